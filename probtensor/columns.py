"""How the values of a column are stored: what an axis needs to compare, number, encode and save them.

Functions of arrays, without an axis. `Axis` and the readers call them; a user need not. Rows in messages count from 0.
"""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pandas.api import types as ptypes

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DATES = r"\d{4}-\d{2}-\d{2}([ T].*)?"
_PER_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}


def to_cpu_array(values: Any) -> Any:
    """Return a torch tensor as a NumPy array, anything else as it is."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values


def as_series(column: Any, name: str | None) -> pd.Series:
    """Return `column` as a Series called `name` (its own name where that is None), without copying numbers."""
    series = pd.Series(to_cpu_array(column))
    series = series.infer_objects() if series.dtype == object else series
    if name is None and series.name is not None:
        name = str(series.name)
    return series.rename(name)


def reject_rows(bad: npt.NDArray[np.bool_], column: pd.Series, expected: str) -> None:
    """Raise a ValueError that names the column and the first of its `bad` rows (n,), if there is one."""
    rows = np.flatnonzero(bad)
    if len(rows):
        came = f"{column.iloc[rows[0]]} at row {rows[0]} (rows like it: {len(rows)})"
        raise ValueError(f"column {column.name!r}: expected {expected}, got {came}")


def measured(column: pd.Series) -> pd.Index:
    """Return a column of numbers, datetimes or timedeltas as an index of int64, float64 or times; all finite."""
    reject_rows(column.isna().to_numpy(dtype=bool), column, "a finite coordinate in every row")
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return measured(pd.Series(column.cat.categories.take(np.asarray(column.cat.codes)), name=column.name))
    if ptypes.is_datetime64_any_dtype(dtype):
        return pd.DatetimeIndex(column).rename(None)
    if ptypes.is_timedelta64_dtype(dtype):
        return pd.TimedeltaIndex(column).rename(None)
    if (dates := dates_of(column)) is not None:
        return dates
    if not ptypes.is_numeric_dtype(dtype) or ptypes.is_bool_dtype(dtype) or ptypes.is_complex_dtype(dtype):
        raise ValueError(
            f"column {column.name!r}: expected numbers, datetimes or timedeltas, got dtype {dtype}; "
            "pd.to_numeric and pd.to_datetime read text"
        )
    values = column.to_numpy()
    values = values.astype(np.int64 if np.can_cast(values.dtype, np.int64) else np.float64, copy=False)
    reject_rows(~np.isfinite(values), column, "a finite coordinate in every row")
    index: pd.Index = pd.Index(values)
    return index


def dates_of(column: pd.Series) -> pd.DatetimeIndex | None:
    """Return a column of `datetime.date`, or of text that is an ISO 8601 date in every row, as datetimes; else None."""
    if ptypes.infer_dtype(column, skipna=False) == "date":
        return pd.DatetimeIndex(pd.to_datetime(column)).rename(None)
    text = ptypes.is_string_dtype(column.dtype) and len(column) > 0 and not ptypes.is_numeric_dtype(column.dtype)
    if not text or not re.fullmatch(DATES, str(column.iloc[0])) or not column.str.fullmatch(DATES).eq(True).all():
        return None
    try:
        return pd.DatetimeIndex(pd.to_datetime(column, format="ISO8601")).rename(None)
    except ValueError:  # 2024-99-99 is no date, but a label
        return None


def hashes(index: pd.Index) -> npt.NDArray[np.uint64]:
    """Return a hash (n,) of each value: the same in every process for equal values of one dtype."""
    is_time = isinstance(index, (pd.DatetimeIndex, pd.TimedeltaIndex))
    values = ticks(index) if is_time else index.to_numpy()
    return np.asarray(pd.util.hash_array(values, categorize=False), dtype=np.uint64)


def unit_kind(index: pd.Index) -> str:
    """Return in words which coordinates can be compared with those of `index`."""
    if isinstance(index, pd.DatetimeIndex):
        return "datetimes without a time zone" if index.tz is None else "datetimes with a time zone"
    return "timedeltas" if isinstance(index, pd.TimedeltaIndex) else "numbers"


def ticks(index: pd.Index) -> IntArray:
    """Return what `index` stores, for times: multiples of their unit, counted from 1970-01-01 UTC for datetimes."""
    return np.array(index.astype(np.int64), dtype=np.int64)


def _first_day(index: pd.Index) -> int:
    """Return the days from 1970-01-01 to the day that counts as 0: that of the first datetime."""
    is_time = isinstance(index, pd.DatetimeIndex) and len(index) > 0
    return int(ticks(index).min() // _PER_DAY[index.unit]) if is_time else 0


def to_days(index: pd.Index, since: pd.Index) -> FloatArray:
    """Return numbers as they are, datetimes as days since the midnight (UTC) before the first in `since`.

    Timedeltas become days. One instant has one result in whichever unit it is stored.
    """
    if unit_kind(index) == "numbers":
        return np.array(index, dtype=np.float64)
    whole, rest = np.divmod(ticks(index), _PER_DAY[index.unit])
    return np.asarray((whole - _first_day(since)) + rest / _PER_DAY[index.unit], dtype=np.float64)


def from_days(days: FloatArray, since: pd.Index) -> IntArray:
    """Return the ticks, in the unit of `since`, of `days`, rounded to the power of ten that float64 resolves there."""
    per_day = _PER_DAY[since.unit]
    whole = np.floor(days)
    step = 10.0 ** np.ceil(np.log10(np.maximum(2 * np.spacing(np.abs(days)) * per_day, 1.0)))
    rest = np.round((days - whole) * per_day / step) * step
    return np.asarray((whole.astype(np.int64) + _first_day(since)) * per_day + rest.astype(np.int64))


def locate(ordered: FloatArray, values: FloatArray) -> IntArray:
    """Return where each of `values` stands in the sorted, distinct `ordered`; -1 where it is not there."""
    if len(ordered) == 0:
        return np.full(values.shape, -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.where(ordered[at] == values, at, -1).astype(np.int64)


def label_key(label: Any) -> tuple[str, Any]:
    """Return what makes two labels the same one: the family of their type, and equality within it."""
    if isinstance(label, (bool, np.bool_)):
        return "bool", label
    if isinstance(label, (int, float, np.integer, np.floating)):
        return "number", label
    return ("str", label) if isinstance(label, str) else (type(label).__name__, label)


def label_dtype(labels: pd.Index) -> str:
    """Return "str", "number" or "bool", another type's name, or "mixed" where labels differ in it or there is none."""
    families = {label_key(label)[0] for label in labels}
    return families.pop() if len(families) == 1 else "mixed"


