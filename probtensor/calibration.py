"""What predictions missed by on rows held out, and predictive distributions that take it into account.

A factorised posterior is too sure of itself: it leaves out how the modes' uncertainties hang together. The cure is
empirical. Rows held out from a fit give residuals ``r_n`` beside the model's own variances, ``v_n`` of the noise-free
entry and ``s_n`` of the noise. The residuals are taken as draws of ``N(0, c_j^2 (a v_n + s_n))`` with probability
``p_j`` (where ``v_n`` is large, `inflated` has less of the inflation ``a``): a scale mixture of normals, any symmetric
bell with tails as heavy, or a peak as sharp, as the residuals have. The inflation ``a``, the scales ``c_j`` and their
probabilities are those of highest likelihood; for fixed scales that is a concave problem, which EM solves.

References
----------
Kiefer and Wolfowitz (1956), maximum likelihood of a mixing distribution. Kuleshov, Fenner, Ermon (2018), "Accurate
Uncertainties for Deep Learning Using Calibrated Regression", ICML, for calibration on held-out rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probtensor.columns import FloatArray

__all__ = ["MIN_RESIDUALS", "ScaleMixture", "fit_scale_mixture", "inflated", "with_tail"]

MIN_RESIDUALS = 200  # fewer say too little of the tails
INFLATIONS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
# Scales a factor sqrt(2) apart: the smallest far below any residual that is no repetition, the largest far above all.
SCALES = 2.0 ** np.arange(-14, 7.5, 0.5)
EM_STEPS = 500
NEGLIGIBLE = 1e-6  # probability below which a scale is dropped
TAIL = 20  # scales of what was never seen, a factor sqrt(2) apart


class ScaleMixture(NamedTuple):
    """Residuals are ``N(0, scale_j^2 (v + noise variance))`` with probability ``weight_j``; for ``v`` see `inflated`.

    Attributes
    ----------
    inflation : float
        Factor on small variances of the noise-free entry.
    scales, weights : Tensor, shape (M,)
        On the CPU; the weights sum to one.
    """

    inflation: float
    scales: Tensor
    weights: Tensor


def inflated(latent_variance: FloatArray, inflation: FloatArray | float) -> FloatArray:
    """Variances (n,) of noise-free standardised entries, inflated the less the nearer they are to 1.

    An inflation ``a`` above 1 gives ``a v / (1 + (a - 1) v)``, and ``v`` itself where that is less: factorised
    posteriors are too sure of what many rows determine, where ``v`` is small; in a gap, ``v`` is the prior's, which has
    no such fault. One below 1 gives ``a v``.

    Examples
    --------
    >>> inflated(np.array([1e-3, 0.2, 1.0, 1.5]), 4.0).round(4).tolist()
    [0.004, 0.5, 1.0, 1.5]
    """
    v, a = latent_variance, np.asarray(inflation)
    grown = a * v / (1 + (a - 1).clip(min=0) * v)
    return np.where(a >= 1, np.maximum(grown, v), grown)


def fit_scale_mixture(residual: Tensor, latent_variance: Tensor, noise_variance: Tensor) -> ScaleMixture:
    """The scale mixture of highest likelihood.

    Parameters
    ----------
    residual : Tensor, shape (n,)
        Held-out standardised values less their predictions.
    latent_variance, noise_variance : Tensor, shape (n,)
        The model's own variances of the noise-free entries and of the noise, positive in sum.

    Returns
    -------
    ScaleMixture

    Examples
    --------
    >>> residual = 3 * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> mixture = fit_scale_mixture(residual, torch.zeros(4000), torch.ones(4000))
    >>> bool(2.8 < (mixture.weights * mixture.scales**2).sum() ** 0.5 < 3.2)
    True
    """
    best: tuple[float, ScaleMixture] | None = None
    r, v, s = (x.detach().double().cpu().numpy() for x in (residual, latent_variance, noise_variance))
    for inflation in INFLATIONS:
        unit = np.sqrt(inflated(v, inflation) + s)
        if not np.all(unit > 0):
            continue
        log_density = -0.5 * (r[:, None] / (unit[:, None] * SCALES)) ** 2 - np.log(SCALES * np.sqrt(2 * np.pi))
        top = log_density.max(axis=1, keepdims=True)
        density = np.exp(log_density - top)
        weights = np.full(len(SCALES), 1 / len(SCALES))
        for _ in range(EM_STEPS):
            weights = weights * (density / (density @ weights)[:, None]).mean(axis=0)
        likelihood = float(np.sum(np.log(density @ weights) + top[:, 0] - np.log(unit)))
        if best is None or likelihood > best[0]:
            kept = weights > NEGLIGIBLE
            weights = weights[kept] / weights[kept].sum()
            best = likelihood, ScaleMixture(inflation, torch.from_numpy(SCALES[kept]), torch.from_numpy(weights))
    assert best is not None  # the variances are positive in sum
    return best[1]


def with_tail(mixture: ScaleMixture, n_residuals: int) -> ScaleMixture:
    """The mixture with larger scales than any of the residuals had, of a total probability ``1 / (n_residuals + 1)``.

    The next residual may be the first of its kind (the rule of succession). Likelihood gives such scales no weight, and
    one row would then cost more than all others: the log density of a normal falls with the square. Here density falls
    with the cube of the residual, up to a thousand times the largest scale.

    Examples
    --------
    >>> narrow = ScaleMixture(1.0, torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    >>> wide = with_tail(narrow, 99)
    >>> round(float(wide.weights[0]), 2), round(float(wide.scales[-1]))
    (0.99, 1024)
    """
    step = torch.arange(1, TAIL + 1, dtype=torch.float64)
    share = 2.0**-step
    scales = torch.cat([mixture.scales, mixture.scales.max() * 2 ** (step / 2)])
    weights = torch.cat([mixture.weights * n_residuals, share / share.sum()]) / (n_residuals + 1)
    return ScaleMixture(mixture.inflation, scales, weights)
