"""Non-negative CP of real values: exponential factors, whose posterior is normal and cut off at zero.

Density, for K modes with labels ``i`` and R components ``r``:

    f       = Σ_r Π_k u_k,i_k,r
    u_k,i,r ~ Exponential(λ_k,r)                             a gamma distribution of shape one
    λ_k,r   ~ Gamma(shape, rate), by its density for log λ   a column that explains nothing goes to zero
    y       ~ N(f, σ²), or Student's t

With independent ``u`` the optimum for one of them is a rectified normal. The rows of a label send its row of the factor
``exp(η' u - u' Λ u / 2)``, ``Λ = Σ_n τ_n E a a'``, ``η = Σ_n τ_n y_n E a``, ``a`` the product of the other modes' rows
and ``τ`` the rows' precisions; then, column by column,

    precision = Λ_rr,     shift = η_r - Σ_s≠r Λ_rs E u_s - λ_r.

A sweep costs ``O(rows K R²)``.

References
----------
Schmidt, Winther, Hansen (2009), "Bayesian Non-negative Matrix Factorization", ICA. Brouwer, Frellsen, Lió (2017),
"Comparative Study of Inference Methods for Bayesian Nonnegative Matrix Factorisation", ECML, for the variational
posterior and the relevance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from probtensor.blocks import Total
from probtensor.contract import pack, packed_size, unpack
from probtensor.inference.maximize import maximize
from probtensor.likelihoods import Entries, Likelihood
from probtensor.models.nonnegative_counts import NonNegativeState, start_means
from probtensor.models.nonnegative_tables import RectifiedNormals, chunks_of, moments_at

__all__ = ["NonNegativeValues", "ValueRows"]

NOISES = 0.5, 0.2  # shares of the variance that starts take for noise, in turn: with less, more columns stay
PASSES = 3  # over a factor's columns in an update: with fewer, components that say the same stay apart
WARM_UP = 4  # sweeps before the noise is learned
LIGHT_TAILS = 16  # sweeps before tails grow heavy: till then what few rows have found looks like outliers
LEARN_STEPS = 5
SURE = 0.1  # standard deviation of a start's factors, in shares of their mean


@dataclass(frozen=True, eq=False)
class ValueRows:
    """Observed entries.

    Attributes
    ----------
    positions : Tensor, shape (K, n), int64
    entries : Entries
        Every row its own.
    sites : tuple of Tensor, shape (n,), or None
        Precision of each row, and precision times value, for the sweep that comes.
    """

    positions: Tensor
    entries: Entries
    sites: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class NonNegativeValues:
    """The model of the module's docstring, for `probtensor.inference.message_passing.run`; holds no data.

    Attributes
    ----------
    sizes : tuple of int
        Labels of each mode.
    rank : int
    mean : float
        Of the values, above 0.
    likelihood : Likelihood
        One whose `sites` are exact.
    log_scale : float
        Logarithm of the values' unit: the bound is that of values in their own.
    relevance_prior : tuple of float
        Shape and rate of the prior of ``λ``.
    learn : bool
        Whether ``λ`` is learned; else it stays at the start's, for which the components share the mean.
    """

    sizes: tuple[int, ...]
    rank: int
    mean: float
    likelihood: Likelihood
    log_scale: float = 0.0
    relevance_prior: tuple[float, float] = (1.0, 1e-3)
    learn: bool = True

    @property
    def blocks(self) -> tuple[int, ...]:
        """Modes, coarse ones first."""
        return tuple(sorted(range(len(self.sizes)), key=lambda k: self.sizes[k]))

    def local_start(self, rows: ValueRows) -> Tensor:
        """What a start needs to know of the rows: their dtype and device."""
        return rows.entries.value.new_zeros(1)

    def start(self, statistics: Tensor, generator: torch.Generator, trial: int) -> NonNegativeState:
        """Factors at random, of products that add up to the mean."""
        unit = (self.mean / self.rank) ** (1 / len(self.sizes))
        tables = []
        for size in self.sizes:
            mean = unit * start_means(size, self.rank, statistics, generator)
            precision = (SURE * mean) ** -2
            tables.append(RectifiedNormals(precision * mean, precision))
        hyper = (statistics.new_full((self.rank,), -math.log(unit)),) * len(self.sizes)
        parameters = self.likelihood.start(NOISES[trial % len(NOISES)], statistics)
        return NonNegativeState(tuple(tables), hyper, parameters, statistics.new_zeros(()), 0)

    def begin(self, state: NonNegativeState, rows: ValueRows) -> ValueRows:
        """The rows with their sites."""
        return self._with_sites(rows, state.sweep, state.log_parameters, *self.at_rows(state, rows))

    def local_statistics(self, state: NonNegativeState, block: int, rows: ValueRows) -> Tensor:
        """Packed ``Λ`` and ``η`` of every label, (I_k, P + R)."""
        assert rows.sites is not None
        precision, shift = rows.sites
        others = [(t.mean, t.variance, k) for k, t in enumerate(state.tables) if k != block]
        R = self.rank
        total = shift.new_zeros(self.sizes[block], packed_size(R) + R)
        diagonal = pack(torch.eye(R, dtype=shift.dtype, device=shift.device)) > 0
        for chunk in chunks_of(len(shift), packed_size(R)):
            mean, second = shift.new_ones(len(shift[chunk]), R), shift.new_ones(len(shift[chunk]), R)
            for of_mode, variance, k in others:
                place = rows.positions[k, chunk]
                m = of_mode.index_select(0, place)
                mean, second = mean * m, second * (m**2 + variance.index_select(0, place))
            pairs = pack(mean[:, :, None] * mean[:, None, :])
            pairs[:, diagonal] = second
            terms = torch.cat([precision[chunk, None] * pairs, shift[chunk, None] * mean], dim=1)
            total.index_add_(0, rows.positions[block, chunk], terms)
        return total

    def update(self, state: NonNegativeState, block: int, statistics: Tensor) -> NonNegativeState:
        """Numbers of a factor at their optimum given the others, column by column, and rates; some times over."""
        precision, shift = unpack(statistics[:, : packed_size(self.rank)]), statistics[:, packed_size(self.rank) :]
        table, hyper = state.tables[block], state.hyper[block].clone()
        assert isinstance(table, RectifiedNormals)
        mean = table.mean.clone()
        new = RectifiedNormals(torch.empty_like(shift), torch.empty_like(shift))
        shape, rate = self.relevance_prior
        for _ in range(PASSES):
            for r in range(self.rank):
                own = precision[:, r, r].clamp(min=torch.finfo(shift.dtype).tiny ** 0.5)
                rest = (precision[:, r] * mean).sum(1) - precision[:, r, r] * mean[:, r]
                column = RectifiedNormals(shift[:, r] - rest - hyper[r].exp(), own)
                new.shift[:, r], new.precision[:, r], mean[:, r] = *column, column.mean
                if self.learn:
                    hyper[r] = torch.log((len(mean) + shape) / (mean[:, r].sum() + rate))
        tables = (*state.tables[:block], new, *state.tables[block + 1 :])
        return state._replace(tables=tables, hyper=(*state.hyper[:block], hyper, *state.hyper[block + 1 :]))

    def end_sweep(
        self, state: NonNegativeState, parts: Sequence[ValueRows], total: Total
    ) -> tuple[NonNegativeState, list[ValueRows]]:
        """Update the likelihood's parameters and the rows' sites; count the sweep."""
        seen = [(rows, *self.at_rows(state, rows)) for rows in parts]
        parameters, likelihood = state.log_parameters, self.likelihood_at(state.sweep)
        if state.sweep >= WARM_UP and len(parameters):
            bounds = likelihood.bounds(parameters)
            parameters = maximize(partial(self._expected, likelihood), parameters, bounds, LEARN_STEPS, seen, total)
        expected = total(self._expected(likelihood, parameters, part)[None] for part in seen)[0]
        rows = [self._with_sites(part, state.sweep + 1, parameters, *moments) for part, *moments in seen]
        n_rows = total(part.entries.count.sum()[None] for part in parts)[0]
        expected = expected - n_rows * self.log_scale
        return state._replace(log_parameters=parameters, expected=expected, sweep=state.sweep + 1), rows

    def bound(self, state: NonNegativeState) -> Tensor:
        """Evidence lower bound, with the log density of the columns' rates; a scalar."""
        shape, rate = self.relevance_prior
        bound = state.expected
        for table, hyper in zip(state.tables, state.hyper, strict=True):
            assert isinstance(table, RectifiedNormals)
            bound = bound - table.divergence(hyper.exp()) + (shape * hyper - rate * hyper.exp()).sum()
        return bound

    def likelihood_at(self, sweep: int) -> Likelihood:
        """The likelihood of a sweep."""
        return self.likelihood if sweep >= LIGHT_TAILS else self.likelihood.light_tailed()

    def at_rows(self, state: NonNegativeState, rows: ValueRows) -> tuple[Tensor, Tensor]:
        """Mean and variance (n,) of ``f`` at the rows."""
        one = rows.entries.value.new_ones(self.rank)
        means, variances = [t.mean for t in state.tables], [t.variance for t in state.tables]
        return moments_at(means, variances, rows.positions, (one, 0 * one))

    @staticmethod
    def _expected(likelihood: Likelihood, parameters: Tensor, part: tuple[ValueRows, Tensor, Tensor]) -> Tensor:
        rows, mean, variance = part
        return likelihood.expected_log_prob(parameters, rows.entries, mean, variance).sum()

    def _with_sites(self, rows: ValueRows, sweep: int, parameters: Tensor, mean: Tensor, variance: Tensor) -> ValueRows:
        """Rows with the sites of a sweep that comes."""
        sites = self.likelihood_at(sweep).sites(parameters, rows.entries, mean, variance)
        return ValueRows(rows.positions, rows.entries, sites)
