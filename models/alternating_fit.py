"""Alternating minimization: the start, the sweeps, the choice of the ridge, and what a fit is made of.

A value at labels ``i`` is ``y = sum_r prod_k U_k[i_k, r] + sum_k b_k[i_k] + e``: a product of matrices for two modes,
CP for more, and effects of labels. A half-sweep is a ridge regression for each label of a mode (`alternating_rows`),
the others as they are; a sweep goes over the modes in turn. Then each component's columns get equal norms, which
changes no prediction and lowers the penalty.

References
----------
Gu, Song, Yin, Zhang (2023), "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time", for
the scheme and its start, the leading singular vectors of the matrix with zeros in its gaps. Sharan, Valiant (2017),
"Orthogonalized ALS: A Theoretically Principled Tensor Decomposition Algorithm for Practical Use", ICML, for the same
with more modes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probtensor.comm import Comm
from probtensor.models.alternating_rows import (
    Designs,
    Ridge,
    View,
    make_view,
    predictor,
    second_moment,
    solve_by_gradients,
    solve_exactly,
    whiten,
)

__all__ = [
    "Cells",
    "Problem",
    "Run",
    "Settings",
    "Tables",
    "balanced",
    "choose_ridge",
    "half_sweep",
    "start_tables",
    "sweeps",
]

EFFECTS_RIDGE = 3.0  # in rows
EFFECTS_SWEEPS, START_ROUNDS = 5, 4
SIZE = 0.3  # root mean square of the start's products, in that of what the effects leave
START_POWER, LEAST_POWER, MOST_POWER = 1, -8, 6  # ridges are powers of the root of ten
TRIAL_SWEEPS = 10


class Settings(NamedTuple):
    """What does not change during a fit; see `AlternatingMinimization`."""

    rank: int
    solver: str
    effects: bool
    init: str
    n_inner: int
    inner_tol: float
    max_iter: int
    tol: float


class Cells(NamedTuple):
    """Cells of this rank: labels (n, N), int64, values (n,), weights (n,) or None, and labels of each mode."""

    labels: Tensor
    values: Tensor
    weight: Tensor | None
    sizes: tuple[int, ...]

    def take(self, rows: Tensor) -> "Cells":
        """Some of them, by a mask or by indexes."""
        weight = None if self.weight is None else self.weight[rows]
        return Cells(self.labels[rows], self.values[rows], weight, self.sizes)


class Tables(NamedTuple):
    """Factors, (size, R), and effects, (size,), of each mode; effects are zero where there are none."""

    factors: tuple[Tensor, ...]
    effects: tuple[Tensor, ...]

    def predict(self, labels: Tensor) -> Tensor:
        """Values (n,) at labels (n, N)."""
        return predictor(self.factors, self.effects, labels)


class Problem(NamedTuple):
    """Cells, sorted by the first mode's labels, and in the order of each mode."""

    cells: Cells
    views: tuple[View, ...]
    settings: Settings
    comm: Comm

    @staticmethod
    def of(cells: Cells, settings: Settings, comm: Comm) -> "Problem":
        """Sort the cells."""
        cells = cells.take(torch.argsort(cells.labels[:, 0], stable=True))  # half of the gathers are then in order
        sizes = enumerate(cells.sizes)
        views = [make_view(cells.labels, mode, size, cells.weight, comm) for mode, size in sizes]
        return Problem(cells, tuple(views), settings, comm)

    def designs(self, mode: int, factors: tuple[Tensor, ...], effects: bool) -> Designs:
        """Of a mode's regressions."""
        return Designs(self.views[mode], [factor for k, factor in enumerate(factors) if k != mode], effects)

    def second_moment(self, mode: int, factors: tuple[Tensor, ...]) -> Tensor:
        """Of a mode's designs, see `second_moment`."""
        totals = [view.total for k, view in enumerate(self.views) if k != mode]
        others = [factor for k, factor in enumerate(factors) if k != mode]
        return second_moment(others, totals, self.settings.effects)

    def strength(self, ridge: float) -> Tensor:
        """Penalty of each column of a mode's table, (R,) or (R + 1,)."""
        columns = [ridge] * self.settings.rank + [EFFECTS_RIDGE] * self.settings.effects
        return torch.tensor(columns, dtype=torch.float64, device=self.cells.values.device)

    def loss(self, residual: Tensor) -> float:
        """Weighted sum of squares over all ranks."""
        squares = residual**2 if self.cells.weight is None else self.cells.weight * residual**2
        return float(self.comm.sum(squares.sum()))


