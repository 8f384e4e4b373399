r"""Mixtures in which one component makes each point: the mathematics of MoG and MoP.

Model: component h with probability ``pi_h``, then ``y ~ N(w_h, Sigma_h)`` or ``y_d ~ Poisson(W_dh)``. Where entries are
missing, they are integrated out, exactly.

States of a point are its H components: log joint densities and posteriors (responsibilities) are arrays (H, n).

**Sums about the old means.** Gaussian sums are those of ``y - w_h`` and its squares with ``w_h`` before the step:
nothing cancels where components are narrow and far from the origin.

References
----------
Dempster, Laird, Rubin (1977), "Maximum Likelihood from Incomplete Data via the EM Algorithm", JRSS B 39.
Ghahramani, Jordan (1994), "Supervised Learning from Incomplete Data via an EM Approach", NIPS 6.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from probtensor.inference.points import Points

__all__ = ["Covariance", "GaussianMixture", "GaussianParameters", "PoissonMixture", "PoissonParameters"]

Covariance = Literal["diag", "full", "spherical"]
CHUNK = 2**21  # numbers in an array of a matrix for each component and point


class GaussianParameters(NamedTuple):
    """Parameters of `GaussianMixture`.

    Attributes
    ----------
    W : Tensor, shape (D, H)
        Means.
    log_prob : Tensor, shape (H,)
        ``log pi``.
    covariance : Tensor, shape (H, D), (H, D, D) or (H,)
        Of each component: diagonal, full or spherical.
    floor : Tensor, shape (D,)
        Least variance of each entry.
    """

    W: Tensor
    log_prob: Tensor
    covariance: Tensor
    floor: Tensor


class PoissonParameters(NamedTuple):
    """Parameters of `PoissonMixture`.

    Attributes
    ----------
    W : Tensor, shape (D, H)
        Mean counts.
    log_prob : Tensor, shape (H,)
        ``log pi``.
    """

    W: Tensor
    log_prob: Tensor


class _Mixture:
    """What both have in common."""

    exact = True

    def codes(self, params: Any, points: Points, states: Any, q: Tensor) -> Tensor:
        """Responsibilities, shape (n, H)."""
        return q.T

    def reconstruct(self, params: Any, points: Points, states: Any, q: Tensor) -> Tensor:
        """Posterior mean of the mean of a point's component, shape (n, D)."""
        mean: Tensor = q.T @ params.W.T
        return mean

    def activity(self, params: Any) -> float:
        """Probability of a component to be the one."""
        return 1 / len(params.log_prob)

    def towards(self, old: Any, new: Any, share: float) -> Any:
        """The new parameters with the means a share of the way from the old ones."""
        return new._replace(W=torch.lerp(old.W, new.W, share))


