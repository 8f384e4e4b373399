"""DAIN: where new cells go, what they hold, what is kept, and that nothing held out is looked at."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator

import probtensor as pt
from probtensor.baselines import PerModeBiases
from probtensor.models import DAIN, FunBaT, NeuralTensorCompletion
from probtensor.models.augmentation_cells import codes_among, draw_cells, entities_of, entity_shares

NET = NeuralTensorCompletion(
    biases=False,
    rank=0,
    hidden=(8,),
    embedding=4,
    max_epochs=8,
    n_members=1,
    n_checkpoints=3,
    batch_size=64,
    progress=False,
    device="cpu",
)


def planted(n: int = 600, sizes: tuple[int, ...] = (20, 15, 6), seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Distinct cells of additive effects and noise."""
    rng = np.random.default_rng(seed)
    cells = np.unique(np.stack([rng.integers(0, size, 3 * n) for size in sizes], axis=1), axis=0)
    cells = rng.permutation(cells)[:n]
    y = 5.0 + sum(rng.normal(size=size)[column] for size, column in zip(sizes, cells.T, strict=True))
    table = pd.DataFrame(
        {f"mode{k}": np.char.mod(f"m{k}-%d", column).astype(object) for k, column in enumerate(cells.T)}
    )
    return table, y + 0.2 * rng.normal(size=len(y))


X, Y = planted()
TRAIN, TEST = slice(0, 500), slice(500, None)


def rows(table: pd.DataFrame) -> set[tuple[object, ...]]:
    return set(table.itertuples(index=False, name=None))


@pytest.fixture(scope="module")
def fitted() -> DAIN:
    return DAIN(NET, 0.5, random_state=0).fit(X[TRAIN], Y[TRAIN], X_exclude=X[TEST])


# Entities and cells


def test_shares_are_sums_and_means_over_the_cells_of_an_entity():
    rng = np.random.default_rng(0)
    codes, importance = rng.integers(0, 4, size=(50, 2)), rng.random(50)
    for aggregate in ("sum", "mean"):
        for k, share in enumerate(entity_shares(codes, importance, (5, 6), aggregate)):
            plain = np.array(
                [
                    getattr(np, aggregate)(importance[codes[:, k] == e]) if e in codes[:, k] else 0.0
                    for e in range(5 + k)
                ]
            )
            np.testing.assert_allclose(share, plain / plain.sum())


def test_entities_without_cells_have_none_and_no_importance_is_the_same_for_all():
    codes = np.array([[0, 1], [0, 1], [2, 1]])
    first, second = entity_shares(codes, np.zeros(3), (4, 3), "sum")
    np.testing.assert_allclose(first, [2 / 3, 0, 1 / 3, 0])
    np.testing.assert_allclose(second, [0, 1, 0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 60))
def test_drawn_cells_are_new_distinct_and_of_living_entities(seed, K, n):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 8, K)
    shares = [rng.random(size) * (rng.random(size) < 0.7) + 1e-3 * (np.arange(size) == 0) for size in sizes]
    shares = [share / share.sum() for share in shares]
    taken = np.stack([rng.integers(-1, size, 20) for size in sizes], axis=1)
    found = draw_cells(shares, n, taken, rng)
    assert found.shape == (len(found), K)
    assert len(found) <= n
    assert len({*map(tuple, found.tolist())}) == len(found)
    assert not {*map(tuple, found.tolist())} & {*map(tuple, taken.tolist())}
    assert all(share[column].min(initial=1) > 0 for share, column in zip(shares, found.T, strict=True))
    volume = int(np.prod([np.count_nonzero(share) for share in shares]))
    if volume < 4 * n:  # enumerated: nothing that is free is missed
        alive = {
            cell
            for cell in map(tuple, taken.tolist())
            if all(c >= 0 and s[c] > 0 for s, c in zip(shares, cell, strict=True))
        }
        assert len(found) == min(n, volume - len(alive))


