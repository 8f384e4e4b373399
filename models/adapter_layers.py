"""Layers: which of their parameters are weights, and forwards that do without the update's full tensor.

Three forms of a layer with input x, weight W0 and update s·ΔW give the same output:

built     ``op(x, W0 + s·ΔW)``. In training its backward computes the gradient by the whole weight.
chained   ``op(x, W0) + s·A_out(op_core(A_in(x)))``: the input's channels are reduced to the core's, the layer's own
          operation runs over the small core (kernel factors contracted into it), and the result is spread over the
          outputs.
folded    ``op(x, W0) + s·A_out(op_core·in(x))``: core and input factor contracted first; one operation less.

A count of floating-point operations, bytes and calls for the size of the input chooses. Padding of a map of reduced
channels equals the reduction of the padded map, as the reduction has no bias; so every mode of padding serves.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probtensor.models.adapter_modules import SLOT, Bank, Delta, bank_of, base_parameter
from probtensor.models.tucker_delta import contract, updated

__all__ = ["Sizes", "choose_form", "is_bias", "kernel_modes", "layer_forward", "takes_dropout", "weight_names"]


class Machine(NamedTuple):
    """What takes as long as how many operations.

    Attributes
    ----------
    a_byte : float
        One byte to or from memory.
    a_call : float
        Starting one kernel.
    least_width : int
        Channels that a matrix product works on at least: fewer take as long.
    most_taps : int
        Of a kernel whose weight's gradient runs at full speed; that of a larger one takes four times as long. (cuDNN in
        bfloat16 on an H100, 7 × 7: from 1.3 times at 64 maps to 20 times at 256.)
    """

    a_byte: float
    a_call: float
    least_width: int
    most_taps: int


CPU = Machine(4.0, 2e5, 1, 2**31)
GPU = Machine(200.0, 3e9, 64, 27)  # of a tensor-core GPU of 2022


def machine_of(x: Tensor) -> Machine:
    """The machine that a tensor is on."""
    return CPU if x.device.type == "cpu" else GPU


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a layer of a known kind; none for other modules.

    Examples
    --------
    >>> weight_names(nn.GRU(2, 3)), weight_names(nn.LayerNorm(4))
    (('weight_ih_l0', 'weight_hh_l0'), ())
    """
    if isinstance(module, nn.Linear | nn.Bilinear | nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if getattr(module, name) is not None)
    if isinstance(module, nn.RNNBase):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))
    return ("weight_ih", "weight_hh") if isinstance(module, nn.RNNCellBase) else ()


def is_bias(name: str) -> bool:
    """Whether a parameter of this name, in its module, is a bias.

    Examples
    --------
    >>> [is_bias(name) for name in ("bias", "bias_ih_l0", "in_proj_bias", "weight")]
    [True, True, True, False]
    """
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def kernel_modes(module: nn.Module) -> int:
    """How many of the last modes of a layer's weight are a kernel's."""
    return len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0


