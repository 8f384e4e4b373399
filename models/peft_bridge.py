"""FLoRA inside Hugging Face PEFT: an opt-in method for `get_peft_model` and its kin.

PEFT's registry is closed to outsiders; `register_with_peft` adds a member to its enumeration of methods while the
program runs, and then registers configuration and tuner. PEFT wraps layers, `inject_adapters` does not; updates, forms
of the forward and merges are the same. Nothing of PEFT is imported or changed before the call.

References
----------
Mangrulkar et al. (2022), "PEFT: State-of-the-art parameter-efficient fine-tuning methods".
"""

import zlib
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from probtensor.models.adapter_config import FLoRAConfig
from probtensor.models.adapter_layers import kernel_modes, layer_forward, takes_dropout, weight_names
from probtensor.models.adapter_modules import SLOT, TuckerDelta
from probtensor.models.adapter_starts import start_scale
from probtensor.models.tucker_delta import Tucker, leading_factors, updated

__all__ = ["METHOD", "register_with_peft"]

METHOD = "PROBTENSOR_FLORA"
PREFIX = "probtensor_flora_"
MAX_MODES = 5  # of a weight: transposed and plain convolutions over volumes


def register_with_peft() -> Any:
    """Make FLoRA a method of the installed PEFT; once in a program, more calls do no harm.

    `get_peft_model`, `PeftModel.from_pretrained`, `save_pretrained`, several adapters, `disable_adapter`,
    `merge_adapter`, `unmerge_adapter`, `merge_and_unload`, ``modules_to_save`` and `inject_adapter_in_model` take the
    configuration that it returns. A program that loads a saved adapter must register first.

    Weights of linear, bilinear, embedding and all convolution layers can be adapted. Each merge is computed from the
    original weight, which is kept and comes back bit by bit; a merge that is not finite is refused.

    Returns
    -------
    type
        The class of configurations, with the fields ``r``, ``kernel_r``, ``alpha``, ``dropout``, ``rank_pattern``,
        ``alpha_pattern``, ``init`` ("zero" or "weight") and ``random_state`` of `FLoRAConfig`, and PEFT's
        ``target_modules``, ``exclude_modules`` and ``modules_to_save``. Files have ``scales`` too, what `alpha` gave.

    Raises
    ------
    ModuleNotFoundError
        Without PEFT: ``pip install peft``.

    Examples
    --------
    >>> from peft import get_peft_model  # doctest: +SKIP
    >>> Config = register_with_peft()  # doctest: +SKIP
    >>> model = get_peft_model(model, Config(r=8, target_modules=["conv1", "fc"]))  # doctest: +SKIP
    """
    return _classes()[0]


class _Acting(NamedTuple):
    """An update as the forwards of `adapter_layers` know it."""

    core: Tensor
    factors: tuple[Tensor | None, ...]
    scale: float
    dropout: float
    training: bool

    @property
    def update(self) -> Tucker:
        return Tucker(self.core, self.factors, self.scale)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        pairs = zip(self.core.shape, self.factors, strict=True)
        return tuple(rank if A is None else A.shape[0] for rank, A in pairs)

    def dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x


def _call(base: Any, acting: list[_Acting], args: Any, kwargs: Any) -> Any:
    """The layer with updates: its own forward on a view that has a bank, or the effective weight in its place."""
    forward = layer_forward(type(base))
    if forward is None:
        weight = updated(base.weight, [each.update for each in acting])
        return functional_call(base, {"weight": weight}, args, kwargs)
    view = object.__new__(type(base))
    bank = SimpleNamespace(acting=lambda: acting)
    view.__dict__ = {**base.__dict__, "_modules": {**base._modules, SLOT: SimpleNamespace(_modules={"weight": bank})}}
    return forward(view, *args, **kwargs)


