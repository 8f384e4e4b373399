"""What predictions of rows held out say of a neural completion: the candidates' weights, and how values scatter.

References
----------
Wolpert (1992), "Stacked generalization", Neural Networks 5. Breiman (1996), "Stacked regressions", Machine Learning
24, for weights that are not negative. Guo, Pleiss, Sun, Weinberger (2017), "On Calibration of Modern Neural Networks",
ICML, for the temperature. MacKay (1992), "The Evidence Framework Applied to Classification Networks", Neural
Computation 4, for probabilities of an uncertain predictor.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize, minimize_scalar, nnls
from scipy.special import expit

from probtensor.calibration import MIN_RESIDUALS, ScaleMixture, fit_scale_mixture, with_tail
from probtensor.models.completion_links import deviance, means
from probtensor.predictive import BernoulliPredictive, CountMixture

__all__ = ["LEAST_VARIANCE", "HeldOut", "Spread", "calibrate", "calibrate_discrete", "discrete", "stack"]

FloatArray = npt.NDArray[np.float64]

LEAST_VARIANCE = 1e-12  # of the noise of standardised values
INFLATIONS = 0.0, 0.25, 0.5, 1.0, 2.0, 4.0
CALIBRATION_ROWS = 20_000  # more say no more
LOG_TEMPERATURES, LOG_DISPERSIONS = (-1.5, 1.5), (-12.0, 3.0)
MOST_UNCERTAIN = 3.0  # variance of the logarithm of a count: the counts' standard deviation is then four times the mean


class Spread(NamedTuple):
    """How binary values or counts scatter around their predictor.

    Attributes
    ----------
    inflation : float
        Factor on the variance of the predictor.
    scale : float
        Temperature of log odds, or dispersion of counts.
    floor : float
        Probability, shared by 0 and 1, of what no row held out has shown.
    """

    inflation: float
    scale: float
    floor: float


class HeldOut(NamedTuple):
    """Rows of all ranks that members have not seen; with few rows, all training rows.

    Attributes
    ----------
    values, weight : ndarray, shape (m,)
    spread : ndarray, shape (m,)
        Variance of the effects' sum, in multiples of the noise's.
    plain : ndarray, shape (m,)
        What the effects predict.
    share : ndarray, shape (m,)
        A number of each row between 0 and 1, from what it holds.
    candidates : ndarray, shape (m, C)
        Predictors.
    small : bool
        Whether there are too few rows for anything but the effects.
    n_rows : int
        Training rows.
    """

    values: FloatArray
    weight: FloatArray
    spread: FloatArray
    plain: FloatArray
    share: FloatArray
    candidates: FloatArray
    small: bool
    n_rows: int

    def noise(self) -> float:
        """Variance that Gaussian values have around the effects' sum."""
        share = self.weight / self.weight.sum()
        if self.small:
            return max(float(share @ self.values**2), LEAST_VARIANCE)
        residual = self.values - self.plain
        return max(float(share @ residual**2 / (1 + share @ self.spread)), LEAST_VARIANCE)

    def combine(self, noise: float, likelihood: str) -> tuple[FloatArray, ScaleMixture, Spread | None]:
        """Weights (C,) of the candidates, and how values scatter around what they predict together."""
        mixture = ScaleMixture(1.0, torch.ones(1).double(), torch.ones(1).double())
        C = self.candidates.shape[1]
        weights = np.asarray(np.eye(C)[0])
        if not self.small:
            weights = stack(self.candidates, self.values, self.weight, likelihood)
        some = np.argsort(self.share, kind="stable")[:CALIBRATION_ROWS]
        if self.small:
            some = some[:0]
        mean, latent = self.candidates[some] @ weights, noise * self.spread[some]
        if likelihood != "gaussian":
            spread = calibrate_discrete(likelihood, mean, latent, self.values[some], self.weight[some], self.n_rows)
            return weights, mixture, spread
        return weights, mixture if self.small else calibrate(self.values[some] - mean, latent, noise), None


