"""Variational inference of Pyro models: exact where exactness is known, the same over ranks, resumable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import constraints

from probtensor.checkpoints import Checkpoints
from probtensor.comm import Serial
from probtensor.inference.variational import fit_svi
from probtensor.intake import Table

if TYPE_CHECKING:
    from tests.conftest import RunMpi

N = 60


def rows(n: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return [x, x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + torch.randn(n, generator=generator).double()]


def regression(x: Tensor, y: Tensor) -> None:
    """Weights of a normal prior and noise of variance one: conjugate."""
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Posterior mean, covariance and log evidence of `regression`."""
    covariance = torch.linalg.inv(torch.eye(2, dtype=x.dtype) + x.mT @ x)
    marginal = torch.eye(len(y), dtype=x.dtype) + x @ x.mT
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), marginal).log_prob(y)
    return covariance @ (x.mT @ y), covariance, float(evidence)


def test_the_bound_is_the_log_evidence_where_the_guide_can_be_exact() -> None:
    x, y = rows()
    guide = AutoMultivariateNormal(regression)
    fit = fit_svi(regression, guide, [x, y], n_steps=1000, learning_rate=0.05, decay=1e-3, tol=0.0)
    mean, covariance, evidence = exact(x, y)
    posterior = guide.get_posterior()
    torch.testing.assert_close(posterior.mean.detach(), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(posterior.covariance_matrix.detach(), covariance, rtol=0.1, atol=1e-3)
    last = torch.tensor(fit.bound_history[-50:])
    assert last.mean() == pytest.approx(evidence, abs=0.02)
    assert last.std() < 0.2, "with an exact guide each draw gives the evidence itself"
    draws = fit.draw(guide, x, y, n_samples=400)["weights"]
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.03)


