"""What the functional tensor model is made of: observed rows, factors and the posterior as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from probtensor.gaussian import Gamma, Gaussian
from probtensor.inference.kalman import Posterior, Sites
from probtensor.likelihoods import Entries, Likelihood
from probtensor.models.latent_functions import Given

if TYPE_CHECKING:
    from collections.abc import Iterable

    from probtensor.contract_cuda import Grouped

__all__ = ["Block", "Factor", "Past", "Rows", "State", "expected_log_prob", "moments_at", "side_by_side"]

Block = int | Literal["core"]


class Rows(NamedTuple):
    """Observed entries of one rank, each with its Gaussian factor ``exp(precision (value f - f^2 / 2))``.

    Attributes
    ----------
    positions : Tensor, shape (K, n), int64
        In the modes' coordinates.
    values : Tensor, shape (n,)
        Standardised values; with a likelihood, the pseudo-values that stand for them.
    precision : Tensor, shape (n,), or None
        Without a likelihood the rows' weights, in units of ``tau``, or None for ones.
    entries : Entries or None
        With a likelihood: what was observed.
    before : Entries or None
        The part of `entries` whose factors the state holds already: earlier rows of the same cells.
    groups : tuple of Grouped, or None
        The rows in the order of each mode, for the CP form on a GPU.
    """

    positions: Tensor
    values: Tensor
    precision: Tensor | None = None
    entries: Entries | None = None
    before: Entries | None = None
    groups: tuple[Grouped, ...] | None = None


class Factor(NamedTuple):
    """Posterior of one mode.

    Attributes
    ----------
    sites : Sites
        Sums of the rows' messages to the latent functions, one a coordinate.
    log_hyperparameters : Tensor, shape (n_hyperparameters, n_functions)
    posterior : Posterior
        What `LatentFunctions.posterior` gave.
    divergence : Tensor, scalar
        Kullback-Leibler divergence from the prior.
    mean : Tensor, shape (T, R)
        ``E u``; columns that are no latent function hold ones.
    second : Tensor, shape (T, R (R + 1) / 2)
        Packed ``E u u'``.
    """

    sites: Sites
    log_hyperparameters: Tensor
    posterior: Posterior
    divergence: Tensor
    mean: Tensor
    second: Tensor


class Past(NamedTuple):
    """What rows that are not at hand any more have said: the messages of earlier batches.

    Beside it, a `State` knows nothing but the coordinates of the rows at hand: sites and moments of its factors are
    theirs, their posterior and divergence those of before.

    Attributes
    ----------
    sites : tuple of Sites
        At the coordinates of the rows at hand, one a mode.
    given : tuple of Given
        The modes' moments at these coordinates, given the sites of all others.
    core : tuple of Tensor, or None
        Precision and shift of the core, its prior not counted.
    n_rows, squared_error : Tensor, scalars
        Of the earlier rows; without a likelihood only.
    """

    sites: tuple[Sites, ...]
    given: tuple[Given, ...]
    core: tuple[Tensor, Tensor] | None
    n_rows: Tensor
    squared_error: Tensor


class State(NamedTuple):
    """Everything that the posterior is made of, and what the bound needs.

    Attributes
    ----------
    factors : tuple of Factor
    core : Gaussian or None
        ``q(W)``, vectorised in the order of the modes; None for CP.
    noise : Gamma
        ``q(tau)``, precision of the standardised values. Without a likelihood only.
    squared_error : Tensor, scalar
        ``sum_n w_n E (y_n - f_n)^2`` over all rows. Without a likelihood only.
    n_rows, square : Tensor, scalars
        ``N`` and ``sum_n w_n y_n^2`` over all rows.
    sweep : int
        Sweeps done.
    log_parameters : Tensor, shape (P,)
        Logarithms of the likelihood's parameters.
    expected : Tensor, scalar, or None
        ``sum_n E log p(y_n | f_n)`` over all rows. With a likelihood only.
    past : Past or None
        Messages of earlier batches, which the rows at hand are added to.
    """

    factors: tuple[Factor, ...]
    core: Gaussian | None
    noise: Gamma
    squared_error: Tensor
    n_rows: Tensor
    square: Tensor
    sweep: int
    log_parameters: Tensor
    expected: Tensor | None = None
    past: Past | None = None


def expected_log_prob(likelihood: Likelihood, log_parameters: Tensor, part: tuple[Rows, Tensor, Tensor]) -> Tensor:
    """``sum_n E log p(y_n | f_n)`` of some rows, a scalar, from the moments (n,) of ``f`` there."""
    rows, mean, variance = part
    assert rows.entries is not None
    return likelihood.expected_log_prob(log_parameters, rows.entries, mean, variance).sum()


def moments_at(state: State, positions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Means (n, R_k) and packed second moments of the rows that the factors have at positions (K, n)."""
    each = list(zip(state.factors, positions, strict=True))
    return [f.mean.index_select(0, p) for f, p in each], [f.second.index_select(0, p) for f, p in each]


def side_by_side(state: State, modes: Iterable[int]) -> list[Tensor]:
    """Packed second moments and means of factors in one table each (T_k, P_k + R_k), for one look-up a row."""
    return [torch.cat([state.factors[k].second, state.factors[k].mean], dim=1) for k in modes]
