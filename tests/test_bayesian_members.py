"""Mixtures of fits from several starts: moments and draws by their definition, intervals, files, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

import probtensor
from probtensor.description import describe_model
from probtensor.metrics import rmse
from probtensor.models import BayesianCP, BayesianTucker
from probtensor.models.factor_posterior import MixturePosterior
from tests.test_bayesian_tucker import QUICK, noisy, planted

POSITIONS = torch.tensor([[0, 0, 0], [3, 2, 1], [8, 7, 6], [-1, 4, 4]])


@cache
def mixture() -> tuple[BayesianCP, MixturePosterior]:
    X, y = noisy()
    model = BayesianCP(4, n_members=3, tol=1e-2, calibration=0, **QUICK).fit(X[:250], y[:250])
    assert isinstance(model._posterior, MixturePosterior)
    return model, model._posterior


def test_moments_are_those_of_draws_from_a_member_picked_at_random() -> None:
    _, posterior = mixture()
    each = [[float(x[2]) for x in member.moments(POSITIONS)] for member in posterior.members]
    mean = sum(m for m, _ in each) / 3
    mean_square = sum(v + m**2 for m, v in each) / 3
    found = posterior.moments(POSITIONS)
    assert float(found[0][2]) == pytest.approx(mean, rel=1e-12)
    assert float(found[1][2]) == pytest.approx(mean_square - mean**2, rel=1e-9)

    drawn = posterior.draw(POSITIONS, 20_000, torch.Generator().manual_seed(0))
    error = (found[1] / len(drawn)) ** 0.5
    assert bool(((drawn.mean(0) - found[0]).abs() < 5 * error).all())
    torch.testing.assert_close(drawn.var(0), found[1], rtol=0.1, atol=0)
    assert drawn[:200, 2].diff().abs().min() > 0, "every draw is one of its own"
    assert [len(x) for x in posterior.moments(POSITIONS[:0])] == [0, 0], "a rank without rows"


def test_draws_of_rows_are_joint() -> None:
    """Members that differ move entries together: a draw is of one member in all its rows."""
    _, posterior = mixture()
    apart = MixturePosterior((posterior.members[0], _shifted(posterior.members[0], 100.0)))
    drawn = apart.draw(POSITIONS, 500, torch.Generator().manual_seed(0))
    of_second = drawn > 50
    assert bool((of_second.all(1) | ~of_second.any(1)).all())
    assert 0.4 < float(of_second[:, 0].double().mean()) < 0.6


def _shifted(member: Any, by: float) -> Any:
    return replace(member, model=replace(member.model, offset=member.model.offset + by))


def test_members_have_starts_of_their_own_and_what_is_shown_is_the_best() -> None:
    model, posterior = mixture()
    means = [member.moments(POSITIONS)[0] for member in posterior.members]
    assert all(not torch.equal(a, b) for a, b in pairwise(means))
    shown = model.factor("mode_0")[0]
    best = posterior.members[0].factor(0, torch.arange(shown.shape[0]))[0]
    np.testing.assert_array_equal(shown, best.numpy())
    assert len(model.relevance_) == shown.shape[1]
    effect, _ = model.main_effect("mode_1")
    assert effect.shape == (8,)


def test_a_mixture_errs_less_than_its_members_where_they_differ() -> None:
    X, f = planted(1200, rank=8)
    model = BayesianCP(4, n_members=3, tol=1e-2, calibration=0, **QUICK).fit(X[:250], f[:250])
    assert isinstance(model._posterior, MixturePosterior)
    members = [member.moments(torch.as_tensor(X[250:]))[0].numpy() for member in model._posterior.members]
    errors = [rmse(f[250:], model.y_mean_ + model.y_scale_ * mean) for mean in members]
    assert rmse(f[250:], model.predict(X[250:])) < 0.95 * np.mean(errors)


@pytest.mark.parametrize("likelihood", ["gaussian", "student-t"])
def test_intervals_are_calibrated_on_the_mixture(likelihood: str) -> None:
    X, f = planted(2500)
    y = f + 0.3 * np.random.default_rng(1).standard_t(2.5, size=len(f))
    model = BayesianCP(3, n_members=2, tol=1e-2, likelihood=likelihood, **QUICK).fit(X[:2000], y[:2000])
    assert model._observation is not None
    assert len(model._observation.calibration) == 1
    lower, upper = model.predict_interval(X[2000:], 0.9)
    assert 0.86 < np.mean((lower <= y[2000:]) & (y[2000:] <= upper)) < 0.94


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (BayesianCP, {"rank": 3}),
        (BayesianCP, {"rank": 3, "likelihood": "ordinal"}),
        (BayesianCP, {"rank": 2, "likelihood": "negative-binomial"}),
        (BayesianTucker, {"rank": 2}),
    ],
)
def test_files_keep_every_bit(kind: type[BayesianCP] | type[BayesianTucker], settings: Any, tmp_path: Path) -> None:
    X, y = noisy()
    if "likelihood" in settings:
        y = np.digitize(y, [-1.0, 0.0, 1.0]).astype(float)
    model = kind(n_members=2, tol=1e-1, **settings, **QUICK).fit(X, y)
    model.save(tmp_path / "model")
    loaded = probtensor.load(tmp_path / "model")
    assert isinstance(loaded, kind)
    np.testing.assert_array_equal(loaded.predict(X[:20], return_std=True), model.predict(X[:20], return_std=True))
    np.testing.assert_array_equal(loaded.sample_y(X[:5], 7), model.sample_y(X[:5], 7))
    np.testing.assert_array_equal(loaded.factor("mode_2"), model.factor("mode_2"))
    assert loaded.get_params()["n_members"] == 2


def test_features_of_labels() -> None:
    X, y = noisy()
    table = pd.DataFrame({"dose": range(9)})
    model = BayesianCP(2, n_members=2, tol=1e-1, **QUICK).fit(X, y, side_information={"mode_0": table})
    mean, std = model.feature_effects("mode_0")
    assert mean.shape == std.shape
    assert list(mean.index) == ["dose", "no row"]


def test_a_fit_goes_on_from_any_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    X, y = noisy()
    model = BayesianCP(3, n_members=2, calibration=0.4, tol=1e-1, **QUICK)
    whole = model.fit(X, y).predict(X, return_std=True)
    clone(model).fit(X, y, checkpoint=tmp_path, checkpoint_every=3)
    parts = ["member-0-part", "member-1-part", "member-0-all", "member-1-all"]
    assert {folder.name for folder in tmp_path.iterdir()} == set(parts)
    with pytest.raises(ValueError, match="checkpoint: expected a folder without checkpoints"):
        clone(model).fit(X, y, checkpoint=tmp_path)
    for part in reversed(parts):  # as if the job had ended within each of them, the last first
        newest = max((tmp_path / part).iterdir())
        newest.unlink()
        resumed = clone(model).fit(X, y, checkpoint=tmp_path, checkpoint_every=3, resume=True)
        np.testing.assert_array_equal(resumed.predict(X, return_std=True), whole)
        for file in (tmp_path / part).iterdir():
            file.unlink()


def test_info_names_the_members() -> None:
    said = "3; predictions mix all; rank, bound, factors are of that with the best bound"
    assert describe_model(mixture()[0])["members"] == said
    assert "members" not in describe_model(BayesianCP(2, tol=1e-1, **QUICK).fit(*noisy()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_members": 0}, "n_members: expected an integer of at least 1, got 0"),
        ({"n_members": 2, "guide": "mean_field"}, "n_members: expected 1 with guide='mean_field', got 2"),
        ({"n_members": 2, "relevance": "horseshoe"}, "n_members: expected 1 with guide='mean_field', got 2"),
        ({"n_members": 2, "prior": "gamma"}, 'n_members: expected 1 with prior="gamma", got 2'),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    X, y = noisy()
    with pytest.raises(ValueError, match=message):
        BayesianCP(2, **settings, **QUICK).fit(X, y - y.min())


WAYS: list[dict[str, Any]] = [{"n_members": 2}, {"guide": "mean_field", "n_steps": 5}, {"prior": "gamma"}]


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_known_noise_is_that_of_new_values(settings: dict[str, Any]) -> None:
    X, y = noisy()
    y = y - y.min()  # the gamma prior's values are of one sign
    model = BayesianCP(2, calibration=0, tol=1e-1, **settings, **QUICK).fit(X, y, noise_std=np.full(len(y), 0.2))
    assert model.noise_std_ == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_intervals_are_calibrated_on_the_known_noise(settings: dict[str, Any]) -> None:
    """Rows held out are compared with the noise that new values have: with another, intervals would be as much off."""
    X, y = noisy()
    y, train = y - y.min(), np.arange(len(y)) % 4 > 0
    model = BayesianCP(2, calibration=0.4, tol=1e-1, **settings, **QUICK)
    model.fit(X[train], y[train], noise_std=np.full(train.sum(), 0.2))
    lower, upper = model.predictive(X[~train]).interval(0.9)
    assert 0.8 < np.mean((lower <= y[~train]) & (y[~train] <= upper)) < 0.98
