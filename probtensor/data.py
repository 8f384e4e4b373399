"""What was observed: tables of coordinates and values, validated once. `probtensor.readers` makes them from files.

A table has one row an observation and one column a mode. Nothing here has the tensor's volume. Rows in messages count
from 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pandas.api import types as ptypes

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.columns import FloatArray, IntArray, as_series, dates_of, numeric, to_cpu_array

Duplicates = Literal["observations", "error", "sum", "mean"]

_CONTINUOUS = {"date", "floating", "datetime64", "datetime", "timedelta64", "timedelta"}
_CATEGORICAL = {"string", "categorical", "boolean", "integer", "empty"}


@dataclass(frozen=True, eq=False)
class Observations:
    """The observed entries of a tensor. Build it with `Observations.from_table`, which validates.

    Parameters
    ----------
    axes : tuple of Axis
        One fitted axis a mode, in the order of the columns.
    positions : torch.Tensor
        int64 (n, K); where each row's coordinates stand in `axes`.
    values : torch.Tensor
        float64 (n,), finite.

    Examples
    --------
    >>> data = Observations.from_table(pd.DataFrame({"cell": ["a", "b"], "dose": [0.1, 0.2]}), [1.0, 2.0])
    >>> data.shape, data.n_observed, data.positions.tolist()
    ((2, 2), 2, [[0, 0], [1, 1]])
    """

    axes: tuple[Axis, ...]
    positions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def from_table(
        cls, X: Any, y: Any, axes: Sequence[Axis] | None = None, duplicates: Duplicates = "observations"
    ) -> Self:
        """Validate a table of coordinates and its values; keep copies, leave what was passed as it is.

        Parameters
        ----------
        X : DataFrame or array_like of shape (n, K)
            Coordinates, see `as_table`.
        y : array_like of shape (n,)
            Values: real numbers or booleans, finite.
        axes : sequence of Axis, optional
            See `resolve_axes`. Axes that are fitted already are used as they are.
        duplicates : {"observations", "error", "sum", "mean"}, default "observations"
            What rows with the same coordinates are: several observations of one cell, an error, or parts to add up
            or to average (in float64; the merged row stands where its cell came first).

        Raises
        ------
        ValueError
            If there is no row, lengths differ, a value or a coordinate is missing or infinite, a fitted axis has not
            seen a coordinate, or `duplicates` is "error" and there are some.

        Warns
        -----
        UserWarning
            If a column that is not among the axes given is text, and all of it ISO 8601 dates.

        Examples
        --------
        >>> data = Observations.from_table([["a", 0.5], ["b", 0.5], ["a", 0.5]], [1.0, 2.0, 3.0], duplicates="mean")
        >>> data.shape, data.positions.tolist(), data.values.tolist()
        ((2, 1), [[0, 0], [1, 0]], [2.0, 2.0])
        """
        if duplicates not in (policies := ("observations", "error", "sum", "mean")):
            raise ValueError(f"duplicates: expected one of {policies}, got {duplicates!r}")
        table = as_table(X)
        values = _as_values(y, len(table))
        fitted, columns = [], []
        resolved = resolve_axes(table, axes)
        asked = {axis.name for axis in axes or ()}  # None: each column, by position
        for axis in resolved:
            if isinstance(axis, CategoricalAxis) and not asked & {axis.name, None}:
                _warn_of_dates(table[axis.name])
            axis = axis if axis.is_fitted else axis.fit(table[axis.name])
            fitted.append(axis)
            columns.append(_seen_positions(axis, table))
        positions = np.stack(columns, axis=1)
        if duplicates != "observations":
            cells, first = group_cells(positions)
            if duplicates == "error" and len(first) < len(table):
                row = int(np.flatnonzero(first[cells] != np.arange(len(cells)))[0])
                raise ValueError(
                    f"X: expected distinct coordinates (duplicates='error'), got row {row} equal to row "
                    f"{first[cells[row]]}: {table.iloc[row].to_dict()} (such rows: {len(table) - len(first)})"
                )
            positions, values = positions[first], _merge(cells, len(first), values, mean=duplicates == "mean")
        return cls(tuple(fitted), torch.from_numpy(positions), torch.from_numpy(values))

    @property
    def n_observed(self) -> int:
        """Number of observations n."""
        return len(self.values)

    @property
    def order(self) -> int:
        """Number of modes K."""
        return len(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of distinct coordinates of each mode."""
        return tuple(axis.size for axis in self.axes)


