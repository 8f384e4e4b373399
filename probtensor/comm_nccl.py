"""Sums of GPU tensors between GPUs, by NCCL; everything else goes through MPI, which also brings the ranks together."""

from __future__ import annotations

import atexit
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn, final

import torch
import torch.distributed as dist
from torch import Tensor

from probtensor.comm import Comm, check_root, check_summable
from probtensor.comm_mpi import Mpi

__all__ = ["Nccl"]

_TIMEOUT = timedelta(minutes=30)  # of one operation: a rank that is gone for longer is not coming back


@final
class Nccl(Comm):
    """The ranks of an MPI job, each with a GPU of its own.

    GPU tensors are summed and broadcast from GPU to GPU, without the host's memory. All ranks get the same bits, and
    again in the next run on the same machines; on others the order of the sum, so its rounding, may differ. Tensors in
    host memory go through MPI.

    Parameters
    ----------
    mpi : Mpi
        The ranks. This process's GPU is torch's current one.
    backend : {"nccl", "gloo"}, default "nccl"
        "gloo" works in host memory and takes every tensor that way: for machines without GPUs, to try a program.
    """

    def __init__(self, mpi: Mpi, backend: str = "nccl") -> None:
        self._mpi = mpi
        self.rank, self.size = mpi.rank, mpi.size
        self._backend = backend
        if dist.is_initialized():  # by the user, as for DistributedDataParallel: a group of our own beside theirs
            self._group = dist.new_group(backend=backend, timeout=_TIMEOUT)
            return
        dist.init_process_group(
            backend, store=_meeting_point(mpi), rank=self.rank, world_size=self.size, timeout=_TIMEOUT
        )
        atexit.register(dist.destroy_process_group)
        self._group = dist.group.WORLD

    def sum(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        """Sum over the ranks; the rest is added to each rank's summand before."""
        if not self._takes(tensor):
            return self._mpi.sum(tensor, rest)
        self._mpi.require_agreement("sum", tensor)
        check_summable(tensor)
        mine = tensor.detach() if rest is None else tensor.detach() + rest.detach()
        total = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Give every rank the tensor of rank `root`."""
        if not self._takes(tensor):
            return self._mpi.broadcast(tensor, root)
        self._mpi.require_agreement(f"broadcast from {root}", tensor)
        check_root(root, self.size)
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(result.reshape(-1).view(torch.uint8), root, group=self._group)
        return result

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all ranks, in rank order."""
        return self._mpi.gather_bytes(data)

    def exchange_bytes(self, parts: Sequence[bytes]) -> list[bytes]:
        """Send each rank a part of its own."""
        return self._mpi.exchange_bytes(parts)

    def barrier(self, timeout: float = 600.0) -> None:
        """Wait until every rank has come here, and its GPU has done what it was given."""
        if self._backend == "nccl":
            torch.cuda.synchronize()
        self._mpi.barrier(timeout)

    def abort(self, code: int = 1) -> NoReturn:
        """End the processes of all ranks at once with the exit status `code`."""
        self._mpi.abort(code)

    def _takes(self, tensor: Tensor) -> bool:
        return tensor.numel() > 0 and (tensor.is_cuda or self._backend == "gloo")


def _meeting_point(mpi: Mpi) -> Any:
    """A store that all ranks reach: rank 0 listens on a free port of its machine, and MPI tells the others where."""
    if mpi.is_root:
        host = socket.gethostbyname(socket.gethostname()) if mpi.node_size < mpi.size else "127.0.0.1"
        store = dist.TCPStore(host, 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]
        mpi.gather_bytes(f"{host}:{store.port}".encode())
        return store
    host, port = mpi.gather_bytes(b"")[0].decode().rsplit(":", 1)
    return dist.TCPStore(host, int(port), None, False, wait_for_workers=False)  # type: ignore[attr-defined]
