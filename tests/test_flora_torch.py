"""Adapters with the rest of torch: forms of a forward, compile, autocast, torch.func, meta device, processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from probtensor.models import FLoRAConfig, adapter_layers, inject_adapters, load_adapters
from probtensor.models.adapter_layers import Sizes, choose_form
from probtensor.models.tucker_delta import Tucker, combined, contract, leading_factors, random_factors, updated
from tests.reference_adapters import delta_by_loops, dense_delta
from tests.test_flora import LAYERS, bits, config_of, equal, made, trained


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the mathematics


@pytest.mark.parametrize("left_out", [(), (0,), (1, 2), (0, 1, 2), (2,), (3,), (2, 3)])
@pytest.mark.parametrize("n_modes", [2, 3, 4, 5])
def test_contraction_equals_loops_and_one_einsum(n_modes: int, left_out: tuple[int, ...]) -> None:
    sizes, ranks = (3, 4, 2, 3, 2)[:n_modes], (2, 3, 1, 2, 1)[:n_modes]
    core = draw(*(sizes[n] if n in left_out else ranks[n] for n in range(n_modes)))
    factors = [None if n in left_out else draw(sizes[n], ranks[n], seed=n) for n in range(n_modes)]
    expected = delta_by_loops(core, factors)
    torch.testing.assert_close(contract(core, factors), expected)
    torch.testing.assert_close(dense_delta(core, factors), expected)
    weight = draw(*sizes, seed=9)
    torch.testing.assert_close(updated(weight, [Tucker(core, tuple(factors), 0.7)] * 2), weight + 1.4 * expected)


def test_autocast_leaves_the_sum_alone_and_half_weights_in_channels_last_have_it_too() -> None:
    factors = [draw(size, 2, seed=n).float().requires_grad_() for n, size in enumerate((6, 5, 3, 3))]
    update, weight = Tucker(draw(2, 2, 2, 2).float(), tuple(factors), 0.7), draw(6, 5, 3, 3).float()
    plain = updated(weight, [update])
    wanted = torch.autograd.grad(plain.sum(), factors)
    with torch.autocast("cpu", torch.bfloat16):
        value = updated(weight, [update])
    found = torch.autograd.grad(value.sum(), factors)
    for one, other in zip((value, *found), (plain, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    half = weight.bfloat16().to(memory_format=torch.channels_last)
    torch.testing.assert_close(updated(half, [update]), (half.float() + plain - weight).bfloat16())


def test_factors_are_orthonormal_columns_of_the_norm_that_random_ones_have() -> None:
    shape, ranks = (9, 30, 3, 3), (4, 9, 2, 3)
    for factors in (
        random_factors(shape, ranks, torch.Generator().manual_seed(0), torch.float64),
        leading_factors(draw(*shape), ranks),
        leading_factors(torch.zeros(shape), ranks),
    ):
        assert factors[3] is None
        for A, size, rank in zip(factors[:3], shape, ranks, strict=False):
            assert A is not None
            torch.testing.assert_close(A.T @ A, torch.eye(rank, dtype=torch.float64) * size / (2 * rank))


@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 3), (40, 30, 3, 3), (40, 30, 2, 3, 3)])
@pytest.mark.parametrize("r", [2, 30])
def test_a_step_in_the_core_moves_the_weight_by_its_size(shape: tuple[int, ...], r: int) -> None:
    """Whatever order and ranks, factors that are left out included."""
    weight = nn.ParameterDict({"w": nn.Parameter(torch.zeros(shape))})
    config = FLoRAConfig(r=r, alpha=0.5, target_modules=["w"], rank_pattern={"w": (r, r, *[2] * (len(shape) - 2))})
    delta = inject_adapters(weight, config).deltas("default")["w"]
    moves = []
    for seed in range(20):
        signs = draw(*delta.ranks, seed=seed).sign().float()
        moves.append((delta.scale * contract(signs, delta.factors)).square().mean().item())
    assert (sum(moves) / len(moves)) ** 0.5 == pytest.approx(0.5, rel=0.2)


def test_leading_factors_hold_a_tensor_of_their_ranks() -> None:
    tensor = contract(draw(2, 3, 2), [draw(7, 2), draw(90, 3, seed=1), draw(4, 2, seed=2)])
    factors = [A / A[:, 0].norm() for A in leading_factors(tensor, (2, 3, 2)) if A is not None]
    torch.testing.assert_close(contract(contract(tensor, [A.T for A in factors]), factors), tensor)


def test_combination_is_exact_when_ranks_fit_and_when_they_do_not() -> None:
    parts = [Tucker(draw(r, 2, 2, seed=r), (draw(5, r), draw(6, 2), None), 0.5 * r) for r in (1, 2, 3)]
    zero = torch.zeros(5, 6, 2, dtype=torch.float64)
    for number in (1, 2, 3):
        total = combined(parts[:number], [1.0, -2.0, 0.3][:number])
        expected = sum(w * updated(zero, [part]) for w, part in zip([1.0, -2.0, 0.3], parts[:number], strict=False))
        torch.testing.assert_close(updated(zero, [total]), expected)
        assert (total.factors[0] is None) == (number == 3)


# forms of a forward

FORMED = [kind for kind in LAYERS if kind.startswith(("linear", "conv", "transposed"))]


@pytest.mark.parametrize("kind", FORMED)
def test_every_form_gives_the_same_output_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = made(kind)
    adapters = trained(inject_adapters(model, config_of(kind)))
    results = []
    for form in ("built", "chained", "folded"):
        monkeypatch.setattr(adapter_layers, "choose_form", lambda *args, form=form, **options: form)
        y = run(model)
        results.append((y, *torch.autograd.grad(y.sin().sum(), adapters.trainable_parameters())))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_the_count_chooses_by_size() -> None:
    tiny = Sizes(4096, 4096, 8, 8, 9, 8, 8, 576)
    assert choose_form(tiny, training=True) == "built", "full rank: nothing is reduced"
    few_rows = Sizes(8, 8, 1024, 1024, 1, 16, 16, 2**20)
    assert choose_form(few_rows, training=False) != "built"
    many_rows = Sizes(10**6, 10**6, 64, 64, 1, 16, 16, 4096)
    assert choose_form(many_rows, training=False) == "built"


def output_and_saved(layer: nn.Module, x: Tensor, sizes: list[int]) -> Tensor:
    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return layer(x)


def test_no_form_of_a_large_layer_makes_the_whole_update() -> None:
    for layer, x in ((nn.Linear(512, 500), torch.randn(64, 512)), (nn.Conv2d(64, 60, 3), torch.randn(2, 64, 14, 14))):
        adapters = inject_adapters(layer, FLoRAConfig(r=4))
        saved: list[int] = []
        y = output_and_saved(layer, x, saved)
        base = {parameter.numel() for name, parameter in layer.named_parameters() if "_flora" not in name}
        assert all(size < 30_000 for size in saved if size not in base | {x.numel(), y.numel()})
        y.sum().backward()
        assert all(parameter.grad is not None for parameter in adapters.trainable_parameters())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(128, 128, 3, padding=1), (2, 128, 14, 14)),
        (nn.ConvTranspose2d(128, 128, 3), (2, 128, 14, 14)),
        (nn.Linear(512, 512), (256, 512)),
    ],
    ids=["convolution", "transposed", "linear"],
)
def test_forms_of_large_layers_equal_their_merge_in_single_precision(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """An update as large as the weight, in a form that does not make it."""
    adapters, x = inject_adapters(layer, FLoRAConfig(r=16, alpha=1.0)), draw(*shape).float()
    adapters.deltas("default")["weight"].core.data = 0.02 * draw(*adapters.deltas("default")["weight"].ranks).float()
    y_base = (adapters.set_active([]), layer(x))[1]
    y = (adapters.set_active("default"), layer(x))[1].detach()
    assert (y - y_base).abs().max() > 1
    adapters.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


def test_a_forward_of_the_users_own_reads_the_effective_weight() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    torch.manual_seed(0)
    layer, x = Standardised(16, 16, 3).double(), draw(2, 16, 8, 8)
    adapters = trained(inject_adapters(layer, FLoRAConfig(r=2)))
    y = layer(x)
    adapters.merge()
    torch.testing.assert_close(layer(x), y)
    assert isinstance(layer, Standardised)


def test_dropout_acts_on_the_update_alone() -> None:
    for kind in ("linear", "conv2d", "conv2d, groups", "conv2d, reflect", "transposed 2d"):
        model, run = made(kind)
        y_base = run(model)
        adapters = trained(inject_adapters(model, config_of(kind, dropout=0.999999)))
        y = run(model)
        model.train()
        torch.testing.assert_close(run(model), y_base)
        assert not torch.allclose(y, y_base)
        with adapters.disable():
            torch.testing.assert_close(run(model), y_base)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(32, 30, 3, padding=1), nn.ConvTranspose2d(32, 30, 3)], ids=lambda x: str(x)
)
def test_channels_last_in_channels_last_out(layer: nn.Module) -> None:
    layer, x = layer.double(), draw(4, 32, 12, 12)
    trained(inject_adapters(layer, FLoRAConfig(r=2)))
    y = layer(x)
    y_last = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y_last, y, rtol=1e-10, atol=1e-10)


def test_padding_rows_stay_what_they_were() -> None:
    model, run = made("embedding, padding")
    adapters = inject_adapters(model, FLoRAConfig(r=3))
    row = model.weight[0].detach().clone()  # type: ignore[index]
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        run(model).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.weight[0], row)  # type: ignore[index, arg-type]


# torch


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "linear",
            "linear, wide",
            "embedding",
            "conv2d",
            "conv2d, groups",
            "conv2d, reflect",
            "transposed 2d",
            "conv1d",
        ),
        *("bilinear", "bare parameter", "tied", "several inputs", "convolution and linear", "attention"),
    ],
)
def test_one_graph_without_breaks(kind: str) -> None:
    model, run = made(kind)
    adapters = trained(inject_adapters(model, config_of(kind)))
    y = run(model)
    expected = torch.autograd.grad(y.sin().sum(), adapters.trainable_parameters())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y_compiled = run(compiled)
    torch.testing.assert_close(y_compiled, y)
    found = torch.autograd.grad(y_compiled.sin().sum(), adapters.trainable_parameters())
    torch.testing.assert_close(found, expected)
    with adapters.disable(), torch.no_grad():
        y_base = run(model)
        torch.testing.assert_close(run(compiled), y_base)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_layers_that_are_compiled_one_by_one_share_graphs() -> None:
    """A scale that differs a little from layer to layer would make a graph for each, up to the limit."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    with torch.no_grad():
        for n, layer in enumerate(model):
            layer.weight *= 1 + n / 100  # type: ignore[operator]
    inject_adapters(model, FLoRAConfig(r=4))
    torch.compiler.reset()
    counters.clear()
    for layer in model:
        layer.compile(backend="aot_eager", fullgraph=True)
    model(torch.randn(5, 64))
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_one_graph_for_inputs_of_any_size() -> None:
    layer = nn.Linear(64, 48)
    trained(inject_adapters(layer, FLoRAConfig(r=4)))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9, 3000):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), layer(x))


