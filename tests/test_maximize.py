"""The optimiser of the hyperparameters: never downhill, inside its bounds."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from probtensor.inference.maximize import maximize
from tests.reference import F64, close, f64

WIDE = f64([[-10.0, -10.0], [10.0, 10.0]])


def rosenbrock(x: Tensor) -> Tensor:
    return -((1 - x[0]) ** 2) - 100 * (x[1] - x[0] ** 2) ** 2


def test_finds_a_maximum():
    assert close(maximize(rosenbrock, f64([-1.0, 2.0]), WIDE, 200), f64([1.0, 1.0]), 1e-3)


@pytest.mark.parametrize("max_iter", [1, 2, 3, 10])
@pytest.mark.parametrize(
    "objective", [rosenbrock, lambda x: (7 * x).sin().sum() - 0.1 * (x**4).sum(), lambda x: x.abs().sqrt().sum()]
)
def test_never_ends_below_its_start(objective, max_iter: int):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        start = 4 * torch.rand(2, generator=generator, dtype=F64) - 2
        end = maximize(objective, start, WIDE, max_iter)
        assert objective(end) >= objective(start)


def test_respects_its_bounds():
    bounds = f64([[-1.0, 0.5], [0.25, 2.0]])
    seen = []

    def objective(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x[0] - x[1] ** 2

    end = maximize(objective, f64([0.0, 1.0]), bounds, 50)
    assert close(end, f64([0.25, 0.5]), 1e-9)
    assert all(((x >= bounds[0]) & (x <= bounds[1])).all() for x in seen)


def test_stays_where_it_cannot_rise():
    start = f64([1.0, 1.0])
    assert torch.equal(maximize(rosenbrock, start, WIDE, 10), start)
    corner = f64([10.0, -10.0])
    assert torch.equal(maximize(lambda x: x[0] - x[1], corner, WIDE, 10), corner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3), ()])
def test_keeps_shape_and_dtype_and_leaves_its_start_alone(dtype: torch.dtype, shape: tuple[int, ...]):
    start = torch.full(shape, 0.5, dtype=dtype)
    kept = start.clone()
    bounds = torch.stack([torch.full(shape, -2.0, dtype=dtype), torch.full(shape, 2.0, dtype=dtype)])
    with torch.no_grad():  # the loop that calls it runs without gradients
        end = maximize(lambda x: -((x - 1) ** 2).sum(), start, bounds, 20)
    assert end.shape == shape
    assert end.dtype == dtype
    assert torch.allclose(end, torch.ones_like(end), atol=1e-4)
    assert torch.equal(start, kept)


def test_the_sum_over_ranks_is_what_rises():
    # This rank's part alone has its maximum at -1, the other's part moves that of the sum.
    others = []

    def mine(x: Tensor) -> Tensor:
        return -((x + 1) ** 2).sum()

    def total(parts: Iterable[Tensor]) -> Tensor:
        # The other rank's value and gradient where this one was asked: -3 (x - 3)^2.
        (found,) = parts
        x = -found[1:] / 2 - 1
        others.append(found.dtype)
        return found + torch.cat([-3 * ((x - 3) ** 2).sum()[None], -6 * (x - 3)])

    end = maximize(lambda x, part: mine(x), f64([0.0, 5.0]), WIDE, 50, [None], total)
    assert close(end, f64([2.0, 2.0]), 1e-6)
    assert close(maximize(mine, f64([0.0, 5.0]), WIDE, 50), f64([-1.0, -1.0]), 1e-6)
    assert set(others) == {F64}


def test_one_rank_is_the_sum_over_one():
    start = f64([-1.0, 2.0])
    assert torch.equal(
        maximize(lambda x, part: rosenbrock(x), start, WIDE, 7, [None], sum), maximize(rosenbrock, start, WIDE, 7)
    )


def test_an_objective_over_parts_is_their_sum():
    parts = [f64([1.0, 2.0]), f64([3.0, -4.0]), f64([-1.0, 5.0])]
    end = maximize(lambda x, part: -((x - part) ** 2).sum(), f64([0.0, 0.0]), WIDE, 50, parts)
    assert close(end, f64([1.0, 1.0]), 1e-6)


def test_value_and_gradient_of_single_precision_are_summed_in_double():
    seen = []
    start = torch.full((2,), 0.5)

    def total(parts: Iterable[Tensor]) -> Tensor:
        (found,) = parts
        seen.append(found.dtype)
        return found

    maximize(lambda x, part: -((x - part) ** 2).sum(), start, WIDE.float(), 3, [1.0], total)
    assert set(seen) == {F64}