def test_batches_estimate_the_bound_of_all_rows_and_cover_them() -> None:
    """At fixed parameters the mean over an epoch's batches, weighted by their rows, is the bound of all rows."""
    x, y = rows()
    seen: list[Tensor] = []

    def model(x: Tensor, y: Tensor) -> None:
        seen.append(y)
        weights = pyro.param("weights", lambda: torch.tensor([0.3, 0.2], dtype=torch.float64))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pass

    def idle(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    fit = fit_svi(model, guide, [x, y], batch_size=20, n_steps=6, tol=0.0, optimizer=idle)
    epoch = seen[1:4]  # the first call makes the parameters
    torch.testing.assert_close(torch.cat(epoch).sort().values, y.sort().values)
    assert len({len(batch) for batch in epoch}) > 1, "batches of several sizes"
    total = sum(bound * len(batch) / N for bound, batch in zip(fit.bound_history, epoch, strict=False))
    weights = torch.tensor([0.3, 0.2], dtype=torch.float64)
    assert total == pytest.approx(float(dist.Normal(x @ weights, 1.0).log_prob(y).sum()), abs=1e-9)
    assert not torch.equal(seen[4], seen[1]), "another epoch has other batches"


def test_parameters_of_functions_are_found_in_the_scope_of_the_fit_alone() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        scale = pyro.param("scale", lambda: x.new_ones(2), constraint=constraints.positive)
        pyro.sample("weights", dist.Normal(pyro.param("mean", lambda: x.new_zeros(2)), scale).to_event(1))

    pyro.clear_param_store()
    x, y = rows()
    fit = fit_svi(regression, guide, [x, y], n_steps=1000, learning_rate=0.1, decay=1e-2, tol=0.0)
    assert not dict(pyro.get_param_store())
    mean, covariance, _ = exact(x, y)
    torch.testing.assert_close(fit.params["mean"], mean, rtol=0, atol=0.02)
    wanted = torch.linalg.inv(covariance).diagonal().rsqrt()  # of the best independent normals
    torch.testing.assert_close(fit.params["scale"], wanted, rtol=0.1, atol=0)
    with fit.scope():
        assert torch.equal(pyro.param("mean"), fit.params["mean"])
    assert not dict(pyro.get_param_store())


def test_global_generators_stay_as_they_were() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fit_svi(regression, AutoNormal(regression), rows(), n_steps=20)
    assert torch.equal(torch.rand(3), expected)
    again = fit_svi(regression, AutoNormal(regression), rows(), n_steps=20)
    other = fit_svi(regression, AutoNormal(regression), rows(), n_steps=20, random_state=1)
    assert first.bound_history == again.bound_history != other.bound_history


def test_it_stops_when_the_bound_stops_growing() -> None:
    fit = fit_svi(regression, AutoNormal(regression), rows(), n_steps=5000, tol=1e-2, window=50)
    assert fit.converged
    assert fit.n_iter < 2000
    assert fit.n_iter % 50 == 0


def test_a_fit_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    given = rows()
    table = Table(torch.arange(N)[:, None], given[1], None, None, torch.arange(N))

    def fit(folder: str, steps: int, resume: bool = False) -> Any:
        states = Checkpoints(tmp_path / folder, 10, resume, Serial(), "probtensor.models.funbat.FunBaT", {}, table)
        guide = AutoNormal(regression)
        settings = {"batch_size": 20, "tol": 0.0, "decay": 1.0}
        return fit_svi(regression, guide, given, n_steps=steps, checkpoints=states, **settings)

    whole = fit("whole", 50)
    fit("parts", 30)
    resumed = fit("parts", 50, resume=True)
    assert resumed.bound_history == whole.bound_history
    for name, value in whole.params.items():
        assert torch.equal(resumed.params[name], value)


def test_enumeration_and_users_own_optimizers() -> None:
    """Two clusters; the guide has no draws, so that the bound is the log likelihood of the best parameters."""
    y = torch.cat([torch.full((30,), -2.0), torch.full((20,), 3.0)])

    @pyro.infer.config_enumerate
    def model(y: Tensor) -> None:
        means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 10.0).to_event(1))
        with pyro.plate("rows", len(y)):
            which = pyro.sample("which", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(means[which], 1.0), obs=y)

    guide = AutoDelta(pyro.poutine.block(model, expose=["means"]))
    fit = fit_svi(
        model,
        guide,
        [y],
        elbo=pyro.infer.TraceEnum_ELBO(max_plate_nesting=1),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        n_steps=300,
    )
    torch.testing.assert_close(fit.params["AutoDelta.means"], torch.tensor([-2.0, 3.0]), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "rows: expected tensors of one length"),
        ({"rows": [torch.zeros(3), torch.zeros(4)]}, r"rows: expected tensors of one length, got lengths \[3, 4\]"),
        ({"rows": [torch.zeros(0, 2), torch.zeros(0)]}, "rows: expected at least one row on some rank"),
        ({"n_steps": 0}, "n_steps: expected an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected an integer of at least 1, got 2.5"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number above 0"),
        ({"tol": -1}, "tol: expected a number of at least 0"),
        ({"keys": torch.arange(3)}, f"keys: expected {N} numbers, one a row, got 3"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"rows": rows()} | change
    with pytest.raises(ValueError, match=message):
        fit_svi(regression, AutoNormal(regression), arguments.pop("rows"), **arguments)


def test_a_bound_that_is_not_finite_and_new_parameters_are_named() -> None:
    x, y = rows()
    y[3] = math.inf
    with pytest.raises(FloatingPointError, match="the bound is nan at step 0"):
        fit_svi(unchecked, AutoNormal(unchecked), [x, y])
    calls: list[int] = []

    def model(y: Tensor) -> None:
        calls.append(1)
        pyro.param(f"p{min(len(calls), 3)}", torch.tensor(1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("p1", torch.tensor(1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"expected the parameters of the first step, got \['p2'\] at step 0"):
        fit_svi(model, lambda y: None, [torch.zeros(3)])


def unchecked(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0, validate_args=False), obs=y)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_steps_on_several_ranks_are_those_on_one(run_mpi: RunMpi, n: int) -> None:
    assert run_mpi("variational_ranks.py", n, timeout=200).stdout == f"ok on {n}\n"
