"""Ways to fine-tune a network: each makes part of it trainable and gives the optimizer's groups.

`attach` returns groups of parameters with their learning rate's factor. Ranks are chosen by `matched_rank`, so that all
adapters train as many parameters as LoRA does.
"""

import copy
import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from probtensor.models import FLoRAConfig, inject_adapters
from probtensor.models.adapter_starts import gradient_ranks, weight_gradients

__all__ = ["ADAPTERS", "METHODS", "OURS", "attach", "matched_rank", "n_trained", "needs"]

Groups = list[tuple[list[nn.Parameter], float]]
Loss = tuple[Callable[[nn.Module, Any], Tensor], list[Any]]

METHODS = {
    "full": "full fine-tuning",
    "head": "head alone",
    "flora": "FLoRA (ours)",
    "paper": "FLoRA as published",
    "lora": "LoRA (PEFT; LyCORIS for depthwise)",
    "pointwise": "LoRA (PEFT), depthwise left out",
    "loha": "LoHa (PEFT; LyCORIS for 3-D)",
    "lokr": "LoKr (PEFT; LyCORIS for 3-D)",
    "locon": "LoCon-Tucker (LyCORIS)",
}
ADAPTERS = ("flora", "paper", "lora", "pointwise", "loha", "lokr", "locon")
PACKAGES = {
    "lora": ("peft",),
    "pointwise": ("peft",),
    "loha": ("peft", "lycoris"),
    "lokr": ("peft", "lycoris"),
    "locon": ("lycoris",),
}
LOKR_FACTOR = 4  # of the Kronecker product; the default leaves no rank that trains as many parameters as LoRA
OURS: dict[str, Any] = {
    "init": "gradient",
    "factor_rate": 1.0,
    "kernel_r": 99,
    "allot": True,
    "alpha": "rms",
}


def needs(method: str, depthwise: bool = False) -> list[str]:
    """Packages that a method needs, with or without depthwise convolutions, and that are not installed."""
    packages = (*PACKAGES.get(method, ()), *(["lycoris"] if method == "lora" and depthwise else []))
    return [name for name in packages if importlib.util.find_spec(name) is None]


def is_grouped(layer: nn.Module) -> bool:
    """Whether it is a convolution in groups, for which PEFT's LoRA raises unless the groups divide its rank."""
    return getattr(layer, "groups", 1) > 1


