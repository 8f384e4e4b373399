"""How neural tensor completion is fitted: effects, networks on top of them, and weights between the two kinds.

Rows are dealt to folds. A member of an ensemble is trained on all folds but its own, which decides when it stops;
predictions of rows by members that have not seen them choose the weights of the kinds and the width of intervals. Where
the user has validation rows, they take the place of every member's fold, and all other rows train all members.

A network on top of effects is trained on what effects leave of rows that these effects have not seen: effects of a
row's own value would leave too little. So training rows are predicted by effects of the other rows, and neither holds
a row of the member's own fold: what a member learns would otherwise know the held-out values, with the sign reversed.

Binary values and counts go the same way with sums of log odds or logarithms; see `completion_links`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probtensor.calibration import ScaleMixture
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
from probtensor.models.completion_links import curvature, means
from probtensor.models.completion_network import Kind, Parameters, Rows, fill_unknown, initial, predict, train
from probtensor.models.completion_settings import Settings
from probtensor.models.completion_side import Side
from probtensor.models.completion_stacking import LEAST_VARIANCE, Spread, calibrate, calibrate_discrete, stack

__all__ = ["Fitted", "Group", "fit_completion", "head_features", "link_offset", "moments"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

N_FOLDS = 5  # where there are not more members
MIN_ROWS = 30  # fewer are left to the effects


class Group(NamedTuple):
    """Members of one kind: those of the first weight decay, one a fold, then those of the next.

    Attributes
    ----------
    name : str
    kind : Kind
    on_effects : bool
        Whether they add to the effects; the head then has each effect among its inputs.
    parameters : dict of str to Tensor, members first
    best_epoch : tuple of int
    history : Tensor, shape (epochs + 1, members)
        Mean deviance, the squared error of Gaussian values, of each member's rows held out, from the start on.
    checkpoints : list of (parameters, rates)
        Parameters before the best ones, and the learning rates (members,) there; see `Fit`.
    """

    name: str
    kind: Kind
    on_effects: bool
    parameters: Parameters
    best_epoch: tuple[int, ...]
    history: Tensor
    checkpoints: list[tuple[Parameters, Tensor]]


class Fitted(NamedTuple):
    """Everything that predicts standardised values, counts or binary values.

    Attributes
    ----------
    effects : Effects
        Of all rows; without biases, for the width of intervals only.
    groups : list of Group
    weights : ndarray, shape (C,)
        Of the effects if there are biases, then of each group's weight decays; they sum to one.
    mixture : ScaleMixture
        Of Gaussian values' residuals.
    n_members : int
    likelihood : str
    spread : Spread, or None
        Of other values.
    """

    effects: Effects
    groups: list[Group]
    weights: FloatArray
    mixture: ScaleMixture
    n_members: int
    likelihood: str = "gaussian"
    spread: Spread | None = None


def fit_completion(
    labels: IntArray,
    sizes: Sequence[int],
    sides: Sequence[Side],
    smooth: FloatArray,
    values: FloatArray,
    weight: FloatArray,
    n_validation: int,
    settings: Settings,
    generator: torch.Generator,
    device: torch.device,
    report: Callable[[str, int, float], None],
) -> Fitted:
    """Fit to standardised values.

    Parameters
    ----------
    labels : ndarray, shape (n, K + n_sides), int64
        -1 where a validation row has a label that no training row has; then rows of the sides' tables.
    sizes : sequence of int
        Labels of each mode, K.
    sides : sequence of Side
        Features of some modes' labels.
    smooth : ndarray, shape (n, q)
        Smooth features of continuous modes, and features of labels.
    values, weight : ndarray, shape (n,)
    n_validation : int
        So many rows at the end are the user's validation rows; 0: each member holds out a fold.
    settings : Settings
    generator : torch.Generator
        On the CPU.
    device : torch.device
        Of the networks.
    report : callable
        Called with a group's name, the epoch and the members' mean loss.
    """
    n, M, likelihood = len(values), settings.n_members, settings.likelihood
    gaussian = likelihood == "gaussian"
    subsets = subsets_of(len(sizes)) if settings.biases and settings.interactions else subsets_of(2)[:0]
    subsets = subsets or tuple((mode,) for mode in range(len(sizes)))
    subsets = subsets if gaussian else ((), *subsets)  # an intercept
    of_sides = [(len(sizes) + j,) for j in range(len(sides))]
    subsets = (*subsets[: int(not gaussian)], *of_sides, *subsets[int(not gaussian) :])
    all_sizes = (*sizes, *(len(side.table) for side in sides))
    cells = [
        number_cells(labels, subset, all_sizes)
        if subset not in of_sides
        else Cells(np.arange(all_sizes[subset[0]]), labels[:, subset[0]], sides[subset[0] - len(sizes)].table)
        for subset in subsets
    ]
    own = np.arange(n) < n - n_validation  # training rows
    small = own.sum() < MIN_ROWS
    if n_validation:
        unseen = [~own]
    else:
        fold = torch.randperm(n, generator=generator).numpy() % max(M, N_FOLDS)
        unseen = [fold == m for m in range(M)]
    strengths = start_strengths(subsets, likelihood)
    if not small:
        strengths = choose_strengths(cells, subsets, values, weight, unseen[0], likelihood)
    if sides and not small:
        hidden = {}
        for j, side in enumerate(sides):
            part = torch.randperm(sizes[side.mode] + 1, generator=generator).numpy()[labels[:, side.mode]] % N_FOLDS
            hidden[subsets.index(of_sides[j])] = [(part == g) & own for g in range(N_FOLDS)]
        strengths = choose_feature_strengths(cells, strengths, values, np.where(own, weight, 0.0), hidden, likelihood)
    live = [s for s, strength in enumerate(strengths) if math.isfinite(strength)]
    cells, strengths = [cells[s] for s in live], [strengths[s] for s in live]

    def parts(held_out: Mask) -> tuple[FloatArray, FloatArray]:
        """Each effect (rows held out, S) of the other rows, and their variance in multiples of the noise's."""
        left = np.where(held_out, 0.0, weight)
        found, eta = fit_effects(cells, values, left, strengths, likelihood)
        left = left * curvature(likelihood, means(likelihood, eta))
        pieces, variance = np.zeros((int(held_out.sum()), len(cells))), np.zeros(int(held_out.sum()))
        for s, (part, strength) in enumerate(zip(cells, strengths, strict=True)):
            code = part.code[held_out]
            pieces[:, s] = part.of_cells(found[s])[code]
            variance += part.variance(part.add(left), strength)[code]
        return pieces, variance

    out = np.zeros(n, dtype=bool) if small else np.any(unseen, axis=0)  # rows that some member has not seen
    pieces, spread = np.zeros((len(unseen), n, len(cells)), dtype=np.float32), np.zeros(n)
    plain = np.zeros(n)
    inner = torch.randperm(n, generator=generator).numpy() % N_FOLDS
    for f, left_out in enumerate([] if small else unseen):
        pieces[f, left_out], spread[left_out] = parts(left_out)
        plain[left_out] = pieces[f, left_out].sum(axis=1)
        if not gaussian and left_out.any():
            pieces[f, ~left_out, 0] = pieces[f, left_out, 0][0]
        for g in range(N_FOLDS if settings.biases else 0):
            held_out = left_out | (inner == g)
            pieces[f, held_out & ~left_out] = parts(held_out)[0][~left_out[held_out]]
    candidates = [plain] if settings.biases else []
    groups = []
    if not small:
        where = unseen, pieces, smooth, labels, values, weight
        for name, on_effects, rank, head in _kinds(settings, len(sizes)):
            n_features = (len(cells) if on_effects and head else 0) + (smooth.shape[1] if head else 0)
            kind = Kind(tuple(sizes), rank, head, settings.width, settings.hidden, n_features)
            group, found = _train(name, kind, on_effects, where, settings, generator, device, report)
            groups.append(group)
            candidates += found
    elif not candidates:
        candidates = [plain]
    weights = stack(np.stack(candidates, axis=1)[out], values[out], weight[out], likelihood)
    stacked = np.stack(candidates, axis=1) @ weights
    train_weight = np.where(own, weight, 0.0)
    found, fitted = fit_effects(cells, values, train_weight, strengths, likelihood)
    rows = own if small else out
    residual = (values - (fitted if small else plain))[rows]
    share = weight[rows] / weight[rows].sum()
    noise = float(share @ residual**2 / (1 + share @ spread[rows]))
    noise = max(float(share @ values[rows] ** 2) if small else noise, LEAST_VARIANCE)
    noise = noise if gaussian else 1.0
    bent = train_weight * curvature(likelihood, means(likelihood, fitted))
    totals = [
        part.add(bent) if part.design is None else 1 / part.variance(part.add(bent), strength) - strength
        for part, strength in zip(cells, strengths, strict=True)
    ]
    found = [part.of_cells(effect) for part, effect in zip(cells, found, strict=True)]
    chosen, known = tuple(subsets[s] for s in live), [part.known for part in cells]
    effects = Effects(chosen, all_sizes, known, found, totals, tuple(strengths), noise)
    mixture, scatter = ScaleMixture(1.0, torch.ones(1).double(), torch.ones(1).double()), None
    if not gaussian:
        scatter = calibrate_discrete(likelihood, stacked[out], spread[out], values[out], weight[out], int(own.sum()))
    elif not small:
        mixture = calibrate((values - stacked)[out], noise * spread[out], noise)
    return Fitted(effects, groups, weights, mixture, M, likelihood, scatter)


