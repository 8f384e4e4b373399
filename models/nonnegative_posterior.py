"""Posterior of non-negative factors, whose numbers are independent, and how it is fitted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.calibration import ScaleMixture
from probtensor.cells import single_rows
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.gaussian import Gamma
from probtensor.inference.message_passing import MessagePassingModel, Progress, Result, run
from probtensor.intake import Table as Observed
from probtensor.models.bayesian_parameters import (
    calibrate,
    observation_from_state,
    observation_of,
    observation_to_state,
)
from probtensor.models.factor_posterior import FactorFit, FactorPosterior
from probtensor.models.functional_fit import no_convergence_warning, typical_noise
from probtensor.models.functional_table import uniform
from probtensor.models.nonnegative_counts import NonNegativeCounts, NonNegativeRows, NonNegativeState
from probtensor.models.nonnegative_tables import RectifiedNormals, Table, chunks_of, moments_at
from probtensor.models.nonnegative_values import LIGHT_TAILS, NonNegativeValues, ValueRows
from probtensor.models.observation import Observation

__all__ = ["NonNegativePosterior", "fit_nonnegative", "read_nonnegative"]

MIN_SWEEPS = 10
COUNTS_TOL = 0.1  # of the tolerance: sweeps over counts are smaller steps
KINDS: dict[str, type[Gamma] | type[RectifiedNormals]] = {"counts": Gamma, "values": RectifiedNormals}


@dataclass(frozen=True, eq=False)
class NonNegativePosterior(FactorPosterior):
    """Independent gamma distributions (counts) or rectified normals (real values).

    Attributes
    ----------
    state : NonNegativeState
    n_modes : int
    """

    state: NonNegativeState
    n_modes: int

    @property
    def log_parameters(self) -> Tensor:  # type: ignore[override]
        """Logarithms of the likelihood's parameters, (P,)."""
        return self.state.log_parameters

    def tables(self, mode: int) -> tuple[Tensor, Tensor]:
        """Means and variances (I_k + 1, R) of the rows of a factor; the last is of a label that is not known."""
        table, prior = self.state.tables[mode], self.state.hyper[mode].exp()
        mean = torch.ones_like(prior) if isinstance(table, Gamma) else 1 / prior
        variance = 1 / prior if isinstance(table, Gamma) else prior**-2
        return torch.cat([table.mean, mean[None]]), torch.cat([table.variance, variance[None]])

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (R,) of the components' weights; ones where factors have their own unit."""
        if len(self.state.tables) == self.n_modes:
            one = torch.ones_like(self.state.hyper[0])
            return one, 0 * one
        return self.state.tables[-1].mean[0], self.state.tables[-1].variance[0]

    def moments(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102 - inherited
        means, variances = zip(*(self.tables(k) for k in range(self.n_modes)), strict=True)
        places = torch.stack([p.remainder(len(mean)) for p, mean in zip(positions.T, means, strict=True)])
        return moments_at(means, variances, places, self.weights)

    def draw(self, positions: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        found = []
        for _ in range(n_samples):
            product = torch.ones_like(self.state.hyper[0])[None]
            for k, table in enumerate(self.state.tables):
                drawn = table.draw(rng)
                if k == self.n_modes:  # the weights
                    product = product * drawn
                    continue
                prior = self.state.hyper[k].exp().cpu().numpy()
                shape = prior if isinstance(table, Gamma) else np.ones_like(prior)
                new = torch.from_numpy(rng.gamma(shape, 1 / prior)).to(drawn)
                drawn = torch.cat([drawn, new[None]])
                product = product * drawn[positions[:, k].remainder(len(drawn))]
            found.append(product.sum(1))
        return torch.stack(found)

    def factor(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        mean, variance = self.tables(mode)
        rows = labels.remainder(len(mean))
        return mean[rows], variance[rows].sqrt()

    def effect(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: D102
        return None

    def core(self) -> Tensor | None:  # noqa: D102
        return None

    def component_squares(self, positions: Tensor) -> Tensor:
        """``E`` of each component's square at positions (n, K), summed over them, (R,)."""
        mean, variance = self.weights
        tables = [self.tables(k) for k in range(self.n_modes)]
        total = torch.zeros_like(mean)
        for chunk in chunks_of(len(positions), len(mean)):
            product = (mean**2 + variance).expand(len(positions[chunk]), -1)
            for (m, v), p in zip(tables, positions[chunk].T, strict=True):
                product = product * (m**2 + v).index_select(0, p)
            total = total + product.sum(0)
        return total

    def only(self, kept: Tensor) -> "NonNegativePosterior":
        """The components of a mask (R,)."""
        tables = tuple(type(table)(*(x[:, kept] for x in table)) for table in self.state.tables)
        hyper = tuple(x[kept] for x in self.state.hyper)
        return replace(self, state=self.state._replace(tables=tables, hyper=hyper))

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:  # noqa: D102
        arrays, meta = _write(self.state)
        return arrays, meta | {"posterior": "nonnegative", "n_modes": self.n_modes}


def read_nonnegative(arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> NonNegativePosterior:
    """What `NonNegativePosterior.to_state` wrote."""
    return NonNegativePosterior(_read(arrays, meta), meta["n_modes"])


def _write(state: NonNegativeState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arrays = {"log_parameters": state.log_parameters, "expected": state.expected}
    arrays |= {f"hyper.{k}": x for k, x in enumerate(state.hyper)}
    for k, table in enumerate(state.tables):
        arrays |= {f"table.{k}.{part}": x.contiguous() for part, x in enumerate(table)}
    kind = "counts" if isinstance(state.tables[0], Gamma) else "values"
    return arrays, {"kind": kind, "sweep": state.sweep, "n_tables": len(state.tables)}


def _read(arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> NonNegativeState:
    table = KINDS[meta["kind"]]
    tables: tuple[Table, ...] = tuple(
        table(arrays[f"table.{k}.0"], arrays[f"table.{k}.1"]) for k in range(meta["n_tables"])
    )
    hyper = tuple(arrays[f"hyper.{k}"] for k in range(sum(name.startswith("hyper.") for name in arrays)))
    return NonNegativeState(tables, hyper, arrays["log_parameters"], arrays["expected"], meta["sweep"])


class _Stage(NamedTuple):
    """A fit under way: whether all rows are fitted, bounds of the stage before, what held-out rows said, progress."""

    is_last: bool
    before: list[float]
    mixture: tuple[ScaleMixture, ...]
    progress: Progress[NonNegativeState] | None


def fit_nonnegative(
    model: NonNegativeCounts | NonNegativeValues,
    table: Observed,
    comm: Comm,
    params: Mapping[str, Any],
    *,
    held_out: float,
    prune_below: float,
    generator: torch.Generator,
    checkpoints: Checkpoints | None,
) -> FactorFit:
    """Fit, calibrate on rows held out, go on with all rows, and drop the components that give next to nothing.

    Parameters
    ----------
    model : NonNegativeCounts or NonNegativeValues
    table : Table
        Rows of this rank.
    comm : Comm
    params : mapping
        Of the estimator; for counts a tenth of `tol` is taken.
    held_out : float
        Share of the rows to calibrate on.
    prune_below : float
        Relevance of components that are dropped, where hyperparameters are learned; at least one stays.
    generator : torch.Generator
        In the same state on every rank.
    checkpoints : Checkpoints or None
    """
    likelihood = model.likelihood if isinstance(model, NonNegativeValues) else None
    seed = int(torch.randint(2**62, (1,), generator=generator))
    noise = typical_noise(table, comm)
    at = _Stage(held_out == 0, [], (), None)
    if checkpoints is not None and (saved := checkpoints.read()) is not None:
        seed, at = _resumed(*saved, generator, table.values.device)
    held = uniform(table.key, seed) < held_out
    n_modes = table.positions.shape[1]
    n_rows = float(comm.sum(table.values.new_tensor([float(len(table.values))])))

    def sweeps(stage: _Stage, given: Observed, limit: int) -> Result[NonNegativeState]:
        def keep(now: Progress[NonNegativeState]) -> bool:
            assert checkpoints is not None
            due = checkpoints.due()
            if due:
                checkpoints.write(*_saved(stage._replace(progress=now), seed, generator))
            return due

        parts = [_rows(model, part) for part in ([given] if given.values.is_cuda else given.blocks())]
        heavy = likelihood is not None and likelihood.light_tailed() != likelihood
        return run(
            cast(MessagePassingModel[NonNegativeState, NonNegativeRows | ValueRows, int], model),
            parts,
            comm=comm,
            generator=generator,
            max_iter=limit,
            tol=params["tol"] * (COUNTS_TOL if isinstance(model, NonNegativeCounts) else 1.0),
            scale=n_rows,
            n_init=params["n_init"],
            min_iter=MIN_SWEEPS + (LIGHT_TAILS if heavy and not stage.before else 0),
            resume=stage.progress,
            after_sweep=None if checkpoints is None else keep,
            progress=params["progress"],
        )

    max_iter = params["max_iter"]
    if not at.is_last:
        with no_convergence_warning(quiet=True):
            found = sweeps(at, table.take(~held), max_iter)
        assert likelihood is not None
        first = NonNegativePosterior(found.state, n_modes)
        mixture = calibrate(likelihood, first, table.take(held), comm, noise)
        at = _Stage(True, found.bound_history, mixture, Progress(params["n_init"], found.state, [], None))
    left = max(max_iter - len(at.before), min(max_iter, MIN_SWEEPS))
    found = sweeps(at, table, left)
    posterior = NonNegativePosterior(found.state, n_modes)
    squares = comm.sum(*add_up(posterior.component_squares(part.positions) for part in table.blocks()))
    relevance = (squares / n_rows).sqrt()
    kept = (relevance >= (prune_below if params["learn_hyperparameters"] else 0.0)) | (relevance == relevance.max())
    observation = None
    if likelihood is not None:
        observation = observation_of(likelihood, posterior.log_parameters, at.mixture, noise)
    history = at.before + found.bound_history
    return FactorFit(posterior.only(kept), observation, history, found.converged, relevance[kept])


def _rows(model: NonNegativeCounts | NonNegativeValues, table: Observed) -> NonNegativeRows | ValueRows:
    positions = table.positions.T.contiguous()
    entries = single_rows(table.values, table.count, table.precision)
    if isinstance(model, NonNegativeCounts):
        return NonNegativeRows(positions, table.values, entries.count)
    return ValueRows(positions, entries)


def _saved(stage: _Stage, seed: int, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and JSON values of a fit under way."""
    now = stage.progress
    assert now is not None
    state, about = _write(now.state)
    of_noise, about_noise = observation_to_state(Observation(1.0, 0.0, math.inf, None, stage.mixture))
    arrays = {f"now.{name}": x for name, x in state.items()} | of_noise | {"generator": generator.get_state()}
    meta = {"seed": seed, "is_last": stage.is_last, "before": stage.before, "noise": about_noise, "now": about}
    meta |= {"trial": now.trial, "history": now.history}
    if now.best is not None:
        best, meta["best"] = _write(now.best[0])
        arrays |= {f"best.{name}": x for name, x in best.items()}
        meta["best_history"] = now.best[1]
    return arrays, meta


def _resumed(
    arrays: dict[str, Tensor], meta: dict[str, Any], generator: torch.Generator, device: torch.device
) -> tuple[int, _Stage]:
    """What `_saved` gave; sets the generator."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x.to(device) for name, x in arrays.items() if name.startswith(prefix)}

    generator.set_state(arrays["generator"])
    best = (_read(part("best."), meta["best"]), meta["best_history"]) if "best" in meta else None
    now = Progress(meta["trial"], _read(part("now."), meta["now"]), meta["history"], best)
    return meta["seed"], _Stage(
        meta["is_last"], meta["before"], observation_from_state(arrays, meta["noise"]).calibration, now
    )
