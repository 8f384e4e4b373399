"""Rows of one rank as they come in: validated, and agreed upon with the other ranks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from probtensor.axes import Axis, CategoricalAxis, axis_from_state
from probtensor.blocks import block_of, number_of_blocks, scramble
from probtensor.columns import to_cpu_array
from probtensor.comm import Comm, Serial, refuse_together
from probtensor.data import Duplicates, Observations

__all__ = [
    "Table",
    "Where",
    "agree_on_axes",
    "deal",
    "observe_more",
    "observe_together",
    "row_keys",
    "row_numbers",
    "seen_after",
    "seen_labels",
]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one rank, as a model takes them.

    Attributes
    ----------
    positions : Tensor, shape (n, K), int64
        In the axes.
    values : Tensor, shape (n,)
        As given; a model gets them standardised.
    count, precision : Tensor, shape (n,), or None
        How often each row counts; one over the known variance of its value, in the same unit.
    key : Tensor, shape (n,), int64
        See `row_keys`.
    n_blocks : int
        Blocks of the rows of all ranks; see `deal`.
    """

    positions: Tensor
    values: Tensor
    count: Tensor | None
    precision: Tensor | None
    key: Tensor
    n_blocks: int = 1

    def take(self, rows: Tensor | slice) -> "Table":
        """Some of the rows, by a mask or by indexes, in the same order."""
        count = None if self.count is None else self.count[rows]
        precision = None if self.precision is None else self.precision[rows]
        return Table(self.positions[rows], self.values[rows], count, precision, self.key[rows], self.n_blocks)

    def blocks(self) -> list["Table"]:
        """The rows of each block that has some; a block without rows where none has."""
        if self.n_blocks == 1:
            return [self]
        sizes = torch.bincount(block_of(self.positions, self.n_blocks)).tolist()
        ends = [0, *accumulate(size for size in sizes if size)]
        pairs = list(pairwise(ends)) or [(0, 0)]
        return [self.take(slice(first, end)) for first, end in pairs]

    def to(self, device: torch.device) -> "Table":
        """The same rows on a device."""
        count, precision = (None if x is None else x.to(device) for x in (self.count, self.precision))
        columns = self.positions.to(device), self.values.to(device), count, precision, self.key.to(device)
        return Table(*columns, self.n_blocks)


class Where:
    """Entries asked for.

    Attributes
    ----------
    table : DataFrame, shape (n, K)
        As they were asked for.
    encoded : list of Tensor, shape (n,)
        One a mode: coordinates of a continuous mode, positions (-1: unknown) of a categorical one.
    """

    def __init__(self, axes: Sequence[Axis], table: pd.DataFrame, device: torch.device) -> None:
        self._axes, self.table = axes, table
        self.encoded = [torch.as_tensor(np.array(axis.encode(table[axis.name])), device=device) for axis in axes]

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def positions(self) -> Tensor:
        """Positions (n, K) among the training coordinates, int64; -1 where a coordinate is none of them."""
        columns = [torch.from_numpy(np.array(axis.positions(self.table[axis.name]))) for axis in self._axes]
        return torch.stack(columns, dim=1).to(self.encoded[0].device)


def seen_labels(observed: Observations, comm: Comm) -> dict[str, npt.NDArray[np.bool_]]:
    """Which labels of each categorical mode have a row on some rank: a category may have none."""
    seen = {}
    for axis, position in zip(observed.axes, observed.positions.T, strict=True):
        if isinstance(axis, CategoricalAxis):
            seen[str(axis.name)] = comm.sum(torch.bincount(position, minlength=axis.size)).numpy() > 0
    return seen


def row_numbers(given: Any, name: str, n: int) -> Tensor | None:
    """One finite positive number a row, as a new tensor, or None where none was given."""
    if given is None:
        return None
    numbers = np.array(to_cpu_array(given), dtype=float)
    if numbers.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},) as X has rows, got {numbers.shape}")
    if len(bad := np.flatnonzero(~(np.isfinite(numbers) & (numbers > 0)))):
        raise ValueError(f"{name}: expected finite numbers above 0, got {numbers[bad[0]]} at row {bad[0]}")
    return torch.from_numpy(numbers)


