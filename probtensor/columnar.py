"""Rows of parquet and npz files and of zarr folders, of which each rank reads its own: they say how many they have.

The classes have what `DelimitedFile` has: `names`, `inferred`, `locate` and `read`.
"""

from __future__ import annotations

import importlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

# Does a step on this rank, and returns what it came to and what the steps of all ranks report, in rank order.
Together = Callable[[Callable[[], tuple[Any, Any]]], tuple[Any, list[Any]]]
Array = npt.NDArray[Any]

_BATCH = 2**16  # rows of a parquet file, or of a Fortran-ordered array's column, that are read at a time
_CHUNK = 2**20  # bytes of an npz file
_KINDS = "biufMmUT"  # booleans, numbers, times and text; "T" is NumPy's text of any length


def share_ends(n: int, size: int) -> list[int]:
    """Return the first row of each of `size` ranks' shares of n rows, and n.

    >>> share_ends(10, 3), share_ends(1, 3)
    ([0, 3, 6, 10], [0, 0, 0, 1])
    """
    return [n * r // size for r in range(size + 1)]


class Columns(ABC):
    """Columns of which any rows can be read.

    Attributes
    ----------
    names : list of str
    inferred : dict of str to list of str
        Empty: dtypes are stored.
    n_rows : int
    """

    inferred: Mapping[str, list[str]]
    names: list[str]
    n_rows: int

    def __init__(self) -> None:
        self.inferred = {}

    def locate(self, together: Together, rank: int, size: int) -> None:
        """Find the rows of `rank` among `size` ranks."""
        ends = share_ends(self.n_rows, size)
        self._rows = ends[rank], ends[rank + 1]

    def read(self, names: list[str], dtypes: Mapping[str, str]) -> pd.DataFrame:
        """Return columns of this rank's rows, numbered as in the file; `dtypes` would be those of inferred ones."""
        start, stop = self._rows
        return self._read(names, start, stop)[names].set_axis(pd.RangeIndex(start, stop))

    @abstractmethod
    def _read(self, names: list[str], start: int, stop: int) -> pd.DataFrame: ...


class ParquetFile(Columns):
    """A parquet file: of its row groups, those are read that hold rows of this rank.

    Raises
    ------
    ImportError
        If pyarrow is missing.
    ValueError
        If the file is malformed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        with self._open() as file:
            groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            self._ends = np.cumsum([0, *groups])
            self.n_rows = int(self._ends[-1])
            self._schema = file.schema_arrow
        self.names = list(self._schema.empty_table().to_pandas().columns)

    def _open(self) -> Any:
        return _load("pyarrow.parquet", "parquet files").ParquetFile(self._path)

    def _read(self, names: list[str], start: int, stop: int) -> pd.DataFrame:
        pyarrow = _load("pyarrow", "parquet files")
        schema = pyarrow.schema([self._schema.field(name) for name in names], self._schema.metadata)
        groups = np.flatnonzero((self._ends[:-1] < stop) & (self._ends[1:] > start))
        batches = []
        if start < stop:
            row = int(self._ends[groups[0]])
            with self._open() as file:
                for batch in file.iter_batches(_BATCH, row_groups=groups.tolist(), columns=names):
                    low, high = max(start - row, 0), min(stop - row, len(batch))
                    if low < high:
                        batches.append(batch.select(names).slice(low, high - low))
                    row += len(batch)
                    if row >= stop:
                        break
        table = pyarrow.Table.from_batches(batches) if batches else schema.empty_table()
        frame: pd.DataFrame = table.replace_schema_metadata(schema.metadata).to_pandas()
        return frame


class _Arrays(Columns):
    """Named arrays of one length: one-dimensional ones are columns, those of "X", if it is (n, K), mode_0, mode_1, ...

    Attributes
    ----------
    arrays : dict of str to (shape, dtype)
    """

    arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]

    def _lay_out(self, path: Path) -> None:
        """Find out names and length; ValueError if an array is no column, or they differ in length."""
        self._columns: dict[str, tuple[str, int | None]] = {}
        for array, (shape, dtype) in self.arrays.items():
            if dtype.kind not in _KINDS:
                raise ValueError(f"path: expected numbers, booleans, times or text in {array!r}, got {dtype} in {path}")
            matrix = array == "X" and len(shape) == 2
            if not matrix and len(shape) != 1:
                raise ValueError(f'path: expected (n,), or (n, K) for "X", got {array!r} of shape {shape} in {path}')
            for name, k in [(f"mode_{k}", k) for k in range(shape[1])] if matrix else [(array, None)]:
                if name in self._columns:
                    raise ValueError(f"path: expected distinct columns, got {name!r} twice in {path}")
                self._columns[name] = array, k
        lengths = {array: shape[0] for array, (shape, _) in self.arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"path: expected arrays of one length, got {lengths} in {path}")
        self.names = list(self._columns)
        self.n_rows = next(iter(lengths.values()), 0)

    def _read(self, names: list[str], start: int, stop: int) -> pd.DataFrame:
        places = [self._columns[name] for name in names]
        parts = {array: _native(self._part(array, start, stop)) for array in dict.fromkeys(a for a, _ in places)}
        columns = [parts[array] if k is None else parts[array][:, k] for array, k in places]
        return pd.DataFrame(dict(zip(names, columns, strict=True)))

    @abstractmethod
    def _part(self, array: str, start: int, stop: int) -> Array:
        """Return the rows of one array, a new array of shape (stop - start,) or (stop - start, K)."""


class NpzFile(_Arrays):
    """A NumPy .npz file, compressed or not. Its members are streamed: never more of one is held than the share.

    Raises
    ------
    ValueError
        If the file is malformed, an array has pickled objects or is no column, or lengths differ.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.arrays = {}
        self._fortran: dict[str, bool] = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, self._fortran[name], dtype = self._header(stream, name)
                self.arrays[name] = shape, dtype
        self._lay_out(path)

    def _header(self, stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        try:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            return read(stream)
        except (ValueError, KeyError) as error:
            raise ValueError(f"path: expected an array as {name!r}, got {error} in {self._path}") from error

    def _part(self, array: str, start: int, stop: int) -> Array:
        shape, dtype = self.arrays[array]
        part = np.empty((stop - start, *shape[1:]), dtype, order="F" if self._fortran[array] else "C")
        runs = part.T if self._fortran[array] and part.ndim == 2 else part[None]  # what lies together in the file
        row_bytes = dtype.itemsize * int(np.prod(shape[1:])) if len(runs) == 1 else dtype.itemsize
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{array}.npy") as stream:
            self._header(stream, array)
            skipped = start * row_bytes
            for run in runs:
                _skip(stream, skipped)
                self._fill(stream, run.reshape(-1).view(np.uint8), array)
                skipped = (shape[0] - (stop - start)) * row_bytes
        return part

    def _fill(self, stream: IO[bytes], target: npt.NDArray[np.uint8], name: str) -> None:
        for low in range(0, len(target), _CHUNK):
            piece = stream.read(min(_CHUNK, len(target) - low))
            if len(piece) < len(target[low : low + _CHUNK]):
                raise ValueError(
                    f"path: expected {self.arrays[name][0]} numbers in {name!r}, got fewer in {self._path}"
                )
            target[low : low + _CHUNK] = np.frombuffer(piece, dtype=np.uint8)


class ZarrFolder(_Arrays):
    """A folder with a zarr group of arrays; columns are in alphabetic order. Chunks are read that hold the share.

    Raises
    ------
    ImportError
        If zarr is missing.
    ValueError
        If there is no group, an array is no column, or lengths differ.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        zarr = _load("zarr", "zarr folders")
        if not path.is_dir():
            raise FileNotFoundError(f"no such folder: {path}")
        try:
            self._group = dict(sorted(zarr.open_group(str(path), mode="r").arrays()))
        except FileNotFoundError as error:
            raise ValueError(f"path: expected a zarr group of arrays, got {error}") from error
        self.arrays = {name: (tuple(array.shape), np.dtype(array.dtype)) for name, array in self._group.items()}
        self._lay_out(path)

    def _part(self, array: str, start: int, stop: int) -> Array:
        return np.asarray(self._group[array][start:stop])


def _load(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"{what} need {package}: pip install {package} ({error})") from error


def _native(part: Array) -> Array:
    """Return numbers in this machine's byte order, and text as pandas takes it."""
    return part.astype(object) if part.dtype.kind in "UT" else part.astype(part.dtype.newbyteorder("="), copy=False)


def _skip(stream: IO[bytes], n: int) -> None:
    while n > 0 and (piece := stream.read(min(_CHUNK, n))):
        n -= len(piece)
