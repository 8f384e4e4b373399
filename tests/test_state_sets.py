"""Posteriors of the six models over every kind of state set, against loops over points and states."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from probtensor.inference.evolution import Evolution
from probtensor.inference.points import Points
from probtensor.inference.state_sets import Gram, Own, Selected, every_state, few_active, sum_of_pairs
from probtensor.models.linear_coding import LinearCoding
from tests import reference_sparse as ref
from tests.sparse_cases import KINDS, NAMES, Case, case, listed, points, selection

DOUBLE = torch.zeros((), dtype=torch.float64)


def check_posterior(case: Case, Y: np.ndarray, kind: str, dtype=torch.float64, tolerance=1e-10) -> None:
    params, some = case.params(dtype), points(Y, dtype)
    states, joint, _ = selection(kind, case, some.y).step(case.model, params, some, None, 3)
    of_each = listed(states, len(Y))
    values = np.array(ref.log_joints(case.log_joint, Y, of_each)).T
    repeated = ~joint.isfinite()  # of own states, where there are not as many
    assert kind == "own" or not repeated.any()
    for n, of_point in enumerate(of_each):
        distinct = [s for s, again in zip(of_point, repeated[:, n], strict=True) if not again]
        assert len(set(distinct)) == len(distinct)
    q = joint.softmax(0)
    values[repeated.numpy()] = -np.inf
    weights = np.exp(values - values.max(0))
    weights /= weights.sum(0)

    def close(found, expected):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)

    close(joint.masked_fill(repeated, 0.0), np.where(np.isfinite(values), values, 0.0))
    close(q, weights)
    close(q.sum(0), 1.0)
    close(joint.logsumexp(0), values.max(0) + np.log(np.exp(values - values.max(0)).sum(0)))

    def expected(function):
        return ref.expectation(function, Y, of_each, weights.T)

    close(case.model.codes(params, some, states, q), expected(case.code))
    close(case.model.reconstruct(params, some, states, q), expected(case.mean))
    close(states.inclusion(q).T, expected(lambda y, s: np.asarray(s) != 0))
    best = states.state(q.argmax(0)).T
    if dtype == torch.float64:
        assert [tuple(s) for s in best.tolist()] == [k[i] for k, i in zip(of_each, weights.argmax(0), strict=True)]


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_posterior_equals_loops_over_its_states(name: str, kind: str, missing: float) -> None:
    this = case(name)
    check_posterior(this, this.sample(7, 2, missing), kind)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_single_precision_is_close(name: str, kind: str, missing: float) -> None:
    this = case(name)
    check_posterior(this, this.sample(6, 4, missing), kind, torch.float32, 3e-3)


@pytest.mark.parametrize(("name", "H"), [(name, 6 if name in ("tsc", "dsc") else 10) for name in NAMES])
def test_full_enumeration_of_many_components(name: str, H: int) -> None:
    this = case(name, H, D=6)
    check_posterior(this, this.sample(3, 5, 0.2), "everything")


@pytest.mark.parametrize("H", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_one_or_two_components(name: str, kind: str, H: int) -> None:
    this = case(name, H, D=1)
    check_posterior(this, this.sample(4, 6), kind)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_those_of_their_definition(name: str) -> None:
    this = case(name, 5)
    some = points(this.sample(9, 7))
    values = (0.0, *this.values)
    everything = selection("everything", this).step(this.model, this.params(), some, None, 0)[0]
    assert all(sorted(k) == sorted(ref.enumerate_states(5, values)) for k in listed(everything, 9))
    few = selection("preselected", this).step(this.model, this.params(), some, None, 0)[0]
    for n, found in enumerate(listed(few, 9)):
        assert len(set(found)) == len(found)
        assert sorted(found) == sorted(ref.et_states(few.index[:, n].tolist(), 5, values, 2))


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_distinct_and_sorted(name: str) -> None:
    """A component once, whatever values fit well."""
    this = case(name, 8, D=6, seed=3)
    for missing in (0.0, 0.4):
        index = this.model.candidates(this.params(), points(this.sample(60, 8, missing)), 5)
        assert index.shape == (5, 60)
        assert (index.diff(dim=0) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_candidates_hold_what_made_the_point(name: str) -> None:
    this = case(name, 8, D=40, seed=3, sigma=0.2)
    rng, H = np.random.default_rng(0), this.H
    pairs = list(itertools.combinations(range(H), 2))
    S = np.zeros((len(pairs), H))
    for row, pair in zip(S, pairs, strict=True):
        row[list(pair)] = rng.choice(this.values, 2) if "gsc" not in name else rng.choice([-2.0, 2.0], 2)
    if "mca" in name:
        Y = np.array([ref.strongest(tuple(s), this.twin["W"], name == "mmca") for s in S])
    else:
        Y = S @ this.twin["W"].T
    Y = Y + 0.2 * rng.normal(size=Y.shape)
    index = this.model.candidates(this.params(), points(Y), 4)
    held = [set(pair) <= set(of_point.tolist()) for pair, of_point in zip(pairs, index.T, strict=True)]
    assert np.mean(held) > 0.8 if "mca" in name else all(held)


def test_sets_of_one_active_component_have_no_table() -> None:
    table = few_active(3, 1, (1.0,), DOUBLE)
    assert table.values.shape == (0, 3)
    for name in NAMES:
        this = case(name, 5)
        some = points(this.sample(4, 1))
        states = Selected(few_active(3, 1, this.values, DOUBLE), torch.zeros(3, 4, dtype=torch.int64), 5)
        joint = this.model.log_joint(this.params(), some, states)
        expected = np.array(ref.log_joints(this.log_joint, some.y.numpy(), listed(states, 4))).T
        np.testing.assert_allclose(joint.numpy(), expected, rtol=1e-10)


def test_gram_by_candidates_is_the_dense_one() -> None:
    rng = np.random.default_rng(0)
    W, seen = torch.tensor(rng.normal(size=(6, 5))), torch.tensor((rng.random((4, 6)) < 0.6).astype(float))
    index = torch.tensor(rng.permuted(np.tile(np.arange(5), (4, 1)), axis=1)[:, :3].T)
    for mask in (None, seen):
        dense = W.T @ W if mask is None else torch.einsum("dh,nd,dk->nhk", W, mask, W)
        dense = dense.expand(4, 5, 5)
        gram, (i, j) = Gram(W, mask), np.triu_indices(3)
        for n in range(4):
            expected = dense[n][index[i, n], index[j, n]]
            torch.testing.assert_close(gram.pairs(index)[:, n], expected, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(gram.columns(index[0])[:, n], dense[n][:, index[0, n]])
            torch.testing.assert_close(gram.diagonal().expand(5, 4)[:, n], dense[n].diagonal())


def test_pairs_are_added_where_they_belong() -> None:
    rng = np.random.default_rng(1)
    H, C, n, D = 5, 3, 7, 4
    index = torch.tensor(rng.permuted(np.tile(np.arange(H), (n, 1)), axis=1)[:, :C].T)  # in any order
    found, seen = torch.tensor(rng.normal(size=(6 + H, n))), torch.tensor(rng.random((n, D)))
    expected = torch.zeros(n, H, H, dtype=torch.float64)
    for point in range(n):
        for entry, (i, j) in enumerate(zip(*np.triu_indices(C), strict=True)):
            a, b = index[i, point], index[j, point]
            expected[point, a, b] = expected[point, b, a] = found[entry, point]
        expected[point] += found[6:, point].diag()
    torch.testing.assert_close(sum_of_pairs(found, index, H, None), expected.sum(0), rtol=1e-13, atol=1e-13)
    weighted = torch.einsum("nd,nhk->dhk", seen, expected)
    torch.testing.assert_close(sum_of_pairs(found, index, H, seen), weighted, rtol=1e-13, atol=1e-13)


# --- evolved states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_evolved_states_never_get_worse_and_find_the_best(name: str) -> None:
    this = case(name, 6)
    some, params = points(this.sample(30, 9)), this.params()
    evolved, kept, before = Evolution(8, 3, 6, this.values), None, torch.full((30,), -torch.inf)
    for step in range(15):
        states, joint, kept = evolved.step(this.model, params, some, kept, step)
        assert (joint.logsumexp(0) >= before - 1e-12).all()
        assert ((states.values != 0).sum(1) <= 3).all()
        before = joint.logsumexp(0)
    _, every, _ = selection("everything", this).step(this.model, params, some, None, 0)
    few_of = (every_state(6, this.values, DOUBLE).values != 0).sum(1) <= 3
    best = every[few_of].topk(8, dim=0).values.logsumexp(0)  # the best set there is
    assert (before <= best + 1e-10).all()
    assert ((best - before) < 0.1).double().mean() > 0.7  # one change at a time: a few points stay at a local optimum


def test_parents_are_drawn_within_each_point() -> None:
    """By their density against the same point's others, whatever that of other points."""
    states = torch.zeros(4, 12, 2, dtype=torch.float64)
    for k in range(4):
        states[k, 3 * k : 3 * k + 3] = 1.0
    joint = torch.tensor([[0.0, -2.0, -5.0, -torch.inf], [-1000.0, -1002.0, -1005.0, -torch.inf]]).double().T
    evolved = Evolution(4, 12, 12, (1.0,))
    drawn = torch.zeros(4, 2)
    for seed in range(400):
        children = evolved._children(states, joint, torch.Generator().manual_seed(seed))
        changed = (children[::4, None] != states[None]).sum(2)  # (parents, states, n)
        assert (changed.amin(1) == 1).all()
        drawn += (changed == 1).sum(0)
    share = (0.5 * joint[:, :1]).softmax(0).float()
    assert (drawn / drawn.sum(0) - share).abs().max() < 0.04
    assert (drawn[3] == 0).all()


