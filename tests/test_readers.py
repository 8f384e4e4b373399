"""Ways in and out: dense tensors, xarray, .tns files, tables in files."""

import gzip

import numpy as np
import pandas as pd
import pytest
import torch

from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.data import resolve_axes
from probtensor.readers import from_dense, from_xarray, read_table, read_tns, to_xarray

X3 = pd.DataFrame({"time": [0.5, 0.1, 0.5], "cell": ["a", "b", "b"]})


# from_dense


@pytest.mark.parametrize("stored", [0.0, 30.0, 1e6, np.nan])
def test_what_is_stored_under_the_mask_is_never_looked_at(stored):
    tensor = np.outer([1.0, 2.0, 3.0], [1.0, 10.0])
    tensor[2, 1] = stored
    mask = np.ones((3, 2), dtype=bool)
    mask[2, 1] = False
    X, y = from_dense(tensor, mask=mask)
    assert X.to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]
    assert y.tolist() == [1.0, 10.0, 2.0, 20.0, 3.0]
    masked = from_dense(np.ma.array(tensor, mask=~mask))
    pd.testing.assert_frame_equal(masked[0], X)
    assert masked[1].tolist() == y.tolist()


def test_nan_is_a_hole_and_nan_where_the_mask_says_observed_is_an_error():
    tensor = np.array([[1.0, np.nan], [3.0, 4.0]])
    assert from_dense(tensor)[1].tolist() == [1.0, 3.0, 4.0]
    with pytest.raises(ValueError, match=r"tensor: expected a number where mask is True, got NaN at \(0, 1\)"):
        from_dense(tensor, mask=np.ones((2, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, bool])
def test_values_keep_a_floating_dtype(dtype):
    _, y = from_dense(np.ones((2, 3), dtype=dtype))
    assert y.dtype == (dtype if np.issubdtype(dtype, np.floating) else np.float64)
    assert from_dense(torch.ones(2, 3))[1].dtype == np.float32


def test_coordinates_name_and_type_the_columns():
    times = pd.date_range("2024-01-01", periods=2, tz="UTC")
    X, _ = from_dense(np.ones((2, 2, 3)), coords={"time": times, "dose": [0.1, 1.0], "cell": ["c", "a", "b"]})
    assert resolve_axes(X) == (ContinuousAxis("time"), ContinuousAxis("dose"), CategoricalAxis("cell"))
    assert X["time"].dtype == times.dtype
    assert X["cell"].cat.categories.tolist() == ["c", "a", "b"]
    X, _ = from_dense(np.ones((2, 1)), coords=([7, 5], None))
    assert X.columns.tolist() == ["mode_0", "mode_1"]
    assert X["mode_0"].tolist() == [7, 5]


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ({"a": [1, 2]}, r"expected one entry a mode for shape \(2, 3\), got 1: \['a'\]"),
        ({"a": [1, 2], "b": [1, 2]}, "expected 3 coordinates for mode 'b', got 2"),
        ({"a": [1, 1], "b": [1, 2, 3]}, "expected distinct labels for mode 'a'"),
        ({"a": ["x", None], "b": [1, 2, 3]}, "expected distinct labels for mode 'a'"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused(coords, message):
    with pytest.raises(ValueError, match=f"coords: {message}"):
        from_dense(np.ones((2, 3)), coords=coords)


def test_other_wrong_input_is_refused():
    for tensor in (np.array(["a"]), np.float64(3), np.array([1j])):
        with pytest.raises(ValueError, match="tensor: expected real numbers"):
            from_dense(tensor)
    for mask in (np.ones((3, 2)), np.full((2, 3), 0.5)):
        with pytest.raises(ValueError, match=r"mask: expected booleans of shape \(2, 3\)"):
            from_dense(np.ones((2, 3)), mask=mask)


# xarray


def test_a_data_array_goes_out_and_comes_back():
    xarray = pytest.importorskip("xarray")
    rng = np.random.default_rng(5)
    cells = rng.normal(size=(3, 2, 5)).astype(np.float32)
    cells[1, 0, 2] = cells[0, 1, 4] = np.nan
    coords = {"time": pd.date_range("2024-01-01", periods=3), "dose": [0.5, 1.5], "cell": list("edabc")}
    array = xarray.DataArray(cells, coords=coords, dims=list(coords), name="response")
    X, y = from_xarray(array)
    assert X.columns.tolist() == ["time", "dose", "cell"]
    assert len(X) == 28
    xarray.testing.assert_identical(to_xarray(X, y, name="response"), array)


def test_a_dimension_without_coordinates_gets_integers():
    xarray = pytest.importorskip("xarray")
    X, _ = from_xarray(xarray.DataArray([[1.0, np.nan, 3.0]], dims=["a", "b"]))
    assert X["b"].tolist() == [0, 2]
    assert X["b"].cat.categories.tolist() == [0, 1, 2]


def test_to_xarray_refuses_repeated_cells_and_wrong_lengths():
    pytest.importorskip("xarray")
    with pytest.raises(ValueError, match="X: expected each row to be another cell, got 1 repeated"):
        to_xarray([[0, 0], [1, 0], [0, 0]], [1.0, 7.0, 3.0])
    with pytest.raises(ValueError, match=r"values: expected shape \(3,\)"):
        to_xarray(X3, [1.0])
    assert to_xarray(X3, torch.tensor([1, 2, 3])).sel(time=0.5, cell="b").item() == 3.0


def test_from_xarray_refuses_an_array():
    pytest.importorskip("xarray")
    with pytest.raises(ValueError, match=r"array: expected an xarray.DataArray, got ndarray"):
        from_xarray(np.ones(3))


# .tns


TNS = "# a tensor\n\n1 1 2 1.5\n2 3 1 -4e-3\n\n# end\n10 1 1 0.1\n"


@pytest.mark.parametrize("suffix", [".tns", ".tns.gz"])
def test_a_frostt_file_is_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(TNS.encode()) if suffix.endswith("gz") else TNS.encode())
    X, y = read_tns(path)
    assert X.to_numpy().tolist() == [[1, 1, 2], [2, 3, 1], [10, 1, 1]]
    assert X.dtypes.tolist() == [np.int64] * 3
    assert X.columns.tolist() == ["mode_0", "mode_1", "mode_2"]
    assert y.tolist() == [1.5, -4e-3, 0.1]
    assert y.dtype == np.float64


@pytest.mark.parametrize("line", ["1 2", "1 2 3 4", "1 x 3.0", "1 0 3.0", "1 2.5 3.0", "1 2 abc", "1 2 nan"])
@pytest.mark.parametrize("suffix", [".tns", ".tns.gz"])
def test_a_malformed_line_is_named(tmp_path, line, suffix):
    text = f"# comment\n1 1 2.0\n\n{line}\n1 2 9\n".encode()
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    with pytest.raises(ValueError, match=f"path: expected 2 integers from 1 and a number, got '{line}' on line 4"):
        read_tns(path)


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    (tmp_path / "x.tns").write_text(text)
    with pytest.raises(ValueError, match="path: expected lines of integers from 1 and a number, got none"):
        read_tns(tmp_path / "x.tns")


def test_a_file_of_values_alone_is_refused(tmp_path):
    (tmp_path / "x.tns").write_text("1.0\n")
    with pytest.raises(ValueError, match=r"got '1\.0' on line 1"):
        read_tns(tmp_path / "x.tns")


# Tables in files


FRAME = pd.DataFrame(
    {
        "when": ["2024-01-01", "2024-01-02T12:00", "2024-01-03"],
        "dose": [1, 2, 3],
        "plate": [7, 8, 8],
        "well": ["NA", "a", "None"],
        "weight": [0.5, 0.7, 0.5],
        "y": [0.1, np.nan, 1e-300],
    }
)


def write(frame, path):
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.suffixes else ",")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet"])
def test_a_table_is_read_with_its_holes_left_out(tmp_path, suffix):
    path = write(FRAME, tmp_path / f"x{suffix}")
    X, y = read_table(path, "y", continuous=["when", "dose"], categorical=["plate", "well", "weight"])
    assert X.columns.tolist() == ["when", "dose", "plate", "well", "weight"]
    assert y.tolist() == [0.1, 1e-300]
    assert X["when"].tolist() == [pd.Timestamp("2024-01-01"), pd.Timestamp("2024-01-03")]
    assert X["dose"].dtype == np.float64
    assert X["plate"].tolist() == [7, 8]
    assert X["plate"].dtype == np.int64
    assert X["well"].tolist() == ["NA", "None"]
    assert X["weight"].cat.categories.tolist() == [0.5]
    kinds = [ContinuousAxis, ContinuousAxis, CategoricalAxis, CategoricalAxis, CategoricalAxis]
    assert [type(axis) for axis in resolve_axes(X)] == kinds


