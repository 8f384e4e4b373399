"""The loop of coordinate ascent on toy models that know what they were asked."""

import math
import warnings
from typing import NamedTuple

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from probtensor.comm import Comm, Serial
from probtensor.inference.message_passing import SCREENING, Progress, run
from tests.reference import F64, f64


class ToyState(NamedTuple):
    trial: int
    sweeps: int
    trace: tuple[str, ...]


class Toy:
    """A model whose bound is a given function of (trial, sweeps)."""

    def __init__(self, bound, blocks=("a", "b")) -> None:
        self._bound, self.blocks = bound, blocks
        self.started: list[int] = []
        self.states: list[ToyState] = []

    def local_start(self, rows: Tensor) -> Tensor:
        return rows.sum()[None]

    def start(self, statistics: Tensor, generator: torch.Generator, trial: int) -> ToyState:
        self.started.append(trial)
        return ToyState(trial, 0, (f"start {float(statistics)}",))

    def local_statistics(self, state: ToyState, block: str, rows: Tensor) -> Tensor:
        return rows.sum()[None]

    def update(self, state: ToyState, block: str, statistics: Tensor) -> ToyState:
        return state._replace(trace=(*state.trace, f"{block} {float(statistics)}"))

    def begin(self, state: ToyState, rows: Tensor) -> Tensor:
        return rows

    def end_sweep(self, state: ToyState, parts: list[Tensor], total) -> tuple[ToyState, list[Tensor]]:
        return state._replace(sweeps=state.sweeps + 1, trace=(*state.trace, "end")), parts

    def bound(self, state: ToyState) -> Tensor:
        self.states.append(state)
        return f64(self._bound(state.trial, state.sweeps))


