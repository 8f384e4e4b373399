"""Rows of labels with features against the dense Gaussian, and rows without any against exchangeable ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from probtensor.inference.kalman import Sites
from probtensor.models import feature_rows
from probtensor.models.feature_rows import FeatureRows
from probtensor.models.latent_functions import ExchangeableRows
from tests.reference import F64, blocks, close, dense_posterior, f64, random_sites
from tests.reference_bayesian import feature_rows_prior

EXACT = 1e-11


def hyper_of(R: int) -> Tensor:
    return f64([[0.3, -1.2, 0.0][:R], [-2.0, 0.0, 1.1][:R], [0.4, -1.0, 0.9][:R]])


def features_of(n: int, p: int, seed: int = 0) -> Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sites_of(T: int, R: int, seed: int = 0) -> Sites:
    return Sites(*random_sites(torch.Generator().manual_seed(seed), T, R))


def with_nothing_known_of(sites: Sites, n: int) -> Sites:
    return Sites(*(torch.cat([x, x.new_zeros(n, *x.shape[1:])]) for x in sites))


@pytest.fixture(params=[2**22, 1], ids=["one chunk", "a chunk a label"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_rows, "CHUNK", request.param)


@pytest.mark.parametrize(("size", "p", "R"), [(1, 1, 1), (2, 3, 3), (6, 2, 1), (7, 3, 2), (3, 9, 2)])
def test_posterior_of_rows_seen_and_not_equals_the_dense_formula(size: int, p: int, R: int) -> None:
    hyper, features, sites = hyper_of(R), features_of(size + 3, p), sites_of(size, R)
    f = FeatureRows(size, features)
    posterior, log_z = f.posterior(hyper, sites)
    prior = feature_rows_prior(features, hyper)
    mean, covariance, expected_log_z = dense_posterior(prior, *with_nothing_known_of(sites, 3))
    assert close(log_z, expected_log_z, EXACT)
    assert close(f.log_normalizer(hyper, sites), expected_log_z, EXACT)
    for mine, dense in zip(f.moments(hyper, sites, posterior), (mean, blocks(covariance)), strict=True):
        assert close(mine, dense[:size], EXACT)
    where = torch.tensor([size + 1, 0, -1, size - 1, size, size + 2])  # -1 and the last row are one
    for mine, dense in zip(f.at(hyper, sites, posterior, where), (mean, blocks(covariance)), strict=True):
        assert close(mine, dense[where], EXACT)


def test_coefficients_are_those_of_the_dense_formula() -> None:
    hyper, features, sites = hyper_of(2), features_of(6, 3), sites_of(5, 2)
    f = FeatureRows(5, features)
    mean, std = f.coefficients(f.posterior(hyper, sites)[0])
    # As further labels with one feature each, less one without any: then without a mean and a part of their own.
    apart = torch.cat([features[:5], torch.eye(3, dtype=F64)])
    prior = feature_rows_prior(apart, hyper)
    for i in range(5, 8):
        for j in range(8):
            for r in range(2):
                alike = hyper[2, r].exp() * (apart[i] @ apart[j])
                prior[i, r, j, r] = prior[j, r, i, r] = alike
    wanted, covariance, _ = dense_posterior(prior, *with_nothing_known_of(sites, 3))
    assert close(mean, wanted[5:], EXACT)
    assert close(std**2, blocks(covariance)[5:].diagonal(dim1=1, dim2=2), EXACT)


def test_gradients_of_the_normaliser_equal_those_of_the_dense_formula() -> None:
    hyper, features, sites = hyper_of(2).requires_grad_(), features_of(6, 3), sites_of(5, 2)
    f = FeatureRows(5, features)
    (ours,) = torch.autograd.grad(f.log_normalizer(hyper, sites), hyper)
    (dense,) = torch.autograd.grad(dense_posterior(feature_rows_prior(features[:5], hyper), *sites)[2], hyper)
    assert close(ours, dense, EXACT)


def test_without_features_rows_are_exchangeable() -> None:
    hyper, sites = hyper_of(2), sites_of(5, 2)
    f, plain = FeatureRows(5, features_of(6, 0)), ExchangeableRows(5, f64([]))
    where = torch.tensor([3, -1, 0])
    posterior, log_z = f.posterior(hyper, sites)
    expected, expected_log_z = plain.posterior(hyper[:2], sites)
    assert close(log_z, expected_log_z, EXACT)
    found = f.at(hyper, sites, posterior, where)
    for mine, theirs in zip(found, plain.at(hyper[:2], sites, expected, where), strict=True):
        assert close(mine, theirs, EXACT)


@pytest.mark.parametrize("here", [[], [0], [1, 3], list(range(5))])
def test_moments_given_the_others_equal_the_posterior(here: list[int]) -> None:
    hyper, sites, at = hyper_of(2), sites_of(5, 2), torch.tensor(here, dtype=torch.int64)
    f = FeatureRows(5, features_of(6, 3))
    given, now = f.given(hyper, sites, at), sites_of(len(here), 2, seed=1)
    everywhere = Sites(*(x.index_copy(0, at, new) for x, new in zip(sites, now, strict=True)))
    expected = f.moments(hyper, everywhere, f.posterior(hyper, everywhere)[0])
    for part, whole in zip(given(now), expected, strict=True):
        assert close(part, whole[at], EXACT)


def test_draws_have_the_joint_posterior_moments() -> None:
    n, hyper, features, sites = 4000, hyper_of(2), features_of(5, 2), sites_of(3, 2)
    where = torch.tensor([2, 3, -1, 0, 2])
    draws = FeatureRows(3, features).sample(hyper, sites, where, n, torch.Generator().manual_seed(0))
    assert draws.shape == (n, 5, 2)
    assert torch.equal(draws[:, 0], draws[:, 4])
    mean, covariance, _ = dense_posterior(feature_rows_prior(features, hyper), *with_nothing_known_of(sites, 2))
    order = where[:4]
    wanted = covariance[order][:, :, order].reshape(8, 8)
    found, variance = draws[:, :4].reshape(n, 8), wanted.diagonal()
    assert ((found.mean(0) - mean[order].reshape(8)).abs() <= 4.5 * (variance / n).sqrt()).all()
    error = (torch.cov(found.T) - wanted).abs()
    assert (error <= 4.5 * ((variance[:, None] * variance + wanted**2) / n).sqrt()).all()
