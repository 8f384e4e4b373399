"""Observations: arrays and tables, axes by name, values, duplicates."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probtensor import columns
from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.data import (
    Observations,
    _merge,
    as_table,
    group_cells,
    infer_axis,
    resolve_axes,
)
from probtensor.kernels import Matern
from probtensor.readers import from_dense

FEW = settings(max_examples=40, deadline=None, derandomize=True)
X3 = pd.DataFrame({"time": [0.5, 0.1, 0.5], "cell": ["a", "b", "b"]})
Y3 = np.array([1.0, 2.0, 3.0])


# as_table


@pytest.mark.parametrize("wrap", [np.array, list, torch.tensor, lambda rows: np.array(rows, order="F")])
def test_arrays_get_columns_by_position(wrap):
    table = as_table(wrap([[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]]))
    assert list(table.columns) == ["mode_0", "mode_1"]
    assert table.to_numpy().tolist() == [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]]


def test_integer_columns_stay_integer():
    assert as_table(np.array([[1, 2]])).dtypes.tolist() == [np.int64, np.int64]
    assert as_table(torch.tensor([[1, 2]])).dtypes.tolist() == [np.int64, np.int64]


@pytest.mark.parametrize("wrap", [list, lambda rows: np.array(rows, dtype=object)])
def test_each_column_of_objects_has_its_own_type(wrap):
    table = as_table(wrap([["a", 0.5, 3, True], ["b", 1.5, 4, False]]))
    assert [axis.name for axis in resolve_axes(table)] == ["mode_0", "mode_1", "mode_2", "mode_3"]
    assert [type(axis) for axis in resolve_axes(table)] == [CategoricalAxis, ContinuousAxis] + [CategoricalAxis] * 2
    assert table["mode_2"].dtype == np.int64


def test_a_data_frame_stays_as_it_is():
    assert as_table(X3) is X3
    numbered = pd.DataFrame(np.zeros((2, 2)))
    assert list(as_table(numbered).columns) == ["0", "1"]
    assert list(numbered.columns) == [0, 1]


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros(3), r"got \(3,\); reshape one mode with X.reshape\(-1, 1\)"),
        (pd.Series([1.0]), r"got \(1,\); reshape"),
        ([1, 2], r"got \(2,\); reshape"),
        (np.zeros((2, 2, 2)), r"expected shape \(n, K\), one row an observation, got \(2, 2, 2\)"),
        (np.zeros((2, 0)), "expected at least one column"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"expected distinct column names, got \['a', 'a'\]"),
    ],
)
def test_what_is_not_a_table_is_refused(X, message):
    with pytest.raises(ValueError, match=f"X: .*{message}"):
        as_table(X)


# infer_axis


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([0.5, 1.0], ContinuousAxis),
        (np.array([0.5], dtype=np.float32), ContinuousAxis),
        (pd.Series([0.5, None], dtype="Float64"), ContinuousAxis),
        (pd.to_datetime(["2024-01-01"]), ContinuousAxis),
        (pd.to_datetime(["2024-01-01"], utc=True), ContinuousAxis),
        (pd.TimedeltaIndex(["1h"]), ContinuousAxis),
        ([1, 2], CategoricalAxis),
        (pd.Series([1, 2], dtype="Int64"), CategoricalAxis),
        ([True, False], CategoricalAxis),
        (["a", "b"], CategoricalAxis),
        (pd.Series(["a", "b"], dtype=object), CategoricalAxis),
        (pd.Categorical([0.5, 1.5]), CategoricalAxis),
    ],
)
def test_the_type_of_a_column_suggests_its_axis(column, kind):
    assert infer_axis(column, "x") == kind("x")


@pytest.mark.parametrize("column", [[1j], pd.Series([1, "a"], dtype=object), [(1, 2)]])
def test_a_column_of_unclear_type_is_refused(column):
    with pytest.raises(ValueError, match="column 'x': expected numbers, datetimes, strings, booleans or categories"):
        infer_axis(column, "x")


# resolve_axes


def test_named_axes_override_and_the_rest_is_inferred():
    axes = resolve_axes(X3, [CategoricalAxis("time")])
    assert axes == (CategoricalAxis("time"), CategoricalAxis("cell"))
    assert resolve_axes(X3) == (ContinuousAxis("time"), CategoricalAxis("cell"))
    assert resolve_axes(X3, [CategoricalAxis("cell"), ContinuousAxis("time", Matern(0.5))])[0].kernel.nu == 0.5


def test_axes_without_names_go_by_position():
    axes = resolve_axes(X3, [ContinuousAxis(kernel=Matern(2.5)), CategoricalAxis("cell")])
    assert axes == (ContinuousAxis("time", Matern(2.5)), CategoricalAxis("cell"))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([ContinuousAxis("dose")], r"expected names among the columns \['time', 'cell'\], got \['dose'\]"),
        ([ContinuousAxis()], r"one axis for each of the columns \['time', 'cell'\], got 1"),
        ([ContinuousAxis(), CategoricalAxis("time")], "expected the order of the columns"),
        ([ContinuousAxis("time"), CategoricalAxis("time")], "expected distinct names"),
        (["time"], "expected ContinuousAxis or CategoricalAxis, got 'time'"),
    ],
)
def test_axes_that_do_not_fit_the_table_are_refused(axes, message):
    with pytest.raises(ValueError, match=f"axes: .*{message}"):
        resolve_axes(X3, axes)


# Observations


def test_observations_hold_axes_positions_and_values():
    data = Observations.from_table(X3, Y3)
    assert (data.n_observed, data.order, data.shape) == (3, 2, (2, 2))
    assert data.positions.tolist() == [[1, 0], [0, 1], [1, 1]]
    assert data.positions.dtype == torch.int64
    assert data.values.dtype == torch.float64
    assert data.values.tolist() == [1.0, 2.0, 3.0]
    assert data.axes[0].decode(data.axes[0].coordinates).tolist() == [0.1, 0.5]


@pytest.mark.parametrize("n", [1, 7])
def test_one_row_and_one_mode_are_enough(n):
    data = Observations.from_table(np.linspace(0, 1, n).reshape(-1, 1), np.ones(n))
    assert data.shape == (n,)


@pytest.mark.parametrize(
    "y",
    [
        [1, 0, 3],
        pd.Series([1, 0, 3], index=[9, 9, 9]),
        torch.tensor([1.0, 0.0, 3.0], requires_grad=True),
        np.array([1, 0, 3], dtype=np.float32),
        np.array([1, 0, 3], dtype=object),
        pd.Series([1, 0, 3], dtype="Int64"),
    ],
)
def test_values_of_every_numeric_kind_become_float64(y):
    data = Observations.from_table(X3, y)
    assert data.values.tolist() == [1.0, 0.0, 3.0]
    assert data.values.dtype == torch.float64


def test_booleans_are_values():
    assert Observations.from_table(X3, [True, False, True]).values.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1.0, 2.0], r"y: expected shape \(3,\) as X has rows, got \(2,\)"),
        (np.zeros((3, 1)), r"y: expected shape \(3,\) .* got \(3, 1\); flatten it with y.ravel\(\)"),
        ([1.0, np.nan, np.inf], r"y: expected finite values, got nan at row 1 \(rows like it: 2\)"),
        (pd.Series([1, None, 2], dtype="Int64"), "y: expected finite values, got nan at row 1"),
        (np.ma.array([1.0, 2.0, 3.0], mask=[0, 0, 1]), "y: expected finite values, got nan at row 2"),
        (["1", "2", "3"], "y: expected real numbers"),
        ([1j, 2, 3], "y: expected real numbers"),
    ],
)
def test_wrong_values_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        Observations.from_table(X3, y)


def test_no_observation_is_refused():
    with pytest.raises(ValueError, match="X, y: expected at least one observation, got none"):
        Observations.from_table(np.empty((0, 2)), [])


def test_a_missing_coordinate_names_its_column():
    with pytest.raises(ValueError, match=r"column 'mode_1': expected a finite coordinate .* at row 1"):
        Observations.from_table(np.array([[1.0, 2.0], [3.0, np.nan]]), [1.0, 2.0])


def test_fitted_axes_are_used_as_they_are():
    time = ContinuousAxis("time").fit([0.0, 0.1, 0.5, 9.0])
    data = Observations.from_table(X3, Y3, axes=[time])
    assert data.axes[0] is time
    assert data.shape == (4, 2)
    assert data.positions[:, 0].tolist() == [2, 1, 2]


def test_coordinates_that_a_fitted_axis_has_not_seen_are_refused():
    cell = CategoricalAxis("cell").fit(["a", "c"])
    with pytest.raises(ValueError, match=r"fitted axis 'cell' has seen, got 'b' at row 1 \(rows like it: 2\)"):
        Observations.from_table(X3, Y3, axes=[cell])


def test_a_slice_without_observations_keeps_its_place():
    rng = np.random.default_rng(3)
    tensor = rng.normal(size=(6, 5, 4))
    tensor[0] = np.nan
    data = Observations.from_table(*from_dense(tensor))
    assert data.shape == (6, 5, 4)
    assert data.positions[:, 0].min() == 1
    assert data.n_observed == 100


# Duplicates


TWICE = (np.array([[0, 0], [1, 0], [0, 0]]), np.array([1.0, 7.0, 3.0]))


def test_duplicates_are_observations_by_default():
    assert Observations.from_table(*TWICE).values.tolist() == [1.0, 7.0, 3.0]


@pytest.mark.parametrize(("policy", "value"), [("sum", 4.0), ("mean", 2.0)])
def test_duplicates_are_merged_where_their_cell_came_first(policy, value):
    data = Observations.from_table(*TWICE, duplicates=policy)
    assert data.values.tolist() == [value, 7.0]
    assert data.positions.tolist() == [[0, 0], [1, 0]]


def test_duplicates_as_an_error_name_the_rows():
    with pytest.raises(ValueError, match=r"X: expected distinct .* row 2 equal to row 0: .*\(such rows: 1\)"):
        Observations.from_table(*TWICE, duplicates="error")
    X, y = TWICE[0][:2], TWICE[1][:2]
    assert Observations.from_table(X, y, duplicates="error").values.tolist() == [1.0, 7.0]


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"duplicates: expected one of .* got 'first'"):
        Observations.from_table(*TWICE, duplicates="first")


def test_43046721_float32_ones_sum_exactly():
    n = 43_046_721
    values = np.broadcast_to(np.float32(1), n)
    cells = np.broadcast_to(np.int64(0), n)
    assert _merge(cells, 1, values, mean=False).tolist() == [43046721.0]


@FEW
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(-9, 9)), min_size=1, max_size=30))
def test_merging_equals_a_dictionary(rows):
    sums: dict[tuple[int, int], list[int]] = {}
    for a, b, value in rows:
        sums.setdefault((a, b), []).append(value)
    X, y = np.array(rows)[:, :2], np.array(rows)[:, 2]
    for policy, merge in (("sum", sum), ("mean", np.mean)):
        data = Observations.from_table(X, y, duplicates=policy)
        cells = np.stack([axis.decode(data.positions[:, k]) for k, axis in enumerate(data.axes)], axis=1)
        assert [tuple(cell) for cell in cells.tolist()] == list(sums)
        assert data.values.tolist() == pytest.approx([float(merge(values)) for values in sums.values()])


def test_cells_of_ten_modes_of_a_million_do_not_overflow():
    rng = np.random.default_rng(10)
    positions = rng.integers(0, 10**6, size=(2001, 10))
    positions[-1] = 10**6 - 1
    twice = np.concatenate([positions, positions[::-1]])
    cells, first = group_cells(twice)
    assert cells[:2001].tolist() == list(range(2001))
    assert cells[2001:].tolist() == list(range(2001))[::-1]
    assert first.tolist() == list(range(2001))


def test_a_thousand_cells_of_a_large_tensor_take_megabytes():
    rng = np.random.default_rng(22)
    shape = (512, 3, 3, 512)
    X = pd.DataFrame(
        {f"m{k}": pd.Categorical.from_codes(rng.integers(0, s, 1000), range(s)) for k, s in enumerate(shape)}
    )
    y = rng.normal(size=1000)
    Observations.from_table(X[:10], y[:10], duplicates="sum")  # what pandas keeps from its first use
    tracemalloc.start()
    data = Observations.from_table(X, y, duplicates="sum")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.shape == shape
    assert peak < 1e6  # the tensor would take 19 MB, the square of an unfolding's side far more


# What the user passes


def test_nothing_that_is_passed_in_is_modified():
    rng = np.random.default_rng(19)
    tensor = rng.normal(size=(3, 5))
    tensor[1, 2] = np.nan
    mask = ~np.isnan(tensor)
    X, y = from_dense(tensor, mask=mask, coords={"t": rng.normal(size=3), "c": list("edabc")})
    objects = np.array([["a", 1.5], ["b", 2.5], ["a", 1.5]], dtype=object)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    before = tensor.tobytes(), mask.copy(), X.copy(deep=True), y.copy(), objects.copy(), weights.clone()
    from_dense(tensor, mask=mask)
    for policy in ("observations", "error", "sum", "mean"):
        Observations.from_table(X, y, duplicates=policy).values.mul_(0.0)
    Observations.from_table(objects, weights, duplicates="sum").values.mul_(0.0)
    Observations.from_table(objects, weights).values.mul_(0.0)
    assert tensor.tobytes() == before[0]
    assert np.array_equal(mask, before[1])
    pd.testing.assert_frame_equal(X, before[2])
    assert y.tobytes() == before[3].tobytes()
    assert (objects == before[4]).all()
    assert torch.equal(weights, before[5])


DAYS = ["2024-01-03", "2024-01-01", "2024-01-02"]


def test_dates_as_text_are_labels_with_a_warning_and_continuous_where_asked():
    table = pd.DataFrame({"day": DAYS})
    with pytest.warns(UserWarning, match=r"column 'day' has dates as text.*pd\.to_datetime, or with axes="):
        assert isinstance(Observations.from_table(table, [1.0, 2.0, 3.0]).axes[0], CategoricalAxis)
    (axis,) = Observations.from_table(table, [1.0, 2.0, 3.0], axes=[ContinuousAxis("day")]).axes
    assert axis.coordinates.tolist() == [0.0, 1.0, 2.0]
    assert axis.encode(["2024-01-02T12:00"]).tolist() == [1.5]
    Observations.from_table(table, [1.0, 2.0, 3.0], axes=[CategoricalAxis("day")])  # as asked: no warning
    Observations.from_table(table, [1.0, 2.0, 3.0], axes=[CategoricalAxis()])


@pytest.mark.parametrize("days", [["2024-01-03", "last week"], ["2024-99-99"], ["week 2024-01-03"], []])
def test_other_text_is_no_date(days):
    assert columns.dates_of(pd.Series(days, dtype="str")) is None


def test_dates_without_a_time_are_continuous():
    days = pd.to_datetime(pd.Series(DAYS)).dt.date
    (axis,) = Observations.from_table(pd.DataFrame({"day": days}), [1.0, 2.0, 3.0]).axes
    assert isinstance(axis, ContinuousAxis)
    assert axis.coordinates.tolist() == [0.0, 1.0, 2.0]
