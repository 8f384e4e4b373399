"""Ranks of adapters: the penalty against its definition, truncation against the dense update."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probtensor.models import FLoRAConfig, inject_adapters, load_adapters, rank_report, relevance_penalty, truncate
from probtensor.models.flora import Adapters
from tests.reference_adapters import dense_delta


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 6)]
    return nn.Sequential(*layers).double()


def filled(adapters: Adapters, seed: int = 0) -> Adapters:
    """Every parameter moved, so that factors are no longer orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 4
    return adapters


def updates(adapters: Adapters) -> dict[str, Tensor]:
    """s·ΔW of each layer."""
    return {
        layer: (delta.scale * dense_delta(delta.core, delta.factors)).detach()
        for layer, delta in adapters.deltas("default").items()
    }


def singular(update: Tensor, mode: int) -> Tensor:
    return torch.linalg.svdvals(update.movedim(mode, 0).flatten(1))


def test_penalty_is_that_of_the_singular_values_of_the_dense_update() -> None:
    adapters = filled(inject_adapters(net(), FLoRAConfig(r=4, modules_to_save=["3"])))
    floor, expected = 0.05, 0.0
    for layer, update in updates(adapters).items():
        delta = adapters.deltas("default")[layer]
        if delta.ranks == delta.shape:
            continue  # the head
        for n, rank in enumerate(delta.ranks):
            own = math.prod(delta.ranks) // rank + (delta.shape[n] if delta.factors[n] is not None else 0)
            energy = singular(update, n).square() / update.numel()
            expected += own / 2 * float((1 + energy / floor**2).log().sum())
    assert relevance_penalty(adapters, floor=floor).item() == pytest.approx(expected, rel=1e-10)


def test_penalty_does_not_depend_on_how_core_and_factors_share_scale_and_rotation() -> None:
    adapters = filled(inject_adapters(nn.Linear(9, 7).double(), FLoRAConfig(r=3)))
    before = relevance_penalty(adapters)
    delta = adapters.deltas("default")["weight"]
    turn = torch.tensor([[2.0, 0.3, -1.0], [0.5, 1.5, 0.2], [0.1, -0.4, 3.0]], dtype=torch.float64)
    with torch.no_grad():
        delta.factor_0.copy_(delta.factor_0 @ turn)  # type: ignore[operator]
        delta.core.copy_(torch.linalg.solve(turn, delta.core))
    torch.testing.assert_close(relevance_penalty(adapters), before)


def test_penalty_has_finite_gradients_at_the_start() -> None:
    adapters = inject_adapters(net(), FLoRAConfig(r=4))
    relevance_penalty(adapters).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapters.trainable_parameters())


