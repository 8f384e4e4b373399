"""New values around noise-free entries: moments, quantiles and draws of one law; cells share their residual."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from probtensor.calibration import ScaleMixture, inflated
from probtensor.models.observation import Observation, SeenCells
from tests.reference import F64, f64

POSITIONS = torch.tensor([[0, 0], [0, 1], [5, 5], [5, 5]])
MEAN = torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=F64)
VARIANCE = torch.tensor([0.3, 0.2, 0.1, 0.1], dtype=F64)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


SEEN = SeenCells(
    torch.tensor([[0, 1], [0, 0]]),
    value=vector(-1.0, 3.0),
    shrink=vector(0.9, 0.5),
    left=vector(0.02, 0.1),
    shape=vector(4.0, 2.5),
    rate=vector(3.0, 3.5),
    n_rows=vector(4.0, 1.0),
    weight=vector(4.0, 1.0),
    scatter=vector(0.1, 0.0),
    log_weight=vector(0.0, 0.0),
)
TWO = (
    ScaleMixture(2.0, vector(0.5, 1.0, 3.0), vector(0.3, 0.5, 0.2)),
    ScaleMixture(1.0, vector(0.7, 1.5), vector(0.6, 0.4)),
)
PLAIN = Observation(0.4, 0.6, 5.0, SEEN)
CASES = {
    "student": PLAIN,
    "gaussian": Observation(0.4, 0.6, float("inf"), SEEN._replace(shape=vector(1.0, 1.0), rate=vector(1.0, 1.0))),
    "no cells": Observation(0.4, 0.0, 5.0, None),
    "calibrated": replace(PLAIN, calibration=TWO),
    "calibrated together": replace(PLAIN, calibration=TWO[:1]),
}


def draws(observation: Observation, n: int = 60_000) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    f = MEAN + VARIANCE.sqrt() * torch.randn(n, 4, generator=generator, dtype=F64)
    positions = None if observation.seen is None else POSITIONS
    return observation.draw(f, MEAN, VARIANCE, positions, list(POSITIONS.T.double()), generator).numpy()


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_quantiles_of_the_predictive_distribution(case: str) -> None:
    observation = CASES[case]
    predictive = observation.predictive(MEAN, VARIANCE, None if observation.seen is None else POSITIONS)
    y = draws(observation)
    for p in (0.05, 0.25, 0.5, 0.8, 0.95):
        share = (y <= predictive.quantile(p)).mean(axis=0)
        np.testing.assert_allclose(share, p, atol=4.5 * np.sqrt(p * (1 - p) / len(y)) + 0.003)


def test_of_a_cell_seen_part_of_the_residual_recurs() -> None:
    mean = PLAIN.predictive(MEAN, VARIANCE, POSITIONS).mean
    np.testing.assert_allclose(mean, [1.0 + 0.5 * 2.0, -2.0 + 0.9 * 1.0, 0.5, 0.5], rtol=1e-12)


def test_gaussian_tails_are_one_normal() -> None:
    observation = CASES["gaussian"]
    predictive = observation.predictive(MEAN, VARIANCE, POSITIONS)
    expected = [0.25 * 0.3 + 0.1 + 0.4, 0.01 * 0.2 + 0.02 + 0.4, 0.1 + 1.0, 0.1 + 1.0]
    np.testing.assert_allclose(predictive.std**2, expected, rtol=1e-12)


@pytest.mark.parametrize("case", ["student", "gaussian", "calibrated"])
def test_rows_of_one_new_cell_share_its_residual(case: str) -> None:
    y = draws(CASES[case])
    correlation = np.corrcoef(np.clip(y, -3, 4), rowvar=False)
    assert 0.4 < correlation[2, 3] < 0.8  # 0.6 of the residual's variance is the cell's
    assert abs(correlation[0, 2]) < 0.02
    assert not np.array_equal(y[:, 2], y[:, 3])


def test_a_row_without_variance_is_where_its_mean_is() -> None:
    observation = Observation(1e-30, 0.0, float("inf"), None)
    predictive = observation.predictive(f64([2.0]), f64([0.0]), None)
    np.testing.assert_allclose(predictive.quantile(0.9), 2.0, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_moments_of_the_predictive_distribution(case: str) -> None:
    observation = CASES[case]
    predictive = observation.predictive(MEAN, VARIANCE, None if observation.seen is None else POSITIONS)
    y = draws(observation, 200_000)
    np.testing.assert_allclose(y.mean(axis=0), predictive.mean, atol=4.5 * predictive.std.max() / len(y) ** 0.5)
    np.testing.assert_allclose(y.std(axis=0), predictive.std, rtol=0.03)  # five degrees of freedom: heavy, but finite


def mixture_std(mixture: ScaleMixture, latent: float, noise: float) -> float:
    """Sum of the components' variances, one after the other."""
    pairs = zip(mixture.scales.tolist(), mixture.weights.tolist(), strict=True)
    grown = float(inflated(np.array(latent), mixture.inflation))
    return sum(w * c**2 * (grown + noise) for c, w in pairs) ** 0.5


def test_calibrated_rows_have_the_mixture_of_their_kind() -> None:
    observation = CASES["calibrated"]
    predictive = observation.predictive(MEAN, VARIANCE, POSITIONS)
    new, known = TWO
    # By hand: seen cells keep (1 - shrink)^2 of the variance, and have the mean weight of their gamma posterior.
    expected = [
        mixture_std(known, 0.25 * 0.3, (0.1 + 0.4) * 3.5 / 2.5),
        mixture_std(known, 0.01 * 0.2, (0.02 + 0.4) * 3.0 / 4.0),
        mixture_std(new, 0.1, 0.6 + 0.4),
        mixture_std(new, 0.1, 0.6 + 0.4),
    ]
    np.testing.assert_allclose(predictive.std, expected, rtol=1e-12)
    together = CASES["calibrated together"].predictive(MEAN, VARIANCE, POSITIONS)
    np.testing.assert_allclose(together.std[2:], expected[2:], rtol=1e-12)
    np.testing.assert_allclose(together.std[1], mixture_std(new, 0.01 * 0.2, 0.42 * 0.75), rtol=1e-12)


