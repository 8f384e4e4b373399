"""Every public name has a docstring, an example that runs and an entry in the reference; the how-to pages run too."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import probtensor

ROOT = Path(__file__).parent.parent
WITHOUT_EXAMPLES = {
    **dict.fromkeys(
        ("probtensor.inference.kalman", "probtensor.inference.message_passing", "probtensor.inference.truncated_em"),
        "solvers that only models call: an example would be a model; what each promises is in its tests",
    ),
    "probtensor.models.sparse_coding.SparseCoder": "abstract: its heirs have examples",
    "probtensor.models.register_with_peft": "its example needs peft, which the tests do without",
}


def load(name: str) -> ModuleType:
    """A module of docs/hooks, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_hooks_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


REFERENCE, PAGES = load("reference"), load("pages")
ENTRIES = [
    (module, name)
    for family in REFERENCE.FAMILIES.values()
    for module, names in REFERENCE.entries(family)
    for name in names
]


def public() -> set[tuple[str, str]]:
    """Module and name of what users import: from the package, its public modules, and the solvers."""
    modules = ["probtensor", "probtensor.models"]
    modules += [f"probtensor.{name}" for name in probtensor.__all__ if inspect.ismodule(getattr(probtensor, name))]
    modules += [f"probtensor.inference.{path.stem}" for path in (ROOT / "inference").glob("[a-z]*.py")]
    return {
        (module, name)
        for module in modules
        for name in getattr(importlib.import_module(module), "__all__", [])
        if not (inspect.ismodule(value := getattr(importlib.import_module(module), name)) or isinstance(value, str))
    }


def found(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def test_every_public_name_has_one_entry_in_the_reference() -> None:
    homes = [id(found(*entry)) for entry in ENTRIES]
    assert len(set(homes)) == len(homes), "an entry twice"
    assert sorted(name for name in public() if id(found(*name)) not in homes) == []


@pytest.mark.parametrize("folder", ["README.md", "docs", "tutorials"])
def test_what_the_docs_import_has_an_entry(folder: str) -> None:
    path = ROOT / folder
    files = [path] if path.is_file() else [*path.rglob("*.md"), *path.glob("*.ipynb")]
    homes = {id(found(*entry)) for entry in ENTRIES}
    imports = r"from (probtensor[\w.]*) import ([\w, ]+)"
    seen = {
        (module, name.strip())
        for file in files
        for module, names in re.findall(imports, file.read_text(encoding="utf-8"))
        for name in names.split(",")
    }
    missing = [entry for entry in seen if not inspect.ismodule(found(*entry)) and id(found(*entry)) not in homes]
    assert missing == []


@pytest.mark.parametrize(("module", "name"), ENTRIES, ids=[".".join(entry) for entry in ENTRIES])
def test_every_public_name_has_a_docstring_and_an_example(module: str, name: str) -> None:
    item = found(module, name)
    assert item.__doc__, "no docstring"
    undocumented = []
    for attribute in dir(item) if inspect.isclass(item) else ():
        member = inspect.getattr_static(item, attribute)
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        ours = inspect.isfunction(function) and function.__module__.startswith("probtensor")
        if ours and not attribute.startswith("_") and not inspect.getdoc(getattr(item, attribute)):
            undocumented.append(attribute)
    assert undocumented == []
    if module in WITHOUT_EXAMPLES or f"{module}.{name}" in WITHOUT_EXAMPLES:
        return
    examples = doctest.DocTestParser().get_examples(item.__doc__)
    assert "Examples\n" in item.__doc__, "no section Examples"
    assert [example for example in examples if not example.options.get(doctest.SKIP)], "no example that runs"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "howto").glob("*.md")), ids=lambda path: path.stem)
def test_examples_of_the_how_to_pages_run(path: Path, tmp_path: Path) -> None:
    """In order, as one program."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if blocks:
        (tmp_path / "example.py").write_text("\n".join(blocks), encoding="utf-8")
        command = [sys.executable, "-W", "error", "example.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_all_pages_have_a_place_in_the_navigation() -> None:
    """Also checked by `make docs`; here without MkDocs."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in text] == []


def test_links_lead_to_pages_or_lose_their_address() -> None:
    pages = {"docs/completion.md": "completion.md", "README.md": "index.md"}
    text = "[a](docs/completion.md#x) [b](LICENSE) [c](nowhere.md) `[d](docs/completion.md)` [e](benchmarks/results)"
    right = "[a](../completion.md#x) b [c](nowhere.md) `[d](docs/completion.md)` [e](../benchmarks/index.md)"
    assert PAGES.relink(text, "README.md", "howto/data.md", pages) == right


def test_a_section_ends_at_the_next_heading_of_its_level() -> None:
    text = PAGES.section("README.md", "Ten lines")
    assert text.startswith("```python")
    assert "## " not in text
    with pytest.raises(ValueError, match=r"README\.md: expected one heading 'No such', found 0"):
        PAGES.section("README.md", "No such")


def test_notebooks_become_markdown_with_their_stored_outputs(tmp_path: Path) -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
        {"output_type": "display_data", "data": {"image/png": "aGVsbG8="}},
        {"output_type": "execute_result", "data": {"text/html": ['<table border="1">\n<tr><td>2</td></tr></table>']}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": outputs},
    ]
    (tmp_path / "07_toy.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    text, pictures = PAGES.from_notebook(tmp_path / "07_toy.ipynb")
    assert pictures == {"07_toy_1.png": b"hello"}
    for part in ("# Title\ntext", "```python\nprint(1)\n```", "```text\n1\n```", "(07_toy_1.png)", "<table><tr><td>2"):
        assert part in text


def test_the_citation_has_the_version_and_licence_of_the_package() -> None:
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    given = dict(line.split(": ", 1) for line in lines if re.match(r"[a-z-]+: ", line))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for field in ("version", "license"):
        assert f'{field} = "{given[field]}"' in project
    assert given["cff-version"] == "1.2.0"
