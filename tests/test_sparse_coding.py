"""Manners of the sparse-coding estimators: what they take and refuse, files, batches, precision, draws."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

import probtensor as pt
from probtensor.inference import truncated_em
from probtensor.models import BSC, DSC, GSC, MCA, MMCA, TSC, sparse_fit
from tests import reference_sparse as ref
from tests.sparse_cases import PHI, Case, listed, tensors

CODERS = {"bsc": BSC, "tsc": TSC, "dsc": DSC, "gsc": GSC, "gsc_full": GSC, "mca": MCA, "mmca": MMCA}
STATES = ("selected", "evolved", "all")
H, D = 4, 9
BARS = np.kron(np.eye(3), np.ones((3, 1)))  # (D, 3)


def coder(name: str, **settings):
    """Of few steps."""
    settings = {"n_components": H, "n_candidates": 3, "max_active": 2, "random_state": 0, "progress": False} | settings
    settings = {"annealing": 3, "renewals": 1, "max_iter": 3, "n_states": 8, "device": "cpu"} | settings
    own = {"gsc_full": {"full_covariance": True}, "dsc": {"values": PHI[1:]}}.get(name, {})
    return CODERS[name](**own | settings)


def data(name: str, N: int = 60, seed: int = 0, missing: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    S = (rng.random((N, 3)) < 0.3) * rng.choice({"tsc": [-1, 1], "dsc": [1, 2]}.get(name, [1.0]), (N, 3))
    if "gsc" in name:
        S = S * rng.normal(1.0, 0.5, size=S.shape)
    Y = 4 * S @ BARS.T + 0.5 * rng.normal(size=(N, D))
    Y[rng.random(Y.shape) < missing] = np.nan
    return Y


@pytest.fixture(autouse=True)
def _short_phases(monkeypatch) -> None:
    monkeypatch.setattr(sparse_fit, "SETTLE", 4)
    monkeypatch.setattr(sparse_fit, "TRIAL", 4)


def fit(model, Y, method="fit", **more):
    """Fit; that few steps are too few is no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return getattr(model, method)(Y, **more)


@pytest.mark.parametrize("name", CODERS)
def test_a_single_component_is_found(name):
    """Its prior once began at one over their number, where a point without it was impossible: the bound was NaN."""
    rng = np.random.default_rng(0)
    Y = 3.0 * (rng.random((200, 1)) < 0.4) + 0.5 * rng.normal(size=(200, 4))
    model = fit(coder(name, n_components=1, n_candidates=1, max_active=1, max_iter=30), Y)
    assert model.noise_std_ == pytest.approx(0.5, abs=0.05)
    assert np.isfinite(model.bound_)


def results(model, Y) -> list[np.ndarray]:
    found = [model.transform(Y), model.inclusion_probability(Y), model.map_states(Y), model.reconstruct(Y)]
    found += [model.score_samples(Y), np.array(model.bound_history_), np.asarray(model.prior_), model.components_]
    return [
        *found,
        np.array(model.noise_std_),
        *model.sample(5, 1),
        *(x for _, x in sorted(model.parameter_history_.items())),
    ]


def global_state() -> tuple:
    legacy = str(np.random.get_state())  # noqa: NPY002
    return random.getstate(), legacy, torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()


def check_same(first, second, Y) -> None:
    for a, b in zip(results(first, Y), results(second, Y), strict=True):
        np.testing.assert_array_equal(a, b)


def twin(name: str, model) -> Case:
    """The slow twin of a fitted estimator."""
    p = {"W": model.components_.T.astype(float), "sigma": model.noise_std_}
    if "gsc" in name:
        p |= {"pi": model.prior_, "mu": model.slab_mean_, "Psi": model.slab_covariance_}
    elif name == "dsc":
        p |= {"phi": (0.0, *model._values()), "probabilities": model.prior_}
    else:
        p |= {"pi": model.prior_}
    return Case(name, model._model(), p)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("name", CODERS)
