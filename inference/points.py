r"""Points of D entries, some of which may be missing, and how they are dealt to ranks.

Points are worked on in blocks. A block is whole on one rank, and which points it has does not depend on the number of
ranks: sums over points have the same bits on any number of ranks (see `probtensor.blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.comm import Comm, refuse_together

__all__ = ["PointBlocks", "Points", "Summary", "any_missing", "as_points", "block_size", "deal_points", "summarise"]


class Points(NamedTuple):
    """Some points, and which of their entries were observed.

    Attributes
    ----------
    y : Tensor, shape (n, D)
        0 where an entry is missing.
    seen : Tensor, shape (n, D), or None
        1 where an entry was observed, else 0; None where all were.
    used : Tensor, shape (n,), or None
        1 for points that an M-step takes into account, else 0; None: all.

    Examples
    --------
    >>> points = Points.of(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), masked=True)
    >>> points.y.tolist(), points.seen.tolist()
    ([[1.0, 0.0], [2.0, 3.0]], [[1.0, 0.0], [1.0, 1.0]])
    """

    y: Tensor
    seen: Tensor | None
    used: Tensor | None = None

    @classmethod
    def of(cls, y: Tensor, masked: bool) -> Points:
        """Points from values in which NaN is a missing entry; without a mask where none can be."""
        if not masked:
            return cls(y, None)
        missing = y.isnan()
        return cls(y.masked_fill(missing, 0.0), (~missing).to(y.dtype))

    def take(self, index: Tensor) -> Points:
        """Some of the points."""
        return Points(self.y[index], None if self.seen is None else self.seen[index])

    def n_seen(self) -> Tensor:
        """Observed entries of each point, shape (n,)."""
        return self.y.new_full((len(self.y),), self.y.shape[1]) if self.seen is None else self.seen.sum(1)

    def log_density_of_noise(self, variance: Tensor) -> Tensor:
        """Log density of each point under ``N(0, variance)``, shape (n,)."""
        return -0.5 * (self.n_seen() * (2 * math.pi * variance).log() + (self.y**2).sum(1) / variance)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Number of points in use and of their observed entries, and their sum of squares, each of shape (1,)."""
        used = self.y.new_ones(len(self.y)) if self.used is None else self.used
        return used.sum()[None], (used @ self.n_seen())[None], (used @ (self.y**2).sum(1))[None]


