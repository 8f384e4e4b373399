"""Pictures of completion: the entities that matter, and how members of ensembles learned.

`probtensor.plotting` offers these functions beside its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probtensor.drawing import COLOURS, INK, LABEL_SIZE, TICK_SIZE, dress, new_panels, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_entity_importance", "plot_validation"]

LONGEST = 24  # characters of a label that are shown


def plot_entity_importance(
    model: Any,
    modes: Sequence[str] | None = None,
    *,
    max_labels: int = 12,
    axes: Sequence[Axes] | npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Draw the labels that matter most, a panel a mode, the largest share at the top.

    Parameters
    ----------
    model : fitted estimator
        With ``entity_importance_``, as `DAIN`: a dict from modes to Series of shares by label.
    modes : sequence of str, optional
        Modes to draw. By default all of them.
    max_labels : int, default 12
        Labels of each mode that are shown at most; the title says how many there are, and a line marks the share that
        each label would have if all had the same.
    axes : sequence of matplotlib Axes, optional
        One for each mode. By default a new figure.

    Returns
    -------
    array of matplotlib Axes, one for each mode

    Raises
    ------
    ValueError
        If a mode is unknown, `max_labels` is below 1, or the number of axes differs from that of the modes.

    Examples
    --------
    >>> import pandas as pd
    >>> from types import SimpleNamespace
    >>> shares = pd.Series([0.5, 0.3, 0.2], index=["ann", "bob", "cid"])
    >>> panels = plot_entity_importance(SimpleNamespace(entity_importance_={"user": shares}))
    >>> [label.get_text() for label in panels[0].get_yticklabels()]
    ['ann', 'bob', 'cid']
    """
    known = list(model.entity_importance_)
    chosen = known if modes is None else list(modes)
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(f"modes: expected names among {known}, got {chosen}")
    if max_labels < 1:
        raise ValueError(f"max_labels: expected at least 1, got {max_labels}")
    panels = new_panels(len(chosen), 4.2, 3.8) if axes is None else np.asarray(axes, dtype=object).ravel()
    if len(panels) != len(chosen):
        raise ValueError(f"axes: expected one for each of the modes {chosen}, got {len(panels)}")
    for ax, name in zip(panels, chosen, strict=True):
        shares = model.entity_importance_[name].sort_values(ascending=False, kind="stable")
        seen = int((shares > 0).sum())
        shown = shares.head(min(max_labels, max(seen, 1)))
        at = np.arange(len(shown))
        ax.barh(at, 100 * shown.to_numpy(), color=COLOURS[0], height=0.72)
        ax.axvline(100 / max(seen, 1), color=INK, linewidth=1.2, linestyle=":")
        ax.set_yticks(at, [_short(label) for label in shown.index])
        ax.set_ylim(len(shown) - 0.4, -0.6)
        dress(ax, "share of the importance, %", "")
        ax.tick_params(axis="y", length=0)
        which = f"{len(shown)} of {len(shares)}" if len(shown) < len(shares) else f"{len(shares)}"
        ax.set_title(f"{name}: {which} labels", fontsize=LABEL_SIZE, color=INK, loc="left")
    return panels


def plot_validation(model: Any, *, ax: Axes | None = None) -> Axes:
    """Draw the error of each candidate's members on rows that they were not trained on, epoch by epoch.

    Members are thin lines, their mean is a thick one, and dots mark the epochs whose parameters were kept.

    Parameters
    ----------
    model : fitted estimator
        With ``validation_rmse_``, a dict from candidates to arrays (epochs + 1, n_members), and ``best_epochs_``, as
        `NeuralTensorCompletion`.
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        If no candidate was trained in epochs.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> errors = {"network": np.array([[1.0, 1.1], [0.7, 0.8], [0.75, 0.7]])}
    >>> ax = plot_validation(SimpleNamespace(validation_rmse_=errors, best_epochs_={"network": np.array([1, 2])}))
    >>> len(ax.lines) > 0
    True
    """
    if not model.validation_rmse_:
        raise ValueError("model: expected a network or factors, which are trained in epochs; got neither")
    if ax is None:
        ax = pyplot().figure(figsize=(8.4, 4.0), layout="constrained").add_subplot()
    for number, (name, curves) in enumerate(model.validation_rmse_.items()):
        colour, epochs = COLOURS[number % len(COLOURS)], np.arange(len(curves))
        line = "-" if number < len(COLOURS) else "--"
        ax.plot(epochs, curves, color=colour, linewidth=0.6, alpha=0.45)
        ax.plot(epochs, curves.mean(axis=1), color=colour, linewidth=2.0, linestyle=line, label=name)
        best = np.asarray(model.best_epochs_[name])
        ax.plot(best, curves[best, np.arange(len(best))], "o", color=colour, markersize=3.5)
    ax.locator_params(axis="x", integer=True)
    dress(ax, "epoch", "RMSE on rows held out")
    # Beside the lines: there may be nine of them and more, which leave no room between.
    ax.legend(fontsize=TICK_SIZE, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def _short(label: object) -> str:
    text = str(label)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
