"""Slow, dense and obviously right: moments of entries with independent factors, probabilities of ordered levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

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
