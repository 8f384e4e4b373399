"""How far a fit has come, as arrays and JSON values, and back: what checkpoints hold."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probtensor.calibration import ScaleMixture
from probtensor.inference.message_passing import Progress
from probtensor.models.funbat_state import read_posterior, write_posterior
from probtensor.models.functional_state import State
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.observation import Observation

__all__ = ["Stage", "begin_stage", "read_stage", "write_stage"]


class Stage(NamedTuple):
    """A fit under way.

    Attributes
    ----------
    seed : int
        Of the rows that are held out.
    is_last : bool
        Whether all rows are fitted, with the components that are left; before that, those not held out.
    progress : Progress or None
        Of the run of this stage; None before its start.
    history : list of float
        The bound after each sweep of the stages before.
    phase_starts : tuple of int
        See `FunBaT`.
    calibration : tuple of ScaleMixture
        From the rows held out.
    """

    seed: int
    is_last: bool
    progress: Progress[State] | None
    history: list[float]
    phase_starts: tuple[int, ...]
    calibration: tuple[ScaleMixture, ...]


def begin_stage(seed: int) -> Stage:
    """The stage before the first sweep."""
    return Stage(seed, False, None, [], (0,), ())


def write_stage(
    stage: Stage, model: FunctionalTucker, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and JSON values of a stage.

    Parameters
    ----------
    stage : Stage
        With progress.
    model : FunctionalTucker
        Of the stage.
    generator : torch.Generator
        As it is now.

    Returns
    -------
    arrays : dict of Tensor
    meta : dict
    """
    now = stage.progress
    assert now is not None
    observation = Observation(1.0, 0.0, float("inf"), None, stage.calibration)
    arrays, about = write_posterior(model, now.state, observation)
    arrays = {f"now.{name}": array for name, array in arrays.items()} | {"generator": generator.get_state()}
    meta: dict[str, Any] = {
        "seed": stage.seed,
        "is_last": stage.is_last,
        "trial": now.trial,
        "now": about,
        "history": now.history,
        "before": stage.history,
        "phase_starts": list(stage.phase_starts),
    }
    if now.best is not None:
        best, meta["best"] = write_posterior(model, now.best[0], None)
        arrays |= {f"best.{name}": array for name, array in best.items()}
        meta["best_history"] = now.best[1]
    return arrays, meta


def read_stage(
    model: FunctionalTucker, arrays: dict[str, Tensor], meta: dict[str, Any], device: torch.device
) -> tuple[FunctionalTucker, Stage]:
    """Model and stage of which `write_stage` made arrays and JSON values.

    Parameters
    ----------
    model : FunctionalTucker
        With the priors of the modes, all components and the likelihood.
    arrays : dict of Tensor
    meta : dict
    device : torch.device
        Where the arrays go.
    """

    def part(prefix: str) -> dict[str, Tensor]:
        own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        return {name: array.to(device) for name, array in own.items()}

    smaller, state, observation = read_posterior(model, part("now."), meta["now"])
    assert observation is not None
    best = None
    if "best" in meta:
        best = read_posterior(model, part("best."), meta["best"])[1], meta["best_history"]
    progress = Progress(meta["trial"], state, meta["history"], best)
    phases = tuple(meta["phase_starts"])
    stage = Stage(meta["seed"], meta["is_last"], progress, meta["before"], phases, observation.calibration)
    # Settings of the fit, damping for one, are those of `model`; files know only what a posterior needs.
    return replace(model, free=smaller.free), stage
