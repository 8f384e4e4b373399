"""How neural tensor completion is fitted: effects, networks on top of them, and weights between the two kinds.

Rows are dealt to folds by hashes of what they hold, so that it does not matter which rank has them. A member of an
ensemble is trained on all folds but its own, which decides when it stops; predictions of rows by members that have not
seen them choose the weights of the kinds and the width of intervals. Where the user has validation rows, they take the
place of every member's fold, and all other rows train all members.

A network on top of effects is trained on what effects leave of rows that these effects have not seen: effects of a
row's own value would leave too little. So training rows are predicted by effects of the other rows, and neither holds
a row of the member's own fold: what a member learns would otherwise know the held-out values, with the sign reversed.

Binary values and counts go the same way with sums of log odds or logarithms; see `completion_links`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from probtensor.blocks import mixed
from probtensor.calibration import ScaleMixture
from probtensor.comm import Comm
from probtensor.models.completion_effects import (
    Cells,
    Effects,
    choose_feature_strengths,
    choose_strengths,
    fit_effects,
    number_cells,
    start_strengths,
    subsets_of,
)
from probtensor.models.completion_groups import Data, Group, Keeper, head_features, kinds_of, train_group
from probtensor.models.completion_links import curvature, means
from probtensor.models.completion_network import Kind, predict
from probtensor.models.completion_pairs import PairFactors, choose_pairs, fit_pairs
from probtensor.models.completion_products import Products, choose_products, fit_products
from probtensor.models.completion_settings import Settings
from probtensor.models.completion_stacking import HeldOut, Spread

__all__ = ["Fitted", "fit_completion", "link_offset", "moments"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

N_FOLDS = 5  # where there are not more members
MIN_ROWS = 30  # fewer are left to the effects
PAIR_ROWS = 50_000  # as many, of all, choose pairs of modes and strengths of their factors


class Fitted(NamedTuple):
    """Everything that predicts standardised values, counts or binary values.

    Attributes
    ----------
    effects : Effects
        Of all rows; without biases, for the width of intervals only.
    groups : list of Group
    weights : ndarray, shape (C,)
        Of the effects if there are biases, of factors of pairs and of products of all modes if there are any, then of
        each group's weight decays; they sum to one.
    mixture : ScaleMixture
        Of Gaussian values' residuals.
    n_members : int
    likelihood : str
    spread : Spread, or None
        Of other values.
    pairs : PairFactors, or None
        Where products of factors of two modes helped.
    products : Products, or None
        Where products of factors of all modes helped; of three modes or more.
    """

    effects: Effects
    groups: list[Group]
    weights: FloatArray
    mixture: ScaleMixture
    n_members: int
    likelihood: str = "gaussian"
    spread: Spread | None = None
    pairs: PairFactors | None = None
    products: Products | None = None


def fit_completion(
    data: Data,
    settings: Settings,
    device: torch.device,
    report: Callable[[str, int, float], None],
    comm: Comm,
    progress: Keeper,
) -> Fitted:
    """Fit to the rows of all ranks.

    Parameters
    ----------
    data : Data
        Of this rank, which may have no rows.
    settings : Settings
    device : torch.device
        Of the networks.
    report : callable
        Called with a group's name, the epoch and the members' mean loss.
    comm : Comm
    progress : Progress
        Where to go on, and the seed of all that is random.
    """
    labels, values, weight, own = data.labels, data.values, data.weight, data.own
    n, M, likelihood = len(values), settings.n_members, settings.likelihood
    gaussian, seed = likelihood == "gaussian", progress.seed
    subsets, cells, sizes = cells_of(data, settings, comm)
    n_own, n_validation = comm.sum(torch.tensor([int(own.sum()), int((~own).sum())])).tolist()
    small = n_own < MIN_ROWS
    if n_validation:
        unseen = [~own]
    else:
        fold = mixed(data.keys, seed) % max(M, N_FOLDS)
        unseen = [fold == m for m in range(M)]
    strengths = start_strengths(subsets, likelihood)
    if not small:
        strengths = choose_strengths(cells, subsets, values, weight, unseen[0], likelihood)
    if data.sides and not small:
        hidden = {}
        for j, side in enumerate(data.sides):
            part = mixed(labels[:, side.mode].copy(), seed + 1) % N_FOLDS
            hidden[subsets.index((len(data.sizes) + j,))] = [(part == g) & own for g in range(N_FOLDS)]
        strengths = choose_feature_strengths(cells, strengths, values, np.where(own, weight, 0.0), hidden, likelihood)
    live = [s for s, strength in enumerate(strengths) if math.isfinite(strength)]
    cells, strengths = [cells[s] for s in live], [strengths[s] for s in live]

    def parts(held_out: Mask) -> tuple[FloatArray, FloatArray, float]:
        """Each effect (rows held out, S) of the other rows, their variance in multiples of the noise's; the first."""
        left = np.where(held_out, 0.0, weight)
        found, eta = fit_effects(cells, values, left, strengths, likelihood)
        left = left * curvature(likelihood, means(likelihood, eta))
        pieces, variance = np.zeros((int(held_out.sum()), len(cells))), np.zeros(int(held_out.sum()))
        for s, (part, strength) in enumerate(zip(cells, strengths, strict=True)):
            code = part.code[held_out]
            pieces[:, s] = part.of_cells(found[s])[code]
            variance += part.variance(part.add(left), strength)[code]
        return pieces, variance, 0.0 if gaussian else float(found[0][0])

    out = np.zeros(n, dtype=bool) if small else np.any(unseen, axis=0)  # rows that some member has not seen
    pieces, spread = np.zeros((len(unseen), n, len(cells)), dtype=np.float32), np.zeros(n)
    plain = np.zeros(n)
    inner = mixed(data.keys, seed + 2) % N_FOLDS
    for f, left_out in enumerate([] if small else unseen):
        pieces[f, left_out], spread[left_out], intercept = parts(left_out)
        plain[left_out] = pieces[f, left_out].sum(axis=1)
        if not gaussian:
            pieces[f, ~left_out, 0] = intercept
        for g in range(N_FOLDS if settings.biases else 0):
            held_out = left_out | (inner == g)
            pieces[f, held_out & ~left_out] = parts(held_out)[0][~left_out[held_out]]
    candidates = [plain] if settings.biases else []
    pairs, products = None, None
    if settings.biases and settings.interactions and settings.rank and gaussian and not small:
        pairs, paired = _pairs(data, unseen, comm, seed)
        candidates += [] if pairs is None else [paired]
        products, multiplied = _products(data, unseen, comm, seed)
        candidates += [] if products is None else [multiplied]
    groups = []
    if not small:
        for number, (name, on_effects, rank, head) in enumerate(kinds_of(settings, len(data.sizes))):
            n_features = (len(cells) if on_effects and head else 0) + (data.smooth.shape[1] if head else 0)
            kind = Kind(data.sizes, rank, head, settings.width, settings.hidden, n_features)
            group, added = train_group(
                number, name, kind, on_effects, data, unseen, pieces, settings, device, report, comm, progress
            )
            groups.append(group)
            candidates += added
    elif not candidates:
        candidates = [plain]
    train_weight = np.where(own, weight, 0.0)
    found, fitted = fit_effects(cells, values, train_weight, strengths, likelihood)
    rows = own if small else out
    everywhere = [values, weight, spread, fitted if small else plain, mixed(data.keys, seed - 1) / 2.0**63, *candidates]
    table = _gather(everywhere, rows, comm)
    held_out = HeldOut(table[0], table[1], table[2], table[3], table[4], table[5:].T, small, n_own)
    noise = held_out.noise() if gaussian else 1.0
    bent = train_weight * curvature(likelihood, means(likelihood, fitted))
    totals = [
        part.add(bent) if part.design is None else 1 / part.variance(part.add(bent), strength) - strength
        for part, strength in zip(cells, strengths, strict=True)
    ]
    found = [part.of_cells(effect) for part, effect in zip(cells, found, strict=True)]
    chosen, known = tuple(subsets[s] for s in live), [part.known for part in cells]
    effects = Effects(chosen, sizes, known, found, totals, tuple(strengths), noise)
    weights, mixture, scatter = held_out.combine(noise, likelihood)
    return Fitted(effects, groups, weights, mixture, M, likelihood, scatter, pairs, products)


