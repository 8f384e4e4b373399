"""Mixtures against their slow twins, against SciPy, and on bars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import multivariate_normal, norm, poisson
from sklearn.base import clone

from probtensor import load
from probtensor.comm import Serial
from probtensor.inference.points import Points
from probtensor.inference.truncated_em import run
from probtensor.models import MoG, MoP
from probtensor.models.mixture_densities import GaussianMixture, GaussianParameters, PoissonMixture, PoissonParameters
from probtensor.models.mixture_fit import OneOfAll
from tests import reference_sparse as slow

if TYPE_CHECKING:
    from tests.conftest import RunMpi

KINDS = ("diag", "full", "spherical")
PIES = np.array([0.5, 0.3, 0.2])


def tensor(x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def with_holes(Y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third of the entries missing, of the first point all."""
    Y = np.where(rng.random(Y.shape) < 0.3, np.nan, Y)
    Y[0] = np.nan
    return Y


def gaussian(rng: np.random.Generator, kind: str, N: int = 40, D: int = 4, apart: float = 2.0) -> tuple[Any, ...]:
    """Data, means, covariances."""
    H = len(PIES)
    W = apart * rng.normal(size=(D, H))
    square = rng.normal(size=(H, D, D))
    covariance = {
        "diag": rng.uniform(0.5, 2, (H, D)),
        "full": square @ square.transpose(0, 2, 1) + np.eye(D),
        "spherical": rng.uniform(0.5, 2, H),
    }[kind]
    return slow.sample_mog(rng, N, W, covariance, PIES)[0], W, covariance


def bars(size: int = 5, value: float = 10.0) -> np.ndarray:
    """Means (2 size, size^2): horizontal and vertical bars."""
    one = np.eye(size)
    lines = [np.outer(x, np.ones(size)) for x in one] + [np.outer(np.ones(size), x) for x in one]
    return value * np.array(lines).reshape(2 * size, -1)


