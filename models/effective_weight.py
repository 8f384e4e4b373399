"""The effective weight ``W0 + Σ s·ΔW`` of a layer with updates.

Written with differentiable operations it takes some 60 of them, forward and backward, for a convolution's kernel; each
is a product of a few thousand numbers, so that starting them is what takes time. One update on a frozen weight is
therefore one operation with a backward of its own. With the modes from the third on, a kernel's, as one, whose factor
``K`` is the Kronecker product of theirs, and ``G`` unfolded to match:

    P = G ×3 K,   Q = P ×2 A2,   W = W0 + s·Q ×1 A1,
    dA1 = s·dW Q',   dQ = s·A1'dW,   dA2 = dQ P',   dP = A2'dQ,   dG = dP ×3 K',   dK = dP'G,

where a product of two tensors sums over the modes that they share. Transforms of `torch.func`, forward-mode
derivatives, compilers and second derivatives see the differentiable operations instead.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from probtensor.models.tucker_delta import MOST_TAPS, Tucker, contract

__all__ = ["updated"]


def updated(weight: Tensor, updates: Sequence[Tucker]) -> Tensor:
    """``W0 + Σ s·ΔW`` in the weight's dtype, summed in float32 (float64 for float64 weights), autocast or not.

    Parameters
    ----------
    weight : Tensor, shape (I1, …, IN)
    updates : sequence of Tucker

    Returns
    -------
    Tensor, shape (I1, …, IN)

    Examples
    --------
    >>> half = torch.ones(1, 1, dtype=torch.bfloat16)
    >>> updated(half, [Tucker(torch.full((1, 1), 0.5), (None, None), 2.0)])
    tensor([[2.]], dtype=torch.bfloat16)
    """
    if len(updates) == 1 and _is_one_operation(weight, updates[0]):
        core, factors, scale = updates[0]
        return _Updated.apply(weight, scale, core, *factors)  # type: ignore[no-untyped-call, no-any-return]
    with _without_autocast(weight):
        return _differentiable(weight, updates)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _differentiable(weight: Tensor, updates: Sequence[Tucker]) -> Tensor:
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


def _is_one_operation(weight: Tensor, update: Tucker) -> bool:
    core, factors, _ = update
    kernel = [A for A in factors[2:] if A is not None]
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and type(weight) in (Tensor, nn.Parameter)
        and core.dtype == torch.promote_types(weight.dtype, torch.float32)
        and all(A is None or A.dtype == core.dtype for A in factors)
        and len(factors) > 1
        and (not kernel or (len(kernel) == len(factors) - 2 and math.prod(map(len, kernel)) <= MOST_TAPS))
    )


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float, core: Tensor, *factors: Tensor | None) -> Tensor:
        ctx.scale = scale
        with _without_autocast(weight):
            first, second, *kernel = factors
            present = [A for A in kernel if A is not None]
            R1, R2 = core.shape[:2]
            K = functools.reduce(torch.kron, present) if present else None
            P = core.reshape(R1, R2, -1) if K is None else (core.reshape(R1 * R2, -1) @ K.mT).view(R1, R2, -1)
            Q = P if second is None else _second_mode(second, P)
            rows = Q.reshape(R1, -1)
            delta = rows if first is None else first @ rows
            ctx.save_for_backward(core, *factors, P, Q, K)
            return torch.add(weight, delta.view(weight.shape), alpha=scale, out=torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        core, *factors, P, Q, K = ctx.saved_tensors
        if torch.is_grad_enabled():  # the derivative of a derivative is wanted
            return _differentiable_backward(ctx, grad, core, factors)
        of_weight, _, of_core, of_first, of_second, *of_kernel = ctx.needs_input_grad
        first, second, *kernel = factors
        R1, R2 = core.shape[:2]
        dG: Tensor | None = None
        grads: list[Tensor | None] = [None] * len(factors)
        with _without_autocast(grad):
            dW = grad.to(core.dtype).reshape(len(grad), -1)
            grads[0] = _product(dW, Q.reshape(R1, -1).mT, ctx.scale) if of_first else None
            dQ = (dW * ctx.scale if first is None else _product(first.mT, dW, ctx.scale)).view(Q.shape)
            grads[1] = torch.bmm(dQ, P.mT).sum(0) if of_second else None
            dP = (dQ if second is None else _second_mode(second.mT, dQ)).reshape(R1 * R2, -1)
            if of_core:
                dG = (dP if K is None else dP @ K).view(core.shape)
            if any(of_kernel):
                grads[2:] = _kronecker_gradients(dP.mT @ core.reshape(R1 * R2, -1), kernel)
        return (grad if of_weight else None, None, dG, *grads)


def _product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``scale·A B`` in one operation."""
    return torch.addmm(A.new_empty(()), A, B, beta=0, alpha=scale)


def _second_mode(matrix: Tensor, tensor: Tensor) -> Tensor:
    """``tensor ×2 matrix`` for a tensor of three modes."""
    if tensor.shape[2] == 1:
        return (tensor[:, :, 0] @ matrix.mT)[:, :, None]
    return torch.bmm(matrix.expand(len(tensor), *matrix.shape), tensor)


def _kronecker_gradients(gradient: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by the factors of ``A ⊗ B ⊗ …``, from that by the product."""
    if len(factors) == 1:
        return [gradient]
    *left, last = factors
    product = functools.reduce(torch.kron, left)
    (n, r), (m, k) = product.shape, last.shape
    pairs = gradient.view(n, m, r, k).transpose(1, 2).reshape(n * r, m * k)
    by_left = (pairs @ last.flatten()).view(n, r)
    return [*_kronecker_gradients(by_left, left), (product.flatten() @ pairs).view(m, k)]


def _differentiable_backward(
    ctx: Any, grad: Tensor, core: Tensor, factors: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    of_weight, _, *wanted = ctx.needs_input_grad
    inputs = [tensor for tensor, wants in zip((core, *factors), wanted, strict=True) if wants and tensor is not None]
    delta = ctx.scale * contract(core, factors)
    found = iter(torch.autograd.grad(delta, inputs, grad.to(core.dtype), create_graph=True))
    return (grad if of_weight else None, None, *(next(found) if wants else None for wants in wanted))
