"""Likelihoods of observed values given noise-free entries: all that a model can choose from.

Missing values are replaced *before* a density is computed and masked after it: a NaN that is only masked afterwards
still makes the gradient NaN.
"""

import math
from dataclasses import dataclass, replace
from itertools import compress
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from probtensor.discrete_likelihoods import Bernoulli, NegativeBinomial, Poisson
from probtensor.likelihood_base import Entries, Likelihood, refuse, to_numpy
from probtensor.predictive import NormalMixture
from probtensor.predictive_base import weight_nodes

__all__ = [
    "Bernoulli",
    "Entries",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "Residual",
    "StudentT",
    "batch_total",
    "gaussian_log_prob",
]

MAX_DOF = 100.0  # of a learned dof: beyond, data cannot tell it from a Gaussian
GAUSSIAN_DOF = 1e6  # of a given one: beyond, the gamma functions lose the digits that would differ


def gaussian_log_prob(y: Tensor, mean: Tensor, variance: Tensor, observed: Tensor | None = None) -> Tensor:
    """Log density of a normal distribution; a value that is not observed gives 0 and no gradient.

    Parameters
    ----------
    y : Tensor, shape (n,)
        Values; what stands where `observed` is False, NaN included, does not matter.
    mean, variance : Tensor, shape (n,) or broadcastable
        Of the normal distribution.
    observed : Tensor, shape (n,), bool, optional
        Default: where `y` is not NaN.

    Returns
    -------
    Tensor, shape (n,)

    Examples
    --------
    >>> gaussian_log_prob(torch.tensor([0.0, torch.nan]), torch.zeros(2), torch.ones(2))
    tensor([-0.9189,  0.0000])
    """
    seen = ~y.isnan() if observed is None else observed
    residual = torch.where(seen, y, mean.detach()) - mean
    density = -0.5 * (residual**2 / variance + variance.log() + math.log(2 * math.pi))
    return torch.where(seen, density, 0.0)


def batch_total(log_prob: Tensor, n_total: int) -> Tensor:
    """Unbiased estimate of a sum over all observations from one batch of them, whatever the batch's size.

    Parameters
    ----------
    log_prob : Tensor, shape (batch,)
        Terms of the observations in the batch.
    n_total : int
        Number of all observations.

    Returns
    -------
    Tensor, scalar

    Raises
    ------
    ValueError
        If the batch is empty or larger than `n_total`.

    Examples
    --------
    >>> batch_total(torch.full((20,), -1.0), 100)
    tensor(-100.)
    """
    size = log_prob.shape[0]
    if not 0 < size <= n_total:
        raise ValueError(f"log_prob: expected between 1 and n_total={n_total} terms, got {size}")
    return log_prob.sum() * (n_total / size)


class Residual(NamedTuple):
    """What a cell's rows say about its own residual ``g`` and its weight ``w``; each of shape (n,).

    Attributes
    ----------
    shrink : Tensor
        ``E[g | f] = shrink (value - f)``, between 0 and 1.
    variance : Tensor
        ``Var[g | f, w] = variance / w``.
    expected_weight : Tensor
        ``E w``.
    shape, rate : Tensor
        Of the gamma distribution of ``w``; infinite for Gaussian tails.

    Examples
    --------
    With as much noise as residual, half of what a row shows is the cell's own:

    >>> one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    >>> student = StudentT(dof=math.inf)
    >>> logs = student.start(0.5, one)
    >>> found = student.residual(torch.zeros_like(logs), Entries(one, one, one, zero, zero), zero, zero)
    >>> found.shrink.tolist()
    [0.5]
    """

    shrink: Tensor
    variance: Tensor
    expected_weight: Tensor
    shape: Tensor
    rate: Tensor