def observe_together(
    X: Any, y: Any, axes: Sequence[Axis] | None, duplicates: Duplicates, weights: Mapping[str, Any], comm: Comm
) -> tuple[Observations, list[Tensor | None]]:
    """Rows of this rank in axes that hold what any rank has seen; what is wrong on one rank is refused on all.

    Parameters
    ----------
    X, y
        As `Observations.from_table` takes them; on several ranks some may have no rows.
    axes : sequence of Axis, optional
    duplicates : {"observations", "error", "sum", "mean"}
    weights : mapping of str to array_like or None
        Numbers above 0, one a row, by the name of their argument.
    comm : Comm

    Returns
    -------
    Observations
    list of Tensor, shape (n,), or None
        In the order of `weights`.
    """

    def look() -> tuple[Observations | None, list[Tensor | None]]:
        if comm.size > 1 and np.shape(X)[:1] == (0,) and np.shape(y) == (0,):
            return None, [None if given is None else torch.zeros(0, dtype=torch.float64) for given in weights.values()]
        observed = Observations.from_table(X, y, axes, duplicates)
        for axis in observed.axes:
            if comm.size > 1:
                axis.to_state()  # refuses labels that could not be sent
        return observed, [row_numbers(given, name, observed.n_observed) for name, given in weights.items()]

    observed, numbers = refuse_together(comm, look)
    if comm.size == 1:
        assert observed is not None
        return observed, numbers
    agreed = agree_on_axes(None if observed is None else observed.axes, comm)
    if observed is None:
        return Observations(agreed, torch.zeros(0, len(agreed), dtype=torch.int64), torch.zeros(0).double()), numbers
    places = [torch.from_numpy(_places(old, new)) for old, new in zip(observed.axes, agreed, strict=True)]
    moved = [place[position] for place, position in zip(places, observed.positions.T, strict=True)]
    return Observations(agreed, torch.stack(moved, dim=1), observed.values), numbers


def agree_on_axes(mine: tuple[Axis, ...] | None, comm: Comm) -> tuple[Axis, ...]:
    """Axes with the distinct values of all ranks.

    Each value goes to one rank by its hash, which drops repetitions, and then to all: no rank holds more than its own
    values, its share of all ranks' and the result.

    Parameters
    ----------
    mine : tuple of Axis, or None
        Fitted to this rank's rows; None where it has none.
    comm : Comm

    Raises
    ------
    ValueError
        On all ranks, if they differ in kind, name or type of values, or no rank has rows.
    """
    if comm.size == 1 and mine is not None:
        return mine
    about = None if mine is None else [[replace(axis, distinct=None).to_state(), axis.is_sorted] for axis in mine]
    abouts = [json.loads(data) for data in comm.gather_bytes(json.dumps(about).encode())]
    first = next((about for about in abouts if about is not None), None)
    if first is None:
        raise ValueError("X, y: expected at least one observation, got none on any rank")
    for rank, other in enumerate(abouts):
        if other is not None and [state for state, _ in other] != [state for state, _ in first]:
            names = [[axis_from_state(state) for state, _ in about] for about in (first, other)]
            raise ValueError(f"X: expected the same axes on every rank, got {names[0]} and, on rank {rank}, {names[1]}")
    agreed = []
    for mode in range(len(first)):
        # Labels whose order is that of appearance stay together, so that ranks keep it.
        n_parts = comm.size if all(about[mode][1] for about in abouts if about is not None) else 1
        parts = [b""] * comm.size
        if mine is not None:
            for part, values in enumerate(mine[mode].split(n_parts)):
                parts[part] = _to_bytes(values)
        received = comm.exchange_bytes(parts)
        share = refuse_together(comm, lambda: _union(received))  # noqa: B023 - called at once
        everything = comm.gather_bytes(b"" if share is None else _to_bytes(share))
        whole = refuse_together(comm, lambda: _union(everything))  # noqa: B023
        assert whole is not None
        agreed.append(whole)
    return tuple(agreed)


