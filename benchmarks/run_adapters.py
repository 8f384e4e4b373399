"""The adapters' suite: FLoRA, PEFT's LoRA and LyCORIS's LoCon on the same frozen layers, with as many parameters."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import adapters
from benchmarks.adapters_cuda import LoRA
from benchmarks.finetune_methods import ATTACH, n_trained
from benchmarks.head_to_head import Case, Method
from benchmarks.run_peers import installed
from probtensor.models import FLoRAConfig, inject_adapters

__all__ = ["adapter_cases"]

PACKAGES = (("peft", "lora", "LoRA (PEFT)"), ("lycoris", "locon", "LoCon, Tucker (LyCORIS)"))


class Alone(nn.Module):
    """A network of one layer; what LyCORIS adds stands beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def adapter_cases(quick: bool) -> list[Case]:
    """Convolutions and linear layers without groups."""
    layers = adapters.LAYERS[:1] + adapters.LAYERS[5:6] + adapters.LAYERS[8:9] if quick else adapters.LAYERS
    simple = [layer for layer in layers if isinstance(layer.make(), nn.Conv2d | nn.Conv3d | nn.Linear)]
    simple = [layer for layer in simple if getattr(layer.make(), "groups", 1) == 1]
    return [_layer_case(layer, 5 if quick else 15) for layer in simple]


def _layer_case(layer: adapters.Layer, repeats: int) -> Case:
    """Milliseconds of forward and backward with an adapter, over the frozen layer's."""
    optional = [(package, Method(label, False, _timed(way, repeats))) for package, way, label in PACKAGES]
    peers, left_out = installed(optional)
    present = [way for package, way, label in PACKAGES if label not in left_out]

    def made(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        handle = inject_adapters(adapted := layer.make(), FLoRAConfig(r=16, kernel_r=2))
        number = sum(parameter.numel() for parameter in handle.trainable_parameters())
        modules = {"frozen": layer.make().requires_grad_(False), "ours": adapted, "plain": LoRA(layer.make(), number)}
        modules |= {way: nearest(way, layer.make, number) for way in present}
        return {"modules": modules, "x": torch.randn(layer.shape, requires_grad=True)}

    methods = (
        Method("FLoRA", True, _timed("ours", repeats)),
        Method("LoRA (PEFT's operations)", False, _timed("plain", repeats)),
        *peers,
    )
    return Case(layer.name, made, methods, decides="over frozen", left_out=left_out)


def nearest(way: str, make: Callable[[], nn.Module], number: int, most: int = 64) -> nn.Module:
    """The layer with a peer's adapter, of the rank that trains most nearly `number` parameters."""
    made: dict[int, nn.Module] = {}
    for rank in range(1, most + 1):
        network = Alone(make()).requires_grad_(False)
        ATTACH[way](network, ["layer"], rank)
        made[rank] = network
        if n_trained(network) >= number:
            break
    return min(made.values(), key=lambda network: abs(n_trained(network) - number))


def _timed(name: str, repeats: int) -> Callable[[Any], Mapping[str, float]]:
    def run(data: dict[str, Any]) -> dict[str, float]:
        module, pairs = data["modules"][name], []
        for _ in range(repeats):
            steps = [adapters.step_seconds(one, data["x"]) for one in (data["modules"]["frozen"], module)]
            pairs.append((steps[1] / steps[0], 1e3 * steps[1]))
        ratio, milliseconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        kept = adapters.saved_bytes(module, data["x"]) / 1e6
        return {"over frozen": ratio, "ms": milliseconds, "kept, MB": kept, "parameters": float(n_trained(module))}

    return run
