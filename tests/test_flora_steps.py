"""How far a step moves a weight: scales by the weight's size, rates of the optimizer's groups."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probtensor.models import FLoRAConfig, inject_adapters, load_adapters
from probtensor.models.adapter_modules import base_parameter, sites
from tests.reference_adapters import dense_delta
from tests.test_flora import made, trained


def size(weight: Tensor) -> float:
    return math.sqrt(weight.double().square().mean().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear, tiny", "conv3d", "conv2d, depthwise", "lstm", "bare parameter"])
def test_a_step_of_adam_moves_a_weight_by_a_share_of_its_size(kind: str, dtype: torch.dtype) -> None:
    """The share is the rate, within the rounding to a power of two, whatever layer, order and precision."""
    model, _ = made(kind)
    for factor, parameter in enumerate(model.parameters()):
        parameter.data *= 0.7 ** (1 + factor)
    model = model.to(dtype)
    adapters = inject_adapters(model, FLoRAConfig(r=3, target_modules=["w"] if kind.startswith("bare") else "all"))
    generator = torch.Generator().manual_seed(0)
    for delta in adapters.deltas("default").values():
        delta.core.data = torch.randn(delta.ranks, generator=generator).sign().to(delta.core)
    for name, module, key, bank in sites(model):
        weight, delta = base_parameter(module, key), bank.deltas["default"]
        alpha = delta.scale / 2 ** (sum(A is not None for A in delta.factors) / 2)
        assert math.log2(alpha).is_integer()
        assert 2**-0.5 <= alpha / size(weight) <= 2**0.5, name
        if weight.numel() > 20:
            moved = size(delta.scale * dense_delta(delta.core, delta.factors))
            assert moved / size(weight) == pytest.approx(1, rel=0.6), name


def test_a_weight_of_zeros_and_what_is_trained_in_full() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 8))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    config = FLoRAConfig(r=2, kernel_r=3, alpha_pattern={"1": 3.0}, bias="adapted", modules_to_save=["2"])
    scales = {name: d.scale for name, d in inject_adapters(model, config).deltas("default").items()}
    assert scales == {
        "0.weight": 2 / 8,
        "1.weight": 3.0 * 2**0.5,  # one factor: the others would be of full rank
        **dict.fromkeys(["0.bias", "1.bias", "2.weight", "2.bias"], 1.0),
    }


def test_files_keep_the_scale_that_the_weights_gave(tmp_path: Path) -> None:
    model, other = nn.Linear(20, 24), nn.Linear(20, 24)
    adapters = trained(inject_adapters(model, FLoRAConfig(r=3)))
    adapters.save_pretrained(tmp_path)
    nn.init.normal_(other.weight, std=30)
    delta, loaded = (each.deltas("default")["weight"] for each in (adapters, load_adapters(other, tmp_path)))
    assert loaded.scale == delta.scale
    assert torch.equal(loaded.core, delta.core)
    assert loaded.config.alpha == "rms"
    adapters.reset_parameters()
    assert delta.scale == loaded.scale


def test_files_of_the_time_when_alpha_was_a_number(tmp_path: Path) -> None:
    model, x = nn.Linear(20, 24), torch.randn(5, 20)
    fresh = nn.Linear(20, 24)
    fresh.load_state_dict(model.state_dict())
    adapters = trained(inject_adapters(model, FLoRAConfig(r=3, alpha=1.0)))
    adapters.save_pretrained(tmp_path)
    meta = json.loads((tmp_path / "adapter_config.json").read_text())
    assert meta["config"]["alpha"] == 1.0
    assert meta["parameters"]["weight"]["scale"] == 2.0
    loaded = load_adapters(fresh, tmp_path)
    assert (loaded.config("default").alpha, loaded.deltas("default")["weight"].scale) == (1.0, 2.0)
    assert torch.equal(fresh(x), model(x))


def test_a_weighted_sum_of_adapters_of_different_alpha() -> None:
    model, run = made("conv2d")
    y_base = run(model)
    changes: list[Tensor] = []
    for alpha in ("rms", 1.0, 0.25):
        adapters = trained(inject_adapters(model, FLoRAConfig(r=2, alpha=alpha), f"a{len(changes)}"))  # type: ignore[arg-type]
        changes.append(run(model) - y_base)
    adapters.add_weighted({"a0": 2.0, "a1": -1.0, "a2": 0.5}, "sum")
    adapters.set_active("sum")
    torch.testing.assert_close(run(model) - y_base, 2 * changes[0] - changes[1] + 0.5 * changes[2])


# groups for an optimizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = net()
    inject_adapters(model, FLoRAConfig(r=2), "other")
    adapters = inject_adapters(model, FLoRAConfig(r=3, modules_to_save=["4"], bias="all"))
    groups = adapters.parameter_groups(0.01, factor_ratio=3.0, dense_ratio=0.5, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.1), (0.03, 0.0), (0.005, 0.1)]
    deltas = adapters.deltas("default")
    conv = deltas["0.weight"]
    expected: list[Any] = [[conv.core], [A for A in conv.factors if A is not None]]
    expected.append([deltas[name].core for name in deltas if name != "0.weight"])
    for group, parameters in zip(groups, expected, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in parameters}
    assert sum(len(group["params"]) for group in groups) == len(adapters.trainable_parameters())
    conv.factor_0.requires_grad_(False)  # type: ignore[operator]
    assert len(adapters.parameter_groups(0.01)[1]["params"]) == len(expected[1]) - 1


def test_groups_of_several_adapters_and_without_parameters_of_a_kind() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapters = inject_adapters(model, FLoRAConfig(r=2), "first")
    inject_adapters(model, FLoRAConfig(r=9), "second")  # full ranks by size: steps relative to the weight
    assert [(len(g["params"]), g["lr"]) for g in adapters.parameter_groups(0.5)] == [(2, 0.5)]
    adapters.set_active(["first", "second"])
    assert [len(g["params"]) for g in adapters.parameter_groups(0.5)] == [4, 4]
    adapters.set_active([])
    assert adapters.parameter_groups(0.5) == []


def test_an_optimizer_with_groups_trains() -> None:
    model = net()
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(64, 3, 5, 5, generator=generator), torch.arange(64) % 4
    adapters = inject_adapters(model, FLoRAConfig(r=3, modules_to_save=["4"], bias="all"))
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=0.03))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": "x"}, {"factor_ratio": math.nan}, {"dense_ratio": math.inf}])
def test_rates_that_are_none(wrong: dict[str, Any]) -> None:
    ((argument, value),) = wrong.items()
    adapters = inject_adapters(nn.Linear(6, 5), FLoRAConfig(r=2))
    with pytest.raises(ValueError, match=f"^{argument}: expected a number of at least 0, got {value!r}"):
        adapters.parameter_groups(**{"lr": 0.1, **wrong})
