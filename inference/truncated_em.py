r"""Truncated expectation maximization: EM whose posterior sums run over few states of each point.

Any set of states ``K_n`` gives a lower bound of the log-likelihood, ``F = sum_n log sum_{s in K_n} p(y_n, s)``, and the
posterior on ``K_n``, normalised there, is the best one. A step that keeps or betters each point's set and then does an
M-step never lowers ``F``. While annealed, at a temperature above one, posteriors are flatter than that, and candidates
are chosen anew; ``F`` is reported all the same.

A model (`TruncatedModel`) knows parameters, log joint densities and sums over points; a selection (`Preselection`,
`Everything`, `probtensor.inference.evolution.Evolution`) knows which states; the loop knows neither. One sum over ranks
a step.

References
----------
Lücke (2016), "Truncated Variational Expectation Maximization", arXiv 1610.03113.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from scipy.stats import binom
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from tqdm import tqdm

from probtensor.blocks import add_up
from probtensor.comm import Comm
from probtensor.inference.points import Points
from probtensor.inference.state_sets import Own, Selected, StateTable

__all__ = [
    "DataCut",
    "Everything",
    "Posterior",
    "Preselection",
    "Result",
    "Selection",
    "TruncatedModel",
    "normalise",
    "posterior",
    "run",
]

P = TypeVar("P")  # a model's parameters, a NamedTuple of tensors
PATIENCE = 3  # steps in a row that must change the bound by less than tol
ROUNDING = 1e-12  # of the bound
SHORTEST = 2.0**-6  # share of a step that is still tried
SHOW_AFTER = 1.0  # seconds before a progress bar appears


class TruncatedModel(Protocol[P]):
    """What `run` asks of a model."""

    @property
    def exact(self) -> bool:
        """Whether `update` finds the optimum given the posterior; else it may overshoot, and steps get shorter."""
        ...

    def candidates(self, params: P, points: Points, n_candidates: int) -> Tensor:
        """Components that probably have a part in each point, shape (n_candidates, n), sorted within each point."""
        ...

    def log_joint(self, params: P, points: Points, states: Selected | Own) -> Tensor:
        """``log p(y_n, s)`` with all constants, shape (states, n)."""
        ...

    def statistics(self, params: P, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Sums over points that the M-step needs, one dimension."""
        ...

    def update(self, params: P, statistics: Tensor, masked: bool, correction: float = 1.0) -> P:
        """The M-step; probabilities of activity are multiplied by `correction`, for points that were left out."""
        ...

    def activity(self, params: P) -> float:
        """Mean probability of a component not to be zero."""
        ...

    def towards(self, old: P, new: P, share: float) -> P:
        """The new parameters with the dictionary only a share of the way from the old one."""
        ...

    def reconstruct(self, params: P, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior mean of the points without noise, shape (n, D)."""
        ...

    def renew(self, params: P, component: int, direction: Tensor) -> P:
        """Parameters with one component begun anew in a direction (D,)."""
        ...


class Selection(Protocol):
    """Which states each point has."""

    @property
    def states_per_point(self) -> int:
        """How many."""
        ...

    def step(
        self, model: TruncatedModel[Any], params: Any, points: Points, kept: Tensor | None, seed: int
    ) -> tuple[Selected | Own, Tensor, Tensor | None]:
        """States of the points, their log joint densities, and what to keep for the next step.

        With what was kept, no point's set gets worse; `seed` is one of its own for these points and this step.
        """
        ...


@dataclass(frozen=True, eq=False)
class Preselection:
    """The states of a table over the model's candidates: Expectation Truncation."""

    table: StateTable
    n_components: int

    @property
    def states_per_point(self) -> int:
        """How many states each point has."""
        return self.table.n_states(self.n_components)

    def step(
        self, model: TruncatedModel[Any], params: Any, points: Points, kept: Tensor | None, seed: int
    ) -> tuple[Selected | Own, Tensor, Tensor | None]:
        """Choose candidates; where they changed, the old ones stay if they are better."""
        C = self.table.values.shape[1]
        index = model.candidates(params, points, C)
        states = Selected(self.table, index, self.n_components)
        joint = model.log_joint(params, points, states)
        if kept is not None:
            kept = kept.long()
            changed = (kept != index).any(0).nonzero().squeeze(-1)
            if len(changed):
                old = Selected(self.table, kept[:, changed], self.n_components)
                before = model.log_joint(params, points.take(changed), old)
                better = before.logsumexp(0) > joint[:, changed].logsumexp(0)
                back = changed[better]
                if len(back):
                    joint[:, back] = before[:, better]
                    index[:, back] = kept[:, back]
                    states = Selected(self.table, index, self.n_components)
        return states, joint, index.to(torch.int16)


@dataclass(frozen=True, eq=False)
class Everything:
    """All states of a table over all components: exact EM where it holds all states there are."""

    table: StateTable

    @property
    def states_per_point(self) -> int:
        """How many states each point has."""
        return len(self.table.values)

    def step(
        self, model: TruncatedModel[Any], params: Any, points: Points, kept: Tensor | None, seed: int
    ) -> tuple[Selected | Own, Tensor, Tensor | None]:
        """The same states for all."""
        H = self.table.values.shape[1]
        index = torch.arange(H, device=points.y.device)[:, None].expand(H, len(points.y))
        states = Selected(self.table, index, H)
        return states, model.log_joint(params, points, states), None


class Result(NamedTuple, Generic[P]):
    """What a run ends with.

    Attributes
    ----------
    params
        Those of the last bound.
    bound_history : list of float
        ``F`` per point before each M-step, and at the end.
    params_history : list
        Parameters at these bounds, or what `keep` made of them.
    n_iter : int
        M-steps done.
    converged : bool
    statistics : Tensor
        Sums over all points for the M-step after these parameters.
    """

    params: P
    bound_history: list[float]
    params_history: list[Any]
    n_iter: int
    converged: bool
    statistics: Tensor


class Posterior(NamedTuple):
    """Of some points, given parameters: their states, log joint densities and probabilities, both (states, n)."""

    points: Points
    states: Selected | Own
    log_joint: Tensor
    q: Tensor


def posterior(model: TruncatedModel[P], params: P, points: Points, selection: Selection) -> Posterior:
    """Posterior of points that nothing was kept of."""
    states, joint, _ = selection.step(model, params, points, None, 0)
    return Posterior(points, states, joint, joint.softmax(0))


def normalise(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """Log evidence (n,) and posterior (states, n) of log joint densities, which are overwritten."""
    highest = log_joint.amax(0)
    q = log_joint.sub_(highest).exp_()
    total = q.sum(0)
    return highest + total.log(), q.div_(total)


class DataCut(NamedTuple):
    """Leaves out of M-steps the share of points that have more active components than any state of their sets.

    These are, by their expected number under the current prior, the points of lowest evidence. Which evidence that is
    comes from a histogram of the step before, so that no rank gathers all of them.

    Attributes
    ----------
    n_components, max_active : int
    """

    n_components: int
    max_active: int

    def moments(self, activity: float) -> tuple[float, float]:
        """Probability of at most `max_active` active components, and their mean number on that event times it."""
        number = np.arange(self.max_active + 1)
        probability = binom.pmf(number, self.n_components, activity)
        return float(probability.sum()), float(number @ probability)

    def correction(self, activity: float) -> float:
        """Activity over the mean share of active components among the points that are kept."""
        share, number = self.moments(activity)
        return self.n_components * activity * share / number if number else 1.0


class _Kept:
    """What each block keeps from step to step, in two tensors: many small ones would scatter over the memory."""

    def __init__(self, n_blocks: int) -> None:
        self._n_blocks = n_blocks
        self._now: Tensor | None = None
        self._offered: Tensor | None = None

    def get(self, number: int, n: int) -> Tensor | None:
        """What block `number`, of n points, keeps: shape (…, n)."""
        return None if self._now is None else self._now[number, ..., :n]

    def offer(self, number: int, chosen: Tensor) -> None:
        """What the block would keep, if this step is accepted."""
        if self._offered is None:  # the first block is as large as any
            self._offered = chosen.new_empty(self._n_blocks, *chosen.shape)
        self._offered[number, ..., : chosen.shape[-1]] = chosen

    def accept(self) -> None:
        """Keep what was offered."""
        self._now, self._offered = self._offered, self._now


class _Evidence:
    """Histogram of the log evidence over all ranks, and the threshold of a quantile in the next step."""

    BINS = 1024
    BELOW, ABOVE = 12.0, 4.0  # standard deviations that the bins span

    def __init__(self) -> None:
        self.size = 2 + self.BINS
        self._place: tuple[float, float] | None = None
        self.threshold = -math.inf

    def local(self, log_z: Tensor) -> Tensor:
        counts = log_z.new_zeros(self.BINS)
        if self._place is not None:
            low, width = self._place
            counts += ((log_z - low) / width).clamp(0, self.BINS - 1).long().bincount(minlength=self.BINS)
        return torch.cat([log_z.sum()[None], (log_z**2).sum()[None], counts])

    def learn(self, total: Tensor, n_points: float, left_out: float) -> None:
        counts = total[2:].cumsum(0)
        if self._place is not None:
            low, width = self._place
            emptied = int(torch.searchsorted(counts, left_out * n_points, right=True))  # bins that go as a whole
            self.threshold = low + width * emptied if emptied else -math.inf
        mean = float(total[0]) / n_points
        deviation = math.sqrt(max(float(total[1]) / n_points - mean**2, 1e-12 * max(mean**2, 1.0)))
        self._place = mean - self.BELOW * deviation, (self.BELOW + self.ABOVE) * deviation / self.BINS


@torch.no_grad()
def run(
    model: TruncatedModel[P],
    params: P,
    blocks: Sequence[Points],
    selection: Selection,
    *,
    comm: Comm,
    temperature: Callable[[int], float],
    max_iter: int,
    tol: float,
    first_block: int = 0,
    seed: int = 0,
    cut: DataCut | None = None,
    between: Callable[[P, int], P] | None = None,
    keep: Callable[[P], Any] | None = None,
    quiet: bool = False,
    progress: bool = True,
) -> Result[P]:
    """Steps of truncated EM until the bound settles.

    Parameters
    ----------
    model : TruncatedModel
    params
        The first ones, the same on all ranks.
    blocks : sequence of Points
        This rank's points; at least one, which may be empty. All of them with a mask, or none.
    selection : Selection
    comm : Comm
    temperature : callable
        Of each step, from 0 on; at least one. At one from some step on.
    max_iter : int
        M-steps at most.
    tol : float
        Stop when the bound per point changes by less than this, relative to it, three times in a row.
    first_block : int, default 0
        Number of the first block among those of all ranks.
    seed : int, default 0
    cut : DataCut, optional
        Points to leave out of M-steps at temperature one. The bound is that of all points; it may fall a little.
    between : callable, optional
        Parameters to go on with, given those after an M-step, and the step's number.
    keep : callable, optional
        What of the parameters the history keeps. Default: all.
    quiet : bool, default False
        Whether `max_iter` is no more than a number of steps: then nothing is warned of.
    progress : bool, default True

    Returns
    -------
    Result

    Raises
    ------
    FloatingPointError
        If the bound is not finite.

    Warns
    -----
    ConvergenceWarning
        If `max_iter` is reached.
    """
    history: list[float] = []
    params_history: list[Any] = []
    masked = blocks[0].seen is not None
    guarded = cut is None and not model.exact
    evidence = _Evidence()
    kept = _Kept(len(blocks))
    good: tuple[P, Tensor] | None = None  # of the last step that did not lower the bound
    share, settled, n_updates = 1.0, 0, 0
    target, statistics = params, torch.empty(0)

    def sums_of(number: int, step: int, T: float, params: P) -> Tensor:
        """Sums over the points of a block."""
        points = blocks[number]
        own_seed = (seed * 1_000_003 + step * 7_919 + (first_block + number) * 104_729) % 2**63
        before = kept.get(number, len(points.y)) if T == 1 else None
        states, joint, chosen = selection.step(model, params, points, before, own_seed)
        if T == 1 and chosen is not None:
            kept.offer(number, chosen)
        if T == 1:
            log_z, q = normalise(joint)
        else:
            log_z, q = joint.logsumexp(0), (joint / T).softmax(0)
        n_used = len(points.y)
        if cut is not None and T == 1:
            used = (log_z >= evidence.threshold).to(q.dtype)
            q *= used
            points, n_used = points._replace(used=used), int(used.sum())
        head = [log_z.new_tensor([len(points.y), n_used]), evidence.local(log_z)]
        return torch.cat([*head, model.statistics(params, points, states, q)])

    with tqdm(total=max_iter, desc="EM steps", delay=SHOW_AFTER, disable=not (progress and comm.is_root)) as bar:
        for step in range(max_iter + 1):
            T = temperature(step)

            cutting = T == 1 and evidence.threshold > -math.inf
            numbers = range(len(blocks))
            total = comm.sum(*add_up(sums_of(number, step, T, params) for number in numbers))
            n_points, statistics = float(total[0]), total[2 + evidence.size :]
            bound = float(total[2]) / n_points
            if not math.isfinite(bound):
                raise FloatingPointError(f"the bound is {bound} after {step} steps; look for extreme values in Y")
            if cut is not None and T == 1:
                evidence.learn(total[2 : 2 + evidence.size], n_points, 1 - cut.moments(model.activity(params))[0])
            if total[1] == 0:  # the evidence of all points fell: last step's threshold says nothing
                evidence.threshold = -math.inf
                continue
            bar.update()
            bar.set_postfix(bound=f"{bound:.6g}", refresh=False)
            if guarded and good is not None and bound < history[-1] - ROUNDING * max(abs(bound), 1.0):
                if share > SHORTEST:
                    if step == max_iter:
                        break
                    share /= 2
                    params = model.towards(good[0], target, share)
                    continue
                # No step from there leads up.
                return Result(good[0], history, params_history, n_updates, True, good[1])
            if T == 1:
                kept.accept()
                good = params, statistics
            still = T == 1 and history and abs(bound - history[-1]) <= tol * max(abs(bound), 1.0)
            history.append(bound)
            params_history.append(params if keep is None else keep(params))
            settled = settled + 1 if still else 0
            if settled >= PATIENCE:
                return Result(params, history, params_history, n_updates, True, statistics)
            if step == max_iter:
                break
            correction = cut.correction(model.activity(params)) if cut is not None and cutting else 1.0
            target = model.update(params, statistics, masked, correction)
            share = min(2 * share, 1.0)
            params = target if share == 1 else model.towards(params, target, share)
            n_updates += 1
            if between is not None:
                params = between(params, step)
    if good is not None:
        params, statistics = good
    if comm.is_root and not quiet:
        warnings.warn(
            f"not converged: max_iter={max_iter} steps done, the bound still moves. Raise max_iter or tol.",
            ConvergenceWarning,
            stacklevel=7,  # the caller of `fit`
        )
    return Result(params, history, params_history, n_updates, False, statistics)
