"""Whether probabilities of a fine-tuned network are what they say: the point estimate, its temperature, posteriors.

A seed holds a third of the pool's groups out for validation and trains on examples of the others, as `finetune` does;
what needs a temperature takes it from the validation examples. Scores are of the test examples: share right, expected
calibration error (15 bins of equal width), mean negative log likelihood, and Brier's score, the mean squared distance
of the probabilities from the right class.
"""

import copy
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.finetune import train
from benchmarks.finetune_jobs import Job, draw
from benchmarks.finetune_methods import OURS
from benchmarks.finetune_table import deviation, difference
from probtensor.metrics import expected_calibration_error
from probtensor.models.adapter_evidence import fit_by_evidence
from probtensor.models.adapter_laplace import AdapterLaplace, fit_laplace
from probtensor.models.flora import Adapters

__all__ = ["WAYS", "Scores", "calibration_table", "probabilities_of", "scores_of", "tuned_scale"]

HELD_SHARE = 1 / 3
BATCH = 60  # rows of a batch for posteriors
MEMBERS = 5
SAMPLES = 200


class Scores(NamedTuple):
    accuracy: float  # %
    error: float  # expected calibration error, %
    nll: float
    brier: float
    seconds: float


@dataclasses.dataclass
class Trained:
    """A seed's network and examples, and posteriors once they are fitted."""

    job: Job
    network: nn.Module
    rows: Tensor
    validation: Tensor
    test: Tensor
    seed: int
    rates: tuple[float, float]
    clip: float
    posteriors: dict[str, AdapterLaplace] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def validation_batches(self) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        return batches_of(self.job, self.validation)

    @functools.cached_property
    def test_inputs(self) -> tuple[Tensor, ...]:
        return tuple(each[self.test] for each in self.job.inputs)


def trained(job: Job, seed: int, rates: tuple[float, float], clip: float = 0.0) -> Trained:
    rows, validation = draw(job, seed, True, HELD_SHARE)
    test = torch.nonzero(job.part == 2).flatten()
    network, _ = train(job, "flora", *rates, seed, rows, OURS, clip)
    return Trained(job, network, rows, validation, test, seed, rates, clip)


@torch.no_grad()
def logits(job: Job, network: nn.Module, rows: Tensor) -> Tensor:
    parts = [network(*[each[some] for each in job.inputs]) for some in rows.split(250)]
    return torch.cat(parts).double().cpu()


def tuned_scale(outputs: Tensor, labels: Tensor) -> float:
    """The temperature by which logits are divided under which the labels are most probable."""

    def loss(log_scale: float) -> float:
        return float(F.cross_entropy(outputs / math.exp(log_scale), labels))

    return math.exp(minimize_scalar(loss, bounds=(-3.0, 5.0), method="bounded").x)


def batches_of(job: Job, rows: Tensor) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    return [(tuple(each[some] for each in job.inputs), job.labels[some]) for some in rows.split(BATCH)]


def point(at: Trained) -> Tensor:
    return logits(at.job, at.network, at.test).softmax(1)


def scaled(at: Trained) -> Tensor:
    scale = tuned_scale(logits(at.job, at.network, at.validation), at.job.labels[at.validation])
    return (logits(at.job, at.network, at.test) / scale).softmax(1)


def ensemble(at: Trained) -> Tensor:
    """Networks that saw the same examples in other orders."""
    found = [point(at)]
    for member in range(1, MEMBERS):
        network, _ = train(at.job, "flora", *at.rates, at.seed + 1000 * member, at.rows, OURS, at.clip)
        found.append(logits(at.job, network, at.test).softmax(1))
    return torch.stack(found).mean(0)