def factorize(column: pd.Series) -> tuple[IntArray, pd.Index]:
    """Return codes (n,) and the distinct labels in order of appearance (a categorical column's in its own order)."""
    reject_rows(column.isna().to_numpy(dtype=bool), column, "a label in every row")
    if isinstance(column.dtype, pd.CategoricalDtype):
        return np.asarray(column.cat.codes, dtype=np.int64), column.cat.categories
    if column.dtype != object or ptypes.infer_dtype(column) == "string":
        codes, labels = pd.factorize(column)
        return np.asarray(codes, dtype=np.int64), labels
    table: dict[tuple[str, Any], int] = {}
    try:
        found = np.fromiter((table.setdefault(label_key(label), len(table)) for label in column), np.int64, len(column))
    except TypeError as error:
        raise ValueError(f"column {column.name!r}: expected hashable labels, got {error}") from error
    return found, pd.Index([label for _, label in table], dtype=object, tupleize_cols=False)


def sort_labels(labels: pd.Index) -> pd.Index:
    """Return `labels` sorted, or as they are where their types cannot be compared."""
    try:
        return labels.sort_values()
    except TypeError:
        return labels


def index_to_state(index: pd.Index, name: str | None) -> dict[str, Any]:
    """Return the index of axis `name` as a dict that JSON can hold, floats bit for bit; ValueError if it cannot."""
    state: dict[str, Any] = {"dtype": str(index.dtype)}
    if isinstance(index, (pd.DatetimeIndex, pd.TimedeltaIndex)):
        return {**state, "bytes": base64.b64encode(ticks(index).astype("<i8").tobytes()).decode()}
    if isinstance(index.dtype, np.dtype) and index.dtype.kind == "f":
        return {**state, "bytes": base64.b64encode(index.to_numpy().astype("<f8").tobytes()).decode()}
    items = [item.item() if isinstance(item, np.generic) else item for item in index.tolist()]
    for item in items:
        if not isinstance(item, (str, int, float)):
            raise ValueError(f"axis {name!r}: expected labels of str, int, bool, float or datetime, got {item!r}")
    return {**state, "items": items}


