"""Functional Bayesian CP and Tucker: the model's mathematics, for the rows that are at hand.

Model: ``y_n ~ N(f_n, 1 / tau)``, ``f_n = W x_1 u^1(x_n^1) … x_K u^K(x_n^K)``, ``tau ~ Gamma``, ``vec(W) ~ N(0, I)`` for
Tucker and superdiagonal ones for CP; the latent functions have the priors of `latent_functions`, all of mean zero.

**Main effects.** Some columns of a factor may be fixed at one instead of being a latent function
(`FunctionalTucker.free`). CP gets one component more per mode, free in that mode and one elsewhere: the mode's main
effect. Tucker gets a column of ones in each mode, so that its core holds the constant, the main effects and all
interactions of fewer modes.

**Posterior.** ``q(W) q(tau) prod_k q(u^k)``. Each *block* in turn is set to its optimum given the others, from sums
over rows (`local_statistics`), so that the bound never falls where nothing is damped.

References
----------
Fang, Yu, Wang, Li, Kirby, Zhe (2024), "Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor Data",
ICLR, section 4. Differences: the core has a prior and its covariance is used; rows carry no second prior.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from probtensor.contract import (
    CP,
    Structure,
    Tucker,
    core_statistics,
    multilinear,
    pack,
    pack_dual,
    packed_size,
    unpack,
    unpack_pairs,
)
from probtensor.gaussian import Gamma, Gaussian, from_natural, gaussian_kl, square_root, standard_normal
from probtensor.inference.kalman import Posterior, Sites
from probtensor.inference.maximize import maximize
from probtensor.models.latent_functions import LatentFunctions, Moments

__all__ = ["Block", "Factor", "FunctionalTucker", "Rows", "State"]

Block = int | Literal["core"]

CHUNK = 2**21  # numbers in the largest temporary of one chunk of rows
WARM_UP = 4  # sweeps before noise and hyperparameters move, so that no start is explained away as noise
LEARN_EVERY = 2  # sweeps from one step of the hyperparameters to the next
LEARN_STEPS = 3  # iterations of the optimiser in one such step
# Shares of the variance that a start takes for noise, in turn: a large share finds the few broad effects of noisy data,
# a small one keeps many components alive where data are precise. The bound decides.
START_NOISE = (0.02, 0.5)


class Rows(NamedTuple):
    """Observed entries of one rank: positions (K, n) int64 in the modes' coordinates, standardised values (n,)."""

    positions: Tensor
    values: Tensor


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