def n_trained(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def attach(
    method: str, network: Any, targets: Sequence[str], rank: int, seed: int, loss: Loss, ours: dict[str, Any] = OURS
) -> Groups:
    """Make a method's parameters trainable, beside the head's; the head is left out of the groups."""
    torch.manual_seed(seed)
    if method == "head":
        return []
    if method == "full":
        network.requires_grad_(True)
        head = set(network.head.parameters())
        return [([p for p in network.parameters() if p not in head], 1.0)]
    names = [name for name, _ in network.named_modules() if name.split(".")[-1] in targets]
    if method == "flora":
        groups = attach_flora(network, names, rank, seed, loss, ours)
    else:
        head, before = set(network.head.parameters()), set(network.parameters())
        ATTACH[method](network, names, rank)
        groups = [([p for p in network.parameters() if p.requires_grad and p not in head], 1.0)]
        assert not before - head & {p for p in before if p.requires_grad}
    network.head.requires_grad_(True)
    return groups


def attach_flora(network: Any, names: list[str], rank: int, seed: int, loss: Loss, ours: dict[str, Any]) -> Groups:
    start, allot = ours["init"], ours["allot"]
    config = FLoRAConfig(r=rank, kernel_r=ours["kernel_r"], target_modules=names, init=start, random_state=seed)
    gradients = weight_gradients(network, config, *loss) if loss[1] and (start == "gradient" or allot) else None
    changes: dict[str, Any] = {"alpha": ours["alpha"]}
    if gradients is not None and allot:
        ranks = gradient_ranks(gradients, rank)
        changes["rank_pattern"] = {re.escape(name): found for name, found in ranks.items()}
    config = FLoRAConfig(**{**config.as_dict(), **changes})
    adapters = inject_adapters(network, config, gradients=gradients if start == "gradient" else None)
    groups = adapters.parameter_groups(1.0, factor_ratio=ours["factor_rate"])
    return [(group["params"], group["lr"]) for group in groups]


class PublishedDelta(nn.Module):
    """The update as in the authors' release: a factor for each mode, from N(0, 1/(2R)), and a constant scale of 4."""

    def __init__(self, shape: Sequence[int], rank: int) -> None:
        super().__init__()
        ranks = [min(size, rank if n < 2 else 2) for n, size in enumerate(shape)]
        self.core = nn.Parameter(torch.zeros(ranks))
        self.factors = nn.ParameterList(
            torch.randn(size, r) / math.sqrt(2 * r) for size, r in zip(shape, ranks, strict=True)
        )

    def forward(self, weight: Tensor) -> Tensor:
        delta: Tensor = self.core
        for factor in self.factors:  # each mode in turn goes from first to last
            delta = torch.tensordot(delta, factor, dims=([0], [1]))
        return weight + 4.0 * delta


def attach_published(network: nn.Module, names: list[str], rank: int) -> None:
    for name in names:
        layer = network.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", PublishedDelta(layer.weight.shape, rank), unsafe=True)  # type: ignore[arg-type]


def attach_peft(kind: str) -> Callable[[nn.Module, list[str], int], None]:
    def attach(network: nn.Module, names: list[str], rank: int) -> None:
        import peft

        layers = [network.get_submodule(name) for name in names]
        if any(is_grouped(layer) if kind == "LoRA" else isinstance(layer, nn.Conv3d) for layer in layers):
            attach_lycoris(kind.lower())(network, names, rank)
            return
        if kind == "LoRA":
            config: Any = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        elif kind == "LoHa":
            config = peft.LoHaConfig(r=rank, alpha=rank, target_modules=names)
        else:
            config = peft.LoKrConfig(r=rank, alpha=rank, target_modules=names, decompose_factor=LOKR_FACTOR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, network)

    return attach


def attach_lycoris(algorithm: str, tucker: bool = False) -> Callable[[nn.Module, list[str], int], None]:
    def attach(network: nn.Module, names: list[str], rank: int) -> None:
        logging.disable(logging.WARNING)
        from lycoris import LycorisNetwork, create_lycoris

        LycorisNetwork.apply_preset({"target_name": names, "target_module": [], "enable_conv": True})
        sizes = {"linear_dim": rank, "linear_alpha": rank, "conv_dim": rank, "conv_alpha": rank}
        more = {"factor": LOKR_FACTOR} if algorithm == "lokr" else {}
        added = create_lycoris(network, 1.0, algo=algorithm, use_tucker=tucker, **sizes, **more)
        added.apply_to()
        assert len(added.loras) == len(names), (len(added.loras), names)
        network.lycoris = added.requires_grad_(True)

    return attach


def attach_pointwise(network: nn.Module, names: list[str], rank: int) -> None:
    attach_peft("LoRA")(network, [name for name in names if not is_grouped(network.get_submodule(name))], rank)


ATTACH: dict[str, Callable[[nn.Module, list[str], int], None]] = {
    "paper": attach_published,
    "lora": attach_peft("LoRA"),
    "pointwise": attach_pointwise,
    "loha": attach_peft("LoHa"),
    "lokr": attach_peft("LoKr"),
    "locon": attach_lycoris("lora", tucker=True),
}


def matched_rank(
    method: str, make: Callable[[], nn.Module], targets: Sequence[str], rank: int, ours: dict[str, Any]
) -> int:
    """The rank whose number of trained parameters is nearest to LoRA's of `rank`.

    Ours is at most 2 % above; LoRA without depthwise layers is above, so that it does not lose by having fewer.
    """
    if method in ("full", "head", "lora") or (method == "flora" and ours["allot"]):
        return rank

    def count(method: str, rank: int) -> int:
        network = copy.deepcopy(make())
        attach(method, network, targets, rank, 0, (lambda m, b: m(b), []), {**ours, "init": "zero"})
        return n_trained(network)

    wanted, counts = lora_count(make, targets, rank), {}
    for r in range(1, 33):
        counts[r] = count(method, r)
        if counts[r] > 1.5 * wanted:
            break
    if method == "flora":
        return max([r for r, n in counts.items() if n <= 1.02 * wanted], default=1)
    if method == "pointwise":
        return min(r for r, n in counts.items() if n >= wanted)
    return min(counts, key=lambda r: abs(counts[r] - wanted))


def lora_count(make: Callable[[], Any], targets: Sequence[str], rank: int) -> int:
    """Parameters that LoRA trains, head and all, whether or not PEFT is there."""
    network = make()
    total = sum(p.numel() for p in network.head.parameters())
    for name, module in network.named_modules():
        if name.split(".")[-1] in targets:
            shape = module.weight.shape
            total += rank * (shape[0] + math.prod(shape[1:]))
    return total
