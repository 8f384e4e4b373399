"""Head-to-head runs: by turns, all figures kept, ratios to the best peer; the suites' own data."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from benchmarks import run_adapters, run_commands, run_data, run_peers
from benchmarks.__main__ import app
from benchmarks.head_to_head import Case, Method, as_json, markdown, measure
from probtensor.resources import keep_freed_memory


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
    """Also where the process keeps what earlier methods freed, as it does once a model has been fitted."""
    if not Path("/proc/self/clear_refs").exists() or platform.libc_ver()[0] != "glibc":
        pytest.skip("the system does not tell the most memory of a while")
    keep_freed_memory()

    def run(n_arrays: int) -> dict[str, float]:
        arrays = [np.ones(2_000_000) for _ in range(n_arrays)]
        return {"rmse": float(len(arrays))}

    small, large, again = (Method(name, True, lambda data, n=n: run(n)) for name, n in (("s", 1), ("l", 10), ("a", 10)))
    runs = measure([Case("memory", lambda seed: None, (large, again, small))], 1, echo=lambda line: None)
    peaks = [run.figures["peak"] for run in runs]
    assert peaks[0] == pytest.approx(160, abs=20)
    assert peaks[1] == pytest.approx(160, abs=20)
    assert peaks[2] == pytest.approx(16, abs=16)


def test_suites_draw_their_data_by_the_seed() -> None:
    for draw in (run_data.surface, run_data.planted):
        first, again, other = draw(0), draw(0), draw(1)
        assert np.array_equal(first.y, again.y)
        assert not np.array_equal(first.y, other.y)
        assert len(first.y_test) == round(0.2 * (len(first.y) + len(first.y_test)))
    bars = run_data.bars(0)
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


def table(n: int = 900, noise: float = 0.1) -> run_data.Split:
    """A CP tensor of rank 2, 12 × 10 × 8, nearly all of it seen."""
    rng = np.random.default_rng(0)
    index = np.stack(np.unravel_index(rng.choice(960, n, replace=False), (12, 10, 8)), axis=1)
    factors = [rng.normal(size=(size, 2)) for size in (12, 10, 8)]
    y = 5 + np.prod([f[i] for f, i in zip(factors, index.T, strict=True)], axis=0).sum(1) + noise * rng.normal(size=n)
    return run_data.split(pd.DataFrame(index, columns=["a", "b", "c"]).astype(str), y, 0)


def test_peers_that_are_not_installed_are_named_in_the_table() -> None:
    method = Method("there", False, lambda data: {"rmse": 1.0})
    absent = Method("not there", False, lambda data: {"rmse": 1.0})
    found, left_out = run_peers.installed([("json", method), ("no_such_package_here", absent)])
    assert (found, left_out) == ((method,), ("not there",))
    case = Case("toy", lambda seed: seed, found, left_out=left_out)
    assert "Not installed, so left out: not there." in markdown([case], measure([case], 1, echo=lambda line: None))


def test_a_rank_is_chosen_by_rows_of_the_training_set_alone() -> None:
    data, asked = table(), []

    def fit(given: run_data.Split, rank: int) -> Any:
        asked.append((rank, len(given.y), len(given.X_test)))
        return np.full(len(given.X_test), 10.0 * abs(rank - 3))

    mean, std = run_peers.chosen(fit, (2, 3, 4))(data)
    assert abs(mean.mean() - data.y.mean()) < 0.5
    n, held = len(data.y), round(len(data.y) / 8)
    assert std is None
    assert asked[-1] == (3, n, len(data.X_test)), "the best rank is fitted to all training rows"
    assert {job[1:] for job in asked[:-1]} == {(n - held, held)}
    assert [job[0] for job in asked[:-1]] == [2, 2, 3, 3, 4, 4], "with and without effects"


def test_scores_of_a_peer_with_standard_deviations_are_those_of_the_normal_distribution() -> None:
    data = table()
    rng = np.random.default_rng(1)
    mean, std = data.y_test + rng.normal(size=len(data.y_test)), np.full(len(data.y_test), 1.1)
    found = run_peers.peer("peer", lambda given: (mean, std)).run(data)
    density = stats.norm(mean, std)
    low, high = density.interval(0.9)
    assert found["nll"] == pytest.approx(-density.logpdf(data.y_test).mean(), rel=1e-12)
    assert found["inside 90 %"] == pytest.approx(100 * np.mean((low <= data.y_test) & (data.y_test <= high)))
    assert set(run_peers.peer("peer", lambda given: (mean, None)).run(data)) == {"rmse", "mae"}


@pytest.mark.parametrize(
    ("package", "predict"),
    [
        ("tensorly", run_peers.chosen(run_peers.tensorly, (1, 2))),
        ("pyttb", run_peers.chosen(run_peers.pyttb_cp, (1, 2))),
        ("bayespy", run_peers.bayespy_cp(4)),
    ],
)
def test_decompositions_find_a_planted_tensor(package: str, predict: run_peers.Predict) -> None:
    pytest.importorskip(package)
    data = table()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    mean, std = predict(data)
    assert np.array_equal(np.random.get_state()[1], state), "the global generator is as it was"  # noqa: NPY002
    assert np.sqrt(np.mean((mean - data.y_test) ** 2)) < 0.16, "the noise is 0.1"
    if package == "bayespy":
        assert std is not None
        assert 0.8 < np.mean(np.abs(data.y_test - mean) < 1.645 * std) < 0.97


@pytest.mark.parametrize("way", ["lora", "locon"])
def test_an_adapter_of_a_peer_trains_about_as_many_parameters(way: str) -> None:
    pytest.importorskip({"lora": "peft", "locon": "lycoris"}[way])
    make = lambda: torch.nn.Conv2d(16, 24, 3, padding=1)  # noqa: E731
    network = run_adapters.nearest(way, make, 700)
    counts = {r: {"lora": r * (16 * 9 + 24), "locon": r * (16 + 24) + 9 * r * r}[way] for r in range(1, 20)}
    assert run_adapters.n_trained(network) == min(counts.values(), key=lambda count: abs(count - 700))
    network(torch.randn(2, 16, 8, 8)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())
