"""Ours and peers on the same rows, in one process, by turns: what each takes and how right it is.

A suite gives cases: data of a seed, and methods that are functions of it. Seeds are the outer loop and methods the
inner one, so that a busy machine meets all alike. Figures are kept run by run in a JSON file; the table shows their
means and what ours is to the best peer.
"""

import ctypes
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commands import machine

__all__ = ["Case", "Method", "Run", "as_json", "markdown", "measure", "versions"]

PACKAGES = (
    "torch",
    "numpy",
    "scikit-learn",
    "tensorly",
    "pyro-ppl",
    "gpytorch",
    "peft",
    "lycoris-lora",
    "pyttb",
    "bayespy",
)
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Method:
    """A way to do a case's job.

    Attributes
    ----------
    name : str
    ours : bool
    run : callable
        Of the case's data: figures by their name, such as "rmse".
    """

    name: str
    ours: bool
    run: Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True)
class Case:
    """One job.

    Attributes
    ----------
    name : str
    data : callable
        Of a seed.
    methods : sequence of Method
    decides : str
        The figure by which methods are ranked: the lower, the better, but for "found".
    left_out : tuple of str
        Peers that are not installed.
    """

    name: str
    data: Callable[[int], Any]
    methods: tuple[Method, ...]
    decides: str = "rmse"
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Figures of one method on one seed of a case; "cpu" and "wall" are seconds, "peak" MB above what was there."""

    case: str
    method: str
    ours: bool
    seed: int
    figures: dict[str, float]


def measure(cases: Iterable[Case], seeds: int, echo: Callable[[str], None] = print) -> list[Run]:
    """Run all methods of all cases on all seeds."""
    runs = []
    for case in cases:
        for seed in range(seeds):
            data = case.data(seed)
            for method in case.methods:
                figures: dict[str, float] = {}
                with _peak_memory(figures):
                    wall, cpu = time.perf_counter(), time.process_time()
                    found = method.run(data)
                    figures["cpu"], figures["wall"] = time.process_time() - cpu, time.perf_counter() - wall
                runs.append(Run(case.name, method.name, method.ours, seed, {**found, **figures}))
                echo(f"{case.name}, seed {seed}, {method.name}: {_shown(runs[-1].figures)}")
    return runs


def markdown(cases: Iterable[Case], runs: list[Run]) -> list[str]:
    """A table a case: means over seeds, best method first; the last columns are ratios to the best peer."""
    lines: list[str] = []
    for case in cases:
        of_case = [run for run in runs if run.case == case.name]
        means = {method.name: _means([run for run in of_case if run.method == method.name]) for method in case.methods}
        columns = list(dict.fromkeys(key for figures in means.values() for key in figures))
        sign = -1 if case.decides == "found" else 1
        ranked = sorted(case.methods, key=lambda m, means=means, sign=sign: sign * means[m.name][case.decides])  # type: ignore[misc]
        peer = next((method.name for method in ranked if not method.ours), None)
        head = ["", *columns, f"{case.decides} / best peer's", "CPU / best peer's"]
        lines += [
            f"**{case.name}** ({len({run.seed for run in of_case})} seeds)",
            "",
            _row(head),
            _row(["---"] * len(head)),
        ]
        for method in ranked:
            figures = means[method.name]
            cells = [_number(figures[key]) if key in figures else "–" for key in columns]
            ratios = ["–", "–"]
            if peer is not None:
                ratios = [f"{figures[key] / means[peer][key]:.3g}" for key in (case.decides, "cpu")]
            lines.append(_row([f"**{method.name}**" if method.ours else method.name, *cells, *ratios]))
        lines.append("")
        if case.left_out:
            lines += [f"Not installed, so left out: {', '.join(case.left_out)}.", ""]
    return lines


def as_json(runs: list[Run], command: str) -> str:
    """All runs, with the machine and the versions."""
    about = {"command": command, "machine": machine("cpu"), "python": platform.python_version(), "versions": versions()}
    return json.dumps(about | {"runs": [vars(run) for run in runs]}, indent=1) + "\n"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _means(runs: list[Run]) -> dict[str, float]:
    keys = dict.fromkeys(key for run in runs for key in run.figures)
    return {key: statistics.fmean(run.figures[key] for run in runs if key in run.figures) for key in keys}


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items())


@contextmanager
def _peak_memory(figures: dict[str, float]) -> Iterator[None]:
    """Most memory in use within the block, above that at its start; nothing where the system does not say.

    What others have freed is given back to the system first: fits keep it for the next use, so that the block would
    otherwise live on it and seem to need nothing.
    """
    if not CLEAR.exists() or platform.libc_ver()[0] != "glibc":
        yield
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the peak so far is forgotten
    before = _memory("VmRSS")
    yield
    figures["peak"] = max(_memory("VmHWM") - before, 0) / 1e3


def _memory(key: str) -> float:
    return next(float(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key))
