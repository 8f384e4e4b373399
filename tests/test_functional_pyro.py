"""FunBaT as a Pyro program: its prior against dense kernels, its posterior against exact and message-passing ones."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from probtensor import CategoricalAxis, ContinuousAxis, Observations
from probtensor.inference.variational import fit_svi
from probtensor.kernels import Kernel, Matern
from probtensor.models.functional_pyro import functional_program, noise_shape, prior_values
from probtensor.models.latent_functions import ExchangeableRows, GaussianProcess, LatentFunctions
from tests.reference_kernels import dense_kernel_prior
from tests.test_latent_functions import CLOSE_TIMES, KERNELS, hyper_of

F64 = torch.float64


def covariance_of(f: LatentFunctions, hyper: Tensor) -> Tensor:
    """Prior covariance (T, R, T, R), from the derivative by the noise, which values are linear in."""
    noise = torch.zeros(noise_shape(f, hyper.shape[1]), dtype=F64)
    slope = torch.autograd.functional.jacobian(lambda z: prior_values(f, hyper, z), noise).flatten(2)
    return torch.einsum("tri,usi->trus", slope, slope)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_values_have_the_kernels_covariance(kernel: Kernel) -> None:
    hyper = hyper_of(kernel)
    expected = dense_kernel_prior(kernel, CLOSE_TIMES, hyper.exp(), CLOSE_TIMES)
    torch.testing.assert_close(covariance_of(GaussianProcess(CLOSE_TIMES, kernel), hyper), expected, rtol=0, atol=1e-7)


def test_rows_of_labels_share_a_mean() -> None:
    found = covariance_of(
        ExchangeableRows(3, torch.zeros((), dtype=F64)), torch.log(torch.tensor([[2.0], [0.5]]).double())
    )
    torch.testing.assert_close(found[:, 0, :, 0], 2.0 * torch.eye(3, dtype=F64) + 0.5)


@pytest.mark.parametrize("kernel", KERNELS[:1] + KERNELS[3:4] + KERNELS[-1:], ids=repr)
def test_gradients_by_hyperparameters_are_those_of_finite_differences(kernel: Kernel) -> None:
    f, hyper = GaussianProcess(CLOSE_TIMES[[0, 1, 4, 5]], kernel), hyper_of(kernel, 1).requires_grad_()
    noise = torch.randn(noise_shape(f, 1), generator=torch.Generator().manual_seed(0), dtype=F64)
    assert torch.autograd.gradcheck(lambda h: prior_values(f, h, noise), (hyper,))


def curve(n: int = 8) -> tuple[Observations, dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 4, n))
    axes = [ContinuousAxis("x", kernel=Matern(1.5))]
    data = Observations.from_table(pd.DataFrame({"x": x}), np.sin(2 * x) + 0.3 * rng.normal(size=n), axes)
    return data, {str(data.axes[0].name): torch.log(torch.tensor([[1.0], [1.0]], dtype=F64))}


def known_noise():
    return lambda f: dist.Normal(f, 0.3)


def test_one_function_has_the_bound_and_mean_of_the_dense_process() -> None:
    data, hyper = curve()
    model = functional_program(data.axes, 1, known_noise, hyperparameters=hyper)
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    rows = [data.positions, data.values]
    fit = fit_svi(model, guide, rows, n_steps=1500, learning_rate=0.05, decay=1e-2, tol=0.0)
    f = GaussianProcess(torch.tensor(data.axes[0].coordinates), data.axes[0].kernel)
    (log_hyper,) = hyper.values()
    K = dense_kernel_prior(data.axes[0].kernel, f.coordinates, log_hyper.exp(), f.coordinates)[:, 0, :, 0]
    marginal = K + 0.09 * torch.eye(len(K), dtype=F64)
    evidence = dist.MultivariateNormal(torch.zeros(len(K), dtype=F64), marginal).log_prob(data.values)
    assert np.mean(fit.bound_history[-200:]) == pytest.approx(float(evidence), abs=0.3)
    noise = guide.get_posterior().mean.detach().reshape(noise_shape(f, 1))  # values are linear in it, and so their mean
    means, expected = prior_values(f, log_hyper, noise)[:, 0], K @ torch.linalg.solve(marginal, data.values)
    std = (K - K @ torch.linalg.solve(marginal, K)).diagonal().sqrt()
    assert ((means - expected).abs() < 0.3 * std).all()


@pytest.mark.parametrize("form", ["cp", "tucker"])
def test_counts_of_labels_by_time_are_fitted(form: str) -> None:
    """A likelihood of one's own, all hyperparameters learned, both forms; entries correlate with the truth."""
    rng = np.random.default_rng(1)
    label, time = rng.integers(0, 4, 300), rng.integers(0, 30, 300) / 5.0
    truth = rng.normal(size=4)[label] * np.sin(time)
    axes = [CategoricalAxis("label"), ContinuousAxis("time")]
    data = Observations.from_table(pd.DataFrame({"label": label, "time": time}), rng.poisson(np.exp(1 + truth)), axes)

    def counts():
        level = pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=F64), 2.0))
        return lambda f: dist.Poisson(torch.exp(level + f))

    model = functional_program(data.axes, 1, counts, form=form)
    rows = [data.positions, data.values]
    guide = AutoNormal(model)
    fit = fit_svi(model, guide, rows, n_steps=600, learning_rate=0.03, tol=0.0)
    with fit.scope(), torch.no_grad():
        trace = pyro.poutine.trace(guide).get_trace(*rows)
        entries = pyro.poutine.replay(model, trace)(*rows)
    assert np.corrcoef(entries.numpy(), truth)[0, 1] > 0.8
    assert math.isfinite(fit.bound_history[-1])


def test_what_cannot_be_is_refused() -> None:
    data, hyper = curve()
    with pytest.raises(ValueError, match="rank: expected an integer of at least 1, got 0"):
        functional_program(data.axes, 0)
    with pytest.raises(ValueError, match="form: expected 'cp' or 'tucker', got 'parafac'"):
        functional_program(data.axes, 1, form="parafac")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axes: expected fitted axes, got 't' that is not"):
        functional_program([ContinuousAxis("t")], 1)
    with pytest.raises(ValueError, match=r"hyperparameters: expected names among \['x'\], got \['y'\]"):
        functional_program(data.axes, 1, hyperparameters={"y": hyper["x"]})
