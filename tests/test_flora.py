"""Adapters in every kind of layer: one table of layers, one list of what must hold for each."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probtensor.models import FLoRAConfig, inject_adapters, load_adapters
from probtensor.models.adapter_modules import base_parameter, sites
from probtensor.models.flora import Adapters
from tests.reference_adapters import dense_delta


class Experts(nn.Module):
    """A bare parameter of three modes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nx,exy->ney", x, self.w)


class ListOfExperts(nn.Module):
    """Parameters in a container of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(4, 5, 6) / 3, torch.randn(6, 7) / 3])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w
        return torch.einsum("nx,exy->ney", x, first) @ second


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = nn.ModuleList([self.first])

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](self.first(x).tanh())


class Tied(nn.Module):
    """Token embedding and output layer are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(30, 12), nn.Linear(12, 30, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True, **options)
        self.sizes = (12, options.get("kdim", 12), options.get("vdim", 12))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x[..., :size] for size in self.sizes)
        return self.attn(q, k, v, need_weights=False)[0]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Conv1d(2, 7, 3)

    def forward(self, x: Tensor, z: Tensor, *, scale: float) -> dict[str, Tensor]:
        return {"sum": scale * (self.first(x) + self.second(z).mean(-1))}


def ids() -> Tensor:
    return torch.tensor([[1, 2, 0, 5], [7, 7, 0, 3]])


def x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Row = tuple[Callable[[], nn.Module], Callable[[], Any]]
LAYERS: dict[str, Row] = {
    "linear": (lambda: nn.Linear(20, 24), x(2, 5, 20)),
    "linear, one row": (lambda: nn.Linear(20, 24, bias=False), x(20)),
    "linear, tiny": (lambda: nn.Linear(2, 1), x(5, 2)),
    "linear, wide": (lambda: nn.Linear(3, 200), x(400, 3)),
    "bilinear": (lambda: nn.Bilinear(5, 6, 7), lambda: (x(3, 5)(), x(3, 6)())),
    "embedding": (lambda: nn.Embedding(30, 12), ids),
    "embedding, padding": (lambda: nn.Embedding(9, 12, padding_idx=0), ids),
    "embedding, many ids": (lambda: nn.Embedding(5, 4, padding_idx=-1), lambda: ids().repeat(9, 9) % 5),
    "embedding, sparse": (lambda: nn.Embedding(30, 12, sparse=True), ids),
    "embedding bag": (lambda: nn.EmbeddingBag(30, 12, mode="mean"), ids),
    "conv1d": (lambda: nn.Conv1d(6, 7, 5, stride=2, padding=2), x(2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(16, 20, 3, padding=1), x(2, 16, 9, 8)),
    "conv2d, one example": (lambda: nn.Conv2d(16, 20, 3), x(16, 9, 8)),
    "conv2d 1x1, stride": (lambda: nn.Conv2d(16, 20, 1, stride=2), x(2, 16, 9, 8)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), x(2, 4, 6, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(8, 8, 3, padding="same", groups=8), x(2, 8, 6, 6)),
    "conv2d, dilation": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2), x(1, 4, 16, 16)),
    "conv2d, reflect": (lambda: nn.Conv2d(16, 20, 3, padding=2, padding_mode="reflect"), x(2, 16, 7, 7)),
    "conv2d, replicate": (lambda: nn.Conv2d(16, 20, (3, 5), padding=(1, 2), padding_mode="replicate"), x(2, 16, 7, 7)),
    "conv2d, circular, same": (
        lambda: nn.Conv2d(16, 20, 4, padding="same", padding_mode="circular", dilation=2),
        x(2, 16, 9, 9),
    ),
    "conv3d": (lambda: nn.Conv3d(6, 7, 3, padding=1), x(2, 6, 5, 5, 5)),
    "conv3d 1x1x1": (lambda: nn.Conv3d(6, 7, 1), x(2, 6, 3, 4, 5)),
    "conv3d 1x1x3": (lambda: nn.Conv3d(6, 7, (1, 1, 3)), x(2, 6, 3, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 7, 3, stride=2, output_padding=1), x(2, 6, 8)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(16, 20, 3, stride=2, padding=1, dilation=2), x(2, 16, 5, 6)),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), x(2, 8, 5, 6)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 7, 2, stride=2), x(2, 6, 3, 3, 3)),
    "attention": (Attention, x(2, 5, 12)),
    "attention, other widths": (lambda: Attention(kdim=7, vdim=8), x(2, 5, 12)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True), x(2, 5, 12)),
    "lstm": (lambda: nn.LSTM(6, 7, 2, bidirectional=True), x(4, 2, 6)),
    "lstm, projected": (lambda: nn.LSTM(6, 7, proj_size=4), x(4, 2, 6)),
    "gru": (lambda: nn.GRU(6, 7, batch_first=True), x(2, 4, 6)),
    "rnn": (lambda: nn.RNN(6, 7), x(4, 2, 6)),
    "gru cell": (lambda: nn.GRUCell(6, 7), lambda: (x(4, 6)(), x(4, 7)())),
    "bare parameter": (Experts, x(3, 5)),
    "bare parameters in a list": (ListOfExperts, x(3, 5)),
    "one layer twice": (Twice, x(5, 8)),
    "tied": (Tied, ids),
    "several inputs": (TwoInputs, lambda: {"x": x(3, 6)(), "z": x(3, 2, 8)(), "scale": 2.0}),
    "convolution and linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)),
        x(2, 3, 5, 5),
    ),
}


