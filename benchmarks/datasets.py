"""Data sets that only the benchmarks use, and how their rows are held out; the files are not part of the package."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

FUNBAT_SETS = ("beijing_pm25", "beijing_pm10", "beijing_so2", "us_temp")
COUNT_SETS = ("nyc2013_flights", "nyc2013_flights_zeros", "kg_nations")
N_FOLDS = 5
BLOCK = 7  # days (US: years) that are held out together

Split = Literal["published", "days", "stations", "cells"]
SPLITS: tuple[Split, ...] = get_args(Split)
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Fold(NamedTuple):
    """Training and test rows, and which training rows a method may set aside to choose its settings.

    `inner` is a fifth of the training rows, held out the way the test rows are: what is chosen on random rows is wrong
    where whole days are held out.
    """

    X: Any
    y: Floats
    X_test: Any
    y_test: Floats
    inner: Mask


class NumberedColumns:
    """Tables as matrices: columns of numbers as they are, labels numbered as in the first table.

    Attributes
    ----------
    labels : dict
        The labels of each column that has them, by its place.
    """

    def __init__(self, X: Any) -> None:
        self.labels: dict[int, pd.Index] = {
            k: pd.Index(sorted(set(column)))
            for k, column in enumerate(self._of(X))
            if not pd.api.types.is_numeric_dtype(column)
        }

    def __call__(self, X: Any) -> Floats:
        """The matrix (n, columns) of a table; -1 is a label that was not seen."""
        columns = [self.labels[k].get_indexer(c) if k in self.labels else c for k, c in enumerate(self._of(X))]
        return np.column_stack([np.asarray(column, dtype=np.float64) for column in columns])

    @staticmethod
    def _of(X: Any) -> list[Any]:
        return list(X.T) if isinstance(X, np.ndarray) else [X[name] for name in X.columns]


def load_fold(folder: Path, name: str, fold: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Coordinates and values of the training and the test rows of a published fold."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as data:
        X, y, order, n = data["coords"], data["y"], data["fold_perm"][fold].astype(np.int64), int(data["n_train"])
    train, test = order[:n], order[n:]
    return X[train], y[train], X[test], y[test]


def load_split(folder: Path, name: str, split: Split, fold: int, *, station: bool = False) -> Fold:
    """One fold of a FunBaT data set.

    "published" has the authors' random rows. The others leak less: "days" holds out blocks of seven days (US: years),
    "stations" whole stations (US: places), "cells" all rows of a coordinate triple. With `station`, X is a DataFrame
    whose fourth column is the station's name (US: a label of the place).
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    if not 0 <= fold < N_FOLDS:
        raise ValueError(f"fold: expected 0 to {N_FOLDS - 1}, got {fold!r}")
    with np.load(folder / f"{name}.npz", allow_pickle=False) as data:
        coords, y, order, n = (
            data["coords"],
            data["y"].astype(np.float64),
            data["fold_perm"][fold],
            int(data["n_train"]),
        )
        if "station" in data:
            columns, day, places = ["temperature", "pressure", "time"], data["day"].astype(np.int64), data["station"]
        else:
            columns = ["latitude", "longitude", "year"]
            day = data["coords_raw"][:, 2].round().astype(np.int64)
            day, places = day - day.min(), distinct(coords[:, :2])
    rows = np.arange(len(y))
    if split == "published":
        train, test = order[:n].astype(np.int64), order[n:].astype(np.int64)
        labels = rows
    else:
        labels = {"days": day // BLOCK, "stations": distinct(places[:, None]), "cells": distinct(coords)}[split]
        out = held_out(labels, fold)
        train, test = rows[~out], rows[out]
    X: Any = coords
    if station:
        names = np.char.decode(places, "ascii") if places.dtype.kind == "S" else np.char.mod("place %02d", places)
        X = pd.DataFrame(coords, columns=columns).assign(station=names.astype(object))
    X, X_test = (X.iloc[train], X.iloc[test]) if station else (X[train], X[test])
    return Fold(X, y[train], X_test, y[test], held_out(labels[train], 0, seed=1))


def load_counts(folder: Path, name: str, fold: int) -> Fold:
    """Counts or zeros and ones with a random fifth of the cells held out; X is a DataFrame of labels.

    "nyc2013_flights": flights of a week by origin, destination and carrier, in the cells with at least one flight.
    "nyc2013_flights_zeros": the same, and a zero in the other weeks of every origin, destination and carrier that
    occur together; the source lists all departures, so no flight is a fact (or a flight without a recorded delay).
    "kg_nations": relations between nations; 1 is a listed triple (in any of PyKEEN's parts), 0 any other triple of two
    different nations, which may be unknown rather than false. No nation is related to itself, so these are left out.
    """
    if name not in COUNT_SETS:
        raise ValueError(f"name: expected one of {COUNT_SETS}, got {name!r}")
    if name == "kg_nations":
        with np.load(folder / "kg_nations.npz", allow_pickle=False) as data:
            listed = np.zeros(data["shape"], dtype=bool)
            listed[tuple(data["idx"].T.astype(np.int64))] = True
            nation, relation = data["entity"].astype(object), data["relation"].astype(object)
        head, kind, tail = np.nonzero(np.ones_like(listed))
        kept = head != tail
        head, kind, tail = head[kept], kind[kept], tail[kept]
        y = listed[head, kind, tail].astype(np.float64)
        X = pd.DataFrame({"head": nation[head], "relation": relation[kind], "tail": nation[tail]})
    else:
        with np.load(folder / "nyc2013_flight_delay.npz", allow_pickle=False) as data:
            index, y, n_weeks = data["idx"].astype(np.int64), data["count"].astype(np.float64), int(data["shape"][3])
            names = [data[mode].astype(object) for mode in ("origin", "dest", "carrier")]
        if name.endswith("_zeros"):
            routes, route = np.unique(index[:, :3], axis=0, return_inverse=True)
            full = np.zeros((len(routes), n_weeks))
            full[route.ravel(), index[:, 3]] = y
            week = np.tile(np.arange(n_weeks), len(routes))
            index, y = np.column_stack([routes.repeat(n_weeks, axis=0), week]), full.ravel()
        labels = {mode: names[k][index[:, k]] for k, mode in enumerate(("origin", "dest", "carrier"))}
        X = pd.DataFrame(labels).assign(week=index[:, 3].astype(np.float64))  # a float: time is continuous
    out = held_out(np.arange(len(y)), fold)
    train, test = np.flatnonzero(~out), np.flatnonzero(out)
    return Fold(X.iloc[train], y[train], X.iloc[test], y[test], held_out(train, 0, seed=1))


def distinct(rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Number the distinct rows of a matrix: equal rows have equal numbers."""
    return np.unique(rows, axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def held_out(labels: npt.NDArray[Any], fold: int, seed: int = 0) -> Mask:
    """Mark the rows whose label is in the given fifth of the distinct labels, in a seeded random order."""
    values, which = np.unique(labels, return_inverse=True)
    part = np.empty(len(values), dtype=np.int64)
    part[np.random.default_rng(seed).permutation(len(values))] = np.arange(len(values)) * N_FOLDS // len(values)
    chosen: Mask = part[which.ravel()] == fold
    return chosen
