"""Neural tensor completion of binary values and counts: what it recovers, its distributions, its parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize
from torch import nn

import probtensor as pt
from probtensor.inference.influence import GaussNewton, influence
from probtensor.models import NeuralTensorCompletion
from probtensor.models.completion_effects import number_cells, start_effects, subsets_of, sweep
from probtensor.models.completion_links import deviance, deviances, inverse_link, means
from probtensor.models.completion_stacking import stack

QUICK = {"rank": 2, "hidden": (8,), "embedding": 4, "max_epochs": 3, "n_members": 2, "random_state": 0}
QUICK |= {"progress": False, "device": "cpu"}
DISCRETE = "bernoulli", "poisson"
TRAIN, TEST = slice(0, 3000), slice(3000, None)


def planted(likelihood: str, n: int = 4000, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Labels, values, and the predictor: effects of two modes and a product of factors."""
    rng = np.random.default_rng(seed)
    index = np.stack([rng.integers(0, size, n) for size in (20, 15, 4)], axis=1)
    a, b, c, d = (rng.normal(size=size) for size in (20, 15, 20, 15))
    eta = 0.5 + a[index[:, 0]] + b[index[:, 1]] + 0.7 * c[index[:, 0]] * d[index[:, 1]]
    X = pd.DataFrame({f"mode{k}": np.char.mod(f"m{k}-%d", column).astype(object) for k, column in enumerate(index.T)})
    y = rng.poisson(np.exp(eta)) if likelihood == "poisson" else rng.random(n) < 1 / (1 + np.exp(-eta))
    return X, y.astype(float), eta


def log_prob(likelihood: str, eta: np.ndarray, y: np.ndarray) -> np.ndarray:
    kind = stats.poisson if likelihood == "poisson" else stats.bernoulli
    return kind(means(likelihood, eta)).logpmf(y)


@pytest.fixture(scope="module", params=DISCRETE)
def case(request: pytest.FixtureRequest) -> tuple[str, NeuralTensorCompletion]:
    X, y, _ = planted(request.param)
    model = NeuralTensorCompletion(likelihood=request.param, random_state=0, progress=False, device="cpu")
    return request.param, model.fit(X[TRAIN], y[TRAIN])


def test_predictions_come_near_the_truth(case):
    likelihood, model = case
    X, y, eta = planted(likelihood)
    found = model.log_prob(X[TEST], y[TEST]).mean()
    truth = log_prob(likelihood, eta[TEST], y[TEST]).mean()
    alone = NeuralTensorCompletion(rank=0, head=None, interactions=False, likelihood=likelihood, random_state=0)
    modes = alone.fit(X[TRAIN], y[TRAIN]).log_prob(X[TEST], y[TEST]).mean()
    share = 0.85 if likelihood == "bernoulli" else 0.25  # binary values say little
    assert found > truth - share * (truth - modes)
    assert 0.9 < y[TEST].mean() / model.predict(X[TEST]).mean() < 1.1
    assert (model.y_mean_, model.y_scale_) == (0.0, 1.0)


def test_intervals_of_counts_cover_what_they_say():
    X, y, eta = planted("poisson", 6000)
    rng = np.random.default_rng(1)
    y = rng.poisson(np.exp(eta + 2.5) * rng.gamma(4, 1 / 4, len(y))).astype(float)
    model = NeuralTensorCompletion(**QUICK | {"likelihood": "poisson", "max_epochs": 10}).fit(X[:5000], y[:5000])
    lower, upper = model.predict_interval(X[5000:], 0.9)
    assert 0.85 < np.mean((lower <= y[5000:]) & (y[5000:] <= upper)) < 0.95


def test_probabilities_are_those_of_the_values(case):
    likelihood, model = case
    X, y, _ = planted(likelihood)
    mean = model.predict(X[TEST])
    for part in np.array_split(np.argsort(mean), 5):
        assert abs(y[TEST][part].mean() - mean[part].mean()) < 4 * np.sqrt(y[TEST][part].var() / len(part)) + 0.02