def config_of(kind: str, **options: Any) -> FLoRAConfig:
    """Small ranks, and updates that are large beside the weights."""
    return FLoRAConfig(r=3, alpha=1.0, target_modules=["w"] if kind.startswith("bare") else "all", **options)


CP = ["linear", "linear, tiny", "embedding, padding", "conv2d, reflect", "conv2d, groups", "conv3d", "transposed 1d"]
CP += ["attention", "lstm", "bare parameter", "tied", "convolution and linear"]
FORMS = [*((kind, "tucker") for kind in LAYERS), *((kind, "cp") for kind in CP)]


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A layer of the table, and its output for the table's input as one tensor."""
    torch.manual_seed(0)
    make, given = LAYERS[kind]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def run(model: nn.Module) -> Tensor:
        value = given()
        if isinstance(value, dict):
            return model(**{key: cast(v) for key, v in value.items()})["sum"]
        y = model(*map(cast, value)) if isinstance(value, tuple) else model(cast(value))
        return y[0] if isinstance(y, tuple) else y

    return make().to(dtype).eval(), run


def trained(adapters: Adapters, seed: int = 0) -> Adapters:
    """Every trainable entry moved at random, as far as training may move it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise.to(parameter.dtype)
    return adapters


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_what_an_adapted_layer_promises(kind: str, form: str) -> None:
    model, run = made(kind)
    before, keys = bits(model), list(model.state_dict())
    y_base = run(model.requires_grad_(False))  # kernels differ with and without gradients
    kinds = [type(module) for module in model.modules()]
    adapters = inject_adapters(model, config_of(kind, form=form))
    assert all(isinstance(module, old) for module, old in zip(_stock_modules(model), kinds, strict=True))
    torch.testing.assert_close(run(model), y_base, rtol=1e-12, atol=1e-12)  # nothing changes at the start
    assert list(model.state_dict()) == keys
    model.load_state_dict(before)  # strict

    # after a step every parameter of the adapter has a gradient and the base has none
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().sum().backward()
        optimizer.step()
    for delta in adapters.deltas("default").values():
        for parameter in delta.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if "_flora" not in name)
    assert equal(bits(model), before)

    trained(adapters)
    y = run(model)
    assert (y - y_base).abs().max() > 1e-3
    with adapters.disable():
        assert torch.equal(run(model), y_base)
    adapters.merge()
    with torch.no_grad():
        assert (run(model) - y).abs().max() <= 1e-10 * max(1.0, float(y.abs().max()))
    with adapters.disable():
        assert torch.equal(run(model), y_base)
    adapters.unmerge()
    assert equal(bits(model), before)
    with torch.no_grad():  # other forms, and fused paths of attention
        torch.testing.assert_close(run(model), y, rtol=1e-10, atol=1e-10)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied), y)
        trained(Adapters(copied), 1)
        assert not torch.equal(run(copied), y)
    assert torch.equal(run(model), y), "a copy shares nothing"

    # a second adapter, the sum of two, their weighted sum
    inject_adapters(model, config_of(kind, random_state=5, form=form), "other")
    assert adapters.active == ("other",)
    torch.testing.assert_close(run(model), y_base, rtol=1e-12, atol=1e-12)
    trained(adapters, 2)
    y_other = run(model)
    adapters.set_active("default")
    assert torch.equal(run(model), y)
    adapters.set_active(["default", "other"])
    y_both = run(model)
    adapters.add_weighted({"default": 1.0, "other": 1.0}, "both")
    adapters.set_active("both")
    torch.testing.assert_close(run(model), y_both, rtol=1e-10, atol=1e-10)
    for name in ("both", "default"):
        adapters.delete(name)
    adapters.set_active("other")
    assert torch.equal(run(model), y_other)
    adapters.delete("other")
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(run(model), y_base)


def _stock_modules(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if "_flora" not in name]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_single_and_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Adapter parameters are float32; merged equals unmerged to the precision of the base's dtype."""
    model, run = made(kind, dtype)
    before = bits(model)
    adapters = inject_adapters(model, config_of(kind))
    assert {parameter.dtype for parameter in adapters.trainable_parameters()} == {torch.float32}
    trained(adapters)
    y = run(model)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    adapters.merge()
    y = y.detach()
    scale = max(1.0, float(y.abs().max()))
    assert (run(model) - y).abs().max() <= (1e-5 if dtype == torch.float32 else 4e-2) * scale
    adapters.unmerge()
    assert equal(bits(model), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_effective_weight_is_the_base_and_one_einsum(kind: str) -> None:
    model, _ = made(kind)
    trained(inject_adapters(model, config_of(kind)))
    for full_name, module, name, bank in sites(model):
        delta = bank.deltas["default"]
        expected = base_parameter(module, name) + delta.scale * dense_delta(delta.core, delta.factors)
        torch.testing.assert_close(getattr(module, name), expected, rtol=1e-12, atol=1e-12, msg=full_name)


def test_saved_adapters_load_in_a_fresh_process(tmp_path: Path, root: Path) -> None:
    """Every row of the table, one process: equal outputs, bit by bit."""
    for number, (kind, form) in enumerate(FORMS):
        model, run = made(kind)
        adapters = trained(inject_adapters(model, config_of(kind, form=form), f"kind_{number}"))
        adapters.save_pretrained(tmp_path / str(number))
        torch.save(run(model).detach(), tmp_path / f"{number}.pt")
    code = f"""
import torch
from probtensor.models import load_adapters
from tests.test_flora import FORMS, made
for number, (kind, form) in enumerate(FORMS):
    model, run = made(kind)
    adapters = load_adapters(model, f"{tmp_path}/{{number}}")
    assert adapters.active == (f"kind_{{number}}",), adapters.active
    assert torch.equal(run(model), torch.load(f"{tmp_path}/{{number}}.pt")), (kind, form)
    assert {{delta.config.form for delta in adapters.deltas(f"kind_{{number}}").values()}} == {{form}}
print(len(FORMS))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", str(len(FORMS)))


def test_a_weighted_sum_survives_files(tmp_path: Path) -> None:
    """Its ranks and scale are not those of its settings; parameters that are trained in full are summed too."""
    (model, run), (other, run_other) = made("convolution and linear"), made("convolution and linear")
    for seed, name in enumerate(("a", "b")):
        config = FLoRAConfig(r=2, modules_to_save=["4"], bias="all", random_state=seed)
        adapters = trained(inject_adapters(model, config, name), seed)
    adapters.set_active(["a", "b"])
    y = run(model)
    adapters.add_weighted({"a": 1.0, "b": 1.0}, "sum")
    adapters.save_pretrained(tmp_path, "sum")
    load_adapters(other, tmp_path)
    torch.testing.assert_close(run_other(other), y)


def test_files_are_strict(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapters = trained(inject_adapters(model, FLoRAConfig(r=2), "task"))
    adapters.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"expected a parameter '0.weight'.*got none"):
        load_adapters(nn.Linear(6, 5), tmp_path)
    with pytest.raises(ValueError, match=r"expected '0.weight' of \[5, 6\], got \[5, 7\]"):
        load_adapters(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4)), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for wrong, message in (
        (
            {key: value for key, value in tensors.items() if key != "1.weight.core"},
            r"missing tensors \['1.weight.core'\]",
        ),
        (tensors | {"2.weight.core": torch.zeros(1)}, r"unused tensors \['2.weight.core'\]"),
        (tensors | {"1.weight.core": torch.zeros(1, 2)}, r"expected 1.weight.core of \(2, 2\), got \(1, 2\)"),
    ):
        save_file(wrong, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_adapters(plain, tmp_path)
    assert type(plain[0]) is nn.Linear, "a failed load leaves the model as it was"
    assert plain[0].weight.requires_grad
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    meta = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(meta | {"version": 7}))
    with pytest.raises(ValueError, match=r"expected an adapter .* got \('probtensor FLoRA adapter', 7\)"):
        load_adapters(plain, tmp_path)


def test_a_name_that_contains_words_of_ours_survives_files(tmp_path: Path) -> None:
    """PEFT loses adapters of modules whose names contain its own words."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair_weighted = nn.Linear(6, 5)
            self.core_default = nn.ModuleDict({"factor_0": nn.Linear(5, 4), "_flora_like": nn.Linear(4, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.core_default["_flora_like"](self.core_default["factor_0"](self.pair_weighted(x)))

    model, x_in = Model(), torch.randn(2, 6)
    other = copy.deepcopy(model)
    adapters = trained(inject_adapters(model, FLoRAConfig(r=2), "default"))
    assert len(adapters.banks) == 3
    adapters.save_pretrained(tmp_path)
    load_adapters(other, tmp_path, "renamed")
    assert torch.equal(other(x_in), model(x_in))
    assert Adapters(other).names == ("renamed",)


def test_hundred_merges_in_bfloat16_change_no_bit() -> None:
    model = nn.Linear(64, 64).to(torch.bfloat16)
    before = bits(model)
    adapters = trained(inject_adapters(model, FLoRAConfig()))
    for _ in range(100):
        adapters.merge()
        adapters.unmerge()
    assert equal(bits(model), before)


def test_merging_what_is_not_finite_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    before = bits(model)
    adapters = trained(inject_adapters(model, FLoRAConfig(r=2)))
    with torch.no_grad():
        adapters.deltas("default")["1.weight"].core[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"merge: expected finite weights, got NaN or infinity in '1.weight'"):
        adapters.merge()
    assert equal(bits(model), before)
    assert adapters.merged == ()


def test_merge_and_unload_leaves_plain_layers() -> None:
    model, run = made("convolution and linear")
    kinds = [type(module) for module in model.modules()]
    adapters = trained(inject_adapters(model, FLoRAConfig(r=2)))
    y = run(model)
    assert adapters.merge_and_unload() is model
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(run(model), y)


def test_tied_weights_have_one_adapter_and_stay_tied() -> None:
    model, run = made("tied")
    adapters = trained(inject_adapters(model, FLoRAConfig(r=2, target_modules=["head"])))
    assert list(adapters.banks) == ["emb.weight"]
    assert torch.equal(model.emb.weight, model.head.weight)  # type: ignore[union-attr, arg-type]
    hidden = F.embedding(ids(), model.emb.weight)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(run(model), hidden @ model.head.weight.T)  # type: ignore[union-attr, operator]
    adapters.merge()
    assert model.emb._parameters["weight"] is model.head._parameters["weight"]  # type: ignore[union-attr]
