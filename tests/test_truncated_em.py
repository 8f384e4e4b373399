"""M-steps against the slow twins; runs of truncated EM: the bound never falls, the cut leaves out what it should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from probtensor.comm import Serial
from probtensor.inference.points import Points
from probtensor.inference.state_sets import Selected, every_state, few_active
from probtensor.inference.truncated_em import DataCut, Everything, Preselection, _Evidence, run
from probtensor.models.linear_coding import LinearCoding
from tests import reference_sparse as ref
from tests.sparse_cases import KINDS, NAMES, Case, blocks, case, listed, selection, step_run, tensors

DOUBLE = torch.zeros((), dtype=torch.float64)


# --- one M-step -------------------------------------------------------------------------------------------------------


def pass_over(case: Case, Y: np.ndarray, kind: str) -> tuple[torch.Tensor, list, list]:
    """Sums over two blocks of unequal size; each point's states and their probabilities."""
    total, of_each, weights = 0, [], []
    chosen = selection(kind, case)
    for some in blocks(Y, 7):
        states, joint, _ = chosen.step(case.model, case.params(), some, None, 1)
        q = joint.softmax(0)
        total = total + case.model.statistics(case.params(), some, states, q)
        of_each += listed(states, len(some.y))
        weights += list(q.T.numpy())
    return total, of_each, weights


