"""FunBaT as a user meets it: fits, latent functions, effects, bad parameters, scikit-learn's habits.

The mathematics has tests of its own. Fits are short: `QUICK` stops after twenty sweeps, the fewest that there are.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score

import probtensor as pt
from probtensor.estimator import UnknownLabelWarning
from probtensor.inference import message_passing
from probtensor.likelihoods import Poisson, StudentT
from probtensor.models import FunBaT, functional_tucker
from probtensor.resources import MANY_ROWS, threads_for

QUICK = {"rank": 2, "n_init": 1, "tol": 10.0, "random_state": 0, "progress": False, "relevance_prior": (1.0, 0.01)}
FORMS = ("cp", "tucker")
EFFECT = {"a": -1.0, "b": 0.0, "c": 1.0, "d": 2.0}


def table(n: int = 90, n_times: int = 12, noise: float = 0.1, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Cells by time: an effect of the cell and a wave whose amplitude depends on the cell."""
    rng = np.random.default_rng(seed)
    times = rng.integers(0, n_times, n) * (10.0 / (n_times - 1))
    X = pd.DataFrame({"time": times, "cell": rng.choice(list(EFFECT), n)})
    effect = X["cell"].map(EFFECT).to_numpy()
    return X, 5.0 + effect + np.sin(times) * (1.0 + 0.5 * effect) + noise * rng.normal(size=n)


X, Y = table()
NEW = pd.DataFrame({"time": [0.0, 2.5, 2.6, 9.9, 13.0], "cell": ["a", "b", "b", "d", "c"]})


class Case(NamedTuple):
    form: str
    main_effects: bool
    model: FunBaT


