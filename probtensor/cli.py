"""The command ``probtensor``: fit a table, fill its holes, look at a model.

Only typer is imported here; each command imports what it needs, so that ``probtensor --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from probtensor.axes import Axis
    from probtensor.comm import Comm

DEFAULT_RANK = 6
COLUMN = "COLUMN"
TYPED = (".parquet", ".npz", ".zarr")  # files whose columns have types, unlike text

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelFile = Annotated[Path, typer.Argument(help="A model that `probtensor fit` wrote.", show_default=False)]
Form = StrEnum("Form", ["cp", "tucker"])


class Law(StrEnum):
    """Likelihoods that FunBaT knows by name."""

    student_t = "student-t"
    gaussian = "gaussian"
    poisson = "poisson"
    negative_binomial = "negative-binomial"
    bernoulli = "bernoulli"


Duplicates = StrEnum("Duplicates", ["observations", "error", "sum", "mean"])


def _print_version(wanted: bool) -> None:
    if wanted:
        import probtensor

        typer.echo(f"probtensor {probtensor.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Complete, explain and predict tables of measurements that are indexed by several aspects.

    A table has one row a measurement: one column for each aspect (time, dose, station, ...) and one column with the
    value. Cells that were never measured are simply not in the table. For example:

    **probtensor demo**

    **probtensor fit data.csv --value y --continuous time --categorical station --rank 4 --out my.model**

    **probtensor predict my.model new.csv --out filled.csv**

    **probtensor info my.model**

    **probtensor view my.model**

    Set the environment variable PROBTENSOR_TRACEBACK=1 to see where an error arose.
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the models.")] = Path("probtensor-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the hidden cells and of the fits.")] = 0,
    holdout: Annotated[float, typer.Option(help="Share of the measured cells to hide, between 0 and 1.")] = 0.2,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Complete real data (cell responses to interleukin-2) and compare with references.

    Hides a fifth of the measured cells, predicts them with FunBaT and with simpler methods, prints the errors, draws
    the latent functions over time and dose, and saves the models. Nothing is downloaded.
    """
    with _user_errors():
        from probtensor.demo import run_demo

        run_demo(out, seed=seed, holdout=holdout, progress=not quiet and sys.stderr.isatty(), echo=typer.echo)


