"""Matérn Gaussian processes as linear stochastic differential equations.

A Matérn process with smoothness ``nu`` = 1/2, 3/2 or 5/2 is the first entry of a Markov chain with
``d = nu + 1/2`` entries: the value and its derivatives. Conventions of this module, used throughout:

* **Scaled state.** Derivatives are taken in the dimensionless time ``s = lam * t``, where
  ``lam = sqrt(2 nu) / lengthscale``. No entry then depends on the unit of the coordinate, and all matrices stay well
  conditioned at any lengthscale.
* **Components.** ``R`` independent processes, each with its own lengthscale and variance, are stacked in one state of
  size ``D = R * d``, component by component: entry ``r * d`` is the value of component ``r``.
* **Column states.** ``x_j = A_j x_{j-1} + N(0, Q_j)``.

References
----------
Hartikainen and Särkkä (2010), "Kalman filtering and smoothing solutions to temporal Gaussian process regression
models". Fang et al. (2024), "Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor Data", section 3.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Transition",
    "block_diagonal",
    "matern_blocks",
    "matern_covariance",
    "state_dim",
    "stationary_blocks",
    "stationary_covariance",
    "transition",
]

# With the scaled state, expm(F s) = exp(-s) * sum_n _DRIFT[n] s^n, and its last column, exp(-s) * sum_n c_n s^n, is
# what the driving noise of intensity _INTENSITY feeds into the state.
_DRIFT: dict[float, list[list[list[float]]]] = {
    0.5: [[[1.0]]],
    1.5: [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [-1.0, -1.0]]],
    2.5: [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [-1.0, -3.0, -2.0]],
        [[0.5, 1.0, 0.5], [-0.5, -1.0, -0.5], [0.5, 1.0, 0.5]],
    ],
}
_INTENSITY: dict[float, float] = {0.5: 2.0, 1.5: 4.0, 2.5: 16.0 / 3.0}
_STATIONARY: dict[float, list[list[float]]] = {
    0.5: [[1.0]],
    1.5: [[1.0, 0.0], [0.0, 1.0]],
    2.5: [[1.0, 0.0, -1.0 / 3.0], [0.0, 1.0 / 3.0, 0.0], [-1.0 / 3.0, 0.0, 1.0]],
}


class Transition(NamedTuple):
    """Steps of a linear-Gaussian chain: ``x_j | x_{j-1} ~ N(matrix_j x_{j-1}, noise_j)``.

    Attributes
    ----------
    matrix : Tensor, shape (..., D, D)
        The paper's ``A``.
    noise : Tensor, shape (..., D, D)
        The paper's ``Q``, symmetric, positive semi-definite; zero for a step of length zero.
    """

    matrix: Tensor
    noise: Tensor


def state_dim(nu: float) -> int:
    """Number of state entries ``d = nu + 1/2`` of one component.

    >>> state_dim(1.5)
    2
    """
    if nu not in _DRIFT:
        raise ValueError(f"nu: expected 0.5, 1.5 or 2.5, got {nu!r}")
    return len(_STATIONARY[nu])


def stationary_covariance(nu: float, variance: Tensor) -> Tensor:
    """Covariance ``P_inf`` of the scaled state under the prior.

    Parameters
    ----------
    nu : {0.5, 1.5, 2.5}
        Smoothness.
    variance : Tensor, shape (R,)
        Prior variance of each component.

    Returns
    -------
    Tensor, shape (R * d, R * d)
        Block diagonal.
    """
    return block_diagonal(stationary_blocks(nu, variance))


def stationary_blocks(nu: float, variance: Tensor) -> Tensor:
    """The blocks of `stationary_covariance`, shape (R, d, d)."""
    return variance[:, None, None] * _constants(nu, variance.dtype, variance.device).stationary


def transition(nu: float, gaps: Tensor, lengthscale: Tensor, variance: Tensor) -> Transition:
    r"""Exact discretisation of the process over steps of given length.

    ``A = expm(F s)`` in closed form. ``Q = q * integral_0^s expm(F u) L L' expm(F u)' du`` is a sum of incomplete gamma
    functions, every term of which is exact for tiny steps too, where ``P_inf - A P_inf A'`` loses all digits.

    Parameters
    ----------
    nu : {0.5, 1.5, 2.5}
        Smoothness.
    gaps : Tensor, shape (n,)
        Step lengths, ``>= 0``, in the coordinate's unit.
    lengthscale, variance : Tensor, shape (R,)
        Hyperparameters of each component.

    Returns
    -------
    Transition
        Both tensors of shape (n, R * d, R * d), differentiable in the hyperparameters.
    """
    matrix, noise = matern_blocks(nu, gaps, lengthscale, variance)
    return Transition(block_diagonal(matrix), block_diagonal(noise))


def matern_blocks(nu: float, gaps: Tensor, lengthscale: Tensor, variance: Tensor) -> Transition:
    """The blocks of `transition`, both tensors of shape (n, R, d, d)."""
    d = state_dim(nu)
    s = math.sqrt(2 * nu) * gaps[:, None] / lengthscale  # (n, R)
    known = _constants(nu, s.dtype, s.device)
    decay = torch.exp(-s)
    powers = torch.stack([decay * s**n for n in range(d)], dim=-1)  # (n, R, d)
    matrix = torch.einsum("nrp,pij->nrij", powers, known.drift)
    twice = (2 * s[..., None]).clamp(min=torch.finfo(s.dtype).tiny)  # the gradient of gammainc is NaN at 0
    incomplete = torch.special.gammainc(known.orders, twice).masked_fill(s[..., None] <= 0, 0.0)  # (n, R, 2d-1)
    noise = torch.einsum("nrp,pij->nrij", incomplete, known.feed) * variance[:, None, None]
    return Transition(matrix, noise)


class _Constants(NamedTuple):
    """What the matrices of one smoothness are made of.

    Attributes
    ----------
    stationary : Tensor, shape (d, d)
    drift : Tensor, shape (d, d, d)
        Power of ``s``, row, column.
    orders : Tensor, shape (2d-1,)
        Of the incomplete gamma functions in the noise: one more than the power of ``s``.
    feed : Tensor, shape (2d-1, d, d)
        What each of these functions feeds into the noise.
    """

    stationary: Tensor
    drift: Tensor
    orders: Tensor
    feed: Tensor


@cache  # so that a GPU gets them once: a copy from the CPU waits, and no graph can hold it
@torch.inference_mode(False)
def _constants(nu: float, dtype: torch.dtype, device: torch.device) -> _Constants:
    d = state_dim(nu)
    drift = torch.tensor(_DRIFT[nu], dtype=torch.float64)
    last = drift[:, :, -1]  # (power, row) of the last column
    square = torch.zeros(2 * d - 1, d, d, dtype=torch.float64)
    for m in range(d):
        for n in range(d):
            square[m + n] += torch.outer(last[m], last[n])
    # integral_0^s u^p exp(-2u) du = p! / 2^(p+1) * P(p+1, 2s), P the regularised lower incomplete gamma function
    orders = torch.arange(1, 2 * d, dtype=torch.float64)
    scale = _INTENSITY[nu] * torch.exp(torch.lgamma(orders) - orders * math.log(2.0))
    stationary = torch.tensor(_STATIONARY[nu], dtype=torch.float64)
    return _Constants(*(x.to(device, dtype) for x in (stationary, drift, orders, scale[:, None, None] * square)))


def matern_covariance(nu: float, distance: Tensor, lengthscale: Tensor | float, variance: Tensor | float) -> Tensor:
    """Matérn covariance in closed form, for dense checks and for plots of the prior.

    Parameters
    ----------
    nu : {0.5, 1.5, 2.5}
        Smoothness.
    distance : Tensor, any shape
        Differences of coordinates.
    lengthscale, variance : Tensor or float
        Hyperparameters, broadcast against `distance`.

    Returns
    -------
    Tensor
        Covariances, of the broadcast shape.

    Examples
    --------
    >>> matern_covariance(0.5, torch.tensor([0.0, 1.0]), 1.0, 2.0)
    tensor([2.0000, 0.7358])
    """
    d = state_dim(nu)
    s = math.sqrt(2 * nu) * distance.abs() / lengthscale
    polynomial = {1: torch.ones_like(s), 2: 1 + s, 3: 1 + s + s**2 / 3}[d]
    return variance * polynomial * torch.exp(-s)


def block_diagonal(blocks: Tensor) -> Tensor:
    """(..., R, d, d) blocks to (..., R d, R d)."""
    *batch, count, d, _ = blocks.shape
    full = blocks.new_zeros(*batch, count, d, count, d)
    full.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
    return full.reshape(*batch, count * d, count * d)
