"""The shell that Bayesian CP and Tucker share: fits, predictive distributions, factors, files."""

import math
import os
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probtensor.axes import CategoricalAxis
from probtensor.blocks import add_up
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm, refuse_together
from probtensor.estimator import TensorRegressor
from probtensor.intake import Table, Where
from probtensor.likelihoods import Likelihood
from probtensor.models.bayesian_fit import fit_by_guide, fit_rows
from probtensor.models.bayesian_parameters import (
    check_nonnegative,
    check_parameters,
    held_out_share,
    observation_from_state,
    observation_to_state,
    resolve_factor_likelihood,
    resolve_guide,
    row_model,
)
from probtensor.models.factor_guides import (
    factor_model_from,
    read_factors,
)
from probtensor.models.factor_posterior import FactorPosterior, MixturePosterior, RowPosterior, read_rows
from probtensor.models.funbat_parameters import resolve_ranks
from probtensor.models.funbat_state import likelihood_from_state, likelihood_to_state
from probtensor.models.functional_table import has_repeated_cells
from probtensor.models.nonnegative_counts import NonNegativeCounts, count_predictive, draw_counts
from probtensor.models.nonnegative_posterior import NonNegativePosterior, fit_nonnegative, read_nonnegative
from probtensor.models.nonnegative_values import NonNegativeValues
from probtensor.models.observation import Observation, draw_values
from probtensor.models.side_information import Side, check_the_same, side_of, sides_from_state, sides_to_state
from probtensor.models.side_rows import effects_table, side_positions, with_side_rows
from probtensor.predictive import Predictive
from probtensor.resources import RandomState, resolve_device, shared_generator

__all__ = ["FactorRegressor"]

FloatArray = npt.NDArray[np.floating[Any]]
PRUNE = 1e-3  # components that contribute less, in standard deviations of y, are dropped
RELEVANT = 2e-2  # components that contribute more count for the effective rank
DECAY = 0.01  # of the learning rate, from the first step to the last: what a guide's draws leave of noise goes with it
RARE = 1e-6  # the least mean count
SHOW_AFTER = 1.0  # seconds before a progress bar appears


