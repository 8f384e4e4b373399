"""Sums over rows that do not depend on which rank holds which rows, nor on their order.

Rows are dealt to ranks in blocks: by a hash of the cell, so that a cell's rows are together, and in the order of their
keys. What a block adds up to has the same bits wherever it is done, and sums of blocks are added with what rounding
cuts off kept beside them, so that the total, rounded once at the end, does not depend on the order of the blocks (but
for one total in 2^45 or so that lies so near to the middle of two numbers). How many blocks there are depends on the
number of rows alone, not on that of the ranks.

References
----------
Ogita, Rump, Oishi (2005), "Accurate sum and dot product", SIAM Journal on Scientific Computing, algorithm 4.4.
"""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Total", "add_up", "block_of", "mixed", "number_of_blocks", "scramble", "total_here"]

Total = Callable[[Iterable[Tensor]], Tensor]  # a sum over parts, here or on all ranks

ROWS = 2**11  # of a block of a small table: fewer, and adding blocks up takes longer than the rows do
FEW, MANY = 2**6, 2**12  # blocks of tables up to 4 million rows, and at most


def number_of_blocks(n_rows: int) -> int:
    """Blocks of a table with so many rows on all ranks.

    Examples
    --------
    >>> [number_of_blocks(n) for n in (0, 10, 13_572, 2_000_000, 100_000_000)]
    [1, 1, 6, 64, 1525]
    """
    return max(1, min(n_rows // ROWS, FEW), min(n_rows // 2**16, MANY))


def block_of(positions: Tensor, n_blocks: int) -> Tensor:
    """Block of each row, (n,), from its positions (n, K), int64."""
    number = torch.zeros(len(positions), dtype=torch.int64)
    for column in positions.cpu().T:
        number = scramble(number * 1_000_003 + column)
    return number % n_blocks


def add_up(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of tensors of one shape, and what rounding has cut off it.

    Examples
    --------
    >>> total, rest = add_up(torch.tensor([1e17, 1.0, -1e17], dtype=torch.float64))
    >>> total.item(), rest.item()
    (0.0, 1.0)
    """
    total: Tensor | None = None
    for part in parts:
        if total is None:
            total, rest = part, torch.zeros_like(part)
            continue
        larger = total + part
        of_part = larger - total
        rest = rest + ((total - (larger - of_part)) + (part - of_part))
        total = larger
    if total is None:
        raise ValueError("parts: expected at least one, got none")
    return total, rest


def total_here(parts: Iterable[Tensor]) -> Tensor:
    """Sum of tensors of one shape, rounded once: a `Total` without other ranks."""
    total, rest = add_up(parts)
    return total + rest


def scramble(numbers: Tensor) -> Tensor:
    """Scramble int64 numbers into [0, 2^63): splitmix64 (Steele, Lea, Flood 2014)."""
    z = numbers.numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def mixed(keys: npt.NDArray[np.int64], salt: int) -> npt.NDArray[np.int64]:
    """Numbers in [0, 2^63) from keys (n,), others for each salt.

    Examples
    --------
    >>> numbers = mixed(np.arange(10_000), 3)
    >>> bool(abs((numbers / 2.0**63).mean() - 0.5) < 0.01), bool((numbers == mixed(np.arange(10_000), 4)).any())
    (True, False)
    """
    salted = int(scramble(torch.tensor([salt]))[0])
    return np.asarray(scramble(torch.from_numpy(keys ^ salted)).numpy())
