"""Variational adapters where theory gives the answer: a model that is linear in its core, with normal noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probtensor.models import FLoRAConfig, fit_laplace, fit_variational, inject_adapters
from probtensor.models.flora import Adapters

DOUBLE = torch.float64
NOISE, PRECISION = 0.2, 0.7


def linear_case() -> tuple[Adapters, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Adapters, batches, and the posterior's exact mean and precision."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    adapters = inject_adapters(layer, FLoRAConfig(rank_pattern={"": (2, 3)}))
    x = torch.randn(40, 5, dtype=DOUBLE)
    x[:, 1] += x[:, 0]  # correlated
    delta = adapters.deltas("default")["weight"]
    A_out, A_in = delta.factors
    assert A_out is not None
    assert A_in is not None
    design = (delta.scale * torch.einsum("or,ni->nori", A_out, x @ A_in)).reshape(160, 6).detach()
    residual = design @ torch.randn(6, dtype=DOUBLE) + NOISE**0.5 * torch.randn(160, dtype=DOUBLE)
    y = layer(x).detach() + residual.reshape(40, 4)
    precision = design.T @ design / NOISE + PRECISION * torch.eye(6, dtype=DOUBLE)
    mean = torch.linalg.solve(precision, design.T @ residual) / NOISE
    with torch.no_grad():  # trained, nearly
        delta.core.copy_((mean + 0.1 * torch.randn(6, dtype=DOUBLE)).reshape(2, 3))
    return adapters, [(x[:20], y[:20]), (x[20:], y[20:])], mean, precision


def log_likelihood(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.distributions.Normal(model(batch[0]), NOISE**0.5).log_prob(batch[1]).sum()


@pytest.mark.parametrize("guide", ["mean_field", "full", "low_rank"])
def test_linear_models_have_the_moments_of_theory(guide: Any) -> None:
    """Mean field: the exact mean, and variances 1/Λᵢᵢ of the precision Λ; a full normal is exact."""
    adapters, batches, mean, precision = linear_case()
    whole = [tuple(torch.cat(part) for part in zip(*batches, strict=True))]
    before = {key: value.clone() for key, value in adapters.state_dict().items()}
    flags = [p.requires_grad for p in adapters.model.parameters()]
    state = torch.get_rng_state()
    posterior = fit_variational(adapters, whole, log_likelihood, guide=guide, prior_precision=PRECISION, n_steps=700)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in adapters.model.parameters()] == flags
    assert all(torch.equal(value, before[key]) for key, value in adapters.state_dict().items())
    exact = torch.linalg.inv(precision)
    deviation = exact.diagonal().sqrt()
    assert float(((posterior.mean - mean) / deviation).abs().max()) < 0.15
    if guide == "mean_field":
        torch.testing.assert_close(posterior.covariance.diagonal(), 1 / precision.diagonal(), rtol=0.2, atol=0)
        assert bool((posterior.covariance.diagonal() < exact.diagonal()).all())
    elif guide == "full":
        torch.testing.assert_close(posterior.covariance.diagonal(), exact.diagonal(), rtol=0.2, atol=0)
    outputs = posterior.outputs(whole[0][0], 500)
    laplace = fit_laplace(
        adapters, whole, likelihood="regression", prior_precision=PRECISION, noise_variance=NOISE, mode="newton"
    )
    assert float((outputs.mean(0) - laplace.predict(whole[0][0]).mean).abs().max()) < 0.15
    posterior.set_mean()
    torch.testing.assert_close(adapters.deltas("default")["weight"].core.flatten(), posterior.mean)


def test_batches_are_scaled_to_all_rows() -> None:
    adapters, batches, mean, precision = linear_case()
    posterior = fit_variational(adapters, batches, log_likelihood, prior_precision=PRECISION, n_steps=700)
    deviation = torch.linalg.inv(precision).diagonal().sqrt()
    assert float(((posterior.mean - mean) / deviation).abs().max()) < 0.5
    torch.testing.assert_close(posterior.covariance.diagonal(), 1 / precision.diagonal(), rtol=0.3, atol=0)


def test_malformed_calls_are_refused() -> None:
    adapters, batches, _, _ = linear_case()
    for options, message in (
        ({"guide": "flow"}, "guide: expected one of mean_field, low_rank, full, got 'flow'"),
        ({"prior_precision": -1}, "prior_precision: expected a positive number, got -1"),
        ({"n_steps": 0}, "n_steps: expected an integer of at least 1, got 0"),
        ({"subset": "none"}, "subset: expected 'core', 'all' or names of parameters, got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_variational(adapters, batches, log_likelihood, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        fit_variational(adapters, [], log_likelihood)
    with pytest.raises(FloatingPointError, match="the bound is -inf at step 0"):
        fit_variational(adapters, batches, lambda model, batch: model(batch[0]).sum() - float("inf"))
    adapters.set_active([])
    with pytest.raises(ValueError, match=r"adapters: expected 'default' to be active, got \(\)"):
        fit_variational(adapters, batches, log_likelihood, name="default")
