"""BayesianCP with non-negative factors: updates and bounds by their definition, planted tensors, posteriors, files."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

import probtensor
from probtensor.blocks import total_here
from probtensor.cells import single_rows
from probtensor.estimator import UnknownLabelWarning
from probtensor.gaussian import Gamma
from probtensor.likelihoods import StudentT
from probtensor.models import BayesianCP
from probtensor.models.nonnegative_counts import NonNegativeCounts, NonNegativeRows, count_predictive, draw_counts
from probtensor.models.nonnegative_tables import RectifiedNormals
from probtensor.models.nonnegative_values import PASSES, NonNegativeValues, ValueRows
from tests.reference_nonnegative import (
    Cells,
    all_cells,
    count_bound,
    gamma_divergence,
    gamma_update,
    rectified_moments,
    rectified_update,
)

SIZES = (4, 3, 2)
QUICK: dict[str, Any] = {"prior": "gamma", "random_state": 0, "progress": False}
Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def rows_of(seed: int = 0, n: int = 9) -> Cells:
    """Different cells of a small tensor, with counts."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(math.prod(SIZES), n, replace=False)
    cells = np.stack(np.unravel_index(chosen, SIZES), axis=1)
    return [(tuple(cell.tolist()), float(count)) for cell, count in zip(cells, rng.poisson(3.0, n), strict=True)]


def in_columns(rows: Cells) -> tuple[Tensor, Tensor]:
    return torch.tensor([cell for cell, _ in rows]).T.contiguous(), torch.tensor([y for _, y in rows]).double()


def planted(likelihood: str, seed: int, n: int = 3000, rank: int = 4) -> tuple[Arrays, npt.NDArray[np.float64]]:
    """Rows and values of components with gamma distributed factors, and the values without noise."""
    rng = np.random.default_rng(seed)
    sizes = (20, 18, 15)
    X = np.stack([rng.integers(0, size, n) for size in sizes], axis=1)
    f = np.ones((n, rank))
    for k, size in enumerate(sizes):
        f *= rng.gamma(0.7, 1 / 0.7, (size, rank))[X[:, k]]
    truth = 2 * f.sum(1)
    y = rng.poisson(truth).astype(float) if likelihood == "poisson" else truth + 0.5 * rng.normal(size=n)
    return (X, y), truth


def fitted(X: Any, y: Any, rank: int = 3, **settings: Any) -> BayesianCP:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return BayesianCP(rank, **{"calibration": 0, **settings}, **QUICK).fit(X, y)


@pytest.mark.parametrize("z", [-300.0, -60.0, -49.0, -8.0, -0.5, 0.0, 2.0, 30.0])
@pytest.mark.parametrize("precision", [0.01, 4.0])
def test_moments_and_divergence_of_rectified_normals_are_integrals(z: float, precision: float) -> None:
    shift = z * math.sqrt(precision)
    table = RectifiedNormals(*torch.tensor([shift, precision], dtype=torch.float64).reshape(2, 1, 1))
    mean, variance, log_mass = rectified_moments(shift, precision)
    assert float(table.mean) == pytest.approx(mean, rel=1e-8)
    assert float(table.variance) == pytest.approx(variance, rel=1e-5)
    rate = torch.tensor([0.7]).double()
    wanted = (shift + 0.7) * mean - precision * (mean**2 + variance) / 2 - log_mass - math.log(0.7)
    assert float(table.divergence(rate)) == pytest.approx(wanted, rel=1e-7, abs=1e-7)


def test_draws_have_the_moments_of_their_tables() -> None:
    rng, n = np.random.default_rng(0), 40_000
    shift = torch.tensor([-40.0, -1.0, 0.5, 9.0]).double().expand(n, -1)
    for table in (RectifiedNormals(shift, torch.full_like(shift, 2.0)), Gamma(shift.abs(), torch.ones_like(shift))):
        drawn = table.draw(rng)
        assert bool((drawn >= 0).all())
        torch.testing.assert_close(drawn.mean(0), table.mean[0], rtol=0.03, atol=0)
        torch.testing.assert_close(drawn.var(0), table.variance[0], rtol=0.06, atol=0)


