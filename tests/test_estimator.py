"""The shell of every regressor: what it takes, its units, intervals, densities and draws, against SciPy.

A stub whose latent moments are known stands for the model, so that every number can be checked exactly.
"""

from __future__ import annotations

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.estimator import TensorRegressor, UnknownLabelWarning
from probtensor.kernels import Matern
from probtensor.predictive import NormalMixture
from probtensor.resources import make_generator

LATENT_VARIANCE, NOISE_VARIANCE = 0.36, 0.28
STD = 0.8  # of a standardised value: the square root of their sum


class Known(TensorRegressor):
    """Entries ``mean = slope * x`` of one continuous mode; all share one draw of an offset of `LATENT_VARIANCE`."""

    def __init__(self, axes=None, *, slope=0.5, duplicates="observations", device="cpu", random_state=None):
        self.axes = axes
        self.slope = slope
        self.duplicates = duplicates
        self.device = device
        self.random_state = random_state

    def _fit(self, table, comm, checkpoints):
        if self.slope < 0:
            raise ValueError(f"slope: expected at least 0, got {self.slope}")
        table = table.take(torch.argsort(table.positions[:, 0], stable=True))  # the order of `X`
        self.positions_, self.values_ = table.positions, table.values
        self.count_, self.precision_ = table.count, table.precision

    def _mean(self, where):
        return self.slope * where.encoded[0].double()

    def _predictive(self, where):
        mean = self._mean(where).numpy()
        return NormalMixture(mean, np.full((len(mean), 1), STD), np.ones(1))

    def _draw(self, where, n_samples, generator):
        offset = torch.randn(n_samples, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(n_samples, len(where), generator=generator, dtype=torch.float64)
        return self._mean(where) + LATENT_VARIANCE**0.5 * offset + NOISE_VARIANCE**0.5 * noise

    def _fitted_device(self):
        return torch.device("cpu")

    def to_state(self):
        return {}, {"params": self._params_state()}

    def _restore(self, arrays, meta):
        pass


X = np.array([[0.0], [1.0], [2.0], [3.0]])
Y = np.array([10.0, 14.0, 12.0, 16.0])
Y_MEAN, Y_SCALE = 13.0, 5.0**0.5
NEW = np.array([[0.5], [4.0], [-2.0]])
CENTRE = Y_MEAN + Y_SCALE * 0.5 * NEW[:, 0]


@pytest.fixture
def model() -> Known:
    return Known().fit(X, Y)


def frame() -> pd.DataFrame:
    return pd.DataFrame({"dose": [0.5, 1.5, 0.5, 2.5], "cell": ["a", "b", "b", "a"]})


# Units


def test_values_are_standardised_by_the_training_rows(model):
    assert (model.y_mean_, model.y_scale_) == (Y_MEAN, pytest.approx(Y_SCALE, rel=1e-15))
    np.testing.assert_allclose(model.values_.numpy(), (Y - Y_MEAN) / Y_SCALE, rtol=1e-14)
    assert model.positions_.tolist() == [[0], [1], [2], [3]]


def test_mean_and_std_are_in_the_users_unit(model):
    mean, std = model.predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, CENTRE, rtol=1e-14)
    np.testing.assert_allclose(std, STD * Y_SCALE, rtol=1e-14)
    assert np.array_equal(model.predict(NEW), mean)


@pytest.mark.parametrize("coverage", [0.01, 0.5, 0.9, 0.999])
def test_intervals_are_those_of_a_normal_distribution(model, coverage):
    lower, upper = stats.norm(CENTRE, STD * Y_SCALE).interval(coverage)
    np.testing.assert_allclose(model.predict_interval(NEW, coverage), (lower, upper), rtol=1e-12)


def test_intervals_cover_ninety_percent_by_default(model):
    assert np.array_equal(model.predict_interval(NEW), model.predict_interval(NEW, coverage=0.9))


def test_log_density_is_in_the_users_unit_and_a_missing_value_gives_zero(model):
    y = np.array([12.0, np.nan, -3.0])
    expected = stats.norm(CENTRE, STD * Y_SCALE).logpdf(y)
    expected[1] = 0.0
    np.testing.assert_allclose(model.log_prob(NEW, y), expected, rtol=1e-12)


