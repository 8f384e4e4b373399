"""Patches of images against scikit-learn's own, and what denoising and inpainting must leave alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d, reconstruct_from_patches_2d

from probtensor.images import denoise, inpaint
from probtensor.metrics import psnr

NAN = float("nan")


class Subspace:
    """Patches near a few directions: scikit-learn's PCA, holes explained by the observed pixels alone (ridge)."""

    def __init__(self, n_components=4):
        self.n_components = n_components

    def fit(self, Y):
        self.seen_ = Y.copy()
        self.pca_ = PCA(self.n_components, random_state=0).fit(np.nan_to_num(Y))
        return self

    def reconstruct(self, Y):
        W = self.pca_.components_.T
        rows = []
        for y in Y:
            seen = ~np.isnan(y)
            gram = W[seen].T @ W[seen] + 1e-3 * np.eye(W.shape[1])
            rows.append(W @ np.linalg.solve(gram, W[seen].T @ y[seen]))
        return np.array(rows)


class Returns:
    """A model that returns something of its choice, and remembers what it was given."""

    def __init__(self, what):
        self.what = what
        self.fitted, self.sizes = [], []

    def fit(self, Y):
        self.fitted.append(Y.copy())

    def reconstruct(self, Y):
        self.sizes.append(len(Y))
        return self.what(Y)


def same(Y):
    return Y


def zero(Y):
    return np.zeros(Y.shape)


@pytest.fixture
def picture():
    rows, columns = np.mgrid[0:24, 0:19]
    return 100 + 40 * np.sin(rows / 3.0) + 30 * (columns > 9)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("patch_size", [(8, 8), (1, 2), (3, 5), (24, 19), (1, 19)])
@pytest.mark.parametrize("batch_size", [1, 40, 10_000])
def test_patches_come_back_as_the_image(picture, patch_size, batch_size):
    model = Returns(same)
    restored = denoise(picture, model, patch_size, batch_size=batch_size)
    np.testing.assert_allclose(restored, picture, rtol=1e-12)
    rows, columns = 25 - patch_size[0], 20 - patch_size[1]
    assert sum(model.sizes) == rows * columns
    assert max(model.sizes) <= max(batch_size, columns)


def test_denoising_is_scikit_learns_patches_through_the_model(picture, rng):
    noisy = picture + 5 * rng.normal(size=picture.shape)
    patches = extract_patches_2d(noisy, (4, 6)).reshape(-1, 24)
    means = patches.mean(axis=1, keepdims=True)
    model = Subspace()
    expected = model.fit(patches - means).reconstruct(patches - means) + means
    expected = reconstruct_from_patches_2d(expected.reshape(-1, 4, 6), noisy.shape)
    mine = Subspace()
    np.testing.assert_allclose(denoise(noisy, mine, (4, 6), batch_size=50), expected, rtol=1e-10)
    np.testing.assert_allclose(mine.seen_, model.seen_)


def test_denoising_takes_noise_out(picture, rng):
    noisy = picture + 10 * rng.normal(size=picture.shape)
    before = noisy.copy()
    restored = denoise(noisy, Subspace(), random_state=0)
    assert psnr(restored, picture) > psnr(noisy, picture) + 5
    np.testing.assert_array_equal(noisy, before)
    assert restored.dtype == np.float64


def test_integer_images_and_read_only_images_are_taken_as_they_are(picture):
    image = picture.astype(np.uint8)
    image.setflags(write=False)
    np.testing.assert_allclose(denoise(image, Returns(same)), image)


def test_weights_say_how_much_a_pixel_of_a_patch_counts():
    image, weights = np.array([[1.0, 5.0, 9.0]]), np.array([[3.0, 1.0]])
    # Patches (1, 5) and (5, 9) become their means 3 and 7; the pixel between them is the second of one, the first of
    # the other.
    np.testing.assert_allclose(denoise(image, Returns(zero), (1, 2)), [[3.0, 5.0, 7.0]])
    np.testing.assert_allclose(denoise(image, Returns(zero), (1, 2), weights=weights), [[3.0, 6.0, 7.0]])


def test_the_fit_gets_some_patches_of_the_image_without_their_means(picture):
    model, every = Returns(same), Returns(same)
    denoise(picture, model, (3, 3), n_train=30, random_state=1)
    denoise(picture, every, (3, 3))
    (drawn,), (patches,) = model.fitted, every.fitted
    assert drawn.shape == (30, 9)
    assert patches.shape == (22 * 17, 9)
    np.testing.assert_allclose(drawn.mean(axis=1), 0.0, atol=1e-10)
    again = Returns(same)
    denoise(picture, again, (3, 3), n_train=30, random_state=1)
    np.testing.assert_array_equal(again.fitted[0], drawn)
    other = Returns(same)
    denoise(picture, other, (3, 3), n_train=30, random_state=2)
    assert not np.array_equal(other.fitted[0], drawn)


def test_patches_are_drawn_once_each(rng):
    image, model = rng.normal(size=(10, 10)), Returns(same)
    denoise(image, model, (2, 2), n_train=80, random_state=0)
    assert len(np.unique(model.fitted[0], axis=0)) == 80