@pytest.mark.parametrize("missing", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_m_step_equals_the_twin(name: str, kind: str, missing: float) -> None:
    this = case(name, H=4, D=5)
    Y = this.sample(40 if missing else 12, 11, missing)
    total, of_each, weights = pass_over(this, Y, kind)
    new = this.model.update(this.params(), total, bool(missing))
    expected = this.m_step(Y, of_each, weights)
    if name == "mca":
        expected["W"] = expected["W"].clip(min=0)  # the optimum among dictionaries that are not negative
    if "mca" in name:  # the error is that at the old dictionary, found in the same pass
        by_magnitude, W = name == "mmca", this.twin["W"]
        mean = lambda s: ref.strongest(s, W, by_magnitude)  # noqa: E731
        expected["sigma"] = ref.sigma_of_residuals(Y, of_each, weights, mean)
    for found, right in zip(new, tensors(name, expected), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_points_mean_the_same_under_other_parameters(name: str) -> None:
    """So that those of earlier batches can be added to."""
    this, other = case(name), case(name, seed=2)
    total, _, _ = pass_over(this, this.sample(30, 1), "everything")
    expected = this.model.update(this.params(), total, False)
    for found, right in zip(this.model.update(other.params(), total, False), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_points_out_of_use_change_nothing(name: str) -> None:
    this = case(name)
    Y = this.sample(30, 12, 0.2)
    some = blocks(Y, 30)[0]
    chosen, params = selection("preselected", this), this.params()
    states, joint, _ = chosen.step(this.model, params, some, None, 0)
    used = (torch.arange(30) % 3 > 0).double()
    kept = used.nonzero().squeeze(1)
    found = this.model.statistics(params, some._replace(used=used), states, joint.softmax(0) * used)
    alone, joint, _ = chosen.step(this.model, params, some.take(kept), None, 0)
    expected = this.model.statistics(params, some.take(kept), alone, joint.softmax(0))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_component_that_no_point_uses_stays_as_it_was(name: str) -> None:
    this = case(name)
    this.twin["W"][:, 2] = 1000.0
    if "gsc" in name:  # a slab near zero would do
        this.twin["pi"][2] = 1e-200
    Y = this.sample(25, 13)[:, :] % 5
    total, _, _ = pass_over(this, Y, "everything")
    new = this.model.update(this.params(), total, False)
    torch.testing.assert_close(new.W[:, 2], this.params().W[:, 2])
    assert all(x.isfinite().all() for x in new)


# --- runs -------------------------------------------------------------------------------------------------------------


def start_of(this: Case, seed: int) -> object:
    """Far from the truth."""
    rng = np.random.default_rng(seed)
    W = this.twin["W"].mean() + rng.normal(size=this.twin["W"].shape)
    return this.model.start(torch.tensor(W), torch.tensor(2.0, dtype=torch.float64), 0.3)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_bound_never_falls(name: str, kind: str, missing: float) -> None:
    this = case(name, H=5, D=6)
    for seed in (0, 1):
        Y = this.sample(60, seed, missing)
        result = step_run(this, Y, start_of(this, seed), selection(kind, this, n_states=8), seed=seed)
        assert len(result.bound_history) > 10 or result.converged
        assert (np.diff(result.bound_history) >= -1e-9).all()
        assert result.bound_history[-1] > result.bound_history[0]
        # What is returned is what the last bound belongs to.
        assert result.params is result.params_history[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_last_bound_is_that_of_the_parameters(name: str) -> None:
    this = case(name)
    Y = this.sample(40, 5, 0.2)
    result = step_run(this, Y, start_of(this, 1), selection("everything", this), max_iter=7)
    p, variance = result.params, float(result.params.variance)
    if "gsc" in name:
        twin = {"W": p.W, "pi": p.prob, "mu": p.mean, "Psi": p.slab}
    elif name == "dsc":
        twin = {"W": p.W, "phi": this.twin["phi"], "probabilities": p.log_prob.exp()}
    else:
        twin = {"W": p.W, "pi": p.log_prob[1:].exp().sum()}
    last = Case(name, this.model, {k: np.asarray(v) for k, v in twin.items()} | {"sigma": math.sqrt(variance)})
    if name == "dsc":
        last.twin["phi"] = this.twin["phi"]
    every = [ref.enumerate_states(4, (0.0, *this.values))] * 40
    assert result.bound_history[-1] == pytest.approx(ref.bound(last.log_joint, Y, every) / 40, abs=1e-10)


@pytest.mark.parametrize("name", ["mca", "mmca"])
def test_shorter_steps_keep_the_bound_from_falling(name: str) -> None:
    """Without them it would fall here: who wins changes with the dictionary."""
    fell = 0
    for seed in range(6):
        this = case(name, H=5, D=6, seed=seed)
        Y, params = this.sample(40, seed), start_of(this, seed)
        result = step_run(this, Y, params, selection("everything", this), max_iter=40)
        assert (np.diff(result.bound_history) >= -1e-9).all()
        history, chosen = [], selection("everything", this)
        for _ in range(40):
            some = blocks(Y, 40)[0]
            states, joint, _ = chosen.step(this.model, params, some, None, 0)
            history.append(float(joint.logsumexp(0).mean()))
            params = this.model.update(
                params, this.model.statistics(params, some, states, joint.softmax(0)), masked=False
            )
        fell += (np.diff(history) < -1e-9).any()
    assert fell > 0


def test_kept_candidates_make_no_point_worse() -> None:
    this = case("bsc", H=8, D=6)
    Y = this.sample(50, 3)
    some, table = blocks(Y, 50)[0], few_active(3, 2, (1.0,), DOUBLE)
    chosen = Preselection(table, 8)
    other = torch.stack(
        [torch.randperm(8, generator=torch.Generator().manual_seed(n))[:3].sort().values for n in range(50)]
    )
    states, joint, kept = chosen.step(this.model, this.params(), some, other.T.to(torch.int16), 0)
    fresh = chosen.step(this.model, this.params(), some, None, 0)[1].logsumexp(0)
    before = this.model.log_joint(this.params(), some, Selected(table, other.T, 8)).logsumexp(0)
    assert (before > fresh).any()
    torch.testing.assert_close(joint.logsumexp(0), torch.maximum(before, fresh))
    torch.testing.assert_close(this.model.log_joint(this.params(), some, states), joint)
    assert torch.equal(kept.long(), states.index)


@pytest.mark.parametrize("name", NAMES)
def test_above_temperature_one_posteriors_are_flatter_and_the_bound_is_still_a_bound(name: str) -> None:
    this = case(name)
    Y = this.sample(40, 2, 0.1)
    every = [ref.enumerate_states(4, (0.0, *this.values))] * 40
    start, T = this.params(), 2.5
    result = step_run(this, Y, start, selection("everything", this), temperature=lambda k: T, max_iter=1)
    assert result.bound_history[0] == pytest.approx(ref.bound(this.log_joint, Y, every) / 40, abs=1e-10)
    flat = [np.exp(v / T - np.logaddexp.reduce(v / T)) for v in ref.log_joints(this.log_joint, Y, every)]
    expected = tensors(name, this.m_step(Y, every, flat))
    torch.testing.assert_close(result.params.W, expected.W, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.params[1], expected[1], rtol=1e-9, atol=1e-9)


def test_annealing_ends_in_ascent() -> None:
    for name in NAMES:
        this = case(name)
        Y = this.sample(60, 4)
        result = step_run(
            this, Y, start_of(this, 4), selection("preselected", this), temperature=lambda k: max(1.0, 3 - k / 4)
        )
        assert (np.diff(result.bound_history[8:]) >= -1e-9).all()


def test_between_steps_parameters_may_be_changed() -> None:
    this, seen = case("bsc"), []

    def between(params, step):
        seen.append(step)
        return params._replace(variance=params.variance * 0 + 4.0)

    result = step_run(
        this, this.sample(30, 1), this.params(), selection("everything", this), max_iter=3, between=between
    )
    assert seen == [0, 1, 2]
    assert float(result.params.variance) == 4.0
    assert len(result.bound_history) == len(result.params_history) == 4
    assert result.n_iter == 3


def test_runs_end_when_the_bound_settles_or_say_that_they_did_not() -> None:
    this = case("bsc")
    Y, chosen = this.sample(60, 1), selection("everything", this)
    settings = {"comm": Serial(), "temperature": lambda step: 1.0, "progress": False}
    done = run(this.model, this.params(), blocks(Y, 60), chosen, max_iter=500, tol=1e-6, **settings)
    assert done.converged
    assert done.n_iter < 500
    assert abs(np.diff(done.bound_history)[-3:]).max() <= 1e-6 * abs(done.bound_history[-1])
    with pytest.warns(ConvergenceWarning, match="max_iter=2 steps done"):
        short = run(this.model, this.params(), blocks(Y, 60), chosen, max_iter=2, tol=0.0, **settings)
    assert not short.converged
    with pytest.warns(ConvergenceWarning):
        none = run(this.model, this.params(), blocks(Y, 60), chosen, max_iter=0, tol=0.0, **settings)
    assert none.n_iter == 0
    torch.testing.assert_close(none.params.W, this.params().W)


@pytest.mark.parametrize("name", ["mca", "mmca"])
def test_a_last_step_that_fell_is_no_convergence(name: str) -> None:
    this = case(name, H=5, D=6, seed=0)
    for seed in range(6):
        Y, params = this.sample(40, seed), start_of(this, seed)
        long = step_run(this, Y, params, selection("everything", this), max_iter=60)
        for steps in range(4, 18, 2):
            short = step_run(this, Y, params, selection("everything", this), max_iter=steps)
            n = len(short.bound_history)
            assert short.bound_history == long.bound_history[:n]
            if len(long.bound_history) > n + 2:
                assert not short.converged


def test_a_bound_that_is_not_finite_is_an_error() -> None:
    this = case("bsc")
    params = this.params()._replace(variance=torch.tensor(math.nan, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="the bound is nan after 0 steps"):
        step_run(this, this.sample(10, 1), params, selection("everything", this))


def test_points_in_any_blocks_give_one_result() -> None:
    for name in NAMES:
        this = case(name)
        Y = this.sample(50, 3, 0.1)
        results = [
            run(
                this.model,
                start_of(this, 0),
                blocks(Y, size),
                selection("preselected", this),
                comm=Serial(),
                temperature=lambda step: 1.0,
                max_iter=6,
                tol=0.0,
                quiet=True,
            )
            for size in (50, 16, 7)
        ]
        for other in results[1:]:
            np.testing.assert_allclose(other.bound_history, results[0].bound_history, rtol=1e-10)


# --- points left out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("H", "gamma", "pi"), [(1, 1, 0.3), (6, 2, 0.2), (10, 3, 0.45), (5, 5, 0.7), (40, 4, 1e-6)])
def test_moments_and_correction_equal_binomial_sums(H: int, gamma: int, pi: float) -> None:
    terms = [math.comb(H, g) * pi**g * (1 - pi) ** (H - g) for g in range(gamma + 1)]
    A, B = sum(terms), sum(g * term for g, term in enumerate(terms))
    cut = DataCut(H, gamma)
    np.testing.assert_allclose(cut.moments(pi), (A, B), rtol=1e-10)
    assert cut.correction(pi) == pytest.approx(H * pi * A / B, rel=1e-10)
    rng = np.random.default_rng(0)
    number = (rng.random((200_000, H)) < pi).sum(1)
    kept = number[number <= gamma]
    if kept.sum() > 1000:  # activity over the mean share of active components of the points that are kept
        assert cut.correction(pi) == pytest.approx(pi / (kept.mean() / H), rel=0.02)


def test_correction_survives_an_activity_of_zero_or_one() -> None:
    assert DataCut(5, 2).correction(0.0) == 1.0
    assert DataCut(5, 2).correction(1.0) == 1.0


@pytest.mark.parametrize("n_blocks", [1, 3, 7])
def test_threshold_of_evidence_is_that_of_a_sort(n_blocks: int) -> None:
    rng = np.random.default_rng(2)
    log_z = torch.tensor(rng.gamma(2.0, 30.0, 4000) * -1 - 500)
    evidence = _Evidence()
    for _ in range(2):  # the first places the bins
        total = torch.stack([evidence.local(part) for part in log_z.chunk(n_blocks)]).sum(0)
        assert len(total) == evidence.size
        evidence.learn(total, 4000.0, 0.13)
    exact = float(log_z.sort().values[round(0.13 * 4000)])
    width = 16 * float(log_z.std()) / 1024
    assert abs(evidence.threshold - exact) <= 2 * width
    assert float((log_z < evidence.threshold).double().mean()) == pytest.approx(0.13, abs=0.01)


def test_evidence_before_the_second_step_leaves_nothing_out() -> None:
    evidence = _Evidence()
    evidence.learn(evidence.local(torch.randn(50, dtype=torch.float64)), 50.0, 0.5)
    assert evidence.threshold == -math.inf


def test_without_points_of_many_causes_truncated_bsc_finds_the_truth() -> None:
    """Two causes at most, where a third of the points has more."""
    rng, H = np.random.default_rng(0), 10
    W = np.kron(np.eye(H), np.ones((3, 1))) * 6.0
    Y, _ = ref.sample_bsc(rng, 3000, W, 0.2, 1.0)
    model = LinearCoding((1.0,))
    start = model.start(torch.tensor(W + 0.3 * rng.normal(size=W.shape)), torch.tensor(1.5).double(), 0.15)
    table = few_active(5, 2, (1.0,), DOUBLE)
    found = {}
    for cut in (None, DataCut(H, 2)):
        result = run(
            model,
            start,
            [Points(torch.tensor(part), None) for part in np.split(Y, 6)],
            Preselection(table, H),
            comm=Serial(),
            temperature=lambda step: 1.0,
            max_iter=40,
            tol=0.0,
            cut=cut,
            quiet=True,
        )
        found[cut] = float(result.params.log_prob[1].exp()), float(result.params.variance.sqrt())
    prob, sigma = found[DataCut(H, 2)]
    assert prob == pytest.approx(0.2, abs=0.015)
    assert sigma == pytest.approx(1.0, abs=0.06)
    prob, sigma = found[None]
    assert prob < 0.18
    assert sigma > 1.3


def test_the_first_steps_leave_nothing_out_and_correct_nothing() -> None:
    """Until it is known which evidence is low."""
    this = case("bsc", H=6, D=8)
    Y = this.sample(60, 2)
    chosen = Preselection(few_active(4, 2, (1.0,), DOUBLE), 6)
    plain = step_run(this, Y, this.params(), chosen, max_iter=1)
    cut = step_run(this, Y, this.params(), chosen, max_iter=1, cut=DataCut(6, 2))
    for a, b in zip(plain.params, cut.params, strict=True):
        assert torch.equal(a, b)


def test_an_activity_above_one_half_stays_a_probability_when_corrected() -> None:
    for name in NAMES:
        this = case(name)
        total, _, _ = pass_over(this, this.sample(20, 1), "everything")
        new = this.model.update(this.params(), total, False, 50.0)
        prob = new[1] if "gsc" in name else new[1].exp()
        assert (prob <= 1.0 + 1e-15).all()
        if "gsc" not in name:
            assert float(prob.sum()) == pytest.approx(1.0)


def test_everything_holds_all_states() -> None:
    assert Everything(every_state(3, (1.0, 2.0), DOUBLE)).table.values.unique(dim=0).shape == (27, 3)
