"""Tables over several ways to hold rows out: FunBaT beside the references, on measured values and on counts.

A command needs three lines::

    methods = reference_methods() | {"FunBaT": funbat({"random_state": 0, "progress": False})}
    lines = table(data, FUNBAT_SETS, SPLITS, methods, range(5))
    lines += count_table(data_of_counts, COUNT_SETS, count_references() | {"FunBaT": funbat_counts({…})}, range(5))
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import special, stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, PoissonRegressor
from sklearn.preprocessing import OneHotEncoder

from benchmarks.datasets import FUNBAT_SETS, Floats, Mask, Split, load_counts, load_split
from benchmarks.peers import Method, references
from benchmarks.scores import Score, point_errors
from benchmarks.sparse_gp import SparseGaussianProcess
from probtensor.estimator import UnknownLabelWarning
from probtensor.metrics import coverage
from probtensor.models import FunBaT

N_LEVELS = 20  # intervals that the quantile form of the ranked probability score is integrated over
LEAST_PROBABILITY = 0.01  # of either value, where a mean is read as a probability


class Entry(NamedTuple):
    """One line of a table: how to make the method for a set, whether it sees the station, and where it is run."""

    make: Callable[[], Method]
    station: bool = False
    sets: tuple[str, ...] = FUNBAT_SETS
    folds: tuple[int, ...] | None = None  # None: all that are asked for


class FunBaTMethod:
    """FunBaT with the given arguments, scored by its own densities and intervals."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)

    def fit(self, X: Any, y: Floats, inner: Mask | None = None) -> Self:
        """Fit to all rows; `inner` is for methods that choose settings."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model = FunBaT(**self.arguments).fit(X, y)
        return self

    def predict(self, X: Any) -> tuple[Floats, Floats | None]:
        """Mean and standard deviation of a new observation."""
        with _unknown_allowed():
            mean, std = self.model.predict(X, return_std=True)
        return np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)

    def score(self, X: Any, y: Floats) -> Score:
        """Score the predictive distribution, whatever its form."""
        mean = self.predict(X)[0]
        with _unknown_allowed():
            nll = -float(np.mean(self.model.log_prob(X, y)))
            crps = quantile_crps(y, lambda level: self.model.predict_interval(X, level))
            inside = [coverage(y, *self.model.predict_interval(X, level)) for level in (0.95, 0.5)]
        return Score(*point_errors(y, mean), (nll,), (crps,), (inside[0],), (inside[1],))


def funbat(arguments: Mapping[str, Any], *, station: bool = False, sets: tuple[str, ...] = FUNBAT_SETS) -> Entry:
    """A line for FunBaT with these constructor arguments; with `station`, X is a DataFrame with a fourth column."""
    return Entry(lambda: FunBaTMethod(arguments), station=station, sets=sets)


def reference_methods(
    *, sparse_gp: bool = True, gp_folds: tuple[int, ...] = (0,), gp_seconds: float = 60.0
) -> dict[str, Entry]:
    """A line for each reference. The sparse GP takes a minute a fit and needs GPyTorch, so it has folds of its own."""
    entries: dict[str, Entry] = {}
    for station in (False, True):
        for name in FUNBAT_SETS:
            for label, make in references(name, station=station).items():
                sets = (*entries[label].sets, name) if label in entries else (name,)
                if make is not SparseGaussianProcess:
                    entries[label] = Entry(make, station, sets)
                elif sparse_gp:
                    entries[label] = Entry(lambda: SparseGaussianProcess(seconds=gp_seconds), station, sets, gp_folds)
    return entries


def table(
    data_folder: Path,
    sets: Iterable[str],
    splits: Iterable[Split],
    methods: Mapping[str, Entry],
    folds: Iterable[int],
    jobs: int = 1,
) -> list[str]:
    """Markdown lines: one table a set and split, one line a method, means over the folds; `jobs` fits at a time.

    Where a method has two forms of errors, Gaussian and Student, their values stand as "Gaussian / Student".
    """
    folds = tuple(folds)
    tables = {
        (name, split): [(label, entry) for label, entry in methods.items() if name in entry.sets]
        for name in sets
        for split in splits
    }
    tasks = [
        (name, split, label, entry, fold)
        for (name, split), entries in tables.items()
        for label, entry in entries
        for fold in folds
        if entry.folds is None or fold in entry.folds
    ]
    scores = Parallel(n_jobs=jobs)(
        delayed(_run)(entry, data_folder, name, split, fold) for name, split, _, entry, fold in tasks
    )
    lines = []
    for (name, split), entries in tables.items():
        lines += [
            f"### {name}, {split}",
            "",
            "| method | RMSE | MAE | NLL | CRPS | in 95 % | in 50 % | RMSE by fold | seconds a fit |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for label, _ in entries:
            pairs = zip(tasks, scores, strict=True)
            found = [score for task, score in pairs if task[:3] == (name, split, label)]
            if found:
                lines.append(_line(label, found))
        lines.append("")
    return lines


class CountMethod(Protocol):
    """What a table of counts compares."""

    def fit(self, X: Any, y: Floats, inner: Mask) -> Self:
        """Fit to training rows; `inner` marks those to choose settings on."""

    def log_likelihood(self, X: Any, y: Floats) -> Floats:
        """Log probability of each value."""


class ConstantRate:
    """One rate, or probability, for all cells."""

    def fit(self, X: Any, y: Floats, inner: Mask) -> Self:
        """Take the mean."""
        self._mean, self._binary = float(y.mean()), bool(y.max() <= 1)
        return self

    def log_likelihood(self, X: Any, y: Floats) -> Floats:
        """Log probability of each value."""
        return _log_mass(y, np.full(len(y), self._mean), self._binary)


class LogLinear:
    """One effect a label of each mode, or also a pair of labels, in the log rate (binary: the log odds).

    scikit-learn's PoissonRegressor or LogisticRegression on one column a label; the strength of the shrinkage is
    chosen on inner rows. Labels that were not seen have no effect.
    """

    grid = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

    def __init__(self, pairs: bool = False) -> None:
        self.pairs = pairs

    def fit(self, X: Any, y: Floats, inner: Mask) -> Self:
        """Choose the strength, then fit to all rows."""
        self._binary = bool(y.max() <= 1)
        errors = {}
        for strength in self.grid:
            self._fit(X[~inner], y[~inner], strength)
            errors[strength] = -self.log_likelihood(X[inner], y[inner]).mean()
        self.strength_ = min(errors, key=lambda strength: errors[strength])
        self._fit(X, y, self.strength_)
        return self

    def log_likelihood(self, X: Any, y: Floats) -> Floats:
        """Log probability of each value."""
        design = self._encoder.transform(self._labels(X))
        mean = self._model.predict_proba(design)[:, 1] if self._binary else self._model.predict(design)
        return _log_mass(y, np.asarray(mean), self._binary)

    def _fit(self, X: Any, y: Floats, strength: float) -> None:
        self._encoder = OneHotEncoder(handle_unknown="ignore")
        design = self._encoder.fit_transform(self._labels(X))
        if self._binary:
            self._model: Any = LogisticRegression(C=1 / (strength * len(y)), max_iter=2000)
        else:
            self._model = PoissonRegressor(alpha=strength, max_iter=2000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(design, y)

    def _labels(self, X: Any) -> Any:
        labels = {name: X[name].astype(str).to_numpy(dtype=object) for name in X.columns}
        names = list(labels)
        if self.pairs:
            for a in range(len(names)):
                for b in range(a):
                    labels[f"{names[b]}, {names[a]}"] = labels[names[b]] + "|" + labels[names[a]]
        return pd.DataFrame(labels).to_numpy(dtype=object)


class LineRate:
    """The mean of the training cells that agree in all modes but the last, shrunk to the mean of all.

    How many cells' worth of the overall mean are mixed in is chosen on inner rows.
    """

    grid = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

    def fit(self, X: Any, y: Floats, inner: Mask) -> Self:
        """Choose the shrinkage, then fit to all rows."""
        self._binary = bool(y.max() <= 1)
        errors = {}
        for prior in self.grid:
            self._fit(X[~inner], y[~inner], prior)
            errors[prior] = -self.log_likelihood(X[inner], y[inner]).mean()
        self.prior_ = min(errors, key=lambda prior: errors[prior])
        self._fit(X, y, self.prior_)
        return self

    def log_likelihood(self, X: Any, y: Floats) -> Floats:
        """Log probability of each value."""
        found = self._rates.reindex(self._keys(X)).to_numpy(dtype=np.float64)
        return _log_mass(y, np.where(np.isnan(found), self._mean, found), self._binary)

    def _fit(self, X: Any, y: Floats, prior: float) -> None:
        self._mean = float(y.mean())
        groups = pd.Series(y).groupby(self._keys(X))
        self._rates = (groups.sum() + prior * self._mean) / (groups.count() + prior)

    @staticmethod
    def _keys(X: Any) -> Any:
        parts = [X[name].astype(str) for name in X.columns[:-1]]
        return pd.Index(parts[0].str.cat(parts[1:], sep="|").to_numpy(dtype=object))


class FunBaTCounts:
    """FunBaT on counts. Its own `log_prob` is a log mass where its likelihood is discrete; else say how to read it.

    "rounded" gives a count the Gaussian probability from half below to half above it, zero all below; "probability"
    reads the mean as the probability of a one, kept 0.01 away from 0 and 1.
    """

    def __init__(self, arguments: Mapping[str, Any], read: Literal["own", "rounded", "probability"] = "own") -> None:
        self.arguments, self.read = dict(arguments), read

    def fit(self, X: Any, y: Floats, inner: Mask) -> Self:
        """Fit to all rows."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model = FunBaT(**self.arguments).fit(X, y)
        return self

    def log_likelihood(self, X: Any, y: Floats) -> Floats:
        """Log probability of each value."""
        with _unknown_allowed():
            if self.read == "own":
                return np.asarray(self.model.log_prob(X, y), dtype=np.float64)
            mean, std = (np.asarray(m, dtype=np.float64) for m in self.model.predict(X, return_std=True))
        if self.read == "probability":
            return _log_mass(y, np.clip(mean, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY), binary=True)
        return rounded_log_mass(y, mean, std)


