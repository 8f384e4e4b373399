"""Fine-tuning: one run of a method on a job."""

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.finetune_jobs import Job, draw
from benchmarks.finetune_methods import OURS, attach, matched_rank, n_trained
from benchmarks.finetune_networks import Network

__all__ = ["Outcome", "run", "train"]


class Outcome(NamedTuple):
    accuracy: float  # %
    parameters: int
    seconds: float  # a step, median


_RANKS: dict[Any, int] = {}


def run(
    job: Job,
    method: str,
    rate: float,
    ratio: float,
    seed: int,
    tuning: bool,
    ours: dict[str, Any] = OURS,
    clip: float = 0.0,
) -> Outcome:
    """Train on a seed's training examples and count what is right among its evaluation examples.

    A seed gives all methods the same examples, head and batches.
    """
    rows, held = draw(job, seed, tuning)
    network, times = train(job, method, rate, ratio, seed, rows, ours, clip)
    return Outcome(accuracy(job, network, held), n_trained(network), statistics.median(times))


def train(
    job: Job,
    method: str,
    rate: float,
    ratio: float,
    seed: int,
    rows: Tensor,
    ours: dict[str, Any] = OURS,
    clip: float = 0.0,
) -> tuple[Network, list[float]]:
    """A network trained on these examples, and the seconds of each step."""
    settings, device = job.settings, job.inputs[0].device
    network = job.network(seed)
    key = (job.name, method, settings.rank, ours["kernel_r"])
    if key not in _RANKS:
        _RANKS[key] = matched_rank(method, lambda: job.network(0), settings.targets, settings.rank, ours)
    network.to(device)
    labels = job.labels.to(device)
    start_head(job, network, rows)
    batches = [batch.to(device) for batch in rows.split(settings.batch)]

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(*[each[batch] for each in job.inputs]), labels[batch])

    groups = attach(
        method, network, settings.targets, _RANKS[key], seed, (loss, batches), {**ours, "factor_rate": ratio}
    )
    network.to(device)
    options = [{"params": parameters, "lr": rate * factor} for parameters, factor in groups if parameters]
    head = {"params": list(network.head.parameters()), "lr": settings.head_rate}
    optimizer = torch.optim.Adam([*options, head])
    per_epoch = len(rows) // settings.batch
    total = settings.epochs * per_epoch
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / (total - warm))
    )
    generator, times = torch.Generator().manual_seed(seed), []
    for _ in range(settings.epochs):
        order = rows[torch.randperm(len(rows), generator=generator)][: per_epoch * settings.batch].to(device)
        for batch in order.view(per_epoch, -1):
            begin = time.perf_counter()
            loss(network, batch).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return network, times


@torch.no_grad()
def accuracy(job: Job, network: torch.nn.Module, held: Tensor) -> float:
    device = job.inputs[0].device
    right = sum(
        int((network(*[each[batch.to(device)] for each in job.inputs]).argmax(1).cpu() == job.labels[batch]).sum())
        for batch in held.split(250)
    )
    return 100 * right / len(held)


def start_head(job: Job, network: Any, train: Tensor, decay: float = 1e-2) -> None:
    """Fit the head to the frozen features, so that all methods start from the same sensible point."""
    device = job.inputs[0].device
    with torch.no_grad():
        features = torch.cat([network.features(*[x[b.to(device)] for x in job.inputs]) for b in train.split(250)])
        scale = features.square().mean().sqrt()
    labels, head = job.labels[train].to(device), network.head
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = decay / 2 * (head.weight.square().sum() * scale**2)
        value = F.cross_entropy(head(features), labels) + penalty
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