def _to_bytes(axis: Axis) -> bytes:
    return json.dumps(axis.to_state()).encode() if axis.size else b""


def _union(states: Sequence[bytes]) -> Axis | None:
    """The axis of all that there are, merged in pairs."""
    axes = [axis_from_state(json.loads(state)) for state in states if state]
    while len(axes) > 1:
        axes = [a.union(b) for a, b in zip(axes[::2], axes[1::2], strict=False)] + axes[len(axes) & ~1 :]
    return axes[0] if axes else None


def row_keys(positions: Tensor, values: Tensor) -> Tensor:
    """A number in [0, 2^53) of each row (n,), int64, from what it holds: the same whichever rank has it.

    Parameters
    ----------
    positions : Tensor, shape (n, K), int64
    values : Tensor, shape (n,), float64
        As they were given.
    """
    key = scramble(values.cpu().view(torch.int64))
    for column in positions.cpu().T:
        key = scramble(key * 1_000_003 + column)
    return (key >> 10).to(values.device)


def deal(table: Table, comm: Comm) -> Table:
    """The rows in blocks: this rank's, whoever had them before.

    Parameters
    ----------
    table : Table
        Of this rank; in host memory.
    comm : Comm

    Returns
    -------
    Table
        Its rows are in the order of blocks and keys. A rank may have none.
    """
    n_blocks = number_of_blocks(int(comm.sum(torch.tensor([len(table.values)]))))
    block = block_of(table.positions, n_blocks)
    if comm.size > 1:
        K = table.positions.shape[1]
        given = [x for x in (table.count, table.precision) if x is not None]
        columns = torch.stack([*(x.double() for x in (*table.positions.T, table.key, table.values)), *given], dim=1)
        moved = comm.exchange(columns, block * comm.size // n_blocks)
        left = list(moved[:, K + 2 :].T)
        count = None if table.count is None else left.pop(0)
        precision = None if table.precision is None else left.pop(0)
        table = Table(moved[:, :K].long(), moved[:, K + 1], count, precision, moved[:, K].long())
        block = block_of(table.positions, n_blocks)
    order = torch.argsort(table.key, stable=True)
    order = order[torch.argsort(block[order], stable=True)]
    return replace(table.take(order), n_blocks=n_blocks)


def observe_more(table: pd.DataFrame, y: Any, axes: Sequence[Axis]) -> tuple[Observations, list[Tensor]]:
    """New rows in the union of fitted axes and what the rows bring; and where the old coordinates are in it.

    Parameters
    ----------
    table : DataFrame, shape (n, K)
    y : array_like, shape (n,)
    axes : sequence of Axis
        Fitted.

    Returns
    -------
    Observations
    list of Tensor, shape (T_k,), int64
    """
    fresh = [replace(axis, distinct=None).fit(table[axis.name]) for axis in axes]
    grown = [old.union(new) for old, new in zip(axes, fresh, strict=True)]
    places = [torch.from_numpy(_places(old, new)) for old, new in zip(axes, grown, strict=True)]
    return Observations.from_table(table, y, grown), places


def _places(old: Axis, new: Axis) -> npt.NDArray[np.int64]:
    assert old.distinct is not None
    return np.array(new.positions(old.distinct), dtype=np.int64)


def seen_after(
    before: dict[str, npt.NDArray[np.bool_]], axes: Sequence[Axis], observed: Observations
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which labels of the observed rows' axes have a row now or had one before, in the earlier axes."""
    seen = seen_labels(observed, Serial())
    for old, new in zip(axes, observed.axes, strict=True):
        if str(old.name) in seen:
            seen[str(old.name)][_places(old, new)[before[str(old.name)]]] = True
    return seen
