"""Sums that do not depend on who does them, nor on the order."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probtensor.blocks import add_up, block_of, number_of_blocks, scramble
from probtensor.comm import Serial
from probtensor.intake import Table, deal
from tests.reference import F64, f64

NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.randoms())
def test_the_total_is_rounded_once_whatever_the_order(numbers, random):
    exact = float(sum(map(Fraction, numbers)))
    for _ in range(3):
        random.shuffle(numbers)
        total, rest = add_up([f64([x]) for x in numbers])
        assert float(total + rest) == pytest.approx(exact, rel=1e-15, abs=1e-300)


def test_the_bits_do_not_depend_on_the_groups():
    generator = torch.Generator().manual_seed(0)
    parts = list(torch.randn(64, 1000, generator=generator, dtype=F64) * 10.0 ** torch.randint(-6, 6, (64, 1)))
    one, rest = add_up(parts)
    expected = one + rest
    assert expected.tolist() == [math.fsum(column) for column in torch.stack(parts).T.tolist()]
    for size in (1, 2, 3, 5, 64):
        pairs = [add_up(group) for group in (parts[r::size] for r in range(size))]
        whole, left = add_up([pair[0] for pair in pairs])
        assert torch.equal(whole + (left + torch.stack([pair[1] for pair in pairs]).sum(0)), expected)
    assert not torch.equal(torch.stack(parts).sum(0), expected)  # what it is for


def test_nothing_is_no_sum():
    with pytest.raises(ValueError, match="parts: expected at least one, got none"):
        add_up([])


def test_blocks_depend_on_cells_alone_and_are_of_one_size():
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(300, (50_000, 3), generator=generator)
    n_blocks = number_of_blocks(50_000)
    block = block_of(positions, n_blocks)
    order = torch.randperm(50_000, generator=generator)
    assert torch.equal(block_of(positions[order], n_blocks), block[order])
    sizes = torch.bincount(block, minlength=n_blocks)
    assert n_blocks == len(sizes) == 24
    assert ((sizes - sizes.double().mean()).abs() < 6 * sizes.double().mean().sqrt()).all()
    assert len(scramble(torch.arange(10_000)).unique()) == 10_000


def test_rows_dealt_in_any_order_are_the_same_table():
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(200, (9000, 2), generator=generator)
    values = torch.randn(9000, generator=generator, dtype=F64)
    whole = Table(positions, values, values.exp(), None, scramble(torch.arange(9000)) >> 10)
    one = deal(whole, Serial())
    other = deal(whole.take(torch.randperm(9000, generator=generator)), Serial())
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.count, one.values.exp())
    assert other.precision is None
    blocks = one.blocks()
    assert len(blocks) == one.n_blocks == 4
    assert torch.equal(torch.cat([part.values for part in blocks]), one.values)
    for number, part in enumerate(blocks):
        assert set(block_of(part.positions, 4).tolist()) == {number}
        assert torch.equal(part.key, part.key.sort().values)
    assert [len(part.values) for part in one.take(slice(0, 0)).blocks()] == [0]
