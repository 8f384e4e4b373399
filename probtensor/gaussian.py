"""Gaussian and gamma messages: moments, observation sites, divergences.

Gaussians in natural form are ``exp(shift' x - x' precision x / 2)``; products add precisions and shifts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Gamma", "Gaussian", "from_natural", "gaussian_kl", "observation_site", "square_root", "standard_normal"]


class Gaussian(NamedTuple):
    """``N(mean, covariance)`` of a vector of size D: shapes (D,) and (D, D)."""

    mean: Tensor
    covariance: Tensor


def from_natural(precision: Tensor, shift: Tensor) -> Gaussian:
    """Moments of a Gaussian in natural form.

    Parameters
    ----------
    precision : Tensor, shape (D, D)
        Symmetric, positive definite.
    shift : Tensor, shape (D,)

    Examples
    --------
    >>> mean, covariance = from_natural(torch.tensor([[4.0]]), torch.tensor([2.0]))
    >>> mean, covariance
    (tensor([0.5000]), tensor([[0.2500]]))
    """
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    return Gaussian(covariance @ shift, covariance)


def gaussian_kl(q: Gaussian, variance: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from ``N(0, variance * I)``.

    Parameters
    ----------
    q : Gaussian
    variance : float

    Returns
    -------
    Tensor, scalar

    Examples
    --------
    >>> gaussian_kl(Gaussian(torch.zeros(2), torch.eye(2)))
    tensor(0.)
    """
    mean, covariance = q
    D = mean.shape[0]
    log_det: Tensor = torch.linalg.slogdet(covariance).logabsdet
    return 0.5 * ((covariance.trace() + mean @ mean) / variance - D - log_det + D * math.log(variance))


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of symmetric positive semi-definite matrices, which may be singular.

    It is unique: no sign or order that a library is free to choose enters.

    Parameters
    ----------
    matrix : Tensor, shape (..., D, D)

    Returns
    -------
    Tensor, shape (..., D, D)
    """
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    return root


def standard_normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the dtype and on the device of `like`: the same numbers on every device.

    Parameters
    ----------
    shape : sequence of int
    like : Tensor
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor, shape `shape`
    """
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)


def observation_site(y: Tensor, noise_covariance: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Site of a partly observed vector ``y ~ N(u, noise_covariance)``: precision, shift and the site's own constant.

    Missing entries are integrated out; what stands at their place in `y` (NaN too) is not looked at.

    Parameters
    ----------
    y : Tensor, shape (R,)
    noise_covariance : Tensor, shape (R, R)
    observed : Tensor, shape (R,), bool

    Returns
    -------
    precision : Tensor, shape (R, R)
    shift : Tensor, shape (R,)
    constant : Tensor, scalar
        ``log N(y; u, noise) = constant + shift' u - u' precision u / 2`` over the observed entries.

    Examples
    --------
    >>> precision, shift, _ = observation_site(
    ...     torch.tensor([1.0, torch.nan]), 0.1 * torch.eye(2), torch.tensor([True, False])
    ... )
    >>> precision
    tensor([[10.,  0.],
            [ 0.,  0.]])
    >>> shift
    tensor([10.,  0.])
    """
    seen = observed.nonzero().squeeze(-1)
    block = noise_covariance[seen[:, None], seen]
    inverse = torch.linalg.inv(block)
    values = y[seen]
    precision = torch.zeros_like(noise_covariance)
    precision[seen[:, None], seen] = inverse
    shift = noise_covariance.new_zeros(y.shape[0])
    shift[seen] = inverse @ values
    log_det = torch.linalg.slogdet(block).logabsdet
    constant = -0.5 * (values @ inverse @ values + log_det + seen.shape[0] * math.log(2 * math.pi))
    return precision, shift, constant


class Gamma(NamedTuple):
    """Gamma distributions with densities ``~ x^(shape - 1) exp(-rate x)``; scalars, or tensors of one shape.

    Examples
    --------
    >>> table = Gamma(torch.tensor([[4.0]]), torch.tensor([[2.0]]))
    >>> table.mean.item(), table.variance.item()
    (2.0, 1.0)
    """

    shape: Tensor
    rate: Tensor

    @property
    def mean(self) -> Tensor:
        """``E x``."""
        return self.shape / self.rate

    @property
    def variance(self) -> Tensor:
        """``Var x``."""
        return self.shape / self.rate**2

    @property
    def mean_log(self) -> Tensor:
        """``E log x``."""
        return torch.digamma(self.shape) - self.rate.log()

    def kl(self, prior: "Gamma") -> Tensor:
        """Kullback-Leibler divergences from `prior`, one each."""
        a, b = self
        a0, b0 = prior
        return (
            (a - a0) * torch.digamma(a)
            - torch.lgamma(a)
            + torch.lgamma(a0)
            + a0 * (b.log() - b0.log())
            + a * (b0 - b) / b
        )

    def draw(self, rng: np.random.Generator) -> Tensor:
        """One draw of every number."""
        shape, rate = (x.double().cpu().numpy() for x in self)
        return torch.from_numpy(np.asarray(rng.gamma(shape, 1 / rate))).to(self.shape)
