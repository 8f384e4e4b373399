"""How the members of an ensemble are trained: one optimiser for all, each with rows and a weight decay of its own.

Nothing couples the members, so they are what a loop over members would give. A row's batch is a hash of its key, the
epoch and the member: which rank has the row does not matter. Batches of members differ a little in size, and shorter
ones are filled up with rows of weight zero. Ranks sum their gradients at each step, and take the same step.

References
----------
Loshchilov, Hutter (2019), "Decoupled Weight Decay Regularization", ICLR.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probtensor.blocks import mixed
from probtensor.comm import Comm, Serial
from probtensor.models.completion_network import CHUNK, Batch, Kind, Parameters, Rows, row_losses

__all__ = ["Fit", "State", "adam_step", "train"]

IntArray = npt.NDArray[np.int64]

WARM_UP = 0.1  # share of the steps in which the learning rate rises
BETAS, EPS = (0.9, 0.999), 1e-8
MEMBERS = 2**20  # more than there are: numbers of epochs and members do not meet


class Fit(NamedTuple):
    """Best parameters of each member; tensors (M,) of their epochs and losses, and the losses (epochs + 1, M).

    Checkpoints are parameters before the best ones, and the learning rate (M,) that they had; 0 for members whose best
    epoch had come.
    """

    parameters: Parameters
    epoch: Tensor
    loss: Tensor
    history: Tensor
    checkpoints: list[tuple[Parameters, Tensor]]


@dataclass
class State:
    """A training under way, after an epoch.

    Attributes
    ----------
    parameters, best : dict of str to Tensor, members first
    moments : dict of str to (Tensor, Tensor)
        Of the gradients, first and second.
    best_loss, best_epoch : Tensor, shape (M,)
    history : list of Tensor, shape (M,)
        Losses from the start on.
    kept : list of (int, dict of str to Tensor, float)
        Epochs whose parameters are kept, the parameters and the learning rate.
    epoch : int
    """

    parameters: Parameters
    moments: dict[str, tuple[Tensor, Tensor]]
    best: Parameters
    best_loss: Tensor
    best_epoch: Tensor
    history: list[Tensor]
    kept: list[tuple[int, Parameters, float]]
    epoch: int = 0


def train(
    kind: Kind,
    parameters: Parameters,
    rows: Rows,
    keys: IntArray,
    train_rows: list[IntArray],
    test_rows: Tensor,
    weight_decay: Tensor,
    *,
    learning_rate: float,
    batch_size: int,
    max_epochs: int,
    patience: int,
    n_checkpoints: int = 0,
    report: Callable[[int, float], None] | None = None,
    comm: Comm | None = None,
    state: State | None = None,
    after_epoch: Callable[[State], None] | None = None,
) -> Fit:
    """Train all members; each keeps the parameters of its best epoch, which may be the start.

    Parameters
    ----------
    kind : Kind
    parameters : dict of str to Tensor, members first
        Left as they are; the same on all ranks.
    rows : Rows
        Of this rank.
    keys : ndarray, shape (n,), int64
        Of the rows, in [0, 2^63): what they are dealt to batches by.
    train_rows : list of ndarray, int64
        Numbers of each member's rows.
    test_rows : Tensor, shape (M, n_test), int64
        The same for the rows that it stops by; -1 is none.
    weight_decay : Tensor, shape (M,)
        Decoupled, in multiples of the learning rate.
    learning_rate : float
        The highest; it rises at first and falls with the cosine.
    batch_size, max_epochs, patience : int
        A fit ends when no member has become better for `patience` epochs.
    n_checkpoints : int, default 0
        Epochs, evenly spaced, whose parameters are kept.
    report : callable, optional
        Called with the epoch and the mean of the members' best losses.
    comm : Comm, optional
        The ranks that share the rows.
    state : State, optional
        Where to go on; it is changed. Default: at the parameters.
    after_epoch : callable, optional
        Called with the state.

    Returns
    -------
    Fit
    """
    comm = Serial() if comm is None else comm
    device, M = rows.target.device, len(weight_decay)
    if state is None:
        loss = validation_loss(kind, parameters, rows, test_rows, comm)
        state = State(
            {name: value.clone().requires_grad_() for name, value in parameters.items()},
            {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in parameters.items()},
            {name: value.detach().clone() for name, value in parameters.items()},
            loss,
            torch.zeros(M, dtype=torch.int64, device=device),
            [loss],
            [],
        )
    n = int(comm.sum(torch.tensor([len(part) for part in train_rows])).min())
    n_batches = max(n // batch_size, 1)
    n_steps, rate = max_epochs * n_batches, 0.0
    to_keep = set(torch.linspace(0, max_epochs, n_checkpoints + 2).round().int().tolist()[1:-1])
    while state.epoch < max_epochs and state.epoch - int(state.best_epoch.max()) < patience:
        state.epoch += 1
        batches = deal_batches(keys, train_rows, n_batches, state.epoch).to(device)
        total = comm.sum(torch.stack([batch_weight(rows.weight, batches[:, b]) for b in range(n_batches)]))
        for b in range(n_batches):
            step = (state.epoch - 1) * n_batches + b + 1
            rise, fall = step / (WARM_UP * n_steps), 0.5 * (1 + math.cos(math.pi * step / n_steps))
            rate = learning_rate * min(rise, fall)
            number = batches[:, b]
            batch = rows.take(number.clamp(min=0))
            batch = batch._replace(weight=batch.weight * (number >= 0))
            how = step, rate, weight_decay, rows.likelihood, total[b], comm
            adam_step(kind, state.parameters, state.moments, batch, *how)
        loss = validation_loss(kind, state.parameters, rows, test_rows, comm)
        state.history.append(loss)
        better = loss < state.best_loss
        state.best_loss = torch.where(better, loss, state.best_loss)
        state.best_epoch = state.best_epoch.masked_fill(better, state.epoch)
        if better.any():
            for name, value in state.parameters.items():
                state.best[name][better] = value.detach()[better]
        if report is not None:
            report(state.epoch, float(state.best_loss.mean()))
        if state.epoch in to_keep:
            now = {name: value.detach().clone() for name, value in state.parameters.items()}
            state.kept.append((state.epoch, now, rate))
        if after_epoch is not None:
            after_epoch(state)
    before = [(now, torch.where(state.best_epoch > epoch, rate, 0.0)) for epoch, now, rate in state.kept]
    used = [(now, rate) for now, rate in before if rate.any()]
    return Fit(state.best, state.best_epoch, state.best_loss, torch.stack(state.history), used)


def deal_batches(keys: IntArray, train_rows: list[IntArray], n_batches: int, epoch: int) -> Tensor:
    """Numbers of the rows in each batch of each member, (M, n_batches, most), -1 where there is none."""
    dealt = []
    for m, own in enumerate(train_rows):
        share = mixed(keys[own], epoch * MEMBERS + m) / 2.0**63
        batch = np.minimum((share * n_batches).astype(np.int64), n_batches - 1)
        order = np.argsort(batch, kind="stable")
        dealt.append((own[order], batch[order], np.bincount(batch, minlength=n_batches)))
    most = max(int(counts.max()) for _, _, counts in dealt)
    numbers = np.full((len(dealt), n_batches, most), -1, dtype=np.int64)
    for m, (own, batch, counts) in enumerate(dealt):
        numbers[m, batch, np.arange(len(own)) - (np.cumsum(counts) - counts)[batch]] = own
    return torch.from_numpy(numbers)


def batch_weight(weight: Tensor, numbers: Tensor) -> Tensor:
    """Summed weights (M,) of the rows (M, B) of a batch; -1 is none."""
    if not numbers.shape[1]:
        return weight.new_zeros(len(numbers))
    return (weight[numbers.clamp(min=0)] * (numbers >= 0)).sum(dim=1)


def adam_step(
    kind: Kind,
    parameters: Parameters,
    moments: dict[str, tuple[Tensor, Tensor]],
    batch: Batch,
    step: int,
    rate: float,
    weight_decay: Tensor,
    likelihood: str = "gaussian",
    total: Tensor | None = None,
    comm: Comm | None = None,
) -> None:
    """One step of AdamW on the sum of the members' mean deviances, in place.

    `total` (M,) has the weights of the batch's rows on all ranks; by default, of those here.
    """
    total = batch.weight.sum(dim=1) if total is None else total
    if batch.target.shape[1]:
        losses = (batch.weight * row_losses(kind, parameters, batch, likelihood)).sum(dim=1)
        loss = (losses / total.clamp(min=torch.finfo(total.dtype).tiny)).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    else:
        gradients = tuple(torch.zeros_like(value) for value in parameters.values())
    if comm is not None and comm.size > 1:
        summed = comm.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = torch.split(summed, [gradient.numel() for gradient in gradients])
        gradients = tuple(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))
    with torch.no_grad():
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
            first, second = moments[name]
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            value.mul_(1 - rate * weight_decay[:, None, None])
            scale = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
            value.addcdiv_(first, scale, value=-rate / (1 - BETAS[0] ** step))


@torch.no_grad()
def validation_loss(kind: Kind, parameters: Parameters, rows: Rows, test_rows: Tensor, comm: Comm) -> Tensor:
    """Weighted mean deviance (M,) of each member on its rows, all of them."""
    at = test_rows.clamp(min=0)
    M = len(at)
    loss, total = rows.target.new_zeros(M), rows.target.new_zeros(M)
    step = max(CHUNK // (M * 512), 1)
    for first in range(0, at.shape[1], step):
        part = slice(first, first + step)
        valid = test_rows[:, part] >= 0
        batch = rows.take(at[:, part])
        weight = batch.weight * valid
        loss = loss + (weight * row_losses(kind, parameters, batch, rows.likelihood)).sum(dim=1)
        total = total + weight.sum(dim=1)
    loss, total = comm.sum(torch.stack([loss, total])).unbind()
    return loss / total.clamp(min=torch.finfo(total.dtype).tiny)
