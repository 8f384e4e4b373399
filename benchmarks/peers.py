"""References that a model of a table must beat: means, additive effects, trees, neighbours.

All have one protocol: ``fit(X, y, inner)``, ``predict(X) -> mean, std or None``, ``score(X, y)``. What a reference
chooses (shrinkage, scales, the size of its errors) it chooses on the training rows marked by `inner`, which are held
out the way the test rows are; then it is fitted to all training rows. Test rows are never looked at.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_array, hstack
from scipy.sparse.linalg import lsmr
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.neighbors import KNeighborsRegressor

from benchmarks.datasets import Floats, Mask, NumberedColumns, distinct, held_out
from benchmarks.scores import Score, both, gaussian_score, student_fit, student_score
from benchmarks.sparse_gp import SparseGaussianProcess

Columns = tuple[int, ...]
LEAST_SCALE = 0.01  # of the errors, in standard deviations of y: duplicated rows would make any density infinite
FEW = 30  # inner rows of one level below which its errors are pooled with all others


class Method(Protocol):
    """What a table compares."""

    def fit(self, X: Any, y: Floats, inner: Mask | None = None) -> Self:
        """Fit to training rows; `inner` marks those to choose settings on."""

    def predict(self, X: Any) -> tuple[Floats, Floats | None]:
        """Mean and, where there is one, standard deviation."""

    def score(self, X: Any, y: Floats) -> Score:
        """Score on test rows."""


class Reference(ABC):
    """What the references share: settings chosen on inner rows, then the size of the errors there, then all rows."""

    settings: Sequence[Any] = (None,)

    def fit(self, X: Any, y: Floats, inner: Mask | None = None) -> Self:
        """Fit to training rows; without `inner`, settings are chosen on a random fifth of them."""
        self._columns = NumberedColumns(X)
        table = self._columns(X)
        if inner is None:
            inner = held_out(np.arange(len(y)), 0)
        outer = ~inner
        self.setting_ = self._choose(table, y, inner)
        self._fit(table[outer], y[outer], self.setting_)
        self._errors = _Errors(y[inner] - self._mean(table[inner]), self._level(table[inner]), float(y.std()))
        self._fit(table, y, self.setting_)
        return self

    def predict(self, X: Any) -> tuple[Floats, Floats | None]:
        """Mean, and the standard deviation of Gaussian errors."""
        table = self._columns(X)
        return self._mean(table), self._std(table)

    def score(self, X: Any, y: Floats) -> Score:
        """Score with Gaussian errors and with Student errors."""
        table = self._columns(X)
        mean, (nu, scale) = self._mean(table), self._errors.student(self._level(table))
        return both(gaussian_score(y, mean, self._std(table)), student_score(y, mean, scale, nu))

    @abstractmethod
    def _fit(self, X: Floats, y: Floats, setting: Any) -> None:
        """Fit to rows with one setting."""

    @abstractmethod
    def _mean(self, X: Floats) -> Floats:
        """Predict rows."""

    def _std(self, X: Floats) -> Floats:
        return self._errors.std(self._level(X))

    def _level(self, X: Floats) -> npt.NDArray[np.int64]:
        """What errors depend on: rows of one level have errors of one size."""
        return np.zeros(len(X), dtype=np.int64)

    def _choose(self, X: Floats, y: Floats, inner: Mask) -> Any:
        """The setting with the smallest squared error on the inner rows."""
        if len(self.settings) == 1:
            return self.settings[0]
        return min(self.settings, key=lambda setting: self._inner_error(X, y, inner, setting))

    def _inner_error(self, X: Floats, y: Floats, inner: Mask, setting: Any) -> float:
        self._fit(X[~inner], y[~inner], setting)
        return float(np.mean((y[inner] - self._mean(X[inner])) ** 2))


class GroupMeans(Reference):
    """The mean of the training rows that agree in the first group of columns that was seen, else in the next, …

    The empty group is the mean of all rows; it always comes last.
    """

    def __init__(self, *groups: Columns) -> None:
        self.groups = (*groups, ())

    def _fit(self, X: Floats, y: Floats, setting: Any) -> None:
        self._means = [_group_means(X[:, list(group)], y) for group in self.groups]

    def _mean(self, X: Floats) -> Floats:
        return self._look_up(X)[0]

    def _level(self, X: Floats) -> npt.NDArray[np.int64]:
        return self._look_up(X)[1]

    def _look_up(self, X: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
        mean, level = np.full(len(X), np.nan), np.full(len(X), -1)
        for j, (group, (labels, means)) in enumerate(zip(self.groups, self._means, strict=True)):
            found = np.append(means, np.nan)[_positions(labels, X[:, list(group)])]
            new = np.isnan(mean) & ~np.isnan(found)
            mean[new], level[new] = found[new], j
        return mean, level


class Effects(Reference):
    """The mean plus one effect for each group of columns, fitted jointly by ridge regression.

    The ridge of a group is the ratio of the noise variance to the variance of its effects. Given ratios are kept;
    otherwise they are chosen on inner rows, one group at a time from `grid`, twice around. With `residual`, the mean
    training residual of the row's own cell (all of the first three columns) is added where it was seen.
    """

    grid = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)

    def __init__(self, *groups: Columns, ridge: float | None = None, residual: bool = False) -> None:
        self.groups, self.ridge, self.residual = groups, ridge, residual

    def _choose(self, X: Floats, y: Floats, inner: Mask) -> Any:
        if self.ridge is not None:
            return (self.ridge,) * len(self.groups)
        best, tried = (1.0,) * len(self.groups), {}
        for _ in range(2):
            for j in range(len(self.groups)):
                for ratio in self.grid:
                    setting = (*best[:j], ratio, *best[j + 1 :])
                    if setting not in tried:
                        tried[setting] = self._inner_error(X, y, inner, setting)
                best = min(tried, key=lambda setting: tried[setting])
        return best

    def _fit(self, X: Floats, y: Floats, setting: Any) -> None:
        self._grand = float(y.mean())
        self._seen, parts, n = [], [], len(y)
        for group, ratio in zip(self.groups, setting, strict=True):
            labels = pd.MultiIndex.from_arrays(X[:, list(group)].T).unique()
            weight = 1 / np.sqrt(ratio) if ratio else 1.0
            at = _positions(labels, X[:, list(group)])
            parts.append(csr_array((np.full(n, weight), at, np.arange(n + 1)), (n, len(labels))))
            self._seen.append(labels)
        damp = float(any(setting))
        solution = lsmr(
            hstack(parts).tocsr(), y - self._grand, damp=damp, atol=1e-9, btol=1e-9, conlim=0.0, maxiter=5000
        )[0]
        ends = np.cumsum([len(labels) for labels in self._seen])
        weights = [1 / np.sqrt(ratio) if ratio else 1.0 for ratio in setting]
        self._effects = [w * part for w, part in zip(weights, np.split(solution, ends[:-1]), strict=True)]
        self._rest = None
        if self.residual:
            self._rest = _group_means(X[:, :3], y - self._additive(X))

    def _additive(self, X: Floats) -> Floats:
        mean = np.full(len(X), self._grand)
        for group, labels, effect in zip(self.groups, self._seen, self._effects, strict=True):
            mean += np.append(effect, 0.0)[_positions(labels, X[:, list(group)])]
        return mean

    def _mean(self, X: Floats) -> Floats:
        mean = self._additive(X)
        if self._rest is not None:
            labels, rest = self._rest
            mean += np.append(rest, 0.0)[_positions(labels, X[:, :3])]
        return mean

    def _level(self, X: Floats) -> npt.NDArray[np.int64]:
        """Which of the groups were seen, as the bits of a number."""
        seen = [labels for labels in self._seen] + ([] if self._rest is None else [self._rest[0]])
        groups = [*self.groups, *[(0, 1, 2)] * (len(seen) - len(self.groups))]
        bits = [_positions(labels, X[:, list(group)]) >= 0 for labels, group in zip(seen, groups, strict=True)]
        return np.asarray(sum(bit.astype(np.int64) << j for j, bit in enumerate(bits)))


class Trees(Reference):
    """scikit-learn's histogram gradient boosting; labels as categories, number and size of trees from inner rows."""

    settings = ((100, 31), (500, 31), (500, 63))

    def _fit(self, X: Floats, y: Floats, setting: Any) -> None:
        self._model = HistGradientBoostingRegressor(
            max_iter=setting[0],
            max_leaf_nodes=setting[1],
            early_stopping=False,
            random_state=0,
            categorical_features=sorted(self._columns.labels) or None,
        )
        self._model.fit(X, y)

    def _mean(self, X: Floats) -> Floats:
        return np.asarray(self._model.predict(X))


