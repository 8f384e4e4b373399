"""Alternating minimization: what a sweep costs, what it recovers, and real tables; conjugate gradients beside Cholesky.

Seconds are CPU time of one thread, so that other work on the machine counts little.
"""

import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from benchmarks.completion_peers import Integers
from benchmarks.datasets import Floats
from probtensor.comm import Serial
from probtensor.estimator import UnknownLabelWarning
from probtensor.metrics import rmse
from probtensor.models import AlternatingMinimization
from probtensor.models.alternating_fit import (
    EFFECTS_RIDGE,
    Cells,
    Problem,
    Settings,
    Tables,
    balanced,
    half_sweep,
    start_tables,
)
from probtensor.models.alternating_rows import whiten
from probtensor.resources import keep_freed_memory

__all__ = ["block_lines", "cost_lines", "load_table", "real_lines", "recovery_lines", "whole_lines"]

SOLVERS = "cg", "exact"
RANKS = 2, 4, 8, 16, 32, 64
PER_LABEL = 100  # cells of a label in the tables that are timed


class Case(NamedTuple):
    """A planted low-rank tensor: labels drawn with probability ``1 / i^skew``, component ``r`` of size ``decay^r``."""

    sizes: tuple[int, ...]
    rank: int
    n: int
    noise: float
    skew: float = 0.0
    decay: float = 1.0

    def __str__(self) -> str:
        shape = " × ".join(str(size) for size in self.sizes)
        more = f", skewed {self.skew:g}, decay {self.decay:g}" if self.skew else ""
        return f"{shape}, rank {self.rank}, {self.n} cells{more}, noise {self.noise:g}"

    def draw(self, seed: int, n_test: int = 20_000) -> tuple[Integers, Floats, Integers, Floats]:
        """Labels and values to fit, of variance 1 and noise; labels and values without noise to test."""
        rng = np.random.default_rng(seed)
        factors = [rng.normal(size=(size, self.rank)) * self.decay ** np.arange(self.rank) for size in self.sizes]

        def labels(n: int) -> Integers:
            shares = [np.arange(1, size + 1) ** -self.skew for size in self.sizes]
            return np.stack([rng.choice(len(share), n, p=share / share.sum()) for share in shares], axis=1)

        def values(at: Integers) -> Floats:
            product = np.ones((len(at), self.rank))
            for factor, column in zip(factors, at.T, strict=True):
                product *= factor[column]
            return product.sum(axis=1)

        X = np.stack(
            np.unravel_index(np.unique(np.ravel_multi_index(labels(self.n).T, self.sizes)), self.sizes), axis=1
        )
        rng.shuffle(X)
        X_test = labels(n_test)
        y, y_test = values(X), values(X_test)
        return X, (y + self.noise * y.std() * rng.normal(size=len(y))) / y.std(), X_test, y_test / y.std()


CASES = (
    Case((1000, 1000), 16, 100_000, 0.1),
    Case((1000, 1000), 16, 100_000, 0.0),
    Case((3000, 3000), 16, 200_000, 0.1, 0.5, 0.9),
    Case((3000, 3000), 16, 200_000, 0.0, 0.5, 0.9),
    Case((1000, 800), 10, 60_000, 0.1, 0.8, 0.7),
    Case((60, 50, 40), 5, 12_000, 0.1),
    Case((100, 100, 100), 8, 30_000, 0.1),
)


def settings(rank: int, solver: str, effects: bool = False, **given: Any) -> Settings:
    default = {"init": "svd", "n_inner": 20, "inner_tol": 0.1, "max_iter": 100, "tol": 0.0}
    return Settings(**{"rank": rank, "solver": solver, "effects": effects} | default | given)


def one_sweep(problem: Problem, tables: Tables, residual: torch.Tensor, ridge: float) -> tuple[Tables, torch.Tensor]:
    strength = problem.strength(ridge)
    for mode in range(len(problem.views)):
        tables, residual = half_sweep(problem, mode, tables, residual, strength)
    return balanced(tables), residual


def cells_of(X: Integers, y: Floats, sizes: Sequence[int]) -> Cells:
    return Cells(torch.from_numpy(X), torch.from_numpy(y), None, tuple(sizes))