def test_divergence_of_gammas_is_an_integral() -> None:
    a, b = torch.tensor([[0.4, 3.0], [20.0, 1.0]]).double(), torch.tensor([[2.0, 0.5], [7.0, 1.0]]).double()
    shape, rate = torch.tensor([0.3, 5.0]).double(), torch.tensor([1.5, 5.0]).double()
    wanted = sum(
        gamma_divergence(float(a[i, r]), float(b[i, r]), float(shape[r]), float(rate[r]))
        for i in range(2)
        for r in range(2)
    )
    assert float(Gamma(a, b).kl(Gamma(shape, rate)).sum()) == pytest.approx(wanted, rel=1e-6)


def test_updates_and_bound_of_counts_are_those_of_loops() -> None:
    rows = rows_of()
    for every in (False, True):
        model = NonNegativeCounts(SIZES, 2, 2.5, learn=False, all_cells=every)
        columns = NonNegativeRows(*in_columns(rows), torch.ones(len(rows)).double())
        state = model.start(torch.zeros(1).double(), torch.Generator().manual_seed(0), 0)
        state = state._replace(hyper=tuple(torch.tensor([0.3, 1.2]).double() for _ in SIZES))
        listed = all_cells(SIZES, rows) if every else rows
        priors = [(np.exp(h.numpy()), np.exp(h.numpy())) for h in state.hyper]
        priors.append((np.full(2, 0.5), np.full(2, 0.4)))
        for block in model.blocks[: len(SIZES) + 1]:
            numbers = [t.shape.numpy() for t in state.tables], [t.rate.numpy() for t in state.tables]  # type: ignore
            shape, rate = gamma_update(*numbers, listed, block, *priors[block])
            new = model.update(state, block, model.local_statistics(state, block, columns))
            np.testing.assert_allclose(new.tables[block][0], shape, rtol=1e-10)
            scale = np.ones(2)
            if block < len(SIZES):  # a factor's columns are scaled against the weights
                scale = (rate / new.tables[block][1].numpy())[0]
                np.testing.assert_allclose(new.tables[-1][1], state.tables[-1][1].numpy() * scale, rtol=1e-10)
            np.testing.assert_allclose(new.tables[block][1], rate / scale, rtol=1e-10)
            state = new
        state, _ = model.end_sweep(state, [columns], total_here)
        numbers = [t.shape.numpy() for t in state.tables], [t.rate.numpy() for t in state.tables]  # type: ignore
        relevance = sum(float((h - 1e-3 * h.exp()).sum()) for h in state.hyper)
        wanted = count_bound(*numbers, listed, priors) + relevance
        assert float(model.bound(state)) == pytest.approx(wanted, rel=1e-6)


def test_scaling_a_column_against_its_weight_is_where_the_bound_is_highest() -> None:
    rows = rows_of()
    model = NonNegativeCounts(SIZES, 2, 2.5, learn=False)
    columns = NonNegativeRows(*in_columns(rows), torch.ones(len(rows)).double())
    state = model.start(torch.zeros(1).double(), torch.Generator().manual_seed(0), 0)
    state = model.update(state, 0, model.local_statistics(state, 0, columns))
    best = float(model.bound(model.end_sweep(state, [columns], total_here)[0]))
    for s in (0.99, 1.01):
        factor, weights = state.tables[0], state.tables[-1]
        moved = (Gamma(factor[0], factor[1] / s), *state.tables[1:-1], Gamma(weights[0], weights[1] * s))
        other = model.end_sweep(state._replace(tables=moved), [columns], total_here)[0]
        assert float(model.bound(other)) < best


