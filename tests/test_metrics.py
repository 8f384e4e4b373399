"""Scores against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from probtensor.metrics import (
    calibration_curve,
    coverage,
    crps_gaussian,
    expected_calibration_error,
    factor_match_score,
    psnr,
    relative_error,
    reliability_curve,
    rmse,
)
from probtensor.predictive import NormalMixture

NAN = float("nan")


def test_relative_error_uses_observed_cells_only_in_numerator_and_denominator():
    assert relative_error([3.0, 4.0, NAN], [3.0, 0.0, 1e3]) == 0.8
    assert relative_error([3.0, 4.0, 7.0], [3.0, 0.0, 1e3], mask=[True, True, False]) == 0.8


@pytest.mark.parametrize("stored", [0.0, 30.0, 1e6, NAN, math.inf])
def test_scores_do_not_depend_on_what_is_stored_in_a_masked_cell(stored):
    y, mask = np.array([[1.0, 2.0], [3.0, stored]]), np.array([[True, True], [True, False]])
    mean = np.array([[1.5, 2.0], [2.0, -7.0]])
    assert rmse(y, mean, mask=mask) == pytest.approx(math.sqrt((0.25 + 1.0) / 3))
    assert coverage(y, mean - 0.6, mean + 0.6, mask=mask) == pytest.approx(2 / 3)


def test_masked_cells_may_have_predictions_that_are_not_finite():
    assert rmse([1.0, NAN], [2.0, NAN]) == 1.0


def test_coverage_counts_the_ends():
    assert coverage([0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, math.inf]) == 0.75


def test_crps_equals_the_integral_of_its_definition():
    rng = np.random.default_rng(0)
    y, mean, std = rng.normal(size=5), rng.normal(size=5), rng.uniform(0.2, 2.0, size=5)
    grid = np.linspace(-30.0, 30.0, 600_001)
    step = grid[1] - grid[0]
    scores = []
    for value, centre, scale in zip(y, mean, std, strict=True):
        cdf = 0.5 * (1.0 + np.vectorize(math.erf)((grid[::100] - centre) / scale / math.sqrt(2.0)))
        cdf = np.interp(grid, grid[::100], cdf)
        scores.append(np.sum((cdf - (grid >= value)) ** 2) * step)
    assert crps_gaussian(y, mean, std) == pytest.approx(np.mean(scores), abs=2e-4)


def test_crps_of_a_certain_prediction_is_the_absolute_error():
    assert crps_gaussian([3.0, 0.0], [1.0, 0.0], [0.0, 1.0]) == pytest.approx((2.0 + 0.2336949772551091) / 2)


def random_factors(rank: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=(n, rank)) for n in (7, 5, 6)]


def test_factor_match_score_finds_the_permutation_whatever_signs_and_scales():
    a = random_factors()
    order = [3, 1, 2, 0]
    signs = (-1.0, 1.0, -1.0)
    scales = (1e-150, 1.0, 1e150)
    b = [sign * scale * f[:, order] for sign, scale, f in zip(signs, scales, a, strict=True)]
    score, permutation = factor_match_score(a, b)
    assert score == pytest.approx(1.0, abs=1e-14)
    assert permutation.tolist() == order


def test_permutation_lines_the_second_model_up_with_the_first():
    a = random_factors()
    b = [f[:, [2, 0, 3, 1]] for f in a]
    _, permutation = factor_match_score(a, b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right[:, permutation])


def test_factor_match_score_of_unlike_models_is_the_mean_product_of_cosines():
    a = [np.array([[1.0], [0.0]]), np.array([[1.0], [1.0]])]
    b = [np.array([[1.0], [1.0]]), np.array([[0.0], [2.0]])]
    score, permutation = factor_match_score(a, b)
    assert score == pytest.approx(0.5)
    assert permutation.tolist() == [0]


def test_a_null_component_matches_a_null_component_only():
    a = random_factors(rank=3)
    a[1][:, 0] = 0.0
    score, permutation = factor_match_score(a, [f[:, [1, 2, 0]] for f in a])
    assert score == pytest.approx(1.0)
    assert permutation.tolist() == [2, 0, 1]
    whole = random_factors(rank=3)
    assert factor_match_score(a, whole)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rmse([1.0, 2.0], [1.0]), r"mean: expected the shape of y, \(2,\), got \(1,\)"),
        (lambda: rmse([NAN], [1.0]), "at least one observed cell"),
        (lambda: rmse([math.inf], [1.0]), "y: expected finite"),
        (lambda: rmse([1.0], [NAN]), "mean: expected finite"),
        (lambda: rmse([1.0], [1.0], mask=[1]), "mask: expected bool"),
        (lambda: relative_error([0.0], [1.0]), "got zeros only"),
        (lambda: coverage([1.0], [2.0], [1.0]), "lower: expected at most upper, got more at 1 of 1"),
        (lambda: crps_gaussian([1.0], [1.0], [-0.5]), "std: expected at least 0"),
        (lambda: factor_match_score([], []), "factors_a: expected matrices"),
        (lambda: factor_match_score([np.ones((2, 2))], [np.ones((2, 3))]), "factors_b: expected the shapes"),
        (lambda: factor_match_score([np.ones(2)], [np.ones(2)]), r"factors_a\[0\]: expected a matrix"),
        (lambda: factor_match_score([np.ones((1, 1))], [np.full((1, 1), NAN)]), r"factors_b\[0\]: expected finite"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_calibration_curve_counts_what_lies_inside_each_interval() -> None:
    y = np.random.default_rng(0).normal(size=500)
    y[7] = np.nan
    wide = NormalMixture(np.zeros(500), np.full((500, 1), 2.0), np.ones(1))
    levels, inside = calibration_curve(y, wide, [0.3, 0.6827])
    seen = y[~np.isnan(y)]
    half = 2.0 * stats.norm.ppf(0.5 + levels / 2)
    np.testing.assert_allclose(inside, [(np.abs(seen) <= h).mean() for h in half], rtol=1e-12)
    assert len(calibration_curve(y, wide)[0]) == 19
    with pytest.raises(ValueError, match="levels: expected probabilities between 0 and 1"):
        calibration_curve(y, wide, [0.0])


def test_psnr_follows_its_definition_and_leaves_unknown_pixels_out():
    truth = np.array([[0.0, 100.0], [200.0, NAN]])
    image = truth + np.array([[3.0, -4.0], [5.0, 0.0]])
    assert psnr(image, truth) == pytest.approx(10 * math.log10(255**2 / (50 / 3)))
    assert psnr(image / 255, truth / 255, peak=1.0) == pytest.approx(psnr(image, truth))
    assert psnr(truth, truth) == math.inf
    # Integers do not wrap around.
    assert psnr(np.array([0], dtype=np.uint8), np.array([255], dtype=np.uint8)) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0], [1.0, 2.0]), r"image: expected the shape of truth, \(2,\), got \(1,\)"),
        (([1.0], [NAN]), "truth: expected at least one known pixel, got none among 1"),
        (([NAN], [1.0]), "image: expected finite numbers"),
        (([1.0], [1.0], 0.0), "peak: expected a positive number, got 0.0"),
        (([1.0], [1.0], NAN), "peak: expected a positive number"),
    ],
)
def test_psnr_names_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        psnr(*arguments)


def test_calibration_error_of_classes_by_hand():
    p = np.array([[0.5, 0.5, 0.0], [0.55, 0.25, 0.2], [0.1, 0.9, 0.0], [0.05, 0.95, 0.0], [0.0, 0.0, 1.0]])
    labels = [1, 0, 1, 0, 2]  # wrong (the first of equals counts), right, right, wrong, right
    confidence, accuracy, count = reliability_curve(labels, p, n_bins=5)
    np.testing.assert_allclose(confidence, [(0.5 + 0.55) / 2, (0.9 + 0.95 + 1.0) / 3])
    np.testing.assert_allclose(accuracy, [1 / 2, 2 / 3])
    assert count.tolist() == [2, 3]
    expected = (2 * abs(0.525 - 0.5) + 3 * abs(0.95 - 2 / 3)) / 5
    assert expected_calibration_error(labels, p, n_bins=5) == pytest.approx(expected)
    assert expected_calibration_error([0, 1], np.eye(2)) == 0.0
    assert expected_calibration_error([1, 0], np.eye(2)) == 1.0


@pytest.mark.parametrize(
    ("labels", "p", "n_bins", "message"),
    [
        ([0, 1], [[0.5, 0.5]], 5, r"labels: expected shape \(n,\)"),
        ([], np.zeros((0, 2)), 5, r"labels: expected shape \(n,\)"),
        ([2], [[0.5, 0.5]], 5, "labels: expected integers from 0 to 1"),
        ([0.0], [[0.5, 0.5]], 5, "labels: expected integers from 0 to 1"),
        ([0], [[0.5, 0.6]], 5, "probabilities: expected numbers of at least 0 that sum to 1"),
        ([0], [[0.5, NAN]], 5, "probabilities: expected numbers of at least 0 that sum to 1"),
        ([0], [[0.5, 0.5]], 0, "n_bins: expected at least 1, got 0"),
    ],
)
def test_malformed_classes_are_refused(labels, p, n_bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(labels, p, n_bins)
