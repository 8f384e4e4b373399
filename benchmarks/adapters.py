"""FLoRA adapters: what a layer costs with one, forward and backward, beside the frozen layer."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probtensor.models import FLoRAConfig, inject_adapters

__all__ = ["LAYERS", "Layer", "adapter_lines", "saved_bytes", "step_seconds"]

TARGET = 1.4  # times the frozen layer


class Layer(NamedTuple):
    """A layer and the shape of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


LAYERS = (
    Layer("Conv2d 256→256, 3×3, 28×28, batch 8", lambda: nn.Conv2d(256, 256, 3, padding=1), (8, 256, 28, 28)),
    Layer("Conv2d 64→64, 7×7, 28×28, batch 8", lambda: nn.Conv2d(64, 64, 7, padding=3), (8, 64, 28, 28)),
    Layer("Conv2d 256→256, 1×1, 28×28, batch 8", lambda: nn.Conv2d(256, 256, 1), (8, 256, 28, 28)),
    Layer("Conv2d 256, depthwise 3×3, 28×28, batch 8", lambda: nn.Conv2d(256, 256, 3, 1, 1, 1, 256), (8, 256, 28, 28)),
    Layer("Conv2d 3→64, 7×7, stride 2, 112×112, batch 4", lambda: nn.Conv2d(3, 64, 7, 2, 3), (4, 3, 112, 112)),
    Layer("Conv3d 64→64, 3×3×3, 8×14×14, batch 4", lambda: nn.Conv3d(64, 64, 3, padding=1), (4, 64, 8, 14, 14)),
    Layer("ConvTranspose2d 128→128, 3×3, 28×28, batch 4", lambda: nn.ConvTranspose2d(128, 128, 3), (4, 128, 28, 28)),
    Layer("Linear 1024→1024, 2048 rows", lambda: nn.Linear(1024, 1024), (2048, 1024)),
    Layer("Linear 1024→1024, 64 rows", lambda: nn.Linear(1024, 1024), (64, 1024)),
    Layer("Linear 64→64, 256 rows", lambda: nn.Linear(64, 64), (256, 64)),
    Layer("MultiheadAttention 256, 4 × 64 tokens", lambda: SelfAttention(256, 4), (4, 64, 256)),
    Layer("LSTM 128→128, 8 × 32 steps", lambda: Recurrent(128), (8, 32, 128)),
)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward: each storage once, without its parameters and input."""
    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    known.add(x.untyped_storage().data_ptr())
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or a later storage could have the address of an earlier one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    y.sum().backward()
    return sum(kept.values())


def adapter_lines(rank: int, kernel_rank: int, repeats: int, layers: Sequence[Layer] = LAYERS) -> list[str]:
    """Markdown lines: milliseconds of forward and backward, the ratio, and bytes kept, for each layer.

    A run goes to and fro between the frozen layer and the adapted one, so that both see the same machine; the ratio is
    the median of the pairs' ratios.
    """
    lines = [
        f"| layer | parameters | frozen, ms | adapted, ms | ratio | target {TARGET} | built update, ratio | kept, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missed = []
    for name, make, shape in layers:
        torch.manual_seed(0)
        frozen = make().requires_grad_(False)
        adapted, built = make(), make()
        handle = inject_adapters(adapted, FLoRAConfig(r=rank, kernel_r=kernel_rank))
        dense = inject_adapters(built, FLoRAConfig(r=rank, kernel_r=kernel_rank))
        _always_built(built)
        x = torch.randn(shape, requires_grad=True)
        modules = (frozen, adapted, built)
        times: list[list[float]] = [[], [], []]
        for turn in range(repeats + 2):
            for module, kept in zip(modules, times, strict=True):
                seconds = step_seconds(module, x)
                if turn > 1:
                    kept.append(seconds)
        first, *others = (statistics.median(kept) for kept in times)
        ratios = [statistics.median(a / b for a, b in zip(kept, times[0], strict=True)) for kept in times[1:]]
        numbers = sum(parameter.numel() for parameter in handle.trainable_parameters())
        assert numbers == sum(parameter.numel() for parameter in dense.trainable_parameters())
        if ratios[0] > TARGET:
            missed.append(name)
        lines.append(
            f"| {name} | {numbers:,} | {1e3 * first:.2f} | {1e3 * others[0]:.2f} | {ratios[0]:.2f} | "
            f"{'reached' if ratios[0] <= TARGET else 'missed'} | {ratios[1]:.2f} | "
            f"{' → '.join(f'{saved_bytes(module, x) / 1e6:.2f}' for module in modules)} |"
        )
    return [*lines, "", f"Target missed: {'; '.join(missed) or 'nowhere'}."]


def step_seconds(module: nn.Module, x: Tensor) -> float:
    """CPU seconds of forward and backward on one thread, gradients of earlier steps dropped."""
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None
    start = time.process_time()
    module(x).sum().backward()
    return time.process_time() - start


def _always_built(module: nn.Module) -> None:
    """Give adapted layers the forward of their kind back: they then read the effective weight."""
    for layer in module.modules():
        kind: Any = type(layer)
        if hasattr(kind, "_adapted_class"):
            layer.__class__ = type(kind.__name__, (kind,), {"forward": kind._adapted_class.forward})
