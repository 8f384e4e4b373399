"""Ordered levels: probabilities by their definition, derivatives, expectations, distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from probtensor.likelihoods import Entries
from probtensor.ordinal import Ordinal, OrdinalPredictive
from tests.reference_bayesian import level_probabilities

STARS = Ordinal((1.0, 2.0, 4.0, 5.0), (3.0, 10.0, 0.0, 7.0))


def rows(values: Tensor, count: float = 1.0) -> Entries:
    many = torch.full_like(values, count)
    return Entries(many, many, values, torch.zeros_like(values), torch.zeros_like(values))


def parameters() -> Tensor:
    return STARS.start(0.0, torch.zeros(1, dtype=torch.float64))


def test_probabilities_are_differences_of_the_distribution_function() -> None:
    cuts, values = STARS.cuts(parameters()).tolist(), torch.tensor(STARS.levels, dtype=torch.float64)
    for f in (-30.0, -1.3, 0.0, 2.0):
        at = torch.full_like(values, f)
        found = STARS.expected_log_prob(parameters(), rows(values), at, torch.zeros_like(at)).exp()
        wanted = torch.tensor(level_probabilities(cuts, f), dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-15)
        predicted = STARS.predictive(parameters(), at[:1], torch.zeros(1, dtype=torch.float64))
        np.testing.assert_allclose(predicted.weights[0], wanted, atol=1e-12)


def test_the_start_has_the_frequencies_of_the_levels() -> None:
    predicted = STARS.predictive(parameters(), *torch.zeros(2, 1, dtype=torch.float64))
    np.testing.assert_allclose(predicted.weights[0], np.array([3.5, 10.5, 0.5, 7.5]) / 22)


def test_sites_are_the_derivatives_of_the_expectation() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 5.0, 5.0], dtype=torch.float64)
    mean = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    variance = torch.linspace(0.1, 1.5, 5, dtype=torch.float64, requires_grad=True)
    entries = rows(values, 2.0)
    total = STARS.expected_log_prob(parameters(), entries, mean, variance).sum()
    by_mean, by_variance = torch.autograd.grad(total, [mean, variance])
    precision, shift = STARS.sites(parameters(), entries, mean.detach(), variance.detach())
    torch.testing.assert_close(precision, -2 * by_variance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(shift, by_mean + precision * mean.detach(), rtol=1e-6, atol=1e-9)
    assert bool((precision > 0).all())


def test_the_predictive_integrates_over_the_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.tensor([0.7], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    draws = mean + variance.sqrt() * torch.randn(200_000, generator=generator, dtype=torch.float64)
    wanted = STARS.predictive(parameters(), draws, torch.zeros_like(draws)).weights.mean(0)
    np.testing.assert_allclose(STARS.predictive(parameters(), mean, variance).weights[0], wanted, atol=3e-3)


def test_distributions_over_levels() -> None:
    found = OrdinalPredictive([1, 2, 5], [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(found.mean, [2.7, 1.0])
    np.testing.assert_allclose(found.std, [math.sqrt(0.2 * 1.7**2 + 0.5 * 0.7**2 + 0.3 * 2.3**2), 0.0])
    np.testing.assert_allclose(found.cdf([2.5, 0.5]), [0.7, 0.0])
    np.testing.assert_allclose(found.log_prob([5, np.nan]), [math.log(0.3), 0.0])
    assert found.log_prob(3.0)[0] == -math.inf
    np.testing.assert_array_equal(found.quantile([0.2, 0.21, 1.0]), [[1, 2, 5], [1, 1, 1]])
    draws = found.sample(20_000, np.random.default_rng(0))
    np.testing.assert_allclose([(draws[0] == x).mean() for x in (1, 2, 5)], [0.2, 0.5, 0.3], atol=0.02)
    pairs = np.abs(draws[0, :10_000] - draws[0, 10_000:]).mean()
    wanted = np.abs(draws[0] - 2.0).mean() - pairs / 2
    assert found.crps([2.0, 1.0])[0] == pytest.approx(wanted, abs=0.03)
    assert found.crps([2.0, 1.0])[1] == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ordinal((1.0,)), "levels: expected at least two finite numbers, rising"),
        (lambda: Ordinal((2.0, 1.0)), "levels: expected at least two finite numbers, rising"),
        (lambda: Ordinal((1.0, 2.0), (1.0,)), "counts: expected 2 numbers of at least 0"),
        (lambda: STARS.check(torch.tensor([1.0, 3.0])), r"y: expected one of \[1.0, 2.0, 4.0, 5.0\], got 3"),
        (lambda: OrdinalPredictive([2, 1], [[0.5, 0.5]]), "levels: expected rising numbers"),
        (lambda: OrdinalPredictive([1, 2], [[0.5, 0.25, 0.25]]), r"weights: expected shape \(n, 2\)"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
