"""The effective weight: one operation with its own backward against differentiable ones and finite differences."""

import itertools

import pytest
import torch
from torch import Tensor

from probtensor.models.effective_weight import _differentiable, _is_one_operation, updated
from probtensor.models.tucker_delta import Tucker

SHAPES = [(5, 4), (6, 5, 3), (6, 5, 3, 3), (4, 5, 3, 2, 3), (6, 5, 1, 1), (3, 4, 3, 1)]


def draw(shape: tuple[int, ...], kept: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tucker]:
    """A weight and an update of ranks 2, and of the whole size in the modes that the core keeps."""
    generator = torch.Generator().manual_seed(0)
    ranks = [size if n in kept or size < 3 else 2 for n, size in enumerate(shape)]
    factors = [
        None if rank == size else torch.randn(size, rank, generator=generator, dtype=dtype, requires_grad=True)
        for size, rank in zip(shape, ranks, strict=True)
    ]
    core = torch.randn(ranks, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    return weight, Tucker(core, tuple(factors), 0.7)


def inputs(update: Tucker) -> list[Tensor]:
    return [update.core, *(A for A in update.factors if A is not None)]


@pytest.mark.parametrize(("shape", "kept"), list(itertools.product(SHAPES, [(), (0,), (1,), (0, 1), (2, 3, 4)])))
def test_one_operation_equals_differentiable_ones(shape: tuple[int, ...], kept: tuple[int, ...]) -> None:
    weight, update = draw(shape, kept)
    value, expected = updated(weight, [update]), _differentiable(weight, [update])
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(value, inputs(update), upstream)
    wanted = torch.autograd.grad(expected, inputs(update), upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 3, 3)])
def test_first_and_second_derivatives_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    weight, update = draw(shape, ())
    weight.requires_grad_()

    def build(weight: Tensor, core: Tensor, *factors: Tensor) -> Tensor:
        return updated(weight, [Tucker(core, factors, 0.7)])

    arguments = (weight, *inputs(update))
    assert torch.autograd.gradcheck(build, arguments)
    assert torch.autograd.gradgradcheck(build, arguments)


def test_frozen_parts_get_no_gradient_and_cost_none() -> None:
    weight, update = draw((4, 5, 3, 3), ())
    frozen = [A for A in update.factors if A is not None]
    for A in frozen:
        A.requires_grad_(False)
    updated(weight, [update]).sum().backward()
    assert update.core.grad is not None
    assert all(A.grad is None for A in frozen)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in dual_level
def test_transforms_and_several_updates_agree_with_one_operation() -> None:
    weight, update = draw((4, 5, 3, 3), ())
    assert _is_one_operation(weight, update)

    def total(core: Tensor) -> Tensor:
        return updated(weight, [update._replace(core=core)]).square().sum()

    (wanted,) = torch.autograd.grad(total(update.core), update.core)
    core = update.core.detach()
    torch.testing.assert_close(torch.func.grad(total)(core), wanted)
    tangent = torch.ones_like(core)
    _, moved = torch.func.jvp(total, (core,), (tangent,))
    torch.testing.assert_close(moved, wanted.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = total(torch.autograd.forward_ad.make_dual(core, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, wanted.sum())
    both = updated(weight, [update, update])
    torch.testing.assert_close(both - weight, 2 * (updated(weight, [update]) - weight))


def test_autocast_changes_neither_value_nor_gradient() -> None:
    weight, update = draw((6, 5, 3, 3), (), torch.float32)
    plain = updated(weight, [update])
    wanted = torch.autograd.grad(plain.sum(), inputs(update))
    with torch.autocast("cpu", torch.bfloat16):
        value = updated(weight, [update])
        found = torch.autograd.grad(value.sum(), inputs(update))
        several = updated(weight, [update, update._replace(scale=0.0)])
    torch.testing.assert_close(value, plain, rtol=0, atol=0)
    torch.testing.assert_close(several, plain)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_weights_in_half_precision_and_channels_last_keep_their_layout() -> None:
    weight, update = draw((6, 5, 3, 3), (), torch.float32)
    half = weight.bfloat16().to(memory_format=torch.channels_last)
    value = updated(half, [update])
    assert value.dtype == torch.bfloat16
    assert value.is_contiguous(memory_format=torch.channels_last)
    exact = half.float() + (updated(weight, [update]) - weight)
    torch.testing.assert_close(value, exact.bfloat16())
    (grad,) = torch.autograd.grad(value.float().square().sum(), update.core)
    assert grad.dtype == torch.float32
    assert grad.shape == update.core.shape
