"""FunBaT on several ranks: the serial fit, whatever rank holds which rows, and the same bits on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import RunMpi


DATA = Path(__file__).parents[2] / "shared" / "data" / "funbat" / "beijing_pm25.npz"


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_fit_on_several_ranks_is_the_serial_fit(run_mpi: RunMpi, n: int) -> None:
    assert run_mpi("funbat_ranks.py", n, "small", timeout=180).stdout == f"ok on {n}\n"


@pytest.mark.mpi
def test_a_fit_under_open_mpi_is_the_serial_fit(run_open_mpi: RunMpi) -> None:
    assert run_open_mpi("funbat_ranks.py", 3, "small", timeout=180).stdout == "ok on 3\n"


@pytest.mark.mpi
def test_there_may_be_more_ranks_than_rows(run_mpi: RunMpi) -> None:
    assert run_mpi("funbat_ranks.py", 12, "few", timeout=180).stdout == "ok on 12\n"


@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 3, 5])
def test_air_quality_on_several_ranks_is_the_serial_fit(run_mpi: RunMpi, n: int) -> None:
    if not DATA.exists():
        pytest.skip(f"no {DATA}")
    assert run_mpi("funbat_ranks.py", n, DATA, timeout=240).stdout == f"ok on {n}\n"
