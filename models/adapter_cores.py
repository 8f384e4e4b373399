"""Cores of adapters as variables: which they are, and the outputs' derivatives by them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from probtensor.models.flora import Adapters

__all__ = ["Inputs", "check_acting", "evaluating", "rows_with_derivatives", "trained_cores"]

MAX_ENTRIES = 2**24  # of the derivatives that are held at a time

Inputs = Tensor | Sequence[Tensor]


def trained_cores(adapters: Adapters, name: str, subset: str | Sequence[str]) -> dict[str, tuple[str, Tensor]]:
    """Cores by their layer: the name among the model's parameters, and a copy.

    Parameters
    ----------
    adapters : Adapters
    name : str
    subset : "core", "all" or sequence of str
        As in `fit_laplace`.

    Raises
    ------
    ValueError
        If a layer is not there, or none is left.
    """
    deltas = adapters.deltas(name)
    if isinstance(subset, str):
        if subset not in ("core", "all"):
            raise ValueError(f"subset: expected 'core', 'all' or names of parameters, got {subset!r}")
        low = [layer for layer, delta in deltas.items() if any(A is not None for A in delta.factors)]
        chosen = list(deltas) if subset == "all" else low
    else:
        chosen = list(dict.fromkeys(subset))
        for layer in chosen:
            if layer not in deltas:
                raise ValueError(f"subset: expected names among {list(deltas)}, got {layer!r}")
    if not chosen:
        raise ValueError(f"subset: expected at least one core, got none of {list(deltas)}")
    keys = {id(parameter): key for key, parameter in adapters.model.named_parameters()}
    return {layer: (keys[id(deltas[layer].core)], deltas[layer].core.detach().clone()) for layer in chosen}


def check_acting(adapters: Adapters, name: str) -> None:
    """Refuse an adapter whose cores the outputs do not depend on.

    Raises
    ------
    ValueError
        If it is not active, or adapters are merged.
    """
    adapters._check_unmerged("outputs")
    if name not in adapters.active:
        raise ValueError(f"adapters: expected {name!r} to be active, got {adapters.active}")


def rows_with_derivatives(
    adapters: Adapters, name: str, cores: Mapping[str, Tensor], x: Inputs, jacobian: str
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Outputs of the model in evaluation mode, and their derivatives by each core, some rows at a time.

    Parameters
    ----------
    adapters : Adapters
    name : str
    cores : mapping of str to Tensor
        By their name among the model's parameters; they take the place of the adapter's.
    x : Tensor, or tuple of Tensors, shape (n, …)
        The model's inputs.
    jacobian : {"vmap", "loop"}

    Yields
    ------
    outputs : Tensor, shape (m, C), float64
    derivatives : list of Tensor, shapes (m, C, *shape), float64

    Raises
    ------
    ValueError
        If the adapter does not act, or the model gives no tensor with a row for each input.
    """
    check_acting(adapters, name)
    model, inputs = adapters.model, (x,) if isinstance(x, Tensor) else tuple(x)
    n_parameters = sum(math.prod(core.shape) for core in cores.values())
    with evaluating(model), torch.no_grad():  # `jacrev` differentiates all the same
        outputs = functional_call(model, dict(cores), inputs)
        n = len(inputs[0])
        if not isinstance(outputs, Tensor) or len(outputs) != n:
            raise ValueError(
                f"model: expected a tensor of outputs with a row for each of {n} inputs, got another output"
            )
        outputs = outputs.reshape(n, -1).to(torch.float64)
        step = max(1, MAX_ENTRIES // max(1, outputs.shape[1] * n_parameters))
        for start in range(0, n, step):
            some = tuple(each[start : start + step] for each in inputs)
            derivatives = (_vmapped if jacobian == "vmap" else _looped)(model, cores, some)
            yield outputs[start : start + step], [each.to(torch.float64) for each in derivatives]


def _vmapped(model: nn.Module, cores: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    def one(cores: dict[str, Tensor], *row: Tensor) -> Tensor:
        result: Tensor = functional_call(model, cores, tuple(each[None] for each in row))
        return result.reshape(-1)

    found: dict[str, Tensor] = vmap(jacrev(one), in_dims=(None, *[0] * len(inputs)))(dict(cores), *inputs)
    return list(found.values())


def _looped(model: nn.Module, cores: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    rows = []
    for row in zip(*inputs, strict=True):
        with torch.enable_grad():
            leaves = {key: core.clone().requires_grad_() for key, core in cores.items()}
            y = functional_call(model, leaves, tuple(each[None] for each in row)).reshape(-1)
            wanted = list(leaves.values())
            each_output = [
                torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
                for value in y
            ]
        rows.append([torch.stack(part) for part in zip(*each_output, strict=True)])
    return [torch.stack(part) for part in zip(*rows, strict=True)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the while; each module gets its own mode back."""
    before: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