def test_all_results_equal_loops_over_the_states(name: str, states: str, missing: float) -> None:
    model = fit(coder(name, states=states), data(name, missing=missing))
    this, Y = twin(name, model), data(name, 7, 5, missing)
    Y[-1] = np.nan if missing else 0.0
    some = next(iter(model._blocks(Y, bool(missing))))
    posterior = truncated_em.posterior(model._model(), model._params, some, model._selection())
    of_each = listed(posterior.states, 7)
    joint = np.array(ref.log_joints(this.log_joint, Y, of_each)).T
    joint[~posterior.log_joint.isfinite().numpy()] = -np.inf
    log_z = np.logaddexp.reduce(joint, axis=0)
    q = np.exp(joint - log_z).T
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(model.score_samples(Y), log_z, **close)
    assert model.score(Y) == pytest.approx(log_z.mean(), abs=1e-9)
    np.testing.assert_allclose(model.transform(Y), ref.expectation(this.code, Y, of_each, q), **close)
    np.testing.assert_allclose(model.reconstruct(Y), ref.expectation(this.mean, Y, of_each, q), **close)
    active = ref.expectation(lambda y, s: np.asarray(s) != 0, Y, of_each, q)
    np.testing.assert_allclose(model.inclusion_probability(Y), active, **close)
    np.testing.assert_array_equal(model.map_states(Y), [k[i] for k, i in zip(of_each, q.argmax(1), strict=True)])
    if states == "all":
        every = [ref.enumerate_states(H, (0.0, *this.values))] * 7
        assert model.score(Y) == pytest.approx(ref.bound(this.log_joint, Y, every) / 7, abs=1e-9)


@pytest.mark.parametrize("name", CODERS)
def test_codes_decode_to_what_the_model_says(name: str) -> None:
    model = fit(coder(name), data(name))
    this = twin(name, model)
    codes = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1.0]])
    if "mca" in name:
        expected = [ref.strongest(tuple(s), this.twin["W"], name == "mmca") for s in codes]
    else:
        expected = codes @ model.components_
    np.testing.assert_allclose(model.inverse_transform(codes), expected, rtol=1e-12)


@pytest.mark.parametrize("name", CODERS)
def test_draws_have_the_moments_of_the_model(name: str) -> None:
    model = fit(coder(name), data(name))
    this = twin(name, model)
    Y, codes = model.sample(40_000, random_state=3)
    assert Y.shape == (40_000, D)
    assert codes.shape == (40_000, H)
    for again, right in zip(model.sample(40_000, random_state=3), (Y, codes), strict=True):
        np.testing.assert_array_equal(again, right)
    states = ref.enumerate_states(H, (0.0, *this.values))
    prior = np.array([np.exp(this.log_joint(np.full(D, np.nan), s)) for s in states])
    assert prior.sum() == pytest.approx(1.0)
    nothing = np.full(D, np.nan)
    mean = prior @ np.array([this.mean(nothing, s) for s in states])
    np.testing.assert_allclose(Y.mean(0), mean, atol=5 * Y.std() / 200)
    np.testing.assert_allclose(codes.mean(0), prior @ np.array([this.code(nothing, s) for s in states]), atol=0.05)
    noise = Y - model.inverse_transform(codes)
    assert noise.std() == pytest.approx(model.noise_std_, rel=0.01)
    alone = (codes != 0).sum(1) <= 1  # every row has noise, whichever causes are active
    assert alone.any()
    assert np.abs(Y[alone]).min(1).min() > 0
    covariance = np.cov(codes.T)
    if name == "gsc_full":
        pi, mu, Psi = model.prior_, model.slab_mean_, model.slab_covariance_
        both = np.outer(pi, pi) + np.diag(pi - pi**2)
        expected = both * (Psi + np.outer(mu, mu)) - np.outer(pi * mu, pi * mu)
        np.testing.assert_allclose(covariance, expected, atol=0.06 * np.abs(expected).max() + 0.01)


@pytest.mark.parametrize("name", ["bsc", "tsc"])
def test_a_fit_learns_bars(name: str) -> None:
    truth = np.kron(np.eye(3), np.ones((3, 1)))
    model = fit(coder(name, n_components=3, max_active=3, annealing=15, max_iter=60), data(name, 500))
    size = np.linalg.norm(model.components_, axis=1)
    match = np.abs(model.components_ @ truth) / size[:, None] / np.sqrt(3)
    assert sorted(match.argmax(1)) == [0, 1, 2]
    assert match.max(1).min() > 0.95
    assert model.noise_std_ == pytest.approx(0.5, rel=0.05)
    assert model.bound_ == model.bound_history_[-1]
    assert all(len(x) == len(model.bound_history_) for x in model.parameter_history_.values())
    assert model.score(data(name, 500)) == pytest.approx(model.bound_, abs=0.02)