@dataclass(frozen=True, eq=False)
class GaussianMixture(_Mixture):
    """The model. Pure functions of `GaussianParameters`; holds no data.

    Attributes
    ----------
    kind : {"diag", "full", "spherical"}
    """

    kind: Covariance

    parameters = GaussianParameters

    def start(self, W: Tensor, variance: Tensor, floor: Tensor) -> GaussianParameters:
        """First parameters: all components with the variances (D,) of the data."""
        H = W.shape[1]
        shapes = {"diag": variance, "full": torch.diag(variance), "spherical": variance.mean()}
        covariance = shapes[self.kind]
        log_prob = W.new_full((H,), -math.log(H))
        return GaussianParameters(W, log_prob, covariance.expand(H, *covariance.shape).clone(), floor)

    def features(self, y: Tensor, variance: Tensor) -> Tensor:
        """Points (n, D) in a space where distances between them say how alike they are."""
        return y if self.kind == "spherical" else y / variance.sqrt()

    def log_joint(self, params: GaussianParameters, points: Points, states: Any = None) -> Tensor:
        """``log p(y, h)``, shape (H, n)."""
        difference = self._difference(params, points)
        if self.kind == "full":
            quadratic, log_det = self._whitened(params, points, difference)
        else:
            variance = _of_entries(params)
            quadratic = (difference**2 @ (1 / variance)[:, :, None]).squeeze(-1)
            log_det = variance.log().sum(1)[:, None] if points.seen is None else variance.log() @ points.seen.T
        constant = points.n_seen() * math.log(2 * math.pi)
        return params.log_prob[:, None] - 0.5 * (quadratic + log_det + constant)

    def statistics(self, params: GaussianParameters, points: Points, states: Any, q: Tensor) -> Tensor:
        """Sums over points for `update`, packed into one dimension."""
        difference = self._difference(params, points)
        if self.kind == "full":
            parts = [q.sum(1), *self._completed(params, points, difference, q)]
        else:
            first = (q[:, None] @ difference).squeeze(1)
            second = (q[:, None] @ difference.square_()).squeeze(1)
            parts = [q.sum(1), first, second]
            if points.seen is not None:
                parts.append(q @ points.seen)
        return torch.cat([x.reshape(-1) for x in parts])

    def update(
        self, params: GaussianParameters, statistics: Tensor, masked: bool, correction: float = 1.0
    ) -> GaussianParameters:
        """The M-step: the optimum of all parameters, with no variance below its floor."""
        number, first, second, known = self._unpack(params, statistics, masked)
        tiny = torch.finfo(known.dtype).tiny ** 0.5
        used = known > tiny
        moved = torch.where(used, first / known.clamp(min=tiny), 0.0)  # (H, D)
        W = params.W + moved.T
        if self.kind == "full":
            second = second / number.clamp(min=tiny)[:, None, None] - moved[:, :, None] * moved[:, None, :]
            covariance = _at_least(0.5 * (second + second.mT), params.floor)
            covariance = torch.where((number > tiny)[:, None, None], covariance, params.covariance)
        elif self.kind == "diag":
            variance = torch.where(used, second / known.clamp(min=tiny) - moved**2, params.covariance)
            covariance = torch.maximum(variance, params.floor)
        else:
            total = known.sum(1)
            variance = (second - known * moved**2).sum(1) / total.clamp(min=tiny)
            covariance = torch.where(total > tiny, variance, params.covariance).clamp(min=float(params.floor.mean()))
        return GaussianParameters(W, _log_shares(number), covariance, params.floor)

    def carried(self, statistics: Tensor, old: GaussianParameters, new: GaussianParameters, masked: bool) -> Tensor:
        """Sums about the old means as sums about the new ones."""
        number, first, second, known = self._unpack(old, statistics, masked)
        step = (new.W - old.W).T
        after = first - known * step
        if self.kind == "full":
            outer = step[:, :, None] * after[:, None, :]
            second = second - outer - first[:, :, None] * step[:, None, :]
        else:
            second = second - step * (first + after)
        parts = [number, after, second, *([known] if masked and self.kind != "full" else [])]
        return torch.cat([x.reshape(-1) for x in parts])

    def softened(self, params: GaussianParameters, n_points: float) -> GaussianParameters:
        """Parameters learned from few points, as carefully as if some had come from the mean covariance."""
        D, H = params.W.shape
        prob = params.log_prob.exp()
        number = n_points * prob
        share = number / (number + (D if self.kind == "full" else 2))
        mean = self._pooled(params)
        share_of = share.reshape(H, *[1] * mean.ndim)
        return params._replace(
            log_prob=((number + 1) / (n_points + H)).log(),
            covariance=share_of * params.covariance + (1 - share_of) * mean,
        )

    def renew(self, params: GaussianParameters, component: int, direction: Tensor) -> GaussianParameters:
        """Parameters with one component begun anew at a point (D,)."""
        W, covariance = params.W.clone(), params.covariance.clone()
        W[:, component], covariance[component] = direction, self._pooled(params)
        return GaussianParameters(W, _with_share(params.log_prob, component), covariance, params.floor)

    def variances(self, params: GaussianParameters) -> Tensor:
        """Of each component and entry, shape (H, D)."""
        return params.covariance.diagonal(dim1=1, dim2=2) if self.kind == "full" else _of_entries(params)

    def _pooled(self, params: GaussianParameters) -> Tensor:
        H = len(params.log_prob)
        return (params.log_prob.softmax(0) @ params.covariance.reshape(H, -1)).reshape(params.covariance.shape[1:])

    def _difference(self, params: GaussianParameters, points: Points) -> Tensor:
        """``y - w_h``, 0 where missing, shape (H, n, D)."""
        difference = points.y - params.W.T[:, None]
        return difference if points.seen is None else difference.mul_(points.seen)

    def _unpack(
        self, params: GaussianParameters, statistics: Tensor, masked: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points of each component (H,), first and second sums, and observations of each entry (H, D)."""
        D, H = params.W.shape
        size = D * D if self.kind == "full" else D
        sizes = [H, H * D, H * size, len(statistics) - H * (1 + D + size)]
        number, first, second, known = statistics.split(sizes)  # type: ignore[no-untyped-call]
        observed = known.reshape(H, D) if len(known) else number[:, None].expand(H, D)
        shape = (H, D, D) if self.kind == "full" else (H, D)
        return number, first.reshape(H, D), second.reshape(shape), observed

    def _whitened(self, params: GaussianParameters, points: Points, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Mahalanobis distances and log determinants of what was observed, both (H, n)."""
        if points.seen is None:
            factor = torch.linalg.cholesky(params.covariance)
            white = torch.linalg.solve_triangular(factor, difference.mT, upper=False)
            return (white**2).sum(1), 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)[:, None]
        quadratic = difference.new_empty(difference.shape[:2])
        log_det = torch.empty_like(quadratic)
        for rows in self._chunks(params, points):
            _, which, inverse, of_pattern = _by_pattern(params.covariance, points.seen[rows])
            white = inverse[:, which] @ difference[:, rows, :, None]
            quadratic[:, rows], log_det[:, rows] = (white**2).sum((2, 3)), of_pattern[:, which]
        return quadratic, log_det

    def _completed(
        self, params: GaussianParameters, points: Points, difference: Tensor, q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """First (H, D) and second (H, D, D) sums of ``y - w_h``, what is missing given what was observed."""
        if points.seen is None:
            return (q[:, None] @ difference).squeeze(1), (difference * q[:, :, None]).mT @ difference
        covariance = params.covariance
        filled = torch.empty_like(difference)
        precision = torch.zeros_like(covariance)  # of what was observed, zero elsewhere, summed over points
        for rows in self._chunks(params, points):
            patterns, which, inverse, _ = _by_pattern(covariance, points.seen[rows])
            part = difference[:, rows]
            of_point = inverse[:, which]
            solved = (of_point.mT @ (of_point @ part[..., None])).squeeze(-1)
            filled[:, rows] = torch.where(points.seen[rows] > 0, part, solved @ covariance)
            weight = q.new_zeros(len(q), len(patterns)).index_add_(1, which, q[:, rows])
            precision += ((inverse.mT @ inverse) * weight[:, :, None, None]).sum(1)
        second = (filled * q[:, :, None]).mT @ filled
        second += q.sum(1)[:, None, None] * covariance - covariance @ precision @ covariance
        return (q[:, None] @ filled).squeeze(1), second

    def _chunks(self, params: GaussianParameters, points: Points) -> Iterator[slice]:
        """Stretches of the points, for each of which a matrix a component fits into memory."""
        D, H = params.W.shape
        size = max(1, CHUNK // (H * D * D))
        return (slice(start, start + size) for start in range(0, len(points.y), size))


@dataclass(frozen=True, eq=False)
class PoissonMixture(_Mixture):
    """The model. Pure functions of `PoissonParameters`; holds no data."""

    parameters = PoissonParameters

    def features(self, y: Tensor, variance: Tensor) -> Tensor:
        """Points (n, D) in a space where distances between them say how alike they are."""
        return 2 * y.sqrt()

    def log_joint(self, params: PoissonParameters, points: Points, states: Any = None) -> Tensor:
        """``log p(y, h)``, shape (H, n)."""
        total = params.W.sum(0)[:, None] if points.seen is None else params.W.T @ points.seen.T
        constant = torch.lgamma(points.y + 1).sum(1)  # 0 where missing
        return params.log_prob[:, None] + params.W.log().T @ points.y.T - total - constant

    def statistics(self, params: PoissonParameters, points: Points, states: Any, q: Tensor) -> Tensor:
        """Sums over points for `update`, packed into one dimension."""
        parts = [q.sum(1), q @ points.y, *([] if points.seen is None else [q @ points.seen])]
        return torch.cat([x.reshape(-1) for x in parts])

    def update(
        self, params: PoissonParameters, statistics: Tensor, masked: bool, correction: float = 1.0
    ) -> PoissonParameters:
        """The M-step: the optimum of all parameters; a mean of 0 stays a little above, for its logarithm."""
        D, H = params.W.shape
        sizes = [H, H * D, len(statistics) - H * (1 + D)]
        number, first, known = statistics.split(sizes)  # type: ignore[no-untyped-call]
        observed = known.reshape(H, D) if len(known) else number[:, None].expand(H, D)
        tiny = torch.finfo(first.dtype).tiny ** 0.5
        W = torch.where(observed > tiny, first.reshape(H, D) / observed.clamp(min=tiny), params.W.T)
        return PoissonParameters(W.clamp(min=tiny).T.contiguous(), _log_shares(number))

    def carried(self, statistics: Tensor, old: PoissonParameters, new: PoissonParameters, masked: bool) -> Tensor:
        """The sums themselves: they depend on parameters through responsibilities alone."""
        return statistics

    def softened(self, params: PoissonParameters, n_points: float) -> PoissonParameters:
        """Parameters learned from few points, as carefully as if each component had one more, the mean of all."""
        prob = params.log_prob.softmax(0)
        number = n_points * prob
        W = (params.W * number + (params.W @ prob)[:, None]) / (number + 1)
        return PoissonParameters(W, ((number + 1) / (number + 1).sum()).log())

    def renew(self, params: PoissonParameters, component: int, direction: Tensor) -> PoissonParameters:
        """Parameters with one component begun anew between a point (D,) and the mean."""
        W = params.W.clone()
        W[:, component] = 0.5 * (direction + params.W @ params.log_prob.softmax(0))
        return PoissonParameters(W, _with_share(params.log_prob, component))


def _of_entries(params: GaussianParameters) -> Tensor:
    """Variances (H, D) of diagonal or spherical covariances."""
    return params.covariance if params.covariance.ndim == 2 else params.covariance[:, None].expand_as(params.W.T)


def _log_shares(number: Tensor) -> Tensor:
    """Log of each component's share of the points; finite, also where it has none."""
    return (number / number.sum()).clamp(min=torch.finfo(number.dtype).tiny).log()


def _with_share(log_prob: Tensor, component: int) -> Tensor:
    """Log probabilities, where a component gets an equal share."""
    prob = log_prob.softmax(0)
    prob[component] = 1 / len(prob)
    return (prob / prob.sum()).log()


def _at_least(covariance: Tensor, floor: Tensor) -> Tensor:
    """The covariances (H, D, D) nearest in likelihood that nowhere fall below ``diag(floor)``."""
    scale = floor.sqrt()
    relative = covariance / (scale[:, None] * scale)
    one = torch.eye(len(floor), dtype=floor.dtype, device=floor.device)
    narrow = torch.linalg.cholesky_ex(relative - one).info != 0
    if not bool(narrow.any()):
        return covariance
    values, vectors = torch.linalg.eigh(relative[narrow])
    wide = (vectors * values.clamp(min=1.0)[:, None]) @ vectors.mT * (scale[:, None] * scale)
    result = covariance.clone()
    result[narrow] = 0.5 * (wide + wide.mT)
    return result


def _by_pattern(covariance: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of the covariances of what was observed, for each different set of observed entries.

    Parameters
    ----------
    covariance : Tensor, shape (H, D, D)
    seen : Tensor, shape (n, D)

    Returns
    -------
    patterns : Tensor, shape (P, D)
        Different rows of `seen`.
    which : Tensor, shape (n,), int64
    inverse : Tensor, shape (H, P, D, D)
        ``L`` with ``L'L`` the inverse of the covariance of observed entries, 0 for others.
    log_det : Tensor, shape (H, P)
    """
    patterns, which = torch.unique(seen, dim=0, return_inverse=True)
    both = patterns[:, :, None] * patterns[:, None, :]
    factor = torch.linalg.cholesky(covariance[:, None] * both + torch.diag_embed(1 - patterns))
    one = torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)
    inverse = torch.linalg.solve_triangular(factor, one, upper=False) * patterns[:, None, :]
    return patterns, which, inverse, 2 * factor.diagonal(dim1=2, dim2=3).log().sum(2)