@pytest.fixture(scope="module", params=[(f, e) for f in FORMS for e in (True, False)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    form, main_effects = request.param
    return Case(form, main_effects, FunBaT(form=form, main_effects=main_effects, **QUICK).fit(X, Y))


@pytest.fixture(scope="module")
def cp() -> FunBaT:
    return FunBaT(form="cp", **QUICK).fit(X, Y)


@pytest.fixture(scope="module")
def tucker() -> FunBaT:
    return FunBaT(form="tucker", **QUICK).fit(X, Y)


def same(a: FunBaT, b: FunBaT) -> bool:
    """Whether two models predict the same bits."""
    return all(np.array_equal(x, y) for x, y in zip(*(m.predict(NEW, return_std=True) for m in (a, b)), strict=True))


# What a fit gives


def test_a_fit_returns_itself_and_reports_how_it_went(case):
    model = FunBaT(form=case.form, main_effects=case.main_effects, **QUICK)
    assert model.fit(X, Y) is model
    assert model.n_iter_ == len(model.bound_history_) == 20
    assert model.bound_ == model.bound_history_[-1]
    assert model.converged_ is True
    assert "tol=10" in model.stop_reason_
    assert model.rank_ == (2, 2)
    assert same(model, case.model)


def test_the_fit_explains_the_data_down_to_the_noise(case):
    assert case.model.score(X, Y) > 0.97
    assert 0.05 < case.model.noise_std_ < 0.4


def test_the_names_of_the_modes_are_those_of_the_columns(case):
    assert case.model.feature_names_in_.tolist() == ["time", "cell"]
    assert list(case.model.hyperparameters_) == ["time", "cell"]


def test_hyperparameters_are_positive_one_a_function(case):
    n_functions = 2 + (case.main_effects and case.form == "cp")
    time, cell = case.model.hyperparameters_["time"], case.model.hyperparameters_["cell"]
    assert (set(time), set(cell)) == ({"lengthscale", "variance", "white_variance"}, {"variance", "mean_variance"})
    for value in (*time.values(), *cell.values()):
        assert value.shape == (n_functions,)
        assert (value > 0).all()


def test_the_core_has_a_constant_column_a_mode_with_main_effects(case):
    if case.form == "cp":
        assert case.model.core_ is None
    else:
        assert case.model.core_.shape == ((3, 3) if case.main_effects else (2, 2))


def test_factors_effects_and_core_make_the_prediction(case):
    model = FunBaT(form=case.form, main_effects=case.main_effects, nugget=False, **QUICK).fit(X, Y)
    time, cell = NEW["time"].to_numpy(), NEW["cell"].to_numpy()
    (u, _), (v, _) = model.factor("time", at=time), model.factor("cell", at=cell)
    assert u.shape == v.shape == (len(NEW), 2)
    if case.form == "tucker":
        if case.main_effects:
            u, v = np.c_[np.ones(len(NEW)), u], np.c_[np.ones(len(NEW)), v]
        latent = np.einsum("rs,nr,ns->n", model.core_, u, v) * model.y_scale_
    else:
        latent = (u * v).sum(axis=1) * model.y_scale_
        if case.main_effects:
            latent += model.main_effect("time", time)[0] + model.main_effect("cell", cell)[0]
    np.testing.assert_allclose(model.predict(NEW), model.y_mean_ + latent, rtol=1e-10)


def test_factors_default_to_the_training_coordinates_in_their_order(case):
    for axis in case.model.axes_:
        given, default = case.model.factor(axis.name, at=axis.distinct), case.model.factor(axis.name)
        assert default[0].shape == (axis.size, 2)
        np.testing.assert_allclose(default, given, rtol=1e-12)
        if case.main_effects:
            np.testing.assert_allclose(
                case.model.main_effect(axis.name), case.model.main_effect(axis.name, axis.distinct), rtol=1e-12
            )


def test_main_effects_are_the_means_over_the_other_mode(cp):
    effect, std = cp.main_effect("cell", at=list(EFFECT))
    assert (std > 0).all()
    np.testing.assert_allclose(effect - effect.mean(), np.array([-1.5, -0.5, 0.5, 1.5]), atol=0.5)


@pytest.mark.parametrize("name", ["time", "cell"])
def test_the_std_of_a_tucker_main_effect_agrees_with_sampling(tucker, name):
    mode, at = (0, [0.0, 5.2, 30.0]) if name == "time" else (1, ["a", "d"])
    mean, std = tucker.main_effect(name, at)
    moments = [x.numpy() for x in tucker._model.functions_at(tucker._state, mode, tucker._where(name, at)[1])]
    rng, core = np.random.default_rng(0), [x.numpy() for x in tucker._state.core]
    cores = rng.multivariate_normal(*core, size=200_000).reshape(-1, *tucker._model.ranks)
    weights = cores[:, 1:, 0] if name == "time" else cores[:, 0, 1:]
    for m, covariance, expected_mean, expected_std in zip(*moments, mean, std, strict=True):
        draws = (rng.multivariate_normal(m, covariance, size=200_000) * weights).sum(axis=1) * tucker.y_scale_
        assert expected_std == pytest.approx(draws.std(), rel=0.02)
        assert expected_mean == pytest.approx(draws.mean(), abs=4 * draws.std() / 200_000**0.5)


def test_main_effects_of_a_model_without_them_are_refused():
    model = FunBaT(form="cp", main_effects=False, **QUICK).fit(X, Y)
    with pytest.raises(ValueError, match="main_effect: expected a model of two or more modes with main_effects=True"):
        model.main_effect("time")


@pytest.mark.parametrize("method", ["factor", "main_effect"])
def test_an_unknown_mode_is_refused(cp, method):
    with pytest.raises(ValueError, match=r"name: expected one of \['time', 'cell'\], got 'dose'"):
        getattr(cp, method)("dose")


# The predictive distribution


def test_draws_have_the_moments_of_predict(case):
    mean, std = case.model.predict(NEW, return_std=True)
    draws = case.model.sample_y(NEW, n_samples=3000, random_state=0)
    assert draws.shape == (len(NEW), 3000)
    assert (np.abs(draws.mean(axis=1) - mean) < 4.5 * std / 3000**0.5).all()
    np.testing.assert_allclose(draws.std(axis=1), std, rtol=0.12)  # 3.5 standard errors, where tails are not too heavy


def test_joint_draws_are_correlated_between_near_coordinates_and_not_far_ones():
    settings = {"noise_prior": (1e4, 1.0), "learn_hyperparameters": False, "n_init": 1, "tol": 10.0, "random_state": 0}
    correlation = {}
    for kernel in (pt.Matern(1.5), pt.Matern(1.5) + pt.White()):
        model = FunBaT(1, "cp", axes=[pt.ContinuousAxis("mode_0", kernel)], **settings)
        model.fit([[0.0], [10.0]], [1.0, -1.0])
        correlation[kernel] = np.corrcoef(model.sample_y([[5.0], [5.1], [400.0]], 2000))
        assert abs(correlation[kernel][0, 2]) < 0.1
    smooth, rough = (float(c[0, 1]) for c in correlation.values())
    assert smooth > 0.95
    assert 0.9 < rough < smooth  # what each coordinate has for itself, it does not share


@pytest.mark.parametrize("form", FORMS)
def test_far_from_the_data_the_prior_returns_with_a_wider_std(form):
    x = np.linspace(0.0, 10.0, 25)[:, None]
    model = FunBaT(form=form, likelihood="gaussian", **QUICK).fit(x, 3.0 + np.sin(x[:, 0]))
    mean, std = model.predict([[-1e6], [1e6]], return_std=True)
    learned = model.hyperparameters_["mode_0"]
    variance = learned["variance"] + learned["white_variance"]
    weight = 1.0
    if form == "tucker":
        core = model._state.core
        weight = (core.covariance.diagonal() + core.mean**2).numpy()
    prior = model.y_scale_ * math.sqrt((weight * variance).sum() + (model.noise_std_ / model.y_scale_) ** 2)
    np.testing.assert_allclose(mean, model.y_mean_, rtol=1e-9)
    np.testing.assert_allclose(std, prior, rtol=1e-9)
    assert (std > 2 * model.predict(x, return_std=True)[1].max()).all()


def test_an_unknown_label_has_what_the_others_share_and_a_wider_interval_than_any_known(case):
    new = pd.DataFrame({"time": 2.5, "cell": [*EFFECT, "nowhere"]})
    with pytest.warns(UnknownLabelWarning, match=r"1 row has a label of 'cell' .* \('nowhere'\)"):
        lower, upper = case.model.predict_interval(new)
    assert (upper - lower)[-1] > 1.2 * (upper - lower)[:-1].max()
    assert case.model.unknown(new)["cell"].tolist() == [False] * 4 + [True]
    with pytest.warns(UnknownLabelWarning, match="'nowhere'"):
        mean, std = case.model.factor("cell", at=["nowhere"])
    known, _ = case.model.factor("cell")
    assert (np.abs(mean[0]) < np.abs(known).max(0)).all()
    hyper = case.model.hyperparameters_["cell"]
    variance, shared = hyper["variance"][:2], hyper["mean_variance"][:2]
    assert ((variance < std[0] ** 2) & (std[0] ** 2 < variance + shared)).all()


def test_an_unknown_label_is_predicted_by_the_other_modes_and_what_labels_share(cp):
    (u, _), time_effect = cp.factor("time", at=[2.5]), cp.main_effect("time", [2.5])[0]
    with pytest.warns(UnknownLabelWarning):
        mean = cp.predict(pd.DataFrame({"time": [2.5], "cell": ["nowhere"]}))
    with pytest.warns(UnknownLabelWarning):
        v, _ = cp.factor("cell", at=["nowhere"])
    with pytest.warns(UnknownLabelWarning):
        effects = time_effect + cp.main_effect("cell", ["nowhere"])[0]
    np.testing.assert_allclose(mean, cp.y_mean_ + effects + cp.y_scale_ * (u * v).sum(1), rtol=1e-12)


def test_a_label_held_out_is_predicted_by_what_the_others_have_in_common():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"day": rng.integers(0, 40, 1200) / 1.0, "station": rng.choice(list("abcdefgh"), 1200)})
    scale = X["station"].map(dict(zip("abcdefgh", 1 + 0.1 * rng.normal(size=8), strict=True)))
    y = scale * np.sin(X["day"] / 3) * 5 + 0.1 * rng.normal(size=1200)
    held = (X["station"] == "h").to_numpy()
    settings = {"main_effects": False, "n_init": 1, "random_state": 0, "progress": False}
    model = FunBaT(2, **settings).fit(X[~held], y[~held])
    with pytest.warns(UnknownLabelWarning):
        predictive = model.predictive(X[held])
    assert pt.metrics.rmse(y[held], predictive.mean) < 0.3 * y.std()  # with rows independent of each other: 1
    assert pt.metrics.coverage(y[held], *predictive.interval(0.9)) > 0.8


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_function_is_recovered_with_calibrated_intervals(form):
    X, y = table(n=900, n_times=41, noise=0.3, seed=1)
    model = FunBaT(2, form, n_init=1, tol=1e-2, random_state=0, progress=False).fit(X[:400], y[:400])
    _, truth = table(n=900, n_times=41, noise=0.0, seed=1)  # the same rows
    assert pt.metrics.rmse(truth[400:], model.predict(X[400:])) < 0.12
    assert 0.80 <= pt.metrics.coverage(y[400:], *model.predict_interval(X[400:])) <= 0.97
    assert model.noise_std_ == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("main_effects", [True, False])
