"""The page of a model in a browser: it draws without errors or a network, and its controls do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest

from probtensor.models import FunBaT, NeuralTensorCompletion
from probtensor.viewing import write_page

pytest.importorskip("plotly")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")

HOSTILE = "</script><b>&amp;<img src=x onerror=alert(1)>"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=8000"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Dom(HTMLParser):
    """Texts and elements of a page as the browser had them in the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        self._raw = tag in ("script", "style")

    def handle_data(self, data):
        if not self._raw:
            self.texts.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for a in self.attributes if name in (a.get("class") or "").split()]


def opened(page: Path, folder: Path, **choices: str) -> str:
    """The document after its scripts have run; fails on anything that the console says."""
    url = page.as_uri() + ("#" + urlencode(choices) if choices else "")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder}", "--dump-dom", url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
    assert 'data-drawn="yes"' in result.stdout
    return result.stdout


def lines(document: str, place: str = "predictions") -> list[str]:
    """Paths of the lines and bands that a section's charts have, not those of legends."""
    part = document[document.index(f'id="{place}" aria-labelledby') :]
    return re.findall(r'<path class="js-(?:line|fill)"[^>]* d="(M[^"]{50,})"', part[: part.index("</section>")])


def numbers(document: str) -> pd.DataFrame:
    """The table below the predictions."""
    part = document[document.index('aria-label="Numbers"') :]
    rows = re.findall(r"<tr>(.*?)</tr>", part[: part.index("</table>")], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return pd.DataFrame(cells[1:], columns=cells[0])


@pytest.fixture(scope="module")
def model() -> FunBaT:
    rng = np.random.default_rng(0)
    days = pd.Timestamp("2024-02-27") + pd.to_timedelta(rng.integers(0, 12, 200), unit="D")
    cells = rng.choice(["a", "b", HOSTILE], 200).astype(object)
    X = pd.DataFrame({"day": days, "dose": rng.integers(0, 6, 200) / 2, "cell": cells})
    size = X["cell"].map({"a": 1.0, "b": 2.0, HOSTILE: -1.0}).to_numpy()
    y = size * np.sin(X["dose"].to_numpy()) + 0.1 * rng.normal(size=200)
    return FunBaT(rank=2, random_state=0, progress=False, max_iter=80, tol=0.1).fit(X, y)


@pytest.fixture(scope="module")
def page(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page.html"
    held = pd.DataFrame(
        {"day": [pd.Timestamp("2024-03-01")] * 4, "dose": [0.0, 0.5, 1.0, 1.5], "cell": ["a", "b", HOSTILE, "a"]}
    )
    write_page(model, path, data=(held, np.zeros(4)), value="<i>y</i>", budget=5000, progress=False)
    return path


def test_every_section_has_its_charts_and_no_text_became_a_tag(page, tmp_path):
    document = opened(page, tmp_path)
    dom = Dom(document)
    assert len(dom.of_class("js-plotly-plot")) == 3 + 1 + 2 + 2  # factors, predictions, rows held out, diagnostics
    assert "img" not in dom.tags
    assert "b" not in dom.tags
    assert "i" not in dom.tags
    assert HOSTILE in dom.texts
    assert any(text.startswith("<i>y</i> along day") for text in dom.texts)
    assert re.search(r'<p id="fault" role="alert" hidden', document)


def test_every_control_has_a_name(page, tmp_path):
    document = opened(page, tmp_path)
    body = document[: document.index('<script type="application/json"')]
    controls = re.findall(r"<(?:select|input)\b", body)
    labelled = re.findall(r"<label[^>]*>(?:(?!</label>).)*<(?:select|input)\b", body, re.DOTALL)
    assert len(controls) == len(labelled) > 5


@pytest.mark.parametrize("cell", ["a", "b", HOSTILE])
def test_numbers_of_a_view_are_the_predictions_of_the_model(model, page, tmp_path, cell):
    choices = {"along": "dose", "at.cell": cell, "at.day": "2024-03-01", "level": "50", "numbers": "1"}
    document = opened(page, tmp_path, **choices)
    shown = numbers(document)
    assert list(shown.columns) == ["dose", "mean", "lower", "upper"]
    shown = shown.astype(float)
    X = pd.DataFrame({"day": pd.Timestamp("2024-03-01"), "dose": shown["dose"], "cell": cell})
    X["cell"] = X["cell"].astype(object)
    lower, upper = model.predict_interval(X, 0.5)
    for name, truth in (("mean", model.predict(X)), ("lower", lower), ("upper", upper)):
        np.testing.assert_allclose(shown[name], truth, atol=2e-4)


def test_a_link_with_other_choices_draws_other_lines(page, tmp_path):
    views = [
        lines(opened(page, tmp_path / str(k), **{"along": "dose", "at.cell": cell, "level": level, "fixed": "1"}))
        for k, (cell, level) in enumerate([("a", "90"), ("a", "90"), ("b", "90"), ("a", "50")])
    ]
    assert len(views[0]) > 1  # the mean, and the band
    assert views[0] == views[1]
    assert set(views[0]).isdisjoint(views[2])
    assert len(set(views[0]) & set(views[3])) == 1  # the mean is the same, the band is not
    assert set(views[0]) != set(views[3])


DRIVER = """<script>
const wait = () => new Promise(done => setTimeout(done, 50));
(async () => {
  const find = name => [...document.querySelectorAll("[name]")].find(node => node.name === name);
  const set = (name, value, kind) => { find(name).value = value; find(name).dispatchEvent(new Event(kind)); };
  await wait();
  set("along", "dose", "change"); await wait();
  set("at.cell", "b", "change"); await wait();
  set("at.day", "3", "input"); await wait();
  set("level", "50", "change"); await wait();
  set("factor", "effect", "change"); await wait();
  document.body.dataset.address = decodeURIComponent(location.hash);
})();
</script>"""


def test_controls_change_the_view_and_the_address(page, tmp_path):
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text(encoding="utf-8") + DRIVER, encoding="utf-8")
    document = opened(driven, tmp_path / "one")
    address = re.search(r'data-address="#([^"]*)"', document)
    assert address is not None
    choices = dict(pair.split("=") for pair in address[1].replace("&amp;", "&").split("&"))
    assert choices == {"along": "dose", "at.cell": "b", "at.day": "2024-03-01", "level": "50", "factor": "effect"}
    linked = opened(page, tmp_path / "two", **choices)
    assert lines(document) == lines(linked) != []
    assert lines(document, "factors") == lines(linked, "factors") != lines(opened(page, tmp_path / "three"), "factors")


def test_components_are_switched_and_labels_found(tmp_path):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"user": [f"user {k}" for k in rng.integers(0, 50, 600)], "day": rng.integers(0, 9, 600) / 1.0})
    model = FunBaT(rank=2, random_state=0, progress=False, max_iter=80, tol=0.1).fit(X, rng.normal(size=600) + X["day"])
    write_page(model, tmp_path / "page.html", budget=2000, progress=False)
    document = opened(tmp_path / "page.html", tmp_path / "one")
    assert "30 of 50 labels, those of the largest values" in document
    found = opened(tmp_path / "page.html", tmp_path / "two", **{"find.user": "R 4", "components": "1"})
    ticks = {text for text in Dom(found).texts if text.startswith("user ") and text[5:].isdigit()}
    assert {f"user {k}" for k in (4, *range(40, 50))} <= ticks


def test_a_page_of_a_network(tmp_path):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"user": rng.integers(0, 9, 200), "film": rng.integers(0, 9, 200)})
    model = NeuralTensorCompletion(
        rank=2, hidden=(8,), max_epochs=2, n_members=2, weight_decay=1.0, random_state=0, progress=False
    ).fit(X, X["user"] + rng.normal(size=200))
    write_page(model, tmp_path / "page.html", budget=1000, progress=False)
    document = opened(tmp_path / "page.html", tmp_path / "profile", along="film")
    assert len(Dom(document).of_class("js-plotly-plot")) == 3
    assert "no factors of single modes" in document