def test_updates_and_bound_of_real_values_are_those_of_loops() -> None:
    rows = rows_of()
    likelihood = StudentT(dof=math.inf, nugget=False)
    model = NonNegativeValues(SIZES, 2, 2.0, likelihood, learn=False)
    positions, values = in_columns(rows)
    columns = ValueRows(positions, single_rows(values))
    state = model.start(torch.zeros(1).double(), torch.Generator().manual_seed(0), 0)
    columns = model.begin(state, columns)
    noise = float(state.log_parameters.exp())
    for block in model.blocks:
        means = [t.mean.numpy().copy() for t in state.tables]
        variances = [t.variance.numpy() for t in state.tables]
        for _ in range(PASSES):
            given = means, variances, rows, noise, block, state.hyper[block].exp().numpy()
            shift, precision = rectified_update(*given)
        state = model.update(state, block, model.local_statistics(state, block, columns))
        np.testing.assert_allclose(state.tables[block][0], shift, rtol=1e-7)
        np.testing.assert_allclose(state.tables[block][1], precision, rtol=1e-10)
    state, _ = model.end_sweep(state, [columns], total_here)
    bound = sum(float((h - 1e-3 * h.exp()).sum()) for h in state.hyper)
    for table, hyper in zip(state.tables, state.hyper, strict=True):
        rates = hyper.exp().expand_as(table[0])
        for shift_, precision_, rate in zip(*(x.ravel().tolist() for x in (*table, rates)), strict=True):
            mean, variance, log_mass = rectified_moments(shift_, precision_)
            bound -= (shift_ + rate) * mean - precision_ * (mean**2 + variance) / 2 - log_mass - math.log(rate)
    for cell, value in rows:
        m = np.prod([t.mean.numpy()[i] for t, i in zip(state.tables, cell, strict=True)], axis=0)
        s = np.prod([(t.mean**2 + t.variance).numpy()[i] for t, i in zip(state.tables, cell, strict=True)], axis=0)
        missed = (value - m.sum()) ** 2 + (s - m**2).sum()
        bound -= 0.5 * (missed / noise + math.log(2 * math.pi * noise))
    assert float(model.bound(state)) == pytest.approx(float(bound), rel=1e-6)


@pytest.mark.parametrize("likelihood", ["poisson", "gaussian"])
@pytest.mark.parametrize("learn", [True, False])
def test_the_bound_never_falls(likelihood: str, learn: bool) -> None:
    for seed in range(3):
        (X, y), _ = planted(likelihood, seed, n=400)
        model = fitted(X, y, 6, likelihood=likelihood, learn_hyperparameters=learn, max_iter=60, tol=0.0)
        assert len(model.bound_history_) == 60
        assert np.all(np.diff(model.bound_history_) >= -1e-8 * abs(model.bound_))


def test_the_bound_of_counts_is_below_the_evidence_and_posterior_means_are_right() -> None:
    """One component, given shapes: against importance sampling from the prior."""
    cells: Cells = [((0, 0), 3.0), ((0, 1), 5.0), ((1, 0), 1.0), ((1, 1), 4.0), ((1, 1), 2.0)]
    X, y = np.array([cell for cell, _ in cells]), np.array([count for _, count in cells])
    model = fitted(X, y, 1, likelihood="poisson", learn_hyperparameters=False, tol=1e-10, max_iter=500)
    rng, n = np.random.default_rng(0), 1_000_000
    w, u, v = rng.gamma(1.0, y.mean(), (n, 1)), rng.gamma(1.0, 1.0, (n, 2)), rng.gamma(1.0, 1.0, (n, 2))
    rate = w * u[:, X[:, 0]] * v[:, X[:, 1]]
    log_likelihood = (y * np.log(rate) - rate - np.array([math.lgamma(k + 1) for k in y])).sum(1)
    weight = np.exp(log_likelihood - log_likelihood.max())
    evidence = math.log(weight.mean()) + log_likelihood.max()
    bound = model.bound_ + 4e-3  # shapes have a prior too, whose density at one this is
    assert evidence - 2.0 < bound < evidence
    share = weight / weight.sum()
    mean = share @ rate
    np.testing.assert_allclose(model.predict(X), mean, rtol=0.1)
    std = np.sqrt(share @ (rate - mean) ** 2)
    found = np.sqrt(model.predict(X, return_std=True)[1] ** 2 - model.predict(X))
    assert np.all((0.8 * std < found) & (found < 1.6 * std)), "too wide: the numbers vary against each other"


@pytest.mark.parametrize("likelihood", ["poisson", "gaussian"])
def test_the_planted_rank_comes_back_in_most_draws(likelihood: str) -> None:
    ranks = []
    for seed in range(4):
        (X, y), truth = planted(likelihood, seed)
        model = fitted(X, y, 12, likelihood=likelihood, n_init=1 if likelihood == "poisson" else 4)
        ranks.append(model.effective_rank_)
        assert np.sqrt(np.mean((model.predict(X) - truth) ** 2)) < 0.15 * truth.std()
        for mode, size in (("mode_0", 20), ("mode_1", 18), ("mode_2", 15)):
            mean, std = model.factor(mode)
            assert mean.shape == std.shape == (size, model.rank_[0])
            assert mean.min() >= 0
    assert sum(rank == 4 for rank in ranks) >= 3, ranks