def test_no_seed_collapses_to_the_mean(form, main_effects):
    for seed in range(4):
        settings = QUICK | {"random_state": seed, "learn_hyperparameters": False}
        assert FunBaT(form=form, main_effects=main_effects, **settings).fit(X, Y).score(X, Y) > 0.95


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shift", "scale"), [(1e3, 1.0), (-7e-6, 1e-6), (0.0, -1e6)])
def test_results_follow_the_unit_of_y(form, shift, scale):
    model = FunBaT(form=form, **QUICK).fit(X, Y)
    other = FunBaT(form=form, **QUICK).fit(X, shift + scale * Y)
    if scale < 0:  # the start is drawn, so that a flip of sign is another start
        assert other.score(X, shift + scale * Y) > 0.97
        return
    mean, std = model.predict(NEW, return_std=True)
    other_mean, other_std = other.predict(NEW, return_std=True)
    np.testing.assert_allclose(other_mean, shift + scale * mean, rtol=1e-6)
    np.testing.assert_allclose(other_std, scale * std, rtol=1e-6)
    assert other.bound_ == pytest.approx(model.bound_ - len(Y) * math.log(scale), rel=1e-6)


# What can be fitted


def mixed_table(n: int = 60) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(
        {
            "when": pd.Timestamp("2024-02-28") + pd.to_timedelta(rng.integers(0, 9, n) * 6, unit="h"),
            "dose": rng.integers(0, 6, n) / 4,
            "station": rng.choice(["north", "south", "east"], n),
            "kind": pd.Categorical(rng.choice(["x", "y"], n), categories=["y", "x", "never"]),
            "treated": rng.random(n) < 0.5,
            "batch": rng.choice([2, 4, 10], n),
        }
    )
    y = frame["dose"] * (frame["station"] == "north") + frame["treated"] + 0.1 * rng.normal(size=n)
    return frame, y.to_numpy()


def test_a_table_of_datetimes_floats_strings_categories_booleans_and_integers_is_fitted():
    frame, y = mixed_table()
    model = FunBaT(form="cp", **QUICK | {"rank": 1}).fit(frame, y)
    kinds = [type(axis) for axis in model.axes_]
    assert kinds == [pt.ContinuousAxis] * 2 + [pt.CategoricalAxis] * 4
    assert model.score(frame, y) > 0.5
    assert np.array_equal(model.predict(frame[frame.columns[::-1]]), model.predict(frame))
    when, _ = model.factor("when", at=[pd.Timestamp("2024-02-28 01:30"), pd.Timestamp("2030-01-01")])
    assert np.isfinite(when).all()
    with pytest.warns(UnknownLabelWarning, match=r"'kind' .* \('never'\)"):  # a category without rows
        mean, std = model.factor("kind", at=["never"])
    kind = {name: value[0] for name, value in model.hyperparameters_["kind"].items()}
    assert np.isfinite(mean[0, 0])
    assert kind["variance"] < std[0, 0] ** 2 < kind["variance"] + kind["mean_variance"]


def test_integers_can_be_continuous_and_floats_categorical():
    X = np.column_stack([np.arange(30) % 6, (np.arange(30) % 5) / 2])
    axes = [pt.ContinuousAxis("mode_0", pt.Matern(2.5)), pt.CategoricalAxis("mode_1")]
    model = FunBaT(form="cp", axes=axes, **QUICK).fit(X, X[:, 0] + X[:, 1])
    assert list(model.hyperparameters_["mode_0"]) == ["lengthscale", "variance"]
    assert list(model.hyperparameters_["mode_1"]) == ["variance", "mean_variance"]
    assert model.axes_[0].kernel.nu == 2.5
    assert np.isfinite(model.predict([[2.5, 1.0]])).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_one_to_five_modes_are_fitted(form, K):
    rng = np.random.default_rng(K)
    X = np.column_stack([rng.integers(0, 3, 80) + (0.5 if k == 0 else 0.0) for k in range(K)]).astype(object)
    for k in range(1, K):
        X[:, k] = [f"label {int(x)}" for x in X[:, k]]
    X[:, 0] = X[:, 0].astype(float)
    y = sum(np.array([0.0, 1.0, -1.0])[pd.factorize(X[:, k])[0]] for k in range(K)) + 0.05 * rng.normal(size=80)
    model = FunBaT(form=form, **QUICK | {"rank": 1}).fit(X, y)
    assert model.rank_ == (1,) * K
    assert model.score(X, y) > 0.9
    assert (model.predict(X, return_std=True)[1] > 0).all()


