"""The rules of the house that a reader would otherwise have to remember (CONTRIBUTING.md says why)."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("models", "inference")
ABOVE_MODELS = ("__init__.py", "cli.py", "demo.py")  # the public face and the command: they show or run the models
MAX_LINES = 450

MODULES = {  # dotted name -> its real file
    ".".join(["probtensor", *folder, *([] if path.stem == "__init__" else [path.stem])]): path
    for folder, where in [((), ROOT / "probtensor"), *(((name,), ROOT / name) for name in LINKED)]
    for path in sorted(where.glob("*.py"))
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Names imported anywhere below `tree`; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_at_module_level(tree: ast.Module) -> Iterator[str]:
    """Names imported when the module is: not those inside functions."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(node)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_packages_in_pyproject_equal_the_tree() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(["probtensor", *(f"probtensor.{name}" for name in LINKED)])
    assert setuptools["package-dir"] == {f"probtensor.{name}": name for name in LINKED}
    beside_links = {p.name for p in (ROOT / "probtensor").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert beside_links == set(LINKED), "a new package: list it in pyproject.toml, and here"


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_flat_packages(name: str) -> None:
    assert (ROOT / name / "__init__.py").is_file()
    assert [p.name for p in (ROOT / name).iterdir() if p.is_dir() and p.name != "__pycache__"] == []


@pytest.mark.parametrize("name", LINKED)
def test_links_point_to_the_folders_and_are_tracked_as_links(name: str) -> None:
    link = ROOT / "probtensor" / name
    assert link.is_symlink(), f"a checkout without links: git config core.symlinks true; git checkout probtensor/{name}"
    assert os.readlink(link) == f"../{name}"
    if (ROOT / ".git").exists():
        entry = subprocess.run(
            ["git", "ls-files", "-s", f"probtensor/{name}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert entry.stdout.startswith("120000 "), f"probtensor/{name} is not tracked by git as a link"


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/**/*.py")) + list(MODULES.values()), ids=lambda p: p.stem)
def test_imports_are_absolute_and_of_one_copy(path: Path) -> None:
    names = set(imported(parse(path)))
    assert [name for name in names if name.startswith(".")] == []
    assert [name for name in names for linked in LINKED if inside(name, linked)] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    path = MODULES[module]
    at_import = set(imported_at_module_level(parse(path)))
    forbidden = {"probtensor.cli", "probtensor.demo"} if module != "probtensor.cli" else set()
    if path.parent.name == "inference":
        forbidden |= {"probtensor.models"}
    elif path.parent.name == "probtensor" and path.name not in ABOVE_MODELS:
        forbidden |= {"probtensor.models", "probtensor.inference"}
    assert [name for name in at_import for package in forbidden if inside(name, package)] == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_communicator_knows_mpi(module: str) -> None:
    knows = any(inside(name, "mpi4py") for name in imported(parse(MODULES[module])))
    assert knows == (module == "probtensor.comm_mpi")


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_modules_stay_readable_in_one_go(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def run_python(code: str) -> str:
    """Return what a fresh process prints; it must succeed without a warning."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("mpi4py", "pyro", "matplotlib", "xarray", "pyarrow", "torch", "pandas", "numpy", "scipy", "sklearn")
    assert run_python(f"import sys, probtensor; print(*{set(heavy)!r} & sys.modules.keys())") == ""


def test_public_names_load_when_they_are_used_and_change_no_global_state() -> None:
    code = """
import random, sys
import numpy, torch
def state():
    return (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.get_default_dtype(),
            torch.get_num_threads())
before = state()
import probtensor as pt
assert pt.comm.world().size == 1
assert pt.models.FunBaT().rank == 6
for name in pt.__all__:
    assert name in dir(pt)
    getattr(pt, name)
assert pt.load is pt.persistence.load
assert before == state(), "using probtensor's names changes global state"
print(*sorted({"matplotlib", "xarray"} & sys.modules.keys()))
"""
    assert run_python(code) == ""


def test_each_public_name_loads_on_its_own() -> None:
    """As the first one that is asked for: no import cycle, whatever the order. Other libraries are loaded once."""
    code = """
import importlib, sys, traceback
names = importlib.import_module("probtensor").__all__
for name in names:
    for module in [module for module in sys.modules if module.partition(".")[0] == "probtensor"]:
        del sys.modules[module]
    try:
        exec(f"from probtensor import {name} as found")
        assert found is not None
    except Exception:
        print(name, traceback.format_exc())
print(len(names))
"""
    assert run_python(code) == str(len(importlib.import_module("probtensor").__all__))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    package = importlib.import_module("probtensor")
    with pytest.raises(AttributeError, match="module 'probtensor' has no attribute 'tucker'"):
        package.tucker  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'tucker'"):
        exec("from probtensor import tucker")


def test_type_checkers_and_the_interpreter_see_the_same_public_names() -> None:
    tree = parse(ROOT / "probtensor" / "__init__.py")
    block = next(node for node in tree.body if isinstance(node, ast.If))
    for_checkers = {a.asname for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert for_checkers | {"__version__"} == set(importlib.import_module("probtensor").__all__)


def test_every_public_name_exists() -> None:
    for name in ("probtensor", "probtensor.models", "probtensor.inference"):
        package = importlib.import_module(name)
        public = getattr(package, "__all__", [])
        assert len(public) == len(set(public))
        assert [item for item in public if not hasattr(package, item)] == []


def test_linked_modules_are_loaded_once_under_the_package() -> None:
    module = importlib.import_module("probtensor.models")
    assert Path(module.__file__ or "").resolve() == ROOT / "models" / "__init__.py"
    assert not any(inside(name, linked) for name in sys.modules for linked in LINKED)
