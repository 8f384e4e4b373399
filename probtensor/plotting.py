"""Pictures of a fitted model: functions, dictionaries, predictions against observations, calibration, learning.

Each function draws on the matplotlib axes it is given, or on a new figure, and returns what it drew on. Colours are
those of Okabe and Ito, which readers with any colour vision can tell apart; matplotlib's settings are left alone, and
matplotlib itself is imported on the first call only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import ndtri

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.drawing import COLOURS, FAINT, INK, LABEL_SIZE, LINES, TICK_SIZE, dress, new_panels, pyplot
from probtensor.kernels import Sum, White
from probtensor.metrics import calibration_curve
from probtensor.plotting_classes import plot_reliability
from probtensor.plotting_completion import plot_entity_importance, plot_validation
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
    "plot_predictions",
    "plot_rank_choice",
    "plot_reconstruction",
    "plot_relevance",
    "plot_reliability",
    "plot_validation",
]

MAX_DOTS = 100  # of a function; more hide the line
MAX_LABELS = 30


def plot_factors(
    model: Any,
    modes: Sequence[str] | None = None,
    *,
    max_components: int = 5,
    n_grid: int = 200,
    axes: Sequence[Axes] | npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Draw the latent functions of a model, one panel a mode.

    A continuous mode shows lines over a fine grid, with bands of two standard deviations and a tick at every observed
    coordinate; a categorical mode shows one point a label, with bars of two standard deviations.

    Parameters
    ----------
    model : fitted estimator
        With ``axes_``, ``form`` and ``factor(name, at)``.
    modes : sequence of str, optional
        Names of the modes to draw. By default all of them.
    max_components : int, default 5
        Only that many components are drawn, those with the largest means: in each mode on its own, or by the product
        over the modes, thus the same in all panels, if ``model.form`` is "cp". Legends count all components from 1.
    n_grid : int, default 200
        Grid points of a continuous mode. The observed coordinates are added to them; with a `White` part they are dots
        (up to a hundred), and the line is the smooth function between them.
    axes : sequence of matplotlib Axes, optional
        One for each mode. By default a new figure.

    Returns
    -------
    array of matplotlib Axes, one for each mode

    Raises
    ------
    ValueError
        If a mode is unknown, the number of axes differs from that of the modes, or a count is below 1.

    Examples
    --------
    >>> from probtensor.models import FunBaT
    >>> X = pd.DataFrame({"day": np.arange(40.0), "place": ["here", "there"] * 20})
    >>> model = FunBaT(rank=1, random_state=0, progress=False).fit(X, np.sin(X["day"] / 6))
    >>> panels = plot_factors(model)
    >>> [panel.get_xlabel() for panel in panels]
    ['day', 'latent value']
    """
    by_name = {str(axis.name): axis for axis in model.axes_}
    chosen = list(by_name) if modes is None else list(modes)
    if not chosen or not set(chosen) <= set(by_name):
        raise ValueError(f"modes: expected names among {list(by_name)}, got {chosen}")
    for argument, count in (("max_components", max_components), ("n_grid", n_grid)):
        if count < 1:
            raise ValueError(f"{argument}: expected at least 1, got {count}")
    panels = _new_panels([by_name[name] for name in chosen]) if axes is None else np.asarray(axes, dtype=object).ravel()
    if len(panels) != len(chosen):
        raise ValueError(f"axes: expected one for each of the modes {chosen}, got {len(panels)}")
    sizes = {name: _sizes(model.factor(name, at=axis.distinct)[0]) for name, axis in by_name.items()}
    if model.form == "cp":
        sizes = dict.fromkeys(sizes, np.prod(list(sizes.values()), axis=0))
    for ax, name in zip(panels, chosen, strict=True):
        axis = by_name[name]
        shown = sorted(int(component) for component in np.argsort(-sizes[name], kind="stable")[:max_components])
        if isinstance(axis, ContinuousAxis):
            _draw_functions(ax, model, axis, shown, n_grid)
        elif isinstance(axis, CategoricalAxis):
            _draw_labels(ax, model, axis, shown)
    return panels


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


