"""Predictive distributions of counts and of binary values."""

import math
from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy import special

from probtensor.predictive_base import (
    Array,
    Predictive,
    as_array,
    chunks,
    draw_components,
    finite,
    matrix,
    normal_nodes,
    probabilities,
)

__all__ = ["LOG_MAX_COUNT", "BernoulliPredictive", "CountMixture"]

LOG_MAX_COUNT = 62 * math.log(2)  # counts are 64-bit integers
SPREAD = 0.2  # share of the standard deviation of log-normal means that a component covers
STEP = 0.3  # the components' distance in the same unit: their sum is smooth, but for 2 exp(-2 (pi SPREAD / STEP)^2)
DENSE = 2048  # counts that a CRPS sums one by one
NEGLIGIBLE = 1e-7  # tail probability that a CRPS, which has its square, leaves out
ALMOST_POISSON = 1e-7  # excess of the variance of a negative binomial, relative, that is taken for none


class CountMixture(Predictive):
    """Mixtures of negative binomials, and of Poisson distributions where the dispersion is 0.

    Parameters
    ----------
    rates : array_like, shape (n, M)
        Means of the components.
    weights : array_like, shape (M,) or (n, M)
        Their probabilities.
    dispersion : array_like, shape () or (n,), default 0
        Of all components: their variance is ``rate + dispersion * rate^2``.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is negative or not finite, or weights do not sum to one.

    Examples
    --------
    >>> counts = CountMixture([[2.0]], [1.0])
    >>> counts.quantile([0.05, 0.5, 0.95]), counts.cdf(0).round(4)
    (array([[0., 2., 5.]]), array([0.1353]))
    """

    def __init__(self, rates: npt.ArrayLike, weights: npt.ArrayLike, dispersion: npt.ArrayLike = 0.0) -> None:
        self.rates = np.maximum(matrix("rates", rates), 1e-300)  # a logarithm follows
        self.weights = probabilities(weights, self.rates)
        given = finite("dispersion", dispersion, np.ndim(dispersion))
        if given.shape not in ((), (len(self.rates),)) or np.any(given < 0):
            raise ValueError(f"dispersion: expected numbers >= 0, one or {len(self.rates)}, got {dispersion!r}")
        self.dispersion = np.broadcast_to(given, (len(self.rates),))

    @classmethod
    def log_normal(cls, mean: Array, variance: Array, dispersion: float = 0.0) -> Self:
        """Counts of mean ``exp(f)``, ``f ~ N(mean, variance)``, and of that dispersion given f.

        Components are 0.3 standard deviations of f apart. Where their own scatter would leave gaps between them, as
        between large Poisson counts, each stands for 0.2 standard deviations, of which a gamma distribution of the
        same first two moments makes a negative binomial; the error of the cdf is then below 0.002 for a standard
        deviation of f up to 1.

        Parameters
        ----------
        mean, variance : ndarray, shape (n,)
        dispersion : float

        References
        ----------
        Aitchison, Ho (1989), "The multivariate Poisson-log normal distribution", Biometrika 76.

        Examples
        --------
        >>> counts = CountMixture.log_normal(np.array([3.0]), np.array([0.5]))
        >>> bool(np.isclose(counts.mean[0], np.exp(3.25)))
        True
        """
        # Joint draws of f come without variance, and there may be many.
        z, weights = normal_nodes(STEP, 25 * STEP if variance.any() else 0.0)
        within = np.minimum(SPREAD**2 * variance, 50.0)  # more would overflow
        largest = np.clip(mean + 4 * np.sqrt(variance), -LOG_MAX_COUNT, LOG_MAX_COUNT)
        within = np.where(dispersion + np.exp(-largest) < within, within, 0.0)
        centre = mean[:, None] + np.sqrt(variance - within)[:, None] * z + within[:, None] / 2
        rates = np.exp(np.minimum(centre, LOG_MAX_COUNT))
        return cls(rates, weights, dispersion + (1 + dispersion) * np.expm1(within))

    @property
    def mean(self) -> Array:
        """Means, shape (n,)."""
        return as_array((self.weights * self.rates).sum(axis=1))

    @property
    def std(self) -> Array:
        """Standard deviations, shape (n,)."""
        mean, w, r = self.mean, self.weights, self.rates
        between = (w * (r - mean[:, None]) ** 2).sum(axis=1)
        return as_array(np.sqrt(mean + between + self.dispersion * (w * r**2).sum(axis=1)))

    def cdf(self, y: npt.ArrayLike) -> Array:
        """Probability of a count up to y, (n,)."""
        values, missing = self._values(y)
        return np.where(missing, np.nan, self._cdf(np.floor(values)))

    def log_prob(self, y: npt.ArrayLike) -> Array:
        """Log probability of y, (n,); -inf where y is no count."""
        values, missing = self._values(y)
        possible = (values >= 0) & (values == np.floor(values)) & np.isfinite(values)
        log_terms = self._log_terms(np.where(possible, values, 0.0)[:, None], slice(None))[:, 0]
        return np.where(missing, 0.0, np.where(possible, special.logsumexp(log_terms, axis=1), -np.inf))

    def crps(self, y: npt.ArrayLike) -> Array:
        """The score, (n,).

        A sum over counts until the tail has probability 1e-7. From 2048 on, where the sum is of a smooth function, by
        Simpson's rule (relative error below 1e-4).
        """
        values, missing = self._values(y)
        top = self._quantile(1 - NEGLIGIBLE) + 1
        score = np.maximum(values - top, 0) + np.maximum(-values, 0)
        end = np.minimum(top, DENSE).astype(int)
        order = np.argsort(end, kind="stable")  # rows of alike support together: little is padded
        for part in chunks(len(order), int(end.max(initial=1)) * self.rates.shape[1]):
            rows = order[part]
            k = np.arange(float(end[rows].max()))[None]
            probability = np.exp(self._log_terms(np.broadcast_to(k, (len(rows), k.shape[1])), rows)).sum(axis=2)
            F = np.minimum(np.cumsum(probability, axis=1), 1.0)
            before = np.clip(values[rows, None] - k, 0, 1)
            score[rows] += (np.where(k < end[rows, None], F**2 * before + (1 - F) ** 2 * (1 - before), 0)).sum(axis=1)
        wide = np.flatnonzero(top > DENSE)
        if len(wide):
            score[wide] += self._wide(values, top, self._quantile(NEGLIGIBLE), wide)
        return np.where(missing, np.nan, score)

    def sample(self, n_samples: int, generator: np.random.Generator) -> Array:
        """Independent draws, shape (n, n_samples)."""
        rate = np.take_along_axis(self.rates, draw_components(self.weights, n_samples, generator), axis=1)
        scale = np.where(self.dispersion > 0, self.dispersion, 1.0)[:, None]
        factor = scale * generator.standard_gamma(1 / np.broadcast_to(scale, rate.shape))
        rate = np.where(self.dispersion[:, None] > 0, rate * factor, rate)
        return as_array(generator.poisson(np.minimum(rate, math.exp(LOG_MAX_COUNT))))

    def _quantile(self, p: float) -> Array:
        """By bisection between Cantelli's bounds."""
        if p == 1:
            return np.full(self._n, np.inf)
        mean, std = self.mean, self.std
        high = np.ceil(mean + std * math.sqrt(p / (1 - p))) + 1
        low = np.maximum(np.floor(mean - std * math.sqrt((1 - p) / p)) - 1, -1.0) if p else np.full(self._n, -1.0)
        active = np.arange(self._n)
        while len(active):
            middle = np.floor((low[active] + high[active]) / 2)
            enough = self._cdf(middle, active) >= p
            high[active], low[active] = np.where(enough, middle, high[active]), np.where(enough, low[active], middle)
            # Beyond 2^53, neighbours are further apart than one.
            active = active[high[active] - low[active] > np.maximum(1.0, 1e-15 * high[active])]
        return high

    def _wide(self, values: Array, top: Array, bottom: Array, rows: npt.NDArray[np.intp]) -> Array:
        """The part of the score of the counts from DENSE to `top`."""
        y, b = values[rows], top[rows]
        a = np.clip(bottom[rows], DENSE, b)
        cut = np.clip(y, a, b)
        score = a - np.clip(y, DENSE, a)  # where F is 0

        def below(k: Array) -> Array:
            return self._cdf(k, rows) ** 2

        def above(k: Array) -> Array:
            return (1 - self._cdf(k, rows)) ** 2

        return score + _smooth_sum(below, a, cut) + _smooth_sum(above, cut, b)

    def _log_terms(self, k: Array, rows: npt.NDArray[np.intp] | slice) -> Array:
        """Log of weight times probability of counts (m, K) in each component, (m, K, M)."""
        rates, alpha = self.rates[rows][:, None, :], self.dispersion[rows][:, None, None]
        poisson = _almost_poisson(self.rates[rows], self.dispersion[rows])[:, None, None]
        alpha = np.where(poisson, 1.0, alpha)
        k = k[:, :, None]
        size, excess = 1 / alpha, np.log1p(alpha * rates)
        ways = np.where(poisson, 0.0, _log_rising(size, k)) - special.gammaln(k + 1)
        slope = np.log(rates) + np.where(poisson, 0.0, np.log(alpha) - excess)
        with np.errstate(divide="ignore"):
            constant = np.log(self.weights[rows])[:, None, :] - np.where(poisson, rates, size * excess)
        return as_array(ways + k * slope + constant)

    def _cdf(self, k: Array, rows: npt.NDArray[np.intp] | None = None) -> Array:
        """Probability of counts up to k >= -1, (m,), k continued to all real numbers."""
        index = np.arange(self._n) if rows is None else rows
        k = np.minimum(k, 1e300)
        poisson = _almost_poisson(self.rates[index], self.dispersion[index])
        result = np.empty(len(index))
        for mine, law in ((poisson, _poisson_cdf), (~poisson, _negative_binomial_cdf)):
            i = index[mine]
            shifted = np.maximum(k[mine], 0.0)[:, None] + 1
            result[mine] = (self.weights[i] * law(shifted, self.rates[i], self.dispersion[i][:, None])).sum(axis=1)
        return np.where(k < 0, 0.0, np.minimum(result, 1.0))


