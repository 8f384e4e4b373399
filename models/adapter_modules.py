"""Adapters inside a model: modules that hold updates, and the class that makes a layer use them.

The layer stays the object that it was. Its class becomes a subclass in which each adapted parameter's name is a
property that gives the effective weight ``W0 + Σ s·ΔW``; the parameter itself stays registered under its name. So
whoever reads ``layer.weight`` (fused paths of attention and `TransformerEncoderLayer`, recurrent layers, code of users)
reads what the adapters made of it, and state dicts keep their keys. Kinds of layers that can do without ``ΔW``
have a forward of their own in `adapter_layers`.

The updates are in a submodule of the layer, so that ``parameters()``, ``to()`` and data-parallel wrappers see them; it
takes no part in ``state_dict`` and ``load_state_dict``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from probtensor.models.adapter_config import FLoRAConfig
from probtensor.models.tucker_delta import Tucker, random_factors, updated
from probtensor.resources import is_number

__all__ = [
    "SLOT",
    "Bank",
    "Delta",
    "TuckerDelta",
    "adapt",
    "bank_of",
    "base_parameter",
    "grouped_parameters",
    "release",
    "sites",
]

SLOT = "_flora"  # name of the submodule that holds a layer's adapters

Forward = Callable[..., Tensor]


class _Hidden(nn.Module):
    """A module that state dicts do not show. In a `Sequential` that is adapted itself, it passes its input on."""

    def forward(self, x: Any) -> Any:
        return x

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return


class Delta(_Hidden, ABC):
    """One adapter's update of one parameter: a core and a factor for each mode.

    Parameters
    ----------
    shape : sequence of int
        Of the parameter.
    ranks : sequence of int
        Of the Tucker form in which layers see the update.
    scale : float
    seed : int
        Of the random factors.
    config : FLoRAConfig
        Of the adapter that it belongs to.
    dropout : float

    Attributes
    ----------
    core : Parameter
    factor_0, factor_1, … : Parameter, or None
    """

    core: nn.Parameter

    def __init__(
        self, shape: Sequence[int], ranks: Sequence[int], scale: float, seed: int, config: FLoRAConfig, dropout: float
    ) -> None:
        super().__init__()
        self.shape, self.ranks, self.scale, self.seed = tuple(shape), tuple(ranks), scale, seed
        self.config, self.dropout = config, dropout
        self.zero_row: int | None = None  # of the first mode: an embedding's padding

    @property
    @abstractmethod
    def update(self) -> Tucker:
        """Core, factors and scale of the Tucker form."""

    def as_dict(self) -> dict[str, Any]:
        """What files hold beside the tensors."""
        shape, ranks = list(self.shape), list(self.ranks)
        return {"shape": shape, "ranks": ranks, "scale": self.scale, "dropout": self.dropout}

    @abstractmethod
    def reset_parameters(self) -> None:
        """Go back to the random start, where the update is zero; for models that were on the meta device."""

    @property
    def factors(self) -> tuple[nn.Parameter | None, ...]:
        """The factors, one a mode."""
        return tuple([getattr(self, f"factor_{n}") for n in range(len(self.shape))])

    @torch.no_grad()
    def start(self, factors: Sequence[Tensor | None]) -> None:
        """Begin from given factors, with a core of zeros."""
        self.core.zero_()
        for own, given in zip(self.factors, factors, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        first = self.factors[0]
        if self.zero_row is not None and first is not None:
            first[self.zero_row] = 0.0

    def dropped(self, x: Tensor) -> Tensor:
        """The layer's input as the update sees it."""
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def extra_repr(self) -> str:
        """Shape, ranks and scale."""
        return f"shape={self.shape}, ranks={self.ranks}, scale={self.scale:g}"


