"""Independent non-negative numbers in tables: gamma distributions, and normal ones cut off at zero.

A table has a row a label and a column a component. Gamma distributions are the posterior of factors of Poisson rates,
rectified normals ``exp(shift x - precision x^2 / 2)``, ``x >= 0``, that of factors of real values.

References
----------
Schmidt, Winther, Hansen (2009), "Bayesian Non-negative Matrix Factorization", ICA, for the rectified normal.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor

from probtensor.gaussian import Gamma
from probtensor.models.bayesian_moments import cp_moments

__all__ = ["RectifiedNormals", "Table", "at", "chunks_of", "moments_at"]

CHUNK = 2**20  # numbers in the largest temporary
FAR = 50.0  # standard deviations below zero from which moments are series: the closed form loses their digits


class RectifiedNormals(NamedTuple):
    """Densities ``~ exp(shift x - precision x^2 / 2)`` for ``x >= 0``; shapes (I, R), the precision above 0.

    Examples
    --------
    >>> half = RectifiedNormals(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
    >>> half.mean.item() ** 2 * math.pi, half.variance.item() + half.mean.item() ** 2  # a half-normal distribution
    (2.0, 1.0)
    """

    shift: Tensor
    precision: Tensor

    @property
    def mean(self) -> Tensor:
        """``E x``, (I, R)."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """``Var x``, (I, R)."""
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        z = self.shift / self.precision.sqrt()
        excess = (-z).clamp(min=FAR)
        near = z.clamp(min=-FAR)
        hazard = (-0.5 * near**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(near)).exp()
        t = excess**-2
        far_mean = (1 - t * (2 - t * (10 - t * (74 - t * 706)))) / excess
        far_variance = t * (1 - t * (6 - t * (50 - t * 518)))
        mean = torch.where(z < -FAR, far_mean, near + hazard)
        variance = torch.where(z < -FAR, far_variance, 1 - hazard * (hazard + near))
        return mean / self.precision.sqrt(), variance / self.precision

    def divergence(self, rate: Tensor) -> Tensor:
        """Kullback-Leibler divergence from exponential distributions of that rate, summed; a scalar."""
        mean, variance = self._moments()
        z = self.shift / self.precision.sqrt()
        log_mass = torch.where(
            z < 0,
            (torch.special.erfcx(-z.clamp(max=0) / math.sqrt(2)) / 2).log(),
            0.5 * z**2 + torch.special.log_ndtr(z.clamp(min=0)),
        )
        log_normalizer = 0.5 * (math.log(2 * math.pi) - self.precision.log()) + log_mass
        energy = (self.shift + rate) * mean - 0.5 * self.precision * (mean**2 + variance)
        return (energy - log_normalizer - rate.log()).sum()

    def draw(self, rng: np.random.Generator) -> Tensor:
        """One draw of every number, (I, R): the inverse of the upper tail's probability."""
        shift, precision = (x.double().cpu().numpy() for x in self)
        z = shift / np.sqrt(precision)
        log_tail = np.log1p(-rng.random(z.shape)) + special.log_ndtr(z)
        drawn = np.maximum(z - special.ndtri_exp(log_tail), 0.0) / np.sqrt(precision)
        return torch.from_numpy(drawn).to(self.shift)


Table = Gamma | RectifiedNormals


def at(tables: Sequence[Tensor], positions: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Rows (n, R) of tables (I_k, R) at positions (n,), one a table."""
    return [table.index_select(0, place) for table, place in zip(tables, positions, strict=True)]


def moments_at(
    means: Sequence[Tensor], variances: Sequence[Tensor], positions: Tensor, weight: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance (n,) of entries at positions (K, n), from moments (I_k, R) and those (R,) of the weights."""
    parts = [
        cp_moments(at(means, positions[:, chunk]), at(variances, positions[:, chunk]), *weight)
        for chunk in chunks_of(positions.shape[1], means[0].shape[1])
    ]
    mean, variance = (torch.cat(x) for x in zip(*parts, strict=True))
    return mean, variance.clamp(min=0)


def chunks_of(n: int, width: int) -> Iterator[slice]:
    """Slices of n rows with at most `CHUNK` numbers in each, at `width` a row; one without rows if n is 0."""
    step = max(CHUNK // width, 1)
    return (slice(first, first + step) for first in range(0, max(n, 1), step))
