"""Components by definition: the best core by one least-squares problem, the best alignment among all there are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np


def core_consistency_by_kronecker(tensor: np.ndarray, factors: Sequence[np.ndarray]) -> float:
    """The core G of the smallest ``|vec X - (A ⊗ B ⊗ …) vec G|``, and its distance from the superdiagonal of ones."""
    rank, K = factors[0].shape[1], len(factors)
    length = functools.reduce(np.multiply, [np.linalg.norm(A, axis=0) for A in factors])
    even = [A / np.linalg.norm(A, axis=0) * length ** (1 / K) for A in factors]
    G = np.linalg.lstsq(functools.reduce(np.kron, even), tensor.ravel(), rcond=None)[0].reshape((rank,) * K)
    total = 0.0
    for index in itertools.product(range(rank), repeat=K):
        total += (G[index] - float(len(set(index)) == 1)) ** 2
    return 100.0 * (1.0 - total / rank)


def alignments(factors: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """All permutations and signs that leave the tensor of a CP model as it is."""
    K, rank = len(factors), factors[0].shape[1]
    even = [signs for signs in itertools.product((1.0, -1.0), repeat=K) if np.prod(signs) > 0]
    return [
        (order, np.array(signs).T)
        for order in itertools.permutations(range(rank))
        for signs in itertools.product(even, repeat=rank)
    ]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