def test_draws_follow_the_shares():
    shares = [np.array([0.1, 0.3, 0.6, 0.0]), np.full(200_000, 1 / 200_000)]
    found = draw_cells(shares, 30_000, np.zeros((0, 2), dtype=int), np.random.default_rng(0))
    assert len(found) == 30_000
    np.testing.assert_allclose(np.bincount(found[:, 0], minlength=4) / 30_000, shares[0], atol=0.01)


def test_labels_become_codes_and_come_back():
    table = pd.DataFrame({"a": ["x", "y", "x"], "t": pd.to_datetime(["2020", "2021", "2021"]), "f": [0.5, 1.5, 0.5]})
    codes, labels = entities_of(table)
    assert codes.tolist() == [[0, 0, 0], [1, 1, 1], [0, 1, 0]]
    np.testing.assert_array_equal(codes_among(labels, table), codes)
    assert codes_among(labels, table.assign(a="new"))[:, 0].tolist() == [-1, -1, -1]


# The estimator


def test_new_cells_are_not_observed_held_out_or_excluded(fitted):
    new = rows(fitted.X_augmented_)
    held_out = fitted.cell_importance_.isna().to_numpy()
    assert held_out.sum() == 100
    assert len(fitted.X_augmented_) == len(new) == 200
    assert not new & rows(X)
    assert list(fitted.X_augmented_.columns) == list(X.columns)
    assert fitted.X_augmented_["mode0"].dtype == X["mode0"].dtype
    assert np.isfinite(fitted.y_augmented_).all()


def test_importance_is_labelled_and_adds_up(fitted):
    train = ~fitted.cell_importance_.isna()
    table, scores = X[TRAIN][train], fitted.cell_importance_[train]
    own = fitted.estimator_.influence(table, Y[TRAIN][train], X[TRAIN][~train], Y[TRAIN][~train], parameters="last")
    np.testing.assert_allclose(scores, own)
    assert (fitted.cell_importance_.index == X[TRAIN].index).all()
    for name, shares in fitted.entity_importance_.items():
        expected = scores.abs().groupby(table[name]).sum() / scores.abs().sum()
        pd.testing.assert_series_equal(shares.sort_index(), expected.sort_index(), check_names=False)
        assert shares.is_monotonic_decreasing
        assert shares.sum() == pytest.approx(1)


def test_the_prediction_weighs_both_models_as_validation_says_and_intervals_cover(fitted):
    first, second = fitted.estimator_.predict(X[TEST]), fitted.augmented_estimator_.predict(X[TEST])
    mean, std = fitted.predict(X[TEST], return_std=True)
    np.testing.assert_allclose(mean, (1 - fitted.weight_) * first + fitted.weight_ * second)
    held_out = fitted.cell_importance_.isna().to_numpy()
    check = [model.predict(X[TRAIN][held_out]) for model in (fitted.estimator_, fitted.augmented_estimator_)]
    tried = [pt.metrics.rmse(Y[TRAIN][held_out], (1 - w) * check[0] + w * check[1]) for w in np.linspace(0, 1, 101)]
    assert fitted.weight_ == pytest.approx(np.argmin(tried) / 100, abs=0.006)
    assert fitted.validation_rmse_["kept"] <= min(tried) + 1e-12
    assert set(fitted.validation_rmse_) == {"first", "second", "kept"}
    lower, upper = fitted.predict_interval(X[TEST])
    assert np.mean((lower <= Y[TEST]) & (Y[TEST] <= upper)) > 0.8
    assert np.mean(upper - lower) < 2 * 1.645 * 1.5 * pt.metrics.rmse(Y[TEST], mean)
    np.testing.assert_allclose(fitted.predictive(X[TEST]).std, std)
    assert pt.metrics.rmse(Y[TEST], mean) < Y.std()


