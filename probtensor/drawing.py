"""The look that all pictures share: colours, lines, axes; matplotlib is imported on the first call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "FAINT", "INK", "LABEL_SIZE", "LINES", "TICK_SIZE", "bare", "dress", "new_panels", "pyplot"]

# Okabe and Ito (2008), ordered so that neighbours differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#222222", "#8A8A8A"
LABEL_SIZE, TICK_SIZE = 12, 10.5


def dress(ax: Axes, x: str, y: str) -> None:
    """Label both axes, without the frame's top and right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=TICK_SIZE, color=FAINT, labelcolor=INK)
    ax.set_xlabel(x, fontsize=LABEL_SIZE, color=INK)
    ax.set_ylabel(y, fontsize=LABEL_SIZE, color=INK)


def bare(ax: Axes, title: str = "") -> None:
    """Leave of an image's axes nothing but a title."""
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=LABEL_SIZE, color=INK, loc="left")


def new_panels(n: int, width: float, height: float) -> npt.NDArray[Any]:
    """Return the n axes of a new figure, at most four in a row, each of a size in inches."""
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = pyplot().figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = np.asarray(figure.subplots(rows, columns, squeeze=False), dtype=object).ravel()
    for spare in panels[n:]:
        spare.remove()
    return panels[:n]


def pyplot() -> Any:
    """Return matplotlib.pyplot, or say how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("matplotlib"):
            raise
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib", name="matplotlib") from error
    return plt
