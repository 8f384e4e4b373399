"""Neural tensor completion on five public tables, beside the mean, additive effects and boosted trees.

Rows are split as the released code of DAIN does it: a tenth for the test by scikit-learn's `train_test_split`; what a
method sets aside to choose its settings comes out of the other nine tenths. Peers are in `completion_peers`.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from benchmarks.completion_peers import PEERS, Impossible, Integers, Method, biases
from benchmarks.datasets import Floats
from probtensor.estimator import TensorRegressor, UnknownLabelWarning
from probtensor.metrics import rmse
from probtensor.models import BayesianCP, NeuralTensorCompletion
from probtensor.predictive import Predictive

__all__ = ["COMPLETION_SETS", "METHODS", "completion_lines", "in_processes", "load_cells", "predictive_of"]

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


def mixture(X: Integers, y: Floats, X_test: Integers, seed: int) -> tuple[Floats, Floats]:
    found = predictive_of(BayesianCP(n_members=5, random_state=seed, progress=False, device="cpu"), X, y, X_test)
    return found.mean, np.stack(found.interval(0.9))


def predictive_of(model: TensorRegressor, X: Integers, y: Floats, X_test: Integers) -> Predictive:
    """Predictive distributions, without warnings of labels that were not met and fits that end early."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UnknownLabelWarning)
        return model.fit(X, y).predictive(X_test)


METHODS: dict[str, tuple[str, Method]] = {  # name on the command line: label, method
    "mean": ("global mean", mean),
    "effects": ("additive effects, ridge chosen", biases),
    "trees": ("HistGradientBoosting on label codes", boosting),
    **PEERS,
    "ours-effects": ("NeuralTensorCompletion(rank=0, head=None): effects alone", effects),
    "ours": ("**NeuralTensorCompletion()**", ours),
    "mixture": ("**BayesianCP(n_members=5)**", mixture),
}


def in_processes(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int) -> dict[Any, Any]:
    """Results by task, so many at a time, each in a process of its own; with one job in this one."""
    if jobs == 1:
        return {task: function(*task) for task in tasks}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(function, *task): task for task in tasks}
        for future in as_completed(futures):
            print(*futures[future][1:], future.result(), file=sys.stderr, flush=True)
        return {task: future.result() for future, task in futures.items()}


def completion_lines(
    folder: Path, names: list[str], seeds: list[int], methods: Sequence[str] = tuple(METHODS), jobs: int = 1
) -> Iterator[str]:
    """A table a data set: test RMSE, share of test values inside 90 % intervals, and seconds, over splits."""
    tasks = [(folder, name, short, seed) for name in names for short in reversed(methods) for seed in seeds]
    found = in_processes(one_split, tasks, jobs)
    yield from (PROTOCOL, "")
    for name in names:
        digits = COMPLETION_SETS[name][1]
        X, _ = load_cells(folder, name)
        yield from (f"{name}: {len(X)} cells, {X.shape[1]} modes, splits {seeds}", "")
        yield from ("| | RMSE | of each split | inside 90 % | seconds |", "|---|---|---|---|---|")
        for short in methods:
            yield f"| {METHODS[short][0]} | {_row([found[folder, name, short, seed] for seed in seeds], digits)} |"
        yield ""


def one_split(folder: Path, name: str, short: str, seed: int) -> tuple[float, float | None, float] | str:
    """Test RMSE, share inside 90 % intervals, seconds; or why there is none."""
    torch.set_num_threads(1)
    X, y = load_cells(folder, name)
    train, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=seed)
    start = time.perf_counter()
    try:
        predicted, ends = METHODS[short][1](X[train], y[train], X[test], seed)
    except Impossible as reason:
        return str(reason)
    inside = None if ends is None else float(np.mean((ends[0] <= y[test]) & (y[test] <= ends[1])))
    return rmse(y[test], predicted), inside, time.perf_counter() - start


def _row(found: Sequence[tuple[float, float | None, float] | str], digits: int) -> str:
    if isinstance(found[0], str):
        return f"impossible: {found[0]} | – | – | –"
    errors, inside, seconds = (list(column) for column in zip(*found, strict=True))
    spread = f" ± {np.std(errors, ddof=1):.{digits}f}" if len(errors) > 1 else ""
    each = " ".join(f"{error:.{digits}f}" for error in errors)
    covered = "–" if inside[0] is None else f"{100 * np.mean(inside):.1f} %"
    return f"{np.mean(errors):.{digits}f}{spread} | {each} | {covered} | {np.mean(seconds):.1f}"
