"""How predictions are scored: point errors, densities, coverage, the continuous ranked probability score."""

from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from benchmarks.datasets import Floats
from probtensor.metrics import crps_gaussian

__all__ = ["Score", "both", "gaussian_score", "point_errors", "student_crps", "student_fit", "student_score"]


class Score(NamedTuple):
    """Means over test rows; what the form of the errors decides has a value for each form (Gaussian, Student)."""

    rmse: float
    mae: float
    nll: tuple[float, ...] = ()
    crps: tuple[float, ...] = ()
    inside_95: tuple[float, ...] = ()
    inside_50: tuple[float, ...] = ()


def gaussian_score(y: Floats, mean: Floats, std: Floats) -> Score:
    """Score normal predictions."""
    z = (y - mean) / std
    nll = float(np.mean(0.5 * z**2 + np.log(std) + 0.5 * np.log(2 * np.pi)))
    inside = [float(np.mean(np.abs(z) <= stats.norm.ppf(0.5 + level / 2))) for level in (0.95, 0.5)]
    return Score(*point_errors(y, mean), (nll,), (crps_gaussian(y, mean, std),), (inside[0],), (inside[1],))


def student_score(y: Floats, mean: Floats, scale: Floats, nu: Floats) -> Score:
    """Score Student predictions with `nu` degrees of freedom; `scale` is not their standard deviation."""
    z = (y - mean) / scale
    nll = float(np.mean(np.log(scale) - stats.t.logpdf(z, nu)))
    inside = [float(np.mean(np.abs(z) <= stats.t.ppf(0.5 + level / 2, nu))) for level in (0.95, 0.5)]
    crps = float(np.mean(scale * student_crps(z, nu)))
    return Score(*point_errors(y, mean), (nll,), (crps,), (inside[0],), (inside[1],))


def student_crps(z: Floats, nu: Floats) -> Floats:
    """Continuous ranked probability score of the standard Student distribution at z, for more than 1 degree of freedom.

    Jordan, Krüger, Lerch (2019), Evaluating Probabilistic Forecasts with scoringRules, appendix A.
    """
    spread = 2 * np.sqrt(nu) / (nu - 1) * np.exp(special.betaln(0.5, nu - 0.5) - 2 * special.betaln(0.5, nu / 2))
    score: Floats = z * (2 * stats.t.cdf(z, nu) - 1) + 2 * stats.t.pdf(z, nu) * (nu + z**2) / (nu - 1) - spread
    return score


def point_errors(y: Floats, mean: Floats) -> tuple[float, float]:
    """Root mean squared and mean absolute error."""
    return float(np.sqrt(np.mean((y - mean) ** 2))), float(np.mean(np.abs(y - mean)))


def both(a: Score, b: Score) -> Score:
    """One score with the values of two forms of errors."""
    return Score(a.rmse, a.mae, *(one + other for one, other in zip(a[2:], b[2:], strict=True)))


def student_fit(residual: Floats, least: float) -> tuple[float, float]:
    """Most likely degrees of freedom (1.5 to 200) and scale (`least` or more) of residuals around zero."""
    start = max(float(np.median(np.abs(residual))), least)

    def cost(theta: Floats) -> float:
        nu, scale = np.exp(theta)
        return float(np.log(scale) - np.mean(stats.t.logpdf(residual / scale, nu)))

    found = optimize.minimize(
        cost,
        np.log([4.0, start]),
        method="L-BFGS-B",
        bounds=[(np.log(1.5), np.log(200.0)), (np.log(least), np.log(max(np.abs(residual).max(), 2 * least)))],
    )
    nu, scale = np.exp(found.x)
    return float(nu), float(scale)