def as_table(X: Any) -> pd.DataFrame:
    """Return coordinates as a DataFrame, one column a mode.

    Parameters
    ----------
    X : DataFrame or array_like of shape (n, K)
        A DataFrame stays as it is; only column names that are not strings become strings. Arrays, torch tensors and
        lists of rows get the columns "mode_0", "mode_1", ...; each column of a list or an object array has a type of
        its own.

    Raises
    ------
    ValueError
        If `X` has not two dimensions, has no column, or has two columns of one name.

    Examples
    --------
    >>> as_table([["a", 0.5], ["b", 1.5]]).dtypes.astype(str).to_dict()
    {'mode_0': 'str', 'mode_1': 'float64'}
    """
    if isinstance(X, pd.DataFrame):
        names = [str(column) for column in X.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"X: expected distinct column names, got {names}")
        table = X if all(isinstance(column, str) for column in X.columns) else X.set_axis(names, axis=1)
    else:
        table = _array_as_table(to_cpu_array(X))
    if table.shape[1] == 0:
        raise ValueError(f"X: expected at least one column, got shape {table.shape}")
    return table


def infer_axis(column: npt.ArrayLike, name: str | None) -> Axis:
    """Return the unfitted axis that the type of `column` (n,) suggests.

    Floats, datetimes, dates and timedeltas are continuous; strings, categories, booleans and integers categorical.

    Raises
    ------
    ValueError
        If the type suggests neither, for example complex numbers or strings mixed with numbers.

    Examples
    --------
    >>> infer_axis([0.5, 1.5], "dose"), infer_axis(["a", "b"], "cell")
    (ContinuousAxis(name='dose', kernel=Matern(nu=1.5) + White()), CategoricalAxis(name='cell'))
    """
    kind = ptypes.infer_dtype(as_series(column, name), skipna=True)
    if kind in _CONTINUOUS:
        return ContinuousAxis(name)
    if kind in _CATEGORICAL:
        return CategoricalAxis(name)
    raise ValueError(
        f"column {name!r}: expected numbers, datetimes, strings, booleans or categories, got {kind} values;"
        " name an axis for it"
    )


def resolve_axes(table: pd.DataFrame, axes: Sequence[Axis] | None = None) -> tuple[Axis, ...]:
    """Return one named axis a column of `table`, in the order of its columns.

    Parameters
    ----------
    table : DataFrame
        n rows, K columns.
    axes : sequence of Axis, optional
        Where all have names, each replaces what `infer_axis` says of the column of that name, and columns without
        one are inferred. Where one has no name, there must be K, and they go by position.

    Raises
    ------
    ValueError
        If a name is unknown or given twice, or axes without names are not K.

    Examples
    --------
    >>> from probtensor.axes import ContinuousAxis
    >>> from probtensor.kernels import Matern
    >>> resolve_axes(as_table([["a", 1], ["b", 2]]), [ContinuousAxis("mode_1", Matern(2.5))])
    (CategoricalAxis(name='mode_0'), ContinuousAxis(name='mode_1', kernel=Matern(nu=2.5)))
    """
    names = list(table.columns)
    if axes is not None and not isinstance(axes, Sequence):
        raise ValueError(f"axes: expected a sequence of ContinuousAxis and CategoricalAxis, got {axes!r}")
    given = [] if axes is None else list(axes)
    for axis in given:
        if not isinstance(axis, Axis):
            raise ValueError(f"axes: expected ContinuousAxis or CategoricalAxis, got {axis!r}")
    if any(axis.name is None for axis in given):
        if len(given) != len(names):
            raise ValueError(f"axes: expected one axis for each of the columns {names}, got {len(given)}")
        given = [replace(axis, name=axis.name or name) for axis, name in zip(given, names, strict=True)]
        if (came := [axis.name for axis in given]) != names:
            raise ValueError(f"axes: expected the order of the columns {names} where some have no name, got {came}")
    by_name = {axis.name: axis for axis in given}
    if unknown := [name for name in by_name if name not in names]:
        raise ValueError(f"axes: expected names among the columns {names}, got {unknown}")
    if len(by_name) < len(given):
        raise ValueError(f"axes: expected distinct names, got {[axis.name for axis in given]}")
    return tuple(by_name[name] if name in by_name else infer_axis(table[name], name) for name in names)