@pytest.mark.parametrize("name", CODERS)
def test_points_without_noise_can_be_fitted(name: str) -> None:
    S = np.random.default_rng(0).integers(0, 2, (80, 3))
    for Y in [S @ BARS.T * 3.0] if "gsc" in name else [S @ BARS.T * 3.0, np.zeros((20, D)), np.ones((20, D))]:
        model = fit(coder(name, max_iter=30, annealing=5), Y)
        assert np.isfinite(model.components_).all()
        assert np.isfinite(model.bound_history_).all()
        assert model.noise_std_ > 0
        assert np.isfinite(model.transform(Y)).all()


@pytest.mark.parametrize("name", ["bsc", "gsc", "mca"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_data_does_not_matter(name: str, scale: float) -> None:
    Y = data(name)
    settings = {"annealing": 0, "renewals": 0, "tol": 1e-8, "max_iter": 100, "data_cut": False}
    one, other = fit(coder(name, **settings), Y), fit(coder(name, **settings), Y * scale)
    assert other.score(Y * scale) + D * np.log(scale) == pytest.approx(one.score(Y), abs=0.15)


# --- manners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
def test_parameters_can_be_read_set_and_cloned(name: str) -> None:
    model = coder(name)
    assert model.get_params()["n_components"] == H
    twin = clone(model)
    assert twin.get_params() == model.get_params()
    twin.set_params(n_components=2, tol=0.1)
    assert (twin.n_components, twin.tol, model.n_components) == (2, 0.1, H)
    with pytest.raises(NotFittedError):
        check_is_fitted(model)
    fit(model, data(name))
    check_is_fitted(model)
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(model))
    assert f"{CODERS[name].__name__}(" in repr(model)


def test_all_estimators_take_the_same_parameters() -> None:
    shared = set(BSC().get_params())
    assert set(TSC().get_params()) == set(MCA().get_params()) == set(MMCA().get_params()) == shared
    assert set(DSC().get_params()) == shared | {"values"}
    assert set(GSC().get_params()) == shared | {"full_covariance"}


@pytest.mark.parametrize(("name", "states"), [*zip(CODERS, (*STATES, *STATES, "all"), strict=True), ("mca", "evolved")])
def test_fitting_twice_with_one_seed_gives_the_same_bits(name: str, states: str) -> None:
    Y = data(name, missing=0.1)
    before = Y.copy()
    state = global_state()
    first, second = fit(coder(name, states=states), Y), fit(coder(name, states=states), Y)
    check_same(first, second, Y)
    assert state == global_state()
    np.testing.assert_array_equal(Y, before)
    codes = fit(coder(name, states=states), Y, "fit_transform")
    np.testing.assert_array_equal(codes, first.transform(Y))
    again = fit(first, Y)  # an estimator that was fitted before starts anew
    check_same(again, second, Y)


def test_another_seed_is_another_start() -> None:
    one, two = (fit(coder("bsc", random_state=seed), data("bsc")) for seed in (0, 1))
    assert not np.array_equal(one.components_, two.components_)
    for seed in (None, np.random.default_rng(0), np.random.RandomState(0), np.int64(3)):
        assert np.isfinite(fit(coder("bsc", random_state=seed), data("bsc")).bound_)


@pytest.mark.parametrize("name", CODERS)
def test_single_precision_in_single_precision_out(name: str) -> None:
    Y = data(name).astype(np.float32)
    model = fit(coder(name), Y)
    for found in (
        model.components_,
        model.transform(Y),
        model.reconstruct(Y),
        model.score_samples(Y),
        *model.sample(3),
    ):
        assert found.dtype == np.float32
    for found in (model.inverse_transform(np.eye(H)), model.inclusion_probability(Y), model.map_states(Y)):
        assert found.dtype == np.float32
    double = fit(coder(name), Y.astype(np.float64))
    assert double.transform(Y).dtype == np.float64
    double._set(type(model._params)(*(x.double() for x in model._params)))
    assert model.score(Y) == pytest.approx(double.score(Y), rel=1e-3)


@pytest.mark.parametrize(
    "kind", [np.int64, bool, ">f8", np.float16, list, torch.tensor, pd.DataFrame, np.asfortranarray]
)
def test_points_of_many_kinds(kind) -> None:
    whole = np.round(data("bsc"))
    if kind is bool:
        whole = whole > 1
    given = kind(whole) if callable(kind) and kind not in (np.int64, np.float16, bool) else whole.astype(kind)
    given = whole.tolist() if kind is list else given
    check_same(fit(coder("bsc"), given), fit(coder("bsc"), whole.astype(float)), whole)
    fitted = fit(coder("bsc"), whole)
    np.testing.assert_array_equal(fitted.transform(given), fitted.transform(whole))


def test_a_pipeline_takes_the_estimators() -> None:
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), coder("gsc"))
    assert fit(pipeline, data("gsc"), "fit_transform").shape == (60, H)


