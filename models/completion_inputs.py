"""What neural tensor completion knows of a coordinate: a label, and smooth features of continuous modes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from probtensor.axes import Axis, ContinuousAxis
from probtensor.blocks import scramble

__all__ = ["bin_edges", "distinct_keys", "encode", "n_labels"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_BINS = 64  # labels of a continuous mode
WAVES = 4  # sines and cosines of a continuous mode, a factor 2 apart


def bin_edges(axes: Sequence[Axis]) -> dict[str, FloatArray]:
    """Edges of each continuous mode between bins of about as many distinct coordinates each, one a bin where few."""
    return {str(axis.name): _edges(axis.coordinates) for axis in axes if isinstance(axis, ContinuousAxis)}


def n_labels(axes: Sequence[Axis], edges: Mapping[str, FloatArray]) -> tuple[int, ...]:
    """Labels of each mode; a continuous one has its bins."""
    return tuple(len(edges[str(axis.name)]) + 1 if isinstance(axis, ContinuousAxis) else axis.size for axis in axes)


def encode(
    axes: Sequence[Axis],
    edges: Mapping[str, FloatArray],
    seen: Mapping[str, npt.NDArray[np.bool_]],
    encoded: Sequence[npt.NDArray[Any]],
) -> tuple[IntArray, FloatArray]:
    """Labels (n, K), -1 where unknown, and smooth features (n, q) of the continuous modes.

    Parameters
    ----------
    axes : sequence of Axis
        Fitted.
    edges : mapping of str to ndarray
        See `bin_edges`.
    seen : mapping of str to ndarray of bool
        Which labels of each categorical mode have a training row.
    encoded : sequence of ndarray, shape (n,)
        Coordinates of a continuous mode, positions (-1: unknown) of a categorical one.
    """
    labels, smooth = [], [np.zeros((len(encoded[0]), 0))]
    for axis, column in zip(axes, encoded, strict=True):
        if isinstance(axis, ContinuousAxis):
            labels.append(np.searchsorted(edges[str(axis.name)], column).astype(np.int64))
            smooth.append(_waves(np.asarray(column, dtype=np.float64), axis.coordinates))
        else:
            unseen = np.append(~seen[str(axis.name)], True)
            labels.append(np.where(unseen[column], -1, column).astype(np.int64))
    return np.stack(labels, axis=1), np.concatenate(smooth, axis=1)


def distinct_keys(keys: IntArray, weight: FloatArray) -> IntArray:
    """Keys in [0, 2^63) that rows of equal keys (n,) do not share; all of these are on one rank.

    Examples
    --------
    >>> found = distinct_keys(np.array([5, 7, 5]), np.array([2.0, 1.0, 1.0]))
    >>> len(set(found.tolist())), bool(found[0] == distinct_keys(np.array([5, 5]), np.array([1.0, 2.0]))[1])
    (3, True)
    """
    order = np.lexsort((weight, keys))
    first = np.flatnonzero(np.diff(keys[order], prepend=-1))
    place = np.arange(len(keys)) - np.repeat(first, np.diff(np.append(first, len(keys))))
    found = np.empty(len(keys), dtype=np.int64)
    found[order] = scramble(torch.from_numpy(keys[order] * 1_000_003 + place)).numpy()
    return found


def _edges(coordinates: FloatArray) -> FloatArray:
    first = np.linspace(0, len(coordinates), min(MAX_BINS, len(coordinates)) + 1)[1:-1].round().astype(np.int64)
    edges: FloatArray = 0.5 * (coordinates[first - 1] + coordinates[first])
    return edges


def _waves(column: FloatArray, coordinates: FloatArray) -> FloatArray:
    """A line and waves over the range of the coordinates, (n, 1 + 2 WAVES); constant outside."""
    low, high = coordinates[0], coordinates[-1]
    unit = (column.clip(low, high) - low) / (high - low if high > low else 1.0)
    phase = math.pi * unit[:, None] * 2.0 ** np.arange(WAVES)
    return np.concatenate([2 * unit[:, None] - 1, np.sin(phase), np.cos(phase)], axis=1)
