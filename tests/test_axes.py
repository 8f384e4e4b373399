"""Axes: what goes in comes back out, labels keep their type, coordinates keep their bits."""

import json
from datetime import date, datetime

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis, axis_from_state
from probtensor.kernels import Linear, Matern, Periodic, White

FLOATS = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9)
MICROSECONDS = st.lists(st.integers(-(10**17), 10**17), min_size=1, max_size=9)
LABELS = st.lists(
    st.one_of(st.text(max_size=3), st.integers(-(2**62), 2**62), st.booleans(), st.floats(allow_nan=False)),
    min_size=1,
    max_size=9,
)
SEASON = Matern(2.5) + Periodic(365.25, 3) + Linear()
FEW = settings(max_examples=40, deadline=None, derandomize=True)


def through_json(axis: Axis) -> Axis:
    return axis_from_state(json.loads(json.dumps(axis.to_state())))


def typed(labels: object) -> list[tuple[type, object]]:
    """Labels with their type, numbers being one type."""
    return [(float if type(x) is int else type(x), x) for x in labels]


# Specification


def test_a_continuous_axis_has_a_matern_kernel_and_white_residuals_unless_told():
    assert ContinuousAxis("time").kernel == Matern(1.5) + White()
    assert ContinuousAxis("time", SEASON).kernel == SEASON


@pytest.mark.parametrize("kernel", [1.5, None, "Matern", Matern, White(), White])
def test_something_else_than_a_kernel_is_refused(kernel):
    with pytest.raises(ValueError, match="kernel: expected Matern, Periodic, Linear or a sum of these and White, got"):
        ContinuousAxis("time", kernel)


def test_the_former_argument_is_gone():
    with pytest.raises(TypeError, match="nu"):
        ContinuousAxis("time", nu=2.5)


def test_name_must_be_a_string():
    with pytest.raises(ValueError, match="name: expected a string or None, got 3"):
        CategoricalAxis(3)


def test_fit_returns_a_new_axis_and_leaves_the_specification():
    axis = ContinuousAxis(kernel=Matern(2.5))
    fitted = axis.fit(pd.Series([2.0, 1.0], name="dose"))
    assert not axis.is_fitted
    assert axis.name is None
    assert fitted.is_fitted
    assert (fitted.name, fitted.kernel.nu, fitted.size) == ("dose", 2.5, 2)


@pytest.mark.parametrize(
    "use", [lambda a: a.size, lambda a: a.positions([1]), lambda a: a.decode([0]), lambda a: a.union(a)]
)
@pytest.mark.parametrize("axis", [ContinuousAxis("x"), CategoricalAxis("x")])
def test_an_axis_without_data_says_that_it_must_be_fitted(axis, use):
    with pytest.raises(ValueError, match="axis 'x': expected a fitted axis"):
        use(axis)


def test_equality_sees_name_kernel_type_and_values():
    axis = ContinuousAxis("x").fit([1.0, 2.0])
    assert axis == ContinuousAxis("x").fit([2.0, 1.0, 1.0])
    assert hash(axis) == hash(ContinuousAxis("x").fit([2.0, 1.0, 1.0]))
    others = [
        ContinuousAxis("x"),
        ContinuousAxis("y").fit([1.0, 2.0]),
        ContinuousAxis("x", Matern(0.5)).fit([1.0, 2.0]),
    ]
    others += [
        ContinuousAxis("x").fit([1.0, 3.0]),
        ContinuousAxis("x").fit([1, 2]),
        CategoricalAxis("x").fit([1.0, 2.0]),
    ]
    assert all(axis != other for other in others)


# Continuous axes


def test_coordinates_are_sorted_distinct_float64_and_read_only():
    axis = ContinuousAxis("x").fit(np.array([3, 1, 3, -2], dtype=np.int32))
    assert axis.coordinates.tolist() == [-2.0, 1.0, 3.0]
    assert axis.coordinates.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        axis.coordinates[0] = 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["fit", "encode", "positions"])