def test_values_in_a_read_only_column_do_not_warn(model):
    torch.set_warn_always(True)  # else only once a process
    try:
        y = pd.Series([12.0, np.nan, -3.0], index=[5, 6, 7])
        y.to_numpy().flags.writeable = False
        assert model.log_prob(NEW, y)[1] == 0.0
    finally:
        torch.set_warn_always(False)


def test_the_density_integrates_to_one(model):
    grid = np.linspace(-20.0, 50.0, 7001)
    density = np.exp(model.log_prob(np.full((len(grid), 1), 0.5), grid))
    assert integrate.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-9)


def test_score_is_the_share_of_variance_explained(model):
    residual = Y - model.predict(X)
    assert model.score(X, Y) == pytest.approx(1.0 - (residual**2).sum() / ((Y - Y.mean()) ** 2).sum())


@pytest.mark.parametrize(("y", "mean"), [([7.0, 7.0, 7.0], 7.0), ([0.0, 0.0], 0.0), ([-3.5], -3.5), ([0.1] * 11, 0.1)])
def test_values_without_spread_have_scale_one(y, mean):
    model = Known().fit(np.arange(len(y))[:, None] + 0.5, y)
    assert model.y_scale_ == 1.0
    assert model.y_mean_ == pytest.approx(mean, rel=1e-15)
    np.testing.assert_allclose(model.values_.numpy(), 0.0, atol=1e-15)


@pytest.mark.parametrize("quantiles", [[0.5], [0.01, 0.3, 0.975], (), np.array([0.9])], ids=str)
def test_quantiles_are_those_of_a_normal_distribution(model, quantiles):
    found = model.predict_quantiles(NEW, quantiles)
    assert found.shape == (3, len(quantiles))
    expected = CENTRE[:, None] + STD * Y_SCALE * stats.norm.ppf(np.asarray(quantiles, dtype=float))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_ends_of_an_interval_are_quantiles(model):
    lower, upper = model.predict_interval(NEW, 0.8)
    np.testing.assert_allclose(np.c_[lower, upper], model.predict_quantiles(NEW, [0.1, 0.9]), rtol=1e-14)


@pytest.mark.parametrize("quantiles", [0.5, [0.0], [0.2, 1.0], [-0.1], [np.nan], [[0.5]]], ids=str)
def test_quantiles_that_are_no_probabilities_are_refused(model, quantiles):
    with pytest.raises(ValueError, match=r"quantiles: expected probabilities between 0 and 1, got "):
        model.predict_quantiles(NEW, quantiles)


def test_the_predictive_distribution_is_in_the_users_unit(model):
    predictive = model.predictive(NEW)
    assert isinstance(predictive, NormalMixture)
    known = stats.norm(CENTRE, STD * Y_SCALE)
    y = np.array([12.0, -3.0, 14.0])
    np.testing.assert_allclose(predictive.mean, CENTRE, rtol=1e-14)
    np.testing.assert_allclose(predictive.std, STD * Y_SCALE, rtol=1e-14)
    np.testing.assert_allclose(predictive.cdf(y), known.cdf(y), rtol=1e-12)
    np.testing.assert_allclose(predictive.quantile(0.3), known.ppf(0.3), rtol=1e-12)
    grid = np.linspace(-40.0, 60.0, 200_001)[:, None]
    score = integrate.trapezoid((known.cdf(grid) - (grid >= y)) ** 2, grid[:, 0], axis=0)
    np.testing.assert_allclose(predictive.crps(y), score, rtol=1e-3)


def test_the_predictive_distribution_stays_double_where_results_are_single():
    predictive = Known().fit(X, Y.astype(np.float32)).predictive(NEW)
    assert predictive.mean.dtype == predictive.std.dtype == np.float64


# Weights and known errors


def test_rows_without_weights_and_known_errors_have_none(model):
    assert model.count_ is None
    assert model.precision_ is None


def test_weights_reach_the_model_and_its_units():
    weight = np.array([1.0, 3.0, 0.5, 2.0])
    model = Known().fit(X, Y, weight)
    mean = np.average(Y, weights=weight)
    scale = np.average((Y - mean) ** 2, weights=weight) ** 0.5
    assert (model.y_mean_, model.y_scale_) == (pytest.approx(mean, rel=1e-14), pytest.approx(scale, rel=1e-14))
    np.testing.assert_allclose(model.values_.numpy(), (Y - mean) / scale, rtol=1e-13)
    assert model.count_.tolist() == weight.tolist()
    assert model.count_.dtype == torch.float64
    assert model.precision_ is None


