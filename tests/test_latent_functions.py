"""Priors of a mode and their posteriors, at seen and unseen coordinates, against dense formulas."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.inference.kalman import Sites
from probtensor.kernels import Kernel, Linear, Matern, Periodic, White
from probtensor.models.latent_functions import ExchangeableRows, GaussianProcess, LatentFunctions, latent_functions
from tests.reference import (
    F64,
    blocks,
    close,
    dense_gp,
    dense_gp_at,
    dense_posterior,
    f64,
    random_sites,
)
from tests.reference_kernels import dense_kernel_at, dense_kernel_prior

NUS = [0.5, 1.5, 2.5]
TIMES = f64([-1.0, 0.0, 0.3, 0.300001, 2.0, 5.5, 6.0])
HYPER = f64([[0.4, -0.9], [0.2, -0.7]])  # log lengthscale and log variance of two components
WHERE = {
    "inside": f64([-0.5, 0.1, 0.3000005, 1.0, 3.0, 5.9]),
    "left": f64([-1.000001, -1.5, -4.0, -1e6]),
    "right": f64([6.000001, 6.4, 9.0, 1e6]),
    "at the data": TIMES,
    "out of order and repeated": f64([7.0, 2.0, -3.0, 2.0, 0.1]),
    "nowhere": f64([]),
}


def sites_of(T: int, R: int = 2, seed: int = 0) -> Sites:
    return Sites(*random_sites(torch.Generator().manual_seed(seed), T, R))


def moments_at(f: LatentFunctions, hyper: Tensor, sites: Sites, where: Tensor) -> tuple[Tensor, Tensor]:
    return f.at(hyper, sites, f.posterior(hyper, sites)[0], where)


# --- Gaussian processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("T", [1, 2, 5, 7])
def test_posterior_at_the_data_equals_the_dense_process(nu: float, T: int):
    f, sites = GaussianProcess(TIMES[:T], Matern(nu)), sites_of(T)
    posterior, log_z = f.posterior(HYPER, sites)
    mean, covariance = f.moments(HYPER, sites, posterior)
    expected_mean, expected_covariance, expected_log_z = dense_gp(nu, TIMES[:T], *HYPER.exp(), *sites)
    assert close(mean, expected_mean)
    assert close(covariance, blocks(expected_covariance))
    assert close(log_z, expected_log_z)
    assert close(f.log_normalizer(HYPER, sites), expected_log_z)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_prediction_equals_the_dense_process(nu: float, where: str, T: int):
    f, sites, x = GaussianProcess(TIMES[:T], Matern(nu)), sites_of(T), WHERE[where]
    mean, covariance = moments_at(f, HYPER, sites, x)
    expected_mean, expected_covariance = dense_gp_at(nu, TIMES[:T], *HYPER.exp(), *sites, x)
    assert close(mean, expected_mean)
    if len(x):
        assert close(covariance, blocks(expected_covariance))
    assert covariance.shape == (len(x), 2, 2)


@pytest.mark.parametrize("nu", NUS)
def test_left_of_the_data_the_prior_comes_back(nu: float):
    # The authors' code inverts A there: the mean grows like exp(distance), the variance becomes negative.
    f, sites = GaussianProcess(TIMES, Matern(nu)), sites_of(7)
    mean, covariance = moments_at(f, HYPER, sites, f64([-1e3, 1e3]))
    assert close(mean, torch.zeros_like(mean), 1e-12)
    assert close(covariance, torch.diag(HYPER[1].exp()).expand(2, 2, 2), 1e-12)


@pytest.mark.parametrize("nu", NUS)
def test_gradients_of_the_normaliser_in_the_log_hyperparameters(nu: float):
    f, sites = GaussianProcess(TIMES, Matern(nu)), sites_of(7)
    hyper = HYPER.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dense_gp(nu, TIMES, *hyper.exp(), *sites)[2], hyper)
    (alone,) = torch.autograd.grad(f.log_normalizer(hyper, sites), hyper)
    (with_posterior,) = torch.autograd.grad(f.posterior(hyper, sites)[1], hyper)
    assert close(alone, expected)
    assert close(with_posterior, expected)


@pytest.mark.parametrize("size", [1, 2, 30])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e5])
def test_bounds_of_the_lengthscale_follow_the_unit_of_the_axis(size: int, spread: float):
    f, unit = (GaussianProcess(x * torch.arange(size, dtype=F64), Matern(1.5)) for x in (spread, 1.0))
    shift = math.log(spread) if size > 1 else 0.0
    for mine, right in zip(
        (f.bounds(3)[:, 0], f.initial_hyperparameters(3)[0]),
        (unit.bounds(3)[:, 0], unit.initial_hyperparameters(3)[0]),
        strict=True,
    ):
        assert close(mine, right + shift, 1e-12)
    assert (f.bounds(3)[0] < f.bounds(3)[1]).all()


@pytest.mark.parametrize("nu", NUS)
def test_draws_are_joint_and_have_the_posterior_moments(nu: float):
    n, f, sites = 4000, GaussianProcess(TIMES[:5], Matern(nu)), sites_of(5)
    where = f64([2.0, -2.0, 0.1, 3.0, 0.1])  # seen, left, inside, right, a repeat
    draws = f.sample(HYPER, sites, where, n, torch.Generator().manual_seed(0))
    assert draws.shape == (n, 5, 2)
    assert torch.equal(draws[:, 2], draws[:, 4])
    mean, covariance = dense_gp_at(nu, TIMES[:5], *HYPER.exp(), *sites, where[:4])
    assert_moments(draws[:, :4].reshape(n, 8), mean.reshape(8), covariance.reshape(8, 8))


def assert_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Empirical moments within four and a half standard errors."""
    n, variance = len(draws), covariance.diagonal()
    assert ((draws.mean(0) - mean).abs() <= 4.5 * (variance / n).sqrt()).all()
    error = (torch.cov(draws.T) - covariance).abs()
    assert (error <= 4.5 * ((variance[:, None] * variance + covariance**2) / n).sqrt() + 1e-12).all()


