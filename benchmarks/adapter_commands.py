"""Commands that measure adapters."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.adapter_calibration import WAYS, Scores, calibration_table, probabilities_of, scores_of
from benchmarks.adapters import adapter_lines
from benchmarks.adapters_cuda import cuda_adapter_lines
from benchmarks.commands import Out, app, machine, report
from benchmarks.finetune_jobs import SETTINGS, load_job


@app.command()
def adapters(rank: int = 16, kernel_rank: int = 2, repeats: int = 15, device: str = "cpu", out: Out = None) -> None:
    """A layer with a FLoRA adapter beside the frozen layer: time of forward and backward, bytes kept for backward."""
    if device != "cpu":
        found = cuda_adapter_lines(rank, kernel_rank, repeats)
        report([f"{machine(device)}; r = {rank}, kernel ranks {kernel_rank}", "", *found], out)
        return
    torch.set_num_threads(1)
    lines = adapter_lines(rank, kernel_rank, repeats)
    report([f"{machine('cpu')}, one thread; r = {rank}, kernel ranks {kernel_rank}", "", *lines], out)


@app.command()
def calibration(
    data: Annotated[Path, typer.Option(help="A folder as for finetune.")] = Path(),
    job: str = "pines",
    seeds: int = 10,
    rate: Annotated[float, typer.Option(help="Learning rate of cores.")] = 0.03,
    ratio: Annotated[float, typer.Option(help="How many times as fast factors learn.")] = 3.0,
    clip: Annotated[float, typer.Option(help="Largest norm of a step's gradient; 0: none.")] = 0.0,
    ways: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(WAYS),
    device: str = "cpu",
    out: Out = None,
) -> None:
    """Probabilities of a network fine-tuned with ours: point estimate, temperature, ensemble, posteriors."""
    torch.set_num_threads(1)
    names = ["point", *(name for name in ways.split(",") if name != "point")]
    loaded = load_job(data, job, device)
    labels = loaded.labels[loaded.part == 2]
    found: dict[str, list[Scores]] = {name: [] for name in names}
    for seed in range(seeds):
        for name, (probabilities, seconds) in probabilities_of(loaded, seed, (rate, ratio), names, clip).items():
            found[name].append(scores_of(probabilities, labels, seconds))
        settings = f"rate {rate:g} × {ratio:g}" + (f", gradients clipped to {clip:g}" if clip else "")
        title = f"**{SETTINGS[job].title}**, test examples: {len(labels):,}; seeds: {seed + 1}; {settings}"
        lines = [f"{machine(device)}, torch {torch.__version__}, one thread", "", title, "", *calibration_table(found)]
        if out is not None:
            out.write_text("\n".join(lines) + "\n")
    note = "¹ chosen on examples of a third of the pool's blocks, which are not trained on."
    report([*lines, "", note], out)
