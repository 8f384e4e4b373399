r"""Noisy-OR: binary data in which each active cause switches entries on, each with a chance of its own.

Model: ``s_h ~ Bernoulli(pi_h)``, ``p(y_d = 1 | s) = 1 - prod_h (1 - W_dh s_h)``; entries of ``y`` may be missing.

With ``a_dh = -log(1 - W_dh)`` an entry stays off with probability ``exp(-sum_h s_h a_dh)``: what entries that are off
say is linear in ``s``, and one product serves all states; only those that are on need a logarithm for each state. The
M-step is that of EM in which also hidden is which causes fired, so that no step lowers the bound.

References
----------
Šingliar, Hauskrecht (2006), "Noisy-OR Component Analysis and its Application to Link Analysis", JMLR 7.
Drefs, Guiraud, Lücke (2022), "Evolutionary Variational Optimization of Generative Models", JMLR 23.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probtensor.inference.points import Points
from probtensor.inference.state_sets import Own, Selected
from probtensor.models.sparse_coding import FloatArray, SparseCoder
from probtensor.resources import RandomState

__all__ = ["NoisyOR", "NoisyOrCoding", "NoisyOrParameters"]

SPREAD = 0.2  # of the random numbers on the dictionary while annealing
CHUNK = 2**16  # numbers in an array over entries, states and points


class NoisyOrParameters(NamedTuple):
    """Parameters of `NoisyOrCoding`.

    Attributes
    ----------
    W : Tensor, shape (D, H)
        Chance that a cause, if active, switches an entry on.
    prob : Tensor, shape (H,)
        ``pi``.
    """

    W: Tensor
    prob: Tensor


class NoisyOrCoding:
    """The model. Pure functions of `NoisyOrParameters`; holds no data."""

    parameters = NoisyOrParameters
    exact = True

    def start(self, W: Tensor, variance: Tensor, activity: float) -> NoisyOrParameters:
        """First parameters, from a dictionary and the expected share of active causes."""
        return NoisyOrParameters(W.clamp(0.05, 0.95), W.new_full((W.shape[1],), activity))

    def candidates(self, params: NoisyOrParameters, points: Points, n_candidates: int) -> Tensor:
        """Causes that each raise the joint density most, given those before; shape (n_candidates, n)."""
        H, n = params.W.shape[1], len(points.y)
        if n_candidates == H:
            return torch.arange(H, device=points.y.device)[:, None].expand(H, n)
        a = _strengths(params.W)
        y, off = points.y.T, _off(points)
        linear = _log_odds(params)[:, None] - a.T @ off
        explained = (a @ params.prob)[:, None].expand(len(a), n).clone()  # what other causes do on average
        taken, chosen = torch.zeros_like(linear), []
        for _ in range(n_candidates):
            gain = linear + taken
            for d in _chunks(len(a), H * n):
                before = explained[d, None]
                gain += (y[d, None] * (_log_on(before + a[d, :, None]) - _log_on(before))).sum(0)
            best = gain.argmax(0)
            chosen.append(best)
            taken.scatter_(0, best[None], -torch.inf)
            explained += a[:, best]
        return torch.stack(chosen).sort(0).values

    def log_joint(self, params: NoisyOrParameters, points: Points, states: Selected | Own) -> Tensor:
        """``log p(y, s)`` of each point's states, shape (states, n)."""
        a = _strengths(params.W)
        joint = _linear(states, _log_odds(params)[:, None] - a.T @ _off(points))
        for d, total in _totals(states, a):
            joint += torch.where(points.y.T[d, None] > 0, _log_on(total), 0.0).sum(0)
        return joint.add_(torch.log1p(-params.prob).sum())

    def statistics(self, params: NoisyOrParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Sums over points for `update`, packed into one dimension."""
        a = _strengths(params.W)
        mean = states.inclusion(q)
        seen = torch.ones_like(points.y) if points.seen is None else points.seen
        fired = torch.zeros_like(params.W)
        for d, total in _totals(states, a):
            # That a cause fired, where an entry is on: W_dh / p(y_d = 1 | s).
            on = -torch.expm1(-total)
            weight = torch.where(on > 0, q / on.clamp(min=torch.finfo(q.dtype).tiny), 0.0) * points.y.T[d, None]
            fired[d] = params.W[d] * _where_active(states, weight)
        active = seen.T @ mean.T
        n_points = points.sums()[0]
        return torch.cat([x.reshape(-1) for x in (fired, active, mean.sum(1), n_points)])

    def update(
        self, params: NoisyOrParameters, statistics: Tensor, masked: bool, correction: float = 1.0
    ) -> NoisyOrParameters:
        """The M-step; see `TruncatedModel` for `correction`."""
        D, H = params.W.shape
        sizes = [D * H, D * H, H, 1]
        fired, active, used, n_points = statistics.split(sizes)  # type: ignore[no-untyped-call]
        tiny = torch.finfo(fired.dtype).tiny ** 0.5
        W = torch.where(active > tiny, fired / active.clamp(min=tiny), params.W.reshape(-1)).reshape(D, H)
        prob = (correction * used / n_points).clamp(tiny, 1 - torch.finfo(used.dtype).eps)
        return NoisyOrParameters(_inside(W), prob)

    def activity(self, params: NoisyOrParameters) -> float:
        """Mean probability of a cause to be active."""
        return float(params.prob.mean())

    def towards(self, old: NoisyOrParameters, new: NoisyOrParameters, share: float) -> NoisyOrParameters:
        """The new parameters with the dictionary a share of the way from the old one, inside of 0 and 1."""
        return new._replace(W=_inside(torch.lerp(old.W, new.W, share)))

    def codes(self, params: NoisyOrParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior probability of each cause to be active, shape (n, H)."""
        return states.inclusion(q).T

    def reconstruct(self, params: NoisyOrParameters, points: Points, states: Selected | Own, q: Tensor) -> Tensor:
        """Posterior mean of ``p(y_d = 1 | s)``, shape (n, D)."""
        mean = torch.empty_like(points.y)
        for d, total in _totals(states, _strengths(params.W)):
            mean[:, d] = (-torch.expm1(-total) * q).sum(1).T
        return mean

    def renew(self, params: NoisyOrParameters, component: int, direction: Tensor) -> NoisyOrParameters:
        """Parameters with one cause begun anew, which explains entries where others fall short, most where most."""
        W, prob = params.W.clone(), params.prob.clone()
        short = direction.clamp(min=0)
        short = short / short.max().clamp(min=torch.finfo(short.dtype).tiny ** 0.5)
        W[:, component], prob[component] = short.clamp(0.05, 0.95), prob.mean()
        return NoisyOrParameters(W, prob)


@final
class NoisyOR(SparseCoder):
    """Noisy-OR: ``p(y_d = 1 | s) = 1 - prod_h (1 - W_dh s_h)``, ``s_h ~ Bernoulli(pi_h)``, binary data.

    Parameters
    ----------
    n_components : int, default 10
        Components ``H`` of the dictionary.
    n_candidates : int, default 8
        Components of which a point's states may have more than one (``H'``); with fewer in all, all. For
        ``states="selected"``.
    max_active : int, default 5
        Components in use in a state at most (``gamma``).
    states : {"selected", "evolved", "all"}, default "selected"
        Which states posterior sums run over: none, each component alone, and those of the candidates; `n_states` that
        each point keeps and betters; or all there are.
    n_states : int, default 64
        For ``states="evolved"``.
    annealing : int, default 40
        Steps in which the temperature falls to one.
    temperature : float, default 3
        At the start.
    renewals : int, default 12
        How often, at most, a component that is hardly missed is begun anew.
    data_cut : bool, default False
        Whether M-steps leave out as many badly explained points as are expected to have more than `max_active` causes.
        The bound may then fall a little. For ``states="selected"``.
    max_iter : int, default 200
        Steps of EM on all points at most.
    tol : float, default 1e-6
        Stop when the bound a point changes by less, relative to it, three times in a row.
    device : str, default "auto"
        "cpu", "cuda" or "cuda:n"; "auto" takes a GPU if there is one.
    random_state : int, Generator, RandomState or None
        Seed of the start.
    progress : bool, default True
        Show a progress bar once the fit has taken a second.

    Attributes
    ----------
    components_ : ndarray, shape (H, D)
        ``W``, transposed: chances between 0 and 1.
    prior_ : ndarray, shape (H,)
        Probability ``pi_h`` of each cause to be active.
        See `SparseCoder` for the others; there is no ``noise_std_``.

    References
    ----------
    Šingliar, Hauskrecht (2006), "Noisy-OR Component Analysis and its Application to Link Analysis", JMLR 7.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> bars = np.kron(np.eye(3), np.ones((1, 3)))
    >>> fires = (rng.random((500, 3, 1)) < 0.3) & (rng.random((500, 3, 9)) < 0.9 * bars)
    >>> model = NoisyOR(n_components=3, random_state=0, progress=False).fit(fires.any(1))
    >>> round(float(model.components_.max(0).mean()), 1), model.transform(fires.any(1)).shape
    (0.9, (500, 3))
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        n_candidates: int = 8,
        max_active: int = 5,
        states: Literal["selected", "evolved", "all"] = "selected",
        n_states: int = 64,
        annealing: int = 40,
        temperature: float = 3.0,
        renewals: int = 12,
        data_cut: bool = False,
        max_iter: int = 200,
        tol: float = 1e-6,
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.n_candidates = n_candidates
        self.max_active = max_active
        self.states = states
        self.n_states = n_states
        self.annealing = annealing
        self.temperature = temperature
        self.renewals = renewals
        self.data_cut = data_cut
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _model(self) -> NoisyOrCoding:
        return NoisyOrCoding()

    def _noise(self, params: NoisyOrParameters) -> None:
        return None

    def _spread(self, params: NoisyOrParameters) -> Tensor:
        return params.W.new_tensor(SPREAD)

    def _set_prior(self, params: NoisyOrParameters) -> None:
        self.prior_: npt.NDArray[Any] = params.prob.cpu().numpy()

    def _prior_history(self, params: NoisyOrParameters) -> dict[str, Tensor]:
        return {"prior": params.prob}

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        return (rng.random((n_samples, self.n_components)) < self.prior_).astype(np.float64)

    def _decode(self, codes: FloatArray) -> FloatArray:
        off = np.ones((len(codes), self.components_.shape[1]))
        for code, component in zip(codes.T, self.components_.astype(np.float64), strict=True):
            off *= 1 - code[:, None] * component
        return 1 - off

    def _observe(self, codes: FloatArray, rng: np.random.Generator) -> FloatArray:
        mean = self._decode(codes)
        return (rng.random(mean.shape) < mean).astype(np.float64)

    def _check_values(self, array: npt.NDArray[Any]) -> None:
        for start in range(0, len(array), 2**16):
            part = array[start : start + 2**16]
            bad = (part != 0) & (part != 1) & ~np.isnan(part)
            if bad.any():
                row, column = (int(x[0]) for x in bad.nonzero())
                raise ValueError(
                    f"Y: expected 0 or 1 (NaN where missing), got {part[row, column]} in row {start + row}, "
                    f"column {column}"
                )


def _inside(W: Tensor) -> Tensor:
    """Chances that are never quite 0 or 1, so that no logarithm is infinite."""
    limits = torch.finfo(W.dtype)
    return W.clamp(limits.tiny**0.5, 1 - limits.eps)


def _strengths(W: Tensor) -> Tensor:
    """``-log(1 - W)``, shape (D, H)."""
    return -torch.log1p(-W)


def _log_odds(params: NoisyOrParameters) -> Tensor:
    return params.prob.log() - torch.log1p(-params.prob)


def _log_on(total: Tensor) -> Tensor:
    """Log probability that an entry is on, from the strengths of the active causes; minus infinity without any."""
    return (-torch.expm1(-total)).log()


def _off(points: Points) -> Tensor:
    """1 where an entry was observed and off, else 0: (D, n)."""
    return ((1 if points.seen is None else points.seen) - points.y).T


def _linear(states: Selected | Own, b: Tensor) -> Tensor:
    """``sum_h s_h b_h`` of each point's states, shape (states, n), from (H, n)."""
    if isinstance(states, Own):
        return (states.values * b).sum(1)
    of_table = states.table.values @ b.gather(0, states.index)
    return torch.cat([torch.zeros_like(b[:1]), b, of_table]) if states.n_singles else of_table


def _totals(states: Selected | Own, a: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some entries, and the strengths of each state's active causes there, shape (entries, states, n).

    With 1 for n where all causes are candidates of all points: then all points have the same states.
    """
    if isinstance(states, Own):
        S, _, n = states.values.shape
        for d in _chunks(len(a), S * n):
            yield d, (a[d] @ states.values).movedim(0, 1)
        return
    table, H, n = states.table, states.n_components, states.index.shape[1]
    n = min(n, 1) if len(states.index) == H else n
    for d in _chunks(len(a), table.n_states(H) * n):
        of_table = table.values @ a[d][:, states.index[:, :n]]
        none = of_table.new_zeros(len(of_table), 1, n)
        yield d, torch.cat([none, a[d, :, None].expand(-1, -1, n), of_table], 1) if states.n_singles else of_table


def _where_active(states: Selected | Own, weight: Tensor) -> Tensor:
    """Sum of weights (entries, states, n) over points and those states where a cause is active, (entries, H)."""
    if isinstance(states, Own):
        return torch.einsum("dsn,shn->dh", weight, states.values)
    first = states.n_singles
    inside = states.table.values.T @ weight[:, first:]  # (entries, C, n)
    total = weight[:, 1:first].sum(2) if first else weight.new_zeros(len(weight), states.n_components)
    return total.index_add_(1, states.index.reshape(-1), inside.reshape(len(weight), -1))


def _chunks(n_entries: int, size: int) -> Iterator[slice]:
    """Stretches of the entries, for each of which arrays of so many numbers an entry stay in the cache."""
    step = max(1, CHUNK // max(size, 1))
    return (slice(start, start + step) for start in range(0, n_entries, step))