def index_from_state(state: dict[str, Any]) -> pd.Index:
    """Return the index whose `index_to_state` gave `state`."""
    index: pd.Index
    if "items" in state:
        index = pd.Index(state["items"], dtype=state["dtype"])
    else:
        kind = "<f8" if state["dtype"].startswith("float") else "<i8"
        values = np.frombuffer(base64.b64decode(state["bytes"]), kind).astype(kind[1:])
        index = pd.Index(values).astype(state["dtype"])
    return index


def numeric(column: pd.Series, argument: str, name: str) -> pd.Series:
    """Return a column of real numbers or booleans, possibly missing; raise a ValueError about `argument` for others."""
    column = column.infer_objects() if column.dtype == object else column
    if not ptypes.is_numeric_dtype(column.dtype) or ptypes.is_complex_dtype(column.dtype):
        words = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        example = f", such as {words.iloc[0]!r}" if len(words) else ""
        raise ValueError(f"{argument}: expected real numbers in {name!r}, got dtype {column.dtype}{example}")
    return column


def as_coordinates(column: pd.Series) -> pd.Series:
    """Return numbers as float64, and ISO 8601 strings as datetimes; raise a ValueError for others.

    The message has the first row at fault as the column's index numbers it.
    """
    if ptypes.is_numeric_dtype(column.dtype) and not ptypes.is_bool_dtype(column.dtype):
        return column.astype(np.float64)
    if column.dtype.kind in "mM":
        return column
    try:
        return pd.to_datetime(column, format="ISO8601")
    except (TypeError, ValueError) as error:
        came = _not_a_date(column) or error
        message = f"continuous: expected numbers or ISO 8601 dates in column {column.name!r}, got {came}"
        raise ValueError(message) from error


def _not_a_date(column: pd.Series) -> str:
    """Return the first word of `column` that is no ISO 8601 date, and its row; nothing if all are."""
    try:
        bad = column.index[pd.to_datetime(column, format="ISO8601", errors="coerce").isna() & column.notna()]
    except (TypeError, ValueError):  # booleans, or several time zones
        return ""
    return f"{column[bad[0]]!r} at row {bad[0]}" if len(bad) else ""


def check_labels(column: pd.Series, expected: str) -> None:
    """Raise a ValueError if the labels of `column` have not the `label_dtype` expected; "mixed" agrees with all.

    The message has the first row without a label as the column's index numbers it.
    """
    if expected == "mixed":
        return
    if len(missing := column.index[column.isna()]):
        came = f"{column[missing[0]]} at row {missing[0]} (rows like it: {len(missing)})"
        raise ValueError(f"column {column.name!r}: expected a label in every row, got {came}")
    came = label_dtype(factorize(column)[1])
    if came not in (expected, "mixed"):
        raise ValueError(f"categorical: expected labels of type {expected!r} in column {column.name!r}, got {came!r}")
