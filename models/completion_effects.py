"""Effects of single labels, pairs of labels and so on: ridge regression in closed form, by sweeps.

A value is the sum of one effect for each subset ``S`` of modes: ``y = sum_S b_S[cell of S] + e``, where a cell of ``S``
is a combination of labels of its modes. Effects are ``N(0, sigma^2 / strength_S)`` and the noise ``e`` is
``N(0, sigma^2)``: a cell of weight ``n`` keeps ``n / (n + strength_S)`` of its deviation, and one that was never seen
has none and falls back on the smaller subsets. Strengths are chosen on rows held out; an infinite one drops the subset.

Where values are binary or counts, the sum is the predictor of `completion_links`, with an intercept, the effect of the
empty subset, that is hardly shrunk; effects are ``N(0, 1 / strength_S)``. The sweeps are then those of iteratively
reweighted least squares, with weights renewed at each subset: Newton's step for one subset after the other.

References
----------
Hastie, Tibshirani (1990), "Generalized Additive Models", chapter 5, for backfitting. Searle, Casella, McCulloch (1992),
"Variance Components", for shrinkage in crossed classifications. Green (1984), "Iteratively Reweighted Least Squares for
Maximum Likelihood Estimation, and some Robust and Resistant Alternatives", JRSS B 46.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from probtensor.comm import Comm, Serial
from probtensor.models.completion_links import curvature, deviance, link, means

__all__ = [
    "Effects",
    "choose_strengths",
    "fit_effects",
    "number_cells",
    "start_effects",
    "start_strengths",
    "subsets_of",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_ORDER = 3  # modes in a subset at most, where there are few modes
MANY_MODES = 5  # with more, pairs at most: the number of subsets grows with the order's power
START = {0: 1e-3, 1: 3.0, 2: 10.0, 3: 10.0}  # strengths that the search starts from, by the number of modes
START_LINK = {0: 1e-3, 1: 1.0, 2: 1.0, 3: 3.0}  # of effects on log odds and logarithms, whose unit is known
STEP = 3.0  # factor between strengths that are tried
SWEEPS, TRIAL_SWEEPS, PASSES = 20, 3, 4
LINK_PASSES = 8
FEATURE_STRENGTHS = 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, math.inf
TOO_STRONG = 1e4  # such effects are none
LONGEST = 1.0  # step of an effect on log odds and logarithms: beyond, Newton's parabola is none


class Cells(NamedTuple):
    """Cells of one subset: sorted numbers of those with a row (C,), and where each row is among them (n,).

    With a `design` (C, p), the features of each cell, their effects are ``design @ coefficients``, and it is the
    coefficients that are shrunk: those of the p columns take the place of effects wherever these are solved for.

    Cells are those of the rows of all ranks, and sums are over these.
    """

    known: IntArray
    code: IntArray
    design: FloatArray | None = None
    comm: Comm = Serial()

    def start(self) -> FloatArray:
        """No effects."""
        return np.zeros(len(self.known) if self.design is None else self.design.shape[1])

    def of_cells(self, effects: FloatArray) -> FloatArray:
        """The effect of each cell, (C,)."""
        return effects if self.design is None else np.asarray(self.design @ effects)

    def add(self, numbers: FloatArray) -> FloatArray:
        """Sum over the rows (n,) of each cell, (C,)."""
        mine = np.bincount(self.code, numbers, len(self.known)).astype(np.float64)
        return np.asarray(self.comm.sum(torch.from_numpy(mine)).numpy())

    def step(self, pull: FloatArray, effects: FloatArray, total: FloatArray, strength: float) -> FloatArray:
        """How far effects move to the optimum, from sums over the rows of each cell: errors and weights (C,)."""
        if self.design is None:
            return np.asarray((pull - strength * effects) / (total + strength))
        slope = self.design.T @ pull - strength * effects
        return np.asarray(np.linalg.solve(self._normal(total, strength), slope), dtype=np.float64)

    def variance(self, total: FloatArray, strength: float) -> FloatArray:
        """Variance of each cell's effect, (C,), in multiples of the noise's."""
        if self.design is None:
            return np.asarray(1 / (total + strength))
        inverse = np.linalg.inv(self._normal(total, strength))
        return np.asarray(np.einsum("cp,pq,cq->c", self.design, inverse, self.design))

    def _normal(self, total: FloatArray, strength: float) -> FloatArray:
        assert self.design is not None
        return np.asarray(self.design.T @ (total[:, None] * self.design) + strength * np.eye(self.design.shape[1]))


class Effects(NamedTuple):
    """Fitted effects.

    Attributes
    ----------
    subsets : tuple of tuple of int
        Modes of each subset.
    sizes : tuple of int
        Labels of each mode.
    known : list of ndarray, shape (C_S,), int64
        Sorted numbers of the cells that have an effect.
    effects, weights : list of ndarray, shape (C_S,)
        Effects, and the summed weights of the rows they are made of.
    strengths : tuple of float
        Finite.
    noise_variance : float
        ``sigma^2``; 1 for effects on log odds and logarithms, whose `weights` are summed curvatures.
    """

    subsets: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    known: list[IntArray]
    effects: list[FloatArray]
    weights: list[FloatArray]
    strengths: tuple[float, ...]
    noise_variance: float

    def pieces(self, positions: IntArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Each effect (n, S) at positions (n, K), -1 for an unknown label, and variances (n,) of their sum.

        The first variance is that of cells of known labels, the second that of what unknown labels bring.
        """
        found, variance = np.zeros((len(positions), len(self.subsets))), np.zeros(len(positions))
        strange = np.zeros(len(positions))
        for s, (subset, known, strength) in enumerate(zip(self.subsets, self.known, self.strengths, strict=True)):
            number = _numbers(positions, subset, self.sizes)
            at = np.searchsorted(known, number).clip(max=len(known) - 1)
            seen = (known[at] == number) & (number >= 0)
            found[:, s] = np.where(seen, self.effects[s][at], 0.0)
            prior = self.noise_variance / strength
            weight = np.where(seen, self.weights[s][at], 0.0)
            variance += np.where(number >= 0, self.noise_variance / (weight + strength), 0.0)
            if len(subset) == 1:  # where labels have many rows, held-out rows hardly tell strengths apart
                prior = max(prior, float(np.mean(self.effects[s] ** 2)))
            strange += np.where(number < 0, prior, 0.0)
        return found, variance, strange


