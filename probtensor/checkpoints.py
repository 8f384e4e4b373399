"""States of a fit under way, in a folder: so that a job that ends before its time can go on.

A file is written by rank 0, whole or not at all, under a temporary name first. It holds what all rows have said, never
rows: any number of ranks can go on from it. The last two are kept; a file that is torn or damaged is passed over for
the one before, and rank 0 says so.
"""

import hashlib
import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from probtensor.comm import Comm, refuse_together
from probtensor.intake import Table
from probtensor.persistence import read_state, state_from_bytes, write_state
from probtensor.resources import is_integer

__all__ = ["CheckpointWarning", "Checkpoints"]

NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")
KEPT = 2  # files: the last may be torn by a disk that lies
TERMINATED = 128 + signal.SIGTERM  # exit status of a process that SIGTERM ends


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an earlier one is used."""


class Checkpoints:
    """Where a fit writes its state, and from where it goes on.

    Parameters
    ----------
    folder : path-like
        Made if it is not there. On several machines all that rank 0 may run on must see it.
    every : int
        Sweeps from one file to the next.
    resume : bool
        Whether to go on from the newest file, if there is one.
    comm : Comm
    kind : str
        Dotted name of the estimator's class.
    params : mapping
        The estimator's parameters, as JSON values.
    table : Table
        This rank's rows: with `params`, what files are told from those of another fit by.

    Raises
    ------
    ValueError
        If `every` is no integer of at least 1, the folder cannot be made, or it holds files and `resume` is False.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: int,
        resume: bool,
        comm: Comm,
        kind: str,
        params: Mapping[str, Any],
        table: Table,
    ) -> None:
        if not (is_integer(every) and every >= 1):
            raise ValueError(f"checkpoint_every: expected an integer of at least 1, got {every!r}")
        self.folder, self._every, self._resume, self._comm, self._kind = Path(folder), every, resume, comm, kind
        totals = comm.sum(torch.tensor([len(table.key), int((table.key.cpu() & 0xFFFFFFFF).sum())]))
        settings = json.dumps({k: v for k, v in params.items() if k not in ("progress", "device")}, sort_keys=True)
        self._of = f"{totals.tolist()} {hashlib.sha256(settings.encode()).hexdigest()}"
        self._step = 0
        self._told_to_stop = False
        refuse_together(comm, self._open)

    def tell_apart(self, by: Sequence[bytes]) -> None:
        """Tell files by more than rows and parameters; the same on all ranks, before the first `read`."""
        self._of += "".join(f" {hashlib.sha256(part).hexdigest()}" for part in by)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Within this block files are those of a part of the fit, in a folder of its own; the parts have an order.

        Raises
        ------
        ValueError
            If the folder holds files and the fit does not go on from them.
        """
        folder, step = self.folder, self._step
        self.folder, self._step = folder / name, 0
        refuse_together(self._comm, self._open)
        try:
            yield
        finally:
            self.folder, self._step = folder, step

    def due(self) -> bool:
        """Count a sweep; whether its state should be written. All ranks must ask."""
        self._step += 1
        stop = self._comm.sum(torch.tensor([int(self._told_to_stop)]))
        self._told_to_stop = bool(stop > 0)
        return self._told_to_stop or self._step % self._every == 0

    def write(self, arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write a file; after SIGTERM end the process then.

        Raises
        ------
        SystemExit
            With status 143, after SIGTERM on any rank.
        """
        if self._comm.is_root:
            about = {"of": self._of, "step": self._step, "digest": _digest(arrays), "fit": dict(meta)}
            write_state(self.folder / f"checkpoint-{self._step:08d}.safetensors", self._kind, arrays, about)
            for old in self._files()[KEPT:]:
                old.unlink()
        if self._told_to_stop:
            self._comm.barrier()
            raise SystemExit(TERMINATED)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole file, on all ranks; None where there is none or the fit should start anew.

        Raises
        ------
        ValueError
            If it was written by a fit with other rows or parameters.

        Warns
        -----
        CheckpointWarning
            On rank 0, for each file that cannot be read.
        """
        found = refuse_together(self._comm, self._newest)
        data = self._comm.gather_bytes(b"" if found is None else found.read_bytes())[0]
        if not data:
            return None
        _, arrays, about = state_from_bytes(data, self.folder)
        self._step = about["step"]
        return arrays, about["fit"]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this block SIGTERM makes the next sweep the last, instead of ending the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread handle signals
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self._told_to_stop = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _open(self) -> None:
        if not self._comm.is_root:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"checkpoint: expected a folder to write to, got {self.folder}: {error}") from error
        if not self._resume and (files := self._files()):
            raise ValueError(
                f"checkpoint: expected a folder without checkpoints, got {self.folder} with {files[0].name}; "
                "resume=True goes on from it"
            )

    def _files(self) -> list[Path]:
        """Files of the folder, newest first."""
        return sorted((file for file in self.folder.iterdir() if NAME.fullmatch(file.name)), reverse=True)

    def _newest(self) -> Path | None:
        if not (self._resume and self._comm.is_root):
            return None
        for file in self._files():
            try:
                kind, arrays, about = read_state(file)
                if about["digest"] != _digest(arrays):
                    raise ValueError(f"{file} is damaged: its numbers are not those that were written")
            except (ValueError, KeyError) as error:
                warnings.warn(f"{error}; looking for an earlier checkpoint", CheckpointWarning, stacklevel=2)
                continue
            if (kind, about["of"]) != (self._kind, self._of):
                raise ValueError(
                    f"checkpoint: expected one of a fit of these rows with these parameters, got {file}; "
                    "use another folder to start anew"
                )
            return file
        return None


def _digest(arrays: Mapping[str, Tensor]) -> str:
    """A fingerprint of names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name].detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
