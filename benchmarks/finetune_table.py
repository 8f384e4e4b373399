"""Fine-tuning: runs over seeds and learning rates in several processes, and their table."""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.finetune import Outcome, run
from benchmarks.finetune_jobs import SETTINGS, Job, load_job
from benchmarks.finetune_methods import ADAPTERS, METHODS

__all__ = ["RATES", "Task", "chosen_rates", "run_all", "table", "tasks_of", "tuning_tasks"]

RATES = {  # five for each method, each about three times the one before
    "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "head": (1e-3,),
    "flora": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "paper": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "loha": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "lokr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "locon": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}


class Task(NamedTuple):
    job: str
    method: str
    rate: float
    seed: int
    tuning: bool


Results = dict[Task, Outcome]


def tuning_tasks(job: str, methods: list[str], splits: int) -> list[Task]:
    return [
        Task(job, m, rate, split, True)
        for m in methods
        if len(RATES[m]) > 1
        for rate in RATES[m]
        for split in range(splits)
    ] + [Task(job, m, RATES[m][0], 0, True) for m in methods if len(RATES[m]) == 1]


def tasks_of(job: str, rates: dict[str, float], seeds: int) -> list[Task]:
    return [Task(job, method, rate, seed, False) for seed in range(seeds) for method, rate in rates.items()]


def chosen_rates(results: Results) -> dict[str, float]:
    """For each method the learning rate of the best mean accuracy over the validation splits."""
    scores: dict[str, dict[float, list[float]]] = {}
    for task, outcome in results.items():
        scores.setdefault(task.method, {}).setdefault(task.rate, []).append(outcome.accuracy)
    return {m: max(rates, key=lambda rate: statistics.mean(rates[rate])) for m, rates in scores.items()}


def run_all(tasks: list[Task], data: Path, device: str, workers: int, runs: Path | None) -> Results:
    """Outcomes of all tasks; those in the file of runs are read from it, and new ones are added to it."""
    known = read_runs(runs)
    results = {task: known[task] for task in tasks if task in known}
    missing = [task for task in tasks if task not in known]
    if workers == 1:
        for task in missing:
            results[task] = one(task, data, device)
            add_run(runs, task, results[task])
        return results
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        waiting = {pool.submit(one, task, data, device): task for task in missing}
        for done in concurrent.futures.as_completed(waiting):
            results[waiting[done]] = done.result()
            add_run(runs, waiting[done], done.result())
    return results


def one(task: Task, data: Path, device: str) -> Outcome:
    torch.set_num_threads(1)
    return run(cached_job(data, task.job, device), task.method, task.rate, task.seed, task.tuning)


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


def table(job: str, rates: dict[str, float], results: Results, seeds: int, splits: int) -> list[str]:
    """Lines of Markdown: a job's methods, and their differences, seed by seed, to LoRA and to ours."""
    title = f"**{SETTINGS[job].title}** ({seeds} seeds; learning rates by {splits} validation splits)"
    lines = [
        title,
        "",
        "| method | trained | rate | accuracy, % | − LoRA | ours − it | ms a step |",
        "|---|" + "---:|" * 6,
    ]
    outcomes = {m: [results[Task(job, m, rate, seed, False)] for seed in range(seeds)] for m, rate in rates.items()}
    scores = {method: [outcome.accuracy for outcome in found] for method, found in outcomes.items()}
    for method, found in outcomes.items():
        own = scores[method]
        to_lora = difference(own, scores.get("lora")) if method != "lora" else ""
        ours = scores.get("flora") if method in ADAPTERS and method != "flora" else None
        rate = "" if method == "head" else f"{rates[method]:g}"
        lines.append(
            f"| {METHODS[method]} | {found[0].parameters:,} | {rate} "
            f"| {statistics.mean(own):.1f} ± {deviation(own):.1f} | {to_lora} | {difference(ours, own)} "
            f"| {1e3 * statistics.median(outcome.seconds for outcome in found):.1f} |"
        )
    return lines


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def difference(first: list[float] | None, second: list[float] | None) -> str:
    """Mean of the paired differences ± its standard error."""
    if first is None or second is None:
        return ""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    return f"{statistics.mean(gaps):+.2f} ± {deviation(gaps) / math.sqrt(len(gaps)):.2f}"
