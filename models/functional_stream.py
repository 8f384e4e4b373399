"""New rows folded into a fitted model, without the old ones.

What the old rows said is in the state: their messages to every coordinate of every mode (and to the core), of fixed
size. They stand as they were sent; the new rows' messages are renewed sweep by sweep and added. The prior is not
touched, so coordinates never seen before take their place in the chain. Where the model is linear and Gaussian (one
mode whose noise is known) this is exact; else it is streaming variational inference.

The new rows' messages go to the coordinates that they have, few of all. What the others' messages say of these is
summed up once a batch (`LatentFunctions.given`), so that a sweep costs what the new rows cost, to the same posterior.
All coordinates are smoothed once, after the sweeps. Hyperparameters take a step, with all coordinates too, whenever the
rows have become a tenth more.

References
----------
Broderick, Boyd, Wibisono, Wilson, Jordan (2013), "Streaming Variational Bayes", NeurIPS.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.cells import find_cells, merge_rows
from probtensor.comm import Comm
from probtensor.inference.kalman import Sites
from probtensor.intake import Table
from probtensor.likelihoods import Entries, StudentT
from probtensor.models.functional_fit import everywhere, look_at_cells
from probtensor.models.functional_state import Factor, Past, Rows, State
from probtensor.models.functional_table import in_groups, plain_rows
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import LatentFunctions
from probtensor.models.observation import SeenCells

__all__ = ["absorb"]

MAX_SWEEPS = 20  # over one batch
LEARN_GROWTH = 1.1  # of the rows, between steps of the hyperparameters: their cost a row stays what it was
SETTLED = 1e-3  # change of the rows' means, in standard deviations of the values, at which a batch is done


@torch.no_grad()
def absorb(
    model: FunctionalTucker,
    state: State,
    places: Sequence[Tensor],
    seen: SeenCells | None,
    table: Table,
    comm: Comm,
) -> tuple[State, SeenCells | None]:
    """Fold the rows of a table in.

    Parameters
    ----------
    model : FunctionalTucker
        Over all coordinates, the table's and the state's.
    state : State
        Fitted.
    places : sequence of Tensor, shape (T_k,), int64
        Where the state's coordinates are among all.
    seen : SeenCells or None
        Cells of the earlier rows, on every rank, where cells have residuals.
    table : Table
        New rows of this rank; with residuals of cells, all new rows of a cell on one rank.
    comm : Comm

    Returns
    -------
    state : State
        Over all coordinates.
    seen : SeenCells or None
        Earlier and new cells, on every rank.
    """
    likelihood = model.likelihood
    rows, cells = plain_rows(model, table) if seen is None else _with_earlier_rows(seen, table)
    counted = rows.precision if rows.entries is None else rows.entries.count
    weight = torch.ones_like(rows.values) if counted is None else counted
    n_new, square = comm.sum(torch.stack([weight.sum(), (weight * rows.values**2).sum()]))
    n_old, error = state.n_rows, state.squared_error
    met = [_met(p, f.size, comm) for p, f in zip(rows.positions, model.functions, strict=True)]
    factors = [
        _larger(factor, place, f) for factor, place, f in zip(state.factors, places, model.functions, strict=True)
    ]
    state = _at_hand(model, state._replace(factors=tuple(factors)), met)._replace(n_rows=n_new, square=square)
    among = torch.stack([torch.searchsorted(at, p) for at, p in zip(met, rows.positions, strict=True)])
    rows = in_groups(model, rows._replace(positions=among), [len(at) for at in met])
    rows = model.begin(state, rows)
    mean, _ = model.at_rows(state, rows)

    def sum_over(parts: Iterable[Tensor]) -> Tensor:
        return comm.sum(*add_up(parts))

    for sweep in range(MAX_SWEEPS):
        for block in model.blocks:
            state = model.update(state, block, comm.sum(model.local_statistics(state, block, rows)))
        state, (rows,) = model.end_sweep(state, [rows], sum_over)
        before, (mean, variance) = mean, model.at_rows(state, rows)
        change = comm.sum(torch.stack([((mean - before) ** 2).sum(), mean.new_tensor(float(len(mean)))]))
        if sweep > 1 and float(change[0]) <= SETTLED**2 * float(change[1]):
            break
    if likelihood is not None:
        here = model.fitted_parameters(state, [(rows, mean, variance)], sum_over)
        # Earlier rows are not asked again: their say is their number.
        share = float(n_new / (n_new + n_old))
        state = state._replace(log_parameters=torch.lerp(state.log_parameters, here, share))
    if seen is not None:
        assert isinstance(likelihood, StudentT)
        assert rows.entries is not None
        here_seen = look_at_cells(likelihood, state.log_parameters, cells, rows.entries, mean, variance)
        seen = _joined(seen, everywhere(here_seen, comm))
    total = state.squared_error + (0.0 if likelihood is not None else error)
    due = model.learn and math.floor(_steps(n_new + n_old)) > math.floor(_steps(n_old))
    for mode, (factor, now, at) in enumerate(zip(factors, state.factors, met, strict=True)):
        sites = Sites(*(x.index_copy(0, at, new) for x, new in zip(factor.sites, now.sites, strict=True)))
        hyper = factor.log_hyperparameters
        factors[mode] = model.factor(mode, sites, model.learned(mode, sites, hyper, state.sweep) if due else hyper)
    return state._replace(factors=tuple(factors), past=None, n_rows=n_new + n_old, squared_error=total), seen


def _steps(n_rows: Tensor) -> float:
    """How often the rows have grown by the factor `LEARN_GROWTH`, from one on."""
    return math.log(float(n_rows)) / math.log(LEARN_GROWTH)


def _met(positions: Tensor, size: int, comm: Comm) -> Tensor:
    """Which of `size` coordinates the rows of any rank have, sorted."""
    return comm.sum(torch.bincount(positions, minlength=size).double()).nonzero().squeeze(-1)


def _larger(factor: Factor, place: Tensor, f: LatentFunctions) -> Factor:
    """A factor with sites of all coordinates of `f`; those it had are at `place`."""
    sites = Sites(*(x.new_zeros(f.size, *x.shape[1:]).index_copy(0, place, x) for x in factor.sites))
    hyper = factor.log_hyperparameters
    return factor._replace(sites=sites, log_hyperparameters=torch.clamp(hyper, *f.bounds(hyper.shape[1])))


def _at_hand(model: FunctionalTucker, state: State, here: Sequence[Tensor]) -> State:
    """The state at some coordinates of each mode, with all that earlier rows have said as its past."""
    sites, given, factors = [], [], []
    for mode, (f, factor, at) in enumerate(zip(model.functions, state.factors, here, strict=True)):
        sites.append(Sites(*(x[at] for x in factor.sites)))
        given.append(f.given(factor.log_hyperparameters, factor.sites, at))
        factors.append(model.factor_at_hand(mode, factor, sites[-1], given[-1]))
    core = None
    if state.core is not None:
        precision = torch.linalg.inv(state.core.covariance)
        core = precision - torch.eye(len(precision)).to(precision), precision @ state.core.mean
    past = Past(tuple(sites), tuple(given), core, state.n_rows, state.squared_error)
    return state._replace(factors=tuple(factors), past=past)


def _with_earlier_rows(seen: SeenCells, table: Table) -> tuple[Rows, Tensor]:
    """The table's cells with all rows they ever had, and their positions (C, K)."""
    new = merge_rows(table.positions, table.values, table.count, table.precision)
    known = find_cells(seen.positions, new.positions)
    has = known >= 0
    before = Entries(*(torch.where(has, part[known.clamp(min=0)], 0.0) for part in seen.entries))
    weight = before.weight + new.entries.weight
    step = new.entries.value - before.value
    value = before.value + step * new.entries.weight / weight
    scatter = before.scatter + new.entries.scatter + step**2 * before.weight * new.entries.weight / weight
    count, log_weight = before.count + new.entries.count, before.log_weight + new.entries.log_weight
    merged = Entries(count, weight, value, scatter, log_weight)
    return Rows(new.positions.T.contiguous(), value, None, merged, before), new.positions


def _joined(seen: SeenCells, new: SeenCells | None) -> SeenCells:
    """Both sets of cells; what is new of a cell replaces what was known."""
    assert new is not None
    stays = find_cells(new.positions, seen.positions) < 0
    return SeenCells(*(torch.cat([a[stays], b]) for a, b in zip(seen, new, strict=True)))
