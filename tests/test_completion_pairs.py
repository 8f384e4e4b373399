"""Factors of pairs of modes: each regression against a dense one, what is chosen, unknown labels, several ranks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import probtensor as pt
from probtensor.comm import Serial
from probtensor.models import NeuralTensorCompletion
from probtensor.models.completion_pairs import RANK, SINGLE, choose_pairs, fit_pairs

SIZES = (30, 20, 10)


def planted(n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Effects, a product of two factors of the first two modes, and noise of 0.2."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, size, n) for size in SIZES], axis=1)
    u, v = rng.normal(size=(SIZES[0], 2)), rng.normal(size=(SIZES[1], 2))
    y = rng.normal(size=SIZES[2])[labels[:, 2]] + (u[labels[:, 0]] * v[labels[:, 1]]).sum(axis=1)
    return labels, y + 0.2 * rng.normal(size=n)


LABELS, Y = planted()
ONE = np.ones(len(Y))


def test_each_half_of_a_sweep_is_the_dense_ridge_regression():
    labels, y, weight = LABELS[:200], Y[:200], np.random.default_rng(1).random(200)
    weight[::7] = 0
    before = fit_pairs(labels, SIZES, y, weight, [(0, 1)], [0.7], 0, Serial(), n_sweeps=3)
    after = fit_pairs(labels, SIZES, y, weight, [(0, 1)], [0.7], 0, Serial(), n_sweeps=1, start=before)
    singles = [effect.copy() for effect in before.singles]
    product = np.einsum("nr,nr->n", before.factors[0][labels[:, 0]], before.factors[1][labels[:, 1]])
    for k, size in enumerate(SIZES):
        rest = y - before.mean - product - sum(singles[j][labels[:, j]] for j in range(3) if j != k)
        design = np.eye(size)[labels[:, k]]
        singles[k][:-1] = np.linalg.solve(
            design.T @ (weight[:, None] * design) + SINGLE * np.eye(size), design.T @ (weight * rest)
        )
        np.testing.assert_allclose(after.singles[k], singles[k], atol=1e-10)
    rest = y - before.mean - sum(singles[j][labels[:, j]] for j in range(3))
    factors = [part.copy() for part in before.factors]
    for side, size in ((0, 30), (1, 20)):
        given = factors[1 - side][labels[:, 1 - side]]
        design = (np.eye(size)[labels[:, side]][:, :, None] * given[:, None, :]).reshape(200, -1)
        normal = design.T @ (weight[:, None] * design) + 0.7 * np.eye(size * RANK)
        factors[side][:-1] = np.linalg.solve(normal, design.T @ (weight * rest)).reshape(size, RANK)
        np.testing.assert_allclose(after.factors[side], factors[side], atol=1e-8)


def test_the_planted_pair_is_chosen_and_recovered_down_to_the_noise():
    held_out = np.arange(3000) % 5 == 0
    pairs, strengths = choose_pairs(LABELS, SIZES, Y, ONE, held_out, 0, Serial())
    assert (0, 1) in pairs
    found = fit_pairs(LABELS, SIZES, Y, np.where(held_out, 0.0, 1.0), pairs, strengths, 0, Serial())
    assert pt.metrics.rmse(Y[held_out], found.predict(LABELS[held_out])) < 1.25 * 0.2


def test_nothing_is_chosen_where_labels_add_up():
    rng = np.random.default_rng(0)
    y = rng.normal(size=30)[LABELS[:, 0]] + rng.normal(size=20)[LABELS[:, 1]] + 0.5 * rng.normal(size=3000)
    assert choose_pairs(LABELS, SIZES, y, ONE, np.arange(3000) % 5 == 0, 0, Serial()) == ([], [])


def test_unknown_labels_have_neither_effects_nor_factors():
    found = fit_pairs(LABELS, SIZES, Y, ONE, [(0, 1), (1, 2)], [1.0, 2.0], 0, Serial())
    unknown = np.array([[-1, -1, -1], [3, -1, 4]])
    np.testing.assert_allclose(found.predict(unknown)[0], found.mean)
    product = found.factors[2][-1] @ found.factors[3][4]
    np.testing.assert_allclose(
        found.predict(unknown)[1], found.mean + found.singles[0][3] + found.singles[2][4] + product
    )
    assert product == 0
    np.testing.assert_array_equal(found.strange(LABELS[:5]), 0)
    own = found.factors[0][:-1] @ found.factors[1][:-1].T
    one, both = found.strange(np.array([[-1, 3, 4], [-1, -1, 4]]))
    singles = [np.mean(effect[:-1] ** 2) for effect in found.singles]
    assert one == pytest.approx(singles[0] + np.mean(own[:, 3] ** 2))
    others = found.factors[2][:-1] @ found.factors[3][4]
    assert both == pytest.approx(singles[0] + singles[1] + np.mean(own**2) + np.mean(others**2))


def test_a_pair_starts_alike_whichever_others_there_are_and_chunks_do_not_matter(monkeypatch):
    alone = fit_pairs(LABELS, SIZES, Y, ONE, [(1, 2)], [1.0], 5, Serial(), n_sweeps=0)
    beside = fit_pairs(LABELS, SIZES, Y, ONE, [(0, 1), (1, 2)], [1.0, 1.0], 5, Serial(), n_sweeps=0)
    np.testing.assert_array_equal(alone.factors[0], beside.factors[2])
    whole = fit_pairs(LABELS, SIZES, Y, ONE, [(0, 1)], [1.0], 5, Serial())
    monkeypatch.setattr("probtensor.models.completion_pairs.CHUNK", 701)
    parts = fit_pairs(LABELS, SIZES, Y, ONE, [(0, 1)], [1.0], 5, Serial())
    np.testing.assert_allclose(parts.factors[0], whole.factors[0], atol=1e-8)


@pytest.mark.parametrize("named", [True, False])
def test_the_estimator_finds_and_names_pairs_and_saves_them(named, tmp_path):
    X = pd.DataFrame(LABELS, columns=["a", "b", "c"]) if named else LABELS
    model = NeuralTensorCompletion(
        rank=2, head=None, max_epochs=2, n_members=2, random_state=0, progress=False, device="cpu"
    ).fit(X[:2400], Y[:2400])
    first, second = ("a", "b") if named else ("mode_0", "mode_1")
    assert (first, second) in model.pair_strengths_
    assert model.weights_["factors of pairs"] > 0.5
    assert pt.metrics.rmse(Y[2400:], model.predict(X[2400:])) < 1.25 * 0.2
    model.save(tmp_path / "a.model")
    loaded = pt.load(tmp_path / "a.model")
    np.testing.assert_array_equal(loaded.predict(X[2400:]), model.predict(X[2400:]))
    assert loaded.pair_strengths_ == model.pair_strengths_
    none = NeuralTensorCompletion(rank=0, head=None, random_state=0).fit(X[:500], Y[:500])
    assert none.pair_strengths_ == {}
