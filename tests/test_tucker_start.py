"""A Tucker start from components: exact where ranks suffice, else the truncated HOSVD of the dense tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probtensor.models import BayesianTucker
from probtensor.models.tucker_start import core_of_components

SIZES = (9, 8, 7)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(core: Tensor, factors: list[Tensor]) -> Tensor:
    return torch.einsum("abc,ia,jb,kc->ijk", core.reshape([f.shape[1] for f in factors]), *factors)


def dense_cp(components: list[Tensor]) -> Tensor:
    return torch.einsum("ir,jr,kr->ijk", *components)


def columns_and_free(ranks: tuple[int, ...], ones: bool) -> tuple[list[Tensor], list[Tensor]]:
    free = [torch.tensor([False] * ones + [True] * r) for r in ranks]
    columns = [draws(n, len(f), seed=k + 20) for k, (n, f) in enumerate(zip(SIZES, free, strict=True))]
    for column, latent in zip(columns, free, strict=True):
        column[:, ~latent] = 1.0
    return columns, free


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_with_enough_columns_the_tensor_is_the_same(ones: bool, rank: int) -> None:
    components = [draws(n, rank, seed=k) for k, n in enumerate(SIZES)]
    columns, free = columns_and_free((4, 4, 3), ones)
    given = [column.clone() for column in columns]
    factors, core = core_of_components(components, columns, free)
    torch.testing.assert_close(dense(core, factors), dense_cp(components))
    for factor, column, before, latent in zip(factors, columns, given, free, strict=True):
        assert torch.equal(column, before)
        assert torch.equal(factor[:, ~latent], before[:, ~latent])
        spare = latent.nonzero().squeeze(-1)[rank:]
        assert torch.equal(factor[:, spare], before[:, spare])  # for which there was no direction


def test_with_few_columns_it_is_the_truncated_hosvd() -> None:
    components, ranks = [draws(n, 5, seed=k) for k, n in enumerate(SIZES)], (2, 3, 4)
    factors, core = core_of_components(components, *columns_and_free(ranks, ones=False))
    wanted = whole = dense_cp(components)
    for k, (rank, factor) in enumerate(zip(ranks, factors, strict=True)):
        left = torch.linalg.svd(whole.movedim(k, 0).flatten(1), full_matrices=False)[0][:, :rank]
        wanted = torch.tensordot(wanted.movedim(k, -1), left @ left.T, dims=1).movedim(-1, k)
        torch.testing.assert_close(factor.square().mean(0), torch.ones(rank, dtype=torch.float64))
    torch.testing.assert_close(dense(core, factors), wanted)


def test_a_fit_finds_planted_components() -> None:
    rng = np.random.default_rng(0)
    sizes: Any = (20, 15, 10)
    X = np.stack([rng.integers(0, size, 1200) for size in sizes], axis=1)
    f = sum(np.prod([rng.normal(size=size)[X[:, k]] for k, size in enumerate(sizes)], axis=0) for _ in range(3))
    y = f + 0.1 * rng.normal(size=len(X))
    model = BayesianTucker(3, random_state=0, progress=False, device="cpu").fit(X[:1000], y[:1000])
    assert np.sqrt(np.mean((model.predict(X[1000:]) - y[1000:]) ** 2)) < 0.2 * y.std()
    assert model.bound_history_[0] < model.bound_
