"""Rows of one rank on their way into the model."""

from torch import Tensor

from probtensor.blocks import scramble
from probtensor.cells import merge_rows, single_rows
from probtensor.comm import Comm
from probtensor.data import group_cells
from probtensor.intake import Table
from probtensor.likelihoods import StudentT
from probtensor.models.functional_state import Rows
from probtensor.models.functional_tucker import FunctionalTucker

__all__ = [
    "has_repeated_cells",
    "in_groups",
    "plain_rows",
    "table_rows",
    "uniform",
]


def has_repeated_cells(table: Table, comm: Comm) -> bool:
    """Whether two rows of one rank are of one cell, on any rank."""
    repeated = len(group_cells(table.positions.cpu().numpy())[1]) < len(table.values)
    return float(comm.sum(table.values.new_tensor([float(repeated)]))) > 0


def uniform(key: Tensor, seed: int) -> Tensor:
    """A uniform number in [0, 1) for the key of each row (n,): the same whichever rank holds the row."""
    return (scramble(key.cpu() + seed).double() / 2.0**63).to(key.device)


def table_rows(model: FunctionalTucker, table: Table) -> tuple[list[Rows], list[Tensor]]:
    """The rows of each block as the model takes them, and the positions (C, K) of their entries; on a GPU one block."""
    parts = [plain_rows(model, part) for part in ([table] if table.values.is_cuda else table.blocks())]
    sizes = [f.size for f in model.functions]
    return [in_groups(model, rows, sizes) for rows, _ in parts], [positions for _, positions in parts]


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
