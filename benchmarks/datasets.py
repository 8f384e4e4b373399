"""Data sets that only the benchmarks use; the files are not part of the package."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

FUNBAT_SETS = ("beijing_pm25", "beijing_pm10", "beijing_so2", "us_temp")

Floats = npt.NDArray[np.float64]


def load_fold(folder: Path, name: str, fold: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Coordinates and values of the training and the test rows of a published fold."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as data:
        X, y, order, n = data["coords"], data["y"], data["fold_perm"][fold].astype(np.int64), int(data["n_train"])
    train, test = order[:n], order[n:]
    return X[train], y[train], X[test], y[test]
