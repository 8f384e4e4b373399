"""The parallel smoother against dense Gaussian processes and against the sequential smoother."""

import math

import pytest
import torch
from torch import Tensor

from probtensor.gaussian import observation_site
from probtensor.inference import kalman
from probtensor.inference.kalman import (
    Chain,
    Sites,
    between,
    condition,
    log_normalizer,
    pull_back,
    sample,
    smooth,
    smooth_between,
)
from probtensor.models.state_space import state_dim, stationary_covariance, transition
from tests.reference import F64, blocks, close, dense_gp, dense_prior, f64, random_sites, sequential_smoother

NUS = [0.5, 1.5, 2.5]
SIZES = [1, 2, 3, 5, 8, 13, 40]


def matern_chain(nu: float, times: Tensor, lengthscale: Tensor, variance: Tensor) -> Chain:
    start = stationary_covariance(nu, variance)[None]
    steps = transition(nu, torch.diff(times), lengthscale, variance)
    observe = torch.eye(start.shape[-1], dtype=F64)[:: state_dim(nu)]
    return Chain(torch.cat([torch.zeros_like(start), steps.matrix]), torch.cat([start, steps.noise]), observe)


def problem(T: int, R: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Sites]:
    """Times (one pair equal, one pair 1e-9 apart where there are enough), hyperparameters and sites."""
    generator = torch.Generator().manual_seed(100 * T + 10 * R + seed)
    times = (10 * torch.rand(T, generator=generator, dtype=F64)).sort().values
    if T >= 3:
        times[2] = times[1]
    if T >= 5:
        times[4] = times[3] + 1e-9
    lengthscale = 0.5 + 2 * torch.rand(R, generator=generator, dtype=F64)
    variance = 0.2 + 2 * torch.rand(R, generator=generator, dtype=F64)
    return times, lengthscale, variance, Sites(*random_sites(generator, T, R))


