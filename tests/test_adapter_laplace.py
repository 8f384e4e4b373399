"""Laplace over adapters' cores: against brute force, and where theory gives the posterior and the evidence exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.func import functional_call

from probtensor.inference.laplace import Curvature, Summary, log_evidence
from probtensor.metrics import expected_calibration_error
from probtensor.models import FLoRAConfig, fit_by_evidence, fit_laplace, inject_adapters
from probtensor.models.adapter_cores import trained_cores
from probtensor.models.flora import Adapters

DOUBLE = torch.float64


def moved(adapters: Adapters, seed: int = 0) -> Adapters:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in adapters.deltas("default").values():
            delta.core += torch.randn(delta.core.shape, generator=generator, dtype=DOUBLE) / 5
    return adapters


def linear_case(noise: float = 0.3) -> tuple[Adapters, Tensor, Tensor, Tensor]:
    """A model that is linear in its core: adapters, inputs, values, and the derivatives of the values (40·2, 6)."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    adapters = inject_adapters(layer, FLoRAConfig(rank_pattern={"": (2, 3)}))
    x = torch.randn(40, 5, dtype=DOUBLE)
    delta = adapters.deltas("default")["weight"]
    A_out, A_in = delta.factors
    assert A_out is not None
    assert A_in is not None
    design = (delta.scale * torch.einsum("or,ni->nori", A_out, x @ A_in)).reshape(160, 6).detach()
    y = layer(x).detach() + (design @ torch.randn(6, dtype=DOUBLE)).reshape(40, 4)
    return adapters, x, y + noise * torch.randn(40, 4, dtype=DOUBLE), design


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_linear_models_have_their_exact_posterior_predictions_and_evidence(structure: Any) -> None:
    """Wherever the core is. Derivatives of a linear layer factorise, A_outᵀA_out ⊗ xxᵀ, so Kronecker is exact too."""
    adapters, x, y, design = linear_case()
    delta, precision, noise = adapters.deltas("default")["weight"], 0.7, 0.2
    with adapters.disable():
        residual = (y - adapters.model(x)).reshape(-1)
    evidence = MultivariateNormal(
        torch.zeros(160, dtype=DOUBLE), design @ design.T / precision + noise * torch.eye(160, dtype=DOUBLE)
    ).log_prob(residual)
    covariance = torch.linalg.inv(design.T @ design / noise + precision * torch.eye(6, dtype=DOUBLE))
    mean = covariance @ design.T @ residual / noise
    for where in (torch.zeros(6, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE), mean):
        with torch.no_grad():
            delta.core.copy_(where.reshape(2, 3))
        batches = [(x[:25], y[:25]), (x[25:], y[25:])]
        options: dict[str, Any] = {"likelihood": "regression", "prior_precision": precision, "noise_variance": noise}
        posterior = fit_laplace(adapters, batches, structure=structure, mode="newton", **options)
        assert posterior.log_marginal_likelihood == pytest.approx(float(evidence), rel=1e-10)
        torch.testing.assert_close(posterior.covariance(), covariance)
        predicted = posterior.predict(x)
        with adapters.disable():
            base = adapters.model(x)
        torch.testing.assert_close(predicted.mean, base + (design @ mean).reshape(40, 4))
        variance = ((design @ covariance) * design).sum(1).reshape(40, 4) + noise
        torch.testing.assert_close(predicted.std, variance.sqrt())
    trained = fit_laplace(adapters, batches, structure=structure, **options)  # at the mode, both modes are one
    assert trained.log_marginal_likelihood == pytest.approx(float(evidence), rel=1e-10)
    torch.testing.assert_close(trained.predict(x).mean, predicted.mean)


def test_hyperparameters_are_those_of_the_largest_exact_evidence() -> None:
    adapters, x, y, design = linear_case()
    with adapters.disable():
        residual = (y - adapters.model(x)).reshape(-1)

    def evidence(precision: float, noise: float) -> float:
        covariance = design @ design.T / precision + noise * torch.eye(160, dtype=DOUBLE)
        return float(MultivariateNormal(torch.zeros(160, dtype=DOUBLE), covariance).log_prob(residual))

    posterior = fit_laplace(adapters, [(x, y)], likelihood="regression", mode="newton")
    best = evidence(posterior.prior_precision, posterior.noise_variance)
    assert posterior.log_marginal_likelihood == pytest.approx(best, rel=1e-9)
    for factor in (0.97, 1.03):
        assert evidence(posterior.prior_precision * factor, posterior.noise_variance) < best
        assert evidence(posterior.prior_precision, posterior.noise_variance * factor) < best
    assert posterior.noise_variance == pytest.approx(0.09, rel=0.3)
    assert 0 < posterior.effective_parameters < 6


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)).double()


