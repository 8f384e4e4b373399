"""What we ship is the whole package, from a checkout with links and from one without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "probtensor", "models", "inference")
MODULES = {
    f"{package}/{path.name}"
    for package, folder in [
        ("probtensor", "probtensor"),
        ("probtensor/models", "models"),
        ("probtensor/inference", "inference"),
    ]
    for path in (ROOT / folder).glob("*.py")
}


def run(*command: str, cwd: Path, **variables: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


def copy_sources(target: Path, *, links: bool) -> Path:
    """Copy what the build reads, so that it leaves nothing in the checkout."""
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)
    if not links:  # what git writes where links are not supported
        for name in ("models", "inference"):
            link = target / "probtensor" / name
            link.unlink()
            link.write_text(f"../{name}", encoding="utf-8")
    return target


def build_wheel(source: Path, target: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--quiet", "--wheel-dir", str(target), str(source), cwd=target.parent)
    [wheel] = target.glob("probtensor-*.whl")
    return wheel


def check_wheel(wheel: Path, unpacked: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == MODULES | {
            f"probtensor/{name}" for name in ("py.typed", "viewing.css", "viewing.html", "viewing.js")
        }
        archive.extractall(unpacked)
    code = "import probtensor, probtensor.models as m, probtensor.inference as i; print(m.__file__); print(i.__file__)"
    files = run(sys.executable, "-c", code, cwd=unpacked, PYTHONPATH=str(unpacked)).splitlines()
    assert files == [str(unpacked / "probtensor" / name / "__init__.py") for name in ("models", "inference")]


@pytest.mark.parametrize("links", [True, False], ids=["links", "links as text files"])
def test_wheel_holds_the_whole_package(links: bool, tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source", links=links)
    check_wheel(build_wheel(source, tmp_path / "wheel"), tmp_path / "unpacked")


def test_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source", links=True)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=source)
    [sdist] = tmp_path.glob("probtensor-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    [unpacked_sdist] = (tmp_path / "sdist").iterdir()
    assert (unpacked_sdist / "LICENSE").is_file()
    check_wheel(build_wheel(unpacked_sdist, tmp_path / "wheel"), tmp_path / "unpacked")
