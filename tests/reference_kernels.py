"""Covariances of the kernels from their definitions, and dense Gaussian processes with them. Clarity before speed."""

import math

import torch
from torch import Tensor

from probtensor.kernels import Kernel, Linear, Matern, Periodic, Sum, White
from probtensor.models.state_space import matern_covariance
from tests.reference import F64, dense_posterior


def kernel_covariance(kernel: Kernel, x: Tensor, y: Tensor, hyper: Tensor, times: Tensor) -> Tensor:
    """Covariance (n, m) of one function with hyperparameters (n_hyperparameters,) over the axis of `times`."""
    if isinstance(kernel, Sum):
        total, a = torch.zeros(len(x), len(y), dtype=F64), 0
        for part in kernel.parts:
            b = a + len(part.hyperparameters)
            total, a = total + kernel_covariance(part, x, y, hyper[a:b], times), b
        return total
    if isinstance(kernel, Matern):
        return matern_covariance(kernel.nu, x[:, None] - y[None, :], hyper[0], hyper[1])
    if isinstance(kernel, Linear):
        middle, half = (times[0] + times[-1]) / 2, (float(times[-1] - times[0]) or 1.0) / 2
        return hyper[0] * (1 + torch.outer(x - middle, y - middle) / half**2)
    if isinstance(kernel, White):
        return hyper[0] * (x[:, None] == y[None, :]).to(F64)
    assert isinstance(kernel, Periodic)
    q = fourier_coefficients(hyper[0])[: kernel.n_harmonics + 1]
    total = torch.zeros(len(x), len(y), dtype=F64)
    for j, weight in enumerate(q):
        total = total + weight * torch.cos(2 * math.pi * j * (x[:, None] - y[None, :]) / kernel.period)
    return hyper[1] * total / q.sum()


def fourier_coefficients(lengthscale: Tensor) -> Tensor:
    """Those of ``exp((cos(theta) - 1) / lengthscale^2)`` as a sum of cosines, by the fast Fourier transform."""
    n = 1024
    theta = torch.arange(n, dtype=F64) * 2 * math.pi / n
    spectrum = torch.fft.rfft(torch.exp((torch.cos(theta) - 1) / lengthscale**2)).real / n
    return torch.cat([spectrum[:1], 2 * spectrum[1:-1]])


def dense_kernel_prior(kernel: Kernel, where: Tensor, hyper: Tensor, times: Tensor) -> Tensor:
    """Prior covariance (n, R, n, R) of R independent functions, hyperparameters (n_hyperparameters, R)."""
    n, R = len(where), hyper.shape[1]
    K = torch.zeros(n, R, n, R, dtype=F64)
    for r in range(R):
        K[:, r, :, r] = kernel_covariance(kernel, where, where, hyper[:, r], times)
    return K


def dense_kernel_at(
    kernel: Kernel, times: Tensor, hyper: Tensor, precision: Tensor, shift: Tensor, where: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean (n, R), joint covariance (n, R, n, R) at `where`, and the log-normaliser, given sites at `times`.

    The coordinates `where` join the rest without a site.
    """
    T, (n, R) = len(times), (len(where), shift.shape[1])
    prior = dense_kernel_prior(kernel, torch.cat([times, where]), hyper, times)
    precision = torch.cat([precision, torch.zeros(n, R, R, dtype=F64)])
    shift = torch.cat([shift, torch.zeros(n, R, dtype=F64)])
    mean, covariance, log_z = dense_posterior(prior, precision, shift)
    return mean[T:], covariance[T:, :, T:, :], log_z
