"""Shares of a table, read by several ranks, are the table that one process reads."""

from __future__ import annotations

import gzip
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from probtensor import columnar, delimited
from probtensor.columnar import share_ends
from probtensor.comm import Comm
from probtensor.readers import read_table
from probtensor.shards import read_shard

if TYPE_CHECKING:
    from tests.conftest import RunMpi


class Thread(Comm):
    """A rank that is a thread; waits 20 s at most, so that ranks that do not call alike fail the test."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[bytes]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots
        self.calls = 0

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self.calls += 1
        self._slots[self.rank] = data
        self._barrier.wait(20)
        result = list(self._slots)
        self._barrier.wait(20)
        return result

    def sum(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        raise NotImplementedError

    def exchange_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        raise NotImplementedError

    def barrier(self, timeout: float = 600.0) -> None:
        raise NotImplementedError

    def abort(self, code: int = 1) -> NoReturn:
        raise NotImplementedError


def on_ranks(size: int, work: Callable[[Comm], Any]) -> list[Any]:
    """Return what `work` returns or raises on each rank; all must have communicated as often."""
    barrier, slots = threading.Barrier(size), [b""] * size
    comms = [Thread(rank, size, barrier, slots) for rank in range(size)]
    results: list[Any] = [None] * size

    def run(comm: Thread) -> None:
        try:
            results[comm.rank] = work(comm)
        except Exception as error:
            results[comm.rank] = error

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({comm.calls for comm in comms}) == 1
    return results


def faults(results: list[Any]) -> str:
    """Return the message of the ValueError that all ranks raised."""
    for error in results:
        if not isinstance(error, Exception):
            pytest.fail(f"expected a ValueError on every rank, got {results}")
    assert {type(error) for error in results} == {ValueError}, results
    messages = {str(error) for error in results}
    assert len(messages) == 1
    return messages.pop()


def fault_of(work: Callable[[], Any]) -> str:
    """Return the message of the ValueError that `work` raises, without the number of rows like the first one."""
    try:
        work()
    except ValueError as error:
        return str(error).split(" (rows like it")[0]
    return ""


def assert_shards_are_the_table(path: Path, size: int, *args: Any, **kwargs: Any) -> list[pd.DataFrame]:
    X, y = read_table(path, *args, **kwargs)
    results = on_ranks(size, lambda comm: read_shard(path, comm, *args, **kwargs))
    for result in results:
        if isinstance(result, Exception):
            raise result
    parts = [part for part, _ in results]
    for part in parts:
        assert part.columns.tolist() == X.columns.tolist()
        assert part.dtypes.tolist() == X.dtypes.tolist(), (part.dtypes, X.dtypes)
        assert isinstance(part.index, pd.RangeIndex)
        assert part.index.start == 0
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), X, check_exact=True)
    if y is None:
        assert [values for _, values in results] == [None] * size
    else:
        assert all(values.dtype == np.float64 for _, values in results)
        np.testing.assert_array_equal(np.concatenate([values for _, values in results]), y)
    return parts


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_BLOCK", 16)
    monkeypatch.setattr(columnar, "_CHUNK", 16)
    monkeypatch.setattr(columnar, "_BATCH", 3)


SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".npz", ".zarr")


def table(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(n)
    return pd.DataFrame(
        {
            "when": [f"2024-01-{1 + i % 28:02d}T0{i % 10}:00" for i in range(n)],
            "dose": rng.integers(0, 9, n),
            "plate": rng.integers(0, 4, n),
            "well": [["NA", "a\nb", 'say "c"', "None", "d,e"][i % 5] for i in range(n)],
            "weight": rng.integers(0, 5, n) / 3,
            "y": np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
        }
    )


def write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, row_group_size=4)
    elif path.suffix in (".npz", ".zarr"):
        arrays = {name: as_array(frame[name]) for name in frame.columns}
        if path.suffix == ".npz":
            np.savez_compressed(path, **arrays)
        else:
            write_zarr(path, arrays)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.suffixes else ",")
    return path


def as_array(column: pd.Series) -> np.ndarray:
    return column.to_numpy() if column.dtype.kind in "biuf" else column.to_numpy().astype(np.str_)


def write_zarr(path: Path, arrays: dict[str, np.ndarray], chunk: int = 4) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="w")
    for name, array in arrays.items():
        if array.dtype.kind == "U":
            created = group.create_array(name, shape=array.shape, dtype="str", chunks=(chunk,))
            created[:] = array.astype(object)
        else:
            group.create_array(name, data=array, chunks=(chunk, *array.shape[1:]))


# The whole table


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [0, 1, 10, 23])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shards_one_after_the_other_are_the_table(tmp_path: Path, suffix: str, n: int) -> None:
    path = write(table(n), tmp_path / f"x{suffix}")
    ways: dict[str, Any] = {"continuous": ["when", "dose"], "categorical": ["plate", "well", "weight"]}
    for size in (1, 3, 12):
        assert_shards_are_the_table(path, size, "y", **ways)
        parts = assert_shards_are_the_table(path, size, None, columns=["well", "dose"])
        assert [len(part) for part in parts] == np.diff(share_ends(n, size)).tolist()


def test_all_formats_have_the_same_table(tmp_path: Path) -> None:
    ways: dict[str, Any] = {"continuous": ["when", "dose"], "categorical": ["plate", "well", "weight"]}
    order = ["when", "dose", "plate", "well", "weight"]
    expected, y = read_table(write(table(23), tmp_path / "x.csv"), "y", **ways)
    for suffix in SUFFIXES[1:]:
        X, values = read_table(write(table(23), tmp_path / f"x{suffix}"), "y", columns=order, **ways)
        pd.testing.assert_frame_equal(X, expected)
        np.testing.assert_array_equal(values, y)


# Rows of csv files


FIELDS = st.one_of(
    st.sampled_from(["", "NA", "nan", "1", "-7", "007", "2.5", "1e3", "True", "false", "x", " y ", "2024-01-01", "\r"]),
    st.sampled_from(["9223372036854775808", "18446744073709551616", "-9223372036854775809", "inf", "9007199254740993"]),
    st.text(alphabet='ab",\n\r\t 1', max_size=6),
)


def quoted(field: str, always: bool, sep: str) -> str:
    if always or any(c in field for c in f'{sep}"\n\r') or field.strip(" \t") != field:
        return '"' + field.replace('"', '""') + '"'
    return field


CALM = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@CALM
@given(st.data())
def test_any_csv_file_is_the_same_table_on_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(delimited, "_BLOCK", data.draw(st.integers(1, 40)))
    sep = data.draw(st.sampled_from(",\t"))
    end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    kinds = [data.draw(st.lists(FIELDS, min_size=1, max_size=3)) for _ in range(2)]
    rows = data.draw(st.lists(st.tuples(*(st.sampled_from(kind) for kind in kinds), st.booleans()), max_size=12))
    lines = [sep.join([*(quoted(field, q, sep) for field in fields), "0.5"]) for *fields, q in rows]
    # After a blank line that ends in a carriage return alone, pandas overlooks a delimiter.
    blanks = data.draw(st.sampled_from(["", end, f"  {end}"] if end != "\r" else [""]))
    text = data.draw(st.sampled_from(["", "\ufeff"])) + sep.join(['"a ""1"""', "b", "y"]) + end + blanks
    text += (end + blanks).join(lines) + data.draw(st.sampled_from(["", end]))
    path = tmp_path / ("x.csv" if sep == "," else "x.tsv")
    path.write_bytes(text.encode())
    categorical = data.draw(st.sampled_from([{}, {"b": "mixed"}, {"b": "str"}])) if rows else {}
    size = data.draw(st.integers(1, 7))
    if fault := fault_of(lambda: read_table(path, "y", categorical=categorical)):
        assert fault in faults(on_ranks(size, lambda comm: read_shard(path, comm, "y", categorical=categorical)))
        return
    parts = assert_shards_are_the_table(path, size, "y", categorical=categorical)
    assert [len(part) for part in parts] == np.diff(share_ends(len(rows), size)).tolist()


