"""From noise-free entries to observations: the predictive side of a likelihood, cells and calibration included.

A new value of an entry with ``f ~ N(m, v)`` is ``y = f + g + e``: ``g`` the residual of its cell, shared by all rows of
that cell, ``e`` the noise of the row. Rows of a cell that was seen tell of ``g``: of ``value - f`` the share
``shrink`` recurs (`probtensor.likelihoods.StudentT.residual`). Where rows were held out to calibrate, the shape of the
distribution and the inflation of ``v`` are those of `probtensor.calibration`; else they are the likelihood's own.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probtensor.calibration import ScaleMixture, inflated
from probtensor.cells import find_cells
from probtensor.data import group_cells
from probtensor.gaussian import standard_normal
from probtensor.likelihoods import Entries, Likelihood
from probtensor.predictive import NormalMixture
from probtensor.predictive_base import weight_nodes

__all__ = ["Observation", "SeenCells", "draw_values"]


class SeenCells(NamedTuple):
    """What the rows of each cell say of its residual; tensors of shape (C,), and positions (C, K).

    Attributes
    ----------
    positions : Tensor, int64
    value : Tensor
        Mean of the cell's rows.
    shrink : Tensor
        Share of ``value - f`` that recurs.
    left : Tensor
        Variance of ``g`` given ``f``, for a weight of one.
    shape, rate : Tensor
        Of the gamma posterior of the cell's weight.
    n_rows, weight, scatter, log_weight : Tensor
        With `value`, its `Entries`: more rows may come.
    """

    positions: Tensor
    value: Tensor
    shrink: Tensor
    left: Tensor
    shape: Tensor
    rate: Tensor
    n_rows: Tensor
    weight: Tensor
    scatter: Tensor
    log_weight: Tensor

    @property
    def entries(self) -> Entries:
        """What the rows of each cell say."""
        return Entries(self.n_rows, self.weight, self.value, self.scatter, self.log_weight)


class Residual(NamedTuple):
    """Rows asked for, (n,) each: what recurs of the cell's residual, and variances for a weight of one."""

    cell: Tensor
    value: Tensor
    shrink: Tensor
    left: Tensor
    shape: Tensor
    rate: Tensor