def test_a_file_without_values_keeps_all_rows(tmp_path):
    X, y = read_table(write(FRAME, tmp_path / "x.csv"), None, columns=["dose", "plate"])
    assert y is None
    assert X.columns.tolist() == ["dose", "plate"]
    assert len(X) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value": "y", "continuous": "when"}, "continuous: expected a list of names, got 'when'"),
        ({"value": "z"}, r"value: expected columns among \['when', .*'y'\], got \['z'\]"),
        ({"value": "y", "continuous": ["z"]}, "continuous: expected columns among .* got .'z'"),
        ({"value": "y", "categorical": ["z"]}, "categorical: expected columns among .* got .'z'"),
        ({"value": "y", "columns": ["dose", "y"]}, r"columns: expected \['y'\] in the table, got"),
        ({"value": "y", "columns": ["dose"], "continuous": ["when"]}, "continuous: expected columns among"),
        ({"value": "y", "continuous": ["dose"], "categorical": ["dose"]}, "categorical: expected columns among"),
        (
            {"value": "weight", "continuous": ["well"]},
            "continuous: expected numbers or ISO 8601 dates in column 'well'",
        ),
        ({"value": "when"}, "value: expected real numbers in 'when'"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, settings, message):
    path = write(FRAME, tmp_path / "x.csv")
    with pytest.raises(ValueError, match=message):
        read_table(path, **settings)


