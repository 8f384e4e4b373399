"""FunBaT on rows dealt to several ranks, against the same fit on one."""

import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import ConvergenceWarning

from probtensor.comm import Comm, Serial, abort_on_error, world
from probtensor.models import FunBaT

MANY = 2500  # a tenth of these are enough to calibrate on
SETTINGS = {"rank": 2, "n_init": 1, "tol": 0.0, "max_iter": 8, "random_state": 0, "progress": False}


def table() -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"time": rng.integers(0, 12, 91) / 2, "cell": rng.choice(["b", "c", "d"], 91)})
    X.loc[:1, "cell"] = "z"  # the first two rows alone have this label,
    X.loc[2:3, "time"] = 99.5  # the next two this coordinate,
    X.loc[4:5, "cell"] = "a"  # and the next two a label that comes first
    y = 5 + np.sin(X["time"]) * (1 + (X["cell"] == "c")) + (X["cell"] == "d") + 0.1 * rng.normal(size=91)
    return X, y.to_numpy()


def repeated_cells(kind: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Cells with residuals, most of them in several rows; heavy tails, or counts."""
    rng = np.random.default_rng(1)
    cells = pd.DataFrame({"time": rng.integers(0, 40, 700) / 4, "cell": rng.choice(list("abcdef"), 700)})
    which = rng.integers(0, 700, MANY)
    X = cells.iloc[which].reset_index(drop=True)
    clean = np.sin(X["time"]) * (1 + 0.5 * (X["cell"] == "c")) + (X["cell"] == "d")
    if kind == "poisson":
        return X, rng.poisson(np.exp(0.5 + clean)).astype(float)
    return X, (clean + 0.2 * rng.standard_t(4, 700)[which] + 0.1 * rng.standard_t(4, MANY)).to_numpy()


def deal(n: int, comm: Comm, seed: int) -> np.ndarray:
    """Rows of this rank, of unequal number and in any order; rare labels and coordinates come to one rank each."""
    rng = np.random.default_rng(seed)
    owner = rng.choice(comm.size, n, p=np.arange(1, comm.size + 1) / np.arange(1, comm.size + 1).sum())
    owner[:2], owner[2:4], owner[4:6] = comm.size - 1, 0, comm.size // 2
    return rng.permutation(np.flatnonzero(owner == comm.rank))


def fit(model: FunBaT, X: pd.DataFrame, y: np.ndarray, comm: Comm) -> FunBaT:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, y, comm=comm)
    assert [w.category for w in caught] == [ConvergenceWarning] * comm.is_root
    return model


def check(form: str, comm: Comm, seed: int) -> None:
    X, y = table()
    new = pd.DataFrame({"time": [0.0, 0.25, 99.5, 200.0], "cell": ["z", "a", "b", "c"]})
    rows = deal(len(y), comm, seed)
    alone = fit(FunBaT(form=form, **SETTINGS), X, y, Serial()) if comm.is_root else None
    model = fit(FunBaT(form=form, **SETTINGS), X.iloc[rows].reset_index(drop=True), y[rows], comm)
    results = [*model.predict(new, return_std=True), *model.factor("time"), *model.main_effect("cell")]
    results += [np.array(model.bound_history_), np.array([model.y_mean_, model.y_scale_, model.noise_std_])]
    everywhere = comm.gather_bytes(b"".join(x.tobytes() for x in results))
    assert len(set(everywhere)) == 1, f"the ranks disagree: {form}"
    for axis in model.axes_:
        assert set(axis.distinct) == set(X[axis.name])
        assert list(axis.distinct) == sorted(axis.distinct)
    if alone is not None:
        assert model.axes_ == alone.axes_
        expected = [*alone.predict(new, return_std=True), *alone.factor("time"), *alone.main_effect("cell")]
        expected += [np.array(alone.bound_history_), np.array([alone.y_mean_, alone.y_scale_, alone.noise_std_])]
        for x, right in zip(results, expected, strict=True):
            np.testing.assert_array_equal(x, right)


def check_likelihood(kind: str, comm: Comm, *, weights: bool = False) -> None:
    """Rows of one cell begin on several ranks; which rows calibrate depends on what they hold alone.

    One rank has no row at all.
    """
    X, y = repeated_cells(kind)
    mine = deal(MANY, comm, seed=7)
    if comm.size > 1:
        to = np.random.default_rng(8).permutation(MANY)
        mine = np.array_split(to, comm.size - 1)[comm.rank - 1] if comm.rank else to[:0]
    rng = np.random.default_rng(2)
    given = {"sample_weight": rng.integers(1, 4, MANY), "noise_std": rng.uniform(0.05, 0.2, MANY)} if weights else {}
    new = pd.concat([X[:40], pd.DataFrame({"time": [0.1, 77.0], "cell": ["a", "f"]})])
    settings = SETTINGS | {"likelihood": kind, "rank": 1, "max_iter": 20 if kind == "student-t" else 6}

    def results(model: FunBaT) -> list[np.ndarray]:
        numbers = [*model.predict(new, return_std=True), *model.predict_interval(new), model.sample_y(new, 2)]
        numbers += [model.predict_quantiles(new, [0.01, 0.6]), model.relevance_, np.array(model.bound_history_)]
        return [*numbers, np.array(model.phase_starts_), np.array([model.y_mean_, model.y_scale_])]

    def fitted(rows: np.ndarray, comm: Comm) -> FunBaT:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            columns = {name: column[rows] for name, column in given.items()}
            return FunBaT(form="cp", **settings).fit(X.iloc[rows], y[rows], comm=comm, **columns)

    model = fitted(mine, comm)
    if kind == "student-t":
        assert model._observation.calibration
        assert len(model._observation.seen.value) == len(X.drop_duplicates())
    found = results(model)
    assert len(set(comm.gather_bytes(b"".join(x.tobytes() for x in found)))) == 1, f"the ranks disagree: {kind}"
    if comm.is_root:
        for x, right in zip(found, results(fitted(np.arange(MANY), Serial())), strict=True):
            np.testing.assert_array_equal(x, right)


def check_seeds(comm: Comm) -> None:
    """Ranks whose seeds or generators differ, or that draw their own seed, take the one of rank 0."""
    X, y = table()
    rows = deal(len(y), comm, 5)
    for seed in (comm.rank, 2**40 + comm.rank, np.random.default_rng(comm.rank), None):
        settings = SETTINGS | {"random_state": seed, "max_iter": 1}
        model = fit(FunBaT(form="cp", **settings), X.iloc[rows], y[rows], comm)
        assert len(set(comm.gather_bytes(model.predict(X).tobytes()))) == 1
        if comm.is_root and isinstance(seed, int):  # the first sums mix several starts unless all ranks share one
            alone = fit(FunBaT(form="cp", **settings), X, y, Serial())
            np.testing.assert_array_equal(model.predict(X), alone.predict(X))


def check_refusal(comm: Comm) -> None:
    """Rows of one cell on several ranks cannot be merged, and one rank's bad value is refused: all ranks say so."""
    with pytest.raises(ValueError, match=r'duplicates: expected "observations" on several ranks, got \'mean\''):
        FunBaT(duplicates="mean").fit(*table(), comm=comm)
    X, y = table()
    if comm.rank == comm.size - 1:
        y = np.where(np.arange(len(y)) == 3, np.nan, y)
    with pytest.raises(ValueError, match=rf"^rank {comm.size - 1}: y: expected .*row 3"):
        FunBaT(**SETTINGS).fit(X, y, comm=comm)
    with pytest.raises(ValueError, match=r"^rank 0: X: expected shape "):
        FunBaT(**SETTINGS).fit(np.ones(3) if comm.rank == 0 else X, np.nan_to_num(y), comm=comm)
    with pytest.raises(ValueError, match=r"^rank 0: y: expected counts"):
        FunBaT(**SETTINGS, likelihood="poisson").fit(X, np.full(91, -1.0 if comm.is_root else 2.0), comm=comm)
    with pytest.raises(ValueError, match=r"X: expected the same axes on every rank, got .* on rank 1, "):
        FunBaT(**SETTINGS).fit(X.astype({"time": str}) if comm.rank else X, np.zeros(91), comm=comm)
    with pytest.raises(ValueError, match="X, y: expected at least one observation, got none on any rank"):
        FunBaT(**SETTINGS).fit(X[:0], y[:0], comm=comm)


def check_more_ranks_than_rows(comm: Comm) -> None:
    X, y = table()
    X, y = X[:10], y[:10]
    mine = np.arange(10)[comm.rank :: comm.size]
    model = fit(FunBaT(**SETTINGS), X.iloc[mine], y[mine], comm)
    assert len(set(comm.gather_bytes(model.predict(X).tobytes()))) == 1
    if comm.is_root:
        alone = fit(FunBaT(**SETTINGS), X, y, Serial())
        for x, right in zip(model.predict(X, return_std=True), alone.predict(X, return_std=True), strict=True):
            np.testing.assert_array_equal(x, right)


def check_air_quality(comm: Comm, file: str) -> None:
    """Beijing PM2.5, every row; rows in any order on any rank."""
    with np.load(file, allow_pickle=False) as data:
        X, y = data["coords"], data["y"]
    rows = np.random.default_rng(0).permutation(len(y))[comm.rank :: comm.size]
    for form in ("cp", "tucker"):
        settings = SETTINGS | {"form": form, "max_iter": 18 if form == "cp" else 6}
        model = fit(FunBaT(**settings), X[rows], y[rows], comm)
        if comm.is_root:
            alone = fit(FunBaT(**settings), X, y, Serial())
            found, expected = (
                [*m.predict(X[::50], return_std=True), np.array(m.bound_history_)] for m in (model, alone)
            )
            for x, right in zip(found, expected, strict=True):
                np.testing.assert_array_equal(x, right)


def main() -> None:
    comm, what = world(), sys.argv[1]
    with abort_on_error(comm):
        if what == "small":
            check("cp", comm, seed=1)
            check("tucker", comm, seed=2)
            check_likelihood("student-t", comm)
            check_likelihood("student-t", comm, weights=True)
            check_likelihood("poisson", comm)
            check_seeds(comm)
            if comm.size > 1:
                check_refusal(comm)
        elif what == "few":
            check_more_ranks_than_rows(comm)
        else:
            check_air_quality(comm, what)
    if comm.is_root:
        print(f"ok on {comm.size}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
