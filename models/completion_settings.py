"""Parameters of neural tensor completion that a fit needs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from probtensor.models.completion_links import LIKELIHOODS
from probtensor.resources import is_integer, is_number

__all__ = ["Settings", "settings_of"]

HEADS = ("mlp", "costco", None)


class Settings(NamedTuple):
    """Parameters of `NeuralTensorCompletion` that a fit needs; see there."""

    biases: bool
    interactions: bool
    rank: int
    head: str | None
    width: int
    hidden: tuple[int, ...]
    weight_decay: tuple[float, ...]
    n_members: int
    learning_rate: float
    batch_size: int
    max_epochs: int
    patience: int
    n_checkpoints: int
    likelihood: str


def settings_of(params: Mapping[str, Any]) -> Settings:
    """The constructor's parameters, checked.

    Parameters
    ----------
    params : mapping of str to object
        As `NeuralTensorCompletion.get_params` gives them.

    Raises
    ------
    ValueError
        Names the parameter that is not as it should be.
    """
    counts = "rank", "embedding", "n_members", "batch_size", "max_epochs", "patience", "n_checkpoints"
    for name in counts:
        value, least = params[name], 0 if name == "rank" else 1
        if not (is_integer(value) and value >= least):
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if params["head"] not in HEADS:
        raise ValueError(f'head: expected "mlp", "costco" or None, got {params["head"]!r}')
    if params["likelihood"] not in LIKELIHOODS:
        raise ValueError(f'likelihood: expected "gaussian", "bernoulli" or "poisson", got {params["likelihood"]!r}')
    layers: Any = params["hidden"]
    hidden: list[Any] = list(layers) if np.iterable(layers) else []
    if not hidden or not all(is_integer(width) and width >= 1 for width in hidden):
        raise ValueError(f"hidden: expected integers of at least 1, one a layer, got {params['hidden']!r}")
    given = params["weight_decay"]
    decays: list[Any] = list(given) if isinstance(given, Sequence | np.ndarray) else [given]
    if not decays or not all(is_number(x) and 0 <= x < math.inf for x in decays):
        raise ValueError(f"weight_decay: expected a number of at least 0, or several, got {given!r}")
    if not (is_number(params["learning_rate"]) and 0 < params["learning_rate"] < math.inf):
        raise ValueError(f"learning_rate: expected a number above 0, got {params['learning_rate']!r}")
    if max(decays) * params["learning_rate"] >= 1:
        raise ValueError(f"weight_decay: expected less than 1 / learning_rate, got {given!r}")
    return Settings(
        bool(params["biases"]),
        bool(params["interactions"]),
        int(params["rank"]),
        params["head"],
        int(params["embedding"]),
        tuple(int(width) for width in hidden),
        tuple(float(decay) for decay in decays),
        int(params["n_members"]),
        float(params["learning_rate"]),
        int(params["batch_size"]),
        int(params["max_epochs"]),
        int(params["patience"]),
        int(params["n_checkpoints"]),
        params["likelihood"],
    )
