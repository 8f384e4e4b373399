"""Decompositions of tables with holes: exact where they can be, stationary where not, blind to hidden cells."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from probtensor.baselines import MaskedNonNegativeParafac, MaskedParafac, MaskedTucker
from probtensor.decomposition_sweeps import Decomposition, complete, hals_sweep, hooi_sweep, tucker_ranks, values_at

SHAPE = (6, 5, 4)
BOTH = [MaskedNonNegativeParafac(random_state=0), MaskedTucker(random_state=0)]
NAMES = ["hals", "hooi"]


def table(noise: float = 0.0, seed: int = 1, shape: tuple[int, ...] = SHAPE, rank: int = 2):
    """Four fifths of the cells of a non-negative CP tensor, and the whole tensor."""
    rng = np.random.default_rng(seed)
    factors = [rng.uniform(size=(n, rank)) for n in shape]
    letters = "abcdefgh"[: len(shape)]
    tensor = np.einsum(",".join(letter + "r" for letter in letters) + "->" + letters, *factors)
    tensor = tensor + noise * rng.normal(size=shape)
    cells = np.argwhere(rng.uniform(size=shape) < 0.8)
    return pd.DataFrame(cells, columns=list(letters)), tensor[tuple(cells.T)], tensor


def start(kind: str, shape: tuple[int, ...] = SHAPE, rank: int = 2) -> Decomposition:
    rng = np.random.default_rng(0)
    if kind == "hals":
        return Decomposition(None, [rng.uniform(size=(n, rank)) for n in shape])
    factors = [np.linalg.qr(rng.normal(size=(n, rank)))[0] for n in shape]
    return Decomposition(np.zeros((rank,) * len(shape)), factors)


def sweep(kind: str):
    return hals_sweep if kind == "hals" else hooi_sweep


@pytest.mark.parametrize("model", BOTH, ids=NAMES)
@pytest.mark.parametrize("shape", [SHAPE, (7, 6), (4, 3, 1, 5)])
def test_hidden_cells_of_an_exact_tensor_are_found(model, shape):
    X, y, tensor = table(shape=shape, rank=1)
    fitted = clone(model).set_params(rank=1, tol=1e-13, max_iter=3000).fit(X, y)
    cells = np.argwhere(np.isfinite(tensor))
    np.testing.assert_allclose(fitted.predict(pd.DataFrame(cells, columns=X.columns)), tensor.ravel(), rtol=1e-5)
    assert fitted.errors_[-1] < 1e-6


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("stored", [0.0, 1e9, -3.0, float("nan"), float("inf")])
def test_what_is_stored_in_hidden_cells_does_not_matter(kind, stored):
    _, _, tensor = table(noise=0.1)
    mask = (np.random.default_rng(2).uniform(size=SHAPE) < 0.8).astype(float)
    truth = complete(tensor, mask, start(kind), sweep(kind), 50, 1e-9)
    other = np.where(mask == 1, tensor, stored)
    kept = other.copy()
    found = complete(other, mask, start(kind), sweep(kind), 50, 1e-9)
    np.testing.assert_array_equal(other, kept)
    np.testing.assert_array_equal(found.errors, truth.errors)
    for one, two in zip(found.factors, truth.factors, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("model", BOTH, ids=NAMES)
def test_no_sweep_raises_the_error_on_observed_cells(model):
    X, y, _ = table(noise=0.1)
    fitted = clone(model).set_params(tol=1e-9, max_iter=3000).fit(X, y)
    assert np.all(np.diff(fitted.errors_) <= 1e-12)
    error = np.linalg.norm(fitted.predict(X) - y) / np.linalg.norm(y)
    assert fitted.errors_[-1] == pytest.approx(error, rel=1e-9)


def test_the_fits_are_stationary_points_of_the_squared_error_over_observed_cells():
    X, y, _ = table(noise=0.1)
    positions = X.to_numpy().T.copy()
    for model, formula in ((BOTH[0], "ir,jr,kr->ijk"), (BOTH[1], "ir,js,kt,rst->ijk")):
        fitted = clone(model).set_params(rank=2, tol=1e-14, max_iter=20_000).fit(X, y)
        parts = [*fitted.factors_, *([fitted.core_] if isinstance(model, MaskedTucker) else [])]
        tensors = [torch.tensor(part, requires_grad=True) for part in parts]
        loss = ((torch.einsum(formula, *tensors)[tuple(positions)] - torch.tensor(y)) ** 2).sum()
        loss.backward()
        for part in tensors:
            gradient = part.grad
            if isinstance(model, MaskedNonNegativeParafac):  # Karush, Kuhn, Tucker: at zero it may only point down
                assert part.min() >= 0.0
                assert gradient.min() > -1e-4
                gradient = gradient * part.detach()
            assert gradient.abs().max() < 1e-4


def test_factors_of_tucker_are_orthonormal_and_values_are_the_contraction():
    X, y, tensor = table(noise=0.1)
    model = MaskedTucker(rank=(3, 2, 2), tol=1e-9, random_state=0).fit(X, y)
    assert model.core_.shape == (3, 2, 2)
    for factor in model.factors_:
        np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-12)
    dense = np.einsum("ir,js,kt,rst->ijk", *model.factors_, model.core_)
    cells = np.argwhere(np.isfinite(tensor))
    np.testing.assert_allclose(model.predict(pd.DataFrame(cells, columns=X.columns)), dense.ravel(), atol=1e-12)


def test_blocks_of_rows_do_not_change_predictions(monkeypatch):
    rng = np.random.default_rng(0)
    model = Decomposition(rng.normal(size=(2, 3)), [rng.normal(size=(4, 2)), rng.normal(size=(5, 3))])
    cells = rng.integers(0, 4, size=(17, 2))
    whole = values_at(model, cells)
    monkeypatch.setattr("probtensor.decomposition_sweeps.BLOCK_NUMBERS", 7)
    np.testing.assert_array_equal(values_at(model, cells), whole)
    assert values_at(model, cells[:0]).shape == (0,)


@pytest.mark.parametrize("model", BOTH, ids=NAMES)
def test_more_starts_are_no_worse_and_the_seed_decides(model):
    X, y, _ = table(noise=0.1)
    kept_X, kept_y = X.copy(), y.copy()
    errors = []
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for n_restarts in (1, 4):
        fitted = clone(model).set_params(n_restarts=n_restarts, tol=1e-6, max_iter=3000).fit(X, y)
        errors.append(np.mean((fitted.predict(X) - y) ** 2))
    assert errors[1] <= errors[0]
    np.testing.assert_array_equal(clone(fitted).fit(X, y).predict(X), fitted.predict(X))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    pd.testing.assert_frame_equal(X, kept_X)
    np.testing.assert_array_equal(y, kept_y)


@pytest.mark.parametrize("model", [MaskedParafac(rank=1), *BOTH], ids=["als", *NAMES])
def test_labels_units_repeated_cells_and_zeros(model):
    X, y, _ = table(noise=0.1)
    named = X.astype({"a": str})
    small = clone(model).set_params(rank=1, random_state=0).fit(named, y)
    large = clone(small).fit(named, 1e6 * y)
    np.testing.assert_allclose(large.predict(named), 1e6 * small.predict(named), rtol=1e-8)
    unknown = pd.DataFrame({"a": ["nine"], "b": [0], "c": [0]})
    np.testing.assert_allclose(small.predict(unknown), [y.mean()])
    absent = named.assign(a=pd.Categorical(named["a"], categories=[*"0123456"]))
    without = clone(small).fit(absent[absent["a"] != "3"], y[absent["a"] != "3"])
    assert np.all(np.isfinite(without.predict(pd.DataFrame({"a": ["3", "6"], "b": 0, "c": 0}))))
    twice = clone(small).fit(pd.concat([named, named]), np.append(y - 0.01, y + 0.01))
    np.testing.assert_allclose(twice.predict(named), small.predict(named), rtol=1e-2)
    np.testing.assert_array_equal(clone(small).fit(named, 0 * y).predict(named), 0 * y)


def test_a_single_rank_of_tucker_is_lowered_to_what_the_modes_can_have():
    assert tucker_ranks(3, (5, 2, 7)) == (3, 2, 3)
    assert tucker_ranks(4, (9, 2)) == (2, 2)
    assert tucker_ranks(2, (1, 1, 5)) == (1, 1, 1)
    assert tucker_ranks(np.array([2, 1, 2]), (5, 2, 7)) == (2, 1, 2)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (MaskedTucker(rank=0), "rank: expected 3 numbers of at least 1, .* got 0"),
        (MaskedTucker(rank=(2, 2)), r"rank: expected 3 numbers .* got \(2, 2\)"),
        (MaskedTucker(rank=(2, 2, 9)), r"rank: expected at most the labels of each mode, \(6, 5, 4\)"),
        (MaskedTucker(rank=(4, 1, 2)), "product of the other ranks"),
        (MaskedTucker(max_iter=0), "max_iter: expected at least 1, got 0"),
        (MaskedNonNegativeParafac(rank=0), "rank: expected at least 1, got 0"),
        (MaskedNonNegativeParafac(n_restarts=0), "n_restarts: expected at least 1, got 0"),
    ],
)
def test_refusals_name_the_argument(model, words):
    X, y, _ = table()
    with pytest.raises(ValueError, match=words):
        model.fit(X, y)


@pytest.mark.parametrize("model", BOTH, ids=NAMES)
def test_a_fit_that_stops_early_says_so(model):
    X, y, _ = table(noise=0.1)
    with pytest.warns(ConvergenceWarning, match="not converged in 1 sweeps"):
        clone(model).set_params(max_iter=1).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="not converged in 2 sweeps"):
        clone(model).set_params(max_iter=2, n_restarts=2).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clone(model).set_params(tol=1e-3).fit(X, y)
