"""Predictive distributions of new values: all kinds, and mixtures of normals.

The mathematics that they share is in `predictive_base`.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from probtensor.discrete_predictive import BernoulliPredictive, CountMixture
from probtensor.predictive_base import (
    Array,
    Predictive,
    as_array,
    chunks,
    draw_components,
    finite,
    matrix,
    probabilities,
)

__all__ = ["BernoulliPredictive", "CountMixture", "NormalMixture", "Predictive"]


class NormalMixture(Predictive):
    """Mixtures of normals of one location: symmetric, with tails as heavy as the scales make them.

    A scale of 0 is a point mass: `cdf` jumps at the location, where `log_prob` is infinite.

    Parameters
    ----------
    location : array_like, shape (n,)
    scales : array_like, shape (n, M)
        Standard deviations of the components, not negative.
    weights : array_like, shape (M,) or (n, M)
        Their probabilities.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or weights are negative or do not sum to one.

    Examples
    --------
    >>> mixture = NormalMixture([10.0], [[1.0, 5.0]], [0.9, 0.1])
    >>> mixture.std.round(3), mixture.quantile([0.025, 0.975]).round(2)
    (array([1.844]), array([[ 6.58, 13.42]]))
    """

    def __init__(self, location: npt.ArrayLike, scales: npt.ArrayLike, weights: npt.ArrayLike) -> None:
        self.location = finite("location", location, 1)
        self.scales = matrix("scales", scales, len(self.location))
        self.weights = probabilities(weights, self.scales)

    @property
    def mean(self) -> Array:
        """The locations, shape (n,)."""
        return self.location

    @property
    def std(self) -> Array:
        """Standard deviations, shape (n,)."""
        return as_array(np.sqrt((self.weights * self.scales**2).sum(axis=1)))

    def affine(self, scale: float, shift: float) -> "NormalMixture":
        """The distributions of ``scale * y + shift``."""
        return NormalMixture(scale * self.location + shift, abs(scale) * self.scales, self.weights)

    def cdf(self, y: npt.ArrayLike) -> Array:
        """Probability of a value up to y, (n,)."""
        values, missing = self._values(y)
        z = self._standardised(values - self.location)
        return np.where(missing, np.nan, (self.weights * special.ndtr(z)).sum(axis=1))

    def log_prob(self, y: npt.ArrayLike) -> Array:
        """Log density, (n,); infinite at a point mass."""
        values, missing = self._values(y)
        spread = self.scales > 0
        unit = np.where(spread, self.scales, 1.0)
        with np.errstate(divide="ignore"):
            log_weight = np.log(self.weights * spread)
        log_term = log_weight - np.log(unit) - 0.5 * ((values - self.location)[:, None] / unit) ** 2
        density = special.logsumexp(log_term, axis=1) - 0.5 * math.log(2 * math.pi)
        at_mass = (values == self.location) & np.any(~spread & (self.weights > 0), axis=1)
        return np.where(missing, 0.0, np.where(at_mass, np.inf, density))

    def crps(self, y: npt.ArrayLike) -> Array:
        """The score in closed form, (n,): ``E|Y - y| - E|Y - Y'| / 2`` by sums over components and pairs of them.

        References
        ----------
        Grimit, Gneiting, Berrocal, Johnson (2006), "The continuous ranked probability score for circular variables and
        its application to mesoscale forecast ensemble verification", Quarterly Journal of the Royal Meteorological
        Society 132, for mixtures of normals.
        """
        values, missing = self._values(y)
        d = values - self.location
        z = self._standardised(d)
        density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        apart = (self.weights * (2 * self.scales * density + d[:, None] * (2 * special.ndtr(z) - 1))).sum(axis=1)
        spread = np.empty_like(d)
        for rows in chunks(self._n, self.scales.shape[1] ** 2):
            w, variance = self.weights[rows], self.scales[rows] ** 2
            pairs = np.sqrt(variance[:, :, None] + variance[:, None, :])
            spread[rows] = np.einsum("nij,ni,nj->n", pairs, w, w)
        return np.where(missing, np.nan, apart - spread / math.sqrt(2 * math.pi))

    def sample(self, n_samples: int, generator: np.random.Generator) -> Array:
        """Independent draws, shape (n, n_samples)."""
        scale = np.take_along_axis(self.scales, draw_components(self.weights, n_samples, generator), axis=1)
        return self.location[:, None] + scale * generator.standard_normal(scale.shape)

    def _standardised(self, distance: Array) -> Array:
        """``distance / scale``, (n, M); infinite beside a point mass, and above all of it at the point itself."""
        certain = self.scales == 0
        side = np.where(distance >= 0, np.inf, -np.inf)[:, None]
        return np.where(certain, side, distance[:, None] / np.where(certain, 1.0, self.scales))

    def _quantile(self, p: float) -> Array:
        """By symmetry: how far from the location the upper tail has probability ``min(p, 1 - p)``."""
        q = min(p, 1 - p)
        sign = 1.0 if p > 0.5 else -1.0
        used = (self.scales > 0) & (self.weights > 0)
        beyond = (self.weights * used).sum(axis=1) / 2  # either side of the point mass
        if q == 0:
            return np.where(beyond > 0, sign * np.inf, self.location)
        distance = np.zeros_like(self.location)
        rows = np.flatnonzero(q < beyond)
        scale = np.where(used, self.scales, 0.0)[rows]
        with np.errstate(divide="ignore"):
            log_weight = np.log(self.weights[rows] * used[rows])
        distance[rows] = _tail_root(scale, log_weight, q)
        return self.location + sign * distance


def _tail_root(scale: Array, log_weight: Array, q: float) -> Array:
    """``t > 0`` with ``sum_j w_j Phi(-t / scale_j) = q``: Newton's steps on the logarithm, within a bracket."""
    unit = np.where(scale > 0, scale, 1.0)
    low, high = np.zeros(len(scale)), scale.max(axis=1, initial=0.0) * -special.ndtri(q)
    t = high.copy()
    active = np.arange(len(t))
    for step in range(200):
        s, x = unit[active], t[active]
        z = x[:, None] / s
        log_terms = log_weight[active] + special.log_ndtr(-z)
        log_tail = special.logsumexp(log_terms, axis=1)
        slope = -np.exp(log_weight[active] - 0.5 * z**2 - np.log(s) - log_tail[:, None]).sum(axis=1)
        slope /= math.sqrt(2 * math.pi)
        excess = log_tail - math.log(q)
        low[active], high[active] = np.where(excess > 0, x, low[active]), np.where(excess > 0, high[active], x)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            new = x - excess / slope
        # Newton's steps are few where they work at all; else halves, in scale where that is known.
        a, b = low[active], high[active]
        middle = np.where(a > 0, np.sqrt(a) * np.sqrt(b), b / 2)
        new = np.where((new >= a) & (new <= b) & (step < 30), new, middle)
        t[active] = new
        active = active[(np.abs(new - x) > 1e-13 * new) & (b - a > 1e-13 * b)]
        if not len(active):
            break
    return as_array(t)
