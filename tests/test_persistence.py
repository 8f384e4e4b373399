"""Model files: bits, header, atomic writes, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from probtensor import persistence
from probtensor.persistence import load, read_header, read_state, write_state

KIND = "probtensor.models.funbat.FunBaT"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "il2.model"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_arrays_come_back_bit_for_bit_with_dtype_and_shape(path):
    rng = np.random.default_rng(0)
    arrays = {
        "strange": np.array([np.nan, -0.0, np.inf, 5e-324, 0.1]),
        "single": rng.normal(size=(3, 2)).astype(np.float32),
        "labels": np.arange(4, dtype=np.int64)[::-1],
        "fortran": np.asfortranarray(rng.normal(size=(2, 3, 4))),
        "scalar": np.array(0.3),
        "empty": np.zeros((0, 3)),
        "flags": np.array([True, False]),
        "view": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
        "learned": torch.ones(2, requires_grad=True),
    }
    arrays["same storage"] = arrays["view"]
    write_state(path, KIND, arrays, {})
    kind, read, meta = read_state(path)
    assert (kind, meta) == (KIND, {})
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        expected = torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array.detach()
        assert read[name].dtype == expected.dtype
        assert read[name].shape == expected.shape
        assert bits(read[name]) == bits(expected)


def test_arrays_of_another_byte_order_keep_their_values(path):
    write_state(path, KIND, {"a": np.array([1.0, 2.5], dtype=">f8")}, {})
    assert read_state(path)[1]["a"].tolist() == [1.0, 2.5]


def test_meta_floats_are_bit_equal_and_text_survives(path):
    meta = {"floats": [0.1, 1e-323, -0.0, 2.0**53 + 1, np.float64(1 / 3)], "name": "Übergröße 漢 \ud800", "n": 2**80}
    write_state(path, KIND, {}, {**meta, "nested": {"none": None, "pair": (1, True)}})
    read = read_state(path)[2]
    assert [x.hex() for x in read["floats"]] == [float(x).hex() for x in meta["floats"]]
    assert (read["name"], read["n"]) == (meta["name"], meta["n"])
    assert read["nested"] == {"none": None, "pair": [1, True]}


def test_the_same_state_gives_the_same_bytes(path, tmp_path):
    arrays = {"b": np.ones(3), "a": np.zeros((2, 2), dtype=np.float32)}
    write_state(path, KIND, arrays, {"x": 1, "y": 2})
    write_state(tmp_path / "again", KIND, arrays, {"x": 1, "y": 2})
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_header_tells_versions_kind_and_meta(path):
    write_state(path, KIND, {"a": np.ones(3)}, {"rank": 2})
    header = read_header(path)
    assert header["format_version"] == persistence.FORMAT_VERSION
    assert header["kind"] == KIND
    assert header["meta"] == {"rank": 2}
    assert isinstance(header["probtensor_version"], str)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"a": float("nan")}, r"meta\['a'\]: expected a finite number, got nan"),
        ({"a": [1.0, {"b": float("inf")}]}, r"meta\['a'\]\[1\]\['b'\]: expected a finite number, got inf"),
        ({"a": {1: 2}}, r"meta\['a'\]: expected string keys, got 1"),
        ({"a": np.int64(3)}, r"meta\['a'\]: expected None, bool.* got int64"),
        ({"a": {1, 2}}, "got set"),
    ],
)
def test_meta_that_json_would_change_is_refused(path, meta, words):
    with pytest.raises(ValueError, match=words):
        write_state(path, KIND, {}, meta)
    assert not path.exists()


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()], dtype=object)])
def test_arrays_that_are_not_numbers_are_refused(path, array):
    with pytest.raises(ValueError, match=r"arrays\['x'\]: expected numbers"):
        write_state(path, KIND, {"x": array}, {})


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128)])
def test_tensors_that_the_format_lacks_are_refused(path, tensor):
    with pytest.raises(ValueError, match=r"arrays\['x'\]: expected dense numbers"):
        write_state(path, KIND, {"x": tensor}, {})
    assert not path.exists()


@pytest.mark.parametrize("kind", ["os.system", "probtensor.models.funbat", "probtensor.models.a.b.C", "", "FunBaT"])
def test_kind_must_be_a_model_class(path, kind):
    with pytest.raises(ValueError, match=r"kind: expected 'probtensor\.models"):
        write_state(path, kind, {}, {})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    write_state(path, KIND, {"a": np.ones(3)}, {})
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(persistence.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_state(path, KIND, {"a": np.zeros(3)}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_an_existing_file_is_replaced_and_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "latest.model"
    link.symlink_to(path)
    write_state(path, KIND, {}, {"run": 1})
    write_state(link, KIND, {}, {"run": 2})
    assert link.is_symlink()
    assert read_state(path)[2] == {"run": 2}
    assert sorted(os.listdir(tmp_path)) == ["il2.model", "latest.model"]


def test_the_file_has_the_permissions_of_any_new_file(path, tmp_path):
    (tmp_path / "plain").touch()
    write_state(path, KIND, {}, {})
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_path_without_a_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model file at .*nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match="folder"):
        load(tmp_path)
    with pytest.raises(IsADirectoryError, match="folder"):
        write_state(tmp_path, KIND, {}, {})
    with pytest.raises(FileNotFoundError):
        write_state(tmp_path / "no" / "folder", KIND, {}, {})


@pytest.mark.parametrize("content", [b"a,b,y\n1,2,3\n", b"\x80\x04\x95" * 20, b"12345678{}"])
def test_other_files_are_not_ours(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a probtensor model"):
        load(path)


def test_other_safetensors_files_are_not_ours(path):
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is not a probtensor model"):
        load(path)


def test_every_truncation_is_reported_as_one(path):
    write_state(path, KIND, {"a": np.ones(5)}, {"note": "x" * 20})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_state(path)
    path.write_bytes(whole + b"tail")
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_state(path)


def rewrite(path: Path, **changes: object) -> None:
    """Write a file whose header has the given entries."""
    header = {
        "format_version": persistence.FORMAT_VERSION,
        "probtensor_version": "9.9",
        "kind": KIND,
        "meta": {},
    } | changes
    save_file({"a": torch.ones(1)}, path, metadata={"probtensor": json.dumps(header)})


def test_a_newer_format_is_named(path):
    rewrite(path, format_version=3)
    with pytest.raises(
        ValueError, match=r"format version 3 \(written by probtensor 9\.9\).*reads version 2: upgrade it"
    ):
        load(path)


def test_an_older_format_is_named_and_not_misread(path):
    rewrite(path, format_version=1)
    with pytest.raises(ValueError, match=r"format version 1 .*reads version 2: fit and save the model again"):
        load(path)


@pytest.mark.parametrize("changes", [{"format_version": "1"}, {"kind": 3}, {"meta": []}])
def test_a_header_of_wrong_types_is_damaged(path, changes):
    rewrite(path, **changes)
    with pytest.raises(ValueError, match="entries of the wrong type"):
        load(path)


@pytest.mark.parametrize("kind", ["os.path.Join", "subprocess.Popen", "probtensor.models.funbat.os.System"])
def test_load_imports_nothing_but_models(path, kind):
    rewrite(path, kind=kind)
    with pytest.raises(ValueError, match=r"not one of probtensor\.models"):
        load(path)


@pytest.mark.parametrize("kind", ["probtensor.models.no_such_model.Model", "probtensor.models.state_space.Nothing"])
def test_a_model_that_this_version_lacks_is_named(path, kind):
    rewrite(path, kind=kind)
    with pytest.raises(ValueError, match=rf"holds a {kind}, which probtensor .* does not have"):
        load(path)


def test_load_calls_from_state_of_the_class_that_was_saved(path, monkeypatch):
    class Toy:
        @classmethod
        def from_state(cls, arrays, meta):
            toy = cls()
            toy.arrays, toy.meta = arrays, meta
            return toy

    module = types.ModuleType("probtensor.models.toy")
    Toy.__module__ = module.__name__
    module.Toy, module.Path = Toy, Path
    monkeypatch.setitem(sys.modules, module.__name__, module)
    write_state(path, "probtensor.models.toy.Toy", {"a": np.array([0.1])}, {"rank": 3})
    toy = load(str(path))
    assert isinstance(toy, Toy)
    assert toy.meta == {"rank": 3}
    assert toy.arrays["a"].tolist() == [0.1]

    write_state(path, "probtensor.models.toy.Path", {}, {})  # a class that the module only imported
    with pytest.raises(ValueError, match="does not have"):
        load(path)


def test_importing_persistence_imports_no_model():
    code = "import sys, probtensor.persistence; print([m for m in sys.modules if m.startswith('probtensor.models.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
