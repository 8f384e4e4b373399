"""How Bayesian CP and Tucker with normal factors are fitted: by message passing, or by guides that start from it."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from probtensor.blocks import add_up
from probtensor.calibration import ScaleMixture
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.intake import Table
from probtensor.likelihoods import Likelihood
from probtensor.models.bayesian_parameters import calibrate, held_out_share, observation_of, resolve_guide
from probtensor.models.factor_guides import MeanField, factor_model, fit_guide, relevance_of, start_parameters
from probtensor.models.factor_posterior import FactorFit, MixturePosterior, RowPosterior
from probtensor.models.functional_fit import Fitted, fit, no_convergence_warning, typical_noise
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_table import uniform
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.tucker_start import start_from_components

__all__ = ["fit_by_guide", "fit_rows"]

DECAY = 0.01  # of the learning rate, from the first step to the last: what a guide's draws leave of noise goes with it
SHOW_AFTER = 1.0  # seconds before a progress bar appears


def fit_rows(
    model: FunctionalTucker,
    table: Table,
    comm: Comm,
    params: Mapping[str, Any],
    *,
    prune_below: float,
    generator: torch.Generator,
    checkpoints: Checkpoints | None,
) -> FactorFit:
    """Message passing, with a share of the rows held out at first to calibrate on; from several starts if asked to.

    Parameters
    ----------
    model : FunctionalTucker
    table : Table
        Rows of this rank.
    comm : Comm
    params : mapping
        Of the estimator.
    prune_below : float
        Relevance of components that are dropped.
    generator : torch.Generator
        In the same state on every rank.
    checkpoints : Checkpoints or None
    """
    if params["n_members"] > 1:
        return _fit_members(model, table, comm, params, prune_below, generator, checkpoints)
    share = None if params["calibration"] == "auto" else float(params["calibration"])
    fitted = _sweep(model, table, comm, params, share, prune_below, generator, checkpoints)
    posterior = RowPosterior(fitted.model, fitted.state)
    return FactorFit(posterior, fitted.observation, fitted.bound_history, fitted.converged, fitted.relevance)


def _fit_members(
    model: FunctionalTucker,
    table: Table,
    comm: Comm,
    params: Mapping[str, Any],
    prune_below: float,
    generator: torch.Generator,
    checkpoints: Checkpoints | None,
) -> FactorFit:
    """Message passing from several starts; what is calibrated is their mixture."""
    assert model.likelihood is not None
    seeds = torch.randint(2**62, (params["n_members"] + 1,), generator=generator).tolist()
    held, calibrating = _held_out(model.likelihood, table, comm, params, seeds[-1])
    noise = typical_noise(table, comm)
    generators = [torch.Generator(generator.device).manual_seed(seed) for seed in seeds[:-1]]
    fitted: list[Fitted] = []
    mixture: tuple[ScaleMixture, ...] = ()
    quiet = dict(params) | {"progress": False}
    n_fits = len(generators) * (1 + calibrating)
    with tqdm(total=n_fits, desc="fits", delay=SHOW_AFTER, disable=not (params["progress"] and comm.is_root)) as bar:
        for rows, name in ((table.take(~held), "part"), (table, "all"))[not calibrating :]:
            found = []
            for m, own in enumerate(generators):
                before = fitted[m] if fitted else None
                part = nullcontext() if checkpoints is None else checkpoints.within(f"member-{m}-{name}")
                with part, no_convergence_warning(quiet=name == "part"):
                    found.append(_sweep(model, rows, comm, quiet, 0.0, prune_below, own, checkpoints, before=before))
                bar.update()
            fitted = found
            if name == "part":
                mixture = calibrate(model.likelihood, _mixture(fitted), table.take(held), comm, noise)
    best = max(fitted, key=lambda each: each.bound_history[-1])
    posterior = _mixture(fitted)
    observation = observation_of(model.likelihood, posterior.log_parameters, mixture, noise)
    converged = all(each.converged for each in fitted)
    return FactorFit(posterior, observation, best.bound_history, converged, best.relevance)


def _held_out(
    likelihood: Likelihood, table: Table, comm: Comm, params: Mapping[str, Any], seed: int
) -> tuple[Tensor, bool]:
    """Rows of this rank to calibrate on, and whether there are any on all ranks."""
    held = uniform(table.key, seed) < held_out_share(params["calibration"], likelihood, table, comm)
    return held, bool(comm.sum(held.sum()[None].double()) > 0)


def _mixture(fitted: list[Fitted]) -> MixturePosterior:
    ranked = sorted(fitted, key=lambda each: each.bound_history[-1], reverse=True)
    return MixturePosterior(tuple(RowPosterior(each.model, each.state) for each in ranked))


def fit_by_guide(
    model: FunctionalTucker,
    table: Table,
    comm: Comm,
    params: Mapping[str, Any],
    *,
    prune_below: float,
    generator: torch.Generator,
    checkpoints: Checkpoints | None,
) -> FactorFit:
    """Variational inference that starts from message passing; parameters as for `fit_rows`."""
    assert model.likelihood is not None
    guide, likelihood = resolve_guide(params, model.form), model.likelihood
    # From a copy: sweeps are those of guide="rows" with the same seed, if no rows are held out.
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().set_state(generator.get_state())))
    held, calibrating = _held_out(likelihood, table, comm, params, seed)
    noise = typical_noise(table, comm)
    fitted = _sweep(model, table.take(~held), comm, params, 0.0, prune_below, generator, None)
    swept = RowPosterior(fitted.model, fitted.state)
    density = factor_model(swept, params["relevance"])
    start, n_steps = start_parameters(swept, density), params["n_steps"]
    mixture: tuple[ScaleMixture, ...] = ()
    settings: dict[str, Any] = {name: params[name] for name in ("batch_size", "learning_rate")}
    with tqdm(desc="steps", delay=SHOW_AFTER, disable=not (params["progress"] and comm.is_root)) as bar:

        def report(step: int, bound: float) -> None:
            bar.set_postfix(bound=f"{bound:.6g}", refresh=False)
            bar.update()

        settings |= {"random_state": seed % 2**31, "report": report, "decay": DECAY}
        if calibrating:
            found, _ = fit_guide(density, guide, start, table.take(~held), comm, n_steps=n_steps, **settings)
            mixture = calibrate(likelihood, found, table.take(held), comm, noise)
            start = dict(found.parameters) if isinstance(found, MeanField) else start
            n_steps = max(n_steps // 2, 1)
        found, variational = fit_guide(density, guide, start, table, comm, checkpoints, n_steps=n_steps, **settings)
    observation = observation_of(likelihood, found.log_parameters, mixture, noise)
    n_rows = float(comm.sum(table.values.new_tensor([float(len(table.values))])))
    history = [bound - n_rows * model.log_scale for bound in variational.bound_history]
    return FactorFit(found, observation, history, variational.converged, relevance_of(found, table, comm))


def _sweep(
    model: FunctionalTucker,
    table: Table,
    comm: Comm,
    params: Mapping[str, Any],
    share: float | None,
    prune_below: float,
    generator: torch.Generator,
    checkpoints: Checkpoints | None,
    before: Fitted | None = None,
) -> Fitted:
    """One fit; from the state of one `before`, with other rows, if there is one."""
    settings = params["max_iter"], params["tol"], params["n_init"]
    start: Callable[[list[Rows]], State] | None = None
    if before is not None:
        model, start = before.model, partial(_from_state, before, comm)
    elif model.form == "tucker":
        start = partial(start_from_components, model, comm=comm, settings=settings, generator=generator)
    return fit(
        model,
        table,
        comm,
        generator=generator,
        held_out=share,
        prune_below=prune_below if params["learn_hyperparameters"] else 0.0,
        max_iter=params["max_iter"],
        tol=params["tol"],
        n_init=params["n_init"],
        progress=params["progress"],
        checkpoints=checkpoints,
        start=start,
    )


def _from_state(before: Fitted, comm: Comm, rows: list[Rows]) -> State:
    """The state of a fit to other rows."""
    n_rows, square = comm.sum(*add_up(before.model.local_start(part)[:2] for part in rows))
    return before.state._replace(n_rows=n_rows, square=square)
