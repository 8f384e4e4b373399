"""Commands that measure sparse coding."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.commands import Out, app, machine, report
from benchmarks.sparse import bars_lines, missing_lines, patch_lines, picture_lines, step_lines
from benchmarks.sparse_ranks import sparse_rank_lines


@app.command()
def sparse(
    data: Annotated[Path, typer.Option(help="Folder with the bars data (bars_bsc_seed0.npz, …) and house.png.")],
    parts: Annotated[str, typer.Option(help="Of bars, steps, missing, pictures; separated by commas.")] = "bars,steps",
    seeds: int = 10,
    out: Out = None,
) -> None:
    """Sparse coding: bars found with default settings, seconds a step, missing entries, pictures."""
    torch.set_num_threads(1)
    made = {
        "bars": lambda: bars_lines(data, seeds),
        "steps": lambda: step_lines(data),
        "missing": lambda: missing_lines(data),
        "pictures": lambda: picture_lines(data / "house.png", min(seeds, 3)),
    }
    lines = [line for part in parts.split(",") for line in ["", *made[part]()]]
    report([f"{machine('cpu')}, one thread", *lines], out)


@app.command()
def sparse_ranks(
    ranks: Annotated[str, typer.Option(help="Numbers of MPI ranks, 1 the first; separated by commas.")] = "1,2",
    sizes: str = "100000",
    launcher: Annotated[str, typer.Option(help="What starts the ranks, without their number.")] = "mpiexec",
    out: Out = None,
) -> None:
    """Seconds of a step of BSC over points on disk, on several MPI ranks, and the memory that it takes."""
    numbers = [[int(x) for x in text.split(",")] for text in (ranks, sizes)]
    report([machine("cpu"), "", *sparse_rank_lines(launcher.split(), *numbers)], out)


@app.command()
def patches(
    sizes: str = "10000",
    device: str = "cpu",
    n_components: int = 256,
    side: int = 16,
    out: Out = None,
) -> None:
    """Seconds of a step of BSC against the number of patches."""
    lines = patch_lines(device, [int(size) for size in sizes.split(",")], n_components, side)
    report([machine(device), "", *lines], out)