def takes_dropout(module: nn.Module) -> bool:
    """Whether the update alone can see a dropped input: the layer has one of numbers, and its own forward."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # of attention, which reads the weight and leaves the forward out
    return layer_forward(type(module)) in (_linear, _convolution, _transposed)


def layer_forward(kind: Any) -> Callable[..., Tensor] | None:
    """The forward for a class of layers, or None where the effective weight serves: other kinds, forwards of users.

    Examples
    --------
    >>> class Standardised(nn.Conv2d):
    ...     def forward(self, x):
    ...         return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
    >>> layer_forward(nn.Conv2d) is None, layer_forward(Standardised) is None
    (False, True)
    """
    kind = getattr(kind, "_adapted_class", kind)
    stocks: dict[Any, Callable[..., Tensor]] = {nn.Linear: _linear, nn.Embedding: _embedding}
    stocks[nn.MultiheadAttention] = _attention
    stocks |= dict.fromkeys(CONVOLUTIONS, _convolution) | dict.fromkeys(TRANSPOSED, _transposed)
    for stock, forward in stocks.items():
        if issubclass(kind, stock) and kind.forward is stock.forward:
            same = getattr(kind, "_conv_forward", None) is getattr(stock, "_conv_forward", None)
            return forward if same else None
    return None


class Sizes(NamedTuple):
    """A layer's sizes, as its cost depends on them.

    Attributes
    ----------
    n_in, n_out : int
        Positions of the input and of the output: tokens, or pixels of all examples.
    inputs, outputs : int
        Channels.
    taps : int
        Entries of the kernel.
    r_in, r_out : int
        Ranks of channels.
    weight : int
        Entries of the weight.
    """

    n_in: int
    n_out: int
    inputs: int
    outputs: int
    taps: int
    r_in: int
    r_out: int
    weight: int


def choose_form(sizes: Sizes, training: bool, folds: bool = True, machine: Machine = CPU) -> str:
    """The cheapest form by the count: "built", "chained" or "folded".

    Parameters
    ----------
    sizes : Sizes
    training : bool
        Whether gradients by the update are wanted: then a backward through each operation costs twice its forward,
        and the built form pays for the gradient by the whole weight.
    folds : bool, default True
        Whether core and input factor may be contracted first.
    machine : Machine

    Examples
    --------
    >>> choose_form(Sizes(6272, 6272, 256, 256, 9, 16, 16, 589824), training=True)
    'chained'
    >>> choose_form(Sizes(4096, 4096, 1024, 1024, 1, 16, 16, 1048576), training=True)
    'folded'
    >>> choose_form(Sizes(4096, 4096, 8, 8, 1, 8, 8, 64), training=True)
    'built'
    >>> choose_form(Sizes(50176, 50176, 256, 256, 9, 16, 16, 589824), training=True, machine=GPU)
    'built'
    """
    n_in, n_out, inputs, outputs, taps, r_in, r_out, weight = sizes
    full = r_in == inputs and r_out == outputs
    r_in, r_out = (min(max(r, machine.least_width), width) for r, width in ((r_in, inputs), (r_out, outputs)))
    passes = 3 if training else 1
    down = 2 * n_in * inputs * r_in if r_in < inputs else 0
    up = 2 * n_out * outputs * r_out if r_out < outputs else 0
    spread = up + machine.a_byte * 4 * 2 * n_out * outputs  # and one more pass over the output
    chained = down + 2 * n_out * taps * r_in * r_out + spread + machine.a_byte * 4 * (n_in * (inputs + r_in))
    folded = 2 * n_out * taps * inputs * r_out + 2 * taps * inputs * r_in * r_out + spread
    folded += machine.a_byte * 4 * n_in * inputs
    build = 2 * weight * min(r_in, r_out) + machine.a_byte * 4 * 4 * weight
    gradient = 2 * n_out * taps * inputs * outputs * (4 if taps > machine.most_taps else 1) if training else 0
    built = passes * (build + 4 * machine.a_call) + gradient
    chained = passes * (chained + 6 * machine.a_call)
    folded = passes * (folded + 5 * machine.a_call)
    if full or built < min(chained, folded):
        return "built"
    return "folded" if folds and r_in < inputs and folded < chained else "chained"


def _linear(self: Any, x: Tensor) -> Tensor:
    """``x Wᵀ + b``."""
    rows = math.prod(x.shape[:-1])

    def form(delta: Delta, wanted: bool) -> str:
        outputs, inputs = delta.shape
        r_out, r_in = delta.ranks
        return choose_form(
            Sizes(rows, rows, inputs, outputs, 1, r_in, r_out, inputs * outputs), wanted, machine=machine_of(x)
        )

    return _adapted_forward(self, x, F.linear, form, _add_linear)


def _add_linear(self: Any, x: Tensor, y: Tensor, delta: Delta, form: str) -> Tensor:
    core, (A_out, A_in), scale = delta.update
    inner = core.to(x.dtype)
    if A_in is not None and (form == "folded" and A_out is not None):
        inner = inner @ A_in.to(x.dtype).T  # (R_out, inputs)
    elif A_in is not None:
        x = F.linear(x, A_in.to(x.dtype).T)
    h = F.linear(x, inner)
    if A_out is None:
        return torch.add(y, h, alpha=scale)
    rows = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), A_out.to(h.dtype).T, alpha=scale) if y.ndim > 1 else None
    return torch.add(y, A_out.to(h.dtype) @ h, alpha=scale) if rows is None else rows.view(y.shape)


def _embedding(self: Any, ids: Tensor) -> Tensor:
    """Rows of the weight."""

    def look_up(ids: Tensor, table: Tensor, bias: None = None) -> Tensor:
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)
        return F.embedding(ids, table, *options, sparse=False)

    def form(delta: Delta, wanted: bool) -> str:
        (size, width), (r_row, r_column), rows = delta.shape, delta.ranks, ids.numel()
        a_byte = machine_of(ids).a_byte
        looked_up = rows * width * (r_row + 4 * a_byte)
        built = size * width * (min(r_row, r_column) + (8 if wanted else 4) * a_byte)
        return "built" if built < looked_up else "chained"

    def add(self: Any, ids: Tensor, y: Tensor, delta: Delta, form: str) -> Tensor:
        core, (A_row, A_column), scale = delta.update
        rows = look_up(ids, core if A_row is None else A_row).to(y.dtype)
        rows = rows if A_row is None else rows @ core.to(y.dtype)
        rows = rows if A_column is None else F.linear(rows, A_column.to(y.dtype))
        return torch.add(y, rows, alpha=scale)

    return _adapted_forward(self, ids, look_up, form, add)


def _convolution(self: Any, x: Tensor) -> Tensor:
    """A convolution with the layer's stride, padding, dilation, groups and mode of padding."""

    def form(delta: Delta, wanted: bool) -> str:
        return "built" if self.groups > 1 else choose_form(_conv_sizes(self, x, delta), wanted, machine=machine_of(x))

    return _adapted_forward(self, x, self._conv_forward, form, _add_convolution)