@pytest.mark.parametrize("values", [(0.1, 0.3), (0.01, 0.015), (-0.7, 1 / 3, 1e6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_evolved_states_have_exactly_the_values_of_the_model(values: tuple[float, ...], dtype: torch.dtype) -> None:
    """Whatever their size and distance; states that differ by a little are two."""
    model, rng = LinearCoding(values), np.random.default_rng(0)
    W = torch.tensor(rng.normal(size=(6, 4)) / values[0], dtype=dtype)
    params = model.start(W, torch.tensor(0.25, dtype=dtype), 0.4)
    some = Points(torch.tensor(rng.normal(size=(20, 6)), dtype=dtype), None)
    evolved = Evolution(30, 4, 4, values)
    states, joint, kept = evolved.step(model, params, some, None, 0)
    allowed = torch.tensor([0.0, *values], dtype=dtype)
    assert torch.isin(states.values, allowed).all()
    for n in range(20):
        distinct = states.values[:, :, n][joint[:, n].isfinite()]
        assert len(distinct.unique(dim=0)) == len(distinct)
    again, after, _ = evolved.step(model, params, some, kept, 1)
    assert (after.logsumexp(0) >= joint.logsumexp(0) - 1e-4).all()
    counts = model.log_joint(params, some, Own(again.values))
    torch.testing.assert_close(counts[after.isfinite()], after[after.isfinite()])
    active = (again.values != 0).sum(1)
    prior = again.log_prior(values, [1.0] * len(values))
    torch.testing.assert_close(prior, active.to(dtype))