def test_a_weight_of_two_standardises_as_the_row_twice():
    twice = Known().fit(np.r_[X, X[:1]], np.r_[Y, Y[:1]])
    weighted = Known().fit(X, Y, sample_weight=[2, 1, 1, 1])
    assert (weighted.y_mean_, weighted.y_scale_) == pytest.approx((twice.y_mean_, twice.y_scale_), rel=1e-14)


def test_known_errors_reach_the_model_in_standardised_units():
    std = [0.1, 2.0, 5.0**0.5, 40.0]
    model = Known().fit(X, Y, noise_std=std)
    np.testing.assert_allclose(model.precision_.numpy(), (Y_SCALE / np.array(std)) ** 2, rtol=1e-14)
    assert model.count_ is None
    assert (model.y_mean_, model.y_scale_) == (Y_MEAN, pytest.approx(Y_SCALE))  # errors do not weigh


@pytest.mark.parametrize(
    "given",
    [
        [1, 2, 3, 4],
        np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        pd.Series([1, 2, 3, 4], index=[9, 8, 7, 6], dtype="Int64"),
    ],
    ids=["list", "float32", "torch", "Series"],
)
def test_numbers_a_row_may_be_any_column(given):
    model = Known().fit(X, Y, given, noise_std=given)
    assert model.count_.tolist() == [1.0, 2.0, 3.0, 4.0]
    np.testing.assert_allclose(
        model.precision_.numpy(), model.y_scale_**2 / np.array([1.0, 4.0, 9.0, 16.0]), rtol=1e-14
    )


def test_weights_given_are_not_changed_and_not_shared():
    weight = np.array([1.0, 3.0, 0.5, 2.0])
    model = Known().fit(X, Y, weight)
    weight[:] = 7.0
    assert model.count_.tolist() == [1.0, 3.0, 0.5, 2.0]


@pytest.mark.parametrize("name", ["sample_weight", "noise_std"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0, 3.0], r"expected shape \(4,\) as X has rows, got \(3,\)"),
        (2.0, r"expected shape \(4,\) as X has rows, got \(\)"),
        (np.ones((4, 1)), r"expected shape \(4,\) as X has rows, got \(4, 1\)"),
        ([1.0, 0.0, 1.0, 1.0], r"expected finite numbers above 0, got 0.0 at row 1"),
        ([1.0, 1.0, -2.0, -3.0], r"expected finite numbers above 0, got -2.0 at row 2"),
        ([np.nan, 1.0, 1.0, 1.0], r"expected finite numbers above 0, got nan at row 0"),
        ([1.0, 1.0, 1.0, np.inf], r"expected finite numbers above 0, got inf at row 3"),
        (pd.Series([1, None, 1, 1], dtype="Int64"), r"expected finite numbers above 0, got nan at row 1"),
    ],
    ids=["short", "number", "column", "zero", "negative", "nan", "inf", "missing"],
)
def test_numbers_a_row_that_do_not_fit_are_refused_by_name(name, given, message):
    with pytest.raises(ValueError, match=rf"^{name}: {message}"):
        Known().fit(X, Y, **{name: given})


@pytest.mark.parametrize("name", ["sample_weight", "noise_std"])
@pytest.mark.parametrize("policy", ["sum", "mean", "error"])
def test_merged_rows_have_no_weights_and_no_known_errors(name, policy):
    with pytest.raises(ValueError, match=rf'^duplicates: expected "observations" with {name}, got \'{policy}\''):
        Known(duplicates=policy).fit(X, Y, **{name: np.ones(4)})


# Draws


def test_draws_have_the_moments_of_predict_and_share_what_is_latent(model):
    draws = model.sample_y(NEW, n_samples=20_000, random_state=1)
    assert draws.shape == (3, 20_000)
    error = STD * Y_SCALE / 20_000**0.5
    np.testing.assert_allclose(draws.mean(axis=1), CENTRE, atol=4 * error)
    np.testing.assert_allclose(draws.std(axis=1), STD * Y_SCALE, rtol=0.02)
    correlation = np.corrcoef(draws)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(correlation, LATENT_VARIANCE / STD**2, atol=0.02)


