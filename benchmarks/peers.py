"""References that a model of a table must beat: means, additive effects, trees, neighbours, a sparse Gaussian process.

All have one protocol: ``fit(X, y, inner)``, ``predict(X) -> mean, std or None``, ``score(X, y)``. What a reference
chooses (shrinkage, scales, the size of its errors) it chooses on the training rows marked by `inner`, which are held
out the way the test rows are; then it is fitted to all training rows. Test rows are never looked at.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import optimize, special, stats
from scipy.sparse import csr_array, hstack
from scipy.sparse.linalg import lsmr
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.neighbors import KNeighborsRegressor

from benchmarks.datasets import Floats, Mask, distinct, held_out
from probtensor.metrics import crps_gaussian

Columns = tuple[int, ...]
LEAST_SCALE = 0.01  # of the errors, in standard deviations of y: duplicated rows would make any density infinite
FEW = 30  # inner rows of one level below which its errors are pooled with all others


class Score(NamedTuple):
    """Means over test rows; what the form of the errors decides has a value for each form (Gaussian, Student)."""

    rmse: float
    mae: float
    nll: tuple[float, ...] = ()
    crps: tuple[float, ...] = ()
    inside_95: tuple[float, ...] = ()
    inside_50: tuple[float, ...] = ()


class Method(Protocol):
    """What a table compares."""

    def fit(self, X: Any, y: Floats, inner: Mask | None = None) -> Self:
        """Fit to training rows; `inner` marks those to choose settings on."""

    def predict(self, X: Any) -> tuple[Floats, Floats | None]:
        """Mean and, where there is one, standard deviation."""

    def score(self, X: Any, y: Floats) -> Score:
        """Score on test rows."""


class Reference:
    """What the references share: settings chosen on inner rows, then the size of the errors there, then all rows."""

    settings: Sequence[Any] = (None,)

    def fit(self, X: Any, y: Floats, inner: Mask | None = None) -> Self:
        """Fit to training rows; without `inner`, settings are chosen on a random fifth of them."""
        self._labels: dict[int, pd.Index] = {}
        table = self._table(X, learn=True)
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
        table = self._table(X)
        return self._mean(table), self._std(table)

    def score(self, X: Any, y: Floats) -> Score:
        """Score with Gaussian errors and with Student errors."""
        table = self._table(X)
        mean, (nu, scale) = self._mean(table), self._errors.student(self._level(table))
        return both(gaussian_score(y, mean, self._std(table)), student_score(y, mean, scale, nu))

    def _fit(self, X: Floats, y: Floats, setting: Any) -> None:
        raise NotImplementedError

    def _mean(self, X: Floats) -> Floats:
        raise NotImplementedError

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

    def _table(self, X: Any, learn: bool = False) -> Floats:
        """Columns of numbers as they are, labels numbered as in training; -1 is a label that was not seen."""
        columns = []
        for k, column in enumerate(X.T if isinstance(X, np.ndarray) else (X[name] for name in X.columns)):
            if not isinstance(X, np.ndarray) and not pd.api.types.is_numeric_dtype(column):
                if learn:
                    self._labels[k] = pd.Index(sorted(set(column)))
                column = self._labels[k].get_indexer(column)
            columns.append(np.asarray(column, dtype=np.float64))
        return np.column_stack(columns)


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
            categorical_features=sorted(self._labels) or None,
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


class SparseGaussianProcess(Reference):
    """GPyTorch's stochastic variational Gaussian process on the first three columns, with its own Gaussian noise.

    Matérn 3/2 with one lengthscale a column, inducing points that start at random training rows and move, Adam on
    minibatches. Stops after `n_steps` or `seconds`, whichever comes first: a slower machine may get a worse fit.
    """

    def __init__(
        self, n_inducing: int = 500, n_steps: int = 500, seconds: float = 60.0, batch: int = 512, seed: int = 0
    ) -> None:
        self.n_inducing, self.n_steps, self.seconds, self.batch, self.seed = n_inducing, n_steps, seconds, batch, seed

    def fit(self, X: Any, y: Floats, inner: Mask | None = None) -> Self:
        """Fit to all rows at once: nothing is chosen on inner rows."""
        self._labels = {}
        self._fit(self._table(X, learn=True), y, None)
        return self

    def score(self, X: Any, y: Floats) -> Score:
        """Score of the Gaussian prediction."""
        mean, std = self.predict(X)
        assert std is not None
        return gaussian_score(y, mean, std)

    def _fit(self, X: Floats, y: Floats, setting: Any) -> None:
        gpytorch = _gpytorch()
        self._centre, self._scale = X[:, :3].mean(0), X[:, :3].std(0)
        self._y_centre, self._y_scale = float(y.mean()), float(y.std())
        inputs = self._inputs(X)
        targets = torch.from_numpy((y - self._y_centre) / self._y_scale).float()
        with torch.random.fork_rng():  # GPyTorch draws from the global generator, at its first evaluation too
            torch.manual_seed(self.seed)
            places = torch.unique(inputs, dim=0)
            first = places[torch.randperm(len(places))[: self.n_inducing]]
            self._model, self._likelihood = _variational(gpytorch, first), gpytorch.likelihoods.GaussianLikelihood()
            objective = gpytorch.mlls.VariationalELBO(self._likelihood, self._model, num_data=len(y))
            self._train(objective, inputs, targets)
        self._model.eval()
        self._likelihood.eval()

    def _train(self, objective: Any, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer = torch.optim.Adam([*self._model.parameters(), *self._likelihood.parameters()], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.n_steps, eta_min=1e-3)
        end, self.n_steps_ = time.perf_counter() + self.seconds, 0
        while True:
            for rows in torch.split(torch.randperm(len(targets)), self.batch):
                if self.n_steps_ >= self.n_steps or time.perf_counter() >= end:
                    return
                optimizer.zero_grad()
                loss = -objective(self._model(inputs[rows]), targets[rows])
                loss.backward()
                optimizer.step()
                schedule.step()
                self.n_steps_ += 1

    def _inputs(self, X: Floats) -> torch.Tensor:
        return torch.from_numpy((X[:, :3] - self._centre) / self._scale).float()

    def _moments(self, X: Floats) -> tuple[Floats, Floats]:
        with torch.no_grad():
            found = [self._likelihood(self._model(rows)) for rows in torch.split(self._inputs(X), 2048)]
        mean = torch.cat([f.mean for f in found]).double().numpy() * self._y_scale + self._y_centre
        return mean, torch.cat([f.variance for f in found]).double().sqrt().numpy() * self._y_scale

    def predict(self, X: Any) -> tuple[Floats, Floats | None]:
        """Mean and standard deviation of a new observation."""
        return self._moments(self._table(X))


def references(name: str, *, station: bool = False) -> dict[str, Callable[[], Reference]]:
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


def gaussian_score(y: Floats, mean: Floats, std: Floats) -> Score:
    """Score normal predictions."""
    z = (y - mean) / std
    nll = float(np.mean(0.5 * z**2 + np.log(std) + 0.5 * np.log(2 * np.pi)))
    inside = [float(np.mean(np.abs(z) <= stats.norm.ppf(0.5 + level / 2))) for level in (0.95, 0.5)]
    return Score(*point_errors(y, mean), (nll,), (crps_gaussian(y, mean, std),), (inside[0],), (inside[1],))


def student_score(y: Floats, mean: Floats, scale: Floats, nu: Floats) -> Score:
    """Score Student predictions with `nu` degrees of freedom; `scale` is not their standard deviation."""
    z = (y - mean) / scale
    nll = float(np.mean(np.log(scale) - stats.t.logpdf(z, nu)))
    inside = [float(np.mean(np.abs(z) <= stats.t.ppf(0.5 + level / 2, nu))) for level in (0.95, 0.5)]
    crps = float(np.mean(scale * student_crps(z, nu)))
    return Score(*point_errors(y, mean), (nll,), (crps,), (inside[0],), (inside[1],))


def student_crps(z: Floats, nu: Floats) -> Floats:
    """Continuous ranked probability score of the standard Student distribution at z, for more than 1 degree of freedom.

    Jordan, Krüger, Lerch (2019), Evaluating Probabilistic Forecasts with scoringRules, appendix A.
    """
    spread = 2 * np.sqrt(nu) / (nu - 1) * np.exp(special.betaln(0.5, nu - 0.5) - 2 * special.betaln(0.5, nu / 2))
    score: Floats = z * (2 * stats.t.cdf(z, nu) - 1) + 2 * stats.t.pdf(z, nu) * (nu + z**2) / (nu - 1) - spread
    return score


def point_errors(y: Floats, mean: Floats) -> tuple[float, float]:
    """Root mean squared and mean absolute error."""
    return float(np.sqrt(np.mean((y - mean) ** 2))), float(np.mean(np.abs(y - mean)))


def both(a: Score, b: Score) -> Score:
    """One score with the values of two forms of errors."""
    return Score(a.rmse, a.mae, *(one + other for one, other in zip(a[2:], b[2:], strict=True)))


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


def student_fit(residual: Floats, least: float) -> tuple[float, float]:
    """Most likely degrees of freedom (1.5 to 200) and scale (`least` or more) of residuals around zero."""
    start = max(float(np.median(np.abs(residual))), least)

    def cost(theta: Floats) -> float:
        nu, scale = np.exp(theta)
        return float(np.log(scale) - np.mean(stats.t.logpdf(residual / scale, nu)))

    found = optimize.minimize(
        cost,
        np.log([4.0, start]),
        method="L-BFGS-B",
        bounds=[(np.log(1.5), np.log(200.0)), (np.log(least), np.log(max(np.abs(residual).max(), 2 * least)))],
    )
    nu, scale = np.exp(found.x)
    return float(nu), float(scale)


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


def _gpytorch() -> Any:
    try:
        return importlib.import_module("gpytorch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the sparse GP reference needs GPyTorch: pip install gpytorch") from error


def _variational(gpytorch: Any, first: torch.Tensor) -> Any:
    """A sparse variational GP whose inducing points start at the rows of `first`."""

    class Model(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            distribution = gpytorch.variational.CholeskyVariationalDistribution(len(first))
            super().__init__(
                gpytorch.variational.VariationalStrategy(self, first, distribution, learn_inducing_locations=True)
            )
            self.mean_module = gpytorch.means.ConstantMean()
            kernel = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=first.shape[1])
            kernel.lengthscale = 0.3
            self.covar_module = gpytorch.kernels.ScaleKernel(kernel)

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return Model()
