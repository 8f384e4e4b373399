"""The demonstration behind ``probtensor demo``: real data, a held-out fifth, honest references, one picture."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.baselines import MaskedParafac, PerModeBiases
from probtensor.datasets import load_il2
from probtensor.metrics import coverage, rmse
from probtensor.models import FunBaT
from probtensor.plotting import plot_factors, plot_predictions

__all__ = ["DemoResult", "Score", "run_demo", "split_rows"]

FloatArray = npt.NDArray[np.float64]

CP_RANK = 32
TUCKER_RANK = (4, 3, 4, 4)
PARAFAC_RANKS = (4, 8, 12, 20, 30, 40)
AXES: tuple[Axis, ...] = (
    CategoricalAxis("ligand"),
    ContinuousAxis("time"),
    ContinuousAxis("dose"),
    CategoricalAxis("cell"),
)


class Score(NamedTuple):
    """How one method did on the held-out rows.

    ``coverage`` is the share of held-out values inside the 90 % intervals, None for a method without intervals;
    ``seconds`` is the time of the fit, the choice of a rank included.
    """

    method: str
    rmse: float
    coverage: float | None
    seconds: float


class DemoResult(NamedTuple):
    """Scores of all methods, best first, and the files that were written."""

    scores: tuple[Score, ...]
    picture: Path
    models: tuple[Path, ...]


def run_demo(
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    holdout: float = 0.2,
    cp_rank: int = CP_RANK,
    tucker_rank: int | Sequence[int] = TUCKER_RANK,
    parafac_ranks: Sequence[int] = PARAFAC_RANKS,
    max_iter: int | None = None,
    progress: bool = True,
    echo: Callable[[str], None] = print,
) -> DemoResult:
    """Complete the IL-2 response data with FunBaT, compare with references, draw and save.

    A share `holdout` of the measured cells is hidden, every method sees the same other cells, and all are judged on
    the hidden ones. PARAFAC may choose its rank: it is fitted with each of `parafac_ranks` on seven eighths of the
    training rows, judged on the last eighth, and refitted on all with the best.

    Parameters
    ----------
    out_dir : path-like
        Folder for the files, made if it is not there.
    seed : int, default 0
        Fixes the hidden cells and every random start: the same seed gives the same numbers.
    holdout : float, default 0.2
        Share of the measured cells to hide, between 0 and 1.
    cp_rank : int
        Components of FunBaT in CP form.
    tucker_rank : int or sequence of int
        Ranks of FunBaT in Tucker form, in the order ligand, time, dose, cell.
    parafac_ranks : sequence of int
        Ranks that PARAFAC chooses from.
    max_iter : int, optional
        Iterations of FunBaT at most. By default as many as FunBaT's own default.
    progress : bool, default True
        Whether FunBaT shows its progress.
    echo : callable, default print
        Takes each line of the report.

    Returns
    -------
    DemoResult
        Scores and files.

    Raises
    ------
    ValueError
        If `holdout` is not between 0 and 1.
    OSError
        If the files cannot be written.
    """
    X, y = load_il2()
    train, test = split_rows(len(y), holdout, seed)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    X_train, y_train, X_test, y_test = X.iloc[train], y[train], X.iloc[test], y[test]
    echo(f"IL-2 responses (ligand x time x dose x cell): {len(y_train)} cells to learn from, {len(y_test)} hidden.")

    settings: dict[str, Any] = {"axes": AXES, "random_state": seed, "progress": progress}
    if max_iter is not None:
        settings["max_iter"] = max_iter
    models, scores, files = {}, [], []
    for form, rank in (("cp", cp_rank), ("tucker", tucker_rank)):
        settings |= {"form": form, "rank": rank}
        model = FunBaT(**settings)
        seconds = _timed(partial(model.fit, X_train, y_train))
        lower, upper = model.predict_interval(X_test, coverage=0.9)
        name = f"FunBaT {'CP' if form == 'cp' else 'Tucker'}, rank {_words(rank)}"
        scores.append(Score(name, rmse(y_test, model.predict(X_test)), coverage(y_test, lower, upper), seconds))
        models[form] = model
        files.append(folder / f"il2-{form}.model")
        model.save(files[-1])

    parafac = MaskedParafac(random_state=seed)
    seconds = _timed(partial(_fit_best_rank, parafac, X_train, y_train, parafac_ranks, seed))
    name = f"TensorLy masked PARAFAC, rank {parafac.rank}"
    scores.append(Score(name, rmse(y_test, parafac.predict(X_test)), None, seconds))
    biases = PerModeBiases()
    seconds = _timed(partial(biases.fit, X_train, y_train))
    scores.append(Score("per-mode biases", rmse(y_test, biases.predict(X_test)), None, seconds))

    picture = folder / "il2.png"
    _draw(models["cp"], X_test, y_test, picture)
    ranked = tuple(sorted(scores, key=lambda score: score.rmse))
    for line in _table(ranked, float(np.std(y_test))):
        echo(line)
    echo(f"Latent functions and held-out predictions: {picture}")
    echo(f"Models, for `probtensor info` and `probtensor predict`: {', '.join(map(str, files))}")
    return DemoResult(ranked, picture, tuple(files))


def split_rows(n_rows: int, holdout: float, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Split rows at random into those to learn from and those to hide.

    Parameters
    ----------
    n_rows : int
        Number of rows.
    holdout : float
        Share to hide, between 0 and 1.
    seed : int
        Seed of the split.

    Returns
    -------
    train, test : arrays of int
        Sorted row numbers, at least one each.

    Raises
    ------
    ValueError
        If `holdout` leaves one of the parts empty.

    Examples
    --------
    >>> train, test = split_rows(10, 0.2, seed=0)
    >>> len(train), len(test), np.intersect1d(train, test).size
    (8, 2, 0)
    """
    n_hidden = round(n_rows * holdout) if 0.0 < holdout < 1.0 else 0
    if not 0 < n_hidden < n_rows:
        raise ValueError(f"holdout: expected a share between 0 and 1 that splits {n_rows} rows, got {holdout!r}")
    order = np.random.default_rng(seed).permutation(n_rows)
    return np.sort(order[n_hidden:]), np.sort(order[:n_hidden])