def test_hyperparameters_are_named_in_the_unit_of_the_axis():
    named = GaussianProcess(TIMES, Matern(1.5)).named(HYPER)
    assert close(named["lengthscale"], HYPER[0].exp(), 1e-15)
    assert close(named["variance"], HYPER[1].exp(), 1e-15)
    assert close(ExchangeableRows(3, F0).named(HYPER[1:].repeat(2, 1))["variance"], HYPER[1].exp(), 1e-15)


# --- kernels of one's choice ------------------------------------------------------------------------------------------

KERNELS = [
    Matern(0.5),
    Matern(1.5),
    Matern(2.5),
    Periodic(1.7),
    Periodic(20.0, n_harmonics=1),
    Linear(),
    Matern(1.5) + Periodic(1.7, n_harmonics=3),
    Matern(0.5) + Linear(),
    Linear() + Periodic(2.0, n_harmonics=4) + Matern(2.5) + Periodic(0.3, n_harmonics=2),
    Matern(1.5) + White(),
    White() + Matern(0.5) + Periodic(1.7, n_harmonics=2),
]
CLOSE_TIMES = f64([-1.0, 0.0, 0.3, 0.3 + 1e-9, 2.0, 5.5, 6.0])
ANYWHERE = f64([7.0, 2.0, -3.0, 2.0, 0.1, 0.3 + 5e-10, -1.0 - 1e-9, 6.0, 30.0])


