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
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import stats
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probtensor.axes import Axis, CategoricalAxis, axis_from_state
from probtensor.comm import Comm, Serial
from probtensor.data import Duplicates, Observations, as_table
from probtensor.gaussian import standard_normal
from probtensor.likelihoods import gaussian_log_prob
from probtensor.persistence import write_state
from probtensor.resources import RandomState, is_integer, is_number, make_generator, resolve_device, threads_for

__all__ = ["TensorRegressor", "UnknownLabelWarning"]

FloatArray = npt.NDArray[np.floating[Any]]


class UnknownLabelWarning(UserWarning):
    """A label was not among the training data: its latent functions have their prior, so the interval is wide."""


class TensorRegressor(RegressorMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """Regression over the entries of a tensor, with a predictive distribution.

    Subclasses set their parameters in ``__init__`` and give `_fit`, `_latent`, `_latent_samples`, `_noise_variance`,
    `to_state` and `_restore`.

    Attributes
    ----------
    axes_ : tuple of Axis
        Fitted axes, one a mode.
    y_mean_, y_scale_ : float
        Mean and standard deviation of the training values.
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

    def fit(self, X: Any, y: Any, comm: Comm | None = None) -> Self:
        """Fit the model to observed entries.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
            Coordinates of the observed entries, one column a mode. Entries that are missing have no row.
        y : array_like, shape (n,)
            Their values. The results are float32 where y is, else float64.
        comm : Comm, optional
            The ranks that fit together, each with its own rows; see `probtensor.comm.world`. Default: this process
            alone.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If X or y is malformed, empty or not finite, or a parameter does not fit the data.
        """
        comm = Serial() if comm is None else comm
        if comm.size > 1 and self.duplicates != "observations":
            raise ValueError(f'duplicates: expected "observations" on several ranks, got {self.duplicates!r}')
        before = dict(self.__dict__)
        try:
            if comm.size == 1:
                observed = Observations.from_table(X, y, self.axes, self.duplicates)
            else:
                observed = _observe_together(X, y, self.axes, comm)
            self.dtype_ = np.dtype(np.float32 if getattr(y, "dtype", None) in (np.float32, torch.float32) else float)
            with threads_for(observed.n_observed):
                self._fit_observed(observed, comm)
        except BaseException:
            # Neither bad input nor Ctrl-C leaves the new data's axes and units beside an old posterior.
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        return self

    def _fit_observed(self, observed: Observations, comm: Comm) -> None:
        self.axes_ = observed.axes
        self._seen = _seen_labels(observed, comm)
        self.n_features_in_ = observed.order
        self.feature_names_in_ = np.array([axis.name for axis in self.axes_], dtype=object)
        device = resolve_device(self.device)
        values = observed.values.to(device)
        count, total = comm.sum(torch.stack([values.new_tensor(float(len(values))), values.sum()])).tolist()
        self.y_mean_ = total / count
        scale = math.sqrt(float(comm.sum(((values - self.y_mean_) ** 2).sum()[None])) / count)
        self.y_scale_ = scale if scale > 1e-12 * abs(self.y_mean_) else 1.0
        self._fit(observed.positions.to(device), (values - self.y_mean_) / self.y_scale_, comm)

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
        mean, std = self._moments(X)
        return (mean.astype(self.dtype_), std.astype(self.dtype_)) if return_std else mean.astype(self.dtype_)

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
        mean, std = self._moments(X)
        half = stats.norm.ppf(0.5 + coverage / 2) * std
        return (mean - half).astype(self.dtype_), (mean + half).astype(self.dtype_)

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
        mean, std = self._moments(X)
        values = np.array(y, dtype=float)  # a copy: torch warns of read-only arrays, and every pandas column is one
        if values.shape != mean.shape:
            raise ValueError(f"y: expected shape {mean.shape} to match X, got {values.shape}")
        density = gaussian_log_prob(*(torch.from_numpy(x) for x in (values, mean, std**2)))
        return density.numpy().astype(self.dtype_)

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
        encoded = self._encode(X, stacklevel=3)
        generator = make_generator(random_state)
        with threads_for(len(encoded[0])):
            drawn = self._latent_samples(encoded, n_samples, generator)
        normal = standard_normal(drawn.shape, drawn, generator)
        drawn = drawn + normal * math.sqrt(self._noise_variance())
        return self._to_user(drawn).T.astype(self.dtype_)

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
        check_is_fitted(self, "axes_")
        arrays, meta = self.to_state()
        shell = {
            "axes": [axis.to_state() for axis in self.axes_],
            "y_mean": self.y_mean_.hex(),
            "y_scale": self.y_scale_.hex(),
            "dtype": self.dtype_.name,
            "seen": {name: seen.tolist() for name, seen in self._seen.items()},
        }
        write_state(path, f"{type(self).__module__}.{type(self).__qualname__}", arrays, {"shell": shell, **meta})

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
    def _fit(self, positions: Tensor, values: Tensor, comm: Comm) -> None:
        """Fit to positions (n, K) in the axes and standardised values (n,)."""

    @abstractmethod
    def _latent(self, encoded: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance (n,) of the standardised noise-free entries at encoded coordinates, (n,) a mode."""

    @abstractmethod
    def _latent_samples(self, encoded: list[Tensor], n_samples: int, generator: torch.Generator) -> Tensor:
        """Joint draws (n_samples, n) of the standardised noise-free entries."""

    @abstractmethod
    def _fitted_device(self) -> torch.device:
        """Where the posterior is."""

    @abstractmethod
    def _noise_variance(self) -> float:
        """Variance of the noise of standardised values."""

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

    def _encode(self, X: Any, stacklevel: int = 4) -> list[Tensor]:
        table = self._columns(X)
        encoded = [axis.encode(table[axis.name]) for axis in self.axes_]
        for axis, codes in zip(self.axes_, encoded, strict=True):
            self._warn_of_unknown(axis, codes, table[axis.name], stacklevel + 1)
        device = self._fitted_device()
        return [torch.as_tensor(np.array(codes), device=device) for codes in encoded]

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
                f"training rows did not have ({shown}): such labels have the prior and a wide "
                "interval; unknown(X) tells which",
                UnknownLabelWarning,
                stacklevel=stacklevel,
            )

    def _moments(self, X: Any) -> tuple[FloatArray, FloatArray]:
        encoded = self._encode(X)
        with torch.no_grad(), threads_for(len(encoded[0])):
            mean, variance = self._latent(encoded)
        std = (variance + self._noise_variance()).sqrt() * self.y_scale_
        return self._to_user(mean), std.cpu().numpy()

    def _to_user(self, standardised: Tensor) -> FloatArray:
        return (standardised * self.y_scale_ + self.y_mean_).cpu().numpy()


