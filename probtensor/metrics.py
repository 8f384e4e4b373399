"""Scores of predictions and of factors: plain numpy, missing cells left out.

Every score takes the observed values ``y`` first. A cell counts when it is observed: where ``y`` is not NaN and, if
a ``mask`` is given, where the mask is True. What the model says about the other cells never enters a score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from probtensor.components import core_consistency, factor_match_score
from probtensor.metrics_classes import expected_calibration_error, reliability_curve

__all__ = [
    "calibration_curve",
    "core_consistency",
    "coverage",
    "crps_gaussian",
    "expected_calibration_error",
    "factor_match_score",
    "psnr",
    "relative_error",
    "reliability_curve",
    "rmse",
]

if TYPE_CHECKING:
    from probtensor.predictive import Predictive

FloatArray = npt.NDArray[np.float64]


def rmse(y: npt.ArrayLike, mean: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> float:
    """Root mean squared error over the observed cells.

    Parameters
    ----------
    y : array of float, any shape
        Observed values; NaN marks a missing cell.
    mean : array of float, the shape of `y`
        Predictions.
    mask : array of bool, the shape of `y`, optional
        True where the cell counts. By default every cell that is not NaN.

    Returns
    -------
    float
        The error in the unit of `y`.

    Raises
    ------
    ValueError
        If shapes differ, no cell is observed, or a prediction of an observed cell is not finite.

    Examples
    --------
    >>> rmse([1.0, 2.0, float("nan")], [1.0, 4.0, 100.0])
    1.4142135623730951
    """
    observed, predicted = _observed(y, mask, mean=mean)
    return float(np.sqrt(np.mean((observed - predicted) ** 2)))


def relative_error(y: npt.ArrayLike, mean: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> float:
    """Norm of the residual divided by the norm of the data, both over the observed cells only.

    Parameters
    ----------
    y : array of float, any shape
        Observed values; NaN marks a missing cell.
    mean : array of float, the shape of `y`
        Predictions or reconstruction.
    mask : array of bool, the shape of `y`, optional
        True where the cell counts. By default every cell that is not NaN.

    Returns
    -------
    float
        Zero for a perfect reconstruction, one for a reconstruction by zeros.

    Raises
    ------
    ValueError
        As `rmse`, and if all observed values are zero.

    Examples
    --------
    The third cell is missing, so the model's value there is of no account:

    >>> relative_error([3.0, 4.0, float("nan")], [3.0, 0.0, 1e3])
    0.8
    """
    observed, predicted = _observed(y, mask, mean=mean)
    norm = float(np.linalg.norm(observed))
    if norm == 0.0:
        raise ValueError("y: expected an observed value other than zero for a relative error, got zeros only")
    return float(np.linalg.norm(observed - predicted)) / norm


def coverage(y: npt.ArrayLike, lower: npt.ArrayLike, upper: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> float:
    """Share of the observed values that lie inside their interval (ends included).

    Parameters
    ----------
    y : array of float, any shape
        Observed values; NaN marks a missing cell.
    lower, upper : array of float, the shape of `y`
        Ends of the intervals.
    mask : array of bool, the shape of `y`, optional
        True where the cell counts. By default every cell that is not NaN.

    Returns
    -------
    float
        Between 0 and 1; near the nominal level for a calibrated model.

    Raises
    ------
    ValueError
        As `rmse`, and if a lower end lies above its upper end.

    Examples
    --------
    >>> coverage([0.0, 1.0, 5.0, float("nan")], [-1.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 1.0])
    0.6666666666666666
    """
    observed, low, high = _observed(y, mask, lower=lower, upper=upper)
    crossed = int(np.count_nonzero(low > high))
    if crossed:
        raise ValueError(f"lower: expected at most upper, got more at {crossed} of {low.size} observed cells")
    return float(np.mean((low <= observed) & (observed <= high)))


def calibration_curve(
    y: npt.ArrayLike, predictive: Predictive, levels: npt.ArrayLike | None = None
) -> tuple[FloatArray, FloatArray]:
    """How often central predictive intervals of many levels hold the observed value.

    Parameters
    ----------
    y : array of float, shape (n,)
        Observed values; NaN marks a missing one.
    predictive : Predictive
        Distributions of the n values, as a fitted model's ``predictive(X)`` gives them.
    levels : array of float, shape (m,), optional
        Probabilities between 0 and 1. By default 0.05, 0.1, …, 0.95.

    Returns
    -------
    levels : array of float, shape (m,)
    inside : array of float, shape (m,)
        Share of the observed values in the interval of each level; near `levels` for a calibrated model.

    Raises
    ------
    ValueError
        As `coverage`, and if a level is not between 0 and 1.

    Examples
    --------
    >>> from probtensor.predictive import NormalMixture
    >>> y = np.random.default_rng(0).normal(size=2000)
    >>> normal = NormalMixture(np.zeros(2000), np.ones((2000, 1)), np.ones(1))
    >>> calibration_curve(y, normal, [0.5, 0.9])[1].round(2).tolist()
    [0.5, 0.9]
    """
    chosen = np.linspace(0.05, 0.95, 19) if levels is None else np.asarray(levels, dtype=np.float64)
    if chosen.ndim != 1 or not np.all((chosen > 0) & (chosen < 1)):
        raise ValueError(f"levels: expected probabilities between 0 and 1, got {levels!r}")
    return chosen, np.array([coverage(y, *predictive.interval(float(level))) for level in chosen])


def crps_gaussian(
    y: npt.ArrayLike, mean: npt.ArrayLike, std: npt.ArrayLike, mask: npt.ArrayLike | None = None
) -> float:
    """Mean continuous ranked probability score of Gaussian predictions (smaller is better).

    With ``z = (y - mean) / std`` the score of one cell is
    ``std * (z * (2 * Phi(z) - 1) + 2 * phi(z) - 1 / sqrt(pi))``. It has the unit of `y`, and for ``std = 0`` it is
    the absolute error.

    Parameters
    ----------
    y : array of float, any shape
        Observed values; NaN marks a missing cell.
    mean, std : array of float, the shape of `y`
        Moments of the predictions, ``std >= 0``.
    mask : array of bool, the shape of `y`, optional
        True where the cell counts. By default every cell that is not NaN.

    Returns
    -------
    float
        The mean score over the observed cells.

    Raises
    ------
    ValueError
        As `rmse`, and if a standard deviation is negative.

    References
    ----------
    Gneiting and Raftery (2007), Strictly Proper Scoring Rules, Prediction, and Estimation, equation 21.

    Examples
    --------
    >>> round(crps_gaussian([0.0], [0.0], [1.0]), 6)
    0.233695
    >>> crps_gaussian([3.0], [1.0], [0.0])
    2.0
    """
    observed, centre, scale = _observed(y, mask, mean=mean, std=std)
    if np.any(scale < 0.0):
        raise ValueError(f"std: expected at least 0 at every observed cell, got {scale.min():g}")
    error = observed - centre
    certain = scale == 0.0
    z = error / np.where(certain, 1.0, scale)
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    score = scale * (z * (2.0 * ndtr(z) - 1.0) + 2.0 * density - 1.0 / np.sqrt(np.pi))
    return float(np.mean(np.where(certain, np.abs(error), score)))


def psnr(image: npt.ArrayLike, truth: npt.ArrayLike, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio of an image: ``10 log10(peak^2 / mean squared error)`` (larger is better).

    Parameters
    ----------
    image : array of float, any shape
        The image to judge, finite wherever the truth is known.
    truth : array of float, the shape of `image`
        The image as it should be; NaN marks pixels that do not count.
    peak : float, default 255
        The largest value that a pixel can have.

    Returns
    -------
    float
        Decibels; infinite if the images agree.

    Raises
    ------
    ValueError
        If shapes differ, no pixel counts, one that counts is not finite, or `peak` is not positive and finite.

    Examples
    --------
    >>> round(psnr([[0.0, 10.0]], [[0.0, 0.0]]), 2)
    31.14
    """
    if not 0.0 < peak < np.inf:
        raise ValueError(f"peak: expected a positive number, got {peak!r}")
    judged, right = np.asarray(image, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if judged.shape != right.shape:
        raise ValueError(f"image: expected the shape of truth, {right.shape}, got {judged.shape}")
    error = (judged - right)[~np.isnan(right)]
    if error.size == 0:
        raise ValueError(f"truth: expected at least one known pixel, got none among {right.size}")
    if not np.all(np.isfinite(error)):
        raise ValueError("image: expected finite numbers, as in truth, wherever truth is not NaN")
    with np.errstate(divide="ignore"):
        return float(20.0 * np.log10(peak) - 10.0 * np.log10(np.mean(error**2)))


def _observed(y: npt.ArrayLike, mask: npt.ArrayLike | None, **predictions: npt.ArrayLike) -> tuple[FloatArray, ...]:
    """Return the observed cells of `y` and of every prediction, flat and checked."""
    values = np.asarray(y, dtype=np.float64)
    seen: npt.NDArray[Any] = ~np.isnan(values)
    if mask is not None:
        chosen = np.asarray(mask)
        if chosen.dtype != np.bool_ or chosen.shape != values.shape:
            raise ValueError(
                f"mask: expected bool of the shape of y, {values.shape}, got {chosen.dtype} of shape {chosen.shape}"
            )
        seen &= chosen
    if not np.any(seen):
        raise ValueError(f"y: expected at least one observed cell, got none among {values.size}")
    flat = [values[seen]]
    if not np.all(np.isfinite(flat[0])):
        raise ValueError("y: expected finite values where it is observed, got infinity")
    for name, prediction in predictions.items():
        array = np.asarray(prediction, dtype=np.float64)
        if array.shape != values.shape:
            raise ValueError(f"{name}: expected the shape of y, {values.shape}, got {array.shape}")
        kept = array[seen]
        if np.any(np.isnan(kept)) or (name in ("mean", "std") and np.any(np.isinf(kept))):
            raise ValueError(f"{name}: expected finite numbers at every observed cell, got NaN or infinity")
        flat.append(kept)
    return tuple(flat)
