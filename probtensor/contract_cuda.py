"""Sums over rows of the CP form on a GPU, in one pass over the rows.

Rows are ordered by the mode that is updated, so that all rows of a coordinate lie together: one program takes a piece
of them, gathers the other modes' moments, multiplies, and keeps the sums in registers. No array of the size (rows,
packed moments) exists, and no two programs write to one place, so that results are the same every time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

__all__ = ["MAX_ROWS", "Grouped", "cp_sums", "group_rows"]

MAX_ROWS = 2**31 - 1  # on one GPU; positions are int32
PIECE = 2048  # rows of one program at most
TILE = 1024  # numbers that one program works on at a time


class Grouped(NamedTuple):
    """Rows in the order of one mode's coordinates.

    Attributes
    ----------
    order : Tensor, shape (n,), int32
        Where each row stands among the rows as they were given.
    others : Tensor, shape (K - 1, n), int32
        Positions in the other modes, counted through: those of the second follow the first's.
    first, last : Tensor, shape (P,), int64
        Pieces of rows; each belongs to one coordinate.
    pieces : Tensor, shape (T,), int64
        Pieces of each coordinate, in the coordinates' order.
    """

    order: Tensor
    others: Tensor
    first: Tensor
    last: Tensor
    pieces: Tensor


def group_rows(positions: Tensor, sizes: Sequence[int]) -> tuple[Grouped, ...]:
    """Order rows by each mode in turn.

    Parameters
    ----------
    positions : Tensor, shape (K, n), int64
        On a GPU; n at most `MAX_ROWS`.
    sizes : sequence of int
        Coordinates of each mode.

    Returns
    -------
    tuple of Grouped
        One a mode.
    """
    groups = []
    for mode, size in enumerate(sizes):
        others = [k for k in range(len(sizes)) if k != mode]
        # Within a coordinate by the next mode's, so that its moments are in the cache.
        order = torch.argsort(positions[mode] * sizes[others[0]] + positions[others[0]], stable=True)
        start, moved = 0, []
        for k in others:
            moved.append((positions[k].index_select(0, order) + start).int())
            start += sizes[k]
        count = torch.bincount(positions[mode], minlength=size)
        end = count.cumsum(0)
        pieces = (count + PIECE - 1) // PIECE
        coordinate = torch.repeat_interleave(torch.arange(size, device=count.device), pieces)
        number = torch.arange(len(coordinate), device=count.device) - (pieces.cumsum(0) - pieces)[coordinate]
        first = (end - count)[coordinate] + number * PIECE
        last = torch.minimum(first + PIECE, end[coordinate])
        groups.append(Grouped(order.int(), torch.stack(moved), first, last, pieces))
    return tuple(groups)


def cp_sums(
    grouped: Grouped, means: Sequence[Tensor], seconds: Sequence[Tensor], values: Tensor, weights: Tensor | None
) -> Tensor:
    """Packed ``sum w E a a'`` and ``sum w y E a`` of each coordinate, where ``a`` is the other modes' product.

    Parameters
    ----------
    grouped : Grouped
    means, seconds : sequence of Tensor, shapes (T_k, R) and (T_k, R (R + 1) / 2)
        Of the other modes.
    values : Tensor, shape (n,)
    weights : Tensor, shape (n,), or None

    Returns
    -------
    Tensor, shape (T, R (R + 1) / 2 + R)
    """
    packed, rank = seconds[0].shape[1], means[0].shape[1]
    width = triton.next_power_of_2(packed + rank)
    table = torch.cat([torch.cat([s, m], dim=1) for s, m in zip(seconds, means, strict=True)])
    out = values.new_empty(len(grouped.first), packed + rank)
    if len(grouped.first):
        _cp_sums[(len(grouped.first),)](
            grouped.first,
            grouped.last,
            grouped.order,
            grouped.others,
            grouped.others.shape[1],
            table,
            values,
            values if weights is None else weights,
            out,
            packed,
            PACKED_AND_RANK=packed + rank,
            WIDTH=width,
            WEIGHTED=weights is not None,
            OTHERS=grouped.others.shape[0],
            ROWS=max(TILE // width, 1),
        )
    sums: Tensor = torch.segment_reduce(out, "sum", lengths=grouped.pieces, unsafe=True)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _cp_sums(  # type: ignore[no-untyped-def]
    first,
    last,
    order,
    others,
    n,
    table,
    values,
    weights,
    out,
    packed,
    PACKED_AND_RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OTHERS: tl.constexpr,
    ROWS: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    start, end = tl.load(first + piece), tl.load(last + piece)
    column = tl.arange(0, WIDTH)
    inside = column < PACKED_AND_RANK
    total = tl.zeros([ROWS, WIDTH], dtype=out.dtype.element_ty)
    for block in range(start, end, ROWS):
        row = block + tl.arange(0, ROWS)
        there = row < end
        at = tl.load(order + row, mask=there, other=0)
        y = tl.load(values + at, mask=there, other=0.0)
        product = tl.where(column[None, :] < packed, 1.0, y[:, None])
        if WEIGHTED:
            product = product * tl.load(weights + at, mask=there, other=0.0)[:, None]
        for k in tl.static_range(OTHERS):
            place = tl.load(others + k * n + row, mask=there, other=0).to(tl.int64)
            entry = table + place[:, None] * PACKED_AND_RANK + column[None, :]
            product = product * tl.load(entry, mask=there[:, None] & inside[None, :], other=0.0)
        total += product
    tl.store(out + piece * PACKED_AND_RANK + column, tl.sum(total, axis=0), mask=inside)