@CALM
@given(
    st.text(alphabet='a1",,\n\n\r \t', max_size=60).map(lambda text: text.replace("\r", "\r\n")),
    st.integers(1, 30),
    st.integers(1, 6),
    st.sampled_from(["", "0,"]),
)
def test_any_text_is_the_same_table_or_the_same_fault_on_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block: int, size: int, first: str
) -> None:
    monkeypatch.setattr(delimited, "_BLOCK", block)
    path = tmp_path / "x.csv"
    path.write_bytes(f"a,b,c,d\n{first}{text}".encode())
    if fault := fault_of(lambda: read_table(path, None)):
        message = faults(on_ranks(size, lambda comm: read_shard(path, comm, None)))
        assert fault in message or "each quote to be closed" in message
        return
    n = len(read_table(path, None)[0])
    assert [len(part) for part in assert_shards_are_the_table(path, size, None)] == np.diff(
        share_ends(n, size)
    ).tolist()


def test_a_quote_within_a_field_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_BLOCK", 8)
    path = tmp_path / "x.csv"
    path.write_bytes(b'size,note,y\n5" nail,"a ""b""\n,c",1\n3",d"e,2\n"""\n""",f,3\n"",g"\n\n,h,4')
    X, y = read_table(path, "y")
    assert X["size"].tolist()[:3] == ['5" nail', '3"', '"\n"']
    assert y is not None
    assert y.tolist() == [1, 2, 3, 4]
    for size in (2, 3, 4, 9):
        assert_shards_are_the_table(path, size, "y")