def test_a_seed_gives_the_same_draws_and_none_gives_others(model):
    first = model.sample_y(NEW, 3, random_state=5)
    assert np.array_equal(first, model.sample_y(NEW, 3, random_state=np.int64(5)))
    assert np.array_equal(model.sample_y(NEW, 3), model.sample_y(NEW, 3, random_state=0))
    assert not np.array_equal(first, model.sample_y(NEW, 3, random_state=6))
    assert not np.array_equal(model.sample_y(NEW, 3, random_state=None), model.sample_y(NEW, 3, random_state=None))


@pytest.mark.parametrize("make", [np.random.default_rng, np.random.RandomState])
def test_a_generator_is_drawn_from_once_a_call(model, make):
    rng, again = make(3), make(3)
    first, second = model.sample_y(NEW, 2, random_state=rng), model.sample_y(NEW, 2, random_state=rng)
    assert np.array_equal(first, model.sample_y(NEW, 2, random_state=again))
    assert np.array_equal(second, model.sample_y(NEW, 2, random_state=again))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("bad", ["0", -1, 1.5, torch.Generator()])
def test_another_kind_of_seed_is_refused(bad):
    with pytest.raises(ValueError, match=r"random_state: expected None, an integer >= 0 or a NumPy generator, got "):
        make_generator(bad)


# Types


@pytest.mark.parametrize(
    ("y", "dtype"),
    [
        (Y.astype(np.float32), np.float32),
        (torch.tensor(Y, dtype=torch.float32), np.float32),
        (pd.Series(Y, dtype="float32"), np.float32),
        (Y, np.float64),
        (Y.astype(int), np.float64),
        (Y.tolist(), np.float64),
        (torch.tensor(Y), np.float64),
        (pd.Series(Y, dtype="Int64"), np.float64),
    ],
    ids=["float32", "torch float32", "Series float32", "float64", "int64", "list", "torch float64", "Series Int64"],
)
def test_results_have_the_precision_of_the_values(y, dtype):
    model = Known().fit(X, y)
    results = [*model.predict(NEW, return_std=True), *model.predict_interval(NEW), model.log_prob(NEW, [1.0, 2.0, 3.0])]
    for result in [*results, model.predict(NEW), model.sample_y(NEW, 2), model.predict_quantiles(NEW, [0.2, 0.7])]:
        assert isinstance(result, np.ndarray)
        assert result.dtype == dtype
    np.testing.assert_allclose(results[0], CENTRE, rtol=1e-6)


# Tables


def test_columns_are_taken_by_name_whatever_their_order():
    model = Known().fit(frame(), Y)
    assert model.feature_names_in_.tolist() == ["dose", "cell"]
    assert (model.n_features_in_, [type(axis) for axis in model.axes_]) == (2, [ContinuousAxis, CategoricalAxis])
    swapped = frame()[["cell", "dose"]]
    assert np.array_equal(model.predict(swapped), model.predict(frame()))
    assert list(model.unknown(swapped).columns) == ["dose", "cell"]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table[["dose"]],
        lambda table: table.assign(extra=1),
        lambda table: table.rename(columns={"cell": "Cell"}),
        lambda table: table.to_numpy(),
    ],
    ids=["missing", "extra", "renamed", "array"],
)
@pytest.mark.parametrize("method", ["predict", "predictive", "predict_interval", "sample_y", "unknown"])
def test_other_columns_than_in_training_are_refused(change, method):
    model, other = Known().fit(frame(), Y), change(frame())
    came = list(other.columns) if isinstance(other, pd.DataFrame) else ["mode_0", "mode_1"]
    with pytest.raises(ValueError, match=re.escape(f"X: expected the columns ['dose', 'cell'], got {came}")):
        getattr(model, method)(other)


