"""Ensembles of a neural completion: their rows, their kinds, and what they say of rows they have not seen."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probtensor.blocks import mixed
from probtensor.comm import Comm
from probtensor.models.completion_network import Kind, Parameters, Rows, fill_unknown, initial, predict
from probtensor.models.completion_settings import Settings
from probtensor.models.completion_training import Fit, State, train
from probtensor.models.side_information import Side

__all__ = ["Data", "Group", "head_features", "kinds_of", "train_group"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Pieces = npt.NDArray[np.float32]

SALT = 3  # that of folds and others is less


class Data(NamedTuple):
    """Rows of this rank.

    Attributes
    ----------
    labels : ndarray, shape (n, K + n_sides), int64
        -1 where a validation row has a label that no training row has; then rows of the sides' tables.
    sizes : tuple of int
        Labels of each mode, K.
    sides : tuple of Side
        Features of some modes' labels.
    smooth : ndarray, shape (n, q)
        Smooth features of continuous modes, and features of labels.
    values, weight : ndarray, shape (n,)
        Values are standardised where they are Gaussian.
    keys : ndarray, shape (n,), int64
        What rows are dealt to folds and batches by, in [0, 2^63).
    own : ndarray, shape (n,), bool
        Training rows; the others are the user's validation rows.
    """

    labels: IntArray
    sizes: tuple[int, ...]
    sides: tuple[Side, ...]
    smooth: FloatArray
    values: FloatArray
    weight: FloatArray
    keys: IntArray
    own: Mask


class Keeper(Protocol):
    """What a training asks of `Progress`."""

    seed: int

    def finished(self, number: int) -> Fit | None:
        """The ensemble of this number, if it is trained."""

    def start(self) -> State | None:
        """The state to go on from, once."""

    def epoch(self, state: State) -> None:
        """Take in the state after an epoch."""

    def finish(self, fit: Fit) -> None:
        """Keep an ensemble that is trained."""


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


def kinds_of(settings: Settings, n_modes: int) -> list[tuple[str, bool, int, str | None]]:
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


def train_group(
    number: int,
    name: str,
    kind: Kind,
    on_effects: bool,
    data: Data,
    unseen: list[Mask],
    pieces: Pieces,
    settings: Settings,
    device: torch.device,
    report: Callable[[str, int, float], None],
    comm: Comm,
    progress: Keeper,
) -> tuple[Group, list[FloatArray]]:
    """Members of one kind, and what those of each weight decay predict of the rows that they have not seen, (n,).

    Parameters
    ----------
    number : int
        Of the group: each has random numbers of its own.
    name, kind, on_effects
        See `Group`.
    data : Data
    unseen : list of ndarray of bool, shape (n,)
        Rows that the members of each fold leave out.
    pieces : ndarray, shape (F, n, S), float32
        Effects of each subset, of rows that are in none of the effects.
    settings : Settings
    device : torch.device
    report : callable
        Called with the name, the epoch and the members' mean loss.
    comm : Comm
    progress : Progress
        Where to go on, and the seed.
    """
    labels, values, n = data.labels[:, : len(kind.sizes)], data.values, len(data.values)
    F, M, decays = len(unseen), settings.n_members, settings.weight_decay
    gaussian = settings.likelihood == "gaussian"
    offset = pieces.sum(axis=2, dtype=np.float64) if on_effects else np.zeros((F, n))
    if not gaussian and not on_effects:
        offset = pieces[:, :, 0].astype(np.float64)
    target = values - offset if gaussian else np.broadcast_to(values, (F, n))
    features = head_features(kind, on_effects, pieces, data.smooth, device)
    rows = Rows(
        torch.from_numpy(labels).to(device),
        features,
        torch.from_numpy(target.astype(np.float32)).to(device),
        torch.from_numpy(data.weight.astype(np.float32)).to(device),
        None if gaussian else torch.from_numpy(offset.astype(np.float32)).to(device),
        settings.likelihood,
    )
    train_rows, test_rows = [np.flatnonzero(~part) for part in unseen], [np.flatnonzero(part) for part in unseen]
    most, copies = max(map(len, test_rows)), M * len(decays) // F
    test_index = torch.from_numpy(np.stack([np.append(part, np.full(most - len(part), -1)) for part in test_rows]))
    seed = progress.seed + SALT
    generator = torch.Generator().manual_seed(int(mixed(np.array([seed]), number)[0]))
    parameters = initial(kind, F * copies, generator, torch.float32)
    fit = progress.finished(number)
    if fit is None:
        fit = train(
            kind,
            {key: value.to(device) for key, value in parameters.items()},
            rows,
            mixed(data.keys, seed + number),
            train_rows * copies,
            test_index.repeat(copies, 1).to(device),
            torch.tensor(decays, dtype=torch.float32).repeat_interleave(M).to(device),
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            max_epochs=settings.max_epochs,
            patience=settings.patience,
            n_checkpoints=settings.n_checkpoints - 1,
            report=lambda epoch, loss: report(name, epoch, loss),
            comm=comm,
            state=progress.start(),
            after_epoch=progress.epoch,
        )
        progress.finish(fit)
    seen = torch.zeros(F, sum(s + 1 for s in kind.sizes), dtype=torch.int64)
    first = np.cumsum([0, *(s + 1 for s in kind.sizes)])[:-1]
    for f in range(F):
        seen[f, torch.from_numpy((labels[train_rows[f]] + first).ravel())] = 1
    seen = comm.sum(seen) > 0
    filled = fill_unknown(kind, fit.parameters, seen.repeat(copies, 1).to(device))
    added = np.zeros((len(decays), n))
    for f, at in enumerate(test_rows):
        of_fold = {key: value[f::F] for key, value in filled.items()}
        inputs = None if features is None else features[f : f + 1, torch.from_numpy(at).to(device)]
        found = predict(kind, of_fold, rows.labels[torch.from_numpy(at).to(device)], inputs).double().cpu().numpy()
        added[:, at] = found.reshape(len(decays), copies // len(decays), len(at)).mean(axis=1) + offset[f, at]
    group = Group(name, kind, on_effects, filled, tuple(fit.epoch.tolist()), fit.history.cpu(), fit.checkpoints)
    return group, list(added)