def test_ranks_may_differ_between_modes_in_tucker():
    model = FunBaT(form="tucker", **QUICK | {"rank": (3, 2)}).fit(X, Y)
    assert (model.rank_, model.core_.shape) == ((3, 2), (4, 3))
    assert (model.factor("time")[0].shape, model.factor("cell")[0].shape) == ((12, 3), (4, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("X", "y"),
    [
        ([[1.5, "a"]], [3.0]),
        ([[1.5, "a"], [1.5, "a"]], [3.0, 4.0]),
        ([[1.5, "a"], [1.5, "b"], [1.5, "c"]], [3.0, 4.0, 3.5]),
        ([[1.5, "a"], [2.5, "a"], [4.5, "a"]], [3.0, 4.0, 3.5]),
        ([[0.5, "a"], [1.5, "b"], [2.5, "a"]], [7.0, 7.0, 7.0]),
    ],
    ids=["one row", "one cell", "one coordinate", "one label", "constant y"],
)
def test_degenerate_tables_give_finite_results_around_the_mean(form, X, y):
    model = FunBaT(form=form, **QUICK | {"rank": 1}).fit(X, y)
    mean, std = model.predict([*X, [9.5, "a"]], return_std=True)
    assert np.isfinite(mean).all()
    assert (std > 0).all()
    assert (np.abs(mean - np.mean(y)) <= 3 * std).all()
    assert np.isfinite(model.bound_history_).all()


def test_no_row_gives_no_prediction(case):
    mean, std = case.model.predict(NEW[:0], return_std=True)
    assert mean.shape == std.shape == (0,)
    assert case.model.sample_y(NEW[:0], 2).shape == (0, 2)


@pytest.mark.parametrize(("policy", "expected"), [("observations", 6), ("sum", 3), ("mean", 3)])
def test_duplicates_are_observations_or_merged(policy, expected):
    X, y = [["a", 0.5], ["b", 0.5], ["a", 1.5]] * 2, [1.0, 2.0, 3.0, 3.0, 4.0, 5.0]
    model = FunBaT(form="cp", duplicates=policy, **QUICK | {"rank": 1}).fit(X, y)
    assert model._state.n_rows == expected
    assert model.y_mean_ == pytest.approx(6.0 if policy == "sum" else 3.0)
    if policy != "observations":
        merged = np.array([4.0, 6.0, 8.0]) / (1 if policy == "sum" else 2)
        again = FunBaT(form="cp", **QUICK | {"rank": 1}).fit(X[:3], merged)
        assert np.array_equal(again.predict(X), model.predict(X))


def test_the_cpu_can_be_asked_for():
    model = FunBaT(form="cp", device="cpu", **QUICK).fit(X, Y)
    assert {factor.mean.device.type for factor in model._state.factors} == {"cpu"}
    mean, std = FunBaT(form="cp", device="auto", **QUICK).fit(X, Y).predict(NEW, return_std=True)
    np.testing.assert_allclose(model.predict(NEW, return_std=True), (mean, std), rtol=1e-6)  # on a GPU, too


# Parameters


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"form": "parafac"}, 'form: expected "cp" or "tucker", got \'parafac\''),
        ({"rank": 0}, "rank: expected integers of at least 1, got 0"),
        ({"rank": 1.5}, "rank: expected integers of at least 1, got 1.5"),
        ({"rank": True}, "rank: expected integers of at least 1, got True"),
        ({"rank": (1, 2, 3)}, "rank: expected one number or 2, one for each mode, got (1, 2, 3)"),
        ({"rank": "2"}, "rank: expected one number or 2, one for each mode, got '2'"),
        ({"rank": 5, "form": "tucker"}, "rank: expected at most 4 for mode 'cell', which has 4 distinct coordinates"),
        ({"rank": (2, 1), "form": "cp"}, 'rank: expected the same rank for all modes with form="cp", got (2, 1)'),
        ({"damping": 1.0}, "damping: expected a number in [0, 1), got 1.0"),
        ({"damping": -0.1}, "damping: expected a number in [0, 1), got -0.1"),
        ({"damping": math.nan}, "damping: expected a number in [0, 1), got nan"),
        ({"damping": "0.5"}, "damping: expected a number in [0, 1), got '0.5'"),
        ({"tol": -1e-3}, "tol: expected a number >= 0, got -0.001"),
        ({"tol": math.nan}, "tol: expected a number >= 0, got nan"),
        ({"tol": None}, "tol: expected a number >= 0, got None"),
        ({"n_init": 0}, "n_init: expected an integer of at least 1, got 0"),
        ({"n_init": 1.5}, "n_init: expected an integer of at least 1, got 1.5"),
        ({"max_iter": 0}, "max_iter: expected an integer of at least 1, got 0"),
        ({"max_iter": 2.5}, "max_iter: expected an integer of at least 1, got 2.5"),
        ({"max_iter": "9"}, "max_iter: expected an integer of at least 1, got '9'"),
        ({"likelihood": "cauchy"}, "likelihood: expected a Likelihood or one of ['gaussian', 'student-t', "),
        ({"likelihood": "poisson"}, "y: expected"),
        ({"calibration": 1.0}, 'calibration: expected "auto" or a share in [0, 1), got 1.0'),
        ({"calibration": "no"}, "calibration: expected \"auto\" or a share in [0, 1), got 'no'"),
        ({"relevance_prior": (-1.0, 0.0)}, "relevance_prior: expected two numbers >= 0 (shape, rate), got (-1.0, 0.0)"),
        ({"noise_prior": (1.0, 0.0)}, "noise_prior: expected two positive numbers (shape, rate), got (1.0, 0.0)"),
        ({"noise_prior": (1.0,)}, "noise_prior: expected two positive numbers (shape, rate), got (1.0,)"),
        ({"noise_prior": 1.0}, "noise_prior: expected two positive numbers (shape, rate), got 1.0"),
        ({"random_state": "0"}, "random_state: expected None, an integer >= 0 or a NumPy generator, got '0'"),
        ({"random_state": -1}, "random_state: expected None, an integer >= 0 or a NumPy generator, got -1"),
        ({"duplicates": "error"}, "X: expected distinct coordinates (duplicates='error'), got row"),
        ({"device": "gpu"}, 'device: expected "auto", "cpu", "cuda" or another that torch knows, got \'gpu\''),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_bad_parameter_is_named_with_what_was_expected_and_what_came(params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FunBaT(**QUICK | params).fit(X, Y)


def test_a_cp_rank_may_exceed_the_size_of_a_mode():
    assert FunBaT(form="cp", **QUICK | {"rank": 5}).fit(X, Y).rank_ == (5, 5)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.predict(X),
        lambda model: model.factor("time"),
        lambda model: model.main_effect("time"),
        lambda model: model.bound_,
        lambda model: model.noise_std_,
        lambda model: model.core_,
        lambda model: model.hyperparameters_,
        lambda model: model.save("never.model"),
    ],
    ids=["predict", "factor", "main_effect", "bound_", "noise_std_", "core_", "hyperparameters_", "save"],
)
def test_use_before_fit_says_so(use):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        use(FunBaT())


def test_a_refit_with_a_bad_parameter_leaves_the_earlier_fit():
    model = FunBaT(form="cp", **QUICK).fit(X, Y)
    before = model.predict(NEW)
    with pytest.raises(ValueError, match="max_iter"):
        model.set_params(max_iter=0).fit(X.assign(time=X["time"] + 50.0), 100.0 * Y)
    assert np.array_equal(model.predict(NEW), before)


@pytest.mark.parametrize("form", FORMS)
def test_without_learning_hyperparameters_keep_their_starts(form):
    model = FunBaT(form=form, learn_hyperparameters=False, **QUICK).fit(X, Y)
    n_functions = 3 if form == "cp" else 2
    np.testing.assert_allclose(model.hyperparameters_["time"]["lengthscale"], [10.0 / 5] * n_functions)
    np.testing.assert_array_equal(model.hyperparameters_["time"]["variance"], 1.0)
    np.testing.assert_array_equal(model.hyperparameters_["cell"]["variance"], 1.0)


