"""The whole fit of a functional tensor model: hold rows out, fit, calibrate on them, go on with all rows."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from probtensor.calibration import MIN_RESIDUALS, ScaleMixture, fit_scale_mixture
from probtensor.cells import merge_rows, single_rows
from probtensor.comm import Comm
from probtensor.inference.message_passing import Result, run
from probtensor.likelihoods import Entries, StudentT
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_tucker import LIGHT_TAILS, WARM_UP, FunctionalTucker
from probtensor.models.observation import Observation, SeenCells
from probtensor.models.relevance import contributions, prune

__all__ = ["Fitted", "Table", "everywhere", "fit", "look_at_cells", "renewed", "spread_cells", "table_rows"]

MAX_HELD_OUT = 20_000  # rows to calibrate on; more say nothing new


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one rank.

    Attributes
    ----------
    positions : Tensor, shape (n, K), int64
    values : Tensor, shape (n,)
        Standardised.
    count, precision : Tensor, shape (n,), or None
        How often each row counts; one over the known variance of its value.
    number : Tensor, shape (n,), int64
        The row's number among those of all ranks.
    """

    positions: Tensor
    values: Tensor
    count: Tensor | None
    precision: Tensor | None
    number: Tensor

    def take(self, rows: Tensor) -> "Table":
        """Some of the rows, by a mask or by indexes."""
        count = None if self.count is None else self.count[rows]
        precision = None if self.precision is None else self.precision[rows]
        return Table(self.positions[rows], self.values[rows], count, precision, self.number[rows])


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit ends with; from each of `phase_starts` on, `bound_history` is the bound of another model."""

    model: FunctionalTucker
    state: State
    observation: Observation | None
    bound_history: list[float]
    phase_starts: tuple[int, ...]
    relevance: Tensor
    converged: bool
    stop_reason: str


def fit(
    model: FunctionalTucker,
    table: Table,
    comm: Comm,
    *,
    generator: torch.Generator,
    held_out: float | None,
    prune_below: float,
    max_iter: int,
    tol: float,
    n_init: int,
    progress: bool,
) -> Fitted:
    """Fit the model.

    Parameters
    ----------
    model : FunctionalTucker
    table : Table
        Rows of this rank; with a nugget, all rows of a cell on one rank (`spread_cells`).
    comm : Comm
    generator : torch.Generator
        In the same state on every rank.
    held_out : float or None
        Share of the rows to calibrate on; 0: none; None: a tenth, where that is enough.
    prune_below : float
        Components that contribute less, in standard deviations of the values, are dropped.
    max_iter, tol, n_init, progress
        See `probtensor.inference.message_passing.run`.

    Returns
    -------
    Fitted
    """
    count = table.values.new_tensor([table.values.shape[0]])
    total = int(comm.sum(count))
    share = held_out if held_out is not None else (0.1 if 0.1 * total >= MIN_RESIDUALS else 0.0)
    location_scale = model.likelihood is None or model.likelihood.location_scale
    share = min(share, MAX_HELD_OUT / total) if location_scale else 0.0

    def sweeps(model: FunctionalTucker, rows: Rows, n: int, least: int, state: State | None) -> Result[State]:
        return run(
            model,
            rows,
            comm=comm,
            generator=generator,
            max_iter=n,
            tol=tol,
            scale=float(total),
            n_init=n_init,
            min_iter=least,
            state=state,
            progress=progress,
        )

    first = LIGHT_TAILS if model.likelihood is not None and model.likelihood.light_tailed() != model.likelihood else 0
    draw = uniform(table.number, int(torch.randint(2**62, (1,), generator=generator)))
    held = draw < share

    kept = table.take(~held)
    rows, cells = table_rows(model, kept)
    calibrating = share > 0
    with _no_convergence_warning(calibrating):
        result = sweeps(model, rows, max_iter, max(first, WARM_UP) + 4, None)
    history, phases = result.bound_history, [0, first] if 0 < first < result.n_iter else [0]
    smaller, state = prune(model, result.state, rows, comm, prune_below)
    calibration: tuple[ScaleMixture, ...] = ()
    if calibrating:
        observation = _observation(smaller, state, rows, cells, table, comm)
        calibration = _calibrate(smaller, state, observation, table.take(held), comm)
        rows, cells = table_rows(smaller, table)
    if calibrating or smaller is not model:
        model = smaller
        phases.append(result.n_iter)
        left = max(max_iter - result.n_iter, min(max_iter, WARM_UP))
        result = sweeps(model, rows, left, WARM_UP, state)
        state, history = result.state, history + result.bound_history
    found = None
    if location_scale:
        found = _observation(model, state, rows, cells, table, comm)
        found = replace(found, seen=everywhere(found.seen, comm), calibration=calibration)
    relevance = contributions(model, state, rows, comm)
    return Fitted(model, state, found, history, tuple(phases), relevance, result.converged, result.stop_reason)


def spread_cells(table: Table, comm: Comm) -> Table:
    """The rows dealt anew among the ranks, so that all rows of a cell are on one."""
    if comm.size == 1:
        return table
    n = table.values.shape[0]
    to = torch.zeros(n, dtype=torch.int64)
    for position in table.positions.cpu().T:
        to = _mix(to * 1_000_003 + position)
    count = torch.ones_like(table.values) if table.count is None else table.count
    precision = torch.ones_like(table.values) if table.precision is None else table.precision
    columns = [*table.positions.T.to(count), table.values, count, precision, table.number.to(count)]
    moved = comm.exchange(torch.stack(columns, dim=1), to % comm.size)
    order = torch.argsort(moved[:, -1])  # the sums over rows then do not depend on who held them before
    moved = moved[order]
    K = table.positions.shape[1]
    return Table(
        moved[:, :K].long(),
        moved[:, K],
        None if table.count is None else moved[:, K + 1],
        None if table.precision is None else moved[:, K + 2],
        moved[:, K + 3].long(),
    )


def uniform(number: Tensor, seed: int) -> Tensor:
    """A uniform number in [0, 1) for each row number (n,): the same whichever rank holds the row."""
    return (_mix(number.cpu() + seed).double() / 2.0**63).to(number.device)


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers into [0, 2^63): splitmix64 (Steele, Lea, Flood 2014)."""
    z = x.numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def table_rows(model: FunctionalTucker, table: Table) -> tuple[Rows, Tensor]:
    """The rows as the model takes them, and the positions (C, K) of their entries."""
    likelihood, count, precision = model.likelihood, table.count, table.precision
    if likelihood is None:
        return Rows(table.positions.T.contiguous(), table.values, count), table.positions
    if isinstance(likelihood, StudentT) and likelihood.nugget:
        cells = merge_rows(table.positions, table.values, count, precision)
        return Rows(cells.positions.T.contiguous(), cells.entries.value, None, cells.entries), cells.positions
    entries = single_rows(table.values, count, precision)
    return Rows(table.positions.T.contiguous(), table.values, None, entries), table.positions


