"""Peers of `python -m benchmarks run` on tables. GPyTorch, pyttb and BayesPy are optional: found when a suite is made.

A peer is a function of a `Split`: means of the rows held out, and standard deviations of new observations, or None.
What a rank could be is chosen on an eighth of the training rows, with additive effects or the mean taken off first;
then the peer is fitted again to all of them. BayesPy prunes its components itself, as BayesianCP does: it gets the most
that there may be.

References
----------
Hong, Kolda, Duersch (2020), "Generalized Canonical Polyadic Tensor Decomposition", SIAM Review, for pyttb's `gcp_opt`.
Luttinen (2016), "BayesPy: Variational Bayesian Inference in Python", JMLR.
"""

import importlib.util
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning

from benchmarks.completion_peers import PEERS, Integers, least_error
from benchmarks.datasets import Floats
from benchmarks.head_to_head import Method
from benchmarks.run_data import Split, split
from benchmarks.scores import gaussian_score, point_errors
from benchmarks.sparse_gp import SparseGaussianProcess
from probtensor.baselines import MaskedParafac, PerModeBiases
from probtensor.estimator import UnknownLabelWarning

__all__ = [
    "bayespy_cp",
    "biases",
    "by_codes",
    "chosen",
    "installed",
    "peer",
    "pyttb_cp",
    "sparse_gp",
    "tensorly",
    "trees",
]

Found = tuple[Floats, Floats | None]
Predict = Callable[[Split], Found]
Ranked = Callable[[Split, int], Floats]  # of a split and a rank: means


def peer(name: str, predict: Predict) -> Method:
    """A peer by its errors, and where it has standard deviations by the density, CRPS and coverage they give."""

    def run(data: Split) -> dict[str, float]:
        with warnings.catch_warnings():
            for kind in (UnknownLabelWarning, ConvergenceWarning):
                warnings.simplefilter("ignore", kind)
            mean, std = predict(data)
        error, absolute = point_errors(data.y_test, mean)
        found = {"rmse": error, "mae": absolute}
        if std is None:
            return found
        score = gaussian_score(data.y_test, mean, std)
        inside = np.mean(np.abs(data.y_test - mean) <= norm.ppf(0.95) * std)
        return found | {"nll": score.nll[0], "crps": score.crps[0], "inside 90 %": 100 * float(inside)}

    return Method(name, False, run)


def installed(peers: Sequence[tuple[str, Method]]) -> tuple[tuple[Method, ...], tuple[str, ...]]:
    """Methods whose package, by the name it is imported by, is there; the names of the others."""
    there = {package: importlib.util.find_spec(package) is not None for package, _ in peers}
    return (
        tuple(method for package, method in peers if there[package]),
        tuple(method.name for package, method in peers if not there[package]),
    )


def biases(data: Split) -> Found:
    return PerModeBiases().fit(data.X, data.y).predict(data.X_test), None


def trees(data: Split) -> Found:
    """Columns as numbers where they are, else as categories."""
    both = pd.concat([data.X, data.X_test])
    encoded = both.apply(lambda column: column if column.dtype.kind == "f" else pd.factorize(column)[0])
    model = HistGradientBoostingRegressor(random_state=data.seed).fit(encoded[: len(data.X)], data.y)
    return np.asarray(model.predict(encoded[len(data.X) :])), None


def chosen(fit: Ranked, ranks: Sequence[int]) -> Predict:
    """A decomposition with the rank, and effects or the mean taken off first, as an eighth of the rows asks for."""

    def predict(data: Split) -> Found:
        inner = split(data.X, data.y, data.seed, 1 / 8)
        settings = list(itertools.product(ranks, (False, True)))
        errors = [point_errors(inner.y_test, _beside(fit, inner, *setting))[0] for setting in settings]
        return _beside(fit, data, *settings[least_error(errors)]), None

    return predict


def _beside(fit: Ranked, data: Split, rank: int, effects: bool) -> Floats:
    """Predictions of a decomposition of what additive effects, or the mean, leave of the values."""
    before = after = np.full(1, data.y.mean())
    if effects:
        model = PerModeBiases().fit(data.X, data.y)
        before, after = model.predict(data.X), model.predict(data.X_test)
    return np.asarray(after + fit(data._replace(y=data.y - before), rank))


