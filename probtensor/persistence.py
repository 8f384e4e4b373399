"""Fitted models on disk: one safetensors file, arrays bit for bit, everything else as JSON in its header.

The header's only entry, ``probtensor``, holds the format version, the version of probtensor that wrote the file, the
kind (the dotted name of the estimator's class) and the estimator's own ``meta``. Nothing is pickled and reading runs no
code from the file: `load` accepts classes of ``probtensor.models`` only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import probtensor

__all__ = ["estimator_from", "load", "read_header", "read_state", "state_from_bytes", "write_state"]

FORMAT_VERSION = 2  # 1: other smoothed states
HEADER_KEY = "probtensor"
# safetensors writes the metadata first, so that our files can be told from others and from their own beginnings.
SIGNATURE = b'{"__metadata__":{"' + HEADER_KEY.encode() + b'":"'
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
KIND = re.compile(r"(?P<module>probtensor\.models\.[a-z][a-z0-9_]*)\.(?P<name>[A-Z][A-Za-z0-9]*)")


def write_state(
    path: str | os.PathLike[str],
    kind: str,
    arrays: Mapping[str, torch.Tensor | npt.NDArray[Any]],
    meta: Mapping[str, Any],
) -> None:
    """Write a fitted estimator's state into one file, atomically.

    The file appears whole or not at all: the bytes go to a temporary file in the same folder, are flushed to the disk,
    and take the name `path` in one step. A file that was there before stays intact until then.

    Parameters
    ----------
    path : path-like
        Where to write; an existing file is replaced.
    kind : str
        Dotted name of the class, ``"probtensor.models.<module>.<Class>"``.
    arrays : mapping of str to tensor or array
        Numeric or boolean, any shape, device and memory layout. Stored with their dtype, bit for bit.
    meta : mapping of str to JSON values
        None, bool, int, finite float, str, and lists and string-keyed dicts of them. Floats come back bit-equal;
        tuples come back as lists.

    Raises
    ------
    ValueError
        If `kind` is not a class of ``probtensor.models``, an array has a dtype without a safetensors counterpart, or
        `meta` holds something else, NaN and infinity included.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tiny.model"
    >>> write_state(path, "probtensor.models.funbat.FunBaT", {"core": np.eye(2)}, {"rank": [2, 2], "scale": 0.1})
    >>> kind, arrays, meta = read_state(path)
    >>> kind, meta["scale"], arrays["core"].dtype
    ('probtensor.models.funbat.FunBaT', 0.1, torch.float64)
    """
    if KIND.fullmatch(kind) is None:
        raise ValueError(f"kind: expected 'probtensor.models.<module>.<Class>', got {kind!r}")
    _check_json(meta, "meta")
    header = {
        "format_version": FORMAT_VERSION,
        "probtensor_version": probtensor.__version__,
        "kind": kind,
        "meta": dict(meta),
    }
    tensors = {name: _as_tensor(name, array) for name, array in arrays.items()}
    _write_atomically(Path(path), save_tensors(tensors, metadata={HEADER_KEY: json.dumps(header, allow_nan=False)}))


def read_state(path: str | os.PathLike[str]) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_state` wrote.

    Parameters
    ----------
    path : path-like
        A file that `write_state` wrote.

    Returns
    -------
    kind : str
        Dotted name of the estimator's class.
    arrays : dict of str to tensor
        On the CPU, with the dtypes, shapes and bits that were saved.
    meta : dict
        The JSON values that were saved.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If `path` is not a file.
    ValueError
        If the file is not a probtensor model, was written in another format, or is truncated or damaged.
    """
    return state_from_bytes(_bytes(path), path)


