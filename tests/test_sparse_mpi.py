"""Sparse coding on several ranks: the serial fit, whatever rank holds which points, and the same bits on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import RunMpi


@pytest.mark.mpi
@pytest.mark.parametrize(("what", "n"), [("selected", 1), ("selected", 2), ("selected", 3), ("evolved", 3)])
def test_a_fit_on_several_ranks_is_the_serial_fit(run_mpi: RunMpi, what: str, n: int) -> None:
    assert run_mpi("sparse_ranks.py", n, what, timeout=180).stdout == f"ok on {n}\n"


@pytest.mark.mpi
def test_there_may_be_more_ranks_than_points(run_mpi: RunMpi) -> None:
    assert run_mpi("sparse_ranks.py", 4, "few", timeout=180).stdout == "ok on 4\n"
