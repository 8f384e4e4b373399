"""Fine-tuning: runs over seeds and learning rates in several processes, and their table."""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from benchmarks.finetune import Outcome, run
from benchmarks.finetune_jobs import SETTINGS, Job, load_job
from benchmarks.finetune_methods import ADAPTERS, METHODS

__all__ = ["Task", "chosen_rates", "read_rates", "run_all", "table", "tasks_of", "tuning_tasks"]

# Five settings for each method: learning rates, each about three times the one before. Ours are of the core, in units
# of the root mean square of a layer's weight, beside how many times as fast the factors learn.
SINGLE = {
    "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "head": (0.0,),
    "paper": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "pointwise": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "loha": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "lokr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "locon": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
Rate = tuple[float, float]
RATES: dict[str, list[Rate]] = {method: [(rate, 1.0) for rate in rates] for method, rates in SINGLE.items()}
RATES["flora"] = [(1e-2, 3.0), (1e-2, 10.0), (2e-2, 1.0), (3e-2, 1.0), (3e-2, 3.0)]
MOBILE = [(1e-2, 3.0), (3e-2, 1.0), (3e-2, 3.0), (1e-1, 1.0), (1e-1, 3.0)]  # ours for MobileNetV2, which wants more

DEPTHWISE = (
    "PEFT's LoRA raises for depthwise convolutions, as its rank is no multiple of their groups. The row of LoRA is "
    "LyCORIS's, of all layers; where depthwise layers are left out, it is PEFT's, of the least rank that trains as "
    "many parameters."
)


class Task(NamedTuple):
    job: str
    method: str
    rate: float
    ratio: float
    seed: int
    tuning: bool


Results = dict[Task, Outcome]


def rates_of(job: str, method: str) -> list[Rate]:
    return MOBILE if (job, method) == ("mobile", "flora") else RATES[method]


def read_rates(text: str) -> dict[str, list[Rate]]:
    """Grids in place of a method's own, as in ``"lora=0.007,0.01 flora=0.03:1,0.03:3"``: ratios stand behind colons."""
    grids = {}
    for part in text.split():
        method, _, rates = part.partition("=")
        if method not in RATES or not rates:
            raise ValueError(f"rates: expected method=rate,… of {', '.join(RATES)}, got {part!r}")
        pairs = [rate.partition(":") for rate in rates.split(",")]
        grids[method] = [(float(rate), float(ratio or 1.0)) for rate, _, ratio in pairs]
    return grids


def tuning_tasks(
    job: str, methods: list[str], splits: int, grids: Mapping[str, list[Rate]] = MappingProxyType({})
) -> list[Task]:
    """Every rate of every method on every split; a single rate needs one run, of which nothing depends."""
    rates = {method: grids.get(method) or rates_of(job, method) for method in methods}
    return [
        Task(job, method, *rate, split, True)
        for method, grid in rates.items()
        for rate in grid
        for split in range(splits if len(grid) > 1 else 1)
    ]


def tasks_of(job: str, rates: dict[str, Rate], seeds: int) -> list[Task]:
    return [Task(job, method, *rate, seed, False) for seed in range(seeds) for method, rate in rates.items()]


def chosen_rates(results: Results) -> dict[str, Rate]:
    """For each method the learning rates of the best mean accuracy over the validation splits."""
    scores: dict[str, dict[Rate, list[float]]] = {}
    for task, outcome in results.items():
        scores.setdefault(task.method, {}).setdefault((task.rate, task.ratio), []).append(outcome.accuracy)
    means = {method: {rate: statistics.mean(own) for rate, own in found.items()} for method, found in scores.items()}
    return {method: max(found, key=lambda rate: found[rate]) for method, found in means.items()}


def run_all(tasks: list[Task], data: Path, device: str, workers: int, runs: Path | None, clip: float = 0.0) -> Results:
    """Outcomes of all tasks; those in the file of runs are read from it, and new ones are added to it."""
    known = read_runs(runs)
    results = {task: known[task] for task in tasks if task in known}
    missing = [task for task in tasks if task not in known]
    if workers == 1:
        for task in missing:
            results[task] = one(task, data, device, clip)
            add_run(runs, task, results[task])
        return results
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        waiting = {pool.submit(one, task, data, device, clip): task for task in missing}
        for done in concurrent.futures.as_completed(waiting):
            results[waiting[done]] = done.result()
            add_run(runs, waiting[done], done.result())
    return results


def one(task: Task, data: Path, device: str, clip: float) -> Outcome:
    torch.set_num_threads(1)
    job = cached_job(data, task.job, device)
    return run(job, task.method, task.rate, task.ratio, task.seed, task.tuning, clip=clip)


@functools.lru_cache(1)
def cached_job(data: Path, job: str, device: str) -> Job:
    return load_job(data, job, device)


def read_runs(runs: Path | None) -> Results:
    lines = runs.read_text().splitlines() if runs is not None and runs.exists() else []
    return {Task(*task): Outcome(*outcome) for task, outcome in map(json.loads, lines)}


def add_run(runs: Path | None, task: Task, outcome: Outcome) -> None:
    if runs is not None:
        with runs.open("a") as file:
            file.write(json.dumps([task, outcome]) + "\n")


def table(job: str, rates: dict[str, Rate], results: Results, seeds: int, splits: int) -> list[str]:
    """Lines of Markdown: a job's methods, and their differences, seed by seed, to LoRA and to ours."""
    title = f"**{SETTINGS[job].title}** ({seeds} seeds; learning rates by {splits} validation splits)"
    lines = [
        title,
        "",
        "| method | trained | rate | accuracy, % | − LoRA | ours − it | ms a step |",
        "|---|" + "---:|" * 6,
    ]
    outcomes = {m: [results[Task(job, m, *rate, seed, False)] for seed in range(seeds)] for m, rate in rates.items()}
    scores = {method: [outcome.accuracy for outcome in found] for method, found in outcomes.items()}
    for method, found in outcomes.items():
        own = scores[method]
        to_lora = difference(own, scores.get("lora")) if method != "lora" else ""
        ours = scores.get("flora") if method in ADAPTERS and method != "flora" else None
        rate = "" if method == "head" else f"{rates[method][0]:g}"
        rate += f" × {rates[method][1]:g}" if method == "flora" else ""
        lines.append(
            f"| {METHODS[method]} | {found[0].parameters:,} | {rate} "
            f"| {statistics.mean(own):.1f} ± {deviation(own):.1f} | {to_lora} | {difference(ours, own)} "
            f"| {1e3 * statistics.median(outcome.seconds for outcome in found):.1f} |"
        )
    if SETTINGS[job].depthwise and "lora" in rates:
        lines += ["", DEPTHWISE]
    return lines


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def difference(first: list[float] | None, second: list[float] | None) -> str:
    """Mean of the paired differences ± its standard error."""
    if first is None or second is None:
        return ""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    return f"{statistics.mean(gaps):+.2f} ± {deviation(gaps) / math.sqrt(len(gaps)):.2f}"
