"""The shell that Bayesian CP and Tucker share: fits, predictive distributions, factors, files."""

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from tqdm import tqdm

from probtensor.axes import CategoricalAxis
from probtensor.blocks import add_up
from probtensor.calibration import ScaleMixture
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm, refuse_together
from probtensor.estimator import TensorRegressor
from probtensor.intake import Table, Where
from probtensor.likelihoods import Likelihood
from probtensor.models.bayesian_parameters import (
    calibrate,
    check_parameters,
    held_out_share,
    observation_from_state,
    observation_of,
    observation_to_state,
    resolve_factor_likelihood,
    resolve_guide,
    row_model,
)
from probtensor.models.factor_guides import (
    Guide,
    MeanField,
    factor_model,
    factor_model_from,
    fit_guide,
    read_factors,
    relevance_of,
    start_parameters,
)
from probtensor.models.factor_posterior import FactorPosterior, RowPosterior
from probtensor.models.funbat_parameters import resolve_ranks
from probtensor.models.funbat_state import likelihood_from_state, likelihood_to_state, read_posterior
from probtensor.models.functional_fit import Fitted, fit
from probtensor.models.functional_table import uniform
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.observation import Observation, draw_values
from probtensor.predictive import Predictive
from probtensor.resources import RandomState, resolve_device, shared_generator

__all__ = ["FactorRegressor"]

FloatArray = npt.NDArray[np.floating[Any]]
PRUNE = 1e-3  # components that contribute less, in standard deviations of y, are dropped
RELEVANT = 2e-2  # components that contribute more count for the effective rank
DECAY = 0.01  # of the learning rate, from the first step to the last: what a guide's draws leave of noise goes with it
SHOW_AFTER = 1.0  # seconds before a progress bar appears


