"""Time of a sweep against the number of rows, and on a GPU against what its memory allows."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from probtensor.blocks import number_of_blocks, total_here
from probtensor.contract import packed_size
from probtensor.gaussian import Gamma
from probtensor.kernels import Matern
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_table import in_groups
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import GaussianProcess
from probtensor.resources import keep_freed_memory

__all__ = ["bandwidth", "now", "random_rows", "scale_lines", "scale_model", "timed_sweep"]


def scale_lines(
    device: str, sizes: Sequence[int], *, rank: int, coordinates: int, dtype: torch.dtype, repeats: int = 5
) -> list[str]:
    """Markdown lines: seconds of one CP sweep of three modes with Gaussian noise, for each number of rows.

    Two floors, from the bandwidth of a copy on the same device: every number of the rows read once a mode; and with
    it the other modes' moments, once a row, as if no cache helped.
    """
    keep_freed_memory()  # as every fit does
    model = scale_model(device, rank, coordinates, dtype)
    speed = bandwidth(device)
    item = torch.finfo(dtype).bits // 8
    index = 4 if device.startswith("cuda") else 8
    a_row = 3 * (index * 3 + item)
    moments = 3 * 2 * (packed_size(rank) + rank) * item
    lines = [
        f"copy: {speed / 1e12:.3f} TB/s; a row and sweep: {a_row} bytes (each mode 3 indexes of {index} and a "
        f"value of {item}), with moments {a_row + moments} (3 x 2 x {packed_size(rank) + rank} x {item} more)",
        "",
        "| rows | seconds a sweep | of it sums over rows | nanoseconds a row | rows' floor, s | share | "
        "floor with moments, s | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n in sizes:
        parts = random_rows(model, n, coordinates, dtype, device)
        state = model.start(total_here(map(model.local_start, parts)), torch.Generator().manual_seed(0))
        whole, sums = [], []
        for _ in range(repeats + 1):
            taken, state = timed_sweep(model, state, parts)
            whole.append(taken[0])
            sums.append(taken[1])
        seconds, of_it = statistics.median(whole[1:]), statistics.median(sums[1:])
        floors = [n * bytes_ / speed for bytes_ in (a_row, a_row + moments)]
        cells = [f"{n:,}", f"{seconds:.4f}", f"{of_it:.4f}", f"{1e9 * seconds / n:.2f}"]
        for floor in floors:
            cells += [f"{floor:.4f}", f"{100 * floor / seconds:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def scale_model(device: str, rank: int, coordinates: int, dtype: torch.dtype) -> FunctionalTucker:
    """CP over three continuous modes, with Gaussian noise."""
    like = torch.ones((), dtype=dtype, device=device)
    process = GaussianProcess(torch.linspace(0, 1, coordinates, dtype=dtype, device=device), Matern(1.5))
    free = (torch.ones(rank, dtype=torch.bool, device=device),) * 3
    return FunctionalTucker((process,) * 3, free, "cp", Gamma(like, like), learn=False)


def random_rows(
    model: FunctionalTucker, n: int, coordinates: int, dtype: torch.dtype, device: str, seed: int = 0, share: int = 1
) -> list[Rows]:
    """Rows anywhere, in as many blocks as a fit makes: those of one of `share` ranks that have n rows each."""
    generator = torch.Generator(device).manual_seed(seed)
    positions = torch.randint(coordinates, (3, n), generator=generator, device=device)
    values = torch.randn(n, generator=generator, dtype=dtype, device=device)
    if device.startswith("cuda"):
        return [in_groups(model, Rows(positions, values), [f.size for f in model.functions])]
    n_blocks = -(-number_of_blocks(n * share) // share)
    pairs = zip(positions.tensor_split(n_blocks, dim=1), values.tensor_split(n_blocks), strict=True)
    return [Rows(where.contiguous(), y) for where, y in pairs]


@torch.no_grad()
def timed_sweep(model: FunctionalTucker, state: State, parts: list[Rows]) -> tuple[tuple[float, float], State]:
    """Seconds of a sweep, and of its sums over rows; the state after it."""
    start, of_it = now(parts), 0.0
    for block in model.blocks:
        before = now(parts)
        total = total_here(model.local_statistics(state, block, rows) for rows in parts)
        of_it += now(parts) - before
        state = model.update(state, block, total)
    state, _ = model.end_sweep(state, parts)
    float(model.bound(state))
    return (now(parts) - start, of_it), state


def now(parts: list[Rows]) -> float:
    """Seconds, when the GPU has done what it was given."""
    if parts[0].values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = clock()
        target.copy_(source)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return 2 * source.numel() * 4 / min(seconds[1:])
