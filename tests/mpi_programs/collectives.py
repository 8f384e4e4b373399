"""Compare every collective with the answer computed serially, on any number of ranks.

Each rank can compute what the others hold, so the expected values need no communication.
"""

import sys

import numpy as np
import pytest
import torch
from mpi4py import MPI

import probtensor.comm_mpi as comm_module
from probtensor.blocks import add_up
from probtensor.comm import Serial, abort_on_error, world
from probtensor.comm_mpi import Mpi
from probtensor.comm_nccl import Nccl

SHAPES = [(), (1,), (0,), (2, 0, 3), (7,), (3, 5), (1001,), (2, 3, 4)]


def held_by(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    if dtype == torch.int64:
        return torch.randint(-(2**60), 2**60, shape, generator=generator)
    magnitude = 10.0 ** torch.randint(-8, 8, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude).to(dtype)


def check_sum(comm: Mpi, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mine = held_by(comm.rank, shape, dtype)
    before = mine.clone()
    total = comm.sum(mine)
    expected = held_by(0, shape, dtype)
    for rank in range(1, comm.size):
        expected = expected + held_by(rank, shape, dtype)
    assert total.dtype == dtype
    assert total.shape == mine.shape
    assert torch.equal(mine, before)
    assert total.data_ptr() != mine.data_ptr() or mine.numel() == 0
    assert torch.equal(total, expected), (shape, dtype, total, expected)
    bits = comm.gather_bytes(total.numpy().tobytes())
    assert len(set(bits)) == 1, f"the ranks disagree on the sum of {shape} {dtype}"


def check_sum_with_rest(comm: Mpi) -> None:
    """The same bits however many parts each rank has added up before."""
    parts = [held_by(number, (1001,), torch.float64) for number in range(40)]
    expected = Serial().sum(*add_up(parts))
    mine = parts[comm.rank :: comm.size] if comm.rank else [*parts[:: comm.size], torch.zeros(1001).double()]
    assert torch.equal(comm.sum(*add_up(mine)), expected)


def check_broadcast(comm: Mpi, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for root in range(comm.size):
        mine = held_by(comm.rank, shape, dtype)
        before = mine.clone()
        assert torch.equal(comm.broadcast(mine, root), held_by(root, shape, dtype))
        assert torch.equal(mine, before)


def check_gather_bytes(comm: Mpi) -> None:
    for lengths in (
        [0] * comm.size,
        [3 * rank for rank in range(comm.size)],
        [1000 - rank for rank in range(comm.size)],
    ):
        expected = [bytes((rank + i) % 256 for i in range(length)) for rank, length in enumerate(lengths)]
        assert comm.gather_bytes(expected[comm.rank]) == expected


def check_exchange_bytes(comm: Mpi) -> None:
    def sent(source: int, target: int) -> bytes:
        return bytes([source, target]) * ((source * 7 + target * 3) % 11)

    received = comm.exchange_bytes([sent(comm.rank, target) for target in range(comm.size)])
    assert received == [sent(source, comm.rank) for source in range(comm.size)]


def check_torch_distributed(comm: Nccl) -> None:
    """What NCCL does between GPUs, done by Gloo in host memory."""
    for dtype in (torch.float64, torch.float32, torch.int64):
        for shape in SHAPES:
            mine = held_by(comm.rank, shape, dtype)
            before = mine.clone()
            total, expected = comm.sum(mine), held_by(0, shape, dtype)
            for rank in range(1, comm.size):
                expected = expected + held_by(rank, shape, dtype)
            assert (total.dtype, total.shape) == (dtype, mine.shape)
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=0 if dtype == torch.int64 else 1e3)
            assert len(set(comm.gather_bytes(total.numpy().tobytes()))) == 1
            assert torch.equal(mine, before)
        for root in range(comm.size):
            mine = held_by(comm.rank, (3, 4), dtype)
            assert torch.equal(comm.broadcast(mine.T, root), held_by(root, (3, 4), dtype).T)
    with pytest.raises(ValueError, match=r"rank 1: sum of torch.float32 \(3,\)"):
        comm.sum(torch.zeros(2 + comm.rank))
    comm.barrier(timeout=30.0)


def outgoing(rank: int, size: int, n: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that tell whence they come, and where each goes."""
    generator = torch.Generator().manual_seed(1000 * n + rank)
    table = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    table[:, :1] = 1e6 * rank + torch.arange(n)[:, None]
    return table, torch.randint(size, (n,), generator=generator)


def check_exchange(comm: Mpi) -> None:
    """Ragged tables, ranks with nothing to send or to receive; rows come by rank, each rank's in their order."""
    last = comm.size - 1
    for lengths in ([0] * comm.size, [5 * rank for rank in range(comm.size)], [37 - 9 * r for r in range(comm.size)]):
        for columns in (1, 4):
            tables = [outgoing(rank, comm.size, n, columns) for rank, n in enumerate(lengths)]
            for deal in (
                lambda to: to,
                torch.zeros_like,  # all to rank 0
                lambda to: torch.full_like(to, last),
                lambda to: torch.where(to == 0, last, to),  # none to rank 0
            ):
                table, to = tables[comm.rank][0], deal(tables[comm.rank][1])
                before = table.clone(), to.clone()
                received = comm.exchange(table, to)
                expected = torch.cat([rows[deal(dealt) == comm.rank] for rows, dealt in tables])
                assert received.dtype == torch.float64
                assert received.shape == expected.shape
                assert torch.equal(received, expected), (lengths, columns, received, expected)
                assert torch.equal(table, before[0])
                assert torch.equal(to, before[1])
    table, to = outgoing(comm.rank, comm.size, 12, 6)
    strided = table[:, ::2]
    everything = [outgoing(rank, comm.size, 12, 6) for rank in range(comm.size)]
    expected = torch.cat([rows[:, ::2][dealt == comm.rank] for rows, dealt in everything])
    assert torch.equal(comm.exchange(strided, to), expected)
    assert not comm.exchange(strided.clone().requires_grad_(), to).requires_grad
    special = torch.tensor([[torch.nan, -0.0, torch.inf, 5e-324]], dtype=torch.float64)
    back = comm.exchange(special, torch.tensor([comm.rank]))
    assert back.numpy().tobytes() == special.numpy().tobytes()


def check_strided_and_differentiable(comm: Mpi) -> None:
    strided = held_by(comm.rank, (3, 4), torch.float64).T
    assert torch.equal(comm.sum(strided), comm.sum(strided.contiguous()))
    assert torch.equal(comm.broadcast(strided), held_by(0, (3, 4), torch.float64).T)
    leaf = torch.ones(3, requires_grad=True)
    assert not comm.sum(leaf).requires_grad


def check_refusals(comm: Mpi) -> None:
    def message(call: object, *args: object) -> str:
        try:
            call(*args)  # type: ignore[operator]
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{call} accepted {args}")

    assert "torch.float16" in message(comm.sum, torch.zeros(2, dtype=torch.float16))
    assert f"got {comm.size}" in message(comm.broadcast, torch.zeros(2), comm.size)
    if comm.size > 1:
        text = message(comm.sum, torch.zeros(2 + (comm.rank == comm.size - 1)))
        assert "rank 0: sum of torch.float32 (2,)" in text
        assert f"rank {comm.size - 1}: sum of torch.float32 (3,)" in text
        text = message(comm.sum if comm.is_root else comm.broadcast, torch.zeros(2))
        assert "rank 1: broadcast" in text
        text = message(comm.sum, torch.zeros(2, dtype=torch.float64 if comm.is_root else torch.float16))
        assert "rank 1: sum of torch.float16" in text
        text = message(comm.broadcast, torch.zeros(2), comm.rank)
        assert "rank 1: broadcast from 1" in text


def main() -> None:
    world_comm = world()
    size = MPI.COMM_WORLD.Get_size()
    assert isinstance(world_comm, Serial if size == 1 else Mpi)
    comm = Mpi()
    assert (comm.rank, comm.size) == (MPI.COMM_WORLD.Get_rank(), size)
    assert comm.is_root == (comm.rank == 0)
    with abort_on_error(comm):
        for chunk in (2**29, 1000, 1):
            comm_module._CHUNK_BYTES = chunk
            for shape in SHAPES if chunk > 1 else SHAPES[:5]:
                for dtype in (torch.float64, torch.float32, torch.int64):
                    check_sum(comm, shape, dtype)
                    check_broadcast(comm, shape, dtype)
            check_gather_bytes(comm)
            check_exchange(comm)
        comm_module._CHUNK_BYTES = 2**29
        for dtype in (torch.bool, torch.float16, torch.complex128):
            mine = torch.full((5,), comm.rank + 1).to(dtype)
            assert torch.equal(comm.broadcast(mine, size - 1), torch.full((5,), size).to(dtype))
        check_exchange_bytes(comm)
        check_sum_with_rest(comm)
        check_strided_and_differentiable(comm)
        if size > 1:
            check_torch_distributed(Nccl(comm, backend="gloo"))
        check_refusals(comm)
        for _ in range(20):
            comm.barrier(timeout=30.0)
        everyone = comm.gather_bytes(np.int64(comm.rank).tobytes())
        assert [int(np.frombuffer(b, np.int64)[0]) for b in everyone] == list(range(size))
    if comm.is_root:
        print(f"ok on {size}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
