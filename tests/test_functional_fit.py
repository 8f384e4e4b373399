"""The whole fit: rows held out, calibration, phases, cells dealt to ranks, relevance."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from probtensor.comm import Comm, Serial
from probtensor.gaussian import Gamma
from probtensor.intake import Table, deal
from probtensor.likelihoods import Likelihood, Poisson, StudentT
from probtensor.models import FunBaT
from probtensor.models.functional_fit import Fitted, fit
from probtensor.models.functional_state import Rows
from probtensor.models.functional_table import has_repeated_cells, uniform
from probtensor.models.functional_tucker import LIGHT_TAILS, FunctionalTucker
from probtensor.models.latent_functions import ExchangeableRows
from probtensor.models.relevance import contributions
from tests.reference import F64

SETTINGS = {"rank": 1, "n_init": 1, "max_iter": 40, "random_state": 0, "progress": False}


def table(n: int = 2500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A wave times a trend; residuals of cells and noise of rows with heavy tails; many cells repeated."""
    rng = np.random.default_rng(seed)
    cells = np.column_stack([rng.integers(0, 60, 900) / 6, rng.integers(0, 25, 900) / 5])
    which = rng.integers(0, 900, n)
    x, z = cells[which].T
    residual = 0.15 * rng.standard_t(3, 900)
    return cells[which], np.sin(x) * (1 + z / 3) + residual[which] + 0.1 * rng.standard_t(3, n)


def test_a_row_has_the_same_uniform_number_on_every_rank() -> None:
    whole = uniform(torch.arange(10_000), 5)
    assert torch.equal(torch.cat([uniform(torch.arange(0, 70), 5), uniform(torch.arange(70, 10_000), 5)]), whole)
    assert not torch.equal(uniform(torch.arange(10_000), 6), whole)
    counts = torch.histc(whole, bins=10, min=0, max=1)
    assert ((counts - 1000).abs() < 150).all()


def test_calibrated_intervals_cover_what_they_say_and_seen_cells_have_narrower_ones() -> None:
    X, y = table(5000)
    model = FunBaT(**SETTINGS).fit(X[:3500], y[:3500])
    assert len(model._observation.calibration) in (1, 2)
    for level in (0.5, 0.9, 0.95):
        lower, upper = model.predict_interval(X[3500:], level)
        inside = np.mean((lower <= y[3500:]) & (y[3500:] <= upper))
        # 350 rows were held out: of a level of 0.5 that is a standard error of 0.027.
        assert inside == pytest.approx(level, abs=0.08 if level == 0.5 else 0.035)
    # A seen cell that lies far out may have a wide one; on the whole they are narrower.
    new, seen = np.column_stack([X[:400, 0] + 0.01, X[:400, 1]]), X[:400]
    lower, upper = model.predict_interval(np.concatenate([new, seen]))
    width = (upper - lower).reshape(2, 400).mean(axis=1)
    assert width[1] < 0.95 * width[0]


def test_few_rows_are_not_held_out() -> None:
    X, y = table(400)
    model = FunBaT(**SETTINGS).fit(X, y)
    assert model._observation.calibration == ()
    assert len(model.phase_starts_) == 2  # light tails, then heavy ones


def test_the_bound_never_falls_within_a_phase() -> None:
    X, y = table()
    for form in ("cp", "tucker"):
        model = FunBaT(form=form, **SETTINGS).fit(X, y)
        for phase in np.split(model.bound_history_, model.phase_starts_[1:]):
            assert (np.diff(phase) >= -1e-8 * abs(model.bound_)).all()


def test_repeated_cells_are_noticed() -> None:
    positions = torch.tensor([[0, 1], [1, 1], [0, 1]])
    values = torch.zeros(3, dtype=F64)
    rows = Table(positions, values, None, None, torch.arange(3))
    assert has_repeated_cells(rows, Serial())
    assert not has_repeated_cells(rows.take(torch.tensor([0, 1])), Serial())


def test_contributions_are_root_mean_squares_of_the_components() -> None:
    X, y = table(300)
    model = FunBaT(likelihood="gaussian", nugget=False, **SETTINGS | {"rank": 3}).fit(X, y)
    positions = np.stack([axis.positions(X[:, k]) for k, axis in enumerate(model.axes_)])
    rows = Rows(torch.from_numpy(positions), torch.zeros(300, dtype=F64))
    found = contributions(model._model, model._state, [rows], Serial()).numpy()
    product = np.ones((300, model.rank_[0]))
    for name, column in zip(("mode_0", "mode_1"), X.T, strict=True):
        mean, std = model.factor(name, at=column)
        product *= mean**2 + std**2
    np.testing.assert_allclose(found, np.sqrt(product.mean(axis=0)), rtol=1e-9)
    np.testing.assert_allclose(model.relevance_, np.sort(found)[::-1] * model.y_scale_, rtol=1e-9)


