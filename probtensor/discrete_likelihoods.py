"""Likelihoods of counts and of binary values.

Expectations that have no closed form are sums over `predictive_base.normal_nodes`. Derivatives of expectations are
expectations of derivatives, by the theorems of Bonnet and Price: ``dE h/dmean = E h'``, ``2 dE h/dvariance = E h''``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probtensor.discrete_predictive import LOG_MAX_COUNT, BernoulliPredictive, CountMixture
from probtensor.likelihood_base import Entries, Likelihood, refuse, to_numpy
from probtensor.predictive_base import normal_nodes

__all__ = ["Bernoulli", "NegativeBinomial", "Poisson", "expect", "expect_logistic"]

RARE = 1e-6  # the least mean of counts, or probability, that an offset stands for


@dataclass(frozen=True)
class Poisson(Likelihood):
    """Counts ``y ~ Poisson(exp f)``; everything in closed form. `Entries.count` multiplies a row's log-likelihood.

    Examples
    --------
    >>> row = Entries(*torch.tensor([[1.0], [1.0], [2.0], [0.0], [0.0]], dtype=torch.float64))
    >>> f = torch.zeros(1, dtype=torch.float64)
    >>> Poisson().expected_log_prob(f[:0], row, f, f)  # log(exp(-1) / 2)
    tensor([-1.6931], dtype=torch.float64)
    """

    name: ClassVar[str] = "poisson"
    location_scale: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def check(self, y: Tensor) -> None:
        """Values are counts: whole numbers from 0."""
        _refuse_but_counts(y)

    def offset(self, mean: float) -> float:
        """``log(mean)``, of a mean of at least 1e-6."""
        return math.log(max(mean, RARE))

    def expected_log_prob(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> Tensor:
        """``y mean - E exp f - log y!``, (n,)."""
        y = entries.value
        return entries.count * (y * mean - _exp(mean + variance / 2) - torch.lgamma(y + 1))

    def sites(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Precision ``E exp f``."""
        rate = entries.count * _exp(mean + variance / 2)
        return rate, entries.count * entries.value - rate + rate * mean

    def predictive(self, log_parameters: Tensor, mean: Tensor, variance: Tensor) -> CountMixture:
        """Poisson counts whose mean is log-normal; see `CountMixture.log_normal`."""
        return CountMixture.log_normal(to_numpy(mean), to_numpy(variance))


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """Counts of mean ``mu = exp f`` and variance ``mu + dispersion mu^2``: near 0 they are Poisson.

    `Entries.count` multiplies a row's log-likelihood. Expectations by quadrature; see `normal_nodes`.

    References
    ----------
    Cameron, Trivedi (2013), "Regression Analysis of Count Data", chapter 3, for this dispersion (NB2).

    Examples
    --------
    >>> row = Entries(*torch.tensor([[1.0], [1.0], [2.0], [0.0], [0.0]], dtype=torch.float64))
    >>> f = torch.zeros(1, dtype=torch.float64)
    >>> NegativeBinomial().expected_log_prob(f, row, f, f)  # dispersion 1 is geometric: log(1 / 8)
    tensor([-2.0794], dtype=torch.float64)
    """

    name: ClassVar[str] = "negative-binomial"
    location_scale: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """The dispersion."""
        return ("dispersion",)

    def start(self, share: float, like: Tensor) -> Tensor:
        """Dispersion `share`: that part of the variance of ``log mu``, about."""
        return torch.clamp(like.new_tensor([math.log(max(share, 1e-300))]), *self.bounds(like))

    def bounds(self, like: Tensor) -> Tensor:
        """Dispersion between 1e-6 and 1e2; (2, 1)."""
        return like.new_tensor([[1e-6], [1e2]]).log()

    def check(self, y: Tensor) -> None:
        """Values are counts: whole numbers from 0."""
        _refuse_but_counts(y)

    def offset(self, mean: float) -> float:
        """``log(mean)``, of a mean of at least 1e-6."""
        return math.log(max(mean, RARE))

    def expected_log_prob(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> Tensor:
        """With ``k = 1 / dispersion`` and ``x = f - log k``: ``log C(y+k-1, y) + y E x - (y+k) E log(1 + exp x)``."""
        y, k = entries.value, (-log_parameters[0]).exp()
        x = mean + log_parameters[0]
        choose = torch.lgamma(y + k) - torch.lgamma(k) - torch.lgamma(y + 1)
        return entries.count * (choose + y * x - (y + k) * expect(_softplus, x, variance))

    def sites(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """From the derivatives ``y - (y+k) E sigmoid(x)`` and ``-(y+k) E sigmoid'(x)``."""
        trials = entries.count * (entries.value + (-log_parameters[0]).exp())
        x = mean + log_parameters[0]
        share, bell = expect_logistic(x, variance)
        precision, slope = trials * bell, entries.count * entries.value - trials * share
        return precision, slope + precision * mean

    def predictive(self, log_parameters: Tensor, mean: Tensor, variance: Tensor) -> CountMixture:
        """Negative binomial counts whose mean is log-normal; see `CountMixture.log_normal`."""
        return CountMixture.log_normal(to_numpy(mean), to_numpy(variance), float(log_parameters[0].exp()))


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Values 0 and 1, 1 with probability ``1 / (1 + exp(-f))``; expectations by quadrature; see `normal_nodes`.

    `Entries.count` multiplies a row's log-likelihood.

    Examples
    --------
    >>> row = Entries(*torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]], dtype=torch.float64))
    >>> f = torch.zeros(1, dtype=torch.float64)
    >>> Bernoulli().expected_log_prob(f[:0], row, f, f)
    tensor([-0.6931], dtype=torch.float64)
    """

    name: ClassVar[str] = "bernoulli"
    location_scale: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    cold: ClassVar[float] = 4.0

    def check(self, y: Tensor) -> None:
        """Values are 0 and 1."""
        refuse(~((y == 0) | (y == 1) | y.isnan()), y, "values 0 and 1")

    def offset(self, mean: float) -> float:
        """``log(mean / (1 - mean))``, of a mean between 1e-6 and 1 - 1e-6."""
        p = min(max(mean, RARE), 1 - RARE)
        return math.log(p) - math.log1p(-p)

    def expected_log_prob(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> Tensor:
        """``y mean - E log(1 + exp f)``, (n,)."""
        return entries.count * (entries.value * mean - expect(_softplus, mean, variance))

    def sites(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """From the derivatives ``y - E sigmoid(f)`` and ``-E sigmoid'(f)``."""
        share, bell = expect_logistic(mean, variance)
        precision, slope = entries.count * bell, entries.count * (entries.value - share)
        return precision, slope + precision * mean

    def predictive(self, log_parameters: Tensor, mean: Tensor, variance: Tensor) -> BernoulliPredictive:
        """1 with probability ``E sigmoid(f)``."""
        return BernoulliPredictive(to_numpy(expect(torch.sigmoid, mean, variance)).clip(0, 1))


