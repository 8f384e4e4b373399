"""Alignment against all there are, core consistency against one dense least-squares problem."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probtensor.baselines import MaskedParafac
from probtensor.components import align_components, core_consistency
from tests.reference_components import alignments, core_consistency_by_kronecker, cosine


def model(shape: tuple[int, ...], rank: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, rank)) for n in shape]


def dense(factors: list[np.ndarray]) -> np.ndarray:
    letters = "abcdefgh"[: len(factors)]
    return np.einsum(",".join(letter + "r" for letter in letters) + "->" + letters, *factors)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (3, 1, 4, 5)])
@pytest.mark.parametrize("rank", [1, 3])
def test_alignment_undoes_permutation_and_signs_and_keeps_the_tensor(shape, rank):
    reference, rng = model(shape, rank), np.random.default_rng(1)
    order = rng.permutation(rank)
    signs = rng.choice([-1.0, 1.0], size=(len(shape), rank))
    signs[0] *= signs.prod(axis=0)
    mixed = [3.0 * f[:, order] * s for f, s in zip(reference, signs, strict=True)]
    kept = [f.copy() for f in mixed]
    aligned = align_components(mixed, reference)
    for found, given, wanted, sign, before in zip(aligned.factors, mixed, reference, aligned.signs, kept, strict=True):
        if len(wanted) > 1:
            np.testing.assert_allclose(found, 3.0 * wanted, atol=1e-12)
        np.testing.assert_array_equal(found, given[:, aligned.permutation] * sign)
        np.testing.assert_array_equal(given, before)
    np.testing.assert_allclose(aligned.congruence, 1.0)
    np.testing.assert_allclose(dense(aligned.factors), dense(mixed), atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_alignment_of_unlike_models_is_better(seed):
    factors, reference = model((5, 4, 3), 3, seed), model((5, 4, 3), 3, seed + 100)
    found = align_components(factors, reference)
    np.testing.assert_array_equal(found.signs.prod(axis=0), 1.0)

    def judge(order, signs):
        cosines = np.array(
            [
                [cosine(w[:, r], s[r] * f[:, order[r]]) for r in range(3)]
                for f, w, s in zip(factors, reference, signs, strict=True)
            ]
        )
        return round(cosines.prod(axis=0).sum(), 9), cosines.sum()

    best = max(judge(order, signs) for order, signs in alignments(factors))
    assert judge(found.permutation, found.signs) == pytest.approx(best, abs=1e-8)
    assert found.congruence.sum() == pytest.approx(best[0], abs=1e-8)


def test_an_opposite_component_is_not_taken_for_the_same_one():
    reference = [np.array([[1.0, 1.0], [0.0, 0.1]])] * 3
    factors = [np.array([[-1.0, 1.0], [-0.05, 0.3]]), reference[1], reference[2]]
    assert align_components(factors, reference).congruence.min() < 0.0


def test_zero_components_are_left_over():
    reference = model((4, 3), 2)
    factors = [np.c_[np.zeros(4), reference[0][:, 0]], reference[1][:, [1, 0]]]
    found = align_components(factors, reference)
    assert found.permutation.tolist() == [1, 0]
    np.testing.assert_allclose(found.congruence, [1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(("shape", "rank"), [((5, 4), 2), ((5, 4, 3), 1), ((5, 4, 3), 3), ((4, 3, 5, 3), 2)])
def test_core_consistency_is_its_definition(shape, rank):
    factors = model(shape, rank)
    tensor = dense(factors) + np.random.default_rng(1).normal(size=shape)
    kept = tensor.copy()
    expected = core_consistency_by_kronecker(tensor, factors)
    assert core_consistency(tensor, factors) == pytest.approx(expected, rel=1e-9)
    stretched = [factors[0] * 100.0, factors[1] / 100.0, *factors[2:]]
    assert core_consistency(tensor, stretched) == pytest.approx(expected, rel=1e-9)
    assert core_consistency(dense(factors), factors) == pytest.approx(100.0, abs=1e-9)
    np.testing.assert_array_equal(tensor, kept)


def test_missing_cells_take_the_models_values():
    factors = model((5, 4, 3), 2)
    tensor = dense(factors) + 0.1 * np.random.default_rng(1).normal(size=(5, 4, 3))
    holes = np.random.default_rng(2).uniform(size=tensor.shape) < 0.3
    filled, holed = np.where(holes, dense(factors), tensor), np.where(holes, np.nan, tensor)
    assert core_consistency(holed, factors) == pytest.approx(core_consistency(filled, factors), rel=1e-12)
    assert np.isnan(holed).sum() == holes.sum()


def test_core_consistency_falls_with_components_that_are_not_there():
    rng = np.random.default_rng(0)
    tensor = dense(model((8, 7, 6), 2)) + 0.05 * rng.normal(size=(8, 7, 6))
    cells = pd.DataFrame(np.argwhere(np.isfinite(tensor)), columns=["a", "b", "c"])
    found = {}
    for rank in (1, 2, 4):
        fit = MaskedParafac(rank=rank, l2_reg=0.0, n_restarts=2, random_state=0).fit(cells, tensor.ravel())
        found[rank] = core_consistency(tensor, fit.factors_)
    assert found[1] == pytest.approx(100.0, abs=1e-3)
    assert found[2] > 95.0
    assert found[4] < 50.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: align_components([], []), "factors: expected matrices with one number"),
        (lambda: align_components([np.ones((2, 2))], [np.ones((2, 3))]), "factors: expected the shapes of reference"),
        (lambda: core_consistency(np.ones((2, 2)), [np.ones((2, 1)), np.ones((3, 1))]), "tensor: expected the shape"),
        (lambda: core_consistency(np.full((2, 2), np.nan), [np.ones((2, 1))] * 2), "tensor: expected finite values"),
        (lambda: core_consistency(np.full((2, 2), np.inf), [np.ones((2, 1))] * 2), "tensor: expected finite values"),
        (lambda: core_consistency(np.ones((2, 2)), [np.ones((2, 1)), np.ones(2)]), r"factors\[1\]: expected a matrix"),
    ],
)
def test_refusals_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
