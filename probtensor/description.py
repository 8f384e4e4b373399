"""What a fitted model says of itself in words and numbers: for ``probtensor info`` and for the page of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.axes import Axis, ContinuousAxis

__all__ = ["axes_of", "describe", "describe_axis", "describe_model", "hyperparameters", "numbers"]


def axes_of(model: Any) -> tuple[Axis, ...]:
    """The fitted axes of a model, or of the estimator inside of it, as in `DAIN`; none where it has no modes."""
    return tuple(getattr(model, "axes_", getattr(getattr(model, "estimator_", None), "axes_", ())))


def describe(model: Any) -> Iterator[str]:
    """Yield the lines of ``probtensor info``."""
    for name, fact in describe_model(model).items():
        yield f"  {name:<28}{fact}"
    for axis in axes_of(model):
        assert axis.distinct is not None
        n = model.factor(axis.name, at=axis.distinct[:1])[0].shape[1] if hasattr(model, "factor") else None
        yield f"{axis.name}: {'' if n is None else f'rank {n}, '}{describe_axis(axis)}"
        for name, learned in hyperparameters(model, axis).items():
            last = "  (the last: of the main effect)" if n is not None and np.size(learned) == n + 1 else ""
            yield f"  {name:<28}{numbers(learned)}{last}"


def describe_model(model: Any) -> dict[str, str]:
    """What a model says of the whole fit, by what it is called; models differ in what they know."""
    facts = {}
    if hasattr(model, "form"):
        facts["form"] = str(model.form)
    if getattr(model, "n_members", 1) > 1 and hasattr(model, "bound_"):
        best = "rank, bound, factors are of that with the best bound"
        facts["members"] = f"{model.n_members}; predictions mix all; {best}"
    if hasattr(model, "effective_rank_") and len(model.relevance_):
        facts["effective rank"] = f"{model.effective_rank_} of {len(model.relevance_)}"
    if hasattr(model, "y_mean_") and (model.y_mean_, model.y_scale_) != (0.0, 1.0):
        facts["values in training"] = f"mean {model.y_mean_:.6g}, standard deviation {model.y_scale_:.6g}"
    if hasattr(model, "noise_std_") and np.ndim(model.noise_std_) == 0:
        facts["noise (standard deviation)"] = f"{model.noise_std_:.6g}"
    if hasattr(model, "bound_"):
        facts["bound on the log evidence"] = f"{model.bound_:.6f}"
    if hasattr(model, "n_iter_"):
        facts["iterations"] = str(model.n_iter_)
    if hasattr(model, "converged_"):
        reason = f" ({model.stop_reason_})" if hasattr(model, "stop_reason_") else ""
        facts["converged"] = ("yes" if model.converged_ else "no") + reason
    return facts


def describe_axis(axis: Axis) -> str:
    """What a fitted axis holds."""
    values = [] if axis.distinct is None else axis.distinct
    if isinstance(axis, ContinuousAxis):
        return f"continuous, {axis.size} coordinates from {values[0]} to {values[-1]}, {axis.kernel}"
    return f"categorical, {axis.size} labels: {', '.join(map(str, values[:5]))}{', ...' * (axis.size > 5)}"


def hyperparameters(model: Any, axis: Axis) -> dict[str, npt.NDArray[np.float64]]:
    """What a model learned of an axis, by name, with the unit of lengthscales over time; nothing where it has none."""
    timed = isinstance(axis, ContinuousAxis) and isinstance(axis.distinct, pd.DatetimeIndex | pd.TimedeltaIndex)
    in_days = axis.kernel.lengthscales if timed and isinstance(axis, ContinuousAxis) else ()
    found = getattr(model, "hyperparameters_", {}).get(axis.name, {})
    return {f"{name} (days)" if name in in_days else name: np.asarray(value) for name, value in found.items()}


def numbers(values: npt.ArrayLike) -> str:
    """Numbers in a line, with six digits."""
    return "  ".join(f"{number:.6g}" for number in np.asarray(values, dtype=np.float64).ravel())
