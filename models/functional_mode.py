"""One mode of the functional tensor model: from the sums over rows to the mode's factor.

Tensors go in and come out, and no number is looked at on the way: on a GPU the whole update runs as one graph.
"""

import torch
from torch import Tensor

from probtensor.contract import pack, pack_dual, packed_size, unpack
from probtensor.cuda_graphs import Captured
from probtensor.inference.kalman import Posterior, Sites
from probtensor.models.feature_rows import FeatureRows
from probtensor.models.functional_state import Factor
from probtensor.models.latent_functions import LatentFunctions, Moments

__all__ = ["Mode"]

GRAPH_SIZE = 2**20  # numbers among the sums of a graph: with more, launches cost little, and its memory is its alone


class Mode:
    """A mode's latent functions, and the columns of ones beside them.

    Parameters
    ----------
    functions : LatentFunctions
        Their prior.
    free : Tensor, shape (R,), bool
        Which columns of the factor are latent functions; the others are one everywhere.
    damping : float
        Share of the old sites kept, in [0, 1).
    """

    def __init__(self, functions: LatentFunctions, free: Tensor, damping: float) -> None:
        self.functions = functions
        self._rank = rank = len(free)
        self._damping = damping
        self._free, ones = free.nonzero().squeeze(-1), (~free).nonzero().squeeze(-1)
        # Where the entries of matrices lie among the sums: of free columns, and of free ones with those of ones.
        packed = unpack(torch.arange(packed_size(rank), device=free.device))[self._free]
        self._pairs, self._beside = packed[:, self._free], packed[:, ones]
        self._packed_pairs = pack(self._pairs)
        self._weights = pack_dual(torch.ones(rank, rank, dtype=torch.int64, device=free.device))
        self._captured = Captured(self._optimum)

    def sites(self, statistics: Tensor, unit: Tensor, old: Sites, past: Sites | None = None) -> Sites:
        """What the rows say of the latent functions.

        Parameters
        ----------
        statistics : Tensor, shape (T, P + R)
            Sums over all rows: packed ``sum E a a'`` and ``sum y E a`` of each coordinate.
        unit : Tensor, scalar
            What the rows' precisions are measured in.
        old : Sites
            Of the update before, for damping.
        past : Sites, optional
            What earlier rows said.
        """
        # Columns of ones are known: what they explain moves to the other side.
        shift = statistics[:, packed_size(self._rank) + self._free] - statistics[:, self._beside].sum(-1)
        new = Sites(unit * statistics[:, self._pairs], unit * shift)
        if past is not None:
            new = Sites(*(x + then for x, then in zip(new, past, strict=True)))
        if not self._damping:
            return new
        return Sites(*(torch.lerp(x, kept, self._damping) for x, kept in zip(new, old, strict=True)))

    def factor(self, sites: Sites, log_hyperparameters: Tensor) -> Factor:
        """Posterior of the mode from its sites and hyperparameters."""
        posterior, log_z = self.functions.posterior(log_hyperparameters, sites)
        moments = self.functions.moments(log_hyperparameters, sites, posterior)
        second = moments.covariance + moments.mean[:, :, None] * moments.mean[:, None, :]
        divergence = (sites.shift * moments.mean).sum() - 0.5 * (sites.precision * second).sum() - log_z
        return Factor(sites, log_hyperparameters, posterior, divergence, *self.with_ones(moments))

    def with_ones(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Mean (n, R) and packed second moment of all columns from the moments of the latent functions."""
        mean = moments.mean.new_ones(moments.mean.shape[0], self._rank)
        mean[:, self._free] = moments.mean
        second = pack(mean[:, :, None] * mean[:, None, :])
        second[:, self._packed_pairs] += pack(moments.covariance)
        return mean, second

    def squared_error(self, statistics: Tensor, square: Tensor, mean: Tensor, second: Tensor) -> Tensor:
        """``sum_n w_n E (y_n - f_n)^2`` over all rows, a scalar, from that of the values alone and the factor."""
        cut = packed_size(self._rank)
        error: Tensor = square - 2 * (statistics[:, cut:] * mean).sum()
        return (error + (self._weights * statistics[:, :cut] * second).sum()).clamp(min=0)

    def optimum(
        self, statistics: Tensor, unit: Tensor, old: Sites, log_hyperparameters: Tensor, square: Tensor
    ) -> tuple[Factor, Tensor]:
        """The factor that is best for the `sites` of the sums, and the `squared_error` with it."""
        # Systems beyond `linalg_cuda`'s, as features have them, go to libraries that a graph may not hold.
        small = statistics.numel() <= GRAPH_SIZE and not isinstance(self.functions, FeatureRows)
        as_graph = statistics.is_cuda and small
        update = self._captured if as_graph else self._optimum
        found = update(statistics, unit, *old, log_hyperparameters, square)
        sites, posterior = Sites(*found[:2]), Posterior(*found[2:6])
        divergence, mean, second, error = found[6:]
        return Factor(sites, log_hyperparameters, posterior, divergence, mean, second), error

    def _optimum(
        self,
        statistics: Tensor,
        unit: Tensor,
        old_precision: Tensor,
        old_shift: Tensor,
        log_hyperparameters: Tensor,
        square: Tensor,
    ) -> tuple[Tensor, ...]:
        sites = self.sites(statistics, unit, Sites(old_precision, old_shift))
        factor = self.factor(sites, log_hyperparameters)
        error = self.squared_error(statistics, square, factor.mean, factor.second)
        return *sites, *factor.posterior, factor.divergence, factor.mean, factor.second, error
