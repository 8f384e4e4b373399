"""FunBaT on several ranks: the serial fit, whatever rank holds which rows, and the same bits on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import RunMpi


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_fit_on_several_ranks_is_the_serial_fit(run_mpi: RunMpi, n: int) -> None:
    assert run_mpi("funbat_ranks.py", n).stdout == f"ok on {n}\n"
