"""Interactions of pairs of modes as products of a few factors, by alternating ridge regression.

A value is a mean, an effect of each label, and for some pairs ``(a, b)`` of modes the product of their labels'
factors: ``y = m + sum_k b_k[i_k] + sum_(a,b) u_ab[i_a] . v_ab[i_b] + e``. Unlike an effect of each pair of labels, this
foretells pairs of labels that were never seen together. Effects and factors are normal with variance ``sigma^2 /
strength``; given all others, those of one mode are a ridge regression for each label, in closed form. Which pairs there
are, and their strengths, is chosen on rows held out.

References
----------
Koren, Bell, Volinsky (2009), "Matrix Factorization Techniques for Recommender Systems", Computer 42, for biases beside
factors. Zhou, Wilkinson, Schreiber, Pan (2008), "Large-scale Parallel Collaborative Filtering for the Netflix Prize",
AAIM, for alternating ridge regressions.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array

from probtensor.comm import Comm

__all__ = ["PairFactors", "choose_pairs", "fit_pairs"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Pair = tuple[int, int]

RANK = 4  # factors of each pair; the strengths decide how much of them is used
SINGLE, START, STEP = 3.0, 1.0, 3.0  # strength of effects; of factors, at first; factor between those that are tried
LEAST, MOST = 0.01, 300.0  # stronger is nothing
SWEEPS, TRIAL_SWEEPS = 20, 12
GAIN = 1e-3  # share of the loss that a pair must take away
CHUNK = 2**19  # rows whose products are in memory at a time


class PairFactors(NamedTuple):
    """Fitted effects and factors; each table has one row more, of zeros, for an unknown label.

    Attributes
    ----------
    pairs : tuple of (int, int)
    strengths : tuple of float
        Of the pairs' factors.
    mean : float
    singles : list of ndarray, shape (size + 1,)
        Effects of each mode's labels.
    factors : list of ndarray, shape (size + 1, R)
        Those of the first pair's first mode and its second, then those of the next pair.
    """

    pairs: tuple[Pair, ...]
    strengths: tuple[float, ...]
    mean: float
    singles: list[FloatArray]
    factors: list[FloatArray]

    def predict(self, labels: IntArray) -> FloatArray:
        """Values (n,) at labels (n, K), -1 for unknown ones."""
        total = np.full(len(labels), self.mean)
        for column, effect in zip(labels.T, self.singles, strict=False):
            total += effect[column]
        for p, (a, b) in enumerate(self.pairs):
            total += np.einsum("nr,nr->n", self.factors[2 * p][labels[:, a]], self.factors[2 * p + 1][labels[:, b]])
        return total

    def strange(self, labels: IntArray) -> FloatArray:
        """Variance (n,) of what unknown labels bring: as much as the labels that are known differ in."""
        variance = np.zeros(len(labels))
        for column, effect in zip(labels.T, self.singles, strict=False):
            variance += np.where(column < 0, np.mean(effect[:-1] ** 2), 0.0)
        for p, (a, b) in enumerate(self.pairs):
            left, right = self.factors[2 * p], self.factors[2 * p + 1]
            square = [part[:-1].T @ part[:-1] / (len(part) - 1) for part in (left, right)]
            for column, other, own, given in ((a, b, square[0], right), (b, a, square[1], left)):
                known = np.einsum("nr,rs,ns->n", given, own, given)
                known[-1] = np.sum(square[0] * square[1])  # both labels are unknown
                part = np.where(labels[:, column] < 0, known[labels[:, other]], 0.0)
                variance += np.where(labels[:, other] < 0, 0.5 * part, part)
        return variance


def fit_pairs(
    labels: IntArray,
    sizes: Sequence[int],
    values: FloatArray,
    weight: FloatArray,
    pairs: Sequence[Pair],
    strengths: Sequence[float],
    seed: int,
    comm: Comm,
    *,
    n_sweeps: int = SWEEPS,
    start: PairFactors | None = None,
) -> PairFactors:
    """Effects and factors after some sweeps over all of them.

    Parameters
    ----------
    labels : ndarray, shape (n, K), int64
        -1 for unknown ones, in rows without weight. Sums are over the rows of all ranks.
    sizes : sequence of int
        Labels of each mode.
    values, weight : ndarray, shape (n,)
        Weight zero for rows held out.
    pairs : sequence of (int, int)
    strengths : sequence of float
        One a pair.
    seed : int
        Of the factors' start, the same on all ranks.
    comm : Comm
    n_sweeps : int
    start : PairFactors, optional
        To go on from, for the pairs that it has.
    """
    sums = [_Sums(column, size, weight, comm) for column, size in zip(labels.T, sizes, strict=False)]
    total = sums[0].add(np.stack([values, np.ones(len(values))], axis=1)).sum(axis=0)
    mean = float(total[0] / max(total[1], 1e-300)) if start is None else start.mean
    singles = [np.zeros(size + 1) for size in sizes] if start is None else [effect.copy() for effect in start.singles]
    counts = [part.add(np.ones((len(values), 1)))[:, 0] for part in sums]
    rng, factors = np.random.default_rng(seed), list[FloatArray]()
    for pair in combinations(range(len(sizes)), 2):  # each pair's start is the same, whichever others there are
        drawn = [0.1 * rng.normal(size=(sizes[mode] + 1, RANK)) for mode in pair]
        if pair in pairs:
            known = start is not None and pair in start.pairs
            at = 2 * start.pairs.index(pair) if start is not None and known else 0
            factors += start.factors[at : at + 2] if start is not None and known else drawn
    found = PairFactors(tuple(pairs), tuple(strengths), mean, singles, [part.copy() for part in factors])
    for part in found.factors:
        part[-1] = 0
    left = values - found.predict(labels)
    for _ in range(n_sweeps):
        for column, mode, effect, count in zip(labels.T, sums, singles, counts, strict=False):
            step = (mode.add(left[:, None])[:, 0] - SINGLE * effect) / (count + SINGLE)
            effect += step
            left -= step[column]
        for p, (pair, strength) in enumerate(zip(pairs, strengths, strict=True)):
            for side in (0, 1):
                own, other = found.factors[2 * p + side], found.factors[2 * p + 1 - side]
                code, given = labels[:, pair[side]], other[labels[:, pair[1 - side]]]
                left += np.einsum("nr,nr->n", own[code], given)
                right, gram = sums[pair[side]].regression(given, left)
                own[:] = np.linalg.solve(gram + strength * np.eye(RANK), right[..., None])[..., 0]
                left -= np.einsum("nr,nr->n", own[code], given)
    return found


def choose_pairs(
    labels: IntArray,
    sizes: Sequence[int],
    values: FloatArray,
    weight: FloatArray,
    held_out: npt.NDArray[np.bool_],
    seed: int,
    comm: Comm,
) -> tuple[list[Pair], list[float]]:
    """Pairs of modes, and strengths of their factors, of least squared error on rows held out: one after the other.

    Parameters
    ----------
    labels, sizes, values, weight, seed, comm
        See `fit_pairs`.
    held_out : ndarray, shape (n,), bool
    """
    train, test = np.where(held_out, 0.0, weight), np.where(held_out, weight, 0.0)

    def run(pairs: list[Pair], strengths: list[float], start: PairFactors | None) -> tuple[float, PairFactors]:
        found = fit_pairs(
            labels, sizes, values, train, pairs, strengths, seed, comm, n_sweeps=TRIAL_SWEEPS, start=start
        )
        lost = float(test @ (values - found.predict(labels)) ** 2)
        return float(comm.sum(torch.tensor([lost]).double())), found

    pairs, strengths = list[Pair](), list[float]()
    best, kept = run(pairs, strengths, None)
    alone = [(run([pair], [START], kept)[0], pair) for pair in combinations(range(len(sizes)), 2)]
    for loss, pair in sorted(alone):
        if loss >= best * (1 - GAIN) and not pairs:
            break
        tried = sorted([*pairs, pair])
        trial = [strengths[pairs.index(x)] if x in pairs else START for x in tried]
        loss, found = run(tried, trial, kept)
        if loss < best * (1 - GAIN):
            best, kept, pairs, strengths = loss, found, tried, trial
    for p in range(len(pairs)):
        for step in (STEP, 1 / STEP):
            while LEAST <= strengths[p] * step <= MOST:
                trial = [*strengths[:p], strengths[p] * step, *strengths[p + 1 :]]
                loss, found = run(pairs, trial, kept)
                if loss >= best * (1 - 1e-4):
                    break
                best, kept, strengths = loss, found, trial
    return pairs, strengths


class _Sums:
    """Sums over the rows of each label of a mode, weighted, of all ranks."""

    def __init__(self, code: IntArray, size: int, weight: FloatArray, comm: Comm) -> None:
        self._comm, self._size = comm, size + 1
        at = np.where(code < 0, size, code)
        self._parts = [
            csr_array(
                (weight[i : i + CHUNK], (at[i : i + CHUNK], np.arange(len(at[i : i + CHUNK])))),
                shape=(self._size, len(at[i : i + CHUNK])),
            )
            for i in range(0, max(len(code), 1), CHUNK)
        ]

    def add(self, columns: FloatArray) -> FloatArray:
        """Sums (size + 1, c) of columns (n, c)."""
        mine = np.zeros((self._size, columns.shape[1]))
        for number, part in enumerate(self._parts):
            mine += part @ columns[number * CHUNK : (number + 1) * CHUNK]
        return np.asarray(self._comm.sum(torch.from_numpy(mine)).numpy())

    def regression(self, given: FloatArray, target: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Of each label, sums of `given` (n, R) times the target (n,), and of its products with itself."""
        R, upper = given.shape[1], np.triu_indices(given.shape[1])
        mine = np.zeros((self._size, R + len(upper[0])))
        for number, part in enumerate(self._parts):
            rows = slice(number * CHUNK, (number + 1) * CHUNK)
            x = given[rows]
            mine += part @ np.concatenate([x * target[rows, None], x[:, upper[0]] * x[:, upper[1]]], axis=1)
        summed = np.asarray(self._comm.sum(torch.from_numpy(mine)).numpy())
        gram = np.zeros((self._size, R, R))
        gram[:, upper[0], upper[1]] = gram[:, upper[1], upper[0]] = summed[:, R:]
        return summed[:, :R], gram