def test_planted_rank_is_found_and_the_penalty_halves_the_spurious_directions() -> None:
    errors, spurious = [], []
    for strength in (0.0, 1.0):
        torch.manual_seed(1)
        layer = nn.Linear(12, 10).double()
        x = torch.randn(300, 12, dtype=torch.float64)
        planted = torch.randn(10, 2, dtype=torch.float64) @ torch.randn(2, 12, dtype=torch.float64) / 2
        with torch.no_grad():
            y = layer(x) + x @ planted.T + 0.5 * torch.randn(300, 10, dtype=torch.float64)
        adapters = inject_adapters(layer, FLoRAConfig(r=8))
        optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            nll = (layer(x) - y).square().sum() / (2 * 0.5**2)
            (nll + strength * relevance_penalty(adapters, floor=0.01)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        (update,) = updates(adapters).values()
        errors.append(float((update - planted).norm()))
        spurious.append(float(singular(update, 0)[2]))
        report = truncate(adapters, energy=0.99)
        assert report["ranks_after"].tolist() == [(2, 2)]
        assert report["energy"].item() > 0.99
    assert spurious[1] < spurious[0] / 2
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_error_stays_within_the_energy_that_is_dropped(energy: float) -> None:
    adapters = filled(inject_adapters(net(), FLoRAConfig(r=5)))
    before = updates(adapters)
    report = truncate(adapters, energy=energy).set_index("layer")
    lost = 0.0
    for layer, update in updates(adapters).items():
        row, delta = report.loc[layer], adapters.deltas("default")[layer]
        assert delta.ranks == row["ranks_after"]
        assert sum(p.numel() for p in delta.parameters()) == row["parameters_after"]
        error = float((update - before[layer]).square().sum())
        dropped = sum(
            float(singular(before[layer], n)[rank:].square().sum()) for n, rank in enumerate(row["ranks_after"])
        )
        assert error <= dropped * (1 + 1e-9) + 1e-20
        assert row["energy"] == pytest.approx(max(0, 1 - dropped / float(before[layer].square().sum())), abs=1e-9)
        lost += dropped
    assert lost <= (1 - energy) * sum(float(update.square().sum()) for update in before.values()) * (1 + 1e-9)


@pytest.mark.parametrize("budget", [900, 500, 300, 215])
def test_budget_is_met_and_what_is_kept_is_what_the_report_said(budget: int) -> None:
    adapters = filled(inject_adapters(net(), FLoRAConfig(r=5)))
    said = rank_report(adapters, n_parameters=budget)
    done = truncate(adapters, n_parameters=budget)
    assert said.equals(done)
    count = sum(p.numel() for p in adapters.trainable_parameters())
    assert count == done["parameters_after"].sum() <= budget
    assert done["parameters_before"].sum() == 1032


def test_steps_that_would_add_parameters_are_not_taken() -> None:
    """A mode that the core keeps has no factor; a rank one less would bring one."""
    adapters = filled(inject_adapters(nn.Linear(40, 5).double(), FLoRAConfig(r=5)))
    assert adapters.deltas("default")["weight"].ranks == (5, 5)
    for budget in range(224, 45, -1):
        assert rank_report(adapters, n_parameters=budget)["parameters_after"].item() <= budget


def test_nothing_dropped_changes_no_bit() -> None:
    adapters = filled(inject_adapters(net(), FLoRAConfig(r=3)))
    before = {key: value.clone() for key, value in adapters.state_dict().items()}
    for options in ({"energy": 1.0}, {"n_parameters": 10**6}):
        report = truncate(adapters, **options)  # type: ignore[arg-type]
        assert (report["ranks_before"] == report["ranks_after"]).all()
        assert (report["energy"] > 1 - 1e-12).all()
    assert all(torch.equal(value, before[key]) for key, value in adapters.state_dict().items())


def test_directions_without_energy_go_without_loss() -> None:
    """Also where a mode's rank is more than the others' ranks allow."""
    model = nn.Sequential(nn.Linear(20, 16)).double()
    adapters = filled(inject_adapters(model, FLoRAConfig(rank_pattern={"0": (8, 2)})))
    x = torch.randn(4, 20, dtype=torch.float64)
    y = model(x)
    assert truncate(adapters, energy=1 - 1e-12)["ranks_after"].tolist() == [(2, 2)]
    torch.testing.assert_close(model(x), y)


def test_truncated_adapters_train_on_save_load_merge_and_copy(tmp_path: Path) -> None:
    model, fresh = net(), net()
    adapters = filled(inject_adapters(model, FLoRAConfig(r=5)))
    truncate(adapters, n_parameters=450)
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=1e-3)
    model(x).sum().backward()
    optimizer.step()
    y = model(x)
    adapters.save_pretrained(tmp_path)
    load_adapters(fresh, tmp_path)
    assert torch.equal(fresh(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    adapters.merge_and_unload()
    torch.testing.assert_close(model(x), y)


def test_factors_are_as_training_expects_them_and_padding_rows_stay_zero() -> None:
    model = nn.Embedding(30, 12, padding_idx=3).double()
    adapters = inject_adapters(model, FLoRAConfig(r=6, alpha=1.0))
    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.arange(30)) - torch.randn(30, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    truncate(adapters, n_parameters=100)
    delta = adapters.deltas("default")["weight"]
    for factor, size in zip(delta.factors, delta.shape, strict=True):
        assert factor is not None
        gram = factor.T @ factor
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64) * size / (2 * len(gram)))
    assert bool((delta.factor_0[3] == 0).all())  # type: ignore[index]
    assert delta.scale == pytest.approx(2.0)


def test_an_adapter_that_learned_nothing_has_a_report() -> None:
    report = rank_report(inject_adapters(net(), FLoRAConfig(r=3)))
    assert np.isfinite(report["energy"]).all()
    assert report["ranks_after"].tolist()[0] == (1, 1, 1, 1)


def test_malformed_calls_are_refused() -> None:
    adapters = filled(inject_adapters(net(), FLoRAConfig(r=3)))
    with pytest.raises(ValueError, match=r"energy: expected None beside n_parameters, got 0\.5"):
        truncate(adapters, n_parameters=100, energy=0.5)
    with pytest.raises(ValueError, match="energy: expected a share above 0 and at most 1, got 0"):
        truncate(adapters, energy=0)
    with pytest.raises(ValueError, match=r"n_parameters: expected an integer, got 9\.5"):
        truncate(adapters, n_parameters=9.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_parameters: expected at least \d+, as no rank falls below 1, got 3"):
        truncate(adapters, n_parameters=3)
    with pytest.raises(ValueError, match="floor: expected a positive number, got 0"):
        relevance_penalty(adapters, floor=0)
    with pytest.raises(ValueError, match="name: expected one of the adapters"):
        rank_report(adapters, "other")
    with torch.no_grad():
        adapters.deltas("default")["1.weight"].core[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"adapters: expected finite updates, got NaN or infinity in '1.weight'"):
        truncate(adapters)
    merged = filled(inject_adapters(net(), FLoRAConfig(r=3)))
    merged.merge()
    with pytest.raises(ValueError, match="truncate: expected adapters that are not merged"):
        truncate(merged)
    dense = inject_adapters(nn.Linear(3, 2), FLoRAConfig(r=8))
    with pytest.raises(ValueError, match="adapters: expected at least one update of low rank, got none"):
        truncate(dense)