def funbat_counts(
    arguments: Mapping[str, Any], read: Literal["own", "rounded", "probability"] = "own"
) -> Callable[[], CountMethod]:
    """A line for FunBaT with these constructor arguments in a table of counts."""
    return lambda: FunBaTCounts(arguments, read)


def count_references() -> dict[str, Callable[[], CountMethod]]:
    """A line for each reference in a table of counts."""
    return {
        "one rate": ConstantRate,
        "rate of the line along the last mode, shrunk": LineRate,
        "per-mode biases, log-linear": LogLinear,
        "biases of modes and pairs, log-linear": lambda: LogLinear(pairs=True),
    }


def count_table(
    data_folder: Path,
    sets: Iterable[str],
    methods: Mapping[str, Callable[[], CountMethod]],
    folds: Iterable[int],
    jobs: int = 1,
) -> list[str]:
    """Markdown lines: one table a set, mean held-out log probability of a row, fold by fold; `jobs` fits at a time."""
    lines, folds = [], tuple(folds)
    for name in sets:
        lines += [f"### {name}", "", "| method | log probability a row | folds | seconds a fit |", "|---|---|---|---|"]
        found = Parallel(n_jobs=jobs)(
            delayed(_run_counts)(make, data_folder, name, fold) for make in methods.values() for fold in folds
        )
        for k, label in enumerate(methods):
            means, seconds = zip(*found[k * len(folds) : (k + 1) * len(folds)], strict=True)
            lines.append(
                f"| {label} | {np.mean(means):.4f} | {' '.join(f'{m:.4f}' for m in means)} | {np.mean(seconds):.1f} |"
            )
        lines.append("")
    return lines


