"""Rows of one cell, merged and found again, against pandas' groupby."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from probtensor.cells import Cells, find_cells, merge_rows, single_rows
from probtensor.likelihoods import StudentT
from tests.reference import F64, close, f64

NO_MODE = torch.empty(0, 2, dtype=torch.int64)


def rows(n: int, K: int, seed: int, size: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, values far from zero, weights and precisions."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(size, (n, K), generator=generator)
    values = 1e6 + torch.randn(n, generator=generator, dtype=F64)
    count, precision = 3 * torch.rand(2, n, generator=generator, dtype=F64) + 0.1
    return positions, values, count, precision


def grouped(positions: Tensor, values: Tensor, count: Tensor, precision: Tensor) -> pd.DataFrame:
    """One line a cell, in order of appearance, from the definitions."""
    keys = [f"mode {k}" for k in range(positions.shape[1])]
    table = pd.DataFrame(positions.numpy(), columns=keys)
    table = table.assign(y=values.numpy(), c=count.numpy(), r=precision.numpy())

    def cell(group: pd.DataFrame) -> pd.Series:
        weight = group["c"] * group["r"]
        mean = group["y"].mul(weight).sum() / weight.sum()
        return pd.Series(
            {
                "count": group["c"].sum(),
                "weight": weight.sum(),
                "value": mean,
                "scatter": (weight * (group["y"] - mean) ** 2).sum(),
                "log_weight": (group["c"] * np.log(group["r"])).sum(),
            }
        )

    return table.groupby(keys, sort=False)[["y", "c", "r"]].apply(cell).reset_index()


def check(cells: Cells, expected: pd.DataFrame) -> None:
    K = cells.positions.shape[1]
    assert cells.positions.tolist() == expected.iloc[:, :K].to_numpy(dtype=int).tolist()
    for name, found in cells.entries._asdict().items():
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_cells_are_those_of_groupby(n: int, K: int):
    positions, values, count, precision = rows(n, K, seed=10 * n + K)
    ones = torch.ones_like(values)
    check(merge_rows(positions, values), grouped(positions, values, ones, ones))
    check(merge_rows(positions, values, count), grouped(positions, values, count, ones))
    check(merge_rows(positions, values, precision=precision), grouped(positions, values, ones, precision))
    check(merge_rows(positions, values, count, precision), grouped(positions, values, count, precision))


def test_no_row_makes_no_cell():
    cells = merge_rows(NO_MODE, f64([]))
    assert cells.positions.shape == (0, 2)
    assert all(part.shape == (0,) for part in cells.entries)


def test_equal_values_scatter_by_nothing_however_large_they_are():
    cells = merge_rows(torch.zeros(4, 2, dtype=torch.int64), torch.full((4,), 1e12 + 0.5, dtype=F64))
    assert float(cells.entries.scatter) == 0.0
    assert float(cells.entries.value) == 1e12 + 0.5


def test_a_small_scatter_around_a_large_value_keeps_its_digits():
    values = 1e8 + f64([1e-3, -1e-3])
    cells = merge_rows(torch.zeros(2, 1, dtype=torch.int64), values)
    assert float(cells.entries.scatter) == pytest.approx(2e-6, rel=1e-4)


def test_a_weight_of_two_is_the_row_twice():
    positions, values, _, precision = rows(9, 2, seed=0)
    count = torch.ones_like(values)
    count[4] = 2.0
    again = [torch.cat([x, x[4:5]]) for x in (positions, values, precision)]
    weighted, twice = merge_rows(positions, values, count, precision), merge_rows(again[0], again[1], None, again[2])
    assert torch.equal(weighted.positions, twice.positions)
    for a, b in zip(weighted.entries, twice.entries, strict=True):
        assert close(a, b, 1e-13)


def test_single_rows_are_the_cells_of_distinct_rows():
    _, values, count, precision = rows(8, 1, seed=3)
    positions = torch.arange(8)[:, None]
    for given in ((), (count,), (count, precision), (None, precision)):
        merged = merge_rows(positions, values, *given).entries
        for a, b in zip(single_rows(values, *given), merged, strict=True):
            assert close(a, b, 1e-14)


def test_nothing_that_a_likelihood_looks_at_is_lost():
    # All rows of one cell at one f: the merged entry's log-likelihood is that of the rows, residual integrated out.
    values, precision = f64([0.3, -1.0, 0.8]), f64([1.0, 2.0, 0.5])
    entries = merge_rows(torch.zeros(3, 2, dtype=torch.int64), values, None, precision).entries
    noise, nugget, mean = 0.4, 0.7, f64([0.1])
    found = StudentT(dof=math.inf).expected_log_prob(f64([noise, nugget]).log(), entries, mean, 0 * mean)
    covariance = torch.diag(noise / precision) + nugget
    joint = torch.distributions.MultivariateNormal(mean.expand(3), covariance).log_prob(values)
    assert float(found) == pytest.approx(float(joint), rel=1e-12)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_cells_are_found_again_and_others_are_not(K: int):
    generator = torch.Generator().manual_seed(K)
    cells = torch.unique(torch.randint(4, (9, K), generator=generator), dim=0)
    cells = cells[torch.randperm(len(cells), generator=generator)]
    asked = torch.randint(-1, 5, (200, K), generator=generator)
    places = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    expected = [places.get(tuple(row), -1) for row in asked.tolist()]
    found = find_cells(cells, asked)
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    assert -1 in expected
    assert max(expected) >= 0
    assert find_cells(cells, cells).tolist() == list(range(len(cells)))


@pytest.mark.parametrize(("n_cells", "n_rows"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("K", [1, 2])
def test_looking_up_nothing_or_among_nothing_finds_nothing(n_cells: int, n_rows: int, K: int):
    cells = torch.arange(n_cells)[:, None].expand(-1, K)
    found = find_cells(cells, torch.zeros(n_rows, K, dtype=torch.int64))
    assert found.dtype == torch.int64
    assert found.tolist() == [-1] * n_rows


def test_a_coordinate_that_was_not_seen_is_in_no_cell():
    cells = torch.tensor([[0, 0], [1, 0], [0, 1]])
    asked = torch.tensor([[-1, 0], [0, -1], [-1, -1], [0, 1], [7, 0]])
    assert find_cells(cells, asked).tolist() == [-1, -1, -1, 2, -1]


def test_what_merge_rows_numbers_find_cells_finds():
    positions, values, _, _ = rows(50, 3, seed=8)
    cells = merge_rows(positions, values)
    found = find_cells(cells.positions, positions)
    assert torch.equal(cells.positions[found], positions)
