"""The update of a weight in Tucker form: its ranks, its start, its contraction, sums of several.

For a weight of shape (I1, …, IN), with a core ``G`` (R1, …, RN) and factors ``A(n)`` (In, Rn):

    ΔW = G ×1 A(1) ×2 A(2) … ×N A(N),        W = W0 + s·ΔW,        s = alpha·2^(N/2)

The core starts at zero and the factors have orthonormal columns, so ΔW = 0 at first and the first step moves the core
alone. Columns are scaled to the Frobenius norm that entries drawn from N(0, 1/(2 Rn)) have in expectation,
``|A(n)|² = In·Rn/(2 Rn) = In/2``. A step of ``lr`` in each entry of the core then moves ΔW by a root mean square of
``lr·2^(−N/2)`` whatever the ranks, and the weight by ``alpha·lr`` whatever the order too.

A mode whose rank is its size needs no factor: the core keeps that mode (`None` in the list of factors). Such a factor
counts as the identity over √2, the square matrix of the norm above, and its √2 is taken out of the scale: ``s`` is
``alpha·2^(M/2)`` with the number ``M`` of factors that are there.

References
----------
Si et al. (2025), "Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning", ICLR.
Tucker (1966), "Some mathematical notes on three-mode factor analysis", Psychometrika 31. De Lathauwer, De Moor,
Vandewalle (2000), "A multilinear singular value decomposition", SIAM J. Matrix Anal. Appl. 21.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Tucker",
    "clamp_ranks",
    "combined",
    "contract",
    "leading_factors",
    "mode_product",
    "random_factors",
    "step_scale",
    "updated",
]


MOST_TAPS = 512  # of a kernel whose factors are multiplied out


class Tucker(NamedTuple):
    """An update ``scale · core ×n factors[n]``.

    Attributes
    ----------
    core : Tensor, shape (R1, …, RN)
    factors : tuple of (Tensor, shape (In, Rn), or None)
        None where ``Rn == In`` and the core keeps the mode.
    scale : float
        The ``s`` of the module's docstring.
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]
    scale: float


