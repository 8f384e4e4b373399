"""Updates in CP form: the formula, steps, compile, files, and what is not for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probtensor.models import (
    FLoRAConfig,
    adapter_layers,
    fit_laplace,
    inject_adapters,
    rank_report,
    relevance_penalty,
    truncate,
)
from probtensor.models.adapter_modules import base_parameter, sites
from probtensor.models.cp_delta import CPDelta, cp_scale
from tests.reference_adapters import cp_by_loops
from tests.test_flora import CP, config_of, made, trained


def factors_of(delta: Any) -> list[Tensor]:
    return [getattr(delta, f"factor_{n}") for n in range(len(delta.shape))]


@pytest.mark.parametrize("kind", ["linear, tiny", "linear", "conv2d, groups", "conv1d", "bare parameter", "gru cell"])
def test_the_effective_weight_is_the_base_and_a_sum_of_outer_products(kind: str) -> None:
    model, _ = made(kind)
    trained(inject_adapters(model, config_of(kind, form="cp")))
    for name, module, key, bank in sites(model):
        delta = bank.deltas["default"]
        assert isinstance(delta, CPDelta)
        expected = base_parameter(module, key) + delta.scale * cp_by_loops(delta.core, factors_of(delta))
        torch.testing.assert_close(getattr(module, key), expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("shape", "r", "rank"), [((9,), 4, 1), ((7, 9), 30, 7), ((6, 5, 3), 16, 15), ((8, 1, 3, 3), 16, 9)]
)
def test_ranks_beyond_sizes(shape: tuple[int, ...], r: int, rank: int) -> None:
    """The rank is cut to what every tensor has, not to each mode's size."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(shape, dtype=torch.float64))})
    delta = inject_adapters(model, FLoRAConfig(r=r, form="cp", target_modules=["w"])).deltas("default")["w"]
    assert delta.core.shape == (rank,)
    assert [tuple(A.shape) for A in factors_of(delta)] == [(size, rank) for size in shape]
    before = model["w"].detach().clone()
    delta.core.data += 1.0
    torch.testing.assert_close(model["w"], before + delta.scale * cp_by_loops(delta.core, factors_of(delta)))


@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 3), (40, 30, 3, 3)])
@pytest.mark.parametrize("r", [2, 30])
def test_a_step_in_the_core_moves_the_weight_by_its_size(shape: tuple[int, ...], r: int) -> None:
    weight = nn.ParameterDict({"w": nn.Parameter(torch.zeros(shape))})
    delta = inject_adapters(weight, FLoRAConfig(r=r, alpha=0.5, form="cp", target_modules=["w"])).deltas("default")["w"]
    assert delta.scale == cp_scale(0.5, len(shape), r)
    delta.core.data = torch.randn(20, r, generator=torch.Generator().manual_seed(0)).sign()
    letters = "abcd"[: len(shape)]
    moves = torch.einsum(f"mr,{','.join(c + 'r' for c in letters)}->m{letters}", delta.core, *factors_of(delta))
    assert (delta.scale * moves).square().mean().sqrt().item() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("kind", [kind for kind in CP if kind.startswith(("linear", "conv", "transposed"))])
def test_every_form_gives_the_same_output_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = made(kind)
    adapters = trained(inject_adapters(model, config_of(kind, form="cp")))
    results = []
    for form in ("built", "chained", "folded"):
        monkeypatch.setattr(adapter_layers, "choose_form", lambda *args, form=form, **options: form)
        y = run(model)
        results.append((y, *torch.autograd.grad(y.sin().sum(), adapters.trainable_parameters())))
    for others in results[1:]:
        torch.testing.assert_close(others, results[0], rtol=1e-9, atol=1e-9)


def test_one_graph_without_breaks() -> None:
    model, run = made("convolution and linear")
    adapters = trained(inject_adapters(model, config_of("convolution and linear", form="cp")))
    y = run(model)
    torch.compiler.reset()
    y_compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(y_compiled, y)
    expected, found = (torch.autograd.grad(each.sum(), adapters.trainable_parameters()) for each in (y, y_compiled))
    torch.testing.assert_close(found, expected)


def test_matrices_are_those_of_lora() -> None:
    """Two factors that are trained at will reach any B A of the rank."""
    layer = nn.Linear(6, 5).double()
    before = layer.weight.detach().clone()
    delta = inject_adapters(layer, FLoRAConfig(r=2, alpha=1.0, form="cp")).deltas("default")["weight"]
    B, A = torch.randn(5, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        for own, given in zip((delta.core, *factors_of(delta)), (torch.ones(2), B, A.T / delta.scale), strict=True):
            own.copy_(given)
    torch.testing.assert_close(layer.weight, before + B @ A)


def test_weighted_sums_are_of_tucker_form_and_exact(tmp_path: Any) -> None:
    from probtensor.models import load_adapters

    (model, run), (fresh, run_fresh) = made("conv2d, reflect"), made("conv2d, reflect")
    y_base = run(model)
    trained(inject_adapters(model, config_of("conv2d", form="cp"), "a"))
    y_a = run(model)
    adapters = trained(inject_adapters(model, config_of("conv2d"), "b"))
    y_b = run(model)
    adapters.add_weighted({"a": 2.0, "b": -1.0}, "sum")
    adapters.set_active("sum")
    torch.testing.assert_close(run(model) - y_base, 2 * (y_a - y_base) - (y_b - y_base))
    adapters.save_pretrained(tmp_path)
    load_adapters(fresh, tmp_path)
    torch.testing.assert_close(run_fresh(fresh), run(model))
    truncate(adapters, energy=0.9)


def test_the_posterior_of_cores() -> None:
    """Outputs are linear in the core, so the posterior is exact; a square matrix of full rank is no exception."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3).double(), torch.randn(40, 3, dtype=torch.float64)
    adapters = inject_adapters(layer, FLoRAConfig(r=3, form="cp"))
    delta: Any = adapters.deltas("default")["weight"]
    design = delta.scale * torch.einsum("ni,ir,or->nor", x, delta.factor_1, delta.factor_0).reshape(120, 3)
    y = layer(x).detach() + 0.1 * torch.randn(40, 3, dtype=torch.float64)
    posterior = fit_laplace(adapters, [(x, y)], likelihood="regression", noise_variance=0.01, prior_precision=2.0)
    precision = design.T @ design / 0.1**2 + 2.0 * torch.eye(3, dtype=torch.float64)
    _, std = posterior.predict(x)
    variance = torch.einsum("nr,rs,ns->n", design, torch.linalg.inv(precision), design).reshape(40, 3)
    torch.testing.assert_close(torch.as_tensor(std), (variance + 0.1**2).sqrt().detach())


def test_what_is_not_for_this_form() -> None:
    adapters = inject_adapters(nn.Linear(6, 5), FLoRAConfig(r=2, form="cp"))
    for call in (truncate, rank_report, relevance_penalty):
        with pytest.raises(ValueError, match="adapters: expected updates in Tucker form, got form='cp'"):
            call(adapters)
    with pytest.raises(ValueError, match="init: expected 'zero' with form='cp', got 'weight'"):
        FLoRAConfig(form="cp", init="weight")
    with pytest.raises(ValueError, match="form: expected one of tucker, cp, got 'kron'"):
        FLoRAConfig(form="kron")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rank_pattern: expected one rank for 'weight' with form='cp', got \(2, 2\)"):
        inject_adapters(nn.Linear(6, 5), FLoRAConfig(form="cp", rank_pattern={"weight": (2, 2)}))
