"""Scale mixtures of held-out residuals: known ones recovered, coverage, and a second maximisation by SciPy."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor

from probtensor.calibration import INFLATIONS, SCALES, ScaleMixture, fit_scale_mixture, inflated, with_tail
from probtensor.predictive import NormalMixture
from tests.reference import F64

Array = NDArray[np.float64]


def tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.array(x))


def fit(residual: Array, latent: Array | float, noise: Array | float) -> ScaleMixture:
    v, s = (np.broadcast_to(np.asarray(x, dtype=float), residual.shape) for x in (latent, noise))
    return fit_scale_mixture(tensor(residual), tensor(v), tensor(s))


def predictive(mixture: ScaleMixture, latent: Array | float, noise: Array | float, n: int) -> NormalMixture:
    unit = np.sqrt(inflated(np.broadcast_to(latent, n), mixture.inflation) + np.broadcast_to(noise, n))
    return NormalMixture(np.zeros(n), unit[:, None] * mixture.scales.numpy(), mixture.weights.numpy())


def log_likelihood(mixture: ScaleMixture, residual: Array, latent: Array | float, noise: Array | float) -> float:
    return float(predictive(mixture, latent, noise, len(residual)).log_prob(residual).sum())


def test_weights_are_probabilities_of_scales_that_count():
    mixture = fit(np.random.default_rng(0).standard_t(3, 800), 0.1, 1.0)
    assert mixture.scales.shape == mixture.weights.shape
    assert mixture.scales.dtype == mixture.weights.dtype == F64
    assert float(mixture.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert (mixture.weights > 0).all()
    assert set(mixture.scales.tolist()) <= set(SCALES.tolist())
    assert mixture.inflation in INFLATIONS


@pytest.mark.parametrize(
    ("scales", "weights"), [([1.0], [1.0]), ([0.25, 4.0], [0.7, 0.3]), ([0.0625, 1.0, 16.0], [0.2, 0.5, 0.3])]
)
def test_a_known_scale_mixture_is_recovered(scales: list[float], weights: list[float]):
    rng = np.random.default_rng(1)
    n = 3000
    noise = rng.uniform(0.5, 2.0, n)
    residual = rng.choice(scales, n, p=weights) * np.sqrt(noise) * rng.normal(size=n)
    mixture = fit(residual, 0.0, noise)
    for scale, weight in zip(scales, weights, strict=True):
        near = (mixture.scales >= scale / 2) & (mixture.scales <= scale * 2)
        assert float(mixture.weights[near].sum()) == pytest.approx(weight, abs=0.05)
    second = float((mixture.weights * mixture.scales**2).sum())
    assert second == pytest.approx(np.dot(weights, np.square(scales)), rel=0.1)
    # The distribution itself is known better than which scales make it.
    truth = NormalMixture(np.zeros(1), [scales], weights)
    for p in (0.6, 0.75, 0.9, 0.975, 0.995):
        x = truth.quantile(p)
        assert predictive(mixture, 0.0, 1.0, 1).cdf(x) == pytest.approx(p, abs=0.015)


DRAWS = {
    "normal": stats.norm(),
    "t": stats.t(3),
    "laplace": stats.laplace(),
    "wide normal": stats.norm(scale=7.0),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", DRAWS)
def test_intervals_cover_new_residuals(name: str, seed: int):
    rng = np.random.default_rng(seed)
    n, m = 600, 10_000
    # The model's variances differ from row to row; residuals are in their unit.
    unit = rng.uniform(0.3, 3.0, n + m)
    residual = unit * DRAWS[name].rvs(n + m, random_state=rng)
    mixture = fit(residual[:n], 0.0, unit[:n] ** 2)
    new = predictive(mixture, 0.0, unit[n:] ** 2, m)
    for coverage in (0.5, 0.9, 0.95):
        lower, upper = new.interval(coverage)
        inside = np.mean((residual[n:] >= lower) & (residual[n:] <= upper))
        # Three standard errors of the calibration rows, and of the test rows.
        error = 3 * math.sqrt(coverage * (1 - coverage) * (1 / n + 1 / m))
        assert inside == pytest.approx(coverage, abs=error)


@pytest.mark.parametrize("inflation", [0.0, 1.0, 4.0, 16.0])
def test_the_inflation_is_found_where_latent_variances_are_wrong_by_it(inflation: float):
    rng = np.random.default_rng(5)
    latent, noise = rng.choice([0.003, 0.03, 0.3, 3.0], 2000), np.full(2000, 0.05)
    residual = np.sqrt(inflated(latent, inflation) + noise) * rng.normal(size=2000)
    assert fit(residual, latent, noise).inflation == inflation


def test_inflation_is_more_than_one_where_the_latent_variance_is_too_small():
    rng = np.random.default_rng(6)
    latent, noise = rng.choice([0.003, 0.03, 0.3, 3.0], 2000), np.full(2000, 0.05)
    residual = np.sqrt(inflated(latent, 6.0) + noise) * rng.standard_t(5, 2000)
    assert fit(residual, latent, noise).inflation in (4.0, 8.0)


def test_residuals_of_exactly_zero_are_survived():
    rng = np.random.default_rng(7)
    residual = np.where(rng.random(1000) < 0.3, 0.0, rng.normal(size=1000))
    mixture = fit(residual, 0.2, 1.0)
    assert all(torch.isfinite(x).all() for x in (mixture.scales, mixture.weights))
    assert float(mixture.weights[mixture.scales < 0.01].sum()) == pytest.approx(0.3, abs=0.05)
    all_zero = fit(np.zeros(300), 0.2, 1.0)
    assert float(all_zero.weights[0]) > 0.99
    assert float(all_zero.scales[0]) == SCALES[0]


def test_rows_without_a_noise_variance_need_a_latent_one():
    # An inflation of zero would leave no unit: it is passed over.
    residual = np.random.default_rng(8).normal(size=400)
    mixture = fit(residual, 1.0, 0.0)
    assert mixture.inflation > 0
    assert predictive(mixture, 1.0, 0.0, 1).std == pytest.approx(residual.std(), rel=0.05)


def test_residuals_far_outside_all_scales_stay_finite():
    residual = np.r_[np.random.default_rng(9).normal(size=300), 1e8, -1e9]
    mixture = fit(residual, 0.0, 1.0)
    assert torch.isfinite(mixture.weights).all()
    assert float(mixture.scales.max()) == SCALES[-1]


@pytest.mark.parametrize(
    ("size", "unit", "rtol"),
    [(0.0, 1024.0, 1e-9), (2.0**-20, 2.0**-10, 1e-3)],
    ids=["no latent variance", "small latent variances"],
)
def test_the_unit_does_not_matter_where_latent_variances_are_small(size: float, unit: float, rtol: float):
    # Elsewhere it does: inflation ends where the variance is that of standardised values.
    rng = np.random.default_rng(10)
    latent, noise = size * rng.uniform(0, 1, 600), (size or 1.0) * rng.uniform(0.05, 0.1, 600)
    residual = np.sqrt(4 * latent + noise) * rng.standard_t(6, 600)
    a, b = fit(residual, latent, noise), fit(unit * residual, unit**2 * latent, unit**2 * noise)
    assert a.inflation == b.inflation
    assert a.inflation in ((2.0, 4.0, 8.0) if size else INFLATIONS)
    assert torch.equal(a.scales, b.scales)
    np.testing.assert_allclose(a.weights, b.weights, rtol=rtol)


GRID = np.r_[0.0, np.logspace(-12, 3, 400), 1.0]


@pytest.mark.parametrize("inflation", [1.0, 1.5, 4.0, 16.0])
def test_an_inflation_of_at_least_one_never_shrinks(inflation: float):
    grown = inflated(GRID, inflation)
    assert (grown >= GRID).all()
    assert (grown <= np.maximum(inflation * GRID, GRID)).all()
    assert (grown[GRID < 1] <= 1).all()
    np.testing.assert_array_equal(grown[GRID >= 1], GRID[GRID >= 1])
    assert inflated(np.array([1.0]), inflation) == 1.0
    if inflation == 1.0:
        np.testing.assert_array_equal(grown, GRID)
    else:
        between = (GRID > 0) & (GRID < 1)
        assert (grown[between] > GRID[between]).all()


@pytest.mark.parametrize("inflation", [*INFLATIONS, 0.5])
def test_inflated_variances_keep_their_order(inflation: float):
    grown = inflated(np.sort(GRID), inflation)
    assert (np.diff(grown) >= 0).all()
    if inflation > 0:
        assert (np.diff(inflated(np.linspace(1e-3, 2.0, 500), inflation)) > 0).all()


@pytest.mark.parametrize("inflation", INFLATIONS)
def test_small_variances_are_inflated_in_full(inflation: float):
    small = np.logspace(-12, -6, 20)
    np.testing.assert_allclose(inflated(small, inflation), inflation * small, rtol=2e-5)


@pytest.mark.parametrize("inflation", [0.0, 0.3, 0.99])
def test_an_inflation_below_one_is_a_factor(inflation: float):
    np.testing.assert_array_equal(inflated(GRID, inflation), inflation * GRID)


def test_each_variance_may_have_its_own_inflation():
    variance, inflation = np.array([0.1, 0.1, 0.1, 2.0]), np.array([0.5, 1.0, 4.0, 4.0])
    expected = [float(inflated(np.array(v), a)) for v, a in zip(variance, inflation, strict=True)]
    np.testing.assert_array_equal(inflated(variance, inflation), expected)
    np.testing.assert_allclose(expected, [0.05, 0.1, 0.4 / 1.3, 2.0], rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_weights_are_likelier(seed: int):
    """For each inflation, the weights by SciPy's SLSQP over the simplex; the best of all is what EM finds."""
    rng = np.random.default_rng(seed)
    n = 500
    latent, noise = rng.choice([0.0, 0.02, 0.2], n), rng.uniform(0.02, 0.06, n)
    residual = np.sqrt(inflated(latent, 4.0) + noise) * rng.standard_t(3 + seed, n)
    mixture = fit(residual, latent, noise)
    found = log_likelihood(mixture, residual, latent, noise)
    best = {}
    for inflation in INFLATIONS:
        unit = np.sqrt(inflated(latent, inflation) + noise)
        density = stats.norm.pdf(residual[:, None], scale=unit[:, None] * SCALES)
        best[inflation] = _simplex_optimum(density)
    assert mixture.inflation == max(best, key=best.__getitem__)
    assert found == pytest.approx(max(best.values()), abs=0.1)  # of a log-likelihood of about -400


