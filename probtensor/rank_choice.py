"""The rank of a model by what it says about cells that it was not shown, or by its bound on the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.base import clone

from probtensor.data import as_table, group_cells
from probtensor.label_cells import fit_cells
from probtensor.metrics import rmse

__all__ = ["RankChoice", "choose_rank"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class RankChoice(NamedTuple):
    """The rank that was chosen, why, and the model that has it.

    Attributes
    ----------
    rank : int or sequence of int
        One of the ranks that were tried.
    table : DataFrame
        One row a rank, as they were given, with the columns ``rank`` and ``bound``, or ``rank``, ``rmse`` (mean over
        the folds) and ``standard_error`` (of that mean).
    estimator : estimator
        Fitted to all rows with that rank.

    Examples
    --------
    >>> table = pd.DataFrame({"rank": [1, 2], "rmse": [0.9, 0.1]})
    >>> RankChoice(2, table, None)._fields[:2]
    ('rank', 'table')
    """

    rank: int | Sequence[int]
    table: pd.DataFrame
    estimator: Any


def choose_rank(
    estimator: Any,
    X: Any,
    y: npt.ArrayLike,
    ranks: Sequence[int | Sequence[int]],
    *,
    by: Literal["held_out", "bound"] = "held_out",
    folds: int = 5,
    one_standard_error: bool = False,
    random_state: int | None = None,
) -> RankChoice:
    """Try ranks, choose one, and fit with it to all rows.

    By held-out cells, cells are dealt to folds at random, all rows of a cell to the same one; each rank is fitted to
    all folds but one and judged by the root mean squared error on that one, in turn. The smallest mean error wins, or
    with `one_standard_error` the first rank in the list whose mean error is within one standard error of it. By the
    bound, each rank is fitted once, to all rows, and the largest ``bound_`` wins.

    A fit that is caught in a poor local minimum on one fold speaks against its rank: give the estimator several starts.

    Parameters
    ----------
    estimator : estimator
        With a parameter ``rank``, ``fit`` and ``predict`` as scikit-learn has them, and ``bound_`` if `by` is "bound".
        It is cloned, never fitted itself.
    X : DataFrame or array (n, K)
        Labels or coordinates, one column a mode. Estimators get a DataFrame.
    y : array (n,) of float
        Values.
    ranks : sequence of int, or of sequences of int
        Ranks to try, the simplest model first.
    by : {"held_out", "bound"}, default "held_out"
        What decides.
    folds : int, default 5
        Parts of the cells, each held out once; of no account by the bound.
    one_standard_error : bool, default False
        Whether to prefer the simplest rank that is not clearly worse. By held-out cells only.
    random_state : int, optional
        Seed of the folds. That of the fits is the estimator's own.

    Returns
    -------
    RankChoice
        The rank, the table of all, and the fitted estimator.

    Raises
    ------
    ValueError
        If an argument is out of range, the estimator has no rank or (by the bound) no ``bound_``, a bound or a
        prediction is not finite, or an error of the rows themselves.

    References
    ----------
    The rule of one standard error: Breiman, Friedman, Olshen and Stone (1984), Classification and Regression Trees,
    section 3.4.3.

    Examples
    --------
    >>> from probtensor.baselines import MaskedTucker
    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.normal(size=(9, 2)), rng.normal(size=(8, 2))
    >>> X = np.argwhere(rng.uniform(size=(9, 8)) < 0.9)
    >>> y = np.sum(a[X[:, 0]] * b[X[:, 1]], axis=1)
    >>> choice = choose_rank(MaskedTucker(tol=1e-5, random_state=0), X, y, [1, 2], folds=3, random_state=0)
    >>> choice.rank, choice.table.columns.tolist()
    (2, ['rank', 'rmse', 'standard_error'])
    """
    if by not in ("held_out", "bound"):
        raise ValueError(f'by: expected "held_out" or "bound", got {by!r}')
    if len(ranks) == 0:
        raise ValueError("ranks: expected at least one, got none")
    if "rank" not in estimator.get_params(deep=False):
        raise ValueError(f"estimator: expected one with a parameter rank, got {type(estimator).__name__}")
    _, positions, values = fit_cells(X, y)
    table = as_table(X)
    candidates = [clone(estimator).set_params(rank=rank) for rank in ranks]
    if by == "bound":
        if one_standard_error:
            raise ValueError('one_standard_error: expected False if by is "bound", which has no standard error')
        return _by_bound(candidates, table, values, ranks)
    cells, first = group_cells(positions)
    if not 2 <= folds <= len(first):
        raise ValueError(f"folds: expected from 2 to the number of cells, {len(first)}, got {folds!r}")
    fold = (np.random.default_rng(random_state).permutation(len(first)) % folds)[cells]
    errors = np.array([_fold_errors(candidate, table, values, fold, folds) for candidate in candidates])
    mean, standard_error = errors.mean(axis=1), errors.std(axis=1, ddof=1) / np.sqrt(folds)
    best = int(mean.argmin())
    if one_standard_error:
        best = int(np.argmax(mean <= mean[best] + standard_error[best]))  # the first that is
    found = pd.DataFrame({"rank": list(ranks), "rmse": mean, "standard_error": standard_error})
    return RankChoice(ranks[best], found, candidates[best].fit(table, values))


def _by_bound(
    candidates: list[Any], table: pd.DataFrame, values: FloatArray, ranks: Sequence[int | Sequence[int]]
) -> RankChoice:
    """Fit all, keep the one with the largest bound."""
    bounds: list[float] = []
    for rank, candidate in zip(ranks, candidates, strict=True):
        candidate.fit(table, values)
        bound = getattr(candidate, "bound_", None)
        if bound is None or not np.isfinite(bound):
            raise ValueError(f"estimator: expected a finite bound_ after the fit with rank {rank!r}, got {bound!r}")
        bounds.append(float(bound))
    best = int(np.argmax(bounds))
    return RankChoice(ranks[best], pd.DataFrame({"rank": list(ranks), "bound": bounds}), candidates[best])


def _fold_errors(candidate: Any, table: pd.DataFrame, values: FloatArray, fold: IntArray, folds: int) -> list[float]:
    """The error on each fold of a fit to the others."""
    errors = []
    for number in range(folds):
        out = fold == number
        fitted = clone(candidate).fit(table[~out], values[~out])
        errors.append(rmse(values[out], fitted.predict(table[out])))
    return errors