def quantile_crps(y: Floats, interval: Callable[[float], tuple[Any, Any]], n_levels: int = N_LEVELS) -> float:
    """Mean continuous ranked probability score from central intervals alone: twice the integrated quantile loss.

    Gneiting and Raftery (2007), Strictly Proper Scoring Rules, Prediction, and Estimation, section 4.2.
    """
    nodes, weights = special.roots_legendre(2 * n_levels)
    total = np.zeros(len(y))
    for node, weight in zip(nodes[n_levels:], weights[n_levels:], strict=True):  # those above the median
        for tau, quantile in zip((0.5 - node / 2, 0.5 + node / 2), interval(float(node)), strict=True):
            gap = y - np.asarray(quantile, dtype=np.float64)
            total += weight * np.maximum(tau * gap, (tau - 1) * gap)  # dτ is half of dnode, and the loss counts twice
    return float(np.mean(total))


def rounded_log_mass(y: Floats, mean: Floats, std: Floats) -> Floats:
    """Log probability that a normal value rounds to the count y; whatever lies below one half counts as 0."""
    upper, lower = (y + 0.5 - mean) / std, np.where(y > 0, (y - 0.5 - mean) / std, -np.inf)
    flip = lower > 0  # both ends in the upper tail: the mirror image keeps the digits
    low, high = np.where(flip, -upper, lower), np.where(flip, -lower, upper)
    log_high, log_low = stats.norm.logcdf(high), stats.norm.logcdf(low)
    mass: Floats = log_high + np.log(-np.expm1(np.minimum(log_low - log_high, -1e-300)))
    return mass


