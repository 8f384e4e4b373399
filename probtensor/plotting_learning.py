"""Pictures of a fit under way: the bound and the parameters; `probtensor.plotting` offers them beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probtensor.drawing import COLOURS, INK, LABEL_SIZE, dress, new_panels, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_bound", "plot_learning"]

MAX_LINES = 6  # of a parameter, each in its colour; more are drawn alike


def plot_bound(model: Any, *, ax: Axes | None = None) -> Axes:
    """Draw the bound over the iterations; the line breaks where it becomes the bound of another model.

    Parameters
    ----------
    model : fitted estimator or VariationalFit
        With ``bound_history_``, ``converged_`` and, where the bound changes its meaning, ``phase_starts_``; or what
        `fit_svi` returned.
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        If the history is empty.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> plot_bound(SimpleNamespace(bound_history_=[-9.0, -4.0, -3.5], converged_=True)).get_title(loc="left")
    '-3.5 after 3 iterations, converged'
    """
    fitted = hasattr(model, "bound_history_")  # else what `fit_svi` returned
    bound = np.asarray(model.bound_history_ if fitted else model.bound_history, dtype=np.float64)
    if bound.size == 0:
        raise ValueError("model: expected a bound_history_ with at least one value, got an empty one")
    ax = pyplot().subplots(figsize=(5.2, 3.6), layout="constrained")[1] if ax is None else ax
    iterations = np.arange(1, bound.size + 1)
    starts = list(getattr(model, "phase_starts_", (0,)))
    for first, end in zip(starts, [*starts[1:], bound.size], strict=True):
        part = slice(first, end)
        ax.plot(
            iterations[part],
            bound[part],
            color=COLOURS[0],
            linewidth=1.8,
            marker="o",
            markersize=4 if bound.size <= 40 or end - first == 1 else 0,
        )
    state = "converged" if (model.converged_ if fitted else model.converged) else "not converged"
    ax.set_title(f"{bound[-1]:,.1f} after {bound.size} iterations, {state}", fontsize=LABEL_SIZE, color=INK, loc="left")
    ax.locator_params(axis="x", integer=True)
    dress(ax, "iteration", "bound on the log evidence")
    return ax


def plot_learning(
    model: Any,
    *,
    truth: Mapping[str, npt.ArrayLike] | None = None,
    axes: Sequence[Axes] | npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Draw the bound and the parameters over the iterations, one panel each.

    Parameters
    ----------
    model : fitted estimator
        With what `plot_bound` needs and ``parameter_history_``: a dict from names to arrays (n_iter,) or (n_iter, K).
        One entry more than the bound has is the start. Larger arrays, as dictionaries, are left out.
    truth : dict of float or array (K,), optional
        Values to compare with, by name: dotted lines.
    axes : sequence of matplotlib Axes, optional
        One for the bound and one for each parameter that is drawn. By default a new figure.

    Returns
    -------
    array of matplotlib Axes

    Raises
    ------
    ValueError
        If there is no bound, a history is longer or shorter than it, or the number of axes differs.

    Examples
    --------
    >>> from probtensor.models import BSC
    >>> Y = np.kron(np.eye(2), np.ones((20, 3))) + 0.1 * np.random.default_rng(0).normal(size=(40, 6))
    >>> model = BSC(n_components=2, random_state=0, progress=False).fit(Y)
    >>> panels = plot_learning(model)
    >>> panels[0].get_ylabel()
    'bound on the log evidence'
    """
    n_iter, histories = len(model.bound_history_), {}
    for name, history in model.parameter_history_.items():
        values = np.asarray(history, dtype=np.float64)
        if not len(values) or len(values) - n_iter not in (0, 1):
            raise ValueError(f"model: expected the {n_iter} iterations of the bound for {name}, got {len(values)}")
        if values.ndim <= 2:
            histories[name] = values.reshape(len(values), -1)
    n = 1 + len(histories)
    panels = new_panels(n, 3.9, 3.4) if axes is None else np.asarray(axes, dtype=object).ravel()
    if len(panels) != n:
        raise ValueError(f"axes: expected {n}, for the bound and {list(histories)}, got {len(panels)}")
    plot_bound(model, ax=panels[0])
    for ax, (name, values) in zip(panels[1:], histories.items(), strict=True):
        x, many = np.arange(n_iter - len(values) + 1, n_iter + 1), values.shape[1] > MAX_LINES
        for k, line in enumerate(values.T):
            colour = COLOURS[0 if many else k]
            ax.plot(x, line, color=colour, linewidth=1.0 if many else 2.0, alpha=0.5 if many else 1.0)
        for k, right in enumerate(np.ravel((truth or {}).get(name, ()))):
            colour = INK if many or values.shape[1] == 1 else COLOURS[k % MAX_LINES]
            ax.axhline(right, color=colour, linewidth=1.2, linestyle=":")
        ax.locator_params(axis="x", integer=True)
        dress(ax, "iteration", name)
    return panels
