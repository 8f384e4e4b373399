"""Sweeps on several MPI ranks: their time, and what the cost model of docs/ranks/cost.md says of it.

Run by ``python -m benchmarks ranks``, which starts this file under the launcher for each number of ranks.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.scale import now, random_rows, scale_model
from probtensor.blocks import add_up
from probtensor.comm import Comm, Serial, world
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.resources import keep_freed_memory

__all__ = ["rank_lines"]

REPEATS = 7


def rank_lines(launcher: Sequence[str], ranks: Sequence[int], sizes: Sequence[int], **options: Any) -> list[str]:
    """Markdown lines: seconds of a CP sweep on each number of ranks, strong scaling, and the model's prediction.

    The model is ``a N / P + s + sum of the collectives``: ``a`` and ``s`` from one rank with all rows and with few,
    collectives timed by themselves, with as many bytes.
    """
    found: dict[tuple[int, int], dict[str, float]] = {}
    for P in ranks:
        for N in sizes:
            job = json.dumps({"rows": N} | options)
            start = [*launcher, "-n", str(P)] if P > 1 else []
            done = subprocess.run(
                [*start, sys.executable, "-m", "benchmarks.ranks", job], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{P} ranks, {N} rows: {done.stderr}")
            found[P, N] = json.loads(done.stdout.splitlines()[-1])
    lines = [
        "| ranks | rows | seconds a sweep | speed-up | efficiency | of it collectives, s | predicted, s | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    one = {N: found[1, N] for N in sizes}
    for (P, N), job in found.items():
        a = (one[N]["sweep"] - one[N]["few"]) / (N - job["few_rows"])
        s = one[N]["few"] - a * job["few_rows"]
        predicted = a * N / P + s + job["collectives"]
        speed_up = one[N]["sweep"] / job["sweep"]
        lines.append(
            f"| {P} | {N:,} | {job['sweep']:.4f} | {speed_up:.2f} | {100 * speed_up / P:.0f} % | "
            f"{job['collectives']:.5f} | {predicted:.4f} | {100 * (job['sweep'] / predicted - 1):+.0f} % |"
        )
    return lines


def main() -> None:
    """One job: this rank's share of the rows, timed."""
    job = json.loads(sys.argv[1])
    keep_freed_memory()
    comm = world()
    dtype = {"float32": torch.float32, "float64": torch.float64}[job["dtype"]]
    model = scale_model(job["device"], job["rank"], job["coordinates"], dtype)

    def timed(n: int, comm: Comm) -> tuple[float, State]:
        parts = random_rows(model, n, job["coordinates"], dtype, job["device"], comm.rank, comm.size)
        sums = comm.sum(*add_up(map(model.local_start, parts)))
        state = model.start(sums, torch.Generator().manual_seed(0))
        seconds = []
        for _ in range(REPEATS + 1):
            comm.barrier()
            began = now(parts)
            state = _sweep(model, state, parts, comm)
            seconds.append(now(parts) - began)
        return statistics.median(seconds[1:]), state

    n = job["rows"] // comm.size
    few = min(n, 1000)
    whole, state = timed(n, comm)
    little = timed(few, Serial())[0] if comm.size == 1 else 0.0
    collectives = _collectives(comm, [f.sites.precision for f in state.factors], job["rank"])
    if comm.is_root:
        print(json.dumps({"sweep": whole, "few": little, "few_rows": few, "collectives": collectives}))


@torch.no_grad()
def _sweep(model: FunctionalTucker, state: State, parts: list[Rows], comm: Comm) -> State:
    for block in model.blocks:
        sums = comm.sum(*add_up(model.local_statistics(state, block, rows) for rows in parts))
        state = model.update(state, block, sums)
    state, _ = model.end_sweep(state, parts, lambda found: comm.sum(*add_up(found)))
    float(comm.broadcast(model.bound(state)))
    return state


def _collectives(comm: Comm, like: list[torch.Tensor], rank: int) -> float:
    """Seconds of the sums and of the broadcast of a sweep, by themselves."""
    packed = rank * (rank + 1) // 2 + rank
    tensors = [x.new_zeros(x.shape[0], packed) for x in like]
    one = tensors[0].new_zeros(())

    def all_of_them() -> None:
        for tensor in tensors:
            comm.sum(tensor, tensor)
        float(comm.broadcast(one))

    return _median(all_of_them, comm, tensors[0].is_cuda)


def _median(work: Callable[[], None], comm: Comm, cuda: bool) -> float:
    seconds = []
    for _ in range(REPEATS + 3):
        comm.barrier()
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


if __name__ == "__main__":
    main()
