"""Shares of an H100's limits, from timings that benchmarks/results has, with the card's published limits."""

from pathlib import Path

from benchmarks.roofline import HEAD, Work, adapter_work, row, smoother_work, sums_work
from benchmarks.tables import number, read_tables

__all__ = ["h100_lines"]

BANDWIDTH = 3.35e12  # NVIDIA, H100 data sheet, SXM5: bytes a second
PEAK = {"float64": 34e12, "float32": 67e12, "bfloat16": 989e12}  # without and, the last, with tensor cores, dense


def h100_lines(results: Path) -> list[str]:
    """Markdown lines: one for each hot loop that was timed on an H100."""
    found = [
        *_sums(read_tables(results / "scale_h100.md")),
        *_smoother(read_tables(results / "smoother_h100.md")[0]),
        *_influence(read_tables(results / "influence_h100.md")[0]),
        *_patches(read_tables(results / "patches_h100.md")[0]),
        *_adapters(read_tables(results / "adapters_h100.md")[0]),
    ]
    return [*HEAD, *(row(name, work, seconds, BANDWIDTH, PEAK[dtype]) for name, dtype, work, seconds in found)]


Line = tuple[str, str, Work, float]


def _sums(tables: list[list[dict[str, str]]]) -> list[Line]:
    lines = []
    for table, dtype in zip(tables, ("float32", "float64", "float32"), strict=True):
        last = table[-1]
        n, item = int(number(last["rows"])), 8 if dtype == "float64" else 4
        name = f"FunBaT, sums over rows, {n:,} × 3 modes, R = 8, {dtype}"
        lines.append((name, dtype, sums_work(n, 8, 3, item, 4), number(last["of it sums over rows"])))
    lines[-1] = (f"{lines[-1][0]}, 10,000 coordinates a mode", *lines[-1][1:])
    return lines


def _smoother(table: list[dict[str, str]]) -> list[Line]:
    steps = [int(number(line["T"])) for line in table]
    return [
        (f"Kalman smoother, T = {T:,}, 4 states", "float64", smoother_work(T, 4, 2, 8), number(line["parallel, s"]))
        for T, line in zip(steps, table, strict=True)
        if T >= 100_000
    ]


def _influence(table: list[dict[str, str]]) -> list[Line]:
    line = [line for line in table if line[""] == "all parameters"][-1]
    n = int(number(line["cells"]))
    work = Work(1e12 * number(line["Tflop of passes"]), 40.0 * n)
    return [(f"Influence, all parameters, {n:,} cells", "float32", work, number(line["seconds"]))]


def _patches(table: list[dict[str, str]]) -> list[Line]:
    line = table[-1]
    n = int(number(line["patches"]))
    work = Work(1e9 * number(line["GFLOP of products a step"]), 4.0 * n * 256)
    return [(f"BSC, E-step and sums, {n:,} patches 16 × 16, H = 256", "float32", work, number(line["seconds a step"]))]


ADAPTED = {  # layer: positions, inputs and outputs, taps of its kernel
    "Conv2d 256→256, 3×3, 28×28, batch 256": (256 * 28 * 28, 256, 9),
    "Conv2d 512→512, 1×1, 28×28, batch 256": (256 * 28 * 28, 512, 1),
    "Linear 4096→4096, 8192 rows": (8192, 4096, 1),
}


def _adapters(table: list[dict[str, str]]) -> list[Line]:
    lines = []
    for line in table:
        name = line["layer"]
        if name in ADAPTED and line[list(line)[1]] == "CUDA graphs":
            positions, width, taps = ADAPTED[name]
            for who, work in (
                (
                    "frozen, µs",
                    Work(4.0 * positions * width**2 * taps, 2.0 * (4 * positions * width + 2 * width**2 * taps)),
                ),
                ("FLoRA, µs", adapter_work(positions, width, width, taps, 16, positions, 2)),
            ):
                lines.append((f"{who.split(',')[0]}, {name}, bfloat16", "bfloat16", work, 1e-6 * number(line[who])))
    return lines
