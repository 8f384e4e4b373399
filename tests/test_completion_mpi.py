"""Neural tensor completion on several ranks: the serial fit but for rounding, and the same bits on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import RunMpi


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_fit_on_several_ranks_is_the_serial_fit(run_mpi: RunMpi, n: int, tmp_path: Path) -> None:
    """With two ranks also one that ends early and goes on, there and on one."""
    assert run_mpi("completion_ranks.py", n, tmp_path / "checkpoints", timeout=400).stdout == f"ok on {n}\n"
