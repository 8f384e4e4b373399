"""Two honest references for completing a table: additive effects, and TensorLy's masked PARAFAC.

Both follow scikit-learn's habits (``fit``, ``predict``, ``clone``, cross-validation) on the same tables as the models
of probtensor: one column a mode. They treat every distinct value of a column as a label, also on continuous modes.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.linalg import lsmr
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from probtensor.axes import CategoricalAxis
from probtensor.data import as_table

__all__ = ["MaskedParafac", "PerModeBiases"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_CELLS = 50_000_000


class PerModeBiases(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """The mean plus one shrunk effect for the label of each mode, fitted jointly by ridge regression.

    Parameters
    ----------
    ridge : float, default 1.0
        Strength of the shrinkage, in observations: the ratio of the noise variance to the variance of the effects. A
        label that was observed once keeps ``1 / (1 + ridge)`` of its deviation.

    Attributes
    ----------
    mean_ : float
        Mean of the training values.
    effects_ : list of arrays (n_labels_of_mode,) of float64
        One effect a label, in the order of ``axes_[k].labels``.
    axes_ : tuple of CategoricalAxis
        The labels of each mode.

    Examples
    --------
    >>> X = [["a", 1], ["a", 2], ["b", 1], ["b", 2]]
    >>> model = PerModeBiases(ridge=0.0).fit(X, [1.0, 2.0, 3.0, 4.0])
    >>> model.predict([["b", 2], ["b", 7]]).round(6).tolist()
    [4.0, 3.5]
    """

    def __init__(self, ridge: float = 1.0) -> None:
        self.ridge = ridge

    def fit(self, X: Any, y: npt.ArrayLike) -> Self:
        """Fit the effects.

        Parameters
        ----------
        X : DataFrame or array (n, K)
            Labels or coordinates, one column a mode.
        y : array (n,) of float
            Values.

        Returns
        -------
        PerModeBiases
            The estimator itself.

        Raises
        ------
        ValueError
            If `ridge` is negative, lengths differ, there is no row, or a value is not finite.
        """
        if not (np.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge: expected a finite number of at least 0, got {self.ridge!r}")
        self.axes_, positions, values = _fit_cells(X, y)
        self.mean_ = float(values.mean())
        sizes = [axis.size for axis in self.axes_]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        n, n_modes = positions.shape
        columns = (positions + starts[:-1]).ravel()
        design = csr_array((np.ones(n * n_modes), columns, np.arange(0, n * n_modes + 1, n_modes)), (n, starts[-1]))
        solution = lsmr(
            design, values - self.mean_, damp=np.sqrt(self.ridge), atol=1e-12, btol=1e-12, conlim=0.0, maxiter=10_000
        )
        self.effects_ = np.split(solution[0], starts[1:-1])
        return self

    def predict(self, X: Any) -> FloatArray:
        """Predict values; a label that was not seen has no effect.

        Parameters
        ----------
        X : DataFrame or array (n, K)
            The columns of the training table.

        Returns
        -------
        array (n,) of float64
        """
        check_is_fitted(self)
        positions = _positions(self.axes_, X)
        mean = np.full(len(positions), self.mean_)
        for effect, position in zip(self.effects_, positions.T, strict=True):
            mean += np.append(effect, 0.0)[position]  # position -1 is the zero at the end
        return mean


class MaskedParafac(RegressorMixin, BaseEstimator):  # type: ignore[misc]
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

    def fit(self, X: Any, y: npt.ArrayLike) -> Self:
        """Fit the factors.

        Parameters
        ----------
        X : DataFrame or array (n, K)
            Labels or coordinates, one column a mode, K at least 2.
        y : array (n,) of float
            Values.

        Returns
        -------
        MaskedParafac
            The estimator itself.

        Raises
        ------
        ValueError
            If `rank` or `n_restarts` is below 1, K is 1, lengths differ, there is no row, a value is not finite, or
            the dense tensor would have more than 50 million cells.
        """
        for name, number in (("rank", self.rank), ("n_restarts", self.n_restarts), ("max_iter", self.max_iter)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number!r}")
        axes, positions, values = _fit_cells(X, y)
        shape = tuple(axis.size for axis in axes)
        if len(shape) < 2 or np.prod(shape, dtype=np.float64) > MAX_CELLS:
            raise ValueError(f"X: expected 2 modes or more and at most {MAX_CELLS} cells, got shape {shape}")
        self.axes_, self.mean_ = axes, float(values.mean())
        scale = float(np.sqrt(np.mean(values**2))) or 1.0
        tensor, mask = _dense(shape, positions, values / scale, fill=self.mean_ / scale)
        seeds = np.random.SeedSequence(self.random_state).generate_state(self.n_restarts)
        starts = [self._factorize(tensor, mask, int(seed)) for seed in seeds]
        errors = [np.mean((_rows(factors, positions) - values / scale) ** 2) for factors in starts]
        best = starts[int(np.argmin(errors))]
        self.factors_ = [best[0] * scale, *best[1:]]
        return self

    def predict(self, X: Any) -> FloatArray:
        """Predict values; the training mean where a label was not seen.

        Parameters
        ----------
        X : DataFrame or array (n, K)
            The columns of the training table.

        Returns
        -------
        array (n,) of float64
        """
        check_is_fitted(self)
        positions = _positions(self.axes_, X)
        known = np.all(positions >= 0, axis=1)
        mean = np.full(len(positions), self.mean_)
        mean[known] = _rows(self.factors_, positions[known])
        return mean

    def _factorize(self, tensor: FloatArray, mask: FloatArray, seed: int) -> list[FloatArray]:
        """Return the factors of one random start, weights multiplied into the first."""
        import tensorly
        from tensorly.decomposition import parafac

        with tensorly.backend_context("numpy", local_threadsafe=True):
            weights, factors = parafac(
                tensor,
                self.rank,
                n_iter_max=self.max_iter,
                init="random",
                tol=self.tol,
                random_state=np.random.RandomState(seed),
                l2_reg=self.l2_reg,
                mask=mask,
            )
        return [factors[0] * weights, *factors[1:]]


def _fit_cells(X: Any, y: npt.ArrayLike) -> tuple[tuple[CategoricalAxis, ...], IntArray, FloatArray]:
    """Return the label axes, the positions (n, K) of the rows on them and the checked values (n,)."""
    table = as_table(X)
    values = np.asarray(y, dtype=np.float64)
    if len(table) == 0 or values.shape != (len(table),):
        raise ValueError(f"y: expected shape ({len(table)},) as X has rows (at least 1), got {values.shape}")
    if not np.all(np.isfinite(values)):
        raise ValueError("y: expected finite values, got NaN or infinity; leave missing cells out")
    axes = tuple(CategoricalAxis(name).fit(table[name]) for name in table.columns)
    return axes, _positions(axes, table), values


def _positions(axes: tuple[CategoricalAxis, ...], X: Any) -> IntArray:
    """Return the positions (n, K) of the rows on the axes, -1 for a label that was not seen."""
    table = as_table(X)
    names = [axis.name for axis in axes]
    if list(table.columns) != names:
        raise ValueError(f"X: expected the columns {names}, got {list(table.columns)}")
    return np.stack([axis.positions(table[axis.name]) for axis in axes], axis=1)


def _dense(
    shape: tuple[int, ...], positions: IntArray, values: FloatArray, fill: float
) -> tuple[FloatArray, FloatArray]:
    """Return the tensor of cell means, `fill` where nothing was observed, and its mask of zeros and ones."""
    cells = np.ravel_multi_index(tuple(positions.T), shape)
    size = int(np.prod(shape))
    count = np.bincount(cells, minlength=size)
    total = np.bincount(cells, weights=values, minlength=size)
    tensor = np.where(count > 0, total / np.maximum(count, 1), fill)
    return tensor.reshape(shape), (count > 0).astype(np.float64).reshape(shape)


def _rows(factors: list[FloatArray], positions: IntArray) -> FloatArray:
    """Evaluate the CP model at the given cells."""
    product = factors[0][positions[:, 0]]
    for factor, position in zip(factors[1:], positions.T[1:], strict=True):
        product = product * factor[position]
    values: FloatArray = product.sum(axis=1)
    return values