class Neighbours(Reference):
    """The mean of the five nearest training rows, plain or weighted by the inverse distance, `mode` stretched.

    Weights and the factor of the stretch are chosen on inner rows.
    """

    settings = tuple(itertools.product((0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0), ("uniform", "distance")))

    def __init__(self, mode: int = 2) -> None:
        self.mode = mode

    def _fit(self, X: Floats, y: Floats, setting: Any) -> None:
        self._model = KNeighborsRegressor(n_neighbors=5, weights=setting[1]).fit(self._stretched(X, setting), y)
        self._setting = setting

    def _mean(self, X: Floats) -> Floats:
        return np.asarray(self._model.predict(self._stretched(X, self._setting)))

    def _stretched(self, X: Floats, setting: Any) -> Floats:
        scale = np.ones(3)
        scale[self.mode] = setting[0]
        return X[:, :3] * scale


def references(name: str, *, station: bool = False) -> dict[str, Callable[[], Method]]:
    """Makers of the references for a FunBaT set; with `station`, of those that also use a fourth column, the station.

    Beijing's days and US places are what rows share; "day" is the third coordinate, a place the first two.
    """
    cell: Columns = (0, 1, 2)
    if name == "us_temp":
        if station:  # the label says no more than the coordinates
            return {}
        place, year = (0, 1), (2,)
        return {
            "global mean": GroupMeans,
            "mean of the location": lambda: GroupMeans(place),
            "mean of the cell, else location": lambda: GroupMeans(cell, place),
            "location + year effects": lambda: Effects(place, year, ridge=0.0),
            "location + year + cell's residual": lambda: Effects(place, year, ridge=0.0, residual=True),
            "location + year + cell, shrunk": lambda: Effects(place, year, cell),
            "histogram gradient boosting": Trees,
            "5 nearest neighbours": Neighbours,
            "sparse GP (GPyTorch)": SparseGaussianProcess,
        }
    day: Columns = (2,)
    if station:
        return {
            "day + station, shrunk": lambda: Effects(day, (3,)),
            "day + station + cell, shrunk": lambda: Effects(day, (3,), cell),
            "histogram gradient boosting, with station": Trees,
        }
    return {
        "global mean": GroupMeans,
        "mean of the day": lambda: GroupMeans(day),
        "mean of the cell, else day": lambda: GroupMeans(cell, day),
        "day + cell, shrunk": lambda: Effects(day, cell),
        "histogram gradient boosting": Trees,
        "5 nearest neighbours": Neighbours,
        "sparse GP (GPyTorch)": SparseGaussianProcess,
    }


