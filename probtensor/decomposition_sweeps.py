"""How a tensor with hidden cells is decomposed: sweeps of TensorLy over the tensor with the model's values in them.

What is stored in a hidden cell must not matter. TensorLy's own masks do not promise that: `parafac` makes its first
sweep over what is stored, `tucker` measures its progress against it, and starts by singular vectors begin with it. Here
hidden cells hold the mean of the others at first and the model's own reconstruction after each sweep (expectation
maximisation; Tomasi and Bro 2005); TensorLy makes one sweep a call, without a mask. Such a sweep never raises the error
on the observed cells.

References
----------
Tomasi and Bro (2005), PARAFAC and missing values, Chemometrics and Intelligent Laboratory Systems 75, 163-180.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Decomposition", "complete", "cp_ranks", "hals_sweep", "hooi_sweep", "tucker_ranks", "values_at"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BLOCK_NUMBERS = 10_000_000  # of a block of rows times the core, while a Tucker model predicts


class Decomposition(NamedTuple):
    """A decomposition: ``core`` (R_1, ..., R_K), None for the superdiagonal of ones (CP), and a factor a mode.

    ``errors`` (n_sweeps,) are relative to the norm of the observed cells; None where TensorLy kept them to itself.
    """

    core: FloatArray | None
    factors: list[FloatArray]
    errors: FloatArray | None = None


def complete(
    tensor: FloatArray,
    mask: FloatArray,
    model: Decomposition,
    sweep: Callable[[FloatArray, Decomposition], Decomposition],
    max_iter: int,
    tol: float,
) -> Decomposition:
    """Sweep over the tensor with the model's own values in its hidden cells, those where the mask is zero."""
    seen = mask == 1
    norm = float(np.linalg.norm(tensor[seen]))
    if norm == 0.0:  # what fits zeros is zero; TensorLy would divide by the norm
        if model.core is not None:
            return Decomposition(np.zeros_like(model.core), model.factors, np.zeros(1))
        return Decomposition(None, [np.zeros_like(model.factors[0]), *model.factors[1:]], np.zeros(1))
    filled, errors = np.where(seen, tensor, tensor[seen].mean()), [math.inf]
    for _ in range(max_iter):
        model = sweep(filled, model)
        estimate = _reconstruct(model)
        errors.append(float(np.linalg.norm((tensor - estimate)[seen])) / norm)
        if abs(errors[-2] - errors[-1]) < tol:
            break
        filled = np.where(seen, tensor, estimate)
    return model._replace(errors=np.asarray(errors[1:]))


def hals_sweep(tensor: FloatArray, model: Decomposition) -> Decomposition:
    """Update the factors of each mode once, none below zero."""
    import tensorly
    from tensorly.decomposition import non_negative_parafac_hals

    rank = model.factors[0].shape[1]
    start = (np.ones(rank), [factor.copy() for factor in model.factors])
    with tensorly.backend_context("numpy", local_threadsafe=True):
        weights, factors = non_negative_parafac_hals(tensor, rank, n_iter_max=1, init=start, tol=0.0)
    return Decomposition(None, [factors[0] * weights, *factors[1:]])


def hooi_sweep(tensor: FloatArray, model: Decomposition) -> Decomposition:
    """Update the factors of each mode once, then the core."""
    import tensorly
    from tensorly.decomposition import tucker

    assert model.core is not None
    with tensorly.backend_context("numpy", local_threadsafe=True):
        core, factors = tucker(tensor, model.core.shape, n_iter_max=1, init=(model.core, list(model.factors)), tol=0.0)
    return Decomposition(core, factors)


def _reconstruct(model: Decomposition) -> FloatArray:
    """The dense tensor of a decomposition."""
    import tensorly

    with tensorly.backend_context("numpy", local_threadsafe=True):
        if model.core is None:
            dense: FloatArray = tensorly.cp_to_tensor((None, model.factors))
        else:
            dense = tensorly.tucker_to_tensor((model.core, model.factors))
    return dense


def values_at(model: Decomposition, positions: IntArray) -> FloatArray:
    """Evaluate a decomposition at the cells (n, K)."""
    if model.core is None:
        product = model.factors[0][positions[:, 0]]
        for factor, position in zip(model.factors[1:], positions.T[1:], strict=True):
            product = product * factor[position]
        values: FloatArray = product.sum(axis=1)
        return values
    values, step = np.empty(len(positions)), max(1, BLOCK_NUMBERS // model.core.size)
    for begin in range(0, len(positions), step):
        block = positions[begin : begin + step]
        part = np.broadcast_to(model.core, (len(block), *model.core.shape))  # (rows, R_k, ..., R_K)
        for factor, position in zip(model.factors, block.T, strict=True):
            part = np.einsum("nr,nr...->n...", factor[position], part)
        values[begin : begin + step] = part
    return values


def cp_ranks(rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The rank of each mode of a CP model, checked."""
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank!r}")
    return (rank,) * len(shape)


def tucker_ranks(rank: int | Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The rank of each mode of a Tucker model, checked; a single number is lowered to what the modes can have."""
    asked = [int(r) for r in np.atleast_1d(rank)] if np.ndim(rank) else [int(rank)] * len(shape)  # type: ignore[arg-type]
    if len(asked) != len(shape) or min(asked) < 1:
        raise ValueError(
            f"rank: expected {len(shape)} numbers of at least 1, one a mode, or a single one, got {rank!r}"
        )
    ranks = [min(r, n) for r, n in zip(asked, shape, strict=True)]
    for k in range(len(ranks)):
        ranks[k] = min(ranks[k], math.prod(ranks[:k] + ranks[k + 1 :]))
    if np.ndim(rank) and ranks != asked:
        raise ValueError(
            f"rank: expected at most the labels of each mode, {shape}, and the product of the other ranks, got {rank!r}"
        )
    return tuple(ranks)
