"""Honest references for completing a table: additive effects, and the decompositions of `probtensor.decompositions`.

All follow scikit-learn's habits (``fit``, ``predict``, ``clone``, cross-validation) on the same tables as the models
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

from probtensor.decompositions import MaskedNonNegativeParafac, MaskedParafac, MaskedTucker
from probtensor.label_cells import fit_cells, label_positions

__all__ = ["MaskedNonNegativeParafac", "MaskedParafac", "MaskedTucker", "PerModeBiases"]

FloatArray = npt.NDArray[np.float64]


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
        self.axes_, positions, values = fit_cells(X, y)
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
        positions = label_positions(self.axes_, X)
        mean = np.full(len(positions), self.mean_)
        for effect, position in zip(self.effects_, positions.T, strict=True):
            mean += np.append(effect, 0.0)[position]  # position -1 is the zero at the end
        return mean
