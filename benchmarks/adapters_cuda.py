"""FLoRA adapters on a GPU beside LoRA of as many parameters: forward and backward over a frozen bfloat16 layer."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probtensor.models import FLoRAConfig, inject_adapters

__all__ = ["cuda_adapter_lines"]


class Layer(NamedTuple):
    """A layer and the shape of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


class LoRA(nn.Module):
    """A frozen layer with HF PEFT's update: down to r channels by a kernel of the layer's shape, up again by 1 × 1."""

    def __init__(self, base: nn.Module, n_parameters: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        weight = base.weight
        kernel = weight[0, 0].numel()
        self.rank = max(round(n_parameters / (weight.shape[0] + weight.shape[1] * kernel)), 1)
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, self.rank, bias=False)
            self.up = nn.Linear(self.rank, base.out_features, bias=False)
        else:
            kind = type(base)
            how = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "bias": False}
            self.down = kind(base.in_channels, self.rank, base.kernel_size, **how)
            self.up = kind(self.rank, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x)) * 2.0
        return y


LAYERS = (
    Layer("Conv2d 256→256, 3×3, 28×28, batch 64", lambda: nn.Conv2d(256, 256, 3, padding=1), (64, 256, 28, 28)),
    Layer("Conv2d 256→256, 3×3, 28×28, batch 256", lambda: nn.Conv2d(256, 256, 3, padding=1), (256, 256, 28, 28)),
    Layer("Conv2d 128→128, 7×7, 28×28, batch 64", lambda: nn.Conv2d(128, 128, 7, padding=3), (64, 128, 28, 28)),
    Layer("Conv2d 128→128, 7×7, 28×28, batch 256", lambda: nn.Conv2d(128, 128, 7, padding=3), (256, 128, 28, 28)),
    Layer("Conv3d 64→64, 3×3×3, 16×28×28, batch 16", lambda: nn.Conv3d(64, 64, 3, padding=1), (16, 64, 16, 28, 28)),
    Layer("Conv2d 512→512, 1×1, 28×28, batch 64", lambda: nn.Conv2d(512, 512, 1), (64, 512, 28, 28)),
    Layer("Conv2d 512→512, 1×1, 28×28, batch 256", lambda: nn.Conv2d(512, 512, 1), (256, 512, 28, 28)),
    Layer("Linear 4096→4096, 8192 rows", lambda: nn.Linear(4096, 4096), (8192, 4096)),
)
MODES: dict[str, dict[str, str]] = {"eager": {}, "compiled": {}, "CUDA graphs": {"mode": "reduce-overhead"}}


def cuda_adapter_lines(rank: int, kernel_rank: int, repeats: int) -> list[str]:
    """Markdown lines: microseconds of forward and backward under bfloat16 autocast, three ways, interleaved.

    "CUDA graphs" is `torch.compile` in the mode "reduce-overhead": then starting kernels costs nothing.
    """
    lines = [
        "| layer | | frozen, µs | FLoRA, µs | LoRA, µs | FLoRA / frozen | FLoRA / LoRA | parameters, LoRA's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, make, shape in LAYERS:
        for way, options in MODES.items():
            torch.manual_seed(0)
            frozen, adapted, base = (make().cuda().bfloat16() for _ in range(3))
            frozen.requires_grad_(False)
            handle = inject_adapters(adapted, FLoRAConfig(r=rank, kernel_r=kernel_rank))
            numbers = sum(parameter.numel() for parameter in handle.trainable_parameters())
            lora = LoRA(base, numbers)
            lora.down.cuda().float()
            lora.up.cuda().float()
            of_lora = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
            x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            modules: list[nn.Module] = [frozen, adapted, lora]
            if way != "eager":
                modules = [torch.compile(module, **options) for module in modules]  # type: ignore[misc]
            times: list[list[float]] = [[], [], []]
            for turn in range(repeats + 5):
                for module, kept in zip(modules, times, strict=True):
                    micros = _step(module, x)
                    if turn > 4:
                        kept.append(micros)
            a, b, c = (statistics.median(kept) for kept in times)
            lines.append(
                f"| {name} | {way} | {a:.0f} | {b:.0f} | {c:.0f} | {b / a:.2f} | {b / c:.2f} "
                f"| {numbers:,}, {of_lora:,} |"
            )
            torch.compiler.reset()
    return lines


def _step(module: nn.Module, x: Tensor, n: int = 10) -> float:
    """Microseconds of one forward and backward, of several in a row, each from no gradients as after an optimiser."""
    grown = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        torch.compiler.cudagraph_mark_step_begin()
        for tensor in grown:
            tensor.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)
        y.backward(y.detach())
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / n
