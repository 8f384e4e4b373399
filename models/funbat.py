"""FunBaT, functional Bayesian Tucker and CP, as an estimator."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probtensor.axes import Axis
from probtensor.blocks import add_up
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm, Serial, refuse_together
from probtensor.data import Duplicates
from probtensor.estimator import TensorRegressor
from probtensor.intake import Table, Where, observe_more, row_keys, row_numbers, seen_after
from probtensor.likelihoods import Likelihood, StudentT
from probtensor.models.funbat_parameters import build_model, check_parameters, resolve_likelihood, resolve_ranks
from probtensor.models.funbat_state import (
    likelihood_from_state,
    likelihood_to_state,
    read_posterior,
    write_posterior,
)
from probtensor.models.functional_fit import Fitted, fit, renewed
from probtensor.models.functional_state import State
from probtensor.models.functional_stream import absorb
from probtensor.models.functional_table import has_repeated_cells
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import latent_functions
from probtensor.models.observation import Observation, draw_values
from probtensor.models.relevance import main_effect
from probtensor.predictive import Predictive
from probtensor.resources import RandomState, resolve_device, shared_generator, threads_for

__all__ = ["FunBaT"]

FloatArray = npt.NDArray[np.floating[Any]]
PRUNE = 1e-3  # components that contribute less, in standard deviations of y, are dropped
RELEVANT = 2e-2  # components that contribute more count for the effective rank


class FunBaT(TensorRegressor):
    """Functional Bayesian Tucker or CP decomposition of a tensor whose modes are continuous or categorical.

    Each mode has latent functions: Gaussian processes over a continuous axis; over the labels of a categorical one,
    rows that scatter about a common mean, which a label that was never seen has too. An entry is a multilinear
    combination of them; observed values scatter around it by a likelihood of one's choice. The posterior comes from
    message passing with state-space smoothers; lengthscales, variances and the likelihood's parameters are learned from
    the evidence lower bound, components that explain nothing are dropped. The cost of a sweep grows with the number of
    observed entries and of distinct coordinates, never with the tensor's volume.

    Parameters
    ----------
    rank : int or sequence of int, default 6
        Latent functions of each mode at most; a sequence gives one number a mode (Tucker only). See `effective_rank_`.
    form : {"cp", "tucker"}, default "cp"
        CP pairs the functions of the modes one to one; Tucker couples every function of a mode with every one of the
        others through a core.
    axes : sequence of Axis, optional
        What the modes mean. Default: by column, floats and dates continuous, all else categorical.
    likelihood : str or Likelihood, default "student-t"
        How values scatter: "student-t", "gaussian", "poisson", "negative-binomial" or "bernoulli". Student-t has 4
        degrees of freedom; `probtensor.likelihoods.StudentT()` learns them. Counts have a log link, binary values a
        logit link.
    nugget : bool, default True
        Give each cell that is observed more than once a residual of its own, which all its rows share. Gaussian and
        Student-t likelihoods only.
    main_effects : bool, default True
        Give each mode an effect of its own beside the interactions: one more function a mode in CP, a constant column a
        mode in Tucker. The authors' model is ``False``.
    calibration : float or "auto", default "auto"
        Share of the rows held out at first, to shape intervals by what predictions miss them by; then the fit goes on
        with all rows. "auto": a tenth where that is 200 rows or more, else 0. Gaussian and Student-t likelihoods only.
    max_iter : int, default 200
        Sweeps at most.
    tol : float, default 1e-3
        Stop when the bound changes over two sweeps by less than this share of itself, or of the number of rows if
        that is more.
    n_init : int, default 3
        Starts; each gets ten sweeps, then the one with the highest bound goes on.
    damping : float, default 0.0
        Share of the old message kept, in [0, 1). The bound is monotone without damping.
    learn_hyperparameters : bool, default True
        Whether lengthscales and variances are learned.
    relevance_prior : tuple of float, default (1.0, 0.001)
        Shape and rate of the gamma prior on one over each function's variance, for values standardised to one.
    noise_prior : tuple of float, default (1.0, 1.0)
        Shape and rate of the gamma prior on the noise precision of values standardised to variance one; only with
        ``likelihood="gaussian", nugget=False``. The rate weighs in where data are few and precise: a thousand rows
        whose noise is 1 % of their spread want a rate of 0.01 or less.
    duplicates : {"observations", "error", "sum", "mean"}, default "observations"
        What rows with equal coordinates are.
    device : str, default "auto"
        "cpu", "cuda", or a GPU where there is one.
    random_state : int, Generator, RandomState or None, default None
        Seed of the start and of the rows held out. No global generator is read or moved.
    progress : bool, default True
        Show a progress bar on long fits.

    Attributes
    ----------
    bound_, bound_history_ : float, list of float
        Evidence lower bound of the values in their own unit; the last, and after each sweep.
    phase_starts_ : tuple of int
        Sweeps from which on the bound is another model's: with heavy tails, with the rows held out, without components.
    n_iter_, converged_, stop_reason_ : int, bool, str
    noise_std_, nugget_std_ : float
        Standard deviation (Student-t: scale) of the noise of a row, and of the residual of a cell, in the unit of y.
    rank_ : tuple of int
        Latent functions of each mode, after pruning.
    relevance_ : ndarray, shape (R,)
        CP: root mean square of each component over the observed entries, in the unit of y, strongest first.
    effective_rank_ : int
        CP: components of which `relevance_` is more than 2 % of the standard deviation of y.
    core_ : ndarray, shape rank_ (plus one a mode with main effects), or None
        Mean of the Tucker core, in standardised units; column 0 of a mode is the constant.
    hyperparameters_ : dict
        For each mode's name, a dict of arrays (R,): "variance"; by kernel "lengthscale", in the axis's unit, and more.
    axes_, y_mean_, y_scale_, n_features_in_, feature_names_in_
        See `TensorRegressor`.

    References
    ----------
    Fang, Yu, Wang, Li, Kirby, Zhe (2024), "Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor
    Data", ICLR (arXiv 2311.04829).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(0, 3, size=(300, 2))
    >>> y = np.sin(X[:, 0]) * np.cos(X[:, 1]) + 0.01 * rng.normal(size=300)
    >>> model = FunBaT(rank=1, form="cp", random_state=0).fit(X[:250], y[:250])
    >>> mean, std = model.predict(X[250:], return_std=True)
    >>> bool(np.sqrt(np.mean((mean - y[250:]) ** 2)) < 0.05)
    True
    """

    _model: FunctionalTucker
    _state: State
    _observation: Observation | None

    def __init__(
        self,
        rank: int | Sequence[int] = 6,
        form: Literal["cp", "tucker"] = "cp",
        axes: Sequence[Axis] | None = None,
        *,
        likelihood: str | Likelihood = "student-t",
        nugget: bool = True,
        main_effects: bool = True,
        calibration: float | Literal["auto"] = "auto",
        max_iter: int = 200,
        tol: float = 1e-3,
        n_init: int = 3,
        damping: float = 0.0,
        learn_hyperparameters: bool = True,
        relevance_prior: tuple[float, float] = (1.0, 0.001),
        noise_prior: tuple[float, float] = (1.0, 1.0),
        duplicates: Duplicates = "observations",
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.rank = rank
        self.form = form
        self.axes = axes
        self.likelihood = likelihood
        self.nugget = nugget
        self.main_effects = main_effects
        self.calibration = calibration
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.damping = damping
        self.learn_hyperparameters = learn_hyperparameters
        self.relevance_prior = relevance_prior
        self.noise_prior = noise_prior
        self.duplicates = duplicates
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, *, noise_std: Any = None) -> Self:
        """Fold new rows in, without the old ones; the first call is `fit`.

        The cost is that of the new rows, and one pass over all distinct coordinates. Rows may bring new coordinates and
        labels, and more values of cells that were seen. Units, ranks and intervals' calibration stay as they were;
        lengthscales and variances take a step whenever the rows have become a tenth more. Where the model is linear and
        Gaussian (one mode, known noise, hyperparameters fixed) this equals a fit on all rows.

        Parameters
        ----------
        X, y, sample_weight, noise_std
            As in `fit`.

        Returns
        -------
        self
        """
        if not hasattr(self, "axes_"):
            return self.fit(X, y, sample_weight, noise_std=noise_std)
        table = self._columns(X)
        known_noise = isinstance(self._model.likelihood, StudentT) and self._model.likelihood.noise_known
        if known_noise != (noise_std is not None):
            wanted = "standard deviations, as at first" if known_noise else "None, as at first"
            raise ValueError(f"noise_std: expected {wanted}, got {noise_std!r}")
        observed, places = observe_more(table, y, self.axes_)
        count = row_numbers(sample_weight, "sample_weight", len(table))
        std = row_numbers(noise_std, "noise_std", len(table))
        device = self._fitted_device()
        values = (observed.values.to(device) - self.y_mean_) / self.y_scale_
        if self._model.likelihood is not None:
            self._model.likelihood.check(values)
        new_rows = Table(
            observed.positions.to(device),
            values,
            None if count is None else count.to(device),
            None if std is None else (self.y_scale_ / std.to(device)) ** 2,
            row_keys(observed.positions, observed.values).to(device),
        )
        places = [place.to(device) for place in places]
        observation, seen = self._observation, None
        if observation is not None and observation.seen is not None:
            moved = [place[position] for place, position in zip(places, observation.seen.positions.T, strict=True)]
            seen = observation.seen._replace(positions=torch.stack(moved, dim=1))
        with threads_for(len(values)):
            functions = tuple(latent_functions(axis, values) for axis in observed.axes)
            model = replace(self._model, functions=functions)
            state, seen = absorb(model, self._state, places, seen, new_rows, Serial())
        self._seen = seen_after(self._seen, self.axes_, observed)
        self.axes_, self._model, self._state = observed.axes, model, state
        if observation is not None:
            self._observation = renewed(model, state, observation, seen)
        return self

    def factor(self, name: str, at: Any = None) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of a mode's latent functions.

        Parameters
        ----------
        name : str
            The mode.
        at : array_like, shape (m,), optional
            Coordinates or labels, in the user's own type. Default: those of the training data.

        Returns
        -------
        mean, std : ndarray, shape (m, R)
            ``R`` is the mode's rank; scale and sign are shared with the other modes. For main effects see
            `main_effect`.
        """
        mode, where = self._where(name, at)
        mean, covariance = self._model.functions_at(self._state, mode, where)
        std = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        rank = self.rank_[mode]
        return mean[:, :rank].cpu().numpy().astype(self.dtype_), std[:, :rank].cpu().numpy().astype(self.dtype_)

    def main_effect(self, name: str, at: Any = None) -> tuple[FloatArray, FloatArray]:
        """Posterior mean and standard deviation of a mode's own effect on y, in the unit of y.

        Parameters
        ----------
        name : str
            The mode.
        at : array_like, shape (m,), optional
            Coordinates or labels. Default: those of the training data.

        Returns
        -------
        mean, std : ndarray, shape (m,)

        Raises
        ------
        ValueError
            If the model was fitted without main effects.
        """
        mode, where = self._where(name, at)
        if self._model.ranks == self.rank_:
            raise ValueError("main_effect: expected a model of two or more modes with main_effects=True")
        effect, variance = main_effect(self._model, self._state, mode, where)
        std = variance.clamp(min=0).sqrt() * self.y_scale_
        effect = effect * self.y_scale_
        return effect.cpu().numpy().astype(self.dtype_), std.cpu().numpy().astype(self.dtype_)

    @property
    def bound_(self) -> float:
        """Evidence lower bound of the training values in their own unit."""
        check_is_fitted(self, "bound_history_")
        return self.bound_history_[-1]

    @property
    def noise_std_(self) -> float:
        """Standard deviation of the noise of a row, in the unit of y."""
        return math.sqrt(self._residuals().noise_variance) * self.y_scale_

    @property
    def nugget_std_(self) -> float:
        """Standard deviation of the residual of a cell, in the unit of y."""
        return math.sqrt(self._residuals().nugget_variance) * self.y_scale_

    @property
    def effective_rank_(self) -> int:
        """Components that matter, main effects not counted."""
        check_is_fitted(self, "axes_")
        return int((self.relevance_ > RELEVANT * self.y_scale_).sum())

    @property
    def core_(self) -> FloatArray | None:
        """Mean of the Tucker core; None for CP."""
        check_is_fitted(self, "axes_")
        core = self._state.core
        return None if core is None else core.mean.reshape(self._model.ranks).cpu().numpy()

    @property
    def hyperparameters_(self) -> dict[str, dict[str, FloatArray]]:
        """Learned lengthscales and variances of each mode's functions, main effect last in CP."""
        check_is_fitted(self, "axes_")
        return {
            str(axis.name): {key: value.cpu().numpy() for key, value in f.named(factor.log_hyperparameters).items()}
            for axis, f, factor in zip(self.axes_, self._model.functions, self._state.factors, strict=True)
        }

    def _fit(self, table: Table, comm: Comm, checkpoints: Checkpoints | None) -> None:
        check_parameters(self.get_params(deep=False))
        self.rank_ = resolve_ranks(self.rank, self.form, self.axes_, bool(self.main_effects))
        values, precision = table.values, table.precision
        likelihood = resolve_likelihood(self.likelihood, bool(self.nugget), known_noise=precision is not None)
        refuse_together(comm, lambda: None if likelihood is None else likelihood.check(values))
        if isinstance(likelihood, StudentT) and likelihood.nugget:
            # Without repetition, residual of the cell and noise of the row are one.
            likelihood = replace(likelihood, nugget=precision is not None or has_repeated_cells(table, comm))
        weights = [torch.ones_like(part.values) if part.count is None else part.count for part in table.blocks()]
        pairs = zip(weights, table.blocks(), strict=True)
        sums = comm.sum(*add_up(torch.stack([w.sum(), (w * part.values).sum()]) for w, part in pairs))
        offset = 0.0 if likelihood is None else likelihood.offset(float(sums[1] / sums[0]))
        model = self._build(values, self.form, bool(self.main_effects) and len(self.axes_) > 1)
        fitted = fit(
            replace(model, likelihood=likelihood, offset=offset),
            table,
            comm,
            generator=shared_generator(self.random_state, comm),
            held_out=None if self.calibration == "auto" else float(self.calibration),
            prune_below=PRUNE if self.learn_hyperparameters else 0.0,
            max_iter=self.max_iter,
            tol=self.tol,
            n_init=self.n_init,
            progress=self.progress,
            checkpoints=checkpoints,
        )
        self._keep(fitted)

    def _keep(self, fitted: Fitted) -> None:
        self._model, self._state, self._observation = fitted.model, fitted.state, fitted.observation
        self.bound_history_, self.phase_starts_ = fitted.bound_history, fitted.phase_starts
        self.n_iter_ = len(fitted.bound_history)
        self.converged_, self.stop_reason_ = fitted.converged, fitted.stop_reason
        self.relevance_ = np.sort(fitted.relevance.cpu().numpy())[::-1] * self.y_scale_
        if self.form == "cp":
            effects = 0 if all(bool(free.all()) for free in self._model.free) else len(self.axes_)
            self.rank_ = (self._model.ranks[0] - effects,) * len(self.axes_)

    def _build(self, like: Tensor, form: Literal["cp", "tucker"], main_effects: bool) -> FunctionalTucker:
        return build_model(self.get_params(deep=False), self.axes_, self.rank_, form, main_effects, like, self.y_scale_)

    def _location_scale(self) -> bool:
        likelihood = resolve_likelihood(self.likelihood, bool(self.nugget), known_noise=False)
        return likelihood is None or likelihood.location_scale

    def _where(self, name: str, at: Any) -> tuple[int, Tensor]:
        check_is_fitted(self, "axes_")
        mode = self._axis(name)
        if at is None:
            return mode, self._model.functions[mode].everywhere()
        codes = self.axes_[mode].encode(at)
        self._warn_of_unknown(self.axes_[mode], codes, at, stacklevel=4)
        return mode, torch.as_tensor(np.array(codes), device=self._fitted_device())

    def _residuals(self) -> Observation:
        check_is_fitted(self, "axes_")
        if self._observation is None:
            raise AttributeError(f"{type(self._model.likelihood).__name__} has no noise variance")
        return self._observation

    def _predictive(self, where: Where) -> Predictive:
        mean, variance = self._model.predict(self._state, where.encoded)
        if self._observation is None:
            assert self._model.likelihood is not None
            return self._model.likelihood.predictive(self._state.log_parameters, mean + self._model.offset, variance)
        return self._observation.predictive(mean, variance, self._positions(where))

    def _draw(self, where: Where, n_samples: int, generator: torch.Generator) -> Tensor:
        f = self._model.sample(self._state, where.encoded, n_samples, generator)
        if self._observation is not None:
            moments = self._model.predict(self._state, where.encoded)
            return self._observation.draw(f, *moments, self._positions(where), where.encoded, generator)
        assert self._model.likelihood is not None
        return draw_values(self._model.likelihood, self._state.log_parameters, f + self._model.offset, generator)

    def _positions(self, where: Where) -> Tensor | None:
        return None if self._observation is None or self._observation.seen is None else where.positions

    def _fitted_device(self) -> torch.device:
        return self._state.square.device

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON values that `from_state` makes the fitted model of."""
        arrays, meta = write_posterior(self._model, self._state, self._observation)
        arrays |= {
            "bound_history": torch.tensor(self.bound_history_, dtype=torch.float64),
            "relevance": torch.tensor(self.relevance_.copy()),
        }
        return arrays, meta | {
            "params": self._params_state(),
            "rank": list(self.rank_),
            "form": self._model.form,
            "phase_starts": list(self.phase_starts_),
            "n_iter": self.n_iter_,
            "converged": self.converged_,
            "stop_reason": self.stop_reason_,
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
        model = self._build(arrays["noise"], meta["form"], False)
        self._model, self._state, self._observation = read_posterior(model, arrays, meta)
        self.bound_history_ = arrays["bound_history"].tolist()
        self.relevance_ = arrays["relevance"].cpu().numpy()
        self.phase_starts_, self.n_iter_ = tuple(meta["phase_starts"]), meta["n_iter"]
        self.converged_, self.stop_reason_ = meta["converged"], meta["stop_reason"]
