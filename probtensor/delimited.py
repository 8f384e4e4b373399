"""Rows of csv and tsv files, of which each rank reads its own.

A row ends at a line end outside quotes. Whether a place in the file is inside quotes depends on all that is before it:
each rank scans one range of bytes, says what it would hold if it began outside quotes and if it began inside, and all
ranks put these together. Ranges and blocks begin where a line does, inside quotes or not. Quotes mean what they mean to
pandas: one opens a field only as its first character, and two within quotes are a quote.
"""

from __future__ import annotations

import csv
import gzip
import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from probtensor.columnar import Together, share_ends
from probtensor.columns import IntArray

_BLOCK = 2**20  # bytes that are scanned at a time
_BOM = b"\xef\xbb\xbf"
_MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None")


class DelimitedFile:
    """A csv or tsv file, perhaps gzipped: its header, and the rows of one rank.

    Parameters
    ----------
    path : Path
        Ends in .csv, .csv.gz, .tsv or .tsv.gz.
    label_dtypes : mapping of str to str
        Columns of labels, and what the labels are: "str" keeps them as they are written.

    Attributes
    ----------
    names : list of str
        The columns.
    inferred : dict of str to list of str
        Those whose dtype pandas infers from the rows that it is given, and the words that mean a missing value there.

    Raises
    ------
    ValueError
        If there is no header.
    """

    def __init__(self, path: Path, label_dtypes: Mapping[str, str]) -> None:
        self._path = path
        self._sep = "\t" if ".tsv" in path.suffixes else ","
        with self._open() as stream:
            start = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
            pieces = list(self._cut(stream, _Place(start, 0, False), 0, 1))
        self._header = b"".join(piece for *_, piece in pieces)
        if not self._header:
            raise ValueError(f"path: expected a header and rows, got neither in {path}")
        offset, _, piece = pieces[-1]
        self._place = _Place(offset + len(piece), 0, False)  # where a block begins that holds the first row,
        self._last: _Place | None = None  # and one that holds the row after the last, if there is one
        self._ends: tuple[int, int | None] = (0, None)  # numbers of the first row and of the one after the last
        self.names = list(pd.read_csv(io.BytesIO(self._header), sep=self._sep, nrows=0).columns)
        # A label may well be called "NA" or "None"; elsewhere these words mean a missing number.
        self._missing = {name: [""] if name in label_dtypes else list(_MISSING) for name in self.names}
        self._dtypes = {name: str for name, expected in label_dtypes.items() if expected == "str"}
        self.inferred = {name: words for name, words in self._missing.items() if name not in self._dtypes}

    def locate(self, together: Together, rank: int, size: int) -> None:
        """Find the rows of `rank` among `size` ranks, which all call this; ValueError if a quote is never closed."""
        if size == 1:
            return
        table, counts = together(lambda: self._count(rank, size))
        first, inside, row = [], [], 0
        begins_inside = False
        for rows, ends in counts:
            first.append(row)
            inside.append(begins_inside)
            row += rows[begins_inside]
            begins_inside = ends[begins_inside]
        if begins_inside:
            raise ValueError(self._unclosed(row - 1))
        ends = share_ends(row, size)
        self._ends = ends[rank], ends[rank + 1]
        nonempty = [r for r in range(size) if ends[r] < ends[r + 1]]
        before = [rows[inside[rank]] for _, rows, _ in table]
        places = []
        for r in nonempty:
            if first[rank] <= ends[r] < [*first, row][rank + 1]:
                offset, rows, states = table[bisect_right(before, ends[r] - first[rank]) - 1]
                places.append([r, offset, first[rank] + rows[inside[rank]], states[inside[rank]]])
        found = {r: _Place(*place) for r, *place in chain.from_iterable(together(lambda: (None, places))[1])}
        self._place = found.get(rank, self._place)
        self._last = next((place for r, place in found.items() if r > rank), None)

    def read(self, names: list[str], dtypes: Mapping[str, str]) -> pd.DataFrame:
        """Return columns of this rank's rows, numbered as in the file; infer the dtypes that are not given.

        Raises
        ------
        ValueError
            If a row is malformed: the message has its number, counted from 0 after the header.
        """
        kinds = {name: str if dtype == "text" else dtype for name, dtype in dtypes.items()}
        with self._open() as stream:
            text = io.BufferedReader(_Pieces(self._pieces(stream)), _BLOCK)
            try:
                frame = pd.read_csv(
                    text,
                    sep=self._sep,
                    dtype=self._dtypes | kinds,
                    usecols=[self.names.index(name) for name in names] if dtypes else None,
                    na_values=self._missing,
                    keep_default_na=False,
                    low_memory=False,
                )
            except ValueError as error:
                raise ValueError(
                    self._first_fault() or f"path: expected a table, got {error} in {self._path}"
                ) from error
        if not isinstance(frame.index, pd.RangeIndex):  # the first row is longer than the header
            raise ValueError(self._first_fault())
        start = self._ends[0]
        return frame[names].set_axis(pd.RangeIndex(start, start + len(frame)))

    def _open(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self._path) if self._path.suffix == ".gz" else open(self._path, "rb"))

    def _range(self, stream: BinaryIO, rank: int, size: int) -> tuple[int, int | None]:
        """Return the bytes that `rank` scans; a gzipped file, where nobody can jump, is scanned by rank 0."""
        start = self._place.offset
        if self._path.suffix == ".gz":
            return (start, None) if rank == 0 else (start, start)
        stop = self._path.stat().st_size
        low, high = (_line_start(stream, start + (stop - start) * r // size, start) for r in (rank, rank + 1))
        return low, high

    def _count(self, rank: int, size: int) -> tuple[list[tuple[int, list[int], list[bool]]], Any]:
        """Count the rows of this rank's range if it begins outside quotes, and if it begins inside.

        Returns
        -------
        list of (offset, rows, inside)
            Of each block: where it begins, rows of the range before it, whether it begins inside quotes; both cases.
        [rows, inside]
            The same at the end of the range.
        """
        table = []
        rows, inside = [0, 0], [False, True]
        with self._open() as stream:
            for offset, block in _blocks(stream, *self._range(stream, rank, size)):
                table.append((offset, list(rows), list(inside)))
                lines = _Lines.of(block, self._sep)
                for case in range(2):
                    starts, inside[case] = lines.rows(inside[case])
                    rows[case] += len(starts)
        return table, [rows, inside]

    def _cut(
        self, stream: BinaryIO, place: _Place, start: int, stop: int | None
    ) -> Iterator[tuple[int, list[int], bytes]]:
        """Yield the bytes of rows `start` to `stop` in pieces: where each begins, and where rows begin in it."""
        row, inside = place.row, place.inside
        for offset, block in _blocks(stream, place.offset):
            found, inside = _Lines.of(block, self._sep).rows(inside)
            low = 0 if row > start else int(found[start - row]) if start < row + len(found) else len(block)
            high = int(found[stop - row]) if stop is not None and stop < row + len(found) else len(block)
            yield offset + low, (found[(low <= found) & (found < high)] - low).tolist(), block[low:high]
            row += len(found)
            if high < len(block):
                return

    def _pieces(self, stream: BinaryIO) -> Iterator[bytes]:
        """Yield the header and this rank's rows. Only blocks with the first and the last of them are scanned."""
        yield self._header
        start, stop = self._ends
        if start == stop:
            return
        row, inside, last = self._place.row, self._place.inside, self._last
        for _, block in _blocks(stream, self._place.offset, None if last is None else last.offset):
            if row > start:
                yield block
                continue
            found, inside = _Lines.of(block, self._sep).rows(inside)
            yield block[found[start - row] if start < row + len(found) else len(block) :]
            row += len(found)
        if last is not None:
            yield from (piece for *_, piece in self._cut(stream, last, start, stop))

    def _first_fault(self) -> str:
        """Return what is wrong with the first of this rank's rows that is malformed, or nothing."""
        row, text = self._ends[0] - 1, b""
        with self._open() as stream:
            for _, starts, piece in self._cut(stream, self._place, *self._ends):
                bounds = [*starts, len(piece)]
                text += piece[: bounds[0]]
                for low, high in pairwise(bounds):
                    if fault := self._fault(row, text):
                        return fault
                    row, text = row + 1, piece[low:high]
        return self._fault(row, text)

    def _fault(self, row: int, text: bytes) -> str:
        where = f"on row {row} of {self._path}"
        try:
            fields = next(csv.reader(io.StringIO(text.decode(), newline=""), delimiter=self._sep), [])
        except UnicodeDecodeError as error:
            return f"path: expected UTF-8, got the byte {error.object[error.start]:#x} {where}"
        except csv.Error:  # a field longer than that module takes
            return ""
        if len(fields) > len(self.names):
            return f"path: expected {len(self.names)} fields as the header has, got {len(fields)} {where}"
        return self._unclosed(row) if text and _Lines.of(text, self._sep).rows(False)[1] else ""

    def _unclosed(self, row: int) -> str:
        return f"path: expected each quote to be closed, got one that is not on row {row} of {self._path}"


@dataclass(frozen=True)
class _Place:
    """Where a block begins: offset in bytes, number of the first row that begins in it, whether it is inside quotes."""

    offset: int
    row: int
    inside: bool


@dataclass(frozen=True, eq=False)
class _Lines:
    """The m lines of a block that are not blank, and what quotes do before each of them.

    Parameters
    ----------
    starts : ndarray
        int64 (m,), where they begin.
    odd : ndarray
        bool (m + 1,), whether a line, and the end, is inside quotes if the block begins outside.
    fixed : ndarray
        bool (m + 1,), whether that is so too if the block begins inside; otherwise it is the other way round.
    """

    starts: IntArray
    odd: npt.NDArray[np.bool_]
    fixed: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, block: bytes, sep: str) -> _Lines:
        """Find the lines of a block that begins where a line does. Carriage returns and newlines end lines.

        An odd number of quotes in a row ends or begins quotes where a field may begin; elsewhere they are outside
        after it, whatever they were before. An even number changes nothing.
        """
        codes = np.frombuffer(block, dtype=np.uint8)
        is_end = codes == ord("\n")
        if b"\r" in block:
            is_end |= codes == ord("\r")
        ends = np.flatnonzero(is_end)
        starts, stops = np.append(0, ends + 1), np.append(ends, len(codes))
        solid = starts < stops
        blank = np.frombuffer(b" " if sep == "\t" else b" \t", dtype=np.uint8)
        begins_blank = np.isin(codes[starts[solid]], blank)
        if begins_blank.any():  # lines of blanks alone are blank too
            others = np.append(np.flatnonzero(~(is_end | np.isin(codes, blank))), len(codes))
            solid &= others[np.searchsorted(others, starts)] < stops
        starts = starts[solid]
        quotes = np.flatnonzero(codes == ord('"')) if b'"' in block else ends[:0]
        if not len(quotes):
            nothing = np.zeros(len(starts) + 1, dtype=bool)
            return cls(starts, nothing, nothing)
        first = np.flatnonzero(np.diff(quotes, prepend=-2) != 1)
        at = quotes[first][np.diff(first, append=len(quotes)) % 2 == 1]
        opens = (at == 0) | is_end[at - 1] | (codes[at - 1] == ord(sep))
        last = np.maximum.accumulate(np.where(opens, -1, np.arange(len(at))))
        opened = np.append(0, np.cumsum(opens))
        odd = np.append(0, opened[1:] - opened[last + 1]) % 2 == 1
        before = np.searchsorted(at, np.append(starts, len(codes)))
        return cls(starts, odd[before], np.append(False, last >= 0)[before])

    def rows(self, inside: bool) -> tuple[IntArray, bool]:
        """Return where rows begin, and if the end is inside quotes, given whether the block begins inside."""
        state = self.odd ^ (inside & ~self.fixed)
        return self.starts[~state[:-1]], bool(state[-1])


class _Pieces(io.RawIOBase):
    """Pieces of bytes as one file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def _blocks(stream: BinaryIO, start: int, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines between two line starts, each with where it begins."""
    stream.seek(start)
    rest = b""
    while True:
        wanted = _BLOCK if stop is None else min(_BLOCK, stop - start - len(rest))
        piece = stream.read(wanted)
        block = rest + piece
        end = _last_line_start(block) if piece else len(block)
        if end:
            yield start, block[:end]
        if not piece:
            return
        start, rest = start + end, block[end:]


def _last_line_start(block: bytes) -> int:
    return max(block.rfind(b"\n"), block.rfind(b"\r")) + 1


def _line_start(stream: BinaryIO, offset: int, first: int) -> int:
    """Return the first place from `offset` on where a line begins, `first` being one; or the end of the file."""
    if offset <= first:
        return first
    stream.seek(offset - 1)
    at = offset - 1
    while piece := stream.read(_BLOCK // 16 or 1):
        found = [end for end in (piece.find(b"\n"), piece.find(b"\r")) if end >= 0]
        if found:
            return at + min(found) + 1
        at += len(piece)
    return at