def test_values_that_cannot_be_are_named():
    X, y, _ = planted("poisson", 40)
    with pytest.raises(ValueError, match=r'^y: expected 0 or 1 with likelihood="bernoulli", got 2'):
        NeuralTensorCompletion(**QUICK, likelihood="bernoulli").fit(X[:40], np.full(40, 2.0))
    for bad in (-1.0, 0.5):
        with pytest.raises(ValueError, match=r"^y: expected whole numbers of at least 0 .*"):
            NeuralTensorCompletion(**QUICK, likelihood="poisson").fit(X, np.append(y[:-1], bad))
    with pytest.raises(ValueError, match=r"^y_val: expected whole numbers"):
        NeuralTensorCompletion(**QUICK, likelihood="poisson").fit(X, y, X_val=X[:2], y_val=[1.0, 1.5])
    with pytest.raises(ValueError, match=r"^likelihood: expected"):
        NeuralTensorCompletion(**QUICK, likelihood="gamma").fit(X, y)


@pytest.mark.parametrize("likelihood", DISCRETE)
@pytest.mark.parametrize("n", [1, 2, 29, 31, 200])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_few_rows_and_a_single_value(likelihood, n, value):
    X, _, _ = planted(likelihood, n)
    model = NeuralTensorCompletion(**QUICK, likelihood=likelihood).fit(X, np.full(n, value))
    assert np.abs(model.predict(X) - value).max() < 0.5
    assert np.isfinite(model.log_prob(X, np.full(n, 1.0))).all()


@pytest.mark.parametrize("settings", [{"biases": False}, {"interactions": False}, {"head": None}, {"head": "costco"}])
@pytest.mark.parametrize("likelihood", DISCRETE)
def test_parts_can_be_left_out_and_files_give_the_same_bits(likelihood, settings, tmp_path):
    X, y, _ = planted(likelihood, 600)
    model = NeuralTensorCompletion(**QUICK, likelihood=likelihood, **settings).fit(X[:500], y[:500])
    assert np.log(0.3) * 4 < model.log_prob(X[500:], y[500:]).mean() < 0
    assert () not in model.strengths_
    assert all(np.isfinite(curves).all() for curves in model.validation_deviance_.values())
    with pytest.raises(AttributeError, match='validation_rmse_: expected likelihood="gaussian"'):
        _ = model.validation_rmse_
    with pytest.raises(AttributeError, match='noise_std_: expected likelihood="gaussian"'):
        _ = model.noise_std_
    model.save(tmp_path / "a.model")
    again = pt.load(tmp_path / "a.model")
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    np.testing.assert_array_equal(again.log_prob(X, y), model.log_prob(X, y))
    np.testing.assert_array_equal(again.sample_y(X, 3), model.sample_y(X, 3))
    assert set(np.unique(model.sample_y(X, 3))) <= set(range(10_000))


@pytest.mark.parametrize("likelihood", DISCRETE)
def test_effects_are_those_of_penalised_likelihood(likelihood):
    X, y, _ = planted(likelihood, 300)
    labels = np.stack([pd.factorize(X[name])[0] for name in X], axis=1)
    subsets = ((), *subsets_of(3)[:4])
    cells = [number_cells(labels, subset, (20, 15, 4)) for subset in subsets]
    strengths = [1e-3, 2.0, 3.0, 4.0, 5.0]
    start = start_effects(cells, y, np.ones(300), likelihood)
    found, eta = sweep(cells, *start, np.ones(300), strengths, 2000, y, likelihood)
    design = np.concatenate([np.eye(len(part.known))[part.code] for part in cells], axis=1)
    penalty = np.concatenate([np.full(len(part.known), s) for part, s in zip(cells, strengths, strict=True)])

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        fit = design @ b
        gradient = design.T @ (means(likelihood, fit) - y) + penalty * b
        return float(deviance(likelihood, fit, y).sum() / 2 + penalty @ b**2 / 2), gradient

    exact = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 5000}).x
    np.testing.assert_allclose(eta, design @ exact, atol=0.03)
    assert loss(np.concatenate(found))[0] < loss(exact)[0] + 0.01


