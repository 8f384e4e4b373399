"""How a mixture is fitted: seeds far from each other, short runs, renewal of components, then EM on all points.

A mixture's likelihood has many local optima: two components in one cluster, one that spans two. Seeds are drawn far
from those before them; of several starts the best goes on. Then the component that is missed least if it were gone is
begun anew at a badly explained point, some steps of EM follow, and the result stays if the bound is higher. All this
happens on some points that are drawn evenly from all, in their order: a sorted file does no harm. All points have their
say afterwards.

Ranks share the drawn points as they share all, in whole blocks, and draw with the same generator; what travels are sums
and single points. The result does not depend on the number of ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.comm import Comm
from probtensor.inference.points import PointBlocks, Points, Summary, deal_points
from probtensor.inference.state_sets import Own
from probtensor.inference.truncated_em import Result, run

__all__ = ["OneOfAll", "Plan", "fit_mixture"]

SHORT = 15  # steps of EM from a start, and after a renewal, before bounds are compared
FAILURES = 8  # renewals in a row without success that end it
WORST_OF = 32  # points among which the worst explained one is looked for
GAIN = 1e-3  # nats a point that make a renewal a success
SETTLED = 1e-4  # see `run`, for short runs


@dataclass(frozen=True, eq=False)
class OneOfAll:
    """States of a mixture: exactly one component is on, any of them."""

    n_components: int

    @property
    def states_per_point(self) -> int:
        """How many states each point has."""
        return self.n_components

    def step(
        self, model: Any, params: Any, points: Points, kept: Tensor | None, seed: int
    ) -> tuple[Own, Tensor, Tensor | None]:
        """The same states for all points, in the order of the components."""
        H = self.n_components
        one = torch.eye(H, dtype=points.y.dtype, device=points.y.device)
        return Own(one[:, :, None].expand(H, H, len(points.y))), model.log_joint(params, points), None


class Plan(NamedTuple):
    """Lengths of the phases of a fit.

    Attributes
    ----------
    starts : int
        Of which the best goes on.
    renewals : int
        At most.
    points : int
        That starts and renewals take into account; all where there are fewer than twice as many.
    max_iter : int
        Steps on all points at most.
    tol : float
        See `run`.
    """

    starts: int
    renewals: int
    points: int
    max_iter: int
    tol: float


def fit_mixture(
    model: Any,
    first_params: Callable[[Tensor], Any],
    blocks: PointBlocks,
    summary: Summary,
    plan: Plan,
    *,
    n_components: int,
    comm: Comm,
    generator: torch.Generator,
    keep: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Result[Any]:
    """Fit a mixture to all ranks' points.

    Parameters
    ----------
    model : GaussianMixture or PoissonMixture
    first_params : callable
        Parameters, given the components' means (D, H).
    blocks : PointBlocks
    summary : Summary
        Of all ranks' points.
    plan : Plan
    n_components : int
    comm : Comm
    generator : torch.Generator
        In the same state on all ranks.
    progress : bool, default True

    Returns
    -------
    Result
        Of the phase on all points.
    """
    few, n_few = _draw(blocks, summary.n_points, plan.points, comm, generator)
    selection = OneOfAll(n_components)

    def short(params: Any) -> Result[Any]:
        return run(
            model,
            params,
            few,
            selection,
            comm=comm,
            temperature=lambda step: 1.0,
            max_iter=SHORT,
            tol=SETTLED,
            quiet=True,
            progress=False,
        )

    found: Result[Any] | None = None
    for _ in range(plan.starts):
        seeds = _Seeds(model, few, summary, comm, generator)
        tried = short(_from_seeds(model, first_params, seeds, few, n_few, n_components, comm))
        if found is None or tried.bound_history[-1] > found.bound_history[-1]:
            found = tried
    assert found is not None
    failures = 0
    for _ in range(plan.renewals if n_components > 1 else 0):
        if failures >= FAILURES:
            break
        tried = short(_renewed(model, found.params, few, n_few, comm, generator))
        success = tried.bound_history[-1] > found.bound_history[-1] + GAIN
        found, failures = (tried, 0) if success else (found, failures + 1)
    return run(
        model,
        model.softened(found.params, n_few) if n_few < summary.n_points else found.params,
        blocks,
        selection,
        comm=comm,
        temperature=lambda step: 1.0,
        max_iter=plan.max_iter,
        tol=plan.tol,
        first_block=blocks.first,
        keep=keep,
        progress=progress,
    )


def _draw(
    blocks: PointBlocks, n_points: int, wanted: int, comm: Comm, generator: torch.Generator
) -> tuple[PointBlocks, int]:
    """One point of each of as many equal stretches as points are wanted, in blocks of their own; their number."""
    if n_points < 2 * wanted:
        return blocks, n_points
    place = torch.arange(wanted) + torch.rand(wanted, generator=generator, dtype=torch.float64)
    rows = (place * (n_points / wanted)).long().clamp(max=n_points - 1).numpy()
    rows = np.unique(rows)
    here = rows - blocks.first * blocks.size
    here = here[(here >= 0) & (here < blocks.n_points)]
    drawn = [blocks.rows(slice(row, row + 1)) for row in here.tolist()]
    array, tail, first = deal_points(np.concatenate([blocks.array[:0], *drawn]), blocks.size, comm)
    return replace(blocks, array=array, tail=tail, first=first, kept={}), len(rows)


class _Seeds:
    """Points far from each other, drawn one after the other: greedy k-means++ (Arthur, Vassilvitskii 2007).

    Each is the best of some candidates that were drawn in proportion to the squared distance to the nearest seed.
    """

    def __init__(self, model: Any, few: PointBlocks, summary: Summary, comm: Comm, generator: torch.Generator) -> None:
        like = torch.zeros((), dtype=few.dtype, device=few.device)
        variance = torch.from_numpy(summary.variance).to(like)
        self._model, self._few, self._comm = model, few, comm
        self._variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        self._mean = torch.from_numpy(summary.mean).to(like)
        self._seed = int(torch.randint(2**31, (1,), generator=generator))
        self.nearest = [torch.zeros(len(few[number].y), dtype=torch.int64) for number in range(len(few))]
        self._distance = [torch.full(x.shape, math.inf, dtype=torch.float64) for x in self.nearest]
        self.chosen: list[Tensor] = []

    def grow(self, n_seeds: int) -> Tensor:
        """Draw seeds until there are so many, (n_seeds, D)."""
        n_candidates = 2 + int(math.log(n_seeds))
        while len(self.chosen) < n_seeds:
            candidates = self._candidates(1 if not self.chosen else n_candidates)
            distances = [self._distances(number, candidates) for number in range(len(self._few))]
            shorter = [
                torch.minimum(new, old) for new, old in zip(distances, self._distance, strict=True)
            ]  # each (candidates, n)
            cost = self._comm.sum(*add_up(x.sum(1) for x in shorter))
            best = int(cost.argmin())
            for number, new in enumerate(distances):
                closer = new[best] < self._distance[number]
                self.nearest[number][closer] = len(self.chosen)
                self._distance[number] = shorter[number][best]
            self.chosen.append(candidates[best])
        return torch.stack(self.chosen)

    def _candidates(self, wanted: int) -> Tensor:
        """Points drawn by their distance on any rank, (wanted or fewer, D), what is missing replaced by the mean."""
        offers: list[bytes] = []
        for number, distance in enumerate(self._distance):
            # A Gumbel maximum draws in proportion; the noise belongs to the block, on whatever rank it is.
            seed = (self._seed + 7_919 * len(self.chosen) + 104_729 * (self._few.first + number)) % 2**63
            noise = torch.rand(len(distance), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            score = (distance.log() if self.chosen else 0.0) - (-noise.clamp(min=1e-300).log()).log()
            for row in score.topk(min(wanted, len(score))).indices.tolist():
                y = _filled(self._few[number].take(torch.tensor([row], device=self._few.device)), self._mean)
                offers.append(np.concatenate([[float(score[row])], y[0].cpu().double().numpy()]).tobytes())
        best = sorted(offers, key=lambda data: -float(np.frombuffer(data)[0]))[:wanted]
        gathered = b"".join(self._comm.gather_bytes(b"".join(best)))
        table = np.frombuffer(gathered).reshape(-1, 1 + len(self._mean))
        table = table[np.argsort(-table[:, 0], kind="stable")[:wanted]]
        return torch.from_numpy(table[:, 1:].copy()).to(self._mean)

    def _distances(self, number: int, candidates: Tensor) -> Tensor:
        """Squared distances of a block's points, as if all entries were observed: (candidates, n)."""
        points = self._few[number]
        features, of_candidates = (self._model.features(y, self._variance) for y in (points.y, candidates))
        difference = features - of_candidates[:, None]
        if points.seen is None:
            distance: Tensor = (difference**2).sum(2)
            return distance.cpu().double()
        known = points.n_seen().clamp(min=1)
        distance = (difference**2 * points.seen).sum(2) * (points.y.shape[1] / known)
        return distance.cpu().double()


