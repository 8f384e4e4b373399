"""The page of a model: its numbers are the model's, texts stay texts, and every kind of model has one."""

from __future__ import annotations

import base64
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import probtensor as pt
from probtensor.baselines import MaskedParafac, MaskedTucker
from probtensor.cli import app
from probtensor.metrics import coverage, rmse
from probtensor.models import (
    BSC,
    DAIN,
    AlternatingMinimization,
    BayesianCP,
    BayesianTucker,
    FunBaT,
    NeuralTensorCompletion,
)
from probtensor.viewing import write_page
from probtensor.viewing_findings import MAX_LABELS
from probtensor.viewing_predictions import LEVELS, MAX_ALONG, MISSING, packed, runs, spread, texts

pytest.importorskip("plotly")

HOSTILE = "</script><b>&amp; \u2028'\""


def table(n: int = 160, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Days, doses and labels, one of which is hostile; y is a product with noise of 0.1."""
    rng = np.random.default_rng(seed)
    days = pd.Timestamp("2024-02-27") + pd.to_timedelta(rng.integers(0, 12, n), unit="D")
    X = pd.DataFrame(
        {"day": days, "dose": rng.integers(0, 6, n) / 2, "cell <i>": rng.choice(["a", "b", HOSTILE], n).astype(object)}
    )
    size = X["cell <i>"].map({"a": 1.0, "b": 2.0, HOSTILE: -1.0}).to_numpy()
    return X, size * np.sin(X["dose"].to_numpy()) + 0.1 * rng.normal(size=n)


@pytest.fixture(scope="module")
def fitted() -> FunBaT:
    return FunBaT(rank=2, random_state=0, progress=False, max_iter=30, tol=0.1).fit(*table())


def content(path: Path) -> dict:
    """The data in a page, as a browser reads them: up to the first closing tag."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def page(model, path: Path, **given) -> dict:
    write_page(model, path, progress=False, **({"budget": 3000} | given))
    return content(path)


def unpacked(run: dict) -> np.ndarray:
    """Curves (C, S, P), as viewing.js decodes them."""
    low, step = (np.frombuffer(base64.b64decode(run[name]), "<f8") for name in ("low", "step"))
    codes = np.frombuffer(base64.b64decode(run["codes"]), "<u2").reshape(len(low), run["stats"], -1)
    values = low[:, None, None] + codes * step[:, None, None]
    return np.where(codes == MISSING, np.nan, values)


def rows_of(run: dict, axes: tuple, combination: int) -> pd.DataFrame:
    """The rows of one curve, from what the page says of it: places of chosen values, positions along the mode."""
    at = np.unravel_index(combination, [len(choice["places"]) for choice in run["choices"]])
    columns = {}
    for mode, axis in enumerate(axes):
        if mode == run["mode"]:
            if hasattr(axis, "labels"):
                columns[axis.name] = axis.distinct[run["places"]]
            elif axis.distinct.dtype.kind == "M":
                columns[axis.name] = pd.to_datetime(run["x"], format="ISO8601").astype(axis.distinct.dtype)
            else:
                columns[axis.name] = axis.decode(run["x"])
    for choice, place in zip(run["choices"], at, strict=True):
        name = axes[choice["mode"]].name
        columns[name] = axes[choice["mode"]].distinct[[choice["places"][place]] * len(run["x"])]
    return pd.DataFrame({axis.name: columns[axis.name] for axis in axes})


@pytest.mark.parametrize("budget", [3000, 100_000])
def test_curves_are_what_the_model_predicts_at_the_coordinates_on_the_page(fitted, tmp_path, budget):
    found = page(fitted, tmp_path / "page.html", budget=budget)
    assert [run["mode"] for run in found["runs"]] == [0, 1, 2]
    total = 0
    for run in found["runs"]:
        curves = unpacked(run)
        total += curves.shape[0] * curves.shape[2]
        assert curves.shape[1] == 1 + 2 * len(LEVELS)
        for combination in {0, len(curves) // 2, len(curves) - 1}:
            X = rows_of(run, fitted.axes_, combination)
            ends = [end for level in LEVELS for end in fitted.predict_interval(X, level)]
            truth = np.stack([fitted.predict(X), *ends])
            np.testing.assert_allclose(curves[combination], truth, rtol=0, atol=np.ptp(truth) / 65_000)
    assert 500 < total <= budget


def test_what_does_not_fit_the_budget_is_said(tmp_path):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"user": rng.integers(0, 300, 3000), "film": rng.integers(0, 90, 3000)})
    model = AlternatingMinimization(rank=1, random_state=0, progress=False, tol=0.1).fit(X, rng.normal(size=3000))
    held = pd.DataFrame({"user": [7] * 5 + [8] * 4 + [299] * 3, "film": np.arange(12)})
    few, counted = page(model, tmp_path / "few.html"), page(model, tmp_path / "n.html", data=(held, np.ones(12)))
    for found, rule in ((few, "spread evenly over those of the training rows"), (counted, "those with the most rows")):
        along_film = found["runs"][1]
        n = len(along_film["choices"][0]["places"])
        assert n < 300
        assert any(f"user: {n:,} of 300 labels, {rule}" in note for note in along_film["notes"])
        assert any(f"film: {MAX_ALONG} of 90 labels, {rule}" in note for note in along_film["notes"])
        assert sum(unpacked(run)[:, 0].size for run in found["runs"]) <= 3000
    assert {7, 8, 299} <= set(counted["runs"][1]["choices"][0]["places"])
    assert page(model, tmp_path / "all.html", budget=100_000)["runs"][0]["notes"] == [
        f"user: {MAX_ALONG} of 300 labels, spread evenly over those of the training rows."
    ]