def gauss_newton(adapters: Adapters, x: Tensor, subset: str = "core") -> tuple[Tensor, Tensor]:
    """Derivatives (n, C, P) entry by entry from finite differences, and H for softmax from its definition."""
    cores = dict(trained_cores(adapters, "default", subset).values())
    columns = []
    with torch.no_grad():
        for key, core in cores.items():
            for i in range(core.numel()):
                up, down = core.clone(), core.clone()
                up.view(-1)[i] += 1e-5
                down.view(-1)[i] -= 1e-5
                change = functional_call(adapters.model, {key: up}, (x,)) - functional_call(
                    adapters.model, {key: down}, (x,)
                )
                columns.append(change / 2e-5)
        J = torch.stack(columns, -1)
        p = adapters.model(x).softmax(-1)
    H = sum(J[n].T @ (torch.diag(p[n]) - torch.outer(p[n], p[n])) @ J[n] for n in range(len(x)))
    assert isinstance(H, Tensor)
    return J, H


@pytest.mark.parametrize("subset", ["core", "all"])
@pytest.mark.parametrize("jacobian", ["vmap", "loop"])
def test_classes_agree_with_brute_force(subset: Any, jacobian: Any) -> None:
    adapters = moved(inject_adapters(small_net(), FLoRAConfig(r=2, modules_to_save=["3"])))
    x, labels = torch.randn(12, 2, 5, dtype=DOUBLE), torch.arange(12) % 3
    J, H = gauss_newton(adapters, x, subset)
    P = H.shape[0]
    posterior = fit_laplace(adapters, [(x, labels)], prior_precision=0.5, subset=subset, jacobian=jacobian)
    covariance = torch.linalg.inv(H + 0.5 * torch.eye(P, dtype=DOUBLE))
    torch.testing.assert_close(posterior.covariance(), covariance, rtol=1e-6, atol=1e-8)
    mean, spread = posterior.outputs(x)
    with torch.no_grad():
        torch.testing.assert_close(mean, adapters.model(x))
    torch.testing.assert_close(spread, J @ covariance @ J.mT, rtol=1e-6, atol=1e-8)
    theta = torch.cat([core.flatten() for _, core in trained_cores(adapters, "default", subset).values()])
    evidence = float(mean.log_softmax(1)[torch.arange(12), labels].sum()) - 0.25 * float(theta @ theta)
    evidence += 0.5 * (P * math.log(0.5) - float(torch.logdet(H + 0.5 * torch.eye(P, dtype=DOUBLE))))
    assert posterior.log_marginal_likelihood == pytest.approx(evidence, abs=1e-6)
    diagonal = fit_laplace(adapters, [(x, labels)], prior_precision=0.5, subset=subset, structure="diagonal")
    torch.testing.assert_close(diagonal.covariance(), torch.diag(1 / (H.diag() + 0.5)), rtol=1e-6, atol=1e-8)


def test_kronecker_blocks_are_what_their_definition_says() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3), (4,), (2, 2, 3)]
    rows = [torch.randn(20, *shape, dtype=DOUBLE) for shape in shapes]
    curvature = Curvature("kronecker", shapes)
    curvature.add([row[:9] for row in rows])
    curvature.add([row[9:] for row in rows])
    spectrum = curvature.spectrum()
    turned = spectrum.rotate(
        [torch.randn(5, *shape, generator=torch.Generator().manual_seed(n)).double() for n, shape in enumerate(shapes)]
    )
    vectors = [
        torch.randn(5, *shape, generator=torch.Generator().manual_seed(n)).double().flatten(1)
        for n, shape in enumerate(shapes)
    ]
    blocks = []
    for row in rows:
        grams = [row.movedim(n, 0).flatten(1) @ row.movedim(n, 0).flatten(1).T for n in range(1, row.ndim)]
        block = grams[0]
        for gram in grams[1:]:
            block = torch.kron(block, gram / row.square().sum())
        blocks.append(block)
        torch.testing.assert_close(block.trace(), row.square().sum())
    H, v = torch.block_diag(*blocks), torch.cat(vectors, 1)
    torch.testing.assert_close((turned * spectrum.values) @ turned.T, v @ H @ v.T)