def _pairs(data: Data, unseen: list[Mask], comm: Comm, seed: int) -> tuple[PairFactors | None, FloatArray]:
    """Factors of pairs of modes, if they help, and what those of the other rows predict of rows held out, (n,)."""
    labels, weight, predicted = data.labels[:, : len(data.sizes)], data.weight, np.zeros(len(data.values))
    total = int(comm.sum(torch.tensor([len(weight)]))[0])
    few = mixed(data.keys, seed + 4) / 2.0**63 < PAIR_ROWS / max(total, 1)  # enough to choose by
    chosen = choose_pairs(labels[few], data.sizes, data.values[few], weight[few], unseen[0][few], seed % 2**32, comm)
    if not chosen[0]:
        return None, predicted

    def fit(rows: Mask) -> PairFactors:
        left = np.where(rows, weight, 0.0)
        return fit_pairs(labels, data.sizes, data.values, left, *chosen, seed % 2**32, comm)

    for left_out in unseen:
        predicted[left_out] = fit(data.own & ~left_out).predict(labels[left_out])
    return fit(data.own), predicted


def _products(data: Data, unseen: list[Mask], comm: Comm, seed: int) -> tuple[Products | None, FloatArray]:
    """Products of factors of all modes, if they help, and what those of other rows predict of rows held out, (n,)."""
    predicted = np.zeros(len(data.values))
    if len(data.sizes) < 3:
        return None, predicted
    given, number = (data.labels, data.sizes, data.values), seed % 2**32
    ridge = choose_products(*given, data.weight, unseen[0], number, comm)
    if ridge is None:
        return None, predicted

    def fit(rows: Mask) -> Products:
        return fit_products(*given, np.where(rows, data.weight, 0.0), ridge, number, comm)

    for left_out in unseen:
        predicted[left_out] = fit(data.own & ~left_out).predict(data.labels[left_out])
    return fit(data.own), predicted


