"""Ranks found from data: a penalty that lets an update's needless directions vanish, and truncation after training.

For an update s·ΔW of shape (I1, …, IN) with ranks (R1, …, RN), let ``σ(n, k)`` be the singular values of its unfolding
along mode n: at most Rn are not zero. They are those of a small tensor: with ``A(n) = Q(n) T(n)`` (QR), s·ΔW is
``K ×n Q(n)`` with ``K = s·G ×n T(n)``, of the core's shape. Nothing of the weight's size is built here.

Penalty. ``Σn Σk (d/2) log(1 + σ(n, k)²/floor²)``, with the number ``d`` of parameters that a direction has: a slice of
the core and a column of the factor. It is the cost of relevance determination, where the parameters of a direction are
normal with a variance of their own, this variance is the one that makes their density largest, and it cannot be below
a floor; scale and rotation are those of the update itself, so the penalty does not depend on how core and factors share
them, and its directions are those that truncation drops. Small directions are pulled to zero like by a normal prior,
large ones are nearly left in peace.

Truncation. Dropping the last directions of each mode (HOSVD) changes s·ΔW by at most the root of the sum of their
``σ²`` in Frobenius norm. Those with the least ``σ²`` for each parameter that they save go first, over all layers.

References
----------
De Lathauwer, De Moor, Vandewalle (2000), "A multilinear singular value decomposition", SIAM J. Matrix Anal. Appl. 21,
property 10. Mørup, Hansen (2009), "Automatic relevance determination for multi-way models", J. Chemometrics 23. Wipf,
Nagarajan (2008), "A new view of automatic relevance determination", NeurIPS 20. Fazel, Hindi, Boyd (2003), "Log-det
heuristic for matrix rank minimization", ACC.
"""

import math
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from probtensor.models.adapter_modules import Delta, TuckerDelta
from probtensor.models.cp_delta import CPDelta
from probtensor.models.flora import Adapters
from probtensor.models.tucker_delta import mode_product, step_scale
from probtensor.resources import is_integer, is_number

__all__ = ["rank_report", "relevance_penalty", "truncate"]


def relevance_penalty(adapters: Adapters, name: str | None = None, *, floor: float = 1e-3) -> Tensor:
    """Minus a log prior that finds the ranks: add it, divided by the number of rows, to a mean negative log likelihood.

    Updates that are dense (biases, modules to save) are not penalised.

    Parameters
    ----------
    adapters : Adapters
    name : str, optional
        Default: the active one.
    floor : float, default 1e-3
        Directions that change a weight's entries by less than this, as a root mean square, count as nothing.

    Returns
    -------
    Tensor, shape ()
        At least 0, and 0 for an adapter that changes nothing; gradients flow to cores and factors.

    Raises
    ------
    ValueError
        If there is no such adapter or the floor is not positive.

    Notes
    -----
    With fewer rows than parameters it may hold back directions that predictions need. Then a larger floor, or less of
    the penalty; and `truncate` alone, checked on rows held out, may do.

    References
    ----------
    Mørup, Hansen (2009), J. Chemometrics 23. Wipf, Nagarajan (2008), NeurIPS 20.

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> adapters = inject_adapters(torch.nn.Linear(6, 4), FLoRAConfig(r=2))
    >>> relevance_penalty(adapters).item()
    0.0
    """
    if not (is_number(floor) and 0 < floor < math.inf):
        raise ValueError(f"floor: expected a positive number, got {floor!r}")
    total = torch.zeros(())
    for delta in _low_rank(adapters, name).values():
        core, factors, scale = delta.update
        other = core
        for n, A in enumerate(factors):
            if A is not None:
                other = mode_product(other, A.mT @ A, n)
        least = floor**2 * math.prod(delta.shape) / scale**2
        for n, rank in enumerate(delta.ranks):
            square = other.movedim(n, 0).reshape(rank, -1) @ core.movedim(n, 0).reshape(rank, -1).mT
            n_own = core.numel() // rank + (0 if factors[n] is None else delta.shape[n])
            eye = torch.eye(rank, dtype=core.dtype, device=core.device)
            total = total.to(core) + n_own / 2 * torch.linalg.slogdet(eye + square / least)[1]
    return total


