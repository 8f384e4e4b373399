"""Side information of neural tensor completion: what is made of tables, and labels that were never seen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import probtensor as pt
from probtensor.axes import CategoricalAxis
from probtensor.estimator import UnknownLabelWarning
from probtensor.models import NeuralTensorCompletion
from probtensor.models.completion_effects import Cells, number_cells, start_effects, sweep
from probtensor.models.side_information import MAX_FEATURES, side_codes, side_features, side_of

QUICK = {"rank": 2, "hidden": (8,), "embedding": 4, "max_epochs": 3, "n_members": 2, "random_state": 0}
QUICK |= {"progress": False, "device": "cpu"}
N_FILMS, KNOWN = 80, 60  # the other films have no training row


def planted(likelihood: str = "gaussian", n: int = 4000) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """Values, and a table of films: what films do is for the most part said by their year and genre."""
    rng = np.random.default_rng(0)
    genre, year = rng.choice(["comedy", "drama", "war"], N_FILMS), rng.normal(1980, 15, N_FILMS)
    films = pd.DataFrame({"year": year, "genre": genre}, index=[f"film {i}" for i in range(N_FILMS)])
    effect = (year - 1980) / 15 + 1.5 * (genre == "war") + 0.2 * rng.normal(size=N_FILMS)
    user, film = rng.integers(0, 30, n), rng.integers(0, N_FILMS, n)
    eta = effect[film] + 0.5 * rng.normal(size=30)[user]
    X = pd.DataFrame({"user": user, "film": films.index.to_numpy()[film]})
    if likelihood == "gaussian":
        return X, 3 + eta + 0.3 * rng.normal(size=n), films
    return X, rng.poisson(np.exp(0.5 * eta)).astype(float), films


def parts(X: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    new = X["film"].isin([f"film {i}" for i in range(KNOWN, N_FILMS)]).to_numpy()
    return ~new, new


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson"])
def test_labels_without_rows_are_predicted_by_their_features(likelihood, tmp_path):
    X, y, films = planted(likelihood)
    old, new = parts(X)
    before = films.copy()
    plain = NeuralTensorCompletion(**QUICK, likelihood=likelihood).fit(X[old], y[old])
    model = NeuralTensorCompletion(**QUICK, likelihood=likelihood)
    model.fit(X[old], y[old], side_information={"film": films})
    pd.testing.assert_frame_equal(films, before)
    assert ("features of film",) in model.strengths_
    assert model.unknown(X[new])["film"].all()
    with pytest.warns(UnknownLabelWarning):
        found, without = model.predict(X[new]), plain.predict(X[new])
    errors = [pt.metrics.rmse(y[new], mean) for mean in (found, without)]
    best = 0.4 if likelihood == "gaussian" else pt.metrics.rmse(y[old], model.predict(X[old]))
    assert errors[0] - best < 0.35 * (errors[1] - best)
    with pytest.warns(UnknownLabelWarning):
        scores = [m.log_prob(X[new], y[new]).mean() for m in (model, plain)]
    assert scores[0] > scores[1]
    with pytest.warns(UnknownLabelWarning):
        intervals = [m.predict_interval(X[new], 0.9) for m in (model, plain)]
    for lower, upper in intervals:
        assert np.mean((lower <= y[new]) & (y[new] <= upper)) > 0.8
    warm = [pt.metrics.rmse(y[old], m.predict(X[old])) for m in (model, plain)]
    assert warm[0] < 1.03 * warm[1]
    model.save(tmp_path / "a.model")
    with pytest.warns(UnknownLabelWarning):
        np.testing.assert_array_equal(pt.load(tmp_path / "a.model").predict(X), model.predict(X))


def test_validation_rows_influence_and_labels_without_features():
    X, y, films = planted(n=1500)
    old, new = parts(X)
    model = NeuralTensorCompletion(**QUICK)
    model.fit(X[old][200:], y[old][200:], X_val=X[old][:200], y_val=y[old][:200], side_information={"film": films[5:]})
    assert np.isfinite(model.influence(X[old][:9], y[old][:9], X[new][:9], y[new][:9])).all()
    stranger = X[:2].assign(film=["nobody's", "film 79"])
    with pytest.warns(UnknownLabelWarning):
        mean, std = model.predict(stranger, return_std=True)
    assert np.isfinite(mean).all()
    assert std[0] > 0.3


def test_features_that_say_nothing_do_no_harm():
    X, y, films = planted()
    old, new = parts(X)
    rng = np.random.default_rng(1)
    noise = pd.DataFrame(rng.normal(size=(N_FILMS, 5)), index=films.index)
    model = NeuralTensorCompletion(**QUICK).fit(X[old], y[old], side_information={"film": noise})
    plain = NeuralTensorCompletion(**QUICK).fit(X[old], y[old])
    with pytest.warns(UnknownLabelWarning):
        errors = [pt.metrics.rmse(y[new], m.predict(X[new])) for m in (model, plain)]
    assert errors[0] < 1.1 * errors[1]


def test_tables_become_features():
    table = pd.DataFrame(
        {
            "size": [1.0, 3.0, np.nan, 2.0],
            "kind": pd.Categorical(["a", "b", "a", None]),
            "big": [True, False, True, True],
            "same": [7, 7, 7, 7],
        },
        index=["x", "y", "z", "w"],
    )
    (side,) = side_of({"m": table}, [CategoricalAxis("k").fit([1, 2]), CategoricalAxis("m").fit(["x", "v"])])
    assert side.mode == 1
    names = ["size", "size missing", "kind=a", "kind=b", "kind missing", "big=False", "big=True", "same", "no row"]
    assert side.names == names
    found = pd.DataFrame(side_features([side], side_codes(side, ["x", "y", "z", "w", "v"])[:, None]), columns=names)
    np.testing.assert_allclose(found["size"], np.array([-1, 1, 0, 0, 0]) * np.sqrt(1.5), atol=1e-12)
    assert found["size missing"].tolist() == [-0.25, -0.25, 0.75, -0.25, 0]
    assert found["kind=a"].tolist() == [0.5, -0.5, 0.5, -0.5, 0]
    assert found["same"].eq(0).all()
    assert found["no row"].tolist() == [0, 0, 0, 0, 1]
    assert side_of(None, []) == ()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([1], "side_information: expected tables by the names"),
        ({"actor": pd.DataFrame({"a": [1]})}, "side_information: expected names of categorical modes"),
        ({"film": pd.DataFrame({"a": [1.0]}, index=[3])}, "expected rows for labels such as"),
        ({"film": pd.DataFrame({"a": [1.0, 2.0]}, index=["film 1", "film 1"])}, "expected one row a label"),
        ({"film": pd.DataFrame({"a": [np.inf]}, index=["film 1"])}, "expected finite numbers or NaN in column 'a'"),
        ({"film": pd.DataFrame(index=["film 1"])}, "expected a DataFrame with rows and columns"),
        ({"film": pd.DataFrame(np.ones((1, MAX_FEATURES)), index=["film 1"])}, "expected fewer than 256 features"),
        ({"film": pd.DataFrame({"a": pd.to_datetime(["2020"])}, index=["film 1"])}, "expected numbers, strings"),
    ],
)
def test_bad_tables_are_named(given, says):
    X, y, _ = planted(n=100)
    with pytest.raises(ValueError, match=says):
        NeuralTensorCompletion(**QUICK).fit(X, y, side_information=given)


def test_effects_of_features_are_those_of_ridge_regression():
    rng = np.random.default_rng(0)
    labels, Z = rng.integers(0, 12, size=(200, 2)), rng.normal(size=(12, 3))
    y = (Z @ [1.0, 2.0, 0.0])[labels[:, 0]] + rng.normal(size=200)
    cells = [Cells(np.arange(12), labels[:, 0], Z), number_cells(labels, (1,), (12, 12))]
    strengths = [4.0, 7.0]
    effects, _ = sweep(cells, *start_effects(cells, y, np.ones(200)), np.ones(200), strengths, 200)
    design = np.append(Z[labels[:, 0]], np.eye(12)[labels[:, 1]], axis=1)
    penalty = np.diag([4.0] * 3 + [7.0] * 12)
    exact = np.linalg.solve(design.T @ design + penalty, design.T @ y)
    np.testing.assert_allclose(np.concatenate(effects), exact, atol=1e-4)
    variance = cells[0].variance(cells[0].add(np.ones(200)), 4.0)
    A = Z[labels[:, 0]].T @ Z[labels[:, 0]] + 4 * np.eye(3)
    np.testing.assert_allclose(variance, np.diag(Z @ np.linalg.inv(A) @ Z.T))
