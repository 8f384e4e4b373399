"""What a mode's index means: a number or a time on a continuous axis, a label on a categorical one.

An axis is first a specification (`ContinuousAxis("time", Matern(2.5))`); `fit` returns a new axis that also knows the
distinct values of a column. Nothing is changed in place. `positions` number those distinct values 0, 1, ... and
are -1 for a value that was not seen. Rows in messages count from 0, whatever the column's index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self, cast, final

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor import columns
from probtensor.columns import FloatArray, IntArray
from probtensor.kernels import Kernel, Matern, White, kernel_from_state

SMOOTH = Matern(1.5) + White()  # what is believed where nothing is said


@dataclass(frozen=True, eq=False)
class Axis(ABC):
    """What the index of one mode means. Use `ContinuousAxis` or `CategoricalAxis`.

    Parameters
    ----------
    name : str, optional
        The column's name; `fit` takes it from the column where it is None.
    distinct : pandas.Index, optional
        The distinct values in the user's own type, in the order of `positions`. `fit` sets it; None before.
    """

    name: str | None = None
    distinct: pd.Index | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name: expected a string or None, got {self.name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Axis) or type(self) is not type(other):
            return NotImplemented
        if any(getattr(self, f.name) != getattr(other, f.name) for f in fields(self) if f.name != "distinct"):
            return False
        if self.distinct is None or other.distinct is None:
            return self.distinct is other.distinct
        return bool(self.distinct.dtype == other.distinct.dtype and self.distinct.equals(other.distinct))

    def __hash__(self) -> int:
        return hash((type(self), self.name, self.distinct is None or len(self.distinct)))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` made this axis."""
        return self.distinct is not None

    @property
    def size(self) -> int:
        """Number of distinct coordinates or labels."""
        return len(self._fitted())

    @abstractmethod
    def fit(self, column: npt.ArrayLike) -> Self:
        """Return a new axis that knows the distinct values of `column` (n,); raise ValueError for a missing one."""

    @abstractmethod
    def encode(self, column: npt.ArrayLike) -> FloatArray | IntArray:
        """Return the numbers that a model works with: float64 (n,) coordinates, or int64 (n,) label positions."""

    @abstractmethod
    def positions(self, column: npt.ArrayLike) -> IntArray:
        """Return where each value of `column` (n,) stands in `distinct`, int64 (n,); -1 where it was not seen."""

    @abstractmethod
    def decode(self, encoded: npt.ArrayLike) -> pd.Index:
        """Return the values, in the user's own type, whose `encode` is `encoded` (n,)."""

    @property
    @abstractmethod
    def is_sorted(self) -> bool:
        """Whether the values are in an order of their own, not in that of their appearance."""

    def split(self, n: int) -> list[Self]:
        """Return n axes, each with the values whose hash falls to it, in their order."""
        distinct = self._fitted()
        part = columns.hashes(distinct) % np.uint64(n)
        return [replace(self, distinct=distinct[part == k]) for k in range(n)]

    @abstractmethod
    def union(self, other: Self) -> Self:
        """Return the axis of both columns, where `self` and `other` were fitted to parts of the rows each."""

    def to_state(self) -> dict[str, Any]:
        """Return everything as a dict that JSON can hold, floats bit for bit; `axis_from_state` reads it.

        Raises
        ------
        ValueError
            For labels that are not str, int, bool, float, datetimes or timedeltas.
        """
        state: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        state["distinct"] = None if self.distinct is None else columns.index_to_state(self.distinct, self.name)
        return {"kind": type(self).__name__, **state}

    def _fitted(self) -> pd.Index:
        if self.distinct is None:
            raise ValueError(f"axis {self.name!r}: expected a fitted axis, got one without data; call fit(column)")
        return self.distinct

    def _check_union(self, other: Axis) -> None:
        for axis in (self, other):
            axis._fitted()
        if replace(self, distinct=None) != replace(other, distinct=None):
            raise ValueError(f"other: expected an axis of the same kind and name as {self!r}, got {other!r}")