def test_a_coordinate_that_is_not_finite_names_column_and_row(bad, method):
    axis = ContinuousAxis("dose").fit([1.0])
    with pytest.raises(
        ValueError, match=r"column 'dose': expected a finite coordinate .* at row 2 \(rows like it: 2\)"
    ):
        getattr(axis, method)(np.array([1.0, 2.0, bad, 3.0, bad]))


def test_a_missing_datetime_names_column_and_row():
    with pytest.raises(ValueError, match=r"column 'time': expected a finite coordinate .* NaT at row 1"):
        ContinuousAxis("time").fit(pd.to_datetime(["2024-01-01", None]))


@pytest.mark.parametrize("column", [["a", "b"], [True, False], [1j, 2j], ["2024-01-01", "soon"]])
def test_columns_that_are_neither_numbers_nor_times_are_refused(column):
    with pytest.raises(ValueError, match="column 'x': expected numbers, datetimes or timedeltas, got dtype"):
        ContinuousAxis("x").fit(column)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("tz", [None, "UTC", "Europe/Berlin", "Asia/Kolkata"])
def test_datetimes_become_days_and_come_back_with_their_time_zone(unit, tz):
    times = pd.DatetimeIndex(["2024-03-31T12:00:00", "2024-03-29T00:00:00", "2024-10-27T06:00:00"])
    times = times.as_unit(unit).tz_localize(tz)
    axis = ContinuousAxis("time").fit(times)
    utc = times.tz_convert(None) if tz else times
    assert np.diff(axis.coordinates).tolist() == pytest.approx(
        np.diff(utc.sort_values()) / np.timedelta64(1, "D"), abs=1e-13
    )
    assert 0 <= axis.coordinates[0] < 1
    back = axis.decode(axis.encode(times))
    assert back.equals(times)
    assert back.dtype == times.dtype


def test_one_instant_has_one_coordinate_whatever_its_unit_and_time_zone():
    times = pd.date_range("1999-12-31T23:59:57.123", periods=101, freq="7h13min", unit="ns", tz="UTC")
    axis = ContinuousAxis("time").fit(times)
    same = times.as_unit("ms").tz_convert("America/New_York")
    assert axis.positions(same).tolist() == list(range(101))
    assert np.array_equal(axis.encode(same), axis.coordinates)


def test_nanoseconds_over_a_century_come_back_exactly_where_they_were_seen():
    times = pd.DatetimeIndex(["1925-01-01T00:00:00.000000001", "2024-05-06T07:08:09.123456789"]).as_unit("ns")
    axis = ContinuousAxis("time").fit(times)
    assert axis.decode(axis.coordinates).equals(times)


def test_unseen_datetimes_come_back_without_noise_in_their_last_digits():
    seen = pd.date_range("2020-01-01", "2021-01-01", freq="D", unit="ns")
    grid = pd.date_range("2020-01-01T00:30", "2021-12-01", freq="1h", unit="ns")
    axis = ContinuousAxis("time").fit(seen)
    assert axis.decode(axis.encode(grid)).equals(grid)


def test_timedeltas_become_days():
    lags = pd.TimedeltaIndex(["36h", "-12h", "0h"])
    axis = ContinuousAxis("lag").fit(lags)
    assert axis.coordinates.tolist() == [-0.5, 0.0, 1.5]
    assert axis.decode(axis.encode(lags)).equals(lags)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0.5], "expected datetimes without a time zone, got numbers"),
        (pd.to_datetime(["2024-01-01"], utc=True), "expected datetimes without a time zone, got datetimes with"),
        (pd.TimedeltaIndex(["1h"]), "expected datetimes without a time zone, got timedeltas"),
    ],
)
def test_another_kind_of_column_than_the_fitted_one_is_refused(column, message):
    axis = ContinuousAxis("time").fit(pd.to_datetime(["2024-01-01"]))
    with pytest.raises(ValueError, match=f"column 'time': {message}"):
        axis.encode(column)
    if len(column):
        with pytest.raises(ValueError, match="other: expected"):
            axis.union(ContinuousAxis("time").fit(column))