@pytest.mark.parametrize(
    ("X_new", "message"),
    [
        (np.zeros((2, 3)), r"X: expected the columns \['mode_0'\], got \['mode_0', 'mode_1', 'mode_2'\]"),
        (np.zeros(2), r"X: expected shape \(n, K\), .* got \(2,\); reshape one mode with X.reshape\(-1, 1\)"),
        ([[1.0], [np.nan]], r"column 'mode_0': expected a finite coordinate in every row, got nan at row 1"),
        ([[np.inf]], r"column 'mode_0': expected a finite coordinate in every row, got inf at row 0"),
        ([["a"]], r"column 'mode_0': expected numbers, datetimes or timedeltas, got "),
    ],
)
def test_wrong_coordinates_are_refused_at_prediction(model, X_new, message):
    with pytest.raises(ValueError, match=message):
        model.predict(X_new)


def test_no_row_gives_no_prediction(model):
    mean, std = model.predict(np.empty((0, 1)), return_std=True)
    assert mean.shape == std.shape == (0,)


@pytest.mark.parametrize(
    ("X_bad", "y_bad", "message"),
    [
        (X, Y[:3], r"y: expected shape \(4,\) as X has rows, got \(3,\)"),
        (X, Y[:, None], r"y: expected shape \(4,\) as X has rows, got \(4, 1\); flatten it with y.ravel\(\)"),
        (X, [1.0, np.nan, 2.0, 3.0], r"y: expected finite values, got nan at row 1"),
        (X, [1.0, 2.0, -np.inf, 3.0], r"y: expected finite values, got -inf at row 2"),
        (X[:0], Y[:0], r"X, y: expected at least one observation, got none"),
        (X[:, 0], Y, r"X: expected shape \(n, K\), one row an observation, got \(4,\)"),
        (X[:, :0], Y, r"X: expected at least one column, got shape \(4, 0\)"),
        (
            np.where(X == 2, np.nan, X),
            Y,
            r"column 'mode_0': expected a finite coordinate in every row, got nan at row 2",
        ),
        (
            np.where(X == 2, np.inf, X),
            Y,
            r"column 'mode_0': expected a finite coordinate in every row, got inf at row 2",
        ),
        ([["a"], [None], ["b"], ["a"]], Y, r"column 'mode_0': expected a label in every row, got .* at row 1"),
    ],
)
def test_bad_data_is_refused_naming_argument_expectation_and_what_came(X_bad, y_bad, message):
    with pytest.raises(ValueError, match=message):
        Known().fit(X_bad, y_bad)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"duplicates": "first"}, r"duplicates: expected one of .*, got 'first'"),
        ({"duplicates": "error"}, r"X: expected distinct coordinates \(duplicates='error'\), got row 2 equal to row 0"),
        ({"device": "gpu"}, r'device: expected "auto", "cpu", .*, got \'gpu\''),
        (
            {"axes": [ContinuousAxis("time")]},
            r"axes: expected names among the columns \['dose', 'cell'\], got \['time'\]",
        ),
        ({"axes": ["dose"]}, r"axes: expected ContinuousAxis or CategoricalAxis, got 'dose'"),
        ({"slope": -1}, r"slope: expected at least 0, got -1"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    table = frame().assign(cell=["a", "b", "a", "a"])
    with pytest.raises(ValueError, match=message):
        Known(**params).fit(table, Y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(
        ValueError, match=r'device: expected "auto" or "cpu", since torch finds no GPU here, got \'cuda\''
    ):
        Known(device="cuda").fit(X, Y)


@pytest.mark.parametrize("coverage", [0, 1, 1.0, -0.1, 90, np.nan, "0.9", None])
def test_a_coverage_that_is_no_probability_is_refused(model, coverage):
    with pytest.raises(ValueError, match=r"coverage: expected a probability between 0 and 1, got "):
        model.predict_interval(NEW, coverage)


@pytest.mark.parametrize("n_samples", [0, -1, 2.5, "3", None])
def test_a_number_of_draws_that_is_no_number_is_refused(model, n_samples):
    with pytest.raises(ValueError, match=r"n_samples: expected an integer of at least 1, got "):
        model.sample_y(NEW, n_samples)


@pytest.mark.parametrize("y", [Y, np.zeros((3, 1)), 1.0])
def test_log_density_refuses_values_that_do_not_match(model, y):
    with pytest.raises(ValueError, match=r"y: expected shape \(3,\) to match X, got "):
        model.log_prob(NEW, y)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.predict(X),
        lambda model: model.predict_interval(X),
        lambda model: model.predict_quantiles(X, [0.5]),
        lambda model: model.predictive(X),
        lambda model: model.log_prob(X, Y),
        lambda model: model.sample_y(X),
        lambda model: model.score(X, Y),
        lambda model: model.unknown(X),
        lambda model: model.save("never.model"),
    ],
    ids=["predict", "interval", "quantiles", "predictive", "log_prob", "sample_y", "score", "unknown", "save"],
)
@pytest.mark.parametrize("failed", [False, True], ids=["before fit", "after a fit that failed"])
def test_use_before_fit_says_so(use, failed):
    model = Known(slope=-1)
    if failed:
        with pytest.raises(ValueError, match="slope"):
            model.fit(X, Y)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        use(model)