@final
@dataclass(frozen=True, eq=False)
class ContinuousAxis(Axis):
    """A mode indexed by numbers, datetimes or timedeltas; nearby coordinates have similar effects.

    Datetimes are encoded as days since the midnight (UTC) before the first of them, timedeltas as days. `datetime.date`
    and text that is an ISO 8601 date in every row are read as datetimes, and come back as such.

    Parameters
    ----------
    name : str, optional
        The column's name.
    kernel : Kernel, default Matern(1.5) + White()
        What is believed of functions over the axis: `Matern`, `Periodic`, `Linear`, or a sum of these and `White`.
    distinct : pandas.Index, optional
        Sorted distinct values, set by `fit`; numbers are kept as int64 or float64.

    Raises
    ------
    ValueError
        If `kernel` is something else.

    Examples
    --------
    >>> times = np.array(["2024-01-02T12:00", "2024-01-01T00:00", "2024-01-01T00:00"], dtype="datetime64[s]")
    >>> axis = ContinuousAxis("time").fit(times)
    >>> axis.coordinates.tolist(), axis.positions(times).tolist()
    ([0.0, 1.5], [1, 0, 0])
    >>> axis.decode([0.75])[0]
    Timestamp('2024-01-01 18:00:00')
    """

    kernel: Kernel = SMOOTH

    def __post_init__(self) -> None:
        super().__post_init__()
        kernel: object = self.kernel
        if not isinstance(kernel, Kernel) or isinstance(kernel, White):
            raise ValueError(
                f"kernel: expected Matern, Periodic, Linear or a sum of these and White, got {self.kernel!r}; "
                "coordinates without any order are a CategoricalAxis"
            )

    @cached_property
    def coordinates(self) -> FloatArray:
        """Sorted distinct coordinates, float64 (T,), read-only."""
        coordinates = columns.to_days(self._fitted(), self._fitted())
        coordinates.setflags(write=False)
        return coordinates

    @property
    def is_sorted(self) -> bool:
        """True."""
        return True

    def fit(self, column: npt.ArrayLike) -> Self:
        """Return a new axis with the distinct coordinates of `column` (n,); raise ValueError for one not finite."""
        series = columns.as_series(column, self.name)
        index = columns.measured(series)
        _, first = np.unique(columns.to_days(index, index), return_index=True)
        return replace(self, name=series.name, distinct=index[first])

    def encode(self, column: npt.ArrayLike) -> FloatArray:
        """Return the coordinates of `column` (n,), float64 (n,); raise ValueError for one not finite."""
        index, fitted = columns.measured(columns.as_series(column, self.name)), self._fitted()
        if columns.unit_kind(index) != columns.unit_kind(fitted):
            raise ValueError(
                f"column {self.name!r}: expected {columns.unit_kind(fitted)}, got {columns.unit_kind(index)}"
            )
        return columns.to_days(index, fitted)

    def positions(self, column: npt.ArrayLike) -> IntArray:
        """Return where each value of `column` (n,) stands in `coordinates`, int64 (n,); -1 where not seen."""
        return columns.locate(self.coordinates, self.encode(column))

    def decode(self, encoded: npt.ArrayLike) -> pd.Index:
        """Return the values, in the user's own type, whose `encode` is `encoded` (n,).

        Fitted coordinates come back exactly. Other datetimes come back in the unit of the fitted column, rounded to
        what float64 days hold: 100 nanoseconds within 11 years of the first datetime, 1 microsecond within 89.
        Integers stay integers where all of `encoded` are whole.
        """
        coordinates, fitted = np.asarray(columns.to_cpu_array(encoded), dtype=np.float64), self._fitted()
        if not np.isfinite(coordinates).all():
            raise ValueError(f"encoded: expected finite coordinates of axis {self.name!r}, got NaN or infinity")
        seen = columns.locate(self.coordinates, coordinates)
        if isinstance(fitted, (pd.DatetimeIndex, pd.TimedeltaIndex)):
            known, values = columns.ticks(fitted), columns.from_days(coordinates, fitted)
        else:
            known = fitted.to_numpy()
            whole = known.dtype.kind == "i" and bool((coordinates == np.round(coordinates)).all())
            values = coordinates.astype(np.int64 if whole else np.float64)
        values[seen >= 0] = known[seen[seen >= 0]]
        return pd.Index(values) if columns.unit_kind(fitted) == "numbers" else pd.Index(values).astype(fitted.dtype)

    def union(self, other: Self) -> Self:
        """Return the axis of both columns; raise ValueError if `other` has another name, kernel or type of values."""
        self._check_union(other)
        mine, theirs = self._fitted(), other._fitted()
        if columns.unit_kind(mine) != columns.unit_kind(theirs):
            raise ValueError(
                f"other: expected {columns.unit_kind(mine)} on axis {self.name!r}, got {columns.unit_kind(theirs)}"
            )
        if isinstance(mine, pd.DatetimeIndex) and isinstance(theirs, pd.DatetimeIndex) and mine.tz is not None:
            theirs = theirs.tz_convert(mine.tz)
        return self.fit(mine.append(theirs))

    def to_state(self) -> dict[str, Any]:
        """Return everything as a dict that JSON can hold, floats bit for bit; `axis_from_state` reads it."""
        return {**super().to_state(), "kernel": self.kernel.to_state()}