def _array_as_table(array: Any) -> pd.DataFrame:
    if not isinstance(array, np.ndarray):
        # Lists keep the type of each column: NumPy would turn [["a", 1.0]] into strings.
        array = np.asarray(array, dtype=object if isinstance(array, (list, tuple)) else None)
    if array.ndim != 2:
        hint = "; reshape one mode with X.reshape(-1, 1)" if array.ndim == 1 else ""
        raise ValueError(f"X: expected shape (n, K), one row an observation, got {array.shape}{hint}")
    table = pd.DataFrame(array, columns=[f"mode_{k}" for k in range(array.shape[1])])
    return table.infer_objects() if array.dtype == object else table


def _as_values(y: Any, n_rows: int) -> FloatArray:
    """Return y as a new float64 (n,) array, or raise."""
    y = to_cpu_array(y)
    if (shape := np.shape(y)) != (n_rows,):
        hint = "; flatten it with y.ravel()" if shape == (n_rows, 1) else ""
        raise ValueError(f"y: expected shape ({n_rows},) as X has rows, got {shape}{hint}")
    if n_rows == 0:
        raise ValueError("X, y: expected at least one observation, got none")
    values = np.array(numeric(pd.Series(y), "y", "y").to_numpy(dtype=np.float64, na_value=np.nan))
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        came = f"{values[bad[0]]} at row {bad[0]} (rows like it: {len(bad)})"
        raise ValueError(f"y: expected finite values, got {came}; leave holes out of X and y")
    return values


def _warn_of_dates(column: pd.Series) -> None:
    if dates_of(column) is not None:
        warnings.warn(
            f"column {column.name!r} has dates as text, and is taken for labels without an order; it is continuous "
            f"after pd.to_datetime, or with axes=[ContinuousAxis({column.name!r})]; a CategoricalAxis keeps labels",
            UserWarning,
            stacklevel=2,
        )


def _seen_positions(axis: Axis, table: pd.DataFrame) -> IntArray:
    positions = axis.positions(table[axis.name])
    if len(unseen := np.flatnonzero(positions < 0)):
        came = f"{table[axis.name].iloc[unseen[0]]!r} at row {unseen[0]} (rows like it: {len(unseen)})"
        raise ValueError(f"X: expected coordinates that the fitted axis {axis.name!r} has seen, got {came}")
    return positions


def group_cells(positions: IntArray) -> tuple[IntArray, IntArray]:
    """Return the cell number (n,) of each row of positions (n, K), in order of appearance, and where each came first.

    Cells are renumbered after each mode, so that numbers stay below n times a mode's size and cannot overflow.
    """
    cells = np.zeros(len(positions), dtype=np.int64)
    for column in positions.T:
        cells = pd.factorize(cells * (column.max(initial=0) + 1) + column)[0].astype(np.int64)
    first = np.empty(cells.max(initial=-1) + 1, dtype=np.int64)
    first[cells[::-1]] = np.arange(len(cells))[::-1]
    return cells, first


def _merge(cells: IntArray, n_cells: int, values: npt.NDArray[np.floating[Any]], *, mean: bool) -> FloatArray:
    """Return the sum or the mean of each cell's values, accumulated in float64 whatever the dtype of `values`."""
    sums = np.bincount(cells, weights=values, minlength=n_cells).astype(np.float64, copy=False)
    return sums / np.bincount(cells, minlength=n_cells) if mean else sums
