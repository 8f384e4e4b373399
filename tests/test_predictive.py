"""Predictive distributions against SciPy's, against sums over the support and against draws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from probtensor.predictive import BernoulliPredictive, CountMixture, NormalMixture, Predictive
from probtensor.predictive_base import normal_nodes, weight_nodes

P = [0.0, 1e-9, 0.025, 0.3, 0.5, 0.7, 0.975, 1 - 1e-9, 1.0]
Y = np.array([-2.0, 0.0, 0.7, 1.0, 3.0, 40.0])


def mixture() -> NormalMixture:
    return NormalMixture([1.0, -3.0], [[0.1, 1.0, 30.0], [2.0, 2.0, 0.5]], [0.2, 0.5, 0.3])


def counts(alpha: float = 0.0) -> CountMixture:
    return CountMixture([[0.3, 2.0], [7.0, 30.0], [150.0, 180.0]], [[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], alpha)


def component(rate: float, alpha: float) -> object:
    return stats.nbinom(1 / alpha, 1 / (1 + alpha * rate)) if alpha else stats.poisson(rate)


ALL = [mixture(), counts(), counts(0.5), BernoulliPredictive([0.0, 0.2, 1.0])]
names = [type(x).__name__ for x in ALL]


# --- what all of them promise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", ALL, ids=names)
def test_draws_have_the_distribution(d: Predictive):
    x = d.sample(40_000, np.random.default_rng(0))
    assert x.shape == (len(d.mean), 40_000)
    error = np.maximum(d.std, 1e-12) / 200
    assert np.all(np.abs(x.mean(axis=1) - d.mean) <= 4 * error)
    for q in d.quantile([0.2, 0.5, 0.9]).T:
        assert np.all(np.abs((x <= q[:, None]).mean(axis=1) - d.cdf(q)) <= 4 * 0.5 / 200)
    for p in (0.2, 0.9):  # the least value that is high enough
        q = d.quantile(p)
        assert np.all(d.cdf(q) >= p - 1e-12)
        assert np.all(d.cdf(q - 1e-6 * d.std - 1e-9) < p)


@pytest.mark.parametrize("d", ALL, ids=names)
def test_the_score_equals_its_definition_by_draws(d: Predictive):
    rng = np.random.default_rng(1)
    a, b = d.sample(40_000, rng), d.sample(40_000, rng)
    y = np.array([0.0, 2.0, 160.0])[: len(d.mean)]
    terms = np.abs(a - y[:, None]) - 0.5 * np.abs(a - b)
    assert np.all(np.abs(d.crps(y) - terms.mean(axis=1)) <= 4 * terms.std(axis=1) / 200 + 1e-12)


@pytest.mark.parametrize("d", ALL, ids=names)
def test_the_score_equals_the_integral(d: Predictive):
    n = len(d.mean)
    for value in (-1.5, 0.0, 0.4, 3.0, 171.25):
        grid = np.sort(np.append(np.arange(-500.0, 900.0, 1 / 128), value))
        middle, step = (grid[1:] + grid[:-1]) / 2, np.diff(grid)
        F = np.stack([d.cdf(np.full(n, x)) for x in middle[::1]], 1) if n > 3 else cdf_on_grid(d, middle)
        score = ((F - (middle >= value)) ** 2 * step).sum(axis=1)
        assert d.crps(np.full(n, value)) == pytest.approx(score, rel=1e-4, abs=1e-6)


def cdf_on_grid(d: Predictive, grid: np.ndarray) -> np.ndarray:
    """(n, len(grid)), by repeating each row's distribution."""
    rows = []
    for i in range(len(d.mean)):
        m = len(grid)
        if isinstance(d, NormalMixture):
            one: Predictive = NormalMixture(np.full(m, d.location[i]), np.tile(d.scales[i], (m, 1)), d.weights[i])
        elif isinstance(d, CountMixture):
            one = CountMixture(np.tile(d.rates[i], (m, 1)), d.weights[i], np.full(m, d.dispersion[i]))
        else:
            assert isinstance(d, BernoulliPredictive)
            one = BernoulliPredictive(np.full(m, d.probability[i]))
        rows.append(one.cdf(grid))
    return np.stack(rows)