class State(NamedTuple):
    """Everything that the posterior is made of, and what the bound needs.

    Attributes
    ----------
    factors : tuple of Factor
    core : Gaussian or None
        ``q(W)``, vectorised in the order of the modes; None for CP.
    noise : Gamma
        ``q(tau)``, precision of the standardised values.
    squared_error : Tensor, scalar
        ``sum_n E (y_n - f_n)^2`` over all rows.
    n_rows, square : Tensor, scalars
        ``N`` and ``sum_n y_n^2`` over all rows.
    sweep : int
        Sweeps done.
    """

    factors: tuple[Factor, ...]
    core: Gaussian | None
    noise: Gamma
    squared_error: Tensor
    n_rows: Tensor
    square: Tensor
    sweep: int


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
    """

    functions: tuple[LatentFunctions, ...]
    free: tuple[Tensor, ...]
    form: Literal["cp", "tucker"]
    noise_prior: Gamma
    damping: float = 0.0
    learn: bool = True
    log_scale: float = 0.0

    @property
    def ranks(self) -> tuple[int, ...]:
        """Columns of each mode's factor, those of ones included."""
        return tuple(len(f) for f in self.free)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What a sweep updates, in this order; the noise comes last, in `end_sweep`."""
        modes = range(len(self.functions))
        return ("core", *modes) if self.form == "tucker" else tuple(modes)

    def local_start(self, rows: Rows) -> Tensor:
        """Sums over rows for the start, packed: count, squares, and by coordinate the count and sum of values."""
        n, y = rows.values.new_tensor([rows.values.shape[0]]), rows.values
        parts = [n, (y @ y)[None]]
        for f, position in zip(self.functions, rows.positions, strict=True):
            parts.append(torch.bincount(position, minlength=f.size).to(y))
            parts.append(torch.zeros(f.size, dtype=y.dtype, device=y.device).index_add_(0, position, y))
        return torch.cat(parts)

    def start(self, statistics: Tensor, generator: torch.Generator, trial: int = 0) -> State:
        """A start from data: smoothed means by mode are a column of its factor, the rest are draws from the prior."""
        n_rows, square = statistics[0], statistics[1]
        split = torch.split(statistics[2:], [f.size for f in self.functions for _ in range(2)])
        effects = [_smoothed_means(f, n, s) for f, n, s in zip(self.functions, split[::2], split[1::2], strict=True)]
        strength = [float((n * e**2).sum()) for n, e in zip(split[::2], effects, strict=True)]
        order = sorted(range(len(effects)), key=lambda k: -strength[k])
        factors = []
        for k, f in enumerate(self.functions):
            n_functions = int(self.free[k].sum())
            # Within their bounds: the optimiser would move them there first, and the bound could fall.
            hyper = torch.clamp(f.initial_hyperparameters(n_functions), *f.bounds(n_functions))
            nothing = _no_sites(f.size, hyper)
            posterior, _ = f.posterior(hyper, nothing)
            draw = f.sample(hyper, nothing, f.everywhere(), 1, generator)[0]
            mean = self._start_columns(k, order.index(k), effects[k], draw)
            zero = torch.zeros_like(square)
            factors.append(Factor(nothing, hyper, posterior, zero, mean, pack(mean[:, :, None] * mean[:, None, :])))
        core = None
        if self.form == "tucker":
            one = torch.eye(math.prod(self.ranks), dtype=square.dtype, device=square.device)
            core = Gaussian(torch.zeros_like(one[0]), one)
        a0, b0 = self.noise_prior
        noise = Gamma(a0 + n_rows / 2, b0 + 0.5 * START_NOISE[trial % len(START_NOISE)] * square)
        return State(tuple(factors), core, noise, square, n_rows, square, 0)

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
            sizes = [math.prod(map(packed_size, self.ranks)), math.prod(self.ranks)]
            total = rows.values.new_zeros(sum(sizes))
        else:
            structure, rank = self.structure(state), self.ranks[block]
            total = rows.values.new_zeros(self.functions[block].size, packed_size(rank) + rank)
        for chunk in self._chunks(rows.values.shape[0]):
            positions, y = rows.positions[:, chunk], rows.values[chunk]
            means = [f.mean.index_select(0, p) for f, p in zip(state.factors, positions, strict=True)]
            seconds = [f.second.index_select(0, p) for f, p in zip(state.factors, positions, strict=True)]
            if block == "core":
                precision, shift = core_statistics(means, seconds, y)
                total += torch.cat([precision.reshape(-1), shift.reshape(-1)])
            else:
                a, aa = structure.partial(block, means, seconds)
                total.index_add_(0, positions[block], torch.cat([aa, y[:, None] * a], dim=1))
        return total

    def update(self, state: State, block: Block, statistics: Tensor) -> State:
        """Set a block to its optimum given the others, from the sums over all rows."""
        if block == "core":
            return self._update_core(state, statistics)
        f, free, old = self.functions[block], self.free[block], state.factors[block]
        cut = packed_size(len(free))
        precision, shift = unpack(statistics[:, :cut]), statistics[:, cut:]
        # Columns of ones are known: what they explain moves to the other side.
        known = precision[:, free][:, :, ~free].sum(-1)
        tau = state.noise.mean
        sites = Sites(tau * precision[:, free][:, :, free], tau * (shift[:, free] - known))
        if self.damping:
            sites = Sites(*(torch.lerp(new, kept, self.damping) for new, kept in zip(sites, old.sites, strict=True)))
        hyper = old.log_hyperparameters
        if self.learn and state.sweep >= WARM_UP and state.sweep % LEARN_EVERY == 0:
            hyper = maximize(lambda h: f.log_normalizer(h, sites), hyper, f.bounds(hyper.shape[1]), LEARN_STEPS)
        factor = self.factor(block, sites, hyper)
        error = state.square - 2 * (shift * factor.mean).sum() + (pack_dual(precision) * factor.second).sum()
        factors = (*state.factors[:block], factor, *state.factors[block + 1 :])
        return state._replace(factors=factors, squared_error=error.clamp(min=0))

    def end_sweep(self, state: State) -> State:
        """Update the noise and count the sweep."""
        noise = state.noise
        if state.sweep >= WARM_UP:
            a0, b0 = self.noise_prior
            rate = b0 + 0.5 * state.squared_error
            noise = Gamma(a0 + state.n_rows / 2, torch.lerp(rate, noise.rate, self.damping) if self.damping else rate)
        return state._replace(noise=noise, sweep=state.sweep + 1)

    def bound(self, state: State) -> Tensor:
        """Evidence lower bound, a scalar: E log-likelihood less the divergences of all factors from their priors."""
        noise = state.noise
        log_density = 0.5 * (noise.mean_log - math.log(2 * math.pi)) - self.log_scale
        bound = state.n_rows * log_density - 0.5 * noise.mean * state.squared_error
        bound = bound - sum(f.divergence for f in state.factors) - noise.kl(self.noise_prior)
        return bound if state.core is None else bound - gaussian_kl(state.core)

    def factor(self, mode: int, sites: Sites, log_hyperparameters: Tensor) -> Factor:
        """Posterior of a mode from its sites and hyperparameters."""
        f = self.functions[mode]
        posterior, log_z = f.posterior(log_hyperparameters, sites)
        mean, covariance = f.moments(log_hyperparameters, posterior)
        second = covariance + mean[:, :, None] * mean[:, None, :]
        divergence = (sites.shift * mean).sum() - 0.5 * (sites.precision * second).sum() - log_z
        return Factor(
            sites, log_hyperparameters, posterior, divergence, *self._with_ones(mode, Moments(mean, covariance))
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
        moments = [self._with_ones(k, self.functions_at(state, k, x)) for k, (x, _) in enumerate(unique)]
        structure = self.structure(state)
        parts = []
        for chunk in self._chunks(coordinates[0].shape[0]):
            means = [m.index_select(0, i[chunk]) for (m, _), (_, i) in zip(moments, unique, strict=True)]
            seconds = [s.index_select(0, i[chunk]) for (_, s), (_, i) in zip(moments, unique, strict=True)]
            mean = structure.mean(means)
            parts.append((mean, (structure.second(seconds) - mean**2).clamp(min=0)))
        means_, variances = zip(*parts, strict=True)
        return torch.cat(means_), torch.cat(variances)

    def functions_at(self, state: State, mode: int, where: Tensor) -> Moments:
        """Moments of a mode's latent functions at coordinates (n,)."""
        factor = state.factors[mode]
        step = max(CHUNK // (3 * factor.log_hyperparameters.shape[1]) ** 2, 1)  # a state has up to 3 entries a function
        parts = [
            self.functions[mode].at(factor.log_hyperparameters, factor.sites, factor.posterior, where[a : a + step])
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
        tau = state.noise.mean
        precision = tau * unpack_pairs(statistics[:cut].reshape(packed_shape))
        one = torch.eye(precision.shape[0], dtype=precision.dtype, device=precision.device)
        precision, shift = precision + one, tau * statistics[cut:]
        if self.damping and state.core is not None:
            old = torch.linalg.inv(state.core.covariance)
            precision = torch.lerp(precision, old, self.damping)
            shift = torch.lerp(shift, old @ state.core.mean, self.damping)
        return state._replace(core=from_natural(precision, shift))

    def _with_ones(self, mode: int, moments: Moments) -> tuple[Tensor, Tensor]:
        """Mean (n, R) and packed second moment of all columns from the moments of the latent functions."""
        free = self.free[mode]
        index = free.nonzero().squeeze(-1)
        n, rank = moments.mean.shape[0], len(free)
        mean = moments.mean.new_ones(n, rank)
        mean[:, index] = moments.mean
        second = mean[:, :, None] * mean[:, None, :]
        second[:, index[:, None], index] += moments.covariance
        return mean, pack(second)

    def _start_columns(self, mode: int, place: int, effect: Tensor, draw: Tensor) -> Tensor:
        """Columns (T, R) to start a mode from; `place` is the mode's place when ordered by strength of main effect."""
        free = self.free[mode]
        mean = draw.new_ones(draw.shape[0], len(free))
        mean[:, free] = draw
        main_effects = not all(bool(f.all()) for f in self.free)
        scale = effect.square().mean().sqrt().clamp(min=1e-6)
        if self.form == "tucker":
            if main_effects or len(free) > 1:
                mean[:, 0], mean[:, 1] = 1.0, effect / scale
            elif place == 0:
                mean[:, 0] = effect / scale
            else:
                mean[:, 0] = 1.0
        elif main_effects:
            mean[:, len(free) - len(self.functions) + mode] = effect
        else:
            for r in range(min(len(free), len(self.functions))):
                mean[:, r] = 0.5 * draw[:, r] + (effect if r == place else 1.0)
        return mean

    def _chunks(self, n: int) -> Iterator[slice]:
        packed = [packed_size(r) for r in self.ranks]
        width = math.prod(packed) // min(packed) if self.form == "tucker" else packed[0]
        step = max(CHUNK // width, 1)
        return (slice(first, first + step) for first in range(0, max(n, 1), step))


def _smoothed_means(f: LatentFunctions, count: Tensor, total: Tensor) -> Tensor:
    """Mean value at each coordinate, smoothed by the prior's start, shape (T,)."""
    hyper = f.initial_hyperparameters(1)
    posterior, _ = f.posterior(hyper, Sites(count[:, None, None], total[:, None]))
    return f.moments(hyper, posterior).mean[:, 0]


def _no_sites(size: int, hyper: Tensor) -> Sites:
    rank = hyper.shape[1]
    return Sites(hyper.new_zeros(size, rank, rank), hyper.new_zeros(size, rank))
