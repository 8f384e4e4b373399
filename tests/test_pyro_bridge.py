"""Pyro's enumeration of state numbers against the closed forms, and a noise that has none."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import Bernoulli, Laplace, MultivariateNormal, Normal, constraints

from probtensor.inference.pyro_bridge import each_state, enumerated_model, fit_states, negative_elbo
from tests import reference_sparse as ref
from tests.sparse_cases import KINDS, case, listed, points, selection

UNIT = constraints.unit_interval


def bsc_prior(states, W, pi, sigma):
    return Bernoulli(pi).log_prob(states).sum(-1)


def bsc_likelihood(y, states, W, pi, sigma):
    return Normal(states @ W.T, sigma).log_prob(y[:, None]).sum(-1)


def gsc_prior(states, W, pi, mu, Psi, sigma):
    return Bernoulli(pi).log_prob(states).sum(-1)


def gsc_likelihood(y, states, W, pi, mu, Psi, sigma):
    active = W * states[..., None, :]  # (n, S, D, H)
    covariance = (active * Psi) @ active.mT + sigma**2 * torch.eye(len(W), dtype=W.dtype)
    return MultivariateNormal(active @ mu, covariance).log_prob(y[:, None])


FUNCTIONS = {"bsc": (bsc_prior, bsc_likelihood), "gsc": (gsc_prior, gsc_likelihood)}


def start_of(this):
    return {name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in this.twin.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bsc", "gsc"])
def test_minus_elbo_is_the_bound_and_its_gradients_are_those_of_the_statistics(name: str, kind: str) -> None:
    """Gradients by Fisher's identity, from the sums that the closed-form M-step takes."""
    this = case(name)
    Y, params = this.sample(20, 3), this.params()
    some = points(Y)
    states, joint, _ = selection(kind, this).step(this.model, params, some, None, 0)
    assert joint.isfinite().all()
    model = enumerated_model(*FUNCTIONS[name], start_of(this))
    value, gradients = negative_elbo(model, some.y, each_state(states))
    assert value == pytest.approx(-float(joint.logsumexp(0).sum()), abs=1e-10)
    assert value == pytest.approx(-ref.bound(this.log_joint, Y, listed(states, 20)), abs=1e-9)

    sums = this.model.statistics(params, some, states, joint.softmax(0))
    (N, D), H, W, variance = Y.shape, this.H, params.W, params.variance
    first, second = sums[: D * H].reshape(D, H), sums[D * H : D * H + H * H].reshape(H, H)
    error = (some.y**2).sum() - 2 * (W * first).sum() + (W @ second * W).sum()
    active = states.inclusion(joint.softmax(0)).sum(1)
    pi = gradients["pi"].new_tensor(this.twin["pi"])
    expected = {
        "W": (first - W @ second) / variance,
        "sigma": (error / variance - N * D) / variance.sqrt(),
        "pi": active / pi - (N - active) / (1 - pi),
    }
    if name == "bsc":
        expected["pi"] = expected["pi"].sum()
    else:
        mean, square = sums[D * H + H * H + H :][:H], second.diagonal()
        away = square - 2 * params.mean * mean + params.mean**2 * active
        expected["mu"] = (mean - active * params.mean) / params.slab
        expected["Psi"] = 0.5 * (away / params.slab - active) / params.slab
    assert gradients.keys() == expected.keys()
    for key, right in expected.items():
        torch.testing.assert_close(-gradients[key], right, rtol=1e-8, atol=1e-8)


