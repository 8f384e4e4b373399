"""Divergences against torch.distributions, and matrix roots against their definition."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Gamma as TorchGamma
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from probtensor.gaussian import (
    Gamma,
    Gaussian,
    from_natural,
    gaussian_kl,
    observation_site,
    square_root,
    standard_normal,
)
from tests.reference import F64, close, f64, random_covariance


def draw(size: int) -> Gaussian:
    generator = torch.Generator().manual_seed(size)
    return Gaussian(torch.randn(size, generator=generator, dtype=F64), random_covariance(generator, size))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_moments_from_natural_form(size: int):
    mean, covariance = draw(size)
    precision = torch.linalg.inv(covariance)
    moments = from_natural(precision, precision @ mean)
    assert close(moments.mean, mean, 1e-11)
    assert close(moments.covariance, covariance, 1e-11)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("variance", [1.0, 0.3, 20.0])
def test_gaussian_divergence_equals_torch(size: int, variance: float):
    q = draw(size)
    prior = MultivariateNormal(torch.zeros(size, dtype=F64), variance * torch.eye(size, dtype=F64))
    assert close(gaussian_kl(q, variance), kl_divergence(MultivariateNormal(*q), prior), 1e-12)


@pytest.mark.parametrize(
    ("a", "b", "a0", "b0"), [(1, 1, 1, 1), (3.5, 0.2, 1, 1), (500, 20, 1e-3, 1e-3), (0.7, 9, 2, 3)]
)
def test_gamma_divergence_and_moments_equal_torch(a: float, b: float, a0: float, b0: float):
    q, prior = Gamma(f64(a), f64(b)), Gamma(f64(a0), f64(b0))
    assert close(q.kl(prior), kl_divergence(TorchGamma(*q), TorchGamma(*prior)), 1e-12)
    assert float(q.kl(q)) == pytest.approx(0.0, abs=1e-12)
    assert float(q.mean) == pytest.approx(a / b)
    draws = torch.from_numpy(np.random.default_rng(0).gamma(a, 1 / b, 100_000)).log()
    assert float(q.mean_log) == pytest.approx(float(draws.mean()), abs=5 * float(draws.std()) / math.sqrt(1e5))


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_square_root_of_matrices_of_any_rank(rank: int):
    generator = torch.Generator().manual_seed(rank)
    thin = torch.randn(6, 4, rank, generator=generator, dtype=F64)
    thin[0] = 0.0
    matrix = thin @ thin.mT
    root = square_root(matrix)
    assert root.shape == matrix.shape
    assert root.isfinite().all()
    assert close(root @ root.mT, matrix, 1e-13)


@pytest.mark.parametrize("observed", [(True, True, True), (True, False, True), (False, True, False), (False,) * 3])
def test_site_of_a_partly_observed_vector_is_its_density(observed: tuple[bool, ...]):
    noise = random_covariance(torch.Generator().manual_seed(1), 3)
    seen = torch.tensor(observed)
    y = torch.where(seen, f64([0.3, -1.0, 2.0]), torch.nan)
    precision, shift, constant = observation_site(y, noise, seen)
    for u in (torch.zeros(3, dtype=F64), f64([1.0, -2.0, 0.5])):
        expected = f64(0.0)
        if any(observed):
            expected = MultivariateNormal(u[seen], noise[seen][:, seen]).log_prob(y[seen])
        assert close(constant + shift @ u - 0.5 * u @ precision @ u, expected, 1e-12)


def test_what_stands_at_a_missing_place_does_not_matter():
    noise, seen = random_covariance(torch.Generator().manual_seed(1), 2), torch.tensor([True, False])
    one, *others = (observation_site(f64([1.0, x]), noise, seen) for x in (0.0, 1e300, math.inf, math.nan))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert close(one[2] + one[1][0] - 0.5 * one[0][0, 0], Normal(f64(1.0), noise[0, 0].sqrt()).log_prob(f64(1.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_follow_their_generator_and_dtype(dtype: torch.dtype):
    one, two = (
        standard_normal((50, 80), torch.empty(0, dtype=dtype), torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert one.dtype == dtype
    assert torch.equal(one, two)
    assert abs(float(one.mean())) < 5 / math.sqrt(4000)
    assert abs(float(one.var()) - 1) < 5 * math.sqrt(2 / 4000)
