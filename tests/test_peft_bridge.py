"""FLoRA inside PEFT; skipped where PEFT is not installed."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probtensor.models import FLoRAConfig, inject_adapters, register_with_peft


def test_without_peft_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from probtensor.models import peft_bridge

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="pip install peft"):
        peft_bridge._classes.__wrapped__()


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12, padding_idx=3)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=2, dilation=2, padding_mode="reflect")
        self.conv2 = nn.Conv2d(2, 6, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)
        self.head = nn.Linear(5 + 4, 3)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        h = self.conv1(self.emb(ids).mT).mT
        h = h + self.attn(h, h, h, need_weights=False)[0]
        both = torch.cat([self.fc(h).mean(1), self.up(self.conv2(image).relu()).mean((2, 3))], 1)
        y: Tensor = self.head(both)
        return y


TARGETS = ["emb", "conv1", "conv2", "up", "attn.out_proj", "fc"]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.tensor([[1, 2, 3, 5, 7], [7, 7, 3, 0, 9]]), torch.randn(2, 2, 6, 6, generator=generator).double()


def made() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="PEFT is not installed")


@pytest.fixture
def config(peft: Any) -> Callable[..., Any]:
    kind = register_with_peft()
    assert register_with_peft() is kind
    return lambda **options: kind(**{"r": 3, "target_modules": list(TARGETS), **options})


def moved(model: nn.Module, name: str = "default", seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "probtensor_flora_core" in key and key.endswith(name):
                parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 3
    return model


def test_start_changes_nothing_and_only_updates_are_trained(peft: Any, config: Callable[..., Any]) -> None:
    base = made()
    y = base(*inputs())
    model = peft.get_peft_model(base, config())
    torch.testing.assert_close(model(*inputs()), y)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("probtensor_flora_" in key for key in trained)
    loss = model(*inputs()).square().sum()
    loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if key in trained and "core" in key}
    assert len(grads) == len(TARGETS)
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads.values())


def test_outputs_are_those_of_our_own_adapters(peft: Any, config: Callable[..., Any]) -> None:
    own, theirs = made(), made()
    adapters = inject_adapters(own, FLoRAConfig(r=3, target_modules=TARGETS, random_state=5))
    model = peft.get_peft_model(theirs, config(random_state=5))
    with torch.no_grad():
        for layer, delta in adapters.deltas("default").items():
            delta.core += torch.randn(delta.core.shape, dtype=torch.float64) / 3
            wrapped = theirs.get_submodule(layer.rpartition(".")[0])
            wrapped.probtensor_flora_core["default"].copy_(delta.core)  # type: ignore[union-attr, index]
    torch.testing.assert_close(model(*inputs()), own(*inputs()))
    assert (model(*inputs()) - made()(*inputs())).abs().max() > 1e-3


def test_merge_unmerge_and_unload(peft: Any, config: Callable[..., Any]) -> None:
    base = made()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = moved(peft.get_peft_model(base, config()))
    y = model(*inputs())
    for _ in range(3):
        model.merge_adapter()  # type: ignore[operator]
        torch.testing.assert_close(model(*inputs()), y)
        model.unmerge_adapter()  # type: ignore[operator]
    with model.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(model(*inputs()), made()(*inputs()))
    torch.testing.assert_close(model(*inputs()), y)
    after = {
        key.replace(".base_layer", ""): value for key, value in base.state_dict().items() if "probtensor" not in key
    }
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    plain = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    assert [type(module) for module in plain.modules()] == [type(module) for module in made().modules()]
    torch.testing.assert_close(plain(*inputs()), y)


def test_save_and_load(peft: Any, config: Callable[..., Any], tmp_path: Path) -> None:
    model = moved(
        peft.get_peft_model(made(), config(modules_to_save=["head"], rank_pattern={"fc": 2, "conv2": [3, 1, 1, 2]}))
    )
    y = model(*inputs())
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = peft.PeftModel.from_pretrained(made(), tmp_path)
    torch.testing.assert_close(loaded(*inputs()), y)
    assert loaded.peft_config["default"].peft_type == "PROBTENSOR_FLORA"
    assert loaded.peft_config["default"].rank_pattern == {"fc": 2, "conv2": [3, 1, 1, 2]}
    low = peft.PeftModel.from_pretrained(made(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(low(*inputs()), y)
    torch.testing.assert_close(copy.deepcopy(low)(*inputs()), y)


def test_several_adapters(peft: Any, config: Callable[..., Any]) -> None:
    model = moved(peft.get_peft_model(made(), config()))
    first = model(*inputs())
    model.add_adapter("second", config(r=2, target_modules=["fc", "conv1"], random_state=3))  # type: ignore[operator]
    torch.testing.assert_close(model(*inputs()), first)
    moved(model, "second", 1)
    model.set_adapter("second")  # type: ignore[operator]
    second = model(*inputs())
    assert (second - first).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "second"])  # type: ignore[union-attr, operator]
    both = model(*inputs())
    model.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(model(*inputs()), both)
    model.unmerge_adapter()  # type: ignore[operator]
    model.set_adapter("default")  # type: ignore[operator]
    assert torch.equal(model(*inputs()), first)
    model.delete_adapter("second")  # type: ignore[operator]
    assert torch.equal(model(*inputs()), first)
    assert not any("second" in key for key in model.state_dict())


def test_training_and_injection_without_a_wrapper(peft: Any, config: Callable[..., Any], tmp_path: Path) -> None:
    model, target = made(), torch.ones(2, 3, dtype=torch.float64)
    injected = peft.inject_adapter_in_model(config(), model)
    optimizer = torch.optim.Adam([p for p in injected.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (injected(*inputs()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 5
    state = peft.get_peft_model_state_dict(injected)
    other = peft.inject_adapter_in_model(config(), made())
    found = peft.set_peft_model_state_dict(other, state)
    assert not found.unexpected_keys
    torch.testing.assert_close(other(*inputs()), injected(*inputs()))


def test_half_precision_dropout_and_hundred_merges(peft: Any, config: Callable[..., Any]) -> None:
    base = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).to(torch.bfloat16)
    before = [parameter.clone() for parameter in base.parameters()]
    kind = register_with_peft()
    model = moved(peft.get_peft_model(base, kind(r=2, target_modules=["0", "2"], dropout=0.5)))
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    for _ in range(100):
        model.merge_adapter()  # type: ignore[operator]
        model.unmerge_adapter()  # type: ignore[operator]
    model.unload()  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))


def test_what_cannot_be_is_refused(peft: Any, config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"target_modules: expected linear, embedding or convolution, got 'attn'"):
        peft.get_peft_model(made(), config(target_modules=["attn"]))
    with pytest.raises(ValueError, match="r: expected an integer of at least 1, got 0"):
        config(r=0)
    with pytest.raises(ValueError, match="init: expected one of zero, weight, got 'gradient'"):
        config(init="gradient")
    with pytest.raises(ValueError, match=r"dropout: expected 0 for 'emb' \(Embedding\), got 0\.1"):
        peft.get_peft_model(made(), config(target_modules=["emb"], dropout=0.1))
    model = moved(peft.get_peft_model(made(), config(target_modules=["fc"], init="weight")))
    with torch.no_grad():
        model.base_model.model.fc.probtensor_flora_core["default"][0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="merge: expected finite weights, got NaN or infinity"):
        model.merge_adapter()  # type: ignore[operator]


def test_a_scale_by_the_weights_size_goes_to_files(peft: Any, config: Callable[..., Any], tmp_path: Path) -> None:
    """It is that of the weights at the start, not of those that the adapter is loaded to; settings serve again."""

    def scales(model: Any) -> list[float]:
        return [m.scaling["default"] for m in model.modules() if "default" in getattr(m, "scaling", {})]

    def larger() -> nn.Module:
        base = made()
        base.load_state_dict({key: 8 * value for key, value in base.state_dict().items()})
        return base

    settings = config()
    model = peft.get_peft_model(made(), settings)
    model.save_pretrained(tmp_path / "new")
    assert scales(peft.PeftModel.from_pretrained(larger(), tmp_path / "new")) == scales(model)
    assert scales(peft.get_peft_model(larger(), settings)) == [8 * scale for scale in scales(model)]
    peft.get_peft_model(made(), config(alpha=1.0)).save_pretrained(tmp_path / "old")
    meta = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    del meta["scales"]  # as files were when a number was all that there was
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(meta))
    old = scales(peft.PeftModel.from_pretrained(made(), tmp_path / "old"))
    assert old == scales(peft.get_peft_model(made(), config(alpha=1.0)))
    assert len(set(old)) > 1
    with pytest.raises(ValueError, match=r"alpha: expected a number, as 'fc.weight' is on the meta device, got 'rms'"):
        peft.inject_adapter_in_model(config(target_modules=["fc"]), made().to("meta"))