@dataclass(frozen=True, eq=False)
class Observation:
    """How standardised values come from noise-free entries.

    Attributes
    ----------
    noise_variance : float
        Variance of ``e``, for a weight of one.
    nugget_variance : float
        Variance of ``g``, for a weight of one.
    dof : float
        Of the weights' gamma distribution; infinite where all weights are one.
    seen : SeenCells or None
        Cells whose residual is known in part.
    calibration : tuple of ScaleMixture
        Empty: not calibrated. One: for all rows. Two: for rows of new and of seen cells.
    """

    noise_variance: float
    nugget_variance: float
    dof: float
    seen: SeenCells | None
    calibration: tuple[ScaleMixture, ...] = ()

    def residual(self, positions: Tensor | None, like: Tensor) -> Residual:
        """What is known of the residuals of rows at positions (n, K); `like` (n,)."""
        zero = torch.zeros_like(like)
        half = zero + (0.5 * self.dof if np.isfinite(self.dof) else 1.0)
        new = Residual(zero.long() - 1, zero, zero, zero + self.nugget_variance, half, half)
        if self.seen is None or positions is None:
            return new
        cell = find_cells(self.seen.positions, positions)
        known, at = cell >= 0, cell.clamp(min=0)
        parts = zip(self.seen[1:6], new[1:], strict=True)
        return Residual(cell, *(torch.where(known, s[at], n) for s, n in parts))

    def moments(self, mean: Tensor, variance: Tensor, residual: Residual) -> tuple[Tensor, Tensor, Tensor]:
        """Location of ``y``, variances of what of ``f`` does not recur and of residual and noise, (n,)."""
        location = mean + residual.shrink * (residual.value - mean)
        latent = (1 - residual.shrink) ** 2 * variance
        return location, latent, (residual.left + self.noise_variance) * residual.rate / residual.shape

    def predictive(self, mean: Tensor, variance: Tensor, positions: Tensor | None) -> NormalMixture:
        """Distribution of new values.

        Parameters
        ----------
        mean, variance : Tensor, shape (n,)
            Moments of ``f``.
        positions : Tensor, shape (n, K), int64, or None
            Where the rows stand among the training coordinates; None only if no cell was seen.

        Returns
        -------
        NormalMixture
        """
        residual = self.residual(positions, mean)
        location, latent, noise = (x.cpu().numpy() for x in self.moments(mean, variance, residual))
        if not self.calibration:
            shape, rate = (x.cpu().numpy() for x in (residual.shape, residual.rate))
            if not np.isfinite(self.dof):
                return NormalMixture(location, np.sqrt(latent + noise)[:, None], np.ones(1))
            weight, probability = weight_nodes(shape, rate)
            scales = np.sqrt(latent[:, None] + (noise * shape / rate)[:, None] / weight)
            return NormalMixture(location, scales, probability)
        inflation, scales, weights = self._calibrated(residual.cell.cpu().numpy() >= 0)
        unit = np.sqrt(inflated(latent, inflation) + noise)
        return NormalMixture(location, unit[:, None] * scales, weights)

    def draw(
        self,
        f: Tensor,
        mean: Tensor,
        variance: Tensor,
        positions: Tensor | None,
        encoded: list[Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Joint draws of new values; rows of one cell share its residual.

        Parameters
        ----------
        f : Tensor, shape (n_samples, n)
            Joint draws of the noise-free entries.
        mean, variance : Tensor, shape (n,)
            Their moments.
        positions : Tensor, shape (n, K), int64, or None
            See `predictive`.
        encoded : list of Tensor, shape (n,)
            Coordinates: rows with the same ones are of one cell.
        generator : torch.Generator

        Returns
        -------
        Tensor, shape (n_samples, n)
        """
        residual = self.residual(positions, mean)
        codes = np.stack([np.unique(x.cpu().numpy(), return_inverse=True)[1] for x in encoded], axis=1)
        index, first = group_cells(codes.astype(np.int64))
        of_cell, first_row = torch.from_numpy(index).to(f.device), torch.from_numpy(first).to(f.device)
        size = (f.shape[0], len(first))
        shared = standard_normal(size, f, generator)[:, of_cell] * residual.left.sqrt()
        own = standard_normal(f.shape, f, generator) * self.noise_variance**0.5
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        location = mean + residual.shrink * (residual.value - mean)
        deviation = (1 - residual.shrink) * (f - mean)
        if self.calibration:
            inflation, scales, weights = self._calibrated(residual.cell.cpu().numpy() >= 0)
            weights = np.broadcast_to(weights, scales.shape)[first]
            chosen = (rng.random((*size, 1)) > weights.cumsum(axis=1)[None]).sum(axis=2).clip(max=scales.shape[1] - 1)
            scale = torch.from_numpy(scales[first][np.arange(len(first)), chosen]).to(f)[:, of_cell]
            latent = self.moments(mean, variance, residual)[1].cpu().numpy()
            growth = np.divide(inflated(latent, inflation), latent, out=inflation.copy(), where=latent > 0)
            spread = torch.from_numpy(np.sqrt(growth)).to(f) * deviation
            drawn: Tensor = location + scale * (spread + (shared + own) * (residual.rate / residual.shape).sqrt())
            return drawn
        drawn = shared + own
        if np.isfinite(self.dof):
            shape, rate = (x[first_row].cpu().numpy() for x in (residual.shape, residual.rate))
            weight = torch.from_numpy(rng.gamma(shape, 1 / rate, size=size)).to(f)
            drawn = drawn / weight.sqrt()[:, of_cell]
        return drawn + location + deviation

    def _calibrated(self, known: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        """Inflation (n,), scales (n, M) and weights (n, M) of rows whose cell is known, or not."""
        kinds = self.calibration if len(self.calibration) == 2 else self.calibration * 2
        M = max(len(kind.scales) for kind in kinds)
        scales, weights = np.ones((2, M)), np.zeros((2, M))
        for row, kind in enumerate(kinds):
            scales[row, : len(kind.scales)] = kind.scales.numpy()
            weights[row, : len(kind.scales)] = kind.weights.numpy()
        which = known.astype(int)
        return np.array([kind.inflation for kind in kinds])[which], scales[which], weights[which]


def draw_values(likelihood: Likelihood, log_parameters: Tensor, f: Tensor, generator: torch.Generator) -> Tensor:
    """One value for each draw of ``f`` (n_samples, n), offset included: counts and binary values."""
    flat = f.reshape(-1)
    known = likelihood.predictive(log_parameters, flat, torch.zeros_like(flat))
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    return torch.from_numpy(known.sample(1, rng).astype(float)).reshape(f.shape)
