"""Communication between the ranks of a job: one small interface, serial by default.

``Comm`` is what the engines see. ``Serial`` is a process on its own, ``Mpi`` a group of MPI ranks, and ``world()``
picks the one that fits how the process was started: `probtensor.comm_mpi` is imported under an MPI launcher only.

Conventions
-----------
Every method but ``abort`` is collective: all ranks call the same methods in the same order with tensors of one dtype
and shape. Only buffers travel, never pickles. Results come back detached, on the device of the tensor passed in.

``sum`` adds in rank order, ``((x_0 + x_1) + x_2) + …``: each element is added up by one rank and then handed to all,
so all ranks hold the same bits, run after run, on any MPI library; with a ``rest``, on any number of ranks.
``MPI_Allreduce`` promises neither: with MPICH 5.0 its order changes with the length of the buffer and the number of
ranks.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import NoReturn, TypeVar, cast, final

import torch
from torch import Tensor

__all__ = ["Comm", "Serial", "abort_on_error", "world"]

Result = TypeVar("Result")

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

    Examples
    --------
    >>> comm = world()  # of this process alone, unless mpiexec or srun started it
    >>> comm.rank, comm.size, comm.is_root
    (0, 1, True)
    >>> comm.sum(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    rank: int
    size: int

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    @abstractmethod
    def sum(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        """Sum a float64, float32 or int64 tensor of any shape over the ranks: a new tensor, the same bits everywhere.

        With what rounding has cut off each rank's summand (`add_up` in `probtensor.blocks`) as `rest`, of the same
        shape, the sum is rounded once, at the end: its bits then do not depend on how the ranks share the work.

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
    def exchange_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        """Send each rank a part of its own, and return what each sent to this one, in rank order; lengths may be 0."""

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
        rows, ranks = table.detach().cpu(), to.detach().cpu()
        parts = self.exchange_bytes([rows[ranks == rank].numpy().tobytes() for rank in range(self.size)])
        received = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(8), dtype=torch.float64)
        return received[: sum(map(len, parts)) // 8].reshape(-1, table.shape[1]).to(table.device)

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

    def sum(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        """Return `tensor` itself, or with its rest."""
        check_summable(tensor)
        return tensor if rest is None else tensor + rest

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Return `tensor` itself."""
        check_root(root, self.size)
        return tensor

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return ``[data]``."""
        return [data]

    def exchange_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        """Return `parts`."""
        return list(parts)

    def exchange(self, table: Tensor, to: Tensor) -> Tensor:
        """Return `table` itself."""
        return table

    def barrier(self, timeout: float = 600.0) -> None:
        """Return at once."""

    def abort(self, code: int = 1) -> NoReturn:
        """Exit with the status `code`."""
        sys.exit(code)


@cache
def world() -> Comm:
    """Return the communicator of this job.

    Under a launcher with more than one process this also makes the processes fit to work together, once: each gets its
    share of the machine's cores as torch threads, unless OMP_NUM_THREADS is set (rank 0 says so on stderr); each takes
    a GPU of its own where there are enough; and an exception that nothing catches on one rank ends the whole job with
    its traceback, instead of leaving the others waiting.

    Returns
    -------
    Comm
        ``Serial`` for a process on its own: mpi4py is then not imported. Under an MPI launcher (mpiexec, srun) with
        more than one process ``Nccl`` where each process of a machine has a GPU of its own, else ``Mpi``.

    Raises
    ------
    ImportError
        If the process was started by an MPI launcher and mpi4py is missing.
    RuntimeError
        If the launcher started several processes but MPI says that each is alone: they would all do the whole work.

    Examples
    --------
    >>> world().size  # more under mpiexec -n 4 python program.py
    1
    """
    name = next((name for name in _LAUNCHED_SIZE if name in os.environ), None)
    launched = None if name is None else int(os.environ[name])
    if launched == 1 or (launched is None and not any(rank in os.environ for rank in _LAUNCHED_RANK)):
        return Serial()
    from probtensor.comm_mpi import Mpi, import_mpi

    comm = Mpi()
    if launched is not None and comm.size == 1:
        library = import_mpi().Get_library_version().splitlines()[0].strip("\0 ")
        raise RuntimeError(
            f"the launcher started {launched} processes ({name}={launched}), but MPI says that this process is alone: "
            f"mpi4py loaded {library!r}, the launcher belongs to another MPI or gave no process management interface. "
            f"Start with the mpiexec of that library (pip wheels put it in {os.path.dirname(sys.executable)})."
        )
    _end_job_on_uncaught(comm)
    _share_cores(comm, comm.node_size)
    gpu = _own_gpu(comm, comm.node_rank, comm.node_size)
    if gpu is None:
        return comm
    from probtensor.comm_nccl import Nccl

    torch.cuda.set_device(gpu)
    return Nccl(comm)


@contextmanager
def abort_on_error(comm: Comm) -> Iterator[None]:
    """End the whole job when this rank fails, instead of leaving the others waiting for it.

    An exception inside the block prints its traceback and ends the processes of all ranks with a non-zero status. With
    a single process, and for an exit with status 0, the exception passes through as usual. `world` does this for
    exceptions that nothing catches; the block is for ``sys.exit`` and for programs with a communicator of their own.

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
        end_job(comm, _failed(comm, traceback.format_exc()), code if isinstance(code, int) else 1)


def refuse_together(comm: Comm, check: Callable[[], Result]) -> Result:
    """What `check` returns on this rank, if it succeeds on all; else its ValueError on all ranks, naming them.

    Parameters
    ----------
    comm : Comm
    check : callable
        Called once, without communication inside.

    Raises
    ------
    ValueError
        If `check` raised one on some rank. Other exceptions are this rank's own and end the job: see ``world``.
    """
    fault, result = "", None
    try:
        result = check()
    except ValueError as error:
        if comm.size == 1:
            raise
        fault = str(error) or repr(error)
    faults = [data.decode() for data in comm.gather_bytes(fault.encode())]
    if any(faults):
        raise ValueError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(faults) if text))
    return cast(Result, result)


def end_job(comm: Comm, message: str, code: int) -> NoReturn:
    """Say on stderr why, and end the processes of all ranks with the exit status `code`."""
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.stderr.flush()
    time.sleep(1.0)  # mpiexec drops what it has not yet read when it ends the job
    comm.abort(code)


def _failed(comm: Comm, story: str) -> str:
    return f"rank {comm.rank} of {comm.size} failed, ending the job:\n{story}"


def _end_job_on_uncaught(comm: Comm) -> None:
    """Make an exception that nothing catches end the job."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        end_job(comm, _failed(comm, "".join(traceback.format_exception(kind, error, trace))), 1)

    sys.excepthook = hook


def _own_gpu(comm: Comm, node_rank: int, node_size: int) -> int | None:
    """Index of the GPU of this rank, where each rank has one of its own; else None, on all ranks.

    A rank sees all GPUs of its machine and takes that of its number, or only the one that the launcher gave it.
    """
    n_visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = node_rank if n_visible >= node_size else 0
    taken = str(torch.cuda.get_device_properties(mine).uuid) if n_visible else ""
    all_taken = comm.gather_bytes(taken.encode())
    return mine if b"" not in all_taken and len(set(all_taken)) == comm.size else None


def _share_cores(comm: Comm, n_here: int) -> None:
    """Give each of the `n_here` ranks of a machine its share of the cores, where the user has not said how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    place = f"{socket.gethostname()} {sorted(cores)}".encode()  # launchers may bind ranks to cores of their own
    sharing = min(comm.gather_bytes(place).count(place), n_here)
    threads = max(len(cores) // sharing, 1)
    torch.set_num_threads(threads)
    if comm.is_root:
        print(f"probtensor: {comm.size} ranks, {threads} thread(s) each (OMP_NUM_THREADS overrides)", file=sys.stderr)


def check_summable(tensor: Tensor) -> None:
    """Raise ValueError for a dtype that `Comm.sum` does not take."""
    if tensor.dtype not in _SUMMABLE:
        names = ", ".join(str(dtype) for dtype in _SUMMABLE)
        raise ValueError(f"tensor: expected one of {names}, got {tensor.dtype}")


def check_root(root: int, size: int) -> None:
    """Raise ValueError for a `root` that is no rank."""
    if not 0 <= root < size:
        raise ValueError(f"root: expected a rank from 0 to {size - 1}, got {root}")
