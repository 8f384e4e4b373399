"""What a fit runs on: device, threads, random numbers; and checks of plain parameters."""

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from numbers import Integral, Real

import numpy as np
import torch

from probtensor.comm import Comm

__all__ = [
    "RandomState",
    "is_integer",
    "is_number",
    "keep_freed_memory",
    "make_generator",
    "resolve_device",
    "shared_generator",
    "threads_for",
    "unchanged_on_failure",
]

RandomState = int | np.random.Generator | np.random.RandomState | None

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
MANY_ROWS = 100_000  # rows of one rank from which a second thread pays


def is_number(value: object) -> bool:
    """Whether `value` is a real number; a bool is none.

    >>> is_number(0.5), is_number(True)
    (True, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Whether `value` is an integer, NumPy's included; a bool is none.

    >>> is_integer(np.int64(2)), is_integer(2.0)
    (True, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def make_generator(random_state: RandomState) -> torch.Generator:
    """A torch generator from a seed, or from one integer drawn from a NumPy generator; no global generator is touched.

    Parameters
    ----------
    random_state : int, numpy.random.Generator, numpy.random.RandomState or None
        None takes the seed from the operating system.

    Raises
    ------
    ValueError
        For another type, or a seed that is negative or has more than 63 bits.
    """
    match random_state:
        case None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        case np.random.Generator():
            seed = int(random_state.integers(2**31))
        case np.random.RandomState():
            seed = int(random_state.randint(2**31))
        case int() | np.integer() if 0 <= random_state < 2**63:
            seed = int(random_state)
        case _:
            raise ValueError(f"random_state: expected None, an integer >= 0 or a NumPy generator, got {random_state!r}")
    return torch.Generator().manual_seed(seed)


def shared_generator(random_state: RandomState, comm: Comm) -> torch.Generator:
    """A generator in the same state on every rank: that of rank 0's seed."""
    generator = make_generator(random_state)
    if comm.size == 1:
        return generator
    return make_generator(int(comm.broadcast(torch.tensor([generator.initial_seed()]))[0]))


def resolve_device(device: str) -> torch.device:
    """The device by its name; "auto" is a GPU where torch finds one, else the CPU.

    Raises
    ------
    ValueError
        If torch does not know the name, or finds no GPU for it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device: expected "auto", "cpu", "cuda" or another that torch knows, got {device!r}'
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device: expected "auto" or "cpu", since torch finds no GPU here, got {device!r}')
    return found


@cache
def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next use, where it is glibc and the user has not set its thresholds.

    By default glibc hands temporaries of megabytes back to the operating system when they are freed and asks for them
    again a moment later; the page faults took half the time of a sweep over two million rows. Up to 512 MB stay with
    the process. This holds for the whole process, and cannot be taken back.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    for parameter, size in ((M_TRIM_THRESHOLD, 2**29), (M_MMAP_THRESHOLD, 2**25)):
        libc.mallopt(parameter, size)


_lock = threading.Lock()
_small: list[int] = []  # the thread count that each piece of small work under way found


@contextmanager
def threads_for(n_rows: int) -> Iterator[None]:
    """One thread while few rows are fitted or predicted, unless the user set OMP_NUM_THREADS.

    The matrices are then so small that waking a second thread costs more than it does, ten times more where other
    programs keep the cores busy. torch's thread count belongs to the whole process: where such work
    overlaps in several Python threads, the first to start lowers it and the last to end puts it back.
    """
    keep_freed_memory()
    if n_rows >= MANY_ROWS or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    with _lock:
        _small.append(torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            if len(_small) == 1:
                torch.set_num_threads(_small[0])
                _small.clear()
            else:
                _small.pop()


@contextmanager
def unchanged_on_failure(estimator: object) -> Iterator[None]:
    """Leave an estimator as it was when what is done inside fails: bad input and Ctrl-C end no earlier fit."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise
