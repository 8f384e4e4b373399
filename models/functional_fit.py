"""The whole fit of a functional tensor model: hold rows out, fit, calibrate on them, go on with all rows."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.calibration import MIN_RESIDUALS, ScaleMixture, fit_scale_mixture, with_tail
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.inference.message_passing import Progress, Result, run
from probtensor.intake import Table
from probtensor.likelihoods import Entries, StudentT
from probtensor.models.functional_stage import Stage, begin_stage, read_stage, write_stage
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_table import table_rows, uniform
from probtensor.models.functional_tucker import COLD_SWEEPS, LIGHT_TAILS, WARM_UP, FunctionalTucker
from probtensor.models.observation import Observation, SeenCells
from probtensor.models.relevance import contributions, prune

__all__ = ["Fitted", "everywhere", "fit", "look_at_cells", "no_convergence_warning", "renewed", "typical_noise"]

MAX_HELD_OUT = 20_000  # rows to calibrate on; more say nothing new


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
    checkpoints: Checkpoints | None = None,
    start: Callable[[list[Rows]], State] | None = None,
) -> Fitted:
    """Fit the model.

    Parameters
    ----------
    model : FunctionalTucker
    table : Table
        Rows of this rank, as `deal` gives them.
    comm : Comm
    generator : torch.Generator
        In the same state on every rank.
    held_out : float or None
        Share of the rows to calibrate on; 0: none; None: a tenth, where that is enough.
    prune_below : float
        Components that contribute less, in standard deviations of the values, are dropped.
    max_iter, tol, n_init, progress
        See `probtensor.inference.message_passing.run`.
    checkpoints : Checkpoints, optional
        Where the state goes while the fit is under way, and where it comes from when the fit goes on.
    start : callable, optional
        Gives the state to start from, for the rows of this rank that are not held out. Default: `n_init` of the model.

    Returns
    -------
    Fitted
    """
    count = table.values.new_tensor([table.values.shape[0]])
    total = int(comm.sum(count))
    share = held_out if held_out is not None else (0.1 if 0.1 * total >= MIN_RESIDUALS else 0.0)
    location_scale = model.likelihood is None or model.likelihood.location_scale
    share = min(share, MAX_HELD_OUT / total) if location_scale else 0.0

    seed = int(torch.randint(2**62, (1,), generator=generator))
    saved = None if checkpoints is None else checkpoints.read()
    at = begin_stage(seed)
    if saved is not None:
        model, at = read_stage(model, *saved, table.values.device)
        generator.set_state(saved[0]["generator"])

    def sweeps(stage: Stage, model: FunctionalTucker, rows: list[Rows], n: int, least: int) -> Result[State]:
        def keep(now: Progress[State]) -> bool:
            assert checkpoints is not None
            due = checkpoints.due()
            if due:
                checkpoints.write(*write_stage(stage._replace(progress=now), model, generator))
            return due

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
            resume=stage.progress,
            after_sweep=None if checkpoints is None else keep,
            progress=progress,
        )

    first = LIGHT_TAILS if model.likelihood is not None and model.likelihood.light_tailed() != model.likelihood else 0
    cold = COLD_SWEEPS if model.likelihood is not None and model.likelihood.cold != 1 else 0
    calibrating = share > 0
    held = uniform(table.key, at.seed) < share

    if not at.is_last:
        rows, cells = table_rows(model, table.take(~held))
        if start is not None:
            first = 0  # what comes before heavy tails is behind it
            if at.progress is None:
                with no_convergence_warning(quiet=True):
                    at = at._replace(progress=Progress(n_init, start(rows), [], None))
        with no_convergence_warning(calibrating):
            result = sweeps(at, model, rows, max_iter, max(first, cold, WARM_UP) + 4)
        history, phases = result.bound_history, (0, first) if 0 < first < result.n_iter else (0,)
        smaller, state = prune(model, result.state, rows, comm, prune_below)
        calibration: tuple[ScaleMixture, ...] = ()
        if calibrating:
            observation = _observation(smaller, state, rows, cells, table, comm)
            calibration = _calibrate(smaller, state, observation, table.take(held), comm)
        again = calibrating or smaller is not model
        if again:
            phases = (*phases, result.n_iter)
        at = Stage(at.seed, again, Progress(n_init, state, [], None), history, phases, calibration)
        model = smaller
    if at.is_last:
        rows, cells = table_rows(model, table)
        assert at.progress is not None
        n_rows, square = comm.sum(*add_up(model.local_start(part)[:2] for part in rows))
        state = at.progress.state._replace(n_rows=n_rows, square=square)
        at = at._replace(progress=at.progress._replace(state=state))
        left = max(max_iter - len(at.history), min(max_iter, WARM_UP))
        result = sweeps(at, model, rows, left, WARM_UP)
        state, history = result.state, at.history + result.bound_history
    found = None
    if location_scale:
        found = _observation(model, state, rows, cells, table, comm)
        found = replace(found, seen=everywhere(found.seen, comm), calibration=at.calibration)
    relevance = contributions(model, state, rows, comm)
    return Fitted(model, state, found, history, at.phase_starts, relevance, result.converged, result.stop_reason)


def _observation(
    model: FunctionalTucker, state: State, rows: list[Rows], cells: list[Tensor], table: Table, comm: Comm
) -> Observation:
    """How values come from entries under a state."""
    likelihood, seen = model.likelihood, None
    if isinstance(likelihood, StudentT) and likelihood.nugget:
        looked = []
        for positions, part in zip(cells, rows, strict=True):
            assert part.entries is not None
            moments = model.at_rows(state, part)
            looked.append(look_at_cells(likelihood, state.log_parameters, positions, part.entries, *moments))
        seen = SeenCells(*(torch.cat(x) for x in zip(*looked, strict=True)))
    return renewed(model, state, Observation(typical_noise(table, comm), 0.0, math.inf, None), seen)


def typical_noise(table: Table, comm: Comm) -> float:
    """Mean variance of the rows' noise, of all ranks, where it is given; else 1."""
    if table.precision is None:
        return 1.0
    variances = [1 / part.precision for part in table.blocks() if part.precision is not None]
    sums = comm.sum(*add_up(torch.stack([x.sum(), x.new_tensor(float(len(x)))]) for x in variances))
    return float(sums[0] / sums[1])


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

    def missed(part: Table) -> Tensor:
        mean, variance = model.at_rows(state, Rows(part.positions.T.contiguous(), part.values))
        residual = observation.residual(part.positions if observation.seen is not None else None, mean)
        location, latent, noise = observation.moments(mean, variance, residual)
        return torch.stack(
            [part.key.to(mean), part.values - location, latent, noise, (residual.cell >= 0).to(mean)], dim=1
        )

    mine = torch.cat([missed(part) for part in held.blocks()]).cpu()
    parts = [np.frombuffer(data, dtype=np.float64) for data in comm.gather_bytes(mine.numpy().tobytes())]
    rows = torch.from_numpy(np.concatenate(parts).reshape(-1, mine.shape[1]))
    rows = rows[torch.argsort(rows[:, 0])]
    known = rows[:, 4] > 0
    kinds = [rows[~known], rows[known]]
    if min(map(len, kinds)) < MIN_RESIDUALS:
        kinds = [rows]
    if len(kinds[0]) < MIN_RESIDUALS:
        return ()
    return tuple(with_tail(fit_scale_mixture(*kind[:, 1:4].T), len(kind)) for kind in kinds)


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
def no_convergence_warning(quiet: bool) -> Iterator[None]:
    """The fit before the last one need not converge: what counts is where the last one ends."""
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", ConvergenceWarning)
        yield
