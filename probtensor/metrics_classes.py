"""Scores of probabilities of classes; `probtensor.metrics` offers them beside its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["expected_calibration_error", "reliability_curve"]

FloatArray = npt.NDArray[np.float64]


def reliability_curve(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, n_bins: int = 15
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
    """How often the most probable class is right, by its probability, in bins of equal width that hold a row.

    Parameters
    ----------
    labels : array of int, shape (n,)
        The right classes, from 0.
    probabilities : array of float, shape (n, n_classes)
    n_bins : int, default 15
        The interval from 0 to 1 is cut into so many; a bin has its upper end and not its lower one.

    Returns
    -------
    confidence : array of float, shape (m,)
        Mean probability of the most probable class, over the rows of each bin.
    accuracy : array of float, shape (m,)
        Share of these rows where that class is right; near `confidence` for a calibrated model.
    count : array of int, shape (m,)

    Raises
    ------
    ValueError
        If there are no rows, shapes do not fit, a label is no class, a row does not sum to 1, or `n_bins` is below 1.

    Examples
    --------
    >>> confidence, accuracy, count = reliability_curve([0, 0, 1], [[0.9, 0.1], [0.2, 0.8], [0.2, 0.8]], n_bins=10)
    >>> confidence.tolist(), accuracy.tolist(), count.tolist()
    ([0.8, 0.9], [0.5, 1.0], [2, 1])
    """
    p, right = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p.ndim != 2 or right.shape != (len(p),) or p.size == 0:
        raise ValueError(
            f"labels: expected shape (n,) for probabilities (n, n_classes), got {right.shape} and {p.shape}"
        )
    if right.dtype.kind not in "iu" or right.min() < 0 or right.max() >= p.shape[1]:
        raise ValueError(f"labels: expected integers from 0 to {p.shape[1] - 1}, got {right.dtype} {right}")
    if not (np.all(p >= 0.0) and np.allclose(p.sum(1), 1.0, atol=1e-4)):
        raise ValueError("probabilities: expected numbers of at least 0 that sum to 1 in each row, got others")
    if n_bins < 1:
        raise ValueError(f"n_bins: expected at least 1, got {n_bins}")
    top = p.max(1)
    bins = np.clip(np.ceil(top * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    count = np.bincount(bins, minlength=n_bins)
    held = count > 0
    confidence = np.bincount(bins, top, n_bins)[held] / count[held]
    accuracy = np.bincount(bins, p.argmax(1) == right, n_bins)[held] / count[held]
    return confidence, accuracy, count[held]


def expected_calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, n_bins: int = 15) -> float:
    """Mean distance of confidence and accuracy, over bins of `reliability_curve` weighted by their rows.

    Parameters
    ----------
    labels : array of int, shape (n,)
        The right classes, from 0.
    probabilities : array of float, shape (n, n_classes)
    n_bins : int, default 15

    Returns
    -------
    float
        Between 0, calibrated, and 1. Few rows make it larger than it is.

    Raises
    ------
    ValueError
        As `reliability_curve`.

    References
    ----------
    Naeini, Cooper, Hauskrecht (2015), Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI.

    Examples
    --------
    Two thirds of the rows are 0.3 too sure, a third is 0.1 not sure enough:

    >>> round(expected_calibration_error([0, 0, 1], [[0.9, 0.1], [0.2, 0.8], [0.2, 0.8]], n_bins=10), 12)
    0.233333333333
    """
    confidence, accuracy, count = reliability_curve(labels, probabilities, n_bins)
    return float(np.sum(count * np.abs(confidence - accuracy)) / count.sum())