def subsets_of(n_modes: int) -> tuple[tuple[int, ...], ...]:
    """Subsets of modes that get effects, single modes first; all modes together are left to the noise.

    Examples
    --------
    >>> subsets_of(3)
    ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    >>> len(subsets_of(4)), len(subsets_of(5)), len(subsets_of(6))
    (14, 25, 21)
    """
    order = min(n_modes - 1, MAX_ORDER if n_modes <= MANY_MODES else 2)
    orders = range(1, max(order, 1) + 1)
    return tuple(subset for size in orders for subset in combinations(range(n_modes), size))


def number_cells(positions: IntArray, subset: Sequence[int], sizes: Sequence[int], comm: Comm | None = None) -> Cells:
    """The cells of a subset that rows at positions (n, K), of any rank, are in."""
    comm = Serial() if comm is None else comm
    numbers = _numbers(positions, subset, sizes)
    known, code = np.unique(numbers, return_inverse=True)
    if comm.size > 1:
        parts = comm.gather_bytes(known.tobytes())
        known = np.unique(np.concatenate([np.frombuffer(part, dtype=np.int64) for part in parts]))
        code = np.searchsorted(known, numbers)
    return Cells(known, code.ravel().astype(np.int64), None, comm)


def total_of(cells: Sequence[Cells], numbers: Sequence[float]) -> list[float]:
    """Sums of numbers over the ranks."""
    summed: list[float] = cells[0].comm.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return summed


