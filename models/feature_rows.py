"""Rows of a categorical mode whose labels have features: what resembles a label says what its row is like.

The mean and the coefficients of the features are what a mode's rows share. Given these, rows are independent, so that
each label's site, its own part integrated out, is a site on them (`probtensor.models.white`); their joint posterior is
one Gaussian, and nothing is approximated.
"""

from collections.abc import Iterator
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from probtensor.contract import pack, pack_dual, packed_size, unpack
from probtensor.gaussian import square_root, standard_normal
from probtensor.inference import kalman
from probtensor.inference.kalman import Posterior, Sites
from probtensor.models.kernel_states import VARIANCES
from probtensor.models.latent_functions import MEAN_START, MEAN_VARIANCES, Given, LatentFunctions, Moments
from probtensor.models.white import add_white, draw_white, without_white

__all__ = ["MAX_UNKNOWNS", "FeatureRows"]

MAX_UNKNOWNS = 2048  # (p + 1) R of a mode: its equations are solved a few times a sweep
CHUNK = 2**22  # products of two features in one chunk of labels


class FeatureRows(LatentFunctions):
    """Rows ``u_i = m + W' x_i + e_i`` with ``m ~ N(0, C)``, ``W_f ~ N(0, F)``, ``e_i ~ N(0, V)``, all diagonal over R.

    Each of the R functions has its own three variances, learned, so that features may matter for one component and not
    for another. Without features it is `ExchangeableRows`. With T labels and p features an update takes
    ``T (p + 1)² R² + T R³ + ((p + 1) R)³`` operations: linear in labels, and as exact as without features.

    Hyperparameters are the logarithms of ``V``, ``C`` and ``F``. A position of T or more is that of a label that was
    never seen but has features; -1 that of a label without features, the last row of the table.

    Parameters
    ----------
    size : int
        Number of labels ``T``.
    features : Tensor, shape (N, p)
        Of the T labels, then of those that were never seen; of unit length on average, so that the variances compare.
    """

    def __init__(self, size: int, features: Tensor) -> None:
        self._size = size
        self._design = torch.cat([features.new_ones(len(features), 1), features], dim=1)

    @property
    def size(self) -> int:  # noqa: D102 - inherited
        return self._size

    @property
    def most_functions(self) -> int:
        """Latent functions R at most, by `MAX_UNKNOWNS`."""
        return MAX_UNKNOWNS // self._design.shape[1]

    def everywhere(self) -> Tensor:  # noqa: D102
        return torch.arange(self._size, device=self._design.device)

    def initial_hyperparameters(self, rank: int) -> Tensor:  # noqa: D102
        return self._design.new_tensor([0.0, log(MEAN_START), log(MEAN_START)])[:, None].repeat(1, rank)

    def bounds(self, rank: int) -> Tensor:  # noqa: D102
        pairs = [[log(low), log(high)] for low, high in (VARIANCES, MEAN_VARIANCES, MEAN_VARIANCES)]
        return self._design.new_tensor(pairs).T[:, :, None].expand(2, 3, rank)

    def named(self, log_hyperparameters: Tensor) -> dict[str, Tensor]:  # noqa: D102
        names = "variance", "mean_variance", "feature_variance"
        return dict(zip(names, log_hyperparameters.exp(), strict=True))

    def posterior(self, log_hyperparameters: Tensor, sites: Sites) -> tuple[Posterior, Tensor]:  # noqa: D102
        shared, log_z = self._shared(log_hyperparameters, *self._seen_by_shared(log_hyperparameters, sites))
        rows = self._rows(log_hyperparameters, sites, shared, self._design[: self._size])
        return Posterior(rows.mean[..., None], rows.covariance, *shared), log_z

    def log_normalizer(self, log_hyperparameters: Tensor, sites: Sites) -> Tensor:  # noqa: D102
        return self._shared(log_hyperparameters, *self._seen_by_shared(log_hyperparameters, sites))[1]

    def moments(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior) -> Moments:  # noqa: D102
        return Moments(posterior.mean.squeeze(-1), posterior.covariance)

    def coefficients(self, posterior: Posterior) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (p, R) of ``W``."""
        mean = posterior.shift
        return mean[1:], posterior.precision.diagonal().clamp(min=0).sqrt().reshape(mean.shape)[1:]

    def given(self, log_hyperparameters: Tensor, sites: Sites, here: Tensor) -> Given:  # noqa: D102
        others = Sites(*(x.index_fill(0, here, 0.0) for x in sites))
        total, _ = self._seen_by_shared(log_hyperparameters, others)
        design = self._design[here]

        def moments(now: Sites) -> Moments:
            mine, constant = self._seen_by_shared(log_hyperparameters, now, design)
            both = Sites(*(a + b for a, b in zip(mine, total, strict=True)))
            shared, _ = self._shared(log_hyperparameters, both, constant)
            return self._rows(log_hyperparameters, now, shared, design)

        return moments

    def at(self, log_hyperparameters: Tensor, sites: Sites, posterior: Posterior, where: Tensor) -> Moments:  # noqa: D102
        known = (where >= 0) & (where < self._size)
        at = torch.where(known, where, 0)
        mean, covariance = _linear(self._design[where], Moments(posterior.shift, posterior.precision))
        covariance = covariance + torch.diag(log_hyperparameters[0].exp())
        mean = torch.where(known[:, None], posterior.mean[at, :, 0], mean)
        return Moments(mean, torch.where(known[:, None, None], posterior.covariance[at], covariance))

    def sample(  # noqa: D102
        self, log_hyperparameters: Tensor, sites: Sites, where: Tensor, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        labels, position = torch.unique(where, return_inverse=True)
        (mean, covariance), _ = self._shared(log_hyperparameters, *self._seen_by_shared(log_hyperparameters, sites))
        normal = standard_normal((n_samples, mean.numel()), mean, generator)
        drawn = mean + (normal @ square_root(covariance)).reshape(-1, *mean.shape)  # (n_samples, p + 1, R)
        known = (labels >= 0) & (labels < self._size)
        at = torch.where(known, labels, 0)
        here = Sites(*(torch.where(known.reshape(-1, *[1] * (x.ndim - 1)), x[at], 0.0) for x in sites))
        return draw_white(log_hyperparameters[0].exp(), here, self._design[labels] @ drawn, generator)[:, position]

    def _rows(self, log_hyperparameters: Tensor, sites: Sites, shared: Moments, design: Tensor) -> Moments:
        """Moments of the rows that have these sites and features."""
        return Moments(*add_white(log_hyperparameters[0].exp(), sites, *_linear(design, shared)))

    def _seen_by_shared(
        self, log_hyperparameters: Tensor, sites: Sites, design: Tensor | None = None
    ) -> tuple[Sites, Tensor]:
        """The sites of rows, those of all labels by default, as one on mean and coefficients, and a log constant."""
        design = self._design[: self._size] if design is None else design
        of_means, constant = without_white(log_hyperparameters[0].exp(), sites)
        q, rank = design.shape[1], of_means.shift.shape[1]
        packed: Tensor = _SumOfPairs.apply(pack(of_means.precision), design)  # type: ignore[no-untyped-call]
        precision = unpack(unpack(packed).movedim(0, -1)).permute(2, 0, 3, 1)
        shift = design.T @ of_means.shift
        return Sites(precision.reshape(1, q * rank, q * rank), shift.reshape(1, q * rank)), constant

    def _shared(self, log_hyperparameters: Tensor, seen: Sites, constant: Tensor) -> tuple[Moments, Tensor]:
        """Posterior of mean and coefficients, (p + 1, R) and ((p + 1) R, (p + 1) R), and the log-normaliser of all."""
        _, of_mean, of_features = log_hyperparameters.exp()
        q, rank = self._design.shape[1], len(of_mean)
        prior = torch.diag(torch.cat([of_mean, of_features.repeat(q - 1)]))[None]
        nothing = torch.zeros_like(seen.shift)
        mean, covariance = kalman.condition(nothing[..., None], prior, seen.shift[..., None], seen.precision)
        log_z = kalman.site_log_normalizer(nothing, prior, seen).sum() + constant
        return Moments(mean.reshape(q, rank), covariance[0]), log_z


def _linear(design: Tensor, shared: Moments) -> tuple[Tensor, Tensor]:
    """Moments of ``m + W' x``, (n, R) and (n, R, R), at rows (n, p + 1) of the design."""
    mean, covariance = shared
    q, rank = mean.shape
    by_pair = pack(pack_dual(covariance.reshape(q, rank, q, rank).permute(1, 3, 0, 2)).movedim(-1, 0))
    parts = [_pairs(part) @ by_pair for part in _chunks(design)]
    return design @ mean, unpack(torch.cat(parts))


class _SumOfPairs(torch.autograd.Function):
    """``sum_i x_i,f x_i,g L_i`` of ``L`` (n, m), a row a pair ``f <= g``, shape (P, m); no pairs (n, P) are kept."""

    @staticmethod
    def forward(ctx: Any, each: Tensor, design: Tensor) -> Tensor:
        ctx.save_for_backward(design)
        total = each.new_zeros(packed_size(design.shape[1]), each.shape[1])
        first = 0
        for part in _chunks(design):
            total.addmm_(_pairs(part).T, each[first : first + len(part)])
            first += len(part)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (design,) = ctx.saved_tensors
        return torch.cat([_pairs(part) @ gradient for part in _chunks(design)]), None


def _pairs(design: Tensor) -> Tensor:
    """Products (n, P) of two features each."""
    row, column = torch.triu_indices(design.shape[1], design.shape[1], device=design.device)
    return design[:, row] * design[:, column]


def _chunks(design: Tensor) -> Iterator[Tensor]:
    """Runs of rows, at least one, of which pairs fit into memory."""
    step = max(CHUNK // packed_size(design.shape[1]), 1)
    return (design[first : first + step] for first in range(0, max(len(design), 1), step))
