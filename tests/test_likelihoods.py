"""Masked densities, their gradients, and totals estimated from batches."""

import math

import pytest
import torch
from torch.distributions import Normal

from probtensor.likelihoods import batch_total, gaussian_log_prob
from tests.reference import F64, close, f64


def test_density_equals_torch():
    y, mean, variance = f64([0.0, 1.0, -3.0]), f64([0.5, 1.0, 2.0]), f64([1.0, 0.1, 7.0])
    assert close(gaussian_log_prob(y, mean, variance), Normal(mean, variance.sqrt()).log_prob(y), 1e-14)
    assert close(gaussian_log_prob(y, f64(0.5), f64(2.0)), Normal(f64(0.5), math.sqrt(2)).log_prob(y), 1e-14)


@pytest.mark.parametrize(
    ("stored", "explicit"), [(x, True) for x in (math.nan, math.inf, -math.inf, 1e300, 0.0)] + [(math.nan, False)]
)
def test_a_missing_value_has_a_finite_density_and_no_gradient(stored: float, explicit: bool):  # case 9
    observed = torch.tensor([True, False, True])
    y = f64([1.0, stored, 2.0])
    mean, variance = f64([0.0, 0.3, 0.5]).requires_grad_(), f64([1.0, 0.5, 2.0]).requires_grad_()
    density = gaussian_log_prob(y, mean, variance, observed if explicit else None)
    assert density.isfinite().all()
    assert float(density[1].detach()) == 0.0
    gradients = torch.autograd.grad(density.sum(), [mean, variance])
    alone = gaussian_log_prob(y[observed], mean[observed], variance[observed]).sum()
    for mine, right in zip(gradients, torch.autograd.grad(alone, [mean, variance]), strict=True):
        assert torch.equal(mine, right)
        assert float(mine[1]) == 0.0


def test_a_missing_value_adds_nothing_to_shared_parameters():
    y = f64([1.0, math.nan])
    mean, variance = f64(0.2).requires_grad_(), f64(0.7).requires_grad_()
    with_missing = torch.autograd.grad(gaussian_log_prob(y, mean, variance).sum(), [mean, variance])
    without = torch.autograd.grad(gaussian_log_prob(y[:1], mean, variance).sum(), [mean, variance])
    assert with_missing == without


@pytest.mark.parametrize("size", [40, 20, 1, 100])
def test_every_batch_estimates_the_total_whatever_its_size(size: int):  # case 10
    total = batch_total(torch.full((size,), -1.0, dtype=F64), 100)
    assert float(total) == pytest.approx(-100.0, rel=1e-15)


def test_batches_in_proportion_average_to_the_total():
    terms = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=F64)
    batches = torch.split(terms, [40, 40, 20])
    mean = sum(len(b) / 100 * batch_total(b, 100) for b in batches)
    assert close(mean, terms.sum(), 1e-14)


@pytest.mark.parametrize("size", [0, 6])
def test_an_impossible_batch_is_refused(size: int):
    with pytest.raises(ValueError, match=f"expected between 1 and n_total=5 terms, got {size}"):
        batch_total(torch.zeros(size, dtype=F64), 5)
