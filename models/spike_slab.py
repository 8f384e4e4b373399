r"""Sparse coding with spike-and-slab causes: the mathematics of GSC.

Model: ``s_h ~ Bernoulli(pi_h)``, ``z ~ N(mu, Psi)``, ``y ~ N(W (s * z), sigma^2 I)``; entries of ``y`` may be missing,
``Psi`` is diagonal or full. For a state with the active set ``a``, ``z`` is integrated out: with ``b = W'y / sigma^2``
and ``G = W'W / sigma^2``, its posterior is ``N(kappa, Lambda)`` with ``Lambda = (G_aa + Psi_aa^-1)^-1`` and
``kappa = mu_a + Lambda (b_a - G_aa mu_a)``, so that all algebra is with matrices of the number of active causes.

These are inverted without pivoting, all states of one size at once, entry by entry: they are positive definite.

References
----------
Sheikh, Shelton, Lücke (2014), "A Truncated EM Approach for Spike-and-Slab Sparse Coding", JMLR 15. The update of a full
``Psi`` is that of exact EM, in which causes that are off have the slab that active ones imply.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from probtensor.inference.points import Points
from probtensor.inference.state_sets import Gram, Own, Selected, pair_places, pursue, sum_of_pairs
from probtensor.models.linear_coding import noise_variance, solve_rows

__all__ = ["SlabParameters", "SpikeSlab"]


class SlabParameters(NamedTuple):
    """Parameters of `SpikeSlab`.

    Attributes
    ----------
    W : Tensor, shape (D, H)
    prob : Tensor, shape (H,)
        ``pi``.
    mean : Tensor, shape (H,)
        ``mu``.
    slab : Tensor, shape (H,) or (H, H)
        ``Psi``: variances, or the covariance.
    variance : Tensor, scalar
        ``sigma^2``.
    """

    W: Tensor
    prob: Tensor
    mean: Tensor
    slab: Tensor
    variance: Tensor


class _Active(NamedTuple):
    """States with (up to) g active causes; points last.

    Attributes
    ----------
    rows : slice or Tensor
        Which states these are.
    component : Tensor, shape (g, S, n), int64
    on : Tensor, shape (g, S, n), bool, or None
        Which of the places are used; None: all.
    pair : Tensor, shape (g, g, S), int64, or None
        Number of each pair of candidates.
    G : Tensor, shape (g, g, S, n)
    b : Tensor, shape (g, S, n)
    """

    rows: Tensor
    component: Tensor
    on: Tensor | None
    pair: Tensor | None
    G: Tensor
    b: Tensor


class _Slabs(NamedTuple):
    """What is known of the active slabs.

    Attributes
    ----------
    mean : Tensor, shape (g, S, n)
    covariance : Tensor, shape (g, g, S, n)
    log_odds : Tensor, shape (S, n)
        Log joint density over that of the zero state.
    precision : Tensor, shape (g, g, S, n), or None
        Of the prior, where ``Psi`` is full.
    """

    mean: Tensor
    covariance: Tensor
    log_odds: Tensor
    precision: Tensor | None


@dataclass(frozen=True, eq=False)
class SpikeSlab:
    """The model. Pure functions of `SlabParameters`; holds no data.

    Attributes
    ----------
    full : bool
        Whether ``Psi`` is a full matrix.
    max_active : int
        Active causes of a state at most.
    """

    full: bool
    max_active: int

    parameters = SlabParameters

    def start(self, W: Tensor, variance: Tensor, activity: float) -> SlabParameters:
        """First parameters, from a dictionary and the expected share of active causes."""
        H = W.shape[1]
        one = W.new_ones(H)
        slab = torch.eye(H, dtype=W.dtype, device=W.device) if self.full else one
        return SlabParameters(W, activity * one, 0 * one, slab, variance)

    def candidates(self, params: SlabParameters, points: Points, n_candidates: int) -> Tensor:
        """Causes that each raise the joint density most, given those before; shape (n_candidates, n)."""
        b, gram = self._messages(params, points)

        def best(left: Tensor) -> tuple[Tensor, Tensor]:
            gain, value, _ = self._alone(params, left, gram)
            return gain, value

        return pursue(b, gram, n_candidates, best)

    def log_joint(self, params: SlabParameters, points: Points, states: Selected | Own) -> Tensor:
        """``log p(y, s)`` of each point's states, shape (states, n)."""
        b, gram = self._messages(params, points)
        if isinstance(states, Own):
            joint = b.new_zeros(len(states.values), b.shape[1])
        else:
            joint = b.new_zeros(states.table.n_states(len(b)), b.shape[1])
            alone, _ = states.split(joint)
            if len(alone):
                alone[0] = self._alone(params, b, gram)[0]
        for active, slabs in self._known(params, b, gram, states):
            joint[active.rows] = slabs.log_odds
        constant = points.log_density_of_noise(params.variance) + torch.log1p(-params.prob).sum()
        return joint.add_(constant)

    def statistics(self, params: SlabParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Sums over points for `update`, packed into one dimension."""
        used, mean, second, t, K = self._moments(params, points, states, q)
        parts = [points.y.T @ mean.T, second[0], used, mean.sum(1), second[1].diagonal()]
        if self.full:  # sums of z and z z' of all causes, active or not
            n_used = points.sums()[0]
            shift = params.slab @ t
            crossed = torch.outer(params.mean, shift + 0.5 * n_used * params.mean)
            parts += [n_used * params.mean + shift]
            parts += [n_used * params.slab + params.slab @ K @ params.slab + crossed + crossed.T]
        return torch.cat([x.reshape(-1) for x in (*parts, *points.sums())])

    exact = True

    def update(
        self, params: SlabParameters, statistics: Tensor, masked: bool, correction: float = 1.0
    ) -> SlabParameters:
        """The M-step: the optimum of all parameters; see `TruncatedModel` for `correction`."""
        D, H = params.W.shape
        sizes = [D * H, D * H * H if masked else H * H, H, H, H, *([H, H * H] if self.full else []), 1, 1, 1]
        first, second, used, mean, square_mean, *slabs, n_points, n_seen, square = torch.split(statistics, sizes)
        W, explained = solve_rows(first.reshape(D, H), second.reshape(-1, H, H), params.W)
        variance = noise_variance(square - explained, square, n_seen)
        tiny, eps = torch.finfo(used.dtype).tiny ** 0.5, torch.finfo(used.dtype).eps
        prob = (correction * used / n_points).clamp(tiny, 1 - eps)
        if self.full:
            mu, square_of_z = slabs[0] / n_points, slabs[1].reshape(H, H) / n_points
            slab = square_of_z - torch.outer(mu, mu)
            slab = 0.5 * (slab + slab.T)
            slab.diagonal().add_(8 * eps * square_of_z.diagonal() + tiny)  # so that rounding leaves it invertible
            return SlabParameters(W, prob, mu, slab, variance)
        known = used > tiny
        share = used.clamp(min=tiny)
        mu = torch.where(known, mean / share, params.mean)
        slab = torch.where(known, torch.maximum(square_mean / share - mu**2, 8 * eps * mu**2), params.slab)
        return SlabParameters(W, prob, mu, slab.clamp(min=tiny), variance)

    def rescaled(self, params: SlabParameters) -> SlabParameters:
        """The same model with slabs of mean square one: the dictionary has the scale."""
        variance = params.slab.diagonal() if self.full else params.slab
        size = (params.mean**2 + variance).sqrt().clamp(min=torch.finfo(variance.dtype).tiny ** 0.25)
        slab = params.slab / (size[:, None] * size if self.full else size**2)
        return params._replace(W=params.W * size, mean=params.mean / size, slab=slab)

    def activity(self, params: SlabParameters) -> float:
        """Mean probability of a cause to be active."""
        return float(params.prob.mean())

    def towards(self, old: SlabParameters, new: SlabParameters, share: float) -> SlabParameters:
        """The new parameters with the dictionary a share of the way from the old one."""
        return new._replace(W=torch.lerp(old.W, new.W, share))

    def codes(self, params: SlabParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior mean of ``s * z``, shape (n, H)."""
        return self._moments(params, points, states, q)[1].T

    def reconstruct(self, params: SlabParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior mean of ``W (s * z)``, shape (n, D)."""
        return self.codes(params, points, states, q) @ params.W.T

    def renew(self, params: SlabParameters, component: int, direction: Tensor) -> SlabParameters:
        """Parameters with one column of the dictionary replaced, and its cause like the average one."""
        W, prob, mean, slab = (x.clone() for x in params[:4])
        W[:, component] = direction
        prob[component] = prob.mean()
        mean[component] = 1.0
        if self.full:
            slab[component] = slab[:, component] = 0.0
            slab[component, component] = 0.25
        else:
            slab[component] = 0.25
        return SlabParameters(W, prob, mean, slab, params.variance)

    def _messages(self, params: SlabParameters, points: Points) -> tuple[Tensor, Gram]:
        scaled = params.W / params.variance.sqrt()
        return scaled.T @ (points.y.T / params.variance.sqrt()), Gram(scaled, points.seen)

    def _alone(self, params: SlabParameters, b: Tensor, gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
        """Log joint density over that of the zero state (H, n), slab's mean (H, n) and variance (H, n or 1)."""
        G, mu = gram.diagonal(), params.mean[:, None]
        psi = (params.slab.diagonal() if self.full else params.slab)[:, None]
        variance = 1 / (G + 1 / psi)
        rest = b - G * mu
        odds = (params.prob.log() - torch.log1p(-params.prob))[:, None]
        log_odds = odds + 0.5 * (variance / psi).log() + mu * (b - 0.5 * G * mu) + 0.5 * variance * rest**2
        return log_odds, mu + variance * rest, variance

    def _known(
        self, params: SlabParameters, b: Tensor, gram: Gram, states: Selected | Own
    ) -> list[tuple[_Active, _Slabs]]:
        """Active causes and their slabs, found once for a set of states."""
        if states.memo.get("params") is not params:
            found = [(active, self._slabs(params, active)) for active in self._levels(b, gram, states)]
            states.memo.update(params=params, slabs=found)
        return states.memo["slabs"]  # type: ignore[no-any-return]

    def _levels(self, b: Tensor, gram: Gram, states: Selected | Own) -> list[_Active]:
        if isinstance(states, Own):
            g = min(self.max_active, len(b))
            on, component = states.values.topk(g, dim=1)  # (S, g, n)
            on, component = on.movedim(1, 0) > 0, component.movedim(1, 0)
            everything = torch.arange(len(b), device=b.device)[:, None].expand_as(b)
            i, j = pair_places(len(b), b.device)
            number = b.new_zeros(len(b), len(b), dtype=torch.int64)
            number[i, j] = number[j, i] = torch.arange(len(i), device=b.device)
            pairs = gram.pairs(everything)
            G = pairs.gather(0, number[component[:, None], component[None]].flatten(0, 2))
            here = b.gather(0, component.flatten(0, 1)).reshape(component.shape)
            rows = torch.arange(len(states.values), device=b.device)
            return [_Active(rows, component, on, None, G.reshape(g, g, *component.shape[1:]), here)]
        pairs, inside = gram.pairs(states.index), b.gather(0, states.index)
        return [
            _Active(rows + states.n_singles, states.index[places.T], None, pair, pairs[pair], inside[places.T])
            for rows, places, pair in states.table.levels
        ]

    def _slabs(self, params: SlabParameters, active: _Active) -> _Slabs:
        c, G, b, on = active.component, active.G, active.b, active.on
        mu = params.mean[c]
        odds = (params.prob.log() - torch.log1p(-params.prob))[c]
        precision = None
        if self.full:
            precision, log_slab = _inverse(_used(params.slab[c[:, None], c[None]], on))
        else:
            inverse, log_slab = (1 / params.slab)[c], params.slab.log()[c]
            if on is not None:
                inverse, log_slab = torch.where(on, inverse, 1.0), log_slab * on
            log_slab = log_slab.sum(0)
        if on is not None:
            G = G * (on[:, None] & on[None])
            b, mu, odds = b * on, mu * on, odds * on
        M = G.clone()
        if precision is None:
            for k in range(len(c)):
                M[k, k] += inverse[k]
        else:
            M += precision
        covariance, log_det = _inverse(M)
        Gmu = (G * mu).sum(1)
        rest = b - Gmu
        moved = (covariance * rest).sum(1)
        log_odds = (
            odds.sum(0) - 0.5 * (log_det + log_slab) + (mu * (b - 0.5 * Gmu)).sum(0) + 0.5 * (rest * moved).sum(0)
        )
        return _Slabs(mu + moved, covariance, log_odds, precision)

    def _moments(
        self, params: SlabParameters, points: Points, states: Selected | Own, q: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Sums ``<s>``, means ``<s z>`` (H, n), sums ``<sz (sz)'>`` (by entry; over all), and for a full ``Psi``."""
        b, gram = self._messages(params, points)
        H, n = b.shape
        everything = torch.arange(H, device=b.device)[:, None].expand(H, n)
        index = everything if isinstance(states, Own) else states.index
        i, _ = pair_places(len(index), b.device)
        inside, diagonal = b.new_zeros(len(i), n), b.new_zeros(H, n)
        mean, t, K_inside, K_diagonal = b.new_zeros(H, n), b.new_zeros(H, n), b.new_zeros(len(i), n), b.new_zeros(H, n)
        if isinstance(states, Selected) and states.n_singles:
            (alone,), _ = states.split(q)
            _, kappa, variance = self._alone(params, b, gram)
            mean += alone * kappa
            diagonal += alone * (variance + kappa**2)
            if self.full:
                psi = params.slab.diagonal()[:, None]
                moved = (kappa - params.mean[:, None]) / psi
                t += alone * moved
                K_diagonal += alone * ((variance - psi) / psi**2 + moved**2)
        for active, slabs in self._known(params, b, gram, states):
            weight = q[active.rows]
            kappa, covariance = slabs.mean, slabs.covariance
            if active.on is not None:
                kappa = kappa * active.on
                covariance = covariance * (active.on[:, None] & active.on[None])
            flat = active.component.flatten(0, 1)
            mean.scatter_add_(0, flat, (weight * kappa).flatten(0, 1))
            _add_pairs(inside, active, weight * (covariance + kappa[:, None] * kappa))
            if self.full:
                assert slabs.precision is not None
                moved = (slabs.precision * (slabs.mean - params.mean[active.component])).sum(1)
                less = torch.einsum("abSn,bcSn,cdSn->adSn", slabs.precision, slabs.covariance, slabs.precision)
                if active.on is not None:
                    moved = moved * active.on
                change = less - slabs.precision + moved[:, None] * moved
                if active.on is not None:
                    change = change * (active.on[:, None] & active.on[None])
                t.scatter_add_(0, flat, (weight * moved).flatten(0, 1))
                _add_pairs(K_inside, active, weight * change)
        pairs = torch.cat([inside, diagonal])
        whole = sum_of_pairs(pairs, index, H, None)
        second = whole if points.seen is None else sum_of_pairs(pairs, index, H, points.seen), whole
        K = sum_of_pairs(torch.cat([K_inside, K_diagonal]), index, H, None) if self.full else t[:0]
        return states.inclusion(q).sum(1), mean, second, t.sum(1), K


def _add_pairs(total: Tensor, active: _Active, terms: Tensor) -> None:
    """Add terms (g, g, S, n) of states to those of pairs of candidates, (P, n): each pair once."""
    i, j = pair_places(len(terms), terms.device)
    if active.pair is not None:
        total.index_add_(0, active.pair[i, j].reshape(-1), terms[i, j].flatten(0, 1))
        return
    H = int((2 * len(total) + 0.25) ** 0.5)
    low = torch.minimum(active.component[i], active.component[j])
    high = torch.maximum(active.component[i], active.component[j])
    number = low * H - low * (low - 1) // 2 + high - low
    total.scatter_add_(0, number.flatten(0, 1), terms[i, j].flatten(0, 1))


def _used(matrix: Tensor, on: Tensor | None) -> Tensor:
    """The matrix (g, g, S, n) with ones on the diagonal, and nothing beside, where a place is not used."""
    if on is None:
        return matrix.clone()
    matrix = matrix * (on[:, None] & on[None])
    for k in range(len(matrix)):
        matrix[k, k] = torch.where(on[k], matrix[k, k], 1.0)
    return matrix


def _inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse (g, g, …) and log determinant (…) of positive definite matrices (g, g, …), which are overwritten.

    A pivot is at least the rounding error of its diagonal entry: nearly equal columns and hardly any noise would else
    leave less than nothing.
    """
    least = torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    log_det = matrix.new_zeros(matrix.shape[2:])
    for k in range(len(matrix)):
        pivot = torch.maximum(matrix[k, k], least[k])
        log_det += pivot.log()
        row = matrix[k] / pivot
        column = matrix[:, k].clone()
        matrix -= column[:, None] * row
        matrix[k] = row
        matrix[:, k] = -column / pivot
        matrix[k, k] = 1 / pivot
    return matrix, log_det