def test_good_values_from_another_model_help_and_are_kept_only_if_they_do():
    trained = clone(NET).set_params(max_epochs=20, weight_decay=0.0, patience=10)
    better = DAIN(trained, ratio=3.0, keep="if_better", random_state=0).fit(X[TRAIN], Y[TRAIN])
    assert better.weight_ == 1
    assert better.validation_rmse_["second"] < better.validation_rmse_["first"]
    np.testing.assert_array_equal(better.predict(X[TEST]), better.augmented_estimator_.predict(X[TEST]))
    nonsense = PerModeBiases().fit(X[TRAIN], 100 * np.random.default_rng(0).normal(size=500))
    worse = DAIN(NET, ratio=2.0, keep="if_better", predictor=FrozenEstimator(nonsense), random_state=0)
    worse.fit(X[TRAIN], Y[TRAIN])
    assert worse.weight_ == 0
    np.testing.assert_array_equal(worse.predict(X[TEST]), worse.estimator_.predict(X[TEST]))
    np.testing.assert_array_equal(worse.y_augmented_, nonsense.predict(worse.X_augmented_))


def test_the_paper_form_takes_values_from_the_model_itself():
    model = DAIN(NET, predictor="self", keep="always", random_state=0).fit(X[TRAIN], Y[TRAIN])
    np.testing.assert_array_equal(model.y_augmented_, model.estimator_.predict(model.X_augmented_))
    assert model.weight_ == 1