def rank_report(
    adapters: Adapters, name: str | None = None, *, n_parameters: int | None = None, energy: float | None = None
) -> pd.DataFrame:
    """What `truncate` would do.

    Parameters
    ----------
    adapters : Adapters
    name : str, optional
        Default: the active one.
    n_parameters : int, optional
        Budget for all updates of low rank together; dense ones (biases, modules to save) neither count nor change.
    energy : float, optional
        Share of the sum of all squared entries of the updates that is kept at least. Default, without a budget: 0.99.

    Returns
    -------
    DataFrame
        A row for each update of low rank. Columns: "layer" (the parameter's name), "shape", "ranks_before",
        "ranks_after", "parameters_before", "parameters_after", and "energy", the share that is kept at least.

    Raises
    ------
    ValueError
        As `truncate`.

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> adapters = inject_adapters(torch.nn.Linear(20, 30), FLoRAConfig(r=4))
    >>> report = rank_report(adapters, n_parameters=120)
    >>> report[["layer", "ranks_before", "parameters_before"]].values.tolist()
    [['weight', (4, 4), 216]]
    """
    return _report(_plans(adapters, name, n_parameters, energy))


@torch.no_grad()
def truncate(
    adapters: Adapters, name: str | None = None, *, n_parameters: int | None = None, energy: float | None = None
) -> pd.DataFrame:
    """Give an adapter's trained updates smaller ranks, in place; ranks may then differ from layer to layer.

    Updates whose ranks stay keep their bits. The others get new parameters: make a new optimizer if training goes on.
    They begin with the norms that training expects (orthonormal factors, scaled). No rank falls below 1.

    Parameters
    ----------
    adapters : Adapters
    name : str, optional
        Default: the active one.
    n_parameters : int, optional
        Budget for all updates of low rank together; dense ones (biases, modules to save) neither count nor change.
    energy : float, optional
        Share of the sum of all squared entries of the updates that is kept at least. Default, without a budget: 0.99.

    Returns
    -------
    DataFrame
        See `rank_report`.

    Raises
    ------
    ValueError
        If there is no such adapter or no update of low rank, adapters are merged, an update is not finite, budget and
        energy are both given, or one is out of range.

    References
    ----------
    De Lathauwer, De Moor, Vandewalle (2000), SIAM J. Matrix Anal. Appl. 21.

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> adapters = inject_adapters(torch.nn.Linear(20, 30), FLoRAConfig(r=4))
    >>> with torch.no_grad():
    ...     adapters.deltas("default")["weight"].core[:2, :2] = torch.tensor([[1.0, 2.0], [0.5, 1.0]])
    >>> report = truncate(adapters, energy=0.99)
    >>> report[["ranks_before", "ranks_after", "parameters_after"]].values.tolist()
    [[(4, 4), (1, 1), 51]]
    """
    plans = _plans(adapters, name, n_parameters, energy)
    name = adapters._one(name)
    banks = adapters.banks
    for layer, plan in plans.items():
        if plan.after != plan.before:
            banks[layer]._modules[name] = _truncated(plan)
    return _report(plans)


class _Plan:
    """An update in the basis of its singular vectors, and the ranks that it shall have.

    ``energies[n]`` (Rn,) are the squares of mode n's singular values, the largest first.
    """

    def __init__(self, delta: Delta, layer: str) -> None:
        self.delta, self.before, self.after = delta, delta.ranks, delta.ranks
        core, factors, scale = delta.update
        self.core = scale * core.detach().to(torch.float64)
        self.bases: list[Tensor | None] = []
        for n, A in enumerate(factors):
            basis, triangle = (None, None) if A is None else torch.linalg.qr(A.detach().to(torch.float64))
            self.bases.append(basis)
            self.core = self.core if triangle is None else mode_product(self.core, triangle, n)
        if not bool(self.core.isfinite().all()):
            raise ValueError(f"adapters: expected finite updates, got NaN or infinity in {layer!r}")
        self.total = float(self.core.square().sum())
        found = [_left(self.core.movedim(n, 0).reshape(rank, -1)) for n, rank in enumerate(self.before)]
        self.vectors = [vectors for vectors, _ in found]
        self.energies = [values.square().tolist() for _, values in found]

    def parameters(self, ranks: tuple[int, ...]) -> int:
        """How many an update of these ranks has."""
        pairs = zip(ranks, self.delta.shape, strict=True)
        return math.prod(ranks) + sum(rank * size for rank, size in pairs if rank < size)

    @property
    def dropped(self) -> float:
        """Bound of the squared error."""
        return sum(sum(values[rank:]) for values, rank in zip(self.energies, self.after, strict=True))

    def best(self, allowed: float) -> "_Step | None":
        """The step with the least energy for each parameter that it saves; several ranks at once where one saves none.

        A mode without a factor gets one when its rank falls, which may cost more than the core saves.
        """
        now, best = self.parameters(self.after), None
        for n, rank in enumerate(self.after):
            lost = 0.0
            for fewer in range(rank - 1, 0, -1):
                lost += self.energies[n][fewer]
                ranks = (*self.after[:n], fewer, *self.after[n + 1 :])
                saved = now - self.parameters(ranks)
                if lost > allowed:
                    break
                if saved > 0 and (best is None or lost / saved < best.price):
                    best = _Step(lost / saved, lost, saved, ranks)
        return best


