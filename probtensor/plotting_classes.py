"""Pictures of probabilities of classes; `probtensor.plotting` offers them beside its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from probtensor.drawing import COLOURS, INK, LABEL_SIZE, dress, pyplot
from probtensor.metrics_classes import expected_calibration_error, reliability_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_reliability"]


def plot_reliability(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, n_bins: int = 15, *, ax: Axes | None = None
) -> Axes:
    """Draw how often the most probable class is right, against its probability.

    Dots are bins of equal width, with areas that grow with their rows and bars of two standard errors; on the diagonal
    probabilities are what they say.

    Parameters
    ----------
    labels : array of int, shape (n,)
        The right classes, from 0; rows not used in the fit.
    probabilities : array of float, shape (n, n_classes)
    n_bins : int, default 15
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        As `probtensor.metrics.reliability_curve`.

    Examples
    --------
    >>> ax = plot_reliability([0, 1, 1, 0], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]], 5)
    >>> ax.get_xlabel()
    'probability of the most probable class'
    """
    confidence, accuracy, count = reliability_curve(labels, probabilities, n_bins)
    error = expected_calibration_error(labels, probabilities, n_bins)
    ax = pyplot().subplots(figsize=(4.4, 4.2), layout="constrained")[1] if ax is None else ax
    start = 1 / np.asarray(probabilities).shape[1]
    ax.plot([start, 1.0], [start, 1.0], color=INK, linewidth=0.9, linestyle="--")
    width = 2 * np.sqrt(np.maximum(confidence * (1 - confidence), 0.0) / count)
    ax.errorbar(confidence, accuracy, width, color=COLOURS[0], linewidth=1.2, alpha=0.6)
    ax.scatter(confidence, accuracy, 15 + 150 * count / count.max(), color=COLOURS[0], zorder=3)
    ax.set_xlim(start - 0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    dress(ax, "probability of the most probable class", "share of rows where it is right")
    ax.set_title(f"expected calibration error {100 * error:.1f} %", fontsize=LABEL_SIZE, color=INK, loc="left")
    return ax