def _from_seeds(
    model: Any,
    first_params: Callable[[Tensor], Any],
    seeds: _Seeds,
    few: PointBlocks,
    n_few: int,
    n_components: int,
    comm: Comm,
) -> Any:
    """Parameters with each point in the component of its nearest seed."""
    params = first_params(seeds.grow(n_components).T.contiguous())

    def sums_of(number: int) -> Tensor:
        points = few[number]
        nearest = seeds.nearest[number].to(few.device)
        q = torch.nn.functional.one_hot(nearest, n_components).T.to(points.y)
        return model.statistics(params, points, None, q)  # type: ignore[no-any-return]

    sums = comm.sum(*add_up(sums_of(number) for number in range(len(few))))
    return model.softened(model.update(params, sums, few.masked), n_few)


def _renewed(model: Any, params: Any, few: Sequence[Points], n_few: int, comm: Comm, generator: torch.Generator) -> Any:
    """Parameters with a component that is hardly missed begun anew at a point that is badly explained."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    first = few.first if isinstance(few, PointBlocks) else 0
    offers: list[tuple[float, Tensor]] = []

    def missed(number: int) -> Tensor:
        """What leaving each component out would cost."""
        points = few[number]
        joint = model.log_joint(params, points)
        log_z = joint.logsumexp(0)
        own = torch.Generator().manual_seed((seed * 1_000_003 + first + number) % 2**63)
        index = (torch.rand(len(log_z), generator=own) < WORST_OF / n_few).nonzero().squeeze(-1).to(log_z.device)
        if len(index):
            worst = index[(log_z[index] / points.n_seen()[index].clamp(min=1)).argmin()]
            y = _filled(points.take(worst[None]), params.W @ params.log_prob.softmax(0))
            offers.append((float(log_z[worst]), y[0].cpu().double()))
        q = (joint - log_z).exp()
        return -torch.log1p(-q.clamp(max=1 - 1e-6)).sum(1)

    cost = comm.sum(*add_up(missed(number) for number in range(len(few))))
    offer = min(offers, key=lambda pair: pair[0], default=None)
    data = b"" if offer is None else np.concatenate([[offer[0]], offer[1].numpy()]).tobytes()
    table = [np.frombuffer(bytes_) for bytes_ in comm.gather_bytes(data) if bytes_]
    order = cost.argsort()[:2]
    component = int(order[int(torch.randint(len(order), (1,), generator=generator))])
    if not table:
        return params
    point = torch.from_numpy(min(table, key=lambda row: row[0])[1:].copy()).to(params.W)
    return model.renew(params, component, point)


def _filled(points: Points, mean: Tensor) -> Tensor:
    """Points (n, D) with the mean where an entry is missing."""
    return points.y if points.seen is None else torch.where(points.seen > 0, points.y, mean)