def test_an_unknown_suffix_names_those_that_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a name that ends in one of .*'\.parquet'.* got 'x\.xls'"):
        read_table(tmp_path / "x.xls", "y")


@pytest.mark.parametrize(
    "labels", [["007", "12"], ["7", "12"], ["NA", "12"], ["True", "1"], [7, 12], [True, False], [0.5, 2.0], ["a", "b"]]
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz", ".parquet"])
def test_labels_are_read_with_the_type_of_a_fitted_axis(tmp_path, labels, suffix):
    axis = CategoricalAxis("id").fit(labels)
    path = write(pd.DataFrame({"id": labels, "y": [1.0, 2.0]}), tmp_path / f"x{suffix}")
    X, _ = read_table(path, "y", categorical={"id": axis.label_dtype})
    assert axis.decode(axis.encode(X["id"])).tolist() == labels


def test_digits_are_strings_only_where_strings_are_asked_for(tmp_path):
    (tmp_path / "x.csv").write_text("id,other\n007,007\n7,7\n")
    X, _ = read_table(tmp_path / "x.csv", None, categorical={"id": "str", "other": "number"})
    assert X["id"].tolist() == ["007", "7"]
    assert X["other"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("label", "expected", "came"), [("x9", "number", "str"), ("1", "bool", "number"), ("True", "number", "bool")]
)
def test_labels_of_another_type_than_expected_are_refused(tmp_path, label, expected, came):
    (tmp_path / "x.csv").write_text(f"id\n{label}\n")
    message = f"categorical: expected labels of type '{expected}' in column 'id', got '{came}'"
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "x.csv", None, categorical={"id": expected})


def test_numbers_in_a_parquet_file_are_not_taken_for_strings(tmp_path):
    path = write(pd.DataFrame({"id": [7]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="expected labels of type 'str' in column 'id', got 'number'"):
        read_table(path, None, categorical={"id": "str"})


@pytest.mark.parametrize("expected", ["str", "number"])
def test_a_missing_label_names_its_row(tmp_path, expected):
    (tmp_path / "x.csv").write_text("id,t\n1,0\n,0\n")
    with pytest.raises(ValueError, match=r"column 'id': expected a label in every row, got nan at row 1"):
        read_table(tmp_path / "x.csv", None, categorical={"id": expected})
