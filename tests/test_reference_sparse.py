"""The reference of sparse coding against definitions, numerical integrals, and maximisers that know no formula."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, norm
from sklearn.decomposition import PCA

from tests import reference_sparse as ref

H, D = 3, 4
BINARY = ref.enumerate_states(H)
TERNARY = ref.enumerate_states(H, (-1, 0, 1))
COMPONENTS = list(range(H))
FULL_PSI = np.array([[1.0, 0.5, -0.2], [0.5, 0.8, 0.1], [-0.2, 0.1, 0.6]])
FULL_SIGMA = np.array([np.eye(D) + 0.4, 2 * np.eye(D) - 0.3, np.diag([1.0, 2.0, 0.5, 1.5])])


def dictionary(D=D, low=-2.0, high=3.0):
    return np.random.default_rng(1).uniform(low, high, size=(D, H))


def slab(Psi, D=D, pi=(0.3, 0.5, 0.4)):
    return {"W": dictionary(D), "pi": np.array(pi), "mu": np.array([1.0, -0.5, 2.0]), "Psi": Psi, "sigma": 0.7}


PI = np.array([0.2, 0.5, 0.35])
MODELS = {  # name -> (suffix of the functions, parameters for D pixels, states)
    "bsc": ("bsc", lambda D: {"W": dictionary(D), "pi": 0.3, "sigma": 0.8}, BINARY),
    "bsc, a pi each": ("bsc", lambda D: {"W": dictionary(D), "pi": PI, "sigma": 0.8}, BINARY),
    "dsc": (
        "dsc",
        lambda D: {"W": dictionary(D), "phi": (0, 1, 2), "probabilities": np.array([0.5, 0.3, 0.2]), "sigma": 0.8},
        ref.enumerate_states(H, (0, 1, 2)),
    ),
    "tsc": ("tsc", lambda D: {"W": dictionary(D), "pi": 0.4, "sigma": 0.8}, TERNARY),
    "gsc, diagonal": ("gsc", lambda D: slab(np.array([1.0, 0.6, 0.3]), D), BINARY),
    "gsc, full": ("gsc", lambda D: slab(FULL_PSI, D), BINARY),
    "mca": ("mca", lambda D: {"W": dictionary(D, 0.1), "pi": 0.4, "sigma": 0.8}, BINARY),
    "mmca": ("mmca", lambda D: {"W": dictionary(D), "pi": PI, "sigma": 0.8}, BINARY),
    "noisy or": ("noisy_or", lambda D: {"W": dictionary(D, 0.05, 0.95), "pi": PI}, BINARY),
    "mog, spherical": (
        "mog",
        lambda D: {"W": dictionary(D), "covariance": np.array([0.5, 1.0, 2.0]), "pies": PI / PI.sum()},
        COMPONENTS,
    ),
    "mog, diagonal": (
        "mog",
        lambda D: {"W": dictionary(D), "covariance": dictionary(D, 0.3, 2.0).T, "pies": PI / PI.sum()},
        COMPONENTS,
    ),
    "mog, full": (
        "mog",
        lambda D: {"W": dictionary(D), "covariance": FULL_SIGMA[:, :D, :D], "pies": PI / PI.sum()},
        COMPONENTS,
    ),
    "mop": ("mop", lambda D: {"W": dictionary(D, 1.0, 6.0), "pies": PI / PI.sum()}, COMPONENTS),
}
EXACT = [name for name in MODELS if "mca" not in name]


def functions(name):
    suffix = MODELS[name][0]
    return tuple(getattr(ref, f"{kind}_{suffix}") for kind in ("log_joint", "sample", "m_step"))


def data(name, N=40, D=D, missing=0.0, seed=0):
    """Data, their states, and the parameters that they were drawn from."""
    rng, params = np.random.default_rng(seed), MODELS[name][1](D)
    Y = functions(name)[1](rng, N, **params)[0]
    Y[rng.random(Y.shape) < missing] = np.nan
    return Y, [MODELS[name][2]] * N, params


def start_from(params, seed=3):
    """Other parameters than those given: dictionaries, deviations and probabilities all moved."""
    rng, moved = np.random.default_rng(seed), dict(params)
    moved["W"] = params["W"] * rng.uniform(0.6, 1.02, size=params["W"].shape)
    for key in {"sigma", "Psi", "covariance", "pi"} & set(params):
        moved[key] = 1.3 * params[key]
    return moved


@pytest.mark.parametrize("name", MODELS)
def test_densities_sum_to_one_over_all_states_and_one_pixel(name):
    log_joint, _, _ = functions(name)
    params, states = MODELS[name][1](1), MODELS[name][2]

    def density(y):
        return sum(np.exp(log_joint(np.array([y]), s, **params)) for s in states)

    if name == "noisy or":
        total = density(0.0) + density(1.0)
    elif name == "mop":
        total = sum(density(float(y)) for y in range(60))
    else:
        total = quad(density, -25, 25, points=np.linspace(-8, 8, 9), epsabs=1e-9, limit=200)[0]
    assert total == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_entry_is_summed_out(name):
    log_joint, _, _ = functions(name)
    params, s = MODELS[name][1](2), MODELS[name][2][-1]
    seen = 1.0

    def density(y):
        return np.exp(log_joint(np.array([seen, y]), s, **params))

    if name == "noisy or":
        total = density(0.0) + density(1.0)
    elif name == "mop":
        total = sum(density(float(y)) for y in range(60))
    else:
        total = quad(density, -25, 25, points=np.linspace(-8, 8, 9), epsabs=1e-12, limit=200)[0]
    assert log_joint(np.array([seen, np.nan]), s, **params) == pytest.approx(np.log(total), rel=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_where_nothing_is_observed_the_posterior_is_the_prior(name):
    log_joint, _, _ = functions(name)
    params, states = MODELS[name][1](2), MODELS[name][2]
    joint = partial(log_joint, **params)
    Y = np.full((1, 2), np.nan)
    (q,) = ref.posterior(joint, Y, [states])
    assert q.sum() == pytest.approx(1.0)
    assert ref.bound(joint, Y, [states]) == pytest.approx(0.0, abs=1e-12)
    if name == "bsc, a pi each":
        np.testing.assert_allclose(ref.expectation(lambda y, s: s, Y, [states], [q]), [PI])


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("name", EXACT)
def test_m_steps_raise_the_likelihood_until_it_stands_still(name, missing):
    log_joint, _, m_step = functions(name)
    Y, states, params = data(name, missing=missing)
    params = start_from(params)
    bounds = []
    for _ in range(5):
        joint = partial(log_joint, **params)
        bounds.append(ref.bound(joint, Y, states))
        params = m_step(Y, states, ref.posterior(joint, Y, states), params)
    assert np.all(np.diff(bounds) > -1e-9)
    assert bounds[-1] > bounds[0] + 1.0


@pytest.mark.parametrize("name", [name for name in EXACT if not name.startswith("mo")])
def test_m_steps_raise_the_bound_of_truncated_states_too(name):
    log_joint, _, m_step = functions(name)
    Y, _, params = data(name, N=25, missing=0.1)
    rng = np.random.default_rng(5)
    values = sorted({value for s in MODELS[name][2] for value in s})
    states = [ref.et_states(rng.choice(H, 2, replace=False), H, values, 2) for _ in Y]
    params = start_from(params)
    bounds = []
    for _ in range(4):
        joint = partial(log_joint, **params)
        bounds.append(ref.bound(joint, Y, states))
        params = m_step(Y, states, ref.posterior(joint, Y, states), params)
    assert np.all(np.diff(bounds) > -1e-9)


@pytest.mark.parametrize("name", ["mca", "mmca"])
def test_the_strongest_cause_takes_the_mean_of_what_it_explains(name):
    m_step = functions(name)[2]
    W = np.array([[2.0, 5.0], [4.0, -1.0], [0.5, 0.5]])
    Y = np.array([[2.2, 3.9, 0.4], [5.3, 4.4, np.nan], [0.1, -0.1, 0.2]])
    states = [[(1, 0)], [(1, 1)], [(0, 0)]]
    new = m_step(Y, states, [np.ones(1)] * 3, {"W": W, "pi": 0.5, "sigma": 1.0})
    expected = np.array([[2.2, 5.3], [(3.9 + 4.4) / 2, -1.0], [0.4, 0.5]])
    np.testing.assert_allclose(new["W"], expected)
    residuals = [0.0, 0.25, 0.0, 0.0, 0.25, 0.1, 0.1, 0.2]
    assert new["sigma"] ** 2 == pytest.approx(np.mean(np.square(residuals)))
    assert new["pi"] == pytest.approx(0.5)
    assert ref.winners((1, 1), W, by_magnitude=name == "mmca") == [1, 0, 0]


def test_magnitude_decides_with_its_sign_in_mmca_and_size_in_mca():
    W = np.array([[2.0, -5.0], [1.0, 0.5]])
    np.testing.assert_array_equal(ref.strongest((1, 1), W, True), [-5.0, 1.0])
    np.testing.assert_array_equal(ref.strongest((1, 1), W, False), [2.0, 1.0])
    np.testing.assert_array_equal(ref.strongest((0, 0), W, True), [0.0, 0.0])


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("name", ["bsc", "dsc", "tsc", "mop", "mog, diagonal", "mog, spherical"])
def test_the_m_step_is_where_a_numerical_maximiser_ends(name, missing):
    """Of the expected log joint, over W and the scales, for models whose completed data are points and states."""
    log_joint, _, m_step = functions(name)
    Y, states, params = data(name, N=12, missing=missing)
    q = ref.posterior(partial(log_joint, **start_from(params)), Y, states)
    best = m_step(Y, states, q, params)
    scales = [key for key in ("sigma", "covariance") if key in best]

    def expected(x):
        trial = dict(best, W=best["W"] + x[: best["W"].size].reshape(best["W"].shape))
        for key in scales:
            trial[key] = best[key] * np.exp(x[-1])
        values = ref.log_joints(partial(log_joint, **trial), Y, states)
        return sum(p @ v for p, v in zip(q, values, strict=True))

    zero = np.zeros(best["W"].size + 1)
    top = expected(zero)
    rng = np.random.default_rng(0)
    for direction in rng.normal(size=(8, len(zero))):
        step = 1e-4 * direction
        up, down = expected(step), expected(-step)
        assert max(up, down) < top + 1e-9
        assert abs(up - down) < 1e-3 * (2 * top - up - down) + 1e-9


def test_priors_become_the_shares_of_the_values():
    Y, states, q = np.zeros((2, D)), [[(0, 0, 0), (1, -1, 0)], [(1, 1, -1)]], [np.array([0.75, 0.25]), np.ones(1)]
    start = {"W": dictionary(), "phi": (-1, 0, 1), "pi": 0.1}
    np.testing.assert_allclose(ref.m_step_dsc(Y, states, q, start)["probabilities"], [1.25 / 6, 2.5 / 6, 2.25 / 6])
    assert ref.m_step_tsc(Y, states, q, start)["pi"] == pytest.approx(3.5 / 6)
    np.testing.assert_allclose(ref.m_step_bsc(Y, states, q, dict(start, pi=PI))["pi"], [1.25 / 2, 1.25 / 2, 1 / 2])


def test_a_cause_without_states_and_a_pixel_without_data_get_zero_weights():
    Y = np.array([[1.0, np.nan], [3.0, np.nan]])
    W, sigma = ref.m_step_linear(Y, [[(1, 0)], [(1, 0)]], [np.ones(1)] * 2)
    np.testing.assert_allclose(W, [[2.0, 0.0], [0.0, 0.0]])
    assert sigma == pytest.approx(1.0)


def test_noisy_or_completes_the_data_with_the_causes_that_fired():
    """<x_dh> by counting over all 2^H ways to fire, for one pixel that is on."""
    W, s = np.array([[0.3, 0.8, 0.4]]), (1, 1, 0)
    chances = {}
    for x in BINARY:
        if any(x) and all(a <= b for a, b in zip(x, s, strict=True)):
            chances[x] = np.prod([W[0, h] if x[h] else 1 - W[0, h] for h in range(H) if s[h]])
    fired = sum(np.array(x) * p for x, p in chances.items()) / sum(chances.values())
    new = ref.m_step_noisy_or(np.ones((1, 1)), [[s]], [np.ones(1)], {"W": W, "pi": PI})
    np.testing.assert_allclose(new["W"], [[fired[0], fired[1], 0.4]])
    new = ref.m_step_noisy_or(np.zeros((1, 1)), [[s]], [np.ones(1)], {"W": W, "pi": 0.5})
    np.testing.assert_allclose(new["W"], [[0.0, 0.0, 0.4]])
    assert new["pi"] == pytest.approx(2 / 3)


def test_a_full_covariance_with_holes_ends_where_the_likelihood_is_flat():
    rng = np.random.default_rng(0)
    Y = rng.multivariate_normal(np.arange(3.0), FULL_PSI, size=30)
    Y[rng.random(Y.shape) < 0.2] = np.nan
    states, q = [[0]] * len(Y), [np.ones(1)] * len(Y)
    params = {"W": np.zeros((3, 1)), "covariance": np.eye(3)[None], "pies": np.ones(1)}
    for _ in range(200):
        params = ref.m_step_mog(Y, states, q, params)

    def likelihood(mean_step, covariance_step):
        moved = {"W": params["W"] + mean_step, "covariance": params["covariance"] + covariance_step, "pies": np.ones(1)}
        return ref.bound(partial(ref.log_joint_mog, **moved), Y, states)

    for _ in range(6):
        a, B = 1e-4 * rng.normal(size=(3, 1)), 1e-4 * rng.normal(size=(3, 3))
        up, down = likelihood(a, B + B.T), likelihood(-a, -B - B.T)
        assert max(up, down) < likelihood(0, 0)
        assert abs(up - down) < 1e-2 * (2 * likelihood(0, 0) - up - down)


# --- spike and slab ---------------------------------------------------------------------------------------------------


def test_slabs_are_integrated_out():
    params = slab(FULL_PSI, D=2)
    y, s = np.array([1.3, -0.4]), (0, 1, 0)

    def density(z):
        return np.prod(norm.pdf(y, params["W"][:, 1] * z, params["sigma"])) * norm.pdf(z, -0.5, np.sqrt(0.8))

    expected = np.log(quad(density, -8, 8, epsabs=1e-12)[0]) + np.log(0.7 * 0.5 * 0.6)
    assert ref.log_joint_gsc(y, s, **params) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("Psi", [FULL_PSI, np.array([1.0, 0.6, 0.3])], ids=["full", "diagonal"])
def test_two_ways_to_the_posterior_of_the_slabs_agree(Psi):
    params, rng = slab(Psi), np.random.default_rng(0)
    for s in BINARY:
        y = rng.normal(size=D)
        y[rng.random(D) < 0.3] = np.nan
        for one, other in zip(
            ref.slab_posterior(y, s, **params), ref.slab_posterior_by_parts(y, s, **params), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-10)


def test_all_causes_active_is_factor_analysis():
    """The likelihood of N(W mu, W Psi W' + sigma^2 I), and EM ends at the closed form of Tipping and Bishop (1999)."""
    params = slab(FULL_PSI, D=5, pi=(1.0, 1.0, 1.0))
    Y, _, _ = ref.sample_gsc(np.random.default_rng(2), 30, **params)
    states = [[(1, 1, 1)]] * len(Y)
    W = params["W"]
    marginal = multivariate_normal(W @ params["mu"], W @ FULL_PSI @ W.T + 0.49 * np.eye(5))
    bound = ref.bound(partial(ref.log_joint_gsc, **params), Y, states)
    assert bound == pytest.approx(marginal.logpdf(Y).sum(), rel=1e-10)
    assert ref.bound(partial(ref.log_joint_gsc, **params), Y, [BINARY] * len(Y)) == pytest.approx(bound, rel=1e-10)

    Y = Y - Y.mean(axis=0)
    for _ in range(150):
        params = ref.m_step_gsc(Y, states, [np.ones(1)] * len(Y), params)
    bound = ref.bound(partial(ref.log_joint_gsc, **params), Y, states)
    assert bound == pytest.approx(PCA(3).fit(Y).score_samples(Y).sum(), rel=2e-4)


@pytest.mark.parametrize("full", [True, False])
def test_the_m_step_of_spike_and_slab_is_where_a_numerical_maximiser_ends(full):
    """From another start, over all parameters, on what the completed data say and not on any formula of the M-step."""
    params = slab(FULL_PSI if full else np.array([1.0, 0.6, 0.3]))
    Y, _, _ = ref.sample_gsc(np.random.default_rng(4), 15, **params)
    Y[np.random.default_rng(5).random(Y.shape) < 0.2] = np.nan
    states = [BINARY] * len(Y)
    q = ref.posterior(partial(ref.log_joint_gsc, **params), Y, states)
    pairs = ref.triples(Y, states, q)
    weight = np.array([w for _, _, w in pairs])
    S = np.array([s for _, s, _ in pairs], dtype=float)
    slabs = [ref.slab_posterior(y, s, **params) for y, s, _ in pairs]
    M, C = np.array([m for m, _ in slabs]), np.array([c for _, c in slabs])
    values, seen = np.nan_to_num([y for y, _, _ in pairs]), ~np.isnan([y for y, _, _ in pairs])
    lower = np.tril_indices(H)

    def unpack(x):
        parts = np.split(x, np.cumsum([D * H, 1, H, H]))
        if full:
            L = np.zeros((H, H))
            L[lower] = parts[4]
            Psi = L @ L.T + 1e-12 * np.eye(H)
        else:
            Psi = np.exp(parts[4])
        pi = 1 / (1 + np.exp(-parts[2]))
        return {"W": parts[0].reshape(D, H), "sigma": np.exp(parts[1][0]), "pi": pi, "mu": parts[3], "Psi": Psi}

    def minus_expected(x):
        p = unpack(x)
        mean = (S * M) @ p["W"].T
        second = np.einsum("dh,nh,nhg,ng,dg->nd", p["W"], S, C, S, p["W"]) + (values - mean) ** 2
        total = -0.5 * weight @ np.sum(seen * (second / p["sigma"] ** 2 + np.log(2 * np.pi * p["sigma"] ** 2)), axis=1)
        total += weight @ (S @ np.log(p["pi"]) + (1 - S) @ np.log1p(-p["pi"]))
        spread = C + np.einsum("nh,ng->nhg", M - p["mu"], M - p["mu"])
        if full:
            inner = np.einsum("nhg,gh->n", spread, np.linalg.inv(p["Psi"]))
            return -total + 0.5 * weight @ (inner + np.linalg.slogdet(2 * np.pi * p["Psi"])[1])
        inner = np.einsum("nhh->nh", spread) / p["Psi"] + np.log(2 * np.pi * p["Psi"])
        return -total + 0.5 * weight @ np.sum(S * inner, axis=1)

    start = [params["W"].ravel(), [0.0], np.zeros(H), np.zeros(H), np.eye(H)[lower] if full else np.zeros(H)]
    found = minimize(minus_expected, np.concatenate(start), method="BFGS", options={"gtol": 1e-4})
    numerical, ours = unpack(found.x), ref.m_step_gsc(Y, states, q, params)
    for key in ours:
        np.testing.assert_allclose(ours[key], numerical[key], atol=2e-3, err_msg=key)


# --- sets of states and averages --------------------------------------------------------------------------------------


def test_truncated_states_are_zero_singletons_and_what_the_candidates_allow():
    states = ref.et_states([0, 2], 4, (0, 1), 2)
    assert set(states) == {(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0)}
    assert len(ref.et_states([0, 1, 2], 5, (-1, 0, 1), 2)) == 1 + 5 * 2 + 3 * 4
    assert len(ref.et_states([0, 1, 2], 5, (0, 1, 3), 3)) == 1 + 5 * 2 + 3 * 4 + 8
    assert ref.et_states(range(H), H, (0, 1), H) == BINARY


def test_averages_are_over_the_states_of_each_point():
    Y, states = np.array([[1.0], [2.0]]), [[(0, 0), (1, 0)], [(1, 1)]]
    q = ref.posterior(lambda y, s: float(np.log(1 + 2 * s[0])), Y, states)
    np.testing.assert_allclose(q[0], [0.25, 0.75])
    np.testing.assert_allclose(ref.expectation(lambda y, s: y[0] * np.array(s), Y, states, q), [[0.75, 0], [2, 2]])


@pytest.mark.parametrize("name", MODELS)
def test_samples_have_noise_and_the_shares_of_the_prior(name):
    params = MODELS[name][1](D)
    Y, S = functions(name)[1](np.random.default_rng(0), 2000, **params)[:2]
    assert Y.shape == (2000, D)
    if name == "mop" or "mog" in name:
        np.testing.assert_allclose(np.bincount(S) / 2000, params["pies"], atol=0.04)
    elif name == "dsc":
        np.testing.assert_allclose([np.mean(v == S) for v in (0, 1, 2)], [0.5, 0.3, 0.2], atol=0.03)
    else:
        np.testing.assert_allclose(np.mean(S != 0, axis=0), np.broadcast_to(params["pi"], H), atol=0.04)
    if "sigma" in params:
        nothing = Y[~S.any(axis=1)]
        assert nothing.std() == pytest.approx(params["sigma"], rel=0.2)
