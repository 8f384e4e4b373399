"""Communication between the ranks of a job: one small interface, serial by default.

``Comm`` is what the engines see. ``Serial`` is a process on its own, ``Mpi`` a group of MPI ranks, and ``world()``
picks the one that fits how the process was started. This is the only module that imports mpi4py, and it does so only
under an MPI launcher.

Conventions
-----------
Every method but ``abort`` is collective: all ranks call the same methods in the same order with tensors of one dtype
and shape. Only buffers travel, never pickles. Results come back detached, on the device of the tensor passed in.

``sum`` adds in rank order, ``((x_0 + x_1) + x_2) + …``: each element is added up by one rank and then handed to all,
so all ranks hold the same bits, run after run, on any MPI library. ``MPI_Allreduce`` promises neither: with MPICH 5.0
its order changes with the length of the buffer and the number of ranks.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpi4py import MPI

_CHUNK_BYTES = 2**29  # per message: MPI counts are 32-bit, and several libraries fail from 1 or 2 GiB on
_BARRIER_TAG = 7101
_SUMMABLE = (torch.float64, torch.float32, torch.int64)
# What a launcher tells its processes about their number, the most specific launcher first (mpiexec itself may run
# inside a Slurm step). Slurm sets SLURM_PROCID and SLURM_NTASKS for a batch script too: only a step is a launch.
_LAUNCHED_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_LAUNCHED_RANK = ("PMIX_RANK", "PMI_RANK")  # launchers that give a rank but no size


class Comm(ABC):
    """A group of ranks that compute together. Use ``Serial`` or ``Mpi``, or let ``world`` choose.

    Attributes
    ----------
    rank : int
        Number of this process in the group, from 0 to ``size - 1``.
    size : int
        Number of processes in the group.
    """

    rank: int
    size: int

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a float64, float32 or int64 tensor of any shape over the ranks: a new tensor, the same bits everywhere.

        Raises
        ------
        ValueError
            If the dtype is another one, or dtype or shape differ between the ranks (then on all of them).
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Give every rank a copy of the tensor, of any shape and dtype, of rank `root`.

        On the other ranks `tensor` says the shape, dtype and device; its values are not used and not changed.

        Raises
        ------
        ValueError
            If `root` is not a rank, or dtype or shape differ between the ranks (then on all of them).
        """

    @abstractmethod
    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all ranks, in rank order; lengths may differ and may be 0."""

    @abstractmethod
    def exchange(self, table: Tensor, to: Tensor) -> Tensor:
        """Send each row to a rank of its own.

        Parameters
        ----------
        table : Tensor, shape (n, c), float64
            Rows of this rank; n may differ between the ranks, and be 0.
        to : Tensor, shape (n,), int64
            The rank that each row goes to.

        Returns
        -------
        Tensor, shape (m, c)
            The rows sent to this rank: those of rank 0 first, each rank's in their order.
        """

    @abstractmethod
    def barrier(self, timeout: float = 600.0) -> None:
        """Wait until every rank has come here.

        Parameters
        ----------
        timeout : float
            Seconds that rank 0 waits for the others; the others wait for rank 0 up to twice as long.

        Raises
        ------
        TimeoutError
            Naming the missing ranks, on every rank that came. The job should end then: see ``abort_on_error``.
        """

    @abstractmethod
    def abort(self, code: int = 1) -> NoReturn:
        """End the processes of all ranks at once with the exit status `code`."""


@final
class Serial(Comm):
    """A process on its own: tensors come back as they are, without a copy.

    Examples
    --------
    >>> import torch
    >>> comm = Serial()
    >>> comm.rank, comm.size, comm.is_root
    (0, 1, True)
    >>> comm.sum(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor` itself."""
        _check_summable(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Return `tensor` itself."""
        _check_root(root, self.size)
        return tensor

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return ``[data]``."""
        return [data]

    def exchange(self, table: Tensor, to: Tensor) -> Tensor:
        """Return `table` itself."""
        return table

    def barrier(self, timeout: float = 600.0) -> None:
        """Return at once."""

    def abort(self, code: int = 1) -> NoReturn:
        """Exit with the status `code`."""
        sys.exit(code)


@final
class Mpi(Comm):
    """The ranks of an MPI communicator.

    Parameters
    ----------
    communicator : mpi4py.MPI.Intracomm, optional
        Default: all ranks of the job (``COMM_WORLD``).

    Raises
    ------
    ImportError
        If mpi4py, or the MPI library that it needs, is missing.
    """

    def __init__(self, communicator: MPI.Intracomm | None = None) -> None:
        self._comm = _import_mpi().COMM_WORLD if communicator is None else communicator
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks: each rank adds up one segment in rank order, then all segments go to all ranks."""
        self._require_agreement("sum", tensor)
        _check_summable(tensor)
        terms = _to_host(tensor).numpy()
        total = np.empty_like(terms)
        step = max(1, _CHUNK_BYTES // terms.itemsize)
        for start in range(0, terms.size, step):
            self._sum_chunk(terms[start : start + step], total[start : start + step])
        return torch.from_numpy(total).reshape(tensor.shape).to(tensor.device)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Give every rank the tensor of rank `root`."""
        self._require_agreement(f"broadcast from {root}", tensor)
        _check_root(root, self.size)
        result = _to_host(tensor).clone()
        raw = result.view(torch.uint8).numpy()
        for start in range(0, raw.size, _CHUNK_BYTES):
            self._comm.Bcast(raw[start : start + _CHUNK_BYTES], root=root)
        return result.reshape(tensor.shape).to(tensor.device)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all ranks, in rank order."""
        lengths = self._gather_int(len(data))
        share = max(1, _CHUNK_BYTES // self.size)  # of each rank, per round
        parts: list[list[bytes]] = [[] for _ in range(self.size)]
        for start in range(0, int(lengths.max()), share):
            counts = np.clip(lengths - start, 0, share)
            ends = counts.cumsum()
            received = np.empty(ends[-1], dtype=np.uint8)
            piece = np.frombuffer(data[start : start + share], dtype=np.uint8)
            self._comm.Allgatherv(piece, [received, (counts, ends - counts)])
            for part, end, count in zip(parts, ends, counts, strict=True):
                part.append(received[end - count : end].tobytes())
        return [b"".join(part) for part in parts]

    def exchange(self, table: Tensor, to: Tensor) -> Tensor:
        """Send each row to a rank of its own, in rounds of bounded size."""
        rows, ranks = table.detach().cpu().numpy(), to.detach().cpu().numpy()
        queues = [rows[ranks == r] for r in range(self.size)]
        share = max(1, _CHUNK_BYTES // (self.size * 8 * max(rows.shape[1], 1)))  # rows to each rank, per round
        rounds = int(self._gather_int(max(-(-len(queue) // share) for queue in queues)).max())
        parts: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(self.size)]
        for start in range(0, rounds * share, share):
            pieces = [queue[start : start + share] for queue in queues]
            sent = np.array([piece.size for piece in pieces])
            incoming = np.empty_like(sent)
            self._comm.Alltoall(sent, incoming)
            received = np.empty(incoming.sum())
            ends = incoming.cumsum()
            self._comm.Alltoallv(
                [np.concatenate([piece.reshape(-1) for piece in pieces]), (sent, sent.cumsum() - sent)],
                [received, (incoming, ends - incoming)],
            )
            for part, end, count in zip(parts, ends, incoming, strict=True):
                part.append(received[end - count : end].reshape(-1, rows.shape[1]))
        whole = [piece for part in parts for piece in part]
        result = np.concatenate(whole) if whole else rows[:0]
        return torch.from_numpy(result).to(table.device)

    def barrier(self, timeout: float = 600.0) -> None:
        """Wait until every rank has come here; raise TimeoutError naming the missing ranks otherwise."""
        here = np.zeros(1, dtype=np.uint8)
        if self.is_root:
            others = range(1, self.size)
            arrivals = {r: self._comm.Irecv(np.empty(1, dtype=np.uint8), source=r, tag=_BARRIER_TAG) for r in others}
            missing = _pending_after(arrivals, timeout)
            verdict = np.isin(np.arange(self.size), missing).astype(np.uint8)
            for r in set(others).difference(missing):
                self._comm.Send(verdict, dest=r, tag=_BARRIER_TAG)
        else:
            sent = self._comm.Isend(here, dest=0, tag=_BARRIER_TAG)
            verdict = np.zeros(self.size, dtype=np.uint8)
            answer = self._comm.Irecv(verdict, source=0, tag=_BARRIER_TAG)
            missing = _pending_after({0: answer}, 2 * timeout) or np.flatnonzero(verdict).tolist()
            if 0 not in missing:
                sent.Wait()
        if missing:
            names = ", ".join(str(r) for r in missing)
            raise TimeoutError(
                f"rank {self.rank} of {self.size}: no sign of rank {names} at a barrier of {timeout:g} s"
            )

    def abort(self, code: int = 1) -> NoReturn:
        """End the processes of all ranks at once with the exit status `code`."""
        self._comm.Abort(code)
        raise SystemExit(code)  # not reached: Abort does not return

    def _sum_chunk(self, terms: np.ndarray[Any, Any], total: np.ndarray[Any, Any]) -> None:
        """Write into `total` the sum over the ranks of the one-dimensional `terms`."""
        size = self.size
        counts = np.array([terms.size // size + (r < terms.size % size) for r in range(size)])
        segments = (counts, counts.cumsum() - counts)
        own = counts[self.rank]
        received = np.empty((size, own), dtype=terms.dtype)  # my segment, from every rank
        self._comm.Alltoallv([terms, segments], [received, (np.full(size, own), own * np.arange(size))])
        own_total = received[0]
        for summand in received[1:]:
            own_total += summand
        self._comm.Allgatherv(own_total, [total, segments])

    def _gather_int(self, value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Gather one integer a rank, on all ranks."""
        values = np.empty(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([value], dtype=np.int64), values)
        return values

    def _require_agreement(self, operation: str, tensor: Tensor) -> None:
        """Raise ValueError on all ranks if they do not all do `operation` with one dtype and shape."""
        mine = f"{operation} of {tensor.dtype} {tuple(tensor.shape)}".encode()
        fingerprints = self._gather_int(zlib.crc32(mine))
        if (fingerprints != fingerprints[0]).any():
            calls = "; ".join(f"rank {r}: {call.decode()}" for r, call in enumerate(self.gather_bytes(mine)))
            raise ValueError(f"tensor: expected the same operation, dtype and shape on every rank, got {calls}")


def world() -> Comm:
    """Return the communicator of this job.

    Returns
    -------
    Comm
        ``Mpi`` under an MPI launcher (mpiexec, srun) with more than one process; otherwise ``Serial``, and mpi4py is
        not imported.

    Raises
    ------
    ImportError
        If the process was started by an MPI launcher and mpi4py is missing.
    RuntimeError
        If the launcher started several processes but MPI says that each is alone: they would all do the whole work.
    """
    name = next((name for name in _LAUNCHED_SIZE if name in os.environ), None)
    launched = None if name is None else int(os.environ[name])
    if launched == 1 or (launched is None and not any(rank in os.environ for rank in _LAUNCHED_RANK)):
        return Serial()
    comm = Mpi()
    if launched is not None and comm.size == 1:
        library = _import_mpi().Get_library_version().splitlines()[0].strip("\0 ")
        raise RuntimeError(
            f"the launcher started {launched} processes ({name}={launched}), but MPI says that this process is alone: "
            f"mpi4py loaded {library!r}, the launcher belongs to another MPI or gave no process management interface. "
            f"Start with the mpiexec of that library (pip wheels put it in {os.path.dirname(sys.executable)})."
        )
    return comm


@contextmanager
def abort_on_error(comm: Comm) -> Iterator[None]:
    """End the whole job when this rank fails, instead of leaving the others waiting for it.

    An exception inside the block prints its traceback and ends the processes of all ranks with a non-zero status. With
    a single process, and for an exit with status 0, the exception passes through as usual.

    Parameters
    ----------
    comm : Comm
        The ranks that would wait.

    Examples
    --------
    >>> with abort_on_error(Serial()):
    ...     print("work")
    work
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if comm.size == 1 or not code:
            raise
        sys.stdout.flush()
        print(f"rank {comm.rank} of {comm.size} failed, ending the job:\n{traceback.format_exc()}", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(0.5)  # mpiexec drops what it has not yet read when it ends the job
        comm.abort(code if isinstance(code, int) else 1)


def _import_mpi() -> Any:
    """Import ``mpi4py.MPI``, which starts MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but finds no MPI library
        raise ImportError(f'running over MPI needs mpi4py and MPI: pip install "probtensor[mpi]" ({error})') from error
    return MPI


def _to_host(tensor: Tensor) -> Tensor:
    """Return the values as a contiguous vector in host memory, sharing memory where possible."""
    return tensor.detach().cpu().contiguous().reshape(-1)


def _check_summable(tensor: Tensor) -> None:
    if tensor.dtype not in _SUMMABLE:
        names = ", ".join(str(dtype) for dtype in _SUMMABLE)
        raise ValueError(f"tensor: expected one of {names}, got {tensor.dtype}")


def _check_root(root: int, size: int) -> None:
    if not 0 <= root < size:
        raise ValueError(f"root: expected a rank from 0 to {size - 1}, got {root}")


def _pending_after(requests: dict[int, MPI.Request], timeout: float) -> list[int]:
    """Wait up to `timeout` seconds for receives; cancel the unfinished ones and return their keys."""
    deadline = time.monotonic() + timeout
    pending = dict(requests)
    pause = 0.0
    while pending:
        pending = {key: request for key, request in pending.items() if not request.Test()}
        if pending and time.monotonic() > deadline:
            for request in pending.values():
                request.Cancel()
                request.Wait()
            break
        time.sleep(pause)
        pause = min(pause + 1e-5, 1e-3)
    return sorted(pending)