@pytest.mark.parametrize("d", ALL, ids=names)
def test_a_missing_value_has_no_score_and_log_probability_zero(d: Predictive):
    assert np.all(d.log_prob(np.nan) == 0)
    assert np.all(np.isnan(d.crps(np.nan)))
    assert np.all(np.isnan(d.cdf(np.nan)))


@pytest.mark.parametrize("d", ALL, ids=names)
def test_the_ends_of_the_line(d: Predictive):
    assert np.all(d.cdf(-np.inf) == 0)
    assert np.all(d.cdf(np.inf) == 1)
    assert np.all(d.log_prob(np.inf) == -np.inf)
    assert np.all(d.log_prob(-np.inf) == -np.inf)
    assert d.quantile([]).shape == (len(d.mean), 0)


@pytest.mark.parametrize("d", ALL, ids=names)
def test_an_interval_has_its_quantiles_as_ends(d: Predictive):
    lower, upper = d.interval(0.8)
    assert np.stack([lower, upper], 1) == pytest.approx(d.quantile([0.1, 0.9]), rel=1e-12)


@pytest.mark.parametrize("d", ALL, ids=names)
def test_impossible_questions_are_refused(d: Predictive):
    for coverage in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="coverage: expected a probability between 0 and 1"):
            d.interval(coverage)
    for p in (-0.1, 1.1, math.nan, [[0.5]]):
        with pytest.raises(ValueError, match="p: expected a probability or a sequence"):
            d.quantile(p)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="y: expected shape"):
        d.log_prob(np.zeros(17))


def test_no_rows_are_no_trouble():
    for d in (NormalMixture([], np.empty((0, 2)), [0.5, 0.5]), CountMixture(np.empty((0, 2)), [0.5, 0.5])):
        for x in (d.mean, d.std, d.cdf([]), d.log_prob([]), d.crps([]), d.quantile(0.3)):
            assert x.shape == (0,)
        assert d.sample(3, np.random.default_rng(0)).shape == (0, 3)


# --- normal mixtures --------------------------------------------------------------------------------------------------


def test_one_normal_equals_scipy():
    d, right = NormalMixture([2.0] * 6, [[3.0]] * 6, [1.0]), stats.norm(2, 3)
    assert d.cdf(Y) == pytest.approx(right.cdf(Y), rel=1e-13)
    assert d.log_prob(Y) == pytest.approx(right.logpdf(Y), rel=1e-13)
    for p in P:
        assert d.quantile(p)[0] == pytest.approx(right.ppf(p), rel=1e-12)


def test_a_mixture_is_the_weighted_sum():
    d = mixture()
    for y in Y:
        for i in range(2):
            normals = [stats.norm(d.location[i], s) for s in d.scales[i]]
            assert d.cdf(y)[i] == pytest.approx(sum(w * n.cdf(y) for w, n in zip(d.weights[i], normals, strict=True)))
            density = sum(w * n.pdf(y) for w, n in zip(d.weights[i], normals, strict=True))
            assert d.log_prob(y)[i] == pytest.approx(math.log(density))
    assert d.std[0] == pytest.approx(math.sqrt(0.2 * 0.01 + 0.5 + 0.3 * 900))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-9, 1.0)), min_size=1, max_size=6),
    st.floats(1e-14, 1.0, exclude_max=True),
    st.floats(-1e3, 1e3),
)
def test_quantiles_invert_the_cdf(parts: list[tuple[float, float]], p: float, location: float):
    scales, weights = np.array(parts).T
    weights = weights / weights.sum()
    centred = NormalMixture([0.0], [scales], weights)
    t = centred.quantile(p)
    # Both a little below and above, by a relative error of the distance from the location.
    low, high = np.sort(np.stack([t * (1 - 1e-10), t * (1 + 1e-10)]), axis=0)
    slack = 1e-13 * min(p, 1 - p) if p < 0.5 else 2e-15
    assert centred.cdf(low)[0] <= p + slack
    assert centred.cdf(high)[0] >= p - slack
    shifted = NormalMixture([location], [scales], weights)
    assert shifted.quantile(p) == pytest.approx(location + t)
    assert centred.quantile(1 - p) == pytest.approx(
        -t, rel=1e-3 if min(p, 1 - p) < 1e-8 else 1e-6, abs=1e-9 * scales.max()
    )


