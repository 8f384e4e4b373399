"""Commands that measure completion, alternating minimization, influence and augmentation."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.alternating import block_lines, cost_lines, real_lines, recovery_lines, whole_lines
from benchmarks.augmentation import augmentation_lines
from benchmarks.commands import Out, app, machine, report
from benchmarks.completion import COMPLETION_SETS, METHODS, completion_lines
from benchmarks.datamodels import datamodel_lines
from benchmarks.influence import influence_lines, jobs_of

Cells = Annotated[Path, typer.Option(help="Folder with dain_synthetic10k.npz, nyc2019_taxi_fares.npz, ….")]
Sets = Annotated[str, typer.Option(help="Data sets, separated by commas.")]
Seeds = Annotated[str, typer.Option(help="Of splits and fits; separated by commas.")]
Jobs = Annotated[int, typer.Option(help="Fits at a time, a thread each.")]
ALL_SETS, ALL_METHODS = ",".join(COMPLETION_SETS), ",".join(METHODS)


@app.command()
def completion(
    data: Cells,
    sets: Sets = ALL_SETS,
    seeds: Seeds = "0,1,2,3,4",
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ALL_METHODS,
    jobs: Jobs = 1,
    out: Out = None,
) -> None:
    """Neural tensor completion against means, effects, trees, factorizations and networks, a tenth of rows held out."""
    lines = completion_lines(data, sets.split(","), [int(seed) for seed in seeds.split(",")], methods.split(","), jobs)
    report([f"{machine('cpu')}, one thread", "", *lines], out)


@app.command()
def alternating(
    data: Annotated[Path | None, typer.Option(help="Folder with the tables of --parts real,blocks.")] = None,
    parts: Annotated[str, typer.Option(help="Of cost, tensors, recovery, real, blocks, whole.")] = "cost,recovery",
    sizes: Annotated[str, typer.Option(help="Cells, separated by commas.")] = "1000,10000,100000,1000000",
    seeds: Seeds = "0,1,2",
    out: Out = None,
) -> None:
    """Alternating minimization: seconds of a sweep by cells and rank, recovery, real tables, greedy blocks, memory."""
    torch.set_num_threads(1)
    numbers, splits = [int(size) for size in sizes.split(",")], [int(seed) for seed in seeds.split(",")]
    if data is None and {"real", "blocks"} & set(parts.split(",")):
        raise typer.BadParameter("--data: expected the folder of the tables for the parts real and blocks")
    lines: list[str] = []
    for part in parts.split(","):
        if part == "cost":
            lines += cost_lines(numbers)
        elif part == "tensors":
            lines += cost_lines(numbers, n_modes=3)
        elif part == "recovery":
            lines += recovery_lines(splits)
        elif part == "whole":
            lines += whole_lines(max(numbers), 16)
        elif data is not None and part in ("real", "blocks"):
            lines += real_lines(data, splits) if part == "real" else block_lines(data)
        else:
            raise typer.BadParameter(f"--parts: expected cost, tensors, recovery, real, blocks or whole, got {part!r}")
    report([f"{machine('cpu')}, one thread, CPU seconds", "", *lines], out)


@app.command()
def augmentation(
    data: Cells,
    sets: Sets = ALL_SETS,
    seeds: Seeds = "0,1,2,3,4",
    device: str = "cpu",
    jobs: Jobs = 1,
    out: Out = None,
) -> None:
    """DAIN's forms against one network and several, 72 % of the rows to train, 18 % to validate, 10 % to test."""
    lines = augmentation_lines(data, sets.split(","), [int(seed) for seed in seeds.split(",")], device, jobs)
    report(
        [f"{machine(device)}, one thread a split; ± standard deviation, or error of a paired difference", "", *lines],
        out,
    )


@app.command()
def influence(
    device: str = "cpu", kinds: str = "last,given,all", sizes: str = "", chunk: int = 1024, out: Out = None
) -> None:
    """Seconds and memory of training cells' influence; on the CPU the sizes of the bars: 40,000 x 50 and 32,000."""
    lines = influence_lines(jobs_of(kinds.split(","), [int(size) for size in sizes.split(",") if size]), device, chunk)
    report([f"{machine(device)}, one thread, passes of {chunk} cells", "", *lines], out)


@app.command()
def datamodels(
    data: Cells,
    halves: int = 150,
    networks: int = 5,
    epochs: int = 10,
    out: Out = None,
) -> None:
    """Linear datamodelling score of influence on the taxi fares: do scores foretell training on other cells?"""
    torch.set_num_threads(1)
    lines = datamodel_lines(data, halves, networks, epochs, range(2, epochs + 1, 2))
    title = f"{halves} halves, trained twice; scores of {networks} networks of all training cells; {epochs} epochs"
    report([f"{machine('cpu')}, one thread; {title}", "", *lines], out)
