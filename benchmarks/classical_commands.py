"""The command that measures classical decompositions."""

from typing import Annotated

import typer

from benchmarks.classical import SETS, accuracy_lines, consistency_lines, leak_lines
from benchmarks.commands import Out, app, machine, report


@app.command()
def classical(
    sets: Annotated[str, typer.Option(help="Data sets, separated by commas.")] = ",".join(SETS),
    n_splits: int = 5,
    folds: Annotated[int, typer.Option(help="Of the training cells, to choose ranks by.")] = 3,
    out: Out = None,
) -> None:
    """Masked PARAFAC, non-negative PARAFAC and Tucker: held-out error, core consistency, leaks of TensorLy's masks."""
    names = sets.split(",")
    lines = [f"A tenth of the cells held out; ranks by {folds} folds of the others; {machine('cpu')}"]
    lines += accuracy_lines(names, n_splits, folds)
    lines += ["", "Core consistency in percent, all cells", "", *consistency_lines(names)]
    lines += ["", "RMSE on hidden cells by what is stored in them; rank 2, noise .01", "", *leak_lines()]
    report(lines, out)