def hyper_of(kernel: Kernel, R: int = 2) -> Tensor:
    """Log hyperparameters (n_hyperparameters, R): lengthscales between 0.5 and 1.2, variances between 0.4 and 1.5."""
    unit = torch.rand(len(kernel.hyperparameters), R, generator=torch.Generator().manual_seed(1), dtype=F64)
    return torch.log(0.4 + 1.1 * unit)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_posterior_of_every_kernel_equals_the_dense_process(kernel: Kernel, T: int):
    times, sites, hyper = CLOSE_TIMES[:T], sites_of(T), hyper_of(kernel)
    f = GaussianProcess(times, kernel)
    posterior, log_z = f.posterior(hyper, sites)
    mean, covariance = f.moments(hyper, sites, posterior)
    expected = dense_posterior(dense_kernel_prior(kernel, times, hyper.exp(), times), *sites)
    assert close(mean, expected[0])
    assert close(covariance, blocks(expected[1]))
    assert close(log_z, expected[2])
    assert list(f.named(hyper)) == list(kernel.hyperparameters)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_gradients_of_the_normaliser_in_the_hyperparameters_of_every_kernel(kernel: Kernel):
    f, sites, hyper = GaussianProcess(CLOSE_TIMES, kernel), sites_of(7), hyper_of(kernel).requires_grad_()
    dense = dense_posterior(dense_kernel_prior(kernel, CLOSE_TIMES, hyper.exp(), CLOSE_TIMES), *sites)
    (expected,) = torch.autograd.grad(dense[2], hyper)
    (alone,) = torch.autograd.grad(f.log_normalizer(hyper, sites), hyper)
    (with_posterior,) = torch.autograd.grad(f.posterior(hyper, sites)[1], hyper)
    assert close(alone, expected)
    assert close(with_posterior, expected)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_prediction_of_every_kernel_equals_the_dense_process(kernel: Kernel, T: int):
    f, sites, hyper = GaussianProcess(CLOSE_TIMES[:T], kernel), sites_of(T), hyper_of(kernel)
    mean, covariance = moments_at(f, hyper, sites, ANYWHERE)
    expected_mean, joint, _ = dense_kernel_at(kernel, CLOSE_TIMES[:T], hyper.exp(), *sites, ANYWHERE)
    assert close(mean, expected_mean)
    assert close(covariance, blocks(joint))
    mean, covariance = moments_at(f, hyper, sites, ANYWHERE[:0])
    assert (mean.shape, covariance.shape) == ((0, 2), (0, 2, 2))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_draws_of_every_kernel_are_joint(kernel: Kernel):
    n, f, sites, hyper = 4000, GaussianProcess(CLOSE_TIMES, kernel), sites_of(7), hyper_of(kernel)
    where = f64([2.0, -2.0, 0.1, 8.0, 0.1])  # seen, left, inside, right, a repeat
    draws = f.sample(hyper, sites, where, n, torch.Generator().manual_seed(0))
    assert torch.equal(draws[:, 2], draws[:, 4])
    mean, covariance, _ = dense_kernel_at(kernel, CLOSE_TIMES, hyper.exp(), *sites, where[:4])
    assert_moments(draws[:, :4].reshape(n, 8), mean.reshape(8), covariance.reshape(8, 8))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kernel_starts_within_its_bounds_with_smooth_parts_of_variance_one(kernel: Kernel, dtype: torch.dtype):
    f = GaussianProcess(CLOSE_TIMES.to(dtype), kernel)
    start, (lower, upper) = f.initial_hyperparameters(3), f.bounds(3)
    assert start.shape == lower.shape == (len(kernel.hyperparameters), 3)
    assert start.dtype == lower.dtype == dtype
    assert ((lower <= start) & (start <= upper) & (lower < upper)).all()
    smooth = {name: value for name, value in f.named(start).items() if name != "white_variance"}
    total = sum(value for name, value in smooth.items() if name.endswith("variance"))
    assert close(total, torch.ones(3, dtype=dtype), 1e-6)
    chain = f.chain(start, f.coordinates)
    assert chain.matrix.dtype == chain.noise.dtype == chain.observe.dtype == dtype
    assert chain.matrix.shape == (7, f.state_size(3), f.state_size(3))


def assert_given_is_the_posterior(f: LatentFunctions, hyper: Tensor, here: list[int]) -> None:
    sites, at = sites_of(f.size), torch.tensor(here, dtype=torch.int64)
    given = f.given(hyper, sites, at)
    for seed in (1, 2):
        now = sites_of(len(here), seed=seed)
        everywhere = Sites(*(x.index_copy(0, at, new) for x, new in zip(sites, now, strict=True)))
        expected = f.moments(hyper, everywhere, f.posterior(hyper, everywhere)[0])
        for part, whole in zip(given(now), expected, strict=True):
            assert close(part, whole[at], 1e-11)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("here", [[], [0], [6], [2, 3, 5], [0, 6], list(range(7))])
def test_moments_given_the_other_sites_equal_the_posterior(kernel: Kernel, here: list[int]):
    assert_given_is_the_posterior(GaussianProcess(CLOSE_TIMES, kernel), hyper_of(kernel), here)


def test_what_repeats_itself_is_known_far_from_the_data():
    times = torch.arange(40, dtype=F64) / 7
    f, hyper = GaussianProcess(times, Periodic(2.0) + Linear()), f64([[0.0], [0.0], [0.0]])
    values = torch.exp(torch.sin(math.pi * times)) + 0.3 * times
    sites = Sites(torch.full((40, 1, 1), 1e4, dtype=F64), 1e4 * values[:, None])
    where = f64([-3.3, 8.1, 20.05])
    mean, covariance = moments_at(f, hyper, sites, where)
    assert close(mean[:, 0], torch.exp(torch.sin(math.pi * where)) + 0.3 * where, 0.02)
    assert (covariance < 0.01).all()


# --- exchangeable rows ------------------------------------------------------------------------------------------------

F0 = torch.empty(0, dtype=F64)
ROWS = f64([[0.3, -1.2], [-0.5, 0.7]])  # log variance of the rows about their mean, and of the mean


def dense_rows(size: int, hyper: Tensor) -> Tensor:
    prior = torch.zeros(size, hyper.shape[1], size, hyper.shape[1], dtype=F64)
    for i in range(size):
        for j in range(size):
            prior[i, :, j, :] = torch.diag(hyper[1].exp() + (hyper[0].exp() if i == j else 0.0))
    return prior