def _add_convolution(self: Any, x: Tensor, y: Tensor, delta: Delta, form: str) -> Tensor:
    core, (A_out, A_in, *kernel_factors), scale = delta.update
    folded = form == "folded"
    inner = contract(core, [None, A_in if folded else None, *kernel_factors]).to(x.dtype)
    if A_in is not None and not folded:
        x = _mixed(A_in.T, x, len(kernel_factors))
    return _spread(y, A_out, self._conv_forward(x, inner, None), scale, len(kernel_factors))


def _transposed(self: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    """A transposed convolution; see `torch.nn.ConvTranspose2d`."""
    n_kernel = len(self.kernel_size)
    arguments = (output_size, self.stride, self.padding, self.kernel_size, n_kernel, self.dilation)
    more = self._output_padding(x, *arguments)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = (self.stride, self.padding, more, self.groups, self.dilation)
        return CONV_TRANSPOSE[n_kernel](x, weight, bias, *options)

    def form(delta: Delta, wanted: bool) -> str:
        return "built" if self.groups > 1 else choose_form(_conv_sizes(self, x, delta), wanted, False, machine_of(x))

    def add(self: Any, x: Tensor, y: Tensor, delta: Delta, form: str) -> Tensor:
        core, (A_in, A_out, *kernel_factors), scale = delta.update
        inner = contract(core, [None, None, *kernel_factors]).to(x.dtype)
        if A_in is not None:
            x = _mixed(A_in.T, x, n_kernel)
        return _spread(y, A_out, convolve(x, inner, None), scale, n_kernel)

    return _adapted_forward(self, x, convolve, form, add)


def _attention(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention's own forward on a view of the layer in which each effective weight is computed once.

    It reads some weights three times, to look at their dtype.
    """
    if torch.compiler.is_compiling():
        return nn.MultiheadAttention.forward(self, *args, **kwargs)  # a compiler sees that they are the same
    view = object.__new__(type(self)._adapted_class)
    names = self._modules[SLOT]._modules
    weights = {name: getattr(self, name) for name in names}
    view.__dict__ = {**self.__dict__, "_parameters": {**self._parameters, **weights}}
    return nn.MultiheadAttention.forward(view, *args, **kwargs)


def _mixed(matrix: Tensor, x: Tensor, n_kernel: int) -> Tensor:
    """Channels of maps mixed by a matrix; on CPUs this is faster than a convolution with a kernel of one entry."""
    flat, matrix = x.flatten(-n_kernel), matrix.to(x.dtype)
    # matmul with a batch would copy the maps, and keep the copy for backward
    maps = matrix @ flat if flat.ndim == 2 else torch.bmm(matrix.expand(len(x), *matrix.shape), flat)
    return maps.reshape(*maps.shape[:-1], *x.shape[-n_kernel:])


def _spread(y: Tensor, matrix: Tensor | None, h: Tensor, scale: float, n_kernel: int) -> Tensor:
    """``y`` and the maps ``h`` with their channels mixed."""
    if matrix is None:
        return torch.add(y, h, alpha=scale)
    if y.ndim == n_kernel + 1:  # one example
        return torch.add(y, _mixed(matrix, h, n_kernel), alpha=scale)
    if not y.is_contiguous():  # channels last, and so the result
        rows = torch.addmm(
            y.movedim(1, -1).flatten(0, -2), h.movedim(1, -1).flatten(0, -2), matrix.to(h.dtype).T, alpha=scale
        )
        return rows.view(y.movedim(1, -1).shape).movedim(-1, 1)
    each = matrix.to(h.dtype).expand(len(h), *matrix.shape)
    return torch.baddbmm(y.flatten(2), each, h.flatten(2), alpha=scale).view(y.shape)


def _conv_sizes(self: Any, x: Tensor, delta: Delta) -> Sizes:
    first, second, *kernel = delta.shape
    r_first, r_second = delta.ranks[:2]
    taps, strides = math.prod(kernel), math.prod(self.stride)
    if self.transposed:  # weight (inputs, outputs, …)
        n = x.numel() // first  # the taps are counted for each input
        return Sizes(n, n * strides, first, second, max(1, taps // strides), r_first, r_second, first * second * taps)
    n = x.numel() // second
    return Sizes(n, max(1, n // strides), second, first, taps, r_second, r_first, first * second * taps)


def _adapted_forward(
    self: Any,
    x: Tensor,
    op: Callable[..., Tensor],
    form: Callable[[Delta, bool], str],
    add: Callable[[Any, Tensor, Tensor, Delta, str], Tensor],
) -> Tensor:
    """The layer's operation, with each acting update in the form that costs least."""
    weight, bias = base_parameter(self, "weight"), getattr(self, "bias", None)
    bank: Bank | None = bank_of(self, "weight")
    acting = [] if bank is None else bank.acting()
    if not acting:
        return op(x, weight, bias)
    training = torch.is_grad_enabled()
    forms = [form(delta, training and delta.core.requires_grad) for delta in acting]
    drops = [delta.dropout > 0 and delta.training for delta in acting]
    into = [d for d, how, drop in zip(acting, forms, drops, strict=True) if how == "built" and not drop]
    y = op(x, updated(weight, [delta.update for delta in into]) if into else weight, bias)
    for delta, how, drop in zip(acting, forms, drops, strict=True):
        if how != "built":
            y = add(self, delta.dropped(x), y, delta, how)
        elif drop:
            dense = delta.scale * contract(delta.core, delta.factors)
            y = y + op(delta.dropped(x), dense.to(weight.dtype), None)
    return y