def observed(chain: Chain, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    H = chain.observe
    return mean.squeeze(-1) @ H.T, H @ covariance @ H.T


@pytest.mark.parametrize("steps", [[], [0], [12], [0, 12], [5, 6], [3, 7, 11], list(range(13)), list(range(2, 13, 2))])
@pytest.mark.parametrize("nu", NUS)
def test_some_steps_alone_have_the_posterior_of_the_whole_chain(steps: list[int], nu: float):
    times, lengthscale, variance, sites = problem(13, 2)
    chain, at = matern_chain(nu, times, lengthscale, variance), torch.tensor(steps, dtype=torch.int64)
    blocks_between = between(chain, sites, at)
    for seed in (1, 2):  # whatever the sites of these steps
        now = Sites(*random_sites(torch.Generator().manual_seed(seed), len(steps), 2))
        everywhere = Sites(*(x.index_copy(0, at, new) for x, new in zip(sites, now, strict=True)))
        for part, whole in zip(
            smooth_between(blocks_between, chain.observe, now), smooth(chain, everywhere), strict=True
        ):
            assert close(part, whole[at], 1e-11)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("R", [1, 2, 3])
def test_smoothed_moments_and_normaliser_equal_the_dense_process(nu: float, T: int, R: int):
    times, lengthscale, variance, sites = problem(T, R)
    chain = matern_chain(nu, times, lengthscale, variance)
    posterior = smooth(chain, sites)
    mean, covariance = observed(chain, *condition(*posterior))
    expected_mean, expected_covariance, log_z = dense_gp(nu, times, lengthscale, variance, *sites)
    assert close(mean, expected_mean)
    assert close(covariance, blocks(expected_covariance))
    assert close(log_normalizer(chain, sites), log_z)
    assert close(log_normalizer(chain, sites, posterior), log_z)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("R", [1, 2, 3])
def test_gradients_of_the_normaliser_equal_those_of_the_dense_process(nu: float, T: int, R: int):
    times, lengthscale, variance, sites = problem(T, R)
    arguments = [x.clone().requires_grad_() for x in (lengthscale, variance, *sites)]
    lengthscale, variance, *site = arguments
    sites = Sites(*site)
    ours = torch.autograd.grad(log_normalizer(matern_chain(nu, times, lengthscale, variance), sites), arguments)
    dense = torch.autograd.grad(dense_gp(nu, times, lengthscale, variance, *sites)[2], arguments)
    for mine, expected, name in zip(ours, dense, ("lengthscale", "variance", "precision", "shift"), strict=True):
        if name == "precision":  # an entry and its mirror are one number
            mine, expected = mine + mine.mT, expected + expected.mT
        assert close(mine, expected), name


@pytest.mark.parametrize("nu", NUS)
def test_a_smoothed_posterior_with_gradients_does_not_count_them_twice(nu: float):
    times, lengthscale, variance, sites = problem(5, 2)
    lengthscale.requires_grad_()
    chain = matern_chain(nu, times, lengthscale, variance)
    (once,) = torch.autograd.grad(log_normalizer(chain, sites), lengthscale, retain_graph=True)
    (handed,) = torch.autograd.grad(log_normalizer(chain, sites, smooth(chain, sites)), lengthscale)
    assert close(handed, once, 1e-12)


def test_gradients_of_the_normaliser_in_every_array_of_the_chain():
    _, lengthscale, variance, sites = problem(4, 2)
    plain = matern_chain(1.5, f64([0.0, 0.4, 1.0, 2.5]), lengthscale, variance)
    arguments = [x.clone().requires_grad_() for x in plain]
    matrix, noise, observe = arguments
    noise = 0.5 * (noise + noise.mT)
    ours = torch.autograd.grad(log_normalizer(Chain(matrix, noise, observe), sites), arguments, retain_graph=True)
    filtered = sequential_smoother(matrix, noise, observe, *sites)[2]
    expected = torch.autograd.grad(filtered, arguments)
    for mine, right in zip(ours, expected, strict=True):
        assert close(mine[-3:], right[-3:])  # the first matrix must be zero and has no meaningful gradient


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("T", [1, 2, 7, 32])
def test_sequential_smoother_agrees_on_the_whole_state(nu: float, T: int):
    generator = torch.Generator().manual_seed(T)
    times = (torch.rand(T, generator=generator, dtype=F64) + 0.2).cumsum(0)
    lengthscale, variance = f64([0.8, 2.0]), f64([1.0, 0.5])
    chain = matern_chain(nu, times, lengthscale, variance)
    sites = Sites(*random_sites(generator, T, 2))
    mean, covariance = condition(*smooth(chain, sites))
    expected_mean, expected_covariance, log_z = sequential_smoother(*chain, *sites)
    assert close(mean.squeeze(-1), expected_mean, 1e-11)
    assert close(covariance, expected_covariance, 1e-11)
    assert close(log_normalizer(chain, sites), log_z, 1e-11)


@pytest.mark.parametrize("nu", NUS)
def test_autograd_walks_through_the_smoother(nu: float):
    times, lengthscale, variance, sites = problem(5, 2)
    lengthscale, shift = lengthscale.requires_grad_(), sites.shift.clone().requires_grad_()
    weights = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=F64)

    def total(mean: Tensor, covariance: Tensor) -> Tensor:
        return (weights * mean).sum() + (weights[:, :, None] * covariance).sum()

    chain = matern_chain(nu, times, lengthscale, variance)
    ours = total(*observed(chain, *condition(*smooth(chain, Sites(sites.precision, shift)))))
    mean, covariance, _ = dense_gp(nu, times, lengthscale, variance, sites.precision, shift)
    gradients = torch.autograd.grad(ours, [lengthscale, shift])
    for mine, right in zip(
        gradients, torch.autograd.grad(total(mean, blocks(covariance)), [lengthscale, shift]), strict=True
    ):
        assert close(mine, right)


@pytest.mark.parametrize("T", [1, 6])
def test_columns_of_shifts_share_one_precision(T: int):
    times, lengthscale, variance, sites = problem(T, 2)
    chain = matern_chain(1.5, times, lengthscale, variance)
    shifts = torch.stack([sites.shift, -3 * sites.shift, sites.shift.flip(1)], dim=-1)
    mean, covariance = condition(*smooth(chain, Sites(sites.precision, shifts)))
    for s in range(3):
        alone_mean, alone_covariance = condition(*smooth(chain, Sites(sites.precision, shifts[..., s])))
        assert close(mean[..., s], alone_mean[..., 0], 1e-13)
        assert close(covariance, alone_covariance, 1e-13)