def test_cells_without_a_row_can_be_zeros_at_the_cost_of_those_with_one() -> None:
    (X, y), _ = planted("poisson", 0, n=150)
    X = X[:, :2]
    sums = {(int(i), int(j)): 0.0 for i, j in X}
    for (i, j), count in zip(X.tolist(), y, strict=True):
        sums[i, j] += count
    cells = all_cells((20, 18), list(sums.items()))
    listed = np.array([cell for cell, _ in cells]), np.array([count for _, count in cells])
    settings: dict[str, Any] = {"likelihood": "poisson", "max_iter": 30}
    with pytest.raises(ValueError, match='duplicates: expected "sum" with unlisted="zero"'):
        fitted(X, y, unlisted="zero", **settings)
    with pytest.raises(ValueError, match='sample_weight: expected None with unlisted="zero"'):
        BayesianCP(2, likelihood="poisson", unlisted="zero", **QUICK).fit(*listed, np.ones(360))
    short = fitted(X, y, unlisted="zero", duplicates="sum", **settings)
    long = fitted(*listed, **settings)
    np.testing.assert_allclose(short.predict(listed[0]), long.predict(listed[0]), rtol=1e-6)
    assert short.bound_ == pytest.approx(long.bound_, rel=1e-9)
    assert short.predict(listed[0]).sum() == pytest.approx(y.sum(), rel=0.02)


@pytest.mark.parametrize("likelihood", ["poisson", "gaussian", "student-t"])
def test_files_keep_every_bit_and_draws_are_those_of_the_predictive_distribution(
    likelihood: str, tmp_path: Path
) -> None:
    (X, y), truth = planted(likelihood, 1)
    model = fitted(X[:2500], y[:2500], 6, likelihood=likelihood)
    assert np.sqrt(np.mean((model.predict(X[2500:]) - truth[2500:]) ** 2)) < 0.25 * truth.std()
    assert (model.predict(X) >= 0).all()
    model.save(tmp_path / "model")
    again = probtensor.load(tmp_path / "model")
    for a, b in zip(again.predict(X, return_std=True), model.predict(X, return_std=True), strict=True):
        np.testing.assert_array_equal(a, b)
    drawn = model.sample_y(X[:8], 4000)
    np.testing.assert_array_equal(again.sample_y(X[:8], 4000), drawn)
    assert again.effective_rank_ == model.effective_rank_
    assert again.bound_ == model.bound_
    mean, std = model.predict(X[:8], return_std=True)
    np.testing.assert_allclose(drawn.mean(1), mean, atol=float(5 * std.max() / math.sqrt(4000)))
    np.testing.assert_allclose(drawn.std(1), std, rtol=0.15)
    with pytest.raises(ValueError, match="main_effect: expected a CP model"):
        model.main_effect("mode_0")
    if likelihood == "poisson":
        assert set(np.mod(drawn, 1).ravel()) == {0.0}
        lower, upper = model.predict_interval(X[2500:], 0.9)
        assert 0.87 < np.mean((lower <= y[2500:]) & (y[2500:] <= upper)) < 0.99