@dataclass(frozen=True, eq=False)
class PointBlocks(Sequence[Points]):
    """Points of a rank in blocks, taken from the array one at a time: one on disk is never wholly in memory.

    Attributes
    ----------
    array, tail : ndarray, shapes (n, D) and (t, D)
        NaN where an entry is missing; the rows of the second follow those of the first.
    size : int
        Points of a block; the last may have fewer.
    first : int
        Number of the first block among those of all ranks.
    masked : bool
        Whether any entry is missing, on any rank.
    dtype : torch.dtype
    device : torch.device
    kept : dict of int to Points
        Blocks that stay on a GPU, unless the array is on disk.

    Examples
    --------
    >>> cpu, empty = torch.device("cpu"), np.empty((0, 2))
    >>> blocks = PointBlocks(np.ones((5, 2)), empty, 2, 0, False, torch.float64, cpu)
    >>> len(blocks), [len(block.y) for block in blocks]
    (3, [2, 2, 1])
    """

    array: npt.NDArray[Any]
    tail: npt.NDArray[Any]
    size: int
    first: int
    masked: bool
    dtype: torch.dtype
    device: torch.device
    kept: dict[int, Points] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(1, -(-self.n_points // self.size))

    @property
    def n_points(self) -> int:
        """Points of this rank."""
        return len(self.array) + len(self.tail)

    def rows(self, wanted: slice) -> npt.NDArray[Any]:
        """Some of the rows, as they were given."""
        rows, split = self.array[wanted], len(self.array)
        if wanted.stop <= split or not len(self.tail):
            return np.asarray(rows)
        return np.concatenate([rows, self.tail[max(wanted.start - split, 0) : wanted.stop - split]])

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number in self.kept:
            return self.kept[number]
        rows = self.rows(slice(number * self.size, (number + 1) * self.size))
        single = self.dtype == torch.float32
        y = torch.from_numpy(np.array(rows, np.float32 if single else np.float64, order="C")).to(self.device)
        points = Points.of(y, self.masked)
        if self.device.type == "cuda" and not isinstance(self.array, np.memmap):
            self.kept[number] = points
        return points


class Summary(NamedTuple):
    """What all ranks' points have in common.

    Attributes
    ----------
    n_points, n_seen : int
        Points, and observed entries.
    mean, variance : ndarray, shape (D,)
        Of the observed entries.
    masked : bool
        Whether any entry is missing.

    Examples
    --------
    >>> from probtensor.comm import Serial
    >>> cpu, empty = torch.device("cpu"), np.empty((0, 2))
    >>> blocks = PointBlocks(np.array([[1.0, 2.0], [3.0, 2.0]]), empty, 2, 0, False, torch.float64, cpu)
    >>> found = summarise(blocks, Serial())
    >>> found.n_points, found.mean.tolist(), found.masked
    (2, [2.0, 2.0], False)
    """

    n_points: int
    n_seen: int
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    masked: bool


def block_size(width: int, device: torch.device) -> int:
    """Points of a block whose largest array has `width` numbers a point: a power of two that suits the device.

    Examples
    --------
    >>> size = block_size(1000, torch.device("cpu"))
    >>> size & (size - 1)  # a power of two
    0
    """
    budget, most = (2**27, 2**18) if device.type == "cuda" else (2**19, 2**9)
    return int(min(max(2 ** int(math.log2(max(budget // width, 1))), 32), most))


def deal_points(array: npt.NDArray[Any], size: int, comm: Comm) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
    """Move rows between ranks so that each has whole blocks of `size` rows; number them through the ranks' order.

    Blocks are shared out evenly. An array on disk stays there: a block belongs to the rank that has its first row, and
    only its other rows move.

    Parameters
    ----------
    array : ndarray, shape (n, D)
        This rank's rows; n may be 0.
    size : int
    comm : Comm

    Returns
    -------
    array : ndarray, shape (m, D)
    tail : ndarray, shape (t, D)
        Rows that follow these.
    first : int
        Number of this rank's first block.

    Examples
    --------
    >>> from probtensor.comm import Serial
    >>> array, tail, first = deal_points(np.ones((5, 2)), 2, Serial())
    >>> len(array) + len(tail), first  # alone, all stays
    (5, 0)
    """
    nothing = np.empty((0, array.shape[1]), dtype=array.dtype)
    if comm.size == 1:
        return array, nothing, 0
    counts = [int.from_bytes(data, "little") for data in comm.gather_bytes(len(array).to_bytes(8, "little"))]
    on_disk = b"yes" in comm.gather_bytes(b"yes" if isinstance(array, np.memmap) else b"no")
    begin = np.cumsum([0, *counts])
    mine = int(begin[comm.rank])
    if on_disk:
        first = -(-mine // size)
        cut = min(first * size - mine, len(array))
        leaving = array[:cut]
        owner = int(np.searchsorted(begin, mine // size * size, side="right")) - 1  # has the block's first row
        to = np.full(cut, owner)
    else:
        n_blocks = -(-sum(counts) // size)
        ends = np.array([n_blocks * (rank + 1) // comm.size for rank in range(comm.size)])
        first = int(ends[comm.rank - 1]) if comm.rank else 0
        cut, leaving = len(array), array
        to = np.searchsorted(ends, (mine + np.arange(len(array))) // size, side="right")
    rows = torch.from_numpy(np.array(leaving, dtype=np.float64))
    moved = comm.exchange(rows, torch.from_numpy(to)).numpy().astype(array.dtype)
    return array[cut:], moved, first


def summarise(blocks: PointBlocks, comm: Comm) -> Summary:
    """Number, mean and variance of all ranks' points, in one pass and one sum.

    Raises
    ------
    ValueError
        If there is no point, or no observed entry.

    Examples
    --------
    >>> from probtensor.comm import Serial
    >>> cpu, empty = torch.device("cpu"), np.empty((0, 1))
    >>> blocks = PointBlocks(np.array([[1.0], [3.0]]), empty, 1, 0, False, torch.float64, cpu)
    >>> found = summarise(blocks, Serial())
    >>> found.mean.tolist(), found.variance.tolist()
    ([2.0], [1.0])
    """

    def sums_of(points: Points) -> Tensor:
        y = points.y.to("cpu", torch.float64)
        seen = ~y.isnan()
        y = y.nan_to_num(0.0)
        return torch.stack(
            [torch.full_like(y[:1].sum(0), float(len(y))), seen.sum(0).double(), y.sum(0), (y**2).sum(0)]
        )

    n, count, first, second = comm.sum(*add_up(map(sums_of, blocks))).numpy()
    if n[0] == 0:
        raise ValueError("Y: expected at least one point, got none")
    if count.sum() == 0:
        raise ValueError("Y: expected at least one observed entry, got none")
    known = np.maximum(count, 1)
    mean = first / known
    return Summary(int(n[0]), int(count.sum()), mean, np.maximum(second / known - mean**2, 0), bool((count < n).any()))


def any_missing(array: npt.NDArray[Any]) -> bool:
    """Whether any entry is NaN; the array may be on disk.

    Examples
    --------
    >>> any_missing(np.array([[1.0, np.nan]])), any_missing(np.ones((2, 2)))
    (True, False)
    """
    return any(bool(np.isnan(array[start : start + 2**16]).any()) for start in range(0, len(array), 2**16))


def as_points(Y: Any, comm: Comm, check_values: Callable[[npt.NDArray[Any]], None]) -> npt.NDArray[Any]:
    """Points as an array (N, D) of floating-point numbers, refused on all ranks together where they are malformed.

    Parameters
    ----------
    Y : array_like, Tensor or DataFrame, shape (N, D)
        NaN is a missing entry; an array on disk stays there.
    comm : Comm
    check_values : callable
        Raises ValueError for values that a model cannot have.

    Returns
    -------
    ndarray, shape (N, D)

    Raises
    ------
    ValueError
        If the shape or dtype does not fit, an entry is infinite, or ranks have points of different widths.

    Examples
    --------
    >>> from probtensor.comm import Serial
    >>> as_points([[1, 2], [3, 4]], Serial(), lambda values: None).dtype
    dtype('float64')
    """

    def check() -> npt.NDArray[Any]:
        array = Y if isinstance(Y, np.memmap) else np.asarray(Y.detach().cpu() if isinstance(Y, Tensor) else Y)
        if array.ndim != 2:
            raise ValueError(f"Y: expected shape (N, D), got {array.shape}")
        if array.dtype.kind not in "fiub":
            raise ValueError(f"Y: expected numbers, got dtype {array.dtype}")
        if array.shape[1] == 0:
            raise ValueError("Y: expected at least one entry a point, got none")
        if array.dtype.kind != "f":
            array = array.astype(np.float64)
        for start in range(0, len(array), 2**16):
            bad = np.isinf(array[start : start + 2**16])
            if bad.any():
                row, column = (int(x[0]) for x in bad.nonzero())
                raise ValueError(
                    f"Y: expected finite entries (NaN where missing), got {array[start + row, column]} in row "
                    f"{start + row}, column {column}"
                )
        check_values(array)
        return array

    array = refuse_together(comm, check)
    widths = {int.from_bytes(data, "little") for data in comm.gather_bytes(array.shape[1].to_bytes(8, "little"))}
    if len(widths) > 1:
        raise ValueError(f"Y: expected the same number of entries a point on all ranks, got {sorted(widths)}")
    return array