@app.command()
def fit(
    data: Annotated[
        Path, typer.Argument(help="Table: .csv, .tsv (also .gz), .parquet, .npz or .zarr.", show_default=False)
    ],
    value: Annotated[str, typer.Option(metavar=COLUMN, help="Column with the measured values.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where to write the model.", show_default=False)],
    continuous: Annotated[
        list[str] | None,
        typer.Option(
            metavar=COLUMN,
            help="Column of numbers or dates, where near means alike. Repeat for more.",
            show_default=False,
        ),
    ] = None,
    categorical: Annotated[
        list[str] | None, typer.Option(metavar=COLUMN, help="Column of labels. Repeat for more.", show_default=False)
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar=COLUMN, help="Column that is no aspect. Repeat for more.", show_default=False),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Latent functions of each aspect: one number, or one for each as in 3,2,4 (Tucker only).",
            show_default="6, with tucker as many as an aspect has labels",
        ),
    ] = None,
    form: Annotated[
        Form,
        typer.Option(help="cp: each function of an aspect meets those of its number; tucker: all of the others."),
    ] = Form.cp,
    likelihood: Annotated[
        Law, typer.Option(help="How values scatter: heavy tails, normal, counts, or zeros and ones.")
    ] = Law.student_t,
    no_main_effects: Annotated[
        bool, typer.Option("--no-main-effects", help="Only products of functions, no effect of an aspect by itself.")
    ] = False,
    nu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[COLUMN=]NUMBER",
            help="Smoothness of the functions, 0.5, 1.5 or 2.5, beside what each coordinate has for itself; for one "
            "column as in time=2.5. Repeat for more.",
            show_default="1.5",
        ),
    ] = None,
    starts: Annotated[
        int | None, typer.Option(min=1, help="Random starts; the best after ten iterations goes on.", show_default="3")
    ] = None,
    max_iter: Annotated[int | None, typer.Option(min=1, help="Iterations at most.", show_default="200")] = None,
    tol: Annotated[
        float | None, typer.Option(help="Stop at this relative change of the bound.", show_default="0.001")
    ] = None,
    damping: Annotated[float, typer.Option(help="Share of the old message kept in each update, 0 to 1.")] = 0.0,
    duplicates: Annotated[
        Duplicates,
        typer.Option(help="Several rows of one cell are repeated observations, an error, or parts to sum or average."),
    ] = Duplicates.observations,
    seed: Annotated[int, typer.Option(help="Seed of the random starts.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder for the state of a long fit, also when a batch queue ends it.", show_default=False),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Iterations from one checkpoint to the next.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Fit a model to a table and save it.

    Every column but the value is an aspect, unless it is ignored. Columns that are named neither continuous nor
    categorical are judged by what they hold: numbers with a decimal point and dates such as 2024-01-31 are continuous;
    other words, whole numbers and true/false are labels. What each column was taken for is printed. Labels in columns
    that are named categorical stay as they are written (007 is not 7). Rows without a value are left out. Under mpiexec
    or srun the ranks share the rows and the work. For example:

    **probtensor fit air.csv --value pm25 --continuous day --continuous latitude --categorical station --out air.model**

    **probtensor fit assay.csv --value y --continuous time --rank 4 --form tucker --nu 2.5 --out assay.model**
    """
    from probtensor.comm import Serial, world

    comm: Comm = Serial()
    with _user_errors(lambda: comm):
        from probtensor.axes import CategoricalAxis
        from probtensor.data import resolve_axes
        from probtensor.description import describe_axis
        from probtensor.intake import agree_on_axes
        from probtensor.models import FunBaT
        from probtensor.shards import read_shard

        comm = world()
        if not out.absolute().parent.is_dir():  # said now, not after the fit
            raise ValueError(f"--out: expected a name in a folder that exists, got {str(out)!r}")
        if resume and checkpoint is None:
            raise ValueError("--resume: expected the folder of the checkpoints as --checkpoint, got none")
        near, labels, ignored = continuous or [], categorical or [], ignore or []
        as_written = dict.fromkeys(labels, "mixed" if data.suffix in TYPED else "str")
        X, y = read_shard(data, comm, value, near, as_written)
        if unknown := [name for name in ignored if name not in X.columns]:
            raise ValueError(f"--ignore: expected columns among {list(X.columns)}, got {unknown}")
        X = _with_dates(X.drop(columns=ignored), {*near, *labels}, comm)
        n_rows = sum(int(data) for data in comm.gather_bytes(str(len(X)).encode()))
        if n_rows == 0 or len(X.columns) == 0:
            raise ValueError(f"{data}: expected values and columns beside them, got {n_rows} and {list(X.columns)}")
        axes = _with_smoothness(resolve_axes(X, [CategoricalAxis(name) for name in labels]), nu or [])
        fitted = agree_on_axes(tuple(axis.fit(X[axis.name]) for axis in axes) if len(X) else None, comm)
        for axis in fitted if comm.is_root else ():
            guessed = axis.name not in near + labels and X[axis.name].dtype.kind == "i"
            hint = f"; if near numbers mean alike: --continuous {axis.name}" if guessed else ""
            typer.echo(f"{axis.name}: {describe_axis(axis)}{hint}")
        settings: dict[str, Any] = {
            **{"rank": _ranks(rank, form, fitted), "form": form.value, "axes": axes, "likelihood": likelihood.value},
            **{"main_effects": not no_main_effects, "n_init": starts, "max_iter": max_iter, "tol": tol},
            **{"damping": damping, "duplicates": duplicates.value, "random_state": seed},
            **{"progress": not quiet and sys.stderr.isatty()},
        }
        model = FunBaT(**{name: setting for name, setting in settings.items() if setting is not None})
        model.fit(X, y, comm=comm, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume)
        if comm.is_root:
            model.save(out)
            typer.echo(f"Fitted {n_rows} values in {model.n_iter_} iterations ({model.stop_reason_}).")
            typer.echo(f"Saved {out}")


@app.command()
def predict(
    model: ModelFile,
    data: Annotated[Path, typer.Argument(help="Table with the columns of the model.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Where to write: .csv, .tsv or .parquet.", show_default="the terminal, as csv")
    ] = None,
    coverage: Annotated[float, typer.Option(help="Probability of the intervals, between 0 and 1.")] = 0.9,
) -> None:
    """Predict the value of each row of a table.

    Writes the table's columns as they are, and four more: mean and std of the predicted value, and the ends of its
    interval, lower and upper. Other columns may stay: to fill the holes of a table, give the table itself. Coordinates
    may be new; a label that was not seen in training gives a warning and a wide interval. For example:

    **probtensor predict my.model new.csv --coverage 0.5 --out filled.csv**
    """
    with _user_errors():
        from probtensor.comm import world
        from probtensor.persistence import load

        if not world().is_root:  # a prediction is no work for several ranks
            return
        fitted = load(model)
        X, _ = _read_for(fitted, data, None)
        table = _read_as_written(data)
        if taken := [name for name in ("mean", "std", "lower", "upper") if name in table.columns]:
            raise ValueError(f"{data}: expected no columns called mean, std, lower or upper, got {taken}")
        table["mean"], table["std"] = fitted.predict(X, return_std=True)
        table["lower"], table["upper"] = fitted.predict_interval(X, coverage=coverage)
        _write_table(table, out)


@app.command()
def info(model: ModelFile) -> None:
    """Show what a model file holds: aspects, ranks, noise, bound, iterations, hyperparameters, versions."""
    with _user_errors():
        from probtensor.description import describe
        from probtensor.persistence import load, read_header

        header = read_header(model)
        typer.echo(f"{header['kind'].rpartition('.')[2]}, written by probtensor {header['probtensor_version']}")
        for line in describe(load(model)):
            typer.echo(line)


@app.command()
def view(
    model: ModelFile,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the page.", show_default="the model's name with .html behind it"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Table with rows that the fit did not have, to compare with.", show_default=False),
    ] = None,
    value: Annotated[
        str | None,
        typer.Option(
            metavar=COLUMN, help="What the values are called; with --data, its column of them.", show_default="value"
        ),
    ] = None,
    budget: Annotated[int, typer.Option(help="Predictions on the page at most.")] = 120_000,
    open_it: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Write an interactive page about a model: factors, predictions along each aspect with intervals, how the fit went.

    The page is one HTML file of 5 to 8 MB that needs no network. For example:

    **probtensor view my.model --data heldout.csv --value pm25 --open**
    """
    with _user_errors():
        from probtensor.comm import world
        from probtensor.persistence import load
        from probtensor.viewing import write_page

        if not world().is_root:
            return
        if data is not None and value is None:
            raise ValueError("--value: expected the column of values in the table of --data, got none")
        fitted = load(model)
        rows = None if data is None else _read_for(fitted, data, value)
        page = model.with_name(f"{model.name}.html") if out is None else out
        named = {} if value is None else {"value": value}
        show = not quiet and sys.stderr.isatty()
        write_page(fitted, page, data=rows, title=model.name, budget=budget, progress=show, **named)
        typer.echo(f"Wrote {page}")
        if open_it:
            typer.launch(page.absolute().as_uri())


def _read_for(fitted: Any, data: Path, value: str | None) -> tuple[pd.DataFrame, Any]:
    """Return the coordinates of a table's rows as a model knows them, and their values if a column is named."""
    from probtensor.axes import CategoricalAxis, ContinuousAxis
    from probtensor.description import axes_of
    from probtensor.readers import read_table

    axes = axes_of(fitted)
    near = [str(axis.name) for axis in axes if isinstance(axis, ContinuousAxis)]
    labels = {str(axis.name): axis.label_dtype for axis in axes if isinstance(axis, CategoricalAxis)}
    return read_table(data, value, near, labels, columns=[str(axis.name) for axis in axes])


def _ranks(text: str | None, form: Form, fitted: Sequence[Axis]) -> int | tuple[int, ...]:
    """Return the ranks of ``--rank``; without it 6, or as many as a Tucker model allows."""
    if text is None:
        ranks = tuple(min(DEFAULT_RANK, axis.size) if form is Form.tucker else DEFAULT_RANK for axis in fitted)
        return ranks if len(set(ranks)) > 1 else ranks[0]
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--rank: expected a number, or one for each aspect as in 3,2,4, got {text!r}") from None
    return ranks[0] if len(ranks) == 1 else ranks


def _with_smoothness(axes: tuple[Axis, ...], given: list[str]) -> tuple[Axis, ...]:
    """Return the axes with the smoothness of ``--nu 1.5`` (all) and ``--nu time=1.5`` (one)."""
    from probtensor.axes import ContinuousAxis
    from probtensor.kernels import Matern, White

    names = [axis.name for axis in axes if isinstance(axis, ContinuousAxis)]
    chosen: dict[str | None, float] = {}
    for text in sorted(given, key=lambda text: "=" in text):  # those of one axis overrule that of all
        name, _, number = text.rpartition("=")
        if name and name not in names:
            raise ValueError(f"--nu: expected a continuous column among {names}, got {name!r}")
        try:
            chosen.update(dict.fromkeys([name] if name else names, float(number)))
        except ValueError:
            raise ValueError(f"--nu: expected a number, or one for a column as in time=2.5, got {text!r}") from None
    return tuple(
        replace(a, kernel=Matern(chosen[a.name]) + White()) if isinstance(a, ContinuousAxis) and a.name in chosen else a
        for a in axes
    )


def _with_dates(table: pd.DataFrame, named: set[str], comm: Comm) -> pd.DataFrame:
    """Return the table with dates instead of text in the columns, not `named`, where every text is an ISO 8601 date.

    On several ranks: every text of all of them.
    """
    import pandas as pd

    from probtensor.columns import dates_of

    for name in table.columns.difference(list(named)):
        dates = dates_of(table[name])
        if b"no" not in comm.gather_bytes(b"no" if dates is None and len(table) else b"yes"):
            table = table.assign(**{name: pd.to_datetime(table[name]) if dates is None else dates})
    return table


def _read_as_written(path: Path) -> pd.DataFrame:
    """Return a table whose csv cells are the text that is in the file."""
    import pandas as pd

    from probtensor.readers import read_table

    if path.suffix in TYPED:
        return read_table(path, None)[0]
    return pd.read_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", dtype=str, keep_default_na=False)


def _write_table(table: pd.DataFrame, out: Path | None) -> None:
    if out is None:
        table.to_csv(sys.stdout, index=False)
    elif out.suffix == ".parquet":
        table.to_parquet(out, index=False)
    elif out.suffix in (".csv", ".tsv"):
        table.to_csv(out, index=False, sep="\t" if out.suffix == ".tsv" else ",")
    else:
        raise ValueError(f"--out: expected a name that ends in .csv, .tsv or .parquet, got {str(out)!r}")


@contextmanager
def _user_errors(group: Callable[[], Comm] | None = None) -> Iterator[None]:
    """Turn what is wrong with the user's input into one line on stderr and code 2; warnings into one line, once.

    `group` gives the ranks, once they are known: rank 0 speaks for all, and an error of one ends the job.
    """
    shown = set[str]()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if (line := _one_line(message)) not in shown and (group is None or group().is_root):
            typer.echo(f"Warning: {line}", err=True)
        shown.add(line)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        try:
            yield
        except BrokenPipeError:  # the reader of our output went away, as in `probtensor predict ... | head`
            raise
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            if os.environ.get("PROBTENSOR_TRACEBACK"):
                raise
            line = f"Error: {_one_line(error)}"
            if group is not None and (comm := group()).size > 1:
                from probtensor.comm import end_job

                if not comm.is_root:
                    time.sleep(2.0)  # what is wrong on all ranks, rank 0 says
                end_job(comm, line, 2)
            typer.echo(line, err=True)
            raise typer.Exit(2) from None


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.strerror and message.filename:
        message = f"{message.filename}: {message.strerror}"
    return " ".join(str(message).split())
