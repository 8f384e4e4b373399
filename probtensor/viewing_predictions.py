"""The predictions that a model's page shows: along each mode, for chosen values of the others, with intervals."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.description import axes_of
from probtensor.kernels import Sum, White

__all__ = [
    "LEVELS",
    "Run",
    "abscissa",
    "interpolates",
    "packed",
    "runs",
    "seen_positions",
    "spread",
    "summaries",
    "texts",
    "with_white",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LEVELS = (0.5, 0.9, 0.95)
MAX_ALONG = 60  # labels, or coordinates that were seen, along a mode
GRID, FINE_GRID = 48, 200  # coordinates of a line; the second where they cost little
ROWS = 10_000  # predicted at once
STEPS = 65_534  # of a curve's span; the next number marks what is not finite
MISSING = STEPS + 1


@dataclass(frozen=True)
class Run:
    """Predictions along one mode.

    Attributes
    ----------
    mode : int
    along : Index, shape (P,)
        Coordinates or labels, in the user's own type.
    seen : ndarray of bool, shape (P,)
        Which of them the training data have.
    others : list of ndarray of int
        For each other mode, the positions of the values it can be given.
    values : ndarray, shape (C, S, P)
        For each combination of these, in row-major order: the mean, then the ends of the intervals of `LEVELS`; the
        mean alone where the model has no intervals.
    """

    mode: int
    along: pd.Index
    seen: npt.NDArray[np.bool_]
    others: list[IntArray]
    values: FloatArray


def runs(
    model: Any, budget: int, counts: Sequence[IntArray | None], report: Callable[[int], object] = lambda n: None
) -> list[Run]:
    """Predictions along each mode, at most `budget` in all.

    Modes that ask for fewer predictions leave more to the others. Where not all values of the other modes can be had,
    those with the highest counts are taken, or else some that are spread evenly.

    Parameters
    ----------
    model : fitted estimator
    budget : int
    counts : sequence of ndarray of int or None
        For each mode, how many rows of the data that the user gave have each of its values, where there are such data.
    report : callable
        Is told how many predictions were made, again and again.
    """
    axes = axes_of(model)
    kept = [seen_positions(model, mode) for mode in range(len(axes))]
    sizes = [len(places) for places in kept]
    rest = [sizes[:mode] + sizes[mode + 1 :] for mode in range(len(axes))]
    whole = [float(np.prod(others, dtype=np.float64)) for others in rest]
    along = []
    for mode in range(len(axes)):
        grid = FINE_GRID if (FINE_GRID + MAX_ALONG) * whole[mode] <= budget // 10 else GRID
        along.append(_along(model, mode, kept[mode], counts, grid))
    found: dict[int, Run] = {}
    left = budget
    for mode in sorted(range(len(axes)), key=lambda mode: whole[mode] * len(along[mode][0])):
        values, seen = along[mode]
        cap = _cap(rest[mode], left // (len(axes) - len(found)) // len(values))
        others = [_chosen(places, cap, axes[j], counts[j]) for j, places in enumerate(kept) if j != mode]
        found[mode] = Run(mode, values, seen, others, _predicted(model, mode, values, others, report))
        left -= len(values) * len(found[mode].values)
    return [found[mode] for mode in range(len(axes))]


def summaries(model: Any, X: pd.DataFrame) -> FloatArray:
    """Mean, and ends of the intervals of `LEVELS`, (n, 7); the mean alone, (n, 1), of a model without intervals."""
    if not hasattr(model, "predictive"):
        return np.asarray(model.predict(X), dtype=np.float64)[:, None]
    predictive = model.predictive(X)
    ends = [end for level in LEVELS for end in predictive.interval(level)]
    return np.stack([predictive.mean, *ends], axis=1)


def packed(values: FloatArray) -> dict[str, Any]:
    """Curves (C, S, P) as text for the page: 16 bits a number, counted from each curve's lowest end.

    The C curves, each with its intervals, have their own lowest value and step, as float64. All little-endian, in
    base64.
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    flat = finite.reshape(len(values), -1)
    known = ~np.isnan(flat).all(axis=1)
    low, span = np.zeros(len(flat)), np.zeros(len(flat))
    low[known] = np.nanmin(flat[known], axis=1)
    span[known] = np.nanmax(flat[known], axis=1) - low[known]
    step = span / STEPS
    codes = np.rint((finite - low[:, None, None]) / np.where(step > 0, step, 1.0)[:, None, None])
    codes = np.where(np.isnan(codes), MISSING, codes)
    return {
        "codes": _base64(codes.astype("<u2")),
        "low": _base64(low.astype("<f8")),
        "step": _base64(step.astype("<f8")),
    }


