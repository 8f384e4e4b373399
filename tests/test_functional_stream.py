"""Rows folded in batch by batch: exact where the model is linear and Gaussian, close elsewhere, nothing forgotten."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
from torch import Tensor

import probtensor as pt
from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.estimator import UnknownLabelWarning
from probtensor.inference import kalman
from probtensor.inference.kalman import Sites
from probtensor.kernels import Linear, Matern, Periodic, White
from probtensor.likelihoods import StudentT
from probtensor.models import FunBaT
from probtensor.models.latent_functions import ExchangeableRows, GaussianProcess, LatentFunctions, Moments

KNOWN = {
    "rank": 1,
    "main_effects": False,
    "learn_hyperparameters": False,
    "n_init": 1,
    "tol": 1e-12,
    "max_iter": 60,
    "random_state": 0,
    "progress": False,
    "calibration": 0,
}
SETTINGS = {"rank": 2, "n_init": 1, "random_state": 0, "progress": False, "calibration": 0}


def series(n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 10, n)).round(1)[:, None]
    return x, np.sin(x[:, 0]) + 0.1 * rng.normal(size=n), np.full(n, 0.1)


def test_batches_of_one_mode_of_known_noise_equal_the_fit_of_all_rows() -> None:
    """With equal units and fixed noise the posterior of all batches is that of all rows, to rounding."""
    x, y, std = series(40)
    y = np.r_[y, -y]  # every batch has mean zero and one spread, so that all units agree
    x, std = np.vstack([x, x]), np.r_[std, std]
    half = np.r_[0:20, 40:60]
    first = np.zeros(80, dtype=bool)
    first[half] = True
    y[~first] *= y[first].std() / y[~first].std()
    ends = np.array([0, 39])
    first[ends] = True
    first[ends + 40] = True
    y[~first] *= math.sqrt((y[first] ** 2).mean() / (y[~first] ** 2).mean())
    model = FunBaT(likelihood="gaussian", nugget=False, **KNOWN)
    model.partial_fit(x[first], y[first], noise_std=std[first])
    model.partial_fit(x[~first], y[~first], noise_std=std[~first])
    whole = FunBaT(likelihood="gaussian", nugget=False, **KNOWN).fit(x, y, noise_std=std)
    assert model.y_scale_ == pytest.approx(whole.y_scale_, rel=1e-12)
    new = np.linspace(-1, 11, 50)[:, None]
    for mine, right in zip(model.predict(new, return_std=True), whole.predict(new, return_std=True), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-8, atol=1e-10)


def table(n: int = 900, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(seed)
    day = np.sort(rng.integers(0, 60, n)) / 2.0
    place = rng.choice(list("abcdef"), n)
    X = pd.DataFrame({"day": day, "place": place})
    level = pd.Series(rng.normal(size=6), index=list("abcdef"))
    residual = pd.Series(0.2 * rng.normal(size=360), index=pd.MultiIndex.from_product([np.arange(60) / 2, level.index]))
    y = 3 + level[place].to_numpy() * (1 + 0.3 * np.sin(day)) + np.cos(day / 3)
    return X, y + residual[list(zip(day, place, strict=True))].to_numpy() + 0.1 * rng.normal(size=n)


def given_by_smoothing_all(f: LatentFunctions, hyper: Tensor, sites: Sites, here: Tensor) -> Callable[[Sites], Moments]:
    """The slow twin of `given`: all coordinates are smoothed whenever a site has moved."""

    def moments(now: Sites) -> Moments:
        everywhere = Sites(*(x.index_copy(0, here, new) for x, new in zip(sites, now, strict=True)))
        return Moments(*(x[here] for x in f.moments(hyper, everywhere, f.posterior(hyper, everywhere)[0])))

    return moments


AXES = [
    [ContinuousAxis("day"), ContinuousAxis("height", kernel=Matern(0.5)), CategoricalAxis("place")],
    [ContinuousAxis("day", kernel=Matern(2.5) + Periodic(7.0, 2) + White()), ContinuousAxis("height", kernel=Linear())],
    [ContinuousAxis("day", kernel=Matern(1.5) + White()), CategoricalAxis("place")],
]


@pytest.mark.parametrize("axes", AXES, ids=["matern", "sum", "white"])
@pytest.mark.parametrize("likelihood", ["student-t", "gaussian"])
@pytest.mark.parametrize("form", ["cp", "tucker"])
def test_smoothing_the_coordinates_of_a_batch_alone_gives_the_posterior_of_smoothing_all(
    axes: Sequence[Axis], likelihood: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches lie inside, before and after what came before, with coordinates old and new, and a new label."""
    X, y = table(400)
    X["height"] = np.random.default_rng(1).integers(0, 40, len(X)) / 8.0
    day, late = X["day"], X["place"] == "f"
    batches = [(day >= 10) & (day < 20) & (day % 1 == 0) & ~late, (day >= 12) & (day < 18), day < 5, day >= 19]
    X = X[[axis.name for axis in axes]]

    def streamed() -> FunBaT:
        settings = SETTINGS | {
            "axes": axes,
            "form": form,
            "likelihood": likelihood,
            "nugget": likelihood == "student-t",
        }
        model = FunBaT(**settings, learn_hyperparameters=False, max_iter=20, tol=1.0)
        for rows in batches:
            model.partial_fit(X[rows], y[rows])
        return model

    ours = streamed()
    monkeypatch.setattr(GaussianProcess, "given", given_by_smoothing_all)
    monkeypatch.setattr(ExchangeableRows, "given", given_by_smoothing_all)
    right = streamed()
    for mine, other in zip(ours.predict(X, return_std=True), right.predict(X, return_std=True), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9)
    for axis in axes:
        for mine, other in zip(ours.factor(axis.name), right.factor(axis.name), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9)
    assert ours.noise_std_ == pytest.approx(right.noise_std_, rel=1e-9)


