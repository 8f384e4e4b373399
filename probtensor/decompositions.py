"""TensorLy's decompositions of a table with missing cells: PARAFAC (CP), non-negative PARAFAC, Tucker.

A table becomes the dense tensor of its cell means. Cells that were not observed are hidden: they hold the training mean
at first and the model's own reconstruction after that. `probtensor.decomposition_sweeps` has the loop.
`probtensor.baselines` offers these estimators too.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from probtensor.decomposition_sweeps import (
    Decomposition,
    complete,
    cp_ranks,
    hals_sweep,
    hooi_sweep,
    tucker_ranks,
    values_at,
)
from probtensor.label_cells import dense_cells, fit_cells, label_positions

__all__ = ["MaskedNonNegativeParafac", "MaskedParafac", "MaskedTucker"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_CELLS = 50_000_000


class _MaskedDecomposition(RegressorMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """What the decompositions share: the table as a tensor, random starts, predictions."""

    max_iter: int
    n_restarts: int
    random_state: int | None

    def fit(self, X: Any, y: npt.ArrayLike) -> Self:
        """Fit the decomposition.

        Parameters
        ----------
        X : DataFrame or array (n, K)
            Labels or coordinates, one column a mode, K at least 2.
        y : array (n,) of float
            Values.

        Returns
        -------
        The estimator itself.

        Raises
        ------
        ValueError
            If a rank, `n_restarts` or `max_iter` is below 1, K is 1, lengths differ, there is no row, a value is not
            finite, or the dense tensor would have more than 50 million cells.
        """
        for name, number in (("n_restarts", self.n_restarts), ("max_iter", self.max_iter)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number!r}")
        axes, positions, values = fit_cells(X, y)
        shape = tuple(axis.size for axis in axes)
        if len(shape) < 2 or np.prod(shape, dtype=np.float64) > MAX_CELLS:
            raise ValueError(f"X: expected 2 modes or more and at most {MAX_CELLS} cells, got shape {shape}")
        ranks = self._ranks(shape)
        self.axes_, self.mean_ = axes, float(values.mean())
        scale = float(np.sqrt(np.mean(values**2))) or 1.0
        tensor, mask = dense_cells(shape, positions, values / scale, fill=self.mean_ / scale)
        seeds = np.random.SeedSequence(self.random_state).generate_state(self.n_restarts)
        starts = [self._decompose(tensor, mask, ranks, int(seed)) for seed in seeds]
        errors = [np.mean((values_at(model, positions) - values / scale) ** 2) for model in starts]
        self._keep(starts[int(np.argmin(errors))], scale)
        return self

    def predict(self, X: Any) -> FloatArray:
        """Predict values; the training mean where a label was not seen.

        A label of a categorical column that no training row has counts as seen: its cells were hidden, one and all, and
        have what the sweeps made of the mean that they began with.

        Parameters
        ----------
        X : DataFrame or array (n, K)
            The columns of the training table.

        Returns
        -------
        array (n,) of float64
        """
        check_is_fitted(self)
        positions = label_positions(self.axes_, X)
        known = np.all(positions >= 0, axis=1)
        mean = np.full(len(positions), self.mean_)
        mean[known] = values_at(self._model(), positions[known])
        return mean

    @abstractmethod
    def _ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checked ranks of the modes of a tensor."""

    @abstractmethod
    def _decompose(self, tensor: FloatArray, mask: FloatArray, ranks: tuple[int, ...], seed: int) -> Decomposition:
        """The decomposition from one random start."""

    @abstractmethod
    def _keep(self, model: Decomposition, scale: float) -> None:
        """Store the fitted attributes, in the unit of the values."""

    @abstractmethod
    def _model(self) -> Decomposition:
        """What `_keep` stored."""