def moments(fitted: Fitted, labels: IntArray, smooth: FloatArray, biases: bool) -> tuple[FloatArray, FloatArray]:
    """Predictors (n,) at labels (n, K + n_sides), -1 for unknown ones, and the variances of these (n,)."""
    pieces, variance = fitted.effects.pieces(labels)
    plain = pieces.sum(axis=1)
    candidates = [plain] if biases or not fitted.groups else []
    for group in fitted.groups:
        device = group.parameters["bias"].device
        features = head_features(group.kind, group.on_effects, pieces[None].astype(np.float32), smooth, device)
        at = torch.from_numpy(labels[:, : len(group.kind.sizes)]).to(device)
        added = predict(group.kind, group.parameters, at, features)
        averaged = added.double().cpu().numpy().reshape(-1, fitted.n_members, len(labels)).mean(axis=1)
        candidates += list(averaged + link_offset(fitted, group, pieces))
    return fitted.weights @ np.stack(candidates), variance


def link_offset(fitted: Fitted, group: Group, pieces: FloatArray) -> FloatArray:
    """What the members of a group add to, (n,): the effects, an intercept or nothing."""
    if group.on_effects:
        return np.asarray(pieces.sum(axis=1))
    return np.zeros(len(pieces)) if fitted.likelihood == "gaussian" else pieces[:, 0]


