"""Markdown tables of benchmarks/results, read again."""

import re
from pathlib import Path

__all__ = ["RESULTS", "number", "read_tables"]

RESULTS = Path(__file__).parent / "results"


def read_tables(path: Path) -> list[list[dict[str, str]]]:
    """Tables of a file: rows by the names of their columns, without bold."""
    tables: list[list[dict[str, str]]] = []
    header: list[str] | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip().strip("*").strip() for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = cells
            tables.append([])
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            tables[-1].append(dict(zip(header, cells, strict=True)))
    return tables


def number(cell: str) -> float:
    """The first number of a cell, thousands with commas."""
    found = re.search(r"-?\d[\d,]*\.?\d*(e-?\d+)?", cell)
    if found is None:
        raise ValueError(f"cell: expected a number, got {cell!r}")
    return float(found.group().replace(",", ""))
