"""A fitted FunBaT as arrays and JSON values, and back: the posterior itself, so that predictions are the same bits."""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from probtensor.calibration import ScaleMixture
from probtensor.gaussian import Gamma, Gaussian
from probtensor.inference.kalman import Posterior, Sites
from probtensor.likelihoods import Bernoulli, Likelihood, NegativeBinomial, Poisson, StudentT
from probtensor.models.functional_state import Factor, State
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.observation import Observation, SeenCells
from probtensor.ordinal import Ordinal

__all__ = ["likelihood_from_state", "likelihood_to_state", "read_posterior", "write_posterior"]

KINDS: dict[str, type[Likelihood]] = {
    kind.name: kind for kind in (StudentT, Poisson, NegativeBinomial, Bernoulli, Ordinal)
}


def likelihood_to_state(likelihood: Likelihood) -> dict[str, Any]:
    """Name and settings as JSON values; infinity as a string."""
    settings = asdict(likelihood)  # type: ignore[call-overload]
    return {"name": likelihood.name} | {k: "inf" if v == float("inf") else v for k, v in settings.items()}


def likelihood_from_state(state: dict[str, Any]) -> Likelihood:
    """What `likelihood_to_state` wrote."""
    settings = {k: float("inf") if v == "inf" else v for k, v in state.items() if k != "name"}
    return KINDS[state["name"]](**settings)


def write_posterior(
    model: FunctionalTucker, state: State, observation: Observation | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and JSON values of a posterior.

    Parameters
    ----------
    model : FunctionalTucker
    state : State
    observation : Observation or None

    Returns
    -------
    arrays : dict of Tensor
    meta : dict
    """
    arrays = {
        "noise": torch.stack(state.noise),
        "totals": torch.stack([state.squared_error, state.n_rows, state.square]),
        "log_parameters": state.log_parameters,
    }
    arrays |= {f"free.{k}": free for k, free in enumerate(model.free)}
    meta: dict[str, Any] = {
        "sweep": state.sweep,
        "likelihood": None if model.likelihood is None else likelihood_to_state(model.likelihood),
        "offset": model.offset,
    }
    if state.core is not None:
        arrays |= {"core.mean": state.core.mean, "core.covariance": state.core.covariance}
    if state.expected is not None:
        arrays["expected"] = state.expected
    for k, factor in enumerate(state.factors):
        parts = factor._asdict() | {"sites": None, "posterior": None}
        parts |= {f"sites.{name}": part for name, part in factor.sites._asdict().items()}
        parts |= {f"posterior.{name}": part for name, part in factor.posterior._asdict().items()}
        arrays |= {f"factor.{k}.{name}": part for name, part in parts.items() if part is not None}
    if observation is not None:
        meta["observation"] = {
            "noise_variance": observation.noise_variance,
            "nugget_variance": observation.nugget_variance,
            "dof": "inf" if observation.dof == float("inf") else observation.dof,
            "inflations": [mixture.inflation for mixture in observation.calibration],
        }
        for k, mixture in enumerate(observation.calibration):
            arrays |= {f"calibration.{k}.scales": mixture.scales, f"calibration.{k}.weights": mixture.weights}
        if observation.seen is not None:
            arrays |= {f"cells.{name}": part for name, part in observation.seen._asdict().items()}
    return arrays, meta


def read_posterior(
    model: FunctionalTucker, arrays: dict[str, Tensor], meta: dict[str, Any]
) -> tuple[FunctionalTucker, State, Observation | None]:
    """What `write_posterior` wrote, on the device of the arrays; `model` has the priors of the modes."""
    n_modes = len(model.functions)
    model = replace(
        model,
        free=tuple(arrays[f"free.{k}"] for k in range(n_modes)),
        likelihood=None if meta["likelihood"] is None else likelihood_from_state(meta["likelihood"]),
        offset=meta["offset"],
    )
    factors = tuple(_factor(arrays, f"factor.{k}.") for k in range(n_modes))
    error, n_rows, square = arrays["totals"]
    core = Gaussian(arrays["core.mean"], arrays["core.covariance"]) if "core.mean" in arrays else None
    state = State(
        factors,
        core,
        Gamma(*arrays["noise"]),
        error,
        n_rows,
        square,
        meta["sweep"],
        arrays["log_parameters"],
        arrays.get("expected"),
    )
    if "observation" not in meta:
        return model, state, None
    given = meta["observation"]
    seen = None
    if "cells.value" in arrays:
        seen = SeenCells(*(arrays[f"cells.{name}"] for name in SeenCells._fields))
    calibration = tuple(
        ScaleMixture(inflation, arrays[f"calibration.{k}.scales"].cpu(), arrays[f"calibration.{k}.weights"].cpu())
        for k, inflation in enumerate(given["inflations"])
    )
    dof = float(given["dof"])
    return model, state, Observation(given["noise_variance"], given["nugget_variance"], dof, seen, calibration)


def _factor(arrays: dict[str, Tensor], prefix: str) -> Factor:
    """The factor whose parts stand under `prefix`."""
    return Factor(
        sites=Sites(*(arrays[f"{prefix}sites.{name}"] for name in Sites._fields)),
        posterior=Posterior(*(arrays[f"{prefix}posterior.{name}"] for name in Posterior._fields)),
        **{name: arrays[prefix + name] for name in ("log_hyperparameters", "divergence", "mean", "second")},
    )
