"""Shares of a table, read by several ranks, are the table that one process reads."""

from __future__ import annotations

import gzip
import threading
import zipfile
from collections.abc import Callable
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

    def sum(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        raise NotImplementedError

    def exchange(self, table: Tensor, to: Tensor) -> Tensor:
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
    for size in (1, 2, 3, 5, 12):
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


CALM = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)


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