class Counting:
    """A file whose bytes that were read are counted for each thread."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def open(self, path: Path, mode: str) -> Any:
        stream = path.open(mode, buffering=0)
        counts = self.counts

        class Counted:
            def read(self, n: int) -> bytes:
                data = stream.read(n)
                counts[threading.get_ident()] = counts.get(threading.get_ident(), 0) + len(data)
                return bytes(data)

            def seek(self, offset: int) -> int:
                return stream.seek(offset)

            def __enter__(self) -> Counted:
                return self

            def __exit__(self, *error: object) -> None:
                stream.close()

        return Counted()


def test_a_rank_reads_its_share_of_a_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(table(5000), tmp_path / "x.csv")
    counting = Counting()
    monkeypatch.setattr(delimited, "open", counting.open, raising=False)
    monkeypatch.setattr(delimited, "_BLOCK", 1000)
    results = on_ranks(8, lambda comm: read_shard(path, comm, None))
    assert [len(X) for X, _ in results] == [625] * 8
    size = path.stat().st_size
    assert len(counting.counts) == 8
    assert max(counting.counts.values()) < 2 * size / 8 + 8000  # once to find rows, once to read them


def test_a_rank_holds_its_rows_of_a_gzipped_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(table(5000), tmp_path / "x.tsv.gz")
    parsed: list[int] = []
    read_csv = pd.read_csv

    def counting(*args: Any, **kwargs: Any) -> pd.DataFrame:
        frame = read_csv(*args, **kwargs)
        parsed.append(len(frame))
        return frame

    monkeypatch.setattr(pd, "read_csv", counting)
    monkeypatch.setattr(delimited, "_BLOCK", 1000)
    results = on_ranks(8, lambda comm: read_shard(path, comm, None))
    assert [len(X) for X, _ in results] == [625] * 8
    assert max(parsed) == 625


# Dtypes


@pytest.mark.parametrize(
    ("cells", "dtype"),
    [
        (["1", "2", "3", "4"], "int64"),
        (["1", "2", "", "4"], "float64"),
        (["1", "NA", "NA", "0.5"], "float64"),
        (["", "", "", ""], "float64"),
        (["True", "False", "true", "False"], "bool"),
        (["True", "False", "", "NA"], "object"),
        (["9007199254740993", "1", "0.5", ""], "float64"),
        (["9223372036854775808", "1", "2", "3"], "uint64"),
        (["1", "2", "3", "9223372036854775808"], "uint64"),
        (["0.5", "1", "1", "9223372036854775808"], "float64"),
        (["0.5", "1", "1", "18446744073709551616"], "float64"),
    ],
)
def test_numbers_have_the_dtype_of_the_whole_column(tmp_path: Path, cells: list[str], dtype: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "".join(f"{cell},0\n" for cell in cells))
    for size in (1, 2, 3, 4, 6):
        assert_shards_are_the_table(path, size, None)
    assert str(read_table(path, None)[0]["a"].dtype) == dtype


@pytest.mark.parametrize(
    "cells",
    [
        ["007", "1", "x", ""],
        ["True", "1", "1", "NA"],
        ["True", "1.50", "False", "False"],
        ["", "", "", "x"],
        ["9223372036854775808", "-1", "007", "1"],
        ["9223372036854775808", "1", "", "1"],
        ["18446744073709551616", "1", "2.50", ""],
        ["18446744073709551616", "x", "2.50", "NA"],
        ["9223372036854775808", "1", "NA", ""],
    ],
)
def test_words_anywhere_make_a_column_text_as_it_is_written(tmp_path: Path, cells: list[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "".join(f"{cell},0\n" for cell in cells))
    for size in (1, 2, 3, 4, 6):
        assert_shards_are_the_table(path, size, None)
    column = read_table(path, None)[0]["a"]
    assert [cell if isinstance(cell, str) else "" for cell in column] == [cell.replace("NA", "") for cell in cells]


def test_whole_numbers_beyond_integers_are_values_and_coordinates(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,y\n9223372036854775808,18446744073709551616\n-1,\n,2\n1,3\n")
    for size in (1, 2, 4):
        parts = assert_shards_are_the_table(path, size, "y", columns=[])
        assert sum(map(len, parts)) == 3
    path.write_text("a,y\n9223372036854775808,18446744073709551616\n-1,\n2,2\n")
    assert_shards_are_the_table(path, 3, "y", continuous=["a"])
    assert read_table(path, "y", continuous=["a"])[0]["a"].tolist() == [2.0**63, 2.0]


def test_dates_have_the_unit_of_the_finest(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a\n2024\n2024-01-02\n\n2024-01-01T00:00:00.123456789\n2024-02-01\n".replace("\n\n", '\n""\n'))
    for size in (1, 2, 3, 5, 7):
        assert_shards_are_the_table(path, size, None, continuous=["a"])
    assert str(read_table(path, None, continuous=["a"])[0]["a"].dtype) == "datetime64[ns]"
    path.write_text("a\n2024-01-01T00:00Z\n2024-01-02T00:00+00:00\n")
    for size in (1, 2, 3):
        assert_shards_are_the_table(path, size, None, continuous=["a"])


def test_dates_of_two_time_zones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a\n2024-01-01T00:00Z\n2024-01-02T00:00+02:00\n")
    message = faults(on_ranks(2, lambda comm: read_shard(path, comm, None, continuous=["a"])))
    assert message == "rank 0, 1: continuous: expected one time zone in column 'a', got ['UTC', 'UTC+02:00']"
    with pytest.raises(ValueError, match="continuous: expected numbers or ISO 8601 dates in column 'a'"):
        read_table(path, None, continuous=["a"])


def test_parquet_types_are_those_of_the_whole_file(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "category": pd.Categorical(list("bacbad"), categories=list("zdcba")),
            "text": ["x", None, None, "y", "7", "z"],
            "nullable": pd.array([1, None, None, 2, 3, 4], dtype="Int64"),
            "time": pd.date_range("2024", periods=6, tz="Europe/Berlin"),
            "small": np.arange(6, dtype=np.int8),
            "single": np.arange(6, dtype=np.float32),
            "flag": [True, None, None, None, False, True],
            "label": [0.5, 0.25, None, 0.5, 1.0, 0.0],
        },
        index=list("uvwxyz"),
    )
    path = tmp_path / "x.parquet"
    for rows in (1, 2, 4, 6):
        frame.to_parquet(path, row_group_size=rows)
        for size in (1, 2, 3, 6, 8):
            assert_shards_are_the_table(path, size, None, categorical=["label", "time"])
    X, _ = read_table(path, None)
    pd.testing.assert_frame_equal(X, pd.read_parquet(path).reset_index(drop=True))


def test_categories_differ_between_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    schema = pyarrow.schema([("c", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())), ("n", pyarrow.int64())])
    path = tmp_path / "x.parquet"
    with parquet.ParquetWriter(path, schema) as writer:
        for words, numbers in ((["b", "a"], [1, 2]), (["c", "a"], [None, 3]), (["a", "d"], [4, 5])):
            writer.write_table(pyarrow.table({"c": pyarrow.array(words).dictionary_encode(), "n": numbers}))
    for size in (1, 2, 3, 5, 7):
        assert_shards_are_the_table(path, size, None)
    assert read_table(path, None)[0]["c"].cat.categories.tolist() == ["b", "a", "c", "d"]


def test_only_row_groups_that_overlap_the_share_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write(table(20), tmp_path / "x.parquet")  # five row groups of four rows
    read: dict[int, list[int]] = {}

    class Traced(parquet.ParquetFile):  # type: ignore[misc]
        def iter_batches(self, *args: Any, **kwargs: Any) -> Any:
            read[threading.get_ident()] = kwargs["row_groups"]
            assert set(kwargs["columns"]) == {"dose", "y"}
            return super().iter_batches(*args, **kwargs)

    monkeypatch.setattr(parquet, "ParquetFile", Traced)
    results = on_ranks(3, lambda comm: (read_shard(path, comm, "y", columns=["dose"]), threading.get_ident()))
    assert [read[thread] for _, thread in results] == [[0, 1], [1, 2, 3], [3, 4]]


# npz files and zarr folders


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, write_zarr])
def test_a_matrix_gives_columns(tmp_path: Path, order: Any, save: Callable[..., None]) -> None:
    matrix = np.asarray(np.arange(33, dtype=">i4").reshape(11, 3), order=order)
    arrays = {"X": matrix, "day": np.arange(11).astype("M8[s]"), "y": np.linspace(0, 1, 11, dtype=np.float32)}
    path = tmp_path / ("x.zarr" if save is write_zarr else "x.npz")
    if save is write_zarr:
        save(path, arrays)
    else:
        save(path, **arrays)
    X, y = read_table(path, "y", columns=["mode_0", "mode_1", "mode_2", "day"])
    np.testing.assert_array_equal(X.iloc[:, :3], matrix)
    assert X.dtypes.astype(str).tolist() == ["int32", "int32", "int32", "datetime64[s]"]
    np.testing.assert_array_equal(y, arrays["y"].astype(np.float64))
    for size in (1, 2, 3, 5, 12):
        assert_shards_are_the_table(path, size, "y")


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_no_more_than_the_share_and_a_chunk_are_held(tmp_path: Path, suffix: str) -> None:
    path, n = tmp_path / f"x{suffix}", 1_000_000
    arrays = {"X": np.zeros((n, 2)), "y": np.zeros(n)}
    np.savez(path, **arrays) if suffix == ".npz" else write_zarr(path, arrays, chunk=50_000)
    source = columnar.NpzFile(path) if suffix == ".npz" else columnar.ZarrFolder(path)
    source.locate(lambda step: (step(), []), 3, 10)
    tracemalloc.start()
    frame = source.read(source.names, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    share = int(frame.memory_usage().sum())
    assert len(frame) == n // 10
    assert peak < 3 * share + 2 * 2**20 < 24 * n / 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.array([{}, None])}, "expected numbers, booleans, times or text in 'a', got object"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, r"expected arrays of one length, got \{'a': 2, 'b': 3\}"),
        ({"a": np.zeros((2, 2))}, r"""expected \(n,\), or \(n, K\) for "X", got 'a' of shape \(2, 2\)"""),
        ({"a": np.float64(1)}, r"""expected \(n,\), or \(n, K\) for "X", got 'a' of shape \(\)"""),
        ({"X": np.zeros((2, 2)), "mode_1": np.zeros(2)}, "expected distinct columns, got 'mode_1' twice"),
        ({"a": np.zeros(2, dtype=complex)}, "expected numbers, booleans, times or text in 'a', got complex128"),
    ],
)
def test_arrays_that_are_no_columns_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"path: {message}"):
        read_table(path, None)
    assert faults(on_ranks(2, lambda comm: read_shard(path, comm, None))).startswith("rank 0, 1: path: ")


def test_other_zarr_folders_are_refused(tmp_path: Path) -> None:
    write_zarr(tmp_path / "x.zarr", {"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(ValueError, match=r"path: expected arrays of one length, got \{'a': 2, 'b': 3\}"):
        read_table(tmp_path / "x.zarr", None)
    (tmp_path / "y.zarr").mkdir()
    with pytest.raises(ValueError, match="path: expected a zarr group of arrays"):
        read_table(tmp_path / "y.zarr", None)
    with pytest.raises(FileNotFoundError, match=r"z\.zarr"):
        read_table(tmp_path / "z.zarr", None)


@pytest.mark.parametrize(("module", "suffix"), [("zarr", ".zarr"), ("pyarrow.parquet", ".parquet")])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, suffix: str) -> None:
    path = write(table(3), tmp_path / f"x{suffix}")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=f"need .*: pip install {module.split('.')[0]}"):
        read_table(path, None)
    assert f"pip install {module.split('.')[0]}" in faults(on_ranks(2, lambda comm: read_shard(path, comm, None)))


# Faults


def rows_of(*lines: str) -> str:
    return "a,t,y\n" + "\n".join(lines) + "\n"


GOOD = ["x,2024-01-01,1"] * 6


@pytest.mark.parametrize(
    ("line", "ways", "message"),
    [
        ("x,2024-01-01,1,2", {}, "path: expected 3 fields as the header has, got 4 on row 4 of "),
        ("x,2024-01-01,high", {}, "value: expected real numbers in 'y', got dtype str, such as 'high' at row 4"),
        ("x,soon,1", {"continuous": ["t"]}, "dates in column 't', got 'soon' at row 4"),
        (",2024-01-01,1", {"categorical": {"a": "str"}}, "column 'a': expected a label in every row, got nan at row 4"),
        ("\udcff,2024-01-01,1", {}, "path: expected UTF-8, got the byte 0xff on row 4 of "),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_row_at_fault_has_its_number_in_the_file_on_all_ranks(
    tmp_path: Path, suffix: str, line: str, ways: Any, message: str
) -> None:
    path = tmp_path / f"x{suffix}"
    lines = [*GOOD[:4], line, *GOOD[4:]]
    lines[1] = lines[1][:-1]  # a row without a value counts
    data = rows_of(*lines).encode(errors="surrogateescape")
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(ValueError, match=r"[ao][tn] row 4"):
        read_table(path, "y", **ways)
    for size in (2, 3, 7, 9):
        found = faults(on_ranks(size, lambda comm: read_shard(path, comm, "y", **ways)))
        if pd.__version__ < "3":
            message = message.replace("dtype str", "dtype object")
        rank = next(r for r in range(size) if share_ends(7, size)[r + 1] > 4)
        assert found.startswith(f"rank {rank}: ")
        assert message in found


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_the_first_row_may_not_be_longer_than_the_header(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    data = rows_of(*(f"{line}," for line in GOOD)).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(ValueError, match="path: expected 3 fields as the header has, got 4 on row 0 of"):
        read_table(path, "y")
    found = faults(on_ranks(2, lambda comm: read_shard(path, comm, "y")))
    assert found.startswith("rank 0: path: expected 3 fields as the header has, got 4 on row 0 of")
    assert "rank 1: path: expected 3 fields as the header has, got 4 on row 3 of" in found


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_quote_that_is_never_closed_names_its_row(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.csv"
    path.write_text(rows_of(*GOOD[:3], '"x,2024-01-01,1', *GOOD[3:]))
    found = faults(on_ranks(size, lambda comm: read_shard(path, comm, "y")))
    assert found == f"path: expected each quote to be closed, got one that is not on row 3 of {path}"


def test_a_file_that_one_rank_cannot_read_is_a_fault_on_all(tmp_path: Path) -> None:
    path = write(table(10), tmp_path / "x.csv")
    wrong = tmp_path / "y.csv"
    found = faults(on_ranks(3, lambda comm: read_shard(wrong if comm.rank == 1 else path, comm, "y")))
    assert found.startswith("rank 1: path: expected a file that can be read, got [Errno 2]")
    with pytest.raises(FileNotFoundError):
        read_table(wrong, "y")


@pytest.mark.parametrize("suffix", [".csv.gz", ".npz", ".parquet"])
def test_a_truncated_file_is_a_fault_on_all_ranks(tmp_path: Path, suffix: str) -> None:
    path = write(table(300), tmp_path / f"x{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"path: expected|Parquet"):
        read_table(path, "y")
    faults(on_ranks(3, lambda comm: read_shard(path, comm, "y")))


def test_an_empty_file_and_unknown_columns_are_refused_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\n \n")
    found = faults(on_ranks(2, lambda comm: read_shard(tmp_path / "x.csv", comm, "y")))
    assert found.startswith("rank 0, 1: path: expected a header and rows, got neither")
    path = write(table(3), tmp_path / "y.csv")
    found = faults(on_ranks(2, lambda comm: read_shard(path, comm, "z")))
    assert found.startswith("rank 0, 1: value: expected columns among ['when', ")


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"hello")
    with pytest.raises(ValueError, match="path: expected an array as 'a'"):
        read_table(path, None)


# Over MPI


@pytest.mark.mpi
@pytest.mark.parametrize("n", [3, 12])  # the latter also in groups of 1, 2, 3 and 5
def test_shards_over_mpi_are_the_table(run_mpi: RunMpi, tmp_path: Path, n: int) -> None:
    for suffix in SUFFIXES if n <= 3 else (".csv", ".npz"):  # the import of libraries takes the time
        write(table(10), tmp_path / f"x{suffix}")
    (tmp_path / "bad.csv").write_text(rows_of(*GOOD, GOOD[0], "1,2,3,4", *GOOD[:2]))
    assert run_mpi("shards.py", n, tmp_path).stdout == f"ok on {n}\n"