def test_integers_come_back_as_integers_where_all_are_whole():
    axis = ContinuousAxis("x").fit([2, 2**60 + 1])
    assert axis.decode(axis.coordinates).tolist() == [2, 2**60 + 1]
    assert axis.decode([0.5, 2.0]).tolist() == [0.5, 2.0]


def test_decode_refuses_nan():
    with pytest.raises(ValueError, match="encoded: expected finite coordinates of axis 'x'"):
        ContinuousAxis("x").fit([1.0]).decode([np.nan])


def test_torch_columns_and_categorical_numbers_are_taken():
    axis = ContinuousAxis("x").fit(torch.tensor([2.0, 1.0], requires_grad=True))
    assert axis.coordinates.tolist() == [1.0, 2.0]
    assert ContinuousAxis("x").fit(pd.Categorical([5, 3, 3])).coordinates.tolist() == [3.0, 5.0]


def test_an_unseen_coordinate_has_position_minus_one():
    axis = ContinuousAxis("x").fit([1.0, 2.0])
    assert axis.positions([0.0, 1.0, 1.5, 2.0, 3.0]).tolist() == [-1, 0, -1, 1, -1]
    assert ContinuousAxis("x").fit(np.empty(0)).positions([1.0]).tolist() == [-1]


@FEW
@given(FLOATS)
def test_floats_round_trip_bit_for_bit(values):
    axis = ContinuousAxis("x").fit(values)
    assert np.array_equal(axis.coordinates[axis.positions(values)], values)
    assert np.array_equal(axis.decode(axis.encode(values)), values)
    again = through_json(axis)
    assert again == axis
    assert again.coordinates.tobytes() == axis.coordinates.tobytes()


@FEW
@given(MICROSECONDS, st.sampled_from([None, "UTC", "Europe/Berlin", "UTC+05:30"]))
def test_datetimes_round_trip_exactly(ticks, tz):
    times = pd.DatetimeIndex(np.array(ticks).astype("M8[us]"))
    times = times.tz_localize("UTC").tz_convert(tz) if tz else times
    axis = ContinuousAxis("time").fit(times)
    again = through_json(axis)
    assert again == axis
    if len(np.unique(axis.encode(times))) == len(set(ticks)):
        assert again.decode(again.encode(times)).equals(times)


@FEW
@given(FLOATS, FLOATS)
def test_the_union_of_two_parts_is_the_fit_of_all(left, right):
    union = ContinuousAxis("x").fit(left).union(ContinuousAxis("x").fit(right))
    assert np.array_equal(union.coordinates, ContinuousAxis("x").fit(left + right).coordinates)


@FEW
@given(MICROSECONDS, MICROSECONDS)
def test_the_union_of_datetimes_is_the_fit_of_all(left, right):
    parts = [pd.DatetimeIndex(np.array(ticks).astype("M8[us]")) for ticks in (left, right)]
    union = ContinuousAxis("t").fit(parts[0]).union(ContinuousAxis("t").fit(parts[1]))
    whole = ContinuousAxis("t").fit(parts[0].append(parts[1]))
    assert union.coordinates.tobytes() == whole.coordinates.tobytes()


def test_the_union_of_two_time_zones_has_the_first_ones():
    berlin = pd.DatetimeIndex(["2024-01-01T01:00"]).tz_localize("Europe/Berlin")
    utc = pd.DatetimeIndex(["2024-01-01T00:00", "2024-01-02T00:00"]).tz_localize("UTC")
    union = ContinuousAxis("t").fit(berlin).union(ContinuousAxis("t").fit(utc))
    assert union.size == 2
    assert str(union.distinct.tz) == "Europe/Berlin"


@pytest.mark.parametrize("other", [ContinuousAxis("y"), ContinuousAxis("x", Matern(0.5)), CategoricalAxis("x")])
def test_union_refuses_another_axis(other):
    with pytest.raises(ValueError, match="other: expected an axis of the same kind and name"):
        ContinuousAxis("x").fit([1.0]).union(other.fit([1.0]))


# Categorical axes


