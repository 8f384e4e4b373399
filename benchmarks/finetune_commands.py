"""The command that compares ways to fine-tune."""

import importlib.metadata
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.commands import Out, app, machine, report
from benchmarks.finetune_data import JOBS, prepare
from benchmarks.finetune_jobs import SETTINGS
from benchmarks.finetune_methods import METHODS, needs
from benchmarks.finetune_table import chosen_rates, read_rates, run_all, table, tasks_of, tuning_tasks

Data = Annotated[Path, typer.Option(help="A prepared folder, or one with vaderSentiment-3.3.2.tar.gz.")]


@app.command()
def finetune(
    data: Data = Path(),
    jobs: str = ",".join(JOBS),
    methods: str = ",".join(METHODS),
    seeds: int = 10,
    splits: Annotated[int, typer.Option(help="Validation splits that choose a learning rate.")] = 4,
    device: str = "cpu",
    workers: Annotated[int, typer.Option(help="Processes, with one thread each.")] = 1,
    clip: Annotated[float, typer.Option(help="Largest norm of a step's gradient, all methods alike; 0: none.")] = 0.0,
    rates: Annotated[
        str,
        typer.Option(
            help="Grids in place of a method's own, as lora=0.007,0.01 flora=0.03:1; factors' ratio behind :."
        ),
    ] = "",
    runs: Annotated[Path | None, typer.Option(help="File of runs: those in it are not made again.")] = None,
    prepare_to: Annotated[Path | None, typer.Option("--prepare", help="Write a folder that needs no packages.")] = None,
    out: Out = None,
) -> None:
    """Accuracy after fine-tuning a pretrained network: ours, in full, the head alone, other adapters of equal size."""
    torch.set_num_threads(1)
    names = jobs.split(",")
    if prepare_to is not None:
        prepare(prepare_to, data, names)
        return
    running = "one process" if workers == 1 else f"{workers} processes"
    lines = [f"{machine(device)}; {versions()}; {running}, one thread each."]
    for job in names:
        wanted, skipped = methods_of(job, methods.split(","))
        results = run_all(tuning_tasks(job, wanted, splits, read_rates(rates)), data, device, workers, runs, clip)
        best = chosen_rates(results)
        finals = run_all(tasks_of(job, best, seeds), data, device, workers, runs, clip)
        lines += ["", *table(job, best, finals, seeds, splits), *skipped]
        if out is not None:
            out.write_text("\n".join(lines) + "\n")
    report(lines, out)


def methods_of(job: str, methods: list[str]) -> tuple[list[str], list[str]]:
    """Those of the methods that can be run on a job, and lines about those whose packages are missing."""
    wanted, skipped = [], []
    for method in methods:
        if method == "pointwise" and not SETTINGS[job].depthwise:
            continue  # it is LoRA there
        missing = needs(method, SETTINGS[job].depthwise)
        wanted += [] if missing else [method]
        skipped += ["", f"{METHODS[method]}: left out, as {' and '.join(missing)} is not installed."] if missing else []
    return wanted, skipped


def versions() -> str:
    found = []
    for package in ("torch", "peft", "lycoris-lora"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