def texts(values: pd.Index) -> list[str]:
    """Coordinates or labels as readers know them, all different: dates without a time of day where none has one."""
    if isinstance(values, pd.DatetimeIndex):
        clock = values.tz_localize(None)
        short = [str(time.date()) if bool((clock == clock.normalize()).all()) else str(time) for time in clock]
    elif values.dtype.kind == "f":
        short = [f"{value:.6g}" for value in values]
    else:
        short = [str(value) for value in values]
    return short if len(set(short)) == len(short) else [repr(value) for value in values.tolist()]


def abscissa(axis: Axis, values: pd.Index) -> list[Any]:
    """Where values stand on a chart: ISO dates on the user's clock, days, or numbers; labels count from 0."""
    if isinstance(axis, CategoricalAxis):
        return list(range(len(values)))
    if isinstance(values, pd.DatetimeIndex):
        return [time.isoformat() for time in values.tz_localize(None)]
    return [float(value) for value in axis.encode(values)]


def spread(n: int, most: int) -> IntArray:
    """At most so many of the numbers 0 to n - 1, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, n - 1, min(n, max(most, 1))).round().astype(np.int64))


def with_white(model: Any, axis: Axis) -> bool:
    """Whether coordinates have something for themselves beside a smooth function."""
    if not (isinstance(axis, ContinuousAxis) and hasattr(model, "factor") and interpolates(model)):
        return False
    return isinstance(axis.kernel, Sum) and any(isinstance(part, White) for part in axis.kernel.parts)


def interpolates(model: Any) -> bool:
    """Whether the model's predictions between coordinates differ from those of a label that was not seen."""
    return bool(getattr(model, "interpolates", True))


def seen_positions(model: Any, mode: int) -> IntArray:
    """Positions of the values that training rows had; of all values where the model does not know."""
    axes, shell = axes_of(model), getattr(model, "estimator_", model)
    axis = axes[mode]
    assert axis.distinct is not None
    if not hasattr(shell, "unknown"):
        return np.arange(axis.size)
    table = _table(axes, [np.arange(axis.size) if j == mode else np.zeros(axis.size, int) for j in range(len(axes))])
    return np.flatnonzero(~shell.unknown(table)[str(axis.name)].to_numpy())


def _along(
    model: Any, mode: int, kept: IntArray, counts: Sequence[IntArray | None], grid: int
) -> tuple[pd.Index, npt.NDArray[np.bool_]]:
    """Values along a mode, and which of them were seen: labels, or a grid with coordinates of the training data."""
    axis = axes_of(model)[mode]
    assert axis.distinct is not None
    seen = axis.distinct[_chosen(kept, MAX_ALONG, axis, counts[mode])]
    if not isinstance(axis, ContinuousAxis) or not interpolates(model) or axis.size == 1:
        return seen, np.ones(len(seen), dtype=bool)
    between = np.setdiff1d(np.linspace(axis.coordinates[0], axis.coordinates[-1], grid), axis.coordinates)
    encoded = np.union1d(between, axis.encode(seen))
    return axis.decode(encoded), np.isin(encoded, axis.coordinates)


def _chosen(kept: IntArray, most: int, axis: Axis, counts: IntArray | None) -> IntArray:
    if len(kept) <= most or counts is None or isinstance(axis, ContinuousAxis):
        return kept[spread(len(kept), most)]
    return np.sort(kept[np.argsort(-counts[kept], kind="stable")[:most]])


def _cap(sizes: Sequence[int], most: int) -> int:
    """The largest number of values of a mode with which combinations of all modes are not more than `most`."""
    low, high = 1, max(sizes, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if np.prod([min(size, middle) for size in sizes], dtype=np.float64) <= most:
            low = middle
        else:
            high = middle - 1
    return low


def _predicted(
    model: Any, mode: int, along: pd.Index, others: list[IntArray], report: Callable[[int], object]
) -> FloatArray:
    axes = axes_of(model)
    shape = tuple(len(places) for places in others)
    n, P = int(np.prod(shape, dtype=np.int64)), len(along)
    chunks = []
    step = max(ROWS // P, 1)
    for first in range(0, n, step):
        combination = np.arange(first, min(first + step, n))
        index = list(np.unravel_index(combination, shape)) if shape else []
        positions = [np.repeat(places[at], P) for places, at in zip(others, index, strict=True)]
        positions.insert(mode, np.tile(np.arange(P), len(combination)))
        chunks.append(summaries(model, _table(axes, positions, {mode: along})))
        report(len(chunks[-1]))
    found = np.concatenate(chunks)
    return found.reshape(n, P, -1).transpose(0, 2, 1)


def _table(
    axes: Sequence[Axis], positions: Sequence[npt.NDArray[Any]], instead: dict[int, pd.Index] | None = None
) -> pd.DataFrame:
    """Rows at positions among the distinct values of each mode, or among others where these are given."""
    table = {}
    for mode, (axis, places) in enumerate(zip(axes, positions, strict=True)):
        values = axis.distinct if instead is None or mode not in instead else instead[mode]
        assert values is not None
        table[str(axis.name)] = values.take(places)
    return pd.DataFrame(table)


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
