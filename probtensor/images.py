"""Images by their patches: take the noise out, fill the holes.

Every patch of an image (stride 1) is one row of data for a model of patches. Its mean over the observed pixels is
removed first and put back after, and a pixel of the result is the mean over all patches that hold it, but for those
without any observed pixel. Patches are cut and merged by strips of the image, so that no array holds all of them.

Images are grey: arrays (height, width), of any unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from probtensor.resources import RandomState, is_integer, make_generator

__all__ = ["denoise", "inpaint"]

FloatArray = npt.NDArray[np.float64]


class PatchModel(Protocol):
    """What `denoise` and `inpaint` ask of a model; rows (n, D) are patches without their mean, NaN where missing."""

    def fit(self, Y: FloatArray) -> Any:
        """Learn from the patches Y (n, D)."""

    def reconstruct(self, Y: FloatArray) -> npt.ArrayLike:
        """Return the posterior mean of every pixel without noise, (n, D), also where Y is missing."""


def denoise(
    image: npt.ArrayLike,
    estimator: PatchModel,
    patch_size: Sequence[int] = (8, 8),
    *,
    n_train: int = 20_000,
    weights: npt.ArrayLike | None = None,
    batch_size: int = 10_000,
    random_state: RandomState = None,
) -> FloatArray:
    """Learn a model of the patches of a noisy image, and put the image together from their reconstructions.

    Parameters
    ----------
    image : array (height, width) of float
        The noisy image, without missing pixels. It is not changed.
    estimator : object with ``fit(Y)`` and ``reconstruct(Y)``
        Model of patches Y (n, D), D pixels each, row after row of the patch. It is fitted in place, so that its
        dictionary can be looked at afterwards.
    patch_size : two int, default (8, 8)
        Height and width of a patch.
    n_train : int, default 20000
        Patches drawn for the fit, without replacement; all of them where the image has fewer. With 0 the estimator is
        used as it was fitted before.
    weights : array of float, shape `patch_size`, optional
        How much each pixel of a patch counts where patches overlap. By default all count the same.
    batch_size : int, default 10000
        About how many patches are reconstructed at once: bounds the memory.
    random_state : int, Generator, RandomState or None, default None
        Draws the patches for the fit.

    Returns
    -------
    array (height, width) of float64

    Raises
    ------
    ValueError
        If an argument is not as described, or a reconstruction has another shape or is not finite.

    Examples
    --------
    A model that explains every patch by its mean:

    >>> class Flat:
    ...     def fit(self, Y):
    ...         return self
    ...
    ...     def reconstruct(self, Y):
    ...         return np.zeros(Y.shape)
    >>> noisy = np.random.default_rng(0).normal(100.0, 10.0, size=(40, 40))
    >>> bool(denoise(noisy, Flat()).std() < 3.0)
    True
    """
    pixels = _grey(image)
    missing = np.count_nonzero(np.isnan(pixels))
    if missing:
        raise ValueError(f"image: expected no missing pixel, got {missing}; inpaint() fills them")
    return _restore(pixels, estimator, patch_size, n_train, weights, batch_size, random_state)


def inpaint(
    image: npt.ArrayLike,
    estimator: PatchModel,
    patch_size: Sequence[int] = (8, 8),
    *,
    n_train: int = 20_000,
    keep_observed: bool = True,
    weights: npt.ArrayLike | None = None,
    batch_size: int = 10_000,
    random_state: RandomState = None,
) -> FloatArray:
    """Fill the missing pixels of an image from a model that is learned from its own patches, holes and all.

    Parameters
    ----------
    image : array (height, width) of float
        NaN marks a missing pixel. It is not changed.
    estimator : object with ``fit(Y)`` and ``reconstruct(Y)``
        As for `denoise`; rows of Y hold NaN where pixels are missing.
    patch_size : two int, default (8, 8)
        Height and width of a patch. Every missing pixel must lie in a patch with an observed one.
    n_train : int, default 20000
        Patches drawn for the fit, among those with at least two observed pixels. With 0 the estimator is used as it was
        fitted before.
    keep_observed : bool, default True
        Return observed pixels as they are. False returns their reconstruction: less noise.
    weights, batch_size, random_state
        As for `denoise`.

    Returns
    -------
    array (height, width) of float64, without missing pixels

    Raises
    ------
    ValueError
        As `denoise`, and if a hole is wider than the patches.

    Examples
    --------
    >>> from probtensor.models import GSC
    >>> image = np.kron(np.eye(4), np.full((4, 4), 100.0))
    >>> holes = np.random.default_rng(0).random(image.shape) < 0.3
    >>> model = GSC(n_components=2, random_state=0, progress=False, max_iter=20, renewals=0)
    >>> filled = inpaint(np.where(holes, np.nan, image), model, (4, 4))
    >>> bool(np.isfinite(filled).all()), bool((filled[~holes] == image[~holes]).all())
    (True, True)
    """
    pixels = _grey(image)
    filled = _restore(pixels, estimator, patch_size, n_train, weights, batch_size, random_state)
    return np.where(np.isnan(pixels), filled, pixels) if keep_observed else filled


def _restore(
    pixels: FloatArray,
    estimator: PatchModel,
    patch_size: Sequence[int],
    n_train: int,
    weights: npt.ArrayLike | None,
    batch_size: int,
    random_state: RandomState,
) -> FloatArray:
    """Return the image (height, width) that merges the reconstructions of all patches with an observed pixel."""
    for method in ("fit", "reconstruct"):
        if not callable(getattr(estimator, method, None)):
            raise ValueError(f"estimator: expected an object with fit(Y) and reconstruct(Y), got {estimator!r}")
    height, width = _patch_size(patch_size, pixels.shape)
    window = _window(weights, (height, width))
    _check_count("n_train", n_train, 0)
    _check_count("batch_size", batch_size, 1)

    seen = (~np.isnan(pixels)).astype(np.float64)
    patches = sliding_window_view(pixels, (height, width))  # (rows, columns, height, width): a view
    rows, columns = patches.shape[:2]
    n_seen = _sums_of_patches(seen, (height, width))  # (rows, columns)
    reached = np.zeros(pixels.shape)
    _add_patches(reached, np.broadcast_to((n_seen > 0)[..., None, None], patches.shape), 0)
    if not reached.all():
        raise ValueError(
            f"patch_size: expected an observed pixel in some patch around each missing one, but {(height, width)} does "
            f"not reach into a hole of the image at {np.count_nonzero(reached == 0)} pixels; try larger patches"
        )
    if n_train:
        drawn = _draw(n_seen >= 2, n_train, random_state)
        if not len(drawn):
            raise ValueError("image: expected patches with at least two observed pixels to learn from, got none")
        estimator.fit(_centred(patches[np.unravel_index(drawn, (rows, columns))])[0])

    total, weight = np.zeros(pixels.shape), np.zeros(pixels.shape)
    strip = max(1, batch_size // columns)
    for first in range(0, rows, strip):
        there = n_seen[first : first + strip] > 0
        filled = np.zeros((*there.shape, height, width))
        filled[there] = _reconstructed(estimator, patches[first : first + strip][there])
        share = there[..., None, None] * window
        _add_patches(total, filled * share, first)
        _add_patches(weight, share, first)
    return total / weight


def _reconstructed(estimator: PatchModel, patches: FloatArray) -> FloatArray:
    """Return what the model makes of patches (n, height, width), their means put back; none may be all missing."""
    if not len(patches):
        return patches
    centred, means = _centred(patches)
    result = np.asarray(estimator.reconstruct(centred), dtype=np.float64)
    if result.shape != (len(patches), patches[0].size) or not np.all(np.isfinite(result)):
        raise ValueError(
            f"estimator: expected reconstruct(Y) to give finite numbers of the shape of Y, "
            f"{(len(patches), patches[0].size)}, got shape {result.shape} with "
            f"{np.count_nonzero(~np.isfinite(result))} numbers that are not"
        )
    return (result + means).reshape(patches.shape)


def _centred(patches: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return patches as rows (n, D) less their means over observed pixels, and these means (n, 1)."""
    flat = patches.reshape(len(patches), -1)
    means: FloatArray = np.nanmean(flat, axis=1, keepdims=True)
    return flat - means, means


