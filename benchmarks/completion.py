"""Neural tensor completion on five public tables, beside the mean, additive effects and boosted trees.

Rows are split as the released code of DAIN does it: a tenth for the test by scikit-learn's `train_test_split`; what a
method sets aside to choose its settings comes out of the other nine tenths. Peers are in `completion_peers`.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import train_test_split

from benchmarks.completion_peers import PEERS, Impossible, Integers, Method, biases
from benchmarks.datasets import Floats
from probtensor.metrics import rmse
from probtensor.models import NeuralTensorCompletion

__all__ = ["COMPLETION_SETS", "METHODS", "completion_lines", "load_cells"]

COMPLETION_SETS = {  # name of the file, decimals shown
    "synthetic": ("dain_synthetic10k", 4),
    "movielens": ("movielens_latest_small_2016", 4),
    "taxi": ("nyc2019_taxi_fares", 3),
    "delay": ("nyc2013_flight_delay", 3),
    "weather": ("nyc2013_weather", 4),
}
PROTOCOL = (
    "Test: a tenth of the cells, by the split's number. A fifth of the others (18 % of all) chooses settings and "
    "stops training early: MF, CP, CoSTCo and the MLP train on 72 %; additive effects, TensorLy and FunBaT are fitted "
    "again to 90 %, as boosting and NeuralTensorCompletion are, which set rows aside themselves."
)


def load_cells(folder: Path, name: str) -> tuple[Integers, Floats]:
    """Positions (n, K) and values (n,) of the observed cells; weather has mean 0 and variance 1 in each variable."""
    with np.load(folder / f"{COMPLETION_SETS[name][0]}.npz", allow_pickle=False) as data:
        if name != "weather":
            return data["idx"].astype(np.int64), data["val"].astype(np.float64)
        x = data["x"].astype(np.float64)
    x = (x - np.nanmean(x, axis=(0, 1, 2))) / np.nanstd(x, axis=(0, 1, 2))
    index = np.argwhere(np.isfinite(x))
    return index, x[tuple(index.T)]


def mean(X: Integers, y: Floats, X_test: Integers, seed: int) -> tuple[Floats, None]:
    return np.full(len(X_test), y.mean()), None


def boosting(X: Integers, y: Floats, X_test: Integers, seed: int) -> tuple[Floats, None]:
    """scikit-learn's gradient boosting on the labels' numbers; it stops early by a tenth of the rows."""
    settings = {"max_iter": 1000, "early_stopping": True, "random_state": seed}
    return HistGradientBoostingRegressor(**settings).fit(X, y).predict(X_test), None


def ours(X: Integers, y: Floats, X_test: Integers, seed: int, **settings: object) -> tuple[Floats, Floats]:
    model = NeuralTensorCompletion(random_state=seed, progress=False, device="cpu", **settings).fit(X, y)  # type: ignore[arg-type]
    return model.predict(X_test), np.stack(model.predict_interval(X_test, 0.9))


def effects(X: Integers, y: Floats, X_test: Integers, seed: int) -> tuple[Floats, Floats]:
    return ours(X, y, X_test, seed, head=None, rank=0)


METHODS: dict[str, tuple[str, Method]] = {  # name on the command line: label, method
    "mean": ("global mean", mean),
    "effects": ("additive effects, ridge chosen", biases),
    "trees": ("HistGradientBoosting on label codes", boosting),
    **PEERS,
    "ours-effects": ("NeuralTensorCompletion(rank=0, head=None): effects alone", effects),
    "ours": ("**NeuralTensorCompletion()**", ours),
}


def completion_lines(
    folder: Path, names: list[str], seeds: list[int], methods: Sequence[str] = tuple(METHODS)
) -> Iterator[str]:
    """A table a data set: test RMSE, share of test values inside 90 % intervals, and seconds, over splits."""
    yield from (PROTOCOL, "")
    for name in names:
        X, y = load_cells(folder, name)
        digits = COMPLETION_SETS[name][1]
        yield from (f"{name}: {len(y)} cells, {X.shape[1]} modes, splits {seeds}", "")
        yield from ("| | RMSE | of each split | inside 90 % | seconds |", "|---|---|---|---|---|")
        for label, method in (METHODS[short] for short in methods):
            try:
                yield f"| {label} | {_row(method, X, y, seeds, digits)} |"
            except Impossible as reason:
                yield f"| {label} | impossible: {reason} | – | – | – |"
        yield ""


def _row(method: Method, X: Integers, y: Floats, seeds: list[int], digits: int) -> str:
    errors, inside, seconds = [], [], []
    for seed in seeds:
        train, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=seed)
        start = time.perf_counter()
        predicted, ends = method(X[train], y[train], X[test], seed)
        seconds.append(time.perf_counter() - start)
        errors.append(rmse(y[test], predicted))
        if ends is not None:
            inside.append(float(np.mean((ends[0] <= y[test]) & (y[test] <= ends[1]))))
    spread = f" ± {np.std(errors, ddof=1):.{digits}f}" if len(errors) > 1 else ""
    each = " ".join(f"{error:.{digits}f}" for error in errors)
    covered = f"{100 * np.mean(inside):.1f} %" if inside else "–"
    return f"{np.mean(errors):.{digits}f}{spread} | {each} | {covered} | {np.mean(seconds):.1f}"