def test_the_noise_is_that_of_all_rows_whatever_share_was_held_out() -> None:
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.integers(0, 20, 1500) / 2, rng.integers(0, 20, 1500) / 2])
    y = np.sin(X[:, 0]) * np.cos(X[:, 1]) + 0.3 * rng.normal(size=1500)
    for share in (0.2, 0.5):
        model = FunBaT(likelihood="gaussian", nugget=False, calibration=share, **SETTINGS).fit(X, y)
        assert float(model._state.n_rows) == 1500
        assert model.noise_std_ == pytest.approx(0.3, rel=0.05)


# --- from tables of rows ----------------------------------------------------------------------------------------------


def test_uniform_numbers_are_uniform_and_unrelated_between_seeds() -> None:
    number = torch.arange(50_000)
    draws = [uniform(number, seed) for seed in (0, 1, 2**62 - 1)]
    for u in draws:
        assert u.dtype == F64
        assert ((u >= 0) & (u < 1)).all()
        assert float(u.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 50_000) ** 0.5)
        assert float(u.var()) == pytest.approx(1 / 12, rel=0.02)
        assert len(torch.unique(u)) == 50_000
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.02  # from one row to the next
    for other in draws[1:]:
        assert abs(float(torch.corrcoef(torch.stack([draws[0], other]))[0, 1])) < 0.02
    shuffled = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(shuffled, 0), draws[0][shuffled])


def small_model(likelihood: Likelihood | None, rank: int = 1) -> FunctionalTucker:
    functions = tuple(ExchangeableRows(size, torch.empty(0, dtype=F64)) for size in (15, 12))
    free = tuple(torch.tensor([True] * rank + [j == k for j in range(2)]) for k in range(2))
    one = torch.tensor(1.0, dtype=F64)
    return FunctionalTucker(functions, free, "cp", Gamma(one, one), likelihood=likelihood, relevance_prior=(1.0, 0.01))


