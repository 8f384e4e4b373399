"""What the parameters of FunBaT may be, and what they stand for."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from probtensor.axes import Axis
from probtensor.gaussian import Gamma
from probtensor.likelihoods import Bernoulli, Likelihood, NegativeBinomial, Poisson, StudentT
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import latent_functions
from probtensor.resources import is_integer, is_number

__all__ = ["build_model", "check_parameters", "resolve_likelihood", "resolve_ranks"]

MAX_CORE = 8_000  # entries of a Tucker core with its constant columns
LIKELIHOODS: dict[str, Callable[[bool], Likelihood]] = {
    "student-t": lambda nugget: StudentT(dof=4.0, nugget=nugget),
    "poisson": lambda nugget: Poisson(),
    "negative-binomial": lambda nugget: NegativeBinomial(),
    "bernoulli": lambda nugget: Bernoulli(),
}


def resolve_likelihood(likelihood: str | Likelihood, nugget: bool, *, known_noise: bool) -> Likelihood | None:
    """The likelihood; None for the Gaussian one whose precision has a gamma posterior."""
    if isinstance(likelihood, Likelihood):
        found: Likelihood | None = likelihood
    elif likelihood == "gaussian":
        found = StudentT(dof=math.inf, nugget=nugget) if nugget or known_noise else None
    elif likelihood in LIKELIHOODS:
        found = LIKELIHOODS[likelihood](nugget)
    else:
        raise ValueError(
            f"likelihood: expected a Likelihood or one of {['gaussian', *LIKELIHOODS]}, got {likelihood!r}"
        )
    if known_noise:
        if not isinstance(found, StudentT):
            raise ValueError(f'noise_std: expected None unless values are "gaussian" or "student-t", got {found!r}')
        found = replace(found, noise_known=True)
    return found


def resolve_ranks(rank: int | Sequence[int], form: str, axes: Sequence[Axis], main_effects: bool) -> tuple[int, ...]:
    """One rank a mode; raise ValueError where they do not fit the form or the axes."""
    K = len(axes)
    ranks = tuple(rank) if isinstance(rank, Sequence) else (rank,) * K
    if len(ranks) != K:
        raise ValueError(f"rank: expected one number or {K}, one for each mode, got {rank!r}")
    if not all(is_integer(r) and r >= 1 for r in ranks):
        raise ValueError(f"rank: expected integers of at least 1, got {rank!r}")
    if form == "cp" and len(set(ranks)) > 1:
        raise ValueError(f'rank: expected the same rank for all modes with form="cp", got {rank!r}')
    for axis, r in zip(axes, ranks, strict=True):
        if form == "tucker" and r > axis.size:
            raise ValueError(
                f"rank: expected at most {axis.size} for mode {axis.name!r}, which has {axis.size} distinct "
                f'coordinates, got {r}; give one rank a mode, or use form="cp"'
            )
    entries = math.prod(int(r) + main_effects for r in ranks)
    if form == "tucker" and entries > MAX_CORE:
        raise ValueError(
            f"rank: expected a core of at most {MAX_CORE:,} entries (covariance: half a GiB), got {rank!r}: "
            f'{entries:,} entries; lower the ranks, or use form="cp"'
        )
    return tuple(int(r) for r in ranks)


def build_model(
    params: Mapping[str, Any],
    axes: Sequence[Axis],
    ranks: Sequence[int],
    form: Literal["cp", "tucker"],
    main_effects: bool,
    like: Tensor,
    scale: float,
) -> FunctionalTucker:
    """The model that FunBaT's parameters describe, its likelihood left out.

    Parameters
    ----------
    params : mapping
        Of FunBaT.
    axes : sequence of Axis
        Fitted.
    ranks : sequence of int
        Latent functions of each mode.
    form : {"cp", "tucker"}
    main_effects : bool
        Whether columns for the modes' own effects are added.
    like : Tensor
        Gives dtype and device.
    scale : float
        Unit of the standardised values.
    """
    a0, b0 = (like.new_tensor(float(x)) for x in params["noise_prior"])
    shape, rate = (float(x) for x in params["relevance_prior"])
    K, extra = len(axes), int(main_effects)
    if form == "tucker":
        columns = [[False] * extra + [True] * rank for rank in ranks]
    else:
        columns = [[True] * ranks[0] + [j == k for j in range(K)] * extra for k in range(K)]
    return FunctionalTucker(
        functions=tuple(latent_functions(axis, like) for axis in axes),
        free=tuple(torch.tensor(c, device=like.device) for c in columns),
        form=form,
        noise_prior=Gamma(a0, b0),
        damping=params["damping"],
        learn=bool(params["learn_hyperparameters"]),
        log_scale=math.log(scale),
        relevance_prior=(shape, rate),
    )


def check_parameters(given: Mapping[str, Any]) -> None:
    """Raise ValueError that names a parameter of FunBaT, what was expected and what came."""
    if given["form"] not in ("cp", "tucker"):
        raise ValueError(f'form: expected "cp" or "tucker", got {given["form"]!r}')
    if not (is_number(given["damping"]) and 0 <= given["damping"] < 1):
        raise ValueError(f"damping: expected a number in [0, 1), got {given['damping']!r}")
    if not (is_integer(given["max_iter"]) and given["max_iter"] >= 1):
        raise ValueError(f"max_iter: expected an integer of at least 1, got {given['max_iter']!r}")
    if not (is_integer(given["n_init"]) and given["n_init"] >= 1):
        raise ValueError(f"n_init: expected an integer of at least 1, got {given['n_init']!r}")
    if not (is_number(given["tol"]) and given["tol"] >= 0):
        raise ValueError(f"tol: expected a number >= 0, got {given['tol']!r}")
    share: Any = given["calibration"]
    if not (share == "auto" if isinstance(share, str) else is_number(share) and 0 <= share < 1):
        raise ValueError(f'calibration: expected "auto" or a share in [0, 1), got {share!r}')
    if not _is_pair(given["relevance_prior"], zero=True):
        raise ValueError(f"relevance_prior: expected two numbers >= 0 (shape, rate), got {given['relevance_prior']!r}")
    if not _is_pair(given["noise_prior"], zero=False):
        raise ValueError(f"noise_prior: expected two positive numbers (shape, rate), got {given['noise_prior']!r}")


def _is_pair(given: Any, *, zero: bool) -> bool:
    """Whether these are two finite numbers above zero, or zero where that is allowed."""
    return (
        isinstance(given, Sequence)
        and len(given) == 2
        and all(is_number(x) and (0 < x < math.inf or (zero and x == 0)) for x in given)
    )
