"""The ranks of an MPI job. This is the only module that imports mpi4py, and it does so on first use only."""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING, Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.comm import Comm, check_root, check_summable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

__all__ = ["Mpi", "import_mpi"]

Array = np.ndarray[Any, Any]

_CHUNK_BYTES = 2**29  # per message: MPI counts are 32-bit, and several libraries fail from 1 or 2 GiB on
_BARRIER_TAG = 7101


@final
class Mpi(Comm):
    """The ranks of an MPI communicator.

    Parameters
    ----------
    communicator : mpi4py.MPI.Intracomm, optional
        Default: all ranks of the job (``COMM_WORLD``).

    Attributes
    ----------
    node_rank, node_size : int
        Number of this process among those of its machine, and how many these are.

    Raises
    ------
    ImportError
        If mpi4py, or the MPI library that it needs, is missing.
    """

    def __init__(self, communicator: MPI.Intracomm | None = None) -> None:
        self._comm = import_mpi().COMM_WORLD if communicator is None else communicator
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        node = self._comm.Split_type(import_mpi().COMM_TYPE_SHARED)
        self.node_rank, self.node_size = node.Get_rank(), node.Get_size()
        node.Free()

    def sum(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        """Sum over the ranks: each rank adds up one segment in rank order, then all segments go to all ranks."""
        self.require_agreement("sum" if rest is None else "sum with rest", tensor)
        check_summable(tensor)
        terms = _to_host(tensor).numpy()
        rests = None if rest is None else _to_host(rest).numpy()
        total = np.empty_like(terms)
        step = max(1, _CHUNK_BYTES // terms.itemsize)
        for start in range(0, terms.size, step):
            chunk = slice(start, start + step)
            self._sum_chunk(terms[chunk], None if rests is None else rests[chunk], total[chunk])
        return torch.from_numpy(total).reshape(tensor.shape).to(tensor.device)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Give every rank the tensor of rank `root`."""
        self.require_agreement(f"broadcast from {root}", tensor)
        check_root(root, self.size)
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

    def exchange_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        """Send each rank a part of its own, in rounds of bounded size."""
        share = max(1, _CHUNK_BYTES // self.size)  # to each rank, per round
        rounds = int(self._gather_int(max(-(-len(part) // share) for part in parts)).max())
        received: list[list[bytes]] = [[] for _ in range(self.size)]
        for start in range(0, rounds * share, share):
            pieces = [part[start : start + share] for part in parts]
            sent = np.array([len(piece) for piece in pieces])
            incoming = np.empty_like(sent)
            self._comm.Alltoall(sent, incoming)
            buffer, ends = np.empty(incoming.sum(), dtype=np.uint8), incoming.cumsum()
            self._comm.Alltoallv(
                [np.frombuffer(b"".join(pieces), dtype=np.uint8), (sent, sent.cumsum() - sent)],
                [buffer, (incoming, ends - incoming)],
            )
            for part, end, count in zip(received, ends, incoming, strict=True):
                part.append(buffer[end - count : end].tobytes())
        return [b"".join(part) for part in received]

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

    def _sum_chunk(self, terms: Array, rests: Array | None, total: Array) -> None:
        """Write into `total` the sum over the ranks of the one-dimensional `terms`, and of their `rests`."""
        size = self.size
        counts = np.array([terms.size // size + (r < terms.size % size) for r in range(size)])
        segments = (counts, counts.cumsum() - counts)
        own = counts[self.rank]

        def from_all(x: Array) -> Array:
            received = np.empty((size, own), dtype=x.dtype)  # my segment, from every rank
            self._comm.Alltoallv([x, segments], [received, (np.full(size, own), own * np.arange(size))])
            return received

        summands = from_all(terms)
        if rests is None:
            own_total = summands[0]
            for summand in summands[1:]:
                own_total += summand
        else:
            whole, left = add_up(map(torch.from_numpy, summands))
            own_total = (whole + (left + torch.from_numpy(from_all(rests)).sum(0))).numpy()
        self._comm.Allgatherv(own_total, [total, segments])

    def _gather_int(self, value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Gather one integer a rank, on all ranks."""
        values = np.empty(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([value], dtype=np.int64), values)
        return values

    def require_agreement(self, operation: str, tensor: Tensor) -> None:
        """Raise ValueError on all ranks if they do not all do `operation` with one dtype and shape."""
        mine = f"{operation} of {tensor.dtype} {tuple(tensor.shape)}".encode()
        fingerprints = self._gather_int(zlib.crc32(mine))
        if (fingerprints != fingerprints[0]).any():
            calls = "; ".join(f"rank {r}: {call.decode()}" for r, call in enumerate(self.gather_bytes(mine)))
            raise ValueError(f"tensor: expected the same operation, dtype and shape on every rank, got {calls}")


def import_mpi() -> Any:
    """Import ``mpi4py.MPI``, which starts MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but finds no MPI library
        raise ImportError(f"running over MPI needs mpi4py and MPI: pip install mpi4py mpich ({error})") from error
    return MPI


def _to_host(tensor: Tensor) -> Tensor:
    """Return the values as a contiguous vector in host memory, sharing memory where possible."""
    return tensor.detach().cpu().contiguous().reshape(-1)


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
