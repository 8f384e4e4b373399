"""Faults of released sparse-coding codes, each with the right value here; and learning from what is left of points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from probtensor.inference.state_sets import Own
from probtensor.models import BSC, GSC
from probtensor.models.linear_coding import LinearCoding
from probtensor.models.max_coding import MaxCoding
from probtensor.models.spike_slab import SlabParameters, SpikeSlab
from tests import reference_sparse as ref
from tests.sparse_cases import KINDS, NAMES, Case, case, points, selection, step_run, tensors

BARS = np.kron(np.eye(4), np.ones((3, 1)))  # (12, 4)


def slab_case(sigma: float = math.sqrt(0.8), pi: float = 0.3, full: bool = False) -> Case:
    root = np.random.default_rng(4).normal(size=(4, 8))
    Psi = root @ root.T / 8 if full else np.array([1.0, 0.5, 1.0, 0.5])
    twin = {"W": 3 * BARS, "pi": np.full(4, pi), "mu": np.array([1.0, 2.0, 0.0, 1.5]), "Psi": Psi, "sigma": sigma}
    return Case("gsc_full" if full else "gsc", SpikeSlab(full, 4), twin)


def scale_free(params: SlabParameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the data determine of dictionary and slabs, where the scale of a component may be anywhere."""
    size = params.W.norm(dim=0)
    slab = params.slab if params.slab.ndim == 1 else params.slab.diagonal()
    return (params.W / size).numpy(), (params.mean * size).numpy(), (slab * size**2).numpy()


@pytest.mark.parametrize("full", [False, True])
def test_spike_and_slab_finds_the_variance_of_the_noise(full: bool) -> None:
    """0.800, where second moments from products of means would give 1.013."""
    this = slab_case(full=full)
    result = step_run(this, this.sample(3000, 0), this.params(), selection("everything", this), max_iter=40)
    assert float(result.params.variance) == pytest.approx(0.8, rel=0.02)
    assert np.abs(result.params.prob.numpy() - 0.3).max() < 0.04
    slab = result.params.slab
    if full:
        assert torch.equal(slab, slab.T)
        assert torch.linalg.eigvalsh(slab).min() > 0