class BernoulliPredictive(Predictive):
    """Values 0 and 1.

    Parameters
    ----------
    probability : array_like, shape (n,)
        Of the value 1.

    Raises
    ------
    ValueError
        If a probability is not between 0 and 1.

    Examples
    --------
    >>> coin = BernoulliPredictive([0.5, 0.9])
    >>> coin.quantile(0.3), coin.crps([1.0, 0.0]).round(2)
    (array([0., 1.]), array([0.25, 0.81]))
    """

    def __init__(self, probability: npt.ArrayLike) -> None:
        self.probability = finite("probability", probability, 1)
        if np.any((self.probability < 0) | (self.probability > 1)):
            raise ValueError(f"probability: expected numbers from 0 to 1, got {probability!r}")

    @property
    def mean(self) -> Array:
        """The probabilities, shape (n,)."""
        return self.probability

    @property
    def std(self) -> Array:
        """Standard deviations, shape (n,)."""
        return as_array(np.sqrt(self.probability * (1 - self.probability)))

    def cdf(self, y: npt.ArrayLike) -> Array:
        """Probability of a value up to y, (n,)."""
        values, missing = self._values(y)
        inside = np.where(values < 0, 0.0, np.where(values < 1, 1 - self.probability, 1.0))
        return np.where(missing, np.nan, inside)

    def log_prob(self, y: npt.ArrayLike) -> Array:
        """Log probability of y, (n,); -inf where y is neither 0 nor 1."""
        values, missing = self._values(y)
        with np.errstate(divide="ignore"):
            one, zero = np.log(self.probability), np.log1p(-self.probability)
        known = np.where(values == 1, one, np.where(values == 0, zero, -np.inf))
        return np.where(missing, 0.0, known)

    def crps(self, y: npt.ArrayLike) -> Array:
        """The score, (n,): for 0 and 1 the Brier score ``(y - probability)^2``."""
        values, missing = self._values(y)
        y01, p = np.clip(values, 0, 1), self.probability
        return np.where(missing, np.nan, y01 * (1 - p) ** 2 + (1 - y01) * p**2 + np.abs(values - y01))

    def sample(self, n_samples: int, generator: np.random.Generator) -> Array:
        """Independent draws, shape (n, n_samples)."""
        return (generator.random((self._n, n_samples)) < self.probability[:, None]).astype(np.float64)

    def _quantile(self, p: float) -> Array:
        return np.where(p <= 1 - self.probability, 0.0, 1.0)


