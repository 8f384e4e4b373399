"""What the parameters of Bayesian CP and Tucker may be, and what they stand for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from probtensor.axes import Axis
from probtensor.calibration import MIN_RESIDUALS, ScaleMixture, fit_scale_mixture, with_tail
from probtensor.comm import Comm
from probtensor.gaussian import Gamma
from probtensor.intake import Table
from probtensor.likelihoods import Likelihood, Poisson, StudentT
from probtensor.models.factor_posterior import FactorPosterior
from probtensor.models.feature_rows import MAX_UNKNOWNS, FeatureRows
from probtensor.models.funbat_parameters import resolve_likelihood
from probtensor.models.functional_fit import MAX_HELD_OUT
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import ExchangeableRows, LatentFunctions
from probtensor.models.observation import Observation
from probtensor.models.side_information import Side
from probtensor.models.side_rows import scaled_features
from probtensor.ordinal import Ordinal
from probtensor.resources import is_integer, is_number

__all__ = [
    "GUIDES",
    "calibrate",
    "check_nonnegative",
    "check_parameters",
    "held_out_share",
    "observation_from_state",
    "observation_of",
    "observation_to_state",
    "resolve_factor_likelihood",
    "resolve_guide",
    "row_model",
]

MAX_LEVELS = 100
GUIDES = "auto", "rows", "mean_field", "low_rank", "full"
CHOICES = {
    "guide": GUIDES,
    "relevance": ("gamma", "horseshoe"),
    "prior": ("normal", "gamma"),
    "unlisted": ("missing", "zero"),
}


def resolve_factor_likelihood(
    likelihood: str | Likelihood, known_noise: bool, table: Table | None = None, comm: Comm | None = None
) -> Likelihood:
    """The likelihood that a name stands for; the noise is that of rows, and cells have no residual of their own.

    Parameters
    ----------
    likelihood : str or Likelihood
    known_noise : bool
    table : Table, optional
        Rows of this rank: what "ordinal" takes its levels from.
    comm : Comm, optional
    """
    if likelihood == "gaussian":
        likelihood = StudentT(dof=math.inf, nugget=False)
    elif likelihood == "student-t":
        likelihood = StudentT(dof=4.0, nugget=False)
    elif likelihood == "ordinal":
        assert table is not None
        assert comm is not None
        likelihood = _levels(table, comm)
    found = resolve_likelihood(likelihood, nugget=False, known_noise=known_noise)
    assert found is not None
    if isinstance(found, StudentT) and found.nugget:
        raise ValueError("likelihood: expected StudentT(nugget=False), rows have no residual of their cell")
    return found


def _levels(table: Table, comm: Comm) -> Ordinal:
    """The levels that the rows of all ranks have, and how many rows have each."""
    mine = np.unique(table.values.cpu().numpy())
    every = np.unique(np.concatenate([np.frombuffer(part) for part in comm.gather_bytes(mine.tobytes())]))
    if not 2 <= len(every) <= MAX_LEVELS:
        raise ValueError(f'y: expected 2 to {MAX_LEVELS} levels with likelihood="ordinal", got {len(every)}')
    place = torch.from_numpy(np.searchsorted(every, table.values.cpu().numpy()))
    counts = comm.sum(torch.bincount(place, minlength=len(every)).double())
    return Ordinal(tuple(every.tolist()), tuple(counts.tolist()))


def resolve_guide(params: Mapping[str, Any], form: str) -> Any:
    """The guide that is meant by "auto"; refuses what it cannot do."""
    guide, horseshoe = params["guide"], params["relevance"] == "horseshoe"
    if horseshoe and form == "tucker":
        raise ValueError('relevance: expected "gamma" for Tucker, got "horseshoe"')
    if guide == "auto":
        guide = "mean_field" if horseshoe else "rows"
    if guide == "rows" and horseshoe:
        raise ValueError('relevance: expected "gamma" with guide="rows", got "horseshoe"')
    if params["n_members"] > 1 and guide != "rows":
        raise ValueError(f"n_members: expected 1 with guide={guide!r}, got {params['n_members']}")
    return guide


def held_out_share(calibration: float | Literal["auto"], likelihood: Likelihood, table: Table, comm: Comm) -> float:
    """Share of the rows to calibrate on; 0 for values without a unit."""
    if not likelihood.location_scale:
        return 0.0
    total = float(comm.sum(table.values.new_tensor([float(len(table.values))])))
    share = (0.1 if 0.1 * total >= MIN_RESIDUALS else 0.0) if calibration == "auto" else float(calibration)
    return min(share, MAX_HELD_OUT / total)


def observation_of(
    likelihood: Likelihood, log_parameters: Tensor, mixture: tuple[ScaleMixture, ...], known_noise: float = 1.0
) -> Observation | None:
    """How values come from entries, where they have a unit; `known_noise` is their variance where it is not learned."""
    if not isinstance(likelihood, StudentT):
        return None
    named = dict(zip(likelihood.parameters, log_parameters.exp().tolist(), strict=True))
    dof = named["dof"] if likelihood.dof is None else float(likelihood.dof)
    return Observation(named.get("noise_variance", known_noise), 0.0, dof, None, mixture)


def calibrate(
    likelihood: Likelihood, posterior: FactorPosterior, held: Table, comm: Comm, known_noise: float = 1.0
) -> tuple[ScaleMixture, ...]:
    """Scale mixture of what predictions miss the rows that were held out by; none where these are few."""
    observation = observation_of(likelihood, posterior.log_parameters, (), known_noise)
    assert observation is not None
    mean, variance = posterior.moments(held.positions)
    location, latent, noise = observation.moments(mean, variance, observation.residual(None, mean))
    mine = torch.stack([held.key.to(mean), held.values - location, latent, noise], dim=1).cpu()
    parts = [np.frombuffer(data, dtype=np.float64) for data in comm.gather_bytes(mine.double().numpy().tobytes())]
    rows = torch.from_numpy(np.concatenate(parts).reshape(-1, 4))
    rows = rows[torch.argsort(rows[:, 0])]
    if len(rows) < MIN_RESIDUALS:
        return ()
    return (with_tail(fit_scale_mixture(*rows[:, 1:].T), len(rows)),)


def row_model(
    axes: Sequence[Axis],
    ranks: Sequence[int],
    form: Literal["cp", "tucker"],
    main_effects: bool,
    params: Mapping[str, Any],
    like: Tensor,
    scale: float,
    sides: Sequence[Side] = (),
) -> FunctionalTucker:
    """The model whose modes have a row a label, whatever the axis is; likelihood and offset are left out.

    Parameters
    ----------
    axes : sequence of Axis
        Fitted.
    ranks : sequence of int
        Components, or columns of each mode's factor.
    form : {"cp", "tucker"}
    main_effects : bool
    params : mapping
        Of the estimator.
    like : Tensor
        Gives dtype and device.
    scale : float
        Unit of the standardised values.
    sides : sequence of Side
        Features of labels, for some modes.

    Raises
    ------
    ValueError
        If a mode has too many features for its rank.
    """
    K, extra = len(axes), int(main_effects)
    if form == "tucker":
        columns = [[False] * extra + [True] * rank for rank in ranks]
    else:
        columns = [[True] * ranks[0] + [j == k for j in range(K)] * extra for k in range(K)]
    rows = {side.mode: _with_features(side, axes[side.mode], sum(columns[side.mode]), like) for side in sides}
    one = like.new_ones(())
    shape, rate = (float(x) for x in params["relevance_prior"])
    return FunctionalTucker(
        functions=tuple(rows.get(k, ExchangeableRows(axis.size, like)) for k, axis in enumerate(axes)),
        free=tuple(torch.tensor(column, device=like.device) for column in columns),
        form=form,
        noise_prior=Gamma(one, one),
        learn=bool(params["learn_hyperparameters"]),
        log_scale=math.log(scale),
        relevance_prior=(shape, rate),
        pairs=True,
    )


def _with_features(side: Side, axis: Axis, rank: int, like: Tensor) -> LatentFunctions:
    """Prior of the rows of a mode, of which `rank` columns are latent."""
    most, p = MAX_UNKNOWNS // rank - 1, len(side.names)
    if p > most:
        said = f"side_information[{axis.name!r}]"
        raise ValueError(f"{said}: expected at most {most} features with {rank} columns of its factor, got {p}")
    features, _ = scaled_features(side, axis.distinct)
    return FeatureRows(axis.size, torch.from_numpy(features).to(like))


def check_parameters(given: Mapping[str, Any]) -> None:
    """Raise ValueError that names a parameter, what was expected and what came."""
    for name, choices in CHOICES.items():
        if name in given and given[name] not in choices:
            raise ValueError(f"{name}: expected one of {list(choices)}, got {given[name]!r}")
    for name in ("max_iter", "n_init", "n_members", "n_steps"):
        if not (is_integer(given[name]) and given[name] >= 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {given[name]!r}")
    size = given["batch_size"]
    if not (size is None or (is_integer(size) and size >= 1)):
        raise ValueError(f"batch_size: expected None or an integer of at least 1, got {size!r}")
    if not (is_number(given["tol"]) and given["tol"] >= 0):
        raise ValueError(f"tol: expected a number >= 0, got {given['tol']!r}")
    rate = given["learning_rate"]
    if not (is_number(rate) and 0 < rate < math.inf):
        raise ValueError(f"learning_rate: expected a number above 0, got {rate!r}")
    share: Any = given["calibration"]
    if not (share == "auto" if isinstance(share, str) else is_number(share) and 0 <= share < 1):
        raise ValueError(f'calibration: expected "auto" or a share in [0, 1), got {share!r}')
    pair = given["relevance_prior"]
    if not (isinstance(pair, Sequence) and len(pair) == 2 and all(is_number(x) and 0 <= x < math.inf for x in pair)):
        raise ValueError(f"relevance_prior: expected two numbers >= 0 (shape, rate), got {pair!r}")


def check_nonnegative(given: Mapping[str, Any], likelihood: Likelihood) -> None:
    """Raise ValueError for what non-negative factors cannot do, or only they can."""
    gamma, counts = given.get("prior") == "gamma", isinstance(likelihood, Poisson)
    if given.get("unlisted") == "zero" and not (gamma and counts):
        raise ValueError('unlisted: expected "missing" unless prior="gamma" and likelihood="poisson", got "zero"')
    if not gamma:
        return
    if not (counts or isinstance(likelihood, StudentT)):
        raise ValueError(
            f'likelihood: expected "gaussian", "student-t" or "poisson" with prior="gamma", got {given["likelihood"]!r}'
        )
    for name, only in (("guide", "auto"), ("relevance", "gamma"), ("n_members", 1)):
        if given[name] != only:
            shown = f'"{only}"' if isinstance(only, str) else only
            raise ValueError(f'{name}: expected {shown} with prior="gamma", got {given[name]!r}')


def observation_to_state(observation: Observation) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and JSON values of how values come from entries."""
    arrays: dict[str, Tensor] = {}
    for k, mixture in enumerate(observation.calibration):
        arrays |= {f"calibration.{k}.scales": mixture.scales, f"calibration.{k}.weights": mixture.weights}
    return arrays, {
        "noise_variance": observation.noise_variance,
        "dof": "inf" if math.isinf(observation.dof) else observation.dof,
        "inflations": [mixture.inflation for mixture in observation.calibration],
    }


def observation_from_state(arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Observation:
    """What `observation_to_state` wrote."""
    mixtures = tuple(
        ScaleMixture(inflation, arrays[f"calibration.{k}.scales"].cpu(), arrays[f"calibration.{k}.weights"].cpu())
        for k, inflation in enumerate(meta["inflations"])
    )
    return Observation(float(meta["noise_variance"]), 0.0, float(meta["dof"]), None, mixtures)
