"""Which parameters of a model an adapter updates, and what is refused."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from probtensor.models.adapter_config import FLoRAConfig, key_matches, names_match
from probtensor.models.adapter_layers import is_bias, takes_dropout, weight_names
from probtensor.models.adapter_modules import SLOT

__all__ = ["Place", "Target", "all_parameters", "find_targets"]


class Place(NamedTuple):
    """Where a parameter stands: the module's path, the module, the parameter's name in it."""

    path: str
    module: nn.Module
    name: str

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.name}" if self.path else self.name


class Target(NamedTuple):
    """A parameter to adapt.

    Attributes
    ----------
    name : str
        Its full name, at the first of its places.
    parameter : Parameter
    places : tuple of Place
        Several where modules share it.
    dense : bool
        Whether its update has full rank: biases and modules to save.
    """

    name: str
    parameter: nn.Parameter
    places: tuple[Place, ...]
    dense: bool


def all_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[Place, ...]]]:
    """Each parameter of the base model once, with every place where it stands."""
    found: dict[int, list[Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if SLOT not in path.split("."):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found.setdefault(id(parameter), []).append(Place(path, module, name))
    for places in found.values():
        parameter = places[0].module._parameters[places[0].name]
        if parameter is not None:
            yield parameter, tuple(places)


def find_targets(model: nn.Module, config: FLoRAConfig) -> list[Target]:
    """The parameters that an adapter of these settings updates.

    Raises
    ------
    ValueError
        If a name of the settings fits nothing, there is nothing to adapt, or a parameter cannot be adapted: its name is
        in the message.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> [(t.name, t.dense) for t in find_targets(model, FLoRAConfig(bias="adapted", exclude_modules="0"))]
    [('3.weight', False), ('3.bias', True)]
    """
    parents = dict(model.named_modules(remove_duplicate=False))
    targets, used, adapted_modules = [], set[str](), set[int]()
    rest = []
    _refuse_computed(parents, config)
    for parameter, places in all_parameters(model):
        entry = None if _excluded(config, places, parents) else _wanted(config, places, parents)
        saved = _saved(config, places)
        if entry is not None:
            used.add(entry)
            adapted_modules |= {id(place.module) for place in places}
        if saved is not None:
            used.add(saved)
        if entry is None and saved is None:
            rest.append((parameter, places))
        else:
            targets.append(Target(places[0].full_name, parameter, places, saved is not None))
    for parameter, places in rest:
        biases = [place for place in places if is_bias(place.name)]
        beside = config.bias == "all" or any(id(place.module) in adapted_modules for place in biases)
        if config.bias != "none" and biases and beside and not _excluded(config, places, parents):
            targets.append(Target(places[0].full_name, parameter, places, True))
    _check_names_used(config, used, targets)
    for target in targets:
        _check(target, config)
    return targets


def _aliases(place: Place, parents: dict[str, nn.Module]) -> list[str]:
    """Names by which a parameter's module goes; attention's output projection goes by that of attention too."""
    above, _, last = place.path.rpartition(".")
    of_attention = last == "out_proj" and isinstance(parents.get(above), nn.MultiheadAttention)
    return [place.path, above] if of_attention else [place.path]


def _excluded(config: FLoRAConfig, places: tuple[Place, ...], parents: dict[str, nn.Module]) -> bool:
    names = [name for place in places for name in (place.full_name, *_aliases(place, parents))]
    return names_match(config.exclude_modules, names) is not None


def _wanted(config: FLoRAConfig, places: tuple[Place, ...], parents: dict[str, nn.Module]) -> str | None:
    """The entry of `target_modules` that asks for a parameter."""
    for place in places:
        known = weight_names(place.module)
        is_weight = place.name in known
        if config.target_modules == "all":
            if is_weight:
                return "all"
            continue
        by_name = names_match(config.target_modules, [place.full_name])
        if by_name is not None:
            return by_name
        parameter = place.module._parameters[place.name]
        if is_weight or (not known and parameter is not None and parameter.ndim > 1):
            by_module = names_match(config.target_modules, _aliases(place, parents))
            if by_module is not None:
                return by_module
    return None


def _saved(config: FLoRAConfig, places: tuple[Place, ...]) -> str | None:
    """The entry of `modules_to_save` that a parameter lies under."""
    for place in places:
        steps = place.path.split(".")
        found = names_match(config.modules_to_save, [".".join(steps[: n + 1]) for n in range(len(steps))])
        if found is not None:
            return found
    return None


def _check_names_used(config: FLoRAConfig, used: set[str], targets: list[Target]) -> None:
    for name in ("target_modules", "modules_to_save"):
        wanted = getattr(config, name)
        for entry in [] if isinstance(wanted, str) else wanted:
            if entry not in used:
                raise ValueError(f"{name}: expected names of parts of the model with weights, got {entry!r}")
    if not targets:
        raise ValueError(f"target_modules: expected weights to adapt, got none for {config.target_modules!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(key_matches(key, target.name) for target in targets if not target.dense):
                raise ValueError(f"{name}: expected names of adapted parameters, got {key!r}")


def _refuse_computed(modules: dict[str, nn.Module], config: FLoRAConfig) -> None:
    """Weights that a parametrization computes are no parameters that could be adapted in their place."""
    for path, module in modules.items():
        for name in weight_names(module):
            place = Place(path, module, name)
            if module._parameters.get(name) is None and not _excluded(config, (place,), modules):
                names = [place.full_name, *_aliases(place, modules)]
                if config.target_modules == "all" or names_match(config.target_modules, names) is not None:
                    raise ValueError(
                        f"target_modules: expected parameters, got {place.full_name!r}, which is computed from others "
                        "(weight_norm, spectral_norm, …): remove that, or exclude the module"
                    )


def _check(target: Target, config: FLoRAConfig) -> None:
    """Refuse what an adapter would get wrong."""
    name, parameter = target.name, target.parameter
    if isinstance(parameter, nn.UninitializedParameter):
        raise ValueError(f"target_modules: expected weights with a shape, got {name!r} of a lazy module: run it once")
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise ValueError(f"target_modules: expected floating-point weights, got {name!r} of {parameter.dtype}")
    if parameter.ndim == 0 or 0 in parameter.shape:
        raise ValueError(f"target_modules: expected weights with entries, got {name!r} of {tuple(parameter.shape)}")
    if type(parameter.data) is not torch.Tensor:  # quantised weights that pass for floating-point ones, and the like
        raise ValueError(f"target_modules: expected plain tensors, got {name!r} of {type(parameter.data).__name__}")
    for place in target.places:
        module = place.module
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"target_modules: expected modules of Python, got {name!r} of a scripted one")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ValueError(f"target_modules: {name!r} has max_norm, which rewrites the weight; exclude it")
        if isinstance(module, nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"target_modules: {name!r} has sparse gradients, which no update can take; exclude it")
        if config.dropout and not target.dense and (place.name != "weight" or not takes_dropout(module)):
            raise ValueError(
                f"dropout: expected 0 with {name!r}, whose layer has no input that can be dropped for the update alone"
            )