class FactorRegressor(TensorRegressor, ABC):
    """Factorization of a tensor whose modes have labels, with a posterior over factors; see the two subclasses."""

    form: ClassVar[Literal["cp", "tucker"]]
    interpolates: ClassVar[bool] = False  # a coordinate between those seen is as a label that was not seen

    rank: int | Sequence[int]
    likelihood: str | Likelihood
    main_effects: bool
    calibration: float | Literal["auto"]
    relevance: Literal["gamma", "horseshoe"]
    learn_hyperparameters: bool
    max_iter: int
    tol: float
    n_init: int
    n_steps: int
    learning_rate: float
    batch_size: int | None
    random_state: RandomState
    progress: bool
    _posterior: FactorPosterior
    _likelihood: Likelihood
    _observation: Observation | None

    def factor(self, name: str, at: Any = None) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of a mode's factor, one row a label.

        Parameters
        ----------
        name : str
            The mode.
        at : array_like, shape (m,), optional
            Labels, in the user's own type; one that was not seen has what the others share. Default: those of the
            training data, in the order of ``axes_``.

        Returns
        -------
        mean, std : ndarray, shape (m, R)
            Scale and sign are shared with the other modes. Main effects are not among the columns; see `main_effect`.

        Raises
        ------
        ValueError
            If there is no such mode.
        """
        mode, labels = self._labels(name, at)
        mean, std = self._posterior.factor(mode, labels)
        return mean.cpu().numpy().astype(self.dtype_), std.cpu().numpy().astype(self.dtype_)

    def main_effect(self, name: str, at: Any = None) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of what each label of a mode adds to ``f`` by itself.

        Parameters
        ----------
        name : str
            The mode.
        at : array_like, shape (m,), optional
            Labels. Default: those of the training data.

        Returns
        -------
        mean, std : ndarray, shape (m,)
            In the unit of y; for counts, binary and ordinal values, of the logarithm or the log odds.

        Raises
        ------
        ValueError
            If the model has no main effects of its own; those of Tucker are in its core.
        """
        mode, labels = self._labels(name, at)
        found = self._posterior.effect(mode, labels)
        if found is None:
            raise ValueError("main_effect: expected a CP model of two or more modes with main_effects=True")
        mean, variance = (x.cpu().numpy() for x in found)
        return (mean * self.y_scale_).astype(self.dtype_), (np.sqrt(variance) * self.y_scale_).astype(self.dtype_)

    @property
    def bound_(self) -> float:
        """Evidence lower bound of the training values in their own unit."""
        check_is_fitted(self, "bound_history_")
        return self.bound_history_[-1]

    @property
    def noise_std_(self) -> float:
        """Standard deviation (Student-t: scale) of the noise of a row, in the unit of y."""
        check_is_fitted(self, "axes_")
        if self._observation is None:
            raise AttributeError(f"{type(self._likelihood).__name__} has no noise variance")
        return float(self._observation.noise_variance**0.5 * self.y_scale_)

    @property
    def effective_rank_(self) -> int:
        """Components that matter, main effects not counted."""
        check_is_fitted(self, "axes_")
        return int((self.relevance_ > RELEVANT * self.y_scale_).sum())

    @property
    def core_(self) -> FloatArray | None:
        """Mean of the Tucker core, in standardised units; None for CP."""
        check_is_fitted(self, "axes_")
        core = self._posterior.core()
        return None if core is None else core.cpu().numpy()

    def _fit(self, table: Table, comm: Comm, checkpoints: Checkpoints | None) -> None:
        params = self.get_params(deep=False)
        check_parameters(params)
        effects = bool(self.main_effects) and len(self.axes_) > 1
        self.rank_ = resolve_ranks(self.rank, self.form, self.axes_, effects)
        values = table.values
        likelihood = resolve_factor_likelihood(self.likelihood, table.precision is not None, table, comm)
        refuse_together(comm, lambda: likelihood.check(values))
        weights = [torch.ones_like(part.values) if part.count is None else part.count for part in table.blocks()]
        pairs = zip(weights, table.blocks(), strict=True)
        sums = comm.sum(*add_up(torch.stack([w.sum(), (w * part.values).sum()]) for w, part in pairs))
        offset = likelihood.offset(float(sums[1] / sums[0]))
        model = row_model(self.axes_, self.rank_, self.form, effects, params, values, self.y_scale_)
        model = replace(model, likelihood=likelihood, offset=offset)
        self._likelihood, guide = likelihood, resolve_guide(params, self.form)
        generator = shared_generator(self.random_state, comm)
        if guide == "rows":
            share = None if self.calibration == "auto" else float(self.calibration)
            fitted = self._sweep(model, table, comm, generator, share, checkpoints)
            self._posterior, self._observation = RowPosterior(fitted.model, fitted.state), fitted.observation
            self.bound_history_, self.converged_ = fitted.bound_history, fitted.converged
            relevance = fitted.relevance
        else:
            relevance = self._fit_guide(guide, model, table, comm, generator, checkpoints)
        self.n_iter_ = len(self.bound_history_)
        self.relevance_ = np.sort(relevance.cpu().numpy())[::-1] * self.y_scale_
        if self.form == "cp":
            self.rank_ = (len(self.relevance_),) * len(self.axes_)

    def _sweep(
        self,
        model: FunctionalTucker,
        table: Table,
        comm: Comm,
        generator: torch.Generator,
        share: float | None,
        checkpoints: Checkpoints | None,
    ) -> Fitted:
        """Message passing, with a share of the rows held out at first to calibrate on."""
        return fit(
            model,
            table,
            comm,
            generator=generator,
            held_out=share,
            prune_below=PRUNE if self.learn_hyperparameters else 0.0,
            max_iter=self.max_iter,
            tol=self.tol,
            n_init=self.n_init,
            progress=self.progress,
            checkpoints=checkpoints,
        )

    def _fit_guide(
        self,
        guide: Guide,
        rows: FunctionalTucker,
        table: Table,
        comm: Comm,
        generator: torch.Generator,
        checkpoints: Checkpoints | None,
    ) -> Tensor:
        """Variational inference that starts from message passing; the components' relevance, (R,)."""
        # From a copy: sweeps are those of guide="rows" with the same seed, if no rows are held out.
        seed = int(torch.randint(2**62, (1,), generator=torch.Generator().set_state(generator.get_state())))
        held = uniform(table.key, seed) < held_out_share(self.calibration, self._likelihood, table, comm)
        calibrating = bool(comm.sum(held.sum()[None].double()) > 0)
        fitted = self._sweep(rows, table.take(~held), comm, generator, 0.0, None)
        swept = RowPosterior(fitted.model, fitted.state)
        model = factor_model(swept, self.relevance)
        start = start_parameters(swept, model)
        mixture: tuple[ScaleMixture, ...] = ()
        settings: dict[str, Any] = {
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "random_state": seed % 2**31,
        }
        with tqdm(desc="steps", delay=SHOW_AFTER, disable=not (self.progress and comm.is_root)) as bar:

            def report(step: int, bound: float) -> None:
                bar.set_postfix(bound=f"{bound:.6g}", refresh=False)
                bar.update()

            settings |= {"report": report, "decay": DECAY}
            if calibrating:
                found, _ = fit_guide(model, guide, start, table.take(~held), comm, n_steps=self.n_steps, **settings)
                mixture = calibrate(self._likelihood, found, table.take(held), comm)
                start = dict(found.parameters) if isinstance(found, MeanField) else start
            steps = max(self.n_steps // 2, 1) if calibrating else self.n_steps
            found, variational = fit_guide(model, guide, start, table, comm, checkpoints, n_steps=steps, **settings)
        self._posterior = found
        self._observation = observation_of(self._likelihood, found.log_parameters, mixture)
        n_rows = float(comm.sum(table.values.new_tensor([float(len(table.values))])))
        self.bound_history_ = [bound - n_rows * math.log(self.y_scale_) for bound in variational.bound_history]
        self.converged_ = variational.converged
        return relevance_of(found, table, comm)

    def _location_scale(self) -> bool:
        return self.likelihood != "ordinal" and resolve_factor_likelihood(self.likelihood, False).location_scale

    def _labels(self, name: str, at: Any) -> tuple[int, Tensor]:
        check_is_fitted(self, "axes_")
        mode = self._axis(name)
        axis = self.axes_[mode]
        if at is None:
            codes = np.arange(axis.size)
        else:
            codes = np.array(axis.positions(at))
            if isinstance(axis, CategoricalAxis):
                self._warn_of_unknown(axis, codes, at, stacklevel=4)
        return mode, torch.as_tensor(codes, device=self._fitted_device())

    def _predictive(self, where: Where) -> Predictive:
        mean, variance = self._posterior.moments(where.positions)
        if self._observation is None:
            return self._likelihood.predictive(self._posterior.log_parameters, mean, variance)
        return self._observation.predictive(mean, variance, None)

    def _draw(self, where: Where, n_samples: int, generator: torch.Generator) -> Tensor:
        f = self._posterior.draw(where.positions, n_samples, generator)
        if self._observation is None:
            return draw_values(self._likelihood, self._posterior.log_parameters, f, generator)
        moments = self._posterior.moments(where.positions)
        return self._observation.draw(f, *moments, None, list(where.positions.T), generator)

    def _fitted_device(self) -> torch.device:
        return self._posterior.device

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON values that `from_state` makes the fitted model of."""
        arrays, meta = self._posterior.to_state()
        arrays |= {
            "bound_history": torch.tensor(self.bound_history_, dtype=torch.float64),
            "relevance": torch.tensor(self.relevance_.copy()),
        }
        if self._observation is not None:
            of_noise, about = observation_to_state(self._observation)
            arrays, meta = arrays | of_noise, meta | {"noise": about}
        return arrays, meta | {
            "params": self._params_state(),
            "rank": list(self.rank_),
            "converged": self.converged_,
            "of_rows": likelihood_to_state(self._likelihood),
        }

    def _params_state(self) -> dict[str, Any]:
        given = self.likelihood
        state = likelihood_to_state(given) if isinstance(given, Likelihood) else given
        return super()._params_state() | {"likelihood": state}

    @classmethod
    def from_state(cls, arrays: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        """Fitted estimator from what `save` wrote; use `probtensor.load`."""
        given = meta["params"]["likelihood"]
        likelihood = likelihood_from_state(given) if isinstance(given, dict) else given
        return super().from_state(arrays, meta | {"params": meta["params"] | {"likelihood": likelihood}})

    @torch.no_grad()
    def _restore(self, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        device = resolve_device(self.device)
        arrays = {name: array.to(device) for name, array in arrays.items()}
        self.rank_ = tuple(meta["rank"])
        self._likelihood = likelihood_from_state(meta["of_rows"])
        self._observation = observation_from_state(arrays, meta["noise"]) if "noise" in meta else None
        params, like = self.get_params(deep=False), arrays["log_parameters" if "noise" in arrays else "svi.hyper.0"]
        model = row_model(self.axes_, self.rank_, self.form, False, params, like, self.y_scale_)
        if meta["posterior"] == "rows":
            model, state, _ = read_posterior(model, arrays, meta)
            self._posterior = RowPosterior(model, state)
        else:
            self._posterior = read_factors(
                factor_model_from(meta["model"], self._likelihood), arrays, meta["posterior"]
            )
        self.bound_history_ = arrays["bound_history"].tolist()
        self.relevance_ = arrays["relevance"].cpu().numpy()
        self.n_iter_, self.converged_ = len(self.bound_history_), meta["converged"]