class _Errors:
    """Size and form of the errors on inner rows, apart for each level that enough of the rows have."""

    def __init__(self, residual: Floats, level: npt.NDArray[np.int64], unit: float) -> None:
        least = LEAST_SCALE * unit
        kinds: list[int | None] = [None, *(int(kind) for kind in np.unique(level) if (level == kind).sum() >= FEW)]
        self._std, self._student = {}, {}
        for kind in kinds:
            some = residual if kind is None else residual[level == kind]
            self._std[kind] = max(float(np.sqrt(np.mean(some**2))), least)
            self._student[kind] = student_fit(some, least)

    def std(self, level: npt.NDArray[np.int64]) -> Floats:
        return np.asarray([self._std.get(kind, self._std[None]) for kind in level.tolist()], dtype=np.float64)

    def student(self, level: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        found = [self._student.get(kind, self._student[None]) for kind in level.tolist()]
        return np.asarray([f[0] for f in found]), np.asarray([f[1] for f in found])


def _group_means(keys: Floats, y: Floats) -> tuple[pd.MultiIndex | None, Floats]:
    """The distinct rows of the keys, and the mean of y over each; None where there are no columns."""
    if keys.shape[1] == 0:
        return None, np.asarray([y.mean()])
    which = distinct(keys)
    first = np.unique(which, return_index=True)[1]
    return pd.MultiIndex.from_arrays(keys[first].T), np.bincount(which, y) / np.bincount(which)


def _positions(labels: pd.MultiIndex | None, keys: Floats) -> npt.NDArray[np.int64]:
    """Where each row of the keys stands among the labels; -1 where it was not seen."""
    if labels is None:
        return np.zeros(len(keys), dtype=np.int64)
    return np.asarray(labels.get_indexer(pd.MultiIndex.from_arrays(keys.T)), dtype=np.int64)
