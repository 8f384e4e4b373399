"""Likelihoods of observed values given noise-free entries.

Missing values are replaced *before* a density is computed and masked after it: a NaN that is only masked afterwards
still makes the gradient NaN.
"""

import math

import torch
from torch import Tensor

__all__ = ["batch_total", "gaussian_log_prob"]


def gaussian_log_prob(y: Tensor, mean: Tensor, variance: Tensor, observed: Tensor | None = None) -> Tensor:
    """Log density of a normal distribution; a value that is not observed gives 0 and no gradient.

    Parameters
    ----------
    y : Tensor, shape (n,)
        Values; what stands where `observed` is False, NaN included, does not matter.
    mean, variance : Tensor, shape (n,) or broadcastable
        Of the normal distribution.
    observed : Tensor, shape (n,), bool, optional
        Default: where `y` is not NaN.

    Returns
    -------
    Tensor, shape (n,)

    Examples
    --------
    >>> gaussian_log_prob(torch.tensor([0.0, torch.nan]), torch.zeros(2), torch.ones(2))
    tensor([-0.9189,  0.0000])
    """
    seen = ~y.isnan() if observed is None else observed
    residual = torch.where(seen, y, mean.detach()) - mean
    density = -0.5 * (residual**2 / variance + variance.log() + math.log(2 * math.pi))
    return torch.where(seen, density, 0.0)


def batch_total(log_prob: Tensor, n_total: int) -> Tensor:
    """Unbiased estimate of a sum over all observations from one batch of them, whatever the batch's size.

    Parameters
    ----------
    log_prob : Tensor, shape (batch,)
        Terms of the observations in the batch.
    n_total : int
        Number of all observations.

    Returns
    -------
    Tensor, scalar

    Raises
    ------
    ValueError
        If the batch is empty or larger than `n_total`.

    Examples
    --------
    >>> batch_total(torch.full((20,), -1.0), 100)
    tensor(-100.)
    """
    size = log_prob.shape[0]
    if not 0 < size <= n_total:
        raise ValueError(f"log_prob: expected between 1 and n_total={n_total} terms, got {size}")
    return log_prob.sum() * (n_total / size)
