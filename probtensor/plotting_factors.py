"""Pictures of what a model found in each mode; `probtensor.plotting` offers them beside its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.drawing import COLOURS, FAINT, INK, LINES, TICK_SIZE, dress, new_panels
from probtensor.kernels import Sum, White

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_factors", "plot_main_effects"]

Columns = Callable[[Any], tuple[npt.NDArray[Any], npt.NDArray[Any]]]  # mean and std (m, R) at m coordinates or labels

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
    if max_components < 1:
        raise ValueError(f"max_components: expected at least 1, got {max_components}")
    chosen, panels = _modes_and_panels(model, modes, n_grid, axes)
    sizes = {str(axis.name): _sizes(model.factor(str(axis.name), at=axis.distinct)[0]) for axis in model.axes_}
    if model.form == "cp":
        sizes = dict.fromkeys(sizes, np.prod(list(sizes.values()), axis=0))
    for ax, axis in zip(panels, chosen, strict=True):
        name = str(axis.name)
        shown = sorted(int(component) for component in np.argsort(-sizes[name], kind="stable")[:max_components])
        _draw(ax, axis, partial(model.factor, name), shown, n_grid, "latent function")
        _legend(ax)
    return panels


def plot_main_effects(
    model: Any,
    modes: Sequence[str] | None = None,
    *,
    n_grid: int = 200,
    axes: Sequence[Axes] | npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Draw what each mode adds by itself, one panel a mode, all in one unit and on one scale.

    Lines, points, bands and bars are those of `plot_factors`.

    Parameters
    ----------
    model : fitted estimator
        With ``axes_`` and ``main_effect(name, at)``.
    modes : sequence of str, optional
        Names of the modes to draw. By default all of them.
    n_grid : int, default 200
        Grid points of a continuous mode.
    axes : sequence of matplotlib Axes, optional
        One for each mode. By default a new figure.

    Returns
    -------
    array of matplotlib Axes, one for each mode

    Raises
    ------
    ValueError
        If the model has no main effects, a mode is unknown, the number of axes differs from that of the modes, or
        `n_grid` is below 1.

    Examples
    --------
    >>> from probtensor.models import FunBaT
    >>> X = pd.DataFrame({"day": np.arange(40.0), "place": ["here", "there"] * 20})
    >>> model = FunBaT(rank=1, random_state=0, progress=False).fit(X, np.sin(X["day"] / 6))
    >>> panels = plot_main_effects(model, ["day"])
    >>> panels[0].get_ylabel()
    'effect on y'
    """
    chosen, panels = _modes_and_panels(model, modes, n_grid, axes)
    for ax, axis in zip(panels, chosen, strict=True):

        def columns(at: Any, name: str = str(axis.name)) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
            mean, std = model.main_effect(name, at=at)
            return mean[:, None], std[:, None]

        _draw(ax, axis, columns, [0], n_grid, "effect on y")
    of_effects = [
        ax.xaxis if isinstance(a, CategoricalAxis) else ax.yaxis for ax, a in zip(panels, chosen, strict=True)
    ]
    low, high = np.transpose([each.get_view_interval() for each in of_effects])
    for each in of_effects:
        each.set_view_interval(low.min(), high.max(), ignore=True)
    return panels


def _modes_and_panels(
    model: Any, modes: Sequence[str] | None, n_grid: int, axes: Sequence[Axes] | npt.NDArray[Any] | None
) -> tuple[list[Axis], npt.NDArray[Any]]:
    """Return the modes to draw and the panels to draw them on."""
    by_name = {str(axis.name): axis for axis in model.axes_}
    chosen = list(by_name) if modes is None else list(modes)
    if not chosen or not set(chosen) <= set(by_name):
        raise ValueError(f"modes: expected names among {list(by_name)}, got {chosen}")
    if n_grid < 1:
        raise ValueError(f"n_grid: expected at least 1, got {n_grid}")
    panels = _new_panels([by_name[name] for name in chosen]) if axes is None else np.asarray(axes, dtype=object).ravel()
    if len(panels) != len(chosen):
        raise ValueError(f"axes: expected one for each of the modes {chosen}, got {len(panels)}")
    return [by_name[name] for name in chosen], panels


def _draw(ax: Axes, axis: Axis, columns: Columns, shown: Sequence[int], n_grid: int, what: str) -> None:
    """Draw one mode."""
    if isinstance(axis, ContinuousAxis):
        _draw_functions(ax, axis, columns, shown, n_grid, what)
    elif isinstance(axis, CategoricalAxis):
        _draw_labels(ax, axis, columns, shown, what.replace("function", "value"))


def _draw_functions(
    ax: Axes, axis: ContinuousAxis, columns: Columns, shown: Sequence[int], n_grid: int, what: str
) -> None:
    """Draw one continuous mode; where coordinates have something for themselves, as dots beside the smooth line."""
    coordinates = axis.coordinates
    grid = np.linspace(coordinates[0], coordinates[-1], n_grid)
    between = np.setdiff1d(grid, coordinates)
    white = isinstance(axis.kernel, Sum) and any(isinstance(part, White) for part in axis.kernel.parts)
    dots = white and len(between) > 0
    grid = between if dots else np.union1d(grid, coordinates)
    mean, std = columns(axis.decode(grid))
    at = columns(axis.decode(coordinates))[0] if dots and len(coordinates) <= MAX_DOTS else None
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
    dress(ax, f"{axis.name}{' (days)' * isinstance(axis.distinct, pd.TimedeltaIndex)}", what)


def _draw_labels(ax: Axes, axis: CategoricalAxis, columns: Columns, shown: Sequence[int], what: str) -> None:
    """Draw one categorical mode, labels from top to bottom."""
    labels = axis.labels
    mean, std = columns(labels)
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
    dress(ax, what, str(axis.name))
    ax.tick_params(axis="y", length=0)


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