def gaussian_constant(n: int, noise: float, y: Tensor) -> float:
    """What the sites of n observations leave out of the log-likelihood."""
    return float(-0.5 * (y @ y) / noise - 0.5 * n * math.log(2 * math.pi * noise))


def test_matern_half_with_a_missing_middle_value():  # case 6
    chain = matern_chain(0.5, f64([0.0, 1.0, 2.0]), f64([1.0]), f64([1.0]))
    sites = Sites(f64([10.0, 0.0, 10.0]).reshape(3, 1, 1), f64([10.0, 0.0, 10.0]).reshape(3, 1))
    mean, covariance = condition(*smooth(chain, sites))
    assert mean.flatten().tolist() == pytest.approx([0.91905, 0.59559, 0.91905], abs=5e-6)
    assert covariance.flatten().tolist() == pytest.approx([0.09077, 0.78089, 0.09077], abs=5e-6)
    log_likelihood = float(log_normalizer(chain, sites)) + gaussian_constant(2, 0.1, f64([1.0, 1.0]))
    assert log_likelihood == pytest.approx(-2.73506, abs=5e-6)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("gap", [0.0, 1e-9])
def test_nearly_equal_coordinates_equal_their_merger(nu: float, gap: float):  # case 7
    one, two = f64([0.0, 1.0, 2.0]), f64([0.0, 1.0, 1.0 + gap, 2.0])
    hyper = f64([0.7]), f64([1.5])
    apart = Sites(f64([3.0, 5.0, 7.0, 2.0]).reshape(4, 1, 1), f64([1.0, -2.0, 9.0, 0.5]).reshape(4, 1))
    merged = Sites(f64([3.0, 12.0, 2.0]).reshape(3, 1, 1), f64([1.0, 7.0, 0.5]).reshape(3, 1))
    chain_apart, chain_merged = matern_chain(nu, two, *hyper), matern_chain(nu, one, *hyper)
    for mine, right in zip(
        condition(*smooth(chain_apart, apart)), condition(*smooth(chain_merged, merged)), strict=True
    ):
        assert mine.isfinite().all()
        assert close(mine[[0, 1, 3]], right, 1e-6)
        assert close(mine[2], right[1], 1e-6)
    assert close(log_normalizer(chain_apart, apart), log_normalizer(chain_merged, merged), 1e-6)


def test_a_partly_missing_vector_gives_one_log_likelihood_term():  # case 8
    noise, y, seen = 0.1 * torch.eye(2, dtype=F64), f64([1.0, math.nan]), torch.tensor([True, False])
    precision, shift, constant = observation_site(y, noise, seen)
    assert precision.tolist() == [[pytest.approx(10.0), 0.0], [0.0, 0.0]]
    assert shift.tolist() == [pytest.approx(10.0), 0.0]
    chain = matern_chain(0.5, f64([0.0]), f64([1.0, 1.0]), f64([1.0, 2.0]))
    sites = Sites(precision[None], shift[None])
    expected = torch.distributions.Normal(f64(0.0), f64(1.1).sqrt()).log_prob(f64(1.0))
    assert close(log_normalizer(chain, sites) + constant, expected, 1e-13)
    mean, covariance = condition(*smooth(chain, sites))
    assert mean.flatten().tolist() == pytest.approx([1 / 1.1, 0.0])
    assert covariance[0].diagonal().tolist() == pytest.approx([0.1 / 1.1, 2.0])


@pytest.mark.parametrize("nu", NUS)
def test_coordinates_a_million_lengthscales_apart(nu: float):
    times = f64([0.0, 1e6, 2e6, 2e6 + 1.0])
    hyper = f64([1.0, 0.5]), f64([1.0, 3.0])
    sites = Sites(*random_sites(torch.Generator().manual_seed(0), 4, 2))
    chain = matern_chain(nu, times, *hyper)
    mean, covariance = observed(chain, *condition(*smooth(chain, sites)))
    expected_mean, expected_covariance, log_z = dense_gp(nu, times, *hyper, *sites)
    assert close(mean, expected_mean, 1e-12)
    assert close(covariance, blocks(expected_covariance), 1e-12)
    assert close(log_normalizer(chain, sites), log_z, 1e-12)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("noise", [1e10, 1.0, 1e-6, 1e-10])