def with_nothing_known_of_a_last(sites: Sites) -> Sites:
    return Sites(*(torch.cat([x, torch.zeros_like(x[:1])]) for x in sites))


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("R", [1, 3])
def test_posterior_of_exchangeable_rows_equals_the_dense_formula(size: int, R: int):
    hyper = f64([[0.3, -1.2, 0.0][:R], [-2.0, 0.0, 1.1][:R]])
    f, sites = ExchangeableRows(size, F0), sites_of(size, R)
    posterior, log_z = f.posterior(hyper, sites)
    mean, covariance, expected_log_z = dense_posterior(dense_rows(size, hyper), *sites)
    moments = f.moments(hyper, sites, posterior)
    assert close(moments.mean, mean, 1e-11)
    assert close(moments.covariance, blocks(covariance), 1e-11)
    assert close(log_z, expected_log_z, 1e-11)
    assert close(f.log_normalizer(hyper, sites), expected_log_z, 1e-11)


@pytest.mark.parametrize("here", [[], [0], [1, 3], list(range(4))])
def test_moments_of_exchangeable_rows_given_the_others_equal_the_posterior(here: list[int]):
    assert_given_is_the_posterior(ExchangeableRows(4, F0), ROWS, here)


def test_gradients_of_the_normaliser_of_exchangeable_rows():
    hyper, sites = ROWS.clone().requires_grad_(), sites_of(4)
    (ours,) = torch.autograd.grad(ExchangeableRows(4, F0).log_normalizer(hyper, sites), hyper)
    (dense,) = torch.autograd.grad(dense_posterior(dense_rows(4, hyper), *sites)[2], hyper)
    assert close(ours, dense, 1e-11)


def test_an_unknown_label_has_what_the_others_say_of_their_mean():
    sites, f = sites_of(4), ExchangeableRows(4, F0)
    where = torch.tensor([2, -1, 0, -1, 3])
    mean, covariance = moments_at(f, ROWS, sites, where)
    expected, dense_covariance, _ = dense_posterior(dense_rows(5, ROWS), *with_nothing_known_of_a_last(sites))
    assert close(mean, expected[where], 1e-11)
    assert close(covariance, blocks(dense_covariance)[where], 1e-11)


def test_an_unknown_label_has_its_prior_where_nothing_was_seen():  # case 15
    sites, f = Sites(*(torch.zeros_like(x) for x in sites_of(3))), ExchangeableRows(3, F0)
    mean, covariance = moments_at(f, ROWS, sites, torch.tensor([-1]))
    assert torch.equal(mean, torch.zeros(1, 2, dtype=F64))
    assert close(covariance[0], torch.diag(ROWS.exp().sum(0)), 1e-14)


def test_draws_of_exchangeable_rows_have_the_joint_posterior_moments():
    n, sites, f = 4000, sites_of(3), ExchangeableRows(3, F0)
    where = torch.tensor([2, -1, 0, 1, 2])
    draws = f.sample(ROWS, sites, where, n, torch.Generator().manual_seed(0))
    assert draws.shape == (n, 5, 2)
    assert torch.equal(draws[:, 0], draws[:, 4])
    mean, covariance, _ = dense_posterior(dense_rows(4, ROWS), *with_nothing_known_of_a_last(sites))
    in_order = where[:4]
    covariance = covariance.reshape(4, 2, 4, 2)[in_order][:, :, in_order].reshape(8, 8)
    assert_moments(draws[:, :4].reshape(n, 8), mean[in_order].reshape(8), covariance)


# --- axes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_kind_of_axis_has_its_prior(dtype: torch.dtype):
    like = torch.empty(0, dtype=dtype)
    f = latent_functions(ContinuousAxis("t", Matern(2.5)).fit(np.array([3.0, 1.0, 1.0, 2.5])), like)
    assert isinstance(f, GaussianProcess)
    assert (f.kernel, f.size, f.everywhere().tolist()) == (Matern(2.5), 3, [1.0, 2.5, 3.0])
    assert f.everywhere().dtype == f.initial_hyperparameters(2).dtype == dtype
    assert f.initial_hyperparameters(2)[0, 0].item() < math.log(2.0)
    rows = latent_functions(CategoricalAxis("c").fit(np.array(["b", "a", "b"])), like)
    assert isinstance(rows, ExchangeableRows)
    assert (rows.size, rows.everywhere().tolist()) == (2, [0, 1])
    assert rows.initial_hyperparameters(2).dtype == dtype


def test_an_unknown_kind_of_axis_is_named():
    with pytest.raises(TypeError, match="axis: expected ContinuousAxis or CategoricalAxis, got str"):
        latent_functions("t", F0)
