"""Which components matter: their share in the entries, dropping those that have none, and the modes' own effects."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.comm import Comm
from probtensor.contract import pack, unpack
from probtensor.inference.kalman import Sites
from probtensor.models.functional_state import Factor, Rows, State
from probtensor.models.functional_tucker import FunctionalTucker

__all__ = ["contributions", "main_effect", "prune"]


def contributions(model: FunctionalTucker, state: State, rows: Sequence[Rows], comm: Comm) -> Tensor:
    """Root mean square of each CP interaction over the observed entries; main effects are not among them.

    Parameters
    ----------
    model : FunctionalTucker
    state : State
    rows : sequence of Rows
        Of this rank, in parts.
    comm : Comm

    Returns
    -------
    Tensor, shape (R,)
        ``sqrt(mean_n E prod_k u^k_r(x_n)^2)`` in standard deviations of the values; of shape (0,) for Tucker.
    """
    if model.form == "tucker":
        return rows[0].values.new_zeros(0)
    every = interactions(model)
    diagonal = pack(torch.eye(model.ranks[0], dtype=torch.float64, device=every.device)) > 0
    squares = [factor.second[:, diagonal][:, every] for factor in state.factors]
    R = int(every.sum())

    def squared(part: Rows) -> Tensor:
        total = part.values.new_zeros(R + 1)
        for chunk in model.chunks(part.values):
            product = torch.ones_like(part.values[chunk])[:, None].expand(-1, R)
            for square, position in zip(squares, part.positions[:, chunk], strict=True):
                product = product * square.index_select(0, position)
            total += torch.cat([product.sum(0), total.new_tensor([product.shape[0]])])
        return total

    total = comm.sum(*add_up(map(squared, rows)))
    return (total[:R] / total[R]).sqrt()


def interactions(model: FunctionalTucker) -> Tensor:
    """Which CP components are functions of every mode, shape (R,), bool."""
    return torch.stack(list(model.free)).all(0)


def prune(
    model: FunctionalTucker, state: State, rows: Sequence[Rows], comm: Comm, below: float
) -> tuple[FunctionalTucker, State]:
    """Model and state without the interactions that contribute next to nothing; at least one stays.

    Parameters
    ----------
    model : FunctionalTucker
        Tucker models are left as they are.
    state : State
    rows : sequence of Rows
        Of this rank, in parts.
    comm : Comm
    below : float
        `contributions` that are dropped.

    Returns
    -------
    model : FunctionalTucker
    state : State
        With the same predictions, but for what the dropped components gave.
    """
    if model.form != "cp" or below <= 0:
        return model, state
    every = interactions(model)
    strength = contributions(model, state, rows, comm)
    weak = strength < below
    if len(strength) and weak.all():
        weak[strength.argmax()] = False
    if not weak.any():
        return model, state
    keep = torch.ones_like(every)
    keep[every] = ~weak
    smaller = replace(model, free=tuple(free[keep] for free in model.free))
    factors = []
    for mode, (free, factor) in enumerate(zip(model.free, state.factors, strict=True)):
        kept = keep[free]
        sites = Sites(factor.sites.precision[:, kept][:, :, kept], factor.sites.shift[:, kept])
        new = smaller.factor(mode, sites, factor.log_hyperparameters[:, kept])
        # The moments stay as they were: the next sweep renews the sites.
        mean, second = factor.mean[:, keep], pack(unpack(factor.second)[:, keep][:, :, keep])
        factors.append(Factor(*new[:4], mean, second))
    return smaller, state._replace(factors=tuple(factors))


def main_effect(model: FunctionalTucker, state: State, mode: int, where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (n,) of a mode's own effect at coordinates (n,), in standard deviations of the values.

    The model must have main effects.
    """
    mean, covariance = model.functions_at(state, mode, where)
    if state.core is None:
        return mean[:, -1], covariance[:, -1, -1]
    ranks = model.ranks
    flat = torch.arange(1, ranks[mode], device=mean.device) * math.prod(ranks[mode + 1 :])
    core, core_covariance = state.core.mean[flat], state.core.covariance[flat[:, None], flat]
    effect = mean @ core
    second = covariance + mean[:, :, None] * mean[:, None, :]
    return effect, (second * (torch.outer(core, core) + core_covariance)).sum((1, 2)) - effect**2