class Run(NamedTuple):
    """Tables after some sweeps, the weighted mean squares of what they left, one a sweep, and whether they settled."""

    tables: Tables
    history: list[float]
    converged: bool


def sweeps(
    problem: Problem, tables: Tables, ridge: float, n: int, tol: float, report: Callable[[float], None] | None = None
) -> Run:
    """Sweeps until the penalised loss falls by less than a share `tol` of itself, `n` at most.

    Parameters
    ----------
    problem : Problem
    tables : Tables
        To start from.
    ridge : float
        Of the factors.
    n : int
    tol : float
    report : callable, optional
        Called with the mean square of each sweep.
    """
    strength, history, before = problem.strength(ridge), list[float](), float("inf")
    total = float(problem.views[0].total.sum())
    residual = problem.cells.values - tables.predict(problem.cells.labels)
    for _ in range(n):
        for mode in range(len(problem.views)):
            tables, residual = half_sweep(problem, mode, tables, residual, strength)
        tables = balanced(tables)
        loss = problem.loss(residual)
        history.append(loss / max(total, 1e-300))
        if report is not None:
            report(history[-1])
        penalty = ridge * sum(float((factor**2).sum()) for factor in tables.factors)
        now = loss + penalty + EFFECTS_RIDGE * sum(float((effect**2).sum()) for effect in tables.effects)
        if before - now <= tol * now:
            return Run(tables, history, True)
        before = now
    return Run(tables, history, n == 0)


def half_sweep(
    problem: Problem, mode: int, tables: Tables, residual: Tensor, strength: Tensor
) -> tuple[Tables, Tensor]:
    """The tables with one mode's solved for, and what they leave of the values, (n,)."""
    settings, whole = problem.settings, problem.views[mode]
    others = [factor for k, factor in enumerate(tables.factors) if k != mode]
    table = tables.factors[mode]
    if settings.effects:
        table = torch.cat([table, tables.effects[mode][:, None]], dim=1)
    found, left = torch.empty_like(table), residual[whole.order]
    whitened = whiten(problem.second_moment(mode, tables.factors), strength)
    first = 0
    for low, high, view in whole.blocks(table.shape[1]):
        designs, end = Designs(view, others, settings.effects), first + len(view.order)
        given = designs, table[low:high], left[first:end], Ridge(strength, torch.ones_like(view.total))
        if settings.solver == "exact":
            found[low:high], left[first:end] = solve_exactly(*given)
        else:
            inner = settings.n_inner, settings.inner_tol
            found[low:high], left[first:end] = solve_by_gradients(*given, whitened, *inner)
        first = end
    table = found
    factors, effects = list(tables.factors), list(tables.effects)
    factors[mode] = table[:, : settings.rank].contiguous()
    if settings.effects:
        effects[mode] = table[:, -1].contiguous()
    return Tables(tuple(factors), tuple(effects)), torch.empty_like(left).index_copy_(0, whole.order, left)


def balanced(tables: Tables) -> Tables:
    """The same predictions by factors whose columns have one norm in all modes."""
    norms = torch.stack([factor.norm(dim=0) for factor in tables.factors])
    target = norms.clamp(min=1e-300).log().mean(dim=0).exp()
    growth = torch.where((norms > 0).all(dim=0), target / norms.clamp(min=1e-300), 0.0)
    return Tables(tuple(factor * by for factor, by in zip(tables.factors, growth, strict=True)), tables.effects)