def small_table(n: int = 2400, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    positions = np.column_stack([rng.integers(0, size, n) for size in (15, 12)])
    effects = [rng.normal(size=size) for size in (15, 12)]
    f = effects[0][positions[:, 0]] * effects[1][positions[:, 1]] + effects[0][::-1][positions[:, 0]]
    residual = 0.2 * rng.standard_t(4, (15, 12))
    y = f + residual[positions[:, 0], positions[:, 1]] + 0.15 * rng.standard_t(4, n)
    return Table(torch.from_numpy(positions), torch.from_numpy((y - y.mean()) / y.std()), None, None, torch.arange(n))


def fit_table(model: FunctionalTucker, table: Table, **options: object) -> Fitted:
    settings = {"held_out": 0.2, "prune_below": 0.0, "max_iter": 40, "tol": 1e-3, "n_init": 1, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit(model, table, Serial(), generator=torch.Generator().manual_seed(0), **settings | options)


def held_out_rows(table: Table, share: float) -> torch.Tensor:
    """The rows that `fit_table` holds out: the first number of its generator is their seed."""
    generator = torch.Generator().manual_seed(0)
    return uniform(table.key, int(torch.randint(2**62, (1,), generator=generator))) < share


LIKELIHOODS = {"gaussian": None, "student-t": StudentT(dof=4.0), "no nugget": StudentT(dof=4.0, nugget=False)}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_values_held_out_change_no_bit_of_the_first_phases(name: str) -> None:
    rows = small_table()
    held = held_out_rows(rows, 0.2)
    values = rows.values.clone()
    values[held] = 3.0 * values[held] + 1.0
    before, after = (fit_table(small_model(LIKELIHOODS[name]), x) for x in (rows, replace(rows, values=values)))
    start = before.phase_starts[-1]
    assert before.phase_starts == after.phase_starts
    assert start > 4
    assert before.bound_history[:start] == after.bound_history[:start]
    assert before.bound_history[start:] != after.bound_history[start:]
    scales = [sum(float((m.weights * m.scales**2).sum()) for m in x.observation.calibration) for x in (before, after)]
    assert scales[1] > 2 * scales[0]
    # And those that were not held out change all bits but the first.
    values = torch.where(held, rows.values, rows.values + 0.1 * held_out_rows(rows, 0.5).double())
    assert (
        fit_table(small_model(LIKELIHOODS[name]), replace(rows, values=values)).bound_history[0]
        != (before.bound_history[0])
    )


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_phases_start_where_the_bound_is_of_another_model(name: str, held_out: float) -> None:
    fitted = fit_table(small_model(LIKELIHOODS[name]), small_table(), held_out=held_out)
    heavy = [LIGHT_TAILS] if name != "gaussian" else []
    assert fitted.phase_starts[: 1 + len(heavy)] == (0, *heavy)
    assert len(fitted.phase_starts) == 1 + len(heavy) + (held_out > 0)
    assert list(fitted.phase_starts) == sorted(set(fitted.phase_starts))
    assert fitted.phase_starts[-1] < len(fitted.bound_history)
    for phase in np.split(fitted.bound_history, fitted.phase_starts[1:]):
        assert (np.diff(phase) >= -1e-9 * 2400).all()


def test_dropped_components_begin_a_phase() -> None:
    model = small_model(None, rank=5)
    plain = fit_table(model, small_table(), held_out=0.0)
    pruned = fit_table(model, small_table(), held_out=0.0, prune_below=float(plain.relevance.sort().values[1]))
    assert pruned.phase_starts == (0, len(plain.bound_history))
    assert pruned.bound_history[: len(plain.bound_history)] == plain.bound_history
    assert len(pruned.relevance) == pruned.model.ranks[0] - 2 < 5
    assert plain.model is model


@pytest.mark.parametrize(
    ("n", "held_out", "calibrated"), [(1900, None, 0), (2400, None, 1), (500, 0.2, 0), (2400, 0, 0)]
)
def test_rows_are_held_out_where_they_are_enough(n: int, held_out: float | None, calibrated: int) -> None:
    fitted = fit_table(small_model(None), small_table(n), held_out=held_out, max_iter=12)
    assert len(fitted.observation.calibration) == calibrated


def test_new_and_seen_cells_are_calibrated_apart_where_both_are_many() -> None:
    rng = np.random.default_rng(0)
    rows = small_table(3000)
    once = rng.random(3000) < 0.5  # in cells of their own, of 30 x 100 others
    positions = rows.positions.clone()
    positions[once] = torch.from_numpy(np.column_stack([15 + np.arange(3000) % 30, 12 + np.arange(3000) // 30])[once])
    functions = tuple(ExchangeableRows(size, torch.empty(0, dtype=F64)) for size in (45, 112))
    model = replace(small_model(LIKELIHOODS["student-t"]), functions=functions)
    fitted = fit_table(model, replace(rows, positions=positions), max_iter=24)
    assert len(fitted.observation.calibration) == 2
    together = fit_table(small_model(LIKELIHOODS["student-t"]), rows, max_iter=24)
    assert len(together.observation.calibration) == 1


def test_counts_are_not_calibrated() -> None:
    rows = small_table(2400)
    fitted = fit_table(
        small_model(Poisson()), replace(rows, values=rows.values.exp().round()), held_out=0.2, max_iter=9
    )
    assert fitted.observation is None
    assert fitted.phase_starts == (0,)


class Party(Comm):
    """One of several ranks, in one process: what the others send is known."""

    def __init__(self, rank: int, size: int, sent: dict[int, tuple[torch.Tensor, torch.Tensor]], n_rows: int) -> None:
        self.rank, self.size, self.sent, self.n_rows = rank, size, sent, n_rows

    def exchange(self, table: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        self.sent[self.rank] = table, to
        return torch.cat([rows[ranks == self.rank] for _, (rows, ranks) in sorted(self.sent.items())])

    def sum(self, tensor: torch.Tensor, rest: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tensor([self.n_rows])

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        raise AssertionError("rows are counted and exchanged, and nothing else")

    gather_bytes = exchange_bytes = barrier = abort = broadcast


def dealt(tables: list[Table]) -> list[Table]:
    """Every rank's rows after `deal`: asked twice, as the first time not all have sent."""
    sent: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for _ in range(2):
        n_rows = sum(len(table.values) for table in tables)
        found = [deal(table, Party(rank, len(tables), sent, n_rows)) for rank, table in enumerate(tables)]
    return found


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_cells_are_dealt_whole_and_no_row_is_lost(size: int, weights: bool) -> None:
    whole = small_table(20_000)
    if weights:
        generator = torch.Generator().manual_seed(0)
        whole = replace(
            whole, count=1 + torch.rand(20_000, generator=generator, dtype=F64), precision=whole.values.exp()
        )
    parts = [part for part in torch.arange(20_000).tensor_split(size - 1)] + [torch.arange(0)]  # the last has no row
    found = dealt([whole.take(part) for part in parts])
    owners: dict[tuple[int, ...], set[int]] = {}
    for rank, table in enumerate(found):
        assert table.positions.dtype == table.key.dtype == torch.int64
        for part in table.blocks():
            assert torch.equal(part.key, part.key.sort().values)
        for cell in table.positions.tolist():
            owners.setdefault(tuple(cell), set()).add(rank)
        for name in ("positions", "values", "count", "precision"):
            column = getattr(whole, name)
            assert (getattr(table, name) is None) == (column is None)
            if column is not None:
                assert torch.equal(getattr(table, name), column[table.key])
    assert all(len(ranks) == 1 for ranks in owners.values())
    assert torch.equal(torch.cat([table.key for table in found]).sort().values, torch.arange(20_000))
    sizes = [len(table.values) for table in found]
    assert min(sizes) > 20_000 / size / 3  # evenly, more or less


def test_where_cells_go_does_not_depend_on_who_held_them() -> None:
    whole = small_table(9000)
    one = dealt([whole.take(torch.arange(0, 5000)), whole.take(torch.arange(5000, 9000))])
    other = dealt([whole.take(torch.arange(0, 20)), whole.take(torch.arange(20, 9000))])
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.key, b.key)
        assert torch.equal(a.values, b.values)
