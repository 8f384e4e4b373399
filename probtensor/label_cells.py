"""Tables whose columns are all labels: positions of rows, and the dense tensor of cell means with its mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from probtensor.axes import CategoricalAxis
from probtensor.data import as_table

__all__ = ["dense_cells", "fit_cells", "label_positions"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def fit_cells(X: Any, y: npt.ArrayLike) -> tuple[tuple[CategoricalAxis, ...], IntArray, FloatArray]:
    """Return the label axes, the positions (n, K) of the rows on them and the checked values (n,)."""
    table = as_table(X)
    values = np.asarray(y, dtype=np.float64)
    if len(table) == 0 or values.shape != (len(table),):
        raise ValueError(f"y: expected shape ({len(table)},) as X has rows (at least 1), got {values.shape}")
    if not np.all(np.isfinite(values)):
        raise ValueError("y: expected finite values, got NaN or infinity; leave missing cells out")
    axes = tuple(CategoricalAxis(name).fit(table[name]) for name in table.columns)
    return axes, label_positions(axes, table), values


def label_positions(axes: tuple[CategoricalAxis, ...], X: Any) -> IntArray:
    """Return the positions (n, K) of the rows on the axes, -1 for a label that was not seen."""
    table = as_table(X)
    names = [axis.name for axis in axes]
    if list(table.columns) != names:
        raise ValueError(f"X: expected the columns {names}, got {list(table.columns)}")
    return np.stack([axis.positions(table[axis.name]) for axis in axes], axis=1)


def dense_cells(
    shape: tuple[int, ...], positions: IntArray, values: FloatArray, fill: float
) -> tuple[FloatArray, FloatArray]:
    """Return the tensor of cell means, `fill` where nothing was observed, and its mask of zeros and ones."""
    cells = np.ravel_multi_index(tuple(positions.T), shape)
    size = int(np.prod(shape))
    count = np.bincount(cells, minlength=size)
    total = np.bincount(cells, weights=values, minlength=size)
    tensor = np.where(count > 0, total / np.maximum(count, 1), fill)
    return tensor.reshape(shape), (count > 0).astype(np.float64).reshape(shape)
