"""Adapters on disk: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from probtensor.models.adapter_config import FLoRAConfig

__all__ = ["SavedAdapter", "check_keys", "check_tensors", "read_adapter", "write_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMAT, VERSION = "probtensor FLoRA adapter", 1


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter apart from its model.

    Attributes
    ----------
    name : str
    config : FLoRAConfig
    parameters : dict of str to dict
        For each adapted parameter by its full name: "shape", "ranks" (lists of int), "scale", "dropout" (float), and
        "form" if it is another than Tucker's.
    tensors : dict of str to Tensor
        Cores and factors, "<parameter>.core", "<parameter>.factor_<mode>".
    """

    name: str
    config: FLoRAConfig
    parameters: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]


def write_adapter(directory: str | os.PathLike[str], adapter: SavedAdapter) -> None:
    """Write the two files; the folder is made if it is not there."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "name": adapter.name,
        "config": adapter.config.as_dict(),
        "parameters": adapter.parameters,
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter.tensors.items()}
    # Under other names first: a write that ends halfway leaves the earlier adapter readable.
    save_file(tensors, folder / f"{TENSORS}.part", metadata={"format": "pt"})
    (folder / f"{CONFIG}.part").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for name in (TENSORS, CONFIG):
        os.replace(folder / f"{name}.part", folder / name)


def read_adapter(directory: str | os.PathLike[str]) -> SavedAdapter:
    """Read what `write_adapter` wrote.

    Raises
    ------
    FileNotFoundError
        If one of the two files is not there.
    ValueError
        If they are not an adapter of this format, or a tensor is missing or left over.
    """
    folder = Path(directory)
    meta = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    found = (meta.get("format"), meta.get("version")) if isinstance(meta, dict) else None
    if found != (FORMAT, VERSION):
        raise ValueError(f"path: expected an adapter ({FORMAT!r}, version {VERSION}) in {str(folder)!r}, got {found}")
    config = FLoRAConfig(**meta["config"])
    adapter = SavedAdapter(meta["name"], config, meta["parameters"], load_file(folder / TENSORS))
    expected = {f"{name}.core" for name in adapter.parameters}
    for name, entry in adapter.parameters.items():
        ranks = entry["ranks"] * len(entry["shape"]) if "form" in entry else entry["ranks"]
        pairs = enumerate(zip(entry["shape"], ranks, strict=True))
        expected |= {f"{name}.factor_{n}" for n, (size, rank) in pairs if rank < size or "form" in entry}
    check_keys("path", expected, adapter.tensors)
    return adapter


def check_keys(argument: str, expected: set[str], given: Mapping[str, Any]) -> None:
    """Refuse a collection of tensors that lacks one or has one too many.

    Raises
    ------
    ValueError
        With the names.

    Examples
    --------
    >>> check_keys("state", {"a.core"}, {"b.core": 0})
    Traceback (most recent call last):
    ValueError: state: missing tensors ['a.core'], unused tensors ['b.core']
    """
    missing, unused = sorted(expected - given.keys()), sorted(given.keys() - expected)
    if missing or unused:
        raise ValueError(f"{argument}: missing tensors {missing}, unused tensors {unused}")


def check_tensors(argument: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse a collection of tensors with other names or shapes than those expected.

    Raises
    ------
    ValueError
        With the names, or the shapes.
    """
    check_keys(argument, set(expected), given)
    for key, value in expected.items():
        if value.shape != given[key].shape:
            raise ValueError(f"{argument}: expected {key!r} of {tuple(value.shape)}, got {tuple(given[key].shape)}")