def test_a_point_mass_within_a_mixture():
    d = NormalMixture([1.0, 1.0], [[0.0, 2.0], [0.0, 0.0]], [0.6, 0.4])
    assert d.cdf([1.0, 1.0]).tolist() == [0.8, 1.0]  # continuous from the right
    assert d.cdf(1 - 1e-12) == pytest.approx([0.2, 0.0])
    assert d.quantile([0.21, 0.5, 0.79]).tolist() == [[1.0] * 3] * 2
    assert d.quantile([0.1, 0.9])[0] == pytest.approx(1 + 2 * stats.norm.ppf([0.25, 0.75]))
    assert d.quantile([0.0, 1.0]).tolist() == [[-np.inf, np.inf], [1.0, 1.0]]
    assert d.log_prob(1.0).tolist() == [np.inf, np.inf]
    assert d.log_prob(2.0) == pytest.approx([math.log(0.4) + stats.norm(1, 2).logpdf(2.0), -np.inf])
    assert d.crps(3.0)[1] == pytest.approx(2.0)
    assert np.all(d.sample(5, np.random.default_rng(0))[1] == 1.0)


def test_a_component_of_probability_zero_does_not_matter():
    plain, more = NormalMixture([0.0], [[1.0]], [1.0]), NormalMixture([0.0], [[1.0, 0.0, 1e9]], [1.0, 0.0, 0.0])
    for y in (0.0, 1.0):
        assert more.log_prob(y) == pytest.approx(plain.log_prob(y))
        assert more.cdf(y) == pytest.approx(plain.cdf(y))
        assert more.crps(y) == pytest.approx(plain.crps(y))
    assert more.quantile([0.1, 0.6]) == pytest.approx(plain.quantile([0.1, 0.6]))


def test_the_score_is_that_of_one_normal_in_closed_form():
    y, s = 1.7, 3.0
    z = (y - 2) / s
    right = s * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert NormalMixture([2.0], [[s, s, s]], [0.2, 0.3, 0.5]).crps(y)[0] == pytest.approx(right, rel=1e-13)