@pytest.mark.parametrize("counts", [(1,), (3, 4), (3, 4, 5), (9, 1), (10, 3)])
def test_the_full_curvature_of_few_rows_is_that_of_many(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    curvature, seen = Curvature("full", [(2, 3), (4,)]), []
    for count in counts:
        rows = [torch.randn(count, 2, 3, dtype=DOUBLE), torch.randn(count, 4, dtype=DOUBLE)]
        rows[0][0], rows[1][0] = 0.0, 0.0  # a row that no parameter moves
        curvature.add(rows)
        seen.append(torch.cat([row.flatten(1) for row in rows], 1))
    spectrum, eye = curvature.spectrum(), torch.eye(10, dtype=DOUBLE)
    turned = spectrum.rotate([eye[:, :6].reshape(10, 2, 3), eye[:, 6:]])
    torch.testing.assert_close(turned @ turned.mT, eye)
    torch.testing.assert_close((turned * spectrum.values) @ turned.mT, torch.cat(seen).mT @ torch.cat(seen))


def test_probit_and_draws_agree_and_rows_far_away_are_less_certain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    adapters = inject_adapters(model, FLoRAConfig(r=3))
    x = torch.randn(90, 2, dtype=DOUBLE) + 3 * torch.eye(3, 2, dtype=DOUBLE).repeat(30, 1)
    labels = torch.arange(90) % 3
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    posterior = fit_laplace(adapters, [(x, labels)])
    for probabilities, std in (posterior.predict(x), posterior.predict(x, 4000)):
        torch.testing.assert_close(probabilities.sum(1), torch.ones(90, dtype=DOUBLE))
        assert bool((std > 0).all())
    error = (posterior.predict(x).mean - posterior.predict(x, 4000).mean).abs()
    assert float(error.mean()) < 0.02  # by the variances of the outputs alone, without covariances: 0.05
    assert float(error.max()) < 0.1
    assert torch.equal(posterior.predict(x, 7).mean, posterior.predict(x, 7).mean)
    with torch.no_grad():
        far = torch.tensor([[-4.0, 20.0]], dtype=DOUBLE)
        assert posterior.predict(far).mean.max() < model(far).softmax(1).max()
    probabilities = posterior.predict(x).mean
    fresh = torch.randn(300, 2, dtype=DOUBLE) + 3 * torch.eye(3, 2, dtype=DOUBLE).repeat(100, 1)
    classes = torch.arange(300) % 3
    held_out, tested = (fresh[:150], classes[:150]), (fresh[150:], classes[150:])

    def nll() -> float:
        return float(nn.functional.nll_loss(posterior.predict(tested[0]).mean.log(), tested[1]))

    before = nll()
    assert math.exp(-13) < posterior.tune_temperature([held_out]) == posterior.temperature < math.exp(6)
    assert nll() < before + 0.01
    assert expected_calibration_error(tested[1], posterior.predict(tested[0]).mean) < 0.15
    posterior.temperature = 0.0
    with torch.no_grad():
        torch.testing.assert_close(posterior.predict(x).mean, model(x).softmax(1))
    posterior.temperature = 1.0
    assert torch.equal(posterior.predict(x).mean, probabilities)


def test_rounds_of_evidence_lead_to_the_mode_and_its_prior() -> None:
    adapters, x, y, _ = linear_case()
    exact = fit_laplace(adapters, [(x, y)], likelihood="regression", mode="newton")
    found = fit_by_evidence(adapters, [(x, y)], likelihood="regression", n_rounds=8, n_steps=300)
    assert found.prior_precision == pytest.approx(exact.prior_precision, rel=0.02)
    assert found.noise_variance == pytest.approx(exact.noise_variance, rel=0.02)
    torch.testing.assert_close(found.predict(x).mean, exact.predict(x).mean, rtol=0, atol=0.02)


def test_evidence_keeps_a_network_that_fits_perfectly_from_despair() -> None:
    """Trained without a prior, on few rows, the curvature is nearly zero and the posterior far too wide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    adapters = inject_adapters(model, FLoRAConfig(r=4))
    x = torch.randn(430, 2, dtype=DOUBLE)
    labels = (x.sum(1) > 0).long()
    batches = [(x[:15], labels[:15]), (x[15:30], labels[15:30])]
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:30]), labels[:30]).backward()
        optimizer.step()
    factors = {key: value.clone() for key, value in adapters.state_dict().items() if "factor" in key}

    def nll(posterior: Any) -> float:
        return float(nn.functional.nll_loss(posterior.predict(x[30:]).mean.log(), labels[30:]))

    wide = nll(fit_laplace(adapters, batches))
    assert nll(fit_by_evidence(adapters, batches)) < 0.7 * wide
    state = adapters.state_dict()
    assert all(torch.equal(state[key], value) for key, value in factors.items())
    with pytest.raises(ValueError, match="n_rounds: expected an integer of at least 1, got 0"):
        fit_by_evidence(adapters, batches, n_rounds=0)
    with pytest.raises(ValueError, match="mode: expected none, as cores go to the mode themselves, got 'newton'"):
        fit_by_evidence(adapters, batches, mode="newton")


def test_recurrent_layers_go_row_by_row_and_modes_of_modules_come_back() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.drop, self.head = nn.GRU(3, 4, batch_first=True), nn.Dropout(0.5), nn.Linear(4, 1)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            y: Tensor = self.head(self.drop(self.rnn(x)[0][:, -1]))
            return y[:, 0] + shift

    model = Net().double()
    model.rnn.eval()
    adapters = moved(inject_adapters(model, FLoRAConfig(r=2, exclude_modules=["head"])))
    x = (torch.randn(6, 5, 3, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE))
    posterior = fit_laplace(
        adapters, [(x, torch.randn(6, dtype=DOUBLE))], likelihood="regression", jacobian="loop", prior_precision=1.0
    )
    assert (model.training, model.rnn.training, model.drop.training) == (True, False, True)
    assert posterior.predict(x).std.shape == (6, 1)
    assert all(p.grad is None for p in model.parameters())


def test_the_grid_finds_the_better_of_two_maxima_and_zero_cores_stop_at_the_bound() -> None:
    adapters = inject_adapters(nn.Linear(3, 2).double(), FLoRAConfig(r=1))
    x = torch.randn(9, 3, dtype=DOUBLE)
    posterior = fit_laplace(adapters, [(x, torch.arange(9) % 2)])
    assert posterior.prior_precision == pytest.approx(1e10)
    summary = Summary(torch.ones(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE), 0.0, None)
    one = torch.tensor(1.0, dtype=DOUBLE)
    assert log_evidence(summary, one, one).item() == pytest.approx(-1 - math.log(2))


def test_malformed_calls_are_refused() -> None:
    adapters = moved(inject_adapters(small_net(), FLoRAConfig(r=2)))
    x, labels = torch.randn(4, 2, 5, dtype=DOUBLE), torch.arange(4) % 3
    for options, message in (
        ({"likelihood": "poisson"}, "likelihood: expected one of classification, regression, got 'poisson'"),
        ({"structure": "low-rank"}, "structure: expected one of full, kronecker, diagonal, got 'low-rank'"),
        ({"prior_precision": 0.0}, r"prior_precision: expected 'marglik' or a positive number, got 0\.0"),
        ({"subset": "head"}, "subset: expected 'core', 'all' or names of parameters, got 'head'"),
        ({"subset": ["9.weight"]}, r"subset: expected names among \['0.weight', '3.weight'\], got '9.weight'"),
        ({"name": "other"}, "name: expected one of the adapters"),
        ({"likelihood": "regression"}, r"batches: expected values like outputs \(4, 3\), got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_laplace(adapters, [(x, labels)], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches: expected at least one row, got none"):
        fit_laplace(adapters, [])
    with pytest.raises(ValueError, match=r"batches: expected numbers of classes \(n,\) for logits"):
        fit_laplace(adapters, [(x, labels.double())])
    with pytest.raises(ValueError, match="batches: expected a target for each of 4 rows, got"):
        fit_laplace(adapters, [(x, torch.arange(7) % 3)])
    posterior = fit_laplace(adapters, [(x, labels)])
    with pytest.raises(ValueError, match="n_samples: expected an integer of at least 1, got 0"):
        posterior.predict(x, 0)
    adapters.merge()
    with pytest.raises(ValueError, match="outputs: expected adapters that are not merged"):
        posterior.predict(x)
    adapters.unmerge()
    adapters.set_active([])
    with pytest.raises(ValueError, match=r"adapters: expected 'default' to be active, got \(\)"):
        posterior.predict(x)
    assert np.isfinite(posterior.log_marginal_likelihood)