@cache
def _classes() -> tuple[Any, Any]:
    """Configuration and tuner, made and registered on the first call."""
    try:
        peft: Any = import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ModuleNotFoundError("adapters in PEFT need it: pip install peft", name="peft") from error
    utils: Any = import_module("peft.utils")
    tuners: Any = import_module("peft.tuners.tuners_utils")
    member = _extended(peft.PeftType)

    @dataclass
    class ProbtensorFloraConfig(peft.PeftConfig):  # type: ignore[misc]
        """Settings of a FLoRA adapter in PEFT; see `register_with_peft`."""

        r: int = 8
        kernel_r: int = 2
        alpha: float | str = "rms"
        dropout: float = 0.0
        target_modules: list[str] | str | None = None
        exclude_modules: list[str] | str | None = None
        rank_pattern: dict[str, Any] = field(default_factory=dict)
        alpha_pattern: dict[str, Any] = field(default_factory=dict)
        init: str = "zero"
        modules_to_save: list[str] | None = None
        random_state: int = 0
        scales: dict[str, float] = field(default_factory=dict)  # from a file

        def __post_init__(self) -> None:
            super().__post_init__()
            self.found: dict[str, float] = {}  # no field: another model's weights have other scales
            self.peft_type = member
            for name in ("target_modules", "exclude_modules"):
                value = getattr(self, name)
                setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
            if self.init not in ("zero", "weight"):
                raise ValueError(f"init: expected one of zero, weight, got {self.init!r}")
            self.flora()

        def flora(self) -> FLoRAConfig:
            """Checked settings."""
            names = ("r", "kernel_r", "alpha", "dropout", "rank_pattern", "alpha_pattern", "init", "random_state")
            return FLoRAConfig(**{name: getattr(self, name) for name in names})

        def scale_of(self, name: str, weight: Tensor, ranks: tuple[int, ...]) -> float:
            """The scale of a weight's update: that of the file, or by `alpha`."""
            scale = self.scales[name] if name in self.scales else start_scale(self.flora(), name, weight, ranks)
            if scale != scale:  # NaN
                raise ValueError(f"alpha: expected a number, as {name!r} is on the meta device, got 'rms'")
            self.found[name] = scale
            return scale

        def to_dict(self) -> dict[str, Any]:
            """The settings as they go to files."""
            return {**super().to_dict(), "scales": {**self.scales, **self.found}}

    class ProbtensorFloraLayer(nn.Module, tuners.BaseTunerLayer):  # type: ignore[misc]
        """A layer with its updates."""

        base_layer: Any
        get_base_layer: Any  # of PEFT, as the next two
        set_adapter: Any
        active_adapters: Any
        adapter_layer_names = (f"{PREFIX}core", *(f"{PREFIX}factor_{n}" for n in range(MAX_MODES)))
        other_param_names = ("scaling", "dropouts", "n_modes")

        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            for name in self.adapter_layer_names:
                setattr(self, name, nn.ParameterDict())
            self.scaling: dict[str, float] = {}
            self.dropouts: dict[str, float] = {}
            self.n_modes: dict[str, int] = {}
            self.merged_adapters: list[str] = []
            self.original: Tensor | None = None  # the weight before a merge
            self._disable_adapters = False

        def update_layer(self, adapter_name: str, config: ProbtensorFloraConfig, key: str) -> None:
            """Add an update at its start."""
            base, settings = self.get_base_layer(), config.flora()
            name, weight = f"{key}.weight", base.weight if self.original is None else self.original
            if settings.dropout and not takes_dropout(base):
                raise ValueError(f"dropout: expected 0 for {key!r} ({type(base).__name__}), got {settings.dropout}")
            ranks = settings.ranks(name, weight.shape, kernel_modes(base))
            scale = config.scale_of(name, weight, ranks)
            seed = (settings.random_state + zlib.crc32(name.encode())) % 2**63
            dtype = torch.promote_types(weight.dtype, torch.float32)
            device = weight.device
            delta = TuckerDelta(weight.shape, ranks, scale, seed, settings, dtype=dtype, device=device)
            delta.zero_row = getattr(base, "padding_idx", None)
            if not weight.is_meta:
                factors = leading_factors(weight, ranks) if settings.init == "weight" else delta.factors
                delta.start(factors)
            getattr(self, f"{PREFIX}core")[adapter_name] = delta.core
            for n, factor in enumerate(delta.factors):
                if factor is not None:
                    getattr(self, f"{PREFIX}factor_{n}")[adapter_name] = factor
            self.scaling[adapter_name], self.dropouts[adapter_name] = scale, float(settings.dropout)
            self.n_modes[adapter_name] = weight.ndim
            self.set_adapter(self.active_adapters)

        def _updates(self, names: list[str]) -> list[_Acting]:
            found = []
            for name in names:
                if name in self.scaling:
                    dicts = [getattr(self, f"{PREFIX}factor_{n}") for n in range(self.n_modes[name])]
                    factors = tuple([each.get(name, None) for each in dicts])
                    core = getattr(self, f"{PREFIX}core")[name]
                    found.append(_Acting(core, factors, self.scaling[name], self.dropouts[name], self.training))
            return found

        def _acting(self) -> list[_Acting]:
            return [] if self.disable_adapters or self.merged else self._updates(self.active_adapters)

        @property
        def weight(self) -> Tensor:
            """The effective weight, for layers that read it and leave the forward out, as attention does."""
            base = self.get_base_layer().weight
            acting = self._acting()
            return updated(base, [each.update for each in acting]) if acting else base

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """The layer's output with the active updates."""
            if self.disable_adapters and self.merged:
                self.unmerge()
            acting = self._acting()
            return _call(self.get_base_layer(), acting, args, kwargs) if acting else self.base_layer(*args, **kwargs)

        @torch.no_grad()
        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Write updates into the weight, from the original; not finite ones are refused with or without `safe`."""
            names = [name for name in tuners.check_adapters_to_merge(self, adapter_names) if name in self.scaling]
            if not names:
                return
            weight = self.get_base_layer().weight
            original = weight.detach().clone() if self.original is None else self.original
            total = updated(original, [each.update for each in self._updates([*self.merged_adapters, *names])])
            if not bool((total.isfinite() | ~original.isfinite()).all()):
                raise ValueError(f"merge: expected finite weights, got NaN or infinity from the adapters {names}")
            self.original = original
            weight.copy_(total)
            self.merged_adapters.extend(names)

        @torch.no_grad()
        def unmerge(self) -> None:
            """Give the weight its original bits."""
            if self.original is not None:
                self.get_base_layer().weight.copy_(self.original)
            self.original = None
            self.merged_adapters.clear()

        def get_delta_weight(self, adapter_name: str) -> Tensor:
            """The update ``s·ΔW``."""
            weight = self.get_base_layer().weight
            (each,) = self._updates([adapter_name])
            return updated(torch.zeros_like(weight, dtype=each.core.dtype), [each.update])

        def __repr__(self) -> str:
            return "probtensor_flora." + super().__repr__()

    class ProbtensorFloraModel(tuners.BaseTuner):  # type: ignore[misc]
        """The tuner."""

        prefix = PREFIX
        tuner_layer_cls = ProbtensorFloraLayer
        target_module_mapping = utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        def _create_and_replace(
            self,
            peft_config: Any,
            adapter_name: str,
            target: nn.Module,
            target_name: str,
            parent: nn.Module,
            current_key: str,
            parameter_name: str | None = None,
        ) -> None:
            if isinstance(target, ProbtensorFloraLayer):
                target.update_layer(adapter_name, peft_config, current_key)
                return
            if weight_names(target) != ("weight",):
                kind = type(target).__name__
                raise ValueError(
                    f"target_modules: expected linear, embedding or convolution, got {current_key!r} ({kind})"
                )
            layer = ProbtensorFloraLayer(target).train(target.training)
            layer.update_layer(adapter_name, peft_config, current_key)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    utils.register_peft_method(
        name=METHOD.lower(), config_cls=ProbtensorFloraConfig, model_cls=ProbtensorFloraModel, prefix=PREFIX
    )
    return ProbtensorFloraConfig, ProbtensorFloraModel


def _extended(kind: Any) -> Any:
    """The enumeration's member for our method, added to it."""
    if METHOD in kind.__members__:
        raise ValueError(f"peft: expected no method named {METHOD!r}, as none comes with PEFT, got one")
    member = str.__new__(kind, METHOD)
    member._name_ = member._value_ = METHOD
    member.__objclass__ = kind
    member._sort_order_ = len(kind._member_names_)
    setattr(kind, METHOD, member)  # before it is a member: members cannot be assigned
    kind._member_names_.append(METHOD)
    kind._member_map_[METHOD] = member
    kind._value2member_map_[METHOD] = member
    return member