@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_an_array_on_disk_gives_the_same_bits(tmp_path, missing: float) -> None:
    Y = data("bsc", 1300, missing=missing)
    np.save(tmp_path / "Y.npy", Y)
    on_disk = np.load(tmp_path / "Y.npy", mmap_mode="r")
    assert isinstance(on_disk, np.memmap)
    check_same(fit(coder("bsc"), on_disk), fit(coder("bsc"), Y), Y)
    model = fit(coder("bsc"), Y)
    np.testing.assert_array_equal(model.transform(on_disk), model.transform(Y))


@pytest.mark.parametrize("name", CODERS)
def test_a_saved_model_is_the_same_in_another_process(name: str, tmp_path) -> None:
    Y = data(name, missing=0.1)
    model = fit(coder(name, random_state=np.int64(2), n_components=np.int64(H)), Y)
    fit(model, Y[:30], "partial_fit")
    model.save(tmp_path / "model")
    again = pt.load(tmp_path / "model")
    check_same(again, model, Y)
    assert again.get_params() == model.get_params()
    assert again.n_iter_ == model.n_iter_
    assert again.converged_ == model.converged_
    fit(again, Y[30:], "partial_fit")
    fit(model, Y[30:], "partial_fit")
    check_same(again, model, Y)
    if name not in ("bsc", "gsc_full"):  # a process takes seconds
        return
    model.save(tmp_path / "model")
    np.save(tmp_path / "Y.npy", Y)
    code = (
        "import sys, numpy as np, probtensor as pt; folder = sys.argv[1]; model = pt.load(folder + '/model');"
        "Y = np.load(folder + '/Y.npy'); np.savez(folder + '/out.npz', model.transform(Y), model.score_samples(Y))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True, timeout=120)
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["arr_0"], model.transform(Y))
        np.testing.assert_array_equal(out["arr_1"], model.score_samples(Y))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
def test_the_first_batch_is_a_fit(name: str) -> None:
    Y = data(name)
    check_same(fit(coder(name), Y, "partial_fit"), fit(coder(name), Y), Y)


@pytest.mark.parametrize("name", CODERS)
def test_batches_come_near_a_fit_on_all_points(name: str) -> None:
    settings = {"annealing": 15, "max_iter": 60, "n_components": 3, "max_active": 3}
    Y, held = data(name, 800, 3), data(name, 400, 4)
    model = fit(coder(name, **settings), Y[:100], "partial_fit")
    first = model.score(held)
    for start in range(100, 800, 100):
        fit(model, Y[start : start + 100], "partial_fit")
    last, whole = model.score(held), fit(coder(name, **settings), Y).score(held)
    assert last > first - 0.005
    assert last > whole - 0.05  # which may end at another local optimum


@pytest.mark.parametrize("name", CODERS)
def test_a_batch_of_one_point_weighs_as_one_point(name: str) -> None:
    settings = {"annealing": 15, "max_iter": 60, "n_components": 3, "max_active": 3, "tol": 1e-9}
    Y = data(name, 300, 3)
    model = fit(coder(name, **settings), Y, "partial_fit")
    W, pi = model.components_.copy(), np.copy(model.prior_)
    fit(model, np.full((1, D), 8.0), "partial_fit")
    assert np.abs(model.components_ - W).max() < 0.2
    assert np.abs(model.prior_ - pi).max() < 0.04
    if name == "gsc_full":
        assert np.linalg.eigvalsh(model.slab_covariance_).min() > 0


def test_batches_have_missing_entries_all_or_none() -> None:
    model = fit(coder("bsc"), data("bsc"), "partial_fit")
    fit(model, data("bsc", seed=1), "partial_fit")
    with pytest.raises(ValueError, match="Y: expected no missing entries, since the points before had none"):
        fit(model, data("bsc", seed=2, missing=0.2), "partial_fit")


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD_PARAMETERS = [
    *[(name, value) for name in ("n_components", "n_candidates", "max_active") for value in (0, 1.5, "2", True, None)],
    *[("n_states", value) for value in (1, 2.0)],
    *[(name, value) for name in ("annealing", "renewals", "max_iter") for value in (-1, 0.5, None)],
    *[("tol", value) for value in (-1e-9, np.nan, "0", None)],
    *[("temperature", value) for value in (0.99, np.nan, np.inf, None)],
    *[("states", value) for value in ("some", None)],
    ("device", "tpu"),
    ("random_state", -1),
    ("random_state", "seed"),
]


