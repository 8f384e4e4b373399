"""Pictures of completion: bars are the shares, lines the members' errors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from probtensor.plotting import plot_entity_importance, plot_validation

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    matplotlib.pyplot.close("all")


MODEL = SimpleNamespace(
    entity_importance_={
        "user": pd.Series([0.1, 0.6, 0.3, 0.0], index=["a", "b", "c", "d"]),
        "item": pd.Series([1.0], index=[7]),
    },
    validation_rmse_={
        "first": np.array([[3.0, 4.0], [2.0, 1.0], [2.5, 3.0]]),
        "second": np.array([[3.0, 3.5], [3.0, 2.0]]),
    },
    best_epochs_={"first": (1, 1), "second": (0, 1)},
)


def test_bars_are_the_largest_shares_first():
    user, item = plot_entity_importance(MODEL)
    assert [bar.get_width() for bar in user.patches] == [60.0, 30.0, 10.0]
    assert [label.get_text() for label in user.get_yticklabels()] == ["b", "c", "a"]
    assert user.get_title(loc="left") == "user: 3 of 4 labels"
    assert user.lines[0].get_xdata()[0] == pytest.approx(100 / 3)
    assert user.get_ylim()[0] > user.get_ylim()[1]
    assert [bar.get_width() for bar in item.patches] == [100.0]
    assert item.get_title(loc="left") == "item: 1 labels"
    user.figure.canvas.draw()


def test_few_labels_and_given_axes():
    own = matplotlib.pyplot.figure().add_subplot()
    (ax,) = plot_entity_importance(MODEL, ["user"], max_labels=2, axes=[own])
    assert ax is own
    assert len(ax.patches) == 2


def test_lines_are_members_and_their_mean_and_dots_the_best_epochs():
    ax = plot_validation(MODEL)
    lines = [line.get_ydata().tolist() for line in ax.lines]
    assert lines[:4] == [[3.0, 2.0, 2.5], [4.0, 1.0, 3.0], [3.5, 1.5, 2.75], [2.0, 1.0]]
    assert lines[-1] == [3.0, 2.0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["first", "second"]
    ax.figure.canvas.draw()


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"^modes: expected names among"):
        plot_entity_importance(MODEL, ["week"])
    with pytest.raises(ValueError, match=r"^max_labels: expected at least 1, got 0"):
        plot_entity_importance(MODEL, max_labels=0)
    with pytest.raises(ValueError, match=r"^axes: expected one for each"):
        plot_entity_importance(MODEL, axes=[])
    with pytest.raises(ValueError, match=r"^model: expected a network"):
        plot_validation(SimpleNamespace(validation_rmse_={}))
