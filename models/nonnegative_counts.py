"""Poisson tensor factorization: counts whose rate is a sum of products of gamma distributed factors.

Density, for K modes with labels ``i`` and R components ``r``:

    y     ~ Poisson(λ),      λ = Σ_r w_r Π_k θ_k,i_k,r
    θ_k,i,r ~ Gamma(a_k,r, a_k,r)                            mean 1, variance 1 / a
    w_r   ~ Gamma(1 / R, 1 / ȳ)                              so that E λ is the mean count ȳ
    a_k,r ~ Gamma(shape, rate), by its density for log a     one over the variance of a column

Two things make what explains nothing vanish. The weights' small shape, as of a gamma process, leaves few of them in
use; and a column whose variance goes to zero is one for every label: the component does without that mode.

Given counts ``n_r ~ Multinomial(y, φ)`` of each component all is conjugate. Coordinate ascent has gamma posteriors and
``φ_r ~ exp(E log w_r + Σ_k E log θ_k,i_k,r)``; the shapes ``a`` maximise the bound with the mode's factor at its
optimum, where it is a sum over labels of

    log Γ(a + S) - log Γ(a) + a log a - (a + S) log(a + T)

with S the counts and T the exposure of a label. A sweep costs ``O(rows K R)``.

References
----------
Schein, Paisley, Blei, Wallach (2015), "Bayesian Poisson Tensor Factorization for Inferring Multilateral Relations from
Sparse Dyadic Event Counts", KDD, for the model and the updates. Hoffman, Blei, Cook (2010), "Bayesian Nonparametric
Matrix Factorization for Recorded Music", ICML, for the prior of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probtensor.blocks import Total
from probtensor.discrete_predictive import CountMixture
from probtensor.gaussian import Gamma
from probtensor.inference.maximize import maximize
from probtensor.likelihood_base import to_numpy
from probtensor.models.nonnegative_tables import Table, at, chunks_of

__all__ = [
    "NonNegativeCounts",
    "NonNegativeRows",
    "NonNegativeState",
    "count_predictive",
    "draw_counts",
    "start_means",
]

SURE = 100.0  # shape, at mean one, of what a start knows of factors
LEAST = 0.1  # of a start's factors
PASSES = 3  # over all blocks in a sweep: each is a small step
WARM_UP = 2  # sweeps before hyperparameters are learned
LEARN_STEPS = 5
SHAPES = 1e-2, 1e4  # least and greatest shape of a column


class NonNegativeRows(NamedTuple):
    """Observed entries.

    Attributes
    ----------
    positions : Tensor, shape (K, n), int64
    values : Tensor, shape (n,)
    weight : Tensor, shape (n,)
        How often each row counts.
    """

    positions: Tensor
    values: Tensor
    weight: Tensor


class NonNegativeState(NamedTuple):
    """The posterior.

    Attributes
    ----------
    tables : tuple of Table, shapes (I_k, R)
        Factors by mode; for counts the weights (1, R) come last.
    hyper : tuple of Tensor, shape (R,)
        Logarithms of the columns' shapes (counts) or rates (real values), by mode.
    log_parameters : Tensor, shape (P,)
        Of the likelihood.
    expected : Tensor, scalar
        Expectation of the log-likelihood of all rows.
    sweep : int
        Sweeps done.
    """

    tables: tuple[Table, ...]
    hyper: tuple[Tensor, ...]
    log_parameters: Tensor
    expected: Tensor
    sweep: int


@dataclass(frozen=True, eq=False)
class NonNegativeCounts:
    """The model of the module's docstring, for `probtensor.inference.message_passing.run`; holds no data.

    Attributes
    ----------
    sizes : tuple of int
        Labels of each mode.
    rank : int
    mean : float
        ``ȳ``, above 0.
    relevance_prior : tuple of float
        Shape and rate of the prior of one over each column's variance.
    learn : bool
        Whether columns' shapes are learned; else they are one.
    all_cells : bool
        Whether cells without a row are zeros.
    """

    sizes: tuple[int, ...]
    rank: int
    mean: float
    relevance_prior: tuple[float, float] = (1.0, 1e-3)
    learn: bool = True
    all_cells: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """Modes, coarse ones first, and then the weights, number K; all that some times over."""
        return PASSES * (*sorted(range(len(self.sizes)), key=lambda k: self.sizes[k]), len(self.sizes))

    def local_start(self, rows: NonNegativeRows) -> Tensor:
        """What a start needs to know of the rows: their dtype and device."""
        return rows.values.new_zeros(1)

    def start(self, statistics: Tensor, generator: torch.Generator, trial: int) -> NonNegativeState:
        """Factors at random, and weights that share the mean count."""
        tables = []
        for size in self.sizes:
            mean = start_means(size, self.rank, statistics, generator)
            tables.append(Gamma(SURE * mean, torch.full_like(mean, SURE)))
        hyper = (statistics.new_zeros(self.rank),) * len(self.sizes)
        weight = statistics.new_full((1, self.rank), SURE)
        tables.append(Gamma(weight, weight * self.rank / self.mean))
        return NonNegativeState(tuple(tables), hyper, statistics.new_zeros(0), statistics.new_zeros(()), 0)

    def begin(self, state: NonNegativeState, rows: NonNegativeRows) -> NonNegativeRows:
        """The rows as they are."""
        return rows

    def local_statistics(self, state: NonNegativeState, block: int, rows: NonNegativeRows) -> Tensor:
        """Counts and exposure of every label and component, (I_k, 2 R)."""
        tables, total = state.tables, rows.values.new_zeros(len(state.tables[block].mean), 2 * self.rank)
        logs, means = [table.mean_log for table in _gammas(tables)], [table.mean for table in tables]
        for chunk in chunks_of(len(rows.values), self.rank):
            places = self._places(rows.positions[:, chunk])
            weight = rows.weight[chunk]
            share = torch.softmax(reduce(torch.add, at(logs, places)), dim=1)
            counts = (weight * rows.values[chunk])[:, None] * share
            others = [x for k, x in enumerate(at(means, places)) if k != block]
            exposure = 0 * share if self.all_cells else weight[:, None] * reduce(torch.mul, others)
            total.index_add_(0, places[block], torch.cat([counts, exposure], dim=1))
        return total

    def update(self, state: NonNegativeState, block: int, statistics: Tensor) -> NonNegativeState:
        """A mode's factor, with its columns' shapes, or the weights, at the optimum given the others."""
        counts, exposure = statistics[:, : self.rank], statistics[:, self.rank :]
        if self.all_cells:
            others = [table.mean.sum(0) for k, table in enumerate(state.tables) if k != block]
            exposure = reduce(torch.mul, others).expand_as(counts)
        hyper = list(state.hyper)
        if block < len(self.sizes):
            if self.learn and state.sweep >= WARM_UP:
                hyper[block] = self._learned(counts, exposure, hyper[block])
            shape = rate = hyper[block].exp()
        else:
            shape, rate = self._weight_prior(counts)
        tables = _gammas(state.tables)
        tables[block] = Gamma(shape + counts, rate + exposure)
        if block < len(self.sizes):
            tables[block], tables[-1] = self._rescaled(tables[block], tables[-1], shape)
        return state._replace(tables=tuple(tables), hyper=tuple(hyper))

    def end_sweep(
        self, state: NonNegativeState, parts: Sequence[NonNegativeRows], total: Total
    ) -> tuple[NonNegativeState, list[NonNegativeRows]]:
        """Count the sweep, and take the expectation of the rows' log-likelihood."""
        expected = total(self._expected(state, rows)[None] for rows in parts)[0]
        if self.all_cells:
            expected = expected - reduce(torch.mul, [table.mean.sum(0) for table in state.tables]).sum()
        return state._replace(expected=expected, sweep=state.sweep + 1), list(parts)

    def bound(self, state: NonNegativeState) -> Tensor:
        """Evidence lower bound, with the log density of the columns' shapes; a scalar."""
        *factors, weights = _gammas(state.tables)
        bound = state.expected - weights.kl(Gamma(*self._weight_prior(state.expected))).sum()
        for table, hyper in zip(factors, state.hyper, strict=True):
            bound = bound - table.kl(Gamma(hyper.exp(), hyper.exp())).sum() + self._log_prior(hyper)
        return bound

    def _rescaled(self, factor: Gamma, weights: Gamma, prior: Tensor) -> tuple[Gamma, Gamma]:
        """Each column of a factor times a number, and its weight divided by it, where the bound is highest.

        The likelihood stays; of the priors ``(I a - 1/R) log s - a s Σ E θ - E w / (s ȳ)`` depends on the number s.
        """
        shape, rate = self._weight_prior(prior)
        linear, square = len(factor.mean) * prior - shape, prior * factor.mean.sum(0)
        s = (linear + (linear**2 + 4 * square * rate * weights.mean[0]).sqrt()) / (2 * square)
        return Gamma(factor.shape, factor.rate / s), Gamma(weights.shape, weights.rate * s)

    def _weight_prior(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(1 / self.rank), like.new_tensor(1 / self.mean)

    def _log_prior(self, hyper: Tensor) -> Tensor:
        shape, rate = self.relevance_prior
        return (shape * hyper - rate * hyper.exp()).sum()

    def _learned(self, counts: Tensor, exposure: Tensor, hyper: Tensor) -> Tensor:
        def objective(log_shape: Tensor) -> Tensor:
            a = log_shape.exp()
            ways = torch.lgamma(a + counts) - torch.lgamma(a) + a * log_shape - (a + counts) * (a + exposure).log()
            return ways.sum() + self._log_prior(log_shape)

        bounds = hyper.new_tensor(SHAPES).log()[:, None].expand(2, self.rank)
        return maximize(objective, hyper, bounds, LEARN_STEPS)

    def _expected(self, state: NonNegativeState, rows: NonNegativeRows) -> Tensor:
        """``Σ_n c_n (y_n log Σ_r exp E log(w_r Π θ) - log y_n! - E λ_n)``; with all cells, rates are counted apart."""
        logs, means = [table.mean_log for table in _gammas(state.tables)], [table.mean for table in state.tables]
        found = rows.values.new_zeros(())
        for chunk in chunks_of(len(rows.values), self.rank):
            places, y = self._places(rows.positions[:, chunk]), rows.values[chunk]
            log_rate = torch.logsumexp(reduce(torch.add, at(logs, places)), dim=1)
            rate = reduce(torch.mul, at(means, places)).sum(1)
            terms = y * log_rate - torch.lgamma(y + 1) - (0 * rate if self.all_cells else rate)
            found = found + (rows.weight[chunk] * terms).sum()
        return found

    @staticmethod
    def _places(positions: Tensor) -> list[Tensor]:
        """Rows of every table, the weights' one row included."""
        return [*positions, torch.zeros_like(positions[0])]


def count_predictive(mean: Tensor, variance: Tensor) -> CountMixture:
    """Counts whose rates have that mean and variance (n,): negative binomial, as for gamma distributed rates."""
    rate, spread = to_numpy(mean).clip(1e-100), to_numpy(variance)
    return CountMixture(rate[:, None], np.ones(1), spread / rate**2)


def draw_counts(rates: Tensor, generator: torch.Generator) -> Tensor:
    """One count for each rate."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    return torch.from_numpy(rng.poisson(rates.cpu().numpy()).astype(float)).to(rates)


def start_means(size: int, rank: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Means (I, R) of a mode's factors at a start: exponential draws, held away from zero, of mean one."""
    uniform = torch.rand(size, rank, generator=generator, dtype=torch.float64)
    return (LEAST - (1 - LEAST) * torch.log1p(-uniform)).to(like)


def _gammas(tables: Sequence[Table]) -> list[Gamma]:
    return [table for table in tables if isinstance(table, Gamma)]
