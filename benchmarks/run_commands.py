"""The command that sets ours against peers, in one run, on the same work."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.commands import Out, app, machine, report
from benchmarks.draw import draw_costs, draw_ratios
from benchmarks.head_to_head import as_json, markdown, measure, versions
from benchmarks.ranks import rank_lines
from benchmarks.roofline import LOOPS, roofline_lines
from benchmarks.roofline_cards import h100_lines
from benchmarks.run_suites import SUITES
from benchmarks.tables import RESULTS
from benchmarks.variational_ranks import variational_rank_lines

RANKS = "mpi"
RANK_SETTINGS = {"rank": 2, "coordinates": 1000, "device": "cpu", "dtype": "float64"}


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help=f"{', '.join([*SUITES, RANKS])} or all.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Ratios in under three minutes, for contributors.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Default: 5, or 1 with --quick.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with more tables (nyc2019_taxi_fares.npz, …).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a .json and a .md of each suite.")] = None,
) -> None:
    """Ours and the peers that are installed on the same rows: errors, coverage, seconds, memory, ratios."""
    wanted = [*SUITES, RANKS] if suite == "all" else [suite]
    if unknown := [name for name in wanted if name not in (*SUITES, RANKS)]:
        raise typer.BadParameter(f"expected one of {', '.join([*SUITES, RANKS, 'all'])}, got {unknown[0]!r}")
    torch.set_num_threads(1)
    number = seeds if seeds is not None else 1 if quick else 5
    command = f"python -m benchmarks run {suite}{' --quick' if quick else ''} --seeds {number}"
    head = [f"{machine('cpu')}, one thread; `{command}`; {json.dumps(versions())[1:-1]}", ""]
    for name in wanted:
        if name == RANKS:
            text, lines = "", rank_lines([launcher()], [1, 2], [200_000 if quick else 2_000_000], **RANK_SETTINGS)
        else:
            cases = SUITES[name](quick, data)
            runs = measure(cases, number, lambda line: print(line, file=sys.stderr, flush=True))
            text, lines = as_json(runs, command), markdown(cases, runs)
        print("\n".join([f"# {name}", "", *lines]))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.md").write_text("\n".join([*head, *lines]) + "\n")
            if text:
                (out / f"{name}.json").write_text(text)


def launcher() -> str:
    """MPICH's, where it came with this Python."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else "mpiexec"


@app.command()
def svi_ranks(
    ranks: Annotated[str, typer.Option(help="Numbers of MPI ranks, 1 the first; separated by commas.")] = "1,2",
    sizes: str = "1000000",
    out: Out = None,
) -> None:
    """Seconds of a step of variational inference over all rows, on several MPI ranks."""
    numbers = [[int(x) for x in text.split(",")] for text in (ranks, sizes)]
    report([machine("cpu"), "", *variational_rank_lines([launcher()], *numbers)], out)


@app.command()
def roofline(
    device: str = "cpu",
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
    loops: Annotated[str, typer.Option(help="Of the hot loops, separated by commas.")] = ",".join(LOOPS),
    recorded: Annotated[bool, typer.Option("--recorded", help="H100: from the timings in benchmarks/results.")] = False,
    out: Out = None,
) -> None:
    """Share of what memory and arithmetic allow that each hot loop reaches."""
    if recorded:
        report(["One NVIDIA H100 80GB HBM3, its published limits", "", *h100_lines(RESULTS)], out)
        return
    wanted = loops.split(",")
    if unknown := [name for name in wanted if name not in LOOPS]:
        raise typer.BadParameter(f"loops: expected some of {', '.join(LOOPS)}, got {unknown[0]!r}")
    numbers = [int(text) for text in threads.split(",")] if device == "cpu" else [1]
    lines = []
    for line in roofline_lines(device, numbers, wanted):
        print(line, file=sys.stderr, flush=True)
        lines.append(line)
    report([machine(device), "", *lines], out)


@app.command()
def draw(
    results: Annotated[Path, typer.Option(help="Folder of the tables.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs"),
) -> None:
    """Pictures of the results: seconds against rows, rank and processes; ours over the best peer."""
    draw_costs(results, out / "cost.png")
    draw_ratios(results, out / "against_peers.png")
