"""New rows folded into a fitted model, without the old ones.

What the old rows said is in the state: their messages to every coordinate of every mode (and to the core), of fixed
size. They stand as they were sent; the new rows' messages are renewed sweep by sweep and added. The prior is not
touched, so coordinates never seen before take their place in the chain. Where the model is linear and Gaussian (one
mode whose noise is known) this is exact; else it is streaming variational inference.

References
----------
Broderick, Boyd, Wibisono, Wilson, Jordan (2013), "Streaming Variational Bayes", NeurIPS.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from probtensor.cells import find_cells, merge_rows
from probtensor.comm import Comm
from probtensor.inference.kalman import Sites
from probtensor.inference.maximize import maximize
from probtensor.intake import Table
from probtensor.likelihoods import Entries, StudentT
from probtensor.models.functional_fit import everywhere, look_at_cells
from probtensor.models.functional_state import Past, Rows, State
from probtensor.models.functional_table import in_groups, table_rows
from probtensor.models.functional_tucker import LEARN_STEPS, FunctionalTucker
from probtensor.models.latent_functions import LatentFunctions
from probtensor.models.observation import SeenCells

__all__ = ["absorb", "extend"]

MAX_SWEEPS = 20  # over one batch
SETTLED = 1e-3  # change of the rows' means, in standard deviations of the values, at which a batch is done


def extend(
    model: FunctionalTucker, state: State, functions: Sequence[LatentFunctions], places: Sequence[Tensor]
) -> tuple[FunctionalTucker, State]:
    """Model and state over more coordinates.

    Parameters
    ----------
    model : FunctionalTucker
    state : State
    functions : sequence of LatentFunctions
        Over all coordinates, one a mode.
    places : sequence of Tensor, shape (T_k,), int64
        Where the old coordinates are among all.

    Returns
    -------
    model : FunctionalTucker
    state : State
        The same posterior; new coordinates have what the prior makes of it.
    """
    larger = replace(model, functions=tuple(functions))
    factors = []
    for mode, (f, factor, place) in enumerate(zip(functions, state.factors, places, strict=True)):
        if f.size == len(place):
            factors.append(factor)
            continue
        R = factor.log_hyperparameters.shape[1]
        like = factor.sites.shift
        precision, shift = like.new_zeros(f.size, R, R), like.new_zeros(f.size, R)
        precision[place], shift[place] = factor.sites
        sites = Sites(precision, shift)
        hyper = torch.clamp(factor.log_hyperparameters, *f.bounds(R))
        factors.append(larger.factor(mode, sites, hyper))
    return larger, state._replace(factors=tuple(factors))


@torch.no_grad()
def absorb(
    model: FunctionalTucker, state: State, seen: SeenCells | None, table: Table, comm: Comm
) -> tuple[State, SeenCells | None]:
    """Fold the rows of a table in.

    Parameters
    ----------
    model : FunctionalTucker
    state : State
        Fitted; over all coordinates of the table.
    seen : SeenCells or None
        Cells of the earlier rows, on every rank, where cells have residuals.
    table : Table
        New rows of this rank; with residuals of cells, all new rows of a cell on one rank.
    comm : Comm

    Returns
    -------
    state : State
    seen : SeenCells or None
        Earlier and new cells, on every rank.
    """
    likelihood = model.likelihood
    rows, cells = table_rows(model, table) if seen is None else _with_earlier_rows(model, seen, table)
    counted = rows.precision if rows.entries is None else rows.entries.count
    weight = torch.ones_like(rows.values) if counted is None else counted
    n_new, square = comm.sum(torch.stack([weight.sum(), (weight * rows.values**2).sum()]))
    core = None
    if state.core is not None:
        precision = torch.linalg.inv(state.core.covariance)
        core = precision - torch.eye(len(precision)).to(precision), precision @ state.core.mean
    n_old, error = state.n_rows, state.squared_error
    past = Past(tuple(factor.sites for factor in state.factors), core, n_old, error)
    state = state._replace(past=past, n_rows=n_new, square=square)
    rows = model.begin(state, rows)
    mean, _ = model.at_rows(state, rows)
    learning, fixed = model, replace(model, learn=False)
    for sweep in range(MAX_SWEEPS):
        # Hyperparameters take one step a batch: it costs more than the rest of a sweep.
        model = learning if sweep == 1 else fixed
        for block in model.blocks:
            state = model.update(state, block, comm.sum(model.local_statistics(state, block, rows)))
        state, rows = model.end_sweep(state, rows, comm.sum)
        before, (mean, variance) = mean, model.at_rows(state, rows)
        change = comm.sum(torch.stack([((mean - before) ** 2).sum(), mean.new_tensor(float(len(mean)))]))
        if sweep > 1 and float(change[0]) <= SETTLED**2 * float(change[1]):
            break
    if likelihood is not None and len(state.log_parameters):
        entries = rows.entries
        assert entries is not None
        here = maximize(
            lambda p: likelihood.expected_log_prob(p, entries, mean, variance).sum(),
            state.log_parameters,
            likelihood.bounds(state.log_parameters),
            LEARN_STEPS,
            comm.sum,
        )
        # Earlier rows are not asked again: their say is their number.
        share = float(n_new / (n_new + n_old))
        state = state._replace(log_parameters=torch.lerp(state.log_parameters, here, share))
    if seen is not None:
        assert isinstance(likelihood, StudentT)
        assert rows.entries is not None
        here_seen = look_at_cells(likelihood, state.log_parameters, cells, rows.entries, mean, variance)
        seen = _joined(seen, everywhere(here_seen, comm))
    total = state.squared_error + (0.0 if likelihood is not None else error)
    return state._replace(past=None, n_rows=n_new + n_old, squared_error=total), seen


def _with_earlier_rows(model: FunctionalTucker, seen: SeenCells, table: Table) -> tuple[Rows, Tensor]:
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
    return in_groups(model, Rows(new.positions.T.contiguous(), value, None, merged, before)), new.positions


def _joined(seen: SeenCells, new: SeenCells | None) -> SeenCells:
    """Both sets of cells; what is new of a cell replaces what was known."""
    assert new is not None
    stays = find_cells(new.positions, seen.positions) < 0
    return SeenCells(*(torch.cat([a[stays], b]) for a, b in zip(seen, new, strict=True)))