def test_an_estimator_that_was_fitted_before_is_used_as_it_is(picture):
    model = Subspace()
    denoise(picture, model)
    learned = model.pca_
    denoise(picture, model, n_train=0)
    assert model.pca_ is learned


def test_inpainting_fills_holes_and_keeps_what_was_observed(picture, rng):
    holes = picture.copy()
    missing = rng.random(picture.shape) < 0.4
    holes[missing] = NAN
    before = holes.copy()
    filled = inpaint(holes, Subspace(), (6, 6), random_state=0)
    np.testing.assert_array_equal(holes, before)
    np.testing.assert_array_equal(filled[~missing], picture[~missing])
    flat = np.where(missing, np.nanmean(holes), picture)
    assert psnr(filled, picture) > psnr(flat, picture) + 6


def test_observed_pixels_can_be_reconstructed_too(picture):
    holes = picture.copy()
    holes[3, 4] = NAN
    both = [inpaint(holes, Returns(zero), (3, 3), keep_observed=keep) for keep in (True, False)]
    assert both[0][10, 10] == picture[10, 10] != both[1][10, 10]
    assert both[0][3, 4] == both[1][3, 4]


def test_means_are_of_observed_pixels_and_patches_without_any_count_for_nothing():
    image, model = np.array([[1.0, NAN, NAN, NAN, 7.0, 9.0]]), Returns(zero)
    with pytest.raises(ValueError, match="does not reach into a hole of the image at 1 pixels"):
        inpaint(image, model, (1, 2))
    assert not model.fitted
    filled = inpaint(image, model, (1, 3))
    np.testing.assert_allclose(filled, [[1.0, 1.0, (1 + 7) / 2, (7 + 8) / 2, 7.0, 9.0]])
    assert sum(model.sizes) == 3
    assert model.fitted[0].shape == (1, 3)
    np.testing.assert_array_equal(model.fitted[0], [[NAN, -1.0, 1.0]])


def test_patches_without_an_observed_pixel_never_reach_the_model(picture):
    image, model = np.array([[1.0, 2.0, NAN, NAN, 7.0, 9.0]]), Returns(zero)
    np.testing.assert_allclose(inpaint(image, model, (1, 2)), [[1.0, 2.0, 2.0, 7.0, 7.0, 9.0]])
    assert sum(model.sizes) == 4


def test_without_holes_inpainting_is_denoising(picture):
    np.testing.assert_array_equal(
        inpaint(picture, Subspace(), random_state=0, keep_observed=False), denoise(picture, Subspace(), random_state=0)
    )


def test_memory_stays_far_below_that_of_all_patches():
    image = np.random.default_rng(0).normal(size=(200, 200))
    all_patches = 193 * 193 * 64 * 8
    tracemalloc.start()
    denoise(image, Returns(zero), n_train=500, batch_size=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3 * all_patches


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": np.zeros((9, 9, 3))}, r"image: expected a grey image \(height, width\), got shape \(9, 9, 3\)"),
        ({"image": np.zeros((0, 9))}, "image: expected a grey image"),
        ({"image": np.full((9, 9), np.inf)}, "image: expected finite numbers"),
        ({"image": np.full((9, 9), "a")}, "image: expected numbers, got dtype"),
        ({"patch_size": (10, 2)}, r"patch_size: expected two int from 1 to the image's \(9, 9\), got \(10, 2\)"),
        ({"patch_size": (0, 2)}, "patch_size: expected two int"),
        ({"patch_size": (2.5, 2)}, "patch_size: expected two int"),
        ({"patch_size": 3}, "patch_size: expected two int"),
        ({"estimator": object()}, r"estimator: expected an object with fit\(Y\) and reconstruct\(Y\)"),
        ({"estimator": Returns(lambda Y: Y[:, :1])}, r"estimator: expected reconstruct\(Y\) to give finite numbers"),
        ({"estimator": Returns(lambda Y: Y * NAN)}, "estimator: expected .* 128 numbers that are not"),
        ({"n_train": -1}, "n_train: expected an int of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected an int of at least 1, got 0"),
        ({"weights": np.zeros((8, 8))}, r"weights: expected positive numbers of shape \(8, 8\)"),
        ({"weights": np.ones((2, 2))}, r"weights: expected positive numbers of shape \(8, 8\)"),
        ({"random_state": "x"}, "random_state: expected None, an integer"),
    ],
)
@pytest.mark.parametrize("function", [denoise, inpaint])
def test_bad_input_is_named(function, arguments, words):
    with pytest.raises(ValueError, match=words):
        function(**{"image": np.eye(9), "estimator": Returns(same), "batch_size": 3} | arguments)


def test_denoising_refuses_holes_and_inpainting_an_image_of_holes():
    image = np.array([[1.0, NAN], [2.0, 3.0]])
    with pytest.raises(ValueError, match=r"image: expected no missing pixel, got 1; inpaint\(\) fills them"):
        denoise(image, Returns(same), (1, 1))
    with pytest.raises(ValueError, match="patch_size: expected an observed pixel"):
        inpaint(np.full((4, 4), NAN), Returns(same), (2, 2))
    with pytest.raises(ValueError, match="image: expected patches with at least two observed pixels"):
        inpaint(np.array([[NAN, 1.0]]), Returns(same), (1, 2))