@final
@dataclass(frozen=True, eq=False)
class CategoricalAxis(Axis):
    """A mode indexed by labels without a notion of distance.

    Labels keep their type: 10, "10" and True are different labels. Numbers are the same label where they are equal
    (int32 2, int64 2, 2.0), and so are all kinds of string. The labels of a pandas categorical column are all its
    categories in their order, whether observed or not; others are sorted, or in order of appearance where their
    types cannot be compared.

    Parameters
    ----------
    name : str, optional
        The column's name.
    distinct : pandas.Index, optional
        The distinct labels, set by `fit`.

    Examples
    --------
    >>> axis = CategoricalAxis("station").fit([10, 2, 4])
    >>> axis.labels.tolist(), axis.positions([10, 7]).tolist(), axis.positions(["10"]).tolist()
    ([2, 4, 10], [2, -1], [-1])
    """

    @property
    def labels(self) -> pd.Index:
        """The distinct labels, (T,), in the order of their positions."""
        return self._fitted()

    @property
    def label_dtype(self) -> str:
        """What the labels are: "str", "number" or "bool", another type's name, or "mixed"; `read_table` takes it."""
        return columns.label_dtype(self._fitted())

    @property
    def is_sorted(self) -> bool:
        """Whether the labels are sorted: not where their types cannot be compared, or categories have an order."""
        labels = self._fitted()
        return bool(labels.equals(columns.sort_labels(labels)))

    def fit(self, column: npt.ArrayLike) -> Self:
        """Return a new axis with the distinct labels of `column` (n,); raise ValueError for a missing one."""
        series = columns.as_series(column, self.name)
        _, labels = columns.factorize(series)
        if not isinstance(series.dtype, pd.CategoricalDtype):
            labels = columns.sort_labels(labels)
        return replace(self, name=series.name, distinct=labels.rename(None))

    def encode(self, column: npt.ArrayLike) -> IntArray:
        """Return the position of each label of `column` (n,), int64 (n,); -1 where unknown."""
        codes, labels = columns.factorize(columns.as_series(column, self.name))
        table = {columns.label_key(label): position for position, label in enumerate(self._fitted())}
        found = np.fromiter((table.get(columns.label_key(label), -1) for label in labels), np.int64, len(labels))
        return found[codes]

    def positions(self, column: npt.ArrayLike) -> IntArray:
        """Return the same as `encode`."""
        return self.encode(column)

    def decode(self, encoded: npt.ArrayLike) -> pd.Index:
        """Return the labels at the positions `encoded` (n,); raise ValueError for -1 and others outside."""
        codes, labels = np.asarray(columns.to_cpu_array(encoded), dtype=np.int64), self._fitted()
        if len(bad := codes[(codes < 0) | (codes >= len(labels))]):
            raise ValueError(f"encoded: expected 0 to {len(labels) - 1} on axis {self.name!r}, got {bad[0]}")
        return labels.take(codes)

    def union(self, other: Self) -> Self:
        """Return the axis of both columns: sorted if both are, else `labels` and then the new ones of `other`."""
        self._check_union(other)
        mine, theirs = self._fitted(), other._fitted()
        merged = mine.append(theirs[self.positions(theirs) < 0])
        return replace(self, distinct=columns.sort_labels(merged) if self.is_sorted and other.is_sorted else merged)


def axis_from_state(state: dict[str, Any]) -> Axis:
    """Return the axis whose `to_state` gave `state`; raise ValueError for a state of another kind.

    Examples
    --------
    >>> axis = CategoricalAxis("cell").fit(["a", "b"])
    >>> axis_from_state(axis.to_state()) == axis
    True
    """
    settings = dict(state)
    classes = {cls.__name__: cls for cls in (ContinuousAxis, CategoricalAxis)}
    kind = settings.pop("kind", None)
    if kind not in classes:
        raise ValueError(f"state: expected a kind among {sorted(classes)}, got {kind!r}")
    if kind == ContinuousAxis.__name__:
        if "kernel" not in settings:
            raise ValueError(f"state: expected the kernel of axis {settings.get('name')!r}, got an axis without one")
        settings["kernel"] = kernel_from_state(settings["kernel"])
    if settings["distinct"] is not None:
        settings["distinct"] = columns.index_from_state(settings["distinct"])
    return cast(Axis, classes[kind](**settings))