def test_ten_is_not_the_string_ten_and_seven_is_unknown():
    axis = CategoricalAxis("id").fit([2, 4, 10])
    assert axis.positions([10]).tolist() == [2]
    assert axis.positions(["10"]).tolist() == [-1]
    assert axis.positions([7]).tolist() == [-1]
    strings = CategoricalAxis("id").fit(["2", "4", "10"])
    assert strings.positions([10]).tolist() == [-1]
    assert (strings.positions(["10"]) >= 0).all()


@pytest.mark.parametrize("mixed", [[1, "a", True], ["a", True, 1.0], [True, 1, "1"]])
def test_true_is_not_one_nor_the_string_one(mixed):
    assert CategoricalAxis("x").fit([0, 1]).positions([True, False]).tolist() == [-1, -1]
    assert CategoricalAxis("x").fit([True, False]).positions([0, 1]).tolist() == [-1, -1]
    axis = CategoricalAxis("x").fit(pd.Series(mixed, dtype=object))
    assert axis.size == 3
    assert typed(axis.decode(axis.encode(pd.Series(mixed, dtype=object)))) == typed(mixed)


def test_one_label_in_another_storage_is_the_same_label():
    numbers = CategoricalAxis("x").fit(np.array([2, 4], dtype=np.int32))
    for dtype in (np.int8, np.uint16, np.int64, np.float64, "Int64"):
        assert numbers.positions(pd.Series([4, 2], dtype=dtype)).tolist() == [1, 0]
    strings = CategoricalAxis("x").fit(np.array(["b", "a"]))
    for column in (["a", "b"], pd.Series([np.str_("a"), "b"], dtype=object), pd.Series(["a", "b"], dtype="string")):
        assert strings.positions(column).tolist() == [0, 1]
    assert strings.positions(pd.Categorical(["b", "a"], categories=["b", "c", "a"])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (["007", "12"], "str"),
        (pd.Categorical([], categories=["b", "a"]), "str"),
        (np.array(["a"], dtype=object), "str"),
        ([7, 12], "number"),
        ([0.5], "number"),
        ([True], "bool"),
        (pd.Series([1, "1"], dtype=object), "mixed"),
        (pd.Categorical([]), "mixed"),
        (pd.to_datetime(["2024-01-01"]), "Timestamp"),
    ],
)
def test_labels_know_their_type(labels, dtype):
    axis = CategoricalAxis("x").fit(labels)
    assert axis.label_dtype == dtype
    assert through_json(axis).label_dtype == dtype


def test_labels_are_sorted_or_else_in_order_of_appearance():
    assert CategoricalAxis("x").fit(["b", "a", "b"]).labels.tolist() == ["a", "b"]
    assert CategoricalAxis("x").fit([10, 9, 2]).labels.tolist() == [2, 9, 10]
    assert CategoricalAxis("x").fit(pd.Series(["b", 3, "a"], dtype=object)).labels.tolist() == ["b", 3, "a"]


def test_all_categories_keep_their_place_and_order():
    column = pd.Series(pd.Categorical(["mid", "low"], categories=["low", "never", "mid"]))
    axis = CategoricalAxis("level").fit(column)
    assert axis.labels.tolist() == ["low", "never", "mid"]
    assert axis.encode(column).tolist() == [2, 0]


@pytest.mark.parametrize(
    "column", [["a", None], pd.Series([True, None]), pd.Series([0.5, np.nan]), pd.Categorical(["a", None])]
)
@pytest.mark.parametrize("method", ["fit", "encode"])
def test_a_missing_label_names_column_and_row(column, method):
    axis = CategoricalAxis("cell").fit(["a"])
    with pytest.raises(ValueError, match=r"column 'cell': expected a label in every row, got .* at row 1"):
        getattr(axis, method)(column)


def test_labels_that_cannot_be_hashed_are_refused():
    with pytest.raises(ValueError, match="column 'x': expected hashable labels"):
        CategoricalAxis("x").fit([[1], [2]])


@pytest.mark.parametrize("bad", [-1, 2])
def test_decode_refuses_a_position_outside(bad):
    with pytest.raises(ValueError, match=f"encoded: expected 0 to 1 on axis 'x', got {bad}"):
        CategoricalAxis("x").fit(["a", "b"]).decode([0, bad])


