"""How Bayesian CP and Tucker with normal factors are fitted: by message passing, or by guides that start from it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from probtensor.calibration import ScaleMixture
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.intake import Table
from probtensor.models.bayesian_parameters import calibrate, held_out_share, observation_of, resolve_guide
from probtensor.models.factor_guides import MeanField, factor_model, fit_guide, relevance_of, start_parameters
from probtensor.models.factor_posterior import FactorFit, RowPosterior
from probtensor.models.functional_fit import Fitted, fit
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
    """Message passing, with a share of the rows held out at first to calibrate on.

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
    share = None if params["calibration"] == "auto" else float(params["calibration"])
    fitted = _sweep(model, table, comm, params, share, prune_below, generator, checkpoints)
    posterior = RowPosterior(fitted.model, fitted.state)
    return FactorFit(posterior, fitted.observation, fitted.bound_history, fitted.converged, fitted.relevance)


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
    held = uniform(table.key, seed) < held_out_share(params["calibration"], likelihood, table, comm)
    calibrating = bool(comm.sum(held.sum()[None].double()) > 0)
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
            mixture = calibrate(likelihood, found, table.take(held), comm)
            start = dict(found.parameters) if isinstance(found, MeanField) else start
            n_steps = max(n_steps // 2, 1)
        found, variational = fit_guide(density, guide, start, table, comm, checkpoints, n_steps=n_steps, **settings)
    observation = observation_of(likelihood, found.log_parameters, mixture)
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
) -> Fitted:
    settings = params["max_iter"], params["tol"], params["n_init"]
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
        start=None if model.form == "cp" else start,
    )