@pytest.mark.parametrize("progress", [True, False])
def test_the_default_network_shows_progress_only_where_that_is_wanted(progress, monkeypatch):
    shown = []
    monkeypatch.setattr(NeuralTensorCompletion, "fit", lambda self, *_, **__: shown.append(self.progress) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DAIN(progress=progress).fit(X[:40], Y[:40])
    assert shown == [progress]


@pytest.mark.parametrize("importance", ["influence", "frequency", "uniform"])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("sign", ["absolute", "helpful"])
def test_kinds_of_importance(importance, aggregate, sign):
    model = DAIN(NET, importance=importance, aggregate=aggregate, sign=sign, random_state=0).fit(X[:200], Y[:200])
    seen = X[:200][~model.cell_importance_.isna()]
    shares = model.entity_importance_["mode1"]
    if importance == "frequency" and aggregate == "sum":
        expected = seen["mode1"].value_counts(normalize=True)
        pd.testing.assert_series_equal(shares.sort_index(), expected.sort_index(), check_names=False)
    elif importance != "influence":
        np.testing.assert_allclose(shares, 1 / seen["mode1"].nunique())
    else:
        assert shares.std() > 0


def test_other_estimators_are_fitted_too():
    biases = DAIN(PerModeBiases(), importance="uniform", random_state=0).fit(X[TRAIN], Y[TRAIN])
    assert pt.metrics.rmse(Y[TEST], biases.predict(X[TEST])) < 0.4
    assert np.isfinite(biases.predict(X[TEST], return_std=True)[1]).all()
    functional = FunBaT(rank=1, max_iter=20, progress=False, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = DAIN(NET, 0.5, predictor=functional, random_state=0).fit(X[:200], Y[:200])
    assert len(model.y_augmented_) == 80


def test_only_what_is_free_is_added():
    grid = pd.DataFrame([(i, j) for i in range(12) for j in range(5)], columns=["a", "b"])
    y = grid["a"] - grid["b"] + 0.0
    model = DAIN(NET, random_state=0).fit(grid, y)  # every cell is observed
    assert len(model.X_augmented_) == len(model.y_augmented_) == 0
    np.testing.assert_array_equal(model.predict(grid), model.estimator_.predict(grid))
    one_free = DAIN(NET, random_state=0).fit(grid.drop(7), y.drop(7))
    assert rows(one_free.X_augmented_) == {(1, 2)}


@pytest.mark.parametrize("y", [np.full(60, 3.5), 1e5 + 1e5 * Y[:60], np.append(np.zeros(59), 1e9)])
@pytest.mark.parametrize("n_modes", [2, 3])
def test_constant_and_large_values(y, n_modes):
    table = X.iloc[:60, :n_modes]
    model = DAIN(NET, random_state=0).fit(table, y)
    train = table[~model.cell_importance_.isna()]
    assert np.isfinite(model.predict(train)).all()
    if y.std() == 0:
        np.testing.assert_allclose(model.predict(train), 3.5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(9, 8), (6, 5, 4), (4, 4, 3, 3), (3, 3, 3, 3, 2)])
def test_two_to_five_modes(sizes):
    table, y = planted(60, sizes)
    model = DAIN(NET, random_state=0).fit(table, y)
    assert len(model.entity_importance_) == len(sizes)
    assert not rows(model.X_augmented_) & rows(table)


def test_validation_rows_weights_arrays_and_bits():
    codes = np.stack([pd.factorize(X[name], sort=True)[0] for name in X], axis=1)
    before = codes.copy(), Y.copy()
    model = DAIN(NET, random_state=3).fit(
        codes[:400], Y[:400], np.full(400, 2.0), X_val=codes[400:500], y_val=Y[400:500]
    )
    again = clone(model).fit(codes[:400], Y[:400], np.full(400, 2.0), X_val=codes[400:500], y_val=Y[400:500])
    np.testing.assert_array_equal(model.predict(codes), again.predict(codes))
    np.testing.assert_array_equal(codes, before[0])
    np.testing.assert_array_equal(Y, before[1])
    assert not model.cell_importance_.isna().any()
    assert not rows(model.X_augmented_) & rows(pd.DataFrame(codes[:500]))


def test_a_saved_model_predicts_the_same_bits(fitted, tmp_path):
    fitted.save(tmp_path / "a.model")
    loaded = pt.load(tmp_path / "a.model")
    for own, other in zip(
        fitted.predict(X[TEST], return_std=True), loaded.predict(X[TEST], return_std=True), strict=True
    ):
        np.testing.assert_array_equal(own, other)
    assert loaded.weight_ == fitted.weight_
    assert loaded.validation_rmse_ == fitted.validation_rmse_
    biases = DAIN(PerModeBiases(), importance="uniform", random_state=0).fit(X[:50], Y[:50])
    with pytest.raises(ValueError, match=r"^estimator: expected a model of probtensor to save, got PerModeBiases"):
        biases.save(tmp_path / "b.model")


class Deaf(RegressorMixin, BaseEstimator):
    def fit(self, X, y):
        return self

    def predict(self, X):
        return np.zeros(len(X))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", -1),
        ("ratio", float("inf")),
        ("importance", "luck"),
        ("aggregate", "max"),
        ("sign", "negative"),
        ("parameters", "some"),
        ("keep", "never"),
        ("validation_fraction", 1.0),
        ("predictor", "other"),
        ("random_state", -1),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        DAIN(NET, **{"random_state": 0, name: value}).fit(X[:50], Y[:50])


def test_bad_rows_are_named():
    model = DAIN(NET, random_state=0)
    with pytest.raises(ValueError, match=r"^importance: expected .* such as Deaf"):
        DAIN(Deaf()).fit(X[:50], Y[:50])
    with pytest.raises(ValueError, match=r"^estimator: expected one of real values, got one with likelihood=.poisson"):
        DAIN(FunBaT(likelihood="poisson"), importance="uniform").fit(X[:50], Y[:50])
    with pytest.raises(ValueError, match=r"^sample_weight: expected None, Deaf takes no weights"):
        DAIN(Deaf(), importance="uniform").fit(X[:50], Y[:50], np.ones(50))
    with pytest.raises(ValueError, match=r"^y: expected shape \(50,\)"):
        model.fit(X[:50], Y[:49])
    with pytest.raises(ValueError, match=r"^y: expected"):
        model.fit(X[:50], np.full(50, np.nan))
    with pytest.raises(ValueError, match=r"^X_exclude: expected the columns"):
        model.fit(X[:50], Y[:50], X_exclude=X[["mode0"]])
    with pytest.raises(ValueError, match=r"^y_val: expected one with X_val"):
        model.fit(X[:50], Y[:50], X_val=X[50:60])
    for wrong in ([np.nan] * 10, np.zeros(3), []):
        with pytest.raises(ValueError, match=r"^y_val: expected finite values of shape"):
            DAIN(PerModeBiases(), importance="uniform").fit(
                X[:50], Y[:50], X_val=X[50:60] if len(wrong) else X[:0], y_val=wrong
            )
    with pytest.raises(ValueError, match=r"^X: expected at least two rows"):
        model.fit(X[:1], Y[:1])
    with pytest.raises(NotFittedError):
        model.predict(X)