def sweep_seconds(X: Integers, y: Floats, sizes: Sequence[int], rank: int) -> dict[str, float]:
    """CPU seconds of a sweep by each solver, the least of some after the first, on the same way down."""
    found = {}
    for solver in SOLVERS:
        problem = Problem.of(cells_of(X, y, sizes), settings(rank, solver), Serial())
        tables = start_tables(problem, torch.Generator().manual_seed(0))
        residual = problem.cells.values - tables.predict(problem.cells.labels)
        times = []
        while len(times) < 4 or (sum(times) < 0.5 and len(times) < 40):
            start = time.process_time()
            tables, residual = one_sweep(problem, tables, residual, 0.1)
            times.append(time.process_time() - start)
        found[solver] = min(times[1:])
        del problem, tables, residual
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def cost_lines(sizes: Sequence[int], ranks: Sequence[int] = RANKS, n_modes: int = 2) -> Iterator[str]:
    """Seconds of a sweep by cells at rank 16, and by rank at the middle of the sizes up to a million cells."""
    middle = max(n for n in sizes if n <= 10**6)
    keep_freed_memory()  # as fits do
    for name, jobs in (
        ("cells", [(n, 16) for n in sizes]),
        ("rank", [(middle, rank) for rank in ranks]),
    ):
        fixed = "rank 16" if name == "cells" else f"{middle} cells"
        labels = f"{PER_LABEL} cells a label" if n_modes == 2 else f"{PER_LABEL} cells a label of each mode"
        yield from (f"### A sweep by {name}, {n_modes} modes, {fixed}, {labels}", "")
        yield from (f"| {name} | cg, seconds | exact, seconds | exact / cg |", "|---|---|---|---|")
        times: dict[str, list[float]] = {solver: [] for solver in SOLVERS}
        for n, rank in jobs:
            size = max(10, n // PER_LABEL)
            X, y, *_ = Case((size,) * n_modes, 8, n, 0.3).draw(0, 1)
            found = sweep_seconds(X, y, (size,) * n_modes, rank)
            for solver in SOLVERS:
                times[solver].append(found[solver])
            cg, exact = found["cg"], found["exact"]
            yield f"| {n if name == 'cells' else rank} | {cg:.2g} | {exact:.2g} | {exact / cg:.2f} |"
        x = [job[name == "rank"] for job in jobs]
        whole = [f"{solver} {slope(x, times[solver]):.2f}" for solver in SOLVERS]
        upper = [f"{solver} {slope(x[-3:], times[solver][-3:]):.2f}" for solver in SOLVERS]
        yield from ("", f"Slopes (log-log): {', '.join(whole)}; of the last three: {', '.join(upper)}.", "")


def recovery_lines(seeds: Sequence[int], cases: Sequence[Case] = CASES, n_sweeps: int = 60) -> Iterator[str]:
    """Errors against the planted tensor: after as many sweeps, and when they come within twice the exact ones' last."""
    yield from (f"Ridge .1 with noise, .001 without; no effects; median of seeds {list(seeds)}; test RMSE.", "")
    yield from (
        "| planted | start | solver | 5 sweeps | 10 | 20 | 60 | seconds of 60 | to 2 × exact's last |",
        "|---" * 9 + "|",
    )
    marks = [5, 10, 20, n_sweeps]
    for case in cases:
        for init in ("svd", "random"):
            paths: dict[str, list[Floats]] = {solver: [] for solver in SOLVERS}
            for seed in seeds:
                for solver in SOLVERS:
                    paths[solver].append(_path(case, solver, init, seed, n_sweeps))
            goals = [2 * path[-1, 1] for path in paths["exact"]]
            for solver in SOLVERS:
                errors = np.median([path[:, 1] for path in paths[solver]], axis=0)
                seconds = np.median([path[-1, 0] for path in paths[solver]])
                reached = []
                for path, goal in zip(paths[solver], goals, strict=True):
                    at = np.flatnonzero(path[:, 1] <= goal)
                    reached.append(path[at[0], 0] if len(at) else np.inf)
                to = np.median(reached)
                shown = " | ".join(f"{errors[mark - 1]:.2g}" for mark in marks)
                when = f"{to:.2f} s" if np.isfinite(to) else "not reached"
                yield f"| {case} | {init} | {solver} | {shown} | {seconds:.2f} | {when} |"
    yield ""


def _path(case: Case, solver: str, init: str, seed: int, n_sweeps: int) -> Floats:
    """CPU seconds and test errors, (n_sweeps, 2)."""
    X, y, X_test, y_test = case.draw(seed)
    problem = Problem.of(cells_of(X, y, case.sizes), settings(case.rank, solver, init=init), Serial())
    at, path, used = torch.from_numpy(X_test), [], 0.0
    tables = start_tables(problem, torch.Generator().manual_seed(seed))
    residual = problem.cells.values - tables.predict(problem.cells.labels)
    for _ in range(n_sweeps):
        start = time.process_time()
        tables, residual = one_sweep(problem, tables, residual, 0.1 if case.noise else 1e-3)
        used += time.process_time() - start
        path.append((used, rmse(y_test, tables.predict(at).numpy())))
    return np.array(path)


REAL = {  # file, modes that are used, rank, share held out for the test, decimals shown
    "MovieLens small, user × film": ("movielens_latest_small_2016", (0, 1), 10, 0.1, 4),
    "taxi fares": ("nyc2019_taxi_fares", None, 10, 0.1, 3),
    "IL-2": ("tensorly_il2_response", None, 20, 0.2, 4),
    "COVID serology": ("tensorly_covid19_serology", None, 10, 0.2, 4),
    "synthetic": ("dain_synthetic10k", None, 10, 0.1, 4),
    "flight delays": ("nyc2013_flight_delay", None, 10, 0.1, 3),
}
WAYS: dict[str, dict[str, Any]] = {
    "cg": {},
    "exact": {"solver": "exact"},
    "cg, random start": {"init": "random"},
    "cg, no effects": {"biases": False},
}


def load_table(folder: Path, name: str) -> tuple[Integers, Floats]:
    """Labels (n, K) and values (n,) of a table in `REAL`."""
    file, modes, *_ = REAL[name]
    with np.load(folder / f"{file}.npz", allow_pickle=False) as data:
        if "x" in data:
            x = data["x"].astype(np.float64)
            index = np.argwhere(np.isfinite(x))
            return index, x[tuple(index.T)]
        index, values = data["idx"].astype(np.int64), data["val"].astype(np.float64)
    return (index if modes is None else index[:, list(modes)]), values


def real_lines(folder: Path, seeds: Sequence[int], names: Sequence[str] = tuple(REAL)) -> Iterator[str]:
    """Test errors of the estimator as it comes, by solver and start, on real tables."""
    yield from ("| table, rank | way | RMSE | of each split | inside 90 % | ridge | seconds |", "|---" * 7 + "|")
    for name in names:
        X, y = load_table(folder, name)
        _, _, rank, share, digits = REAL[name]
        for way, given in WAYS.items():
            rows = []
            for seed in seeds:
                train, test = train_test_split(np.arange(len(y)), test_size=share, random_state=seed)
                start = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    warnings.simplefilter("ignore", UnknownLabelWarning)
                    model = AlternatingMinimization(rank, random_state=seed, progress=False, device="cpu", **given)
                    model.fit(X[train], y[train])
                    seconds = time.process_time() - start
                    error = rmse(y[test], model.predict(X[test]))
                    lower, upper = model.predict_interval(X[test], 0.9)
                inside = np.mean((lower <= y[test]) & (y[test] <= upper))
                rows.append((error, inside, model.ridge_, seconds))
            errors, inside, ridges, seconds = np.array(rows).T
            each = " ".join(f"{error:.{digits}f}" for error in errors)
            chosen = " ".join(f"{ridge:.2g}" for ridge in ridges)
            yield (
                f"| {name}, {rank} | {way} | {errors.mean():.{digits}f} | {each} | {100 * inside.mean():.1f} % "
                f"| {chosen} | {seconds.mean():.1f} |"
            )
    yield ""


BLOCK_RIDGES = {"taxi fares": 3.0, "IL-2": 0.1, "COVID serology": 3.0, "flight delays": 10.0}


def block_lines(folder: Path, names: Sequence[str] = tuple(BLOCK_RIDGES)) -> Iterator[str]:
    """Cyclic against greedy choice of the mode that is solved next: seconds to come near the best loss of all."""
    yield from (
        "Greedy: the mode with the longest gradient (Gauss–Southwell), or the longest in the preconditioner's norm "
        "(Nutini, Laradji, Schmidt 2017), not the last one again; 30 half-sweeps a mode. Half-sweeps and seconds until "
        "the penalised loss is within 5 % and 1 % of the least of all three.",
        "",
    )
    yield from ("| table | choice | to 5 % | to 1 % | loss at the end / least | seconds |", "|---" * 6 + "|")
    cases = [(name, *load_table(folder, name), REAL[name][2], BLOCK_RIDGES[name]) for name in names]
    planted = Case((80, 60, 50, 40), 5, 20_000, 0.1)
    for name, X, y, rank, ridge in [*cases, (str(planted), *planted.draw(0)[:2], 5, 0.1)]:
        sizes = tuple((X.max(axis=0) + 1).tolist())
        problem = Problem.of(cells_of(X, (y - y.mean()) / y.std(), sizes), settings(rank, "cg", True), Serial())
        start = start_tables(problem, torch.Generator().manual_seed(0))
        paths = {choice: _blocks(problem, start, choice, ridge) for choice in ("cyclic", "gradient", "scaled gradient")}
        least = min(path[:, 1].min() for path in paths.values())
        for choice, path in paths.items():
            reached = [np.flatnonzero(path[:, 1] <= least * near) for near in (1.05, 1.01)]
            shown = " | ".join(f"{at[0] + 1}: {path[at[0], 0]:.2f} s" if len(at) else "–" for at in reached)
            yield f"| {name} | {choice} | {shown} | {path[-1, 1] / least:.3f} | {path[-1, 0]:.2f} |"
    yield ""


def _blocks(problem: Problem, tables: Tables, choice: str, ridge: float) -> Floats:
    """CPU seconds and penalised losses after each half-sweep, (m, 2)."""
    strength, n_modes = problem.strength(ridge), len(problem.views)
    residual = problem.cells.values - tables.predict(problem.cells.labels)
    path, used, last = [], 0.0, -1
    for step in range(30 * n_modes):
        start = time.process_time()
        mode = step % n_modes
        if choice != "cyclic":
            lengths = {
                k: _gradient(problem, tables, residual, strength, k, choice) for k in range(n_modes) if k != last
            }
            mode = last = max(lengths, key=lambda k: lengths[k])
        tables, residual = half_sweep(problem, mode, tables, residual, strength)
        used += time.process_time() - start
        penalty = ridge * sum(float((factor**2).sum()) for factor in tables.factors)
        penalty += EFFECTS_RIDGE * sum(float((effect**2).sum()) for effect in tables.effects)
        path.append((used, problem.loss(residual) + penalty))
    return np.array(path)


def _gradient(
    problem: Problem, tables: Tables, residual: torch.Tensor, strength: torch.Tensor, mode: int, choice: str
) -> float:
    """Squared length of the gradient with respect to a mode's tables."""
    view, designs = problem.views[mode], problem.designs(mode, tables.factors, effects=True)
    table = torch.cat([tables.factors[mode], tables.effects[mode][:, None]], dim=1)
    left = designs.pull(view.weighted(residual[view.order])) - table * strength
    if choice == "gradient":
        return float((left**2).sum())
    values, basis = whiten(problem.second_moment(mode, tables.factors), strength)
    return float(((left @ basis) ** 2 / (view.total[:, None] * values + 1)).sum())


def whole_lines(n: int, rank: int) -> Iterator[str]:
    """One fit of the estimator to a large table: seconds of its parts, and the process's largest memory."""
    size = n // PER_LABEL
    X, y, X_test, y_test = Case((size, size), 8, n, 0.3).draw(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.process_time()
    model = AlternatingMinimization(rank, ridge=1.0, held_out=0.0, max_iter=30, progress=False, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield (
        f"`AlternatingMinimization({rank}, ridge=1.0, held_out=0.0)` on {n} cells, {size} × {size}: {seconds:.0f} s, "
        f"{model.n_iter_} sweeps, test RMSE {rmse(y_test, model.predict(X_test)):.3f}; peak memory {peak:.1f} GiB, "
        f"{before:.1f} of it before the fit."
    )