def test_a_batch_smooths_all_coordinates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = table(200)
    model = FunBaT(learn_hyperparameters=False, **SETTINGS).fit(X[:100], y[:100])
    sizes, smooth = [], kalman.smooth

    def counted(chain: kalman.Chain, sites: Sites) -> kalman.Posterior:
        sizes.append(len(chain.matrix))
        return smooth(chain, sites)

    monkeypatch.setattr(kalman, "smooth", counted)
    model.partial_fit(X[100:], y[100:])
    assert sizes == [model.axes_[0].size]


def test_hyperparameters_take_a_step_when_the_rows_have_become_a_tenth_more() -> None:
    X, y = table(400)
    model = FunBaT(likelihood="gaussian", nugget=False, **SETTINGS).fit(X[:200], y[:200])
    ends = np.arange(200, 320, 4)  # batches of four rows
    moved = []
    for first in ends:
        before = model.hyperparameters_["day"]["lengthscale"]
        model.partial_fit(X[first : first + 4], y[first : first + 4])
        moved.append(not np.array_equal(before, model.hyperparameters_["day"]["lengthscale"]))
    growth = np.log((ends[-1] + 4) / ends[0]) / np.log(1.1)
    assert abs(sum(moved) - growth) < 1


def test_damping_counts_earlier_rows_once() -> None:
    x, y, std = series()
    first = np.arange(60) % 2 == 0
    sigmas = []
    for damping in (0.0, 0.5):
        model = FunBaT(likelihood="gaussian", nugget=False, damping=damping, **KNOWN)
        model.partial_fit(x[first], y[first], noise_std=std[first])
        model.partial_fit(x[~first], y[~first], noise_std=std[~first])
        sigmas.append(model.predict(x, return_std=True)[1])
    np.testing.assert_allclose(*sigmas, rtol=0.01)


@pytest.mark.parametrize("form", ["cp", "tucker"])
@pytest.mark.parametrize("likelihood", ["student-t", "gaussian"])
def test_a_stream_ends_close_to_the_fit_of_all_rows(form: str, likelihood: str) -> None:
    X, y = table()
    test = np.arange(len(y)) % 5 == 0
    settings = SETTINGS | {"form": form, "likelihood": likelihood}
    model = FunBaT(**settings)
    for part in np.array_split(np.flatnonzero(~test), 6):
        model.partial_fit(X.iloc[part], y[part])
    whole = FunBaT(**settings).fit(X[~test], y[~test])
    errors = [np.sqrt(np.mean((m.predict(X[test]) - y[test]) ** 2)) for m in (model, whole)]
    assert errors[0] < 1.15 * errors[1]
    assert model.axes_ == whole.axes_
    lower, upper = model.predict_interval(X[test])
    assert 0.8 < np.mean((lower <= y[test]) & (y[test] <= upper)) < 0.99


def test_new_labels_and_coordinates_are_known_afterwards(tmp_path) -> None:
    X, y = table()
    early = (X["day"] < 10) & (X["place"] != "f")
    model = FunBaT(**SETTINGS).partial_fit(X[early], y[early])
    new = pd.DataFrame({"day": [25.0, 3.0], "place": ["a", "f"]})
    with pytest.warns(UnknownLabelWarning):
        before = model.predict(new, return_std=True)[1]
    model.partial_fit(X[~early], y[~early])
    after = model.predict(new, return_std=True)[1]
    assert (after < before).all()
    assert not model.unknown(new).any().any()
    model.save(tmp_path / "streamed")
    same = pt.load(tmp_path / "streamed")
    assert np.array_equal(same.predict(X), model.predict(X))
    one, other = (m.partial_fit(X[:30], y[:30]).predict(X) for m in (model, same))
    np.testing.assert_array_equal(one, other)


def test_more_rows_of_a_cell_count_as_if_they_had_come_at_once() -> None:
    X, y = table(300)
    model = FunBaT(likelihood=StudentT(dof=math.inf), **SETTINGS).fit(X[:200], y[:200])
    model.partial_fit(X[200:], y[200:])
    seen = model._observation.seen
    cells = X.groupby(["day", "place"], sort=False).size()
    assert len(seen.value) == len(cells)
    assert float(seen.n_rows.sum()) == 300
    means = pd.Series(y).groupby([X["day"], X["place"]]).mean()
    positions = seen.positions.numpy()
    day, place = (axis.decode(axis.encode(axis.distinct[p])) for axis, p in zip(model.axes_, positions.T, strict=True))
    found = seen.value.numpy() * model.y_scale_ + model.y_mean_
    np.testing.assert_allclose(found, means[list(zip(day, place, strict=True))], rtol=1e-10)


def test_the_first_call_is_a_fit_and_bad_batches_change_nothing() -> None:
    X, y = table(200)
    model = FunBaT(**SETTINGS).partial_fit(X, y)
    expected = FunBaT(**SETTINGS).fit(X, y).predict(X)
    np.testing.assert_array_equal(model.predict(X), expected)
    with pytest.raises(ValueError, match="y: expected finite values"):
        model.partial_fit(X, np.full(len(y), np.nan))
    with pytest.raises(ValueError, match="noise_std: expected None, as at first"):
        model.partial_fit(X, y, noise_std=np.ones(len(y)))
    with pytest.raises(ValueError, match=r"X: expected the columns \['day', 'place'\]"):
        model.partial_fit(X[["day"]], y)
    np.testing.assert_array_equal(model.predict(X), expected)
