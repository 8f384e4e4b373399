"""The rank by held-out cells, against the loop written out, and by the bound; its picture."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator

from probtensor.baselines import MaskedParafac, MaskedTucker, PerModeBiases
from probtensor.plotting import plot_rank_choice
from probtensor.rank_choice import RankChoice, choose_rank

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


class Recorder(BaseEstimator):
    """Predicts a constant that its rank decides; remembers what it was fitted to, and has a bound."""

    log: list[tuple[int, pd.DataFrame, np.ndarray]] = []  # noqa: RUF012

    def __init__(self, rank: int = 1, bounds: Any = None) -> None:
        self.rank, self.bounds = rank, bounds

    def fit(self, X: pd.DataFrame, y: np.ndarray) -> Self:
        self.log.append((self.rank, X, y))
        if self.bounds:
            self.bound_ = self.bounds[self.rank]
        return self

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        return np.full(len(X), abs(self.rank - 2.9))


@pytest.fixture
def log():
    Recorder.log.clear()
    return Recorder.log


def low_rank(rank: int = 2, noise: float = 0.02) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(n, rank)) for n in (8, 7, 6)]
    cells = np.argwhere(rng.uniform(size=(8, 7, 6)) < 0.8)
    y = np.prod([f[cells[:, k]] for k, f in enumerate(factors)], axis=0).sum(axis=1)
    return pd.DataFrame(cells, columns=["a", "b", "c"]), y + noise * rng.normal(size=len(y))


@pytest.mark.parametrize(
    "model", [MaskedParafac(tol=1e-5, n_restarts=3, random_state=0), MaskedTucker(tol=1e-5, random_state=0)]
)
def test_held_out_cells_find_the_rank(model):
    X, y = low_rank()
    kept_X, kept_y = X.copy(), y.copy()
    choice = choose_rank(model, X, y, [1, 2, 4], folds=3, random_state=0)
    assert choice.rank == choice.estimator.rank == 2
    np.testing.assert_array_equal(
        choice.estimator.predict(X), type(model)(**choice.estimator.get_params()).fit(X, y).predict(X)
    )
    assert not hasattr(model, "factors_")
    again = choose_rank(model, X, y, [1, 2, 4], folds=3, random_state=0)
    pd.testing.assert_frame_equal(again.table, choice.table)
    pd.testing.assert_frame_equal(X, kept_X)
    np.testing.assert_array_equal(y, kept_y)


def test_folds_hold_each_cell_out_once_with_all_its_rows(log):
    X = pd.DataFrame({"a": np.repeat([0, 1, 2], 6), "b": np.tile([0, 0, 1, 2, 3, 4], 3)})
    y = np.arange(18.0)
    choice = choose_rank(Recorder(), X, y, [1], folds=4, random_state=1)
    fits = [set(rows.index) for _, rows, _ in log]
    assert fits.pop() == set(range(18))
    held = [set(range(18)) - rows for rows in fits]
    assert sorted(row for rows in held for row in rows) == list(range(18))
    assert sorted(len(X.loc[list(rows)].drop_duplicates()) for rows in held) == [3, 4, 4, 4]
    errors = [np.sqrt(np.mean((y[sorted(rows)] - 1.9) ** 2)) for rows in held]
    assert choice.table["rmse"][0] == pytest.approx(np.mean(errors))
    assert choice.table["standard_error"][0] == pytest.approx(np.std(errors, ddof=1) / 2)


def test_one_standard_error_prefers_the_first_that_is_not_clearly_worse(log):
    rng = np.random.default_rng(0)
    X, y = np.stack([np.arange(40), np.arange(40) % 7], axis=1), rng.normal(size=40)
    assert choose_rank(Recorder(), X, y, [1, 2, 3, 4], random_state=0).rank == 3
    choice = choose_rank(Recorder(), X, y, [1, 2, 3, 4], one_standard_error=True, random_state=0)
    best = choice.table.iloc[2]
    within = choice.table["rmse"] <= best["rmse"] + best["standard_error"]
    assert choice.rank == choice.table["rank"][within.idxmax()]
    far = choose_rank(Recorder(), X, 0.01 * y, [1, 2, 3, 4], one_standard_error=True, random_state=0)
    assert far.rank == 3


def test_by_the_bound_each_rank_is_fitted_once_and_the_largest_wins(log):
    X, y = low_rank()
    choice = choose_rank(Recorder(bounds={1: -5.0, (2, 2, 2): -1.0, 3: -2.0}), X, y, [1, (2, 2, 2), 3], by="bound")
    assert choice.rank == choice.estimator.rank == (2, 2, 2)
    assert choice.table.to_dict("list") == {"rank": [1, (2, 2, 2), 3], "bound": [-5.0, -1.0, -2.0]}
    assert [len(rows) for _, rows, _ in log] == [len(X)] * 3


def test_the_bound_of_funbat_chooses():
    from probtensor.models import FunBaT

    X, y = low_rank(rank=1)
    model = FunBaT(form="cp", main_effects=False, n_init=1, max_iter=40, tol=1e-2, random_state=0, progress=False)
    choice = choose_rank(model, X, y, [1, 2], by="bound")
    assert choice.table["bound"].max() == choice.estimator.bound_
    assert choice.estimator.rank == choice.rank


@pytest.mark.parametrize(
    ("model", "ranks", "settings", "words"),
    [
        (MaskedTucker(), [1], {"by": "eye"}, 'by: expected "held_out" or "bound"'),
        (MaskedTucker(), [], {}, "ranks: expected at least one"),
        (PerModeBiases(), [1], {}, "estimator: expected one with a parameter rank, got PerModeBiases"),
        (MaskedTucker(), [1], {"folds": 1}, "folds: expected from 2 to the number of cells"),
        (MaskedTucker(), [1], {"folds": 10_000}, "folds: expected from 2 to the number of cells"),
        (
            MaskedTucker(),
            [1],
            {"by": "bound"},
            "estimator: expected a finite bound_ after the fit with rank 1, got None",
        ),
        (MaskedTucker(), [1], {"by": "bound", "one_standard_error": True}, "one_standard_error: expected False"),
        (Recorder(bounds={1: float("nan")}), [1], {"by": "bound"}, "expected a finite bound_ .* got nan"),
    ],
)
def test_refusals_name_the_argument(model, ranks, settings, words):
    X, y = low_rank()
    with pytest.raises(ValueError, match=words):
        choose_rank(model, X, y, ranks, **settings)


def test_the_picture_shows_every_rank_and_the_chosen_one():
    table = pd.DataFrame({"rank": [1, 2, 4], "rmse": [0.5, 0.2, 0.3], "standard_error": [0.05, 0.04, 0.06]})
    ax = plot_rank_choice(RankChoice(2, table, None))
    assert ax.lines[0].get_ydata().tolist() == [0.5, 0.2, 0.3]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4"]
    assert ax.lines[-1].get_xdata().tolist() == [1]
    assert ax.get_title(loc="left") == "rank 2 chosen"
    own = pyplot.figure().add_subplot()
    bounds = pd.DataFrame({"rank": [(1, 1), (2, 3)], "bound": [-7.0, -5.0]})
    assert plot_rank_choice(RankChoice((2, 3), bounds, None), ax=own) is own
    assert own.get_ylabel() == "bound on the log evidence"
    assert own.get_title(loc="left") == "rank 2×3 chosen"
    own.figure.canvas.draw()