def _simplex_optimum(density: Array) -> float:
    """Largest ``sum log(density @ w)`` over probabilities w: a convex problem."""
    size = density.shape[1]
    top = density.max(axis=1, keepdims=True)
    ratio = density / top

    def negative(w: Array) -> tuple[float, Array]:
        total = ratio @ w
        return -float(np.log(total).mean()), -(ratio / total[:, None]).mean(axis=0)

    result = optimize.minimize(
        negative,
        np.full(size, 1 / size),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * size,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 2000, "ftol": 1e-12},
    )
    w = result.x.clip(0.0)
    return float(np.log(density @ (w / w.sum())).sum())


def test_the_conditions_of_an_optimum_hold():
    """Kiefer and Wolfowitz: no scale's mean density ratio is above one, and those of likely scales are one."""
    rng = np.random.default_rng(11)
    residual = rng.laplace(size=1500)
    mixture = fit(residual, 0.0, 1.0)
    density = stats.norm.pdf(residual[:, None], scale=SCALES)
    kept = np.isin(SCALES, mixture.scales.numpy())
    ratio = (density / (density[:, kept] @ mixture.weights.numpy())[:, None]).mean(axis=0)
    assert ratio.max() < 1.005
    np.testing.assert_allclose(ratio[kept][mixture.weights.numpy() > 0.05], 1.0, atol=0.002)


