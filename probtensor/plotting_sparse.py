"""Pictures of sparse codes: dictionaries, how their components are used, images before and after.

`probtensor.plotting` offers these functions beside its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probtensor.drawing import COLOURS, FAINT, INK, LABEL_SIZE, TICK_SIZE, bare, dress, new_panels, pyplot
from probtensor.metrics import psnr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_activations", "plot_dictionary", "plot_reconstruction"]

FloatArray = npt.NDArray[np.float64]

MAX_NUMBERED = 64  # tiles with words; more have no room for them
FINEST = 16  # a tile's shorter side is drawn with at least that many pixels,
GAP = 2  # so that gaps of that many stay narrow
MAX_POINTS = 2000  # for the number of active components


def plot_dictionary(
    components: npt.ArrayLike,
    shape: Sequence[int] | None = None,
    *,
    use: npt.ArrayLike | None = None,
    max_components: int = 256,
    same_scale: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw a dictionary as a mosaic, one tile a component.

    Colours are symmetric around zero: blue below, red above, white at zero. Where no number is negative, they run from
    dark blue at zero to yellow.

    Parameters
    ----------
    components : array (H, D) of float
        One component a row, as ``model.components_``.
    shape : two int, optional
        Height and width of a component, D pixels together. By default square, or one row where D is no square.
    use : array (H,) of float, optional
        How often each component is active. With it the tiles go by use, the most used first, and up to 64 tiles have
        their use above them in percent.
    max_components : int, default 256
        Only that many are drawn, the first or most used.
    same_scale : bool, default True
        One scale of colours for all. False divides every component by its largest magnitude, which shows the form of
        weak ones.
    ax : matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError
        If an argument is not as described.

    Examples
    --------
    >>> plot_dictionary(np.eye(4), (2, 2)).get_title(loc="left")
    '4 components'
    """
    tiles = np.asarray(components, dtype=np.float64)
    if tiles.ndim != 2 or tiles.size == 0 or not np.all(np.isfinite(tiles)):
        raise ValueError(f"components: expected finite numbers (H, D), got shape {tiles.shape}")
    height, width = _tile_shape(shape, tiles.shape[1])
    if max_components < 1:
        raise ValueError(f"max_components: expected at least 1, got {max_components}")
    n_all, often = len(tiles), None
    if use is not None:
        often = np.asarray(use, dtype=np.float64)
        if often.shape != (n_all,) or not np.all(np.isfinite(often)):
            raise ValueError(f"use: expected one finite number for each of {n_all} components, got {use!r}")
        order = np.argsort(-often, kind="stable")
        tiles, often = tiles[order], often[order]
    tiles = tiles[:max_components]
    if not same_scale:
        largest = np.abs(tiles).max(axis=1, keepdims=True)
        tiles = tiles / np.where(largest == 0.0, 1.0, largest)

    with_words = often is not None and len(tiles) <= MAX_NUMBERED
    columns = int(np.ceil(np.sqrt(len(tiles) * height / width)))
    fine = -(-FINEST // min(height, width))
    drawn = tiles.reshape(-1, height, width).repeat(fine, axis=1).repeat(fine, axis=2)
    above = round(max(0.35 * min(drawn.shape[1:]), 0.035 * columns * drawn.shape[2])) if with_words else GAP
    mosaic, corners = _mosaic(drawn, columns, above)
    if ax is None:
        inches = 5.0 / max(mosaic.shape)
        size = (max(inches * mosaic.shape[1], 2.2) + 1.1, max(inches * mosaic.shape[0], 1.8) + 0.4)
        ax = pyplot().subplots(figsize=size, layout="constrained")[1]
    assert ax is not None
    signed, largest_of_all = bool(tiles.min() < 0), float(np.abs(tiles).max()) or 1.0
    picture = ax.imshow(
        np.ma.masked_invalid(mosaic), cmap="RdBu_r" if signed else "cividis",
        vmin=-largest_of_all if signed else 0.0, vmax=largest_of_all, interpolation="nearest",
    )  # fmt: skip
    for k, (top, left) in enumerate(corners):
        where, (tall, wide) = (left - 0.5, top - 0.5), drawn.shape[1:]
        ax.add_patch(pyplot().Rectangle(where, wide, tall, fill=False, edgecolor=FAINT, linewidth=0.6))
        if with_words and often is not None:
            words = f"{100 * often[k]:.2g} %"
            ax.text(left + wide / 2, top - 1, words, ha="center", va="bottom", fontsize=8, color=INK)
    bar = ax.figure.colorbar(picture, ax=ax, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=TICK_SIZE, color=FAINT, labelcolor=INK)
    bar.set_label("weight" if same_scale else "weight / its largest", fontsize=LABEL_SIZE, color=INK)
    count = f"{n_all} component{'s' * (n_all > 1)}" if len(tiles) == n_all else f"{len(tiles)} of {n_all} components"
    bare(ax, count + ", most used first" * (often is not None))
    return ax


def plot_activations(
    inclusion: Any, *, prior: npt.ArrayLike | None = None, axes: Sequence[Axes] | npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Draw how often each component is active, and how many are active at once.

    Parameters
    ----------
    inclusion : array (N, H) of float, or fitted model
        Posterior probabilities that component h is active in point n; a model has them as ``inclusion_``.
    prior : float or array (H,) of float, optional
        Prior probabilities that a component is active: drawn as lines, to compare. By default the model's ``prior_``,
        if it has one.
    axes : two matplotlib Axes, optional
        Where to draw. By default a new figure.

    Returns
    -------
    array of two matplotlib Axes
        Bars of the mean probability of each component, the most used first, and the distribution of the number of
        active components of a point under independent probabilities, averaged over the points (up to 2000 of them).

    Raises
    ------
    ValueError
        If probabilities lie outside of [0, 1], or shapes do not fit.

    Examples
    --------
    >>> inclusion = np.random.default_rng(0).random((100, 5)) < 0.3
    >>> panels = plot_activations(inclusion.astype(float), prior=0.3)
    >>> len(panels)
    2
    """
    found = getattr(inclusion, "inclusion_", inclusion)
    chances = _probabilities("inclusion", found)
    if chances.ndim != 2 or chances.size == 0:
        raise ValueError(f"inclusion: expected probabilities (N, H), got shape {chances.shape}")
    H = chances.shape[1]
    prior = getattr(inclusion, "prior_", None) if prior is None else prior
    believed = None if prior is None else _probabilities("prior", prior)
    if believed is not None and believed.shape not in ((), (1,), (H,)):
        raise ValueError(f"prior: expected one number or {H}, got shape {believed.shape}")
    panels = new_panels(2, 4.5, 3.6) if axes is None else np.asarray(axes, dtype=object).ravel()
    if len(panels) != 2:
        raise ValueError(f"axes: expected two, got {len(panels)}")

    mean = chances.mean(axis=0)
    order, place = np.argsort(-mean, kind="stable"), np.arange(1, H + 1)
    panels[0].bar(place, mean[order], color=COLOURS[0], width=0.8 if H <= 60 else 1.0, label="posterior mean")
    numbers = _number_active(chances[:: -(-len(chances) // MAX_POINTS)]).mean(axis=0)
    # As far as either distribution reaches, and no further: of many components few are active at once.
    reach = np.flatnonzero(numbers > 1e-3).max()
    if believed is not None:
        of_each = np.broadcast_to(believed, (H,))
        panels[0].hlines(of_each[order], place - 0.5, place + 0.5, colors=COLOURS[1], lw=2.0, label="prior")
        before = _number_active(of_each[None])[0]
        reach = max(reach, np.flatnonzero(before > 1e-3).max())
        panels[1].plot(
            np.arange(reach + 1), before[: reach + 1], color=COLOURS[1], lw=2.0, marker="D", ms=5, label="prior"
        )
    panels[1].bar(np.arange(reach + 1), numbers[: reach + 1], color=COLOURS[0], width=0.8, label="posterior mean")
    for ax, x, y in (
        (panels[0], "components, most used first", "probability of being active"),
        (panels[1], "active components of a point", "share of points"),
    ):
        ax.locator_params(axis="x", integer=True)
        ax.set_ylim(bottom=0.0)
        dress(ax, x, y)
        if believed is not None:
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=TICK_SIZE)
    return panels


def plot_reconstruction(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    truth: npt.ArrayLike | None = None,
    *,
    peak: float = 255.0,
    axes: Sequence[Axes] | npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Draw an image before and after, and as it should be, on one scale of greys.

    Parameters
    ----------
    before : array (height, width) of float
        The noisy image; missing pixels (NaN) are drawn in orange.
    after : array (height, width) of float
        The restored image.
    truth : array (height, width) of float, optional
        The image as it should be. With it, titles tell the peak signal-to-noise ratio of both images.
    peak : float, default 255
        Largest value of a pixel, for the ratio.
    axes : sequence of matplotlib Axes, optional
        Two, or three with `truth`. By default a new figure.

    Returns
    -------
    array of matplotlib Axes

    Raises
    ------
    ValueError
        If an argument is not as described.

    Examples
    --------
    >>> image = np.full((8, 8), 100.0)
    >>> noisy = image + np.random.default_rng(0).normal(0.0, 10.0, size=(8, 8))
    >>> panels = plot_reconstruction(noisy, image, image)
    >>> len(panels)
    3
    """
    images = {"before": before, "after": after} | ({} if truth is None else {"truth": truth})
    pixels = {name: np.asarray(image, dtype=np.float64) for name, image in images.items()}
    for name, image in pixels.items():
        if image.ndim != 2 or image.size == 0 or image.shape != pixels["before"].shape:
            raise ValueError(
                f"{name}: expected a grey image (height, width) of one shape with before, got {image.shape}"
            )
        if np.isinf(image).any() or (name != "before" and np.isnan(image).any()):
            raise ValueError(f"{name}: expected finite pixels{', or NaN where missing' * (name == 'before')}")
    height, width = pixels["before"].shape
    tall = float(np.clip(3.6 * height / width, 1.2, 8.0)) + 0.4
    panels = new_panels(len(pixels), 3.6, tall) if axes is None else np.asarray(axes, dtype=object).ravel()
    if len(panels) != len(pixels):
        raise ValueError(f"axes: expected {len(pixels)}, got {len(panels)}")

    scale = pixels.get("truth", pixels["after"])
    greys = pyplot().get_cmap("gray").with_extremes(bad=COLOURS[4])
    for ax, (name, image) in zip(panels, pixels.items(), strict=True):
        ax.imshow(np.ma.masked_invalid(image), cmap=greys, vmin=scale.min(), vmax=scale.max(), interpolation="nearest")
        words, seen = [name], ~np.isnan(image)
        if not seen.all():
            words.append(f"{100 * np.mean(~seen):.0f} % missing")
        if truth is not None and name != "truth" and not np.array_equal(image[seen], pixels["truth"][seen]):
            words.append(f"{psnr(image[seen], pixels['truth'][seen], peak):.1f} dB")
        bare(ax, ", ".join(words))
    return panels


def _tile_shape(shape: Sequence[int] | None, size: int) -> tuple[int, int]:
    """Return height and width of a component of `size` pixels."""
    if shape is None:
        side = round(np.sqrt(size))
        return (side, side) if side * side == size else (1, size)
    sizes = [int(side) for side in shape]
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != size:
        raise ValueError(f"shape: expected height and width of {size} pixels together, got {shape!r}")
    return sizes[0], sizes[1]


def _mosaic(tiles: FloatArray, columns: int, above: int) -> tuple[FloatArray, list[tuple[int, int]]]:
    """Return tiles (n, height, width) row by row in one array, NaN between them, and where each begins.

    `above` pixels lie above each tile, and a narrow gap left of it.
    """
    n, height, width = tiles.shape
    rows = -(-n // columns)
    mosaic = np.full((rows * (height + above) + 1, columns * (width + GAP) + 1), np.nan)
    corners = [((k // columns) * (height + above) + above, (k % columns) * (width + GAP) + GAP) for k in range(n)]
    for tile, (top, left) in zip(tiles, corners, strict=True):
        mosaic[top : top + height, left : left + width] = tile
    return mosaic, corners


def _probabilities(argument: str, values: Any) -> FloatArray:
    """Return probabilities as float64, checked."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: expected probabilities, got {values!r}") from error
    if not np.all((found >= -1e-9) & (found <= 1 + 1e-9)):
        raise ValueError(f"{argument}: expected probabilities between 0 and 1, got others")
    return np.clip(found, 0.0, 1.0)


def _number_active(chances: FloatArray) -> FloatArray:
    """Return the distributions (n, H + 1) of the number of successes of H independent trials, of chances (n, H)."""
    n, H = chances.shape
    result = np.zeros((n, H + 1))
    result[:, 0] = 1.0
    for h in range(H):
        chance = chances[:, h : h + 1]
        result[:, 1:] = (1 - chance) * result[:, 1:] + chance * result[:, :-1]
        result[:, :1] *= 1 - chance
    return result
