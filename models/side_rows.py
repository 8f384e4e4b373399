"""Features of labels as rows of a factor take them: in one unit, training labels first.

The rows of a mode with features are numbered: T training labels, the S labels of the features' table, and one more for
labels that have none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from probtensor.axes import Axis
from probtensor.intake import Where
from probtensor.models.side_information import Side, side_codes

__all__ = ["effects_table", "scaled_features", "side_positions", "with_side_rows"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def scaled_features(side: Side, labels: Any) -> tuple[FloatArray, FloatArray]:
    """Features of all rows, and their unit.

    Parameters
    ----------
    side : Side
    labels : array_like, shape (T,)
        Of the training.

    Returns
    -------
    features : ndarray, shape (T + S + 1, p)
        The mean of the squared length of those training labels' rows that have features is one; so is that of a label
        without.
    unit : ndarray, shape (p,)
        What `side.table` was divided by.

    Examples
    --------
    >>> from probtensor.axes import CategoricalAxis
    >>> table = np.array([[-3.0, 0], [3, 0], [0, 1]])
    >>> side = Side(0, CategoricalAxis("film").fit(["a", "b"]), ("year", "no row"), table)
    >>> scaled_features(side, ["b"])[0].tolist()
    [[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    codes = side_codes(side, np.asarray(labels, dtype=object))
    length = np.sqrt(np.square(side.table[codes[codes < side.axis.size]]).sum(1).mean())
    unit = np.append(np.full(side.table.shape[1] - 1, length if length > 0 else 1.0), 1.0)
    features = side.table / unit
    return np.concatenate([features[codes], features]), unit


def side_positions(side: Side, size: int, column: Any, positions: IntArray) -> IntArray:
    """Rows (n,) of labels of which `positions` (n,) gives those among `size` training labels, -1 where it has none.

    Examples
    --------
    >>> from probtensor.axes import CategoricalAxis
    >>> side = Side(0, CategoricalAxis("film").fit(["a", "b"]), ("year",), np.zeros((3, 1)))
    >>> side_positions(side, 4, ["a", "b", "c"], np.array([-1, 3, -1])).tolist()  # "b" is the last of the four
    [4, 3, 6]
    """
    return np.where(positions < 0, size + side_codes(side, column), positions)


def with_side_rows(sides: Sequence[Side], axes: Sequence[Axis], where: Where) -> Tensor:
    """Rows (n, K) of the entries asked for: positions, and `side_positions` in modes that have features."""
    positions = where.positions.clone()
    for side in sides:
        column, axis = positions[:, side.mode], axes[side.mode]
        found = side_positions(side, axis.size, where.table[axis.name], column.cpu().numpy())
        column.copy_(torch.from_numpy(found))
    return positions


def effects_table(side: Side, labels: Any, components: Tensor, effect: Tensor | None, scale: float) -> pd.DataFrame:
    """Means or standard deviations of coefficients, a row a feature, in the features' own unit.

    Parameters
    ----------
    side : Side
    labels : array_like, shape (T,)
        Of the training.
    components : Tensor, shape (p, R)
        Of `scaled_features`.
    effect : Tensor, shape (p,), optional
        Of the main effect.
    scale : float
        Unit of the main effect.
    """
    _, unit = scaled_features(side, labels)
    table = pd.DataFrame(components.cpu().numpy() / unit[:, None], index=pd.Index(side.names, name="feature"))
    if effect is not None:
        table["main effect"] = scale * effect.cpu().numpy() / unit
    return table
