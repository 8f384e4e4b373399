"""Operations and bytes of the roofline's formulas against counts, tables read again, pictures of results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import draw, head_to_head, roofline, roofline_cards, tables
from probtensor.models.completion_network import Batch, Kind, initial
from probtensor.models.completion_training import adam_step


def counted_products(run: object) -> float:
    """Operations of the products and convolutions that a function starts."""
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return float(counter.get_total_flops())


def test_sums_over_rows_by_counting_one_operation_after_the_other() -> None:
    n, rank, modes = 7, 3, 4
    done = 0
    for _ in range(n):
        for _ in range(modes):
            moments = [(i, j) for i in range(rank) for j in range(i, rank)] + list(range(rank))
            for _ in moments:
                done += modes - 2  # products of the others' moments
                done += 1  # added to the sum
            done += rank  # the value times the means
    assert roofline.sums_work(n, rank, modes, 8, 8) == (done, n * modes * (modes * 8 + 8))


@pytest.mark.parametrize("taps", [1, 9])
def test_a_frozen_layer_has_the_operations_that_torch_counts(taps: int) -> None:
    side = math.isqrt(taps)
    layer = nn.Conv2d(6, 10, side, padding=side // 2).requires_grad_(False)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    found = counted_products(lambda: layer(x).sum().backward())
    work = roofline.adapter_work(50, 6, 10, taps, 0, 50, 4)
    assert found == work.flops
    assert work.bytes == 4 * (2 * 50 * 6 + 2 * 50 * 10 + 2 * 6 * 10 * taps)


def test_a_chained_adapter_has_the_operations_that_torch_counts() -> None:
    chain = nn.Sequential(
        nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 10, 1, bias=False)
    )
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    found = counted_products(lambda: chain(x).sum().backward())
    assert (
        found
        == roofline.adapter_work(50, 6, 10, 9, 3, 50, 4).flops - roofline.adapter_work(50, 6, 10, 9, 0, 50, 4).flops
    )


def test_a_training_step_has_the_products_that_torch_counts() -> None:
    kind, members, batch = Kind((20, 15, 10), 0, "mlp", 4, (8, 6)), 3, 32
    parameters = {k: v.requires_grad_() for k, v in initial(kind, members, torch.Generator(), torch.float32).items()}
    moments = {k: (torch.zeros_like(v), torch.zeros_like(v)) for k, v in parameters.items()}
    target = torch.randn(members, batch)
    rows = Batch(torch.zeros(members, batch, 3, dtype=torch.int64), None, target, torch.ones_like(target))
    found = counted_products(lambda: adam_step(kind, parameters, moments, rows, 1, 1e-3, torch.ones(members)))
    n_parameters = sum(v[0].numel() for v in parameters.values())
    work = roofline.step_work(kind, members, batch, 4)
    assert work.flops - 14 * members * n_parameters == found
    assert work.bytes == 8 * 4 * members * n_parameters


def test_the_smoothers_merges_have_the_products_that_torch_counts() -> None:
    """D³ terms: torch counts products, but neither inverses (2 D³) nor solves (2/3 D³ and substitutions)."""
    loop = roofline.smoother("cpu")
    T, D, S = 20_000, 4, 1
    found = counted_products(lambda: loop.passes(1)) / T
    merge = 16 * D**3 + 8 * D**2 * S
    down = 2 * (6 * D**3 + 4 * D**2 * S)
    assert found == pytest.approx(merge + down, rel=0.15)
    assert 0.9 * found < loop.work.flops / T < 1.6 * found


def test_the_limit_is_the_larger_one() -> None:
    cells = [cell.strip() for cell in roofline.row("x", roofline.Work(2e9, 1e9), 4.0, 1e9, 1e9).strip("|").split("|")]
    assert cells == ["x", "2", "1", "2", "4", "2", "arithmetic", "50 %"]
    assert "memory | 25 %" in roofline.row("x", roofline.Work(2e9, 1e9), 4.0, 1e9, 1e10)


def test_a_table_of_the_roofline_has_the_machines_limits_and_a_share_below_them() -> None:
    lines = list(roofline.roofline_lines("cpu", [1], ["smoother"], budget=0.0))
    assert lines[0].startswith("**1 thread**: copy ")
    share = tables.number(lines[-2].strip("|").split("|")[-1])
    assert 0 < share < 100


def test_shares_on_the_card_are_those_of_the_committed_timings() -> None:
    lines = roofline_cards.h100_lines(tables.RESULTS)
    committed = (tables.RESULTS / "roofline_h100.md").read_text()
    assert all(line in committed for line in lines)
    shares = [tables.number(line.strip("|").split("|")[-1]) for line in lines[2:]]
    assert len(shares) == 13
    assert all(0 < share <= 100 for share in shares)


def test_tables_are_read_as_they_are_written(tmp_path: Path) -> None:
    case = head_to_head.Case("c", lambda seed: seed, (head_to_head.Method("m", True, lambda data: {"rmse": 12345.0}),))
    lines = head_to_head.markdown([case], head_to_head.measure([case], 1, echo=lambda line: None))
    (tmp_path / "a.md").write_text("\n".join(["text", *lines, "| x |", "|:-:|", "| 1 |"]))
    first, second = tables.read_tables(tmp_path / "a.md")
    assert first[0][""] == "m"
    assert tables.number(first[0]["rmse"]) == 12345
    assert second == [{"x": "1"}]
    assert [tables.number(cell) for cell in ("0.103 0.093", "1,000 s", "8.5e-05", "-3 %")] == [0.103, 1000, 8.5e-5, -3]
    with pytest.raises(ValueError, match="cell: expected a number, got '–'"):
        tables.number("–")


def written(decides: str, ours: list[float], good: list[float], bad: list[float]) -> str:
    runs = [
        {"case": "c", "method": name, "ours": name == "ours", "seed": seed, "figures": {decides: value, "cpu": cpu}}
        for name, values, cpu in (("ours", ours, 3.0), ("good", good, 2.0), ("bad", bad, 1.0))
        for seed, value in enumerate(values)
    ]
    return json.dumps({"runs": runs})


def test_ratios_are_those_of_means_to_the_best_peer() -> None:
    (ratio,) = draw.ratios_of(written("rmse", [1.0, 2.0], [2.0, 4.0], [5.0, 5.0]))
    assert ratio == ("c", "ours", 0.5, 1.5)
    (ratio,) = draw.ratios_of(written("found", [5.0, 5.0], [10.0, 10.0], [2.0, 2.0]))
    assert ratio == ("c", "ours", 2.0, 1.5)
    (ratio,) = draw.ratios_of(written("over frozen", [1.2, 1.2], [1.5, 1.5], [2.0, 2.0]))
    assert ratio == ("c", "ours", None, pytest.approx(0.8))


def test_pictures_are_drawn_from_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw.draw_costs(tables.RESULTS, tmp_path / "cost.png")
    draw.draw_ratios(tables.RESULTS, tmp_path / "ratios.png")
    from matplotlib.image import imread

    for name in ("cost.png", "ratios.png"):
        assert (tmp_path / name).stat().st_size < 100_000
        assert np.ptp(imread(tmp_path / name)[..., :3]) > 0.8