class FactorRegressor(TensorRegressor, ABC):
    """Factorization of a tensor whose modes have labels, with a posterior over factors; see the two subclasses."""

    form: ClassVar[Literal["cp", "tucker"]]
    prior: Literal["normal", "gamma"] = "normal"
    unlisted: Literal["missing", "zero"] = "missing"
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
    n_members: int
    n_steps: int
    learning_rate: float
    batch_size: int | None
    random_state: RandomState
    progress: bool
    _posterior: FactorPosterior
    _likelihood: Likelihood
    _observation: Observation | None
    _spread: float
    _given: Mapping[str, pd.DataFrame] | None
    _sides: tuple[Side, ...]

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        side_information: Mapping[str, pd.DataFrame] | None = None,
        noise_std: Any = None,
        comm: Comm | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
    ) -> Self:
        """Fit the model to observed entries.

        Parameters
        ----------
        X, y, sample_weight, noise_std, comm, checkpoint, checkpoint_every, resume
            See `TensorRegressor.fit`, also for what is raised.
        side_information : mapping of str to DataFrame, optional
            What is known of the labels of some categorical modes: tables of numbers, strings, categories or truth
            values, indexed by label. Rows of a factor then scatter around what their features say (`feature_effects`);
            with a column of categories, labels of one category share a mean. Labels that no training row has may be
            among them, and are predicted by their features; `unknown` flags them all the same. With `guide="rows"`
            only; for T labels, p features and R components a sweep costs ``T (p + 1)² R² + ((p + 1) R)³`` operations
            more, and (p + 1) R, main effects counted, may be 2048 at most.
        """
        self._given = side_information
        try:
            return super().fit(
                X,
                y,
                sample_weight,
                noise_std=noise_std,
                comm=comm,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                resume=resume,
            )
        finally:
            del self._given

    def feature_effects(self, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Posterior mean and standard deviation of what each feature of a mode's labels adds to the rows of its factor.

        Parameters
        ----------
        name : str
            The mode.

        Returns
        -------
        mean, std : DataFrame, shape (p, R)
            A row a feature, a column a component, in the order of `factor`; for CP with main effects a last column
            "main effect" in the unit of `main_effect`. Where the other modes' factors have a mean, components take part
            in what a feature does on average. Numbers are per standard deviation of the feature, categories and truth
            values against their mean over the labels; "no row" is a label without features.

        Raises
        ------
        ValueError
            If the mode was fitted without side information.

        Examples
        --------
        >>> from probtensor.models import BayesianCP
        >>> X, films = np.random.default_rng(0).integers(0, 30, (500, 2)), pd.DataFrame({"year": range(1960, 2000)})
        >>> y = films["year"].to_numpy()[X[:, 1]] / 20
        >>> model = BayesianCP(rank=1, random_state=0).fit(X, y, side_information={"mode_1": films})
        >>> round(float(model.feature_effects("mode_1")[0].loc["year", "main effect"]), 2)  # 11.5 years / 20
        0.58
        """
        check_is_fitted(self, "axes_")
        mode = self._axis(name)
        side = next((side for side in self._sides if side.mode == mode), None)
        if side is None:
            raise ValueError(f"name: expected a mode with side information, got {name!r}")
        assert isinstance(self._posterior, RowPosterior | MixturePosterior)
        components, effect = self._posterior.feature_effects(mode)
        found = zip(components, (None, None) if effect is None else effect, strict=True)
        labels, scale = self.axes_[mode].distinct, self.y_scale_
        mean, std = (effects_table(side, labels, each, own, scale).astype(self.dtype_) for each, own in found)
        return mean, std

    def factor(self, name: str, at: Any = None) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of a mode's factor, one row a label.

        Parameters
        ----------
        name : str
            The mode.
        at : array_like, shape (m,), optional
            Labels, in the user's own type; one that was not seen has what the others share, or its features say.
            Default: those of the training data, in the order of ``axes_``.

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
            raise ValueError(
                "main_effect: expected a CP model of two or more modes with main_effects=True and a normal prior"
            )
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
        return int((self.relevance_ > RELEVANT * self._spread).sum())

    @property
    def core_(self) -> FloatArray | None:
        """Mean of the Tucker core, in standardised units; None for CP."""
        check_is_fitted(self, "axes_")
        core = self._posterior.core()
        return None if core is None else core.cpu().numpy()

    def _fit(self, table: Table, comm: Comm, checkpoints: Checkpoints | None) -> None:
        params = self.get_params(deep=False)
        check_parameters(params)
        gamma = self.prior == "gamma"
        guide, given = resolve_guide(params, self.form), self._given
        if given is not None and (gamma or guide != "rows"):
            only = 'prior="gamma", only "normal"' if gamma else f'guide={guide!r}, only "rows"'
            raise ValueError(f"side_information: expected None with {only} takes tables")
        self._sides = refuse_together(comm, lambda: side_of(given, self.axes_))
        check_the_same(self._sides, comm)
        if checkpoints is not None:
            checkpoints.tell_apart([side.table.tobytes() for side in self._sides])
        effects = bool(self.main_effects) and len(self.axes_) > 1 and not gamma
        self.rank_ = resolve_ranks(self.rank, self.form, self.axes_, effects)
        values = table.values
        likelihood = resolve_factor_likelihood(self.likelihood, table.precision is not None, table, comm)
        check_nonnegative(params, likelihood)
        refuse_together(comm, lambda: likelihood.check(values))
        self._likelihood, self._spread = likelihood, self.y_scale_
        generator = shared_generator(self.random_state, comm)
        weights = [torch.ones_like(part.values) if part.count is None else part.count for part in table.blocks()]
        pairs = zip(weights, table.blocks(), strict=True)
        sums = comm.sum(*add_up(torch.stack([(w * part.values**k).sum() for k in range(3)]) for w, part in pairs))
        shared: dict[str, Any] = {"generator": generator, "checkpoints": checkpoints}
        if gamma:
            nonnegative, rows = self._nonnegative(table, sums, comm)
            held_out = held_out_share(self.calibration, likelihood, table, comm)
            least = PRUNE * self._spread / self.y_scale_
            found = fit_nonnegative(nonnegative, rows, comm, params, held_out=held_out, prune_below=least, **shared)
        else:
            offset = likelihood.offset(float(sums[1] / sums[0]))
            model = row_model(self.axes_, self.rank_, self.form, effects, params, values, self.y_scale_, self._sides)
            model = replace(model, likelihood=likelihood, offset=offset)
            fit = fit_rows if guide == "rows" else fit_by_guide
            found = fit(model, table, comm, params, prune_below=PRUNE, **shared)
        self._posterior, self._observation = found.posterior, found.observation
        self.bound_history_, self.converged_ = found.bound_history, found.converged
        self.n_iter_ = len(self.bound_history_)
        self.relevance_ = np.sort(found.relevance.cpu().numpy())[::-1] * self.y_scale_
        if self.form == "cp":
            self.rank_ = (len(self.relevance_),) * len(self.axes_)

    def _nonnegative(
        self, table: Table, sums: Tensor, comm: Comm
    ) -> tuple[NonNegativeCounts | NonNegativeValues, Table]:
        """The model with non-negative factors, and the rows as it takes them; `sums` of the values' powers 0 to 2."""
        sizes, rank = tuple(axis.size for axis in self.axes_), self.rank_[0]
        shape, rate = (float(x) for x in self.relevance_prior)
        shared: dict[str, Any] = {"relevance_prior": (shape, rate), "learn": bool(self.learn_hyperparameters)}
        model: NonNegativeCounts | NonNegativeValues
        if self._likelihood.location_scale:
            # Non-negative factors are of y itself, in a unit of its own but not centred.
            table = replace(table, values=table.values + self.y_mean_ / self.y_scale_)
            mean, self.y_mean_ = self.y_mean_, 0.0
            if mean <= 0:
                raise ValueError(f'y: expected values of a mean above 0 with prior="gamma", got mean {mean:g}')
            settings = shared | {"log_scale": math.log(self.y_scale_)}
            model = NonNegativeValues(sizes, rank, mean / self.y_scale_, self._likelihood, **settings)
        else:
            zeros = self.unlisted == "zero"
            if zeros and table.count is not None:
                raise ValueError('sample_weight: expected None with unlisted="zero", got numbers')
            if zeros and has_repeated_cells(table, comm):
                raise ValueError(
                    f'duplicates: expected "sum" with unlisted="zero", as rows repeat cells, got {self.duplicates!r}'
                )
            n_rows, total, square = sums.tolist()
            self._spread = math.sqrt(max(square / n_rows - (total / n_rows) ** 2, 0.0)) or 1.0
            mean = max(total / (math.prod(sizes) if zeros else n_rows), RARE)
            model = NonNegativeCounts(sizes, rank, mean, all_cells=zeros, **shared)
        return model, table

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
            for side in self._sides:
                codes = side_positions(side, axis.size, at, codes) if side.mode == mode else codes
        return mode, torch.as_tensor(codes, device=self._fitted_device())

    def _predictive(self, where: Where) -> Predictive:
        mean, variance = self._posterior.moments(with_side_rows(self._sides, self.axes_, where))
        if self._observation is None and isinstance(self._posterior, NonNegativePosterior):
            return count_predictive(mean, variance)
        if self._observation is None:
            return self._likelihood.predictive(self._posterior.log_parameters, mean, variance)
        return self._observation.predictive(mean, variance, None)

    def _draw(self, where: Where, n_samples: int, generator: torch.Generator) -> Tensor:
        positions = with_side_rows(self._sides, self.axes_, where)
        f = self._posterior.draw(positions, n_samples, generator)
        if self._observation is None and isinstance(self._posterior, NonNegativePosterior):
            return draw_counts(f, generator)
        if self._observation is None:
            return draw_values(self._likelihood, self._posterior.log_parameters, f, generator)
        moments = self._posterior.moments(positions)
        return self._observation.draw(f, *moments, None, list(positions.T), generator)

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
        of_sides, about = sides_to_state(self._sides)
        arrays, meta = arrays | of_sides, meta | about
        return arrays, meta | {
            "params": self._params_state(),
            "rank": list(self.rank_),
            "converged": self.converged_,
            "spread": self._spread,
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
        self._spread = meta["spread"]
        self.bound_history_ = arrays["bound_history"].tolist()
        self.relevance_ = arrays["relevance"].cpu().numpy()
        self.n_iter_, self.converged_ = len(self.bound_history_), meta["converged"]
        self._sides = sides_from_state(arrays, meta)
        if meta["posterior"] == "nonnegative":
            self._posterior = read_nonnegative(arrays, meta)
            return
        params, like = self.get_params(deep=False), arrays["bound_history"]
        model = row_model(self.axes_, self.rank_, self.form, False, params, like, self.y_scale_, self._sides)
        if meta["posterior"] in ("rows", "mixture"):
            self._posterior = read_rows(model, arrays, meta)
        else:
            self._posterior = read_factors(
                factor_model_from(meta["model"], self._likelihood), arrays, meta["posterior"]
            )