def test_counts_of_gamma_distributed_rates_are_negative_binomial() -> None:
    mean, variance = torch.tensor([4.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double()
    counts = count_predictive(mean, variance)
    np.testing.assert_allclose(counts.mean, [4.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(counts.std**2, [6.0, 0.0], atol=1e-9)
    drawn = draw_counts(torch.tensor([3.0]).double().expand(10_000), torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(3.0, abs=0.1)


def test_intervals_of_real_values_are_calibrated_on_rows_held_out() -> None:
    (X, _), truth = planted("gaussian", 1, n=4000)
    y = truth + 0.5 * np.random.default_rng(2).standard_t(2.5, size=len(truth))
    model = fitted(X[:3000], y[:3000], 6, calibration="auto")
    lower, upper = model.predict_interval(X[3000:], 0.9)
    assert 0.86 < np.mean((lower <= y[3000:]) & (y[3000:] <= upper)) < 0.94


@pytest.mark.parametrize("likelihood", ["poisson", "gaussian"])
def test_a_label_that_was_never_seen_has_the_prior(likelihood: str) -> None:
    (X, y), _ = planted(likelihood, 0)
    model = fitted(X, y, 6, likelihood=likelihood)
    new = X[:20].copy()
    new[:, 0] = 99
    with pytest.warns(UnknownLabelWarning):
        mean, std = model.predict(new, return_std=True)
    with pytest.warns(UnknownLabelWarning):
        own, spread = model.factor("mode_0", [99])
    assert np.all(np.isfinite(mean) & (mean >= 0))
    assert std.mean() > model.predict(X[:20], return_std=True)[1].mean()
    everyone = model.factor("mode_0")[0].mean(0)
    np.testing.assert_allclose(own[0], everyone, rtol=0.3)
    assert (spread > 0).all()


@pytest.mark.parametrize("likelihood", ["poisson", "gaussian"])
def test_weights_count_rows(likelihood: str) -> None:
    (X, y), _ = planted(likelihood, 0, n=500)
    settings: dict[str, Any] = {"likelihood": likelihood, "max_iter": 20}
    twice = fitted(np.repeat(X, 2, axis=0), np.repeat(y, 2), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        weighted = BayesianCP(3, calibration=0, **settings, **QUICK).fit(X, y, np.full(len(y), 2.0))
    np.testing.assert_allclose(weighted.predict(X), twice.predict(X), rtol=1e-5)
    assert weighted.bound_ == pytest.approx(twice.bound_, rel=1e-7)


@pytest.mark.parametrize("likelihood", ["poisson", "gaussian"])
@pytest.mark.parametrize("settings", [{}, {"n_init": 2}, {"calibration": 0.3}], ids=str)
def test_a_fit_goes_on_from_its_checkpoint(likelihood: str, settings: dict[str, Any], tmp_path: Path) -> None:
    (X, y), _ = planted(likelihood, 0, n=1000)
    model = BayesianCP(3, likelihood=likelihood, **{"calibration": 0, **settings}, max_iter=27, tol=0.0, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = clone(model).fit(X, y)
        clone(model).fit(X, y, checkpoint=tmp_path, checkpoint_every=8)
        files = sorted(tmp_path.glob("*.safetensors"))
        files[-1].unlink()  # the fit was stopped before it
        resumed = clone(model).fit(X, y, checkpoint=tmp_path, checkpoint_every=8, resume=True)
    np.testing.assert_allclose(resumed.predict(X), whole.predict(X), rtol=1e-9)
    assert resumed.bound_history_ == pytest.approx(whole.bound_history_, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": "beta"}, "prior: expected one of"),
        ({"prior": "gamma", "likelihood": "bernoulli"}, 'likelihood: expected "gaussian", "student-t" or "poisson"'),
        ({"prior": "gamma", "likelihood": "negative-binomial"}, "likelihood: expected"),
        ({"prior": "gamma", "relevance": "horseshoe"}, 'relevance: expected "gamma" with prior="gamma"'),
        ({"prior": "gamma", "guide": "mean_field"}, 'guide: expected "auto" with prior="gamma"'),
        ({"prior": "gamma", "unlisted": "zero"}, 'unlisted: expected "missing" unless prior="gamma" and'),
        ({"unlisted": "zero", "likelihood": "poisson"}, 'unlisted: expected "missing" unless'),
        ({"prior": "gamma", "unlisted": "one"}, "unlisted: expected one of"),
        ({"prior": "gamma", "likelihood": "poisson"}, "y: expected counts"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    (X, y), _ = planted("gaussian", 0, n=60)
    with pytest.raises(ValueError, match=message):
        BayesianCP(2, **settings, progress=False).fit(X, (y > 1).astype(float) if "bern" in str(settings) else y)


def test_real_values_need_a_mean_above_zero_and_zeros_are_counts() -> None:
    (X, y), _ = planted("gaussian", 0, n=60)
    with pytest.raises(ValueError, match='y: expected values of a mean above 0 with prior="gamma"'):
        fitted(X, y - y.mean() - 1.0)
    assert fitted(X, np.zeros(60), likelihood="poisson").predict(X).max() < 0.02
