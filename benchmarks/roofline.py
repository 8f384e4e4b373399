"""Hot loops against what the machine allows: bytes and operations by formulas, over its bandwidth and peak, measured.

A loop's limit is the larger of bytes over bandwidth and operations over peak. Bytes are those that no way of doing the
work can spare: what is too large for the caches is read or written once a pass; temporaries, and tables of parameters
gathered from, do not count. Operations are multiplications and additions that the method needs, one each.
Bandwidth is that of a copy of 1 GiB, the peak that of a product of matrices in the loop's dtype.

References
----------
Williams, Waterman, Patterson (2009), "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
Communications of the ACM 52.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from benchmarks import adapters, influence
from benchmarks.alternating import PER_LABEL, cells_of, settings
from benchmarks.alternating import Case as Planted
from benchmarks.scale import bandwidth, random_rows, scale_model
from benchmarks.sparse import patch_steps
from probtensor.blocks import total_here
from probtensor.comm import Serial
from probtensor.contract import packed_size
from probtensor.gaussian import Gamma
from probtensor.inference import kalman
from probtensor.kernels import Matern
from probtensor.models import FLoRAConfig, NeuralTensorCompletion, inject_adapters
from probtensor.models.alternating_fit import Problem, half_sweep, start_tables
from probtensor.models.completion_network import Batch, Kind, initial
from probtensor.models.completion_training import adam_step
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import ExchangeableRows, GaussianProcess
from probtensor.resources import keep_freed_memory

__all__ = ["LOOPS", "Loop", "Work", "roofline_lines", "row"]

HEAD = [
    "| loop | Gflop | GB | flop a byte | seconds | limit, s | bound by | share |",
    "|---|---|---|---|---|---|---|---|",
]
INDEX = {"cpu": 8, "cuda": 4}  # bytes of a position in the rows of FunBaT


class Work(NamedTuple):
    """What a loop has to do: operations and bytes by the formulas that the page states."""

    flops: float
    bytes: float


class Loop(NamedTuple):
    """A hot loop.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
    work : Work
        Of one pass.
    passes : callable
        Does so many passes; those beyond the first few say what one takes.
    """

    name: str
    dtype: torch.dtype
    work: Work
    passes: Callable[[int], object]


def sums_work(n: int, rank: int, modes: int, item: int, index: int) -> Work:
    """Sums of R × R sites over n rows, all modes of a CP sweep.

    A row and mode: products of the other modes' packed moments, P = R (R + 1) / 2 + R numbers; the value times R of
    them; P additions. Bytes: the positions of all modes and the value.
    """
    P = packed_size(rank) + rank
    return Work(n * modes * ((modes - 1) * P + rank), n * modes * (modes * index + item))


def smoother_work(n_steps: int, states: int, functions: int, item: int) -> Work:
    """The Kalman smoother as a tree over T steps, D states, R functions.

    A merge: inverse and products of D × D, 18 D³ + 8 D²; down the tree a solve and products, twice: 17.3 D³ + 12 D².
    Bytes: transition, noise and sites of each step; two means and two matrices.
    """
    D = states
    flops = n_steps * (35.3 * D**3 + 20 * D**2)
    return Work(flops, n_steps * item * (2 * D**2 + functions**2 + functions + 2 * D**2 + 2 * D))


def step_work(kind: Kind, members: int, batch: int, item: int) -> Work:
    """A training step of M networks: 6 operations a weight and row, 14 of AdamW a parameter.

    Bytes: each parameter, its two moments and its gradient read and written once.
    """
    K, rows = len(kind.sizes), sum(size + 1 for size in kind.sizes)
    widths = [K * kind.width, *kind.hidden, 1]
    weights = sum(a * b for a, b in pairwise(widths)) + 2 * K * kind.rank
    parameters = rows * (1 + kind.rank + kind.width) + kind.rank + sum((a + 1) * b for a, b in pairwise(widths)) - 1
    return Work(members * (6.0 * batch * weights + 14.0 * parameters), members * 8.0 * item * parameters)


def adapter_work(positions: int, inputs: int, outputs: int, taps: int, rank: int, in_positions: int, item: int) -> Work:
    """Forward and backward of a layer with FLoRA: frozen 4 operations a weight and position, the adapter's own 6.

    The adapter, chained: I r + r² k + r O weights. Bytes: input, output and both gradients, the weight twice.
    """
    frozen, own = inputs * outputs * taps, inputs * rank + rank**2 * taps + rank * outputs
    numbers = 2 * in_positions * inputs + 2 * positions * outputs + 2 * frozen
    return Work(positions * (4.0 * frozen + 6.0 * own), float(item * numbers))


def alternating_work(n: int, rank: int, modes: int, inner: int, item: int) -> Work:
    """A sweep by conjugate gradients: a product with the designs at the start, two and an update each inner step.

    Bytes, a cell and mode: its place, the other modes' labels, the residual read and written.
    """
    products = 2 * rank * (1 + 2 * inner) + 2 * inner + (modes - 2) * rank
    return Work(float(n * modes * products), float(n * modes * (8 + 8 * (modes - 1) + 2 * item)))


def rows_work(n: int, labels: int, rank: int, modes: int, item: int, index: int) -> Work:
    """A sweep of BayesianCP: the sums over rows, and a Cholesky factor and an inverse, 2 R³, a label."""
    sums = sums_work(n, rank, modes, item, index)
    moments = packed_size(rank) + rank
    return Work(sums.flops + modes * labels * 2 * rank**3, sums.bytes + modes * labels * 2 * item * moments)


def funbat_sums(device: str) -> Loop:
    n, rank, T = (10**6 if device == "cpu" else 10**8), 8, 1000
    dtype = torch.float64 if device == "cpu" else torch.float32
    model = scale_model(device, rank, T, dtype)
    parts = random_rows(model, n, T, dtype, device)
    state = model.start(total_here(map(model.local_start, parts)), torch.Generator().manual_seed(0))

    def passes(count: int) -> None:
        for _ in range(count):
            for block in model.blocks:
                total_here(model.local_statistics(state, block, rows) for rows in parts)

    work = sums_work(n, rank, 3, dtype.itemsize, INDEX[_kind(device)])
    return Loop(f"FunBaT, sums over rows, {n:,} × 3 modes, R = 8", dtype, work, passes)


def smoother(device: str) -> Loop:
    T, rank, dtype = (20_000 if device == "cpu" else 10**6), 2, torch.float64
    generator = torch.Generator(device).manual_seed(0)
    times = torch.rand(T, generator=generator, dtype=dtype, device=device).cumsum(0)
    hyper = torch.stack([times.new_full((rank,), 3.0).log(), times.new_zeros(rank)])
    chain = GaussianProcess(times, Matern(1.5)).chain(hyper, times)
    shift = torch.randn(T, rank, generator=generator, dtype=dtype, device=device)
    sites = kalman.Sites(times.new_ones(T, rank).diag_embed(), shift)

    def passes(count: int) -> None:
        for _ in range(count):
            kalman.smooth(chain, sites)

    return Loop(f"Kalman smoother, T = {T:,}, 4 states", dtype, smoother_work(T, 4, rank, 8), passes)


def completion_step(device: str) -> Loop:
    given = NeuralTensorCompletion().get_params()
    kind = Kind((2000, 2000, 200), given["rank"], given["head"], given["embedding"], tuple(given["hidden"]))
    members, B = 5 * len(given["weight_decay"]), given["batch_size"]
    generator = torch.Generator().manual_seed(0)
    start = initial(kind, members, generator, torch.float32)
    parameters = {name: value.to(device).requires_grad_() for name, value in start.items()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in parameters.items()}
    labels = torch.stack([torch.randint(size, (members, B), generator=generator) for size in kind.sizes], dim=2)
    target = torch.randn(members, B, generator=generator).to(device)
    batch = Batch(labels.to(device), None, target, torch.ones_like(target))
    decay = torch.ones(members, device=device)

    def passes(count: int) -> None:
        with torch.enable_grad():
            for step in range(count):
                adam_step(kind, parameters, moments, batch, step + 1, 1e-3, decay)

    work = step_work(kind, members, B, 4)
    return Loop(f"NeuralTensorCompletion, a step of {members} members, batch {B:,}", torch.float32, work, passes)


def influence_pass(device: str) -> Loop:
    n, chunk = (4000, 1024) if device == "cpu" else (10**6, 65536)
    torch.manual_seed(0)
    module = influence.DainNetwork().to(device)
    few, rows = influence.random_rows(64, device), influence.random_rows(n, device)
    passes_over = influence.job_of(module, "all", (rows, few), 1, chunk)
    weights = sum(
        value.numel() for name, value in module.named_parameters() if "weight" in name and "tables" not in name
    )

    def passes(count: int) -> None:
        with torch.enable_grad():
            for _ in range(count):
                passes_over()

    work = Work(6.0 * weights * (n + 64), 40.0 * n)  # three labels, a value and a score of 8 bytes a cell
    return Loop(f"Influence, all parameters, {n:,} cells", torch.float32, work, passes)


def bsc_step(device: str) -> Loop:
    n, H, side = (4096 if device == "cpu" else 10**6), 256, 16
    steps, flops = patch_steps(device, n, H, side)
    work = Work(flops, 4.0 * n * side**2)
    return Loop(f"BSC, E-step and sums, {n:,} patches 16 × 16, H = 256", torch.float32, work, steps)


def adapter_step(place: int) -> Callable[[str], Loop]:
    def make(device: str) -> Loop:
        layer = adapters.LAYERS[place]
        torch.manual_seed(0)
        module: Any = layer.make().to(device)
        shape = module.weight.shape
        inject_adapters(module, FLoRAConfig(r=16, kernel_r=2))
        x = torch.randn(layer.shape, device=device, requires_grad=True)
        linear = isinstance(module, torch.nn.Linear)
        positions = layer.shape[0] if linear else layer.shape[0] * layer.shape[2] * layer.shape[3]

        def passes(count: int) -> None:
            with torch.enable_grad():
                for _ in range(count):
                    for grown in (x, *module.parameters()):
                        grown.grad = None
                    module(x).sum().backward()

        work = adapter_work(positions, shape[1], shape[0], shape[2:].numel(), 16, positions, 4)
        return Loop(f"FLoRA, {layer.name}", torch.float32, work, passes)

    return make


def alternating_sweep(device: str) -> Loop:
    n, rank, inner, size = 10**6, 16, 3, 10**6 // PER_LABEL
    X, y, *_ = Planted((size, size), 8, n, 0.3).draw(0, 1)
    cells = cells_of(X, y, (size, size))
    cells = cells._replace(labels=cells.labels.to(device), values=cells.values.to(device))
    problem = Problem.of(cells, settings(rank, "cg", init="random", n_inner=inner, inner_tol=0.0), Serial())
    tables = start_tables(problem, torch.Generator().manual_seed(0))
    residual, strength = cells.values - tables.predict(cells.labels), problem.strength(0.1)

    def passes(count: int) -> None:
        for _ in range(count):
            for mode in range(2):
                half_sweep(problem, mode, tables, residual, strength)

    work = alternating_work(len(X), rank, 2, inner, 8)
    return Loop(
        f"AlternatingMinimization, a sweep of {len(X):,} cells, R = 16, 3 inner steps", torch.float64, work, passes
    )


def bayesian_sweep(device: str) -> Loop:
    n, rank, T, dtype = 10**6, 8, 5000, torch.float64
    like = torch.ones((), dtype=dtype, device=device)
    free = (torch.ones(rank, dtype=torch.bool, device=device),) * 3
    model = FunctionalTucker((ExchangeableRows(T, like),) * 3, free, "cp", Gamma(like, like), learn=False)
    parts = random_rows(model, n, T, dtype, device)
    state = model.start(total_here(map(model.local_start, parts)), torch.Generator().manual_seed(0))

    def passes(count: int) -> None:
        for _ in range(count):
            for block in model.blocks:
                sums = total_here(model.local_statistics(state, block, rows) for rows in parts)
                model.update(state, block, sums)

    work = rows_work(n, T, rank, 3, 8, INDEX[_kind(device)])
    return Loop(f"BayesianCP, a sweep of {n:,} rows, 5,000 labels a mode, R = 8", dtype, work, passes)


LOOPS: dict[str, Callable[[str], Loop]] = {
    "sums": funbat_sums,
    "smoother": smoother,
    "completion": completion_step,
    "influence": influence_pass,
    "bsc": bsc_step,
    "convolution": adapter_step(0),
    "linear": adapter_step(7),
    "alternating": alternating_sweep,
    "bayesian": bayesian_sweep,
}


def roofline_lines(
    device: str, threads: Sequence[int], loops: Sequence[str] = tuple(LOOPS), budget: float = 3.0
) -> Iterator[str]:
    """Markdown lines: for each number of threads the machine's limits, and each loop's share of them.

    One thread of a processor is timed by its CPU time, which other work disturbs little; more threads and GPUs by the
    clock. Each loop has `budget` seconds, at least three rounds.
    """
    keep_freed_memory()  # as every fit does
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        clock = _clock(device, n_threads)
        speed = bandwidth(device, clock)
        peaks = {dtype: _peak(device, dtype, clock) for dtype in (torch.float64, torch.float32)}
        shown = ", ".join(f"{str(dtype).split('.')[1]} {peak / 1e9:,.0f} Gflop/s" for dtype, peak in peaks.items())
        title = f"{n_threads} thread{'s' if n_threads > 1 else ''}" if device == "cpu" else "GPU"
        yield from (f"**{title}**: copy {speed / 1e9:,.1f} GB/s; product of matrices {shown}", "", *HEAD)
        for name in loops:
            loop = LOOPS[name](device)
            with torch.no_grad():
                seconds = _seconds(loop.passes, clock, budget)
            yield row(loop.name, loop.work, seconds, speed, peaks[loop.dtype])
            del loop
        yield ""


def row(name: str, work: Work, seconds: float, speed: float, peak: float) -> str:
    """A line of the table, from the speed of memory in bytes and the peak in operations a second."""
    least = {"memory": work.bytes / speed, "arithmetic": work.flops / peak}
    bound = max(least, key=lambda key: least[key])
    cells = [f"{work.flops / 1e9:.3g}", f"{work.bytes / 1e9:.3g}", f"{work.flops / work.bytes:.3g}"]
    cells += [f"{seconds:.3g}", f"{least[bound]:.2g}", bound, _percent(100 * least[bound] / seconds)]
    return f"| {name} | {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"


def _seconds(passes: Callable[[int], object], clock: Callable[[], float], budget: float) -> float:
    """Seconds of a pass: two passes fewer of three, each the fastest of those in the time, so that starts drop out."""
    passes(1)
    taken: dict[int, list[float]] = {1: [], 3: []}
    end = time.perf_counter() + budget
    while len(taken[1]) < 3 or (time.perf_counter() < end and len(taken[1]) < 50):
        for count, kept in taken.items():
            start = clock()
            passes(count)
            kept.append(clock() - start)
    return (min(taken[3]) - min(taken[1])) / 2


def _peak(device: str, dtype: torch.dtype, clock: Callable[[], float], n: int = 2048) -> float:
    """Operations a second of a product of square matrices, the best of five."""
    A, B = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    taken = []
    for _ in range(6):
        start = clock()
        A @ B
        taken.append(clock() - start)
    return 2.0 * n**3 / min(taken[1:])


def _clock(device: str, n_threads: int) -> Callable[[], float]:
    if device.startswith("cuda"):

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized
    return time.process_time if n_threads == 1 else time.perf_counter


def _kind(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"
