"""Alternating minimization: solvers against dense regressions, recovery, invariances, odd tables, files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

import probtensor as pt
from benchmarks import alternating as benchmark
from probtensor.comm import Serial
from probtensor.estimator import UnknownLabelWarning
from probtensor.models import AlternatingMinimization
from probtensor.models.alternating_fit import Cells, Problem, Settings, Tables, balanced, half_sweep, start_tables
from probtensor.models.alternating_rows import (
    Designs,
    Ridge,
    make_view,
    second_moment,
    solve_by_gradients,
    solve_exactly,
    whiten,
)
from tests import reference_alternating as reference

SHAPES = [(7, 5), (30, 1), (6, 5, 4), (4, 3, 2, 5)]


def problem(sizes, n=120, R=3, seed=0, weighted=True):
    """Cells with repeated ones, labels without a cell, random tables."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, max(size - 1, 1), n) for size in sizes], axis=1)  # the last label has none
    labels[:5] = labels[5:10]
    factors = [rng.normal(size=(size, R)) for size in sizes]
    effects = [rng.normal(size=size) for size in sizes]
    weight = rng.uniform(0.5, 2, n) if weighted else np.ones(n)
    return labels, rng.normal(size=n), weight, factors, effects


def settings(**given):
    default = {"rank": 3, "solver": "cg", "effects": True, "init": "svd", "n_inner": 200, "inner_tol": 0.0}
    return Settings(**default | {"max_iter": 10, "tol": 0.0} | given)


def tensors(parts):
    return tuple(torch.from_numpy(part) for part in parts)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_a_half_sweep_is_a_dense_ridge_regression_for_each_label(sizes, weighted, solver):
    labels, y, weight, factors, effects = problem(sizes, weighted=weighted)
    cells = Cells(torch.from_numpy(labels), torch.from_numpy(y), torch.from_numpy(weight) if weighted else None, sizes)
    whole = Problem.of(cells, settings(solver=solver), Serial())
    tables = Tables(tensors(factors), tensors(effects))
    residual = whole.cells.values - tables.predict(whole.cells.labels)
    order = np.argsort(labels[:, 0], kind="stable")
    np.testing.assert_allclose(residual, (y - reference.predict(factors, effects, labels))[order], atol=1e-12)
    strength = torch.tensor([0.7, 0.7, 0.7, 3.0], dtype=torch.float64)
    for mode in range(len(sizes)):
        found, left = half_sweep(whole, mode, tables, residual, strength)
        expected = reference.regressions(factors, effects, labels, y, weight, mode, strength.numpy())
        np.testing.assert_allclose(found.factors[mode], expected[:, :-1], atol=1e-8)
        np.testing.assert_allclose(found.effects[mode], expected[:, -1], atol=1e-8)
        np.testing.assert_allclose(left, whole.cells.values - found.predict(whole.cells.labels), atol=1e-9)


@pytest.mark.parametrize("sizes", [(40, 6), (40, 6, 4)])
def test_rows_that_are_left_early_come_as_near_as_asked_and_pieces_do_not_matter(sizes, monkeypatch):
    labels, y, _, factors, _ = problem(sizes, n=400, R=4)
    labels[:250, 0] = 0  # one long row, many short ones
    view = make_view(torch.from_numpy(labels), 0, sizes[0], None, Serial())
    table = torch.from_numpy(factors[0])
    residual = torch.from_numpy(y - reference.predict(factors, [], labels))[view.order]
    ridge = Ridge(torch.full((4,), 0.1, dtype=torch.float64), torch.ones(sizes[0], dtype=torch.float64))

    def run(tol, solver):
        designs = Designs(view, tensors(factors[1:]), with_effects=False)
        totals = [torch.ones(size, dtype=torch.float64) for size in sizes[1:]]
        whitened = whiten(second_moment(tensors(factors[1:]), totals, False), ridge.strength)
        if solver == "exact":
            return solve_exactly(designs, table, residual, ridge)[0]
        return solve_by_gradients(designs, table, residual, ridge, whitened, 100, tol)[0]

    def distance(found):
        return float((found - run(0, "exact")).norm() / (table - run(0, "exact")).norm())

    rough, fine = run(0.1, "cg"), run(1e-16, "cg")
    assert distance(fine) < 1e-6 < distance(rough) < 0.7
    monkeypatch.setattr("probtensor.models.alternating_rows.PIECE", 97)
    np.testing.assert_allclose(run(0.1, "cg"), rough, atol=1e-10)
    np.testing.assert_allclose(run(0, "exact"), run(1e-16, "cg"), atol=1e-6)


@pytest.mark.parametrize("sizes", [(9, 30), (9, 5, 4)])
def test_blocks_of_labels_do_not_matter(sizes, monkeypatch):
    labels, y, weight, factors, effects = problem(sizes)
    cells = Cells(torch.from_numpy(labels), torch.from_numpy(y), torch.from_numpy(weight), sizes)
    tables, strength = Tables(tensors(factors), tensors(effects)), torch.ones(4, dtype=torch.float64)
    for solver in ("cg", "exact"):
        whole = Problem.of(cells, settings(solver=solver), Serial())
        residual = whole.cells.values - tables.predict(whole.cells.labels)
        with monkeypatch.context() as patch:
            expected = half_sweep(whole, 0, tables, residual, strength)
            patch.setattr("probtensor.models.alternating_rows.BLOCK", 20 if len(sizes) == 2 else 100)
            assert len(list(whole.views[0].blocks(4))) > 3
            found = half_sweep(whole, 0, tables, residual, strength)
        np.testing.assert_allclose(found[0].factors[0], expected[0].factors[0], atol=1e-8)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-8)


def test_the_second_moment_is_the_mean_over_cells_of_a_matrix():
    labels, _, weight, factors, _ = problem((7, 5))
    total = np.bincount(labels[:, 1], weight, 5)
    found = second_moment(tensors(factors[1:]), tensors([total]), with_effects=True)
    z = reference.design(factors, labels, 0, effects=True)
    np.testing.assert_allclose(found, z.T @ np.diag(weight) @ z / weight.sum(), atol=1e-12)


def test_the_start_of_a_matrix_is_its_leading_singular_vectors():
    rng = np.random.default_rng(0)
    sizes, wanted = (9, 6), rng.normal(size=(9, 2)) @ np.diag([5.0, 2.0]) @ rng.normal(size=(2, 6))
    labels = np.argwhere(np.ones(sizes))
    cells = Cells(torch.from_numpy(labels), torch.from_numpy(wanted[tuple(labels.T)]), None, sizes)
    start = start_tables(Problem.of(cells, settings(rank=2, effects=False), Serial()), torch.Generator().manual_seed(0))
    product = (start.factors[0] @ start.factors[1].T).numpy()
    np.testing.assert_allclose(product / product[0, 0], wanted / wanted[0, 0], rtol=1e-3, atol=1e-2)


def test_balanced_factors_predict_the_same():
    labels, _, _, factors, effects = problem((6, 5, 4))
    factors[0][:, 0] *= 1e4
    factors[1][:, 2] = 0
    before = Tables(tensors(factors), tensors(effects))
    after = balanced(before)
    at = torch.from_numpy(labels)
    np.testing.assert_allclose(after.predict(at), before.predict(at), rtol=1e-10)
    norms = torch.stack([factor.norm(dim=0) for factor in after.factors])
    np.testing.assert_allclose(norms, norms[:1].expand(3, 3), rtol=1e-12)
    assert not norms[:, 2].any()


