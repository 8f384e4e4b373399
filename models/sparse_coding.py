"""The shell of the sparse-coding estimators: validation, fit, posterior quantities, files.

Manners are those of scikit-learn's decompositions: ``fit``, ``transform``, ``inverse_transform``, ``components_``. A
subclass gives the model's mathematics (`_model`), and its prior in users' terms (`_set_prior`).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from probtensor.comm import Comm, Serial, refuse_together
from probtensor.inference.evolution import Evolution
from probtensor.inference.points import (
    PointBlocks,
    Summary,
    any_missing,
    as_points,
    block_size,
    deal_points,
    summarise,
)
from probtensor.inference.state_sets import every_state, few_active
from probtensor.inference.truncated_em import DataCut, Everything, Posterior, Preselection, Result, Selection, posterior
from probtensor.models.sparse_files import read_coder, write_coder
from probtensor.models.sparse_fit import Schedule, check_settings, fit_dictionary, sums_at
from probtensor.resources import (
    RandomState,
    is_integer,
    make_generator,
    resolve_device,
    shared_generator,
    threads_for,
    unchanged_on_failure,
)

__all__ = ["SparseCoder"]

FloatArray = npt.NDArray[np.floating[Any]]

SAMPLE, SAMPLE_A_COMPONENT = 1000, 20  # points, and this many a component more, for annealing and renewals
SEARCH_CANDIDATES, SEARCH_ACTIVE = 6, 3  # in annealing and renewals
MAX_EVERY = 2**16  # states that full enumeration takes at most


class SparseCoder(TransformerMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """A dictionary whose components are mostly off in a point, with a prior, noise and posteriors.

    Attributes
    ----------
    components_ : ndarray, shape (H, D)
        The dictionary.
    noise_std_ : float
        Standard deviation of the noise, in the unit of Y.
    bound_ : float
        Lower bound of the log-likelihood a point, exact where all states are enumerated.
    bound_history_ : list of float
        The bound before each step on all points, and at the end.
    parameter_history_ : dict of str to ndarray
        Prior and noise at these steps.
    n_iter_ : int
        Steps of EM on all points.
    converged_ : bool
    n_features_in_ : int
        Entries ``D`` of a point.
    """

    n_components: int
    n_candidates: int
    max_active: int
    states: Literal["selected", "evolved", "all"]
    n_states: int
    annealing: int
    temperature: float
    renewals: int
    data_cut: bool
    max_iter: int
    tol: float
    device: str
    random_state: RandomState
    progress: bool

    components_: FloatArray
    noise_std_: float
    bound_history_: list[float]
    parameter_history_: dict[str, FloatArray]
    n_iter_: int
    converged_: bool
    n_features_in_: int
    dtype_: np.dtype[Any]
    _params: Any
    _sums: Tensor
    _masked: bool

    def fit(self, Y: Any, y: None = None, *, comm: Comm | None = None) -> Self:
        """Learn dictionary, prior and noise.

        Parameters
        ----------
        Y : array_like or DataFrame, shape (N, D)
            Points; NaN is a missing entry. Results are float32 where Y is. An array on disk (``numpy.memmap``) is read
            block by block.
        y : None
            Not used.
        comm : Comm, optional
            The ranks that fit together, each with its own points; see `probtensor.comm.world`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If Y is malformed, empty or has infinite entries, or a parameter does not fit it.
        """
        comm = Serial() if comm is None else comm
        with unchanged_on_failure(self):
            refuse_together(comm, self._check)
            array = as_points(Y, comm, self._check_values)
            single = b"yes" if array.dtype == np.float32 else b"no"
            self.dtype_ = np.dtype(np.float32 if set(comm.gather_bytes(single)) == {b"yes"} else np.float64)
            array, tail, first = deal_points(array, self._blocks(array, False).size, comm)
            summary = summarise(self._blocks(array, False, first, tail), comm)
            blocks = self._blocks(array, summary.masked, first, tail)
            with threads_for(summary.n_points):
                result = self._learn(blocks, summary, comm)
                params, self._sums = self._standard(result.params), result.statistics
                if params is not result.params:  # sums for a later batch must be of the same scale
                    self._sums = sums_at(self._model(), params, blocks, self._selection(), comm).statistics
            self.n_features_in_, self._masked = array.shape[1], summary.masked
            self.bound_history_, self.n_iter_, self.converged_ = result.bound_history, result.n_iter, result.converged
            steps = {name: [x[name] for x in result.params_history] for name in result.params_history[0]}
            self.parameter_history_ = {name: torch.stack(values).cpu().numpy() for name, values in steps.items()}
            self._set(params)
        return self

    def fit_transform(self, Y: Any, y: None = None, *, comm: Comm | None = None) -> FloatArray:
        """Fit, and return the codes of Y; see `fit` and `transform`."""
        return self.fit(Y, comm=comm).transform(Y)

    def partial_fit(self, Y: Any, y: None = None) -> Self:
        """Learn from a batch: steps of EM on it alone, with what was learned before weighing as its own points did.

        The first call is `fit`. Sums over earlier batches stay in memory, their points do not: the dictionary is the
        optimum for all sums together (incremental EM, Neal and Hinton 1998, one step a batch).

        Parameters
        ----------
        Y : array_like, shape (N, D)
        y : None
            Not used.

        Returns
        -------
        self
        """
        if not hasattr(self, "components_"):
            return self.fit(Y)
        array = self._array_like_fitted(Y)
        if any_missing(array) and not self._masked:
            raise ValueError("Y: expected no missing entries, since the points before had none; got some")
        if len(array) == 0:
            raise ValueError("Y: expected at least one point, got none")
        with threads_for(len(array)):
            blocks = self._blocks(array, self._masked)
            found = sums_at(self._model(), self._params, blocks, self._selection(), Serial())
            self._sums = self._sums + found.statistics
            self._set(self._model().update(self._params, self._sums, self._masked))
        self.bound_history_ = [*self.bound_history_, found.bound_history[-1]]
        return self

    def transform(self, Y: Any) -> FloatArray:
        """Codes: posterior means of the causes.

        Parameters
        ----------
        Y : array_like, shape (N, D)
            NaN is a missing entry.

        Returns
        -------
        ndarray, shape (N, H)
        """
        return self._each(Y, lambda p: self._model().codes(self._params, p.points, p.states, p.q))

    def inclusion_probability(self, Y: Any) -> FloatArray:
        """Posterior probability of each cause not to be zero.

        Parameters
        ----------
        Y : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N, H)
        """
        return self._each(Y, lambda p: p.states.inclusion(p.q).T)

    def map_states(self, Y: Any) -> FloatArray:
        """The most probable state of each point.

        Parameters
        ----------
        Y : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N, H)
        """
        return self._each(Y, lambda p: p.states.state(p.q.argmax(0)).T)

    def reconstruct(self, Y: Any) -> FloatArray:
        """Posterior mean of the points without noise, missing entries included.

        Parameters
        ----------
        Y : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N, D)
        """
        return self._each(Y, lambda p: self._model().reconstruct(self._params, p.points, p.states, p.q))

    def score_samples(self, Y: Any) -> FloatArray:
        """Lower bound of the log-likelihood of each point; exact with ``states="all"``.

        Parameters
        ----------
        Y : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N,)
        """
        return self._each(Y, lambda p: p.log_joint.logsumexp(0))

    def score(self, Y: Any, y: None = None) -> float:
        """Mean of `score_samples`.

        Parameters
        ----------
        Y : array_like, shape (N, D)
        y : None
            Not used.

        Returns
        -------
        float
        """
        return float(self.score_samples(Y).astype(np.float64).mean())

    def inverse_transform(self, codes: Any) -> FloatArray:
        """Points without noise that codes stand for.

        Parameters
        ----------
        codes : array_like, shape (N, H)

        Returns
        -------
        ndarray, shape (N, D)
        """
        check_is_fitted(self, "components_")
        array = np.asarray(codes)
        if array.ndim != 2 or array.shape[1] != len(self.components_):
            raise ValueError(f"codes: expected shape (N, {len(self.components_)}), got {array.shape}")
        return self._decode(array).astype(self.components_.dtype)

    def sample(self, n_samples: int = 1, random_state: RandomState = 0) -> tuple[FloatArray, FloatArray]:
        """Draw points from the model.

        Parameters
        ----------
        n_samples : int, default 1
        random_state : int, Generator, RandomState or None, default 0

        Returns
        -------
        Y : ndarray, shape (n_samples, D)
        codes : ndarray, shape (n_samples, H)
        """
        check_is_fitted(self, "components_")
        if not (is_integer(n_samples) and n_samples >= 1):
            raise ValueError(f"n_samples: expected an integer of at least 1, got {n_samples!r}")
        rng = np.random.default_rng(make_generator(random_state).initial_seed())
        codes = self._draw(n_samples, rng)
        drawn = self._observe(codes, rng)
        return drawn.astype(self.components_.dtype), codes.astype(self.components_.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one file; `probtensor.load` reads it.

        Parameters
        ----------
        path : path-like
        """
        check_is_fitted(self, "components_")
        write_coder(self, path)

    @classmethod
    def from_state(cls, arrays: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        """Fitted estimator from what `save` wrote; use `probtensor.load`."""
        return read_coder(cls, arrays, meta)

    @property
    def bound_(self) -> float:
        """Lower bound of the log-likelihood of the training points, a point."""
        check_is_fitted(self, "bound_history_")
        return self.bound_history_[-1]

    @abstractmethod
    def _model(self) -> Any:
        """The model's mathematics."""

    @abstractmethod
    def _set_prior(self, params: Any) -> None:
        """Set ``prior_`` and whatever else belongs to the prior."""

    @abstractmethod
    def _prior_history(self, params: Any) -> dict[str, Tensor]:
        """What of the prior `parameter_history_` keeps."""

    @abstractmethod
    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        """Codes from the prior."""

    def _standard(self, params: Any) -> Any:
        """The same model with whatever scale is free as users expect it."""
        return params

    def _values(self) -> tuple[float, ...]:
        """Values of a cause other than zero."""
        return (1.0,)

    def _noise(self, params: Any) -> Tensor | None:
        """Standard deviation of the noise; None where the model has none."""
        return params.variance.sqrt()  # type: ignore[no-any-return]

    def _spread(self, params: Any) -> Tensor:
        """Size of the random numbers that annealing adds to the dictionary, at most."""
        return params.variance.sqrt()  # type: ignore[no-any-return]

    def _observe(self, codes: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Points drawn given their codes."""
        mean = self._decode(codes)
        return mean + self.noise_std_ * rng.normal(size=mean.shape)

    def _decode(self, codes: FloatArray) -> FloatArray:
        return np.asarray(codes @ self.components_.astype(np.float64))

    def _learn(self, blocks: PointBlocks, summary: Summary, comm: Comm) -> Result[Any]:
        """Parameters from all ranks' points."""
        H = self.n_components
        search = SAMPLE + SAMPLE_A_COMPONENT * H
        schedule = Schedule(self.temperature, self.annealing, self.renewals, search, self.max_iter, self.tol)
        limited = self.states == "selected" and self._max_active() < H
        return fit_dictionary(
            self._model(),
            blocks,
            summary,
            (self._selection(search=True), self._selection()),
            schedule,
            n_components=H,
            comm=comm,
            generator=shared_generator(self.random_state, comm),
            cut=DataCut(H, self._max_active()) if self.data_cut and limited else None,
            spread=self._spread,
            keep=self._history,
            progress=self.progress,
        )

    def _history(self, params: Any) -> dict[str, Tensor]:
        """What of the parameters stays of each step."""
        noise = self._noise(params)
        return self._prior_history(params) | ({} if noise is None else {"noise_std": noise})

    def _set(self, params: Any) -> None:
        self._params = params
        self.components_ = params.W.T.contiguous().cpu().numpy()
        noise = self._noise(params)
        if noise is not None:
            self.noise_std_ = float(noise)
        self._set_prior(params)

    def _check(self) -> None:
        check_settings(self)
        n_all = (1 + len(self._values())) ** self.n_components
        if self.states == "all" and n_all > MAX_EVERY:
            raise ValueError(f'states: expected "selected" or "evolved" for {n_all:.3g} states, got "all"')

    def _candidates(self) -> int:
        return min(self.n_candidates, self.n_components)

    def _max_active(self) -> int:
        return min(self.max_active, self._candidates() if self.states == "selected" else self.n_components)

    def _selection(self, search: bool = False) -> Selection:
        """Which states points have; in the search for a good dictionary only few."""
        H, values = self.n_components, self._values()
        like = torch.zeros((), dtype=self._dtype(), device=resolve_device(self.device))
        n_candidates, n_active = self._candidates() if self.states == "selected" else H, self._max_active()
        if search:
            n_candidates, n_active = min(n_candidates, SEARCH_CANDIDATES), min(n_active, SEARCH_ACTIVE)
        elif self.states == "all":
            return Everything(every_state(H, values, like))
        elif self.states == "evolved":
            return Evolution(self.n_states, n_active, H, values)
        return Preselection(few_active(n_candidates, min(n_active, n_candidates), values, like), H)

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype_ == np.float32 else torch.float64

    def _blocks(
        self, array: npt.NDArray[Any], masked: bool, first: int = 0, tail: npt.NDArray[Any] | None = None
    ) -> PointBlocks:
        width, device = max(self._selection().states_per_point, array.shape[1]), resolve_device(self.device)
        tail = array[:0] if tail is None else tail
        return PointBlocks(array, tail, block_size(width, device), first, masked, self._dtype(), device)

    def _array_like_fitted(self, Y: Any) -> npt.NDArray[Any]:
        check_is_fitted(self, "components_")
        array = as_points(Y, Serial(), self._check_values)
        if array.shape[1] != self.n_features_in_:
            raise ValueError(f"Y: expected {self.n_features_in_} entries a point, got {array.shape[1]}")
        return array

    def _check_values(self, array: npt.NDArray[Any]) -> None:
        """Refuse values that the model cannot have."""

    def _each(self, Y: Any, what: Callable[[Posterior], Tensor]) -> FloatArray:
        """What is asked of the posterior of each point, block by block."""
        array = self._array_like_fitted(Y)
        blocks, selection = self._blocks(array, any_missing(array)), self._selection()
        with torch.no_grad(), threads_for(len(array)):
            parts = [what(posterior(self._model(), self._params, points, selection)).cpu() for points in blocks]
        return torch.cat(parts).numpy()
