"""Updates at their start: random, from the weight, from a gradient, from a file, from others."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probtensor.models.adapter_config import FLoRAConfig
from probtensor.models.adapter_files import SavedAdapter
from probtensor.models.adapter_layers import kernel_modes
from probtensor.models.adapter_modules import Delta, TuckerDelta
from probtensor.models.adapter_targets import Target, all_parameters, find_targets
from probtensor.models.cp_delta import CPDelta, cp_scale
from probtensor.models.tucker_delta import combined, leading_factors, step_scale

__all__ = [
    "empty_delta",
    "filled",
    "gradient_ranks",
    "new_delta",
    "saved_deltas",
    "start_scale",
    "summed_delta",
    "weight_gradients",
]


def weight_gradients(
    model: nn.Module, config: FLoRAConfig, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Mean gradient of a loss by each parameter that an adapter of these settings would update.

    For ``init="gradient"``. Needs memory for one gradient of each weight.

    Parameters
    ----------
    model : Module
        Not adapted yet; it is left as it is.
    config : FLoRAConfig
    loss : callable
        From the model and a batch to a scalar.
    batches : iterable

    Returns
    -------
    dict of str to Tensor
        By the parameters' full names.

    Raises
    ------
    ValueError
        If there is no batch, or the settings do not fit the model.

    Examples
    --------
    >>> gradients = weight_gradients(nn.Linear(2, 1), FLoRAConfig(), lambda m, x: m(x).sum(), [torch.ones(3, 2)])
    >>> gradients["weight"]
    tensor([[3., 3.]])
    """
    targets = [target for target in find_targets(model, config) if not target.dense]
    parameters = [target.parameter for target in targets]
    before = [parameter.requires_grad for parameter in parameters]
    totals, count = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters], 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient
            count += 1
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
    if count == 0:
        raise ValueError("batches: expected at least one, got none")
    return {target.name: total / count for target, total in zip(targets, totals, strict=True)}


def gradient_ranks(gradients: Mapping[str, Tensor], r: int) -> dict[str, tuple[int, ...]]:
    """Ranks for each parameter that capture most of the gradients with as many parameters as LoRA of rank `r` trains.

    LoRA is meant to have rank `r` for every parameter, and for a convolution factors of (out, r) and (r, in·kernel).
    The first two modes get ranks, further ones, of kernels, keep their sizes. From ranks of 1, each step is the one
    that adds most to the squared norm of the gradients' truncated HOSVD for every parameter that it adds.

    Parameters
    ----------
    gradients : mapping of str to Tensor
        Of `weight_gradients`.
    r : int

    Returns
    -------
    dict of str to tuple of int
        By the parameters' names; `FLoRAConfig.rank_pattern` takes it with its keys through `re.escape`.

    Examples
    --------
    >>> gradient = torch.diag(torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]))
    >>> gradient_ranks({"steep": gradient, "flat": 0.01 * gradient}, 3)
    {'steep': (3, 3), 'flat': (1, 1)}
    """
    shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    budget = sum(r * (shape[0] + math.prod(shape[1:])) for shape in shapes.values())
    captured = {name: _captured(gradient.detach().to("cpu", torch.float64)) for name, gradient in gradients.items()}
    ranks = {name: (1, 1) for name in shapes}
    left = budget - sum(_n_parameters(shape, (1, 1)) for shape in shapes.values())
    while True:
        best, chosen = 0.0, None
        for name, (a, b) in ranks.items():
            energy, now = captured[name], _n_parameters(shapes[name], (a, b))
            for pair in ((a + 1, b), (a, b + 1), (a + 1, b + 1)):
                if pair[0] <= len(energy) and pair[1] <= len(energy[0]):
                    more = _n_parameters(shapes[name], pair) - now
                    gain = (energy[pair[0] - 1][pair[1] - 1] - energy[a - 1][b - 1]) / max(more, 1)
                    if more <= left and gain > best:
                        best, chosen = gain, (name, pair, more)
        if chosen is None:
            return {name: (*pair, *shapes[name][2:]) for name, pair in ranks.items()}
        ranks[chosen[0]], left = chosen[1], left - chosen[2]


def _captured(gradient: Tensor) -> list[list[float]]:
    """Squared norm of the HOSVD cut to each pair of ranks of the first two modes; less than rounding counts as none."""
    if gradient.ndim == 2:
        energy = torch.diag(torch.linalg.svdvals(gradient).square())
    else:
        first, second = (torch.linalg.svd(gradient.movedim(n, 0).flatten(1), full_matrices=False)[0] for n in (0, 1))
        core = torch.einsum("oi...,op,iq->pq...", gradient, first, second)
        energy = core.square().flatten(2).sum(2)
    energy = torch.where(energy > 1e-12 * energy.sum(), energy, 0.0)
    table: list[list[float]] = energy.cumsum(0).cumsum(1).tolist()
    return table


def _n_parameters(shape: Sequence[int], pair: tuple[int, int]) -> int:
    factors = sum(size * rank for size, rank in zip(shape, pair, strict=False) if rank < size)
    return pair[0] * pair[1] * math.prod(shape[2:]) + factors


def new_delta(target: Target, config: FLoRAConfig, gradients: Mapping[str, Tensor] | None) -> Delta:
    """An update at its start, in which it changes nothing.

    Raises
    ------
    ValueError
        If ranks do not fit the weight, or its gradient is asked for and not given.
    """
    name, shape = target.name, tuple(target.parameter.shape)
    if target.dense:
        return empty_delta(target, config, shape, 1.0, 0.0)
    ranks = config.ranks(name, shape, kernel_modes(target.places[0].module))
    delta = empty_delta(
        target, config, ranks, start_scale(config, name, target.parameter, ranks), float(config.dropout)
    )
    if config.init != "zero" and target.parameter.is_meta:
        raise ValueError(f"init: expected 'zero' for a model on the meta device, got {config.init!r}")
    if config.init == "weight":
        delta.start(leading_factors(target.parameter, ranks))
    if gradients is not None:
        if name not in gradients or tuple(gradients[name].shape) != shape:
            found = tuple(gradients[name].shape) if name in gradients else "none"
            raise ValueError(f"gradients: expected one of {shape} for {name!r}, got {found}")
        delta.start(leading_factors(gradients[name], ranks))
    return delta


