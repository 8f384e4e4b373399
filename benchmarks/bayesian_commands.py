"""The command that measures Bayesian CP and Tucker."""

from typing import Annotated

import typer

from benchmarks.bayesian import BAYESIAN_METHODS, BAYESIAN_SETS, bayesian_lines, cold_lines, planted_lines
from benchmarks.commands import Out, app, machine, report
from benchmarks.completion_commands import Cells, Seeds, Sets

ALL_SETS, ALL_METHODS = ",".join(BAYESIAN_SETS), ",".join(BAYESIAN_METHODS)


@app.command()
def bayesian(
    data: Cells,
    sets: Sets = ALL_SETS,
    seeds: Seeds = "0",
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ALL_METHODS,
    planted: Annotated[int, typer.Option(help="Tensors of a planted rank; 0 for none.")] = 10,
    cold: Annotated[int, typer.Option(help="Splits with whole films held out, with features; 0 for none.")] = 0,
    out: Out = None,
) -> None:
    """Bayesian CP and Tucker against effects, TensorLy and networks: errors, densities, intervals, planted rank."""
    lines = []
    if sets:
        numbers = [int(seed) for seed in seeds.split(",")]
        lines += bayesian_lines(data, sets.split(","), numbers, methods.split(","))
    if planted:
        lines += planted_lines(planted)
    if cold:
        lines += cold_lines(cold)
    report([f"{machine('cpu')}, one thread", "", *lines], out)