def start_tables(problem: Problem, generator: torch.Generator) -> Tables:
    """Effects by themselves, and factors that are random, or the leading ones of what the effects leave.

    Parameters
    ----------
    problem : Problem
    generator : torch.Generator
        In the same state on all ranks.
    """
    cells, settings = problem.cells, problem.settings
    like = cells.values

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=like.dtype, device=like.device)

    tables = Tables(tuple(zeros(size, 0) for size in cells.sizes), tuple(zeros(size) for size in cells.sizes))
    if settings.effects:
        alone = problem._replace(settings=settings._replace(rank=0))
        tables = sweeps(alone, tables, 1.0, EFFECTS_SWEEPS, 1e-6).tables
    residual = like - tables.predict(cells.labels)
    drawn = [torch.randn(size, settings.rank, generator=generator, dtype=like.dtype) for size in cells.sizes]
    factors = [part.to(like.device) for part in drawn]
    if settings.init == "svd":
        factors = _leading(problem, factors, residual)
    total = float(problem.views[0].total.sum())
    target = SIZE * (problem.loss(residual) / max(total, 1e-300)) ** 0.5
    size = (problem.loss(predictor(factors, [], cells.labels)) / max(total, 1e-300)) ** 0.5
    scale = (target / size) ** (1 / len(factors)) if size > 0 else 0.0
    return Tables(tuple(factor * scale for factor in factors), tables.effects)


def _leading(problem: Problem, factors: list[Tensor], residual: Tensor) -> list[Tensor]:
    """Leading factors of the sparse tensor of the residuals by orthogonal iteration: of a matrix, singular vectors."""
    weights: Tensor | None = None
    for _ in range(START_ROUNDS):
        for mode, view in enumerate(problem.views):
            pulled = problem.designs(mode, tuple(factors), False).pull(view.weighted(residual[view.order]))
            weights = pulled.norm(dim=0)
            if pulled.shape[0] >= pulled.shape[1]:
                factors[mode] = torch.linalg.qr(pulled)[0]
            else:
                factors[mode] = pulled / weights.clamp(min=1e-300)
    assert weights is not None
    relative = weights / weights.max().clamp(min=1e-300)
    return [factor * relative ** (1 / len(factors)) for factor in factors]


def choose_ridge(
    problem: Problem, start: Tables, held_out: Cells, report: Callable[[float], None] | None = None
) -> tuple[float, Run, dict[float, float]]:
    """The ridge of least squared error on cells held out, the sweeps with it, and mean squares of all that were tried.

    Powers of the root of ten: from one in the middle, in steps of ten to the better side, then the two beside the best.

    Parameters
    ----------
    problem : Problem
        Without the cells held out.
    start : Tables
        That each trial starts from.
    held_out : Cells
    report : callable, optional
        See `sweeps`.
    """
    runs, losses = dict[int, Run](), dict[int, float]()
    weight = torch.ones_like(held_out.values) if held_out.weight is None else held_out.weight

    def loss(power: int) -> float:
        if power not in losses:
            runs[power] = sweeps(problem, start, 10 ** (power / 2), TRIAL_SWEEPS, problem.settings.tol, report)
            error = held_out.values - runs[power].tables.predict(held_out.labels)
            lost, total = problem.comm.sum(torch.stack([(weight * error**2).sum(), weight.sum()])).tolist()
            losses[power] = lost / max(total, 1e-300)
        return losses[power]

    best = START_POWER
    for step in (-2, 2):
        while LEAST_POWER <= best + step <= MOST_POWER and loss(best + step) < loss(best):
            best += step
    for power in (best - 1, best + 1):
        if loss(power) < loss(best):
            best = power
    return 10 ** (best / 2), runs[best], {10 ** (power / 2): lost for power, lost in sorted(losses.items())}