class MaskedParafac(_MaskedDecomposition):
    """TensorLy's PARAFAC with a mask, on the dense tensor of a table.

    TensorLy's start looks at what is stored in the missing cells, so these are filled with the training mean: neither
    a zero nor a held-out value enters. Values are divided by their root mean square, so that ``l2_reg`` has the same
    meaning whatever the unit. Cells observed more than once are averaged.

    Parameters
    ----------
    rank : int, default 3
        Number of components.
    l2_reg : float, default 0.1
        Ridge penalty of each least-squares step. A little of it keeps high ranks from diverging.
    max_iter : int, default 1000
        Sweeps at most.
    tol : float, default 1e-7
        Stop once the relative reconstruction error changes less in one sweep.
    n_restarts : int, default 1
        Random starts; the one with the smallest error on the training cells is kept.
    random_state : int, optional
        Seed of the starts.

    Attributes
    ----------
    factors_ : list of arrays (n_labels_of_mode, rank) of float64
        Factor matrices, in the unit of the values.
    axes_ : tuple of CategoricalAxis
        The labels of each mode.
    mean_ : float
        Mean of the training values.

    Examples
    --------
    >>> X = [[0, "a"], [0, "b"], [1, "a"], [2, "a"], [2, "b"]]
    >>> model = MaskedParafac(rank=1, l2_reg=0.0, tol=1e-12, random_state=0).fit(X, [1.0, 10.0, 2.0, 3.0, 30.0])
    >>> model.predict([[1, "b"]]).round(1).tolist()
    [20.0]
    """

    def __init__(
        self,
        rank: int = 3,
        *,
        l2_reg: float = 0.1,
        max_iter: int = 1000,
        tol: float = 1e-7,
        n_restarts: int = 1,
        random_state: int | None = None,
    ) -> None:
        self.rank = rank
        self.l2_reg = l2_reg
        self.max_iter = max_iter
        self.tol = tol
        self.n_restarts = n_restarts
        self.random_state = random_state

    def _ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return cp_ranks(self.rank, shape)

    def _decompose(self, tensor: FloatArray, mask: FloatArray, ranks: tuple[int, ...], seed: int) -> Decomposition:
        import tensorly
        from tensorly.decomposition import parafac

        if not np.any(tensor):  # what fits zeros is zero; TensorLy would divide by the norm
            return Decomposition(None, [np.zeros((n, rank)) for n, rank in zip(tensor.shape, ranks, strict=True)])
        with tensorly.backend_context("numpy", local_threadsafe=True):
            weights, factors = parafac(
                tensor,
                ranks[0],
                n_iter_max=self.max_iter,
                init="random",
                tol=self.tol,
                random_state=np.random.RandomState(seed),
                l2_reg=self.l2_reg,
                mask=mask,
            )
        return Decomposition(None, [factors[0] * weights, *factors[1:]])

    def _keep(self, model: Decomposition, scale: float) -> None:
        self.factors_ = [model.factors[0] * scale, *model.factors[1:]]

    def _model(self) -> Decomposition:
        return Decomposition(None, self.factors_)


class MaskedNonNegativeParafac(_MaskedDecomposition):
    """CP decomposition with factors of at least zero, by TensorLy's hierarchical alternating least squares (HALS).

    For values that are sums of parts: amounts, counts, intensities. Values below zero are allowed, and come out as
    near to zero as the factors can. Hidden cells hold the reconstruction of the sweep before. Cells observed more than
    once are averaged.

    Parameters
    ----------
    rank : int, default 3
        Number of components.
    max_iter : int, default 1000
        Sweeps at most.
    tol : float, default 1e-7
        Stop once the relative error on the observed cells changes less in one sweep.
    n_restarts : int, default 1
        Random starts; the one with the smallest error on the training cells is kept.
    random_state : int, optional
        Seed of the starts.

    Attributes
    ----------
    factors_ : list of arrays (n_labels_of_mode, rank) of float64
        Factor matrices, none with an entry below zero, in the unit of the values.
    errors_ : array (n_sweeps,) of float64
        After each sweep, the norm of the residual over the observed cells relative to that of their values.
    axes_ : tuple of CategoricalAxis
        The labels of each mode.
    mean_ : float
        Mean of the training values.

    References
    ----------
    Gillis and Glineur (2012), Accelerated Multiplicative Updates and Hierarchical ALS Algorithms for Nonnegative Matrix
    Factorization, Neural Computation 24, 1085-1105.

    Examples
    --------
    >>> X = [[0, "a"], [0, "b"], [1, "a"], [2, "a"], [2, "b"]]
    >>> model = MaskedNonNegativeParafac(rank=1, tol=1e-10, random_state=0).fit(X, [1.0, 2.0, 2.0, 3.0, 6.0])
    >>> model.predict([[1, "b"]]).round(1).tolist()
    [4.0]
    """

    def __init__(
        self,
        rank: int = 3,
        *,
        max_iter: int = 1000,
        tol: float = 1e-7,
        n_restarts: int = 1,
        random_state: int | None = None,
    ) -> None:
        self.rank = rank
        self.max_iter = max_iter
        self.tol = tol
        self.n_restarts = n_restarts
        self.random_state = random_state

    def _ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return cp_ranks(self.rank, shape)

    def _decompose(self, tensor: FloatArray, mask: FloatArray, ranks: tuple[int, ...], seed: int) -> Decomposition:
        rng = np.random.default_rng(seed)
        start = Decomposition(None, [rng.uniform(size=(n, rank)) for n, rank in zip(tensor.shape, ranks, strict=True)])
        return complete(tensor, mask, start, hals_sweep, self.max_iter, self.tol)

    def _keep(self, model: Decomposition, scale: float) -> None:
        assert model.errors is not None
        _check_convergence(model.errors, self.max_iter, self.tol)
        self.factors_, self.errors_ = [model.factors[0] * scale, *model.factors[1:]], model.errors

    def _model(self) -> Decomposition:
        return Decomposition(None, self.factors_)


