"""The shell of every regressor over tensor entries: validation, units, intervals, files.

A model sees fitted axes, positions and standardised values; a user sees tables and their own units. The shell stands
between: it validates once, agrees on the axes with the other ranks, standardises by the training rows, and turns
moments into means, intervals and densities.
"""

import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probtensor.axes import Axis, CategoricalAxis, axis_from_state
from probtensor.blocks import add_up
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm, Serial
from probtensor.data import Duplicates, Observations, as_table
from probtensor.intake import Table, Where, deal, observe_together, row_keys, seen_labels
from probtensor.persistence import write_state
from probtensor.predictive import Predictive
from probtensor.resources import (
    RandomState,
    is_integer,
    is_number,
    make_generator,
    resolve_device,
    threads_for,
    unchanged_on_failure,
)

__all__ = ["TensorRegressor", "UnknownLabelWarning"]

FloatArray = npt.NDArray[np.floating[Any]]


class UnknownLabelWarning(UserWarning):
    """A label was not among the training data: its latent functions have what the others share, and a wide interval.

    Examples
    --------
    >>> assert issubclass(UnknownLabelWarning, UserWarning)  # warnings.simplefilter("ignore", …) silences it
    """


class TensorRegressor(RegressorMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """Regression over the entries of a tensor, with a predictive distribution.

    Subclasses set their parameters in ``__init__`` and give `_fit`, `_predictive`, `_draw`, `_fitted_device`,
    `to_state` and `_restore`; where values may not be standardised, `_location_scale` too.

    Attributes
    ----------
    axes_ : tuple of Axis
        Fitted axes, one a mode.
    y_mean_, y_scale_ : float
        Mean and standard deviation of the training values; 0 and 1 for counts and binary values.
    n_features_in_ : int
        Number of modes ``K``.
    feature_names_in_ : ndarray of str, shape (K,)
        Names of the modes.
    """

    axes: Sequence[Axis] | None
    duplicates: Duplicates
    device: str

    axes_: tuple[Axis, ...]
    y_mean_: float
    y_scale_: float
    dtype_: np.dtype[Any]
    _seen: dict[str, npt.NDArray[np.bool_]]
    n_features_in_: int
    feature_names_in_: npt.NDArray[Any]

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        noise_std: Any = None,
        comm: Comm | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
    ) -> Self:
        """Fit the model to observed entries.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
            Coordinates of the observed entries, one column a mode. Entries that are missing have no row.
        y : array_like, shape (n,)
            Their values. The results are float32 where y is, else float64.
        sample_weight : array_like, shape (n,), optional
            How often each row counts, above 0. Default: once.
        noise_std : array_like, shape (n,), optional
            Known standard deviation of each row's measurement error, in the unit of y. Default: one standard deviation
            for all rows, learned.
        comm : Comm, optional
            The ranks that fit together, each with its own rows; see `probtensor.comm.world`. Default: this process
            alone.
        checkpoint : path-like, optional
            Folder for the state of the fit while it is under way; SIGTERM writes it too, and ends the process. A fit of
            the same rows with the same parameters, on any number of ranks, can go on from there.
        checkpoint_every : int, default 10
            Iterations from one checkpoint to the next.
        resume : bool, default False
            Go on from the newest checkpoint in the folder, if there is one.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If X or y is malformed, empty or not finite, a parameter does not fit the data, or checkpoints are of
            another fit.
        """
        comm = Serial() if comm is None else comm
        merged = self.duplicates != "observations"
        if comm.size > 1 and merged:
            raise ValueError(f'duplicates: expected "observations" on several ranks, got {self.duplicates!r}')
        for name, given in (("sample_weight", sample_weight), ("noise_std", noise_std)):
            if merged and given is not None:
                raise ValueError(f'duplicates: expected "observations" with {name}, got {self.duplicates!r}')
        with unchanged_on_failure(self):
            weights = {"sample_weight": sample_weight, "noise_std": noise_std}
            observed, (count, std) = observe_together(X, y, self.axes, self.duplicates, weights, comm)
            single = getattr(y, "dtype", None) in (np.float32, torch.float32) or observed.n_observed == 0
            self.dtype_ = np.dtype(np.float32 if b"no" not in comm.gather_bytes(b"yes" if single else b"no") else float)
            with threads_for(observed.n_observed):
                table = self._standardise(observed, count, std, comm)
                checkpoints = None
                if checkpoint is not None:
                    kind = f"{type(self).__module__}.{type(self).__qualname__}"
                    given = checkpoint, checkpoint_every, resume, comm
                    checkpoints = Checkpoints(*given, kind, self._params_state(), table)
                with nullcontext() if checkpoints is None else checkpoints.watching():
                    self._fit(table, comm, checkpoints)
        return self

    def _standardise(
        self, observed: Observations, sample_weight: Tensor | None, noise_std: Tensor | None, comm: Comm
    ) -> Table:
        self.axes_ = observed.axes
        self._seen = seen_labels(observed, comm)
        self.n_features_in_ = observed.order
        self.feature_names_in_ = np.array([axis.name for axis in self.axes_], dtype=object)
        key = row_keys(observed.positions, observed.values)
        precision = None if noise_std is None else noise_std**-2
        table = deal(Table(observed.positions, observed.values, sample_weight, precision, key), comm)
        self.y_mean_, self.y_scale_ = 0.0, 1.0
        if self._location_scale():

            def weighted(part: Table, power: int) -> Tensor:
                weight = torch.ones_like(part.values) if part.count is None else part.count
                return torch.stack([weight.sum(), (weight * (part.values - self.y_mean_) ** power).sum()])

            count, total = comm.sum(*add_up(weighted(part, 1) for part in table.blocks())).tolist()
            self.y_mean_ = total / count
            scatter = float(comm.sum(*add_up(weighted(part, 2) for part in table.blocks()))[1])
            scale = math.sqrt(scatter / count)
            self.y_scale_ = scale if scale > 1e-12 * abs(self.y_mean_) else 1.0
        values = (table.values - self.y_mean_) / self.y_scale_
        precision = None if table.precision is None else self.y_scale_**2 * table.precision
        return replace(table, values=values, precision=precision).to(resolve_device(self.device))

    def predict(self, X: Any, return_std: bool = False) -> FloatArray | tuple[FloatArray, FloatArray]:
        """Predictive mean of y, and its standard deviation.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
            Coordinates, seen in training or not.
        return_std : bool, default False
            Whether to return the standard deviation of y (noise included) too.

        Returns
        -------
        mean : ndarray, shape (n,)
            In the unit of y.
        std : ndarray, shape (n,)
            Only with ``return_std=True``.

        Raises
        ------
        ValueError
            If X has other columns than in training, or missing coordinates.

        Warns
        -----
        UnknownLabelWarning
            If a label was not seen in training; see `unknown`.
        """
        predictive = self._distribution(X)
        mean = predictive.mean.astype(self.dtype_)
        return (mean, predictive.std.astype(self.dtype_)) if return_std else mean

    def predictive(self, X: Any) -> Predictive:
        """The predictive distribution of y: quantiles, densities, scores and more.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)

        Returns
        -------
        Predictive
            One distribution a row, in the unit of y, float64.
        """
        return self._distribution(X)

    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[FloatArray, FloatArray]:
        """Central predictive intervals of y.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
        coverage : float, default 0.9
            Probability of the interval, between 0 and 1.

        Returns
        -------
        lower, upper : ndarray, shape (n,)
        """
        if not (is_number(coverage) and 0 < coverage < 1):
            raise ValueError(f"coverage: expected a probability between 0 and 1, got {coverage!r}")
        lower, upper = self._distribution(X).interval(coverage)
        return lower.astype(self.dtype_), upper.astype(self.dtype_)

    def predict_quantiles(self, X: Any, quantiles: Sequence[float]) -> FloatArray:
        """Predictive quantiles of y.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
        quantiles : sequence of float
            Probabilities between 0 and 1.

        Returns
        -------
        ndarray, shape (n, len(quantiles))
        """
        probabilities = np.asarray(quantiles, dtype=float)
        if probabilities.ndim != 1 or not np.all((probabilities > 0) & (probabilities < 1)):
            raise ValueError(f"quantiles: expected probabilities between 0 and 1, got {quantiles!r}")
        return np.asarray(self._distribution(X).quantile(probabilities)).astype(self.dtype_)

    def log_prob(self, X: Any, y: Any) -> FloatArray:
        """Log predictive density of each value, in the unit of y; a NaN in y is a missing value and gives 0.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
        y : array_like, shape (n,)

        Returns
        -------
        ndarray, shape (n,)
        """
        predictive = self._distribution(X)
        values = np.array(y, dtype=float)  # a copy: y may be a column that pandas shares
        if values.shape != predictive.mean.shape:
            raise ValueError(f"y: expected shape {predictive.mean.shape} to match X, got {values.shape}")
        return predictive.log_prob(values).astype(self.dtype_)

    def sample_y(self, X: Any, n_samples: int = 1, random_state: RandomState = 0) -> FloatArray:
        """Joint draws from the predictive distribution of y.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
        n_samples : int, default 1
        random_state : int, Generator, RandomState or None, default 0
            Seed; None draws one.

        Returns
        -------
        ndarray, shape (n, n_samples)
        """
        if not (is_integer(n_samples) and n_samples >= 1):
            raise ValueError(f"n_samples: expected an integer of at least 1, got {n_samples!r}")
        where = self._locate(X, stacklevel=3)
        generator = make_generator(random_state)
        with torch.no_grad(), threads_for(len(where)):
            drawn = self._draw(where, n_samples, generator)
        return (drawn * self.y_scale_ + self.y_mean_).cpu().numpy().T.astype(self.dtype_)

    def unknown(self, X: Any) -> pd.DataFrame:
        """Which labels were not seen in training: bool, one column a mode; continuous modes have none.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)

        Returns
        -------
        DataFrame, shape (n, K)
        """
        table = self._columns(X)
        flags = {axis.name: self._unknown(axis, axis.encode(table[axis.name])) for axis in self.axes_}
        return pd.DataFrame(flags, index=table.index)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one file; `probtensor.load` reads it, without the data, and predicts the same bits.

        Parameters
        ----------
        path : path-like
        """
        write_state(path, *self.state())

    def state(self) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """What `save` writes: the kind of model, arrays and JSON values."""
        check_is_fitted(self, "axes_")
        arrays, meta = self.to_state()
        shell = {
            "axes": [axis.to_state() for axis in self.axes_],
            "y_mean": self.y_mean_.hex(),
            "y_scale": self.y_scale_.hex(),
            "dtype": self.dtype_.name,
            "seen": {name: seen.tolist() for name, seen in self._seen.items()},
        }
        return f"{type(self).__module__}.{type(self).__qualname__}", arrays, {"shell": shell, **meta}

    @classmethod
    def from_state(cls, arrays: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        """Fitted estimator from what `save` wrote; use `probtensor.load`."""
        params = dict(meta["params"])
        if params.get("axes") is not None:
            params["axes"] = [axis_from_state(state) for state in params["axes"]]
        if str(params["device"]).startswith("cuda") and not torch.cuda.is_available():
            params["device"] = "cpu"  # fitted on a GPU, loaded on a machine without
        model = cls(**params)
        shell = meta["shell"]
        model.axes_ = tuple(axis_from_state(state) for state in shell["axes"])
        model.n_features_in_ = len(model.axes_)
        model.feature_names_in_ = np.array([axis.name for axis in model.axes_], dtype=object)
        model.y_mean_, model.y_scale_ = float.fromhex(shell["y_mean"]), float.fromhex(shell["y_scale"])
        model.dtype_ = np.dtype(shell["dtype"])
        model._seen = {name: np.array(seen, dtype=bool) for name, seen in shell["seen"].items()}
        model._restore(arrays, meta)
        return model

    @abstractmethod
    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the model itself writes: arrays and JSON values, among these ``params``."""

    @abstractmethod
    def _restore(self, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Set the fitted attributes from what `to_state` gave."""

    @abstractmethod
    def _fit(self, table: Table, comm: Comm, checkpoints: Checkpoints | None) -> None:
        """Fit to this rank's rows, of which there may be none where there are several ranks."""

    @abstractmethod
    def _predictive(self, where: Where) -> Predictive:
        """Predictive distributions of the standardised values."""

    @abstractmethod
    def _draw(self, where: Where, n_samples: int, generator: torch.Generator) -> Tensor:
        """Joint draws (n_samples, n) of the standardised values, noise included."""

    @abstractmethod
    def _fitted_device(self) -> torch.device:
        """Where the posterior is."""

    def _location_scale(self) -> bool:
        """Whether values may be standardised."""
        return True

    def _params_state(self) -> dict[str, Any]:
        """Constructor parameters as JSON values."""
        params = self.get_params(deep=False)
        if params["axes"] is not None:
            params["axes"] = [axis.to_state() for axis in params["axes"]]
        if not is_integer(params["random_state"]):
            params["random_state"] = None
        return json.loads(json.dumps(params, default=_json_value))  # type: ignore[no-any-return]

    def _axis(self, name: str) -> int:
        names = [axis.name for axis in self.axes_]
        if name not in names:
            raise ValueError(f"name: expected one of {names}, got {name!r}")
        return names.index(name)

    def _columns(self, X: Any) -> pd.DataFrame:
        check_is_fitted(self, "axes_")
        table = as_table(X)
        names = [axis.name for axis in self.axes_]
        missing = [name for name in names if name not in table.columns]
        if missing or (len(table.columns) != len(names)):
            raise ValueError(f"X: expected the columns {names}, got {list(table.columns)}")
        return table[names]

    def _locate(self, X: Any, stacklevel: int) -> Where:
        table = self._columns(X)
        where = Where(self.axes_, table, self._fitted_device())
        for axis, codes in zip(self.axes_, where.encoded, strict=True):
            self._warn_of_unknown(axis, codes.cpu().numpy(), table[axis.name], stacklevel + 1)
        return where

    def _unknown(self, axis: Axis, codes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which encoded labels have no training row; False on a continuous axis."""
        if not isinstance(axis, CategoricalAxis):
            return np.zeros(len(codes), dtype=bool)
        unseen = np.append(~self._seen[str(axis.name)], True)  # code -1 is the one at the end
        return np.asarray(unseen[codes])

    def _warn_of_unknown(self, axis: Axis, codes: npt.NDArray[Any], column: Any, stacklevel: int) -> None:
        flags = self._unknown(axis, codes)
        if flags.any():
            labels = pd.unique(pd.Series(column)[flags])
            shown = ", ".join(repr(x) for x in labels[:5].tolist()) + (", …" if len(labels) > 5 else "")
            warnings.warn(
                f"{flags.sum()} {'row has a label' if flags.sum() == 1 else 'rows have labels'} of {axis.name!r} that "
                f"training rows did not have ({shown}): such labels have what the others "
                "share and a wide interval; unknown(X) tells which",
                UnknownLabelWarning,
                stacklevel=stacklevel,
            )

    def _distribution(self, X: Any) -> Predictive:
        where = self._locate(X, stacklevel=4)
        with torch.no_grad(), threads_for(len(where)):
            predictive = self._predictive(where)
        if (self.y_scale_, self.y_mean_) != (1.0, 0.0):  # counts have no other unit
            predictive = predictive.affine(self.y_scale_, self.y_mean_)
        return predictive


def _json_value(value: object) -> object:
    """NumPy's numbers, such as a grid search sets, and torch's devices as JSON values."""
    return value.item() if isinstance(value, np.generic) else str(value)
