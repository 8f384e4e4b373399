"""Tables in files, of which each rank reads its own rows: the same table, whatever the number of ranks.

A file of N rows is cut into P shares, in the order of the file. What one rank cannot know from its rows, all ranks
agree on: where rows begin in a csv file, dtypes, the categories of labels, time zones, and faults.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types as ptypes

from probtensor.columnar import Columns, NpzFile, ParquetFile, Together, ZarrFolder
from probtensor.columns import FloatArray, as_coordinates, check_labels, index_from_state, index_to_state, numeric
from probtensor.comm import Comm
from probtensor.delimited import DelimitedFile

_DELIMITED = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_STORED: dict[str, Callable[[Path], Columns]] = {".parquet": ParquetFile, ".npz": NpzFile, ".zarr": ZarrFolder}
_UNITS = ("s", "ms", "us", "ns")

# What a rank says of a column that has rows: its kind and its dtype. "missing" has no value at all; "doubtful" is
# what pandas makes of whole numbers that no integer dtype holds: text of numbers alone, or one where words that mean a
# missing value have stayed.
_Vote = tuple[str, str]


def read_shard(
    path: str | os.PathLike[str],
    comm: Comm,
    value: str | None,
    continuous: Iterable[str] = (),
    categorical: Iterable[str] | Mapping[str, str] = (),
    columns: Iterable[str] | None = None,
) -> tuple[pd.DataFrame, FloatArray | None]:
    """Read this rank's share of the rows of a table, for `fit(X, y, comm=comm)`. All ranks call it together.

    Of N rows in the file, rank r of P has those from N r // P to N (r + 1) // P, less those without a value. The shares
    of all ranks, one after the other, are what `read_table` returns, with the same dtypes on every rank. No rank holds
    all rows. Each reads O(1 / P) of the file, except of .csv.gz and .tsv.gz, which every rank has to read through.

    Parameters
    ----------
    path : path_like
        Ends in .csv, .csv.gz, .tsv, .tsv.gz, .parquet, .npz or .zarr, and is the same file for all ranks. In .npz and
        .zarr, arrays of shape (n,) are columns, and an array "X" of shape (n, K) has the columns "mode_0", "mode_1", …
    comm : Comm
        The ranks.
    value, continuous, categorical, columns
        As in `read_table`.

    Returns
    -------
    X : DataFrame
        (n_r, K) coordinates; n_r may be 0.
    y : ndarray or None
        float64 (n_r,) values; None if `value` is None.

    Raises
    ------
    ValueError
        As in `read_table`, or if a file is malformed or, on several ranks, cannot be read: on all ranks, naming those
        that found a fault, and rows by their number in the file, from 0.
    OSError, ImportError
        On one rank, if the file cannot be read, or pyarrow or zarr is missing.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from probtensor.comm import Serial
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(folder + "/a.npz", X=np.arange(6).reshape(3, 2), y=[0.5, np.nan, 1.5])
    ...     X, y = read_shard(folder + "/a.npz", Serial(), "y")
    >>> X.to_numpy().tolist(), y.tolist()
    ([[0, 1], [4, 5]], [0.5, 1.5])
    """
    for argument, names in (("continuous", continuous), ("categorical", categorical), ("columns", columns)):
        if isinstance(names, str):
            raise ValueError(f"{argument}: expected a list of names, got {names!r}")
    near = list(continuous)
    labels = dict(categorical) if isinstance(categorical, Mapping) else dict.fromkeys(categorical, "mixed")
    together: Together = partial(_together, comm)

    def opened() -> tuple[Any, None]:
        source = _open(Path(path), labels)
        known = [name for name in source.names if name != value]
        modes = known if columns is None else list(columns)
        _check_names("value", [] if value is None else [value], source.names)
        if lacking := [name for name in modes if name not in known]:
            raise ValueError(f"columns: expected {lacking} in the table, got {known}")
        _check_names("continuous", near, modes)
        _check_names("categorical", list(labels), [name for name in modes if name not in near])
        return (source, modes), None

    (source, modes), _ = together(opened)
    source.locate(together, comm.rank, comm.size)
    frame = _read_agreed(source, modes, value, near, together)
    made: set[str] = set()  # columns that become categories here

    def converted() -> tuple[Any, dict[str, Any]]:
        kept = frame if value is None else frame[frame[value].notna()]
        y = None if value is None else _values(kept[value], value, alone=comm.size == 1)
        table = kept[modes].copy()
        for name in near:
            table[name] = as_coordinates(table[name])
        for name, expected in labels.items():
            check_labels(table[name], expected)
            if ptypes.is_float_dtype(table[name].dtype) or table[name].dtype.kind in "mM":
                table[name] = table[name].astype("category")
                made.add(name)
        if comm.size == 1:
            return (kept, table, y), {}
        return (kept, table, y), {name: _traits(table[name]) for name in dict.fromkeys(modes)}

    (kept, table, y), traits = together(converted)
    if value is not None and y is None:  # words are elsewhere, or there are none: all ranks say so
        numeric(kept[value], "value", value)
    table = table.reset_index(drop=True)
    if comm.size > 1:

        def unified() -> tuple[pd.DataFrame, None]:
            for name in traits[0]:
                table[name] = _unify(table[name], [trait[name] for trait in traits], sort=name in made)
            return table, None

        table, _ = together(unified)
    return table, y


def _together(comm: Comm, step: Callable[[], tuple[Any, Any]]) -> tuple[Any, list[Any]]:
    """Do a step on this rank; return what it came to and what all ranks report; raise a fault of one on all."""
    try:
        mine, report = step()
        data = json.dumps({"report": report})
    except (EOFError, zlib.error, zipfile.BadZipFile) as error:
        data = json.dumps({"fault": f"path: expected a whole archive, got {str(error) or type(error).__name__}"})
        cause: Exception = error
    except Exception as error:
        if comm.size == 1:
            raise
        expected = "path: expected a file that can be read, got " if isinstance(error, OSError) else ""
        data = json.dumps({"fault": f"{expected}{error}" if str(error) else type(error).__name__})
        cause = error
    reports = [json.loads(each) for each in comm.gather_bytes(data.encode())]
    faults: dict[str, list[str]] = {}
    for rank, each in enumerate(reports):
        if "fault" in each:
            faults.setdefault(each["fault"], []).append(str(rank))
    if comm.size == 1 and faults:
        raise ValueError(next(iter(faults))) from cause
    if faults:
        raise ValueError("; ".join(f"rank {', '.join(ranks)}: {fault}" for fault, ranks in faults.items()))
    return mine, [each["report"] for each in reports]


def _open(path: Path, label_dtypes: Mapping[str, str]) -> DelimitedFile | Columns:
    if path.name.endswith(_DELIMITED):
        return DelimitedFile(path, label_dtypes)
    if path.suffix not in _STORED:
        suffixes = (*_DELIMITED, *_STORED)
        raise ValueError(f"path: expected a name that ends in one of {suffixes}, got {path.name!r}")
    return _STORED[path.suffix](path)


def _check_names(argument: str, names: list[str], known: list[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{argument}: expected columns among {known}, got {unknown}")


def _read_agreed(
    source: DelimitedFile | Columns, modes: list[str], value: str | None, near: list[str], together: Together
) -> pd.DataFrame:
    """Return the rows of this rank with the dtypes that the whole file has."""
    names = list(dict.fromkeys([*modes, *([] if value is None else [value])]))

    def first() -> tuple[pd.DataFrame, dict[str, _Vote]]:
        frame = source.read(names, {})
        return frame, {name: _vote(frame[name], source.inferred.get(name)) for name in names}

    frame, votes = together(first)
    agreed = {name: _agree([tuple(vote[name]) for vote in votes], name in source.inferred) for name in names}
    for name in source.inferred.keys() & {value, *near}:  # numbers, if there is no row to infer from
        agreed[name] = agreed[name] or "float64"
    if doubtful := [name for name, dtype in agreed.items() if dtype == "doubt"]:

        def looked() -> tuple[None, dict[str, Any]]:
            texts = source.read(doubtful, dict.fromkeys(doubtful, "text"))
            return None, {name: _sizes(texts[name]) for name in doubtful}

        _, sizes = together(looked)
        for name in doubtful:
            agreed[name] = _dtype_of([size[name] for size in sizes], is_number=name in (value, *near))
    changed = {name: dtype for name, dtype in agreed.items() if any(vote[name][1] != dtype for vote in votes)}

    def retyped() -> tuple[pd.DataFrame, None]:
        again = {name: dtype for name, dtype in changed.items() if dtype and (dtype == "text" or name in doubtful)}
        read = source.read(list(again), again) if again else frame
        for name, dtype in changed.items():
            if name in again:
                frame[name] = read[name]
            elif dtype is not None and str(frame[name].dtype) != dtype:
                frame[name] = frame[name].astype(dtype)
        return frame, None

    return together(retyped)[0] if changed else frame


def _vote(column: pd.Series, missing: list[str] | None) -> _Vote:
    """Return what this rank takes the column for; its dtype was inferred if it has words that mean a missing value."""
    dtype = column.dtype
    is_object = ptypes.is_object_dtype(dtype)
    if len(column) == 0:
        return "", str(dtype)
    if column.isna().all():
        return "missing", str(dtype)
    kind = ptypes.infer_dtype(column, skipna=True) if is_object else ""
    if kind == "boolean" or (isinstance(dtype, np.dtype) and dtype.kind == "b"):
        return "bool", str(dtype)
    if isinstance(dtype, np.dtype) and dtype.kind in "iuf":
        return "number", str(dtype)
    if kind == "string" or (not is_object and ptypes.is_string_dtype(dtype)):
        doubtful = missing and ((not column.hasnans and column.isin(missing).any()) or _has_numbers_alone(column))
        return "doubtful" if doubtful else "text", str(dtype)
    return "doubtful" if missing and kind == "integer" else "other", str(dtype)


def _has_numbers_alone(column: pd.Series) -> bool:
    words = column.dropna()
    try:
        pd.to_numeric(words[:1])  # most often a word, which is enough
        pd.to_numeric(words)
    except ValueError:
        return False
    return True


def _agree(votes: list[_Vote], inferred: bool) -> str | None:
    """Return the dtype of a column by the votes of all ranks; None to leave it, "text" or "doubt"."""
    given = [vote for vote in votes if vote[0]]
    kinds, dtypes = {kind for kind, _ in given} - {"missing"}, {dtype for _, dtype in given}
    if inferred and kinds <= {"number", "doubtful"} and ("doubtful" in kinds or {"uint64"} < dtypes):
        return "doubt"
    if len(dtypes) <= 1 and "doubtful" not in kinds:
        return next(iter(dtypes), None)
    if kinds == {"number"}:
        return "float64"
    return "text" if inferred and kinds != {"bool"} else "object"


def _sizes(texts: pd.Series) -> dict[str, Any]:
    """Return what decides for which dtype pandas takes a column of numbers, given as texts."""
    words = texts.dropna().astype(object)
    if not _has_numbers_alone(words):
        return {"first": "word"}
    whole = words.str.fullmatch(r"\s*[+-]?[0-9]+\s*")
    numbers = words[whole].map(int)
    odd = {row: "fraction" for row in [*words.index[~whole][:1], *numbers.index[numbers < -(2**63)][:1]]}
    odd |= dict.fromkeys(numbers.index[numbers >= 2**64][:1], "huge")
    return {
        "first": odd[min(odd)] if odd else "",
        "missing": len(words) < len(texts),
        "negative": bool((numbers < 0).any()),
        "unsigned": bool((numbers >= 2**63).any()),
    }


def _dtype_of(sizes: list[dict[str, Any]], *, is_number: bool) -> str:
    """Return for which dtype pandas takes a column whose parts have these sizes; values and coordinates are floats."""
    if any(part["first"] == "word" for part in sizes):
        return "text"
    if is_number:
        return "float64"
    first = next((part["first"] for part in sizes if part["first"]), "")
    missing, negative, unsigned = (any(part[key] for part in sizes) for key in ("missing", "negative", "unsigned"))
    if first == "huge" or (not first and unsigned and (missing or negative)):
        return "text"
    if first or missing:
        return "float64"
    return "uint64" if unsigned else "int64"


def _values(column: pd.Series, name: str, *, alone: bool) -> FloatArray | None:
    """Return values as float64; None if the column is of words, of which this rank has none and another may have."""
    try:
        return numeric(column, "value", name).to_numpy(np.float64)  # type: ignore[no-any-return]
    except ValueError as error:
        words = column.index[pd.to_numeric(column, errors="coerce").isna()]
        if len(words):
            raise ValueError(f"{error} at row {words[0]}") from error
        if alone:
            raise
        return None


def _traits(column: pd.Series) -> dict[str, Any]:
    """Return what ranks must have in common of categories and times."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = column.cat.categories
        return {"categories": index_to_state(categories, column.name) if len(categories) else None}
    if column.dtype.kind == "M":
        zone = getattr(column.dtype, "tz", None)
        return {"unit": column.dt.unit, "zone": str(zone) if column.notna().any() else None, "dtype": str(column.dtype)}
    return {}


def _unify(column: pd.Series, traits: list[dict[str, Any]], *, sort: bool) -> pd.Series:
    """Return a column with the categories, or the unit and time zone, that it has in the whole table."""
    if "categories" in traits[0]:
        states = [trait["categories"] for trait in traits if trait["categories"] is not None]
        if not states:
            return column
        categories = reduce(lambda a, b: a.append(b), map(index_from_state, states)).unique()
        return column.cat.set_categories(categories.sort_values() if sort else categories)
    if "zone" not in traits[0]:
        return column
    dated = [trait for trait in traits if trait["zone"] is not None] or traits
    if len(zones := {trait["zone"] for trait in dated}) > 1:
        raise ValueError(f"continuous: expected one time zone in column {column.name!r}, got {sorted(zones)}")
    dtype = max(dated, key=lambda trait: _UNITS.index(trait["unit"]))["dtype"]
    if column.isna().all():
        return pd.Series(pd.NaT, column.index, dtype, name=column.name)
    try:
        return column.astype(dtype)
    except ValueError as error:
        raise ValueError(
            f"continuous: expected dates that {dtype} holds in column {column.name!r}, got {error}"
        ) from error