class TuckerDelta(Delta):
    """An update in Tucker form; see `tucker_delta`.

    Parameters
    ----------
    shape, ranks : sequence of int
        Of the parameter and of the core.
    scale, seed, config, dropout
        As in `Delta`.
    dtype, device
        Of the adapter's parameters.

    Attributes
    ----------
    core : Parameter, shape (R1, …, RN)
    factor_0, factor_1, … : Parameter, shape (In, Rn), or None
        None where the core keeps the mode.
    """

    def __init__(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        scale: float,
        seed: int,
        config: FLoRAConfig,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape, ranks, scale, seed, config, dropout)
        self.core = nn.Parameter(torch.zeros(self.ranks, dtype=dtype, device=device))
        for n, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
            empty = torch.empty(size, rank, dtype=dtype, device=device)
            self.register_parameter(f"factor_{n}", None if rank == size else nn.Parameter(empty))
        self.reset_parameters()

    @property
    def update(self) -> Tucker:
        """Core, factors and scale."""
        return Tucker(self.core, self.factors, self.scale)

    def reset_parameters(self) -> None:
        """Go back to the random start, where the update is zero; for models that were on the meta device."""
        self.start(random_factors(self.shape, self.ranks, torch.Generator().manual_seed(self.seed)))


class Bank(_Hidden):
    """All adapters' updates of one parameter; layers that share the parameter share the bank.

    Attributes
    ----------
    active : tuple of str
        The adapters that act, in the order in which they are summed.
    enabled : bool
    merged : tuple of str
        The adapters that the parameter holds now.
    original : Tensor or None
        The parameter as it was before the merge.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        self.original: Tensor | None = None

    @property
    def deltas(self) -> dict[str, Delta]:
        """The updates by their adapter's name."""
        return self._modules  # type: ignore[return-value]

    def acting(self) -> list[Delta]:
        """The updates that the layer adds to its parameter now."""
        if not self.enabled or self.original is not None:
            return []
        return [self.deltas[name] for name in self.active if name in self.deltas]

    def effective(self, parameter: Tensor) -> Tensor:
        """The parameter with its acting updates: itself if there are none."""
        acting = self.acting()
        if not acting or parameter.shape != acting[0].shape:  # another shape: sharded training looks at its flat piece
            return parameter
        return updated(parameter, [delta.update for delta in acting])

    @torch.no_grad()
    def merge(self, parameter: Tensor, names: Sequence[str]) -> bool:
        """Write the sum into the parameter, keeping the original; False, and no change, if it is not finite."""
        present = tuple(name for name in names if name in self.deltas)
        with torch.autocast(parameter.device.type, enabled=False):
            total = updated(parameter, [self.deltas[name].update for name in present])
        if not bool((total.isfinite() | ~parameter.isfinite()).all()):
            return False
        self.original, self.merged = parameter.detach().clone(), tuple(names)
        parameter.copy_(total)
        return True

    @torch.no_grad()
    def unmerge(self, parameter: Tensor) -> None:
        """Give the parameter its original bits."""
        if self.original is not None:
            parameter.copy_(self.original)
        self.original, self.merged = None, ()


class _Slot(_Hidden):
    """The banks of one layer, by the parameter's name in it."""