def stack(design: FloatArray, values: FloatArray, weight: FloatArray, likelihood: str = "gaussian") -> FloatArray:
    """Weights (C,) that are not negative and sum to one, of least deviance.

    Parameters
    ----------
    design : ndarray, shape (n, C)
        Predictors of rows held out.
    values, weight : ndarray, shape (n,)
    likelihood : str, default "gaussian"

    Examples
    --------
    >>> y = np.array([1.0, 2.0, 4.0])
    >>> stack(np.stack([y - 1, y + 1, -y], axis=1), y, np.ones(3)).round(3) + 0.0
    array([0.5, 0.5, 0. ])
    """
    C = design.shape[1]
    if not len(values) or C == 1 or (likelihood == "gaussian" and not values.any()):
        return np.asarray(np.eye(C)[0])
    if likelihood != "gaussian":
        share = weight / weight.sum()

        def loss(weights: FloatArray) -> tuple[float, FloatArray]:
            eta = design @ weights
            slope: FloatArray = design.T @ (2 * share * (means(likelihood, eta) - values))
            return float(share @ deviance(likelihood, eta, values)), slope

        whole = {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones(C)}
        bounds = [(0.0, 1.0)] * C
        start = np.full(C, 1 / C)
        how = {"maxiter": 200, "ftol": 1e-10}
        found = minimize(loss, start, jac=True, bounds=bounds, constraints=whole, method="SLSQP", options=how)
        weights = np.where(found.x > 1e-6, found.x, 0.0)
        return np.asarray(weights / weights.sum())
    root = np.sqrt(weight)
    heavy = 1e3 * np.linalg.norm(root)  # of the row that says that weights sum to one
    left = np.vstack([root[:, None] * design, np.full(C, heavy)])
    weights = nnls(left, np.append(root * values, heavy))[0]
    return np.asarray(weights / weights.sum())


def calibrate(residual: FloatArray, latent: FloatArray, noise: float) -> ScaleMixture:
    """Scales of Gaussian values' residuals (n,); one scale where they are few."""
    parts = torch.from_numpy(residual), torch.from_numpy(latent), torch.full((len(residual),), noise).double()
    if len(residual) < MIN_RESIDUALS:
        scale = math.sqrt(max(float((parts[0] ** 2 / (parts[1] + parts[2])).mean()), LEAST_VARIANCE))
        return ScaleMixture(1.0, torch.tensor([scale]).double(), torch.ones(1).double())
    return with_tail(fit_scale_mixture(*parts), len(residual))


def calibrate_discrete(
    likelihood: str, eta: FloatArray, variance: FloatArray, values: FloatArray, weight: FloatArray, n_rows: int
) -> Spread:
    """The spread of highest likelihood on rows held out; that of the model itself where they are few.

    Parameters
    ----------
    likelihood : {"bernoulli", "poisson"}
    eta, variance : ndarray, shape (n,)
        Predictors and their variances.
    values, weight : ndarray, shape (n,)
    n_rows : int
        Of the training.
    """
    floor = 1 / (n_rows + 1)
    plain = Spread(1.0, 1.0 if likelihood == "bernoulli" else 0.0, floor)
    if len(values) < MIN_RESIDUALS:
        return plain

    def loss_at(inflation: float) -> Callable[[float], float]:
        def loss(log_scale: float) -> float:
            spread = Spread(inflation, math.exp(log_scale), floor)
            return -float(weight @ discrete(likelihood, eta, variance, spread).log_prob(values))

        return loss

    best: tuple[float, Spread] | None = None
    bounds = LOG_TEMPERATURES if likelihood == "bernoulli" else LOG_DISPERSIONS
    for inflation in INFLATIONS:
        found = minimize_scalar(loss_at(inflation), bounds=bounds, method="bounded", options={"xatol": 1e-2})
        if best is None or found.fun < best[0]:
            best = found.fun, Spread(inflation, math.exp(found.x), floor)
    assert best is not None
    return best[1]


def discrete(
    likelihood: str, eta: FloatArray, variance: FloatArray, spread: Spread, strange: FloatArray | float = 0.0
) -> BernoulliPredictive | CountMixture:
    """Predictive distributions of binary values or counts.

    The probability of a 1 is the logistic function of the log odds over the temperature, and nearer to a half where the
    log odds are uncertain. Counts are negative binomials whose mean is the predicted one; uncertainty of its logarithm
    adds to their dispersion, as a gamma distribution of the mean with the moments of a log-normal one does.

    Parameters
    ----------
    likelihood : {"bernoulli", "poisson"}
    eta, variance : ndarray, shape (n,)
    spread : Spread
    strange : ndarray, shape (n,), or float
        Variance that unknown labels add, which is not inflated.

    Examples
    --------
    >>> discrete("bernoulli", np.array([2.0]), np.array([4.0]), Spread(1.0, 1.0, 0.0)).mean.round(3)
    array([0.777])
    >>> discrete("poisson", np.log([5.0]), np.array([0.0]), Spread(1.0, 0.2, 0.0)).std.round(3)
    array([3.162])
    """
    variance = spread.inflation * variance + strange
    if likelihood == "bernoulli":
        odds = eta / (spread.scale * np.sqrt(1 + math.pi / 8 * variance))
        return BernoulliPredictive((1 - spread.floor) * expit(odds) + spread.floor / 2)
    excess = np.expm1(variance.clip(max=MOST_UNCERTAIN))
    return CountMixture(means(likelihood, eta)[:, None], [1.0], spread.scale + (1 + spread.scale) * excess)
