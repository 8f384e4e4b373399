"""Data of `python -m benchmarks run`: drawn by a seed, or real tables; a share of the rows is held out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks import completion
from benchmarks.datasets import Floats
from probtensor.datasets import load_il2
from probtensor.demo import split_rows

__all__ = ["Split", "bars", "cells", "il2", "planted", "split", "surface"]


class Split(NamedTuple):
    """A table with rows held out; `seed` is that of the split and of the methods."""

    X: pd.DataFrame
    y: Floats
    X_test: pd.DataFrame
    y_test: Floats
    seed: int


def split(X: pd.DataFrame, y: Floats, seed: int, share: float = 0.2) -> Split:
    train, test = split_rows(len(y), share, seed)
    return Split(X.iloc[train], y[train], X.iloc[test], y[test], seed)


def surface(seed: int) -> Split:
    """A smooth function of place and time with noise, a fifth hidden: sums and products of waves."""
    rng = np.random.default_rng(seed)
    place, time_ = rng.integers(0, 40, 3000) / 40, rng.integers(0, 200, 3000) / 20
    wave = np.sin(6 * place) * np.cos(time_) + 0.5 * np.cos(9 * place) * np.sin(2.3 * time_) + np.sin(0.5 * time_)
    return split(pd.DataFrame({"place": place, "time": time_}), wave + 0.2 * rng.normal(size=3000), seed)


def il2(seed: int) -> Split:
    X, y = load_il2()
    return split(X, y, seed)


def planted(seed: int) -> Split:
    """Labels of three modes: effects and a CP tensor of rank 3 with noise, 6 % of the cells seen."""
    rng = np.random.default_rng(seed)
    sizes = (60, 50, 40)
    cells = rng.choice(np.prod(sizes), 7200, replace=False)
    index = np.stack(np.unravel_index(cells, sizes), axis=1)
    factors = [rng.normal(size=(size, 3)) for size in sizes]
    effects = [rng.normal(size=size) for size in sizes]
    y = np.prod([f[i] for f, i in zip(factors, index.T, strict=True)], axis=0).sum(1)
    y = y + sum(e[i] for e, i in zip(effects, index.T, strict=True)) + 0.3 * rng.normal(size=len(y))
    return split(pd.DataFrame(index, columns=["a", "b", "c"]).astype(str), y, seed)


def cells(folder: Path, name: str) -> Callable[[int], Split]:
    """A set of `benchmarks.completion`, a tenth hidden."""

    def load(seed: int) -> Split:
        index, y = completion.load_cells(folder, name)
        return split(
            pd.DataFrame(index, columns=[f"mode {k}" for k in range(index.shape[1])]).astype(str), y, seed, 0.1
        )

    return load


def bars(seed: int) -> dict[str, Any]:
    """2,000 pictures of 5 × 5 with ten bars, each there with probability 0.2, and noise."""
    rng = np.random.default_rng(seed)
    W = np.zeros((10, 5, 5))
    for k in range(5):
        W[k, k, :] = W[5 + k, :, k] = 10.0
    W = W.reshape(10, 25)
    s = rng.random((2000, 10)) < 0.2
    return {"Y": s @ W + rng.normal(size=(2000, 25)), "W": W.T, "seed": seed}
