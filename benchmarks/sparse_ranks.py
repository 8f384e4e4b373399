"""Steps of truncated EM on several MPI ranks, and over an array on disk in little memory.

Run by ``python -m benchmarks sparse-ranks``, which starts this file under the launcher for each number of ranks.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probtensor.comm import world
from probtensor.models import BSC

__all__ = ["sparse_rank_lines"]

STEPS = 6
WIDTH = 25  # entries of a point


def sparse_rank_lines(launcher: Sequence[str], ranks: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Markdown lines: seconds of a step of BSC on each number of ranks, peak memory, and whether results are equal."""
    lines = [
        "| ranks | points | MB on disk | seconds a step | speed-up | most memory a rank, MB | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for N in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "points.npy"
            _write(path, N)
            one = None
            for P in ranks:
                start = [*launcher, "-n", str(P)] if P > 1 else []
                command = [*start, sys.executable, "-m", "benchmarks.sparse_ranks", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{P} ranks, {N} points: {done.stderr}")
                job = json.loads(done.stdout.splitlines()[-1])
                one = job["step"] if one is None else one
                lines.append(
                    f"| {P} | {N:,} | {path.stat().st_size / 1e6:.0f} | {job['step']:.3f} | {one / job['step']:.2f} | "
                    f"{job['memory']:.0f} | {job['bound']!r} |"
                )
    return lines


def _write(path: Path, n_points: int) -> None:
    """Bars, drawn and written piece by piece."""
    rng = np.random.default_rng(0)
    bars = np.concatenate([np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))])
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(n_points, WIDTH))
    for start in range(0, n_points, 2**16):
        n = min(2**16, n_points - start)
        array[start : start + n] = 10.0 * (rng.random((n, 10)) < 0.2) @ bars + 2 * rng.normal(size=(n, WIDTH))
    array.flush()


def main() -> None:
    """One job: this rank's share of the points on disk."""
    comm = world()
    everything = np.load(sys.argv[1], mmap_mode="r")
    n = len(everything)
    mine = everything[n * comm.rank // comm.size : n * (comm.rank + 1) // comm.size]
    model = BSC(n_components=10, random_state=0, max_iter=STEPS, tol=0.0, progress=False)
    stamps: list[float] = []
    kept = BSC._prior_history

    def stamped(self: BSC, params: object) -> object:
        stamps.append(time.perf_counter())
        return kept(self, params)  # type: ignore[arg-type]

    BSC._prior_history = stamped  # type: ignore[assignment, method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(mine, comm=comm)
    step = statistics.median(np.diff(stamps))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if comm.is_root:
        print(json.dumps({"step": step, "memory": memory, "bound": model.bound_}))


if __name__ == "__main__":
    main()