def clamp_ranks(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Ranks no larger than their modes.

    Examples
    --------
    >>> clamp_ranks((64, 3, 7, 7), (16, 16, 2, 2))
    (16, 3, 2, 2)
    """
    return tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))


def step_scale(alpha: float, shape: Sequence[int], ranks: Sequence[int]) -> float:
    """Scale ``s`` that makes a step in the core move the weight by ``alpha`` times its size.

    Examples
    --------
    >>> step_scale(1.0, (256, 256, 3, 3), (16, 16, 2, 2)), step_scale(1.0, (256, 256, 3, 3), (16, 16, 3, 3))
    (4.0, 2.0)
    """
    n_factors = sum(rank < size for rank, size in zip(ranks, shape, strict=True))
    return float(alpha * 2.0 ** (n_factors / 2))


def random_factors(
    shape: Sequence[int], ranks: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """Random orthonormal columns of the norm in the module's docstring; None where the rank is the mode's size.

    Parameters
    ----------
    shape, ranks : sequence of int
        Of the weight and of the core.
    generator : torch.Generator
        On the CPU, so that a start is the same on every device.
    dtype : torch.dtype, default torch.float32

    Returns
    -------
    list of (Tensor, shape (In, Rn), or None)
    """
    return [
        None
        if rank == size
        else _scaled(torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]).to(dtype)
        for size, rank in zip(shape, ranks, strict=True)
    ]


def leading_factors(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor | None]:
    """Leading left singular vectors of each unfolding (truncated HOSVD), scaled as in the module's docstring.

    Parameters
    ----------
    tensor : Tensor, shape (I1, …, IN)
        A weight, or the gradient of a loss by it.
    ranks : sequence of int

    Returns
    -------
    list of (Tensor, shape (In, Rn), float64, or None)

    Examples
    --------
    >>> weight = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0, 0.0]))
    >>> [[round(abs(x), 3) for x in factor.flatten().tolist()] for factor in leading_factors(weight, (1, 1))]
    [[0.6, 0.8], [1.225, 0.0, 0.0]]
    """
    return [
        None if rank == size else _scaled(_leading(tensor.detach().to("cpu", torch.float64).movedim(n, 0), rank))
        for n, (size, rank) in enumerate(zip(tensor.shape, ranks, strict=True))
    ]


def _leading(tensor: Tensor, rank: int) -> Tensor:
    """Orthonormal columns that span the leading left singular vectors; the Gram matrix is of the shorter side."""
    unfolding = tensor.reshape(len(tensor), -1)
    if unfolding.shape[0] <= unfolding.shape[1]:
        left: Tensor = torch.linalg.eigh(unfolding @ unfolding.T)[1]
        return left.flip(1)[:, :rank]
    right = torch.linalg.eigh(unfolding.T @ unfolding)[1].flip(1)[:, :rank]
    basis = unfolding @ right
    if basis.shape[1] < rank:  # an unfolding narrower than the rank: any further columns
        basis = torch.cat([basis, torch.eye(len(basis), rank - basis.shape[1], dtype=basis.dtype)], 1)
    orthonormal: Tensor = torch.linalg.qr(basis)[0]
    return orthonormal


def _scaled(basis: Tensor) -> Tensor:
    size, rank = basis.shape
    return basis * math.sqrt(size / (2 * rank))


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """``tensor ×mode matrix``: the mode of size R becomes one of size I; matrix has shape (I, R).

    Nothing is transposed: the modes before are a batch, those after are columns.
    """
    before, after = math.prod(tensor.shape[:mode]), math.prod(tensor.shape[mode + 1 :])
    shape = (*tensor.shape[:mode], len(matrix), *tensor.shape[mode + 1 :])
    if before == 1:
        return (matrix @ tensor.reshape(-1, after)).view(shape)
    if after == 1:
        return (tensor.reshape(before, -1) @ matrix.mT).view(shape)
    unfolded = tensor.reshape(before, -1, after)
    return torch.bmm(matrix.expand(before, *matrix.shape), unfolded).view(shape)


def contract(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """``ΔW``, shape (I1, …, IN).

    Modes from the third on, a kernel's, are taken as one, by the Kronecker product of their factors: fewer operations
    to start. Then from the last mode to the first, so that what stands before a mode is still small.

    Examples
    --------
    >>> contract(torch.ones(1, 2), [torch.tensor([[1.0], [2.0]]), None])
    tensor([[1., 1.],
            [2., 2.]])
    """
    kernel = [A for A in factors[2:] if A is not None]
    first, taps = list(factors[:2]), [len(A) for A in kernel]
    if len(kernel) > 1 and len(kernel) == core.ndim - 2 and math.prod(taps) <= MOST_TAPS:
        merged = contract(core.flatten(2), [*first, functools.reduce(torch.kron, kernel)])
        return merged.view(*merged.shape[:2], *taps)
    for n in reversed(range(len(factors))):
        A = factors[n]
        core = core if A is None else mode_product(core, A, n)
    return core


def updated(weight: Tensor, updates: Sequence[Tucker]) -> Tensor:
    """``W0 + Σ s·ΔW`` in the weight's dtype, summed in float32 (float64 for float64 weights), autocast or not.

    Examples
    --------
    >>> half = torch.ones(1, 1, dtype=torch.bfloat16)
    >>> updated(half, [Tucker(torch.full((1, 1), 0.5), (None, None), 2.0)])
    tensor([[2.]], dtype=torch.bfloat16)
    """
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return updated(weight, updates)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(dtype)
    for core, factors, scale in updates:
        A, *others = (None if A is None else A.to(dtype) for A in factors)
        if A is None or not weight.is_contiguous():
            total = torch.add(total, contract(core.to(dtype), [A, *others]), alpha=scale)
        else:  # the last product adds to the weight
            inner = contract(core.to(dtype), [None, *others]).reshape(core.shape[0], -1)
            total = torch.addmm(total.view(len(A), -1), A, inner, alpha=scale).view(weight.shape)
    return total.to(weight.dtype)


def combined(updates: Sequence[Tucker], weights: Sequence[float]) -> Tucker:
    """One update that equals ``Σ weights[i] · updates[i]``, with scale 1.

    Factors stand side by side and cores on a block diagonal. A mode whose ranks add up to its size or more loses its
    factor instead.

    Examples
    --------
    >>> one = Tucker(torch.ones(1, 1), (torch.ones(3, 1), torch.ones(2, 1)), 0.5)
    >>> both = combined([one, one], [1.0, 3.0])
    >>> both.core.shape, updated(torch.zeros(3, 2), [both])[0, 0].item()
    (torch.Size([2, 2]), 2.0)
    """
    first = updates[0]
    sizes = [first.core.shape[n] if A is None else A.shape[0] for n, A in enumerate(first.factors)]
    totals = [sum(update.core.shape[n] for update in updates) for n in range(len(sizes))]
    kept = [total < size for total, size in zip(totals, sizes, strict=True)]
    core = first.core.new_zeros([totals[n] if kept[n] else sizes[n] for n in range(len(sizes))])
    starts = [0] * len(sizes)
    for (part, factors, scale), weight in zip(updates, weights, strict=True):
        place = tuple(
            slice(starts[n], starts[n] + part.shape[n]) if kept[n] else slice(None) for n in range(len(sizes))
        )
        core[place] += weight * scale * contract(part, [None if kept[n] else A for n, A in enumerate(factors)])
        starts = [start + size for start, size in zip(starts, part.shape, strict=True)]
    columns = [[update.factors[n] for update in updates] for n in range(len(sizes))]
    beside = [torch.cat([A for A in As if A is not None], 1) if kept[n] else None for n, As in enumerate(columns)]
    return Tucker(core, tuple(beside), 1.0)