def start_effects(
    cells: Sequence[Cells], values: FloatArray, weight: FloatArray, likelihood: str = "gaussian"
) -> tuple[list[FloatArray], FloatArray]:
    """No effects but an intercept, where there is one, and the state that `sweep` starts from."""
    effects = [part.start() for part in cells]
    if likelihood == "gaussian":
        return effects, values
    n, total = total_of(cells, [float(weight.sum()), float(weight @ values)])
    intercept = link(likelihood, total / max(n, 1.0), max(n, 1.0))
    effects[0][:] = intercept
    return effects, np.full(len(values), intercept)


def sweep(
    cells: Sequence[Cells],
    effects: list[FloatArray],
    state: FloatArray,
    weight: FloatArray,
    strengths: Any,
    n: int,
    values: FloatArray | None = None,
    likelihood: str = "gaussian",
) -> tuple[list[FloatArray], FloatArray]:
    """Effects after n sweeps of backfitting, and their state, (n_rows,).

    Parameters
    ----------
    cells : sequence of Cells
        One a subset.
    effects : list of ndarray, shape (C_S,)
        To start from.
    state : ndarray, shape (n_rows,)
        Of Gaussian values, what these effects leave of them; else the predictor, the effects' sum.
    weight : ndarray, shape (n_rows,)
        Zero for rows held out.
    strengths : sequence of float
    n : int
    values : ndarray, shape (n_rows,), optional
        Where they are not Gaussian.
    likelihood : str, default "gaussian"
    """
    effects, state = list(effects), state.copy()
    known = state if values is None else values
    gaussian = likelihood == "gaussian"
    sign = -1.0 if gaussian else 1.0
    totals = [part.add(weight) for part in cells] if gaussian else []
    for _ in range(n):
        moved = 0.0
        for s, (part, strength) in enumerate(zip(cells, strengths, strict=True)):
            if math.isinf(strength):
                if effects[s].any():
                    state -= sign * part.of_cells(effects[s])[part.code]
                    effects[s] = np.zeros_like(effects[s])
                continue
            if gaussian:
                error, total = state, totals[s]
            else:
                mean = means(likelihood, state)
                error = known - mean
                total = part.add(weight * curvature(likelihood, mean))
            step = part.step(part.add(weight * error), effects[s], total, strength)
            if not gaussian:
                step = step.clip(-LONGEST, LONGEST)
            effects[s] = effects[s] + step
            state += sign * part.of_cells(step)[part.code]
            moved = max(moved, float(np.abs(step).max(initial=0.0)))
        if moved < 1e-5:
            break
    return effects, state


def start_strengths(subsets: Sequence[tuple[int, ...]], likelihood: str = "gaussian") -> list[float]:
    """Strengths that are believed before anything is known."""
    start = START if likelihood == "gaussian" else START_LINK
    return [start[len(subset)] for subset in subsets]


