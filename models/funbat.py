"""FunBaT, functional Bayesian Tucker and CP, as an estimator."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probtensor.axes import Axis
from probtensor.comm import Comm
from probtensor.data import Duplicates
from probtensor.estimator import TensorRegressor
from probtensor.gaussian import Gamma, Gaussian
from probtensor.inference.kalman import Posterior, Sites
from probtensor.inference.message_passing import run
from probtensor.models.functional_tucker import WARM_UP, Factor, FunctionalTucker, Rows, State
from probtensor.models.latent_functions import latent_functions
from probtensor.resources import RandomState, is_integer, is_number, make_generator, resolve_device

__all__ = ["FunBaT"]

FloatArray = npt.NDArray[np.floating[Any]]
MAX_CORE = 8_000  # entries of a Tucker core with its constant columns


class FunBaT(TensorRegressor):
    """Functional Bayesian Tucker or CP decomposition of a tensor whose modes are continuous or categorical.

    Each mode has latent functions: Matérn Gaussian processes over a continuous axis, independent rows over the labels
    of a categorical one. An entry is a multilinear combination of them plus Gaussian noise. The posterior comes from
    message passing with state-space smoothers; lengthscales and variances are learned from the evidence lower bound.
    The cost of a sweep grows with the number of observed entries and of distinct coordinates, never with the tensor's
    volume.

    Parameters
    ----------
    rank : int or sequence of int, default 3
        Latent functions of each mode; a sequence gives one number a mode (Tucker only).
    form : {"tucker", "cp"}, default "tucker"
        Tucker couples every function of a mode with every one of the others through a core; CP pairs them one to one.
    axes : sequence of Axis, optional
        What the modes mean. Default: by column, floats and dates continuous, all else categorical.
    main_effects : bool, default True
        Give each mode an effect of its own beside the interactions: one more function a mode in CP, a constant column a
        mode in Tucker. The authors' model is ``False``.
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
    noise_prior : tuple of two float, default (1.0, 1.0)
        Shape and rate of the gamma prior of the noise precision of standardised values. The authors' choice; it weighs
        as much as two rows, and keeps intervals wide where a few hundred rows are very precise: (1e-3, 1e-3) then.
    duplicates : {"observations", "error", "sum", "mean"}, default "observations"
        What rows with equal coordinates are.
    device : str, default "auto"
        Where to compute: "cpu", "cuda", or a GPU where there is one.
    random_state : int, Generator, RandomState or None, default None
        Seed of the start. No global generator is read or moved.
    progress : bool, default True
        Show a progress bar on long fits.

    Attributes
    ----------
    bound_, bound_history_ : float, list of float
        Evidence lower bound of the values in their own unit; the last, and after each sweep.
    n_iter_, converged_, stop_reason_ : int, bool, str
    noise_std_ : float
        Standard deviation of the noise, in the unit of y.
    rank_ : tuple of int
        Latent functions of each mode.
    core_ : ndarray, shape rank_ (plus one a mode with main effects), or None
        Mean of the Tucker core, in standardised units; column 0 of a mode is the constant.
    hyperparameters_ : dict
        For each mode's name, a dict of arrays: "variance" and, for continuous modes, "lengthscale" in the unit of the
        axis.
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

    def __init__(
        self,
        rank: int | Sequence[int] = 3,
        form: Literal["tucker", "cp"] = "tucker",
        axes: Sequence[Axis] | None = None,
        *,
        main_effects: bool = True,
        max_iter: int = 200,
        tol: float = 1e-3,
        n_init: int = 3,
        damping: float = 0.0,
        learn_hyperparameters: bool = True,
        noise_prior: tuple[float, float] = (1.0, 1.0),
        duplicates: Duplicates = "observations",
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.rank = rank
        self.form = form
        self.axes = axes
        self.main_effects = main_effects
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.damping = damping
        self.learn_hyperparameters = learn_hyperparameters
        self.noise_prior = noise_prior
        self.duplicates = duplicates
        self.device = device
        self.random_state = random_state
        self.progress = progress

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
        mean, covariance = self._model.functions_at(self._state, mode, where)
        if self._state.core is None:
            effect, variance = mean[:, -1], covariance[:, -1, -1]
        else:
            ranks = self._model.ranks
            flat = torch.arange(1, ranks[mode], device=mean.device) * math.prod(ranks[mode + 1 :])
            core, core_covariance = self._state.core.mean[flat], self._state.core.covariance[flat[:, None], flat]
            effect = mean @ core
            second = covariance + mean[:, :, None] * mean[:, None, :]
            variance = (second * (torch.outer(core, core) + core_covariance)).sum((1, 2)) - effect**2
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
        """Standard deviation of the noise, in the unit of y."""
        check_is_fitted(self, "axes_")
        return math.sqrt(self._noise_variance()) * self.y_scale_

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

    def _fit(self, positions: Tensor, values: Tensor, comm: Comm) -> None:
        self._check_parameters()
        self.rank_ = self._ranks()
        self._model = self._build(values, self.form, bool(self.main_effects) and len(self.axes_) > 1)
        result = run(
            self._model,
            Rows(positions.T.contiguous(), values),
            comm=comm,
            generator=make_generator(self._shared_seed(comm)),
            max_iter=self.max_iter,
            tol=self.tol,
            scale=float(comm.sum(values.new_tensor([values.shape[0]]))),
            n_init=self.n_init,
            min_iter=WARM_UP + 4,
            progress=self.progress,
        )
        self._state: State = result.state
        self.bound_history_ = result.bound_history
        self.n_iter_, self.converged_, self.stop_reason_ = result.n_iter, result.converged, result.stop_reason

    def _build(self, like: Tensor, form: Literal["tucker", "cp"], main_effects: bool) -> FunctionalTucker:
        a0, b0 = (like.new_tensor(float(x)) for x in self.noise_prior)
        K, extra = len(self.axes_), int(main_effects)
        if form == "tucker":
            columns = [[False] * extra + [True] * rank for rank in self.rank_]
        else:
            columns = [[True] * self.rank_[0] + [j == k for j in range(K)] * extra for k in range(K)]
        return FunctionalTucker(
            functions=tuple(latent_functions(axis, like) for axis in self.axes_),
            free=tuple(torch.tensor(c, device=like.device) for c in columns),
            form=form,
            noise_prior=Gamma(a0, b0),
            damping=self.damping,
            learn=bool(self.learn_hyperparameters),
            log_scale=math.log(self.y_scale_),
        )

    def _ranks(self) -> tuple[int, ...]:
        K = len(self.axes_)
        ranks = tuple(self.rank) if isinstance(self.rank, Sequence) else (self.rank,) * K
        if len(ranks) != K:
            raise ValueError(f"rank: expected one number or {K}, one for each mode, got {self.rank!r}")
        if not all(is_integer(r) and r >= 1 for r in ranks):
            raise ValueError(f"rank: expected integers of at least 1, got {self.rank!r}")
        if self.form == "cp" and len(set(ranks)) > 1:
            raise ValueError(f'rank: expected the same rank for all modes with form="cp", got {self.rank!r}')
        for axis, rank in zip(self.axes_, ranks, strict=True):
            if self.form == "tucker" and rank > axis.size:
                raise ValueError(
                    f"rank: expected at most {axis.size} for mode {axis.name!r}, which has {axis.size} distinct "
                    f'coordinates, got {rank}; give one rank a mode, or use form="cp"'
                )
        entries = math.prod(int(r) + bool(self.main_effects) for r in ranks)
        if self.form == "tucker" and entries > MAX_CORE:
            raise ValueError(
                f"rank: expected a core of at most {MAX_CORE:,} entries (covariance: half a GiB), got {self.rank!r}: "
                f'{entries:,} entries; lower the ranks, or use form="cp"'
            )
        return tuple(int(r) for r in ranks)

    def _check_parameters(self) -> None:
        if self.form not in ("cp", "tucker"):
            raise ValueError(f'form: expected "cp" or "tucker", got {self.form!r}')
        if not (is_number(self.damping) and 0 <= self.damping < 1):
            raise ValueError(f"damping: expected a number in [0, 1), got {self.damping!r}")
        if not (is_integer(self.max_iter) and self.max_iter >= 1):
            raise ValueError(f"max_iter: expected an integer of at least 1, got {self.max_iter!r}")
        if not (is_integer(self.n_init) and self.n_init >= 1):
            raise ValueError(f"n_init: expected an integer of at least 1, got {self.n_init!r}")
        if not (is_number(self.tol) and self.tol >= 0):
            raise ValueError(f"tol: expected a number >= 0, got {self.tol!r}")
        given: Any = self.noise_prior
        if not (
            isinstance(given, Sequence) and len(given) == 2 and all(is_number(x) and 0 < x < math.inf for x in given)
        ):
            raise ValueError(f"noise_prior: expected two positive numbers (shape, rate), got {self.noise_prior!r}")

    def _shared_seed(self, comm: Comm) -> RandomState:
        """The seed of rank 0: sums over ranks mean something only when all have one start."""
        if comm.size == 1:
            return self.random_state
        seed = make_generator(self.random_state).initial_seed()
        return int(comm.broadcast(torch.tensor([seed]))[0])

    def _where(self, name: str, at: Any) -> tuple[int, Tensor]:
        check_is_fitted(self, "axes_")
        mode = self._axis(name)
        if at is None:
            return mode, self._model.functions[mode].everywhere()
        codes = self.axes_[mode].encode(at)
        self._warn_of_unknown(self.axes_[mode], codes, at, stacklevel=4)
        return mode, torch.as_tensor(np.array(codes), device=self._fitted_device())

    @torch.no_grad()
    def _latent(self, encoded: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self._model.predict(self._state, encoded)

    @torch.no_grad()
    def _latent_samples(self, encoded: list[Tensor], n_samples: int, generator: torch.Generator) -> Tensor:
        return self._model.sample(self._state, encoded, n_samples, generator)

    def _fitted_device(self) -> torch.device:
        return self._state.squared_error.device

    def _noise_variance(self) -> float:
        shape, rate = self._state.noise
        return float(rate / (shape - 1) if shape > 1 else rate / shape)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON values that `from_state` makes the fitted model of."""
        state = self._state
        arrays = {
            "noise": torch.stack(state.noise),
            "totals": torch.stack([state.squared_error, state.n_rows, state.square]),
            "bound_history": torch.tensor(self.bound_history_, dtype=torch.float64),
        }
        if state.core is not None:
            arrays |= {"core.mean": state.core.mean, "core.covariance": state.core.covariance}
        for k, factor in enumerate(state.factors):
            # The posterior too: smoothing again could round otherwise, on another number of threads.
            parts = factor._asdict() | {"sites": None, "posterior": None}
            parts |= {f"sites.{name}": part for name, part in factor.sites._asdict().items()}
            parts |= {f"posterior.{name}": part for name, part in factor.posterior._asdict().items()}
            arrays |= {f"factor.{k}.{name}": part for name, part in parts.items() if part is not None}
        meta = {
            "params": self._params_state(),
            "rank": list(self.rank_),
            "form": self._model.form,
            "main_effects": self._model.ranks != self.rank_,
            "sweep": state.sweep,
            "n_iter": self.n_iter_,
            "converged": self.converged_,
            "stop_reason": self.stop_reason_,
        }
        return arrays, meta

    @torch.no_grad()
    def _restore(self, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        device = resolve_device(self.device)
        arrays = {name: array.to(device) for name, array in arrays.items()}
        self.rank_ = tuple(meta["rank"])
        self._model = self._build(arrays["noise"], meta["form"], meta["main_effects"])
        factors = tuple(_stored_factor(arrays, f"factor.{k}.") for k in range(len(self.axes_)))
        error, n_rows, square = arrays["totals"]
        core = Gaussian(arrays["core.mean"], arrays["core.covariance"]) if "core.mean" in arrays else None
        self._state = State(factors, core, Gamma(*arrays["noise"]), error, n_rows, square, meta["sweep"])
        self.bound_history_ = arrays["bound_history"].tolist()
        self.n_iter_, self.converged_, self.stop_reason_ = meta["n_iter"], meta["converged"], meta["stop_reason"]


def _stored_factor(arrays: dict[str, Tensor], prefix: str) -> Factor:
    """The factor whose parts `to_state` wrote under `prefix`."""
    return Factor(
        sites=Sites(*(arrays[f"{prefix}sites.{name}"] for name in Sites._fields)),
        posterior=Posterior(*(arrays[f"{prefix}posterior.{name}"] for name in Posterior._fields)),
        **{name: arrays[prefix + name] for name in ("log_hyperparameters", "divergence", "mean", "second")},
    )
