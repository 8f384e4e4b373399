"""Rows that share all their coordinates: one cell of the tensor, observed more than once."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probtensor.data import group_cells
from probtensor.likelihoods import Entries

__all__ = ["Cells", "find_cells", "merge_rows", "single_rows"]


class Cells(NamedTuple):
    """The distinct cells of a table.

    Attributes
    ----------
    positions : Tensor, shape (C, K), int64
        Their coordinates' positions, in the order in which the table first names them.
    entries : Entries
        What the rows of each say.
    """

    positions: Tensor
    entries: Entries


def single_rows(values: Tensor, count: Tensor | None = None, precision: Tensor | None = None) -> Entries:
    """Every row an entry of its own.

    Parameters
    ----------
    values : Tensor, shape (n,)
    count : Tensor, shape (n,), optional
        How often each row counts. Default: once.
    precision : Tensor, shape (n,), optional
        Relative precision of each row. Default: ones.

    Returns
    -------
    Entries
    """
    count = torch.ones_like(values) if count is None else count
    precision = torch.ones_like(values) if precision is None else precision
    return Entries(count, count * precision, values, torch.zeros_like(values), count * precision.log())


def merge_rows(
    positions: Tensor, values: Tensor, count: Tensor | None = None, precision: Tensor | None = None
) -> Cells:
    """All rows of a cell as one entry; nothing that a Gaussian or Student-t likelihood looks at is lost.

    Parameters
    ----------
    positions : Tensor, shape (n, K), int64
    values : Tensor, shape (n,), float64
    count, precision : Tensor, shape (n,), optional
        As in `single_rows`.

    Returns
    -------
    Cells

    Examples
    --------
    >>> cells = merge_rows(torch.tensor([[0, 1], [2, 2], [0, 1]]), torch.tensor([1.0, 5.0, 3.0]))
    >>> cells.positions.tolist(), cells.entries.value.tolist(), cells.entries.scatter.tolist()
    ([[0, 1], [2, 2]], [2.0, 5.0], [2.0, 0.0])
    """
    rows = single_rows(values, count, precision)
    index, first = group_cells(positions.cpu().numpy())
    cell = torch.from_numpy(index).to(values.device)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(first)).index_add_(0, cell, x)

    weight = total(rows.weight)
    mean = total(rows.weight * values) / weight
    # From the deviations: the difference of two large sums would lose the digits of a small scatter.
    scatter = total(rows.weight * (values - mean[cell]) ** 2)
    entries = Entries(total(rows.count), weight, mean, scatter, total(rows.log_weight))
    return Cells(positions[torch.from_numpy(first).to(positions.device)], entries)


def find_cells(cells: Tensor, positions: Tensor) -> Tensor:
    """Where each row's cell stands among the given ones, -1 where it is none of them.

    Parameters
    ----------
    cells : Tensor, shape (C, K), int64
        Distinct.
    positions : Tensor, shape (n, K), int64
        With -1 for a coordinate that was not seen.

    Returns
    -------
    Tensor, shape (n,), int64

    Examples
    --------
    >>> find_cells(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[2, 2], [2, 1], [-1, 1]])).tolist()
    [1, -1, -1]
    """
    if not len(cells) or not len(positions):
        return torch.full((len(positions),), -1, device=positions.device)
    known, asked = (_index(x.cpu().numpy()) for x in (cells, positions))
    found = known.get_indexer(asked)
    return torch.from_numpy(np.asarray(found, dtype=np.int64)).to(positions.device)


def _index(positions: np.ndarray) -> pd.Index:
    if positions.shape[1] == 1:
        return pd.Index(positions[:, 0])
    return pd.MultiIndex.from_arrays(list(positions.T))