def _fit_best_rank(model: MaskedParafac, X: pd.DataFrame, y: FloatArray, ranks: Sequence[int], seed: int) -> None:
    """Fit with the rank that predicts an eighth of the training rows best; the test rows have no say."""
    inner, judge = split_rows(len(y), 0.125, seed + 1)
    errors = {}
    for rank in ranks:
        model.set_params(rank=rank).fit(X.iloc[inner], y[inner])
        errors[rank] = rmse(y[judge], model.predict(X.iloc[judge]))
    model.set_params(rank=min(errors, key=errors.__getitem__)).fit(X, y)


def _draw(model: FunBaT, X_test: pd.DataFrame, y_test: FloatArray, path: Path) -> None:
    """Draw the functions over time and dose, and predicted against held-out values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    plot_factors(model, ["time", "dose"], max_components=4, axes=panels[:2])
    panels[0].set_xlabel("time after stimulation (hours)")
    panels[1].set_xlabel("dose (log10 nM)")
    interval = model.predict_interval(X_test, 0.9)
    plot_predictions(y_test, model.predict(X_test), interval=interval, level=0.9, ax=panels[2])
    panels[2].set_xlabel("held-out response")
    panels[2].set_ylabel("predicted response")
    figure.savefig(path, dpi=150)


def _table(scores: Sequence[Score], spread: float) -> list[str]:
    """Return the lines of the table of scores."""
    width = max(len(score.method) for score in scores)
    lines = ["", f"{'held-out cells':<{width}}  {'RMSE':>7}  {'in 90 % interval':>16}  {'seconds':>8}"]
    for score in scores:
        inside = "-" if score.coverage is None else f"{100 * score.coverage:.1f} %"
        lines.append(f"{score.method:<{width}}  {score.rmse:7.4f}  {inside:>16}  {score.seconds:8.1f}")
    return [*lines, f"{'(standard deviation of the values)':<{width}}  {spread:7.4f}", ""]


def _words(rank: int | Sequence[int]) -> str:
    return str(rank) if isinstance(rank, int) else "x".join(map(str, rank))


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
