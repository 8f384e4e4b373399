"""Slow, dense and obviously right: moments of entries, probabilities of ordered levels, rows with features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def entry_moments(
    means: Sequence[Tensor], variances: Sequence[Tensor], core: Tensor, core_variance: Tensor
) -> tuple[float, float]:
    """Mean and variance of ``Σ_a G_a Π_k u_k,a_k`` for one entry: all pairs of cells of the core."""
    cells = list(itertools.product(*(range(n) for n in core.shape)))
    mean = sum(float(core[a]) * math.prod(float(m[i]) for m, i in zip(means, a, strict=True)) for a in cells)
    second = 0.0
    for a, b in itertools.product(cells, cells):
        term = float(core[a] * core[b]) + (float(core_variance[a]) if a == b else 0.0)
        for m, v, i, j in zip(means, variances, a, b, strict=True):
            term *= float(m[i] * m[j]) + (float(v[i]) if i == j else 0.0)
        second += term
    return mean, second - mean**2


def level_probabilities(cuts: Sequence[float], f: float) -> list[float]:
    """Of each level, by the definition: differences of the logistic distribution function."""
    below = [0.0, *(1 / (1 + math.exp(f - cut)) for cut in cuts), 1.0]
    return [b - a for a, b in itertools.pairwise(below)]


def feature_rows_prior(features: Tensor, log_hyperparameters: Tensor) -> Tensor:
    """Covariance (n, R, n, R) of ``u_i = m + W' x_i + e_i`` by the definition: a number for each pair of entries."""
    variance, of_mean, of_features = log_hyperparameters.exp()
    n, rank = len(features), len(variance)
    prior = torch.zeros(n, rank, n, rank, dtype=features.dtype)
    for i, j, r in itertools.product(range(n), range(n), range(rank)):
        alike = sum(float(a) * float(b) for a, b in zip(features[i], features[j], strict=True))
        prior[i, r, j, r] = of_mean[r] + of_features[r] * alike + (variance[r] if i == j else 0.0)
    return prior
