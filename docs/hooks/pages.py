"""Pages of the site that are not files in docs/: notebooks, result tables, the changelog; and links between all.

Markdown anywhere in the repository links to files as they lie there, so that it reads right in a plain checkout too;
here such links become links between pages. ``<!-- include README.md "Ten lines" -->`` stands for the text below that
heading of that file: what the README says is not written twice.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
FOLDERS = {RESULTS: "benchmarks/index.md", "tutorials": "tutorials/index.md"}  # links to a folder lead to a page

INCLUDE = re.compile(r'^<!-- include (\S+) "([^"]+)" -->$', re.MULTILINE)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?!https?:)([^)\s]+)\)")
OUTPUT_LINES = 60  # of printed text; more is cut


def sources() -> dict[str, str]:
    """Path in the site of each page that comes from outside docs/, with its path in the repository."""
    results = {f"benchmarks/{path.name}": f"{RESULTS}/{path.name}" for path in sorted((ROOT / RESULTS).glob("*.md"))}
    results["benchmarks/index.md"] = results.pop("benchmarks/README.md")
    notebooks = {f"tutorials/{path.stem}.md": f"tutorials/{path.name}" for path in notebook_paths()}
    return {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", **results, **notebooks}


def notebook_paths() -> list[Path]:
    """The notebooks, in the order of their numbers."""
    return sorted((ROOT / "tutorials").glob("*.ipynb"))


def title(markdown: str) -> str:
    """The text of the first heading."""
    return next(line for line in markdown.splitlines() if line.startswith("# "))[2:].strip()


def section(file: str, heading: str) -> str:
    """What stands below a heading of a file, down to the next heading of its level or above."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip("#").strip() == heading and line.startswith("#")]
    if len(starts) != 1:
        raise ValueError(f"{file}: expected one heading {heading!r}, found {len(starts)}")
    level = len(lines[starts[0]]) - len(lines[starts[0]].lstrip("#"))
    body: list[str] = []
    fenced = False
    for line in lines[starts[0] + 1 :]:
        fenced ^= line.startswith("```")
        if not fenced and re.match(rf"#{{1,{level}}} ", line):
            break
        body.append(line)
    return "\n".join(body).strip()


def relink(text: str, source: str, page: str, pages: dict[str, str]) -> str:
    """Turn links to files of the repository into links to pages.

    Parameters
    ----------
    text : str
        Markdown, written in `source`.
    source : str
        Path in the repository, which links are relative to.
    page : str
        Path in the site of the page that shows it.
    pages : dict of str to str
        Path in the site of each file of the repository that has one.
    """

    def target(link: str) -> str | None:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        found = pages.get(path, FOLDERS.get(path))
        return found and posixpath.relpath(found, posixpath.dirname(page) or ".")

    def link(match: re.Match[str]) -> str:
        label, path, anchor = match.groups()
        found = target(path)
        there = (ROOT / posixpath.dirname(source) / path).exists()
        if found is None and not there and not path.endswith(".ipynb"):  # tutorials link to those that are to come
            return match.group()  # wrong, or a page of this site: MkDocs says which
        return f"[{label}]({found}{anchor or ''})" if found else label

    def picture(match: re.Match[str]) -> str:
        found = target(match[2])
        return f"{match[1]}{found})" if found else match.group()

    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else PICTURE.sub(picture, LINK.sub(link, part)) for i, part in enumerate(parts))


def from_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, with the outputs that are stored in it, and its pictures by file name."""
    texts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            texts.append(text)
        elif cell["cell_type"] == "code" and text.strip():
            texts.append(f"```python\n{text}\n```")
            for output in cell.get("outputs", []):
                texts.append(_output(output, path.stem, pictures))
    return "\n\n".join(text for text in texts if text), pictures


def _output(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    """One output of a cell as Markdown; a picture goes into `pictures`."""
    if output["output_type"] == "stream":
        return _printed("".join(output["text"])) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}_{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![output of the code above]({name})"
    if "<table" in "".join(data.get("text/html", "")):
        html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
        html = re.sub(r"<(table|tr)\b[^>]*>", r"<\1>", html)  # the theme's own borders
        return "".join(line.strip() for line in html.splitlines())
    return _printed("".join(data.get("text/plain", "")))


def _printed(text: str) -> str:
    lines = text.rstrip().splitlines()
    shown = [*lines[:OUTPUT_LINES], *(["…"] if len(lines) > OUTPUT_LINES else [])]
    return "```text\n" + "\n".join(shown) + "\n```" if shown else ""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation: all notebooks and all result tables."""
    outside = ["tutorials/index.md", *(page for page in sources() if page != "benchmarks/index.md")]

    def pruned(items: list[Any]) -> list[Any]:
        kept: list[Any] = []
        for item in items:
            ((name, value),) = item.items() if isinstance(item, dict) else ((None, item),)
            if isinstance(value, list):
                kept.append({name: pruned(value)})
            elif value in ("tutorials/", "benchmarks/"):
                kept.append({name: [page for page in outside if page.startswith(value)]})
            else:
                kept.append(item)
        return kept

    config.nav = pruned(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    index = [
        "# Tutorials",
        "One question each. `make notebooks` runs them; what they show was stored when they last ran.",
    ]
    for page, source in sources().items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            text, pictures = from_notebook(path)
            for name, content in pictures.items():
                files.append(File.generated(config, f"tutorials/{name}", content=content))
            index.append(f"- [{title(text)}]({path.stem}.md), `tutorials/{path.name}`")
        else:
            text = path.read_text(encoding="utf-8")
            if source.startswith(RESULTS) and not text.startswith("# "):
                text = f"# {path.stem.replace('_', ' ')}\n\n{text}"
        files.append(File.generated(config, page, content=text))
    files.append(
        File.generated(config, "tutorials/index.md", content="\n\n".join(index[:2]) + "\n\n" + "\n".join(index[2:]))
    )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Include what is asked for, and turn links to files into links to pages."""
    here = page.file.src_uri
    outside = sources()
    pages = {source: name for name, source in outside.items()}
    pages |= {f"docs/{file.src_uri}": file.src_uri for file in files if file.src_uri not in outside}
    pages["README.md"] = "index.md"

    def included(match: re.Match[str]) -> str:
        return relink(section(match[1], match[2]), match[1], here, pages)

    source = outside.get(here, f"docs/{here}")
    return INCLUDE.sub(included, relink(markdown, source, here, pages))
