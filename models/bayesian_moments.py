"""Moments of entries whose factors are independent: exact, for CP and for Tucker.

An entry is ``f = Σ_a G_a Π_k u_k,a_k``, a sum over components (CP: all ``a_k`` equal) or over the cells of a core
(Tucker). All ``u`` and ``G`` are independent, with means ``m``, ``M`` and variances ``v``, ``V``. Then

    CP:      E f = Σ_r M_r Π_k m_kr,   Var f = Σ_r ((M_r² + V_r) Π_k (m_kr² + v_kr) - M_r² Π_k m_kr²);
    Tucker:  E f = M ×_1 m_1 … ×_K m_K,   E f² = |M ×_1 A_1 … ×_K A_K|² + V ×_1 (m_1² + v_1) …,

``A_k`` having the row ``m_k`` above the diagonal matrix of ``√v_k``: what a factor adds to the second moment is a
square for its mean and one for each of its deviations. So a Tucker entry costs ``Π_k (1 + R_k)`` numbers, and not the
square of the core.

Shapes: factors (n, R_k), one row an entry; a core (R,) for CP, (R_1, …, R_K) for Tucker.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cp_moments", "tucker_moments", "tucker_values"]


def cp_moments(
    means: Sequence[Tensor], variances: Sequence[Tensor], weight: Tensor, weight_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of CP entries.

    Parameters
    ----------
    means, variances : sequence of Tensor, shape (n, R)
        Of the factors, one a mode.
    weight, weight_variance : Tensor, shape (R,)
        Of the components' weights.

    Returns
    -------
    mean, variance : Tensor, shape (n,)

    Examples
    --------
    >>> one = torch.ones(1, 1)
    >>> cp_moments([one, 2 * one], [0 * one, one], torch.ones(1), torch.zeros(1))
    (tensor([2.]), tensor([1.]))
    """
    product, second = means[0], means[0] ** 2 + variances[0]
    for mean, variance in zip(means[1:], variances[1:], strict=True):
        product, second = product * mean, second * (mean**2 + variance)
    return product @ weight, second @ (weight**2 + weight_variance) - product**2 @ weight**2


def tucker_moments(
    means: Sequence[Tensor], variances: Sequence[Tensor], core: Tensor, core_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of Tucker entries.

    Parameters
    ----------
    means, variances : sequence of Tensor, shape (n, R_k)
        Of the factors, one a mode.
    core, core_variance : Tensor, shape (R_1, …, R_K)
        Of the core.

    Returns
    -------
    mean, variance : Tensor, shape (n,)

    Examples
    --------
    >>> one = torch.ones(1, 1)
    >>> tucker_moments([one, 2 * one], [0 * one, one], torch.ones(1, 1), torch.zeros(1, 1))
    (tensor([2.]), tensor([1.]))
    """
    n, K = len(means[0]), len(means)
    parts = core.expand(n, 1, *core.shape)  # (n, B, R_k, …, R_K): B squares so far
    for k, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        ahead = (1,) * (K - k - 1)
        first = (parts * mean.reshape(n, 1, -1, *ahead)).sum(2)
        deviations = parts * variance.clamp(min=1e-30).sqrt().reshape(n, 1, -1, *ahead)
        parts = torch.cat([first, deviations.flatten(1, 2)], dim=1)
    seconds = [mean**2 + variance for mean, variance in zip(means, variances, strict=True)]
    of_core = tucker_values(seconds, core_variance)
    return parts[:, 0], parts[:, 1:].square().sum(1) + of_core


def tucker_values(factors: Sequence[Tensor], core: Tensor) -> Tensor:
    """Entries (n,) of a Tucker tensor with factors (n, R_k) and a core (R_1, …, R_K)."""
    found = factors[0] @ core.reshape(len(core), -1)  # (n, R_2 … R_K)
    for factor in factors[1:]:
        found = torch.einsum("nrm,nr->nm", found.reshape(len(factor), factor.shape[1], -1), factor)
    return found.squeeze(1)
