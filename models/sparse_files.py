"""Sparse-coding estimators on disk: what `SparseCoder` writes, and how it is read."""

import os
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from probtensor.persistence import write_state
from probtensor.resources import is_integer, resolve_device

__all__ = ["read_coder", "write_coder"]

C = TypeVar("C")


def write_coder(coder: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted `SparseCoder`: its constructor's parameters, the model's, histories, and sums of batches."""
    params = coder.get_params(deep=False)
    if not is_integer(params["random_state"]):
        params["random_state"] = None
    meta = {
        "params": {name: _plain(value) for name, value in params.items()},
        "bound_history": coder.bound_history_,
        "n_iter": coder.n_iter_,
        "converged": coder.converged_,
        "masked": coder._masked,
    }
    arrays = {f"params.{name}": value for name, value in coder._params._asdict().items()}
    arrays |= {f"history.{name}": value for name, value in coder.parameter_history_.items()}
    arrays["sums"] = coder._sums
    write_state(path, f"{type(coder).__module__}.{type(coder).__qualname__}", arrays, meta)


def read_coder(kind: type[C], arrays: dict[str, Tensor], meta: dict[str, Any]) -> C:
    """The fitted estimator of a class from what `write_coder` wrote."""
    params = {name: tuple(value) if isinstance(value, list) else value for name, value in meta["params"].items()}
    if str(params["device"]).startswith("cuda") and not torch.cuda.is_available():
        params["device"] = "cpu"  # fitted on a GPU, loaded on a machine without
    coder: Any = kind(**params)
    device = resolve_device(coder.device)
    named = {name[7:]: value.to(device) for name, value in arrays.items() if name.startswith("params.")}
    coder.bound_history_, coder.n_iter_ = list(meta["bound_history"]), meta["n_iter"]
    coder.converged_ = meta["converged"]
    coder.parameter_history_ = {
        name[8:]: value.numpy() for name, value in arrays.items() if name.startswith("history.")
    }
    coder._sums, coder._masked = arrays["sums"].to(device), meta["masked"]
    coder.n_features_in_ = len(named["W"])
    coder.dtype_ = np.dtype(np.float32 if named["W"].dtype == torch.float32 else np.float64)
    coder._set(coder._model().parameters(**named))
    return coder  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """A parameter as JSON has it: a Python number for one of NumPy's, a list for a tuple or an array."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