@dataclass(frozen=True)
class StudentT(Likelihood):
    """Heavy tails by cell: rows of one cell share a weight and a residual.

    Cell c has ``w_c ~ Gamma(nu/2, nu/2)``, a residual (nugget) ``g_c ~ N(0, g2 / w_c)`` and rows
    ``y_cj = f_c + g_c + e_cj``, ``e_cj ~ N(0, s2 / (w_c r_cj))`` of relative precision ``r_cj``. With n rows, W the sum
    of their precisions, ``v = g2 + s2 / W`` and ``Q = scatter / s2 + E(value - f)^2 / v``, the bound under the optimal
    ``q(w_c) = Gamma((nu + n) / 2, (nu + Q) / 2)`` is ::

        log Gamma((nu+n)/2) - log Gamma(nu/2) - n/2 log(nu pi) - (nu+n)/2 log(1 + Q/nu)
            - ((n-1) log s2 + log W + log v - sum_j log r_cj) / 2

    Parameters
    ----------
    dof : float, optional
        ``nu``; above 1e6 (inf too) tails are Gaussian, ``w = 1``. Default: learned, between `min_dof` and 100.
    nugget : bool, default True
        Whether cells have a residual; else ``g2 = 0``.
    min_dof : float, default 2
    noise_known : bool, default False
        Whether ``r_cj`` is one over the row's known variance, so that ``s2 = 1`` is no parameter.
    light : bool, default False
        Gaussian tails for now; a learned dof stays among the parameters and rests.

    Raises
    ------
    ValueError
        If `dof` is not positive, or `min_dof` not in (0, 100].

    References
    ----------
    Lange, Little, Taylor (1989), "Robust Statistical Modeling Using the t Distribution", JASA 84, for the weights.

    Examples
    --------
    >>> one_row = Entries(*torch.tensor([[1.0], [1.0], [3.0], [0.0], [0.0]], dtype=torch.float64))
    >>> f = torch.zeros(1, dtype=torch.float64)
    >>> t = StudentT(dof=4.0, nugget=False)
    >>> t.expected_log_prob(torch.zeros_like(f), one_row, f, f)  # Student's t with 4 degrees of freedom at 3
    tensor([-3.9275], dtype=torch.float64)
    >>> precision, _ = t.sites(torch.zeros_like(f), one_row, f, f)
    >>> precision  # far out, it weighs less
    tensor([0.3846], dtype=torch.float64)
    """

    dof: float | None = None
    nugget: bool = True
    min_dof: float = 2.0
    noise_known: bool = False
    light: bool = False

    name: ClassVar[str] = "student-t"
    location_scale: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dof is not None and not self.dof > 0:
            raise ValueError(f"dof: expected a positive number, inf or None, got {self.dof!r}")
        if not 0 < self.min_dof <= MAX_DOF:
            raise ValueError(f"min_dof: expected a number above 0 and up to {MAX_DOF:g}, got {self.min_dof!r}")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Of ``noise_variance``, ``nugget_variance``, ``dof`` those that are learned, in this order."""
        learned = (not self.noise_known, self.nugget, self.dof is None)
        return tuple(compress(("noise_variance", "nugget_variance", "dof"), learned))

    def start(self, share: float, like: Tensor) -> Tensor:
        """Noise and nugget take equal parts of `share`; dof 4, or `min_dof` if that is more."""
        parts = len(self.parameters) - (self.dof is None)
        values = [math.log(max(share, 1e-300) / max(parts, 1))] * parts
        values += [math.log(max(self.min_dof, 4.0))] if self.dof is None else []
        return torch.clamp(like.new_tensor(values), *self.bounds(like))

    def bounds(self, like: Tensor) -> Tensor:
        """Variances between 1e-8 and 1e2, dof between `min_dof` and 100; (2, P)."""
        pairs = [(self.min_dof, MAX_DOF) if p == "dof" else (1e-8, 1e2) for p in self.parameters]
        return like.new_tensor(pairs).reshape(-1, 2).T.log()

    def light_tailed(self) -> Self:
        """Gaussian tails; the log-parameters stay the same ones."""
        return replace(self, light=True)

    def check(self, y: Tensor) -> None:
        """Values are finite."""
        refuse(y.isinf(), y, "finite values")

    def offset(self, mean: float) -> float:
        """Always 0."""
        return 0.0

    def expected_log_prob(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> Tensor:
        """The bound of the class docstring, (n,)."""
        s2, _, nu = self._unpack(log_parameters)
        v, Q = self._distance(log_parameters, entries, mean, variance)
        n, W, _, _, log_r = entries
        log_det = (n - 1) * s2.log() + W.log() + v.log() - log_r
        if nu is None:
            # The zero keeps a resting dof in the graph.
            return -0.5 * (n * math.log(2 * math.pi) + log_det + Q) + 0.0 * log_parameters.sum()
        density = torch.lgamma((nu + n) / 2) - torch.lgamma(nu / 2) - n / 2 * (nu * math.pi).log()
        return density - 0.5 * log_det - (nu + n) / 2 * torch.log1p(Q / nu)

    def sites(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """``E[w] / v``, and that times the value: the optimum given ``q(w)``."""
        v, _ = self._distance(log_parameters, entries, mean, variance)
        precision = self.residual(log_parameters, entries, mean, variance).expected_weight / v
        return precision, precision * entries.value

    def known_part(
        self, log_parameters: Tensor, entries: Entries, before: Entries, precision: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian factors of the rows that a cell had before others came, under the weight that all of them give.

        Parameters
        ----------
        log_parameters : Tensor, shape (P,)
        entries, before : Entries
            All rows of each cell, and those it had before; a `weight` of 0 where it had none.
        precision : Tensor, shape (n,)
            That of `entries`, from `sites`.

        Returns
        -------
        precision, shift : Tensor, shape (n,)
            The precision is never more than that of `entries`.
        """
        s2, g2, _ = self._unpack(log_parameters)
        known = precision * (g2 + s2 / entries.weight) / (g2 + s2 / before.weight)
        return known, known * before.value

    def residual(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> Residual:
        """What is known of the cells' residuals and weights.

        Parameters
        ----------
        log_parameters : Tensor, shape (P,)
        entries : Entries
        mean, variance : Tensor, shape (n,)
            Posterior moments of ``f``.

        Returns
        -------
        Residual
        """
        s2, g2, nu = self._unpack(log_parameters)
        v, Q = self._distance(log_parameters, entries, mean, variance)
        shrink = g2 / v
        left = shrink * s2 / entries.weight
        if nu is None:
            never = torch.full_like(v, torch.inf)
            return Residual(shrink, left, torch.ones_like(v), never, never)
        shape, rate = (nu + entries.count) / 2, (nu + Q) / 2
        return Residual(shrink, left, shape / rate, shape, rate)

    def predictive(self, log_parameters: Tensor, mean: Tensor, variance: Tensor) -> NormalMixture:
        """Of a row, of relative precision one, in a new cell.

        Normals of variance ``variance + (g2 + s2) / w``, with `weight_nodes` for ``w``.
        """
        s2, g2, nu = self._unpack(log_parameters)
        half = torch.inf if nu is None else float(nu) / 2
        weights, probability = weight_nodes(np.array([half]), np.array([half]))
        return NormalMixture(
            to_numpy(mean), np.sqrt(to_numpy(variance)[:, None] + float(s2 + g2) / weights), probability[0]
        )

    def _unpack(self, log_parameters: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``s2``, ``g2`` and ``nu``, None where tails are Gaussian."""
        one = log_parameters.new_ones(())
        s2 = one if self.noise_known else log_parameters[0].exp()
        g2 = log_parameters[int(not self.noise_known)].exp() if self.nugget else 0 * one
        if self.light or (self.dof is not None and self.dof > GAUSSIAN_DOF):
            return s2, g2, None
        return s2, g2, log_parameters[-1].exp() if self.dof is None else self.dof * one

    def _distance(
        self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``v`` and ``Q`` of the class docstring, (n,)."""
        s2, g2, _ = self._unpack(log_parameters)
        v = g2 + s2 / entries.weight
        return v, entries.scatter / s2 + ((entries.value - mean) ** 2 + variance) / v
