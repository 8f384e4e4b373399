"""Slow, dense and obviously right: coordinate ascent for non-negative CP, one number at a time, and its bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import integrate, special

Floats = npt.NDArray[np.float64]
Cells = list[tuple[tuple[int, ...], float]]  # coordinates and count of each row


def all_cells(sizes: Sequence[int], rows: Cells) -> Cells:
    """Every cell of the tensor; zero where no row is."""
    counts = dict(rows)
    return [(cell, counts.get(cell, 0.0)) for cell in itertools.product(*(range(n) for n in sizes))]


def count_shares(log_means: Sequence[Floats], cell: tuple[int, ...]) -> Floats:
    """Probabilities that a count is of each component; the weights are the last table, with one row."""
    logs = sum(table[i] for table, i in zip(log_means, (*cell, 0), strict=True))
    weights = np.exp(logs - np.max(logs))
    return np.asarray(weights / weights.sum())


def gamma_update(
    shapes: Sequence[Floats], rates: Sequence[Floats], rows: Cells, mode: int, shape: Floats, rate: Floats
) -> tuple[Floats, Floats]:
    """Shape and rate (I, R) of a table's posterior, given the others and its prior's (R,)."""
    means = [a / b for a, b in zip(shapes, rates, strict=True)]
    log_means = [special.digamma(a) - np.log(b) for a, b in zip(shapes, rates, strict=True)]
    found = np.tile(shape, (len(means[mode]), 1)), np.tile(rate, (len(means[mode]), 1))
    for cell, count in rows:
        share, at = count_shares(log_means, cell), (*cell, 0)
        for r in range(len(share)):
            found[0][at[mode], r] += count * share[r]
            others = [m[i, r] for k, (m, i) in enumerate(zip(means, at, strict=True)) if k != mode]
            found[1][at[mode], r] += math.prod(float(x) for x in others)
    return found


def gamma_divergence(a: float, b: float, shape: float, rate: float) -> float:
    """Kullback-Leibler divergence of Gamma(a, b) from Gamma(shape, rate), by quadrature over the logarithm."""

    def term(u: float) -> float:
        x = math.exp(u)
        own = a * math.log(b) - math.lgamma(a) + a * u - b * x
        prior = shape * math.log(rate) - math.lgamma(shape) + shape * u - rate * x
        return math.exp(own) * (own - prior)

    middle = float(special.digamma(a)) - math.log(b)
    spread = 12 * math.sqrt(float(special.polygamma(1, a)))
    return float(integrate.quad(term, middle - 3 * spread, middle + spread, points=[middle], limit=400)[0])


def count_bound(
    shapes: Sequence[Floats],
    rates: Sequence[Floats],
    rows: Cells,
    priors: Sequence[tuple[Floats, Floats]],
) -> float:
    """Bound of the counts under gamma posteriors, multinomial shares of components at their optimum."""
    means = [a / b for a, b in zip(shapes, rates, strict=True)]
    log_means = [special.digamma(a) - np.log(b) for a, b in zip(shapes, rates, strict=True)]
    bound = 0.0
    for cell, count in rows:
        share, at = count_shares(log_means, cell), (*cell, 0)
        for r, p in enumerate(share):
            log_rate = sum(float(table[i, r]) for table, i in zip(log_means, at, strict=True))
            bound += count * p * (log_rate - math.log(p)) if p > 0 else 0.0
            bound -= math.prod(float(table[i, r]) for table, i in zip(means, at, strict=True))
        bound -= math.lgamma(count + 1)
    for a, b, (shape, rate) in zip(shapes, rates, priors, strict=True):
        for i, r in itertools.product(range(a.shape[0]), range(a.shape[1])):
            bound -= gamma_divergence(float(a[i, r]), float(b[i, r]), float(shape[r]), float(rate[r]))
    return bound


def rectified_moments(shift: float, precision: float) -> tuple[float, float, float]:
    """Mean, variance and logarithm of the integral of ``exp(shift x - precision x^2 / 2)`` over ``x >= 0``."""
    top = max(shift / precision, 0.0)
    peak = shift * top - 0.5 * precision * top**2
    width = min(1 / math.sqrt(precision), 1 / abs(shift) if shift < 0 else math.inf)

    def moment(power: int) -> float:
        def term(x: float) -> float:
            return x**power * math.exp(shift * x - 0.5 * precision * x**2 - peak)

        ends = max(top - 40 * width, 0.0), top + 40 * width
        return float(integrate.quad(term, *ends, points=[top], epsabs=0, epsrel=1e-11, limit=400)[0])

    mass, first, second = (moment(power) for power in range(3))
    mean = first / mass
    return mean, second / mass - mean**2, math.log(mass) + peak


def rectified_update(
    means: list[Floats],
    variances: list[Floats],
    rows: Cells,
    noise_variance: float,
    mode: int,
    rate: Floats,
) -> tuple[Floats, Floats]:
    """Shift and precision (I, R) of a factor, one number at a time; `means` of the mode are replaced as they come."""
    shape = means[mode].shape
    shift, precision = np.zeros(shape), np.zeros(shape)
    for r in range(shape[1]):
        for i in range(shape[0]):
            shift[i, r] = -rate[r]
            for cell, value in rows:
                if cell[mode] != i:
                    continue
                others = [(means[k][j], variances[k][j]) for k, j in enumerate(cell) if k != mode]
                product = np.prod([m for m, _ in others], axis=0)
                second = math.prod(float(m[r] ** 2 + v[r]) for m, v in others)
                rest = sum(float(means[mode][i, s] * product[s]) for s in range(shape[1]) if s != r)
                precision[i, r] += second / noise_variance
                shift[i, r] += product[r] * (value - rest) / noise_variance
            means[mode][i, r] = rectified_moments(shift[i, r], precision[i, r])[0]
    return shift, precision