def posterior(at: Trained, kind: str) -> AdapterLaplace:
    """By `fit_laplace` of a structure, or by `fit_by_evidence` from a copy of the network."""
    if kind not in at.posteriors:
        rows = batches_of(at.job, at.rows)
        loops = any(isinstance(module, nn.PReLU) for module in at.network.modules())  # whose derivative vmap refuses
        options: dict[str, Any] = {"jacobian": "loop" if loops else "vmap"}
        if kind == "evidence":
            network = copy.deepcopy(at.network)
            found = fit_by_evidence(Adapters(network), rows, structure="kronecker", **options)
        else:
            found = fit_laplace(Adapters(at.network), rows, structure=kind, **options)
        setattr(found, "outputs", functools.cache(found.outputs))  # noqa: B010  the same at all temperatures
        at.posteriors[kind] = found
    return at.posteriors[kind]


def predicted(at: Trained, kind: str, tuned: bool, samples: int | None = None) -> Tensor:
    found = posterior(at, kind)
    found.temperature = 1.0
    if tuned:
        found.tune_temperature(at.validation_batches)
    return found.predict(at.test_inputs, samples).mean


def way(kind: str, tuned: bool, samples: int | None = None) -> Callable[[Trained], Tensor]:
    return functools.partial(predicted, kind=kind, tuned=tuned, samples=samples)


WAYS: dict[str, tuple[str, Callable[[Trained], Tensor]]] = {
    "point": ("point estimate", point),
    "scaled": ("logits divided by a temperature ¹", scaled),
    "ensemble": (f"ensemble of {MEMBERS}", ensemble),
    "plain": ("`fit_laplace`, Kronecker", way("kronecker", False)),
    "kronecker": ("`fit_laplace`, Kronecker, `tune_temperature` ¹", way("kronecker", True)),
    "draws": (f"the same, {SAMPLES} draws instead of probit ¹", way("kronecker", True, SAMPLES)),
    "full": ("`fit_laplace`, full, `tune_temperature` ¹", way("full", True)),
    "full-draws": (f"the same, {SAMPLES} draws instead of probit ¹", way("full", True, SAMPLES)),
    "evidence": ("`fit_by_evidence`, Kronecker", way("evidence", False)),
}


def probabilities_of(
    job: Job, seed: int, rates: tuple[float, float], ways: list[str], clip: float = 0.0
) -> dict[str, tuple[Tensor, float]]:
    """Test probabilities by way, and the seconds each took after training."""
    at, found = trained(job, seed, rates, clip), {}
    for name in ways:
        begin = time.perf_counter()
        found[name] = WAYS[name][1](at).cpu(), time.perf_counter() - begin
    return found


def scores_of(probabilities: Tensor, labels: Tensor, seconds: float = 0.0) -> Scores:
    right = F.one_hot(labels, probabilities.shape[1])
    return Scores(
        100 * float((probabilities.argmax(1) == labels).double().mean()),
        100 * expected_calibration_error(labels.numpy(), probabilities.numpy()),
        float(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels)),
        float((probabilities - right).square().sum(1).mean()),
        seconds,
    )


def calibration_table(found: dict[str, list[Scores]]) -> list[str]:
    """Lines of Markdown; differences and ratios of calibration errors are to the point estimate."""
    lines = [
        "| | accuracy, % | − point | calibration error, % | ratio of means | of seeds | NLL | Brier | s |",
        "|---|" + "---:|" * 8,
    ]
    base = found["point"]
    for name, scores in found.items():
        ratios = [own.error / other.error for own, other in zip(scores, base, strict=True)]
        error = [each.error for each in scores]
        other = name != "point"
        cells: list[Any] = [
            WAYS[name][0],
            spread([each.accuracy for each in scores], 1),
            difference([each.accuracy for each in scores], [each.accuracy for each in base]) if other else "",
            spread(error, 1),
            f"{statistics.mean(error) / statistics.mean(each.error for each in base):.2f}" if other else "",
            spread(ratios, 2) if other else "",
            spread([each.nll for each in scores], 3),
            spread([each.brier for each in scores], 3),
            f"{statistics.mean(each.seconds for each in scores):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {deviation(values):.{digits}f}"