def choose_strengths(
    cells: Sequence[Cells],
    subsets: Sequence[tuple[int, ...]],
    values: FloatArray,
    weight: FloatArray,
    held_out: npt.NDArray[np.bool_],
    likelihood: str = "gaussian",
) -> list[float]:
    """Strengths of least deviance on rows held out, by one after the other, up, down or out.

    Those of an intercept and of features stay as they are.

    Parameters
    ----------
    cells : sequence of Cells
        One a subset.
    subsets : sequence of tuple of int
    values, weight : ndarray, shape (n,)
    held_out : ndarray, shape (n,), bool
    likelihood : str, default "gaussian"

    Returns
    -------
    list of float
        Infinite where a subset does not help.
    """
    train, test = np.where(held_out, 0.0, weight), np.where(held_out, weight, 0.0)
    strengths = start = start_strengths(subsets, likelihood)

    def run(effects: list[FloatArray], state: FloatArray, trial: list[float], n: int) -> Any:
        return sweep(cells, effects, state, train, trial, n, values, likelihood)

    gaussian = likelihood == "gaussian"

    def loss_of(state: FloatArray) -> float:
        return total_of(cells, [float(test @ deviance(likelihood, state, 0.0 if gaussian else values))])[0]

    effects, state = run(*start_effects(cells, values, train, likelihood), strengths, SWEEPS)
    best = loss_of(state)
    for _ in range(PASSES if likelihood == "gaussian" else LINK_PASSES):
        before = best
        for s in reversed(range(len(cells))):
            if not subsets[s] or cells[s].design is not None:
                continue
            now = strengths[s]
            tried = [start[s]] if math.isinf(now) else [now * STEP, now / STEP, math.inf]
            for strength in tried:
                trial = [*strengths[:s], strength, *strengths[s + 1 :]]
                found = run(effects, state, trial, TRIAL_SWEEPS)
                loss = loss_of(found[1])
                if loss < best * (1 - 1e-5):
                    best, strengths, (effects, state) = loss, trial, found
        if best > before * (1 - 1e-3):
            break
    return [math.inf if strength > TOO_STRONG else strength for strength in strengths]


def choose_feature_strengths(
    cells: Sequence[Cells],
    strengths: list[float],
    values: FloatArray,
    weight: FloatArray,
    hidden: Mapping[int, Sequence[npt.NDArray[np.bool_]]],
    likelihood: str = "gaussian",
) -> list[float]:
    """Strengths of subsets with features, the others as they are, of least deviance on rows of labels held out.

    Rows of labels that have other rows hardly need features; those of labels without any have little else.

    Parameters
    ----------
    cells, strengths, values, weight
        See `choose_strengths`.
    hidden : mapping of int to sequence of ndarray of bool, shape (n,)
        Rows of some labels, and then those of others, by the subset that has features of the labels.
    likelihood : str, default "gaussian"

    Returns
    -------
    list of float
        Infinite where features do not help.
    """
    strengths = list(strengths)
    for s, folds in hidden.items():
        losses = np.zeros(len(FEATURE_STRENGTHS))
        for rows in folds:
            train, test = np.where(rows, 0.0, weight), np.where(rows, weight, 0.0)
            if min(total_of(cells, [float(train.sum()), float(test.sum())])) == 0:
                continue
            effects, state = start_effects(cells, values, train, likelihood)
            for i, strength in enumerate(FEATURE_STRENGTHS):
                trial, n = [*strengths[:s], strength, *strengths[s + 1 :]], TRIAL_SWEEPS if i else SWEEPS
                effects, state = sweep(cells, effects, state, train, trial, n, values, likelihood)
                lost = deviance(likelihood, state, 0.0 if likelihood == "gaussian" else values)
                losses[i] += total_of(cells, [float(test @ lost)])[0]
        strengths[s] = FEATURE_STRENGTHS[int(np.argmin(losses))]
    return strengths


def fit_effects(
    cells: Sequence[Cells],
    values: FloatArray,
    weight: FloatArray,
    strengths: Sequence[float],
    likelihood: str = "gaussian",
) -> tuple[list[FloatArray], FloatArray]:
    """Effects of each subset, and their sum at each row, held out or not, (n,)."""
    effects, start = start_effects(cells, values, weight, likelihood)
    effects, state = sweep(cells, effects, start, weight, strengths, SWEEPS, values, likelihood)
    return effects, values - state if likelihood == "gaussian" else state


def _numbers(positions: IntArray, subset: Sequence[int], sizes: Sequence[int]) -> IntArray:
    """Number (n,) of the cell of each row; -1 where a label of the subset is unknown."""
    number = np.zeros(len(positions), dtype=np.int64)
    for mode in subset:
        number = number * sizes[mode] + positions[:, mode]
    return np.where((positions[:, list(subset)] < 0).any(axis=1), -1, number)