def state_from_bytes(data: bytes, path: str | os.PathLike[str]) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    """What `read_state` returns, from the bytes of the file at `path`; raises its ValueErrors."""
    header = _header(data, path)
    try:
        arrays = load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    return header["kind"], arrays, header["meta"]


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a model file says about itself, without its arrays.

    Parameters
    ----------
    path : path-like
        A file that `write_state` wrote.

    Returns
    -------
    dict
        With the keys ``format_version``, ``probtensor_version``, ``kind`` and ``meta``.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, ValueError
        As `read_state`.
    """
    return _header(_bytes(path), path)


def load(path: str | os.PathLike[str]) -> Any:
    """Load a fitted estimator that its ``save`` method wrote.

    Parameters
    ----------
    path : path-like
        The file.

    Returns
    -------
    estimator
        Of the class that was saved. On a CPU it predicts the same bits as the one that was saved, without the data.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If `path` is not a file.
    ValueError
        If the file is not a probtensor model, was written in another format, is truncated or damaged, or holds a
        model that this version does not have.

    Examples
    --------
    >>> load("no/such.model")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no model file at no/such.model
    """
    kind, arrays, meta = read_state(path)
    return estimator_from(kind, arrays, meta, os.fspath(path))


def estimator_from(kind: str, arrays: dict[str, torch.Tensor], meta: dict[str, Any], source: str = "a state") -> Any:
    """The fitted estimator of a state.

    Parameters
    ----------
    kind : str
        Dotted name of its class.
    arrays, meta
        As `write_state` was given them.
    source : str
        Where they come from, for messages.

    Raises
    ------
    ValueError
        If this version has no such model.
    """
    match = KIND.fullmatch(kind)
    if match is None:
        raise ValueError(f"{source} names the class {kind!r}, which is not one of probtensor.models")
    unknown = f"{source} holds a {kind}, which probtensor {probtensor.__version__} does not have"
    try:
        module = importlib.import_module(match["module"])
    except ModuleNotFoundError as error:
        if error.name != match["module"]:  # a dependency of the model is missing: say that instead
            raise
        raise ValueError(unknown) from error
    estimator = getattr(module, match["name"], None)
    if not (isinstance(estimator, type) and estimator.__module__ == match["module"]):
        raise ValueError(unknown)
    from_state = getattr(estimator, "from_state", None)
    if not callable(from_state):
        raise ValueError(f"{source} holds a {kind}, which cannot be loaded: it has no from_state")
    return from_state(arrays, meta)


def _bytes(path: str | os.PathLike[str]) -> bytes:
    """Return all bytes of a model file."""
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"expected a model file, got the folder {file}")
    if not file.exists():
        raise FileNotFoundError(f"no model file at {file}")
    return file.read_bytes()


def _header(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the checked header of a model file."""
    file = Path(path)
    size = int.from_bytes(data[:8], "little")
    if not data[8:].startswith(SIGNATURE):
        if SIGNATURE.startswith(data[8:]) and (len(data) <= 8 or size > len(SIGNATURE)):
            raise _damaged(path, f"it has {len(data)} bytes")
        raise ValueError(f"{file} is not a probtensor model (expected a file written by a model's save method)")
    if len(data) < 8 + size:
        raise _damaged(path, f"its header has {size} bytes, the file {len(data)}")
    try:
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][HEADER_KEY])
        format_version, kind, meta = header["format_version"], header["kind"], header["meta"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error
    if not (isinstance(format_version, int) and isinstance(kind, str) and isinstance(meta, dict)):
        raise _damaged(path, "its header has entries of the wrong type")
    written_by = (
        f"{file} has format version {format_version} (written by probtensor {header.get('probtensor_version')})"
    )
    here = f"probtensor {probtensor.__version__} reads version {FORMAT_VERSION}"
    if format_version > FORMAT_VERSION:
        raise ValueError(f"{written_by}; {here}: upgrade it")
    if format_version < FORMAT_VERSION:
        raise ValueError(f"{written_by}; {here}: fit and save the model again")
    return header  # type: ignore[no-any-return]


def _damaged(path: str | os.PathLike[str], detail: str) -> ValueError:
    return ValueError(f"{os.fspath(path)} is truncated or damaged: {detail}")


def _write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step; a link at `path` stays a link."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"cannot write a model file to {path}: it is a folder")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        # Not tempfile: its files are private to the user, a saved model should follow the umask.
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself must survive a crash, too
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
                os.fsync(folder)
        finally:
            os.close(folder)


def _as_tensor(name: str, array: torch.Tensor | npt.NDArray[Any]) -> torch.Tensor:
    """Return a dense copy on the CPU that shares memory with nothing, as safetensors requires."""
    if not isinstance(array, torch.Tensor):
        try:
            array = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise ValueError(f"arrays[{name!r}]: expected numbers or booleans, got dtype {array.dtype}") from error
    if array.layout is not torch.strided or array.dtype not in DTYPES:
        raise ValueError(f"arrays[{name!r}]: expected dense numbers or booleans, got {array.layout}, {array.dtype}")
    return array.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would change or lose."""
    if value is None or isinstance(value, (bool, int, str)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, got {value}")
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: expected string keys, got {key!r}")
            _check_json(entry, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _check_json(entry, f"{where}[{index}]")
    else:
        raise ValueError(
            f"{where}: expected None, bool, int, float, str, list or dict (numbers of numpy as Python numbers), "
            f"got {type(value).__name__}"
        )
