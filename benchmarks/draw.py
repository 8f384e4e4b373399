"""Pictures of results: what a step costs against the size of the job, and ours beside the best peer."""

import json
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.tables import number, read_tables
from probtensor.drawing import COLOURS, FAINT, INK, TICK_SIZE, dress, pyplot

__all__ = ["Ratio", "draw_costs", "draw_ratios", "ratios_of"]

DECIDES = ("rmse", "over frozen", "found")
MARKS = ("o", "s", "^", "D")
Curve = tuple[str, list[float], list[float]]


class Ratio(NamedTuple):
    """A method of ours on a case, over the best peer there: its error, or None, and its time."""

    case: str
    method: str
    error: float | None
    time: float


def ratios_of(text: str) -> list[Ratio]:
    """Ratios of a file that `run` wrote: means over seeds; the best peer is the one of least error (or most found)."""
    runs: list[dict[str, Any]] = json.loads(text)["runs"]
    found = []
    for case in dict.fromkeys(run["case"] for run in runs):
        means: dict[tuple[str, bool], dict[str, float]] = {}
        for key in dict.fromkeys((run["method"], run["ours"]) for run in runs if run["case"] == case):
            figures = [run["figures"] for run in runs if (run["case"], run["method"]) == (case, key[0])]
            means[key] = {name: statistics.fmean(f[name] for f in figures) for name in figures[0]}
        decides = next(name for name in DECIDES if all(name in figures for figures in means.values()))
        sign = -1 if decides == "found" else 1
        peer = min((f for (_, ours), f in means.items() if not ours), key=lambda f: sign * f[decides])
        for (method, ours), figures in means.items():
            if ours and decides == "over frozen":
                found.append(Ratio(case, method, None, figures[decides] / peer[decides]))
            elif ours:
                error = (figures[decides] / peer[decides]) ** sign
                found.append(Ratio(case, method, error, figures["cpu"] / peer["cpu"]))
    return found


