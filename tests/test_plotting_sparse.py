"""Pictures of sparse codes: tiles hold the components, bars the probabilities, greys the images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from probtensor.plotting import COLOURS, plot_activations, plot_dictionary, plot_reconstruction

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

NAN = float("nan")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    matplotlib.pyplot.close("all")


def tiles(ax):
    """The components as they are drawn, by their frames, each as coarse as it was given; upper left first."""
    mosaic = ax.images[0].get_array().filled(NAN)
    found = []
    for frame in ax.patches:
        left, top = (round(edge + 0.5) for edge in frame.get_xy())
        found.append(mosaic[top : top + round(frame.get_height()), left : left + round(frame.get_width())])
    return found


def words(ax):
    return [text.get_text() for text in ax.texts]


def test_every_component_is_a_tile_of_its_own_shape():
    components = np.random.default_rng(0).normal(size=(5, 6))
    ax = plot_dictionary(components, (2, 3))
    drawn = tiles(ax)
    assert len(drawn) == 5
    for tile, component in zip(drawn, components, strict=True):
        np.testing.assert_array_equal(tile[4::8, 4::8], component.reshape(2, 3))
    assert np.isnan(ax.images[0].get_array().filled(NAN)[0]).all()
    assert ax.get_title(loc="left") == "5 components"
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("size", "shape"), [(16, (4, 4)), (6, (1, 6)), (1, (1, 1))])
def test_components_are_square_or_one_row(size, shape):
    drawn = tiles(plot_dictionary(np.ones((2, size))))[0].shape
    assert drawn[0] * shape[1] == drawn[1] * shape[0]


def test_colours_are_symmetric_around_zero_where_numbers_are_negative():
    signed = plot_dictionary([[-1.0, 0.0, 2.0, 3.0]]).images[0]
    assert (signed.get_clim(), signed.get_cmap().name) == ((-3.0, 3.0), "RdBu_r")
    positive = plot_dictionary([[1.0, 0.0, 2.0, 3.0]]).images[0]
    assert (positive.get_clim(), positive.get_cmap().name) == ((0.0, 3.0), "cividis")
    assert plot_dictionary(np.zeros((2, 4))).images[0].get_clim() == (0.0, 1.0)


def test_the_most_used_components_come_first_with_their_use():
    ax = plot_dictionary([[1.0], [2.0], [3.0]], use=[0.1, 0.005, 0.25])
    assert [tile[0, 0] for tile in tiles(ax)] == [3.0, 1.0, 2.0]
    assert words(ax) == ["25 %", "10 %", "0.5 %"]
    assert ax.get_title(loc="left") == "3 components, most used first"
    ax = plot_dictionary([[1.0], [2.0], [3.0]], use=[0.1, 0.005, 0.25], max_components=2)
    assert [tile[0, 0] for tile in tiles(ax)] == [3.0, 1.0]
    assert ax.get_title(loc="left") == "2 of 3 components, most used first"
    assert words(plot_dictionary(np.ones((65, 4)), use=np.ones(65))) == []


def test_weak_components_show_their_form_on_a_scale_of_their_own():
    ax = plot_dictionary([[0.0, -100.0], [0.5, 0.25], [0.0, 0.0]], same_scale=False)
    assert [tile[0, [0, -1]].tolist() for tile in tiles(ax)] == [[0.0, -1.0], [1.0, 0.5], [0.0, 0.0]]


def test_a_dictionary_is_drawn_where_it_is_told():
    mine = matplotlib.figure.Figure().subplots()
    assert plot_dictionary(np.eye(4), ax=mine) is mine


def test_components_are_bars_the_most_used_first():
    chances = np.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.1]])
    often, number = plot_activations(chances)
    assert [bar.get_height() for bar in often.patches] == [1.0, 0.3, 0.0]
    np.testing.assert_allclose([bar.get_height() for bar in number.patches], [0.0, 0.7, 0.3])
    assert often.get_legend() is None
    often.figure.canvas.draw()


def test_the_number_of_active_components_is_binomial_under_equal_chances():
    from scipy.stats import binom

    chances = np.full((3000, 6), 0.3)
    _, number = plot_activations(chances, prior=0.2)
    drawn = [bar.get_height() for bar in number.patches]
    np.testing.assert_allclose(drawn, binom.pmf(np.arange(len(drawn)), 6, 0.3))
    x, before = number.lines[0].get_data()
    np.testing.assert_allclose(before, binom.pmf(x, 6, 0.2))


def test_a_model_brings_its_probabilities_and_its_prior():
    model = SimpleNamespace(inclusion_=np.array([[0.25, 0.5]]), prior_=np.array([0.1, 0.2]))
    often, _ = plot_activations(model)
    assert [bar.get_height() for bar in often.patches] == [0.5, 0.25]
    assert [segment[0, 1] for segment in often.collections[0].get_segments()] == [0.2, 0.1]
    assert {text.get_text() for text in often.get_legend().get_texts()} == {"prior", "posterior mean"}
    often, _ = plot_activations(model, prior=0.4)
    assert [segment[0, 1] for segment in often.collections[0].get_segments()] == [0.4, 0.4]


def test_images_share_the_scale_of_the_truth_and_tell_their_error():
    truth = np.array([[0.0, 200.0], [100.0, 50.0]])
    panels = plot_reconstruction(truth + 25.5, truth + 2.55, truth)
    assert [ax.get_title(loc="left") for ax in panels] == ["before, 20.0 dB", "after, 40.0 dB", "truth"]
    assert {ax.images[0].get_clim() for ax in panels} == {(0.0, 200.0)}
    panels[0].figure.canvas.draw()


def test_missing_pixels_stand_out():
    before = np.array([[1.0, NAN], [NAN, NAN]])
    panels = plot_reconstruction(before, np.arange(4.0).reshape(2, 2))
    assert [ax.get_title(loc="left") for ax in panels] == ["before, 75 % missing", "after"]
    bad = panels[0].images[0].get_cmap().get_bad()
    np.testing.assert_allclose(bad, matplotlib.colors.to_rgba(COLOURS[4]))
    panels = plot_reconstruction(before, np.ones((2, 2)), np.ones((2, 2)), peak=1.0)
    assert panels[0].get_title(loc="left") == "before, 75 % missing"


def test_matplotlib_settings_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    plot_dictionary(np.eye(4))
    plot_activations(np.eye(4))
    plot_reconstruction(np.eye(4), np.eye(4))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_dictionary([1.0, 2.0]), r"components: expected finite numbers \(H, D\), got shape \(2,\)"),
        (lambda: plot_dictionary([[NAN]]), "components: expected finite numbers"),
        (lambda: plot_dictionary(np.eye(4), (3, 2)), r"shape: expected height and width of 4 pixels together"),
        (lambda: plot_dictionary(np.eye(4), (4,)), "shape: expected height and width of 4 pixels"),
        (lambda: plot_dictionary(np.eye(4), use=[1.0]), "use: expected one finite number for each of 4 components"),
        (lambda: plot_dictionary(np.eye(4), max_components=0), "max_components: expected at least 1, got 0"),
        (lambda: plot_activations([0.5]), r"inclusion: expected probabilities \(N, H\), got shape \(1,\)"),
        (lambda: plot_activations([[1.5]]), "inclusion: expected probabilities between 0 and 1"),
        (lambda: plot_activations([[NAN]]), "inclusion: expected probabilities between 0 and 1"),
        (lambda: plot_activations(object()), "inclusion: expected probabilities, got <object"),
        (lambda: plot_activations([[0.5, 0.5]], prior=[0.1] * 3), r"prior: expected one number or 2, got shape \(3,\)"),
        (lambda: plot_activations([[0.5]], axes=[None]), "axes: expected two, got 1"),
        (lambda: plot_reconstruction(np.eye(2), np.eye(3)), "after: expected a grey image .* of one shape with before"),
        (lambda: plot_reconstruction(np.ones(2), np.ones(2)), "before: expected a grey image"),
        (lambda: plot_reconstruction(np.eye(2), np.full((2, 2), NAN)), "after: expected finite pixels$"),
        (lambda: plot_reconstruction(np.full((2, 2), np.inf), np.eye(2)), "before: .* or NaN where missing"),
        (lambda: plot_reconstruction(np.eye(2), np.eye(2), axes=[None]), "axes: expected 2, got 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