@FEW
@given(LABELS)
def test_labels_round_trip_with_their_types(labels):
    column = pd.Series(labels, dtype=object)
    axis = CategoricalAxis("x").fit(column)
    encoded = axis.encode(column)
    assert encoded.dtype == np.int64
    assert typed(axis.decode(encoded)) == typed(column.infer_objects())
    again = through_json(axis)
    assert again == axis
    assert again.encode(column).tolist() == encoded.tolist()


@FEW
@given(LABELS, LABELS)
def test_the_union_knows_the_labels_of_both(left, right):
    columns = [pd.Series(labels, dtype=object) for labels in (left, right)]
    union = CategoricalAxis("x").fit(columns[0]).union(CategoricalAxis("x").fit(columns[1]))
    whole = CategoricalAxis("x").fit(pd.Series(left + right, dtype=object))
    assert union.size == whole.size
    for column in columns:
        assert sorted(set(union.positions(column))) == sorted(set(union.positions(column[column.notna()])))
        assert (union.positions(column) >= 0).all()


def test_the_union_of_sorted_labels_is_sorted_and_an_order_of_categories_is_kept():
    union = CategoricalAxis("x").fit(["c", "a"]).union(CategoricalAxis("x").fit(["b", "a"]))
    assert union.labels.tolist() == ["a", "b", "c"]
    levels = CategoricalAxis("x").fit(pd.Categorical([], categories=["low", "mid", "high"]))
    assert levels.union(levels).labels.tolist() == ["low", "mid", "high"]
    assert levels.union(CategoricalAxis("x").fit(["ultra", "low"])).labels.tolist() == ["low", "mid", "high", "ultra"]


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3, 1], dtype=np.int32),
        [True, False],
        [0.1, 1e-300],
        ["a", ""],
        pd.Series([1, "1", True, 1.5], dtype=object),
        pd.DatetimeIndex(["2024-01-01"]).tz_localize("Europe/Berlin"),
        [datetime(2024, 1, 1)],
        pd.TimedeltaIndex(["1h"]),
        pd.Series(["a"], dtype="string"),
        pd.Series([1], dtype="Int64"),
        pd.Categorical([], categories=["b", "a"]),
    ],
)
def test_labels_survive_json(labels):
    axis = CategoricalAxis("x").fit(labels)
    again = through_json(axis)
    assert again == axis
    assert typed(again.labels) == typed(axis.labels)


@pytest.mark.parametrize("label", [(1, 2), date(2024, 1, 1)])
def test_a_label_that_json_cannot_hold_is_refused_when_saved(label):
    axis = CategoricalAxis("x").fit([label, label])
    assert axis.size == 1
    assert axis.decode([0])[0] == label
    with pytest.raises(ValueError, match="axis 'x': expected labels of str, int, bool, float or datetime"):
        axis.to_state()


# States


@pytest.mark.parametrize("axis", [ContinuousAxis("x", Matern(0.5)), ContinuousAxis("x", SEASON), CategoricalAxis()])
def test_a_specification_survives_json(axis):
    assert through_json(axis) == axis


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"state: expected a kind among .* got 'Ordinal'"):
        axis_from_state({"kind": "Ordinal", "name": "x", "distinct": None})


def test_a_continuous_axis_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="state: expected the kernel of axis 'x', got an axis without one"):
        axis_from_state({"kind": "ContinuousAxis", "name": "x", "nu": 1.5, "distinct": None})


def test_the_users_column_is_not_modified():
    column = pd.Series([3.0, 1.0, 2.0], name="own", index=[7, 8, 9])
    labels = pd.Series(["b", "a"], dtype=object, name="own")
    before = column.copy(deep=True), labels.copy(deep=True)
    for axis, given_column in ((ContinuousAxis("x"), column), (CategoricalAxis("x"), labels)):
        axis.fit(given_column).positions(given_column)
    pd.testing.assert_series_equal(column, before[0])
    pd.testing.assert_series_equal(labels, before[1])
