"""A picture of how a rank was chosen.

`probtensor.plotting` offers this function beside its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probtensor.drawing import COLOURS, INK, LABEL_SIZE, dress, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from probtensor.rank_choice import RankChoice

__all__ = ["plot_rank_choice"]


def plot_rank_choice(choice: RankChoice, *, ax: Axes | None = None) -> Axes:
    """Draw what each rank reached: the error on held-out cells with its standard error, or the bound.

    The chosen rank has a filled dot.

    Parameters
    ----------
    choice : RankChoice
        As `probtensor.rank_choice.choose_rank` returns it.
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes

    Examples
    --------
    >>> from probtensor.baselines import MaskedTucker
    >>> from probtensor.rank_choice import choose_rank
    >>> X = np.argwhere(np.ones((6, 5)))
    >>> y = np.cos(X[:, 0]) * np.sin(X[:, 1])
    >>> choice = choose_rank(MaskedTucker(tol=1e-5, random_state=0), X, y, [1, 2], folds=3, random_state=0)
    >>> ax = plot_rank_choice(choice)
    >>> ax.get_xlabel()
    'rank'
    """
    ax = pyplot().subplots(figsize=(5.2, 3.6), layout="constrained")[1] if ax is None else ax
    ranks, held_out = list(choice.table["rank"]), "rmse" in choice.table
    reached = choice.table["rmse" if held_out else "bound"].to_numpy()
    error = choice.table["standard_error"].to_numpy() if held_out else None
    at, chosen = np.arange(len(ranks)), ranks.index(choice.rank)
    ax.errorbar(
        at, reached, error, color=COLOURS[0], linewidth=1.8, elinewidth=1.2, marker="o", markerfacecolor="white"
    )
    ax.plot(at[chosen], reached[chosen], "o", color=COLOURS[0], markersize=8, zorder=3)
    labels = [_words(rank) for rank in ranks]
    ax.set_xticks(at, labels, rotation=30 if max(map(len, labels)) > 4 else 0)
    ax.set_title(f"rank {_words(choice.rank)} chosen", fontsize=LABEL_SIZE, color=INK, loc="left")
    dress(ax, "rank", "RMSE on cells held out" if held_out else "bound on the log evidence")
    return ax


def _words(rank: object) -> str:
    return "×".join(str(number) for number in np.atleast_1d(np.asarray(rank)))