def test_a_change_of_unit_changes_all_alike():
    d, y, p = mixture(), np.array([0.3, -4.0]), 0.2
    new = d.affine(-5.0, 7.0)
    assert new.mean == pytest.approx(-5 * d.mean + 7)
    assert new.log_prob(-5 * y + 7) == pytest.approx(d.log_prob(y) - math.log(5))
    assert new.quantile(1 - p) == pytest.approx(-5 * d.quantile(p) + 7)
    assert new.crps(-5 * y + 7) == pytest.approx(5 * d.crps(y))
    with pytest.raises(TypeError, match="CountMixture has no unit"):
        counts().affine(2.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([math.nan], [[1.0]], [1.0]), "location"),
        (([[0.0]], [[1.0]], [1.0]), "location"),
        (([0.0], [1.0], [1.0]), "scales"),
        (([0.0], [[-1.0]], [1.0]), "scales"),
        (([0.0], [[1.0], [1.0]], [1.0]), "scales"),
        (([0.0], np.empty((1, 0)), []), "scales"),
        (([0.0], [[1.0, 1.0]], [0.5, 0.6]), "weights"),
        (([0.0], [[1.0, 1.0]], [1.5, -0.5]), "weights"),
        (([0.0], [[1.0, 1.0]], [1.0]), "weights"),
    ],
)
def test_a_mixture_that_is_none_is_refused(arguments: tuple[object, object, object], named: str):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        NormalMixture(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dof", [2.0, 3.0, 4.5, 10.0, 100.0])
def test_gamma_nodes_make_students_t(dof: float):
    weights, probability = weight_nodes(np.array([dof / 2]), np.array([dof / 2]))
    x = np.array([0.0, 0.3, 1.0, 3.0, 6.0])
    t = NormalMixture(np.zeros(5), np.repeat(1 / np.sqrt(weights), 5, axis=0), probability[0])
    assert t.cdf(x) == pytest.approx(stats.t.cdf(x, dof), abs=2e-4)
    assert t.log_prob(x) == pytest.approx(stats.t.logpdf(x, dof), abs=2e-3)
    assert t.quantile(0.995)[0] == pytest.approx(stats.t.ppf(0.995, dof), rel=1e-3)
    assert t.log_prob(20.0)[0] == pytest.approx(stats.t.logpdf(20.0, dof), abs=0.01 if dof < 10 else 60)


def test_normal_nodes_integrate():
    z, weights = normal_nodes()
    for s in (0.1, 1.0, 2.5):
        assert weights @ np.exp(s * z) == pytest.approx(math.exp(s**2 / 2), rel=1e-9)
        logistic = integrate.quad(lambda x, s=s: stats.norm.pdf(x) / (1 + math.exp(-s * x - 1)), -9, 9)[0]
        assert weights @ (1 / (1 + np.exp(-s * z - 1))) == pytest.approx(logistic, abs=1e-8)


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1e-12, 1e-6, 0.3, 20.0])
@pytest.mark.parametrize("rate", [1e-5, 0.4, 9.0, 3e3, 1e7])
def test_one_component_equals_scipy(rate: float, alpha: float):
    right = component(rate, alpha if alpha > 1e-10 else 0.0)
    y = np.unique(np.floor(right.ppf([0.01, 0.3, 0.5, 0.9, 0.999])))
    d = CountMixture(np.full((len(y), 1), rate), [1.0], alpha)
    assert d.cdf(y + 0.5) == pytest.approx(right.cdf(y), rel=1e-6 if alpha != 1e-12 else 1e-6 + 5 * alpha * rate)
    assert d.log_prob(y) == pytest.approx(right.logpmf(y), rel=1e-6, abs=1e-6 + 5 * 1e-12 * rate)
    assert d.mean == pytest.approx(right.mean())
    assert d.std == pytest.approx(right.std(), rel=1e-5)
    for p in (0.0, 0.025, 0.5, 0.975, 1 - 1e-9, 1.0):
        assert d.quantile(p)[0] == pytest.approx(max(right.ppf(p), 0.0), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_mixture_of_counts_is_the_weighted_sum(alpha: float):
    d, y = counts(alpha), np.array([1.0, 12.0, 170.0])
    for i in range(3):
        parts = list(zip(d.weights[i], (component(r, alpha) for r in d.rates[i]), strict=True))
        assert d.cdf(y)[i] == pytest.approx(sum(w * c.cdf(y[i]) for w, c in parts))
        assert d.log_prob(y)[i] == pytest.approx(math.log(sum(w * c.pmf(y[i]) for w, c in parts)))
        k = np.arange(5000)
        p = sum(w * c.pmf(k) for w, c in parts)
        assert d.std[i] == pytest.approx(math.sqrt(p @ k**2 - (p @ k) ** 2))


def test_what_is_no_count_has_no_probability():
    d = counts()
    assert np.all(d.log_prob([0.5, -1.0, 2.25]) == -np.inf)
    assert np.all(d.cdf([-0.5, -1.0, -7.0]) == 0)


@pytest.mark.parametrize(
    ("rate", "alpha"), [(700.0, 0.5), (1e4, 0.0), (3e4, 1.0), (5e4, 1e-4), (2100.0, 0.0), (300.0, 30.0)]
)
@pytest.mark.parametrize("at", [0.0, 0.001, 0.4, 0.999, 1.0])
def test_the_score_of_large_counts_equals_the_sum(rate: float, alpha: float, at: float):
    right = component(rate, alpha)
    y = float(right.ppf(at)) if 0 < at < 1 else at * 3 * float(right.ppf(0.999999))
    y = max(y, 0.0)
    k = np.arange(max(right.ppf(1 - 1e-9), y) + 1)
    exact = ((right.cdf(k) - (k >= y)) ** 2).sum()
    assert CountMixture([[rate]], [1.0], alpha).crps(y)[0] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 0.3), (2.0, 1.0), (5.0, 0.5), (7.0, 0.2), (7.0, 1.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_log_normal_means_have_no_gaps(mean: float, sd: float, alpha: float):
    d = CountMixture.log_normal(np.array([mean]), np.array([sd**2]), alpha)
    z, weights = normal_nodes(0.002, 8.0)
    fine = [(w, component(math.exp(mean + sd * x), alpha)) for x, w in zip(z[::8], weights[::8], strict=True)]
    total = sum(w for w, _ in fine)
    y = np.floor(np.exp(mean + sd * np.linspace(-2, 2, 23)))
    pmf = sum(w * c.pmf(y) for w, c in fine) / total
    cdf = sum(w * c.cdf(y) for w, c in fine) / total
    mine = np.array([d.log_prob(x)[0] for x in y])
    assert mine == pytest.approx(np.log(pmf), abs=0.02)
    assert np.array([d.cdf(x)[0] for x in y]) == pytest.approx(cdf, abs=2e-3)
    assert d.mean[0] == pytest.approx(math.exp(mean + sd**2 / 2), rel=1e-8)
    second = math.exp(2 * mean + 2 * sd**2) * (1 + alpha)
    assert d.std[0] == pytest.approx(math.sqrt(d.mean[0] + second - d.mean[0] ** 2), rel=1e-6)


def test_known_means_are_one_component():
    d = CountMixture.log_normal(np.array([1.0, 2.0]), np.zeros(2), 0.5)
    assert d.rates.shape == (2, 1)
    assert d.log_prob([3.0, 3.0]) == pytest.approx([component(math.exp(m), 0.5).logpmf(3) for m in (1.0, 2.0)])


def test_enormous_means_stay_finite():
    d = CountMixture.log_normal(np.array([0.0, 200.0, 30.0]), np.array([1e4, 1.0, 0.0]))
    for x in (d.mean, d.std, d.cdf(5.0), d.log_prob(5.0), d.quantile(0.5)):
        assert np.isfinite(x).all()
    assert np.isfinite(d.sample(100, np.random.default_rng(0))).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1.0], [1.0]), "rates"),
        (([[-1.0]], [1.0]), "rates"),
        (([[math.inf]], [1.0]), "rates"),
        (([[1.0]], [0.9]), "weights"),
        (([[1.0]], [1.0], -0.1), "dispersion"),
        (([[1.0]], [1.0], [0.1, 0.1]), "dispersion"),
    ],
)
def test_counts_that_are_none_are_refused(arguments: tuple[object, ...], named: str):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        CountMixture(*arguments)  # type: ignore[arg-type]


def test_a_binary_value_equals_scipy():
    p = np.array([0.0, 0.2, 1.0])
    d, right = BernoulliPredictive(p), stats.bernoulli(p)
    for y in (-0.5, 0.0, 0.5, 1.0, 2.0):
        assert d.cdf(y) == pytest.approx(right.cdf(y))
        if y in (0.0, 1.0):
            with np.errstate(divide="ignore"):
                assert d.log_prob(y) == pytest.approx(np.log(right.pmf(y)))
            assert d.crps(y) == pytest.approx((y - p) ** 2)
        else:
            assert np.all(d.log_prob(y) == -np.inf)
    assert d.quantile([0.8, 0.81]).tolist() == [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    assert d.std == pytest.approx(right.std())
    for bad in ([1.1], [-0.1], [math.nan], 0.5):
        with pytest.raises(ValueError, match=r"^probability: expected"):
            BernoulliPredictive(bad)  # type: ignore[arg-type]
