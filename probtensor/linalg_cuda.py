"""Inverses and determinants of many small matrices on a GPU, one program each, in registers.

Gauss-Jordan elimination with partial pivoting. Libraries do the same in many launches and look at the result.
"""

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

__all__ = ["inverse_and_log_det"]


def inverse_and_log_det(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of matrices, and logarithms of their absolute determinants.

    Parameters
    ----------
    matrix : Tensor, shape (..., D, D)
        On a GPU. Two of them must fit into a program's registers: D at most `probtensor.linalg.KERNEL_SIZE`.

    Returns
    -------
    inverse : Tensor, shape (..., D, D)
        Not finite where a matrix is singular.
    log_det : Tensor, shape (...)
    """
    matrix = matrix.contiguous()
    D = matrix.shape[-1]
    inverse, log_det = torch.empty_like(matrix), matrix.new_empty(matrix.shape[:-2])
    if log_det.numel():
        width = triton.next_power_of_2(D)
        _gauss_jordan[(log_det.numel(),)](matrix, inverse, log_det, D=D, WIDTH=width, num_warps=max(width // 8, 1))
    return inverse, log_det


@triton.jit  # type: ignore[untyped-decorator]
def _gauss_jordan(matrix, inverse, log_det, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    row, column = at[:, None], at[None, :]
    inside = (row < D) & (column < D)
    left = tl.load(matrix + number * D * D + row * D + column, mask=inside, other=0.0)
    right = (row == column).to(left.dtype)
    waiting = at < D  # rows that have not been the pivot's
    unknown = at  # which row of the inverse a row ends as
    log = tl.zeros([WIDTH], dtype=left.dtype)
    for k in range(D):
        entries = tl.sum(tl.where(column == k, left, 0.0), axis=1)
        size = tl.where(entries == entries, tl.abs(entries), float("inf"))  # a NaN goes on to the result
        place = tl.argmax(tl.where(waiting, size, -1.0), axis=0)
        pivot_row = at == place
        pivot = tl.sum(tl.where(pivot_row, entries, 0.0), axis=0)
        of_left = tl.sum(tl.where(pivot_row[:, None], left, 0.0), axis=0) / pivot
        of_right = tl.sum(tl.where(pivot_row[:, None], right, 0.0), axis=0) / pivot
        left = tl.where(pivot_row[:, None], of_left[None, :], left - entries[:, None] * of_left[None, :])
        right = tl.where(pivot_row[:, None], of_right[None, :], right - entries[:, None] * of_right[None, :])
        waiting = waiting & (at != place)
        unknown = tl.where(pivot_row, k, unknown)
        log = tl.where(pivot_row, tl.log(tl.abs(pivot)), log)
    tl.store(inverse + number * D * D + unknown[:, None] * D + column, right, mask=inside)
    tl.store(log_det + number, tl.sum(log, axis=0))
