"""Markov chains: a posterior that is known, three ways to one posterior of a small tensor, what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from probtensor.inference.monte_carlo import ChainWarning, fit_nuts
from probtensor.models import BayesianCP
from probtensor.models.factor_guides import DrawnFactors, drawn_factors


def regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def test_chains_have_the_moments_of_a_conjugate_posterior_and_leave_generators_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + torch.randn(30, generator=generator).double()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    chains = fit_nuts(regression, [x, y], n_samples=200, n_warmup=50, compiled=True)
    assert torch.equal(torch.rand(1), expected)
    covariance = torch.linalg.inv(torch.eye(2, dtype=x.dtype) + x.mT @ x)
    draws = chains.merged["weights"]
    assert draws.shape == (400, 2)
    error = covariance.diagonal().sqrt() / chains.n_effective["weights"].sqrt()
    assert bool(((draws.mean(0) - covariance @ (x.mT @ y)).abs() < 4 * error).all())
    torch.testing.assert_close(draws.std(0), covariance.diagonal().sqrt(), rtol=0.2, atol=0)
    assert float(chains.r_hat["weights"].max()) < 1.05
    assert chains.n_divergent == 0
    again = fit_nuts(regression, [x, y], n_samples=200, n_warmup=50, compiled=True)
    assert torch.equal(again.merged["weights"], draws)


def test_message_passing_a_full_guide_and_chains_agree_on_a_small_tensor() -> None:
    """3 x 4 x 2, rank 1, variances and noise given: noise-free entries have the same moments, each in its own way."""
    rng = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(*map(np.arange, (3, 4, 2)), indexing="ij"), -1).reshape(-1, 3)
    X = np.tile(cells, (3, 1))
    factors = np.array([1.2, 0.8, 1.5]), np.array([0.9, 1.3, -1.0, 0.6]), np.array([1.0, 1.6])
    f = factors[0][X[:, 0]] * factors[1][X[:, 1]] * factors[2][X[:, 2]]
    y = f + 0.4 * rng.normal(size=len(f))
    fixed: dict[str, Any] = {"main_effects": False, "learn_hyperparameters": False, "calibration": 0}
    fixed |= {"random_state": 0, "progress": False}
    sweeps = BayesianCP(1, tol=1e-9, max_iter=500, **fixed).fit(X, y)
    full = BayesianCP(1, guide="full", n_steps=500, learning_rate=0.05, **fixed).fit(X, y)
    assert np.mean(full.bound_history_[-100:]) > sweeps.bound_, "a larger family"
    posterior = full._posterior
    assert isinstance(posterior, DrawnFactors)
    positions, values = torch.from_numpy(X), torch.from_numpy((y - full.y_mean_) / full.y_scale_)
    start = {name.replace(".", "_"): x.mean(0) for name, x in posterior.drawn.items()}
    start |= {f"factor_{k}": start[f"factor_{k}"][:-1] for k in range(3)}
    program, one = posterior.model.program(posterior.parameters), torch.ones_like(values)
    rows = [positions, values, one, one]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ChainWarning)  # two factors may change their signs: r_hat of entries counts
        chains = fit_nuts(program, rows, n_samples=100, n_warmup=40, max_tree_depth=5, start=start, compiled=True)
    drawn = drawn_factors(posterior.model, posterior.parameters, chains.merged)
    at = torch.from_numpy(cells)
    mean, variance = drawn.moments(at)
    entries = torch.stack([drawn._at(s, at) for s in range(200)]).reshape(2, 100, -1)
    assert float(split_gelman_rubin(entries, 0, 1).max()) < 1.1
    error = (variance / effective_sample_size(entries, 0, 1)).sqrt()
    for other, limit in ((sweeps._posterior, 1.0), (posterior, 1.5)):
        m, v = other.moments(at)
        apart = (m - mean).abs()
        assert float((apart / error).square().mean().sqrt()) < 4 * limit, "within Monte Carlo error, about"
        assert float((apart / variance.sqrt()).square().mean().sqrt()) < 0.3
        assert float((v / variance).log().mean().exp().sqrt()) == pytest.approx(
            1.0, abs=0.1 if other is posterior else 0.2
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 3}, "n_samples: expected an integer of at least 4, got 3"),
        ({"n_warmup": 0}, "n_warmup: expected an integer of at least 1, got 0"),
        ({"n_chains": 1}, "n_chains: expected an integer of at least 2, got 1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_nuts(regression, [torch.zeros(3, 2), torch.zeros(3)], **change)


def test_chains_that_have_not_met_are_told_of() -> None:
    def two_hills(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 20.0))
        pyro.factor("hills", -0.5 * (x.abs() - 20.0) ** 2)

    with pytest.warns(ChainWarning, match="r_hat is up to"):
        fit_nuts(two_hills, [torch.zeros(1)], n_samples=20, n_warmup=20, n_chains=4, random_state=1)