def _log_mass(y: Floats, mean: Floats, binary: bool) -> Floats:
    """Log probability under Poisson rates, or under probabilities of a one."""
    if binary:
        return np.asarray(special.xlogy(y, mean) + special.xlog1py(1 - y, -mean))
    return np.asarray(stats.poisson.logpmf(y, mean))


def _run(entry: Entry, data_folder: Path, name: str, split: Split, number: int) -> tuple[Score, float]:
    """Score of one method on one fold, and the seconds of its fit."""
    fold, method = load_split(data_folder, name, split, number, station=entry.station), entry.make()
    start = time.perf_counter()
    method.fit(fold.X, fold.y, fold.inner)
    seconds = time.perf_counter() - start
    return method.score(fold.X_test, fold.y_test), seconds


def _run_counts(make: Callable[[], CountMethod], data_folder: Path, name: str, number: int) -> tuple[float, float]:
    """Mean log probability of the held-out rows of one fold, and the seconds of the fit."""
    fold, method = load_counts(data_folder, name, number), make()
    start = time.perf_counter()
    method.fit(fold.X, fold.y, fold.inner)
    seconds = time.perf_counter() - start
    return float(np.mean(method.log_likelihood(fold.X_test, fold.y_test))), seconds


def _line(label: str, found: list[tuple[Score, float]]) -> str:
    """One line of a table: means over folds."""
    scores = [score for score, _ in found]
    cells = [f"{np.mean([s.rmse for s in scores]):.4f}", f"{np.mean([s.mae for s in scores]):.4f}"]
    for field, form in (("nll", "{:.3f}"), ("crps", "{:.4f}"), ("inside_95", "{:.1%}"), ("inside_50", "{:.1%}")):
        means = np.mean([getattr(s, field) for s in scores], axis=0)
        cells.append(" / ".join(form.format(m).replace("%", " %") for m in means) or "–")
    seconds = np.mean([s for _, s in found])
    cells.append(" ".join(f"{s.rmse:.3f}" for s in scores))
    return f"| {label} | {' | '.join(cells)} | {seconds:.1f} |"


@contextlib.contextmanager
def _unknown_allowed() -> Iterator[None]:
    """A context in which a held-out station is no surprise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownLabelWarning)
        yield
