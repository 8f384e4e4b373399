"""What a model's page shows beside predictions: factors, the course of the fit, rows that the user held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.description import axes_of, hyperparameters, numbers
from probtensor.metrics import calibration_curve, coverage, rmse
from probtensor.viewing_predictions import (
    FINE_GRID,
    LEVELS,
    abscissa,
    interpolates,
    seen_positions,
    spread,
    summaries,
    texts,
    with_white,
)

__all__ = ["charts", "factors", "held_out", "rounded", "tables"]

MAX_LABELS = 400  # of a mode, whose factors are on the page
MAX_COORDINATES = 200
MAX_ROWS = 1500  # held out, that are drawn
CURVE = (*np.arange(0.1, 0.95, 0.1).round(1), 0.95, 0.99)  # probabilities of intervals


def rounded(values: npt.ArrayLike, digits: int = 6) -> list[Any]:
    """Numbers for the page, with so many digits; None for what is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row, digits) for row in array]
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in array]


def factors(model: Any) -> list[dict[str, Any]]:
    """For each mode what is known of its factor: curves or labels, of components and of the main effect."""
    found = [_factor(model, axis, seen_positions(model, mode)) for mode, axis in enumerate(axes_of(model))]
    return [factor for factor in found if factor is not None]


def charts(model: Any, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Charts of the fit: bound or loss, relevance, weights, errors on rows held out by the fit itself."""
    if hasattr(model, "bound_history_"):
        bound = model.bound_history_
        starts = list(getattr(model, "phase_starts_", (0,)))
        phases = [
            {"x": list(range(first + 1, end + 1)), "y": rounded(bound[first:end], 9)}
            for first, end in zip(starts, [*starts[1:], len(bound)], strict=True)
        ]
        yield _chart(prefix + "Bound", "iteration", "bound on the log evidence", phases)
    for name, words, unit in (
        ("history_", "Error of the rows fitted", "RMSE"),
        ("errors_", "Error of the cells fitted", "relative error"),
    ):
        if hasattr(model, name):
            error = getattr(model, name)
            steps = list(range(1, len(error) + 1))
            yield _chart(prefix + words, "sweep", unit, [{"x": steps, "y": rounded(error)}])
    if hasattr(model, "relevance_") and len(model.relevance_):
        bars = [{"x": [str(k + 1) for k in range(len(model.relevance_))], "y": rounded(model.relevance_)}]
        title = f"Relevance: effective rank {model.effective_rank_} of {len(model.relevance_)}"
        yield _chart(prefix + title, "component, strongest first", "root mean square, unit of y", bars, "bars")
    if hasattr(model, "best_epochs_") and model.best_epochs_:
        gaussian = hasattr(model, "validation_rmse_")
        curves = model.validation_rmse_ if gaussian else model.validation_deviance_
        lines = [
            {"name": name, "x": list(range(len(errors))), "y": rounded(np.mean(errors, axis=1))}
            for name, errors in curves.items()
        ]
        unit = "RMSE" if gaussian else "deviance"
        yield _chart(prefix + "Validation of the networks", "epoch", f"{unit} on rows held out, mean of members", lines)
    if hasattr(model, "weights_") and isinstance(model.weights_, Mapping):
        bars = [{"x": list(model.weights_), "y": rounded(list(model.weights_.values()))}]
        yield _chart(prefix + "Weights of the candidates", "", "weight in the prediction", bars, "bars")
    for name, words in (("estimator_", "First model: "), ("augmented_estimator_", "Second model: ")):
        if hasattr(model, name):
            yield from charts(getattr(model, name), words)


def tables(model: Any) -> Iterator[dict[str, Any]]:
    """Tables of the fit: hyperparameters, and errors by ridge or by model."""
    rows = [
        [str(axis.name), name, numbers(learned)]
        for axis in axes_of(model)
        for name, learned in hyperparameters(model, axis).items()
    ]
    if rows:
        yield {"title": "Hyperparameters", "head": ["mode", "parameter", "values, one a function"], "rows": rows}
    errors = getattr(model, "validation_rmse_", {})
    if errors and all(np.ndim(error) == 0 for error in errors.values()):
        head = "model" if isinstance(next(iter(errors)), str) else "ridge"
        rows = [[name if isinstance(name, str) else f"{name:.6g}", f"{error:.6g}"] for name, error in errors.items()]
        yield {"title": "Error on rows held out by the fit", "head": [head, "RMSE"], "rows": rows}


def held_out(model: Any, X: pd.DataFrame, y: npt.NDArray[np.float64], positions: npt.ArrayLike) -> dict[str, Any]:
    """What rows that the user gave say: predictions beside what was observed, scores, calibration.

    Parameters
    ----------
    model : fitted estimator
    X : DataFrame, shape (n, K)
    y : ndarray, shape (n,)
        Finite values.
    positions : array_like of int, shape (n, K)
        Of the coordinates among those of training, -1 for others.
    """
    found = summaries(model, X)
    scores = [["rows", f"{len(y):,}"], ["RMSE", f"{rmse(y, found[:, 0]):.6g}"]]
    scores.append(["mean absolute error", f"{np.mean(np.abs(y - found[:, 0])):.6g}"])
    curve = None
    if found.shape[1] > 1:
        for k, level in enumerate(LEVELS):
            lower, upper = found[:, 1 + 2 * k], found[:, 2 + 2 * k]
            share = f"{100 * coverage(y, lower, upper):.1f} %, mean width {np.mean(upper - lower):.6g}"
            scores.append([f"{100 * level:g} % intervals hold", share])
        levels, inside = calibration_curve(y, model.predictive(X), CURVE)
        curve = {"levels": rounded(levels), "inside": rounded(inside)}
    drawn = spread(len(y), MAX_ROWS)
    return {
        "scores": scores,
        "n": len(y),
        "curve": curve,
        "y": rounded(y[drawn]),
        "predicted": rounded(found[drawn].T),
        "positions": np.asarray(positions)[drawn].T.tolist(),
        "x": [
            None if isinstance(axis, CategoricalAxis) else abscissa(axis, pd.Index(X[axis.name].iloc[drawn]))
            for axis in axes_of(model)
        ],
        "note": "" if len(drawn) == len(y) else f"{len(drawn):,} of {len(y):,} rows are drawn; numbers are of all.",
    }


def _chart(title: str, x: str, y: str, series: list[dict[str, Any]], kind: str = "lines") -> dict[str, Any]:
    return {"title": title, "x": x, "y": y, "kind": kind, "series": series}


def _factor(model: Any, axis: Axis, seen: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """One mode's factor for the page; None where the model has none."""
    assert axis.distinct is not None
    if not hasattr(model, "factor"):
        return _plain_factor(model, axis, seen)
    known = axis.distinct[seen]
    components = model.factor(axis.name, at=known)
    strength = np.sqrt(np.mean(np.square(components[0], dtype=np.float64), axis=0))
    effect = _effect(model, axis, known)
    found: dict[str, Any] = {"mode": str(axis.name), "strength": rounded(strength), "note": ""}
    if not isinstance(axis, ContinuousAxis):
        return found | _labels(known, components, effect)
    places = spread(axis.size, MAX_COORDINATES)
    coordinates = axis.distinct[places]
    if not interpolates(model):
        return found | {"dots": _values(model, axis, coordinates), "ticks": []}
    ends = axis.coordinates[0], axis.coordinates[-1]
    grid = np.linspace(*ends, FINE_GRID)
    ticks = abscissa(axis, coordinates)
    between = np.setdiff1d(grid, axis.coordinates)
    if with_white(model, axis) and len(between):
        lines, dots = _values(model, axis, axis.decode(between)), _values(model, axis, coordinates)
        return found | {"lines": lines, "dots": dots | {"std": None, "effect_std": None}, "ticks": ticks}
    return found | {
        "lines": _values(model, axis, axis.decode(np.union1d(grid, axis.coordinates[places]))),
        "ticks": ticks,
    }


def _values(model: Any, axis: Axis, at: pd.Index) -> dict[str, Any]:
    """Components and main effect at coordinates of a continuous mode."""
    mean, std = model.factor(axis.name, at=at)
    effect = _effect(model, axis, at)
    return {
        "x": abscissa(axis, at),
        "mean": rounded(mean.T),
        "std": rounded(std.T),
        "effect": None if effect is None else rounded(effect[0]),
        "effect_std": None if effect is None else rounded(effect[1]),
    }


def _effect(model: Any, axis: Axis, at: pd.Index) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    try:
        mean, std = model.main_effect(axis.name, at=at)
    except ValueError:  # what `main_effect` raises where a model has none
        return None
    return mean, std


def _plain_factor(model: Any, axis: Axis, seen: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """Factors without a posterior: `factors_` by mode or in the order of the axes, `effects_` by mode."""
    factors = getattr(model, "factors_", None)
    if factors is None:
        return None
    names = [str(other.name) for other in axes_of(model)]
    by_name = factors if isinstance(factors, Mapping) else dict(zip(names, factors, strict=True))
    mean = np.asarray(by_name[str(axis.name)], dtype=np.float64)
    found = {"mode": str(axis.name), "strength": rounded(np.sqrt(np.mean(mean**2, axis=0))), "note": ""}
    if not isinstance(axis, CategoricalAxis):
        return found | {
            "note": f"{axis.name} is continuous: this model has factors of bins of it, which are not drawn."
        }
    effects = getattr(model, "effects_", {}).get(str(axis.name))
    assert axis.distinct is not None
    known = None if effects is None else (np.asarray(effects)[seen], None)
    return found | _labels(axis.distinct[seen], (mean[seen], None), known)


def _labels(labels: pd.Index, components: tuple[Any, Any], effect: tuple[Any, Any] | None) -> dict[str, Any]:
    """Labels of a mode with what they have; those of the largest values where there are many."""
    (mean, std), (main, main_std) = components, effect or (None, None)
    size = np.sqrt(np.mean(np.square(mean, dtype=np.float64), axis=1)) if mean.shape[1] else np.zeros(len(labels))
    top = np.sort(np.argsort(-size, kind="stable")[:MAX_LABELS])
    many = len(labels) > MAX_LABELS
    return {
        "labels": texts(labels[top]),
        "mean": rounded(mean[top].T),
        "std": None if std is None else rounded(std[top].T),
        "effect": None if main is None else rounded(main[top]),
        "effect_std": None if main_std is None else rounded(main_std[top]),
        "note": f"The page has the {MAX_LABELS} of {len(labels):,} labels with the largest values." if many else "",
    }
