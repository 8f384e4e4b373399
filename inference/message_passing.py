"""Coordinate ascent by message passing: the loop, its stop, and what it reports.

A model names its blocks; each sweep visits them in order: sums over the rows at hand, one sum over ranks, update. The
model knows nothing of ranks, the loop nothing of the model. All ranks take the same decisions, since they take them on
summed values only.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from tqdm import tqdm

from probtensor.blocks import Total, add_up
from probtensor.comm import Comm

__all__ = ["MessagePassingModel", "Progress", "Result", "run"]

StateT = TypeVar("StateT")
RowsT = TypeVar("RowsT")
BlockT = TypeVar("BlockT")

SCREENING = 10  # sweeps that each of several starts gets before the best goes on
PATIENCE = 2  # sweeps over which the bound's change is judged: one with and one without a step of the hyperparameters
ADVICE = "try damping=0.5, a larger noise_prior, or look for extreme values in y"
SHOW_AFTER = 1.0  # seconds before a progress bar appears


class MessagePassingModel(Protocol[StateT, RowsT, BlockT]):
    """What `run` asks of a model; `probtensor.models.functional_tucker.FunctionalTucker` is one."""

    @property
    def blocks(self) -> Sequence[BlockT]:
        """Blocks in the order of their updates."""
        ...

    def local_start(self, rows: RowsT) -> Tensor:
        """Sums over rows for the start."""
        ...

    def start(self, statistics: Tensor, generator: torch.Generator, trial: int) -> StateT:
        """The first state of a trial."""
        ...

    def begin(self, state: StateT, rows: RowsT) -> RowsT:
        """The rows with what the first sweep of a trial needs to know of them."""
        ...

    def local_statistics(self, state: StateT, block: BlockT, rows: RowsT) -> Tensor:
        """Sums over rows for one block."""
        ...

    def update(self, state: StateT, block: BlockT, statistics: Tensor) -> StateT:
        """The state with one block at its optimum."""
        ...

    def end_sweep(self, state: StateT, parts: Sequence[RowsT], total: Total) -> tuple[StateT, list[RowsT]]:
        """State and rows after the last block; `total` sums what belongs to the parts, over all ranks."""
        ...

    def bound(self, state: StateT) -> Tensor:
        """The evidence lower bound."""
        ...


class Progress(NamedTuple, Generic[StateT]):
    """A run under way.

    Attributes
    ----------
    trial : int
        Which of several starts is tried; as many as there are: the best one goes on.
    state
        The posterior.
    history : list of float
        Its bound after each sweep.
    best : tuple of state and history, or None
        Of the trials before.
    """

    trial: int
    state: StateT
    history: list[float]
    best: tuple[StateT, list[float]] | None


class Result(NamedTuple, Generic[StateT]):
    """What a run ends with.

    Attributes
    ----------
    state
        The posterior.
    bound_history : list of float
        The bound after each sweep.
    n_iter : int
        Sweeps done.
    converged : bool
    stop_reason : str
    """

    state: StateT
    bound_history: list[float]
    n_iter: int
    converged: bool
    stop_reason: str


@torch.no_grad()
def run(
    model: MessagePassingModel[StateT, RowsT, BlockT],
    given: Sequence[RowsT],
    *,
    comm: Comm,
    generator: torch.Generator,
    max_iter: int,
    tol: float,
    scale: float,
    n_init: int = 1,
    min_iter: int = 0,
    resume: Progress[StateT] | None = None,
    after_sweep: Callable[[Progress[StateT]], bool] | None = None,
    progress: bool = True,
) -> Result[StateT]:
    """Sweep until the bound settles.

    Parameters
    ----------
    model : MessagePassingModel
    given : sequence
        This rank's rows in parts: see `probtensor.blocks`. At least one, which may be empty.
    comm : Comm
        Sums over ranks.
    generator : torch.Generator
        In the same state on every rank.
    max_iter : int
        Sweeps at most.
    tol : float
        Stop when the bound changes by less than ``tol * max(abs(bound), scale)`` over two sweeps.
    scale : float
        Size below which a bound counts as zero: the number of rows.
    n_init : int, default 1
        Starts; the one with the highest bound after `SCREENING` sweeps goes on.
    min_iter : int, default 0
        Sweeps at least.
    resume : Progress, optional
        Where to go on from, instead of starting anew.
    after_sweep : callable, optional
        Told how far the run is after each sweep; whether it has kept that.
    progress : bool, default True
        Show a progress bar on rank 0, once the run has taken a second.

    Returns
    -------
    Result

    Raises
    ------
    FloatingPointError
        If a bound is not finite, or a matrix is singular.

    Warns
    -----
    ConvergenceWarning
        If `max_iter` is reached.
    """
    screening = min(SCREENING, max_iter) if n_init > 1 else 0
    done = 0 if resume is None else min(resume.trial, n_init) * screening + len(resume.history)
    total = n_init * screening + max_iter - screening
    with tqdm(
        total=total, initial=done, desc="sweeps", delay=SHOW_AFTER, disable=not (progress and comm.is_root)
    ) as bar:

        def sum_over(parts: Iterable[Tensor]) -> Tensor:
            return comm.sum(*add_up(parts))

        def begin(state: StateT) -> list[RowsT]:
            return [model.begin(state, part) for part in given]

        def sweep(now: Progress[StateT], rows: list[RowsT]) -> tuple[Progress[StateT], list[RowsT]]:
            state, number = now.state, len(now.history) + 1
            try:
                for block in model.blocks:
                    sums = sum_over(model.local_statistics(state, block, part) for part in rows)
                    state = model.update(state, block, sums)
                state, rows = model.end_sweep(state, rows, sum_over)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise FloatingPointError(f"sweep {number} met a singular matrix; {ADVICE}") from error
            # From rank 0, since ranks on other processors may round otherwise, and all must decide alike.
            bound = _finite(float(comm.broadcast(model.bound(state))), number)
            bar.update()
            bar.set_postfix(bound=f"{bound:.6g}", refresh=False)
            now = now._replace(state=state, history=[*now.history, bound])
            if after_sweep is not None and after_sweep(now):
                rows = begin(state)  # as whoever goes on from there will
            return now, rows

        @cache
        def start_sums() -> Tensor:
            return sum_over(model.local_start(part) for part in given)

        def start(trial: int, best: tuple[StateT, list[float]] | None) -> Progress[StateT]:
            return Progress(trial, model.start(start_sums(), generator, trial), [], best)

        now = resume if resume is not None else start(0, None)
        rows = begin(now.state)
        while now.trial < n_init and screening:
            if len(now.history) < screening:
                now, rows = sweep(now, rows)
                continue
            best = now.state, now.history
            if now.best is not None and now.best[1][-1] >= best[1][-1]:
                best = now.best
            now = start(now.trial + 1, best) if now.trial + 1 < n_init else Progress(n_init, *best, None)
            rows = begin(now.state)
        while True:
            history = now.history
            if len(history) >= max(min_iter, PATIENCE + 1):
                change = abs(history[-1] - history[-1 - PATIENCE])
                if change <= tol * max(abs(history[-1]), scale):
                    bar.total = bar.n  # done, however many sweeps there might have been
                    reason = f"the bound changed by less than tol={tol:g} (relative) over {PATIENCE} sweeps"
                    return Result(now.state, history, len(history), True, reason)
            if len(history) >= max_iter:
                break
            now, rows = sweep(now, rows)
    reason = f"max_iter={max_iter} sweeps done"
    if comm.is_root:
        warnings.warn(
            f"not converged: {reason}, the bound still moves. Raise max_iter or tol, or look at bound_history_; "
            "a lower rank often converges faster.",
            ConvergenceWarning,
            stacklevel=7,  # the line that called fit: past run, its no_grad, sweeps, fit, _fit and fit
        )
    return Result(now.state, now.history, max_iter, False, reason)


def _finite(bound: float, n_sweeps: int) -> float:
    if not math.isfinite(bound):
        raise FloatingPointError(f"the bound is {bound} after {n_sweeps} sweeps; {ADVICE}")
    return bound
