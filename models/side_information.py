"""Side information: numbers known of labels, whether they have training rows or not.

A mode's table becomes one row of features for each label in it, and a last row for all labels that it lacks. Numeric
columns are standardised, with the mean where a number is missing; strings, categories and truth values have a column of
zeros and ones for each value, centred. Where a column lacks numbers, and for the last row, another column says so.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from probtensor.axes import Axis, CategoricalAxis, axis_from_state
from probtensor.comm import Comm

__all__ = [
    "MAX_FEATURES",
    "Side",
    "check_the_same",
    "side_codes",
    "side_features",
    "side_of",
    "sides_from_state",
    "sides_to_state",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_FEATURES = 256  # of a mode: the effects' equations have so many unknowns


class Side(NamedTuple):
    """Features of one mode's labels.

    Attributes
    ----------
    mode : int
        Its number.
    axis : CategoricalAxis
        The S labels that have features.
    features : tuple of str
        Their names, p.
    table : ndarray, shape (S + 1, p)
        The last row is that of labels without features.
    """

    mode: int
    axis: CategoricalAxis
    features: tuple[str, ...]
    table: FloatArray

    @property
    def names(self) -> list[str]:
        """Names of the features, p."""
        return list(self.features)


def side_of(given: Mapping[str, Any] | None, axes: Sequence[Axis]) -> tuple[Side, ...]:
    """Features of each mode that a table was given for, in the order of the modes.

    Parameters
    ----------
    given : mapping of str to DataFrame, optional
        Tables indexed by label, by the mode's name.
    axes : sequence of Axis
        Fitted.

    Raises
    ------
    ValueError
        If a table is not of a categorical mode, has repeated or missing labels, none of the training's, columns that
        are no features, or too many.

    Examples
    --------
    >>> films = pd.DataFrame({"year": [1950.0, 1990.0, None], "colour": [False, True, True]}, index=["a", "b", "c"])
    >>> (side,) = side_of({"film": films}, [CategoricalAxis("film").fit(["a", "b"])])
    >>> side.names
    ['year', 'year missing', 'colour=False', 'colour=True', 'no row']
    >>> side.table[-1].tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0]
    """
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise ValueError(f"side_information: expected tables by the names of modes, got {type(given).__name__}")
    modes = {str(axis.name): k for k, axis in enumerate(axes) if isinstance(axis, CategoricalAxis)}
    if unknown := [name for name in given if name not in modes]:
        raise ValueError(f"side_information: expected names of categorical modes {list(modes)}, got {unknown[0]!r}")
    return tuple(_of_mode(name, given[name], modes[name], axes[modes[name]]) for name in modes if name in given)


def check_the_same(sides: Sequence[Side], comm: Comm) -> None:
    """Raise ValueError, on all ranks, where they differ in side information."""
    digest = hashlib.sha256()
    for side in sides:
        digest.update(json.dumps([side.mode, side.axis.to_state(), side.names]).encode())
        digest.update(side.table.tobytes())
    if len(set(comm.gather_bytes(digest.digest()))) > 1:
        raise ValueError("side_information: expected the same tables on every rank, got others")


def side_codes(side: Side, column: Any) -> IntArray:
    """Row (n,) of the features' table of each label of a column (n,)."""
    found = side.axis.encode(column)
    return np.where(found < 0, side.axis.size, found)


def side_features(sides: Sequence[Side], codes: IntArray) -> FloatArray:
    """Features (n, sum of p) at rows (n, n_sides) of the modes' tables."""
    parts = [side.table[code] for side, code in zip(sides, codes.T, strict=True)]
    return np.concatenate([np.zeros((len(codes), 0)), *parts], axis=1)


def sides_to_state(sides: Sequence[Side]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and JSON values of the features of labels."""
    arrays = {f"side.{j}": torch.from_numpy(side.table) for j, side in enumerate(sides)}
    return arrays, {"sides": [[side.mode, side.axis.to_state(), list(side.features)] for side in sides]}


def sides_from_state(arrays: dict[str, Tensor], meta: dict[str, Any]) -> tuple[Side, ...]:
    """What `sides_to_state` was given."""
    sides = []
    for j, (mode, state, names) in enumerate(meta.get("sides", ())):
        axis = axis_from_state(state)
        assert isinstance(axis, CategoricalAxis)
        sides.append(Side(mode, axis, tuple(names), arrays[f"side.{j}"].cpu().numpy()))
    return tuple(sides)


def _of_mode(name: str, table: Any, mode: int, axis: Axis) -> Side:
    said = f"side_information[{name!r}]"
    if not isinstance(table, pd.DataFrame) or not table.shape[1] or not len(table):
        raise ValueError(f"{said}: expected a DataFrame with rows and columns, got {type(table).__name__}")
    if table.index.hasnans or table.index.has_duplicates:
        raise ValueError(f"{said}: expected one row a label, got labels that repeat or are missing")
    labels = CategoricalAxis(name).fit(np.asarray(table.index, dtype=object))
    assert isinstance(axis, CategoricalAxis)
    if not (labels.encode(np.asarray(axis.labels, dtype=object)) >= 0).any():
        shown = table.index[:3].tolist()
        raise ValueError(f"{said}: expected rows for labels such as {axis.labels[:3].tolist()}, got {shown}")
    names, columns = [], []
    for column in table.columns:
        for label, numbers in _numbers(table[column], str(column), said):
            names.append(label)
            columns.append(numbers)
    if len(names) >= MAX_FEATURES:
        raise ValueError(f"{said}: expected fewer than {MAX_FEATURES} features, got {len(names)}")
    numbers = np.zeros((len(table) + 1, len(names) + 1))
    place = labels.encode(np.asarray(table.index, dtype=object))
    numbers[place, :-1] = np.stack(columns, axis=1)
    numbers[-1, -1] = 1.0
    return Side(mode, labels, (*names, "no row"), numbers)


def _numbers(column: Any, name: str, said: str) -> list[tuple[str, FloatArray]]:
    """Named features of mean 0, one or more, of one column."""
    missing = column.isna().to_numpy(dtype=bool)
    found = []
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        if np.isinf(numbers).any():
            raise ValueError(f"{said}: expected finite numbers or NaN in column {name!r}, got an infinite one")
        known = numbers[~missing]
        scale = float(known.std()) if len(known) else 0.0
        centred = np.where(missing, 0.0, numbers - (known.mean() if len(known) else 0.0))
        found.append((name, centred / scale if scale > 0 else np.zeros(len(numbers))))
    elif isinstance(column.dtype, pd.CategoricalDtype) or column.dtype.kind in "bOUT":
        codes, values = pd.factorize(column.astype(object).where(~missing, None), sort=False)
        for value in sorted(range(len(values)), key=lambda i: str(values[i])):
            found.append((f"{name}={values[value]}", _centred(codes == value)))
    else:
        kinds = "numbers, strings, categories or truth values"
        raise ValueError(f"{said}: expected {kinds} in column {name!r}, got {column.dtype}")
    return [*found, (f"{name} missing", _centred(missing))] if missing.any() else found


def _centred(flag: npt.NDArray[np.bool_]) -> FloatArray:
    return np.asarray(flag - flag.mean())
