"""Rows of one rank as they come in: validated, and agreed upon with the other ranks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from probtensor.axes import Axis, CategoricalAxis, axis_from_state
from probtensor.columns import to_cpu_array
from probtensor.comm import Comm, Serial
from probtensor.data import Observations

__all__ = ["Weights", "observe_more", "observe_together", "row_numbers", "seen_after", "seen_labels"]

Weights = tuple[Tensor | None, Tensor | None]


def seen_labels(observed: Observations, comm: Comm) -> dict[str, npt.NDArray[np.bool_]]:
    """Which labels of each categorical mode have a row on some rank: a category may have none."""
    seen = {}
    for axis, position in zip(observed.axes, observed.positions.T, strict=True):
        if isinstance(axis, CategoricalAxis):
            seen[str(axis.name)] = comm.sum(torch.bincount(position, minlength=axis.size)).numpy() > 0
    return seen


def row_numbers(given: Any, name: str, n: int) -> Tensor | None:
    """One finite positive number a row, as a new tensor, or None where none was given."""
    if given is None:
        return None
    numbers = np.array(to_cpu_array(given), dtype=float)
    if numbers.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},) as X has rows, got {numbers.shape}")
    if len(bad := np.flatnonzero(~(np.isfinite(numbers) & (numbers > 0)))):
        raise ValueError(f"{name}: expected finite numbers above 0, got {numbers[bad[0]]} at row {bad[0]}")
    return torch.from_numpy(numbers)


def observe_together(
    observe: Callable[[Sequence[Axis] | None], Observations],
    weigh: Callable[[int], Weights],
    axes: Sequence[Axis] | None,
    comm: Comm,
) -> tuple[Observations, Weights]:
    """Rows of this rank in axes that hold what any rank has seen; what is wrong on one rank is refused on all."""
    if comm.size == 1:
        observed = observe(axes)
        return observed, weigh(observed.n_observed)
    fault = ""
    try:
        observed = observe(axes)
        weights = weigh(observed.n_observed)
    except ValueError as error:
        fault = str(error)
    faults = [data.decode() for data in comm.gather_bytes(fault.encode())]
    if any(faults):
        raise ValueError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(faults) if text))
    states = comm.gather_bytes(json.dumps([axis.to_state() for axis in observed.axes]).encode())
    ranks = [[axis_from_state(state) for state in json.loads(data)] for data in states]
    agreed = list(ranks[0])
    for other in ranks[1:]:
        agreed = [a.union(b) for a, b in zip(agreed, other, strict=True)]
    return observe(agreed), weights


def observe_more(table: pd.DataFrame, y: Any, axes: Sequence[Axis]) -> tuple[Observations, list[Tensor]]:
    """New rows in the union of fitted axes and what the rows bring; and where the old coordinates are in it.

    Parameters
    ----------
    table : DataFrame, shape (n, K)
    y : array_like, shape (n,)
    axes : sequence of Axis
        Fitted.

    Returns
    -------
    Observations
    list of Tensor, shape (T_k,), int64
    """
    fresh = [replace(axis, distinct=None).fit(table[axis.name]) for axis in axes]
    grown = [old.union(new) for old, new in zip(axes, fresh, strict=True)]
    places = [torch.from_numpy(_places(old, new)) for old, new in zip(axes, grown, strict=True)]
    return Observations.from_table(table, y, grown), places


def _places(old: Axis, new: Axis) -> npt.NDArray[np.int64]:
    assert old.distinct is not None
    return np.array(new.positions(old.distinct), dtype=np.int64)


def seen_after(
    before: dict[str, npt.NDArray[np.bool_]], axes: Sequence[Axis], observed: Observations
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which labels of the observed rows' axes have a row now or had one before, in the earlier axes."""
    seen = seen_labels(observed, Serial())
    for old, new in zip(axes, observed.axes, strict=True):
        if str(old.name) in seen:
            seen[str(old.name)][_places(old, new)[before[str(old.name)]]] = True
    return seen
