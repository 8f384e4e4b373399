"""Ways in and out: dense tensors, xarray, .tns files and tables in files, as tables of coordinates and values.

What is read goes to `Observations.from_table` or to a model's `fit`. Nothing here has the tensor's volume, except
`from_dense` and `from_xarray`, whose input has it, and `to_xarray`, whose result has it.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pandas.api import types as ptypes

from probtensor.columns import FloatArray, to_cpu_array
from probtensor.comm import Serial
from probtensor.data import as_table, resolve_axes
from probtensor.shards import read_shard

if TYPE_CHECKING:
    import xarray

Values = npt.NDArray[np.floating[Any]]


def from_dense(tensor: Any, mask: Any = None, coords: Any = None) -> tuple[pd.DataFrame, Values]:
    """Return the observed cells of a dense array as a table and its values.

    Parameters
    ----------
    tensor : array_like of shape (I_1, ..., I_K)
        Real numbers. NaN, or what a masked array masks, is a hole.
    mask : array_like of bool, same shape, optional
        True where observed; what is stored elsewhere is never looked at.
    coords : mapping of str to array_like, or sequence of array_like, optional
        What each mode's index means, in the order of the modes; a mapping names them too. Floats, datetimes and
        timedeltas become such columns; anything else a categorical column whose categories are all labels, observed
        or not. None, or None for a mode, means 0, 1, ... as labels; names are "mode_0", ... by default.

    Returns
    -------
    X : DataFrame
        (n, K) coordinates of the observed cells, last mode fastest.
    y : ndarray
        (n,) values; the tensor's floating dtype, float64 for integers and booleans.

    Raises
    ------
    ValueError
        If shapes do not agree, labels of a mode are repeated, or a cell is NaN where `mask` is True.

    Examples
    --------
    >>> X, y = from_dense([[1.0, np.nan], [3.0, 4.0]], coords={"cell": ["a", "b"], "dose": [0.1, 0.2]})
    >>> X.to_numpy().tolist(), y.tolist()
    ([['a', 0.1], ['b', 0.1], ['b', 0.2]], [1.0, 3.0, 4.0])
    """
    array = np.ma.asanyarray(to_cpu_array(tensor))
    if array.ndim == 0 or array.dtype.kind not in "fiub":
        raise ValueError(f"tensor: expected real numbers, got dtype {array.dtype} and shape {array.shape}")
    stored = array.data if array.dtype.kind == "f" else array.data.astype(np.float64)
    known = ~(np.isnan(stored) | np.ma.getmaskarray(array))
    given = known if mask is None else np.asarray(to_cpu_array(mask))
    if given.shape != array.shape or not (given.dtype == bool or np.isin(given, (0, 1)).all()):
        raise ValueError(f"mask: expected booleans of shape {array.shape}, got {given.dtype} of shape {given.shape}")
    observed = given.astype(bool)
    if len(holes := np.argwhere(observed & ~known)):
        cell = tuple(holes[0].tolist())
        raise ValueError(f"tensor: expected a number where mask is True, got NaN at {cell} (cells: {len(holes)})")
    labels = _mode_labels(array.shape, coords)
    indices = zip(labels, np.nonzero(observed), strict=True)
    return pd.DataFrame({name: _take(labels[name], index, name) for name, index in indices}), stored[observed]


def from_xarray(array: xarray.DataArray) -> tuple[pd.DataFrame, Values]:
    """Return the cells of a DataArray that are not NaN as a table, one column a dimension, and their values.

    Coordinates become columns as in `from_dense`; a dimension without coordinates gets 0, 1, ... as labels.

    Parameters
    ----------
    array : xarray.DataArray
        K dimensions with one index each.

    Returns
    -------
    X : DataFrame
        (n, K) coordinates.
    y : ndarray
        (n,) values.

    Raises
    ------
    ValueError
        If `array` is not a DataArray, or as for `from_dense`.

    Examples
    --------
    >>> import xarray
    >>> coords = {"cell": ["a", "b"], "dose": [0.1, 0.2]}
    >>> array = xarray.DataArray([[1.0, np.nan], [3.0, 4.0]], coords, ("cell", "dose"))
    >>> X, y = from_xarray(array)
    >>> X.to_numpy().tolist(), y.tolist()
    ([['a', 0.1], ['b', 0.1], ['b', 0.2]], [1.0, 3.0, 4.0])
    """
    import xarray

    if not isinstance(array, xarray.DataArray):
        raise ValueError(f"array: expected an xarray.DataArray, got {type(array).__name__}")
    return from_dense(array.to_numpy(), coords={str(dim): array.indexes.get(dim) for dim in array.dims})


def to_xarray(X: Any, values: Any, name: str | None = None) -> xarray.DataArray:
    """Return a table of cells as a DataArray. The result is dense: it has as many cells as the tensor.

    Parameters
    ----------
    X : DataFrame or array_like of shape (n, K)
        Coordinates, each row another cell.
    values : array_like of shape (n,)
        Values; integers become float64.
    name : str, optional
        Name of the result.

    Returns
    -------
    xarray.DataArray
        One dimension a column with its sorted distinct coordinates (all categories, in their order, of a
        categorical column); NaN where there is no row.

    Raises
    ------
    ValueError
        If two rows are one cell, or lengths differ.

    Examples
    --------
    >>> array = to_xarray(pd.DataFrame({"cell": ["a", "b"], "dose": [0.1, 0.2]}), [1.0, 4.0])
    >>> array.dims, array.to_numpy().tolist()
    (('cell', 'dose'), [[1.0, nan], [nan, 4.0]])
    """
    import xarray

    table, numbers = as_table(X), np.asarray(to_cpu_array(values))
    numbers = numbers if numbers.dtype.kind == "f" else numbers.astype(np.float64)
    if numbers.shape != (len(table),):
        raise ValueError(f"values: expected shape ({len(table)},) as X has rows, got {numbers.shape}")
    axes = [axis.fit(table[axis.name]) for axis in resolve_axes(table)]
    positions = np.stack([axis.positions(table[axis.name]) for axis in axes], axis=1)
    if repeated := int(pd.DataFrame(positions).duplicated().sum()):
        raise ValueError(f"X: expected each row to be another cell, got {repeated} repeated ones")
    cells = np.full([axis.size for axis in axes], np.nan, dtype=numbers.dtype)
    cells[tuple(positions.T)] = numbers
    coords = {str(axis.name): axis.distinct for axis in axes}
    return xarray.DataArray(cells, coords=coords, dims=list(coords), name=name)


def read_tns(path: str | os.PathLike[str]) -> tuple[pd.DataFrame, FloatArray]:
    r"""Read a sparse tensor in the FROSTT format: a line holds K coordinates, counted from 1, and a value.

    Parameters
    ----------
    path : path_like
        Text, gzipped if it ends in ".gz". What follows '#' and blank lines are skipped.

    Returns
    -------
    X : DataFrame
        (n, K) coordinates as they are in the file, int64.
    y : ndarray
        float64 (n,) values.

    Raises
    ------
    ValueError
        If a line is malformed (its number is named), or there is none.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "small.tns")
    ...     with open(path, "w") as file:
    ...         _ = file.write("# two entries\n1 2 0.5\n3 1 2\n")
    ...     X, y = read_tns(path)
    >>> X.to_numpy().tolist(), y.tolist()
    ([[1, 2], [3, 1]], [0.5, 2.0])
    """
    try:
        frame = pd.read_csv(path, sep=r"\s+", header=None, comment="#", low_memory=False)
    except ValueError:
        frame = pd.DataFrame()
    coordinates, values = frame.iloc[:, :-1], frame.iloc[:, -1:]
    integers = all(dtype == np.int64 for dtype in coordinates.dtypes) and coordinates.shape[1] > 0
    numbers = all(dtype.kind in "iuf" for dtype in values.dtypes) and bool(np.isfinite(values).all(axis=None))
    if not integers or not numbers or bool((coordinates < 1).any(axis=None)):
        raise ValueError(_first_fault(path))
    coordinates.columns = [f"mode_{k}" for k in range(coordinates.shape[1])]
    return coordinates, values.iloc[:, 0].to_numpy(np.float64)


def read_table(
    path: str | os.PathLike[str],
    value: str | None,
    continuous: Iterable[str] = (),
    categorical: Iterable[str] | Mapping[str, str] = (),
    columns: Iterable[str] | None = None,
) -> tuple[pd.DataFrame, FloatArray | None]:
    r"""Read coordinates and values from a csv, tsv, parquet or npz file or a zarr folder.

    The table carries what was named: `resolve_axes` says continuous or categorical as asked.

    Parameters
    ----------
    path : path_like
        Ends in .csv, .csv.gz, .tsv, .tsv.gz, .parquet, .npz or .zarr. In .npz and .zarr, arrays of shape (n,) are
        columns, and an array "X" of shape (n, K) has the columns "mode_0", "mode_1", …
    value : str or None
        Column of values; rows without one are holes and are left out. None for a file of coordinates only.
    continuous : iterable of str
        Columns of numbers (they become float64) or of ISO 8601 dates.
    categorical : iterable of str, or mapping of str to str
        Columns of labels. Integers stay integers, strings strings ("NA" too); floats and dates, which would be
        taken for continuous, become a categorical column. A mapping also says what the labels are, as
        `CategoricalAxis.label_dtype` does: with "str", 007 in a csv file is "007"; with "number" it is 7.
    columns : iterable of str, optional
        The columns that are modes, in this order. Default: all but `value`.

    Returns
    -------
    X : DataFrame
        (n, K) coordinates.
    y : ndarray or None
        float64 (n,) values; None if `value` is None.

    Raises
    ------
    ValueError
        If the suffix or a column is unknown, a column is named both ways, or does not hold what it should, or the file
        is malformed. Rows in messages are those of the file, from 0.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "fares.csv")
    ...     with open(path, "w") as file:
    ...         _ = file.write("zone,hour,fare\n007,8.5,12\n008,9.5,\n")
    ...     X, y = read_table(path, "fare", categorical={"zone": "str"})
    >>> X.to_numpy().tolist(), y.tolist()  # the second row has no value
    ([['007', 8.5]], [12.0])
    """
    return read_shard(path, Serial(), value, continuous, categorical, columns)


def _mode_labels(shape: tuple[int, ...], coords: Any) -> dict[str, pd.Index]:
    if coords is None:
        coords = [None] * len(shape)
    if not isinstance(coords, Mapping):
        coords = {f"mode_{k}": labels for k, labels in enumerate(coords)}
    if len(coords) != len(shape):
        raise ValueError(f"coords: expected one entry a mode for shape {shape}, got {len(coords)}: {list(coords)}")
    labels = {}
    for (name, given), size in zip(coords.items(), shape, strict=True):
        labels[name] = pd.RangeIndex(size) if given is None else pd.Index(to_cpu_array(given))
        if len(labels[name]) != size:
            raise ValueError(f"coords: expected {size} coordinates for mode {name!r}, got {len(labels[name])}")
    return labels


def _take(labels: pd.Index, index: npt.NDArray[np.intp], name: str) -> Any:
    """Return the column of mode `name`: coordinates as they are, labels as categories, observed or not."""
    if ptypes.is_float_dtype(labels.dtype) or isinstance(labels, (pd.DatetimeIndex, pd.TimedeltaIndex)):
        return labels.take(index)
    if labels.hasnans or not labels.is_unique:
        raise ValueError(f"coords: expected distinct labels for mode {name!r}, none missing, got {labels.tolist()[:9]}")
    return pd.Categorical.from_codes(index, categories=labels)


def _first_fault(path: str | os.PathLike[str]) -> str:
    """Return what is wrong with a .tns file, naming the first line that is malformed."""
    n_fields = None
    with gzip.open(path, "rt") if str(path).endswith(".gz") else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split("#")[0].split()
            n_fields = n_fields or len(fields)
            try:
                is_entry = min(map(int, fields[:-1])) >= 1 and np.isfinite(float(fields[-1]))
            except ValueError:
                is_entry = False
            if fields and not (is_entry and len(fields) == n_fields):
                expected = f"{max(n_fields - 1, 1)} integers from 1 and a number"
                return f"path: expected {expected}, got {line.strip()!r} on line {number} of {path}"
    return f"path: expected lines of integers from 1 and a number, got {'others' if n_fields else 'none'} in {path}"
