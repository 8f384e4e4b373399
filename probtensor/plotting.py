"""Pictures of a fitted model: functions, dictionaries, predictions against observations, calibration, learning.

Each function draws on the matplotlib axes it is given, or on a new figure, and returns what it drew on. Colours are
those of Okabe and Ito, which readers with any colour vision can tell apart; matplotlib's settings are left alone, and
matplotlib itself is imported on the first call only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from probtensor.drawing import COLOURS, INK, LABEL_SIZE, TICK_SIZE, dress, pyplot
from probtensor.metrics import calibration_curve
from probtensor.plotting_classes import plot_reliability
from probtensor.plotting_completion import plot_entity_importance, plot_validation
from probtensor.plotting_factors import plot_factors, plot_main_effects
from probtensor.plotting_learning import plot_bound, plot_learning
from probtensor.plotting_ranks import plot_rank_choice
from probtensor.plotting_sparse import plot_activations, plot_dictionary, plot_reconstruction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from probtensor.predictive import Predictive

__all__ = [
    "plot_activations",
    "plot_bound",
    "plot_calibration",
    "plot_dictionary",
    "plot_entity_importance",
    "plot_factors",
    "plot_learning",
    "plot_main_effects",
    "plot_predictions",
    "plot_rank_choice",
    "plot_reconstruction",
    "plot_relevance",
    "plot_reliability",
    "plot_validation",
]


def plot_predictions(
    y: npt.ArrayLike,
    mean: npt.ArrayLike,
    std: npt.ArrayLike | None = None,
    *,
    level: float = 0.9,
    interval: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw predicted against observed values, with intervals, and the diagonal where they agree.

    Parameters
    ----------
    y : array (n,) of float
        Observed values; NaN is left out.
    mean : array (n,) of float
        Predictions.
    std : array (n,) of float, optional
        Their standard deviations. With them each point has the Gaussian interval of probability `level`, and
        observations outside of it are drawn in another colour and marker.
    level : float, default 0.9
        Probability of the intervals, between 0 and 1.
    interval : tuple of two arrays (n,) of float, optional
        Lower and upper ends of intervals of probability `level`, as ``model.predict_interval(X, level)`` gives them,
        in place of Gaussian ones: where tails are heavy, a Gaussian interval of the same standard deviation is wider.
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        If shapes differ, nothing is observed, or `level` is not between 0 and 1.

    Examples
    --------
    >>> ax = plot_predictions([1.0, 2.0, 3.0], [1.1, 1.9, 3.5], [0.2, 0.2, 0.2])
    >>> len(ax.lines) > 0
    True
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level!r}")
    observed, centre = np.asarray(y, dtype=np.float64).ravel(), np.asarray(mean, dtype=np.float64).ravel()
    spread = np.zeros_like(centre) if std is None else np.asarray(std, dtype=np.float64).ravel()
    if interval is not None:
        lower, upper = (np.asarray(end, dtype=np.float64).ravel() for end in interval)
    elif spread.shape == centre.shape:
        lower, upper = centre - spread * ndtri(0.5 + level / 2), centre + spread * ndtri(0.5 + level / 2)
    else:
        lower = upper = centre
    with_intervals = std is not None or interval is not None
    for name, array in (("mean", centre), ("std", spread), ("interval", lower), ("interval", upper)):
        if array.shape != observed.shape:
            raise ValueError(f"{name}: expected the {len(observed)} values of y, got {len(array)}")
    seen = ~np.isnan(observed)
    if not seen.any():
        raise ValueError(f"y: expected at least one observed value, got none among {len(observed)}")
    observed, centre, lower, upper = observed[seen], centre[seen], lower[seen], upper[seen]

    ax = pyplot().subplots(figsize=(4.8, 4.6), layout="constrained")[1] if ax is None else ax
    outside = ((observed < lower) | (observed > upper)) & with_intervals
    ends = (float(min(observed.min(), centre.min())), float(max(observed.max(), centre.max())))
    margin = 0.04 * (ends[1] - ends[0]) or 1.0
    limits = (ends[0] - margin, ends[1] + margin)
    ax.plot(limits, limits, color=INK, linewidth=1.2, zorder=3)
    percent = f"{100 * level:g} % interval"
    crowd = float(np.clip(40.0 / np.sqrt(len(observed)), 1.0, 5.0))
    for group, colour, marker, words in (
        (~outside, COLOURS[0], "o", f"inside its {percent}" if with_intervals else None),
        (outside, COLOURS[1], "D", f"outside its {percent}"),
    ):
        if group.any():
            label = None if words is None else f"{words} ({100 * group.mean():.0f} %)"
            if with_intervals:
                ax.vlines(observed[group], lower[group], upper[group], colors=colour, lw=0.7, alpha=0.3)
            ax.scatter(
                observed[group], centre[group], s=4.0 * crowd, c=colour, marker=marker, linewidths=0, alpha=0.85,
                label=label, zorder=4,
            )  # fmt: skip
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    dress(ax, "observed", "predicted")
    if with_intervals:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=TICK_SIZE, markerscale=1.8)
    return ax


def plot_calibration(y: npt.ArrayLike, predictive: Predictive, *, ax: Axes | None = None) -> Axes:
    """Draw how often predictive intervals hold the observed value, against what they say.

    Parameters
    ----------
    y : array of float, shape (n,)
        Observed values, not used in the fit.
    predictive : Predictive
        What ``model.predictive(X)`` gives for their rows.
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes
        The band around the diagonal holds two standard errors of a calibrated model's curve.

    Examples
    --------
    >>> from probtensor.predictive import NormalMixture
    >>> y = np.random.default_rng(0).normal(size=500)
    >>> ax = plot_calibration(y, NormalMixture(np.zeros(500), np.ones((500, 1)), np.ones(1)))
    >>> len(ax.lines) > 0
    True
    """
    levels, inside = calibration_curve(y, predictive)
    n = np.count_nonzero(~np.isnan(np.asarray(y, dtype=np.float64)))
    ax = pyplot().subplots(figsize=(4.4, 4.2), layout="constrained")[1] if ax is None else ax
    line = np.linspace(0.0, 1.0, 101)
    error = 2 * np.sqrt(line * (1 - line) / n)
    ax.fill_between(line, line - error, line + error, color=INK, alpha=0.2, linewidth=0)
    ax.plot(line, line, color=INK, linewidth=0.9, linestyle="--")
    ax.plot(levels, inside, color=COLOURS[0], linewidth=1.8, marker="o", markersize=4)
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(0.0, 1.0)
    ax.set_aspect("equal")
    dress(ax, "probability of the interval", "share of values inside")
    return ax


def plot_relevance(model: Any, *, ax: Axes | None = None) -> Axes:
    """Draw how much each component contributes: solid bars count for the effective rank, open ones do not.

    Parameters
    ----------
    model : fitted estimator
        With ``relevance_`` (R,), ``effective_rank_`` and ``rank_``.
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        If the model has no components to compare, as the Tucker form.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> fitted = SimpleNamespace(relevance_=np.array([2.0, 0.5, 0.001]), effective_rank_=2, rank_=3)
    >>> plot_relevance(fitted).get_title(loc="left")
    'effective rank 2 of 3'
    """
    relevance = np.asarray(model.relevance_, dtype=np.float64)
    if relevance.size == 0:
        raise ValueError("model: expected components with a relevance_ (form='cp'), got a model without")
    ax = pyplot().subplots(figsize=(4.4, 3.6), layout="constrained")[1] if ax is None else ax
    number, counted = np.arange(1, relevance.size + 1), np.arange(relevance.size) < model.effective_rank_
    ax.bar(number[counted], relevance[counted], color=COLOURS[0], edgecolor=COLOURS[0], width=0.7)
    ax.bar(number[~counted], relevance[~counted], color="none", edgecolor=COLOURS[0], width=0.7)
    title = f"effective rank {model.effective_rank_} of {relevance.size}"
    ax.set_title(title, fontsize=LABEL_SIZE, color=INK, loc="left")
    ax.locator_params(axis="x", integer=True)
    dress(ax, "components, strongest first", "root mean square, unit of y")
    return ax
