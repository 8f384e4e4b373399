"""Checkpoints of a neural completion: ensembles that are trained, and the state of the one in training.

All else is made anew from the rows and the seed: effects, folds and batches are the same again.
"""

from typing import Any

import torch
from torch import Tensor

from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.models.completion_groups import Data
from probtensor.models.completion_training import Fit, State

__all__ = ["Progress"]


class Progress:
    """How far the training of the ensembles is.

    Parameters
    ----------
    checkpoints : Checkpoints, optional
        Where to write to and to go on from.
    seed : int
        Of the fit; that of the file takes its place.
    data : Data
    comm : Comm
    device : torch.device
        Of the networks.

    Attributes
    ----------
    seed : int

    Raises
    ------
    ValueError
        If the file is of a fit with other validation rows or side information.
    """

    def __init__(
        self, checkpoints: Checkpoints | None, seed: int, data: Data, comm: Comm, device: torch.device
    ) -> None:
        self._checkpoints, self._device, self.seed = checkpoints, device, seed
        self._finished: list[Fit] = []
        self._current: State | None = None
        own = torch.from_numpy(data.own.astype("int64"))
        totals = comm.sum(torch.stack([own.sum(), (torch.from_numpy(data.keys) & 0xFFFFFFFF).sum()])).tolist()
        self._of = [*totals, *(float(side.table.sum()) for side in data.sides)]
        found = None if checkpoints is None else checkpoints.read()
        if found is not None:
            self._read(*found)

    def finished(self, number: int) -> Fit | None:
        """The ensemble of this number, if it is trained."""
        return self._finished[number] if number < len(self._finished) else None

    def start(self) -> State | None:
        """The state to go on from, once."""
        state, self._current = self._current, None
        return state

    def epoch(self, state: State) -> None:
        """Write the state after an epoch, if it is time."""
        if self._checkpoints is None or not self._checkpoints.due():
            return
        arrays, about = _state_arrays(state)
        fits = []
        for g, fit in enumerate(self._finished):
            more, n = _fit_arrays(fit)
            arrays |= {f"finished.{g}.{name}": value for name, value in more.items()}
            fits.append(n)
        self._checkpoints.write(arrays, {"seed": self.seed, "of": self._of, "state": about, "finished": fits})

    def finish(self, fit: Fit) -> None:
        """Keep an ensemble that is trained."""
        self._finished.append(fit)

    def _read(self, arrays: dict[str, Tensor], about: dict[str, Any]) -> None:
        if about["of"] != self._of:
            raise ValueError(
                "checkpoint: expected one of a fit with these validation rows and this side information, got another"
            )
        self.seed = about["seed"]
        arrays = {name: value.to(self._device) for name, value in arrays.items()}
        self._current = _state_from(arrays, about["state"])
        self._finished = [_fit_from(_under(arrays, f"finished.{g}."), n) for g, n in enumerate(about["finished"])]


def _under(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    # A file gives its arrays in any order, and ranks sum gradients in that of the parameters.
    return {name[len(prefix) :]: arrays[name] for name in sorted(arrays) if name.startswith(prefix)}


def _named(prefix: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value.detach() for name, value in parameters.items()}


def _state_arrays(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arrays = _named("parameters", state.parameters) | _named("best", state.best)
    arrays |= _named("first", {name: first for name, (first, _) in state.moments.items()})
    arrays |= _named("second", {name: second for name, (_, second) in state.moments.items()})
    arrays |= {"loss": state.best_loss, "epoch": state.best_epoch, "history": torch.stack(state.history)}
    for c, (_, kept, _) in enumerate(state.kept):
        arrays |= _named(f"kept.{c}", kept)
    return arrays, {"epoch": state.epoch, "kept": [[epoch, rate] for epoch, _, rate in state.kept]}


def _state_from(arrays: dict[str, Tensor], about: dict[str, Any]) -> State:
    first, second = _under(arrays, "first."), _under(arrays, "second.")
    return State(
        {name: value.requires_grad_() for name, value in _under(arrays, "parameters.").items()},
        {name: (first[name], second[name]) for name in first},
        _under(arrays, "best."),
        arrays["loss"],
        arrays["epoch"],
        list(arrays["history"].unbind()),
        [(epoch, _under(arrays, f"kept.{c}."), rate) for c, (epoch, rate) in enumerate(about["kept"])],
        about["epoch"],
    )


def _fit_arrays(fit: Fit) -> tuple[dict[str, Tensor], int]:
    arrays = _named("best", fit.parameters) | {"loss": fit.loss, "epoch": fit.epoch, "history": fit.history}
    for c, (parameters, rates) in enumerate(fit.checkpoints):
        arrays |= _named(f"checkpoint.{c}", parameters) | {f"rates.{c}": rates}
    return arrays, len(fit.checkpoints)


def _fit_from(arrays: dict[str, Tensor], n: int) -> Fit:
    checkpoints = [(_under(arrays, f"checkpoint.{c}."), arrays[f"rates.{c}"]) for c in range(n)]
    return Fit(_under(arrays, "best."), arrays["epoch"], arrays["loss"], arrays["history"], checkpoints)