def test_weak_and_strong_sites(nu: float, noise: float):
    times, y = f64([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), f64([0.3, -1.0, 0.7, 1.1, 0.0, -0.4])
    chain = matern_chain(nu, times, f64([1.3]), f64([0.8]))
    sites = Sites(torch.full((6, 1, 1), 1 / noise, dtype=F64), y[:, None] / noise)
    mean, covariance = observed(chain, *condition(*smooth(chain, sites)))
    K = dense_prior(nu, times, f64([1.3]), f64([0.8])).reshape(6, 6)
    gain = torch.linalg.solve(K + noise * torch.eye(6, dtype=F64), K).T
    assert close(mean.flatten(), gain @ y, 1e-6)
    assert close(covariance.flatten() / noise, (K - gain @ K).diagonal() / noise, 1e-4)


@pytest.mark.parametrize("nu", NUS)
def test_draws_have_the_dense_posterior_moments(nu: float):
    times, n = f64([0.0, 0.6, 0.6, 1.7, 4.0]), 4000  # a step of length zero is one of them
    hyper = f64([1.0, 2.5]), f64([1.0, 0.6])
    sites = Sites(*random_sites(torch.Generator().manual_seed(3), 5, 2))
    chain = matern_chain(nu, times, *hyper)
    draws = sample(chain, sites, n, torch.Generator().manual_seed(4))
    assert draws.shape == (n, 5, 2 * state_dim(nu))
    u = draws @ chain.observe.T
    assert close(u[:, 1], u[:, 2], 1e-7)
    mean, covariance, _ = dense_gp(nu, times, *hyper, *sites)
    C = covariance.reshape(10, 10)
    error_mean = (u.mean(0) - mean).flatten().abs() / (C.diagonal() / n).sqrt()
    assert error_mean.max() < 4
    spread = ((C.diagonal()[:, None] * C.diagonal() + C**2) / n).sqrt()  # of an entry of the empirical covariance
    error = (torch.cov(u.reshape(n, 10).T) - C).abs() / spread
    assert error.max() < 4.5


def test_draws_depend_on_the_generator_alone():
    times, lengthscale, variance, sites = problem(5, 2)
    chain = matern_chain(1.5, times, lengthscale, variance)
    one, two = (sample(chain, sites, 3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)


def test_merges_grow_with_the_logarithm_of_the_number_of_steps(monkeypatch: pytest.MonkeyPatch):
    calls = []
    merge = kalman._merge
    monkeypatch.setattr(kalman, "_merge", lambda first, second: calls.append(len(first.A)) or merge(first, second))
    for T in (1, 2, 3, 5, 8, 13, 40, 1000):
        calls.clear()
        times = torch.arange(T, dtype=F64)
        smooth(
            matern_chain(0.5, times, f64([1.0]), f64([1.0])),
            Sites(torch.ones(T, 1, 1, dtype=F64), torch.ones(T, 1, dtype=F64)),
        )
        assert len(calls) == math.ceil(math.log2(T))
        assert sum(calls) == T - 1


def test_information_pulled_back_is_the_integral_over_the_next_state():
    generator = torch.Generator().manual_seed(5)
    A, B, C = (torch.randn(3, 3, generator=generator, dtype=F64) for _ in range(3))
    Q, L, h = B @ B.T, C @ C.T, torch.randn(3, 1, generator=generator, dtype=F64)
    shift, precision = pull_back(A, Q, h, L)
    # N(y; A x, Q) N(y; L^-1 h, L^-1) integrated over y: N(A x; L^-1 h, Q + L^-1)
    total = torch.linalg.inv(Q + torch.linalg.inv(L))
    assert close(precision, A.T @ total @ A, 1e-10)
    assert close(shift, A.T @ total @ torch.linalg.solve(L, h), 1e-10)


def test_float32_stays_float32_and_is_close():
    times, lengthscale, variance, sites = problem(13, 2)
    exact = condition(*smooth(matern_chain(1.5, times, lengthscale, variance), sites))
    chain = Chain(*(x.float() for x in matern_chain(1.5, times, lengthscale, variance)))
    for single, double in zip(condition(*smooth(chain, Sites(*(x.float() for x in sites)))), exact, strict=True):
        assert single.dtype == torch.float32
        assert close(single.double(), double, 1e-4)
