"""Where a sparse tensor should have more cells: entities by importance, and draws of cells that nobody has observed.

An entity is a label of a mode. The importance of entity k of mode n is the sum or the mean of the importance ``a_j`` of
the training cells that have it, ``a(n)_k = sum of a_j over cells j with j_n = k``; divided by their sum over the mode's
entities it is a distribution. New cells have each coordinate drawn independently from its mode's.

References
----------
Oh, Kim, Rossi, Kumar (2021), "Influence-guided Data Augmentation for Neural Tensor Completion", CIKM, section 3.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["codes_among", "draw_cells", "entities_of", "entity_shares"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_ENUMERATED = 2_000_000  # cells of a tensor that are looked at one by one where it is nearly full
ROUNDS = 50  # of draws at most


def entities_of(table: pd.DataFrame) -> tuple[IntArray, list[pd.Index]]:
    """Codes (n, K) of each column's labels, and the labels by their codes."""
    pairs = [pd.factorize(table[name]) for name in table.columns]
    return np.stack([code for code, _ in pairs], axis=1).astype(np.int64), [pd.Index(labels) for _, labels in pairs]


def codes_among(labels: list[pd.Index], table: pd.DataFrame) -> IntArray:
    """Codes (m, K) among these labels, -1 for others."""
    columns = zip(labels, table.columns, strict=True)
    return np.stack([part.get_indexer(pd.Index(table[name])) for part, name in columns], axis=1).astype(np.int64)


def entity_shares(
    codes: IntArray, importance: FloatArray, sizes: Sequence[int], aggregate: Literal["sum", "mean"]
) -> list[FloatArray]:
    """Each mode's distribution over its entities, (size,); entities without a training cell have 0.

    Parameters
    ----------
    codes : ndarray, shape (n, K), int64
        Entities of the training cells.
    importance : ndarray, shape (n,)
        Not negative. Where no cell has any, all count alike.
    sizes : sequence of int
        Entities of each mode.
    aggregate : {"sum", "mean"}

    Examples
    --------
    >>> codes = np.array([[0, 0], [0, 1], [1, 1]])
    >>> [share.tolist() for share in entity_shares(codes, np.array([1.0, 1.0, 2.0]), (2, 3), "sum")]
    [[0.5, 0.5], [0.25, 0.75, 0.0]]
    """
    given = importance if importance.sum() > 0 else np.ones(len(codes))
    given = given / given.max()  # sums of the largest or smallest floats stay finite and above zero
    shares = []
    for column, size in zip(codes.T, sizes, strict=True):
        total = np.bincount(column, given, size)
        if aggregate == "mean":
            total = total / np.bincount(column, minlength=size).clip(min=1)
        shares.append(total / total.sum())
    return shares


def draw_cells(shares: Sequence[FloatArray], n: int, taken: IntArray, rng: np.random.Generator) -> IntArray:
    """Distinct cells (n or fewer, K) that are not taken, each coordinate drawn from its mode's distribution.

    Draws that repeat or hit a cell that is taken are drawn again. Where the cells of positive probability are few, they
    are enumerated and drawn without replacement: all of them, if there are no more than `n`.

    Parameters
    ----------
    shares : sequence of ndarray
        Each mode's distribution.
    n : int
    taken : ndarray, shape (m, K), int64
    rng : Generator

    Returns
    -------
    ndarray, shape (n or fewer, K), int64
        Fewer where there are not so many free cells, or they are too rare to be found.
    """
    alive = [np.flatnonzero(share) for share in shares]
    volume = float(np.prod([float(len(part)) for part in alive]))
    if volume <= MAX_ENUMERATED and volume < 4 * (n + len(taken)):
        grid = np.stack([part.ravel() for part in np.meshgrid(*alive, indexing="ij")], axis=1)
        free = grid[_new(taken, grid)]
        log_share = sum(np.log(share[column]) for share, column in zip(shares, free.T, strict=True))
        keys = log_share + rng.gumbel(size=len(free))  # the largest n are draws without replacement (Gumbel top-k)
        return free[np.argsort(-keys)[:n]]
    found = np.zeros((0, len(shares)), dtype=np.int64)
    for _ in range(ROUNDS):
        drawn = np.stack([rng.choice(len(share), size=2 * (n - len(found)) + 16, p=share) for share in shares], axis=1)
        found = np.concatenate([found, drawn[_new(np.concatenate([taken, found]), drawn)]])[:n]
        if len(found) == n:
            break
    return found


def _new(taken: IntArray, cells: IntArray) -> npt.NDArray[np.bool_]:
    """Which cells (n,) are not taken and have not come before."""
    both = pd.DataFrame(np.concatenate([taken, cells]))
    fresh: npt.NDArray[np.bool_] = ~both.duplicated().to_numpy()[len(taken) :]
    return fresh
