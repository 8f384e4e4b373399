r"""Sparse coding with discrete causes that add up: the mathematics of BSC, TSC and DSC.

Model: ``p(s_h = phi_k) = pi_k`` for each of H causes, one of the values being 0, and ``y ~ N(W s, sigma^2 I)``; entries
of ``y`` may be missing. BSC has the values 0 and 1, TSC -1, 0 and 1 with ``pi`` shared by both signs, DSC any.

References
----------
Henniges, Puertas, Bornschein, Eggert, Lücke (2010), "Binary Sparse Coding", LVA/ICA. Exarchakis, Lücke (2017),
"Discrete Sparse Coding", Neural Computation 29(11).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from probtensor.inference.points import Points
from probtensor.inference.state_sets import Gram, Own, Selected, pursue

__all__ = ["LinearCoding", "LinearParameters", "noise_variance", "solve_rows"]


class LinearParameters(NamedTuple):
    """Parameters of `LinearCoding`.

    Attributes
    ----------
    W : Tensor, shape (D, H)
    log_prob : Tensor, shape (1 + V,)
        Of the value 0, then of each other value.
    variance : Tensor, scalar
        ``sigma^2``.
    """

    W: Tensor
    log_prob: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class LinearCoding:
    """The model. Pure functions of `LinearParameters`; holds no data.

    Attributes
    ----------
    values : tuple of float
        Values of a cause other than 0.
    tied : bool
        Whether all of them have one probability.
    """

    values: tuple[float, ...]
    tied: bool = False

    parameters = LinearParameters

    def start(self, W: Tensor, variance: Tensor, activity: float) -> LinearParameters:
        """First parameters, from a dictionary and the expected share of causes that are not 0."""
        V = len(self.values)
        return LinearParameters(W, W.new_tensor([1 - activity] + [activity / V] * V).log(), variance)

    def candidates(self, params: LinearParameters, points: Points, n_candidates: int) -> Tensor:
        """Causes that each raise the joint density most, given those before; shape (n_candidates, n)."""
        b, gram = self._messages(params, points)
        diagonal = gram.diagonal()
        odds = (params.log_prob[1:] - params.log_prob[0]).tolist()

        def best(left: Tensor) -> tuple[Tensor, Tensor]:
            gain, value = torch.full_like(left, -torch.inf), torch.zeros_like(left)
            for phi, log_odds in zip(self.values, odds, strict=True):
                alone = torch.add(phi * left, diagonal, alpha=-0.5 * phi**2) + log_odds
                value.masked_fill_(alone > gain, phi)
                gain = torch.maximum(gain, alone)
            return gain, value

        return pursue(b, gram, n_candidates, best)

    def log_joint(self, params: LinearParameters, points: Points, states: Selected | Own) -> Tensor:
        """``log p(y, s)`` of each point's states, shape (states, n)."""
        energy = states.energy(*self._messages(params, points))
        energy += self._log_prior(params, states)
        H = params.W.shape[1]
        constant = points.log_density_of_noise(params.variance) + H * params.log_prob[0]
        return energy.add_(constant)

    def statistics(self, params: LinearParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Sums over points for `update`, packed into one dimension."""
        mean, found = states.mean(q)
        second = states.second(found, points.seen)
        counts = states.counts(q, self.values)
        return torch.cat([x.reshape(-1) for x in (points.y.T @ mean.T, second, counts, *points.sums())])

    exact = True

    def update(
        self, params: LinearParameters, statistics: Tensor, masked: bool, correction: float = 1.0
    ) -> LinearParameters:
        """The M-step: the optimum of all parameters; see `TruncatedModel` for `correction`."""
        D, H = params.W.shape
        V = len(self.values)
        sizes = [D * H, D * H * H if masked else H * H, V, 1, 1, 1]
        first, second, counts, n_points, n_seen, square = torch.split(statistics, sizes)
        first = first.reshape(D, H)
        W, explained = solve_rows(first, second.reshape(-1, H, H), params.W)
        variance = noise_variance(square - explained, square, n_seen)
        prob = correction * counts / (n_points * H)
        prob = prob / prob.sum().clamp(min=1)
        if self.tied:
            prob = prob.mean().expand(V)
        tiny = torch.finfo(prob.dtype).tiny
        zero = (1 - prob.sum()).clamp(min=tiny)
        log_prob = torch.cat([zero[None], prob.clamp(min=tiny)]).log()
        return LinearParameters(W, log_prob, variance)

    def activity(self, params: LinearParameters) -> float:
        """Probability of a cause not to be 0."""
        return 1 - float(params.log_prob[0].exp())

    def towards(self, old: LinearParameters, new: LinearParameters, share: float) -> LinearParameters:
        """The new parameters with the dictionary a share of the way from the old one."""
        return new._replace(W=torch.lerp(old.W, new.W, share))

    def codes(self, params: LinearParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior mean of ``s``, shape (n, H)."""
        return states.mean(q)[0].T

    def reconstruct(self, params: LinearParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior mean of ``W s``, shape (n, D)."""
        return self.codes(params, points, states, q) @ params.W.T

    def renew(self, params: LinearParameters, component: int, direction: Tensor) -> LinearParameters:
        """Parameters with one column of the dictionary replaced."""
        W = params.W.clone()
        W[:, component] = direction
        return params._replace(W=W)

    def _messages(self, params: LinearParameters, points: Points) -> tuple[Tensor, Gram]:
        scaled = params.W / params.variance.sqrt()
        return scaled.T @ (points.y.T / params.variance.sqrt()), Gram(scaled, points.seen)

    def _log_prior(self, params: LinearParameters, states: Selected | Own) -> Tensor:
        odds = (params.log_prob[1:] - params.log_prob[0]).tolist()
        return states.log_prior(self.values, odds)


def noise_variance(error: Tensor, square: Tensor, n_seen: Tensor) -> Tensor:
    """Mean squared error, and not less than rounding leaves of the mean square: points may have no noise at all.

    Parameters
    ----------
    error, square, n_seen : Tensor, shape (1,)
        Expected squared error, sum of squares, and number, of the observed entries.

    Returns
    -------
    Tensor, scalar
    """
    kind = torch.finfo(error.dtype)
    return (torch.maximum(error, 8 * kind.eps * square) / n_seen).clamp(min=kind.tiny**0.75).squeeze(0)


def solve_rows(first: Tensor, second: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``W`` from ``W S = B``, and ``tr(W' B)``: what they explain of the sum of squares.

    Parameters
    ----------
    first : Tensor, shape (D, H)
        ``B = sum y <s>'``.
    second : Tensor, shape (1, H, H) or (D, H, H)
        ``S = sum <s s'>``, of all rows or of each.
    old : Tensor, shape (D, H)
        Kept where nothing is known.

    Returns
    -------
    W : Tensor, shape (D, H)
    explained : Tensor, shape (1,)
        ``2 tr(W'B) - tr(W S W')``.
    """
    scale = second.diagonal(dim1=1, dim2=2)
    used = scale > torch.finfo(scale.dtype).tiny ** 0.5
    size = torch.where(used, scale, torch.ones_like(scale)).sqrt()
    normal = second / (size[:, :, None] * size[:, None, :])
    one = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
    # A unit's own scale divided out, what no point tells of is pinned at its old value by a part in 10^12.
    pinned = one * torch.where(used, 1e3 * torch.finfo(first.dtype).eps, 1.0)[:, None, :]
    right = first / size + torch.where(used, 1e3 * torch.finfo(first.dtype).eps, 1.0) * (old * size)
    system = normal + pinned
    if len(second) == 1:
        W = torch.linalg.solve(system[0], right.T).T / size
    else:
        W = torch.linalg.solve(system, right[..., None]).squeeze(-1) / size
    explained = 2 * (W * first).sum() - ((W[:, None, :] @ second).squeeze(1) * W).sum()
    return W, explained[None]