def _observation(
    model: FunctionalTucker, state: State, rows: Rows, cells: Tensor, table: Table, comm: Comm
) -> Observation:
    """How values come from entries under a state."""
    likelihood, seen = model.likelihood, None
    if isinstance(likelihood, StudentT) and likelihood.nugget:
        assert rows.entries is not None
        seen = look_at_cells(likelihood, state.log_parameters, cells, rows.entries, *model.at_rows(state, rows))
    typical = 1.0
    if table.precision is not None:
        sums = comm.sum(torch.stack([(1 / table.precision).sum(), table.values.new_tensor(float(len(table.values)))]))
        typical = float(sums[0] / sums[1])
    return renewed(model, state, Observation(typical, 0.0, math.inf, None), seen)


def renewed(model: FunctionalTucker, state: State, observation: Observation, seen: SeenCells | None) -> Observation:
    """The observation model under another state, with other cells; known noise and calibration stay."""
    likelihood = model.likelihood
    if likelihood is None:
        shape, rate = state.noise
        return replace(observation, noise_variance=float(rate / (shape - 1) if shape > 1 else rate / shape))
    assert isinstance(likelihood, StudentT)
    named = dict(zip(likelihood.parameters, state.log_parameters.exp().tolist(), strict=True))
    return replace(
        observation,
        noise_variance=named.get("noise_variance", observation.noise_variance),
        nugget_variance=named.get("nugget_variance", 0.0),
        dof=named["dof"] if likelihood.dof is None else float(likelihood.dof),
        seen=seen,
    )


def look_at_cells(
    likelihood: StudentT, log_parameters: Tensor, cells: Tensor, entries: Entries, mean: Tensor, variance: Tensor
) -> SeenCells:
    """What is known of the residuals of cells at positions (C, K), where ``f`` has the given moments (C,)."""
    residual = likelihood.residual(log_parameters, entries, mean, variance)
    # Gaussian tails: infinite shape and rate, a weight of one.
    shape, rate = (x.masked_fill(x.isinf(), 1.0) for x in (residual.shape, residual.rate))
    count, weight, value, scatter, log_weight = entries
    known = residual.shrink, residual.variance, shape, rate
    return SeenCells(cells, value, *known, count, weight, scatter, log_weight)


def _calibrate(
    model: FunctionalTucker, state: State, observation: Observation, held: Table, comm: Comm
) -> tuple[ScaleMixture, ...]:
    """Scale mixtures of the held-out residuals of all ranks: one, or one each for new and for seen cells."""
    mean, variance = model.at_rows(state, Rows(held.positions.T.contiguous(), held.values))
    residual = observation.residual(held.positions if observation.seen is not None else None, mean)
    location, latent, noise = observation.moments(mean, variance, residual)
    columns = [held.number.to(mean), held.values - location, latent, noise, (residual.cell >= 0).to(mean)]
    mine = torch.stack(columns, dim=1).cpu()
    parts = [np.frombuffer(data, dtype=np.float64) for data in comm.gather_bytes(mine.numpy().tobytes())]
    rows = torch.from_numpy(np.concatenate(parts).reshape(-1, len(columns)))
    rows = rows[torch.argsort(rows[:, 0])]
    known = rows[:, 4] > 0
    kinds = [rows[~known], rows[known]]
    if min(map(len, kinds)) < MIN_RESIDUALS:
        kinds = [rows]
    if len(kinds[0]) < MIN_RESIDUALS:
        return ()
    return tuple(fit_scale_mixture(*kind[:, 1:4].T) for kind in kinds)


def everywhere(seen: SeenCells | None, comm: Comm) -> SeenCells | None:
    """The cells of all ranks, on every rank: each can predict, and save, all of them."""
    if seen is None or comm.size == 1:
        return seen
    K, like = seen.positions.shape[1], seen.value
    mine = torch.stack([*seen.positions.T.to(like), *seen[1:]], dim=1).cpu()
    parts = [np.frombuffer(data, dtype=np.float64) for data in comm.gather_bytes(mine.numpy().tobytes())]
    cells = torch.from_numpy(np.concatenate(parts).reshape(-1, mine.shape[1])).to(like.device)
    return SeenCells(cells[:, :K].long(), *cells[:, K:].T.contiguous())


@contextmanager
def _no_convergence_warning(quiet: bool) -> Iterator[None]:
    """The fit before the last one need not converge: what counts is where the last one ends."""
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", ConvergenceWarning)
        yield