class MaskedTucker(_MaskedDecomposition):
    """Tucker decomposition of a table with missing cells, by TensorLy's higher-order orthogonal iteration (HOOI).

    Hidden cells hold the reconstruction of the sweep before. Cells observed more than once are averaged.

    Parameters
    ----------
    rank : int or sequence of int, default 3
        Size of the core: one for each mode, at most the number of the mode's labels and the product of the other
        modes' ranks; a single number stands for all modes and is lowered to that where it is larger.
    max_iter : int, default 1000
        Sweeps at most.
    tol : float, default 1e-7
        Stop once the relative error on the observed cells changes less in one sweep.
    n_restarts : int, default 1
        Random starts; the one with the smallest error on the training cells is kept.
    random_state : int, optional
        Seed of the starts.

    Attributes
    ----------
    core_ : array (rank_of_mode, ...) of float64
        In the unit of the values.
    factors_ : list of arrays (n_labels_of_mode, rank_of_mode) of float64
        With orthonormal columns.
    errors_ : array (n_sweeps,) of float64
        After each sweep, the norm of the residual over the observed cells relative to that of their values.
    axes_ : tuple of CategoricalAxis
        The labels of each mode.
    mean_ : float
        Mean of the training values.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000), On the best rank-1 and rank-(R1, R2, ..., RN) approximation of
    higher-order tensors, SIAM Journal on Matrix Analysis and Applications 21, 1324-1342, algorithm 4.2.

    Examples
    --------
    >>> X = [[0, "a"], [0, "b"], [1, "a"], [2, "a"], [2, "b"]]
    >>> model = MaskedTucker(rank=1, tol=1e-10, random_state=0).fit(X, [1.0, 2.0, 2.0, 3.0, 6.0])
    >>> model.predict([[1, "b"]]).round(1).tolist()
    [4.0]
    """

    def __init__(
        self,
        rank: int | Sequence[int] = 3,
        *,
        max_iter: int = 1000,
        tol: float = 1e-7,
        n_restarts: int = 1,
        random_state: int | None = None,
    ) -> None:
        self.rank = rank
        self.max_iter = max_iter
        self.tol = tol
        self.n_restarts = n_restarts
        self.random_state = random_state

    def _ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tucker_ranks(self.rank, shape)

    def _decompose(self, tensor: FloatArray, mask: FloatArray, ranks: tuple[int, ...], seed: int) -> Decomposition:
        rng = np.random.default_rng(seed)
        factors = [np.linalg.qr(rng.normal(size=(n, rank)))[0] for n, rank in zip(tensor.shape, ranks, strict=True)]
        return complete(tensor, mask, Decomposition(np.zeros(ranks), factors), hooi_sweep, self.max_iter, self.tol)

    def _keep(self, model: Decomposition, scale: float) -> None:
        assert model.core is not None
        assert model.errors is not None
        _check_convergence(model.errors, self.max_iter, self.tol)
        self.core_, self.factors_, self.errors_ = model.core * scale, model.factors, model.errors

    def _model(self) -> Decomposition:
        return Decomposition(self.core_, self.factors_)


def _check_convergence(errors: FloatArray, max_iter: int, tol: float) -> None:
    """Warn where the last sweep allowed was not the last one needed."""
    if len(errors) == max_iter and not (max_iter > 1 and abs(errors[-2] - errors[-1]) < tol) and errors[-1] > 0.0:
        warnings.warn(
            f"not converged in {max_iter} sweeps: raise max_iter, or tol ({tol:g})", ConvergenceWarning, stacklevel=4
        )
