"""Components' shares, pruning and main effects, against sums term by term."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from probtensor.comm import Comm, Serial
from probtensor.contract import pack, unpack
from probtensor.gaussian import Gamma
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import ExchangeableRows
from probtensor.models.relevance import contributions, interactions, main_effect, prune
from tests.reference import F64, close, f64

SIZES = (5, 4, 6)


def build(form: str, K: int, rank: int, *, main_effects: bool) -> FunctionalTucker:
    extra = main_effects and K > 1
    if form == "tucker":
        free = [[False] * extra + [True] * rank] * K
    else:
        free = [[True] * rank + [j == k for j in range(K)] * extra for k in range(K)]
    functions = tuple(ExchangeableRows(size, f64([])) for size in SIZES[:K])
    prior = Gamma(f64(1.0), f64(1.0))
    return FunctionalTucker(functions, tuple(map(torch.tensor, free)), form, prior, learn=False)


def make_rows(K: int, n: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randint(size, (n,), generator=generator) for size in SIZES[:K]])
    return Rows(positions, torch.randn(n, generator=generator, dtype=F64))


@torch.no_grad()
def swept(model: FunctionalTucker, rows: Rows, n: int = 3) -> State:
    state = model.start(model.local_start(rows), torch.Generator().manual_seed(0))
    for _ in range(n):
        for block in model.blocks:
            state = model.update(state, block, model.local_statistics(state, block, rows))
        state, (rows,) = model.end_sweep(state, [rows])
    return state


def squares(state: State, rows: Rows, r: int) -> list[float]:
    """``E prod_k u^k_r(x_n)^2`` row after row; the modes are independent."""
    moments = [unpack(factor.second)[:, r, r] for factor in state.factors]
    return [math.prod(float(m[p]) for m, p in zip(moments, row, strict=True)) for row in rows.positions.T.tolist()]


CASES = [(K, effects) for K in (1, 2, 3) for effects in ((False, True) if K > 1 else (False,))]


@pytest.mark.parametrize(("K", "main_effects"), CASES)
def test_contributions_are_root_mean_squares_over_the_rows(K: int, main_effects: bool):
    model, rows = build("cp", K, 3, main_effects=main_effects), make_rows(K, 17)
    state = swept(model, rows)
    found = contributions(model, state, [rows], Serial())
    expected = f64([math.sqrt(sum(squares(state, rows, r)) / 17) for r in range(3)])
    assert close(found, expected, 1e-12)


class TwoRanks(Comm):
    """Rank 0 of two: sums add what the other rank would say."""

    rank, size = 0, 2

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def sum(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        return tensor + self.other

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        raise AssertionError("contributions are summed, and nothing else")

    gather_bytes = exchange_bytes = barrier = abort = broadcast


def test_contributions_are_over_the_rows_of_all_ranks():
    model, rows = build("cp", 2, 2, main_effects=True), make_rows(2, 20)
    state = swept(model, rows)
    mine, other = (Rows(rows.positions[:, s], rows.values[s]) for s in (slice(0, 13), slice(13, 20)))
    sums = f64([*(sum(squares(state, other, r)) for r in range(2)), 7.0])
    assert close(
        contributions(model, state, [mine], TwoRanks(sums)), contributions(model, state, [rows], Serial()), 1e-12
    )


def test_contributions_add_up_over_chunks_and_need_no_row(monkeypatch: pytest.MonkeyPatch):
    model, rows = build("cp", 3, 2, main_effects=True), make_rows(3, 50)
    state = swept(model, rows)
    whole = contributions(model, state, [rows], Serial())
    monkeypatch.setattr("probtensor.models.functional_tucker.CHUNK", 1)
    assert close(contributions(model, state, [rows], Serial()), whole, 1e-12)
    none = Rows(rows.positions[:, :0], rows.values[:0])
    sums = f64([1.0, 4.0, 4.0])
    assert contributions(model, state, [none], TwoRanks(sums)).tolist() == [0.5, 1.0]


def test_tucker_has_no_contributions_and_is_not_pruned():
    model, rows = build("tucker", 2, 2, main_effects=True), make_rows(2, 20)
    state = swept(model, rows)
    assert contributions(model, state, [rows], Serial()).shape == (0,)
    assert prune(model, state, [rows], Serial(), 1e9) == (model, state)


def test_main_effects_are_no_interactions():
    assert interactions(build("cp", 3, 2, main_effects=True)).tolist() == [True, True, False, False, False]
    assert interactions(build("cp", 1, 2, main_effects=True)).tolist() == [True, True]


# --- pruning ----------------------------------------------------------------------------------------------------------


def silenced(state: State, model: FunctionalTucker, columns: list[int], size: float) -> State:
    """A state whose given components have shrunk to `size` in every mode, coupled to no other."""
    factors = []
    for mode, factor in enumerate(state.factors):
        mean, second = factor.mean.clone(), unpack(factor.second).clone()
        for r in columns:
            mean[:, r] *= size
            second[:, r] *= size
            second[:, :, r] *= size
        factors.append(factor._replace(mean=mean, second=pack(second)))
        assert model.free[mode][columns].all()
    return state._replace(factors=tuple(factors))


@pytest.mark.parametrize(("K", "main_effects"), CASES)
def test_pruning_keeps_the_predictions_at_the_rows(K: int, main_effects: bool):
    model, rows = build("cp", K, 4, main_effects=main_effects), make_rows(K, 30)
    state = silenced(swept(model, rows), model, [0, 2], 1e-9)
    smaller, pruned = prune(model, state, [rows], Serial(), 1e-3)
    assert smaller.ranks == tuple(rank - 2 for rank in model.ranks)
    assert [free.tolist() for free in smaller.free] == [free[[1, *range(3, len(free))]].tolist() for free in model.free]
    for a, b in zip(smaller.at_rows(pruned, rows), model.at_rows(state, rows), strict=True):
        assert close(a, b, 1e-7)
    strength = contributions(model, state, [rows], Serial())
    assert close(contributions(smaller, pruned, [rows], Serial()), strength[[1, 3]], 1e-12)


def test_pruned_sites_and_hyperparameters_are_those_of_the_kept_functions():
    model, rows = build("cp", 2, 3, main_effects=True), make_rows(2, 30)
    state = silenced(swept(model, rows), model, [1], 1e-9)
    smaller, pruned = prune(model, state, [rows], Serial(), 1e-3)
    for mode, (old, new) in enumerate(zip(state.factors, pruned.factors, strict=True)):
        kept = torch.tensor([0, 2, 3])  # of the latent functions: two interactions and the mode's own effect
        assert torch.equal(new.sites.precision, old.sites.precision[:, kept][:, :, kept])
        assert torch.equal(new.sites.shift, old.sites.shift[:, kept])
        assert torch.equal(new.log_hyperparameters, old.log_hyperparameters[:, kept])
        again = smaller.factor(mode, new.sites, new.log_hyperparameters)
        assert torch.equal(again.divergence, new.divergence)
        assert torch.equal(again.posterior.mean, new.posterior.mean)


@pytest.mark.parametrize("main_effects", [True, False])
def test_the_strongest_stays_where_all_are_weak(main_effects: bool):
    model, rows = build("cp", 2, 3, main_effects=main_effects), make_rows(2, 30)
    state = swept(model, rows)
    strongest = int(contributions(model, state, [rows], Serial()).argmax())
    smaller, pruned = prune(model, state, [rows], Serial(), 1e9)
    assert int(interactions(smaller).sum()) == 1
    assert torch.equal(pruned.factors[0].mean[:, 0], state.factors[0].mean[:, strongest])
    if main_effects:
        assert torch.equal(pruned.factors[0].mean[:, 1:], state.factors[0].mean[:, 3:])


@pytest.mark.parametrize("below", [0.0, 1e-12, -1.0])
def test_nothing_weak_is_nothing_dropped(below: float):
    model, rows = build("cp", 2, 3, main_effects=True), make_rows(2, 30)
    state = swept(model, rows)
    smaller, pruned = prune(model, state, [rows], Serial(), below)
    assert smaller is model
    assert pruned is state


def test_a_pruned_model_goes_on_and_its_bound_does_not_fall():
    model, rows = build("cp", 2, 4, main_effects=True), make_rows(2, 60)
    smaller, state = prune(model, silenced(swept(model, rows, 6), model, [3], 1e-9), [rows], Serial(), 1e-3)
    bounds = []
    with torch.no_grad():
        for _ in range(6):
            for block in smaller.blocks:
                state = smaller.update(state, block, smaller.local_statistics(state, block, rows))
            state, _ = smaller.end_sweep(state, [rows])
            bounds.append(float(smaller.bound(state)))
    assert all(b >= a - 1e-9 * abs(b) for a, b in itertools.pairwise(bounds))


# --- main effects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_main_effect_of_cp_is_its_column(mode: int):
    model, rows = build("cp", 3, 2, main_effects=True), make_rows(3, 40)
    state = swept(model, rows)
    where = torch.tensor([0, 2, -1])
    effect, variance = main_effect(model, state, mode, where)
    moments = model.functions_at(state, mode, where)
    assert close(effect, moments.mean[:, -1], 1e-14)
    assert close(variance, moments.covariance[:, -1, -1], 1e-14)
    column = 2 + mode
    assert close(effect[:2], state.factors[mode].mean[where[:2], column], 1e-12)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_main_effect_of_tucker_is_a_row_of_the_core(mode: int):
    model, rows = build("tucker", 3, 2, main_effects=True), make_rows(3, 40)
    state = swept(model, rows)
    where = torch.tensor([3, 1, -1])
    effect, variance = main_effect(model, state, mode, where)
    size = math.prod(model.ranks)
    index = torch.arange(size).reshape(model.ranks)
    flat = [int(index[tuple(r if k == mode else 0 for k in range(3))]) for r in (1, 2)]
    W, C = state.core.mean, state.core.covariance
    moments = model.functions_at(state, mode, where)
    for n in range(3):
        u, U = moments.mean[n], moments.covariance[n] + torch.outer(moments.mean[n], moments.mean[n])
        mean = sum(float(W[i] * u[r]) for r, i in enumerate(flat))
        second = sum(float((W[i] * W[j] + C[i, j]) * U[r, q]) for r, i in enumerate(flat) for q, j in enumerate(flat))
        assert float(effect[n]) == pytest.approx(mean, rel=1e-12, abs=1e-14)
        assert float(variance[n]) == pytest.approx(second - mean**2, rel=1e-10)


def test_pruning_needs_no_gradient_and_leaves_its_arguments_alone():
    model, rows = build("cp", 2, 3, main_effects=True), make_rows(2, 30)
    state = silenced(swept(model, rows), model, [1], 1e-9)
    before = [x.clone() for factor in state.factors for x in (factor.mean, factor.second, *factor.sites)]
    smaller, _ = prune(model, state, [rows], Serial(), 1e-3)
    after = [x for factor in state.factors for x in (factor.mean, factor.second, *factor.sites)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert model.ranks != smaller.ranks