def expect(function: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    """``E function(f)``, (n,): node by node, so that no (n, nodes) array is held."""
    total, scale = torch.zeros_like(mean), variance.sqrt()
    for z, weight in zip(*(x.tolist() for x in normal_nodes()), strict=True):
        total = torch.add(total, function(torch.add(mean, scale, alpha=z)), alpha=weight)
    return total


def expect_logistic(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """``E s(f)`` and ``E s'(f)``, (n,), of the logistic function ``s``, which is looked up once a node for both.

    Examples
    --------
    >>> share, bell = expect_logistic(*torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    >>> round(share.item(), 4), round(bell.item(), 4)
    (0.5, 0.2066)
    """
    share, square, scale = torch.zeros_like(mean), torch.zeros_like(mean), variance.sqrt()
    for z, weight in zip(*(x.tolist() for x in normal_nodes()), strict=True):
        s = torch.add(mean, scale, alpha=z).sigmoid_()
        share.add_(s, alpha=weight)
        square.addcmul_(s, s, value=weight)
    return share, (share - square).clamp(min=0)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # torch's softplus drops exp(-x) above a threshold


def _exp(x: Tensor) -> Tensor:
    """``exp``, held below 2^62: no count is larger, and an infinite precision would leave NaN in every block."""
    return x.clamp(max=LOG_MAX_COUNT).exp()


def _refuse_but_counts(y: Tensor) -> None:
    refuse(~((y >= 0) & (y == y.floor()) & y.isfinite() | y.isnan()), y, "counts (whole numbers from 0)")