def _draw(allowed: npt.NDArray[np.bool_], n_train: int, random_state: RandomState) -> npt.NDArray[np.intp]:
    """Return the flat numbers of at most `n_train` of the allowed patches, in the order of the image."""
    numbers = np.flatnonzero(allowed)
    drawn = torch.randperm(len(numbers), generator=make_generator(random_state))[:n_train].numpy()
    return np.sort(numbers[drawn])


def _sums_of_patches(image: FloatArray, patch_size: tuple[int, int]) -> FloatArray:
    """Return the sum over each patch, (height - patch height + 1, width - patch width + 1)."""
    sums = image
    for axis in (0, 1):
        sums = sliding_window_view(sums, patch_size[axis], axis=axis).sum(axis=-1)
    return sums


def _add_patches(image: FloatArray, patches: npt.NDArray[Any], first: int) -> None:
    """Add patches (rows, columns, height, width) to the image they were cut from; their first row starts at `first`."""
    rows, columns, height, width = patches.shape
    for i in range(height):
        for j in range(width):
            image[first + i : first + i + rows, j : j + columns] += patches[:, :, i, j]


def _grey(image: npt.ArrayLike) -> FloatArray:
    """Return the image as float64, checked."""
    pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.size == 0:
        raise ValueError(f"image: expected a grey image (height, width), got shape {pixels.shape}")
    try:
        pixels = pixels.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"image: expected numbers, got dtype {pixels.dtype}") from error
    if np.isinf(pixels).any():
        raise ValueError("image: expected finite numbers, or NaN for missing pixels, got infinity")
    return pixels


def _patch_size(patch_size: Sequence[int], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of a patch, checked against the image's shape."""
    sizes = np.asarray(patch_size)
    if sizes.shape != (2,) or sizes.dtype.kind not in "iu" or np.any(sizes < 1) or np.any(sizes > shape):
        raise ValueError(f"patch_size: expected two int from 1 to the image's {shape}, got {patch_size!r}")
    return int(sizes[0]), int(sizes[1])


def _window(weights: npt.ArrayLike | None, patch_size: tuple[int, int]) -> FloatArray:
    """Return the weights of a patch's pixels, checked."""
    window = np.ones(patch_size) if weights is None else np.asarray(weights, dtype=np.float64)
    if window.shape != patch_size or not (np.all(np.isfinite(window)) and np.all(window > 0)):
        raise ValueError(f"weights: expected positive numbers of shape {patch_size}, got {weights!r}")
    return window


def _check_count(argument: str, count: int, least: int) -> None:
    if not is_integer(count) or count < least:
        raise ValueError(f"{argument}: expected an int of at least {least}, got {count!r}")
