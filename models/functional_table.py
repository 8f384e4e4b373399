"""Rows of one rank on their way into the model: numbered, dealt by cell, and as the model takes them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probtensor.cells import merge_rows, single_rows
from probtensor.comm import Comm
from probtensor.data import group_cells
from probtensor.likelihoods import StudentT
from probtensor.models.functional_state import Rows
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.resources import RandomState, make_generator

__all__ = [
    "Table",
    "has_repeated_cells",
    "in_groups",
    "number_rows",
    "plain_rows",
    "shared_generator",
    "spread_cells",
    "table_rows",
    "uniform",
]


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


def shared_generator(random_state: RandomState, comm: Comm) -> torch.Generator:
    """A generator in the same state on every rank: that of rank 0's seed."""
    generator = make_generator(random_state)
    if comm.size == 1:
        return generator
    return make_generator(int(comm.broadcast(torch.tensor([generator.initial_seed()]))[0]))


def number_rows(values: Tensor, comm: Comm) -> Tensor:
    """Number of each row of this rank among those of all ranks, in rank order; (n,), int64."""
    sizes = torch.zeros(comm.size, dtype=torch.int64)
    sizes[comm.rank] = len(values)
    first = int(comm.sum(sizes)[: comm.rank].sum())
    return torch.arange(first, first + len(values), device=values.device)


def has_repeated_cells(table: Table, comm: Comm) -> bool:
    """Whether two rows of one rank are of one cell, on any rank."""
    repeated = len(group_cells(table.positions.cpu().numpy())[1]) < len(table.values)
    return float(comm.sum(table.values.new_tensor([float(repeated)]))) > 0


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
    rows, positions = plain_rows(model, table)
    return in_groups(model, rows, [f.size for f in model.functions]), positions


def in_groups(model: FunctionalTucker, rows: Rows, sizes: list[int]) -> Rows:
    """The rows, for the CP form on a GPU in the order of each mode too; the modes have so many coordinates."""
    if model.form != "cp" or len(model.functions) < 2 or not rows.values.is_cuda:
        return rows
    from probtensor.contract_cuda import MAX_ROWS, group_rows  # it needs Triton, which only CUDA builds of torch bring

    if rows.values.shape[0] > MAX_ROWS:
        return rows
    return rows._replace(groups=group_rows(rows.positions, sizes))


def plain_rows(model: FunctionalTucker, table: Table) -> tuple[Rows, Tensor]:
    """What `table_rows` gives, in the rows' own order only."""
    likelihood, count, precision = model.likelihood, table.count, table.precision
    if likelihood is None:
        return Rows(table.positions.T.contiguous(), table.values, count), table.positions
    if isinstance(likelihood, StudentT) and likelihood.nugget:
        cells = merge_rows(table.positions, table.values, count, precision)
        return Rows(cells.positions.T.contiguous(), cells.entries.value, None, cells.entries), cells.positions
    entries = single_rows(table.values, count, precision)
    return Rows(table.positions.T.contiguous(), table.values, None, entries), table.positions