@pytest.mark.parametrize("likelihood", ["gaussian", *DISCRETE])
def test_deviances_are_those_of_the_densities(likelihood):
    rng = np.random.default_rng(0)
    eta, y = rng.normal(size=20), rng.integers(0, 2, 20).astype(float)
    if likelihood == "gaussian":
        expected = (y - eta) ** 2
    else:
        perfect = stats.poisson(y).logpmf(y) if likelihood == "poisson" else 0.0
        expected = 2 * (perfect - log_prob(likelihood, eta, y))
    np.testing.assert_allclose(deviance(likelihood, eta, y), expected, atol=1e-12)
    tensors = torch.from_numpy(eta).requires_grad_(), torch.from_numpy(y)
    found = deviances(likelihood, *tensors)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), tensors[0])
    np.testing.assert_allclose(gradient, 2 * (inverse_link(likelihood, tensors[0]) - tensors[1]).detach(), atol=1e-12)
    np.testing.assert_allclose(inverse_link(likelihood, tensors[0]).detach(), means(likelihood, eta), rtol=1e-12)


@pytest.mark.parametrize("likelihood", DISCRETE)
def test_weights_of_candidates_are_the_best_on_the_simplex(likelihood):
    _, y, eta = planted(likelihood, 500)
    rng = np.random.default_rng(0)
    design = np.stack([eta + rng.normal(size=500), eta + rng.normal(size=500), rng.normal(size=500)], axis=1)
    weights = stack(design, y, np.ones(500), likelihood)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    best = deviance(likelihood, design @ weights, y).sum()
    for other in rng.dirichlet(np.ones(3), 200):
        assert best < deviance(likelihood, design @ other, y).sum() + 1e-3


# Influence


@pytest.mark.parametrize("parameters", ["last", "all"])
@pytest.mark.parametrize("likelihood", DISCRETE)
def test_influence_through_a_link_is_that_of_gradients(likelihood, parameters):
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape, generator=generator).double())
    inputs = torch.randn(12, 3, generator=generator).double()
    values = (torch.rand(12, generator=generator) < 0.5).double()
    chosen = list(module.parameters()) if parameters == "all" else list(module[2].parameters())

    def gradient(row: int) -> torch.Tensor:
        loss = 0.5 * deviances(likelihood, module(inputs[row : row + 1]), values[row : row + 1]).sum()
        return torch.cat([g.ravel() for g in torch.autograd.grad(loss, chosen)])

    v = torch.stack([gradient(row) for row in range(8, 12)]).sum(dim=0)
    given = (inputs[:8], values[:8]), (inputs[8:], values[8:])
    m = lambda eta: inverse_link(likelihood, eta)  # noqa: E731
    found = influence(module, *given, parameters=parameters, inverse_link=m)
    G = torch.stack([gradient(row) for row in range(8)])
    torch.testing.assert_close(found, G @ v, atol=1e-10, rtol=1e-8)
    J = torch.stack(
        [
            torch.cat([g.ravel() for g in torch.autograd.grad(module(inputs[row : row + 1]).sum(), chosen)])
            for row in range(8)
        ]
    )
    mean = m(module(inputs[:8])).detach()
    W = mean * (1 - mean) if likelihood == "bernoulli" else mean
    H = J.T @ (W[:, None] * J) / 8 + 0.1 * torch.eye(J.shape[1]).double()
    found = influence(
        module, *given, parameters=parameters, inverse_link=m, preconditioner=GaussNewton(0.1, 500, 1e-14)
    )
    torch.testing.assert_close(found, G @ torch.linalg.solve(H, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"biases": False}, {"head": None}])
def test_influence_finds_the_rows_whose_values_are_wrong(settings):
    X, y, _ = planted("bernoulli")
    wrong = np.random.default_rng(0).choice(2000, 100, replace=False)
    y[wrong] = 1 - y[wrong]
    model = NeuralTensorCompletion(**QUICK | {"likelihood": "bernoulli", "max_epochs": 8} | settings)
    model.fit(X[:2000], y[:2000], X_val=X[2000:2500], y_val=y[2000:2500])
    scores = model.influence(X[:2000], y[:2000], X[2000:2500], y[2000:2500])
    size = np.abs(scores)
    assert np.median(size[wrong]) > 1.2 * np.median(np.delete(size, wrong))
    with pytest.raises(ValueError, match=r"^y_query: expected 0 or 1"):
        model.influence(X[:5], y[:5], X[:2], [0.0, 3.0])