def test_gradients_are_those_of_autograd_through_our_joint_density() -> None:
    this = case("bsc")
    some, params = points(this.sample(15, 2)), this.params()
    W, sigma = params.W.clone().requires_grad_(), params.variance.sqrt().requires_grad_()
    chosen = selection("everything", this)
    states, joint, _ = chosen.step(this.model, params._replace(W=W, variance=sigma**2), some, None, 0)
    expected = torch.autograd.grad(-joint.logsumexp(0).sum(), [W, sigma])
    model = enumerated_model(*FUNCTIONS["bsc"], start_of(this))
    _, gradients = negative_elbo(model, some.y, each_state(states))
    torch.testing.assert_close(gradients["W"], expected[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradients["sigma"], expected[1], rtol=1e-8, atol=1e-8)


def test_states_are_written_out_in_their_order() -> None:
    for name in ("tsc", "dsc", "mca"):
        this = case(name)
        for kind in KINDS:
            states, _, _ = selection(kind, this).step(this.model, this.params(), points(this.sample(6, 1)), None, 0)
            assert [[tuple(s) for s in of_point] for of_point in each_state(states).tolist()] == listed(states, 6)


def test_training_comes_where_closed_form_steps_come() -> None:
    this = case("bsc", H=3, D=6)
    Y = this.sample(150, 1)
    every = each_state(selection("everything", this).step(this.model, this.params(), points(Y), None, 0)[0])
    start = start_of(this) | {"W": start_of(this)["W"] + 0.2, "pi": torch.tensor(0.5).double()}
    limits = {"pi": UNIT, "sigma": constraints.positive}
    fit = fit_states(torch.tensor(Y), every, *FUNCTIONS["bsc"], start, constraints=limits, n_steps=250)
    params, some, history = this.params(), points(Y), []
    for _ in range(100):
        states, joint, _ = selection("everything", this).step(this.model, params, some, None, 0)
        history.append(float(joint.logsumexp(0).mean()))
        params = this.model.update(params, this.model.statistics(params, some, states, joint.softmax(0)), False)
    assert fit.bound_history[-1] == pytest.approx(history[-1], abs=1e-3)
    assert len(fit.bound_history) == 251
    torch.testing.assert_close(fit.params["W"], params.W, rtol=0.03, atol=0.03)
    torch.testing.assert_close(fit.posterior.sum(1), torch.ones(150).double())


def test_a_noise_of_the_users_own_is_learned_and_no_global_state_stays() -> None:
    """Laplace noise: its scale, and a dictionary better than that of Gaussian noise."""
    rng = np.random.default_rng(3)
    W = np.kron(np.eye(3), np.ones((3, 1))) * 3
    S = (rng.random((300, 3)) < 0.4).astype(float)
    y = torch.tensor(S @ W.T + rng.laplace(size=(300, 9)))
    states = torch.tensor(ref.enumerate_states(3)).double().expand(300, 8, 3)

    def prior(states, W, pi, scale):
        return Bernoulli(pi).log_prob(states).sum(-1)

    def likelihood(y, states, W, pi, scale):
        return Laplace(states @ W.T, scale).log_prob(y[:, None]).sum(-1)

    start = {"W": torch.tensor(W + rng.normal(size=W.shape)), "pi": torch.full((3,), 0.3).double()}
    start["scale"] = torch.tensor(2.0).double()
    limits = {"pi": UNIT, "scale": constraints.positive}
    pyro.param("mine", torch.tensor(7.0))
    copies = {name: value.clone() for name, value in start.items()}
    before = torch.get_rng_state(), dict(pyro.get_param_store().named_parameters())
    fit = fit_states(y, states, prior, likelihood, start, constraints=limits, n_steps=200)
    assert torch.equal(before[0], torch.get_rng_state())
    assert dict(pyro.get_param_store().named_parameters()).keys() == before[1].keys() == {"mine"}
    pyro.clear_param_store()
    assert float(fit.params["scale"]) == pytest.approx(1.0, rel=0.05)
    assert np.abs(fit.params["W"].numpy() - W).max() < 0.4
    active = torch.einsum("ns,nsh->nh", fit.posterior, states).numpy()
    assert ((active > 0.5) == S).mean() > 0.95
    assert fit.bound_history[-1] > fit.bound_history[0]
    again = fit_states(y, states, prior, likelihood, start, constraints=limits, n_steps=200)
    assert again.bound_history == fit.bound_history
    assert all(torch.equal(start[name], copies[name]) for name in start)


def test_faults_are_named() -> None:
    y, states = torch.zeros(4, 2), torch.zeros(3, 2, 2)
    nothing = lambda *args, **params: torch.full((4, 2), -math.inf)  # noqa: E731
    with pytest.raises(ValueError, match=r"^states: expected shape \(n, S, H\) for y .*got \(3, 2, 2\) for \(4, 2\)"):
        fit_states(y, states, nothing, nothing, {})
    with pytest.raises(FloatingPointError, match="the bound is -inf after 0 steps; try a lower learning_rate"):
        fit_states(y, torch.zeros(4, 2, 2), nothing, nothing, {"a": torch.tensor(1.0)})