@pytest.mark.parametrize(("parameter", "value"), BAD_PARAMETERS)
def test_a_bad_parameter_is_refused_by_name(parameter: str, value) -> None:
    with pytest.raises(ValueError, match=rf"^{parameter}: expected .*got "):
        fit(coder("bsc", **{parameter: value}), data("bsc"))


@pytest.mark.parametrize("values", [(), (0.0, 1.0), (1.0, 1.0), ("a",), (np.nan,), (np.inf, 1.0), 1.0, None, "12"])
def test_bad_values_of_causes_are_refused(values) -> None:
    with pytest.raises(ValueError, match=r"^values: expected distinct .*numbers other than 0, got "):
        fit(coder("dsc", values=values), data("dsc"))


def test_more_states_than_can_be_listed_are_refused() -> None:
    with pytest.raises(ValueError, match=r'^states: expected "selected" or "evolved" for .* states, got "all"'):
        fit(coder("tsc", states="all", n_components=20), data("tsc"))


BAD_POINTS = [
    (np.ones(3), r"^Y: expected shape \(N, D\), got \(3,\)"),
    (np.ones((2, 3, 4)), r"^Y: expected shape \(N, D\), got \(2, 3, 4\)"),
    (np.ones((5, 0)), "^Y: expected at least one entry a point, got none"),
    (np.ones((0, 5)), "^Y: expected at least one point, got none"),
    (np.array([["a", "b"]]), "^Y: expected numbers, got dtype "),
    (np.ones((2, 2), dtype=complex), "^Y: expected numbers, got dtype complex128"),
    (np.array([[1.0, 2.0], [3.0, np.inf]]), r"^Y: expected finite entries .*got inf in row 1, column 1"),
    (np.full((4, 3), np.nan), "^Y: expected at least one observed entry, got none"),
]


@pytest.mark.parametrize(("Y", "message"), BAD_POINTS)
def test_bad_points_are_refused(Y: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(coder("bsc"), Y)


def test_bad_points_of_a_fitted_model_are_refused() -> None:
    with pytest.raises(NotFittedError):
        coder("bsc").transform(data("bsc"))
    model = fit(coder("bsc"), data("bsc"))
    for method in ("transform", "reconstruct", "score", "score_samples", "map_states", "partial_fit"):
        with pytest.raises(ValueError, match=f"^Y: expected {D} entries a point, got 3"):
            getattr(model, method)(np.ones((2, 3)))
    with pytest.raises(ValueError, match=rf"^codes: expected shape \(N, {H}\), got \(2, 3\)"):
        model.inverse_transform(np.ones((2, 3)))
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"^n_samples: expected an integer of at least 1, got {bad}"):
            model.sample(bad)
    with pytest.raises(NotFittedError):
        coder("bsc").save("nowhere")
    with pytest.raises(NotFittedError):
        coder("bsc").sample()
    with pytest.raises(NotFittedError):
        _ = coder("bsc").bound_


def test_no_points_give_no_codes() -> None:
    for name in CODERS:
        for states in STATES:
            model = fit(coder(name, states=states), data(name))
            assert model.transform(np.ones((0, D))).shape == (0, H)


def test_a_fit_that_ends_early_says_so() -> None:
    with pytest.warns(ConvergenceWarning, match="max_iter=3 steps done") as caught:
        coder("bsc", tol=0.0).fit(data("bsc"))
    assert [w.filename for w in caught] == [__file__]


def test_tensors_helper_is_what_the_estimator_holds() -> None:
    for name in CODERS:
        model = fit(coder(name), data(name))
        for found, right in zip(tensors(name, twin(name, model).twin), model._params, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mca", "mmca"])
def test_more_sets_of_candidates_than_fit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="n_candidates: expected at most 12, got 13"):
        coder(name, n_components=20, n_candidates=13).fit(data(name))
    with pytest.raises(ValueError, match='states: expected "selected" or "evolved" for more than 12 components'):
        coder(name, n_components=13, states="all").fit(data(name))


def test_a_fit_that_fails_leaves_the_earlier_one() -> None:
    model = fit(coder("bsc"), data("bsc"))
    before = model.transform(data("bsc"))
    model.set_params(tol=-1.0)
    with pytest.raises(ValueError, match="tol"):
        model.fit(data("bsc").astype(np.float32))
    model.set_params(tol=1e-6)
    with pytest.raises(ValueError, match="observed entry"):
        model.fit(np.full((5, D), np.nan, dtype=np.float32))
    np.testing.assert_array_equal(model.transform(data("bsc")), before)
