"""Head-to-head runs: by turns, all figures kept, ratios to the best peer; the suites' own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import run_commands, run_suites
from benchmarks.__main__ import app
from benchmarks.head_to_head import Case, Method, as_json, markdown, measure


def cases() -> tuple[Case, list[str]]:
    order: list[str] = []

    def method(name: str, ours: bool, error: float, extra: bool = False) -> Method:
        def run(data: int) -> dict[str, float]:
            order.append(f"{name} {data}")
            return {"rmse": error + data} | ({"nll": 0.5} if extra else {})

        return Method(name, ours, run)

    methods = (method("mine", True, 1.0, extra=True), method("good", False, 2.0), method("bad", False, 4.0))
    return Case("toy", lambda seed: seed, methods), order


def test_methods_take_turns_and_the_table_shows_ratios_to_the_best_peer() -> None:
    case, order = cases()
    runs = measure([case], 2, echo=lambda line: None)
    assert order == ["mine 0", "good 0", "bad 0", "mine 1", "good 1", "bad 1"]
    lines = markdown([case], runs)
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]] for line in lines if "|" in line}
    assert list(rows)[2:] == ["**mine**", "good", "bad"], "best first"
    assert rows["**mine**"][:2] == ["1.5", "0.5"]
    assert rows["good"][1] == "–"
    of = rows[""].index("rmse / best peer's")
    assert [rows[name][of] for name in ("**mine**", "good", "bad")] == ["0.6", "1", "1.8"]
    found = json.loads(as_json(runs, "command"))
    assert [run["figures"]["rmse"] for run in found["runs"]] == [1.0, 2.0, 4.0, 2.0, 3.0, 5.0]
    assert found["versions"]["torch"] == torch.__version__


def test_memory_is_that_of_the_method() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell the most memory of a while")
    kept: list[Any] = []
    small = Method("small", True, lambda data: {"rmse": 0.0})
    large = Method("large", False, lambda data: {"rmse": float(np.ones(20_000_000).sum() * 0)})
    runs = measure([Case("memory", lambda seed: kept, (large, small))], 1, echo=lambda line: None)
    assert runs[0].figures["peak"] > 140
    assert runs[1].figures["peak"] < 50


def test_suites_draw_their_data_by_the_seed() -> None:
    for draw in (run_suites.surface, run_suites.planted):
        first, again, other = draw(0), draw(0), draw(1)
        assert np.array_equal(first.y, again.y)
        assert not np.array_equal(first.y, other.y)
        assert len(first.y_test) == round(0.2 * (len(first.y) + len(first.y_test)))
    bars = run_suites.bars(0)
    assert bars["Y"].shape == (2000, 25)
    assert bars["W"].shape == (25, 10)


def test_the_command_writes_a_table_and_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_commands, "SUITES", {"toy": lambda quick, data: [cases()[0]]})
    done = CliRunner().invoke(app, ["run", "toy", "--seeds", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "rmse / best peer's" in (tmp_path / "toy.md").read_text()
    assert len(json.loads((tmp_path / "toy.json").read_text())["runs"]) == 6
    refused = CliRunner().invoke(app, ["run", "nothing"])
    assert refused.exit_code == 2
