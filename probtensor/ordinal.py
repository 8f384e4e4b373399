"""Ordered levels, such as ratings: a likelihood by cut points on the line, and predictive distributions over levels.

References
----------
McCullagh (1980), "Regression Models for Ordinal Data", Journal of the Royal Statistical Society B 42, equation 2.4: the
proportional odds model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from probtensor.discrete_likelihoods import expect, expect_logistic
from probtensor.likelihood_base import Entries, Likelihood, refuse, to_numpy
from probtensor.predictive_base import Array, Predictive, as_array, draw_components, finite, matrix, probabilities

__all__ = ["Ordinal", "OrdinalPredictive"]

GAPS = 1e-3, 1e2  # least and greatest distance of two cut points
FARTHEST = 30.0  # of the lowest cut point
RARE = 0.5  # rows that each level is taken to have more, so that a level without rows has a place


@dataclass(frozen=True)
class Ordinal(Likelihood):
    """Levels in their order: ``P(y <= level_l | f) = 1 / (1 + exp(f - c_l))`` with cut points ``c_1 < c_2 < …``.

    Between two cut points the probability is ``s(c_l - f) s(f - c_(l-1)) (1 - exp(c_(l-1) - c_l))``, ``s`` the logistic
    function, so that its logarithm is concave in ``f``. Expectations by quadrature. `Entries.count` multiplies a row's
    log-likelihood. The learned parameters are the odds of the lowest level at ``f = 0``, whose logarithm is ``c_1``,
    and the distances of the other cut points.

    Parameters
    ----------
    levels : sequence of float
        At least two, rising: the values that y can have.
    counts : sequence of float, optional
        Rows of each level, where the cut points start. Default: as many of each.

    Raises
    ------
    ValueError
        If levels do not rise, or `counts` has not a number of at least 0 for each.

    Examples
    --------
    >>> row = Entries(*torch.tensor([[1.0], [1.0], [2.0], [0.0], [0.0]], dtype=torch.float64))
    >>> stars, f = Ordinal((1.0, 2.0, 3.0)), torch.zeros(1, dtype=torch.float64)
    >>> cuts = stars.start(0.0, f)  # thirds of the rows
    >>> stars.expected_log_prob(cuts, row, f, f).exp()
    tensor([0.3333], dtype=torch.float64)
    """

    levels: tuple[float, ...]
    counts: tuple[float, ...] | None = None

    name: ClassVar[str] = "ordinal"
    location_scale: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    cold: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        levels = tuple(float(level) for level in self.levels)
        if len(levels) < 2 or not all(math.isfinite(x) for x in levels) or not np.all(np.diff(levels) > 0):
            raise ValueError(f"levels: expected at least two finite numbers, rising, got {self.levels!r}")
        object.__setattr__(self, "levels", levels)
        if self.counts is not None:
            counts = tuple(float(count) for count in self.counts)
            if len(counts) != len(levels) or not all(0 <= count < math.inf for count in counts):
                raise ValueError(f"counts: expected {len(levels)} numbers of at least 0, got {self.counts!r}")
            object.__setattr__(self, "counts", counts)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The odds of the lowest level, and the distances of the cut points."""
        return ("lowest_odds", *(f"gap_{k}" for k in range(1, len(self.levels) - 1)))

    def start(self, share: float, like: Tensor) -> Tensor:
        """Cut points at which ``f = 0`` has the levels' frequencies; `share` is not looked at."""
        counts = np.ones(len(self.levels)) if self.counts is None else np.array(self.counts) + RARE
        below = counts.cumsum()[:-1] / counts.sum()
        cuts = np.log(below / (1 - below))
        found = like.new_tensor([cuts[0], *np.log(np.diff(cuts))])
        return torch.clamp(found, *self.bounds(like))

    def bounds(self, like: Tensor) -> Tensor:
        """(2, P)."""
        pairs = [(-FARTHEST, FARTHEST)] + [(math.log(GAPS[0]), math.log(GAPS[1]))] * (len(self.levels) - 2)
        return like.new_tensor(pairs).T

    def check(self, y: Tensor) -> None:
        """Values are levels."""
        refuse(~((y[:, None] == y.new_tensor(self.levels)).any(1) | y.isnan()), y, f"one of {list(self.levels)}")

    def offset(self, mean: float) -> float:
        """Always 0: the cut points have the place."""
        return 0.0

    def cuts(self, log_parameters: Tensor) -> Tensor:
        """Cut points (L - 1,), rising, from the parameters' logarithms."""
        return torch.cat([log_parameters[:1], log_parameters[1:].exp()]).cumsum(0)

    def expected_log_prob(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> Tensor:
        """``E log P(y | f)``, (n,)."""
        upper, lower, width = self._ends(log_parameters, entries.value)
        above = torch.where(upper.isinf(), 0.0, expect(logsigmoid, _finite(upper) - mean, variance))
        below = torch.where(lower.isinf(), 0.0, expect(logsigmoid, mean - _finite(lower), variance))
        return entries.count * (above + below + width)

    def sites(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """From the derivatives ``E s(c_(l-1) - f) - E s(f - c_l)`` and ``-E s'`` of both."""
        upper, lower, _ = self._ends(log_parameters, entries.value)
        slope, precision = torch.zeros_like(mean), torch.zeros_like(mean)
        for end, sign in ((upper, -1.0), (lower, 1.0)):
            x = sign * (_finite(end) - mean)
            share, bell = (torch.where(end.isinf(), 0.0, each) for each in expect_logistic(x, variance))
            slope, precision = slope + sign * share, precision + bell
        precision = entries.count * precision
        return precision, entries.count * slope + precision * mean

    def predictive(self, log_parameters: Tensor, mean: Tensor, variance: Tensor) -> "OrdinalPredictive":
        """Probabilities of the levels, ``f`` integrated out."""
        cuts = self.cuts(log_parameters)
        below = torch.stack([expect(torch.sigmoid, cut - mean, variance) for cut in cuts], dim=1)
        ends = torch.cat([torch.zeros_like(below[:, :1]), below, torch.ones_like(below[:, :1])], dim=1)
        share = to_numpy(ends.diff(dim=1)).clip(min=0)
        return OrdinalPredictive(self.levels, share / share.sum(axis=1, keepdims=True))

    def _ends(self, log_parameters: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Upper and lower cut point of each value, infinite at the ends, and the logarithm of what they cut off."""
        cuts = self.cuts(log_parameters)
        infinite = cuts.new_full((1,), torch.inf)
        ends = torch.cat([-infinite, cuts, infinite])
        inner = torch.log(-torch.expm1(-log_parameters[1:].exp()))
        width = torch.cat([inner.new_zeros(1), inner, inner.new_zeros(1)])
        level = torch.searchsorted(y.new_tensor(self.levels), y.contiguous())
        level = level.clamp(max=len(self.levels) - 1)
        return ends[level + 1], ends[level], width[level]


class OrdinalPredictive(Predictive):
    """Distributions over ordered levels.

    Parameters
    ----------
    levels : sequence of float, length L
        Rising.
    weights : array_like, shape (n, L)
        Their probabilities.

    Raises
    ------
    ValueError
        If levels do not rise, or weights are negative or do not sum to one.

    Examples
    --------
    >>> stars = OrdinalPredictive([1, 2, 3], [[0.25, 0.5, 0.25]])
    >>> stars.mean, stars.quantile([0.2, 0.5, 0.9]), stars.log_prob(2).round(4)
    (array([2.]), array([[1., 2., 3.]]), array([-0.6931]))
    """

    def __init__(self, levels: Sequence[float], weights: npt.ArrayLike) -> None:
        self.levels = finite("levels", np.asarray(levels, dtype=np.float64), 1)
        if not np.all(np.diff(self.levels) > 0):
            raise ValueError(f"levels: expected rising numbers, got {levels!r}")
        given = matrix("weights", weights)
        if given.shape[1] != len(self.levels):
            raise ValueError(f"weights: expected shape (n, {len(self.levels)}), got {given.shape}")
        self.weights = probabilities(given, given)

    @property
    def mean(self) -> Array:
        """Means of the levels, shape (n,)."""
        return as_array(self.weights @ self.levels)

    @property
    def std(self) -> Array:
        """Standard deviations, shape (n,)."""
        apart = self.levels[None] - self.mean[:, None]
        return as_array(np.sqrt((self.weights * apart**2).sum(axis=1)))

    def cdf(self, y: npt.ArrayLike) -> Array:
        """Probability of a level up to y, (n,)."""
        values, missing = self._values(y)
        return np.where(missing, np.nan, (self.weights * (self.levels <= values[:, None])).sum(axis=1))

    def log_prob(self, y: npt.ArrayLike) -> Array:
        """Log probability, (n,); minus infinity for what is no level."""
        values, missing = self._values(y)
        with np.errstate(divide="ignore"):
            found = np.log((self.weights * (self.levels == values[:, None])).sum(axis=1))
        return np.where(missing, 0.0, found)

    def crps(self, y: npt.ArrayLike) -> Array:
        """The ranked probability score, in the unit of the levels, (n,)."""
        values, missing = self._values(y)
        apart = (self.weights * np.abs(self.levels - values[:, None])).sum(axis=1)
        pairs = np.abs(self.levels[:, None] - self.levels)
        return np.where(missing, np.nan, apart - 0.5 * ((self.weights @ pairs) * self.weights).sum(axis=1))

    def sample(self, n_samples: int, generator: np.random.Generator) -> Array:
        """Independent draws, shape (n, n_samples)."""
        return self.levels[draw_components(self.weights, n_samples, generator)]

    def _quantile(self, p: float) -> Array:
        total = self.weights.cumsum(axis=1)
        return as_array(self.levels[(total < p - 1e-12).sum(axis=1).clip(max=len(self.levels) - 1)])


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0.0, x)
