"""Where message passing starts: smoothed means by mode as main effects, draws from the prior for the rest."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from probtensor.inference.kalman import Sites
from probtensor.models.functional_state import Rows
from probtensor.models.latent_functions import LatentFunctions

__all__ = ["local_start", "no_sites", "paired", "start_columns"]

NEAR_ONE = 0.1  # standard deviation of a factor's rows about 1 where its mode is not of the pair


def local_start(functions: Sequence[LatentFunctions], rows: Rows) -> Tensor:
    """Sums over rows for the start.

    Parameters
    ----------
    functions : sequence of LatentFunctions
        One a mode.
    rows : Rows
        With their Gaussian factors.

    Returns
    -------
    Tensor, one-dimensional
        Number of observations, sum of weighted squares, and by mode and coordinate the sums of weights and of weighted
        values.
    """
    y = rows.values
    weight = torch.ones_like(y) if rows.precision is None else rows.precision
    count = (weight if rows.entries is None else rows.entries.count).sum()[None]
    parts = [count, (weight * y**2).sum()[None]]
    for f, position in zip(functions, rows.positions, strict=True):
        zero = torch.zeros(f.size, dtype=y.dtype, device=y.device)
        parts += [zero.index_add(0, position, weight), zero.index_add(0, position, weight * y)]
    return torch.cat(parts)


def start_columns(
    functions: Sequence[LatentFunctions],
    free: Sequence[Tensor],
    form: Literal["cp", "tucker"],
    statistics: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """Columns of each mode's factor to start from.

    Parameters
    ----------
    functions : sequence of LatentFunctions
    free : sequence of Tensor, shape (R_k,), bool
        Which columns are latent functions.
    form : {"cp", "tucker"}
    statistics : Tensor
        `local_start`, summed over ranks.
    generator : torch.Generator

    Returns
    -------
    list of Tensor, shapes (T_k, R_k)
    """
    split = torch.split(statistics[2:], [f.size for f in functions for _ in range(2)])
    effects = [_smoothed_means(f, n, s) for f, n, s in zip(functions, split[::2], split[1::2], strict=True)]
    strength = [float((n * e**2).sum()) for n, e in zip(split[::2], effects, strict=True)]
    order = sorted(range(len(effects)), key=lambda k: -strength[k])
    main_effects = not all(bool(f.all()) for f in free)
    coarsest = min(range(len(functions)), key=lambda k: functions[k].size)
    columns = []
    for k, f in enumerate(functions):
        n_functions = int(free[k].sum())
        hyper = torch.clamp(f.initial_hyperparameters(n_functions), *f.bounds(n_functions))
        draw = f.sample(hyper, no_sites(f.size, hyper), f.everywhere(), 1, generator)[0]
        mean = draw.new_ones(draw.shape[0], len(free[k]))
        mean[:, free[k]] = draw
        if form == "tucker":
            _tucker_columns(mean, effects[k], main_effects, strongest=order[0] == k)
        elif main_effects:
            # The others' effects come from what this one leaves.
            mean[:, len(free[k]) - len(functions) + k] = effects[k] if k == coarsest else 0.0
        else:
            place = order.index(k)
            for r in range(min(len(free[k]), len(functions))):
                mean[:, r] = 0.5 * draw[:, r] + (effects[k] if r == place else 1.0)
        columns.append(mean)
    return columns


def paired(f: LatentFunctions, mode: int, mean: Tensor, hyper: Tensor, free: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A start at which components are interactions of two modes each, in turn, and then one of all modes.

    In the other modes a component is one, about: what labels have in common is then there to be found, where a factor
    of mean zero would hide what two modes share behind the signs of a third.

    Parameters
    ----------
    f : LatentFunctions
    mode : int
    mean : Tensor, shape (T, R)
        Columns to start from.
    hyper : Tensor, shape (n_hyperparameters, R_free)
        Logarithms of the variance of rows, of that of their mean, and of others, as `ExchangeableRows` has them.
    free : sequence of Tensor, shape (R,), bool
        Which columns are latent functions, by mode.

    Returns
    -------
    mean, hyper : Tensor
        New ones.
    """
    K = len(free)
    of_all = torch.stack(list(free)).all(0)
    pairs = [*combinations(range(K), 2), tuple(range(K))] if K > 2 else [tuple(range(K))]
    column = of_all.nonzero().squeeze(-1).tolist()
    place = free[mode].long().cumsum(0) - 1
    mean, hyper = mean.clone(), hyper.clone()
    for r, c in enumerate(column):
        if mode not in pairs[r % len(pairs)]:
            mean[:, c] = 1 + NEAR_ONE * mean[:, c]
            hyper[:2, place[c]] = hyper.new_tensor([2 * math.log(NEAR_ONE), 0.0])
    return mean, hyper


def no_sites(size: int, hyper: Tensor) -> Sites:
    """Sites that say nothing, for `size` coordinates and as many functions as `hyper` (n_hyperparameters, R) has."""
    rank = hyper.shape[1]
    return Sites(hyper.new_zeros(size, rank, rank), hyper.new_zeros(size, rank))


def _tucker_columns(mean: Tensor, effect: Tensor, main_effects: bool, *, strongest: bool) -> None:
    """Set the first columns of (T, R) in place: a constant, and the effect in its own unit."""
    unit = effect / effect.square().mean().sqrt().clamp(min=1e-6)
    if main_effects or mean.shape[1] > 1:
        mean[:, 0], mean[:, 1] = 1.0, unit
    else:
        mean[:, 0] = unit if strongest else 1.0


def _smoothed_means(f: LatentFunctions, weight: Tensor, total: Tensor) -> Tensor:
    """Mean value at each coordinate, smoothed by the prior's start, shape (T,)."""
    hyper = f.initial_hyperparameters(1)
    sites = Sites(weight[:, None, None], total[:, None])
    posterior, _ = f.posterior(hyper, sites)
    return f.moments(hyper, sites, posterior).mean[:, 0]
