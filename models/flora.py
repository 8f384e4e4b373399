"""FLoRA adapters: low-rank Tucker updates of a frozen model's weights, of any order.

`inject_adapters` changes a model in place and returns the handle, `load_adapters` does so from files. The mathematics
is in `tucker_delta`, settings in `adapter_config`, the choice of weights in `adapter_targets`, starts in
`adapter_starts`, modules in `adapter_modules`, layers in `adapter_layers`.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from probtensor.models.adapter_config import FLoRAConfig
from probtensor.models.adapter_files import SavedAdapter, check_tensors, read_adapter, write_adapter
from probtensor.models.adapter_layers import layer_forward
from probtensor.models.adapter_modules import Bank, Delta, adapt, bank_of, base_parameter, release, sites
from probtensor.models.adapter_modules import grouped_parameters as grouped
from probtensor.models.adapter_starts import new_delta, saved_deltas, start_scale, summed_delta
from probtensor.models.adapter_targets import Target, all_parameters, find_targets
from probtensor.resources import is_number

__all__ = ["Adapters", "FLoRAConfig", "inject_adapters", "load_adapters"]


def inject_adapters(
    model: nn.Module, config: FLoRAConfig, name: str = "default", *, gradients: Mapping[str, Tensor] | None = None
) -> "Adapters":
    """Add an adapter to a model in place, freeze the base, and make the new adapter the active one.

    The model's outputs do not change until the adapter is trained. Layers stay the objects that they were, instances of
    their classes, and the keys of ``model.state_dict()`` stay as they were.

    Parameters
    ----------
    model : Module
        A second call, with another name, adds a second adapter.
    config : FLoRAConfig
    name : str, default "default"
        Of the adapter.
    gradients : mapping of str to Tensor, optional
        For ``init="gradient"``: for each weight, by its full name, the gradient whose leading singular vectors are the
        factors; see `probtensor.models.adapter_starts.weight_gradients`.

    Returns
    -------
    Adapters

    Raises
    ------
    ValueError
        If a name of the settings fits nothing, a weight cannot be adapted, the adapter is there already, or adapters
        are merged. The model is then as it was.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> adapters = inject_adapters(model, FLoRAConfig(r=2))
    >>> adapters.print_trainable_parameters()
    trainable: 70 of 312 parameters (22.44 %)
    >>> sorted(model.state_dict()), isinstance(model[0], nn.Conv2d)
    (['0.bias', '0.weight', '2.bias', '2.weight'], True)
    >>> import torch
    >>> optimizer = torch.optim.Adam(adapters.parameter_groups(lr=1e-2))
    """
    adapters = Adapters(model)
    adapters._check_new(name)
    targets = find_targets(model, config)
    if (gradients is not None) != (config.init == "gradient"):
        raise ValueError(f'gradients: expected together with init="gradient", got init={config.init!r}')
    deltas = [new_delta(target, config, gradients) for target in targets]
    adapters._add(name, targets, deltas)
    return adapters


def load_adapters(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> "Adapters":
    """Add an adapter that `Adapters.save_pretrained` wrote, freeze the base, and make it the active one.

    Parameters
    ----------
    model : Module
        With the parameters that were adapted, under the same names and of the same shapes.
    path : str or path
        The folder.
    name : str, optional
        Another name than the one that it was saved under.

    Returns
    -------
    Adapters

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ValueError
        If the files do not fit each other or the model: missing and unused tensors are errors.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     inject_adapters(nn.Linear(4, 3), FLoRAConfig(r=2), "task").save_pretrained(folder)
    ...     load_adapters(nn.Linear(4, 3), folder).names
    ('task',)
    """
    saved = read_adapter(path)
    name = saved.name if name is None else name
    adapters = Adapters(model)
    adapters._check_new(name)
    adapters._add(name, *saved_deltas(saved, model))
    return adapters


class Adapters:
    """The adapters of a model: which act, what they hold, how they go to files and into the weights.

    All state is in the model. So ``Adapters(copy.deepcopy(model))`` is the handle of a copy, and
    ``Adapters(pickle.loads(...))`` that of a model from a file.

    Parameters
    ----------
    model : Module

    Attributes
    ----------
    names : tuple of str
        The adapters, in the order in which they were added.
    active : tuple of str
        Those that act.
    merged : tuple of str
        Those that the weights hold at present.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(4, 3)
    >>> adapters = inject_adapters(model, FLoRAConfig(r=2), "first")
    >>> adapters = inject_adapters(model, FLoRAConfig(r=1), "second")
    >>> adapters.names, adapters.active
    (('first', 'second'), ('second',))
    >>> adapters.set_active(["first", "second"])
    >>> adapters.add_weighted({"first": 0.5, "second": 2.0}, "both")
    >>> with adapters.disable():
    ...     y = model(torch.ones(1, 4))
    >>> adapters.merge()
    >>> adapters.merged
    ('first', 'second')
    >>> adapters.unmerge()
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def banks(self) -> dict[str, Bank]:
        """Updates of each adapted parameter, by the full name of the first place where it stands."""
        found: dict[int, tuple[str, Bank]] = {}
        for full_name, _, _, bank in sites(self.model):
            found.setdefault(id(bank), (full_name, bank))
        return dict(found.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were added."""
        return tuple(dict.fromkeys(name for bank in self.banks.values() for name in bank.deltas))

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act."""
        return next((bank.active for bank in self.banks.values()), ())

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that the weights hold at present."""
        return next((bank.merged for bank in self.banks.values()), ())

    def deltas(self, name: str) -> dict[str, Delta]:
        """An adapter's updates, by the full name of the parameter."""
        self._check_there("name", name)
        return {full_name: bank.deltas[name] for full_name, bank in self.banks.items() if name in bank.deltas}

    def config(self, name: str) -> FLoRAConfig:
        """An adapter's settings."""
        return next(iter(self.deltas(name).values())).config

    def set_active(self, names: str | Sequence[str]) -> None:
        """Let one adapter act, or the sum of several, or none (``[]``); those that act are trainable.

        Raises
        ------
        ValueError
            If one is not there or adapters are merged.
        """
        wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        for name in wanted:
            self._check_there("names", name)
        self._check_unmerged("set_active")
        for bank in self.banks.values():
            bank.active = wanted
            for name, delta in bank.deltas.items():
                delta.requires_grad_(name in wanted)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Within the context the model is the base, bit by bit; merged weights are taken back for the while."""
        merged = self.merged
        self.unmerge()
        before = [(bank, bank.enabled) for bank in self.banks.values()]
        for bank, _ in before:
            bank.enabled = False
        try:
            yield
        finally:
            for bank, enabled in before:
                bank.enabled = enabled
            if merged:
                self.merge(merged)

    def merge(self, names: str | Sequence[str] | None = None) -> None:
        """Write updates into the weights, summed in float32 (float64 for float64 weights); originals are kept.

        Parameters
        ----------
        names : str or sequence of str, optional
            Default: the active ones.

        Raises
        ------
        ValueError
            If adapters are merged already, one is not there, or a weight would not be finite. No weight is then
            changed.
        """
        wanted = self.active if names is None else (names,) if isinstance(names, str) else tuple(names)
        for name in wanted:
            self._check_there("names", name)
        self._check_unmerged("merge")
        for full_name, (bank, parameter) in self._parameters().items():
            if not bank.merge(parameter, wanted):
                self.unmerge()
                raise ValueError(f"merge: expected finite weights, got NaN or infinity in {full_name!r}")

    def unmerge(self) -> None:
        """Give the weights the bits that they had before `merge`."""
        for bank, parameter in self._parameters().values():
            bank.unmerge(parameter)

    def merge_and_unload(self) -> nn.Module:
        """Merge the active adapters for good, remove all, and return the model: plain layers, all frozen."""
        if not self.merged:
            self.merge()
        for _, module, name, _ in list(sites(self.model)):
            release(module, name, layer_forward)
        return self.model

    def delete(self, name: str) -> None:
        """Remove an adapter; layers without any are what they were before the first.

        Raises
        ------
        ValueError
            If it is not there or adapters are merged.
        """
        self._check_there("name", name)
        self._check_unmerged("delete")
        for bank in self.banks.values():
            bank.deltas.pop(name, None)
            bank.active = tuple(other for other in bank.active if other != name)
        for _, module, parameter, bank in list(sites(self.model)):
            if not bank.deltas:
                release(module, parameter, layer_forward)

    def add_weighted(self, weights: Mapping[str, float], name: str) -> None:
        """Add the adapter whose updates are weighted sums of those of others; it does not act until `set_active`.

        The sum is exact: ranks add up.

        Parameters
        ----------
        weights : mapping of str to float
            By the adapters' names.
        name : str
            Of the new one.

        Raises
        ------
        ValueError
            If an adapter is not there, a weight is no number, or the new name is taken.
        """
        if not weights:
            raise ValueError("weights: expected at least one adapter, got none")
        for other, weight in weights.items():
            self._check_there("weights", other)
            if not is_number(weight):
                raise ValueError(f"weights: expected numbers, got {weight!r} for {other!r}")
        self._check_new(name)
        config = dataclasses.replace(self.config(next(iter(weights))), form="tucker")
        for bank in self.banks.values():
            parts = [other for other in weights if other in bank.deltas]
            if parts:
                delta = summed_delta([bank.deltas[part] for part in parts], [weights[part] for part in parts], config)
                bank._modules[name] = delta.train(bank.training).requires_grad_(False)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer: those of the active adapters, each once."""
        return [
            parameter for delta in self._active_deltas() for parameter in delta.parameters() if parameter.requires_grad
        ]

    def parameter_groups(
        self, lr: float, *, factor_ratio: float = 2.0, dense_ratio: float = 0.1, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """The trainable parameters for an optimizer in groups with a learning rate of their own.

        Parameters
        ----------
        lr : float
            Of cores. With ``alpha="rms"`` and Adam, the share of its size that a weight moves by in a step.
        factor_ratio : float, default 2.0
            Rate of factors, in `lr`. Of 1, 3 and 10, validation chose 3, 3 and 1 on three tasks (docs/adapters.md).
        dense_ratio : float, default 0.1
            Rate of what is trained in full (biases, modules to save), in `lr`: its steps are not relative to its size.
        weight_decay : float, default 0.0
            Of cores and of what is trained in full: it pulls weights to the base's. Factors have none.

        Returns
        -------
        list of dict
            With the keys "params", "lr" and "weight_decay"; groups without parameters are left out.

        Raises
        ------
        ValueError
            If a number is negative or not finite.

        Examples
        --------
        >>> adapters = inject_adapters(nn.Linear(6, 5), FLoRAConfig(r=2, bias="all"))
        >>> [(len(group["params"]), group["lr"]) for group in adapters.parameter_groups(0.01)]
        [(1, 0.01), (2, 0.02), (1, 0.001)]
        """
        return grouped(self._active_deltas(), lr, factor_ratio, dense_ratio, weight_decay)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of all of base and active adapters."""
        trained = sum(parameter.numel() for parameter in self.trainable_parameters())
        base = sum(parameter.numel() for parameter, _ in all_parameters(self.model))
        print(f"trainable: {trained:,} of {base + trained:,} parameters ({100 * trained / (base + trained):.2f} %)")

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """An adapter's tensors, "<parameter>.core" and "<parameter>.factor_<mode>"; default: the active one's."""
        deltas = self.deltas(self._one(name))
        return {
            f"{full_name}.{key}": value.detach()
            for full_name, delta in deltas.items()
            for key, value in delta._parameters.items()
            if value is not None
        }

    def load_state_dict(self, state: Mapping[str, Tensor], name: str | None = None) -> None:
        """Take over tensors that `state_dict` gave for an adapter of the same ranks.

        Raises
        ------
        ValueError
            If one is missing, left over, or of another shape.
        """
        own = self.state_dict(name)
        check_tensors("state", own, state)
        for key, value in own.items():
            value.copy_(state[key])

    def save_pretrained(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        """Write an adapter's settings and tensors into a folder; `load_adapters` reads them.

        Parameters
        ----------
        directory : str or path
        name : str, optional
            Default: the active one.

        Raises
        ------
        ValueError
            If there is no such adapter, or several act and none is named.
        """
        name = self._one(name)
        parameters = {full_name: delta.as_dict() for full_name, delta in self.deltas(name).items()}
        write_adapter(directory, SavedAdapter(name, self.config(name), parameters, self.state_dict(name)))

    def reset_parameters(self, name: str | None = None) -> None:
        """Put an adapter back to its random start.

        Also for a model that was on the meta device, once ``to_empty`` and ``load_state_dict`` have given it its
        weights: an `alpha` of "rms" is then found; until then the outputs are NaN.
        """
        deltas, bases = self.deltas(self._one(name)), self._parameters()
        for full_name, delta in deltas.items():
            if math.isnan(delta.scale):
                delta.scale = start_scale(delta.config, full_name, bases[full_name][1], delta.ranks)
            delta.reset_parameters()

    def _one(self, name: str | None) -> str:
        if name is None and len(self.active) != 1:
            raise ValueError(f"name: expected one of {self.names}, as {len(self.active)} adapters act, got None")
        return self.active[0] if name is None else name

    def _active_deltas(self) -> list[Delta]:
        return [bank.deltas[name] for bank in self.banks.values() for name in bank.active if name in bank.deltas]

    def _parameters(self) -> dict[str, tuple[Bank, Tensor]]:
        """Bank and base parameter, by full name, each once."""
        found: dict[int, tuple[str, tuple[Bank, Tensor]]] = {}
        for full_name, module, name, bank in sites(self.model):
            found.setdefault(id(bank), (full_name, (bank, base_parameter(module, name))))
        return dict(found.values())

    def _check_there(self, argument: str, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"{argument}: expected one of the adapters {self.names}, got {name!r}")

    def _check_unmerged(self, verb: str) -> None:
        if self.merged:
            raise ValueError(f"{verb}: expected adapters that are not merged, got {self.merged}: unmerge first")

    def _check_new(self, name: Any) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name: expected a name without dots, got {name!r}")
        if name in self.names:
            raise ValueError(f"name: expected one that is not among the adapters {self.names}, got {name!r}")
        self._check_unmerged("name")

    def _add(self, name: str, targets: Sequence[Target], deltas: Sequence[Delta]) -> None:
        for parameter, _ in all_parameters(self.model):
            parameter.requires_grad_(False)
        for target, delta in zip(targets, deltas, strict=True):
            first = target.places[0]
            bank = bank_of(first.module, first.name)
            bank = Bank().train(first.module.training) if bank is None else bank
            bank._modules[name] = delta.train(first.module.training)
            for place in target.places:
                if bank_of(place.module, place.name) is not bank:
                    adapt(place.module, place.name, bank, layer_forward)
        self.set_active(name)