def test_learning_hyperparameters_raises_the_bound(case):
    fixed = FunBaT(form=case.form, main_effects=case.main_effects, learn_hyperparameters=False, **QUICK).fit(X, Y)
    assert case.model.bound_ > fixed.bound_ + 1.0


@pytest.mark.parametrize("form", FORMS)
def test_damping_ends_where_no_damping_ends(form):
    settings = QUICK | {"rank": 1, "learn_hyperparameters": False, "tol": 1e-3}
    plain = FunBaT(form=form, **settings).fit(X, Y)
    damped = FunBaT(form=form, damping=0.5, **settings).fit(X, Y)
    assert damped.bound_history_[0] < plain.bound_history_[0]
    assert damped.bound_ == pytest.approx(plain.bound_, abs=4.0)
    np.testing.assert_allclose(damped.predict(NEW), plain.predict(NEW), atol=0.08)


def test_damping_keeps_its_share_of_the_old_message():
    def sites(damping):
        with pytest.warns(ConvergenceWarning):
            model = FunBaT(form="cp", damping=damping, **QUICK | {"max_iter": 1}).fit(X, Y)
        return model._state.factors[model._model.blocks[0]].sites

    # From no message at all, the first update of the mode that comes first is the share of the new one.
    for old, new in zip(sites(0.0), sites(0.75), strict=True):
        torch.testing.assert_close(new, 0.25 * old)


@pytest.mark.parametrize("make", [np.random.default_rng, np.random.RandomState])
def test_a_numpy_generator_seeds_the_start(make):
    first, second = (FunBaT(form="cp", **QUICK | {"random_state": make(4)}).fit(X, Y) for _ in range(2))
    assert same(first, second)


# Output, files, scikit-learn


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_only_where_asked_for(progress, monkeypatch, capsys):
    monkeypatch.setattr(message_passing, "SHOW_AFTER", 0.0)
    FunBaT(form="cp", **QUICK | {"progress": progress, "learn_hyperparameters": False}).fit(X, Y)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("sweeps" in err) == progress


def test_a_model_can_be_pickled(case):
    buffer = io.BytesIO()
    joblib.dump(case.model, buffer)
    buffer.seek(0)
    assert same(joblib.load(buffer), case.model)
    assert same(pickle.loads(pickle.dumps(case.model)), case.model)