def cells_of(
    data: Data, settings: Settings, comm: Comm
) -> tuple[tuple[tuple[int, ...], ...], list[Cells], tuple[int, ...]]:
    """Subsets of modes, an intercept first where there is one and then features; their cells; sizes of all columns."""
    K = len(data.sizes)
    subsets = subsets_of(K) if settings.biases and settings.interactions else subsets_of(2)[:0]
    subsets = subsets or tuple((mode,) for mode in range(K))
    of_sides = tuple((K + j,) for j in range(len(data.sides)))
    subsets = (*(() if settings.likelihood == "gaussian" else ((),)), *of_sides, *subsets)
    sizes = (*data.sizes, *(len(side.table) for side in data.sides))
    cells = [
        number_cells(data.labels, subset, sizes, comm)
        if subset not in of_sides
        else Cells(np.arange(sizes[subset[0]]), data.labels[:, subset[0]], data.sides[subset[0] - K].table, comm)
        for subset in subsets
    ]
    return subsets, cells, sizes


def _gather(columns: list[FloatArray], rows: Mask, comm: Comm) -> FloatArray:
    """Columns (c, m) at some rows of all ranks."""
    mine = np.stack(columns, axis=1)[rows]
    parts = [np.frombuffer(data).reshape(-1, len(columns)) for data in comm.gather_bytes(mine.tobytes())]
    return np.ascontiguousarray(np.concatenate(parts).T)


def moments(
    fitted: Fitted, labels: IntArray, smooth: FloatArray, biases: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Predictors (n,) at labels (n, K + n_sides), -1 for unknown ones, and the variances of these (n,).

    The first variance is the model's, to be calibrated; the second is what unknown labels add, which rows held out
    hardly show.
    """
    pieces, variance, strange = fitted.effects.pieces(labels)
    plain = pieces.sum(axis=1)
    candidates = [plain] if biases or not fitted.groups else []
    if fitted.pairs is not None:
        candidates.append(fitted.pairs.predict(labels))
        strange = np.maximum(strange, fitted.pairs.strange(labels))
    if fitted.products is not None:
        candidates.append(fitted.products.predict(labels))
        strange = np.maximum(strange, fitted.products.strange(labels))
    for group in fitted.groups:
        device = group.parameters["bias"].device
        features = head_features(group.kind, group.on_effects, pieces[None].astype(np.float32), smooth, device)
        at = torch.from_numpy(labels[:, : len(group.kind.sizes)]).to(device)
        added = predict(group.kind, group.parameters, at, features)
        averaged = added.double().cpu().numpy().reshape(-1, fitted.n_members, len(labels)).mean(axis=1)
        candidates += list(averaged + link_offset(fitted, group, pieces))
    return fitted.weights @ np.stack(candidates), variance, strange


def link_offset(fitted: Fitted, group: Group, pieces: FloatArray) -> FloatArray:
    """What the members of a group add to, (n,): the effects, an intercept or nothing."""
    if group.on_effects:
        return np.asarray(pieces.sum(axis=1))
    return np.zeros(len(pieces)) if fitted.likelihood == "gaussian" else pieces[:, 0]
