r"""Sparse coding with binary causes of which the strongest wins: the mathematics of MCA and MMCA.

Model: ``s_h ~ Bernoulli(pi)``, ``y_d ~ N(w_d(s), sigma^2)``, where ``w_d(s)`` is that ``W_dh`` among the active causes
whose magnitude is largest, with its sign, and 0 where no cause is active. MCA keeps ``W >= 0``.

**No array of points, states and entries.** In entry d, cause c wins in the states that contain c but none of the
stronger causes. With ``U`` the set of c and the stronger ones, that is ``[s meets U] - [s meets U \ c]``, so that a
state's squared error is a sum over sets ``U`` of candidates, of which there are ``2^C``: entries are added up by set
first, and one product with the table "state meets set" serves all states. Expectations go the same way back.

References
----------
Lücke, Sahani (2008), "Maximal Causes for Non-linear Component Extraction", JMLR 9. Bornschein, Henniges, Lücke (2013),
"Are V1 Simple Cells Optimized for Visual Occlusions?", PLoS Computational Biology 9(6). Here the maximum itself is the
model, at every temperature, not a soft one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from probtensor.inference.points import Points
from probtensor.inference.state_sets import Own, Selected
from probtensor.models.linear_coding import noise_variance

__all__ = ["MaxCoding", "MaxParameters"]


class MaxParameters(NamedTuple):
    """Parameters of `MaxCoding`.

    Attributes
    ----------
    W : Tensor, shape (D, H)
    log_prob : Tensor, shape (2,)
        Of a cause being off, and on.
    variance : Tensor, scalar
        ``sigma^2``.
    """

    W: Tensor
    log_prob: Tensor
    variance: Tensor


class _Winners(NamedTuple):
    """Who wins where: arrays (D, C, n) over entries, candidates and points.

    Attributes
    ----------
    with_it, without_it : Tensor, int64
        Number of the set of candidates that are as strong or stronger, and of that set without the candidate itself.
    gain : Tensor
        What the squared error changes by where the candidate wins, against no cause at all.
    """

    with_it: Tensor
    without_it: Tensor
    gain: Tensor


@dataclass(frozen=True, eq=False)
class MaxCoding:
    """The model. Pure functions of `MaxParameters`; holds no data.

    Attributes
    ----------
    signed : bool
        Whether dictionary entries may be negative (MMCA).
    """

    signed: bool

    parameters = MaxParameters

    def start(self, W: Tensor, variance: Tensor, activity: float) -> MaxParameters:
        """First parameters, from a dictionary and the expected share of active causes."""
        W = W if self.signed else W.clamp(min=0)
        return MaxParameters(W, W.new_tensor([1 - activity, activity]).log(), variance)

    def candidates(self, params: MaxParameters, points: Points, n_candidates: int) -> Tensor:
        """Causes that fit a point best; for MCA where they do not exceed it, since others may add the rest."""
        if self.signed:
            misfit = _alone(params.W, points)
        else:
            over = (params.W[:, :, None] - points.y.T[:, None]).clamp(min=0)
            misfit = (over if points.seen is None else over * points.seen.T[:, None]).sum(0)
        return misfit.topk(n_candidates, dim=0, largest=False).indices.sort(dim=0).values

    def log_joint(self, params: MaxParameters, points: Points, states: Selected | Own) -> Tensor:
        """``log p(y, s)`` of each point's states, shape (states, n)."""
        W, variance = params.W, params.variance
        if isinstance(states, Own):
            error = _errors(W, points, states.values)
        else:
            error = points.y.new_zeros(states.table.n_states(W.shape[1]), len(points.y))
            alone, of_table = states.split(error)
            if len(alone):
                alone[0] = _alone(W, points)
            torch.matmul(states.table.meets, _by_set(_winners(W, points, states.index)), out=of_table)
        odds = float(params.log_prob[1] - params.log_prob[0])
        constant = points.log_density_of_noise(variance) + W.shape[1] * params.log_prob[0]
        return error.mul_(-0.5 / variance).add_(states.log_prior((1.0,), (odds,))).add_(constant)

    def statistics(self, params: MaxParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Sums over points for `update`, packed into one dimension."""
        W, y = params.W, points.y.T
        seen = torch.ones_like(y) if points.seen is None else points.seen.T
        if isinstance(states, Own):
            wins = _wins(W, states.values, q)
            weighted, weight = (wins * y[:, None]).sum(2), (wins * seen[:, None]).sum(2)
            error = (q * _errors(W, points, states.values)).sum()
        else:
            weighted, weight = W.new_zeros(W.shape), W.new_zeros(W.shape)
            alone, of_table = states.split(q)
            winners = _winners(W, points, states.index)
            wins = _shares(winners, states, of_table)
            D = len(y)
            error = (wins * winners.gain).sum()
            where = states.index.reshape(-1)
            weighted.index_add_(1, where, (wins * y[:, None]).reshape(D, -1))
            weight.index_add_(1, where, (wins * seen[:, None]).reshape(D, -1))
            if len(alone):
                weighted += y @ alone[0].T
                weight += seen @ alone[0].T
                error = error + (alone[0] * _alone(W, points)).sum()
        counts = states.counts(q, (1.0,))
        sums = points.sums()
        error = sums[2] + error
        return torch.cat([x.reshape(-1) for x in (weighted, weight, counts, error, *sums)])

    exact = False  # a new dictionary changes who wins

    def update(self, params: MaxParameters, statistics: Tensor, masked: bool, correction: float = 1.0) -> MaxParameters:
        """The M-step, with the winners as they were; see `TruncatedModel` for `correction`."""
        D, H = params.W.shape
        sizes = [D * H, D * H, 1, 1, 1, 1, 1]
        weighted, weight, active, error, n_points, n_seen, square = torch.split(statistics, sizes)
        tiny = torch.finfo(weight.dtype).tiny ** 0.5
        W = torch.where(weight > tiny, weighted / weight.clamp(min=tiny), params.W.reshape(-1)).reshape(D, H)
        if not self.signed:
            W = W.clamp(min=0)
        prob = (correction * active / (n_points * H)).clamp(tiny, 1 - torch.finfo(weight.dtype).eps)
        return MaxParameters(W, torch.cat([1 - prob, prob]).log(), noise_variance(error, square, n_seen))

    def activity(self, params: MaxParameters) -> float:
        """Probability of a cause to be active."""
        return float(params.log_prob[1].exp())

    def towards(self, old: MaxParameters, new: MaxParameters, share: float) -> MaxParameters:
        """The new parameters with the dictionary a share of the way from the old one."""
        return new._replace(W=torch.lerp(old.W, new.W, share))

    def codes(self, params: MaxParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior probability of each cause to be active, shape (n, H)."""
        return states.inclusion(q).T

    def reconstruct(self, params: MaxParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior mean of the winners' entries, shape (n, D)."""
        W = params.W
        if isinstance(states, Own):
            return (_wins(W, states.values, q) * W[:, :, None]).sum(1).T
        alone, of_table = states.split(q)
        mean = (_shares(_winners(W, points, states.index), states, of_table) * W[:, states.index]).sum(1)
        return (mean + W @ alone[0]).T if len(alone) else mean.T

    def renew(self, params: MaxParameters, component: int, direction: Tensor) -> MaxParameters:
        """Parameters with one column of the dictionary replaced."""
        W = params.W.clone()
        W[:, component] = direction if self.signed else direction.clamp(min=0)
        return params._replace(W=W)


def _alone(W: Tensor, points: Points) -> Tensor:
    """What each cause alone changes the squared error by, shape (H, n)."""
    square = (W**2).sum(0)[:, None] if points.seen is None else (W**2).T @ points.seen.T
    return square - 2 * W.T @ points.y.T


def _winners(W: Tensor, points: Points, index: Tensor) -> _Winners:
    C = len(index)
    rank = W.abs().argsort(dim=1, stable=True, descending=True).argsort(dim=1)[:, index].to(torch.int16)  # (D, C, n)
    power = 2 ** torch.arange(C, device=W.device)
    with_it = torch.empty(rank.shape, dtype=torch.int64, device=W.device)
    for c in range(C):
        with_it[:, c] = ((rank <= rank[:, c : c + 1]) * power[:, None]).sum(1)
    chosen = W[:, index]
    gain = chosen * (chosen - 2 * points.y.T[:, None])
    if points.seen is not None:
        gain = gain * points.seen.T[:, None]
    return _Winners(with_it, with_it - power[:, None], gain)


def _by_set(winners: _Winners) -> Tensor:
    """Gains added up by set of candidates, shape (2^C, n): what meeting a set changes the squared error by."""
    D, C, n = winners.gain.shape
    total = winners.gain.new_zeros(2**C, n)
    gain = winners.gain.reshape(D * C, n)
    total.scatter_add_(0, winners.with_it.reshape(D * C, n), gain)
    return total.scatter_add_(0, winners.without_it.reshape(D * C, n), -gain)


def _shares(winners: _Winners, states: Selected, q: Tensor) -> Tensor:
    """Probability that each candidate wins each entry, shape (D, C, n), from the posterior of the table's states."""
    D, C, n = winners.gain.shape
    met = states.table.meets.T @ q  # probability to meet each set
    share = met.gather(0, winners.with_it.reshape(D * C, n)) - met.gather(0, winners.without_it.reshape(D * C, n))
    return share.reshape(D, C, n)


def _wins(W: Tensor, values: Tensor, q: Tensor) -> Tensor:
    """Probability that each cause wins each entry, shape (D, H, n), from own states (S, H, n)."""
    total = W.new_zeros(*W.shape, q.shape[1])
    order = W.abs().argsort(dim=1, stable=True, descending=True)  # (D, H)
    free = torch.ones(len(W), *q.shape, dtype=torch.bool, device=W.device)
    for column in order.T:
        active = values[:, column].movedim(1, 0) > 0  # (D, S, n)
        won = active & free
        free &= ~active
        total[torch.arange(len(W)), column] = (won * q).sum(1)
    return total


def _errors(W: Tensor, points: Points, values: Tensor) -> Tensor:
    """What each point's own states (S, H, n) change the squared error by, shape (S, n)."""
    mean = W.new_zeros(values.shape[0], len(W), values.shape[2])
    size = torch.zeros_like(mean)
    for h in range(W.shape[1]):
        stronger = (values[:, h, None] > 0) & (W[:, h].abs()[:, None] > size)
        mean = torch.where(stronger, W[:, h, None], mean)
        size = torch.where(stronger, W[:, h, None].abs(), size)
    gain = mean * (mean - 2 * points.y.T)
    return (gain if points.seen is None else gain * points.seen.T).sum(1)
