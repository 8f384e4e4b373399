"""Settings of adapters: which weights they choose, ranks, starts, and what is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probtensor.models import FLoRAConfig, inject_adapters
from probtensor.models.adapter_config import names_match
from probtensor.models.adapter_starts import gradient_ranks, weight_gradients
from probtensor.models.adapter_targets import find_targets
from probtensor.models.flora import Adapters
from tests.test_flora import bits, equal, trained


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3)
        self.body = nn.ModuleDict({"conv2": nn.Conv2d(16, 16, 3), "norm": nn.BatchNorm2d(16)})
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["norm"](self.body["conv2"](self.conv1(x))).flatten(2).mT
        return self.head(self.attn(x, x, x)[0].mean(1))


def names(config: FLoRAConfig, model: nn.Module | None = None) -> list[str]:
    return [target.name for target in find_targets(model or Net(), config)]


WEIGHTS = ["conv1.weight", "body.conv2.weight", "attn.in_proj_weight", "attn.out_proj.weight", "head.weight"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, WEIGHTS),
        ({"target_modules": ["conv2"]}, ["body.conv2.weight"]),
        ({"target_modules": ["attn"]}, ["attn.in_proj_weight", "attn.out_proj.weight"]),
        ({"target_modules": ["attn.out_proj", "head.weight"]}, ["attn.out_proj.weight", "head.weight"]),
        ({"target_modules": r".*conv\d"}, ["conv1.weight", "body.conv2.weight"]),
        (
            {"target_modules": r"body\..*"},
            ["body.conv2.weight", "body.conv2.bias", "body.norm.weight", "body.norm.bias"],
        ),
        ({"exclude_modules": ["attn", "head"]}, WEIGHTS[:2]),
        ({"exclude_modules": "body.*"}, [WEIGHTS[0], *WEIGHTS[2:]]),
        ({"target_modules": ["conv2"], "bias": "adapted"}, ["body.conv2.weight", "body.conv2.bias"]),
        ({"target_modules": ["conv2"], "modules_to_save": ["head"]}, ["body.conv2.weight", "head.weight", "head.bias"]),
        ({"target_modules": ["norm.weight"]}, ["body.norm.weight"]),
    ],
)
def test_names_choose_weights(options: dict[str, Any], expected: list[str]) -> None:
    assert sorted(names(FLoRAConfig(**options))) == sorted(expected)


def test_all_biases() -> None:
    model = Net()
    found = names(FLoRAConfig(target_modules=["conv2"], bias="all"), model)
    assert set(found) == {"body.conv2.weight"} | {n for n, p in model.named_parameters() if n.endswith("bias")}


def test_a_name_is_whole_from_a_dot_on() -> None:
    assert names_match(["v1"], ["conv1"]) is None
    assert names_match(["conv1"], ["net.conv1"]) == "conv1"


def test_a_rank_and_a_step_for_each_layer() -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"conv1": (5, 3, 1, 3), "head": 2, "attn.*": 4}}
    adapters = inject_adapters(Net(), FLoRAConfig(r=8, alpha=2.0, alpha_pattern={"head": 0.5}, **patterns))
    deltas = adapters.deltas("default")
    assert {name: delta.ranks for name, delta in deltas.items()} == {
        "conv1.weight": (5, 3, 1, 3),
        "body.conv2.weight": (8, 8, 2, 2),
        "attn.in_proj_weight": (4, 4),
        "attn.out_proj.weight": (4, 4),
        "head.weight": (2, 2),
    }
    assert deltas["head.weight"].scale == 1.0
    assert deltas["body.conv2.weight"].scale == 8.0
    assert deltas["conv1.weight"].factors[1] is None
    assert deltas["conv1.weight"].scale == 4.0, "the factors that are left out leave their share of the scale out"


def test_modules_to_save_and_biases_are_trained_in_full_and_come_back(tmp_path: Any) -> None:
    from probtensor.models import load_adapters

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    plain = Net().eval()
    plain.load_state_dict(bits(model))
    y_base, before = model(x), bits(model)
    adapters = inject_adapters(model, FLoRAConfig(target_modules=["conv1"], modules_to_save=["head"], bias="all"))
    torch.optim.SGD(adapters.trainable_parameters(), lr=0.1)
    model(x).square().sum().backward()
    gradient = adapters.deltas("default")["head.bias"].core.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, (2 * y_base).sum(0))
    y = (trained(adapters), model(x))[1]
    assert equal(bits(model), before)
    adapters.save_pretrained(tmp_path)
    load_adapters(plain, tmp_path)
    assert torch.equal(plain(x), y)
    with adapters.disable():
        torch.testing.assert_close(model(x), y_base)


def test_starts_from_the_weight_and_from_a_gradient() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    y_base = model(batches[0])
    config = FLoRAConfig(r=2, init="gradient", exclude_modules=["attn"])
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = weight_gradients(model, config, lambda model, x: model(x).square().mean(), batches)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    adapters = inject_adapters(model, config, gradients=gradients)
    torch.testing.assert_close(model(batches[0]), y_base)
    A = adapters.deltas("default")["head.weight"].factors[0]
    left = torch.linalg.svd(gradients["head.weight"])[0][:, :2]
    assert A is not None
    torch.testing.assert_close((left.T @ A / A[:, 0].norm()).det().abs(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)

    inject_adapters(model, FLoRAConfig(r=2, init="weight"), "weight")
    torch.testing.assert_close(model(batches[0]), y_base)
    B = adapters.deltas("weight")["conv1.weight"].factors[0]
    unfolding = model.conv1._parameters["weight"].flatten(1)  # type: ignore[union-attr]
    left = torch.linalg.svd(unfolding)[0][:, :2]
    assert B is not None
    torch.testing.assert_close((left.T @ B / B[:, 0].norm()).det().abs(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)


def test_starts_depend_on_seed_and_name_alone_and_no_global_generator_moves() -> None:
    state = torch.get_rng_state()
    few = inject_adapters(nn.Sequential(nn.Linear(20, 20)), FLoRAConfig(random_state=3)).state_dict()
    models = [nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)) for _ in range(2)]
    torch.set_rng_state(state)
    many, other = (
        inject_adapters(m, FLoRAConfig(random_state=s)).state_dict() for m, s in zip(models, (3, 4), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few["0.weight.factor_0"], many["0.weight.factor_0"])
    assert not torch.equal(many["1.weight.factor_0"], many["0.weight.factor_0"])
    assert not torch.equal(other["0.weight.factor_0"], many["0.weight.factor_0"])


def test_settings_survive_their_dictionary_and_numpy_numbers() -> None:
    config = FLoRAConfig(r=np.int64(3), target_modules=["a"], rank_pattern={"a": [1, 2]}, alpha_pattern={"a": "rms"})
    assert FLoRAConfig(**config.as_dict()) == config


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r: expected an integer of at least 1, got 0"),
    ({"r": 2.5}, "r: expected an integer of at least 1, got 2.5"),
    ({"kernel_r": True}, "kernel_r: expected an integer of at least 1, got True"),
    ({"alpha": 0}, "alpha: expected 'rms' or a positive number, got 0"),
    ({"alpha": float("nan")}, "alpha: expected 'rms' or a positive number, got nan"),
    ({"alpha": "weight"}, "alpha: expected 'rms' or a positive number, got 'weight'"),
    ({"alpha_pattern": {"a": None}}, r"alpha_pattern\['a'\]: expected 'rms' or a positive number, got None"),
    ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1, got 1.0"),
    ({"init": "pissa"}, "init: expected one of zero, weight, gradient, got 'pissa'"),
    ({"bias": "some"}, "bias: expected one of none, adapted, all, got 'some'"),
    ({"random_state": -1}, "random_state: expected an integer >= 0, got -1"),
    ({"target_modules": []}, "target_modules: expected at least one name, got none"),
    ({"target_modules": "("}, r"target_modules: expected a regular expression, got '\('"),
    ({"target_modules": [1]}, r"target_modules: expected a string or strings, got \[1\]"),
    ({"modules_to_save": "head"}, "modules_to_save: expected strings, got 'head'"),
    ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\]: expected an integer of at least 1, got 0"),
    ({"rank_pattern": {"a": (2, 0)}}, r"rank_pattern\['a'\]: expected an integer of at least 1, got 0"),
    ({"rank_pattern": 3}, "rank_pattern: expected a mapping, got 3"),
    ({"alpha_pattern": {"a": -1}}, r"alpha_pattern\['a'\]: expected 'rms' or a positive number, got -1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_malformed_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        FLoRAConfig(**options)


def quantised() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer)


def infinite() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = float("-inf")
    return nn.Sequential(layer)


def eight_bits() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return nn.Sequential(layer)


MISFITS: list[tuple[nn.Module, dict[str, Any], str]] = [
    (Net(), {"target_modules": ["conv3"]}, "target_modules: expected names of parts of the model with .* got 'conv3'"),
    (Net(), {"target_modules": ["body"]}, "target_modules: expected names of parts of the model with .* got 'body'"),
    (Net(), {"target_modules": "conv3"}, "target_modules: expected weights to adapt, got none for 'conv3'"),
    (nn.ReLU(), {}, "target_modules: expected weights to adapt, got none for 'all'"),
    (Net(), {"modules_to_save": ["tail"]}, "modules_to_save: expected names of parts of the model .* got 'tail'"),
    (Net(), {"rank_pattern": {"conv9": 2}}, "rank_pattern: expected names of adapted parameters, got 'conv9'"),
    (Net(), {"rank_pattern": {"conv1": (2, 2)}}, r"rank_pattern: expected 4 ranks for 'conv1.weight' .*, got \(2, 2\)"),
    (Net(), {"dropout": 0.1}, "dropout: expected 0 with 'attn.in_proj_weight'"),
    (Net(), {"dropout": 0.1, "target_modules": ["out_proj"]}, "dropout: expected 0 with 'attn.out_proj.weight'"),
    (Net(), {"init": "gradient"}, 'gradients: expected together with init="gradient", got init='),
    (infinite(), {}, "alpha: expected a number, as '0.weight' has no root mean square .NaN or infinity., got 'rms'"),
    (nn.Embedding(5, 4, max_norm=1.0), {}, "target_modules: 'weight' has max_norm"),
    (nn.EmbeddingBag(5, 4, sparse=True), {}, "target_modules: 'weight' has sparse gradients"),
    (quantised(), {}, "target_modules: expected floating-point weights, got '0.weight' of torch.int8"),
    (eight_bits(), {}, "target_modules: expected floating-point weights, got '0.weight' of torch.float8_e4m3fn"),
    (nn.Sequential(nn.LazyLinear(3)), {}, "target_modules: expected weights with a shape, got '0.weight' of a lazy"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), {}, ".*'0.weight', which is computed from"),
    (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))), {}, ".*'0.weight', which is computed"),
]


@pytest.mark.parametrize(("model", "options", "message"), MISFITS, ids=[message[:60] for *_, message in MISFITS])
def test_settings_that_do_not_fit_leave_the_model_as_it_was(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    before, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=f"^{message}"):
        inject_adapters(model, FLoRAConfig(**options))
    assert [type(module) for module in model.modules()] == kinds
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert list(model.state_dict()) == before


def test_verbs_name_what_is_wrong() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = inject_adapters(model, FLoRAConfig(r=2), "one")
    with pytest.raises(ValueError, match=r"name: expected one that is not among the adapters \('one',\), got 'one'"):
        inject_adapters(model, FLoRAConfig(), "one")
    for name in ("", "a.b", 3):
        with pytest.raises(ValueError, match="name: expected a name without dots"):
            inject_adapters(model, FLoRAConfig(), name)  # type: ignore[arg-type]
    for call in (
        lambda: adapters.set_active("two"),
        lambda: adapters.delete("two"),
        lambda: adapters.merge("two"),
        lambda: adapters.add_weighted({"two": 1.0}, "new"),
        lambda: adapters.save_pretrained("nowhere", "two"),
    ):
        with pytest.raises(ValueError, match=r"expected one of the adapters \('one',\), got 'two'"):
            call()
    with pytest.raises(ValueError, match="weights: expected numbers, got 'x' for 'one'"):
        adapters.add_weighted({"one": "x"}, "new")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="weights: expected at least one adapter, got none"):
        adapters.add_weighted({}, "new")
    adapters.set_active([])
    with pytest.raises(ValueError, match=r"name: expected one of .*, as 0 adapters act, got None"):
        adapters.save_pretrained("nowhere")
    adapters.set_active("one")
    adapters.merge()
    for call in (
        adapters.merge,
        lambda: adapters.set_active("one"),
        lambda: adapters.delete("one"),
        lambda: inject_adapters(model, FLoRAConfig(), "two"),
    ):
        with pytest.raises(ValueError, match=r"expected adapters that are not merged, got \('one',\): unmerge first"):
            call()
    state = adapters.state_dict("one")
    with pytest.raises(ValueError, match=r"state: missing tensors \['0.weight.core'\], unused tensors \['x'\]"):
        adapters.load_state_dict({"x" if key == "0.weight.core" else key: value for key, value in state.items()})
    with pytest.raises(ValueError, match=r"state: expected '0.weight.core' of \(2, 2\), got \(3,\)"):
        adapters.load_state_dict(state | {"0.weight.core": torch.zeros(3)})


def test_states_of_adapters_go_out_and_in() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    adapters = trained(inject_adapters(model, FLoRAConfig(r=2)))
    state, y = {key: value.clone() for key, value in adapters.state_dict().items()}, model(x)
    assert sorted(state) == ["0.weight.core", "0.weight.factor_0", "0.weight.factor_1"]
    trained(adapters, 7)
    assert not torch.equal(model(x), y)
    adapters.load_state_dict(state)
    assert torch.equal(model(x), y)


def test_only_active_adapters_are_trainable(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapters = inject_adapters(model, FLoRAConfig(r=2, target_modules=["0"]), "first")
    inject_adapters(model, FLoRAConfig(r=1), "second")
    assert len(adapters.trainable_parameters()) == 6
    assert [p for p in model.parameters() if p.requires_grad] == adapters.trainable_parameters()
    adapters.set_active("first")
    adapters.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable: 26 of 85 parameters (30.59 %)\n"
    adapters.set_active(["first", "second"])
    assert len(adapters.trainable_parameters()) == 9
    assert Adapters(model).active == ("first", "second")


def test_a_sequential_with_a_parameter_of_its_own_passes_its_input_on() -> None:
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 5), nn.ReLU())
            self.mix = nn.Parameter(torch.eye(5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.mix

    model, x = Scaled(), torch.randn(3, 6)
    y = model(x)
    adapters = inject_adapters(model, FLoRAConfig(r=2, target_modules=["mix", "0"]))
    torch.testing.assert_close(model(x), y)
    y = (trained(adapters), model(x))[1]
    adapters.merge()
    torch.testing.assert_close(model(x), y)


def test_ranks_by_the_gradient_follow_it_and_stay_within_the_budget():
    rng = torch.Generator().manual_seed(0)
    strong = torch.randn(20, 3, generator=rng) @ torch.randn(3, 30, generator=rng)
    kernel = torch.zeros(8, 6, 3, 3)
    kernel[0, 0], kernel[1, 1] = 5.0, 4.0
    gradients = {"strong": strong, "kernel": kernel, "weak": 1e-3 * torch.randn(20, 30, generator=rng)}
    ranks = gradient_ranks(gradients, 2)
    assert ranks["strong"] == (3, 3)
    assert ranks["kernel"] == (2, 2, 3, 3)
    assert sum(20 * a + 30 * b + a * b for a, b in (ranks["strong"], ranks["weak"])) + 64 <= 2 * (50 + 50 + 8 + 54)
    assert gradient_ranks({"weak": gradients["weak"]}, 50) == {"weak": (20, 20)}
