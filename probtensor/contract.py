r"""Moments of CP and Tucker structures at observed entries.

An entry is ``f = sum_{r1..rK} W[r1..rK] prod_k u^k[rk]``. For mode ``k``, ``f = u^k . a`` with
``a = W_(k) (u^1 x ... x u^K without k)``. A structure gives the moments of ``a`` and ``f`` when the factors ``u^k`` are
independent with mean ``m^k`` and second moment ``M^k = E u u'``, row by row; nothing has the tensor's volume.

Conventions: factors keep the order of the modes everywhere, in the unfolding as in the Kronecker product. Symmetric
matrices are *packed*: ``R (R + 1) / 2`` entries of the upper triangle, row by row.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Final, Protocol

import torch
from torch import Tensor

__all__ = ["CP", "Structure", "Tucker", "multilinear", "outer_rows", "pack", "pack_dual", "products_at", "unpack"]


def packed_size(rank: int) -> int:
    """Entries of a packed symmetric matrix: ``rank (rank + 1) / 2``.

    >>> packed_size(3)
    6
    """
    return rank * (rank + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """Upper triangles of symmetric matrices.

    Parameters
    ----------
    matrix : Tensor, shape (..., R, R)

    Returns
    -------
    Tensor, shape (..., R (R + 1) / 2)

    Examples
    --------
    >>> pack(torch.tensor([[1., 2.], [2., 3.]]))
    tensor([1., 2., 3.])
    """
    row, column = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
    return matrix[..., row, column]


def pack_dual(matrix: Tensor) -> Tensor:
    """Weights of a packed matrix: ``(pack_dual(A) * pack(B)).sum() == (A * B).sum()`` for every symmetric B.

    Parameters
    ----------
    matrix : Tensor, shape (..., R, R)

    Returns
    -------
    Tensor, shape (..., R (R + 1) / 2)

    Examples
    --------
    >>> pack_dual(torch.tensor([[1., 2.], [2., 3.]]))
    tensor([1., 4., 3.])
    """
    both = matrix + matrix.mT
    return pack(both - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))


def unpack(packed: Tensor) -> Tensor:
    """Symmetric matrices from their upper triangles.

    Parameters
    ----------
    packed : Tensor, shape (..., R (R + 1) / 2)

    Returns
    -------
    Tensor, shape (..., R, R)

    Examples
    --------
    >>> unpack(torch.tensor([1., 2., 3.]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    rank = _rank(packed)
    row, column = torch.triu_indices(rank, rank, device=packed.device)
    matrix = packed.new_empty(*packed.shape[:-1], rank, rank)
    matrix[..., row, column] = packed
    matrix[..., column, row] = packed
    return matrix


def outer_rows(rows: Sequence[Tensor]) -> Tensor:
    """Row-wise Kronecker product, first factor slowest.

    Parameters
    ----------
    rows : sequence of Tensor, shape (n, c_k)
        At least one.

    Returns
    -------
    Tensor, shape (n, prod c_k)

    Examples
    --------
    >>> outer_rows([torch.tensor([[1., 2.]]), torch.tensor([[1., 10.]])])
    tensor([[ 1., 10.,  2., 20.]])
    """
    return reduce(lambda left, right: (left[:, :, None] * right[:, None, :]).flatten(1), rows)


class Structure(Protocol):
    """What a CP or Tucker structure answers; `means` and `seconds` are rows (n, R_k) and packed rows, one a mode."""

    def partial(self, mode: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``E a`` (n, R_k) and packed ``E a a'`` of `mode`; the entries of that mode in the arguments are not used."""
        ...

    def mean(self, means: Sequence[Tensor]) -> Tensor:
        """``E f``, shape (n,)."""
        ...

    def second(self, seconds: Sequence[Tensor]) -> Tensor:
        """``E f^2``, shape (n,)."""
        ...


class CP:
    """Canonical polyadic structure: ``f = sum_r prod_k u^k[r]``, all ranks equal."""

    def partial(self, mode: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``E a`` and packed ``E a a'``: products over the other modes (Fang et al. 2024, section 4)."""
        if len(means) == 1:
            return torch.ones_like(means[0]), torch.ones_like(seconds[0])
        others = [k for k in range(len(means)) if k != mode]
        return _product([means[k] for k in others]), _product([seconds[k] for k in others])

    def mean(self, means: Sequence[Tensor]) -> Tensor:
        """``E f``, shape (n,)."""
        return _product(means).sum(-1)

    def second(self, seconds: Sequence[Tensor]) -> Tensor:
        """``E f^2``, shape (n,)."""
        packed = _product(seconds)
        rank = _rank(packed)
        return packed @ pack_dual(packed.new_ones(rank, rank))


def products_at(tables: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Products over modes of the rows that entries have in tables: one array is written, and no other of its size held.

    Parameters
    ----------
    tables : sequence of Tensor, shape (T_k, c)
        At least one.
    positions : Tensor, shape (K, n), int64
        A row a table.

    Returns
    -------
    Tensor, shape (n, c)
        New.

    Examples
    --------
    >>> tables = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[10., 100.]])
    >>> products_at(tables, torch.tensor([[0, 1, 1], [0, 0, 0]]))
    tensor([[ 10., 200.],
            [ 30., 400.],
            [ 30., 400.]])
    """
    found = tables[0].index_select(0, positions[0])
    for table, position in zip(tables[1:], positions[1:], strict=True):
        found.mul_(table.index_select(0, position))
    return found


class Tucker:
    """Tucker structure whose core is Gaussian, ``vec(W) ~ N(mean, covariance)``, vectorised in the order of the modes.

    Parameters
    ----------
    core : Tensor, shape (R_1, ..., R_K)
        Mean of the core.
    covariance : Tensor, shape (R, R) with R = prod R_k
        Its covariance.
    """

    def __init__(self, core: Tensor, covariance: Tensor) -> None:
        self.core: Final = core
        flat = core.reshape(-1)
        self.second_core: Final = _pack_pairs(torch.outer(flat, flat) + covariance, core.shape)  # dual, (P_1, ..., P_K)

    def partial(self, mode: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``E a`` and packed ``E a a'``, core covariance included (Fang et al. 2024, section 4)."""
        rank = self.core.shape[mode]
        off_diagonal = 0.5 + 0.5 * pack(torch.eye(rank, dtype=self.core.dtype, device=self.core.device))
        unfolded = self.core.movedim(mode, -1).reshape(-1, rank)
        second = self.second_core.movedim(mode, -1).reshape(-1, packed_size(rank)) * off_diagonal
        if len(means) == 1:
            n = means[0].shape[0]
            return unfolded.expand(n, -1), second.expand(n, -1)
        others = [k for k in range(len(means)) if k != mode]
        return outer_rows([means[k] for k in others]) @ unfolded, outer_rows([seconds[k] for k in others]) @ second

    def mean(self, means: Sequence[Tensor]) -> Tensor:
        """``E f``, shape (n,)."""
        return multilinear(self.core, means)

    def second(self, seconds: Sequence[Tensor]) -> Tensor:
        """``E f^2``, shape (n,)."""
        return multilinear(self.second_core, seconds)


def core_statistics(
    means: Sequence[Tensor], seconds: Sequence[Tensor], values: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums over rows that a Gaussian core needs: ``sum_n w_n x_k M^k`` and ``sum_n w_n y_n x_k m^k``.

    Parameters
    ----------
    means, seconds : sequence of Tensor, shapes (n, R_k) and (n, P_k)
    values : Tensor, shape (n,)
    weight : Tensor, shape (n,), optional
        Default: ones.

    Returns
    -------
    precision : Tensor, shape (P_1, ..., P_K)
        Packed mode by mode; `unpack_pairs` makes the matrix of it.
    shift : Tensor, shape (R_1, ..., R_K)
    """

    def total(rows: Sequence[Tensor]) -> Tensor:
        *first, last = rows
        left = outer_rows(first) if first else last.new_ones(last.shape[0], 1)
        return (left.T @ last).reshape([x.shape[1] for x in rows])

    last = seconds[-1]
    if weight is not None:
        last, values = last * weight[:, None], values * weight
    return total([*seconds[:-1], last]), total([*means[:-1], means[-1] * values[:, None]])


def unpack_pairs(packed: Tensor) -> Tensor:
    """``(P_1, ..., P_K)`` packed mode by mode to the symmetric matrix ``(R, R)``, R = prod R_k, modes in order.

    Parameters
    ----------
    packed : Tensor, shape (P_1, ..., P_K)

    Returns
    -------
    Tensor, shape (R, R)
    """
    K = packed.ndim
    for _ in range(K):  # the first packed axis becomes a pair at the end
        packed = unpack(packed.movedim(0, -1))
    ranks = packed.shape[::2]
    return packed.permute(*range(0, 2 * K, 2), *range(1, 2 * K, 2)).reshape(math.prod(ranks), -1)


def _pack_pairs(matrix: Tensor, ranks: Sequence[int]) -> Tensor:
    """Dual packing of ``(R, R)`` mode by mode: the transpose of `unpack_pairs`."""
    K = len(ranks)
    pairs = matrix.reshape(*ranks, *ranks).permute(*(axis for k in range(K) for axis in (k, K + k)))
    for _ in range(K):  # the first pair becomes a packed axis at the end
        pairs = pack_dual(pairs.movedim((0, 1), (-2, -1)))
    return pairs


def multilinear(core: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """``core`` (c_1, ..., c_K) contracted with one row (n, c_k) a mode, shape (n,); no (n, prod c_k) array is built."""
    *first, last = rows
    if not first:
        return last @ core
    return ((outer_rows(first) @ core.reshape(-1, core.shape[-1])) * last).sum(-1)


def _rank(packed: Tensor) -> int:
    return (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2


def _product(rows: Sequence[Tensor]) -> Tensor:
    return reduce(torch.mul, rows)