def tensorly(data: Split, rank: int) -> Floats:
    return np.asarray(MaskedParafac(rank=rank, random_state=data.seed).fit(data.X, data.y).predict(data.X_test))


def pyttb_cp(data: Split, rank: int) -> Floats:
    """Generalized CP with squared errors and a mask, by L-BFGS-B from random factors."""
    import pyttb
    from pyttb.gcp.handles import Objectives
    from pyttb.gcp.optimizers import LBFGSB

    X, X_test = codes(data)
    dense, seen, (center, scale) = _dense(X, X_test, data.y)
    rng = np.random.default_rng(data.seed)
    size = rank ** (-0.5 / dense.ndim)  # so that the sum of the products has the values' size
    start = [size * rng.normal(size=(length, rank)) for length in dense.shape]
    with _silent():
        found, _, _ = pyttb.gcp_opt(
            pyttb.tensor(dense),
            rank,
            Objectives.GAUSSIAN,
            LBFGSB(pgtol=1e-6),
            init=start,
            mask=pyttb.tensor(seen.astype(float)),
            printitn=0,
        )
    means: Floats = center + scale * found.full().data[tuple(X_test.T)]
    return means


def bayespy_cp(rank: int, sweeps: int = 300) -> Predict:
    """CP by variational Bayes with automatic relevance of at most so many components, Gaussian noise and a mask."""

    def predict(data: Split) -> Found:
        from bayespy.inference import VB
        from bayespy.nodes import Gamma, GaussianARD, SumMultiply

        X, X_test = codes(data)
        dense, seen, (center, scale) = _dense(X, X_test, data.y)
        K = dense.ndim
        with _seeded(data.seed):
            relevance, precision = Gamma(1e-3, 1e-3, plates=(rank,)), Gamma(1e-3, 1e-3)
            factors = [
                GaussianARD(0, relevance if k == 0 else 1, shape=(rank,), plates=(size,) + (1,) * (K - 1 - k))
                for k, size in enumerate(dense.shape)
            ]
            for factor in factors:
                factor.initialize_from_random()
            product = SumMultiply(",".join("d" * K), *factors)
            values = GaussianARD(product, precision)
            values.observe(dense, mask=seen)
            VB(values, *factors, relevance, precision).update(repeat=sweeps, tol=1e-6, verbose=False)
        mean, second = (np.broadcast_to(moment, dense.shape) for moment in product.get_moments()[:2])
        noise = 1 / float(precision.get_moments()[0])
        at = tuple(X_test.T)
        variance = np.maximum(second[at] - mean[at] ** 2, 0) + noise
        return center + scale * mean[at], scale * np.sqrt(variance)

    return predict


def sparse_gp(n_inducing: int, n_steps: int) -> Predict:
    """GPyTorch's stochastic variational Gaussian process on the columns as numbers, all steps whatever they take."""

    def predict(data: Split) -> Found:
        model = SparseGaussianProcess(n_inducing, n_steps, seconds=math.inf, seed=data.seed)
        return model.fit(data.X.to_numpy(float), data.y).predict(data.X_test.to_numpy(float))

    return predict


def by_codes(name: str) -> Predict:
    """A peer of `completion_peers`, on the labels' numbers."""

    def predict(data: Split) -> Found:
        X, X_test = codes(data)
        return PEERS[name][1](X, data.y, X_test, data.seed)[0], None

    return predict


def codes(data: Split) -> tuple[Integers, Integers]:
    """Numbers of the labels of the training rows and of the others."""
    both = pd.concat([data.X, data.X_test]).apply(lambda column: pd.factorize(column, sort=True)[0])
    found = both.to_numpy(np.int64)
    return found[: len(data.X)], found[len(data.X) :]


def _dense(X: Integers, X_test: Integers, y: Floats) -> tuple[Floats, npt.NDArray[np.bool_], tuple[float, float]]:
    """Standardised means of cells, zero where none was seen; which were; the mean and the unit."""
    shape = tuple(np.maximum(X.max(0), X_test.max(0)) + 1)
    center, scale = float(y.mean()), float(y.std())
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, tuple(X.T), (y - center) / scale)
    np.add.at(count, tuple(X.T), 1)
    return total / np.maximum(count, 1), count > 0, (center, scale)


@contextmanager
def _silent() -> Iterator[None]:
    """pyttb warns of a copy at every evaluation."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """BayesPy draws from NumPy's global generator."""
    before: Any = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