def _json_value(value: object) -> object:
    """NumPy's numbers, such as a grid search sets, and torch's devices as JSON values."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _seen_labels(observed: Observations, comm: Comm) -> dict[str, npt.NDArray[np.bool_]]:
    """Which labels of each categorical mode have a row on some rank: a category may have none."""
    seen = {}
    for axis, position in zip(observed.axes, observed.positions.T, strict=True):
        if isinstance(axis, CategoricalAxis):
            seen[str(axis.name)] = comm.sum(torch.bincount(position, minlength=axis.size)).numpy() > 0
    return seen


def _observe_together(X: Any, y: Any, axes: Sequence[Axis] | None, comm: Comm) -> Observations:
    """Rows of this rank in axes that hold what any rank has seen; what is wrong on one rank is refused on all."""
    try:
        own, fault = Observations.from_table(X, y, axes), ""
    except ValueError as error:
        fault = str(error)
    faults = [data.decode() for data in comm.gather_bytes(fault.encode())]
    if any(faults):
        raise ValueError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(faults) if text))
    states = comm.gather_bytes(json.dumps([axis.to_state() for axis in own.axes]).encode())
    ranks = [[axis_from_state(state) for state in json.loads(data)] for data in states]
    agreed = list(ranks[0])
    for other in ranks[1:]:
        agreed = [a.union(b) for a, b in zip(agreed, other, strict=True)]
    return Observations.from_table(X, y, agreed)