def _almost_poisson(rates: Array, dispersion: Array) -> npt.NDArray[np.bool_]:
    """Rows (n,) whose dispersion shows in no digit that counts."""
    return np.asarray(dispersion * np.maximum(rates.max(axis=1, initial=1.0), 1.0) < ALMOST_POISSON)


def _log_rising(size: Array, k: Array) -> Array:
    """``log Gamma(size + k) - log Gamma(size)``; for a large size by Stirling's series, whose terms do not cancel."""
    series = (size - 0.5) * np.log1p(k / size) + k * (np.log(size + k) - 1) + (1 / (size + k) - 1 / size) / 12
    return as_array(np.where(size > 1e5, series, special.gammaln(size + k) - special.gammaln(size)))


def _poisson_cdf(above: Array, rates: Array, dispersion: Array) -> Array:
    return as_array(special.gammaincc(above, rates))


def _negative_binomial_cdf(above: Array, rates: Array, dispersion: Array) -> Array:
    return as_array(special.betainc(1 / dispersion, above, 1 / (1 + dispersion * rates)))


def _smooth_sum(function: Callable[[Array], Array], a: Array, b: Array, panels: int = 32) -> Array:
    """``sum_k function(k)``, a <= k < b, of functions (n,) that hardly change from one k to the next; a > 0.

    The integral by Simpson's rule in ``log k``, plus the first two corrections of Euler and Maclaurin.
    """

    def slope(k: Array) -> Array:
        return function(k + 0.5) - function(k - 0.5)

    log_a, width = np.log(a), np.log(b) - np.log(a)
    first, last = function(a), function(b)
    total = first * a + last * b
    for i in range(1, 2 * panels):
        k = np.exp(log_a + width * (i / (2 * panels)))
        total = total + (4 if i % 2 else 2) * function(k) * k
    corrections = (first - last) / 2 + (slope(b) - slope(a)) / 12
    return as_array(total * width / (6 * panels) + corrections)
