"""CP and Tucker moments against loops over all index tuples."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probtensor.contract import (
    CP,
    Tucker,
    core_statistics,
    outer_rows,
    pack,
    pack_dual,
    packed_size,
    unpack,
    unpack_pairs,
)
from tests.reference import (
    F64,
    close,
    entry,
    entry_second,
    kron,
    message,
    random_covariance,
    random_moments,
    superdiagonal,
)

RANKS = [(3,), (1,), (2, 3), (3, 1), (2, 3, 2), (3, 1, 2), (2, 1, 3, 2)]
N = 3  # rows


def symmetric(rank: int, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    matrix = torch.randn(*batch, rank, rank, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return matrix + matrix.mT


class Problem:
    """A random Gaussian core and random Gaussian factors in N rows; CP is the core without covariance."""

    def __init__(self, form: str, ranks: tuple[int, ...], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = math.prod(ranks)
        moments = [random_moments(generator, N, r) for r in ranks]
        self.means, self.seconds = [m for m, _ in moments], [s for _, s in moments]
        self.packed = [pack(s) for s in self.seconds]
        self.core = torch.randn(ranks, generator=generator, dtype=F64)
        self.covariance = random_covariance(generator, size)
        self.structure: CP | Tucker = Tucker(self.core, self.covariance)
        if form == "cp":
            self.core, self.covariance = superdiagonal(ranks[0], len(ranks)), torch.zeros(size, size, dtype=F64)
            self.structure = CP()

    def row(self, n: int) -> tuple[list[Tensor], list[Tensor]]:
        return [m[n] for m in self.means], [s[n] for s in self.seconds]


PROBLEMS = (
    [("tucker", ranks) for ranks in RANKS] + [("cp", (r,) * K) for r in (1, 3) for K in (1, 2, 3)] + [("cp", (2,) * 4)]
)


# --- packing ----------------------------------------------------------------------------------------------------------


@given(rank=st.integers(1, 7), seed=st.integers(0, 2**20), batch=st.sampled_from([(), (1,), (0,), (2, 3)]))
@settings(max_examples=60, deadline=None)
def test_packing_identities(rank: int, seed: int, batch: tuple[int, ...]):
    A, B = symmetric(rank, seed, batch), symmetric(rank, seed + 1, batch)
    assert pack(B).shape == (*batch, packed_size(rank))
    assert torch.equal(unpack(pack(B)), B)
    assert close((pack_dual(A) * pack(B)).sum(-1), (A * B).sum((-2, -1)), 1e-12)
    upper_only = A.triu() + torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=F64).tril(-1)
    assert close((pack_dual(upper_only) * pack(B)).sum(-1), (upper_only * B).sum((-2, -1)), 1e-12)


@given(ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_unpacked_pairs_of_packed_matrices_are_their_kronecker_product(ranks: list[int]):
    matrices = [symmetric(r, k) for k, r in enumerate(ranks)]
    packed = outer_rows([pack(M)[None] for M in matrices]).reshape([packed_size(r) for r in ranks])
    assert close(unpack_pairs(packed), kron(matrices), 1e-13)


def test_row_wise_kronecker_products_have_the_first_factor_slowest():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(4, c, generator=generator, dtype=F64) for c in (2, 1, 3)]
    assert torch.equal(outer_rows(rows[:1]), rows[0])
    for n in range(4):
        assert close(outer_rows(rows)[n], kron([x[n] for x in rows]), 1e-15)


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "ranks"), PROBLEMS)
def test_mean_and_second_moment_of_an_entry(form: str, ranks: tuple[int, ...]):
    problem = Problem(form, ranks)
    mean, second = problem.structure.mean(problem.means), problem.structure.second(problem.packed)
    assert mean.shape == second.shape == (N,)
    for n in range(N):
        m, M = problem.row(n)
        assert float(mean[n]) == pytest.approx(entry(problem.core, m), rel=1e-11)
        assert float(second[n]) == pytest.approx(entry_second(problem.core, problem.covariance, M), rel=1e-11)


@pytest.mark.parametrize(("form", "ranks"), PROBLEMS)
def test_messages_of_every_mode(form: str, ranks: tuple[int, ...]):
    problem = Problem(form, ranks)
    for mode, rank in enumerate(ranks):
        a, aa = problem.structure.partial(mode, problem.means, problem.packed)
        assert a.shape == (N, rank)
        assert aa.shape == (N, packed_size(rank))
        for n in range(N):
            expected_a, expected_aa = message(problem.core, problem.covariance, mode, *problem.row(n))
            assert close(a[n], expected_a, 1e-12)
            assert close(unpack(aa)[n], expected_aa, 1e-12)


@pytest.mark.parametrize(("form", "ranks"), PROBLEMS)
def test_factor_times_its_message_is_the_prediction_in_every_mode(form: str, ranks: tuple[int, ...]):
    # The authors' code orders the core's axes differently in the update and in the prediction: this fails there.
    problem = Problem(form, ranks)
    for mode in range(len(ranks)):
        a, aa = problem.structure.partial(mode, problem.means, problem.packed)
        assert close((problem.means[mode] * a).sum(-1), problem.structure.mean(problem.means), 1e-12)
        second = (pack_dual(problem.seconds[mode]) * aa).sum(-1)
        assert close(second, problem.structure.second(problem.packed), 1e-12)


@pytest.mark.parametrize(("form", "ranks"), [("tucker", (2, 3, 2)), ("cp", (3, 3, 3))])
def test_messages_do_not_use_the_modes_own_factor(form: str, ranks: tuple[int, ...]):
    problem = Problem(form, ranks)
    for mode in range(3):
        means, packed = list(problem.means), list(problem.packed)
        means[mode], packed[mode] = torch.full_like(means[mode], torch.nan), torch.full_like(packed[mode], torch.nan)
        for mine, right in zip(
            problem.structure.partial(mode, means, packed),
            problem.structure.partial(mode, problem.means, problem.packed),
            strict=True,
        ):
            assert torch.equal(mine, right)


@pytest.mark.parametrize("ranks", RANKS)
def test_core_statistics_are_sums_of_kronecker_products(ranks: tuple[int, ...]):
    problem = Problem("tucker", ranks)
    y = torch.randn(N, generator=torch.Generator().manual_seed(9), dtype=F64)
    precision, shift = core_statistics(problem.means, problem.packed, y)
    assert precision.shape == tuple(map(packed_size, ranks))
    assert shift.shape == ranks
    rows = [problem.row(n) for n in range(N)]
    assert close(unpack_pairs(precision), sum(kron(M) for _, M in rows), 1e-12)
    assert close(shift.reshape(-1), sum(y[n] * kron(m) for n, (m, _) in enumerate(rows)), 1e-12)


@pytest.mark.parametrize("form", ["cp", "tucker"])
def test_second_moments_are_those_of_draws(form: str):
    ranks, n_draws = ((2, 2, 2), 40_000) if form == "cp" else ((2, 3, 1), 40_000)
    problem = Problem(form, ranks, seed=1)
    generator = torch.Generator().manual_seed(2)
    draws = []
    for mean, second in zip(problem.means, problem.seconds, strict=True):
        root = torch.linalg.cholesky(second[0] - torch.outer(mean[0], mean[0]))
        draws.append(mean[0] + torch.randn(n_draws, len(root), generator=generator, dtype=F64) @ root.T)
    core = problem.core.reshape(-1).expand(n_draws, -1)
    if form == "tucker":
        root = torch.linalg.cholesky(problem.covariance)
        core = core + torch.randn(core.shape, generator=generator, dtype=F64) @ root.T
    f = torch.zeros(n_draws, dtype=F64)
    for flat, index in enumerate(itertools.product(*map(range, ranks))):
        f += core[:, flat] * math.prod(u[:, r] for u, r in zip(draws, index, strict=True))
    for values, expected in (
        (f, problem.structure.mean(problem.means)),
        (f**2, problem.structure.second(problem.packed)),
    ):
        assert abs(float(values.mean() - expected[0])) < 4 * float(values.std()) / math.sqrt(n_draws)