def bfloat16_lstm() -> bool:
    """Whether a bare LSTM runs under autocast: oneDNN has none in bfloat16 where there is AVX2 only."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(4, 3)(torch.zeros(2, 1, 4))
    except RuntimeError as error:
        if "primitive descriptor" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "lstm, projected"])
def test_autocast(kind: str) -> None:
    model, run = made(kind, torch.float32)
    if kind == "lstm" and not bfloat16_lstm():
        pytest.skip("torch's own LSTM has no bfloat16 on this processor")
    adapters = trained(inject_adapters(model, config_of(kind)))
    with torch.autocast("cpu", torch.bfloat16):
        y = run(model)
        adapters.merge()
        y_merged = run(model).float().detach()
    assert (y.float() - y_merged).abs().max() <= 5e-2 * max(1.0, y_merged.abs().max().item())
    y.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.trainable_parameters())


def test_functional_calls_and_gradients_of_single_examples() -> None:
    layer, x = nn.Linear(20, 24), torch.randn(6, 20)
    trained(inject_adapters(layer, FLoRAConfig(r=2)))
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    assert "_flora.weight.default.core" in parameters

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = torch.func.grad(loss)(parameters, x[3])
    for name, gradient in expected.items():
        torch.testing.assert_close(each[name][3], gradient)


def test_a_model_on_the_meta_device(tmp_path: Path) -> None:
    real = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(2, 3, 3, 3)
    state, y_base = bits(real), real(x)
    first = trained(inject_adapters(real, FLoRAConfig(r=2)))
    first.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    late = copy.deepcopy(model)
    adapters = inject_adapters(model, FLoRAConfig(r=2))
    model.to_empty(device="cpu").load_state_dict(state)
    assert model(x).isnan().all(), "a scale by the weight's size waits for the weight"
    adapters.reset_parameters()
    torch.testing.assert_close(model(x), y_base)
    deltas = adapters.deltas("default")
    assert [delta.scale for delta in deltas.values()] == [delta.scale for delta in first.deltas("default").values()]
    load_adapters(late, tmp_path)
    late.load_state_dict(state, assign=True)
    assert torch.equal(late(x), real(x))


def test_modules_that_move_and_change_dtype_take_their_adapters_along() -> None:
    model, _ = made("lstm", torch.float32)
    adapters = trained(inject_adapters(model, config_of("lstm")))
    before = bits(model)
    adapters.merge()
    model.double()
    adapters.unmerge()
    assert equal({key: value.float() for key, value in bits(model).items()}, before)
    assert {parameter.dtype for parameter in adapters.trainable_parameters()} == {torch.float64}
    model(draw(4, 2, 6))


def test_a_checkpoint_of_the_base_is_refused_while_merged() -> None:
    model, _ = made("linear")
    state = bits(model)
    adapters = trained(inject_adapters(model, config_of("linear")))
    adapters.merge()
    with pytest.raises(RuntimeError, match="weight holds merged adapters: unmerge before"):
        model.load_state_dict(state)
    adapters.unmerge()
    model.load_state_dict(state)


def test_grouped_convolution_of_row_13() -> None:
    layer, x = nn.Conv2d(4, 8, 3, groups=2), torch.randn(1, 4, 6, 6)
    y_base, before = layer(x), bits(layer)
    adapters = inject_adapters(layer, FLoRAConfig())
    delta = adapters.deltas("default")["weight"]
    assert contract(delta.core, delta.factors).shape == (8, 2, 3, 3)
    assert not contract(delta.core, delta.factors).any()
    assert torch.equal(layer(x), y_base)
    y = (trained(adapters), layer(x))[1]
    adapters.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    adapters.unmerge()
    assert equal(bits(layer), before)


def test_dilated_convolution_of_row_14() -> None:
    layer, x = nn.Conv2d(4, 8, 3, dilation=2, padding=2), torch.randn(1, 4, 16, 16)
    assert layer(x).shape == (1, 8, 16, 16)
    trained(inject_adapters(layer, FLoRAConfig(r=2)))
    y = layer(x)
    assert y.shape == (1, 8, 16, 16)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, layer.bias, padding=2, dilation=2))


def test_data_parallel_wrappers_train_as_one_process_does(root: Path, tmp_path: Path) -> None:
    """Two processes under DDP, and under FSDP with the original parameters."""
    program = str(root / "tests" / "torch_programs" / "adapters.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, program, str(tmp_path / "m")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stderr
