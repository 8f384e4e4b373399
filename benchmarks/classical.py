"""Classical decompositions of two tensors: held-out error, ranks, and what TensorLy's masks let through."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from benchmarks.datasets import Floats
from probtensor.baselines import MaskedNonNegativeParafac, MaskedParafac, MaskedTucker, PerModeBiases
from probtensor.components import core_consistency
from probtensor.datasets import load_il2
from probtensor.demo import split_rows
from probtensor.metrics import rmse
from probtensor.rank_choice import choose_rank
from probtensor.readers import from_dense, to_xarray

MODELS = {
    "PARAFAC": MaskedParafac(random_state=0),
    "non-negative PARAFAC": MaskedNonNegativeParafac(random_state=0),
    "Tucker": MaskedTucker(random_state=0),
}
RANKS = {  # of CP and of Tucker
    "IL-2": ((2, 4, 8, 16, 24), (2, 3, 4, 5, 6)),
    "COVID-19 serology": ((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6)),
}
STORED = ("zero", "mean", "1000", "truth")


def load_serology() -> tuple[pd.DataFrame, Floats]:
    """Antibodies of 438 people: logarithms of 6 antigens times 11 receptors, centred; no cell is missing."""
    from tensorly.datasets import load_covid19_serology

    bunch = load_covid19_serology()
    samples, antigens, receptors = bunch.ticks
    coords = {"sample": np.arange(len(samples)), "antigen": antigens, "receptor": receptors}
    return from_dense(bunch.tensor, coords=coords)


SETS: dict[str, Callable[[], tuple[pd.DataFrame, Floats]]] = {"IL-2": load_il2, "COVID-19 serology": load_serology}


def accuracy_lines(sets: Iterable[str], n_splits: int, folds: int) -> list[str]:
    """A tenth of the cells held out, several times; ranks chosen inside the other cells."""
    lines = []
    for name in sets:
        X, y = SETS[name]()
        lines += [
            "",
            f"**{name}**, {len(y)} cells, standard deviation {y.std():.3f}",
            "",
            "| method | RMSE, mean | splits | rank, best | RMSE, mean | rank, one standard error | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        lines.append(
            _line("per-mode biases", [_held_out(PerModeBiases(), (), X, y, folds, k) for k in range(n_splits)])
        )
        for label, model in MODELS.items():
            ranks = RANKS[name][label == "Tucker"]
            lines.append(_line(label, [_held_out(model, ranks, X, y, folds, seed) for seed in range(n_splits)]))
    return lines


def consistency_lines(sets: Iterable[str], ranks: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> list[str]:
    """Core consistency of PARAFAC fitted to all cells."""
    lines = [f"| set | {' | '.join(f'rank {rank}' for rank in ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for name in sets:
        X, y = SETS[name]()
        X = X.astype(str)  # for labels in the order of the estimator
        tensor = to_xarray(X, y).to_numpy()
        found = []
        for rank in ranks:
            model = MaskedParafac(rank=rank, n_restarts=3, random_state=0).fit(X, y)
            found.append(core_consistency(tensor, model.factors_))
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' if value > -1000 else '< -1000' for value in found)} |")
    return lines


def leak_lines() -> list[str]:
    """What a masked fit says about hidden cells, with different numbers stored in them."""
    import tensorly
    from tensorly.decomposition import non_negative_parafac, parafac, tucker

    rng = np.random.default_rng(0)
    factors = [rng.uniform(size=(n, 2)) for n in (8, 7, 6)]
    truth = np.einsum("ir,jr,kr->ijk", *factors) + 0.01 * rng.normal(size=(8, 7, 6))
    seen = rng.uniform(size=truth.shape) < 0.8
    stored = {"zero": 0.0, "mean": truth[seen].mean(), "1000": 1000.0, "truth": truth}
    peers: dict[str, tuple[Any, Any]] = {"parafac": (parafac, 2), "non_negative_parafac": (non_negative_parafac, 2)}
    peers["tucker"] = (tucker, (2, 2, 2))
    lines = [f"| hidden cells store | {' | '.join(STORED)} |", "|---" * (len(STORED) + 1) + "|"]
    for label, (decompose, rank) in peers.items():
        for start in ("random", "svd"):
            errors = []
            for value in stored.values():
                settings = {"n_iter_max": 1000, "init": start, "random_state": np.random.RandomState(0)}
                tensor = np.where(seen, truth, value)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = decompose(tensor, rank, mask=seen.astype(float), **settings)
                full = tensorly.tucker_to_tensor(found) if label == "tucker" else tensorly.cp_to_tensor(found)
                errors.append(rmse(truth[~seen], full[~seen]))
            lines.append(f'| TensorLy `{label}(mask=, init="{start}")` | {" | ".join(map(_short, errors))} |')
    cells, hidden = np.argwhere(seen), np.argwhere(~seen)
    for model in (MaskedParafac(2), MaskedNonNegativeParafac(2), MaskedTucker(2)):
        fitted = model.set_params(random_state=0).fit(cells, truth[seen])
        error = _short(rmse(truth[~seen], fitted.predict(hidden)))
        lines.append(f"| `{type(model).__name__}`: not given them | {' | '.join([error] * len(STORED))} |")
    return lines


def _held_out(
    model: Any, ranks: Sequence[int], X: pd.DataFrame, y: Floats, folds: int, seed: int
) -> tuple[float, int | None, float, int | None, float]:
    """The error and the rank that was chosen as best, those by one standard error, and the seconds of it all."""
    train, test = split_rows(len(y), 0.1, seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if not ranks:
            error = rmse(y[test], clone(model).fit(X.iloc[train], y[train]).predict(X.iloc[test]))
            return error, None, error, None, time.perf_counter() - start
        choice = choose_rank(model, X.iloc[train], y[train], ranks, folds=folds, random_state=seed)
        seconds = time.perf_counter() - start
        best = choice.table["rmse"].idxmin()
        limit = choice.table["rmse"][best] + choice.table["standard_error"][best]
        small = int(choice.table["rank"][(choice.table["rmse"] <= limit).idxmax()])
        simple = clone(model).set_params(rank=small).fit(X.iloc[train], y[train])
    errors = [rmse(y[test], fitted.predict(X.iloc[test])) for fitted in (choice.estimator, simple)]
    return errors[0], int(choice.rank), errors[1], small, seconds


def _line(label: str, found: list[tuple[float, int | None, float, int | None, float]]) -> str:
    errors, ranks, simple, small, seconds = zip(*found, strict=True)
    splits = " ".join(f"{error:.4f}" for error in errors)
    words = ["-" if None in some else " ".join(map(str, some)) for some in (ranks, small)]
    return (
        f"| {label} | {np.mean(errors):.4f} | {splits} | {words[0]} | {np.mean(simple):.4f} | {words[1]} | "
        f"{np.mean(seconds):.1f} |"
    )


def _short(number: float) -> str:
    return f"{number:.4f}" if number < 10 else f"{number:.3g}"
