"""Inverses of many small matrices at once, without a look at the result: a GPU need not be waited for.

Singular matrices give numbers that are not finite instead of an error; who sums them up will see.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["inverse", "solve", "solve_and_log_det"]

KERNEL_SIZE = 64  # rows of the largest matrices that `linalg_cuda` takes


def inverse(matrix: Tensor) -> Tensor:
    """Inverses of matrices (..., D, D)."""
    if _by_kernel(matrix):
        from probtensor.linalg_cuda import inverse_and_log_det  # it needs Triton, which only CUDA builds of torch bring

        return inverse_and_log_det(matrix)[0]
    found: Tensor = torch.linalg.inv_ex(matrix).inverse
    return found


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solutions (..., D, S) of ``matrix x = right``."""
    if _by_kernel(matrix):
        return inverse(matrix) @ right
    found: Tensor = torch.linalg.solve_ex(matrix, right).result
    return found


def solve_and_log_det(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions (..., D, S) of ``matrix x = right`` and logarithms (...) of the matrices' absolute determinants.

    Once differentiable.
    """
    found: tuple[Tensor, Tensor] = _SolveAndLogDet.apply(matrix, right)  # type: ignore[no-untyped-call]
    return found


class _SolveAndLogDet(torch.autograd.Function):
    """Its gradients need one inverse, where autograd would take the LU decomposition apart."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if _by_kernel(matrix):
            from probtensor.linalg_cuda import inverse_and_log_det

            inverted, log_det = inverse_and_log_det(matrix)
            solution = inverted @ right
        else:
            factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
            log_det = factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
            solution = torch.linalg.lu_solve(factors, pivots, right)
        ctx.save_for_backward(matrix, solution)
        return solution, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_solution: Tensor, of_log_det: Tensor) -> tuple[Tensor, Tensor]:
        matrix, solution = ctx.saved_tensors
        back = inverse(matrix).mT
        of_right = back @ of_solution
        return of_log_det[..., None, None] * back - of_right @ solution.mT, of_right


def _by_kernel(matrix: Tensor) -> bool:
    """Whether `linalg_cuda` takes them: it has no gradients, and large matrices do not fit into its registers."""
    needs_gradient = torch.is_grad_enabled() and matrix.requires_grad
    return matrix.is_cuda and matrix.shape[-1] <= KERNEL_SIZE and not needs_gradient
