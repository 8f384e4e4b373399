"""Steps of variational inference on several MPI ranks; `python -m benchmarks svi-ranks` starts it under a launcher."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from probtensor.comm import world
from probtensor.inference.variational import fit_svi
from probtensor.resources import keep_freed_memory

__all__ = ["variational_rank_lines"]

SIZES, RANK, STEPS = (1000, 1000), 8, 12


def variational_rank_lines(launcher: Sequence[str], ranks: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Markdown lines: seconds of a step over all rows of a CP model, and the speed-up."""
    lines = ["| ranks | rows | seconds a step | speed-up |", "|---|---|---|---|"]
    for N in sizes:
        one = None
        for P in ranks:
            start = [*launcher, "-n", str(P)] if P > 1 else []
            command = [*start, sys.executable, "-m", "benchmarks.variational_ranks", str(N)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{P} ranks, {N} rows: {done.stderr}")
            seconds = json.loads(done.stdout.splitlines()[-1])
            one = seconds if one is None else one
            lines.append(f"| {P} | {N:,} | {seconds:.4f} | {one / seconds:.2f} |")
    return lines


def model(labels: Tensor, values: Tensor) -> None:
    """A matrix of rank 8 by normal factors, with known noise."""
    priors = [dist.Normal(torch.zeros(size, RANK), 1.0).to_event(2) for size in SIZES]
    factors = [pyro.sample(f"factor_{k}", prior) for k, prior in enumerate(priors)]
    with pyro.plate("rows", len(values)):
        mean = (factors[0][labels[:, 0]] * factors[1][labels[:, 1]]).sum(1)
        pyro.sample("value", dist.Normal(mean, 0.5), obs=values)


def main() -> None:
    """One job: this rank's share of the rows, timed."""
    keep_freed_memory()
    comm, n = world(), int(sys.argv[1])
    generator = torch.Generator().manual_seed(comm.rank)
    share = n // comm.size
    labels = torch.stack([torch.randint(size, (share,), generator=generator) for size in SIZES], 1)
    values = torch.randn(share, generator=generator)
    times: list[float] = []
    fit_svi(
        model,
        AutoNormal(model),
        [labels, values],
        comm=comm,
        n_steps=STEPS,
        tol=0.0,
        report=lambda step, bound: times.append(time.perf_counter()),
    )
    if comm.is_root:
        print(json.dumps(statistics.median(b - a for a, b in pairwise(times[1:]))))


if __name__ == "__main__":
    main()