def test_a_saved_model_is_the_same_model(case, tmp_path):
    case.model.save(tmp_path / "a.model")
    loaded = pt.load(tmp_path / "a.model")
    assert same(loaded, case.model)
    for name in ("bound_history_", "n_iter_", "converged_", "stop_reason_", "noise_std_", "rank_", "y_mean_", "axes_"):
        assert getattr(loaded, name) == getattr(case.model, name)
    params = {name: tuple(x) if isinstance(x, list) else x for name, x in loaded.get_params().items()}
    assert params == case.model.get_params()  # a tuple comes back as a list
    assert np.array_equal(loaded.sample_y(NEW, 3), case.model.sample_y(NEW, 3))
    assert all(np.array_equal(*pair) for pair in zip(loaded.factor("time"), case.model.factor("time"), strict=True))
    loaded.save(tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_parameters_of_numpy_can_be_saved(tmp_path):
    rng = np.random.default_rng(0)
    params = {"rank": np.int64(1), "tol": np.float64(10.0), "damping": np.float32(0.0), "random_state": rng}
    axes = [pt.ContinuousAxis("time", pt.Matern(0.5))]
    FunBaT(form="cp", axes=axes, **QUICK | params).fit(X, Y).save(tmp_path / "a.model")
    loaded = pt.load(tmp_path / "a.model")
    assert (loaded.rank, loaded.tol, loaded.random_state, loaded.axes[0].kernel.nu) == (1, 10.0, None, 0.5)
    assert loaded.fit(X, Y).score(X, Y) > 0.5  # and it can be fitted anew


def test_clone_copies_the_parameters_and_no_fit(cp):
    copy = clone(cp)
    assert copy.get_params() == cp.get_params()
    assert not hasattr(copy, "axes_")
    assert same(copy.fit(X, Y), cp)


def test_the_default_parameters_are_stored_as_they_are():
    assert FunBaT().get_params() == {
        "rank": 6,
        "form": "cp",
        "axes": None,
        "likelihood": "student-t",
        "nugget": True,
        "main_effects": True,
        "calibration": "auto",
        "max_iter": 200,
        "tol": 1e-3,
        "n_init": 3,
        "damping": 0.0,
        "learn_hyperparameters": True,
        "relevance_prior": (1.0, 0.001),
        "noise_prior": (1.0, 1.0),
        "duplicates": "observations",
        "device": "auto",
        "random_state": None,
        "progress": True,
    }


def test_cross_validation_and_a_search_over_ranks_work_on_data_frames():
    fast = QUICK | {"learn_hyperparameters": False}
    scores = cross_val_score(FunBaT(form="cp", **fast), X, Y, cv=3)
    assert scores.shape == (3,)
    assert (scores > 0.8).all()
    search = GridSearchCV(FunBaT(**fast), {"rank": [1, (2, 1)], "form": ["tucker"]}, cv=2).fit(X, Y)
    assert search.best_params_["rank"] in (1, (2, 1))
    assert search.predict(NEW).shape == (len(NEW),)


def test_a_model_of_a_gpu_loads_on_a_machine_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = np.array([[0.0], [0.5], [1.0]]), np.array([0.0, 1.0, 0.5])
    model = FunBaT(rank=1, form="cp", device="cpu", tol=1.0, progress=False).fit(X, y)
    model.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model.save(tmp_path / "gpu.model")
    loaded = pt.load(tmp_path / "gpu.model")
    assert loaded.device == "cpu"
    np.testing.assert_array_equal(loaded.predict(X), model.set_params(device="cpu").predict(X))


def test_axes_that_are_no_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match=r"axes: expected a sequence .* got ContinuousAxis"):
        FunBaT(axes=pt.ContinuousAxis("a")).fit([[0.0], [1.0]], [0.0, 1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changed", [{"form": "cp"}, {"form": "tucker"}, {"main_effects": False}, {"device": "meta"}])
def test_parameters_set_after_the_fit_do_not_touch_what_was_fitted(
    form: str, changed: dict[str, object], tmp_path: Path
) -> None:
    X, y = table()
    model = FunBaT(form=form, **QUICK).fit(X, y)
    mean, (effect, _) = model.predict(X), model.main_effect("cell")
    model.set_params(**changed)
    np.testing.assert_array_equal(model.predict(X), mean)
    np.testing.assert_array_equal(model.main_effect("cell")[0], effect)
    if "device" not in changed:
        model.save(tmp_path / "model")
        loaded = pt.load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.predict(X), mean)
        np.testing.assert_array_equal(loaded.main_effect("cell")[0], effect)


def test_a_category_without_a_row_is_flagged_and_has_the_prior(tmp_path: Path) -> None:
    X, y = table()
    X["cell"] = pd.Categorical(X["cell"], categories=[*EFFECT, "z"])
    model = FunBaT(form="cp", **QUICK).fit(X, y)
    new = pd.DataFrame({"time": [0.0, 0.0, 0.0], "cell": ["a", "z", "q"]})
    model.save(tmp_path / "model")
    for fitted in (model, pt.load(tmp_path / "model")):
        assert fitted.unknown(new)["cell"].tolist() == [False, True, True]
        with pytest.warns(UnknownLabelWarning, match=r"2 rows have labels of 'cell' .*\('z', 'q'\)"):
            mean, std = fitted.predict(new, return_std=True)
        assert mean[1] == mean[2]
        assert std[1] == std[2] > std[0]
    with pytest.warns(UnknownLabelWarning, match="'z'"):
        model.factor("cell", at=["z"])


def test_predictions_at_many_coordinates_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = table()
    model = FunBaT(form="cp", **QUICK).fit(X, y)
    new = pd.DataFrame({"time": np.linspace(-1, 11, 50), "cell": ["a", "b"] * 25})
    whole = model.predict(new, return_std=True)
    sizes = []
    process = model._model.functions[0]
    at = type(process).at
    monkeypatch.setattr(functional_tucker, "CHUNK", 1000)
    monkeypatch.setattr(
        type(process), "at", lambda self, h, s, p, where: sizes.append(len(where)) or at(self, h, s, p, where)
    )
    pieces = model.predict(new, return_std=True)
    assert max(sizes) * 6 * 6 <= 1000  # three functions of two state entries
    for a, b in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_core_that_would_not_fit_into_memory_is_refused() -> None:
    X = pd.DataFrame({f"mode {k}": np.arange(40.0) for k in range(5)})
    with pytest.raises(ValueError, match=r"rank: expected a core of at most 8,000 entries .* got 10: 161,051 entries"):
        FunBaT(rank=10, form="tucker").fit(X, np.arange(40.0))


def test_a_flag_of_numpy_is_a_flag() -> None:
    X, y = table()
    np.testing.assert_array_equal(
        FunBaT(main_effects=np.False_, **QUICK).fit(X, y).predict(X),
        FunBaT(main_effects=False, **QUICK).fit(X, y).predict(X),
    )


def test_a_fit_leaves_the_thread_count_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(10):
            assert torch.get_num_threads() == 1
            with threads_for(10):  # a second fit under way
                pass
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with threads_for(MANY_ROWS):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Likelihoods


def made_of(likelihood: str, n: int = 160, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Values of the kind that a likelihood takes, many cells in several rows."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"time": rng.integers(0, 10, n) / 2, "cell": rng.choice(list(EFFECT), n)})
    f = np.sin(frame["time"]) + 0.7 * frame["cell"].map(EFFECT).to_numpy()
    match likelihood:
        case "poisson":
            return frame, rng.poisson(np.exp(f)).astype(float)
        case "negative-binomial":
            return frame, rng.poisson(np.exp(f) * rng.gamma(2.0, 0.5, n)).astype(float)
        case "bernoulli":
            return frame, (rng.random(n) < 1 / (1 + np.exp(-3 * f))).astype(float)
    return frame, (f + 0.1 * rng.standard_t(4, n)).to_numpy()


LIKELIHOODS = {
    "gaussian": "gaussian",
    "gaussian without nugget": "gaussian",
    "student-t": "student-t",
    "student-t without nugget": "student-t",
    "learned dof": StudentT(),
    "infinite dof": StudentT(dof=math.inf),
    "poisson": "poisson",
    "negative-binomial": "negative-binomial",
    "bernoulli": "bernoulli",
    "Poisson()": Poisson(),
}
COUNTS = ("poisson", "negative-binomial", "Poisson()")


class Fit(NamedTuple):
    name: str
    model: FunBaT
    X: pd.DataFrame
    y: np.ndarray


@pytest.fixture(scope="module", params=LIKELIHOODS)
def any_likelihood(request: pytest.FixtureRequest) -> Fit:
    name = request.param
    X, y = made_of("poisson" if name == "Poisson()" else name)
    settings = QUICK | {"rank": 1, "nugget": "without nugget" not in name}
    return Fit(name, FunBaT(likelihood=LIKELIHOODS[name], **settings).fit(X, y), X, y)


def test_every_likelihood_fits_predicts_and_samples(any_likelihood):
    _, model, X, y = any_likelihood
    mean, std = model.predict(X, return_std=True)
    assert np.isfinite(mean).all()
    assert (std > 0).all()
    assert np.corrcoef(mean, y)[0, 1] > 0.6
    lower, upper = model.predict_interval(X, 0.9)
    assert (lower <= upper).all()
    assert 0.8 <= pt.metrics.coverage(y, lower, upper) <= 1.0
    quantiles = model.predict_quantiles(X, [0.1, 0.5, 0.9])
    assert (np.diff(quantiles, axis=1) >= 0).all()
    drawn = model.sample_y(X[:20], 400, random_state=0)
    assert drawn.shape == (20, 400)
    np.testing.assert_allclose(drawn.mean(axis=1), mean[:20], atol=5 * (std[:20] / 20).max())
    assert np.isfinite(model.log_prob(X, y)).all()
    assert model.log_prob(X, y).mean() > model.log_prob(X, np.roll(y, 7)).mean()
    assert np.isfinite(model.bound_history_).all()


def test_predictions_are_of_the_kind_of_the_values(any_likelihood):
    name, model, X, _ = any_likelihood
    mean, drawn = model.predict(X), model.sample_y(X, 20)
    if name in COUNTS:
        assert (mean > 0).all()
        assert (drawn == drawn.round()).all()
        assert drawn.min() >= 0
        assert model.predict_interval(X)[0].min() >= 0
    elif name == "bernoulli":
        assert ((mean > 0) & (mean < 1)).all()
        assert set(np.unique(drawn)) == {0.0, 1.0}
        np.testing.assert_allclose(model.predict(X, return_std=True)[1], np.sqrt(mean * (1 - mean)), rtol=1e-12)
    else:
        assert (model.y_mean_, model.y_scale_) != (0.0, 1.0)
        assert model.noise_std_ > 0
        assert (model.nugget_std_ > 0) == ("without nugget" not in name)
        return
    assert (model.y_mean_, model.y_scale_) == (0.0, 1.0)
    with pytest.raises(AttributeError, match="has no noise variance"):
        _ = model.noise_std_


def test_a_saved_model_of_every_likelihood_gives_the_same_bits(any_likelihood, tmp_path):
    _, model, X, y = any_likelihood
    model.save(tmp_path / "a.model")
    loaded = pt.load(tmp_path / "a.model")
    new = pd.concat([X, pd.DataFrame({"time": [0.25, 9.0], "cell": ["a", "d"]})])

    def results(fitted: FunBaT) -> list[np.ndarray]:
        numbers = [*fitted.predict(new, return_std=True), *fitted.predict_interval(new), fitted.sample_y(new, 3)]
        numbers += [fitted.predict_quantiles(new, [0.01, 0.7]), fitted.log_prob(X, y), fitted.relevance_]
        return [*numbers, *fitted.factor("time"), *fitted.main_effect("cell", at=["a", "b"])]

    for a, b in zip(results(loaded), results(model), strict=True):
        assert a.tobytes() == b.tobytes()
    assert loaded.likelihood == model.likelihood
    assert loaded.phase_starts_ == model.phase_starts_
    loaded.save(tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert np.array_equal(loaded.fit(X, y).predict(new), model.predict(new))  # and it can be fitted anew


def test_a_calibrated_model_is_saved_with_its_calibration(tmp_path):
    X, y = made_of("student-t", n=2100)
    model = FunBaT(**QUICK | {"rank": 1}).fit(X, y)
    assert model._observation.calibration
    model.save(tmp_path / "model")
    loaded = pt.load(tmp_path / "model")
    for a, b in zip(loaded.predict_interval(X), model.predict_interval(X), strict=True):
        assert a.tobytes() == b.tobytes()
    assert loaded.sample_y(X[:9], 5).tobytes() == model.sample_y(X[:9], 5).tobytes()


def test_heavy_tails_recover_what_outliers_hide_from_a_gaussian():
    settings = QUICK | {"n_init": 3, "tol": 1e-3, "calibration": 0, "nugget": False, "relevance_prior": (0.0, 0.0)}
    errors = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        X = pd.DataFrame({"time": rng.integers(0, 25, 500) / 2, "cell": rng.choice(list(EFFECT), 500)})
        clean = np.sin(X["time"]) * (1 + 0.5 * X["cell"].map(EFFECT)) + X["cell"].map(EFFECT)
        y = clean + 0.2 * rng.normal(size=500) + np.where(rng.random(500) < 0.08, rng.normal(size=500) * 15, 0.0)
        models = [FunBaT(likelihood=likelihood, **settings).fit(X, y) for likelihood in ("gaussian", "student-t")]
        errors.append([pt.metrics.rmse(clean, model.predict(X)) for model in models])
    gaussian, heavy = np.array(errors).T
    assert (heavy < 0.75 * gaussian).all()
    # What each cell has of the wave (root mean square 0.39) is lost for about every second seed, since the best start
    # is chosen while tails are still light; nothing else is, and where it is found, it is found well.
    assert heavy.max() < 0.45
    assert (heavy < 0.1).sum() >= 2


def repeated_table(seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """Cells of large residuals, each in eight rows of little noise; and cells that were left out."""
    rng = np.random.default_rng(seed)
    grid = pd.MultiIndex.from_product([np.arange(12) / 2, list("abcdef")], names=["time", "cell"]).to_frame(index=False)
    grid = grid.sample(frac=1.0, random_state=seed).reset_index(drop=True)
    level = np.sin(grid["time"]) + 0.4 * rng.normal(size=len(grid))
    seen, new = grid[:56], grid[56:]
    X = seen.loc[seen.index.repeat(8)].reset_index(drop=True)
    y = level[:56].repeat(8).to_numpy() + 0.1 * rng.normal(size=len(X))
    return X, y, new


@pytest.mark.parametrize("likelihood", ["gaussian", "student-t"])
def test_a_seen_cell_has_a_narrower_interval_than_a_new_one(likelihood):
    X, y, new = repeated_table()
    model = FunBaT(likelihood=likelihood, **QUICK | {"rank": 1, "tol": 1e-3}).fit(X, y)
    assert model.noise_std_ == pytest.approx(0.1, rel=0.4)
    assert model.nugget_std_ > 2 * model.noise_std_
    seen = X.drop_duplicates()
    widths = [np.diff(model.predict_interval(cells), axis=0)[0] for cells in (seen, new)]
    assert np.median(widths[0]) < 0.6 * np.median(widths[1])
    assert widths[0].max() < widths[1].min() or likelihood == "student-t"
    # What its rows agree on is predicted, not smoothed away.
    level = pd.Series(y).groupby([X["time"], X["cell"]]).mean()
    known = level.loc[list(seen.itertuples(index=False, name=None))].to_numpy()
    assert pt.metrics.rmse(known, model.predict(seen)) < 0.1
    without = FunBaT(likelihood=likelihood, nugget=False, **QUICK | {"rank": 1, "tol": 1e-3}).fit(X, y)
    assert pt.metrics.rmse(known, without.predict(seen)) > 0.15
    assert without.nugget_std_ == 0.0


def test_rows_that_are_all_of_new_cells_have_no_residual_of_cells():
    X, y = [[0.5 * i, "abc"[i % 3]] for i in range(40)], np.sin(0.5 * np.arange(40))
    assert FunBaT(**QUICK | {"rank": 1}).fit(X, y).nugget_std_ == 0.0


# Relevance


@pytest.mark.parametrize("likelihood", ["gaussian", "student-t"])
def test_a_planted_rank_of_two_is_found_among_six(likelihood):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 40, (1200, 2)) / 4
    y = 3 * np.sin(X[:, 0]) * np.cos(X[:, 1]) + 2 * np.cos(0.5 * X[:, 0]) * np.sin(1.5 * X[:, 1])
    settings = {"calibration": 0, "nugget": False, "random_state": 2, "progress": False}
    model = FunBaT(rank=6, likelihood=likelihood, **settings).fit(X, y + 0.3 * rng.normal(size=1200))
    assert model.effective_rank_ == 2
    assert model.relevance_.shape == (model.rank_[0],)
    assert (np.diff(model.relevance_) <= 0).all()
    # 3 sin cos and 2 cos sin have root mean squares of about 1.5 and 1; main effects take or give a part.
    assert (model.relevance_[:2] > 0.8).all()
    assert (model.relevance_[2:] < 0.01 * model.y_scale_).all()


def test_relevance_is_the_root_mean_square_of_each_product_of_functions(cp):
    cells = X.drop_duplicates()  # entries of the tensor: a cell in several rows is one
    total = np.ones((len(cells), cp.rank_[0]))
    for name in ("time", "cell"):
        mean, std = cp.factor(name, at=cells[name])
        total *= mean**2 + std**2
    expected = np.sort(np.sqrt(total.mean(axis=0)))[::-1] * cp.y_scale_
    np.testing.assert_allclose(cp.relevance_, expected, rtol=1e-7)


def test_tucker_has_no_relevance(tucker):
    assert tucker.relevance_.shape == (0,)
    assert tucker.effective_rank_ == 0


# Weights and known errors


@pytest.mark.parametrize("name", ["sample_weight", "noise_std"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_a_weight_that_is_no_positive_number_is_refused_by_name(name, bad):
    given = np.ones(len(Y))
    given[[5, 9]] = bad
    with pytest.raises(ValueError, match=rf"^{name}: expected finite numbers above 0, got {bad} at row 5"):
        FunBaT(**QUICK).fit(X, Y, **{name: given})


@pytest.mark.parametrize("likelihood", ["poisson", "negative-binomial", "bernoulli"])
def test_counts_and_binary_values_have_no_known_errors(likelihood):
    X, y = made_of(likelihood)
    with pytest.raises(ValueError, match=r'^noise_std: expected None unless values are "gaussian" or "student-t", got'):
        FunBaT(likelihood=likelihood, **QUICK).fit(X, y, noise_std=np.ones(len(y)))


@pytest.mark.parametrize(
    ("likelihood", "bad", "message"),
    [
        ("poisson", 1.5, r"y: expected counts \(whole numbers from 0\), got 1.5"),
        ("negative-binomial", -1.0, r"y: expected counts \(whole numbers from 0\), got -1"),
        ("bernoulli", 2.0, r"y: expected values 0 and 1, got 2"),
    ],
)
def test_values_that_a_likelihood_cannot_give_are_refused(likelihood, bad, message):
    X, y = made_of(likelihood)
    y[3] = bad
    with pytest.raises(ValueError, match=rf"^{message} \(1 such of 160\)"):
        FunBaT(likelihood=likelihood, **QUICK).fit(X, y)


@pytest.mark.parametrize(
    ("likelihood", "nugget"),
    [
        ("gaussian", False),
        ("gaussian", True),
        ("student-t", True),
        ("poisson", False),
    ],
)
def test_a_row_of_weight_two_is_the_row_twice(likelihood, nugget):
    X, y = made_of(likelihood, n=60)
    weight = np.ones(60)
    weight[[3, 8]] = 2.0
    settings = QUICK | {"rank": 1, "calibration": 0, "nugget": nugget}
    if nugget:  # also where no cell would be in several rows without the weights
        X = pd.concat([X, X[:4]], ignore_index=True)
        y, weight = np.r_[y, y[:4]], np.r_[weight, np.ones(4)]
    again = np.r_[np.arange(len(y)), 3, 8]
    weighted = FunBaT(likelihood=likelihood, **settings).fit(X, y, weight)
    twice = FunBaT(likelihood=likelihood, **settings).fit(X.iloc[again].reset_index(drop=True), y[again])
    np.testing.assert_allclose(weighted.bound_history_, twice.bound_history_, rtol=1e-6)
    for a, b in zip(weighted.predict(NEW, return_std=True), twice.predict(NEW, return_std=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_known_errors_make_a_dense_gaussian_process():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0.0, 10.0, 25))
    x[7] = x[6]  # a coordinate twice, of different precision
    std = rng.uniform(0.05, 0.6, 25)
    y = 20.0 + np.sin(x) + std * rng.normal(size=25)
    settings = QUICK | {"rank": 1, "learn_hyperparameters": False, "nugget": False, "likelihood": "gaussian"}
    axes = [pt.ContinuousAxis("mode_0", pt.Matern(1.5))]
    model = FunBaT(axes=axes, **settings).fit(x[:, None], y, noise_std=std)
    length = model.hyperparameters_["mode_0"]["lengthscale"][0]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        scaled = math.sqrt(3.0) * np.abs(a[:, None] - b[None, :]) / length
        return model.y_scale_**2 * (1 + scaled) * np.exp(-scaled)

    at = np.array([-1.0, x[0], 3.3, x[6], 12.0])
    gram = np.linalg.inv(kernel(x, x) + np.diag(std**2))
    cross = kernel(at, x)
    mean, deviation = model.predict(at[:, None], return_std=True)
    np.testing.assert_allclose(mean, model.y_mean_ + cross @ gram @ (y - model.y_mean_), rtol=1e-8)
    latent = model.y_scale_**2 - np.einsum("ij,jk,ik->i", cross, gram, cross)
    np.testing.assert_allclose(deviation**2, latent + np.mean(std**2), rtol=1e-7)  # a new row: a typical error
    assert model.noise_std_ == pytest.approx(np.sqrt(np.mean(std**2)))


def test_precise_rows_outweigh_others():
    X, y = (
        [[0.5, "a"], [0.5, "a"], [1.5, "b"], [2.5, "b"], [0.5, "b"], [1.5, "a"]] * 3,
        np.tile([1.0, 3, 0, 0, 0, 0], 3),
    )
    std = np.tile([0.01, 1.0, 0.5, 0.5, 0.5, 0.5], 3)
    model = FunBaT(**QUICK | {"rank": 1}).fit(X, y, noise_std=std)
    assert model.predict([[0.5, "a"]])[0] == pytest.approx(1.0, abs=0.1)
