r"""Sets of states over which truncated EM sums: the same few for all points, or each point's own.

A state ``s`` gives each of H components a value, mostly zero. Arrays have states first and points last: (S, n). That
is how sums over states and matrix products run fastest.

Two kinds of set, one interface:

- `Selected`: a table of states over C candidates (`StateTable`), the same for all points, with the components that each
  point takes for candidates; beside it, where asked for, the zero state and all states with one component. With all
  components as candidates and all states in the table this is full enumeration.
- `Own`: S states of each point's own, which are kept and bettered from step to step.

References
----------
Lücke, Eggert (2010), "Expectation Truncation and the Benefits of Preselection in Training Generative Models", JMLR 11.
Drefs, Guiraud, Lücke (2022), "Evolutionary Variational Optimization of Generative Models", JMLR 23.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Gram",
    "Own",
    "Selected",
    "StateTable",
    "every_state",
    "few_active",
    "pair_places",
    "pursue",
    "sum_of_pairs",
]


def pair_places(size: int, device: torch.device | None = None) -> Tensor:
    """Rows and columns (2, P) of the pairs ``i <= j`` of `size` places, row by row.

    Examples
    --------
    >>> pair_places(3).tolist()
    [[0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    """
    return torch.triu_indices(size, size, device=device)


@dataclass(frozen=True, eq=False)
class StateTable:
    """States over C places, shared by all points.

    Attributes
    ----------
    values : Tensor, shape (S, C)
        Value of each place.
    singles : Tensor, shape (V,)
        With V > 0 there are 1 + V H states more, before those of `values`: the zero state, and each component with each
        of these values alone, value by value.

    Examples
    --------
    >>> table = StateTable(torch.tensor([[1.0, 1.0]]), torch.tensor([1.0]))  # both of two candidates
    >>> table.n_states(5)  # and none, and each of five components alone
    7
    """

    values: Tensor
    singles: Tensor

    @cached_property
    def products(self) -> Tensor:
        """``s_i s_j`` of the pairs of `pair_places`, shape (S, P)."""
        i, j = pair_places(self.values.shape[1], self.values.device)
        return self.values[:, i] * self.values[:, j]

    @cached_property
    def energy(self) -> Tensor:
        """(S, C + P): with ``b`` and the pairs of ``G`` of each point below each other it gives ``s'b - s'G s / 2``."""
        i, j = pair_places(self.values.shape[1], self.values.device)
        return torch.cat([self.values, torch.where(i == j, -0.5, -1.0).to(self.values) * self.products], dim=1)

    @cached_property
    def moments(self) -> Tensor:
        """(C + P, S): values and products, transposed."""
        return torch.cat([self.values, self.products], dim=1).T.contiguous()

    @cached_property
    def levels(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """States by number g of places in use: which (S_g,), the places (S_g, g), the pairs' numbers (g, g, S_g)."""
        C = self.values.shape[1]
        i, j = pair_places(C, self.values.device)
        number = torch.zeros(C, C, dtype=torch.int64, device=i.device)
        number[i, j] = number[j, i] = torch.arange(len(i), device=i.device)
        size = (self.values != 0).sum(1)
        levels = []
        for g in range(1, int(size.max()) + 1 if len(size) else 0):
            rows = (size == g).nonzero().squeeze(-1)
            places = self.values[rows].nonzero()[:, 1].reshape(len(rows), g)
            levels.append((rows, places, number[places.T[:, None], places.T[None]]))
        return levels

    @cached_property
    def meets(self) -> Tensor:
        """1 where a state has a component in a set of places, else 0: shape (S, 2^C), sets in binary order."""
        C = self.values.shape[1]
        sets = torch.arange(2**C, device=self.values.device)
        inside = (sets[None] >> torch.arange(C, device=sets.device)[:, None]) & 1  # (C, 2^C)
        return ((self.values != 0).to(self.values) @ inside.to(self.values) > 0).to(self.values)

    def n_states(self, n_components: int) -> int:
        """States of a point."""
        return len(self.values) + (1 + len(self.singles) * n_components if len(self.singles) else 0)

    def counts(self, values: Sequence[float], n_components: int) -> Tensor:
        """How many components of each state have each of some values other than zero, shape (V, n_states)."""
        of_table = torch.stack([(self.values == value).sum(1).to(self.values) for value in values])
        if not len(self.singles):
            return of_table
        alone = (self.singles == self.singles.new_tensor(list(values))[:, None]).to(self.values)
        return torch.cat([of_table.new_zeros(len(values), 1), alone.repeat_interleave(n_components, 1), of_table], 1)


def few_active(n_candidates: int, max_active: int, values: Sequence[float], like: Tensor) -> StateTable:
    """The zero state, all states of one component, and those of 2 to `max_active` of the candidates.

    Examples
    --------
    >>> few_active(8, 5, (1.0,), torch.zeros(1)).values.shape
    torch.Size([210, 8])
    """
    rows = []
    for size in range(2, max_active + 1):
        for places in itertools.combinations(range(n_candidates), size):
            for chosen in itertools.product(values, repeat=size):
                row = [0.0] * n_candidates
                for place, value in zip(places, chosen, strict=True):
                    row[place] = value
                rows.append(row)
    table = like.new_tensor(rows).reshape(len(rows), n_candidates)
    return StateTable(table, like.new_tensor(list(values)))


def every_state(n_components: int, values: Sequence[float], like: Tensor) -> StateTable:
    """All states, the zero state first.

    Examples
    --------
    >>> every_state(2, (1.0,), torch.zeros(1)).values.tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    rows = list(itertools.product((0.0, *values), repeat=n_components))
    return StateTable(like.new_tensor(rows), like.new_zeros(0))


@dataclass(frozen=True, eq=False)
class Selected:
    """The states of a table, over each point's candidates.

    Attributes
    ----------
    table : StateTable
    index : Tensor, shape (C, n), int64
        Component that each place stands for.
    n_components : int
    memo : dict
        What a model found of these states and keeps for its sums.

    Examples
    --------
    >>> table = StateTable(torch.tensor([[1.0, 1.0]]), torch.tensor([1.0]))
    >>> states = Selected(table, torch.tensor([[0], [2]]), n_components=3)  # one point with candidates 0 and 2
    >>> [states.state(torch.tensor([number])).ravel().tolist() for number in range(5)][-2:]
    [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    """

    table: StateTable
    index: Tensor
    n_components: int
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def n_singles(self) -> int:
        """States before those of the table."""
        return 1 + len(self.table.singles) * self.n_components if len(self.table.singles) else 0

    def split(self, per_state: Tensor) -> tuple[Tensor, Tensor]:
        """Parts of an array (states, …): (V, H, …) of the states of one component, and (S, …) of the table."""
        first, V = self.n_singles, len(self.table.singles)
        alone = per_state[1:first] if V else per_state[:0]
        return alone.reshape(V, self.n_components, *per_state.shape[1:]), per_state[first:]

    def state(self, number: Tensor) -> Tensor:
        """One state of each point, by its number (n,): shape (H, n)."""
        first, H = self.n_singles, self.n_components
        found = self.table.values.new_zeros(H, len(number))
        single, of_table = number - 1, number - first
        alone = (number > 0) & (number < first)
        if first:
            value = self.table.singles[single.clamp(0, first - 2) // H]
            found.scatter_(0, (single.clamp(min=0) % H)[None], torch.where(alone, value, 0.0)[None])
        if len(self.table.values):
            inside = self.table.values[of_table.clamp(min=0)].T * (number >= first)
            found.scatter_add_(0, self.index, inside)
        return found

    def energy(self, b: Tensor, gram: "Gram") -> Tensor:
        """``s'b - s'G s / 2``, shape (states, n), from ``b`` (H, n)."""
        inside = torch.cat([b.gather(0, self.index), gram.pairs(self.index)])
        if not self.n_singles:
            return self.table.energy @ inside
        out = b.new_empty(self.table.n_states(self.n_components), b.shape[1])
        out[0] = 0.0
        alone, of_table = self.split(out)
        diagonal = gram.diagonal()
        for row, value in zip(alone, self.table.singles.tolist(), strict=True):
            torch.add(value * b, diagonal, alpha=-0.5 * value**2, out=row)
        torch.matmul(self.table.energy, inside, out=of_table)
        return out

    def log_prior(self, values: Sequence[float], log_odds: Sequence[float]) -> Tensor:
        """Log prior of each state over that of the zero state, shape (states, 1)."""
        counts = self.table.counts(values, self.n_components)
        return (counts.new_tensor(log_odds) @ counts)[:, None]

    def counts(self, q: Tensor, values: Sequence[float]) -> Tensor:
        """Expected number of components with each of the values, summed over points, shape (V,)."""
        return self.table.counts(values, self.n_components) @ q.sum(1)

    def inclusion(self, q: Tensor) -> Tensor:
        """Probability that each component is not zero, shape (H, n)."""
        alone, of_table = self.split(q)
        found = alone.sum(0)
        return found.scatter_add_(0, self.index, (self.table.values != 0).to(q).T @ of_table)

    def mean(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``<s>`` (H, n), and what `second` needs of the same product."""
        alone, of_table = self.split(q)
        C = len(self.index)
        inside = self.table.moments @ of_table
        mean = torch.zeros(self.n_components, q.shape[1], dtype=q.dtype, device=q.device)
        for row, value in zip(alone, self.table.singles.tolist(), strict=True):
            mean.add_(row, alpha=value)
        square = torch.zeros_like(mean)
        for row, value in zip(alone, self.table.singles.tolist(), strict=True):
            square.add_(row, alpha=value**2)
        mean.scatter_add_(0, self.index, inside[:C])
        return mean, torch.cat([inside[C:], square])

    def second(self, found: Tensor, seen: Tensor | None) -> Tensor:
        """``sum_n <s s'>``, shape (H, H); with ``seen`` (n, D), 0 or 1, ``sum_n seen_nd <s s'>_n``, shape (D, H, H)."""
        return sum_of_pairs(found, self.index, self.n_components, seen)


def sum_of_pairs(found: Tensor, index: Tensor, n_components: int, seen: Tensor | None) -> Tensor:
    """Sum over points of symmetric matrices that are zero but among a point's candidates and on the diagonal.

    Parameters
    ----------
    found : Tensor, shape (P + H, n)
        Entries of the pairs of candidates, then what is added to the diagonal.
    index : Tensor, shape (C, n)
    n_components : int
    seen : Tensor, shape (n, D), or None
        Weights.

    Returns
    -------
    Tensor, shape (H, H) or (D, H, H)

    Examples
    --------
    One point with candidates 0 and 2 of three components, and nothing to add to the diagonal:

    >>> pairs = torch.tensor([[1.0], [5.0], [2.0], [0.0], [0.0], [0.0]])
    >>> sum_of_pairs(pairs, torch.tensor([[0], [2]]), 3, None).tolist()
    [[1.0, 0.0, 5.0], [0.0, 0.0, 0.0], [5.0, 0.0, 2.0]]
    """
    H = n_components
    i, j = pair_places(len(index), index.device)
    inside, diagonal = found[: len(i)], found[len(i) :]
    places = index[i] * H + index[j]
    if seen is None:
        total = found.new_zeros(H * H).index_add_(0, places.reshape(-1), inside.reshape(-1)).reshape(H, H)
        total = total + total.triu(1).T + total.tril(-1).T  # candidates come in any order
        total.diagonal().add_(diagonal.sum(1))
        return total
    D = seen.shape[1]
    weighted = inside[:, :, None] * seen
    flat = found.new_zeros(H * H, D).index_add_(0, places.reshape(-1), weighted.reshape(-1, D))
    by_entry = flat.T.reshape(D, H, H)
    by_entry = by_entry + by_entry.triu(1).mT + by_entry.tril(-1).mT
    by_entry.diagonal(dim1=1, dim2=2).add_((diagonal @ seen).T)
    return by_entry


@dataclass(frozen=True, eq=False)
class Own:
    """Each point's own states.

    Attributes
    ----------
    values : Tensor, shape (S, H, n)
    memo : dict
        What a model found of these states and keeps for its sums.

    Examples
    --------
    >>> states = Own(torch.tensor([[[0.0], [0.0]], [[1.0], [0.0]]]))  # two states of two components, one point
    >>> states.inclusion(torch.tensor([[0.25], [0.75]])).ravel().tolist()
    [0.75, 0.0]
    """

    values: Tensor
    memo: dict[str, Any] = field(default_factory=dict)

    def state(self, number: Tensor) -> Tensor:
        """One state of each point, by its number (n,): shape (H, n)."""
        return self.values.gather(0, number[None, None].expand(1, *self.values.shape[1:]))[0]

    def energy(self, b: Tensor, gram: "Gram") -> Tensor:
        """``s'b - s'G s / 2``, shape (S, n), from ``b`` (H, n)."""
        return (self.values * b).sum(1) - 0.5 * gram.quadratic(self.values)

    def log_prior(self, values: Sequence[float], log_odds: Sequence[float]) -> Tensor:
        """Log prior of each state over that of the zero state, shape (S, n)."""
        parts = [odds * (self.values == x).to(self.values).sum(1) for x, odds in zip(values, log_odds, strict=True)]
        return torch.stack(parts).sum(0)

    def counts(self, q: Tensor, values: Sequence[float]) -> Tensor:
        """Expected number of components with each of the values, summed over points, shape (V,)."""
        return torch.stack([(q * (self.values == value).sum(1)).sum() for value in values])

    def inclusion(self, q: Tensor) -> Tensor:
        """Probability that each component is not zero, shape (H, n)."""
        return ((self.values != 0) * q[:, None]).sum(0)

    def mean(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``<s>`` (H, n), and what `second` needs."""
        weighted = self.values * q[:, None]
        return weighted.sum(0), weighted

    def second(self, found: Tensor, seen: Tensor | None) -> Tensor:
        """``sum_n <s s'>``, shape (H, H); with ``seen`` (n, D), ``sum_n seen_nd <s s'>_n``, shape (D, H, H)."""
        if seen is None:
            return (found @ self.values.mT).sum(0)
        pairs = torch.einsum("shn,skn->hkn", found, self.values)
        return (pairs @ seen).movedim(-1, 0)


@dataclass(frozen=True, eq=False)
class Gram:
    """``G = W' diag(seen) W / variance`` of all points, or of each where entries are missing.

    Attributes
    ----------
    W : Tensor, shape (D, H)
        Over the standard deviation of the noise.
    seen : Tensor, shape (n, D), or None
        1 where an entry was observed, else 0; None: all were.

    Examples
    --------
    >>> gram = Gram(torch.tensor([[1.0, 2.0], [0.0, 2.0]]), None)
    >>> gram.whole.tolist()
    [[1.0, 2.0], [2.0, 8.0]]
    """

    W: Tensor
    seen: Tensor | None

    @cached_property
    def whole(self) -> Tensor:
        """(H, H), of a point without missing entries."""
        return self.W.T @ self.W

    def diagonal(self) -> Tensor:
        """(H, 1), or (H, n) where entries are missing."""
        if self.seen is None:
            return self.whole.diagonal()[:, None]
        return (self.W**2).T @ self.seen.T

    def pairs(self, index: Tensor) -> Tensor:
        """Entries of the pairs of candidates (C, n): shape (P, n)."""
        i, j = pair_places(len(index), index.device)
        if self.seen is None:
            return self.whole.reshape(-1)[index[i] * self.W.shape[1] + index[j]]
        columns = self.W.T[index.T] * self.seen[:, None]  # (n, C, D)
        return (columns @ columns.mT).movedim(0, -1)[i, j]

    def columns(self, index: Tensor) -> Tensor:
        """Column of one component of each point, (n,): shape (H, n)."""
        if self.seen is None:
            return self.whole[:, index]
        return self.W.T @ (self.W[:, index] * self.seen.T)

    def quadratic(self, values: Tensor) -> Tensor:
        """``s'G s`` of each point's states (S, H, n): shape (S, n)."""
        if self.seen is None:
            return (values * (self.whole @ values)).sum(1)
        return ((self.W @ values) ** 2 * self.seen.T).sum(1)


def pursue(b: Tensor, gram: Gram, n_candidates: int, best: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Candidates of each point one after the other, each given what those before it explain.

    Where components overlap, what one alone explains is a poor guide to which have a part: a weak one beside strong
    ones, or two that cancel, would be missed. This is matching pursuit (Mallat, Zhang 1993) with the model's own gain.

    Parameters
    ----------
    b : Tensor, shape (H, n)
        Dictionary times point, over the noise's variance.
    gram : Gram
    n_candidates : int
    best : callable
        Of what is left of `b`: the log odds that each component at its best value gives, and that value, both (H, n).

    Returns
    -------
    Tensor, shape (n_candidates, n), int64
        Sorted within each point.

    Examples
    --------
    >>> W = torch.eye(3)
    >>> y = torch.tensor([[0.1], [2.0], [3.0]])
    >>> pursue(W.T @ y, Gram(W, None), 2, lambda b: (b - 0.5, torch.ones_like(b))).ravel().tolist()
    [1, 2]
    """
    left, taken, chosen = b.clone(), torch.zeros_like(b), []
    for _ in range(n_candidates):
        gain, value = best(left)
        highest, index = gain.add_(taken).max(0)
        chosen.append(index)
        taken.scatter_(0, index[None], -torch.inf)
        value = value.gather(0, index[None]) * (highest > 0)
        left.sub_(gram.columns(index).mul_(value))
    return torch.stack(chosen).sort(0).values
