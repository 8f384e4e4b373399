"""States that each point keeps and betters: evolutionary truncated EM.

In every step some of a point's states are parents, drawn by how probable they are; each child is a parent with some
components changed; of parents and children, each distinct state once, the best stay. A point's share of the bound never
falls by that.

References
----------
Drefs, Guiraud, Lücke (2022), "Evolutionary Variational Optimization of Generative Models", JMLR 23. There, fitness is
compared over the whole batch; here, within each point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probtensor.inference.points import Points
from probtensor.inference.state_sets import Own
from probtensor.inference.truncated_em import TruncatedModel

__all__ = ["Evolution"]

PARENTS, CHILDREN = 5, 4  # of a point in a step, and of a parent
ROUNDS = 12  # of bettering, for points whose states were not kept


@dataclass(frozen=True, eq=False)
class Evolution:
    """Each point keeps `n_states` states of its own.

    Attributes
    ----------
    n_states : int
    max_active : int
        Components other than zero in a state at most.
    n_components : int
    values : sequence of float
        Values of a component other than zero.

    Examples
    --------
    >>> search = Evolution(n_states=8, max_active=2, n_components=5, values=(1.0,))
    >>> search.states_per_point > search.n_states  # its children too
    True
    """

    n_states: int
    max_active: int
    n_components: int
    values: Sequence[float]

    @property
    def states_per_point(self) -> int:
        """How many states each point has, children of a step included."""
        return self.n_states + PARENTS * CHILDREN

    def step(
        self, model: TruncatedModel[Any], params: Any, points: Points, kept: Tensor | None, seed: int
    ) -> tuple[Own, Tensor, Tensor | None]:
        """Better the states once; without any, from states of few components in several rounds."""
        generator = torch.Generator().manual_seed(seed)
        n, like = len(points.y), points.y
        if kept is None:
            values = self._first(n, generator).to(like)
        else:
            values = kept.to(like.dtype) if len(self.values) == 1 else kept
        joint = model.log_joint(params, points, Own(values))
        for _ in range(ROUNDS if kept is None else 1):
            values, joint = self._bettered(model, params, points, values, joint, generator)
        small = values.to(torch.int8) if len(self.values) == 1 and self.values[0] == 1 else values
        return Own(values), joint, small

    def _first(self, n: int, generator: torch.Generator) -> Tensor:
        """The zero state, single components, and random pairs: distinct with high probability; copies count once."""
        H = self.n_components
        values = torch.zeros(self.n_states, H, n, dtype=torch.float64)
        choice = torch.rand(self.n_states, H, n, generator=generator)
        for place, size in enumerate([0, *([1] * min(H, self.n_states // 2)), *([2] * self.n_states)][: self.n_states]):
            size = min(size, self.max_active, H)
            if size:
                values[place].scatter_(0, choice[place].topk(size, dim=0).indices, 1.0)
        return values * self._random_values(values.shape, generator)

    def _random_values(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.values), tuple(shape), generator=generator)
        return torch.tensor(list(self.values), dtype=torch.float64)[chosen]

    def _bettered(
        self,
        model: TruncatedModel[Any],
        params: Any,
        points: Points,
        values: Tensor,
        joint: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        children = self._children(values, joint, generator).to(values)
        everything = torch.cat([values, children])
        joint = torch.cat([joint, model.log_joint(params, points, Own(children))])
        joint[len(values) :].masked_fill_((children != 0).sum(1) > self.max_active, -torch.inf)
        joint = joint.masked_fill(_repeated(everything, self.values, generator), -torch.inf)
        best, index = joint.topk(self.n_states, dim=0)
        return everything.gather(0, index[:, None].expand(-1, values.shape[1], -1)), best

    def _children(self, values: Tensor, joint: Tensor, generator: torch.Generator) -> Tensor:
        """Each parent's children, each with one component changed, in half of them one that is not zero."""
        H = values.shape[1]
        finite = torch.where(joint.isfinite(), joint, torch.full_like(joint, -torch.inf))
        fitness = (0.5 * (finite - finite.amax(0))).clamp(min=-30).exp().masked_fill(~joint.isfinite(), 0.0)
        drawn = torch.multinomial(fitness.T.cpu().double(), PARENTS, replacement=True, generator=generator).T
        parents = values.gather(0, drawn.to(values.device)[:, None].expand(-1, H, -1)).repeat_interleave(CHILDREN, 0)
        # A Gumbel maximum draws the component that changes: one in use as likely as all the others together.
        active = (parents != 0).cpu().double()
        count = active.sum(1, keepdim=True)
        weight = torch.where(active > 0, 0.5 / count.clamp(min=1), 0.5 / (H - count).clamp(min=1))
        noise = torch.rand(parents.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
        place = (weight.log() - (-noise.log()).log()).argmax(1, keepdim=True).to(values.device)
        old = parents.gather(1, place)
        new = self._random_values(old.shape, generator).to(values)
        keep_active = len(self.values) > 1 and bool(torch.rand((), generator=generator) < 0.5)
        changed = torch.where((old != 0) & (not keep_active), torch.zeros_like(new), new)
        return parents.scatter(1, place, changed)


def _repeated(states: Tensor, values: Sequence[float], generator: torch.Generator) -> Tensor:
    """Which states of a point stand there already, further ahead: (S, n), from (S, H, n)."""
    key = torch.randint(-(2**62), 2**62, (states.shape[1],), generator=generator).to(states.device)
    levels = torch.bucketize(states, states.new_tensor(sorted({0.0, *values})))
    number = (levels * key[:, None]).sum(1)  # wraps around
    ordered, order = number.sort(dim=0, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[1:] = ordered[1:] == ordered[:-1]
    return torch.zeros_like(again).scatter_(0, order, again)