def _draw_functions(ax: Axes, model: Any, axis: ContinuousAxis, shown: Sequence[int], n_grid: int) -> None:
    """Draw one continuous mode; where coordinates have something for themselves, as dots beside the smooth line."""
    coordinates = axis.coordinates
    grid = np.linspace(coordinates[0], coordinates[-1], n_grid)
    between = np.setdiff1d(grid, coordinates)
    white = isinstance(axis.kernel, Sum) and any(isinstance(part, White) for part in axis.kernel.parts)
    dots = white and len(between) > 0
    grid = between if dots else np.union1d(grid, coordinates)
    mean, std = model.factor(str(axis.name), at=axis.decode(grid))
    at = model.factor(str(axis.name), at=axis.decode(coordinates))[0] if dots and len(coordinates) <= MAX_DOTS else None
    x, ticks = _abscissa(axis, grid), _abscissa(axis, coordinates)
    for place, component in enumerate(shown):  # colours go by place: those drawn side by side all differ
        colour = COLOURS[place % len(COLOURS)]
        line, centre, reach = LINES[place // len(COLOURS) % len(LINES)], mean[:, component], 2.0 * std[:, component]
        ax.fill_between(x, centre - reach, centre + reach, color=colour, alpha=0.16, linewidth=0)
        ax.plot(x, centre, line, color=colour, linewidth=2.0, label=str(component + 1))
        if at is not None:
            ax.plot(ticks, at[:, component], ".", color=colour, markersize=5)
    ax.plot(ticks, np.full(len(ticks), 0.018), "|", color=INK, markersize=7, transform=ax.get_xaxis_transform())
    if np.issubdtype(np.asarray(x).dtype, np.datetime64):
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator: Any = AutoDateLocator(maxticks=6)  # type: ignore[no-untyped-call]
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    ax.axhline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    dress(ax, f"{axis.name}{' (days)' * isinstance(axis.distinct, pd.TimedeltaIndex)}", "latent function")
    _legend(ax)


def _draw_labels(ax: Axes, model: Any, axis: CategoricalAxis, shown: Sequence[int]) -> None:
    """Draw one categorical mode, labels from top to bottom."""
    labels = axis.labels
    mean, std = model.factor(str(axis.name), at=labels)
    offsets = (np.arange(len(shown)) - (len(shown) - 1) / 2) * 0.66 / max(len(shown), 1)
    heights = np.arange(len(labels))
    many, step = len(labels) > MAX_LABELS, -(-len(labels) // MAX_LABELS)
    for place, (component, offset) in enumerate(zip(shown, offsets, strict=True)):
        ax.errorbar(
            mean[:, component], heights + offset, xerr=2.0 * std[:, component], fmt="o" if place < 6 else "D",
            color=COLOURS[place % len(COLOURS)], markersize=2.5 if many else 4.5, elinewidth=0.7 if many else 1.3,
            label=str(component + 1),
        )  # fmt: skip
    ax.set_yticks(heights[::step], [str(label) for label in labels[::step]])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    if not many:
        ax.hlines(heights[:-1] + 0.5, 0.0, 1.0, colors="#E6E6E6", lw=0.8, transform=ax.get_yaxis_transform(), zorder=0)
    ax.axvline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    dress(ax, "latent value", str(axis.name))
    ax.tick_params(axis="y", length=0)
    _legend(ax)


def _sizes(mean: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the root mean square of each component, (R,)."""
    size: npt.NDArray[np.float64] = np.sqrt(np.mean(np.asarray(mean, dtype=np.float64) ** 2, axis=0))
    return size


def _abscissa(axis: ContinuousAxis, encoded: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Return coordinates as matplotlib can draw them: datetimes on the user's clock, everything else as numbers."""
    if not isinstance(axis.distinct, pd.DatetimeIndex):
        return encoded
    return np.asarray(pd.DatetimeIndex(axis.decode(encoded)).tz_localize(None))


def _legend(ax: Axes) -> None:
    """Put the numbers of the components above the panel, in one row, without its error bars."""
    handles, labels = ax.get_legend_handles_labels()
    handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    ax.legend(
        handles, labels, title="component", loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(len(labels), 5),
        frameon=False, fontsize=TICK_SIZE, title_fontsize=TICK_SIZE, handlelength=1.3, handletextpad=0.4,
        columnspacing=1.0, borderpad=0.2, alignment="left",
    )  # fmt: skip


def _new_panels(modes: Sequence[Axis]) -> npt.NDArray[Any]:
    """Return the axes of a new figure, one a mode; tall where there are many labels."""
    n_labels = max((min(axis.size, MAX_LABELS) for axis in modes if isinstance(axis, CategoricalAxis)), default=0)
    return new_panels(len(modes), 3.9, float(np.clip(0.36 * n_labels + 1.2, 3.6, 7.0)))
