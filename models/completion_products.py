"""Interactions of all modes at once as a sum of products of factors, by alternating minimization.

A value is an effect of each label and a CP tensor of low rank, ``y = Σk b_k[i_k] + Σr Πk U_k[i_k, r] + e``. Gradients
from a random start hardly find such tensors where few cells are seen; alternating regressions that start from leading
factors of the sparse table do (see `alternating_fit`). Values have mean zero. The ridge, and whether the products help
at all, is chosen on rows held out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from probtensor.comm import Comm
from probtensor.models.alternating_fit import Cells, Problem, Settings, choose_ridge, start_tables, sweeps

__all__ = ["Products", "choose_products", "fit_products"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SETTINGS = Settings(rank=8, solver="cg", effects=True, init="svd", n_inner=10, inner_tol=0.1, max_iter=40, tol=1e-5)
GAIN = 1e-3  # share of the loss that the products must take away
CHUNK = 2**16  # rows whose products are in memory at a time


class Products(NamedTuple):
    """Fitted effects and factors; each table has one row more, of zeros, for an unknown label.

    Attributes
    ----------
    ridge : float
    effects : list of ndarray, shape (size + 1,)
    factors : list of ndarray, shape (size + 1, R)
    """

    ridge: float
    effects: list[FloatArray]
    factors: list[FloatArray]

    def predict(self, labels: IntArray) -> FloatArray:
        """Values (n,) at labels (n, K), -1 for unknown ones."""
        total = np.zeros(len(labels))
        for first in range(0, len(labels), CHUNK):
            part = labels[first : first + CHUNK]
            rows = np.ones((len(part), self.factors[0].shape[1]))
            for column, effect, factor in zip(part.T, self.effects, self.factors, strict=False):
                total[first : first + CHUNK] += effect[column]
                rows *= factor[column]
            total[first : first + CHUNK] += rows.sum(axis=1)
        return total

    def strange(self, labels: IntArray) -> FloatArray:
        """Variance (n,) of what unknown labels bring: as much as the labels that are known differ in."""
        modes = range(len(self.factors))
        variance, some = np.zeros(len(labels)), np.flatnonzero((labels[:, : len(self.factors)] < 0).any(axis=1))
        for first in range(0, len(some), CHUNK):
            rows = some[first : first + CHUNK]
            square = np.ones((len(rows), *2 * self.factors[0].shape[1:]))
            for k in modes:
                column, factor = labels[rows, k], self.factors[k]
                second = factor[:-1].T @ factor[:-1] / max(len(factor) - 1, 1)
                own = factor[column][:, :, None] * factor[column][:, None, :]
                square *= np.where(column[:, None, None] < 0, second, own)
                variance[rows] += np.where(column < 0, np.mean(self.effects[k][:-1] ** 2), 0.0)
            variance[rows] += square.sum(axis=(1, 2))
        return variance


def choose_products(
    labels: IntArray,
    sizes: Sequence[int],
    values: FloatArray,
    weight: FloatArray,
    held_out: npt.NDArray[np.bool_],
    seed: int,
    comm: Comm,
) -> float | None:
    """The ridge of least squared error on rows held out; None where the effects alone are as good.

    Parameters
    ----------
    labels : ndarray, shape (n, K), int64
        -1 for unknown ones, in rows without weight.
    sizes : sequence of int
        Labels of each mode.
    values, weight : ndarray, shape (n,)
    held_out : ndarray, shape (n,), bool
    seed : int
        Of the start, the same on all ranks.
    comm : Comm
        The ranks that share the rows.
    """
    problem = _problem(labels, sizes, values, np.where(held_out, 0.0, weight), comm)
    hidden = _cells(labels, sizes, values, np.where(held_out, weight, 0.0))
    start = start_tables(problem, torch.Generator().manual_seed(seed))
    alone = hidden.values - start._replace(factors=tuple(0 * x for x in start.factors)).predict(hidden.labels)
    assert hidden.weight is not None
    lost, total = comm.sum(torch.stack([(hidden.weight * alone**2).sum(), hidden.weight.sum()])).tolist()
    ridge, _, tried = choose_ridge(problem, start, hidden)
    return ridge if tried[ridge] < (1 - GAIN) * lost / max(total, 1e-300) else None


def fit_products(
    labels: IntArray,
    sizes: Sequence[int],
    values: FloatArray,
    weight: FloatArray,
    ridge: float,
    seed: int,
    comm: Comm,
) -> Products:
    """Effects and factors of the rows that have weight, those of all ranks; parameters as in `choose_products`."""
    problem = _problem(labels, sizes, values, weight, comm)
    start = start_tables(problem, torch.Generator().manual_seed(seed))
    tables = sweeps(problem, start, ridge, SETTINGS.max_iter, SETTINGS.tol).tables
    effects, factors = ([np.append(x.numpy(), 0 * x[:1].numpy(), axis=0) for x in part] for part in reversed(tables))
    return Products(ridge, effects, factors)


def _problem(labels: IntArray, sizes: Sequence[int], values: FloatArray, weight: FloatArray, comm: Comm) -> Problem:
    return Problem.of(_cells(labels, sizes, values, weight), SETTINGS, comm)


def _cells(labels: IntArray, sizes: Sequence[int], values: FloatArray, weight: FloatArray) -> Cells:
    """The rows that have weight."""
    some = weight > 0
    columns = (np.ascontiguousarray(x[some]) for x in (labels[:, : len(sizes)], values, weight))
    at, y, w = (torch.from_numpy(column) for column in columns)
    return Cells(at, y, w, tuple(sizes))