def n_found(found: np.ndarray, truth: np.ndarray) -> int:
    cosine = found @ truth.T / np.linalg.norm(found, axis=1)[:, None] / np.linalg.norm(truth, axis=1)
    return int((cosine[linear_sum_assignment(-cosine)] > 0.95).sum())


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_mog_is_that_of_the_slow_twin(kind: Any, holes: bool) -> None:
    rng = np.random.default_rng(0)
    Y, W, covariance = gaussian(rng, kind)
    Y = with_holes(Y, rng) if holes else Y
    states = [list(range(3))] * len(Y)
    q = slow.posterior(lambda y, s: slow.log_joint_mog(y, s, W, covariance, PIES), Y, states)
    expected = slow.m_step_mog(Y, states, q, {"W": W, "covariance": covariance, "pies": PIES})
    bound = slow.bound(lambda y, s: slow.log_joint_mog(y, s, W, covariance, PIES), Y, states)

    params = GaussianParameters(tensor(W), tensor(PIES).log(), tensor(covariance), tensor(np.full(4, 1e-9)))
    found = one_step(GaussianMixture(kind), params, Points.of(tensor(Y), holes))
    assert found.bound_history[0] == pytest.approx(bound / len(Y), rel=1e-12)
    np.testing.assert_allclose(found.params_history[1].W, expected["W"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.params_history[1].covariance, expected["covariance"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.params_history[1].log_prob.exp(), expected["pies"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("holes", [False, True])
def test_a_step_of_mop_is_that_of_the_slow_twin(holes: bool) -> None:
    rng = np.random.default_rng(1)
    W = rng.uniform(0.5, 6, (4, 3))
    Y, _ = slow.sample_mop(rng, 40, W, PIES)
    Y = with_holes(Y, rng) if holes else Y
    states = [list(range(3))] * len(Y)
    q = slow.posterior(lambda y, s: slow.log_joint_mop(y, s, W, PIES), Y, states)
    expected = slow.m_step_mop(Y, states, q, {"W": W, "pies": PIES})
    bound = slow.bound(lambda y, s: slow.log_joint_mop(y, s, W, PIES), Y, states)

    found = one_step(PoissonMixture(), PoissonParameters(tensor(W), tensor(PIES).log()), Points.of(tensor(Y), holes))
    assert found.bound_history[0] == pytest.approx(bound / len(Y), rel=1e-12)
    np.testing.assert_allclose(found.params_history[1].W, expected["W"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.params_history[1].log_prob.exp(), expected["pies"], rtol=0, atol=1e-10)


def one_step(model: Any, params: Any, points: Points) -> Any:
    """One M-step, in blocks of seven points."""
    index = torch.arange(len(points.y)).split(7)
    return run(
        model,
        params,
        [points.take(rows) for rows in index],
        OneOfAll(3),
        comm=Serial(),
        temperature=lambda step: 1.0,
        max_iter=1,
        tol=0.0,
        quiet=True,
        progress=False,
    )


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("model", [*(MoG(3, covariance=kind) for kind in KINDS), MoP(3)], ids=[*KINDS, "mop"])
def test_the_likelihood_never_falls(model: Any, holes: bool) -> None:
    rng = np.random.default_rng(2)
    Y = gaussian(rng, "full", 300, apart=0.8)[0]
    Y = rng.poisson(np.exp(0.2 * Y)) if isinstance(model, MoP) else Y
    Y = with_holes(Y, rng) if holes else Y
    fitted = clone(model).set_params(tol=1e-9, max_iter=2000, renewals=0, n_init=1, random_state=0, progress=False)
    fitted.fit(Y)
    assert fitted.n_iter_ > 10
    assert np.all(np.diff(fitted.bound_history_) >= -1e-11)
    assert fitted.score(Y) == pytest.approx(fitted.bound_, rel=1e-10)
    assert all(len(x) == len(fitted.bound_history_) for x in fitted.parameter_history_.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gaussian_log_density_has_its_half(kind: Any) -> None:
    """One component: the log-likelihood is SciPy's; two: the odds are those of densities, not of their squares."""
    rng = np.random.default_rng(3)
    Y = rng.normal(size=(50, 3))
    model = MoG(1, covariance=kind, random_state=0, progress=False).fit(Y)
    covariance = model.covariances_[0] if kind == "full" else np.diag(np.broadcast_to(model.covariances_[0], 3))
    expected = multivariate_normal(model.components_[0], covariance).logpdf(Y)
    np.testing.assert_allclose(model.score_samples(Y), expected, rtol=1e-10)

    model = MoG(2, covariance=kind, random_state=0, progress=False).fit(Y + 2 * rng.integers(0, 2, (50, 1)))
    log_joint = [
        np.log(p) + multivariate_normal(w, c if kind == "full" else np.diag(np.broadcast_to(c, 3))).logpdf(Y)
        for w, p, c in zip(model.components_, model.prior_, model.covariances_, strict=True)
    ]
    odds = np.exp(log_joint[0] - log_joint[1])
    np.testing.assert_allclose(model.transform(Y)[:, 0], odds / (1 + odds), rtol=1e-8)


def test_the_poisson_likelihood_holds_the_factorials() -> None:
    rng = np.random.default_rng(4)
    Y = rng.poisson([3.0, 7.0], (50, 2))
    model = MoP(1, random_state=0, progress=False).fit(Y)
    np.testing.assert_allclose(model.components_[0], Y.mean(0), rtol=1e-12)
    np.testing.assert_allclose(model.score_samples(Y), poisson.logpmf(Y, Y.mean(0)).sum(1), rtol=1e-10)


@pytest.mark.parametrize("kind", [*KINDS, "mop"])
def test_nothing_underflows_with_400_entries_far_apart(kind: Any) -> None:
    rng = np.random.default_rng(5)
    label = rng.integers(0, 2, 60)
    means = np.where(label[:, None] == 1, 900.0, 300.0) * np.ones(400)
    if kind == "mop":
        model, Y = MoP(2, random_state=0, progress=False), rng.poisson(means).astype(float)
    else:
        model, Y = MoG(2, covariance=kind, random_state=0, progress=False), means + rng.normal(size=means.shape)
    model.fit(Y)
    assert np.isfinite(model.bound_)
    np.testing.assert_allclose(model.transform(Y).sum(1), 1, rtol=1e-12)
    assert np.array_equal(model.predict(Y), label) or np.array_equal(model.predict(Y), 1 - label)
    if kind != "mop":
        assert np.all(np.isfinite(model.score_samples(np.full((1, 400), 1e6))))


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_components_far_from_the_origin_keep_their_width(kind: Any) -> None:
    rng = np.random.default_rng(6)
    Y = 1e6 + 100 * rng.integers(0, 2, (400, 1)) + 1e-3 * rng.normal(size=(400, 2))
    model = MoG(2, covariance=kind, min_std=1e-9, random_state=0, progress=False).fit(Y)
    assert model.noise_std_ == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_move_with_the_means_they_are_about(kind: Any, holes: bool) -> None:
    """What `partial_fit` keeps of earlier batches is as if it had been taken about the new means."""
    rng = np.random.default_rng(7)
    Y, W, covariance = gaussian(rng, kind)
    points = Points.of(tensor(with_holes(Y, rng) if holes and kind != "full" else Y), holes and kind != "full")
    model = GaussianMixture(kind)
    old = GaussianParameters(tensor(W), tensor(PIES).log(), tensor(covariance), tensor(np.full(4, 1e-9)))
    new = old._replace(W=old.W + 0.5)
    q = model.log_joint(old, points).softmax(0)
    moved = model.carried(model.statistics(old, points, None, q), old, new, points.seen is not None)
    np.testing.assert_allclose(moved, model.statistics(new, points, None, q), rtol=0, atol=1e-11)


@pytest.mark.parametrize("model", [*(MoG(3, covariance=kind) for kind in KINDS), MoP(3)], ids=[*KINDS, "mop"])
def test_a_model_comes_back_from_its_file_bit_for_bit(model: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    Y = np.abs(np.round(gaussian(rng, "diag", 200, apart=5)[0]))
    Y = with_holes(Y, rng)
    fitted = clone(model).set_params(random_state=0, progress=False).fit(Y)
    fitted.save(tmp_path / "model")
    back = load(tmp_path / "model")
    for what in ("transform", "predict", "score_samples", "reconstruct"):
        np.testing.assert_array_equal(getattr(back, what)(Y), getattr(fitted, what)(Y))
    assert back.get_params() == fitted.get_params()
    assert back.bound_history_ == fitted.bound_history_
    for name, values in fitted.parameter_history_.items():
        np.testing.assert_array_equal(back.parameter_history_[name], values)
    np.testing.assert_array_equal(back.sample(5)[0], fitted.sample(5)[0])


@pytest.mark.parametrize("model", [MoG(5), MoG(5, covariance="full"), MoP(5)], ids=["diag", "full", "mop"])
def test_components_without_points_do_no_harm(model: Any) -> None:
    """More components than distinct points, and entries that never change."""
    Y = np.array([[0.0, 5, 2], [0, 5, 2], [9, 5, 2], [9, 5, 2], [9, 5, 2]])
    model = clone(model).set_params(random_state=0, progress=False).fit(Y)
    assert np.all(np.isfinite(model.components_))
    assert np.isfinite(model.bound_)
    assert model.prior_.sum() == pytest.approx(1)
    np.testing.assert_allclose(model.transform(Y).sum(1), 1)
    np.testing.assert_allclose(model.reconstruct(Y), Y, atol=0.05)
    one = clone(model).fit(Y[:1])
    np.testing.assert_allclose(one.reconstruct(Y[:1]), Y[:1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_variance_falls_below_its_floor(kind: Any) -> None:
    rng = np.random.default_rng(9)
    Y = np.concatenate([rng.normal(size=(30, 2)), np.full((5, 2), 50.0)])
    model = MoG(2, covariance=kind, min_std=0.01, random_state=0, progress=False).fit(Y)
    small = model.covariances_ if kind != "full" else np.linalg.eigvalsh(model.covariances_)
    floor = (0.01 * Y.std(0)) ** 2
    assert small.min() >= floor.min() * (1 - 1e-9)
    assert small.min() == pytest.approx(floor.mean(), rel=0.1)
    assert np.all(np.diff(model.bound_history_) >= -1e-11)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("which", ["mog", "mop"])
def test_all_bars_are_found_and_their_parameters(which: str, single: bool) -> None:
    """In the order of their components too, which a start on the first points would not survive."""
    rng = np.random.default_rng(10)
    W = bars()
    label = np.sort(rng.integers(0, 10, 7000))
    Y = W[label] + rng.normal(size=(7000, 25)) if which == "mog" else rng.poisson(W[label]).astype(float)
    Y = Y.astype(np.float32) if single else Y
    for seed in range(3):
        model = (MoG if which == "mog" else MoP)(random_state=seed, progress=False).fit(Y)
        assert n_found(model.components_, W) == 10
        np.testing.assert_allclose(np.sort(model.prior_), np.sort(np.bincount(label) / 7000), atol=1e-3)
        assert model.components_.dtype == model.transform(Y[:5]).dtype == Y.dtype
        if which == "mog":
            assert model.noise_std_ == pytest.approx(1, rel=0.01)
            truth = norm.logpdf(Y, W[label]).sum(1).mean() - np.log(10)
        else:
            truth = poisson.logpmf(Y, W[label]).sum(1).mean() - np.log(10)
        assert model.score(Y) >= truth - 0.05


@pytest.mark.parametrize("kind", [*KINDS, "mop"])
def test_missing_entries_bias_nothing(kind: Any) -> None:
    rng = np.random.default_rng(11)
    W = bars(3)
    label = rng.integers(0, 6, 3000)
    clean = rng.poisson(W[label]).astype(float) if kind == "mop" else W[label] + rng.normal(size=(3000, 9))
    Y = with_holes(clean, rng)
    settings = {"n_components": 6, "random_state": 0, "progress": False}
    model = (MoP(**settings) if kind == "mop" else MoG(covariance=kind, **settings)).fit(Y)
    assert n_found(model.components_, W) == 6
    if kind != "mop":
        assert model.noise_std_ == pytest.approx(1, rel=0.03)
    np.testing.assert_allclose(model.transform(Y[:1])[0], model.prior_, rtol=1e-10)
    assert np.abs(model.reconstruct(Y)[1:] - W[label][1:]).mean() < 0.6


def test_full_covariances_are_found_with_holes() -> None:
    rng = np.random.default_rng(12)
    covariance = np.array([[[1.0, 0.8], [0.8, 1.0]], [[1.0, -0.6], [-0.6, 2.0]]])
    Y, _ = slow.sample_mog(rng, 4000, np.array([[0.0, 8.0], [0.0, 0.0]]), covariance, np.array([0.5, 0.5]))
    Y[rng.random(Y.shape) < 0.2] = np.nan
    model = MoG(2, covariance="full", random_state=0, progress=False).fit(Y)
    order = np.argsort(model.components_[:, 0])
    np.testing.assert_allclose(model.covariances_[order], covariance, atol=0.12)


def test_samples_have_the_moments_of_the_model() -> None:
    rng = np.random.default_rng(13)
    for kind in KINDS:
        Y, _, _ = gaussian(rng, kind, 500, D=3)
        model = MoG(3, covariance=kind, tol=1e-4, random_state=0, progress=False).fit(Y)
        drawn, codes = model.sample(40_000)
        np.testing.assert_allclose(drawn.mean(0), Y.mean(0), atol=0.1)
        np.testing.assert_allclose(codes.mean(0), model.prior_, atol=0.02)
        if kind == "full":
            np.testing.assert_allclose(np.cov(drawn.T), np.cov(Y.T), rtol=0.1, atol=0.3)
    counts = rng.poisson([[1.0, 9.0]], (300, 2))
    drawn, _ = MoP(2, tol=1e-3, random_state=0, progress=False).fit(counts).sample(20_000)
    np.testing.assert_allclose(drawn.mean(0), counts.mean(0), rtol=0.05)
    assert np.array_equal(drawn, np.round(drawn))


def test_batches_lead_to_what_all_points_do() -> None:
    rng = np.random.default_rng(14)
    W = bars(3)
    for model, Y in (
        (MoG(6), W[rng.integers(0, 6, 1500)] + rng.normal(size=(1500, 9))),
        (MoP(6), rng.poisson(W[rng.integers(0, 6, 1500)])),
    ):
        model.set_params(random_state=0, progress=False)
        for batch in np.split(Y, 5):
            model.partial_fit(batch)
        whole = clone(model).fit(Y)
        assert n_found(model.components_, W) == 6
        assert model.score(Y) > whole.score(Y) - 0.05


@pytest.mark.parametrize(
    ("model", "Y", "message"),
    [
        (MoG(0), np.ones((3, 2)), "n_components: expected an integer of at least 1, got 0"),
        (MoG(n_init=0), np.ones((3, 2)), "n_init: expected an integer of at least 1, got 0"),
        (MoG(renewals=-1), np.ones((3, 2)), "renewals: expected an integer of at least 0, got -1"),
        (MoG(max_iter=1.5), np.ones((3, 2)), "max_iter: expected an integer of at least 0, got 1.5"),
        (MoG(tol=-1), np.ones((3, 2)), "tol: expected a number of at least 0, got -1"),
        (MoG(covariance="tied"), np.ones((3, 2)), 'covariance: expected "diag", "full" or "spherical", got \'tied\''),
        (MoG(min_std=0), np.ones((3, 2)), "min_std: expected a number above 0 and below 1, got 0"),
        (MoG(), np.ones(3), r"Y: expected shape \(N, D\), got \(3,\)"),
        (MoG(), np.array([[1, np.inf]]), "Y: expected finite entries .* got inf in row 0, column 1"),
        (MoG(), np.ones((0, 2)), "Y: expected at least one point, got none"),
        (MoP(), np.array([[1.0, 2], [3, -1]]), "Y: expected counts .* got -1.0 in row 1, column 1"),
        (MoP(), np.array([[1.0, np.nan], [2.5, 1]]), "Y: expected counts .* got 2.5 in row 1, column 0"),
    ],
)
def test_bad_input_is_refused_by_name(model: Any, Y: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.fit(Y)


def test_points_of_another_width_are_refused() -> None:
    model = MoG(1, random_state=0, progress=False).fit(np.eye(3))
    with pytest.raises(ValueError, match="Y: expected 3 entries a point, got 2"):
        model.predict(np.ones((1, 2)))


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_fit_on_several_ranks_is_the_serial_fit(run_mpi: RunMpi, n: int) -> None:
    assert run_mpi("mixtures_ranks.py", n, timeout=180).stdout == f"ok on {n}\n"