class Counting(Comm):
    """A serial communicator that counts its sums, as rank 0 or another."""

    size = 1

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.sums = 0

    def sum(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        self.sums += 1
        return tensor

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        assert root == 0
        return tensor

    def gather_bytes(self, data: bytes) -> list[bytes]:
        raise AssertionError("the loop sums and hands the bound out, and does nothing else")

    exchange_bytes = barrier = abort = gather_bytes


def start(model: Toy, *, rows=(1.0, 2.0), comm: Comm | None = None, **options):
    settings = {"max_iter": 50, "tol": 1e-3, "scale": 1.0, "progress": False} | options
    comm = Serial() if comm is None else comm
    return run(
        model, [torch.tensor(rows, dtype=F64)], comm=comm, generator=torch.Generator().manual_seed(0), **settings
    )


def geometric(trial: int, sweeps: int) -> float:
    return 10.0 - 8 * 0.5**sweeps


def test_a_settled_bound_stops_the_loop_and_says_so():
    result = start(Toy(geometric))
    assert result.converged
    assert result.stop_reason == "the bound changed by less than tol=0.001 (relative) over 2 sweeps"
    assert result.n_iter == len(result.bound_history) == result.state.sweeps
    assert result.bound_history == [geometric(0, n) for n in range(1, result.n_iter + 1)]
    changes = [abs(b - a) / abs(b) for a, b in zip(result.bound_history, result.bound_history[2:], strict=False)]
    assert changes[-1] <= 1e-3 < changes[-2]


def test_blocks_are_updated_in_order_from_the_sums_of_the_rows():
    result = start(Toy(geometric), rows=(1.0, 2.0, 4.0))
    assert result.state.trace == ("start 7.0", *("a 7.0", "b 7.0", "end") * result.n_iter)


def test_a_bound_that_rises_steadily_is_never_called_converged():  # case 23
    with pytest.warns(ConvergenceWarning, match=r"max_iter=12 sweeps done.*Raise max_iter or tol") as caught:
        result = start(Toy(lambda trial, n: float(n)), max_iter=12)
    assert not result.converged
    assert result.stop_reason == "max_iter=12 sweeps done"
    assert result.n_iter == len(result.bound_history) == 12
    assert len(caught) == 1


def test_only_rank_zero_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not start(Toy(lambda trial, n: float(n)), comm=Counting(rank=1), max_iter=12).converged


def test_a_falling_bound_is_not_called_converged():
    with pytest.warns(ConvergenceWarning):
        assert not start(Toy(lambda trial, n: -float(n)), max_iter=12).converged


def test_one_still_sweep_between_moving_ones_does_not_stop_the_loop():
    # Hyperparameters move in every other sweep only.
    with pytest.warns(ConvergenceWarning):
        assert start(Toy(lambda trial, n: float(n // 2)), max_iter=20, tol=1e-2).n_iter == 20


def test_a_bound_near_zero_is_judged_by_the_number_of_rows():
    assert start(Toy(lambda trial, n: 1e-3 * (-1) ** (n // 2)), scale=100.0).n_iter == 3


@pytest.mark.parametrize("min_iter", [0, 3, 8])
def test_at_least_min_iter_sweeps(min_iter: int):
    assert start(Toy(lambda trial, n: 1.0), min_iter=min_iter).n_iter == max(min_iter, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n_init", [1, 2])
def test_a_bound_that_is_not_finite_raises_and_says_what_to_try(value: float, n_init: int):
    with pytest.raises(FloatingPointError, match=r"the bound is -?(nan|inf) after 4 sweeps; try damping=0\.5"):
        start(Toy(lambda trial, n: value if n == 4 else float(n)), n_init=n_init)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_of_several_starts_goes_on(best: int):
    model = Toy(lambda trial, n: geometric(trial, n) + (5.0 if trial == best else 0.0))
    result = start(model, n_init=3, tol=1e-9)
    assert model.started == [0, 1, 2]
    assert result.state.trial == best
    assert result.converged
    assert result.bound_history == [geometric(0, n) + 5.0 for n in range(1, result.n_iter + 1)]
    per_trial = [sum(s.trial == t for s in model.states) for t in range(3)]
    assert per_trial == [result.n_iter if t == best else SCREENING for t in range(3)]


def test_starts_are_judged_after_the_screening_and_not_before():
    model = Toy(lambda trial, n: float(n if trial else SCREENING / 2 + n / 2 - 0.1))
    with pytest.warns(ConvergenceWarning):
        assert start(model, n_init=2, max_iter=SCREENING + 5).state.trial == 1


def test_few_sweeps_are_shared_by_no_one():
    model = Toy(lambda trial, n: float(n * (trial + 1)))
    with pytest.warns(ConvergenceWarning):
        result = start(model, n_init=3, max_iter=4)
    assert (result.n_iter, result.state.trial, result.state.sweeps) == (4, 2, 4)


@pytest.mark.parametrize("n_init", [1, 3])
def test_the_number_of_sums_depends_on_the_sweeps_alone(n_init: int):
    counts = []
    for rows in ((), (1.0,), tuple(range(1000))):
        comm = Counting()
        result = start(Toy(geometric, blocks=("core", 0, 1)), rows=rows, comm=comm, n_init=n_init)
        sweeps = result.n_iter + (n_init - 1) * SCREENING
        assert comm.sums == 1 + 3 * sweeps
        counts.append(comm.sums)
    assert len(set(counts)) == 1


def test_no_gradients_are_recorded():
    seen = []

    class Watching(Toy):
        def update(self, state, block, statistics):
            seen.append(torch.is_grad_enabled())
            return super().update(state, block, statistics)

    start(Watching(geometric))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(("progress", "rank", "shown"), [(True, 0, True), (False, 0, False), (True, 1, False)])
def test_the_progress_bar_is_for_rank_zero(
    monkeypatch: pytest.MonkeyPatch, capsys, progress: bool, rank: int, shown: bool
):
    monkeypatch.setattr("probtensor.inference.message_passing.SHOW_AFTER", 0.0)
    start(Toy(geometric), comm=Counting(rank), progress=progress)
    assert ("sweeps" in capsys.readouterr().err) == shown


class Renewing(Toy):
    """Rows that every sweep renews: each statistic tells how often."""

    def begin(self, state: ToyState, rows: Tensor) -> Tensor:
        self.began = [*getattr(self, "began", []), state.trial]
        return rows + 100.0

    def end_sweep(self, state: ToyState, parts: list[Tensor], total) -> tuple[ToyState, list[Tensor]]:
        state, parts = super().end_sweep(state, parts, total)
        said = float(total(rows.sum() for rows in parts))
        return state._replace(trace=(*state.trace, f"total {said}")), [rows + 1.0 for rows in parts]


def test_rows_go_from_one_sweep_to_the_next():
    result = start(Renewing(geometric, blocks=("a",)), rows=(5.0,), max_iter=3, tol=10.0)
    assert result.state.trace == (
        "start 5.0",
        *("a 105.0", "end", "total 105.0"),
        *("a 106.0", "end", "total 106.0"),
        *("a 107.0", "end", "total 107.0"),
    )


def test_each_start_has_rows_of_its_own_and_the_best_gets_its_again():
    model = Renewing(lambda trial, n: geometric(trial, n) + (5.0 if trial == 1 else 0.0), blocks=("a",))
    result = start(model, rows=(5.0,), n_init=3, tol=1e-9)
    assert model.began == [0, 1, 2, 1]
    said = [text for text in result.state.trace if text.startswith("a ")]
    since = [*range(SCREENING), *range(result.n_iter - SCREENING)]
    assert said == [f"a {105.0 + n}" for n in since]


def test_a_state_to_go_on_from_is_no_new_start():
    model = Renewing(geometric, blocks=("a",))
    earlier = ToyState(7, 4, ("earlier",))
    result = start(model, rows=(5.0,), n_init=3, resume=Progress(3, earlier, [], None), tol=1e-3)
    assert model.started == []
    assert model.began == [7]
    assert result.state.trace[:3] == ("earlier", "a 105.0", "end")
    assert result.state.sweeps == 4 + result.n_iter
    assert result.bound_history == [geometric(7, 4 + n) for n in range(1, result.n_iter + 1)]


def test_a_state_to_go_on_from_sweeps_no_more_than_max_iter_and_sums_no_start():
    comm, earlier = Counting(), Progress(5, ToyState(0, 0, ()), [], None)
    with pytest.warns(ConvergenceWarning):
        result = start(Toy(lambda trial, n: float(n), blocks=("a",)), comm=comm, n_init=5, resume=earlier, max_iter=6)
    assert result.n_iter == comm.sums == 6


# --- going on from where another run was -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_init", [1, 3])
def test_a_run_that_goes_on_from_any_sweep_ends_as_if_it_had_never_stopped(n_init: int):
    def bound(trial: int, sweeps: int) -> float:
        return geometric(trial, sweeps) - (trial - 1) ** 2  # the second start is the best

    seen: list[Progress] = []

    def keep(now: Progress) -> bool:
        seen.append(now)
        return False

    whole = start(Toy(bound), n_init=n_init, after_sweep=keep)
    assert len(seen) == whole.n_iter + (n_init - 1) * SCREENING
    for number, now in enumerate(seen):
        model, later = Toy(bound), []
        result = start(
            model, n_init=n_init, resume=now, after_sweep=lambda now, later=later: later.append(now) or False
        )
        assert result == whole
        assert later == seen[number + 1 :]


def test_rows_are_begun_anew_where_the_state_was_kept():
    class Restless(Toy):
        def begin(self, state: ToyState, rows: Tensor) -> Tensor:
            self.begun = (*getattr(self, "begun", ()), state.sweeps)
            return rows

    model = Restless(geometric)
    result = start(model, after_sweep=lambda now: len(now.history) % 4 == 0)
    assert model.begun == (0, *range(4, result.n_iter + 1, 4))
