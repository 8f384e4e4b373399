"""How the benchmarks hold rows out, and the references against their definitions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats

from benchmarks import (
    classical,
    completion,
    completion_peers,
    datamodels,
    datasets,
    finetune_jobs,
    finetune_methods,
    finetune_networks,
    finetune_table,
    influence,
    peers,
    scores,
    sparse_gp,
    splits,
)
from benchmarks.datasets import COUNT_SETS, FUNBAT_SETS, SPLITS, load_counts, load_fold, load_split
from probtensor.inference.influence import GaussNewton
from probtensor.inference.influence import influence as scores_of
from probtensor.metrics import crps_gaussian, rmse

DATA = Path(os.environ.get("PROBTENSOR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def needs(name):
    path = DATA / name
    return pytest.mark.skipif(not path.exists(), reason=f"no {path}: set PROBTENSOR_DATA to the folder of data sets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files with the keys of the Beijing, the US, the flight and the nations data."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    day, station = (part.ravel() for part in np.meshgrid(np.arange(70), np.arange(10), indexing="ij"))
    n = len(day)
    coords = np.column_stack([rng.integers(0, 3, n), rng.integers(0, 3, n), day / 7.0])
    y = np.sin(day) + 0.3 * rng.normal(size=n)
    fold_perm = np.array([rng.permutation(n) for _ in range(5)])
    common = {"coords": coords, "y": y, "fold_perm": fold_perm, "n_train": 560}
    names = np.char.mod("s%d", station).astype("S14")
    np.savez(folder / "beijing_pm25.npz", day=day, station=names, **common)
    place = rng.normal(size=(10, 2)).round(2)[station]
    common["coords"] = np.column_stack([place, day / 70.0])
    np.savez(folder / "us_temp.npz", coords_raw=np.column_stack([place, 1743.0 + day]), **common)
    cells = np.unravel_index(rng.choice(3 * 5 * 2 * 6, 60, replace=False), (3, 5, 2, 6))
    np.savez(
        folder / "nyc2013_flight_delay.npz",
        idx=np.column_stack(cells).astype(np.uint8),
        count=1 + rng.poisson(4.0, 60),
        shape=[3, 5, 2, 6],
        **{mode: np.char.mod("x%d", np.arange(size)) for mode, size in (("origin", 3), ("dest", 5), ("carrier", 2))},
    )
    fares = np.argwhere(rng.random((12, 10, 4)) < 0.6)
    value = (fares[:, 0] * np.sin(fares[:, 1]) + fares[:, 2] + 0.1 * rng.normal(size=len(fares))).astype(np.float32)
    np.savez(folder / "nyc2019_taxi_fares.npz", idx=fares.astype(np.uint8), val=value, shape=[12, 10, 4])
    triples = np.array([[0, 0, 1], [1, 0, 2], [2, 1, 0], [3, 1, 1]], dtype=np.uint8)
    nations = np.array(["a", "b", "c", "d"])
    np.savez(folder / "kg_nations.npz", idx=triples, shape=[4, 2, 4], entity=nations, relation=np.array(["r", "s"]))
    return folder


def keys(X, split, name):
    if split == "days":
        return set(X["time" if name == "beijing_pm25" else "year"])
    return set(X["station"]) if split == "stations" else set(map(tuple, X.iloc[:, :3].to_numpy()))


@pytest.mark.parametrize("name", ["beijing_pm25", "us_temp"])
@pytest.mark.parametrize("split", ["days", "stations", "cells"])
def test_what_is_held_out_is_not_in_training_and_every_row_is_tested_once(folder, name, split):
    n_tested, rows = 0, []
    for fold in range(5):
        held = load_split(folder, name, split, fold, station=True)
        assert len(held.y) + len(held.y_test) == 700
        assert not keys(held.X, split, name) & keys(held.X_test, split, name)
        inner = held.inner
        assert 0 < inner.mean() < 0.5
        assert not keys(held.X[inner], split, name) & keys(held.X[~inner], split, name)
        n_tested += len(held.y_test)
        rows.extend(held.X_test.index)
    assert n_tested == 700
    assert sorted(rows) == list(range(700))


@pytest.mark.parametrize("name", ["beijing_pm25", "us_temp"])
def test_days_are_held_out_in_blocks_of_seven(folder, name):
    held = load_split(folder, name, "days", 0)
    days = np.unique((held.X_test[:, 2] * (7 if name == "beijing_pm25" else 70)).round().astype(int))
    assert len(days) == 14
    assert np.array_equal(days, np.concatenate([block * 7 + np.arange(7) for block in np.unique(days // 7)]))


def test_published_rows_are_those_of_the_old_loader_and_the_station_is_a_fourth_column(folder):
    X, y, X_test, y_test = load_fold(folder, "beijing_pm25", 2)
    held = load_split(folder, "beijing_pm25", "published", 2)
    for ours, theirs in zip(held[:4], (X, y, X_test, y_test), strict=True):
        assert np.array_equal(ours, theirs)
    labelled = load_split(folder, "beijing_pm25", "published", 2, station=True)
    assert labelled.X.columns.tolist() == ["temperature", "pressure", "time", "station"]
    assert np.array_equal(labelled.X.iloc[:, :3].to_numpy(), X)
    assert set(labelled.X["station"]) == {f"s{k}" for k in range(10)}


def test_a_split_or_fold_that_does_not_exist_is_refused(folder):
    with pytest.raises(ValueError, match="split: expected one of"):
        load_split(folder, "us_temp", "weeks", 0)
    with pytest.raises(ValueError, match="fold: expected 0 to 4"):
        load_split(folder, "us_temp", "days", 5)
    with pytest.raises(ValueError, match="name: expected one of"):
        load_counts(folder, "trains", 0)


def test_counts_have_the_zeros_of_routes_that_exist_and_no_others(folder):
    listed, full = (load_counts(folder, f"nyc2013_flights{end}", 1) for end in ("", "_zeros"))
    assert min(listed.y.min(), listed.y_test.min()) == 1
    tables = [pd.concat([held.X, held.X_test]) for held in (listed, full)]
    routes = [set(map(tuple, X[["origin", "dest", "carrier"]].to_numpy())) for X in tables]
    assert routes[0] == routes[1]
    assert len(tables[1]) == 6 * len(routes[0])
    assert full.y.sum() + full.y_test.sum() == listed.y.sum() + listed.y_test.sum()


def test_nations_are_related_to_others_only(folder):
    held = load_counts(folder, "kg_nations", 0)
    X, y = pd.concat([held.X, held.X_test]), np.append(held.y, held.y_test)
    assert len(y) == 4 * 3 * 2
    assert (X["head"] != X["tail"]).all()
    assert sorted(map(tuple, X[y == 1].to_numpy())) == [
        ("a", "r", "b"),
        ("b", "r", "c"),
        ("c", "s", "a"),
        ("d", "s", "b"),
    ]


def test_group_means_fall_back_in_order():
    X = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    model = peers.GroupMeans((0, 1), (0,))
    model._fit(X, np.array([1.0, 3.0, 10.0, 20.0]), None)
    query = np.array([[0.0, 1.0], [0.0, 5.0], [1.0, 0.0], [7.0, 0.0]])
    assert model._mean(query).tolist() == [3.0, 2.0, 15.0, 8.5]
    assert model._level(query).tolist() == [0, 1, 0, 2]


def test_effects_are_ridge_regression():
    rng = np.random.default_rng(1)
    X, y = rng.integers(0, 4, size=(60, 3)).astype(float), rng.normal(size=60)
    model = peers.Effects((0,), (1,))
    model._fit(X, y, (2.0, 0.5))
    design = np.concatenate([X[:, [0]] == np.arange(4), X[:, [1]] == np.arange(4)], axis=1).astype(float)
    effects = np.linalg.solve(design.T @ design + np.diag([2.0] * 4 + [0.5] * 4), design.T @ (y - y.mean()))
    np.testing.assert_allclose(model._mean(X), y.mean() + design @ effects, atol=1e-7)
    assert model._level(np.array([[0.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 0.0]])).tolist() == [1, 0, 3]


def test_effects_with_the_cell_residual_reproduce_cells_seen():
    X = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    y = np.array([1.0, 2.0, 5.0, 9.0])
    model = peers.Effects((0, 1), (2,), ridge=0.0, residual=True)
    model._fit(X, y, (0.0, 0.0))
    np.testing.assert_allclose(model._mean(X), y, atol=1e-7)


def test_settings_come_from_inner_rows_and_levels_have_errors_of_their_own():
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(100), 4)
    X = np.column_stack([group, rng.normal(size=400), rng.normal(size=400)])
    y = 5 * rng.normal(size=100)[group] + 0.1 * rng.normal(size=400)
    model = peers.GroupMeans((0,)).fit(X, y)
    mean, std = model.predict(np.array([[3.0, 0.0, 0.0], [1e3, 0.0, 0.0]]))
    assert mean[1] == pytest.approx(y.mean())
    assert 0.08 < std[0] < 0.2
    held = datasets.held_out(group, 0)  # whole groups: no inner row has seen its group, so errors are large
    assert peers.GroupMeans((0,)).fit(X, y, held).predict(X)[1][0] > 3
    shrunk = peers.Effects((0,)).fit(X, y)
    assert shrunk.setting_[0] <= 0.1


@pytest.mark.parametrize("nu", [1.5, 4.0, 150.0])
def test_the_student_score_is_the_integral_that_defines_it(nu):
    for z in (-2.0, 0.3):
        below = integrate.quad(lambda x: stats.t.cdf(x, nu) ** 2, -np.inf, z)[0]
        above = integrate.quad(lambda x: stats.t.sf(x, nu) ** 2, z, np.inf)[0]
        assert scores.student_crps(np.array([z]), np.array([nu]))[0] == pytest.approx(below + above, rel=1e-5)


def test_student_errors_find_their_parameters_and_never_collapse():
    residual = 0.3 * stats.t.rvs(4.0, size=20_000, random_state=np.random.default_rng(0))
    nu, scale = scores.student_fit(residual, 1e-3)
    assert nu == pytest.approx(4.0, rel=0.1)
    assert scale == pytest.approx(0.3, rel=0.05)
    assert scores.student_fit(np.zeros(100), 0.01)[1] == pytest.approx(0.01)


def test_the_score_from_intervals_is_the_closed_form():
    rng = np.random.default_rng(3)
    y, mean, std = rng.normal(size=(3, 500))
    std = 0.5 + std**2
    crps = splits.quantile_crps(y, lambda level: stats.norm.interval(level, mean, std))
    assert crps == pytest.approx(crps_gaussian(y, mean, std), rel=2e-3)
    normal, student = scores.gaussian_score(y, mean, std), scores.student_score(y, mean, std, np.full(500, 1e6))
    np.testing.assert_allclose(np.concatenate(normal[2:]), np.concatenate(student[2:]), rtol=1e-4)


def test_rounded_masses_sum_to_one_also_in_the_tails():
    counts = np.arange(60.0)
    for mean in (-3.0, 0.2, 12.0):
        mass = splits.rounded_log_mass(counts, np.full(60, mean), np.full(60, 2.5))
        assert np.exp(mass).sum() == pytest.approx(1.0)
        assert np.isfinite(mass).all()


@pytest.mark.parametrize("make", [*splits.count_references().values()])
@pytest.mark.parametrize("binary", [False, True])
def test_count_references_learn_rates_and_have_normalised_masses(make, binary):
    rng = np.random.default_rng(4)
    X = pd.DataFrame({"a": rng.integers(0, 3, 600).astype(str), "b": rng.integers(0, 3, 600).astype(float)})
    rate = 0.2 + 0.3 * X["a"].astype(float).to_numpy()
    y = (rng.random(600) < rate).astype(float) if binary else rng.poisson(10 * rate).astype(float)
    model = make().fit(X, y, datasets.held_out(np.arange(600), 0))
    values = np.arange(2.0 if binary else 100.0)
    same = X.iloc[np.zeros(len(values), dtype=int)]
    assert np.exp(model.log_likelihood(same, values)).sum() == pytest.approx(1.0)
    if make is not splits.ConstantRate:
        one = splits.ConstantRate().fit(X, y, np.ones(600, dtype=bool))
        assert model.log_likelihood(X, y).mean() > one.log_likelihood(X, y).mean() + 0.02


def test_the_tables_have_a_line_for_every_method(folder):
    methods = splits.reference_methods(sparse_gp=False)
    few = {label: methods[label] for label in ("global mean", "mean of the day", "day + station, shrunk")}
    few["FunBaT"] = splits.funbat({"rank": 1, "max_iter": 5, "n_init": 1, "random_state": 0, "progress": False})
    lines = splits.table(folder, ["beijing_pm25", "us_temp"], ["stations"], few, [0])
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    of_beijing = ["method", "global mean", "mean of the day", "day + station, shrunk", "FunBaT"]
    assert named == [*of_beijing, "method", "global mean", "FunBaT"]
    assert "nan" not in "".join(lines)
    counts = splits.count_table(folder, ["nyc2013_flights"], splits.count_references(), [0, 1])
    assert len([line for line in counts if line.startswith("| ")]) == 5


@pytest.mark.parametrize("read", ["own", "rounded"])
def test_funbat_has_a_log_likelihood_of_each_row_of_counts(folder, read):
    held = load_counts(folder, "nyc2013_flights", 0)
    arguments = {"rank": 1, "form": "cp", "max_iter": 5, "n_init": 1, "random_state": 0, "progress": False}
    model = splits.funbat_counts(arguments, read)().fit(held.X, held.y, held.inner)
    found = model.log_likelihood(held.X_test, held.y_test)
    assert found.shape == held.y_test.shape
    assert np.isfinite(found).all()


@pytest.mark.filterwarnings("ignore")
def test_the_sparse_gp_learns_a_smooth_function_and_is_the_same_each_time():
    pytest.importorskip("gpytorch", reason="no GPyTorch: pip install gpytorch")
    rng = np.random.default_rng(5)
    X = rng.uniform(0, 3, size=(300, 3))
    y = 4 + np.sin(2 * X[:, 0])
    found = [
        sparse_gp.SparseGaussianProcess(n_inducing=20, n_steps=80, batch=150).fit(X, y).predict(X) for _ in range(2)
    ]
    assert np.array_equal(found[0][0], found[1][0])
    assert np.sqrt(np.mean((found[0][0] - y) ** 2)) < 0.4
    assert (found[0][1] > 0).all()


def test_a_missing_gpytorch_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gpytorch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gpytorch"):
        sparse_gp.SparseGaussianProcess().fit(np.zeros((3, 3)), np.zeros(3))


def test_the_completion_table_has_a_line_for_every_method_named(folder, monkeypatch):
    monkeypatch.setattr(completion_peers, "EPOCHS", 2)
    monkeypatch.setattr(completion_peers, "LEAST_STEPS", 4)
    names = ["mean", "effects", "trees", *completion_peers.PEERS, "mixture"]
    lines = list(completion.completion_lines(folder, ["taxi"], [0, 1], names))
    assert [line.split(" | ")[0] for line in lines[6:-1]] == [f"| {completion.METHODS[name][0]}" for name in names]
    assert "nan" not in "".join(lines)
    monkeypatch.setattr(completion_peers, "MOST_CELLS", 100)
    lines = list(completion.completion_lines(folder, ["taxi"], [0], ["tucker"]))
    assert lines[6] == "| TensorLy tucker(mask) | impossible: a dense array of 480 cells | – | – | – |"


@pytest.mark.parametrize("name", ["mf", "cp", "costco", "mlp", "parafac", "tucker"])
def test_peers_learn_a_product_of_two_modes(name, monkeypatch):
    monkeypatch.setattr(completion_peers, "LEAST_STEPS", 2000 if name == "cp" else 400)
    monkeypatch.setattr(completion_peers, "PENALTIES", (0.1,))
    rng = np.random.default_rng(7)
    X = np.argwhere(rng.random((12, 10, 4)) < 0.8)
    y = (X[:, 0] - 6.0) * np.sin(X[:, 1]) + X[:, 2] + 0.1 * rng.normal(size=len(X))
    test = rng.random(len(X)) < 0.1
    rows = X[~test], y[~test], X[test]
    predicted, _ = completion_peers.PEERS[name][1](*rows, 0)
    assert rmse(y[test], predicted) < 0.9 * rmse(y[test], completion_peers.biases(*rows, 0)[0])


def test_networks_keep_their_best_weights():
    X = torch.arange(40)[:, None] % 4
    y = X[:, 0].float()
    module = completion_peers.Factorization(np.array([4]), (0,))
    found = completion_peers.trained(module, (X, y), (X, y), torch.Generator().manual_seed(0), rate=1.0)
    assert float((module(X) - y).square().mean().detach()) == pytest.approx(found)


def small_network(folder):
    train, query, n_labels = datamodels._taxi(folder)
    train, query = (datamodels.Cells(cells.labels[:30], cells.values[:30]) for cells in (train, query))
    generator = torch.Generator().manual_seed(0)
    start = {name: value.double() for name, value in datamodels.initial(2, n_labels, 3, generator).items()}
    train, query = (datamodels.Cells(cells.labels, cells.values.double()) for cells in (train, query))
    found = datamodels.train(start, train, torch.arange(30).expand(2, 30), 20, (10, 20), generator)
    return found, train, query


class OneNetwork(torch.nn.Module):
    """The first network as a module."""

    def __init__(self, parameters):
        super().__init__()
        self.names = list(parameters)
        self.values = torch.nn.ParameterList([value[:1].clone() for value in parameters.values()])

    def forward(self, labels):
        return datamodels.forward(dict(zip(self.names, self.values, strict=True)), labels[None])[0]


def test_scores_of_datamodels_are_those_of_the_package(folder):
    steps, train, query = small_network(folder)
    found = datamodels.scores(steps, train, query)
    modules = [OneNetwork(step) for step in steps]
    K = datamodels.kernels(steps[-1], train)[2]
    for row in (0, 7):
        one = query.labels[row : row + 1], query.values[row : row + 1]
        plain = sum(scores_of(module, tuple(train), one, parameters="all") for module in modules)
        torch.testing.assert_close(found["all parameters"][:, row], plain, rtol=1e-5, atol=1e-6, check_dtype=False)
        solver = GaussNewton(0.01 * float(K.trace()) / len(K), steps=200, tol=1e-12)
        exact = scores_of(modules[-1], tuple(train), one, parameters="all", preconditioner=solver)
        exact *= (found["Gauss–Newton, damping 0.01"][:, row] / exact).median()  # a common factor does not matter
        torch.testing.assert_close(
            found["Gauss–Newton, damping 0.01"][:, row], exact, rtol=1e-4, atol=1e-6, check_dtype=False
        )


def test_correlations_are_spearmans():
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 5, size=(2, 20, 3)).astype(float)
    expected = [stats.spearmanr(a[:, k], b[:, k]).statistic for k in range(3)]
    np.testing.assert_allclose(datamodels.correlations(torch.from_numpy(a), torch.from_numpy(b)), expected)


def test_the_table_of_datamodels_has_a_line_for_every_score(folder, monkeypatch):
    monkeypatch.setattr(datamodels, "CHOOSE", 5)
    lines = datamodels.datamodel_lines(folder, 12, 2, 4, (2, 4))
    assert [line.split(" | ")[0].split(",")[0] for line in lines[4:]] == [
        f"| {name}" for name in ("output layer", "all parameters", "Gauss–Newton", "empirical Fisher")
    ]
    assert "nan" not in "".join(lines)


@pytest.mark.parametrize("kind", influence.KINDS)
def test_influence_is_measured(kind, monkeypatch):
    monkeypatch.setattr(influence, "QUERY", 200)
    found = influence.measure(kind, 100, 2, "cpu", 64)
    assert found["seconds"] > 0
    assert found["memory"] >= 0
    assert influence.jobs_of([kind], [5, 6]) == [(kind, 5, 1), (kind, 6, 1)]


def test_a_line_of_influence_comes_from_a_process_of_its_own():
    assert len(influence.influence_lines([("given", 100, 2)], "cpu", 64)) == 3
    with pytest.raises(RuntimeError, match="'cells': -1"):
        influence.influence_lines([("given", -1, 2)], "cpu", 64)


@needs("funbat")
@pytest.mark.parametrize(
    ("name", "label", "root", "mae"),
    [
        ("beijing_pm25", "global mean", 0.998, 0.739),
        ("beijing_pm25", "mean of the day", 0.2734, 0.1626),
        ("beijing_pm25", "mean of the cell, else day", 0.2480, 0.1450),
        ("beijing_so2", "mean of the day", 0.3406, 0.2070),
        ("beijing_so2", "mean of the cell, else day", 0.3472, 0.2065),
    ],
)
def test_references_without_parameters_have_their_known_errors(name, label, root, mae):
    errors = []
    for fold in range(5):
        held = load_split(DATA / "funbat", name, "published", fold)
        model = peers.references(name)[label]()
        model._fit(held.X, held.y, None)
        errors.append(scores.point_errors(held.y_test, model._mean(held.X_test)))
    digits = 3 if label == "global mean" else 4
    assert np.mean(errors, axis=0).round(digits).tolist() == [root, mae]


@needs("funbat")
@pytest.mark.parametrize("name", FUNBAT_SETS)
def test_real_splits_hold_out_about_a_fifth(name):
    for split in SPLITS:
        held = load_split(DATA / "funbat", name, split, 0)
        assert 0.1 < len(held.y_test) / (len(held.y) + len(held.y_test)) < 0.3


@needs("dain")
def test_real_counts_have_their_known_sizes():
    sizes = {
        name: len(held.y) + len(held.y_test) for name in COUNT_SETS for held in [load_counts(DATA / "dain", name, 0)]
    }
    assert sizes == {"nyc2013_flights": 16_170, "nyc2013_flights_zeros": 437 * 53, "kg_nations": 55 * 14 * 13}


@pytest.fixture(scope="module")
def tuning_data(tmp_path_factory):
    """A stand-in for the digits' file: bright quarters of a picture, and the network's shapes with random weights."""
    folder, rng = tmp_path_factory.mktemp("finetune"), np.random.default_rng(0)
    y = np.repeat(np.arange(3), 40)
    x = rng.integers(0, 90, (120, 1, 24, 24))
    for n, label in enumerate(y):
        x[n, 0, 12 * (label // 2) :, 12 * (label % 2) :][:12, :12] += 150
    torch.manual_seed(0)
    network = finetune_networks.RNet(2)
    base = {f"base.{name}": value.numpy() for name, value in network.state_dict().items() if "head" not in name}
    part = np.tile([1, 1, 2], 40)
    np.savez(
        folder / "digits.npz", x=x.astype(np.uint8), y=y.astype(np.uint8), part=part, group=np.arange(120) // 3, **base
    )
    return folder


def test_fine_tuning_draws_keep_groups_apart_and_never_tune_on_the_test(tuning_data):
    job = finetune_jobs.load_job(tuning_data, "digits")
    for seed in range(3):
        train, held = finetune_jobs.draw(job, seed, tuning=True)
        assert set(job.part[train].tolist()) == set(job.part[held].tolist()) == {1}
        assert not set(job.group[train].tolist()) & set(job.group[held].tolist())
        train, held = finetune_jobs.draw(job, seed, tuning=False)
        assert set(job.part[train].tolist()) == {1}
        assert held.tolist() == torch.nonzero(job.part == 2).flatten().tolist()


def test_fine_tuning_learns_and_gives_its_table(tuning_data, tmp_path):
    runs = tmp_path / "runs.jsonl"
    rates = {"full": (1e-3, 1.0), "head": (0.0, 1.0), "flora": (1e-2, 3.0), "paper": (3e-3, 1.0)}
    tasks = finetune_table.tasks_of("digits", rates, 2)
    results = finetune_table.run_all(tasks, tuning_data, "cpu", 1, runs)
    assert finetune_table.run_all(tasks, tuning_data, "cpu", 1, runs) == results
    assert len(runs.read_text().splitlines()) == len(tasks)
    assert results[tasks[2]].accuracy > 80
    assert results[tasks[2]].parameters < results[tasks[0]].parameters / 5
    lines = finetune_table.table("digits", rates, results, 2, 0)
    assert len(lines) == 4 + len(rates)
    assert lines[6].startswith("| FLoRA (ours)")


def test_the_published_update_is_its_formula():
    torch.manual_seed(0)
    delta = finetune_methods.PublishedDelta((5, 4, 3, 3), 2)
    torch.nn.init.normal_(delta.core)
    expected = torch.einsum("abcd,ia,jb,kc,ld->ijkl", delta.core, *delta.factors)
    torch.testing.assert_close(delta(torch.ones(5, 4, 3, 3)), 1 + 4 * expected)


def test_classical_decompositions_choose_their_ranks_inside_the_training_cells(monkeypatch):
    rng = np.random.default_rng(0)
    a, b, c = (rng.uniform(0.5, 1.5, size=(n, 1)) for n in (6, 5, 4))
    X = pd.DataFrame(np.argwhere(np.ones((6, 5, 4))), columns=["a", "b", "c"])
    y = (a[X["a"]] * b[X["b"]] * c[X["c"]])[:, 0]
    seen = []
    monkeypatch.setitem(classical.SETS, "small", lambda: (X, y))
    monkeypatch.setitem(classical.RANKS, "small", ((1,), (1,)))
    chosen = classical.choose_rank
    monkeypatch.setattr(
        classical, "choose_rank", lambda model, X, *rest, **more: seen.append(len(X)) or chosen(model, X, *rest, **more)
    )
    lines = classical.accuracy_lines(["small"], n_splits=2, folds=2)
    assert seen == [108] * 6
    errors = [float(line.split("|")[2]) for line in lines[5:]]
    assert len(errors) == 4
    assert max(errors[1:]) < 0.05 < errors[0]
    assert [line.split("|")[4].strip() for line in lines[5:]] == ["-", "1 1", "1 1", "1 1"]
    assert classical.consistency_lines(["small"], ranks=(1,))[-1] == "| small | 100.0 |"
