"""Functional Bayesian CP and Tucker: the model's mathematics, for the rows that are at hand.

Model: ``y_n ~ N(f_n, 1 / (w_n tau))``, ``f_n = W x_1 u^1(x_n^1) … x_K u^K(x_n^K)``, ``tau ~ Gamma``,
``vec(W) ~ N(0, I)`` for Tucker and superdiagonal ones for CP; the latent functions have the priors of
`latent_functions`, all of mean zero.

**Main effects.** Some columns of a factor may be fixed at one instead of being a latent function
(`FunctionalTucker.free`). CP gets one component more per mode, free in that mode and one elsewhere: the mode's main
effect. Tucker gets a column of ones in each mode, so that its core holds the constant, the main effects and all
interactions of fewer modes.

**Posterior.** ``q(W) q(tau) prod_k q(u^k)``. Each *block* in turn is set to its optimum given the others, from sums
over rows (`local_statistics`), so that the bound never falls where nothing is damped.

**Other likelihoods.** With a `Likelihood`, each entry's factor ``p(y | f)`` is replaced by a Gaussian one,
``exp(shift f - precision f^2 / 2)``, renewed after every sweep from the moments of ``f``: the optimum of the weights
for a Student-t likelihood, a natural-gradient step (Khan and Lin 2017) for counts and binary values. The blocks see
Gaussian factors only.

References
----------
Fang, Yu, Wang, Li, Kirby, Zhe (2024), "Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor Data",
ICLR, section 4. Differences: the core has a prior and its covariance is used; rows carry no second prior.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from probtensor.blocks import Total, total_here
from probtensor.contract import (
    CP,
    Structure,
    Tucker,
    core_statistics,
    multilinear,
    pack,
    packed_size,
    products_at,
    unpack_pairs,
)
from probtensor.gaussian import Gamma, Gaussian, from_natural, gaussian_kl, square_root, standard_normal
from probtensor.inference.kalman import Sites
from probtensor.inference.maximize import maximize
from probtensor.likelihoods import Likelihood, StudentT
from probtensor.models.functional_mode import Mode
from probtensor.models.functional_start import local_start, no_sites, paired, start_columns
from probtensor.models.functional_state import Block, Factor, Rows, State, expected_log_prob, moments_at, side_by_side
from probtensor.models.latent_functions import GaussianProcess, Given, LatentFunctions, Moments, log_variance_prior

__all__ = ["FunctionalTucker"]

CHUNK = 2**16  # numbers a thread in the largest temporary of one chunk of rows: several stay in a core's own cache
GPU_CHUNK = 2**26  # there, each chunk costs launches
WARM_UP = 4  # sweeps before noise and hyperparameters move, so that no start is explained away as noise
LEARN_EVERY = 2  # sweeps from one step of the hyperparameters to the next
LEARN_STEPS = 3  # iterations of the optimiser in one such step
LIGHT_TAILS = 16  # sweeps of a heavy-tailed likelihood with Gaussian tails: else what few rows share is an outlier
CVI_DAMPING = 0.5  # share of the old Gaussian factor kept where the new one is a natural-gradient step, no optimum
COLD_SWEEPS = 8  # the first ones, in which each row counts `Likelihood.cold` times
# Shares of the variance that a start takes for noise, in turn: a large share finds the few broad effects of noisy data,
# a small one keeps many components alive where data are precise. The bound decides.
START_NOISE = (0.02, 0.5)


@dataclass(frozen=True, eq=False)
class FunctionalTucker:
    """The model. Pure functions of a `State`; holds no data.

    Attributes
    ----------
    functions : tuple of LatentFunctions
        Prior of each mode.
    free : tuple of Tensor, shape (R_k,), bool
        Which columns of each mode's factor are latent functions; the others are one everywhere.
    form : {"cp", "tucker"}
    noise_prior : Gamma
        Prior of ``tau``.
    damping : float
        Share of the old message kept, in [0, 1).
    learn : bool
        Whether hyperparameters are learned.
    log_scale : float
        Logarithm of the unit of the standardised values: the bound is that of the values in their own unit.
    likelihood : Likelihood or None
        None: Gaussian with precision ``tau``.
    offset : float
        Added to ``f`` in the likelihood: where counts or binary values have their mean.
    relevance_prior : tuple of float
        Shape and rate of the gamma prior on one over each function's variance: with a shape above 0, functions that
        explain nothing vanish.
    pairs : bool
        Whether CP components start as interactions of two modes each, in turn, with every one of all modes among them.
    """

    functions: tuple[LatentFunctions, ...]
    free: tuple[Tensor, ...]
    form: Literal["cp", "tucker"]
    noise_prior: Gamma
    damping: float = 0.0
    learn: bool = True
    log_scale: float = 0.0
    likelihood: Likelihood | None = None
    offset: float = 0.0
    relevance_prior: tuple[float, float] = (0.0, 0.0)
    pairs: bool = False

    @cached_property
    def modes(self) -> tuple[Mode, ...]:
        """What updates each mode's factor."""
        return tuple(Mode(f, free, self.damping) for f, free in zip(self.functions, self.free, strict=True))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Columns of each mode's factor, those of ones included."""
        return tuple(len(f) for f in self.free)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What a sweep updates, in this order; the noise comes last, in `end_sweep`."""
        # Coarse modes first: what few coordinates explain is not left to many. Where noise is small, what one mode's
        # effect has once taken never comes back to another's.
        modes = sorted(range(len(self.functions)), key=lambda k: self.functions[k].size)
        return ("core", *modes) if self.form == "tucker" else tuple(modes)

    def local_start(self, rows: Rows) -> Tensor:
        """Sums over rows that a start needs; see `functional_start`."""
        return local_start(self.functions, self._first_sites(rows, self._start_parameters(0.5, rows.values)))

    def start(self, statistics: Tensor, generator: torch.Generator, trial: int = 0) -> State:
        """A start from data: smoothed means by mode are a column of its factor, the rest are draws from the prior."""
        n_rows, square = statistics[0], statistics[1]
        columns = start_columns(self.functions, self.free, self.form, statistics, generator)
        factors = []
        for mode, (f, mean, free) in enumerate(zip(self.functions, columns, self.free, strict=True)):
            n_functions = int(free.sum())
            # Within their bounds: the optimiser would move them there first, and the bound could fall.
            hyper = torch.clamp(f.initial_hyperparameters(n_functions), *f.bounds(n_functions))
            if self.pairs and self.form == "cp":
                mean, hyper = paired(f, mode, mean, hyper, self.free)
            nothing = no_sites(f.size, hyper)
            posterior, _ = f.posterior(hyper, nothing)
            zero = torch.zeros_like(square)
            factors.append(Factor(nothing, hyper, posterior, zero, mean, pack(mean[:, :, None] * mean[:, None, :])))
        core = None
        if self.form == "tucker":
            one = torch.eye(math.prod(self.ranks), dtype=square.dtype, device=square.device)
            core = Gaussian(torch.zeros_like(one[0]), one)
        a0, b0 = self.noise_prior
        share = START_NOISE[trial % len(START_NOISE)]
        noise = Gamma(a0 + n_rows / 2, b0 + 0.5 * share * square)
        parameters = self._start_parameters(share, square)
        return State(tuple(factors), core, noise, square, n_rows, square, 0, parameters)

    def begin(self, state: State, rows: Rows) -> Rows:
        """Rows with their first Gaussian factors: at the offset for a new state, else where the state predicts."""
        if self.likelihood is None:
            return rows
        if state.sweep == 0:
            return self._first_sites(rows, state.log_parameters)
        return self._with_sites(rows, state.sweep - 1, state.log_parameters, *self.at_rows(state, rows))

    def likelihood_at(self, sweep: int) -> Likelihood:
        """The likelihood of a sweep: heavy tails wait until the factors have found what many rows share."""
        assert self.likelihood is not None
        return self.likelihood if sweep >= LIGHT_TAILS else self.likelihood.light_tailed()

    def structure(self, state: State) -> Structure:
        """Moments of the CP or Tucker form under the posterior."""
        if state.core is None:
            return CP()
        return Tucker(state.core.mean.reshape(self.ranks), state.core.covariance)

    def local_statistics(self, state: State, block: Block, rows: Rows) -> Tensor:
        """Sums over rows that the update of a block needs; to be summed over ranks.

        Returns
        -------
        Tensor
            For a mode, (T, P + R): packed ``sum E a a'`` and ``sum y E a`` of each coordinate. For the core, (prod P
            + prod R,).
        """
        if block == "core":
            return self._core_sums(state, rows)
        others = [k for k in range(len(self.ranks)) if k != block]
        if rows.groups is not None:
            from probtensor.contract_cuda import cp_sums  # it needs Triton, which only CUDA builds of torch bring

            factors = [state.factors[k] for k in others]
            moments = [f.mean for f in factors], [f.second for f in factors]
            return cp_sums(rows.groups[block], *moments, rows.values, rows.precision)
        rank, structure = self.ranks[block], self.structure(state)
        packed = packed_size(rank)
        total = rows.values.new_zeros(len(state.factors[block].mean), packed + rank)
        tables = side_by_side(state, others) if state.core is None else []
        for chunk in self.chunks(rows.values):
            positions, y = rows.positions[:, chunk], rows.values[chunk]
            if tables:
                terms = products_at(tables, positions[others])
            else:
                a, aa = structure.partial(block, *moments_at(state, positions))
                terms = torch.cat([aa, a], dim=1)
            terms[:, packed:].mul_(y[:, None])
            if rows.precision is not None:
                terms.mul_(rows.precision[chunk, None])
            total.index_add_(0, positions[block], terms)
        return total

    def _core_sums(self, state: State, rows: Rows) -> Tensor:
        sizes = [math.prod(map(packed_size, self.ranks)), math.prod(self.ranks)]
        total = rows.values.new_zeros(sum(sizes))
        for chunk in self.chunks(rows.values):
            weight = None if rows.precision is None else rows.precision[chunk]
            moments = moments_at(state, rows.positions[:, chunk])
            precision, shift = core_statistics(*moments, rows.values[chunk], weight)
            total += torch.cat([precision.reshape(-1), shift.reshape(-1)])
        return total

    def update(self, state: State, block: Block, statistics: Tensor) -> State:
        """Set a block to its optimum given the others, from the sums over all rows."""
        if block == "core":
            return self._update_core(state, statistics)
        mode, old, past, unit = self.modes[block], state.factors[block], state.past, self._unit(state)
        hyper = old.log_hyperparameters
        if past is not None:
            sites = mode.sites(statistics, unit, old.sites, past.sites[block])
            factor = self.factor_at_hand(block, old, sites, past.given[block])
            error = mode.squared_error(statistics, state.square, factor.mean, factor.second)
        else:
            if self.learn and state.sweep >= WARM_UP and state.sweep % LEARN_EVERY == 0:
                hyper = self.learned(block, mode.sites(statistics, unit, old.sites), hyper, state.sweep)
            factor, error = mode.optimum(statistics, unit, old.sites, hyper, state.square)
        factors = (*state.factors[:block], factor, *state.factors[block + 1 :])
        return state._replace(factors=factors, squared_error=error)

    def end_sweep(self, state: State, parts: Sequence[Rows], total: Total = total_here) -> tuple[State, list[Rows]]:
        """Update the noise, or the likelihood's parameters and all rows' Gaussian factors; count the sweep."""
        if self.likelihood is None:
            noise = state.noise
            if state.sweep >= WARM_UP:
                a0, b0 = self.noise_prior
                n_rows, error = state.n_rows, state.squared_error
                if state.past is not None:
                    n_rows, error = n_rows + state.past.n_rows, error + state.past.squared_error
                rate = b0 + 0.5 * error
                rate = torch.lerp(rate, noise.rate, self.damping) if self.damping else rate
                noise = Gamma(a0 + n_rows / 2, rate)
            return state._replace(noise=noise, sweep=state.sweep + 1), list(parts)
        seen = [(rows, *self.at_rows(state, rows)) for rows in parts]
        parameters = state.log_parameters
        if state.sweep >= WARM_UP and state.past is None:
            parameters = self.fitted_parameters(state, seen, total)
        likelihood = self.likelihood_at(state.sweep)
        expected = total(expected_log_prob(likelihood, parameters, part)[None] for part in seen)[0]
        renewed = [self._with_sites(rows, state.sweep, parameters, mean, variance) for rows, mean, variance in seen]
        return state._replace(log_parameters=parameters, expected=expected, sweep=state.sweep + 1), renewed

    def fitted_parameters(self, state: State, seen: Sequence[tuple[Rows, Tensor, Tensor]], total: Total) -> Tensor:
        """The likelihood's parameters after some steps uphill, given the moments of ``f`` at the rows."""
        likelihood, start = self.likelihood_at(state.sweep), state.log_parameters
        if not len(start):
            return start
        bounds = likelihood.bounds(start)
        return maximize(lambda p, part: expected_log_prob(likelihood, p, part), start, bounds, LEARN_STEPS, seen, total)

    def at_rows(self, state: State, rows: Rows) -> tuple[Tensor, Tensor]:
        """Mean and variance (n,) of ``f``, offset included, at the rows."""
        structure, packed = self.structure(state), packed_size(self.ranks[0])
        means, variances = rows.values.new_empty(rows.values.shape), rows.values.new_empty(rows.values.shape)
        tables = side_by_side(state, range(len(self.ranks))) if state.core is None else []
        for chunk in self.chunks(rows.values):
            if tables:
                found = products_at(tables, rows.positions[:, chunk])
                at = [found[:, packed:]], [found[:, :packed]]
            else:
                at = moments_at(state, rows.positions[:, chunk])
            mean, second = structure.mean(at[0]), structure.second(at[1])
            means[chunk], variances[chunk] = mean + self.offset, (second - mean**2).clamp(min=0)
        return means, variances

    def bound(self, state: State) -> Tensor:
        """Evidence lower bound, a scalar: E log-likelihood less the divergences of all factors from their priors."""
        bound = -state.n_rows * self.log_scale - sum(f.divergence for f in state.factors)
        factors = zip(self.functions, state.factors, strict=True)
        last = state.sweep - 1
        bound = bound + sum(self._log_relevance(f, factor.log_hyperparameters, last) for f, factor in factors)
        if state.core is not None:
            bound = bound - gaussian_kl(state.core)
        if state.expected is not None:
            return bound + state.expected
        noise = state.noise
        density = 0.5 * state.n_rows * (noise.mean_log - math.log(2 * math.pi)) - 0.5 * noise.mean * state.squared_error
        return bound + density - noise.kl(self.noise_prior)

    def factor(self, mode: int, sites: Sites, log_hyperparameters: Tensor) -> Factor:
        """Posterior of a mode from its sites and hyperparameters."""
        return self.modes[mode].factor(sites, log_hyperparameters)

    def factor_at_hand(self, mode: int, factor: Factor, sites: Sites, given: Given) -> Factor:
        """The factor with other sites at the coordinates of the rows at hand; see `Past`."""
        mean, second = self.modes[mode].with_ones(given(sites))
        return factor._replace(sites=sites, mean=mean, second=second)

    def learned(self, mode: int, sites: Sites, log_hyperparameters: Tensor, sweep: int) -> Tensor:
        """Hyperparameters of a mode after a step uphill, given its sites."""
        f = self.functions[mode]
        return maximize(
            lambda h: f.log_normalizer(h, sites) + self._log_relevance(f, h, sweep),
            log_hyperparameters,
            f.bounds(log_hyperparameters.shape[1]),
            LEARN_STEPS,
        )

    def predict(self, state: State, coordinates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of ``f``.

        Parameters
        ----------
        coordinates : sequence of Tensor, shape (n,)
            One a mode: coordinates of a continuous mode, positions (-1: unknown) of a categorical one.

        Returns
        -------
        mean, variance : Tensor, shape (n,)
        """
        unique = [torch.unique(x, return_inverse=True) for x in coordinates]
        moments = [self.modes[k].with_ones(self.functions_at(state, k, x)) for k, (x, _) in enumerate(unique)]
        structure = self.structure(state)
        parts = []
        for chunk in self.chunks(coordinates[0]):
            means = [m.index_select(0, i[chunk]) for (m, _), (_, i) in zip(moments, unique, strict=True)]
            seconds = [s.index_select(0, i[chunk]) for (_, s), (_, i) in zip(moments, unique, strict=True)]
            mean = structure.mean(means)
            parts.append((mean, (structure.second(seconds) - mean**2).clamp(min=0)))
        means_, variances = zip(*parts, strict=True)
        return torch.cat(means_), torch.cat(variances)

    def functions_at(self, state: State, mode: int, where: Tensor) -> Moments:
        """Moments of a mode's latent functions at coordinates (n,)."""
        factor = state.factors[mode]
        f, rank = self.functions[mode], factor.log_hyperparameters.shape[1]
        width = (f.state_size(rank) if isinstance(f, GaussianProcess) else rank) ** 2
        step = max(_chunk(where) // width, 1)
        parts = [
            f.at(factor.log_hyperparameters, factor.sites, factor.posterior, where[a : a + step])
            for a in range(0, max(len(where), 1), step)
        ]
        return Moments(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def sample(self, state: State, coordinates: Sequence[Tensor], n_samples: int, generator: torch.Generator) -> Tensor:
        """Joint draws of ``f``, shape (n_samples, n): functions and core are drawn once a sample."""
        factors = []
        for mode, x in enumerate(coordinates):
            where, index = torch.unique(x, return_inverse=True)
            factor = state.factors[mode]
            drawn = self.functions[mode].sample(factor.log_hyperparameters, factor.sites, where, n_samples, generator)
            columns = drawn.new_ones(n_samples, where.shape[0], self.ranks[mode])
            columns[:, :, self.free[mode]] = drawn
            factors.append((columns, index))
        if state.core is None:
            return torch.stack([CP().mean([c[s, index] for c, index in factors]) for s in range(n_samples)])
        core, covariance = state.core
        normal = standard_normal((n_samples, len(core)), core, generator)
        cores = core + normal @ square_root(covariance).T
        return torch.stack(
            [multilinear(cores[s].reshape(self.ranks), [c[s, index] for c, index in factors]) for s in range(n_samples)]
        )

    def _update_core(self, state: State, statistics: Tensor) -> State:
        packed_shape = [packed_size(r) for r in self.ranks]
        cut = math.prod(packed_shape)
        tau = self._unit(state)
        precision = tau * unpack_pairs(statistics[:cut].reshape(packed_shape))
        one = torch.eye(precision.shape[0], dtype=precision.dtype, device=precision.device)
        precision, shift = precision + one, tau * statistics[cut:]
        if state.past is not None and state.past.core is not None:
            precision, shift = precision + state.past.core[0], shift + state.past.core[1]
        if self.damping and state.core is not None:
            old = torch.linalg.inv(state.core.covariance)
            precision = torch.lerp(precision, old, self.damping)
            shift = torch.lerp(shift, old @ state.core.mean, self.damping)
        return state._replace(core=from_natural(precision, shift))

    def _unit(self, state: State) -> Tensor:
        """What the rows' precisions are measured in."""
        return state.noise.mean if self.likelihood is None else torch.ones_like(state.square)

    def _start_parameters(self, share: float, like: Tensor) -> Tensor:
        return like.new_zeros(0) if self.likelihood is None else self.likelihood.start(share, like)

    def _first_sites(self, rows: Rows, parameters: Tensor) -> Rows:
        if self.likelihood is None:
            return rows
        assert rows.entries is not None
        nowhere = torch.full_like(rows.entries.value, self.offset)
        return self._with_sites(rows, 0, parameters, nowhere, torch.zeros_like(nowhere), first=True)

    def _with_sites(
        self,
        rows: Rows,
        sweep: int,
        parameters: Tensor,
        mean: Tensor,
        variance: Tensor,
        first: bool = False,
    ) -> Rows:
        """Rows whose Gaussian factors stand for the likelihood near ``N(mean, variance)``, after a sweep."""
        assert rows.entries is not None
        likelihood = self.likelihood_at(sweep)
        precision, shift = likelihood.sites(parameters, rows.entries, mean, variance)
        if rows.before is not None:
            assert isinstance(likelihood, StudentT)
            known = likelihood.known_part(parameters, rows.entries, rows.before, precision)
            precision, shift = precision - known[0], shift - known[1]
        shift = shift - precision * self.offset
        if sweep < COLD_SWEEPS:
            precision, shift = likelihood.cold * precision, likelihood.cold * shift
        if not (likelihood.exact or first) and rows.precision is not None:
            keep = max(self.damping, CVI_DAMPING)
            shift = torch.lerp(shift, rows.precision * rows.values, keep)
            precision = torch.lerp(precision, rows.precision, keep)
        precision = precision.clamp(min=torch.finfo(precision.dtype).tiny ** 0.5)
        return rows._replace(values=shift / precision, precision=precision)

    def _log_relevance(self, f: LatentFunctions, log_hyperparameters: Tensor, sweep: int) -> Tensor:
        """Log density of the priors on the functions' variances; see `log_variance_prior`.

        Relevance waits for heavy tails: what outliers hide till then would vanish, and not come back.
        """
        waits = self.likelihood is not None and sweep < LIGHT_TAILS and self.likelihood_at(0) != self.likelihood
        return log_variance_prior(f, log_hyperparameters, (0.0, 0.0) if waits else self.relevance_prior)

    def chunks(self, like: Tensor) -> Iterator[slice]:
        """Slices of the rows of a tensor (n,), each small enough for its largest temporary."""
        packed = [packed_size(r) for r in self.ranks]
        width = math.prod(packed) // min(packed) if self.form == "tucker" else packed[0]
        n, step = like.shape[0], max(_chunk(like) // width, 1)
        return (slice(first, first + step) for first in range(0, max(n, 1), step))


def _chunk(like: Tensor) -> int:
    return GPU_CHUNK if like.is_cuda else CHUNK * torch.get_num_threads()