def start_scale(config: FLoRAConfig, name: str, weight: Tensor, ranks: Sequence[int]) -> float:
    """The scale ``s`` of an update; NaN where `alpha` is "rms" and the weight on the meta device.

    For "rms" `alpha` is a power of two: there are few of them, so layers that are compiled one by one share graphs, and
    it hardly depends on the weight's precision and device.

    Parameters
    ----------
    config : FLoRAConfig
    name : str
        The weight's full name.
    weight : Tensor, shape (I1, …, IN)
        Of the base.
    ranks : sequence of int

    Raises
    ------
    ValueError
        If `alpha` is "rms" and the weight is not finite.

    Examples
    --------
    >>> start_scale(FLoRAConfig(), "weight", torch.full((9, 4), 0.23), (2, 2)), 2 * 0.25
    (0.5, 0.5)
    >>> start_scale(FLoRAConfig(), "weight", torch.zeros(9, 4), (2, 2)), 2 / 4**0.5
    (1.0, 1.0)
    """
    alpha = config.alpha_of(name)
    if alpha == "rms":
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm = math.nan if weight.is_meta else float(torch.linalg.vector_norm(weight.detach(), dtype=wide))
        if not (weight.is_meta or math.isfinite(norm)):
            raise ValueError(
                f"alpha: expected a number, as {name!r} has no root mean square (NaN or infinity), got 'rms'"
            )
        size = norm / math.sqrt(weight.numel()) if norm else 1 / math.sqrt(weight.numel() // len(weight))
        alpha = size if math.isnan(size) else 2.0 ** round(math.log2(size))
    return cp_scale(alpha, weight.ndim, *ranks) if config.form == "cp" else step_scale(alpha, weight.shape, ranks)


def empty_delta(target: Target, config: FLoRAConfig, ranks: Sequence[int], scale: float, dropout: float) -> Delta:
    """An update of given ranks at its random start.

    Parameters
    ----------
    target : Target
    config : FLoRAConfig
        Its seed counts; ranks, scale and dropout are given apart.
    ranks : sequence of int
    scale, dropout : float
    """
    parameter = target.parameter
    kind = CPDelta if config.form == "cp" and not target.dense else TuckerDelta
    delta = kind(
        tuple(parameter.shape),
        ranks,
        scale,
        # by the name, so that a start does not depend on which other weights are adapted
        (config.random_state + zlib.crc32(target.name.encode())) % 2**63,
        config,
        dropout=dropout,
        dtype=torch.promote_types(parameter.dtype, torch.float32),
        device=parameter.device,
    )
    padding = {getattr(place.module, "padding_idx", None) for place in target.places if place.name == "weight"}
    if padding != {None} and len(padding) == 1:
        delta.zero_row = padding.pop()  # no gradient comes to it, so it stays zero, and the padding what it was
        delta.reset_parameters()
    return delta


def filled(delta: Delta, tensors: Mapping[str, Tensor], name: str) -> Delta:
    """An update with tensors from a file; on the CPU if the base has no storage yet.

    Raises
    ------
    ValueError
        If a tensor has another shape.
    """
    for key, value in tensors.items():
        own = delta._parameters[key]
        if own is None or own.shape != value.shape:
            expected = None if own is None else tuple(own.shape)
            raise ValueError(f"path: expected {name}.{key} of {expected}, got {tuple(value.shape)}")
        device = "cpu" if own.is_meta else own.device
        delta._parameters[key] = nn.Parameter(value.to(device, own.dtype, copy=True))
    return delta


def saved_deltas(saved: SavedAdapter, model: nn.Module) -> tuple[list[Target], list[Delta]]:
    """The parameters that a saved adapter updates, and its updates.

    Raises
    ------
    ValueError
        If the model lacks a parameter, or one has another shape.
    """
    places = {place.full_name: found for found in all_parameters(model) for place in found[1]}
    targets, deltas = [], []
    for full_name, entry in saved.parameters.items():
        if full_name not in places:
            raise ValueError(f"model: expected a parameter {full_name!r}, which the adapter updates, got none")
        parameter, where = places[full_name]
        if list(parameter.shape) != entry["shape"]:
            raise ValueError(f"model: expected {full_name!r} of {entry['shape']}, got {list(parameter.shape)}")
        targets.append(Target(full_name, parameter, where, entry["shape"] == entry["ranks"] and "form" not in entry))
        delta = empty_delta(targets[-1], saved.config, entry["ranks"], entry["scale"], entry["dropout"])
        tensors = {
            key: saved.tensors[f"{full_name}.{key}"] for key, value in delta._parameters.items() if value is not None
        }
        deltas.append(filled(delta, tensors, full_name))
    return targets, deltas


@torch.no_grad()
def summed_delta(parts: Sequence[Delta], weights: Sequence[float], config: FLoRAConfig) -> Delta:
    """The update that is a weighted sum of others, with scale 1."""
    first, total = parts[0], combined([part.update for part in parts], weights)
    kind = {"dtype": first.core.dtype, "device": first.core.device}
    delta = TuckerDelta(first.shape, total.core.shape, 1.0, 0, config, dropout=first.dropout, **kind)  # type: ignore[arg-type]
    delta.start(total.factors)
    delta.core.copy_(total.core)
    return delta