def test_tensors_of_any_kind_are_taken_and_left_alone():
    residual = torch.randn(300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mixture = fit_scale_mixture(residual, torch.zeros(300), torch.ones(300))
    assert mixture.weights.dtype == F64
    assert not mixture.weights.requires_grad


def test_a_residual_of_no_known_size_costs_no_more_than_its_surprise():
    rng = np.random.default_rng(12)
    residual = 1e-3 * rng.normal(size=999)
    mixture = fit(residual, 0.0, 1e-6)
    wide = with_tail(mixture, len(residual))
    assert float(wide.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(wide.weights[len(mixture.weights) :].sum()) == pytest.approx(1e-3)
    far = np.array([0.3])  # three hundred standard deviations
    assert predictive(mixture, 0.0, 1e-6, 1).log_prob(far)[0] < -1e4
    assert -25 < predictive(wide, 0.0, 1e-6, 1).log_prob(far)[0] < -10
    # Where residuals lie, nothing but the thousandth changes.
    near = np.zeros(1)
    gap = predictive(mixture, 0.0, 1e-6, 1).log_prob(near) - predictive(wide, 0.0, 1e-6, 1).log_prob(near)
    assert 0 < gap[0] < 2e-3


def test_density_of_the_tail_falls_with_the_cube_of_the_residual():
    wide = with_tail(ScaleMixture(1.0, *torch.ones(2, 1, dtype=F64)), 100)
    x = np.array([20.0, 40.0, 80.0, 160.0])
    density = predictive(wide, 0.0, 1.0, 4).log_prob(x)
    np.testing.assert_allclose(np.diff(density) / np.log(2), -3.0, atol=0.05)
