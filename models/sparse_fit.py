"""How a sparse-coding model is fitted: a start from data, annealing, renewal of components, then EM on all points.

A dictionary's likelihood has many local optima: two components that share a cause, one that holds two. Annealing with
noise on the dictionary finds most causes. Then the component that is missed least if it were gone is begun anew as what
a badly explained point leaves unexplained, some steps of EM follow, and the result stays if the bound is higher: that
moves components from where there are too many to where there are too few. Both happen on some thousand points; all
points have their say afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.comm import Comm
from probtensor.inference.points import PointBlocks, Points, Summary
from probtensor.inference.truncated_em import DataCut, Result, Selection, TruncatedModel, run
from probtensor.resources import is_integer, is_number

__all__ = ["Schedule", "check_settings", "fit_dictionary", "sums_at"]

P = TypeVar("P")

START = 0.25  # of the data's standard deviation, in the first dictionary, beside the mean
NOISE = 1.0  # of the noise's standard deviation, on the dictionary while annealing is in its first half; then less
SETTLE = 15  # steps after annealing, and
TRIAL = 10  # after a renewal, before the bounds are compared
FAILURES = 6  # renewals in a row without success that end it
WORST_OF = 32  # points among which the worst explained one is looked for
RELATED = 0.2  # correlation of use from which on two components may share a cause
ORTHOGONAL = 0.1  # square of the cosine up to which a pair is turned
GAIN = 1e-3  # nats a point that make a renewal a success


class Schedule(NamedTuple):
    """Lengths of the phases of a fit.

    Attributes
    ----------
    temperature : float
        At the start of annealing; 1: none.
    annealing : int
        Steps from there to one.
    renewals : int
        At most.
    points : int
        That annealing and renewals take into account; all where there are fewer than twice as many.
    max_iter : int
        Steps on all points at most.
    tol : float
        See `run`.
    """

    temperature: float
    annealing: int
    renewals: int
    points: int
    max_iter: int
    tol: float

    def at(self, step: int) -> float:
        """Temperature of a step."""
        if self.annealing == 0:
            return 1.0
        return max(1.0, self.temperature - (self.temperature - 1) * step / self.annealing)


def check_settings(coder: Any) -> None:
    """Raise ValueError for settings of a `SparseCoder` that make no sense."""
    for name, least in (("n_components", 1), ("n_candidates", 1), ("max_active", 1), ("n_states", 2)):
        value = getattr(coder, name)
        if not (is_integer(value) and value >= least):
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    for name in ("annealing", "renewals", "max_iter"):
        value = getattr(coder, name)
        if not (is_integer(value) and value >= 0):
            raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
    if not (is_number(coder.tol) and coder.tol >= 0):
        raise ValueError(f"tol: expected a number of at least 0, got {coder.tol!r}")
    if not (is_number(coder.temperature) and 1 <= coder.temperature < np.inf):
        raise ValueError(f"temperature: expected a finite number of at least 1, got {coder.temperature!r}")
    if coder.states not in ("selected", "evolved", "all"):
        raise ValueError(f'states: expected "selected", "evolved" or "all", got {coder.states!r}')


def fit_dictionary(
    model: Any,
    blocks: PointBlocks,
    summary: Summary,
    selections: tuple[Selection, Selection],
    schedule: Schedule,
    *,
    n_components: int,
    comm: Comm,
    generator: torch.Generator,
    cut: DataCut | None,
    spread: Callable[[Any], Tensor],
    keep: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Result[Any]:
    """Fit a model to all ranks' points.

    The first of `selections` serves the search for a good dictionary, the second the fit to all points; `spread` is the
    size of random numbers that suits a dictionary: the standard deviation of the noise.

    Returns
    -------
    Result
        Of the last phase.
    """
    like = torch.zeros((), dtype=blocks.dtype, device=blocks.device)
    search, selection = selections
    seed = int(torch.randint(2**31, (1,), generator=generator))
    few, first = _sample(blocks, summary.n_points, schedule.points)

    def go(params: Any, blocks: Sequence[Points], first: int, steps: int, tol: float, **more: Any) -> Result[Any]:
        more = {"temperature": lambda step: 1.0, "progress": False, "cut": None, "selection": search, **more}
        return run(model, params, blocks, comm=comm, max_iter=steps, tol=tol, first_block=first, seed=seed, **more)

    mean, variance = (torch.from_numpy(x).to(like) for x in (summary.mean, summary.variance))
    noise = torch.randn(len(mean), n_components, generator=generator, dtype=torch.float64).to(like)
    kind = torch.finfo(like.dtype)
    rounding = (8 * kind.eps) ** 0.5 * float(mean.abs().max())  # points may all be equal
    deviation = variance.sqrt().mean().clamp(min=max(kind.tiny**0.25, rounding))
    W = mean[:, None] + START * deviation * noise
    params = model.start(W, deviation**2, 1 / max(n_components, 2))  # one that is certain could never be away

    def shaken(params: Any, step: int) -> Any:
        T = schedule.at(step)
        if T <= 1:
            return params
        size = NOISE * min(1.0, 2 * (T - 1) / (schedule.temperature - 1)) * spread(params)
        noise = torch.randn(params.W.shape, generator=generator, dtype=torch.float64).to(params.W)
        return model.towards(params, params._replace(W=params.W + size * noise), 1.0)

    steps = schedule.annealing + SETTLE
    found = go(params, few, first, steps, 1e-4, temperature=schedule.at, between=shaken, quiet=True)
    failures = 0
    for number in range(schedule.renewals):
        if failures >= FAILURES or n_components == 1:
            break
        params = _renewed(model, found.params, few, first, search, comm, generator, seed + number)
        tried = go(params, few, first, TRIAL, 1e-4, quiet=True)
        success = tried.bound_history[-1] > found.bound_history[-1] + GAIN
        found, failures = (tried, 0) if success else (found, failures + 1)
    return go(
        found.params,
        blocks,
        blocks.first,
        schedule.max_iter,
        schedule.tol,
        selection=selection,
        cut=cut,
        keep=keep,
        progress=progress,
    )


def sums_at(model: Any, params: Any, blocks: PointBlocks, selection: Selection, comm: Comm) -> Result[Any]:
    """The bound and the sums over points at given parameters, without a step."""
    return run(
        model,
        params,
        blocks,
        selection,
        comm=comm,
        temperature=lambda step: 1.0,
        max_iter=0,
        tol=0.0,
        quiet=True,
        progress=False,
    )


def _sample(blocks: PointBlocks, n_points: int, wanted: int) -> tuple[Sequence[Points], int]:
    """Every so many blocks of all ranks', and the number of the first here among these."""
    every = max(1, n_points // max(wanted, 1))
    if every == 1:
        return [blocks[number] for number in range(len(blocks))], blocks.first
    chosen = [number for number in range(len(blocks)) if (blocks.first + number) % every == 0]
    empty = blocks[0].take(torch.arange(0, device=blocks.device))
    return [blocks[number] for number in chosen] or [empty], -(-blocks.first // every)


def _renewed(
    model: TruncatedModel[Any],
    params: Any,
    blocks: Sequence[Points],
    first: int,
    selection: Selection,
    comm: Comm,
    generator: torch.Generator,
    seed: int,
) -> Any:
    """Parameters with a component begun anew: from a point that is badly explained, or from a pair in use together.

    Where one component holds two causes and another one of these, the first without its projection on the other is the
    second cause alone. Where both hold both, one with the opposite sign, their sum and difference are the causes.
    """
    n_points = float(comm.sum(torch.tensor([float(sum(len(points.y) for points in blocks))], dtype=torch.float64)))
    offers: list[tuple[float, Tensor]] = []

    def use(number: int) -> Tensor:
        """What leaving each component out would cost, its use, and the use of pairs, summed over points."""
        points = blocks[number]
        states, joint, _ = selection.step(model, params, points, None, seed)
        log_z = joint.logsumexp(0)
        q = (joint - log_z).exp()
        own = torch.Generator().manual_seed((seed * 1_000_003 + first + number) % 2**63)
        drawn = torch.rand(len(points.y), generator=own) < WORST_OF / n_points
        if drawn.any():
            index = drawn.nonzero().squeeze(-1).to(log_z.device)
            worst = index[log_z[index].argmin()]
            left = points.y - model.reconstruct(params, points, states, q)
            left = left if points.seen is None else left * points.seen
            offers.append((float(log_z[worst]), left[worst].cpu().double()))
        inclusion = states.inclusion(q)
        cost = -torch.log1p(-inclusion.clamp(max=1 - 1e-12)).sum(1)
        return torch.cat([cost[:, None], inclusion.sum(1)[:, None], inclusion @ inclusion.T], dim=1)

    total = comm.sum(*add_up(use(number) for number in range(len(blocks)))).cpu()
    data = b""
    if offers:
        evidence, left = min(offers, key=lambda pair: pair[0])
        data = np.concatenate([[evidence], left.numpy()]).tobytes()
    table = [np.frombuffer(bytes_) for bytes_ in comm.gather_bytes(data) if bytes_]
    draw = torch.rand(3, generator=generator).tolist()
    cost, share, together = total[:, 0], total[:, 1] / n_points, total[:, 2:] / n_points
    covariance = together - share[:, None] * share
    spread = covariance.diagonal().clamp(min=1e-12).sqrt()
    related = (covariance / (spread[:, None] * spread)).triu(1).reshape(-1)
    strongest = related.topk(min(3, len(related)))
    if draw[0] < 0.5 and strongest.values[0] > RELATED:
        n = int((strongest.values > RELATED).sum())
        pair = divmod(int(strongest.indices[int(draw[1] * n)]), len(cost))
        changed, other = pair if draw[2] < 0.5 else pair[::-1]
        column, beside = params.W[:, changed], params.W[:, other]
        product = column @ beside
        if product**2 > ORTHOGONAL * (column @ column) * (beside @ beside):
            return model.renew(params, changed, column - product / (beside @ beside) * beside)
        return model.renew(model.renew(params, changed, column + beside), other, column - beside)
    if not table:
        return params
    component = int(cost.argsort()[int(draw[1] * min(2, len(cost)))])
    direction = torch.from_numpy(min(table, key=lambda row: row[0])[1:].copy()).to(params.W)
    return model.renew(params, component, direction)