def draw_ratios(results: Path, out: Path) -> None:
    """A row for each of ours and case: error and time over the best peer's; left of one, ours is better."""
    ratios = [ratio for path in sorted(results.glob("run_*.json")) for ratio in ratios_of(path.read_text())]
    ratios.sort(key=lambda ratio: ratio.error is None)
    figure, panels = pyplot().subplots(
        1, 2, figsize=(11, 0.36 * len(ratios) + 1.3), sharey=True, layout="constrained", width_ratios=(1, 1.2)
    )
    y = np.arange(len(ratios))[::-1]
    for ax, values, label in (
        (panels[0], [ratio.error for ratio in ratios], "error / best peer's"),
        (panels[1], [ratio.time for ratio in ratios], "time / best peer's"),
    ):
        there = [(at, value) for at, value in zip(y, values, strict=True) if value is not None]
        ax.axvline(1, color=FAINT, linewidth=1)
        for at, value in there:
            won = value <= 1.005
            ax.hlines(at, min(value, 1), max(value, 1), color=FAINT, linewidth=1)
            ax.plot(value, at, MARKS[0 if won else 1], color=COLOURS[0 if won else 1], markersize=7)
            side = "right" if value < 1 else "left"
            ax.annotate(
                f"{value:.3g}",
                (value, at),
                xytext=(-7 if side == "right" else 7, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=TICK_SIZE - 1.5,
                color=INK,
            )
        low, high = min(value for _, value in there), max(value for _, value in there)
        if high > 3 * low:
            ax.set_xscale("log")
            ax.set_xlim(min(low, 1) / 5, max(high, 1) * 5)
        else:
            ax.set_xlim(min(low, 1) - 0.1, max(high, 1) + 0.1)
        dress(ax, label, "")
        ax.tick_params(axis="y", length=0)
        ax.minorticks_off()
    panels[0].set_yticks(y, [f"{ratio.method}: {_short(ratio.case)}" for ratio in ratios])
    panels[0].set_title("left of the line ours is better (circles); squares: it loses", fontsize=TICK_SIZE, loc="left")
    _save(figure, out)


def draw_costs(results: Path, out: Path) -> None:
    """Seconds of a sweep against rows, rank and processes, with slopes or ideals as thin lines."""
    alternating = read_tables(results / "alternating.md")
    figure, panels = pyplot().subplots(1, 3, figsize=(12, 4), layout="constrained")
    _curves(panels[0], _against_rows(results, alternating), "rows", "seconds a sweep")
    _curves(panels[1], _against_rank(alternating), "rank", "seconds a sweep")
    _curves(panels[2], _against_processes(results), "ranks (CPU) or GPUs", "seconds a sweep")
    panels[1].set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    panels[2].set_xticks([1, 2], ["1", "2"])
    panels[2].set_xlim(0.85, 2.35)
    panels[2].set_ylim(panels[2].get_ylim()[0], 4 * panels[2].get_ylim()[1])  # room for the legend
    for panel, slope in ((panels[0], 1), (panels[1], 1), (panels[2], -1)):
        x = np.array(panel.get_xlim())
        low, high = panel.get_ylim()
        middle = np.exp(np.mean(np.log(x))), np.exp(np.mean(np.log([low, high])))
        panel.plot(x, middle[1] * (x / middle[0]) ** slope, ":", color=FAINT, linewidth=1.2, zorder=0)
        panel.set_xlim(*x)
        panel.set_ylim(low, high)
    panels[0].set_title("dotted: proportional", fontsize=TICK_SIZE, loc="left", color=INK)
    panels[1].set_title("dotted: proportional", fontsize=TICK_SIZE, loc="left", color=INK)
    panels[2].set_title("dotted: half the time on two", fontsize=TICK_SIZE, loc="left", color=INK)
    _save(figure, out)


def _against_rows(results: Path, alternating: list[list[dict[str, str]]]) -> list[Curve]:
    rows = read_tables(results / "scale_cpu.md")[0]
    card = read_tables(results / "scale_h100.md")[0]
    cells = next(table for table in alternating if "cells" in table[0])
    return [
        ("FunBaT, R = 8, CPU", *_columns(rows, "rows", "seconds a sweep")),
        ("FunBaT, R = 8, H100", *_columns(card, "rows", "seconds a sweep")),
        ("alternating, R = 16, CPU", *_columns(cells, "cells", "cg, seconds")),
    ]


def _against_rank(alternating: list[list[dict[str, str]]]) -> list[Curve]:
    two, three = [table for table in alternating if "rank" in table[0]][:2]
    return [
        ("2 modes, gradients", *_columns(two, "rank", "cg, seconds")),
        ("2 modes, exact", *_columns(two, "rank", "exact, seconds")),
        ("3 modes, gradients", *_columns(three, "rank", "cg, seconds")),
        ("3 modes, exact", *_columns(three, "rank", "exact, seconds")),
    ]


def _against_processes(results: Path) -> list[Curve]:
    cpu = read_tables(results / "ranks_cpu_8.md")[0]
    cards = [line for line in read_tables(results / "ranks_h100.md")[0] if line["rows"] == "600,000,000"]
    return [
        ("2 million rows, CPU", *_columns(cpu, "ranks", "seconds a sweep")),
        ("600 million rows, H100", *_columns(cards, "GPUs", "seconds a sweep")),
    ]


def _columns(table: list[dict[str, str]], *names: str) -> tuple[list[float], list[float]]:
    x, y = ([number(line[name]) for line in table] for name in names)
    return x, y


def _curves(ax: Any, curves: list[Curve], x: str, y: str) -> None:
    for (label, at, values), colour, mark in zip(curves, COLOURS, MARKS, strict=False):
        ax.loglog(at, values, marker=mark, color=colour, markersize=6, linewidth=1.5, label=label)
    dress(ax, x, y)
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=TICK_SIZE - 0.5, handlelength=1.5)


def _short(case: str) -> str:
    """A layer's or a table's name without what is alike or in every row."""
    return re.sub(r", batch \d+|, a fifth hidden|, 2,000 pictures", "", case)


def _save(figure: Any, out: Path) -> None:
    figure.savefig(out, dpi=90, metadata={"Software": None})
    pyplot().close(figure)
