"""Noisy-OR against its slow twin, and on bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from probtensor import load
from probtensor.inference.points import Points
from probtensor.inference.state_sets import Own, Selected, every_state, few_active
from probtensor.models import NoisyOR
from probtensor.models.noisy_or import NoisyOrCoding, NoisyOrParameters
from tests import reference_sparse as slow

D, H = 4, 3
PI = np.array([0.2, 0.5, 0.4])


def tensor(x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def data(rng: np.random.Generator, N: int, holes: bool) -> tuple[np.ndarray, np.ndarray]:
    W = rng.uniform(0.05, 0.9, (D, H))
    Y, _ = slow.sample_noisy_or(rng, N, W, PI)
    if holes:
        Y[rng.random(Y.shape) < 0.3] = np.nan
        Y[0] = np.nan
    return Y, W


def bars(size: int, rng: np.random.Generator, N: int, chance: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Data, and W' (2 size, size^2)."""
    one = np.eye(size)
    lines = [np.outer(x, np.ones(size)) for x in one] + [np.outer(np.ones(size), x) for x in one]
    W = chance * np.array(lines).reshape(2 * size, -1)
    return slow.sample_noisy_or(rng, N, W.T, 0.25)[0], W


def n_found(found: np.ndarray, truth: np.ndarray) -> int:
    cosine = found @ truth.T / np.linalg.norm(found, axis=1)[:, None] / np.linalg.norm(truth, axis=1)
    return int((cosine[linear_sum_assignment(-cosine)] > 0.95).sum())


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", ["all", "own", "selected"])
def test_a_step_is_that_of_the_slow_twin(kind: str, holes: bool) -> None:
    """All states, in a table or as each point's own; or few states over two of three candidates."""
    rng = np.random.default_rng(0)
    Y, W = data(rng, 30, holes)
    everything = slow.enumerate_states(H)
    of_points = [everything] * len(Y)
    model, params = NoisyOrCoding(), NoisyOrParameters(tensor(W), tensor(PI))
    points = Points.of(tensor(Y), holes)
    states: Selected | Own
    if kind == "all":
        states = Selected(every_state(H, (1.0,), tensor(0)), torch.arange(H)[:, None].expand(H, len(Y)), H)
    elif kind == "own":
        states = Own(tensor(everything)[:, :, None].expand(-1, -1, len(Y)))
    else:
        index = model.candidates(params, points, 2)
        states = Selected(few_active(2, 2, (1.0,), tensor(0)), index, H)
        of_points = [slow.et_states(c.tolist(), H) for c in index.T]

    def log_joint(y: np.ndarray, s: Any) -> float:
        return slow.log_joint_noisy_or(y, s, W, PI)

    q = slow.posterior(log_joint, Y, of_points)
    expected = slow.m_step_noisy_or(Y, of_points, q, {"W": W, "pi": PI})
    joint = model.log_joint(params, points, states)
    assert float(joint.logsumexp(0).sum()) == pytest.approx(slow.bound(log_joint, Y, of_points), rel=1e-12)
    q_found = joint.softmax(0)
    found = model.update(params, model.statistics(params, points, states, q_found), holes)
    np.testing.assert_allclose(found.W, expected["W"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.prob, expected["pi"], rtol=0, atol=1e-10)

    on = slow.expectation(
        lambda y, s: [1 - np.prod([1 - W[d, h] for h in range(H) if s[h]]) for d in range(D)], Y, of_points, q
    )
    np.testing.assert_allclose(model.reconstruct(params, points, states, q_found), on, atol=1e-12)
    active = slow.expectation(lambda y, s: s, Y, of_points, q)
    np.testing.assert_allclose(model.codes(params, points, states, q_found), active, atol=1e-12)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("states", ["selected", "evolved", "all"])
def test_the_bound_never_falls(states: Any, holes: bool) -> None:
    Y, _ = data(np.random.default_rng(1), 200, holes)
    settings = {"n_candidates": 2, "n_states": 6, "annealing": 5, "renewals": 0, "max_iter": 3000, "tol": 1e-7}
    model = NoisyOR(H, states=states, random_state=0, progress=False, **settings).fit(Y)
    assert model.n_iter_ > 5
    assert np.all(np.diff(model.bound_history_) >= -1e-10)


def test_candidates_are_the_causes_of_a_point() -> None:
    """With three of many bars on, those three; overlaps do not hide one."""
    rng = np.random.default_rng(2)
    _, W = bars(5, rng, 1, 0.95)
    params = NoisyOrParameters(tensor(W.T).clamp(0.001), tensor(np.full(10, 0.2)))
    on = np.array([rng.choice(10, 3, replace=False) for _ in range(50)])
    Y = np.array([W[rows].max(0) > 0 for rows in on])
    found = NoisyOrCoding().candidates(params, Points(tensor(Y), None), 5)
    assert all(set(rows) <= set(column) for rows, column in zip(on.tolist(), found.T.tolist(), strict=True))
    assert torch.equal(found, found.sort(0).values)


@pytest.mark.parametrize("single", [False, True])
def test_all_bars_are_found_and_their_parameters(single: bool) -> None:
    Y, W = bars(4, np.random.default_rng(3), 500)
    Y = Y.astype(np.float32) if single else Y
    for seed in range(2):
        model = NoisyOR(8, random_state=seed, progress=False).fit(Y)
        assert n_found(model.components_, W) == 8
        np.testing.assert_allclose(model.prior_, 0.25, atol=0.07)
        assert model.components_.dtype == model.transform(Y).dtype == Y.dtype
        assert not hasattr(model, "noise_std_")
        assert list(model.parameter_history_) == ["prior"]


def test_chances_below_one_are_found_with_holes() -> None:
    rng = np.random.default_rng(4)
    Y, W = bars(3, rng, 1500, 0.8)
    clean = Y.copy()
    Y[rng.random(Y.shape) < 0.1] = np.nan
    model = NoisyOR(6, random_state=0, progress=False, tol=1e-5).fit(Y)
    assert n_found(model.components_, W) == 6
    assert np.sort(model.components_.max(1)).mean() == pytest.approx(0.8, abs=0.1)
    filled = model.reconstruct(Y)[np.isnan(Y)]
    truth = clean[np.isnan(Y)]
    assert np.mean((filled > 0.5) == truth) > np.mean(np.round(clean.mean()) == truth) + 0.1


def test_nothing_underflows_with_400_entries() -> None:
    rng = np.random.default_rng(5)
    Y, _ = bars(20, rng, 60)
    model = NoisyOR(4, n_candidates=3, max_active=2, annealing=5, renewals=1, tol=1e-4, random_state=0,
                    progress=False).fit(Y)  # fmt: skip
    assert np.isfinite(model.bound_)
    for extreme in (np.zeros((1, 400)), np.ones((1, 400))):
        assert np.isfinite(model.score(extreme))
        assert np.all(np.isfinite(model.transform(extreme)))


def test_components_without_points_do_no_harm() -> None:
    Y = np.zeros((20, 4))
    Y[10:, :2] = 1
    model = NoisyOR(6, random_state=0, progress=False, tol=1e-3).fit(Y)
    assert np.all(np.isfinite(model.components_))
    assert np.all((model.components_ >= 0) & (model.components_ <= 1))
    np.testing.assert_allclose(model.reconstruct(Y), Y, atol=0.05)


@pytest.mark.parametrize("states", ["selected", "evolved", "all"])
def test_a_model_comes_back_from_its_file_bit_for_bit(states: Any, tmp_path: Path) -> None:
    Y, _ = data(np.random.default_rng(6), 100, True)
    model = NoisyOR(H, states=states, n_states=6, annealing=5, renewals=1, max_iter=500, tol=1e-4, random_state=0,
                    progress=False).fit(Y)  # fmt: skip
    model.save(tmp_path / "model")
    back = load(tmp_path / "model")
    for what in ("transform", "map_states", "score_samples", "reconstruct"):
        np.testing.assert_array_equal(getattr(back, what)(Y), getattr(model, what)(Y))
    assert back.get_params() == model.get_params()
    np.testing.assert_array_equal(back.sample(5)[0], model.sample(5)[0])


def test_samples_have_the_moments_of_the_model() -> None:
    Y, _ = bars(3, np.random.default_rng(7), 500, 0.9)
    model = NoisyOR(6, random_state=0, progress=False, tol=1e-4).fit(Y)
    drawn, codes = model.sample(20_000)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(codes.mean(0), model.prior_, atol=0.02)
    np.testing.assert_allclose(drawn.mean(0), Y.mean(0), atol=0.06)
    decoded = model.inverse_transform(np.eye(6))
    np.testing.assert_allclose(decoded, model.components_, atol=1e-12)


@pytest.mark.parametrize(
    ("Y", "message"),
    [
        (np.array([[0.0, 1], [2, 0]]), "Y: expected 0 or 1 .* got 2.0 in row 1, column 0"),
        (np.array([[0.0, np.nan], [1, 0.5]]), "Y: expected 0 or 1 .* got 0.5 in row 1, column 1"),
        (np.ones((0, 2)), "Y: expected at least one point, got none"),
        (np.ones(3), r"Y: expected shape \(N, D\), got \(3,\)"),
    ],
)
def test_bad_input_is_refused_by_name(Y: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyOR(2).fit(Y)


def test_data_may_be_booleans() -> None:
    Y, _ = bars(2, np.random.default_rng(8), 100)
    settings: dict[str, Any] = {"random_state": 0, "progress": False, "tol": 1e-4}
    model = NoisyOR(2, **settings).fit(Y > 0)
    np.testing.assert_array_equal(model.components_, NoisyOR(2, **settings).fit(Y).components_)
