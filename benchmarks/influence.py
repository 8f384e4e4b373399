"""Seconds and memory of the influence of training cells, beside what the forward passes must cost.

Run by ``python -m benchmarks influence``, which starts this file for each line, so that memory is that line's alone.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from probtensor.inference.influence import influence, output_layer_influence

__all__ = ["DainNetwork", "influence_lines", "job_of", "jobs_of", "random_rows"]

N_LABELS = 1000  # of each of three modes
WIDTHS = (150, 1024, 1024, 128)
QUERY = 2000
Rows = tuple[Tensor, Tensor]

KINDS = {
    "last": "output layer",
    "given": "the same, hidden values and errors given",
    "all": "all parameters",
}


class DainNetwork(nn.Module):
    """DAIN's released network: three tables of embeddings, dense layers 150, 1024, 1024, 128, one output."""

    def __init__(self, n_labels: int = N_LABELS, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n_labels, widths[0] // 3) for _ in range(3))
        self.layers = nn.Sequential(*(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())))
        self.out = nn.Linear(widths[-1], 1)

    def hidden(self, labels: Tensor) -> Tensor:
        """What the output layer is given."""
        return self.layers(torch.cat([table(labels[:, k]) for k, table in enumerate(self.tables)], dim=1))

    def forward(self, labels: Tensor) -> Tensor:
        return self.out(self.hidden(labels)).squeeze(1)


def jobs_of(kinds: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, int, int]]:
    """Jobs ``(kind, cells, checkpoints)``: of each size with one checkpoint, or without sizes those of the bars."""
    if sizes:
        return [(kind, size, 1) for kind in kinds for size in sizes]
    return [(kind, 32_000, 1) if kind == "all" else (kind, 40_000, 50) for kind in kinds]


def influence_lines(jobs: Sequence[tuple[str, int, int]], device: str, chunk: int) -> list[str]:
    """Markdown lines for jobs ``(kind, cells, checkpoints)``: seconds, memory, and the least that passes must take."""
    lines = [
        "| | cells | checkpoints | seconds | of them on the processor | peak memory beyond model and rows, MB "
        "| Tflop of passes | at the speed of matrix products here, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, cells, checkpoints in jobs:
        job = {"kind": kind, "cells": cells, "checkpoints": checkpoints, "device": device, "chunk": chunk}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.influence", json.dumps(job)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{job}: {done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        least = found["flop"] / found["speed"]
        lines.append(
            f"| {KINDS[kind]} | {cells:,} | {checkpoints} | {found['seconds']:.2f} | {found['busy']:.2f} "
            f"| {found['memory'] / 1e6:.0f} | {found['flop'] / 1e12:.2f} | {least:.1f} |"
        )
    return lines


def main() -> None:
    """One job: its seconds, memory, and the speed of matrix products."""
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    print(json.dumps(measure(job["kind"], job["cells"], job["checkpoints"], job["device"], job["chunk"])))


def measure(kind: str, cells: int, checkpoints: int, device: str, chunk: int) -> dict[str, float]:
    """Seconds, bytes beyond the model and the rows, floating-point operations of the forward passes, their speed."""
    torch.manual_seed(0)
    module = DainNetwork().to(device)
    train, query = (random_rows(n, device) for n in (cells, QUERY))
    state = {name: value.detach() for name, value in module.state_dict().items()}
    few = train[0][:64], train[1][:64]
    job_of(module, kind, (few, few), 1, chunk)()  # loads what there is to load
    work = job_of(module, kind, (train, query), checkpoints, chunk)
    before = _memory(device) if device == "cpu" else float(torch.cuda.memory_allocated())
    seconds, busy = _timed(work, device)
    memory = _memory(device) - before
    dense = sum(value.numel() for name, value in state.items() if "weight" in name and "tables" not in name)
    flop = 0.0 if kind == "given" else 2.0 * dense * (cells + QUERY) * checkpoints * (3 if kind == "all" else 1)
    return {"seconds": seconds, "busy": busy, "memory": memory, "flop": flop, "speed": _speed(device)}


def job_of(
    module: DainNetwork, kind: str, rows: tuple[Rows, Rows], checkpoints: int, chunk: int
) -> Callable[[], Tensor]:
    if kind == "given":
        (hidden, errors), query = (_hidden(module, part, chunk) for part in rows)
        return lambda: output_layer_influence((hidden, errors, *query, 1e-3) for _ in range(checkpoints))
    at = [(module.state_dict(), 1e-3)] * checkpoints
    return lambda: influence(module, *rows, parameters=kind, checkpoints=at, chunk=chunk)  # type: ignore[arg-type]


@torch.no_grad()
def _hidden(module: DainNetwork, rows: Rows, chunk: int) -> Rows:
    """Hidden values (n, d) and errors (n,) of the module's own state."""
    labels, values = rows
    hidden = torch.cat([module.hidden(part) for part in labels.split(chunk)])
    return hidden, torch.addmv(module.out.bias - values, hidden, module.out.weight[0])


def random_rows(n: int, device: str) -> Rows:
    generator = torch.Generator(device).manual_seed(n)
    labels = torch.randint(N_LABELS, (n, 3), generator=generator, device=device)
    return labels, torch.randn(n, generator=generator, device=device)


def _timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds by the clock, and of the processor: less where others use it too."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, busy = time.perf_counter(), time.process_time()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def _memory(device: str) -> float:
    """Most bytes so far: of the process, or of tensors on the GPU."""
    if device != "cpu":
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@cache
def _speed(device: str) -> float:
    """Floating-point operations a second of a float32 product of matrices, the best of three."""
    A, B = (torch.randn(4096, 1024, device=device), torch.randn(1024, 1024, device=device))
    found = [_timed(lambda: [A @ B for _ in range(2)], device)[int(device == "cpu")] for _ in range(4)]
    return 2 * 2.0 * 4096 * 1024 * 1024 / min(found[1:])


if __name__ == "__main__":
    main()