def test_labels_that_training_rows_did_not_have_are_left_out(tmp_path):
    X = pd.DataFrame({"cell": pd.Categorical(["a", "b"] * 20, ["a", "b", "never"]), "day": np.arange(40.0)})
    model = FunBaT(rank=1, random_state=0, progress=False, max_iter=80, tol=0.1).fit(X, np.sin(X["day"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = page(model, tmp_path / "page.html")
    assert found["runs"][0]["texts"] == ["a", "b"]
    assert found["factors"][0]["labels"] == ["a", "b"]


def test_factors_are_those_of_the_model(fitted, tmp_path):
    found = page(fitted, tmp_path / "page.html")
    by_mode = {factor["mode"]: factor for factor in found["factors"]}
    mean, std = fitted.factor("cell <i>")
    np.testing.assert_allclose(by_mode["cell <i>"]["mean"], mean.T, rtol=1e-5)
    np.testing.assert_allclose(by_mode["cell <i>"]["std"], std.T, rtol=1e-5)
    np.testing.assert_allclose(by_mode["cell <i>"]["effect"], fitted.main_effect("cell <i>")[0], rtol=1e-5)
    lines, dots = by_mode["dose"]["lines"], by_mode["dose"]["dots"]
    np.testing.assert_allclose(lines["mean"], fitted.factor("dose", at=lines["x"])[0].T, rtol=1e-4, atol=1e-5)
    assert dots["x"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert by_mode["day"]["dots"]["x"][0] == "2024-02-27T00:00:00"
    assert found["shared"]


def test_many_labels_are_cut_to_those_of_the_largest_values(tmp_path):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"user": np.tile(np.arange(500), 4), "film": np.repeat(np.arange(4), 500)})
    strong = X["user"] < MAX_LABELS
    y = np.where(strong, 5.0, 0.0) * (X["film"] - 1.5) + 0.01 * rng.normal(size=2000)
    model = AlternatingMinimization(rank=1, biases=False, random_state=0, progress=False).fit(X, y)
    factor = page(model, tmp_path / "page.html")["factors"][0]
    assert factor["labels"] == [str(user) for user in range(MAX_LABELS)]
    assert factor["std"] is None
    assert f"{MAX_LABELS} of 500 labels" in factor["note"]


def test_rows_held_out_are_compared_with_what_the_model_says(fitted, tmp_path):
    X, y = table(40, seed=1)
    given, values = X.copy(), np.append(y[:-1], np.nan)
    held = page(fitted, tmp_path / "page.html", data=(X[X.columns[::-1]], values))["held"]
    pd.testing.assert_frame_equal(X, given)
    X, y = X[:-1], y[:-1]
    scores = dict(held["scores"])
    assert scores["rows"] == "39"
    assert float(scores["RMSE"]) == pytest.approx(rmse(y, fitted.predict(X)), rel=1e-5)
    share = 100 * coverage(y, *fitted.predict_interval(X, 0.9))
    assert scores["90 % intervals hold"].startswith(f"{share:.1f} %")
    np.testing.assert_allclose(held["predicted"][0], fitted.predict(X), rtol=1e-5)
    np.testing.assert_allclose(held["y"], y, rtol=1e-5)
    assert held["curve"]["levels"][0] == 0.1
    assert held["curve"]["levels"][-1] == 0.99
    assert held["positions"][1] == fitted.axes_[1].positions(X["dose"]).tolist()


def test_the_bound_breaks_where_its_meaning_changes(fitted, tmp_path):
    charts = page(fitted, tmp_path / "page.html")["charts"]
    assert [chart["title"].split(":")[0] for chart in charts] == ["Bound", "Relevance"]
    series = charts[0]["series"]
    assert [one["x"][0] - 1 for one in series] == list(fitted.phase_starts_)
    np.testing.assert_allclose([y for one in series for y in one["y"]], fitted.bound_history_, rtol=1e-6)


def quick_network() -> NeuralTensorCompletion:
    return NeuralTensorCompletion(
        rank=2, hidden=(8,), max_epochs=2, n_members=2, weight_decay=1.0, random_state=0, progress=False
    )


@pytest.mark.parametrize(
    ("model", "titles", "has_factors"),
    [
        (FunBaT(2, "tucker", random_state=0, progress=False, max_iter=80, tol=0.1), ["Bound"], True),
        (FunBaT(1, likelihood="student-t", main_effects=False, random_state=0, progress=False), ["Bound"], True),
        (BayesianCP(2, random_state=0, progress=False, max_iter=80, tol=0.1), ["Bound", "Relevance"], True),
        (BayesianTucker(2, random_state=0, progress=False, max_iter=80, tol=0.1), ["Bound"], True),
        (quick_network(), ["Validation of the networks", "Weights of the candidates"], False),
        (AlternatingMinimization(2, random_state=0, progress=False, tol=0.1), ["Error of the rows fitted"], True),
        (DAIN(quick_network(), ratio=0.25, random_state=0), ["First model", "Second model"], False),
        (MaskedParafac(2, random_state=0), [], True),
        (MaskedTucker(2, random_state=0, tol=1e-3), ["Error of the cells fitted"], True),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "fit") else None,
)
def test_every_kind_of_model_of_tables_has_a_page(model, titles, has_factors, tmp_path):
    X, y = table()
    model.fit(X, y)
    if hasattr(model, "save"):
        model.save(tmp_path / "model")
        model = pt.load(tmp_path / "model")
    found = page(model, tmp_path / "page.html", data=(X[:20], y[:20]))
    assert set(titles) <= {chart["title"].split(":")[0] for chart in found["charts"]}
    assert bool(found["factors"]) == has_factors
    assert found["shared"] == (getattr(model, "core_", None) is None)
    for run in found["runs"]:
        curves = unpacked(run)
        assert np.isfinite(curves).all()
        axes = getattr(model, "axes_", None) or model.estimator_.axes_
        X_run = rows_of(run, axes, len(curves) - 1)
        np.testing.assert_allclose(curves[-1][0], model.predict(X_run), atol=np.ptp(curves[-1]) / 60_000 + 1e-12)


def test_counts_have_the_ends_of_their_own_intervals(tmp_path):
    X, y = table()
    model = BayesianCP(1, likelihood="poisson", random_state=0, progress=False, max_iter=80, tol=0.1)
    model.fit(X[["dose", "cell <i>"]], np.round(np.exp(y)))
    curves = unpacked(page(model, tmp_path / "page.html")["runs"][1])
    np.testing.assert_allclose(curves[:, 1:], curves[:, 1:].round(), atol=np.ptp(curves) / 60_000)
    assert (curves[:, 3] <= curves[:, 1]).all()


def test_texts_of_the_user_cannot_end_the_script_or_open_a_tag(fitted, tmp_path):
    found = page(fitted, tmp_path / "page.html", title=HOSTILE, value="<img src=x>")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE in found["runs"][2]["texts"]
    assert found["title"] == HOSTILE
    assert "<img src" not in text
    assert "</script><b>" not in text
    assert "<title>&lt;/script&gt;&lt;b&gt;&amp;amp;" in text


def test_the_page_needs_no_other_file(fitted, tmp_path):
    page(fitted, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|<link[^>]*stylesheet|@import|@font-face", text[:20_000])
    assert re.findall(r'<link [^>]*href="([^"]*)"', text) == ["data:,"]
    assert "<!-- " not in text[-5_000:]
    assert len(text) < 6e6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": 999}, "budget: expected an integer of at least 1000, got 999"),
        ({"budget": 1e5}, "budget: expected an integer of at least 1000, got 100000.0"),
        ({"data": (table()[0][["day"]], np.zeros(160))}, r"data: expected the columns \['day', 'dose', 'cell <i>'\]"),
        ({"data": (table()[0], np.zeros(3))}, r"data: expected 160 values, some of them finite, got shape \(3,\)"),
        ({"data": (table()[0], np.full(160, np.nan))}, "data: expected 160 values, some of them finite"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(fitted, tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        write_page(fitted, tmp_path / "page.html", progress=False, **given)
    assert list(tmp_path.iterdir()) == []


def test_models_without_modes_and_folders_that_are_not_there_are_refused(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"model: expected one of tables that is fitted .* got BSC without axes_"):
        write_page(BSC(2), tmp_path / "page.html")
    with pytest.raises(ValueError, match="got FunBaT without axes_"):
        write_page(FunBaT(), tmp_path / "page.html")
    with pytest.raises(ValueError, match="path: expected a name in a folder that exists"):
        write_page(fitted, tmp_path / "no" / "page.html")


def test_without_plotly_it_is_said_how_to_get_it(fitted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "plotly.offline", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pages need plotly: pip install plotly"):
        write_page(fitted, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.1, 1.0, 1e7], ["0.1", "1", "1e+07"]),
        ([1_700_000_000.1, 1_700_000_000.2], ["1700000000.1", "1700000000.2"]),
        (pd.DatetimeIndex(["2024-01-01", "2024-03-01"]), ["2024-01-01", "2024-03-01"]),
        (pd.DatetimeIndex(["2024-01-01", "2024-03-01 12:00"]), ["2024-01-01 00:00:00", "2024-03-01 12:00:00"]),
        (pd.Index([10, "10", True], dtype=object), ["10", "'10'", "True"]),
        (pd.DatetimeIndex(["2024-01-01"], tz="Asia/Tokyo"), ["2024-01-01"]),
    ],
)
def test_values_are_written_as_readers_know_them_and_never_alike(values, shown):
    assert texts(pd.Index(values)) == shown


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 1e12])
def test_packed_curves_come_back_within_a_65000th_of_their_span(scale):
    values = 1e3 + scale * np.random.default_rng(0).normal(size=(4, 3, 5))
    values[1, 0, 2], values[2] = np.inf, np.nan
    found = unpacked(packed(values) | {"stats": 3})
    finite = np.isfinite(values)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    for curve in (0, 1, 3):
        error = np.abs(found[curve] - values[curve])[finite[curve]]
        assert error.max() <= np.ptp(values[curve][finite[curve]]) / 65_000 + 1e-12


@pytest.mark.parametrize(("n", "most"), [(1, 1), (1, 9), (5, 1), (5, 2), (5, 5), (1000, 60)])
def test_places_are_spread_over_the_whole_list(n, most):
    places = spread(n, most)
    assert len(places) == min(n, most)
    assert places[0] == 0
    assert most == 1 or places[-1] == n - 1
    assert np.ptp(np.diff(places), axis=0) <= 1 if len(places) > 2 else True


def test_a_model_of_one_mode_has_one_curve():
    X = pd.DataFrame({"day": np.arange(30.0)})
    model = FunBaT(rank=1, random_state=0, progress=False).fit(X, np.sin(X["day"] / 5))
    (run,) = runs(model, 1000, [None])
    assert run.others == []
    assert run.values.shape == (1, 7, len(run.along))


def test_the_command_writes_the_page_beside_the_model(fitted, tmp_path, monkeypatch):
    fitted.save(tmp_path / "my.model")
    X, y = table(30, seed=2)
    X.assign(y=y).to_csv(tmp_path / "rows.csv", index=False)
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", lambda url: opened.append(url))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["view", *arguments])
        assert result.exit_code == code, result.output
        return result.output

    assert run("my.model", "--budget", "1000") == "Wrote my.model.html\n"
    assert content(Path("my.model.html"))["title"] == "my.model"
    assert opened == []
    run("my.model", "--out", "p.html", "--data", "rows.csv", "--value", "y", "--open", "--budget", "1000")
    assert content(Path("p.html"))["held"]["n"] == 30
    assert content(Path("p.html"))["value"] == "y"
    assert opened == [(tmp_path / "p.html").as_uri()]
    assert "--value: expected the column of values" in run("my.model", "--data", "rows.csv", code=2)
    assert "budget: expected an integer of at least 1000, got 5" in run("my.model", "--budget", "5", code=2)
    assert "path: expected a name in a folder that exists" in run("my.model", "--out", "no/p.html", code=2)


@pytest.mark.parametrize("model", [BSC(2, random_state=0, progress=False), quick_network()], ids=["BSC", "network"])
def test_info_describes_models_of_other_kinds(model, tmp_path):
    X, y = table()
    model.fit(np.random.default_rng(0).normal(size=(30, 4))) if isinstance(model, BSC) else model.fit(X, y)
    model.save(tmp_path / "model")
    result = CliRunner().invoke(app, ["info", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{type(model).__name__}, written by probtensor")
    assert ("dose: continuous, 6 coordinates" in result.output) == (not isinstance(model, BSC))