def _kinds(settings: Settings, n_modes: int) -> list[tuple[str, bool, int, str | None]]:
    """Name, whether on effects, rank and head of each kind of member."""
    rank = settings.rank if n_modes > 1 else 0
    kinds: list[tuple[str, bool, int, str | None]] = []
    if settings.biases and rank:
        kinds.append(("effects + factors", True, rank, None))
    if settings.biases and settings.head is not None:
        kinds.append(("effects + network", True, rank, settings.head))
    if settings.head is not None or not settings.biases or rank:
        kinds.append(("network" if settings.head is not None else "factors", False, rank, settings.head))
    return kinds


def head_features(
    kind: Kind, on_effects: bool, pieces: npt.NDArray[np.float32], smooth: FloatArray, device: torch.device
) -> Tensor | None:
    """Inputs of the head (F, n, n_features): effects, smooth features."""
    if not kind.n_features:
        return None
    parts = [pieces] if on_effects else []
    if smooth.shape[1]:
        parts.append(np.broadcast_to(smooth.astype(np.float32), (len(pieces), *smooth.shape)))
    return torch.from_numpy(np.concatenate(parts, axis=2)).to(device)


def _train(
    name: str,
    kind: Kind,
    on_effects: bool,
    where: tuple[list[Mask], npt.NDArray[np.float32], FloatArray, IntArray, FloatArray, FloatArray],
    settings: Settings,
    generator: torch.Generator,
    device: torch.device,
    report: Callable[[str, int, float], None],
) -> tuple[Group, list[FloatArray]]:
    """Members of one kind, and what those of each weight decay predict of the rows that they have not seen, (n,)."""
    unseen, pieces, smooth, labels, values, weight = where
    labels = labels[:, : len(kind.sizes)]
    F, M, n, decays = len(unseen), settings.n_members, len(values), settings.weight_decay
    gaussian = settings.likelihood == "gaussian"
    offset = pieces.sum(axis=2, dtype=np.float64) if on_effects else np.zeros((F, n))
    if not gaussian and not on_effects:
        offset = pieces[:, :, 0].astype(np.float64)
    target = values - offset if gaussian else np.broadcast_to(values, (F, n))
    features = head_features(kind, on_effects, pieces, smooth, device)
    rows = Rows(
        torch.from_numpy(labels).to(device),
        features,
        torch.from_numpy(target.astype(np.float32)).to(device),
        torch.from_numpy(weight.astype(np.float32)).to(device),
        None if gaussian else torch.from_numpy(offset.astype(np.float32)).to(device),
        settings.likelihood,
    )
    train_rows, test_rows = [np.flatnonzero(~part) for part in unseen], [np.flatnonzero(part) for part in unseen]
    fewest, most = min(map(len, train_rows)), max(map(len, test_rows))
    # Folds differ by a row at most: members with one more leave it out.
    train_index = torch.from_numpy(np.stack([part[:fewest] for part in train_rows]))
    test_index = torch.from_numpy(np.stack([np.append(part, np.full(most - len(part), -1)) for part in test_rows]))
    copies = M * len(decays) // F
    parameters = initial(kind, F * copies, generator, torch.float32)
    fit = train(
        kind,
        {key: value.to(device) for key, value in parameters.items()},
        rows,
        train_index.repeat(copies, 1).to(device),
        test_index.repeat(copies, 1).to(device),
        torch.tensor(decays, dtype=torch.float32).repeat_interleave(M).to(device),
        generator,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        max_epochs=settings.max_epochs,
        patience=settings.patience,
        n_checkpoints=settings.n_checkpoints - 1,
        report=lambda epoch, loss: report(name, epoch, loss),
    )
    seen = torch.zeros(F, sum(s + 1 for s in kind.sizes), dtype=torch.bool)
    first = np.cumsum([0, *(s + 1 for s in kind.sizes)])[:-1]
    for f in range(F):
        seen[f, torch.from_numpy((labels[train_rows[f]] + first).ravel())] = True
    filled = fill_unknown(kind, fit.parameters, seen.repeat(copies, 1).to(device))
    added = np.zeros((len(decays), n))
    for f, at in enumerate(test_rows):
        of_fold = {key: value[f::F] for key, value in filled.items()}
        inputs = None if features is None else features[f : f + 1, torch.from_numpy(at).to(device)]
        found = predict(kind, of_fold, rows.labels[torch.from_numpy(at).to(device)], inputs).double().cpu().numpy()
        added[:, at] = found.reshape(len(decays), -1, len(at)).mean(axis=1) + offset[f, at]
    group = Group(name, kind, on_effects, filled, tuple(fit.epoch.tolist()), fit.history.cpu(), fit.checkpoints)
    return group, list(added)
