"""A fitted alternating minimization: what cells held out choose, predictions and how sure they are.

The factors of a label are known as well as its cells tell: of a mode's row ``x_i`` the covariance, in multiples of the
noise's variance, is taken as ``Q (W_i D + 1)^-1 Q'``, the preconditioner of `alternating_rows`. The variance of a
prediction is the sum over modes, as if the other modes' factors were right; what that leaves out is learned from
residuals of cells held out (`probtensor.calibration`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probtensor.calibration import ScaleMixture
from probtensor.comm import Comm
from probtensor.models.alternating_fit import Cells, Problem, Run, Settings, Tables, choose_ridge, start_tables, sweeps
from probtensor.models.alternating_rows import whiten
from probtensor.models.completion_stacking import LEAST_VARIANCE, calibrate

__all__ = ["Fitted", "fit_alternating", "fitted_from_state", "fitted_to_state", "moments"]

MIN_ROWS = 30  # of fewer none are held out
PLAIN_RIDGE = 1.0  # where nothing chooses
CALIBRATION_ROWS = 20_000  # more say no more
CHUNK = 2**22  # numbers in memory at a time


class Fitted(NamedTuple):
    """Everything that predicts standardised values; tables have one row more, of means, for unknown labels.

    Attributes
    ----------
    tables : Tables
    bases : tuple of Tensor, shape (R, R)
        ``Q`` of each mode, effects among its columns.
    curvatures : tuple of Tensor, shape (R,)
        ``D``.
    totals : tuple of Tensor, shape (size,)
        Summed weights of each label's cells.
    ridge, noise_variance : float
    mixture : ScaleMixture
        Of the residuals of cells held out.
    run : Run
        The last sweeps.
    tried : dict of float to float
        Mean square on cells held out by ridge.
    """

    tables: Tables
    bases: tuple[Tensor, ...]
    curvatures: tuple[Tensor, ...]
    totals: tuple[Tensor, ...]
    ridge: float
    noise_variance: float
    mixture: ScaleMixture
    run: Run
    tried: dict[float, float]


def fit_alternating(
    cells: Cells,
    share: Tensor,
    held_out: float,
    settings: Settings,
    ridge: float | None,
    generator: torch.Generator,
    comm: Comm,
    report: Callable[[float], None] | None = None,
) -> Fitted:
    """Fit to the cells of all ranks: without some, which choose the ridge and show how values scatter; then to all.

    Parameters
    ----------
    cells : Cells
        Of this rank.
    share : Tensor, shape (n,)
        A number of each cell, uniform between 0 and 1, from what it holds.
    held_out : float
        Share of the cells.
    settings : Settings
    ridge : float, or None
        None: chosen.
    generator : torch.Generator
        In the same state on all ranks.
    comm : Comm
    report : callable, optional
        Called after each sweep with the mean square of what it left.
    """
    out = share < held_out
    n_in, n_out = comm.sum(torch.tensor([int((~out).sum()), int(out.sum())])).tolist()
    mixture = ScaleMixture(1.0, torch.ones(1).double(), torch.ones(1).double())
    tried = dict[float, float]()
    if n_in + n_out < MIN_ROWS or min(n_in, n_out) == 0:
        problem = Problem.of(cells, settings, comm)
        ridge = PLAIN_RIDGE if ridge is None else ridge
        run = sweeps(problem, start_tables(problem, generator), ridge, settings.max_iter, settings.tol, report)
        few = n_in + n_out < MIN_ROWS
        left = problem.cells.values - (0.0 if few else run.tables.predict(problem.cells.labels))
        square = problem.loss(left)
        noise = max(square / float(problem.views[0].total.sum()), LEAST_VARIANCE)
        return _fitted(problem, run, ridge, noise, mixture, tried)
    problem, hidden = Problem.of(cells.take(~out), settings, comm), cells.take(out)
    tables = start_tables(problem, generator)
    if ridge is None:
        ridge, run, tried = choose_ridge(problem, tables, hidden, report)
        tables = run.tables
    run = sweeps(problem, tables, ridge, settings.max_iter, settings.tol, report)
    part = _fitted(problem, run, ridge, 1.0, mixture, tried)
    mean, spread, _ = moments(part, hidden.labels)
    weight = torch.ones_like(mean) if hidden.weight is None else hidden.weight
    residual = hidden.values - mean
    sums = torch.stack([(weight * residual**2).sum(), (weight * (1 + spread)).sum()])
    lost, expected = comm.sum(sums).tolist()
    noise = max(lost / expected, LEAST_VARIANCE)
    rows = _gather(torch.stack([share[out], residual, noise * spread], dim=1), comm)
    some = rows[np.argsort(rows[:, 0], kind="stable")[:CALIBRATION_ROWS]]
    mixture = calibrate(some[:, 1], some[:, 2], noise)
    problem = Problem.of(cells, settings, comm)
    run = sweeps(problem, run.tables, ridge, settings.max_iter, settings.tol, report)
    return _fitted(problem, run, ridge, noise, mixture, tried)


def _fitted(
    problem: Problem, run: Run, ridge: float, noise: float, mixture: ScaleMixture, tried: dict[float, float]
) -> Fitted:
    bases, curvatures, totals = [], [], tuple(view.total for view in problem.views)
    for mode in range(len(problem.views)):
        values, basis = whiten(problem.second_moment(mode, run.tables.factors), problem.strength(ridge))
        bases.append(basis.contiguous())  # as a file gives it back, so that products have the same bits
        curvatures.append(values)
    factors, effects = [], []
    for factor, effect, total in zip(*run.tables, totals, strict=True):
        seen = total > 0
        factors.append(torch.cat([factor, factor[seen].mean(dim=0, keepdim=True)]))
        effects.append(torch.cat([effect, effect[seen].mean(dim=0, keepdim=True)]))
    tables = Tables(tuple(factors), tuple(effects))
    return Fitted(tables, tuple(bases), tuple(curvatures), totals, ridge, noise, mixture, run, tried)


def moments(fitted: Fitted, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions (n,) at labels (n, N), -1 for unknown ones; their variances in multiples of the noise's; and more.

    The third are the variances of what unknown labels bring: as much as the labels that are known differ.
    """
    step = max(1, CHUNK // len(fitted.curvatures[0]) ** 2)
    parts = [_variances(fitted, labels[first : first + step]) for first in range(0, max(len(labels), 1), step)]
    mean = fitted.tables.predict(labels)
    return mean, torch.cat([known for known, _ in parts]), torch.cat([strange for _, strange in parts])


def _variances(fitted: Fitted, labels: Tensor) -> tuple[Tensor, Tensor]:
    factors, effects = fitted.tables
    rows = [factor[column] for factor, column in zip(factors, labels.T, strict=True)]
    variance, strange = torch.zeros_like(rows[0][:, 0]), torch.zeros_like(rows[0][:, 0])
    for mode, (basis, curvature, total) in enumerate(zip(fitted.bases, fitted.curvatures, fitted.totals, strict=True)):
        design = torch.ones_like(rows[0])
        for other, row in enumerate(rows):
            design = design if other == mode else design * row
        if len(basis) > design.shape[1]:
            design = torch.cat([design, design.new_ones(len(design), 1)], dim=1)
        column = labels[:, mode]
        weight = torch.where(column < 0, torch.inf, total[column])[:, None]
        share = torch.where(torch.isinf(weight), 0.0, 1 / (weight * curvature + 1))
        variance += ((design @ basis) ** 2 * share).sum(dim=1)
    new = (labels < 0).any(dim=1).nonzero()[:, 0]
    if len(new):
        second = first = torch.ones(1, dtype=variance.dtype, device=variance.device)
        for factor, effect, row, column, total in zip(factors, effects, rows, labels.T, fitted.totals, strict=True):
            seen, unknown, outer = total > 0, column[new] < 0, row[new][:, :, None] * row[new][:, None, :]
            known = factor[:-1][seen]
            second = second * torch.where(unknown[:, None, None], known.T @ known / len(known), outer)
            first = first * outer
            strange[new] += torch.where(unknown, effect[:-1][seen].var(correction=0), 0.0)
        strange[new] += (second - first).sum(dim=(1, 2)).clamp(min=0)
    return variance, strange


def _gather(rows: Tensor, comm: Comm) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rows (m, c) of all ranks."""
    parts = comm.gather_bytes(rows.double().cpu().numpy().tobytes())
    return np.concatenate([np.frombuffer(part).reshape(-1, rows.shape[1]) for part in parts])


def fitted_to_state(fitted: Fitted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and JSON values of a fitted model, all but its parameters and axes."""
    lists = {"factor": fitted.tables.factors, "effect": fitted.tables.effects, "basis": fitted.bases}
    lists |= {"curvature": fitted.curvatures, "total": fitted.totals}
    arrays = {f"{name}.{k}": array for name, parts in lists.items() for k, array in enumerate(parts)}
    arrays |= {"scales": fitted.mixture.scales, "scale_weights": fitted.mixture.weights}
    arrays["history"] = torch.tensor(fitted.run.history, dtype=torch.float64)
    arrays["tried"] = torch.tensor(list(fitted.tried.items()), dtype=torch.float64).reshape(-1, 2)
    return arrays, {
        "ridge": fitted.ridge.hex(),
        "noise_variance": fitted.noise_variance.hex(),
        "inflation": fitted.mixture.inflation,
        "converged": fitted.run.converged,
    }


def fitted_from_state(arrays: dict[str, Tensor], meta: dict[str, Any], device: torch.device) -> Fitted:
    """What `fitted_to_state` was given."""

    def parts(name: str) -> tuple[Tensor, ...]:
        n_modes = sum(key.startswith("factor.") for key in arrays)
        return tuple(arrays[f"{name}.{k}"].to(device) for k in range(n_modes))

    tables = Tables(parts("factor"), parts("effect"))
    alone = Tables(tuple(part[:-1] for part in tables.factors), tuple(part[:-1] for part in tables.effects))
    return Fitted(
        tables,
        parts("basis"),
        parts("curvature"),
        parts("total"),
        float.fromhex(meta["ridge"]),
        float.fromhex(meta["noise_variance"]),
        ScaleMixture(meta["inflation"], arrays["scales"], arrays["scale_weights"]),
        Run(alone, arrays["history"].tolist(), meta["converged"]),
        {ridge: lost for ridge, lost in arrays["tried"].tolist()},
    )