@pytest.mark.parametrize(("slope", "y"), [(-1, 100 * Y), (0.5, np.full(4, np.nan))], ids=["parameter", "data"])
def test_a_fit_that_fails_leaves_the_earlier_fit(slope, y):
    model = Known().fit(X, Y)
    before = model.predict(NEW)
    with pytest.raises(ValueError, match="expected"):
        model.set_params(slope=slope).fit(X + 100.0, y)
    assert np.array_equal(model.set_params(slope=0.5).predict(NEW), before)


# Labels that were not seen


def test_unknown_labels_are_flagged_by_mode_and_row():
    model = Known().fit(frame(), Y)
    new = pd.DataFrame({"dose": [9.0, 0.5, 0.5], "cell": ["a", "z", "b"]}, index=[7, 5, 3])
    expected = pd.DataFrame({"dose": [False] * 3, "cell": [False, True, False]}, index=[7, 5, 3])
    pd.testing.assert_frame_equal(model.unknown(new), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, t: m.predict(t),
        lambda m, t: m.predict_interval(t),
        lambda m, t: m.predict_quantiles(t, [0.5]),
        lambda m, t: m.predictive(t),
        lambda m, t: m.log_prob(t, np.zeros(len(t))),
        lambda m, t: m.sample_y(t),
    ],
    ids=["predict", "interval", "quantiles", "predictive", "log_prob", "sample_y"],
)
def test_a_warning_names_mode_and_labels_at_the_line_that_asked(use):
    model = Known().fit(frame(), Y)
    new = pd.DataFrame({"dose": 0.5, "cell": ["u", "a", "v", "w", "x", "y", "z", "z"]})
    with pytest.warns(UnknownLabelWarning, match=r"7 rows .* 'cell' .* \('u', 'v', 'w', 'x', 'y', …\)") as caught:
        use(model, new)
    assert [warning.filename for warning in caught] == [__file__]


def test_labels_and_coordinates_that_are_known_or_continuous_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Known().fit(frame(), Y).predict(pd.DataFrame({"dose": [77.0], "cell": ["b"]}))


# Duplicates


@pytest.mark.parametrize(
    ("policy", "values"), [("observations", [1.0, 5.0, 3.0]), ("sum", [4.0, 5.0]), ("mean", [2.0, 5.0])]
)
def test_the_policy_for_duplicates_reaches_the_model(policy, values):
    model = Known(duplicates=policy).fit([["a"], ["b"], ["a"]], [1.0, 5.0, 3.0])
    assert model.y_mean_ == np.mean(values)
    np.testing.assert_allclose(np.sort(model.values_ * model.y_scale_ + model.y_mean_), np.sort(values), rtol=1e-14)


# scikit-learn


def test_parameters_are_stored_as_given_and_cloned():
    axes = [ContinuousAxis("dose", Matern(2.5))]
    model = Known(axes, slope=0.25, device="cpu")
    assert model.get_params()["axes"] is axes
    copy = clone(model.fit(frame(), Y))
    assert not hasattr(copy, "axes_")
    assert copy.get_params() == model.get_params()
    assert copy.set_params(slope=2.0).slope == 2.0
    with pytest.raises(ValueError, match="Invalid parameter 'slop'"):
        copy.set_params(slop=1.0)


def test_axes_given_are_those_of_the_fit_and_stay_unfitted():
    axis = ContinuousAxis("dose", Matern(2.5))
    model = Known([axis]).fit(frame(), Y)
    assert model.axes_[0].kernel.nu == 2.5
    assert not axis.is_fitted
