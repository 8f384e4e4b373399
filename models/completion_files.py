"""A fitted neural completion as arrays and JSON values, and back."""

import json
from typing import Any

import torch
from torch import Tensor

from probtensor.calibration import ScaleMixture
from probtensor.models.completion_effects import Effects
from probtensor.models.completion_fit import Fitted
from probtensor.models.completion_groups import Group
from probtensor.models.completion_network import Kind
from probtensor.models.completion_pairs import PairFactors
from probtensor.models.completion_products import FloatArray, Products
from probtensor.models.completion_stacking import Spread

__all__ = ["fitted_from_state", "fitted_to_state"]

OF_EFFECTS = "known", "effects", "weights"  # one array for each subset of modes


def fitted_to_state(fitted: Fitted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and JSON values of a fitted model, all but its parameters and axes."""
    effects = fitted.effects
    arrays: dict[str, Tensor] = {}
    for s in range(len(effects.subsets)):
        arrays |= {f"effects.{s}.{name}": torch.from_numpy(getattr(effects, name)[s]) for name in OF_EFFECTS}
    arrays["weights"] = torch.from_numpy(fitted.weights)
    arrays["scales"], arrays["scale_weights"] = fitted.mixture.scales, fitted.mixture.weights
    for g, group in enumerate(fitted.groups):
        arrays |= {f"group.{g}.{name}": value for name, value in group.parameters.items()}
        arrays[f"history.{g}"] = group.history
        for c, (parameters, rates) in enumerate(group.checkpoints):
            arrays |= {f"checkpoint.{g}.{c}.{name}": value for name, value in parameters.items()}
            arrays[f"rates.{g}.{c}"] = rates
    if fitted.pairs is not None:
        arrays |= {f"single.{k}": torch.from_numpy(effect) for k, effect in enumerate(fitted.pairs.singles)}
        arrays |= {f"factor.{p}": torch.from_numpy(factor) for p, factor in enumerate(fitted.pairs.factors)}
    if fitted.products is not None:
        arrays |= {f"of_label.{k}": torch.from_numpy(effect) for k, effect in enumerate(fitted.products.effects)}
        arrays |= {f"of_all.{k}": torch.from_numpy(factor) for k, factor in enumerate(fitted.products.factors)}
    groups = [
        [group.name, list(group.kind), group.on_effects, list(group.best_epoch), len(group.checkpoints)]
        for group in fitted.groups
    ]
    return arrays, {
        "subsets": [list(subset) for subset in effects.subsets],
        "sizes": list(effects.sizes),
        "strengths": list(effects.strengths),
        "noise_variance": effects.noise_variance,
        "inflation": fitted.mixture.inflation,
        "groups": json.loads(json.dumps(groups)),
        "n_members": fitted.n_members,
        "likelihood": fitted.likelihood,
        "spread": None if fitted.spread is None else list(fitted.spread),
        "pairs": None if fitted.pairs is None else json.loads(json.dumps(fitted.pairs[:3])),
        "products": None if fitted.products is None else fitted.products.ridge,
    }


def fitted_from_state(arrays: dict[str, Tensor], meta: dict[str, Any], device: torch.device) -> Fitted:
    """What `fitted_to_state` was given, with the networks on a device."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value.to(device) for key, value in arrays.items() if key.startswith(prefix)}

    parts = {name: [arrays[f"effects.{s}.{name}"].numpy() for s in range(len(meta["subsets"]))] for name in OF_EFFECTS}
    effects = Effects(
        tuple(tuple(subset) for subset in meta["subsets"]),
        tuple(meta["sizes"]),
        parts["known"],
        parts["effects"],
        parts["weights"],
        tuple(meta["strengths"]),
        meta["noise_variance"],
    )
    groups = []
    for g, (name, (sizes, rank, head, width, hidden, n_features), on_effects, best_epoch, n) in enumerate(
        meta["groups"]
    ):
        kind = Kind(tuple(sizes), rank, head, width, tuple(hidden), n_features)
        checkpoints = [(under(f"checkpoint.{g}.{c}."), arrays[f"rates.{g}.{c}"].to(device)) for c in range(n)]
        history = arrays[f"history.{g}"]
        groups.append(Group(name, kind, on_effects, under(f"group.{g}."), tuple(best_epoch), history, checkpoints))
    mixture = ScaleMixture(meta["inflation"], arrays["scales"], arrays["scale_weights"])
    spread = None if meta["spread"] is None else Spread(*meta["spread"])

    def tables(*names: str) -> list[list[FloatArray]]:
        numbers = [range(sum(key.startswith(f"{name}.") for key in arrays)) for name in names]
        return [[arrays[f"{name}.{i}"].numpy() for i in of] for name, of in zip(names, numbers, strict=True)]

    pairs, products = None, None
    if meta["pairs"] is not None:
        chosen, strengths, mean = meta["pairs"]
        pairs = PairFactors(tuple((a, b) for a, b in chosen), tuple(strengths), mean, *tables("single", "factor"))
    if meta.get("products") is not None:
        products = Products(meta["products"], *tables("of_label", "of_all"))
    weights = arrays["weights"].numpy()
    return Fitted(effects, groups, weights, mixture, meta["n_members"], meta["likelihood"], spread, pairs, products)