def grouped_parameters(
    deltas: Iterable[Delta], lr: float, factor_ratio: float, dense_ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: cores, factors, and updates of full rank and scale 1; see `Adapters.parameter_groups`.

    Raises
    ------
    ValueError
        If a number is negative or not finite.
    """
    given = {"lr": lr, "factor_ratio": factor_ratio, "dense_ratio": dense_ratio, "weight_decay": weight_decay}
    for argument, value in given.items():
        if not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{argument}: expected a number of at least 0, got {value!r}")
    cores, factors, dense = [list[nn.Parameter]() for _ in range(3)]
    for delta in deltas:
        in_full = all(A is None for A in delta.factors) and delta.scale == 1.0
        for key, parameter in delta.named_parameters():
            if parameter.requires_grad:
                (dense if in_full else cores if key == "core" else factors).append(parameter)
    rows = ((cores, 1.0, weight_decay), (factors, factor_ratio, 0.0), (dense, dense_ratio, weight_decay))
    return [{"params": some, "lr": lr * ratio, "weight_decay": decay} for some, ratio, decay in rows if some]


def bank_of(module: nn.Module, name: str) -> Bank | None:
    """The bank of a parameter, by its name in its module."""
    slot = module._modules.get(SLOT)
    return None if slot is None else slot._modules.get(name)  # type: ignore[return-value]


def base_parameter(module: nn.Module, name: str) -> Tensor:
    """The parameter itself, whatever adapters do; sharded training puts a plain tensor in its place at times."""
    parameter = module._parameters.get(name)
    if parameter is None:
        if name not in module.__dict__:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
        return module.__dict__[name]  # type: ignore[no-any-return]
    return parameter


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Bank]]:
    """Full name, module, name in the module and bank of each adapted parameter, in every module that has it."""
    for path, module in model.named_modules():
        slot = module._modules.get(SLOT)
        for name, bank in ({} if slot is None else slot._modules).items():
            yield f"{path}.{name}" if path else name, module, name, bank


def adapt(module: nn.Module, name: str, bank: Bank, forwards: Callable[[type], Forward | None]) -> None:
    """Make a module use a bank for one of its parameters.

    Parameters
    ----------
    module : Module
    name : str
        Of the parameter in the module.
    bank : Bank
    forwards : callable
        From a class to the forward that takes the place of its own, or None.
    """
    slot = module._modules.get(SLOT)
    if slot is None:
        slot = module._modules[SLOT] = _Slot().train(module.training)
    slot._modules[name] = bank
    base: Any = getattr(type(module), "_adapted_class", type(module))
    module.__class__ = _adapted(base, tuple(slot._modules), forwards)


def release(module: nn.Module, name: str, forwards: Callable[[type], Forward | None]) -> None:
    """Undo `adapt`."""
    slot: Any = module._modules[SLOT]
    base: Any = getattr(type(module), "_adapted_class")  # noqa: B009 - no attribute of Module that a checker knows
    del slot._modules[name]
    if slot._modules:
        module.__class__ = _adapted(base, tuple(slot._modules), forwards)
    else:
        module.__class__ = base
        del module._modules[SLOT]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


@cache
def _adapted(base: Any, names: tuple[str, ...], forwards: Callable[[type], Forward | None]) -> Any:
    """The subclass of `base` in which these parameters are effective weights."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        make, args, *state = super(adapted, self).__reduce_ex__(protocol)
        plain = tuple(base if arg is adapted else arg for arg in args)
        return (_rebuild, (names, forwards, make, plain), *state)

    def load(self: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in names:
            bank = bank_of(self, name)
            if bank is not None and bank.original is not None and prefix + name in state_dict:
                args[-1].append(f"{prefix}{name} holds merged adapters: unmerge before a checkpoint is loaded")
        super(adapted, self)._load_from_state_dict(state_dict, prefix, *args)

    members: dict[str, Any] = {name: _effective(name) for name in names}
    members |= {"_adapted_class": base, "__reduce_ex__": reduce, "_load_from_state_dict": load}
    members["__module__"] = base.__module__
    forward = forwards(base)
    if forward is not None:
        members["forward"] = forward
    if issubclass(base, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        # Copies and references that recurrent layers keep of their weights would be of none in use.
        members |= dict.fromkeys(("flatten_parameters", "_init_flat_weights"), lambda self: None)
        members["_weights_have_changed"] = lambda self: False
    adapted: Any = type(f"Adapted{base.__name__}", (base,), members)
    return adapted


def _rebuild(names: tuple[str, ...], forwards: Any, make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """A copied or unpickled module, before its state comes."""
    module = make(*args)
    base: Any = type(module)
    module.__class__ = _adapted(base, names, forwards)
    return module


def _effective(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        parameter = base_parameter(self, name)
        bank = bank_of(self, name)
        return parameter if bank is None or _is_away(self, name, parameter) else bank.effective(parameter)

    def put(self: nn.Module, value: Tensor) -> None:  # parameters go to the registry before they come here
        self.__dict__[name] = value

    def remove(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(get, put, remove)


def _is_away(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether there are no numbers: on the meta device, or freed by sharded training, which asks for the name alone."""
    if parameter.is_meta:
        return True
    if torch.compiler.is_compiling() or (name in module._parameters and type(parameter) is not nn.Parameter):
        return False  # tensors of `torch.func`, which have no storage of their own
    return parameter.untyped_storage().size() == 0 and parameter.numel() > 0


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    """What the kernels of recurrent layers read: effective weights in their order."""
    return [getattr(self, name, None) for name in self._flat_weights_names]