def test_a_new_cell_is_a_student_t_around_the_variance_of_f() -> None:
    observation = Observation(0.4, 0.6, 5.0, None)
    predictive = observation.predictive(MEAN[:1], VARIANCE[:1] * 0, None)
    t = stats.t(5, loc=1.0, scale=1.0)  # 0.4 + 0.6
    for p in (0.01, 0.2, 0.5, 0.9, 0.99):
        assert float(predictive.quantile(p)[0]) == pytest.approx(t.ppf(p), abs=2e-3)
    assert float(predictive.log_prob(np.array([3.0]))[0]) == pytest.approx(t.logpdf(3.0), abs=2e-3)


def test_a_seen_cell_is_its_gamma_posterior_by_quadrature() -> None:
    predictive = PLAIN.predictive(MEAN, VARIANCE, POSITIONS)
    location, latent, noise = 1.0 + 0.5 * 2.0, 0.25 * 0.3, 0.1 + 0.4
    w = np.linspace(1e-6, 12.0, 400_001)
    density = stats.gamma.pdf(w, 2.5, scale=1 / 3.5)
    for y in (-1.0, 1.5, 2.0, 6.0):
        below = stats.norm.cdf(y, location, np.sqrt(latent + noise / w))
        expected = integrate.trapezoid(below * density, w)
        assert float(predictive.cdf(y)[0]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("calibrated", [False, True])
def test_rows_of_one_cell_have_the_covariance_of_what_they_share(calibrated: bool) -> None:
    seen = CASES["gaussian"].seen
    mixture = ScaleMixture(2.0, vector(1.0), vector(1.0))
    observation = replace(CASES["gaussian"], calibration=(mixture,) if calibrated else ())
    positions = torch.tensor([[0, 0], [0, 0], [5, 5], [5, 5], [6, 5]])
    mean, variance = vector(1.0, 1.0, 0.5, 0.5, 0.2), vector(0.3, 0.3, 0.1, 0.1, 0.1)
    generator = torch.Generator().manual_seed(1)
    cell = torch.tensor([0, 0, 1, 1, 2])
    f = mean + (variance.sqrt() * torch.randn(120_000, 3, generator=generator, dtype=F64)[:, cell])
    y = observation.draw(f, mean, variance, positions, list(positions.T.double()), generator).numpy()
    latent = np.array([0.25 * 0.3, 0.25 * 0.3, 0.1, 0.1, 0.1])  # of f, which the rows of a cell share too
    latent = inflated(latent, 2.0) if calibrated else latent
    shared = latent + np.array([0.1, 0.1, 0.6, 0.6, 0.6])
    expected = np.where(cell[:, None] == cell, shared[:, None], 0.0) + 0.4 * np.eye(5)
    np.testing.assert_allclose(np.cov(y, rowvar=False), expected, atol=0.02)
    assert float(seen.left[1]) == 0.1


def test_rows_of_one_cell_share_their_weight() -> None:
    # Dof 3, almost no noise that is the row's own: where one row is far out, so is the other.
    observation = Observation(1e-6, 1.0, 3.0, None)
    positions = torch.tensor([[0, 0], [0, 0], [1, 0]])
    mean = vector(0.0, 0.0, 0.0)
    f = torch.zeros(20_000, 3, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    y = observation.draw(f, mean, torch.zeros_like(mean), None, list(positions.T.double()), generator).numpy()
    assert np.abs(y[:, 0] - y[:, 1]).max() < 1.0 < np.abs(y[:, 0]).max()
    far = np.abs(y[:, 0]) > np.quantile(np.abs(y[:, 0]), 0.95)
    assert np.abs(y[far, 1]).min() > 2.0
    assert np.mean(np.abs(y[far, 2]) > 2.0) < 0.3


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_their_generator(case: str) -> None:
    assert np.array_equal(draws(CASES[case], 50), draws(CASES[case], 50))


def test_no_row_has_no_distribution_and_no_draw() -> None:
    for observation in CASES.values():
        none, positions = vector(), torch.empty(0, 2, dtype=torch.int64)
        assert observation.predictive(none, none, positions).mean.shape == (0,)
        empty = [x.double() for x in positions.T]
        drawn = observation.draw(torch.zeros(3, 0, dtype=F64), none, none, positions, empty, torch.Generator())
        assert drawn.shape == (3, 0)


def test_a_coordinate_that_was_not_seen_is_of_no_seen_cell() -> None:
    positions = torch.tensor([[-1, 1], [0, -1], [0, 1]])
    mean, variance = vector(-2.0, -2.0, -2.0), vector(0.2, 0.2, 0.2)
    known = PLAIN.residual(positions, mean)
    assert known.cell.tolist() == [-1, -1, 0]
    np.testing.assert_allclose(PLAIN.predictive(mean, variance, positions).mean, [-2.0, -2.0, -1.1], rtol=1e-12)


def test_entries_of_the_cells_are_what_their_rows_said() -> None:
    entries = SEEN.entries
    assert (entries.count, entries.weight, entries.value) == (SEEN.n_rows, SEEN.weight, SEEN.value)
    assert (entries.scatter, entries.log_weight) == (SEEN.scatter, SEEN.log_weight)
