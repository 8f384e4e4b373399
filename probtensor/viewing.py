"""A page in HTML that shows a fitted model: what it learned, what it predicts, how sure it is.

The page is one file that needs no network: charts are drawn by plotly.js, which is written into it. What stands on it
is computed when it is written; nothing is fitted or predicted in the reader's browser.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import probtensor
from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.data import as_table
from probtensor.description import axes_of, describe_model
from probtensor.drawing import COLOURS, FAINT, INK
from probtensor.resources import is_integer
from probtensor.viewing_findings import charts, factors, held_out, tables
from probtensor.viewing_predictions import LEVELS, Run, abscissa, packed, runs, texts, with_white

__all__ = ["write_page"]

MARKER = re.compile(r"<!-- (\w+) -->")
MIN_BUDGET = 1000
SHOW_AFTER = 1.0  # seconds before a progress bar appears


def write_page(
    model: Any,
    path: str | os.PathLike[str],
    *,
    data: tuple[Any, npt.ArrayLike] | None = None,
    value: str = "value",
    title: str | None = None,
    budget: int = 120_000,
    progress: bool = True,
) -> None:
    """Write an interactive page about a fitted model: one HTML file, to be opened in any browser, without a network.

    It shows the model at a glance, its factors with bands of two standard deviations, predictions along any mode for
    chosen values of the others with 50, 90 and 95 % intervals, and how the fit went. A link to the page keeps what was
    chosen.

    Parameters
    ----------
    model : fitted estimator
        Of tables: with ``predict``, and axes that it was fitted on. Intervals need ``predictive``, factors ``factor``
        or ``factors_``; what a model does not have is left out.
    path : path-like
        Where to write; an existing file is replaced.
    data : tuple of DataFrame or array_like (n, K) and array_like (n,), optional
        Coordinates and values of rows that were not used in the fit: the page compares them with predictions and
        intervals. NaN marks a missing value.
    value : str, default "value"
        What the values are called.
    title : str, optional
        By default the class of the model.
    budget : int, default 120000
        Predictions on the page at most. Where modes have more values than that allows, the page has some of them:
        labels with the most rows of `data`, else such that are spread evenly over the list; it says which. Intervals of
        counts take longest, about half a millisecond a prediction.
    progress : bool, default True
        Show a progress bar where it takes long.

    Raises
    ------
    ValueError
        If the model is not one of tables, or not fitted, `data` does not fit it, `budget` is below 1000, or there is no
        folder for `path`.
    ModuleNotFoundError
        If plotly is not installed.

    Warns
    -----
    UnknownLabelWarning
        If `data` has labels that the training rows did not have.

    Examples
    --------
    >>> import tempfile
    >>> from probtensor.models import FunBaT
    >>> X = np.random.default_rng(0).uniform(0, 3, size=(60, 2))
    >>> model = FunBaT(rank=1, random_state=0, progress=False).fit(X, np.sin(X[:, 0]) * X[:, 1])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = Path(folder) / "model.html"
    ...     write_page(model, page, budget=2000, progress=False)
    ...     page.read_text(encoding="utf-8")[:15]
    '<!doctype html>'
    """
    if not (axes_of(model) and hasattr(model, "predict")):
        raise ValueError(
            "model: expected one of tables that is fitted (FunBaT, BayesianCP, NeuralTensorCompletion, …), "
            f"got {type(model).__name__} without axes_"
        )
    if not (is_integer(budget) and budget >= MIN_BUDGET):
        raise ValueError(f"budget: expected an integer of at least {MIN_BUDGET}, got {budget!r}")
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise ValueError(f"path: expected a name in a folder that exists, got {os.fspath(path)!r}")
    plotly = _plotly()
    shown = type(model).__name__ if title is None else title
    with tqdm(desc="predictions", total=int(budget), delay=SHOW_AFTER, disable=not progress) as bar:
        content = page_data(model, data=data, value=value, title=shown, budget=int(budget), report=bar.update)
    folder = files("probtensor")
    parts = {
        "title": html.escape(shown),
        "style": (folder / "viewing.css").read_text(encoding="utf-8"),
        "plotly": plotly,
        "data": _json(content),
        "script": (folder / "viewing.js").read_text(encoding="utf-8"),
    }
    template = (folder / "viewing.html").read_text(encoding="utf-8")
    target.write_text(MARKER.sub(lambda marker: parts[marker[1]], template), encoding="utf-8")


def page_data(
    model: Any,
    *,
    data: tuple[Any, npt.ArrayLike] | None,
    value: str,
    title: str,
    budget: int,
    report: Callable[[int], object],
) -> dict[str, Any]:
    """What `write_page` writes into the page, as JSON values; arguments as there."""
    axes = axes_of(model)
    held: dict[str, Any] | None = None
    counts: list[npt.NDArray[np.int64] | None] = [None] * len(axes)
    if data is not None:
        X, y = as_table(data[0]), np.array(data[1], dtype=np.float64)
        names = [str(axis.name) for axis in axes]
        if sorted(map(str, X.columns)) != sorted(names):
            raise ValueError(f"data: expected the columns {names}, got {list(X.columns)}")
        if y.shape != (len(X),) or not np.isfinite(y).any():
            raise ValueError(f"data: expected {len(X)} values, some of them finite, got shape {y.shape}")
        X, y = X.loc[np.isfinite(y), names], y[np.isfinite(y)]
        positions = np.stack([axis.positions(X[axis.name]) for axis in axes], axis=1)
        counts = [np.bincount(p[p >= 0], minlength=a.size) for p, a in zip(positions.T, axes, strict=True)]
        held = held_out(model, X, y, positions)
    return {
        "title": title,
        "value": value,
        "facts": [
            ["model", f"{type(model).__name__}, page by probtensor {probtensor.__version__}"],
            *map(list, describe_model(model).items()),
        ],
        "axes": [_axis(model, axis) for axis in axes],
        "shared": getattr(model, "core_", None) is None,  # components of CP are those of all modes
        "factors": factors(model),
        "levels": LEVELS,
        "runs": [_run(model, run, data is not None) for run in runs(model, budget, counts, report)],
        "charts": list(charts(model)),
        "tables": list(tables(model)),
        "held": held,
        "colours": {"lines": COLOURS, "ink": INK, "faint": FAINT},
    }


def _axis(model: Any, axis: Axis) -> dict[str, Any]:
    """A mode, with what stands in the table of modes: kind, values, kernel where the model has use for it."""
    assert axis.distinct is not None
    unit = axis.distinct.dtype.kind
    if isinstance(axis, ContinuousAxis):
        kernel = str(axis.kernel) if hasattr(model, "hyperparameters_") else ""
        words = [f"continuous, {axis.size:,} coordinates", " to ".join(texts(axis.distinct[[0, -1]])), kernel]
    else:
        first = ", ".join(texts(axis.distinct[:5])) + ", …" * (axis.size > 5)
        words = [f"categorical, {axis.size:,} labels", first, ""]
    return {
        "name": str(axis.name),
        "unit": " (days)" if isinstance(axis, ContinuousAxis) and unit == "m" else "",
        "continuous": isinstance(axis, ContinuousAxis),
        "dates": isinstance(axis, ContinuousAxis) and unit == "M",
        "words": words,
    }


def _run(model: Any, run: Run, counted: bool) -> dict[str, Any]:
    """Predictions along a mode, with what the page says of values that were left out."""
    axes = axes_of(model)
    axis, rest = axes[run.mode], [axis for mode, axis in enumerate(axes) if mode != run.mode]
    notes = []
    n_seen = int(run.seen.sum())
    if n_seen < axis.size:
        what = "coordinates are marked" if isinstance(axis, ContinuousAxis) else "labels"
        notes.append(f"{axis.name}: {n_seen:,} of {axis.size:,} {what}, {_rule(axis, counted)}.")
    choices = []
    for other, places in zip(rest, run.others, strict=True):
        assert other.distinct is not None
        values = other.distinct[places]
        choices.append({"mode": axes.index(other), "places": places.tolist(), "texts": texts(values)})
        if len(places) < other.size:
            what = "coordinates" if isinstance(other, ContinuousAxis) else "labels"
            notes.append(f"{other.name}: {len(places):,} of {other.size:,} {what}, {_rule(other, counted)}.")
    return {
        "mode": run.mode,
        "x": abscissa(axis, run.along),
        "texts": texts(run.along),
        "places": axis.positions(run.along).tolist(),
        "apart": with_white(model, axis) and not bool(run.seen.all()),
        "choices": choices,
        "stats": run.values.shape[1],
        "notes": notes,
        **packed(run.values),
    }


def _rule(axis: Axis, counted: bool) -> str:
    if counted and isinstance(axis, CategoricalAxis):
        return "those with the most rows of the data given"
    return "spread evenly over those of the training rows"


def _plotly() -> str:
    """The source of plotly.js, or how to get it."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("plotly"):
            raise
        raise ModuleNotFoundError("pages need plotly: pip install plotly", name="plotly") from error
    return str(get_plotlyjs())


def _json(content: dict[str, Any]) -> str:
    """JSON that may stand in a script element, whatever labels hold."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
