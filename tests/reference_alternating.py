"""Alternating minimization, row by row and densely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def design(factors: Sequence[np.ndarray], labels: np.ndarray, mode: int, effects: bool) -> np.ndarray:
    """What multiplies a mode's factors (and its effect) in each cell, (n, R) or (n, R + 1)."""
    n, R = len(labels), factors[0].shape[1]
    rows = np.ones((n, R + effects))
    for cell in range(n):
        for other, factor in enumerate(factors):
            if other != mode:
                rows[cell, :R] *= factor[labels[cell, other]]
    return rows


def predict(factors: Sequence[np.ndarray], effects: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The whole tensor, and its entries at the labels, (n,)."""
    letters = "abcdef"[: len(factors)]
    tensor = np.einsum(",".join(letter + "r" for letter in letters) + "->" + letters, *factors)
    for mode, effect in enumerate(effects):
        tensor = tensor + effect.reshape([-1 if k == mode else 1 for k in range(len(factors))])
    return tensor[tuple(labels.T)]


def regressions(
    factors: Sequence[np.ndarray],
    effects: Sequence[np.ndarray],
    labels: np.ndarray,
    values: np.ndarray,
    weight: np.ndarray,
    mode: int,
    penalty: np.ndarray,
) -> np.ndarray:
    """A mode's factors and effects (size, R + 1) given the others': a ridge regression for each label by itself."""
    z = design(factors, labels, mode, effects=True)
    rest = values - sum(effects[k][labels[:, k]] for k in range(len(factors)) if k != mode)
    table = np.zeros((len(factors[mode]), z.shape[1]))
    for label in range(len(table)):
        own = labels[:, mode] == label
        normal = z[own].T @ np.diag(weight[own]) @ z[own] + np.diag(penalty)
        table[label] = np.linalg.solve(normal, z[own].T @ (weight[own] * rest[own]))
    return table
