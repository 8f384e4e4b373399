"""Pictures: what is drawn is what the model says, and nothing global changes."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.inference.variational import VariationalFit
from probtensor.kernels import Matern
from probtensor.plotting import (
    COLOURS,
    plot_bound,
    plot_calibration,
    plot_factors,
    plot_learning,
    plot_main_effects,
    plot_predictions,
    plot_relevance,
)
from probtensor.predictive import NormalMixture

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


class Toy:
    """Component r is (r + 1) * encoded coordinate, deviation 0.5; cubed and backwards in a mode "back"."""

    def __init__(self, *axes, rank=2, form="tucker"):
        self.axes_ = axes
        self.form = form
        self.rank = rank
        self.bound_history_ = [-10.0, -4.0, -3.5]
        self.converged_ = True

    def factor(self, name, at=None):
        axis = next(axis for axis in self.axes_ if axis.name == name)
        values = np.asarray(axis.encode(at), dtype=float)
        slopes = np.arange(1, self.rank + 1)
        return values[:, None] * (slopes[::-1] ** 3 if name == "back" else slopes), np.full(
            (len(values), self.rank), 0.5
        )

    def main_effect(self, name, at=None):
        mean, std = self.factor(name, at)
        return mean[:, 0], std[:, 0]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def model():
    return Toy(CategoricalAxis("cell").fit(["a", "b", "c"]), ContinuousAxis("dose").fit([0.0, 0.3, 2.0]))


def draw(ax):
    ax.figure.canvas.draw()


def test_one_panel_a_mode_in_the_order_of_the_axes(model):
    panels = plot_factors(model)
    assert panels.shape == (2,)
    assert panels[0].get_ylabel() == "cell"
    assert panels[1].get_xlabel() == "dose"
    draw(panels[0])


def test_what_coordinates_have_for_themselves_are_dots_beside_the_line(model):
    (panel,) = plot_factors(model, ["dose"], n_grid=5)
    lines = {line.get_label(): line for line in panel.lines}
    dots = [line for line in panel.lines if line.get_marker() == "."]
    for component in (1, 2):
        x, y = lines[str(component)].get_data()
        np.testing.assert_allclose(x, [0.5, 1.0, 1.5])
        np.testing.assert_allclose(y, component * x)
        x, y = dots[component - 1].get_data()
        np.testing.assert_allclose(x, [0.0, 0.3, 2.0])
        np.testing.assert_allclose(y, component * x)


def test_a_continuous_mode_shows_means_bands_and_observed_coordinates():
    model = Toy(ContinuousAxis("dose", Matern(1.5)).fit([0.0, 0.3, 2.0]))
    (panel,) = plot_factors(model, ["dose"], n_grid=5)
    lines = {line.get_label(): line for line in panel.lines}
    grid = np.unique([0.0, 0.5, 1.0, 1.5, 2.0, 0.3])
    for component in (1, 2):
        x, y = lines[str(component)].get_data()
        np.testing.assert_allclose(x, grid)
        np.testing.assert_allclose(y, component * grid)
    assert not [line for line in panel.lines if line.get_marker() == "."]
    band = panel.collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(2 * 0.0 - 2 * 0.5)
    assert band[:, 1].max() == pytest.approx(2 * 2.0 + 2 * 0.5)
    (rug,) = [line for line in panel.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(rug.get_xdata(), [0.0, 0.3, 2.0])
    assert lines["1"].get_color() == COLOURS[0]


def test_a_categorical_mode_shows_a_point_with_a_bar_for_each_label(model):
    (panel,) = plot_factors(model, ["cell"])
    assert [text.get_text() for text in panel.get_yticklabels()] == ["a", "b", "c"]
    assert panel.yaxis.get_inverted()
    means = [container.lines[0].get_xdata().tolist() for container in panel.containers]
    assert means == [[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]
    bars = panel.containers[1].lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 0] for bar in bars], [[-1.0, 1.0], [1.0, 3.0], [3.0, 5.0]])


def test_main_effects_are_drawn_alone_and_on_one_scale(model):
    cell, dose = plot_main_effects(model, n_grid=5)
    (points,) = [line for line in cell.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points.get_xdata(), [0, 1, 2])
    line = next(line for line in dose.lines if line.get_linewidth() == 2.0)
    np.testing.assert_allclose(line.get_ydata(), line.get_xdata())
    assert cell.get_xlim() == dose.get_ylim() == pytest.approx((-1.2, 3.2))  # two deviations around 0 and 2, and 5 %
    assert (cell.get_xlabel(), dose.get_ylabel()) == ("effect on y", "effect on y")
    assert cell.get_legend() is None


def test_only_the_strongest_components_are_drawn_under_their_own_numbers():
    toy = Toy(ContinuousAxis("dose").fit([0.0, 1.0]), rank=7)
    (panel,) = plot_factors(toy, max_components=3)
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["5", "6", "7"]
    styles = {line.get_label(): line for line in panel.lines}
    assert [styles[label].get_color() for label in "567"] == list(COLOURS[:3])
    assert styles["7"].get_linestyle() == "-"


def test_components_that_share_a_colour_differ_in_line():
    toy = Toy(ContinuousAxis("dose").fit([0.0, 1.0]), rank=7)
    (panel,) = plot_factors(toy, max_components=7)
    styles = {line.get_label(): line for line in panel.lines}
    assert styles["1"].get_color() == styles["7"].get_color() == COLOURS[0]
    assert (styles["1"].get_linestyle(), styles["7"].get_linestyle()) == ("-", "--")


@pytest.mark.parametrize(("form", "shown"), [("cp", [["1", "2"]] * 2), ("tucker", [["3", "4"], ["1", "2"]])])
def test_a_cp_model_shows_the_same_components_in_all_panels(form, shown):
    axes = (ContinuousAxis(name).fit([0.0, 1.0]) for name in ("forth", "back"))
    panels = plot_factors(Toy(*axes, rank=4, form=form), max_components=2)
    assert [[text.get_text() for text in panel.get_legend().get_texts()] for panel in panels] == shown


@pytest.mark.parametrize("timezone", [None, "Europe/Berlin"])
def test_datetimes_are_drawn_on_the_clock_of_the_user(timezone):
    times = pd.date_range("2024-01-03", "2024-03-20", periods=9, tz=timezone)
    (panel,) = plot_factors(Toy(ContinuousAxis("when").fit(times)))
    (rug,) = [line for line in panel.lines if line.get_marker() == "|"]
    drawn = pd.DatetimeIndex(rug.get_xdata())
    assert abs(drawn - times.tz_localize(None)).max() < pd.Timedelta("1ms")
    draw(panel)
    assert "Feb" in [text.get_text() for text in panel.get_xticklabels()]


def test_durations_are_drawn_in_days():
    (panel,) = plot_factors(Toy(ContinuousAxis("lag").fit(pd.to_timedelta([6, 12, 24], unit="h"))))
    assert panel.get_xlabel() == "lag (days)"
    (rug,) = [line for line in panel.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(rug.get_xdata(), [0.25, 0.5, 1.0])


def test_many_labels_get_some_ticks_and_one_coordinate_draws():
    toy = Toy(CategoricalAxis("station").fit([f"s{i:03d}" for i in range(120)]), ContinuousAxis("t").fit([1.0]))
    panels = plot_factors(toy)
    assert 10 <= len(panels[0].get_yticks()) <= 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(panels[1])


def test_given_axes_are_used_and_more_than_four_modes_wrap():
    toy = Toy(*(ContinuousAxis(f"m{k}").fit([0.0, 1.0]) for k in range(5)))
    panels = plot_factors(toy)
    assert len(panels) == 5
    assert len(panels[0].figure.axes) == 5
    mine = matplotlib.figure.Figure().subplots(1, 2)
    drawn = plot_factors(toy, ["m3", "m1"], axes=mine)
    assert all(a is b for a, b in zip(drawn, mine, strict=True))
    assert [ax.get_xlabel() for ax in mine] == ["m3", "m1"]


def test_predictions_outside_of_their_interval_stand_out():
    y = np.array([0.0, 1.0, 2.0, np.nan])
    ax = plot_predictions(y, [0.1, 1.0, 4.0, 9.0], [0.5, 0.5, 0.5, 0.5], level=0.9)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["inside its 90 % interval (67 %)", "outside its 90 % interval (33 %)"]
    outside = ax.collections[3].get_offsets()
    np.testing.assert_allclose(outside, [[2.0, 4.0]])
    np.testing.assert_allclose(
        ax.collections[2].get_segments()[0][:, 1], 4.0 + 0.5 * 1.6448536269514722 * np.array([-1, 1])
    )
    np.testing.assert_allclose(*ax.lines[0].get_data())
    assert ax.get_xlim() == ax.get_ylim()
    draw(ax)


def test_predictions_take_intervals_that_are_not_gaussian():
    ax = plot_predictions([0.0, 1.0], [0.0, 3.0], interval=([-1.0, 2.0], [0.5, 9.0]), level=0.8)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["inside its 80 % interval (50 %)", "outside its 80 % interval (50 %)"]
    np.testing.assert_allclose(ax.collections[2].get_segments()[0], [[1.0, 2.0], [1.0, 9.0]])
    draw(ax)


def test_predictions_without_deviations_have_no_intervals():
    ax = plot_predictions([1.0, 1.0], [1.0, 1.0])
    assert ax.get_legend() is None
    assert len(ax.collections) == 1
    low, high = ax.get_xlim()
    assert low < 1.0 < high


def test_the_bound_is_drawn_from_the_first_iteration(model):
    ax = plot_bound(model)
    np.testing.assert_allclose(ax.lines[0].get_data(), [[1, 2, 3], [-10.0, -4.0, -3.5]])
    assert ax.get_title(loc="left") == "-3.5 after 3 iterations, converged"
    model.converged_ = False
    assert "not converged" in plot_bound(model, ax=ax).get_title(loc="left")


def test_the_bound_of_variational_inference_is_drawn_too():
    fit = VariationalFit({}, [-9.0, -5.0], False, {})
    assert plot_bound(fit).get_title(loc="left") == "-5.0 after 2 iterations, not converged"


def test_components_that_count_are_solid_bars(model):
    model.relevance_, model.effective_rank_ = np.array([3.0, 1.0, 0.01]), 2
    ax = plot_relevance(model)
    bars = {round(bar.get_x() + bar.get_width() / 2): (bar.get_height(), bar.get_facecolor()[3]) for bar in ax.patches}
    assert bars == {1: (3.0, 1.0), 2: (1.0, 1.0), 3: (0.01, 0.0)}
    assert ax.get_title(loc="left") == "effective rank 2 of 3"
    draw(ax)
    model.relevance_ = np.zeros(0)
    with pytest.raises(ValueError, match="model: expected components with a relevance_"):
        plot_relevance(model)


def test_calibration_is_drawn_against_the_diagonal():
    y = np.random.default_rng(0).normal(size=300)
    ax = plot_calibration(y, NormalMixture(np.zeros(300), np.ones((300, 1)), np.ones(1)))
    diagonal, curve = ax.lines
    np.testing.assert_allclose(*diagonal.get_data())
    np.testing.assert_allclose(*curve.get_data(), atol=0.08)
    assert ax.get_xlabel() == "probability of the interval"


def test_the_line_of_the_bound_breaks_where_the_bound_is_that_of_another_model(model):
    model.phase_starts_ = (0, 2)
    first, second = plot_bound(model).lines
    np.testing.assert_allclose(first.get_data(), [[1, 2], [-10.0, -4.0]])
    np.testing.assert_allclose(second.get_data(), [[3], [-3.5]])


def test_learning_is_the_bound_and_each_small_parameter_over_the_iterations(model):
    model.parameter_history_ = {
        "noise_std": [3.0, 2.0, 1.0],
        "prior": np.arange(8.0).reshape(4, 2),  # from the start on
        "components": np.zeros((3, 2, 5)),
    }
    panels = plot_learning(model, truth={"prior": [6.5, 7.5], "unknown": 1.0})
    assert [ax.get_ylabel() for ax in panels] == ["bound on the log evidence", "noise_std", "prior"]
    np.testing.assert_allclose(panels[0].lines[0].get_data(), [[1, 2, 3], [-10.0, -4.0, -3.5]])
    np.testing.assert_allclose(panels[1].lines[0].get_data(), [[1, 2, 3], [3.0, 2.0, 1.0]])
    curves, rights = panels[2].lines[:2], panels[2].lines[2:]
    np.testing.assert_allclose(curves[1].get_data(), [[0, 1, 2, 3], [1.0, 3.0, 5.0, 7.0]])
    assert [line.get_ydata()[0] for line in rights] == [6.5, 7.5]
    assert [line.get_color() for line in rights] == [line.get_color() for line in curves] == list(COLOURS[:2])
    draw(panels[0])


def test_many_values_of_a_parameter_are_drawn_alike_and_many_panels_wrap(model):
    model.parameter_history_ = {name: np.zeros((3, 9)) for name in "abcde"}
    panels = plot_learning(model)
    assert len(panels) == len(panels[0].figure.axes) == 6
    assert {line.get_color() for line in panels[5].lines} == {COLOURS[0]}
    mine = matplotlib.figure.Figure().subplots(2, 3)
    assert all(a is b for a, b in zip(plot_learning(model, axes=mine), mine.flat, strict=True))
    with pytest.raises(ValueError, match=r"axes: expected 6, for the bound and \['a', .*, got 3"):
        plot_learning(model, axes=mine[0])
    model.parameter_history_ = {"a": [1.0]}
    with pytest.raises(ValueError, match="model: expected the 3 iterations of the bound for a, got 1"):
        plot_learning(model)


def test_matplotlib_settings_stay_as_they_were(model):
    before = dict(matplotlib.rcParams)
    plot_factors(model)
    plot_predictions([1.0, 2.0], [1.0, 2.5], [0.1, 0.1])
    plot_bound(model)
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_on_first_use_only():
    code = "import sys, probtensor.plotting; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_without_matplotlib_the_remedy_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot_bound(model)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda toy: plot_factors(toy, ["nope"]), r"modes: expected names among \['cell', 'dose'\], got \['nope'\]"),
        (lambda toy: plot_factors(toy, []), r"modes: expected names .* got \[\]"),
        (lambda toy: plot_factors(toy, max_components=0), "max_components: expected at least 1, got 0"),
        (lambda toy: plot_factors(toy, n_grid=0), "n_grid: expected at least 1, got 0"),
        (lambda toy: plot_factors(toy, axes=[None]), r"axes: expected one for each of the modes .* got 1"),
        (lambda toy: plot_predictions([1.0], [1.0, 2.0]), "mean: expected the 1 values of y, got 2"),
        (lambda toy: plot_predictions([1.0], [1.0], [1.0, 2.0]), "std: expected the 1 values of y, got 2"),
        (lambda toy: plot_predictions([1.0], [1.0], interval=([0.0, 0.0], [2.0])), "interval: expected the 1 values"),
        (lambda toy: plot_predictions([float("nan")], [1.0]), "y: expected at least one observed value"),
        (lambda toy: plot_predictions([1.0], [1.0], level=1.0), "level: expected a number between 0 and 1"),
    ],
)
def test_bad_input_is_named(model, call, words):
    with pytest.raises(ValueError, match=words):
        call(model)


def test_an_empty_history_is_named(model):
    model.bound_history_ = []
    with pytest.raises(ValueError, match="expected a bound_history_ with at least one value"):
        plot_bound(model)