class _Step(NamedTuple):
    price: float
    lost: float
    saved: int
    ranks: tuple[int, ...]


def _left(unfolding: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors (R, R) and values (R,), of an unfolding that may have fewer columns than rows."""
    rows, columns = unfolding.shape
    vectors, values, _ = torch.linalg.svd(F.pad(unfolding, (0, max(0, rows - columns))), full_matrices=False)
    return vectors, values


def _low_rank(adapters: Adapters, name: str | None) -> dict[str, Delta]:
    """An adapter's updates but for the dense ones."""
    deltas = adapters.deltas(adapters._one(name))
    if any(isinstance(delta, CPDelta) for delta in deltas.values()):
        raise ValueError("adapters: expected updates in Tucker form, got form='cp', which has one rank for all modes")
    return {layer: delta for layer, delta in deltas.items() if delta.ranks != delta.shape}


def _plans(adapters: Adapters, name: str | None, n_parameters: int | None, energy: float | None) -> dict[str, _Plan]:
    """New ranks of all updates."""
    if n_parameters is not None and energy is not None:
        raise ValueError(f"energy: expected None beside n_parameters, got {energy!r}")
    share = 0.99 if energy is None else energy
    if not (is_number(share) and 0 < share <= 1):
        raise ValueError(f"energy: expected a share above 0 and at most 1, got {energy!r}")
    if n_parameters is not None and not is_integer(n_parameters):
        raise ValueError(f"n_parameters: expected an integer, got {n_parameters!r}")
    adapters._check_unmerged("truncate")
    plans = {layer: _Plan(delta, layer) for layer, delta in _low_rank(adapters, name).items()}
    if not plans:
        raise ValueError("adapters: expected at least one update of low rank, got none")
    count = sum(plan.parameters(plan.before) for plan in plans.values())
    allowed = math.inf if n_parameters is not None else (1 - share) * sum(plan.total for plan in plans.values())
    steps = {layer: plan.best(allowed) for layer, plan in plans.items()}
    while n_parameters is None or count > n_parameters:
        open_steps = {layer: step for layer, step in steps.items() if step is not None}
        if not open_steps:
            break
        layer, step = min(open_steps.items(), key=lambda pair: pair[1].price)
        if step.lost > allowed:  # found when more was allowed
            steps[layer] = plans[layer].best(allowed)
            continue
        plans[layer].after = step.ranks
        count, allowed = count - step.saved, allowed - step.lost
        steps[layer] = plans[layer].best(allowed)
    if n_parameters is not None and count > n_parameters:
        raise ValueError(f"n_parameters: expected at least {count}, as no rank falls below 1, got {n_parameters}")
    return plans


def _truncated(plan: _Plan) -> Delta:
    """The update with new ranks."""
    old = plan.delta
    n_factors = sum(A is not None for A in old.factors)
    scale = step_scale(old.scale / 2.0 ** (n_factors / 2), old.shape, plan.after)
    kind = {"dtype": old.core.dtype, "device": old.core.device}
    new = TuckerDelta(old.shape, plan.after, scale, old.seed, old.config, dropout=old.dropout, **kind)  # type: ignore[arg-type]
    new.zero_row = old.zero_row
    core, factors = plan.core / scale, []
    for n, (size, rank) in enumerate(zip(old.shape, plan.after, strict=True)):
        vectors, basis = plan.vectors[n][:, :rank], plan.bases[n]
        if rank == plan.before[n]:
            vectors = torch.eye(rank, dtype=torch.float64, device=core.device)  # no reason to turn the basis
        norm = math.sqrt(size / (2 * rank)) if rank < size else 1.0
        core = mode_product(core, vectors.mT, n) / norm
        factors.append(None if rank == size else norm * (vectors if basis is None else basis @ vectors))
    new.start(factors)
    new.core.copy_(core)
    return new.train(old.training).requires_grad_(old.core.requires_grad)


def _report(plans: dict[str, _Plan]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "layer": layer,
                "shape": plan.delta.shape,
                "ranks_before": plan.before,
                "ranks_after": plan.after,
                "parameters_before": plan.parameters(plan.before),
                "parameters_after": plan.parameters(plan.after),
                "energy": max(0.0, 1 - plan.dropped / plan.total) if plan.total > 0 else 1.0,
            }
            for layer, plan in plans.items()
        ]
    )