def test_spike_and_slab_density_has_its_halves() -> None:
    """One component, all integrals done by hand."""
    w, pi, mu, psi, sigma, y = 2.0, 0.3, 0.5, 1.5, 0.7, 1.9
    params = tensors("gsc", {"W": np.array([[w]]), "pi": [pi], "mu": [mu], "Psi": [psi], "sigma": sigma})
    some = points(np.array([[y]]))
    model = SpikeSlab(False, 1)
    joint = model.log_joint(params, some, Own(torch.tensor([[[0.0]], [[1.0]]]).double())).squeeze()
    total = sigma**2 + w**2 * psi
    off = math.log(1 - pi) - 0.5 * math.log(2 * math.pi * sigma**2) - 0.5 * y**2 / sigma**2
    on = math.log(pi) - 0.5 * math.log(2 * math.pi * total) - 0.5 * (y - w * mu) ** 2 / total
    np.testing.assert_allclose(joint.numpy(), [off, on], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_many_entries_underflow_nowhere_and_posteriors_sum_to_one(name: str, kind: str) -> None:
    this = case(name, H=5, D=400)
    Y = this.sample(12, 1)
    chosen = selection(kind, this)
    states, joint, _ = chosen.step(this.model, this.params(), points(Y), None, 0)
    best = joint.max(0).values
    assert best.max() < -300  # its exponential of an unnormalised density would be 0
    q = joint.softmax(0)
    torch.testing.assert_close(q.sum(0), torch.ones(12, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (states.inclusion(q) <= 1 + 1e-12).all()
    assert (states.inclusion(q) >= 0).all()
    result = step_run(this, Y, this.params(), chosen, max_iter=3)
    assert np.isfinite(result.bound_history).all()


def test_ternary_candidates_are_distinct() -> None:
    """A component whose value fits with either sign stands among them once."""
    model = LinearCoding((-1.0, 1.0), tied=True)
    W = torch.zeros(4, 5, dtype=torch.float64)
    W[:, 0] = 0.05
    W[0, 1:] = torch.tensor([3.0, 3.0, 3.0, 3.0])
    params = model.start(W, torch.tensor(4.0, dtype=torch.float64), 0.5)
    index = model.candidates(params, points(np.zeros((3, 4))), 4)
    assert all(len(set(of_point.tolist())) == 4 for of_point in index.T)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("signed", [False, True])
def test_points_of_one_cause_weigh_one_whatever_their_scale(signed: bool, scale: float) -> None:
    """The update is the mean of what each cause wins, not one weighted by the dictionary's entries."""
    model = MaxCoding(signed)
    W = torch.tensor([[2.0, 0.5], [1.0, 4.0]], dtype=torch.float64) * scale
    params = model.start(W, torch.tensor((0.5 * scale) ** 2, dtype=torch.float64), 0.3)
    Y = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0]]) * scale
    # Points 0 and 1 have cause 0 alone, point 2 has both: cause 0 wins its first entry only.
    states = torch.tensor([[[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    q = torch.ones(1, 3, dtype=torch.float64)
    new = model.update(params, model.statistics(params, points(Y), Own(states), q), False)
    expected = np.array([[2.0, 0.5], [1.5, 3.0]]) * scale
    np.testing.assert_allclose(new.W.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("rate", [1e-4, 0.997])
@pytest.mark.parametrize("name", ["bsc", "gsc", "mca", "mmca"])
def test_activity_is_not_kept_from_zero_or_one(name: str, rate: float) -> None:
    this = case(name, H=2, D=6, sigma=0.05)
    truth = np.full(2, rate) if name == "gsc" else rate
    twin = this.twin | {"pi": truth, "W": np.kron(np.eye(2), np.ones((3, 1))) * 5.0}
    if name == "gsc":
        twin |= {"mu": np.ones(2) * 2, "Psi": np.ones(2) * 0.01}
    rare = Case(name, this.model, twin)
    Y = rare.sample(2000, 3)
    active = (np.abs(Y[:, ::3]) > 2.5).mean()
    result = step_run(rare, Y, rare.params(), selection("everything", rare), max_iter=5)
    prob = result.params.prob.mean() if name == "gsc" else result.params.log_prob[1].exp()
    assert float(prob) == pytest.approx(active, abs=1e-6)
    assert result.bound_history[-1] >= result.bound_history[0]


def test_discrete_probabilities_are_not_kept_from_zero() -> None:
    this = case("dsc", H=2, D=6, sigma=0.05)
    twin = this.twin | {"W": np.kron(np.eye(2), np.ones((3, 1))) * 5.0, "probabilities": np.array([0.7, 0.3, 1e-12])}
    rare = Case("dsc", this.model, twin)
    result = step_run(rare, rare.sample(500, 3), rare.params(), selection("everything", rare), max_iter=10)
    assert float(result.params.log_prob[2]) < math.log(1e-12)
    assert np.isfinite(result.bound_history).all()


# --- missing entries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bsc", "gsc"])
def test_missing_entries_do_not_bias_noise_or_dictionary(name: str) -> None:
    """Half of the entries, at random: what imputes them would give 0.67 of the variance, 0.62 of the dictionary."""
    if name == "bsc":
        this = Case("bsc", LinearCoding((1.0,)), {"W": 3 * BARS, "pi": 0.3, "sigma": 1.0})
    else:
        this = slab_case(sigma=1.0, pi=0.4)
    rng = np.random.default_rng(7)
    Y = this.sample(4000, 6)
    Y[rng.random(Y.shape) < 0.5] = np.nan
    start = this.params()
    start = start._replace(W=start.W + 0.3 * torch.tensor(rng.normal(size=start.W.shape)), variance=start.variance * 2)
    result = step_run(this, Y, start, selection("everything", this), max_iter=40)
    assert float(result.params.variance.sqrt()) == pytest.approx(1.0, rel=0.05)
    W, truth = result.params.W.numpy(), this.twin["W"]
    if name == "gsc":
        W = W * np.abs(result.params.mean.numpy()) / np.where(this.twin["mu"], np.abs(this.twin["mu"]), 1)
        W, truth = W[:, [0, 1, 3]], truth[:, [0, 1, 3]]  # the third slab has mean 0: its scale is free
    assert np.abs(W - truth).max() < 0.05 * 3 + 0.12
    assert np.abs((W * truth).sum() / (truth**2).sum() - 1) < 0.05


@pytest.mark.parametrize("model", [BSC, GSC])
def test_a_fit_of_points_with_holes_reconstructs_what_is_missing(model) -> None:
    this = Case("bsc", LinearCoding((1.0,)), {"W": 4 * BARS, "pi": 0.3, "sigma": 0.5})
    Y, S = ref.sample_bsc(np.random.default_rng(1), 700, **this.twin)
    missing = np.random.default_rng(2).random(Y.shape) < 0.3
    holes = np.where(missing, np.nan, Y)
    fitted = model(n_components=5, random_state=0, progress=False, max_iter=60, tol=1e-5).fit(holes)
    known = (~missing).reshape(700, 4, 3).any(2).repeat(3, axis=1)  # some entry of the same bar was seen
    error = (fitted.reconstruct(holes) - S @ this.twin["W"].T)[missing & known]
    assert np.sqrt(np.mean(error**2)) < 0.5  # below the noise; nothing known, it is 1.8
    assert fitted.noise_std_ == pytest.approx(0.5, rel=0.05)
    assert np.isfinite(fitted.reconstruct(np.full((1, 12), np.nan))).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_that_was_never_seen_changes_nothing_else(name: str) -> None:
    this = case(name, D=6)
    Y = this.sample(40, 2, 0.2)
    Y[:, 2] = np.nan
    rest = Case(name, this.model, this.twin | {"W": np.delete(this.twin["W"], 2, 0)})
    one = step_run(this, Y, this.params(), selection("everything", this), max_iter=5)
    two = step_run(rest, np.delete(Y, 2, 1), rest.params(), selection("everything", rest), max_iter=5)
    np.testing.assert_allclose(one.bound_history, two.bound_history, rtol=1e-9)
    np.testing.assert_allclose(np.delete(one.params.W.numpy(), 2, 0), two.params.W.numpy(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(one.params.W[2].numpy(), this.twin["W"][2], rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_ones_is_no_mask(name: str) -> None:
    this = case(name)
    some = points(this.sample(30, 2))
    masked = some._replace(seen=torch.ones_like(some.y))
    params = this.params()
    for kind in KINDS:
        states, joint, _ = selection(kind, this).step(this.model, params, some, None, 0)
        torch.testing.assert_close(
            this.model.log_joint(params, masked, states)[joint.isfinite()], joint[joint.isfinite()]
        )
        new = [
            this.model.update(params, this.model.statistics(params, x, states, joint.softmax(0)), x.seen is not None)
            for x in (some, masked)
        ]
        for a, b in zip(*new, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- sizes of update --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_renewed_component_is_the_only_one_that_changes(name: str) -> None:
    this = case(name)
    params, direction = this.params(), torch.linspace(-1, 2, 5, dtype=torch.float64)
    new = this.model.renew(params, 2, direction)
    others = [0, 1, 3]
    assert torch.equal(new.W[:, others], params.W[:, others])
    torch.testing.assert_close(new.W[:, 2], direction.clamp(min=0) if name == "mca" else direction)
    assert torch.equal(params.W, this.params().W)
    if name == "gsc_full":
        assert torch.linalg.eigvalsh(new.slab).min() > 0
    some = points(this.sample(5, 1))
    assert selection("everything", this).step(this.model, new, some, None, 0)[1].isfinite().all()
