"""The fine-tuning jobs: network with its pretrained weights, data, and what is trained and held out under a seed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.finetune_data import Arrays, load_arrays
from benchmarks.finetune_networks import (
    Block,
    MobileLower,
    MobileUpper,
    Network,
    RNet,
    SentenceLayers,
    SpectralNet,
    sentence_states,
)

__all__ = ["SETTINGS", "Job", "Settings", "draw", "load_job"]


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of colours from 0 to 1
MOBILE_SIZE = 64  # pixels a side that digits are enlarged to for MobileNetV2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a job is, beside its data.

    Attributes
    ----------
    title : str
    network : callable
        From the number of classes.
    targets : tuple of str
        Ends of the names of the adapted modules.
    per_class : int
        Training examples of each class.
    rank : int
        Of LoRA, whose number of trainable parameters the others meet.
    epochs, batch : int
    head_rate : float
        Learning rate of the head, the same for all methods.
    most_validation : int
        Validation examples of a tuning split at most.
    depthwise : bool
        Whether convolutions with a kernel for each channel are among the adapted.
    """

    title: str
    network: Callable[[int], Network]
    targets: tuple[str, ...]
    per_class: int
    rank: int
    epochs: int
    batch: int
    head_rate: float
    most_validation: int = 1000
    depthwise: bool = False


SETTINGS = {
    "pines": Settings(
        "Indian Pines, 3-D convolutions: 6 → 6 other classes",
        SpectralNet,
        ("conv1", "conv2", "conv3", "dense"),
        per_class=30,
        rank=4,
        epochs=12,
        batch=20,
        head_rate=2e-3,
    ),
    "digits": Settings(
        "R-Net (faces) → MNIST, 500 images",
        RNet,
        ("conv1", "conv2", "conv3", "dense4"),
        per_class=50,
        rank=4,
        epochs=8,
        batch=25,
        head_rate=2e-3,
    ),
    "mobile": Settings(
        "MobileNetV2 (ImageNet), upper 7 of 17 blocks → MNIST, 500 images",
        MobileUpper,
        ("expand", "depthwise", "project", "last"),
        per_class=50,
        rank=4,
        epochs=16,
        batch=25,
        head_rate=2e-3,
        depthwise=True,
    ),
    "text": Settings(
        "MiniLM, upper 3 layers → film snippets' polarity",
        SentenceLayers,
        ("query", "key", "value", "out", "up", "down"),
        per_class=160,
        rank=4,
        epochs=4,
        batch=16,
        head_rate=2e-3,
        most_validation=600,
    ),
}


@dataclasses.dataclass
class Job:
    """A job ready to run.

    Attributes
    ----------
    name : str
    settings : Settings
    bases : list of dict of str to Tensor
        Pretrained weights, all but the head's, of one network or several; seeds take them in turn.
    inputs : tuple of Tensor
        The network's arguments for all examples.
    labels, part, group : Tensor
        Class; 1 for the pool and 2 for the test; what is held out together in validation.
    """

    name: str
    settings: Settings
    bases: list[dict[str, Tensor]]
    inputs: tuple[Tensor, ...]
    labels: Tensor
    part: Tensor
    group: Tensor

    @property
    def n_classes(self) -> int:
        return int(self.labels.max()) + 1

    def network(self, seed: int) -> Network:
        """The seed's pretrained network with a fresh head, all frozen but the head."""
        torch.manual_seed(seed)
        network = self.settings.network(self.n_classes)
        with torch.no_grad():
            network(*[each[:2].cpu() for each in self.inputs])  # lazy layers learn their shapes
        base = self.bases[seed % len(self.bases)]
        state = base | {f"head.{name}": value for name, value in network.head.state_dict().items()}
        network.load_state_dict(state)
        network.eval().requires_grad_(False).head.requires_grad_(True)
        return network


def load_job(data: Path, name: str, device: str = "cpu") -> Job:
    arrays = load_arrays(data, name)
    x = torch.from_numpy(arrays["x"])
    inputs: tuple[Tensor, ...] = (x.float(),)
    if name == "text":
        inputs = text_inputs(arrays, x.long(), device)
    if name == "mobile":
        inputs = (mobile_inputs(arrays, x, device),)
    group = torch.from_numpy(arrays["group"] if "group" in arrays else np.arange(len(x)))
    bases = [tensors(arrays, f"{prefix}.") for prefix in sorted({n.split(".")[0] for n in arrays if n[:4] == "base"})]
    labels, part = (torch.from_numpy(arrays[key]).long() for key in ("y", "part"))
    return Job(name, SETTINGS[name], bases, tuple(each.to(device) for each in inputs), labels, part, group.long())


def text_inputs(arrays: Arrays, tokens: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """States below the trained layers, computed once."""
    lower, state = nn.ModuleList(), tensors(arrays, "lower.")
    for _ in range(len({name.split(".")[0] for name in state})):
        lower.append(Block(384, 1536, 12))
    lower.load_state_dict(state)
    lower.to(device)
    embeddings = {name: value.to(device) for name, value in tensors(arrays, "embeddings.").items()}
    parts = [sentence_states(part, embeddings, lower) for part in tokens.to(device).split(128)]
    return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])


@torch.no_grad()
def mobile_inputs(arrays: Arrays, pictures: Tensor, device: str) -> Tensor:
    """Outputs of the lower blocks, computed once, for grey pictures in the three colours and of the size wanted."""
    lower = MobileLower()
    lower.load_state_dict(tensors(arrays, "lower."))
    lower.eval().to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in IMAGENET)
    states = []
    for part in pictures.split(250):
        x = F.interpolate(part.to(device) / 255, size=(MOBILE_SIZE, MOBILE_SIZE), mode="bilinear", align_corners=False)
        states.append(lower((x - mean) / std))
    return torch.cat(states)


def tensors(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    found = {
        name.removeprefix(prefix): torch.from_numpy(value) for name, value in arrays.items() if name.startswith(prefix)
    }
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def draw(job: Job, seed: int, tuning: bool, held_share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Training and evaluation examples: all of the test, or, for tuning, of a share of the pool's groups."""
    rng = np.random.default_rng((seed, tuning))
    pool = np.flatnonzero(job.part.numpy() == 1)
    labels, group = job.labels.numpy(), job.group.numpy()
    evaluated = np.flatnonzero(job.part.numpy() == 2)
    if tuning:
        groups = rng.permutation(np.unique(group[pool]))
        held = np.isin(group[pool], groups[: int(held_share * len(groups))])
        evaluated, pool = rng.permutation(pool[held])[: job.settings.most_validation], pool[~held]
    order = rng.permutation(pool)
    of_class = [order[labels[order] == k][: job.settings.per_class] for k in range(job.n_classes)]
    return torch.from_numpy(np.concatenate(of_class)), torch.from_numpy(np.sort(evaluated))
