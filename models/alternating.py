"""Alternating minimization with approximate least squares, as an estimator."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from tqdm import tqdm

from probtensor.axes import Axis, ContinuousAxis
from probtensor.blocks import mixed
from probtensor.calibration import inflated
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.data import Duplicates
from probtensor.estimator import TensorRegressor
from probtensor.intake import Table, Where
from probtensor.models.alternating_fit import Cells, Settings
from probtensor.models.alternating_model import (
    Fitted,
    fit_alternating,
    fitted_from_state,
    fitted_to_state,
    moments,
)
from probtensor.models.completion_inputs import bin_edges, distinct_keys, encode, n_labels
from probtensor.predictive import NormalMixture
from probtensor.resources import RandomState, is_integer, is_number, resolve_device, shared_generator

__all__ = ["AlternatingMinimization"]

FloatArray = npt.NDArray[np.float64]

SHOW_AFTER = 1.0  # seconds before a progress bar appears


class AlternatingMinimization(TensorRegressor):
    """Low-rank completion of a matrix, or CP completion of a tensor, in time linear in the observed cells and the rank.

    ``y = sum_r prod_k U_k[i_k, r] + sum_k b_k[i_k] + noise``. The factors of all labels of a mode are ridge regressions
    given the other modes'; they are solved approximately, by a few preconditioned steps of conjugate gradients that
    never form a normal matrix, and go on from the last sweep's factors. The ridge is chosen on cells held out, which
    calibrate the intervals too.

    Parameters
    ----------
    rank : int, default 10
        Factors of each label.
    axes : sequence of Axis, optional
        What the modes mean. Default: by column, floats and dates continuous, all else categorical. Continuous modes
        have up to 64 bins as labels.
    solver : {"cg", "exact"}, default "cg"
        Conjugate gradients, ``O(cells * rank)`` a step; or Cholesky factors of normal matrices, ``O(cells * rank^2 +
        labels * rank^3)``: as fast for small tables and ranks, and better without noise where labels have few cells.
    ridge : "auto" or float, default "auto"
        Penalty on the squares of the factors, for values of variance 1: the noise's variance over that of a factor.
    biases : bool, default True
        Whether labels have effects beside their factors.
    init : {"svd", "random"}, default "svd"
        Factors at the start: the leading ones of the tensor with zeros in its gaps, or random ones.
    n_inner : int, default 20
        Steps of a half-sweep at most; ``solver="cg"`` only.
    inner_tol : float, default 0.1
        A label is left in a half-sweep once its squared gradient, as the preconditioner measures it, has fallen to
        this share; with 0, all labels take `n_inner` steps.
    max_iter : int, default 100
        Sweeps at most.
    tol : float, default 1e-4
        Sweeps end when the penalised loss falls by less than this share of itself.
    held_out : float, default 0.1
        Share of the cells that choose the ridge and show how values scatter; afterwards all cells are fitted. With 0,
        `ridge` has to be a number, and intervals are those of the cells fitted: too narrow.
    duplicates : {"observations", "error", "sum", "mean"}, default "observations"
        What rows with equal coordinates are.
    device : str, default "auto"
        "cpu", "cuda", or a GPU where there is one.
    random_state : int, Generator, RandomState or None, default None
        Seed of the start and of what is held out. No global generator is read or moved.
    progress : bool, default True
        Show a progress bar on long fits.

    Attributes
    ----------
    factors_ : dict of str to ndarray, shape (size, rank)
        Of each mode's labels, in the order of `axes_`, for standardised values.
    effects_ : dict of str to ndarray, shape (size,)
        Of each mode's labels, in the unit of y; zeros without `biases`.
    ridge_ : float
    n_iter_ : int
        Sweeps over all cells, after those that chose the ridge.
    history_ : ndarray, shape (n_iter_,)
        Root mean square error of the cells fitted after each of them, in the unit of y.
    converged_ : bool
    validation_rmse_ : dict of float to float
        On cells held out, after a few sweeps, by ridge; empty where the ridge was given.
    noise_std_ : float
        Of a cell, in the unit of y.
    axes_, y_mean_, y_scale_, n_features_in_, feature_names_in_
        See `TensorRegressor`.

    Notes
    -----
    A label that was not seen has the mean of the others' factors and effects, and an interval as much wider as these
    differ. Neither ``noise_std`` nor checkpoints are supported. On several ranks a fit depends on their number by
    rounding alone; every rank holds all factors, and a step is one sum over the ranks.

    References
    ----------
    Gu, Song, Yin, Zhang (2023), "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time":
    alternating minimization bears regressions that are solved approximately. See `alternating_rows` for the solver.

    Examples
    --------
    >>> import pandas as pd
    >>> rng = np.random.default_rng(0)
    >>> user, film = rng.integers(0, 40, size=(2, 1200))
    >>> u, v = rng.normal(size=(2, 40, 2))
    >>> y = 3 + (u[user] * v[film]).sum(axis=1) + 0.1 * rng.normal(size=1200)
    >>> X = pd.DataFrame({"user": user, "film": film})
    >>> model = AlternatingMinimization(rank=2, random_state=0).fit(X[:1000], y[:1000])
    >>> bool(np.sqrt(np.mean((model.predict(X[1000:]) - y[1000:]) ** 2)) < 0.15)
    True
    """

    _fitted: Fitted
    _edges: dict[str, FloatArray]

    def __init__(
        self,
        rank: int = 10,
        axes: Sequence[Axis] | None = None,
        *,
        solver: Literal["cg", "exact"] = "cg",
        ridge: Literal["auto"] | float = "auto",
        biases: bool = True,
        init: Literal["svd", "random"] = "svd",
        n_inner: int = 20,
        inner_tol: float = 0.1,
        max_iter: int = 100,
        tol: float = 1e-4,
        held_out: float = 0.1,
        duplicates: Duplicates = "observations",
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.rank = rank
        self.axes = axes
        self.solver = solver
        self.ridge = ridge
        self.biases = biases
        self.init = init
        self.n_inner = n_inner
        self.inner_tol = inner_tol
        self.max_iter = max_iter
        self.tol = tol
        self.held_out = held_out
        self.duplicates = duplicates
        self.device = device
        self.random_state = random_state
        self.progress = progress

    @property
    def factors_(self) -> dict[str, FloatArray]:
        """Factors by mode, (size, rank)."""
        return self._by_mode(self._known().tables.factors, 1.0)

    @property
    def effects_(self) -> dict[str, FloatArray]:
        """Effects by mode, (size,), in the unit of y."""
        return self._by_mode(self._known().tables.effects, self.y_scale_)

    @property
    def ridge_(self) -> float:
        """The ridge of the factors."""
        return self._known().ridge

    @property
    def n_iter_(self) -> int:
        """Sweeps over all cells."""
        return len(self._known().run.history)

    @property
    def history_(self) -> FloatArray:
        """Root mean square errors of the cells fitted, (n_iter_,), in the unit of y."""
        return np.asarray(np.sqrt(self._known().run.history) * self.y_scale_)

    @property
    def converged_(self) -> bool:
        """Whether the last sweeps settled."""
        return self._known().run.converged

    @property
    def validation_rmse_(self) -> dict[float, float]:
        """Root mean square errors on cells held out by ridge, in the unit of y."""
        return {ridge: math.sqrt(lost) * self.y_scale_ for ridge, lost in self._known().tried.items()}

    @property
    def noise_std_(self) -> float:
        """Standard deviation of a cell's noise, in the unit of y."""
        return math.sqrt(self._known().noise_variance) * self.y_scale_

    def _known(self) -> Fitted:
        if not hasattr(self, "_fitted"):
            raise AttributeError("AlternatingMinimization: expected a fitted model, call fit first")
        return self._fitted

    def _by_mode(self, parts: Sequence[Tensor], scale: float) -> dict[str, FloatArray]:
        arrays = [part[:-1].cpu().numpy() * scale for part in parts]
        return {str(axis.name): array for axis, array in zip(self.axes_, arrays, strict=True)}

    def _settings(self) -> Settings:
        whole = {"rank": self.rank, "n_inner": self.n_inner, "max_iter": self.max_iter}
        for name, value in whole.items():
            if not (is_integer(value) and value >= 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        for name, choice, known in (("solver", self.solver, ("cg", "exact")), ("init", self.init, ("svd", "random"))):
            if choice not in known:
                raise ValueError(f'{name}: expected "{known[0]}" or "{known[1]}", got {choice!r}')
        for name, share in (("inner_tol", self.inner_tol), ("tol", self.tol), ("held_out", self.held_out)):
            if not (is_number(share) and 0 <= share < 1):
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {share!r}")
        if self.ridge != "auto" and not (is_number(self.ridge) and 0 < self.ridge < math.inf):
            raise ValueError(f'ridge: expected "auto" or a number above 0, got {self.ridge!r}')
        if self.ridge == "auto" and self.held_out == 0:
            raise ValueError("ridge: expected a number where held_out is 0, since nothing chooses it, got 'auto'")
        return Settings(
            int(self.rank),
            self.solver,
            bool(self.biases),
            self.init,
            int(self.n_inner),
            float(self.inner_tol),
            int(self.max_iter),
            float(self.tol),
        )

    def _fit(self, table: Table, comm: Comm, checkpoints: Checkpoints | None) -> None:
        settings = self._settings()
        if table.precision is not None:
            raise ValueError("noise_std: expected None, AlternatingMinimization learns the noise; use sample_weight")
        if checkpoints is not None:
            raise ValueError("checkpoint: expected None, AlternatingMinimization has none: its fits are short")
        if len(self.axes_) < 2:
            raise ValueError(f"X: expected two modes or more, got {len(self.axes_)}")
        self._edges = bin_edges(self.axes_)
        positions = table.positions.cpu().numpy()
        encoded = [
            axis.coordinates[at] if isinstance(axis, ContinuousAxis) else at
            for axis, at in zip(self.axes_, positions.T, strict=True)
        ]
        device = resolve_device(self.device)
        labels = torch.from_numpy(encode(self.axes_, self._edges, self._seen, encoded)[0]).to(device)
        count = None if table.count is None else table.count.double()
        generator = shared_generator(self.random_state, comm)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        weight = np.ones(len(positions)) if count is None else count.cpu().numpy()
        keys = distinct_keys(table.key.cpu().numpy(), weight)
        share = torch.from_numpy(mixed(keys, seed) / 2.0**63).to(device)
        cells = Cells(labels, table.values.double(), count, n_labels(self.axes_, self._edges))
        ridge = None if self.ridge == "auto" else float(self.ridge)
        with tqdm(desc="sweeps", delay=SHOW_AFTER, disable=not (self.progress and comm.is_root)) as bar:

            def report(square: float) -> None:
                bar.set_postfix_str(f"RMSE {math.sqrt(square) * self.y_scale_:.4g}", refresh=False)
                bar.update()

            held_out = float(self.held_out)
            self._fitted = fit_alternating(cells, share, held_out, settings, ridge, generator, comm, report)
        if not self._fitted.run.converged:
            warnings.warn(
                f"the loss still fell by more than {settings.tol:g} of itself after {settings.max_iter} sweeps: raise "
                "max_iter, tol or ridge, or lower rank",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _predictive(self, where: Where) -> NormalMixture:
        columns = [column.cpu().numpy() for column in where.encoded]
        labels = encode(self.axes_, self._edges, self._seen, columns)[0]
        at = torch.from_numpy(labels).to(self._fitted_device())
        mean, spread, strange = (part.cpu().numpy() for part in moments(self._fitted, at))
        noise, mixture = self._fitted.noise_variance, self._fitted.mixture
        unit = inflated(noise * spread, mixture.inflation) + noise
        scales = np.sqrt(unit[:, None] * mixture.scales.numpy() ** 2 + strange[:, None])
        return NormalMixture(mean, scales, mixture.weights.numpy())

    def _draw(self, where: Where, n_samples: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        return torch.from_numpy(self._predictive(where).sample(n_samples, rng).T.copy())

    def _fitted_device(self) -> torch.device:
        return self._fitted.tables.factors[0].device

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON values that `from_state` makes the fitted model of."""
        arrays, meta = fitted_to_state(self._fitted)
        arrays |= {f"edges.{name}": torch.from_numpy(edges) for name, edges in self._edges.items()}
        return arrays, {"params": self._params_state(), **meta}

    def _restore(self, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self._edges = {key[len("edges.") :]: v.numpy() for key, v in arrays.items() if key.startswith("edges.")}
        self._fitted = fitted_from_state(arrays, meta, resolve_device(self.device))