def planted(sizes, R, n, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    X = np.stack([rng.integers(0, size, n) for size in sizes], axis=1)
    product = np.ones((n, R))
    for column, size in zip(X.T, sizes, strict=True):
        product *= rng.normal(size=(size, R))[column]
    return X, product.sum(axis=1), product.sum(axis=1) + noise * rng.normal(size=n)


def fit(X, y, *args, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return AlternatingMinimization(**{"rank": 3, "random_state": 0, "progress": False} | given).fit(X, y, *args)


def unknown_allowed(model, X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownLabelWarning)
        return model.predict(X, return_std=True)


@pytest.mark.parametrize("solver", ["cg", "exact"])
@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize(("sizes", "n"), [((80, 60), 3000), ((20, 15, 12), 2500)])
def test_planted_low_rank_tensors_are_recovered_below_the_noise(solver, init, sizes, n):
    X, clean, y = planted(sizes, 3, n + 500)
    model = fit(X[:n], y[:n], solver=solver, init=init)
    assert pt.metrics.rmse(clean[n:], model.predict(X[n:])) < 0.1
    lower, upper = model.predict_interval(X[n:], 0.9)
    assert 0.83 < np.mean((lower <= y[n:]) & (y[n:] <= upper)) < 0.97
    assert model.noise_std_ == pytest.approx(0.1, rel=0.3)
    assert model.history_[-1] < model.history_[0] or len(model.history_) == 1
    assert model.ridge_ in model.validation_rmse_
    assert model.n_iter_ == len(model.history_)


def test_conjugate_gradients_recover_what_exact_regressions_do():
    X, clean, y = planted((100, 90), 5, 6500, noise=0.3, seed=1)
    given = {"rank": 5, "ridge": 0.1, "held_out": 0.0, "biases": False, "tol": 1e-8, "max_iter": 60}
    errors = [
        pt.metrics.rmse(clean[6000:], fit(X[:6000], y[:6000], solver=solver, **given).predict(X[6000:]))
        for solver in ("cg", "exact")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_the_order_of_rows_and_the_names_of_labels_do_not_matter():
    X, _, y = planted((25, 20), 2, 700)
    order = np.random.default_rng(1).permutation(700)
    given = {"rank": 2, "ridge": 0.3, "held_out": 0.0, "tol": 1e-12, "max_iter": 200}
    expected = fit(X, y, **given).predict(X)
    np.testing.assert_allclose(fit(X[order], y[order], **given).predict(X), expected, atol=1e-6)
    names = np.random.default_rng(2).permutation(25)  # another order of the labels: another start, the same optimum
    text = pd.DataFrame({"user": [f"user {names[i]:02}" for i in X[:, 0]], "film": X[:, 1]})
    np.testing.assert_allclose(fit(text, y, **given).predict(text), expected, atol=1e-4)


def test_rows_that_repeat_count_as_weights_do():
    X, _, y = planted((12, 10), 2, 300)
    weight = np.random.default_rng(0).integers(1, 4, 300)
    times = np.repeat(np.arange(300), weight)
    given = {"rank": 2, "ridge": 0.5, "held_out": 0.0, "tol": 1e-12, "max_iter": 100}
    weighted = fit(X, y, weight.astype(float), **given)
    np.testing.assert_allclose(weighted.predict(X), fit(X[times], y[times], **given).predict(X), atol=1e-7)


def test_unknown_labels_have_means_and_wider_intervals():
    X, _, y = planted((30, 20, 6), 2, 3000)
    model = fit(X, y + X[:, 1], rank=2)
    asked = np.array([[0, 0, 0], [99, 0, 0], [99, 99, 0], [99, 99, 99]])
    with pytest.warns(UnknownLabelWarning):
        model.predict(asked[1:2])
    mean, std = unknown_allowed(model, asked)
    factors, effects = ([table[f"mode_{k}"] for k in range(3)] for table in (model.factors_, model.effects_))
    own = np.prod([factors[0].mean(axis=0), factors[1][0], factors[2][0]], axis=0).sum() * model.y_scale_
    own += effects[0].mean() + effects[1][0] + effects[2][0] + model.y_mean_
    assert mean[1] == pytest.approx(own)
    assert std[0] < std[1] < std[3]
    assert std[1] < std[2]
    assert std[3] == pytest.approx(np.std(y + X[:, 1]), rel=0.5)


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_odd_tables(solver):
    X, _, y = planted((8, 7), 1, 200)
    constant = fit(X, np.full(200, 5.0), solver=solver)
    np.testing.assert_allclose(constant.predict(X), 5.0, atol=1e-6)
    single = fit(np.column_stack([np.zeros(200, dtype=int), X[:, 0]]), X[:, 0] + 1e5, solver=solver)
    np.testing.assert_allclose(single.predict([[0, 3]]), 1e5 + 3, atol=0.2)
    alike = {"solver": solver, "ridge": 0.3, "held_out": 0.0}
    large, plain = fit(X, 1e5 * y, **alike), fit(X, y, **alike)
    np.testing.assert_allclose(large.predict(X), 1e5 * plain.predict(X), rtol=1e-6, atol=1e-2)
    for n in (1, 2, 29):
        few = fit(X[:n], y[:n], solver=solver)
        assert np.isfinite(few.predict(X[:n], return_std=True)).all()
    twice = fit(np.repeat(X[:50], 4, axis=0), np.repeat(y[:50], 4) + np.tile([0.0, 0.1], 100), solver=solver, rank=40)
    assert np.isfinite(twice.predict(X[:50])).all()
    spare = fit(pd.DataFrame({"a": pd.Categorical(X[:, 0], categories=range(12)), "b": X[:, 1]}), y, solver=solver)
    assert spare.factors_["a"].shape == (12, 3)
    asked = [pd.DataFrame({"a": [label], "b": [3]}) for label in (10, 99)]  # a category without rows, and no category
    np.testing.assert_allclose(*(unknown_allowed(spare, X)[0] for X in asked))
    assert fit(X, y.astype(np.float32), solver=solver).predict(X).dtype == np.float32


def test_continuous_modes_have_bins():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"station": rng.integers(0, 10, 2000), "hour": rng.uniform(0, 24, 2000)})
    y = rng.normal(size=10)[X["station"]] * np.sin(X["hour"] / 4)
    model = fit(X[:1800], y[:1800])
    assert model.factors_["hour"].shape == (64, 3)
    assert pt.metrics.rmse(y[1800:], model.predict(X[1800:])) < 0.1 * y.std()


def test_nothing_given_is_changed_and_a_seed_gives_the_same_bits():
    X, _, y = planted((12, 10), 2, 400)
    before = X.copy(), y.copy()
    state = torch.get_rng_state()
    first = fit(X, y).predict(X)
    np.testing.assert_array_equal(fit(X, y).predict(X), first)
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(y, before[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_files_clones_and_draws(tmp_path):
    X, _, y = planted((12, 10), 2, 400)
    model = fit(X, y)
    model.save(tmp_path / "a.model")
    loaded = pt.load(tmp_path / "a.model")
    for found, expected in zip(loaded.predict(X, return_std=True), model.predict(X, return_std=True), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert loaded.validation_rmse_ == model.validation_rmse_
    np.testing.assert_array_equal(loaded.history_, model.history_)
    np.testing.assert_array_equal(loaded.factors_["mode_0"], model.factors_["mode_0"])
    assert loaded.converged_ == model.converged_
    assert clone(model).get_params() == model.get_params()
    assert model.sample_y(X[:5], 3).shape == (5, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        ({"n_inner": 1.5}, "n_inner: expected an integer"),
        ({"max_iter": 0}, "max_iter: expected an integer"),
        ({"solver": "qr"}, 'solver: expected "cg" or "exact", got \'qr\''),
        ({"init": "ones"}, 'init: expected "svd" or "random"'),
        ({"ridge": 0.0}, 'ridge: expected "auto" or a number above 0, got 0.0'),
        ({"ridge": "automatic"}, 'ridge: expected "auto" or a number above 0'),
        ({"held_out": 0.0}, "ridge: expected a number where held_out is 0"),
        ({"inner_tol": -1}, "inner_tol: expected a number from 0 to below 1"),
        ({"tol": 1.0}, "tol: expected a number from 0 to below 1"),
    ],
)
def test_bad_parameters_are_named(given, message):
    X, _, y = planted((8, 7), 1, 50)
    with pytest.raises(ValueError, match=message):
        fit(X, y, **given)


def test_bad_rows_and_what_is_not_supported_are_named(tmp_path):
    X, _, y = planted((8, 7), 1, 50)
    model = AlternatingMinimization(progress=False)
    with pytest.raises(ValueError, match="noise_std: expected None"):
        model.fit(X, y, noise_std=np.ones(50))
    with pytest.raises(ValueError, match="checkpoint: expected None"):
        model.fit(X, y, checkpoint=tmp_path / "states")
    with pytest.raises(ValueError, match="X: expected two modes or more, got 1"):
        model.fit(X[:, :1], y)
    with pytest.raises(AttributeError, match="fit"):
        _ = model.factors_
    with pytest.raises(NotFittedError):
        model.predict(X)
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        AlternatingMinimization(max_iter=1, ridge=0.1, held_out=0.0, progress=False).fit(X, y)


FOLDER = Path(os.environ.get("PROBTENSOR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "dain"


@pytest.mark.skipif(not FOLDER.exists(), reason=f"no {FOLDER}: set PROBTENSOR_DATA to the folder of data sets")
def test_defaults_are_sensible_on_ratings_of_films():
    X, y = benchmark.load_table(FOLDER, "MovieLens small, user × film")
    test = np.random.default_rng(0).random(len(y)) < 0.1
    model = AlternatingMinimization(rank=10, random_state=0, progress=False).fit(X[~test], y[~test])
    with pytest.warns(UnknownLabelWarning):
        assert pt.metrics.rmse(y[test], model.predict(X[test])) < 0.9


def test_the_benchmark_draws_what_it_says_and_prints_tables():
    case = benchmark.Case((30, 20), 2, 400, 0.1, 0.5, 0.9)
    X, y, X_test, y_test = case.draw(0, 50)
    assert len(np.unique(X, axis=0)) == len(X) <= 400
    assert (X_test.shape, y_test.shape) == ((50, 2), (50,))
    assert y.std() == pytest.approx(1, rel=0.1)
    lines = list(benchmark.cost_lines([300, 600], ranks=(2, 3), n_modes=3))
    assert sum(line.startswith("| 300 |") or line.startswith("| 3 |") for line in lines) == 2
    lines = list(benchmark.recovery_lines([0], [case], n_sweeps=20))
    assert len(lines) == 2 + 2 + 4 + 1


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_fit_on_several_ranks_is_the_serial_fit(run_mpi, n):
    assert run_mpi("alternating_ranks.py", n, timeout=200).stdout == f"ok on {n}\n"
