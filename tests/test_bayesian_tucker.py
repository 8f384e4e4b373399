"""Bayesian CP and Tucker: moments by their definition, planted tensors, guides, likelihoods, files, labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from torch import Tensor

import probtensor
from probtensor.estimator import UnknownLabelWarning
from probtensor.likelihoods import StudentT
from probtensor.models import BayesianCP, BayesianTucker
from probtensor.models.bayesian_moments import cp_moments, tucker_moments, tucker_values
from probtensor.models.functional_start import paired
from probtensor.models.latent_functions import ExchangeableRows
from tests.reference_bayesian import entry_moments

if TYPE_CHECKING:
    from tests.conftest import RunMpi

SIZES = (9, 8, 7)
QUICK: dict[str, Any] = {"random_state": 0, "progress": False}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n: int = 700, rank: int = 2, seed: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    X = np.stack([rng.integers(0, size, n) for size in SIZES], axis=1)
    f = np.ones((n, rank))
    for k, size in enumerate(SIZES):
        f *= rng.normal(size=(size, rank))[X[:, k]]
    return X, f.sum(1)


def noisy(seed: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    X, f = planted()
    return X, f + 0.2 * np.random.default_rng(seed).normal(size=len(f))


@pytest.mark.parametrize("ranks", [(1,), (2, 3), (2, 1, 3)])
def test_tucker_moments_are_those_of_all_pairs_of_cells(ranks: tuple[int, ...]) -> None:
    means = [draws(4, r, seed=k) for k, r in enumerate(ranks)]
    variances = [draws(4, r, seed=9 + k) ** 2 for k, r in enumerate(ranks)]
    core, spread = draws(*ranks), draws(*ranks, seed=1) ** 2
    mean, variance = tucker_moments(means, variances, core, spread)
    for n in range(4):
        wanted = entry_moments([m[n] for m in means], [v[n] for v in variances], core, spread)
        assert (float(mean[n]), float(variance[n])) == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(tucker_values(means, core), mean)


def test_cp_moments_are_those_of_a_superdiagonal_core() -> None:
    means, variances = [draws(4, 3, seed=k) for k in range(3)], [draws(4, 3, seed=9 + k) ** 2 for k in range(3)]
    weight, spread = draws(3), draws(3, seed=5) ** 2
    core, core_variance = torch.zeros(2, 3, 3, 3, dtype=torch.float64)
    for r in range(3):
        core[r, r, r], core_variance[r, r, r] = weight[r], spread[r]
    mean, variance = cp_moments(means, variances, weight, spread)
    for n in range(4):
        wanted = entry_moments([m[n] for m in means], [v[n] for v in variances], core, core_variance)
        assert (float(mean[n]), float(variance[n])) == pytest.approx(wanted, rel=1e-12)


def test_cp_finds_the_planted_components() -> None:
    X, y = noisy()
    model = BayesianCP(6, calibration=0, **QUICK).fit(X, y)
    assert model.effective_rank_ == 2
    assert model.noise_std_ == pytest.approx(0.2, abs=0.03)
    assert list(model.relevance_) == sorted(model.relevance_, reverse=True)
    mean, std = model.factor("mode_0")
    assert mean.shape == std.shape == (SIZES[0], model.rank_[0])
    effect, spread = model.main_effect("mode_1")
    assert np.all(np.abs(effect) < 4 * spread + 0.05), "nothing is planted there"


GUIDES: list[dict[str, Any]] = [
    {"guide": "mean_field"},
    {"guide": "low_rank"},
    {"guide": "full", "main_effects": False},
    {"relevance": "horseshoe"},
    {"guide": "mean_field", "batch_size": 200},
]


@pytest.mark.parametrize("settings", GUIDES, ids=str)
def test_guides_of_pyro_predict_as_rows_do_and_files_keep_every_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    X, y = noisy()
    effects = settings.get("main_effects", True)
    rows = BayesianCP(2, main_effects=effects, calibration=0, **QUICK).fit(X[:500], y[:500])
    model = BayesianCP(2, calibration=0, n_steps=30, learning_rate=0.005, **settings, **QUICK).fit(X[:500], y[:500])
    truth = planted()[1][500:]
    errors = [float(np.sqrt(np.mean((m.predict(X[500:]) - truth) ** 2))) for m in (rows, model)]
    assert errors[1] < 1.3 * errors[0] + 0.02
    assert model.bound_ < rows.bound_ + 3 or settings["guide"] != "mean_field", "rows have the larger family"
    assert model.effective_rank_ == 2
    model.save(tmp_path / "model")
    again = probtensor.load(tmp_path / "model")
    for a, b in zip(again.predict(X, return_std=True), model.predict(X, return_std=True), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(again.sample_y(X[:5], 3), model.sample_y(X[:5], 3))
    np.testing.assert_array_equal(again.relevance_, model.relevance_)


@pytest.mark.parametrize("guide", ["rows", "mean_field"])
def test_tucker(guide: Any, tmp_path: Path) -> None:
    X, y = noisy()
    model = BayesianTucker((3, 2, 2), guide=guide, calibration=0, n_steps=60, **QUICK).fit(X[:500], y[:500])
    error = np.sqrt(np.mean((model.predict(X[500:]) - planted()[1][500:]) ** 2))
    assert error < 0.25
    assert model.core_ is not None
    assert model.core_.shape == (4, 3, 3)
    with pytest.raises(ValueError, match="main_effect: expected a CP model"):
        model.main_effect("mode_0")
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(probtensor.load(tmp_path / "model").predict(X), model.predict(X))


@pytest.mark.parametrize("guide", ["rows", "mean_field"])
@pytest.mark.parametrize("likelihood", ["student-t", "bernoulli", "poisson", "negative-binomial", "ordinal"])
def test_likelihoods_predict_better_than_one_distribution_for_all(likelihood: str, guide: Any, tmp_path: Path) -> None:
    X, f = planted()
    rng = np.random.default_rng(0)
    y = {
        "student-t": f + 0.2 * rng.standard_t(3, size=len(f)),
        "bernoulli": (f + 0.3 * rng.logistic(size=len(f)) > 0).astype(float),
        "ordinal": np.digitize(f + 0.3 * rng.logistic(size=len(f)), [-1.0, 0.0, 1.0]) / 2,
    }.get(likelihood, rng.poisson(np.exp(f.clip(max=3.0))).astype(float))
    settings = {"likelihood": likelihood, "guide": guide, "n_steps": 30, "calibration": 0}
    model = BayesianCP(2, **settings, **QUICK).fit(X[:500], y[:500])
    found = model.log_prob(X[500:], y[500:]).mean()
    shares = pd.Series(y[500:]).value_counts(normalize=True)
    none = -np.log(y[500:].std()) - 1.42 if likelihood == "student-t" else float((shares * np.log(shares)).sum())
    assert found > none + 0.02
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(probtensor.load(tmp_path / "model").log_prob(X, y), model.log_prob(X, y))
    drawn = model.sample_y(X[:4], 5)
    assert drawn.shape == (4, 5)
    if likelihood != "student-t":
        assert set(drawn.ravel()) <= set(range(100)) | {0.5, 1.5}


def test_labels_of_any_kind_and_labels_that_are_new() -> None:
    X, y = noisy()
    table = pd.DataFrame(
        {
            "who": [f"label {i}" for i in X[:, 0]],
            "when": pd.Timestamp("2020-01-01") + pd.to_timedelta(X[:, 1], unit="D"),
            "dose": X[:, 2] / 4,
        }
    )
    before = table.copy()
    plain, named = (BayesianCP(2, calibration=0, **QUICK).fit(x, y) for x in (X, table))
    pd.testing.assert_frame_equal(table, before)
    np.testing.assert_allclose(named.predict(table), plain.predict(X), atol=0.05)
    new = table.head(3).assign(who="nobody")
    with pytest.warns(UnknownLabelWarning):
        mean, std = named.predict(new, return_std=True)
    assert np.isfinite(mean).all()
    assert std.mean() > 2 * named.predict(table.head(3), return_std=True)[1].mean()
    assert np.isfinite(named.predict(table.head(3).assign(dose=0.3))).all(), "a dose between others is a new label"


def test_intervals_are_calibrated_on_rows_held_out() -> None:
    X, f = planted(4000)
    y = f + 0.3 * np.random.default_rng(1).standard_t(2.5, size=len(f))
    for guide in ("rows", "mean_field"):
        model = BayesianCP(2, guide=guide, n_steps=20, **QUICK).fit(X[:3000], y[:3000])  # type: ignore[arg-type]
        lower, upper = model.predict_interval(X[3000:], 0.9)
        inside = np.mean((lower <= y[3000:]) & (y[3000:] <= upper))
        assert 0.86 < inside < 0.94


def test_weights_and_known_noise() -> None:
    X, y = noisy()
    twice = BayesianCP(2, calibration=0, **QUICK).fit(np.repeat(X, 2, axis=0), np.repeat(y, 2))
    weighted = BayesianCP(2, calibration=0, **QUICK).fit(X, y, sample_weight=np.full(len(y), 2.0))
    np.testing.assert_allclose(weighted.predict(X), twice.predict(X), atol=0.02)
    known = BayesianCP(2, calibration=0, **QUICK).fit(X, y, noise_std=np.full(len(y), 0.2))
    np.testing.assert_allclose(known.predict(X), BayesianCP(2, calibration=0, **QUICK).fit(X, y).predict(X), atol=0.05)


def test_the_same_seed_gives_the_same_fit_and_no_generator_moves() -> None:
    X, y = noisy()
    model = BayesianCP(2, guide="mean_field", n_steps=5, calibration=0, **QUICK)
    torch.manual_seed(3)
    first = model.fit(X, y).predict(X)
    moved = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), moved)
    np.testing.assert_array_equal(clone(model).fit(X, y).predict(X), first)


@pytest.mark.parametrize("guide", ["rows", "mean_field"])
def test_a_fit_goes_on_from_its_checkpoint(guide: Any, tmp_path: Path) -> None:
    X, y = noisy()
    model = BayesianCP(2, guide=guide, n_steps=12, calibration=0, **QUICK)
    whole = model.fit(X, y).predict(X)
    clone(model).fit(X, y, checkpoint=tmp_path, checkpoint_every=5)
    resumed = clone(model).fit(X, y, checkpoint=tmp_path, checkpoint_every=5, resume=True)
    np.testing.assert_allclose(resumed.predict(X), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": "best"}, "guide: expected one of"),
        ({"relevance": "horseshoe", "guide": "rows"}, 'relevance: expected "gamma" with guide="rows"'),
        ({"relevance": "lasso"}, "relevance: expected one of"),
        ({"n_steps": 0}, "n_steps: expected an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected None or an integer of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
        ({"calibration": 2.0}, 'calibration: expected "auto" or a share'),
        ({"relevance_prior": (1.0,)}, "relevance_prior: expected two numbers"),
        ({"tol": -1.0}, "tol: expected a number >= 0"),
        ({"rank": (2, 3, 2)}, "rank: expected the same rank for all modes"),
        ({"likelihood": "cauchy"}, "likelihood: expected a Likelihood or one of"),
        ({"likelihood": StudentT()}, r"likelihood: expected StudentT\(nugget=False\)"),
        ({"likelihood": "ordinal"}, "y: expected 2 to 100 levels"),
        ({"likelihood": "poisson"}, "y: expected counts"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    X, y = noisy()
    with pytest.raises(ValueError, match=message):
        BayesianCP(**{"rank": 2, **settings}, **QUICK).fit(X, y)


def test_a_horseshoe_is_refused_for_tucker_and_a_full_guide_for_many_labels() -> None:
    X, y = noisy()
    with pytest.raises(ValueError, match='relevance: expected "gamma" for Tucker'):
        BayesianTucker(2, relevance="horseshoe", **QUICK).fit(X, y)
    many = np.random.default_rng(0).integers(0, 1000, size=(700, 2))
    with pytest.raises(ValueError, match='guide: expected another than "full"'):
        BayesianCP(2, guide="full", max_iter=200, tol=1.0, calibration=0, **QUICK).fit(many, y)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fits_on_several_ranks_are_the_serial_fits(run_mpi: RunMpi, n: int) -> None:
    assert run_mpi("bayesian_ranks.py", n, timeout=200).stdout == f"ok on {n}\n"


def test_the_model_of_ones_own_in_the_docs_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "bayesian.md").read_text(encoding="utf-8")
    code = next(part.split("```")[0] for part in page.split("```python\n") if part.startswith("import pyro"))
    rng = np.random.default_rng(0)
    positions = torch.from_numpy(np.stack([rng.integers(0, n, 1000) for n in (20, 30)], axis=1))
    logits = (draws(20, 1)[positions[:, 0]] * draws(30, 1, seed=1)[positions[:, 1]]).squeeze(1)
    trials = torch.full((1000,), 5.0)
    successes = torch.binomial(trials, torch.sigmoid(logits).float(), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"positions": positions, "trials": trials, "successes": successes}
    exec(code, names)
    found = names["draws"]
    assert found["users"].shape == (50, 20, 2)
    predicted = (found["users"][:, positions[:, 0]] * found["films"][:, positions[:, 1]]).sum(2).mean(0)
    assert np.corrcoef(predicted, logits)[0, 1] > 0.7


def test_components_start_as_pairs_of_modes_in_turn_and_then_of_all() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    columns, free = draws(30, 5), [torch.tensor([True] * 4 + [k == j for j in range(1)]) for k in range(3)]
    for mode, near_one in enumerate(([2], [1], [0])):  # pairs (0, 1), (0, 2), (1, 2), then all three
        f = ExchangeableRows(30, like)
        mean, hyper = paired(f, mode, columns, f.initial_hyperparameters(int(free[mode].sum())), free)
        moved = [r for r in range(5) if not torch.equal(mean[:, r], columns[:, r])]
        assert moved == near_one
        torch.testing.assert_close(mean[:, moved], 1 + 0.1 * columns[:, moved])
        assert hyper[1, moved].tolist() == [0.0]
