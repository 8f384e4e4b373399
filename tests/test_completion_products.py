"""Products of factors of all modes: against plain sums, in the estimator, files, unknown labels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import probtensor as pt
from probtensor.comm import Serial
from probtensor.estimator import UnknownLabelWarning
from probtensor.metrics import rmse
from probtensor.models import NeuralTensorCompletion
from probtensor.models.completion_products import Products, choose_products, fit_products

SIZES = (20, 15, 12)


def table(n: int, rank: int, seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Different cells of a CP tensor with effects; standardised."""
    rng = np.random.default_rng(seed)
    labels = np.stack(np.unravel_index(rng.choice(np.prod(SIZES), n, replace=False), SIZES), axis=1)
    factors = [rng.normal(size=(size, rank)) for size in SIZES]
    y = sum(rng.normal(size=size)[column] for size, column in zip(SIZES, labels.T, strict=True))
    y = y + np.prod([f[column] for f, column in zip(factors, labels.T, strict=True)], axis=0).sum(1)
    y = y + noise * rng.normal(size=n)
    return labels.astype(np.int64), (y - y.mean()) / y.std()


def test_predictions_and_variances_are_sums_over_labels() -> None:
    rng = np.random.default_rng(0)
    factors = [np.vstack([rng.normal(size=(size, 2)), np.zeros((1, 2))]) for size in (3, 4, 2)]
    effects = [np.append(rng.normal(size=size), 0.0) for size in (3, 4, 2)]
    found = Products(1.0, effects, factors)
    labels = np.array([[0, 1, 1], [2, 3, 0], [-1, 1, 1], [-1, 2, -1]])
    for row, value, variance in zip(labels, found.predict(labels), found.strange(labels), strict=True):
        product = sum(factors[0][row[0], r] * factors[1][row[1], r] * factors[2][row[2], r] for r in range(2))
        assert value == pytest.approx(product + sum(effects[k][row[k]] for k in range(3)))
        candidates = [range(len(factors[k]) - 1) if row[k] < 0 else [row[k]] for k in range(3)]
        squares = [
            sum(factors[0][a, r] * factors[1][b, r] * factors[2][c, r] for r in range(2)) ** 2
            for a in candidates[0]
            for b in candidates[1]
            for c in candidates[2]
        ]
        expected = np.mean(squares) + sum(np.mean(effects[k][:-1] ** 2) for k in range(3) if row[k] < 0)
        assert variance == pytest.approx(expected if (row < 0).any() else 0.0)


def test_the_ridge_comes_from_rows_held_out_and_noise_has_no_products() -> None:
    held_out = np.random.default_rng(1).random(900) < 0.2
    labels, y = table(900, 2)
    ridge = choose_products(labels, SIZES, y, np.ones(900), held_out, 0, Serial())
    assert ridge is not None
    found = fit_products(labels, SIZES, y, np.where(held_out, 0.0, 1.0), ridge, 0, Serial())
    assert rmse(y[held_out], found.predict(labels[held_out])) < 0.2
    noise = np.random.default_rng(2).normal(size=900)
    assert choose_products(labels, SIZES, noise, np.ones(900), held_out, 0, Serial()) is None


def test_the_estimator_finds_a_tensor_of_low_rank_and_keeps_it_in_its_file(tmp_path) -> None:
    labels, y = table(1100, 2)
    X = pd.DataFrame(labels, columns=["a", "b", "c"]).astype(str)
    settings = {"rank": 2, "head": None, "max_epochs": 1, "random_state": 0, "progress": False, "device": "cpu"}
    model = NeuralTensorCompletion(**settings).fit(X[:900], y[:900])
    assert model.weights_["factors of all modes"] > 0.5
    mean, std = model.predict(X[900:], return_std=True)
    assert rmse(y[900:], mean) < 0.25
    model.save(tmp_path / "m.model")
    loaded = pt.load(tmp_path / "m.model")
    assert np.array_equal(loaded.predict(X[900:]), mean)
    assert loaded.weights_ == model.weights_
    new = X[900:].assign(a="new")
    with pytest.warns(UnknownLabelWarning):
        wide = model.predict(new, return_std=True)[1]
    assert np.median(wide) > 3 * np.median(std)
    two = NeuralTensorCompletion(**settings).fit(X[["a", "b"]][:900], y[:900])
    assert "factors of all modes" not in two.weights_, "of two modes these are the factors of their pair"
