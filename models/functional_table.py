"""Rows of one rank on their way into the model: dealt by cell, and as the model takes them."""

import torch
from torch import Tensor

from probtensor.cells import merge_rows, single_rows
from probtensor.comm import Comm
from probtensor.data import group_cells
from probtensor.intake import Table, scramble
from probtensor.likelihoods import StudentT
from probtensor.models.functional_state import Rows
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.resources import RandomState, make_generator

__all__ = [
    "has_repeated_cells",
    "in_groups",
    "plain_rows",
    "shared_generator",
    "spread_cells",
    "table_rows",
    "uniform",
]


def shared_generator(random_state: RandomState, comm: Comm) -> torch.Generator:
    """A generator in the same state on every rank: that of rank 0's seed."""
    generator = make_generator(random_state)
    if comm.size == 1:
        return generator
    return make_generator(int(comm.broadcast(torch.tensor([generator.initial_seed()]))[0]))


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
        to = scramble(to * 1_000_003 + position)
    count = torch.ones_like(table.values) if table.count is None else table.count
    precision = torch.ones_like(table.values) if table.precision is None else table.precision
    columns = [*table.positions.T.to(count), table.values, count, precision, table.key.to(count)]
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


def uniform(key: Tensor, seed: int) -> Tensor:
    """A uniform number in [0, 1) for the key of each row (n,): the same whichever rank holds the row."""
    return (scramble(key.cpu() + seed).double() / 2.0**63).to(key.device)


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
