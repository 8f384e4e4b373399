"""Likelihoods of neural tensor completion, each with its canonical link: how a value scatters around a predictor.

The predictor ``eta`` is the value itself ("gaussian"), the log odds of a 1 ("bernoulli") or the logarithm of the
expected count ("poisson"). With these links the derivative of a row's negative log-likelihood by ``eta`` is the mean
less the value, and its second derivative is the mean's derivative, the curvature.

References
----------
McCullagh, Nelder (1989), "Generalized Linear Models", chapter 2, for canonical links and deviances.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor
from torch.nn.functional import softplus

__all__ = [
    "LIKELIHOODS",
    "Likelihood",
    "check_values",
    "curvature",
    "deviance",
    "deviances",
    "inverse_link",
    "link",
    "means",
]

FloatArray = npt.NDArray[np.float64]
Likelihood = Literal["gaussian", "bernoulli", "poisson"]

LIKELIHOODS = "gaussian", "bernoulli", "poisson"
LARGEST = 30.0  # log odds and logarithms of counts beyond are taken for this


def check_values(likelihood: str, values: FloatArray, name: str) -> None:
    """Raise ValueError, naming the argument, where values (n,) cannot be of the likelihood.

    Examples
    --------
    >>> check_values("bernoulli", np.array([0.0, 0.5]), "y")
    Traceback (most recent call last):
        ...
    ValueError: y: expected 0 or 1 with likelihood="bernoulli", got 0.5
    """
    if likelihood == "gaussian":
        return
    if likelihood == "bernoulli":
        wrong, wanted = (values != 0) & (values != 1), "0 or 1"
    else:
        wrong, wanted = (values < 0) | (values != np.floor(values)), "whole numbers of at least 0"
    if len(bad := np.flatnonzero(wrong)):
        raise ValueError(f'{name}: expected {wanted} with likelihood="{likelihood}", got {values[bad[0]]:g}')


def link(likelihood: str, mean: float, n: float) -> float:
    """Predictor of the mean of n rows, moved by half a row into the range of possible means.

    Examples
    --------
    >>> link("bernoulli", 0.5, 10), round(link("poisson", 0.0, 100), 2)
    (0.0, -5.3)
    """
    if likelihood == "gaussian":
        return mean
    if likelihood == "bernoulli":
        return float(special.logit((mean * n + 0.5) / (n + 1)))
    return float(np.log((mean * n + 0.5) / n))


def means(likelihood: str, eta: FloatArray) -> FloatArray:
    """Expected values at predictors (n,)."""
    if likelihood == "gaussian":
        return eta
    eta = eta.clip(-LARGEST, LARGEST)
    found: FloatArray = special.expit(eta) if likelihood == "bernoulli" else np.exp(eta)
    return found


def curvature(likelihood: str, mean: FloatArray) -> FloatArray:
    """Second derivative of the negative log-likelihood by the predictor, (n,), from expected values (n,)."""
    if likelihood == "gaussian":
        return np.ones_like(mean)
    return mean * (1 - mean) if likelihood == "bernoulli" else mean


def deviance(likelihood: str, eta: FloatArray, values: FloatArray | float) -> FloatArray:
    """Deviance of each row (n,): twice the log-likelihood that a perfect prediction would have more.

    Examples
    --------
    >>> deviance("bernoulli", np.zeros(1), np.ones(1)).round(4), deviance("poisson", np.log([2.0]), np.array([2.0]))
    (array([1.3863]), array([0.]))
    """
    if likelihood == "gaussian":
        return (values - eta) ** 2
    eta = eta.clip(-LARGEST, LARGEST)
    if likelihood == "bernoulli":
        return 2 * (np.logaddexp(0.0, eta) - values * eta)
    excess: FloatArray = 2 * (np.exp(eta) - values - values * eta + special.xlogy(values, values))
    return excess


def inverse_link(likelihood: str, eta: Tensor) -> Tensor:
    """Expected values at predictors, as tensors."""
    if likelihood == "gaussian":
        return eta
    return torch.sigmoid(eta) if likelihood == "bernoulli" else torch.exp(eta.clamp(-LARGEST, LARGEST))


def deviances(likelihood: str, eta: Tensor, values: Tensor) -> Tensor:
    """Deviance of each row, as tensors; see `deviance`."""
    if likelihood == "gaussian":
        return (values - eta) ** 2
    if likelihood == "bernoulli":
        return 2 * (softplus(eta) - values * eta)
    eta = eta.clamp(-LARGEST, LARGEST)
    return 2 * (torch.exp(eta) - values - values * eta + torch.xlogy(values, values))
