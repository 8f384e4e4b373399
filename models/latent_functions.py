"""Priors of a mode's latent functions, and their posteriors under Gaussian sites.

A mode has ``T`` distinct coordinates and ``R`` latent functions. Whatever the prior, it answers the same few questions;
continuous modes answer them with a state-space Gaussian process, categorical modes with exchangeable rows.

Hyperparameters are one tensor of logarithms a mode, so that an optimiser can step in any direction.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.gaussian import square_root, standard_normal
from probtensor.inference import kalman
from probtensor.inference.kalman import Chain, Posterior, Sites
from probtensor.kernels import Kernel, Sum, White
from probtensor.models.kernel_states import VARIANCES, Extent, kernel_state
from probtensor.models.state_space import Transition, block_diagonal
from probtensor.models.white import add_white, draw_white, without_white

__all__ = [
    "ExchangeableRows",
    "GaussianProcess",
    "Given",
    "LatentFunctions",
    "Moments",
    "latent_functions",
    "log_variance_prior",
]

Value = TypeVar("Value")

WHITE_START = 0.01  # variance of white parts at the start: more, and they take what smooth functions would explain
WHITE_VARIANCES = (1e-6, 1e4)
WHITE_RATIO = 0.01  # of a white part's variance to the smooth ones', up to which its prior is flat
MEAN_START = 0.01  # variance of what labels have in common
MEAN_VARIANCES = (1e-6, 1e4)


class Moments(NamedTuple):
    """Mean (n, R) and covariance (n, R, R) of the latent functions at n coordinates."""

    mean: Tensor
    covariance: Tensor


Given = Callable[[Sites], Moments]  # from the sites of some coordinates to the posterior moments there


class LatentFunctions(ABC):
    """The prior over one mode's latent functions. Stateless: hyperparameters, sites and posteriors are arguments."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of distinct coordinates ``T``."""

    @abstractmethod
    def everywhere(self) -> Tensor:
        """The T distinct coordinates, as `at` and `sample` take them."""

    @abstractmethod
    def initial_hyperparameters(self, rank: int) -> Tensor:
        """Logarithms to start from, shape (n_hyperparameters, R)."""

    @abstractmethod
    def bounds(self, rank: int) -> Tensor:
        """Lower and upper bounds of the logarithms, shape (2, n_hyperparameters, R)."""

    @abstractmethod
    def named(self, log_hyperparameters: Tensor) -> dict[str, Tensor]:
        """The hyperparameters by name, in the axis's unit, each of shape (R,)."""

    @abstractmethod
    def posterior(self, log_hyperparameters: Tensor, sites: Sites) -> tuple[Posterior, Tensor]:
        """Posterior given one site a coordinate (an opaque value for the methods below), and its log-normaliser."""

    @abstractmethod
    def log_normalizer(self, log_hyperparameters: Tensor, sites: Sites) -> Tensor:
        """Log of the integral of the prior times all sites, a scalar, differentiable."""

    @abstractmethod
    def moments(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior) -> Moments:
        """Posterior moments at the T coordinates."""

    @abstractmethod
    def given(self, log_hyperparameters: Tensor, sites: Sites, here: Tensor) -> Given:
        """What `posterior` and `moments` say at some coordinates, as a function of the sites there; others stay.

        `here` has the positions of these coordinates, sorted and distinct. The function's cost is that of so many
        coordinates.
        """

    @abstractmethod
    def at(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior, where: Tensor) -> Moments:
        """Posterior moments at n coordinates, seen or not."""

    @abstractmethod
    def sample(
        self, log_hyperparameters: Tensor, sites: Sites, where: Tensor, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        """Joint posterior draws at n coordinates, shape (n_samples, n, R)."""


class GaussianProcess(LatentFunctions):
    """Gaussian processes over a continuous axis, by the state-space form of their kernel; `White` parts need no state.

    Hyperparameters are the logarithms of those that the kernel names, for each component.

    Parameters
    ----------
    coordinates : Tensor, shape (T,)
        Sorted, distinct, in the axis's unit.
    kernel : Kernel
        What is believed of the functions.
    """

    def __init__(self, coordinates: Tensor, kernel: Kernel) -> None:
        self.coordinates = coordinates
        self.kernel = kernel
        first, last = float(coordinates[0]), float(coordinates[-1])
        smooth, self._white = _split_white(kernel)
        self._form = kernel_state(smooth, Extent(first + (last - first) / 2, last - first or 1.0, len(coordinates)))
        self._dim = len(self._form.observe)
        self._weights = coordinates.new_tensor([self._form.observe])
        self._selects = self._form.observe == (1.0,) + (0.0,) * (self._dim - 1)  # H takes the first of each d entries
        self._entries = slice(None, None, self._dim if self._selects else 1)  # of the state, that the functions need

    @property
    def size(self) -> int:  # noqa: D102 - inherited
        return self.coordinates.shape[0]

    def everywhere(self) -> Tensor:  # noqa: D102
        return self.coordinates

    def state_size(self, rank: int) -> int:
        """Entries of the state of `rank` functions: memory of `at` goes with the square of it, time with the cube."""
        return rank * self._dim

    def initial_hyperparameters(self, rank: int) -> Tensor:  # noqa: D102
        start = [math.log(value) for value in self._with_white(self._form.start(), WHITE_START)]
        return self.coordinates.new_tensor(start)[:, None].repeat(1, rank)

    def bounds(self, rank: int) -> Tensor:  # noqa: D102
        bounds = self._with_white(self._form.bounds(), WHITE_VARIANCES)
        pairs = [[math.log(low), math.log(high)] for low, high in bounds]
        return self.coordinates.new_tensor(pairs).T[:, :, None].expand(2, len(pairs), rank)

    def named(self, log_hyperparameters: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return dict(zip(self.kernel.hyperparameters, log_hyperparameters.exp(), strict=True))

    def chain(self, log_hyperparameters: Tensor, coordinates: Tensor) -> Chain:
        """The prior over the states of the smooth parts at given sorted coordinates."""
        start = self._prior(log_hyperparameters, coordinates[:1])
        steps = self._step(log_hyperparameters, torch.diff(coordinates))
        return Chain(
            torch.cat([torch.zeros_like(start), steps.matrix]),
            torch.cat([start, steps.noise]),
            self._observe(log_hyperparameters),
        )

    def posterior(self, log_hyperparameters: Tensor, sites: Sites) -> tuple[Posterior, Tensor]:  # noqa: D102
        chain = self.chain(log_hyperparameters, self.coordinates)
        smooth_sites, constant = self._smooth_sites(log_hyperparameters, sites)
        posterior = kalman.smooth(chain, smooth_sites)
        return posterior, kalman.log_normalizer(chain, smooth_sites, posterior) + constant

    def log_normalizer(self, log_hyperparameters: Tensor, sites: Sites) -> Tensor:  # noqa: D102
        smooth_sites, constant = self._smooth_sites(log_hyperparameters, sites)
        return kalman.log_normalizer(self.chain(log_hyperparameters, self.coordinates), smooth_sites) + constant

    def moments(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior) -> Moments:  # noqa: D102
        return self._observed(*kalman.condition(*posterior, self._entries), log_hyperparameters, sites)

    def given(self, log_hyperparameters: Tensor, sites: Sites, here: Tensor) -> Given:  # noqa: D102
        chain = self.chain(log_hyperparameters, self.coordinates)
        blocks = kalman.between(chain, self._smooth_sites(log_hyperparameters, sites)[0], here)

        def moments(now: Sites) -> Moments:
            smooth_sites, _ = self._smooth_sites(log_hyperparameters, now)
            posterior = kalman.smooth_between(blocks, chain.observe, smooth_sites)
            return self._observed(*kalman.condition(*posterior, self._entries), log_hyperparameters, now)

        return moments

    def at(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior, where: Tensor) -> Moments:  # noqa: D102
        # The state left of `where`, carried forward, meets the information right of it, carried back: what inserting
        # `where` as steps without a site would give.
        H = self._observe(log_hyperparameters)
        left = torch.searchsorted(self.coordinates, where, right=True) - 1
        right = left + 1
        has_left, has_right = left >= 0, right < self.size
        left, right = left.clamp(min=0), right.clamp(max=self.size - 1)

        forward = self._step(log_hyperparameters, torch.where(has_left, where - self.coordinates[left], 0.0))
        behind, _ = self._smooth_sites(log_hyperparameters, Sites(*(x[left] for x in sites)))
        known = kalman.information_of(H, behind)
        A, D = forward.matrix, H.shape[1]
        m, P = kalman.condition(posterior.mean[left], posterior.covariance[left], known[..., D:], known[..., :D])
        prior = self._prior(log_hyperparameters, where)  # left of all coordinates, that of `where` itself
        mean = torch.where(has_left[:, None, None], A @ m, 0.0)
        covariance = torch.where(has_left[:, None, None], A @ P @ A.mT + forward.noise, prior)

        backward = self._step(log_hyperparameters, torch.where(has_right, self.coordinates[right] - where, 0.0))
        shift, precision = kalman.pull_back(*backward, posterior.shift[right], posterior.precision[right])
        shift = torch.where(has_right[:, None, None], shift, 0.0)
        precision = torch.where(has_right[:, None, None], precision, 0.0)
        seen = has_left & (self.coordinates[left] == where)
        here = Sites(*(torch.where(seen.reshape(-1, *[1] * (x.ndim - 1)), x[left], 0.0) for x in sites))
        found = kalman.condition(mean, covariance, shift, precision, self._entries)
        return self._observed(*found, log_hyperparameters, here)

    def sample(  # noqa: D102
        self, log_hyperparameters: Tensor, sites: Sites, where: Tensor, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        everywhere, position = torch.unique(torch.cat([self.coordinates, where]), return_inverse=True)
        rank = log_hyperparameters.shape[1]
        precision = where.new_zeros(everywhere.shape[0], rank, rank)
        shift = where.new_zeros(everywhere.shape[0], rank)
        seen, asked = position[: self.size], position[self.size :]
        precision[seen], shift[seen] = sites
        chain = self.chain(log_hyperparameters, everywhere)
        smooth_sites, _ = self._smooth_sites(log_hyperparameters, Sites(precision, shift))
        drawn = kalman.sample(chain, smooth_sites, n_samples, generator) @ chain.observe.T
        if self._white is not None:
            variance = log_hyperparameters[self._white].exp()
            drawn = draw_white(variance, Sites(precision, shift), drawn, generator)
        return drawn[:, asked]

    def _step(self, log_hyperparameters: Tensor, gaps: Tensor) -> Transition:
        matrix, noise = self._form.step(gaps, self._smooth(log_hyperparameters).exp())
        return Transition(block_diagonal(matrix), block_diagonal(noise))

    def _prior(self, log_hyperparameters: Tensor, coordinates: Tensor) -> Tensor:
        return block_diagonal(self._form.prior(coordinates, self._smooth(log_hyperparameters).exp()))

    def _observe(self, log_hyperparameters: Tensor) -> Tensor:
        one = torch.eye(log_hyperparameters.shape[1], dtype=self._weights.dtype, device=self._weights.device)
        return torch.kron(one, self._weights)

    def _observed(self, mean: Tensor, covariance: Tensor, log_hyperparameters: Tensor, sites: Sites) -> Moments:
        """The functions' moments from those of the states' `_entries`, (n, E, 1) and (n, E, E), and the sites there."""
        if not self._selects:
            H = self._observe(log_hyperparameters)
            mean, covariance = H @ mean, H @ covariance @ H.T
        mean = mean.squeeze(-1)
        if self._white is None:
            return Moments(mean, covariance)
        return Moments(*add_white(log_hyperparameters[self._white].exp(), sites, mean, covariance))

    def _smooth(self, log_hyperparameters: Tensor) -> Tensor:
        """The hyperparameters of all parts but the white one."""
        if self._white is None:
            return log_hyperparameters
        return torch.cat([log_hyperparameters[: self._white], log_hyperparameters[self._white + 1 :]])

    def _smooth_sites(self, log_hyperparameters: Tensor, sites: Sites) -> tuple[Sites, Tensor]:
        """The sites as the smooth parts see them, and the logarithm of the constant factors that are left."""
        if self._white is None:
            return sites, log_hyperparameters.new_zeros(())
        return without_white(log_hyperparameters[self._white].exp(), sites)

    def _with_white(self, smooth: list[Value], white: Value) -> list[Value]:
        """What belongs to each hyperparameter, from the smooth parts' and the white one's."""
        return smooth if self._white is None else [*smooth[: self._white], white, *smooth[self._white :]]


def _split_white(kernel: Kernel) -> tuple[Kernel, int | None]:
    """The kernel without its white part, and the row of this part's variance among the hyperparameters."""
    if not isinstance(kernel, Sum) or not any(isinstance(part, White) for part in kernel.parts):
        return kernel, None
    at = next(i for i, part in enumerate(kernel.parts) if isinstance(part, White))
    smooth = (*kernel.parts[:at], *kernel.parts[at + 1 :])
    row = sum(len(part.hyperparameters) for part in kernel.parts[:at])
    return smooth[0] if len(smooth) == 1 else Sum(smooth), row


class ExchangeableRows(LatentFunctions):
    """Rows of a categorical mode: ``u_i = m + e_i`` with ``m ~ N(0, C)``, ``e_i ~ N(0, V)``, both diagonal.

    The mean ``m`` is what labels have in common, so that a label that was never seen (position -1) has what the others
    say of it. Hyperparameters are the logarithms of ``V`` and ``C``.

    Parameters
    ----------
    size : int
        Number of labels.
    like : Tensor
        Gives dtype and device.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self._size = size
        self._like = like.new_empty(0)

    @property
    def size(self) -> int:  # noqa: D102 - inherited
        return self._size

    def everywhere(self) -> Tensor:  # noqa: D102
        return torch.arange(self._size, device=self._like.device)

    def initial_hyperparameters(self, rank: int) -> Tensor:  # noqa: D102
        return self._like.new_tensor([0.0, math.log(MEAN_START)])[:, None].repeat(1, rank)

    def bounds(self, rank: int) -> Tensor:  # noqa: D102
        pairs = [[math.log(low), math.log(high)] for low, high in (VARIANCES, MEAN_VARIANCES)]
        return self._like.new_tensor(pairs).T[:, :, None].expand(2, 2, rank)

    def named(self, log_hyperparameters: Tensor) -> dict[str, Tensor]:  # noqa: D102
        variance, mean_variance = log_hyperparameters.exp()
        return {"variance": variance, "mean_variance": mean_variance}

    def posterior(self, log_hyperparameters: Tensor, sites: Sites) -> tuple[Posterior, Tensor]:  # noqa: D102
        common, log_z = self._common(log_hyperparameters, sites)
        mean, covariance = self._rows(log_hyperparameters, sites, common)
        nothing = torch.zeros_like(mean)[..., None]
        return Posterior(mean[..., None], covariance, nothing, torch.zeros_like(covariance)), log_z

    def log_normalizer(self, log_hyperparameters: Tensor, sites: Sites) -> Tensor:  # noqa: D102
        return self._common(log_hyperparameters, sites)[1]

    def moments(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior) -> Moments:  # noqa: D102
        return Moments(posterior.mean.squeeze(-1), posterior.covariance)

    def given(self, log_hyperparameters: Tensor, sites: Sites, here: Tensor) -> Given:  # noqa: D102
        others = Sites(*(x.index_fill(0, here, 0.0) for x in sites))
        of_mean, _ = without_white(log_hyperparameters[0].exp(), others)
        total = Sites(*(x.sum(0, keepdim=True) for x in of_mean))

        def moments(now: Sites) -> Moments:
            common, _ = self._common(log_hyperparameters, now, total)
            return self._rows(log_hyperparameters, now, common)

        return moments

    def at(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior, where: Tensor) -> Moments:  # noqa: D102
        known, at = where >= 0, where.clamp(min=0)
        common, _ = self._common(log_hyperparameters, sites)
        new = common.covariance + torch.diag(log_hyperparameters[0].exp())
        mean = torch.where(known[:, None], posterior.mean[at, :, 0], common.mean)
        return Moments(mean, torch.where(known[:, None, None], posterior.covariance[at], new))

    def sample(  # noqa: D102
        self, log_hyperparameters: Tensor, sites: Sites, where: Tensor, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        labels, position = torch.unique(where, return_inverse=True)
        (mean, covariance), _ = self._common(log_hyperparameters, sites)
        normal = standard_normal((n_samples, *mean.shape, 1), mean, generator)
        common = mean + (square_root(covariance) @ normal).squeeze(-1)  # (n_samples, 1, R)
        seen, at = labels >= 0, labels.clamp(min=0)
        here = Sites(*(torch.where(seen.reshape(-1, *[1] * (x.ndim - 1)), x[at], 0.0) for x in sites))
        common = common.expand(-1, len(labels), -1)
        return draw_white(log_hyperparameters[0].exp(), here, common, generator)[:, position]

    def _rows(self, log_hyperparameters: Tensor, sites: Sites, common: Moments) -> Moments:
        """Moments of the rows that have these sites from those of the mean."""
        mean, covariance = (x.expand(len(sites.shift), *x.shape[1:]) for x in common)
        return Moments(*add_white(log_hyperparameters[0].exp(), sites, mean, covariance))

    def _common(self, log_hyperparameters: Tensor, sites: Sites, others: Sites | None = None) -> tuple[Moments, Tensor]:
        """Posterior of the mean, (1, R) and (1, R, R), and the log-normaliser of the whole.

        What `others` say of the mean is added to what the sites do.
        """
        variance, mean_variance = log_hyperparameters.exp()
        of_mean, constant = without_white(variance, sites)
        total = Sites(*(x.sum(0, keepdim=True) for x in of_mean))
        if others is not None:
            total = Sites(*(a + b for a, b in zip(total, others, strict=True)))
        nothing, prior = torch.zeros_like(total.shift), torch.diag(mean_variance)[None]
        mean, covariance = kalman.condition(nothing[..., None], prior, total.shift[..., None], total.precision)
        log_z = kalman.site_log_normalizer(nothing, prior, total).sum() + constant
        return Moments(mean.squeeze(-1), covariance), log_z


def latent_functions(axis: Axis, like: Tensor) -> LatentFunctions:
    """The prior that belongs to a fitted axis.

    Parameters
    ----------
    axis : Axis
        Fitted.
    like : Tensor
        Gives dtype and device.
    """
    match axis:
        case ContinuousAxis():
            return GaussianProcess(torch.tensor(axis.coordinates).to(like), axis.kernel)
        case CategoricalAxis():
            return ExchangeableRows(axis.size, like)
    raise TypeError(f"axis: expected ContinuousAxis or CategoricalAxis, got {type(axis).__name__}")


def log_variance_prior(f: LatentFunctions, log_hyperparameters: Tensor, relevance: tuple[float, float]) -> Tensor:
    """Log density, up to a constant, of the priors on the functions' variances; a scalar.

    A gamma prior on one over each function's variance, of the shape and rate `relevance`. And a prior on the share of
    white parts, which few coordinates cannot tell from smooth ones: ``(1 + ratio / WHITE_RATIO)^-1/2`` for the ratio of
    the two variances.
    """
    named = f.named(log_hyperparameters)
    white = named.pop("white_variance", None)
    variance = torch.stack([x for name, x in named.items() if name.endswith("variance")]).sum(0)
    density = log_hyperparameters.new_zeros(())
    if white is not None:
        density = density - 0.5 * torch.log1p(white / (WHITE_RATIO * variance)).sum()
        variance = variance + white
    shape, rate = relevance
    return density - (shape * variance.log() + rate / variance).sum()
