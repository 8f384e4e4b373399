"""The command: with a recording stand-in for the model, then with the model itself, and the demonstration."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from sklearn.exceptions import ConvergenceWarning
from typer.testing import CliRunner

import probtensor
import probtensor.demo  # before the stand-in takes the model's place
from probtensor.axes import CategoricalAxis, ContinuousAxis, axis_from_state
from probtensor.cli import app, fit
from probtensor.comm import Serial
from probtensor.data import resolve_axes
from probtensor.datasets import load_il2
from probtensor.demo import run_demo, split_rows
from probtensor.kernels import Linear, Matern, Periodic, Sum, White
from probtensor.metrics import rmse
from probtensor.models import FunBaT  # the model, not the stand-in
from probtensor.persistence import load, write_state

CSV = "day,station,value\n0.5,007,1.25\n1.5,007,\n1.5,12,3.5\n2.5,12,4.5\n"


class Toy:
    """Stands in for the model: predicts the coordinate of the first column, with deviation 2."""

    made: Toy

    def __init__(self, **settings):
        self.settings = settings
        Toy.made = self

    def fit(self, X, y, **running):
        self.X, self.y, self.running = X, y, running
        self.axes_ = tuple(axis.fit(X[axis.name]) for axis in resolve_axes(X, self.settings.get("axes")))
        self.finish()
        return self

    def finish(self):
        self.form, self.noise_std_, self.bound_, self.n_iter_ = "tucker", 0.25, -12.5, 7
        self.converged_, self.stop_reason_ = True, "the bound changed by less than tol"
        self.hyperparameters_ = {axis.name: {"lengthscale": np.array([0.5, 2.0])} for axis in self.axes_}

    def save(self, path):
        write_state(path, "probtensor.models.toy.Toy", {}, {"axes": [axis.to_state() for axis in self.axes_]})

    @classmethod
    def from_state(cls, arrays, meta):
        toy = cls()
        toy.axes_ = tuple(axis_from_state(state) for state in meta["axes"])
        toy.finish()
        return toy

    def factor(self, name, at=None):
        return np.zeros((len(at), 3)), np.ones((len(at), 3))

    def predict(self, X, return_std=False):
        Toy.seen = X
        mean = np.asarray(X.iloc[:, 0], dtype=float)
        return (mean, np.full(len(X), 2.0)) if return_std else mean

    def predict_interval(self, X, coverage=0.9):
        if not 0 < coverage < 1:
            raise ValueError(f"coverage: expected a number between 0 and 1,\n got {coverage}")
        mean = self.predict(X)
        return mean - coverage, mean + coverage


@pytest.fixture
def toy(monkeypatch):
    module = types.ModuleType("probtensor.models.toy")
    module.Toy = Toy
    monkeypatch.setattr(Toy, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("probtensor.models.FunBaT", Toy, raising=False)


@pytest.fixture
def folder(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_text(CSV)
    return tmp_path


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


FIT = ("fit", "data.csv", "--value", "value", "--categorical", "station", "--out", "my.model")


def test_fit_passes_the_table_and_every_setting_to_the_model(folder):
    options = (
        "--rank",
        "3,2",
        "--form",
        "cp",
        "--max-iter",
        "9",
        "--tol",
        "1e-3",
        "--damping",
        "0.5",
        "--likelihood",
        "gaussian",
    )
    options += ("--no-main-effects", "--starts", "5")
    result = run(*FIT, *options, "--duplicates", "mean", "--seed", "4", "--quiet", "--nu", "2.5")
    axes = Toy.made.settings.pop("axes")
    assert axes == (ContinuousAxis("day", Matern(2.5) + White()), CategoricalAxis("station"))
    assert Toy.made.settings == {
        **{"rank": (3, 2), "form": "cp", "max_iter": 9, "tol": 1e-3, "damping": 0.5, "likelihood": "gaussian"},
        **{"main_effects": False, "n_init": 5, "duplicates": "mean", "random_state": 4, "progress": False},
    }
    assert Toy.made.X["day"].tolist() == [0.5, 1.5, 2.5]  # the row without a value is a hole
    assert Toy.made.y.tolist() == [1.25, 3.5, 4.5]
    assert "Fitted 3 values in 7 iterations" in result.stdout
    assert Path("my.model").is_file()


def test_checkpoints_are_passed_on(folder):
    run(*FIT)
    running = Toy.made.running
    assert isinstance(running.pop("comm"), Serial)
    assert running == {"checkpoint": None, "checkpoint_every": 10, "resume": False}
    run(*FIT, "--checkpoint", "states", "--checkpoint-every", "3", "--resume")
    assert Toy.made.running | {"comm": 0} == {
        **{"comm": 0, "checkpoint": Path("states"), "checkpoint_every": 3, "resume": True}
    }


def test_settings_that_were_not_given_are_left_to_the_model(folder):
    Path("data.csv").write_text("day,station,value\n0.5,a,1\n1.5,b,2\n2.5,c,3\n")
    run(*FIT)
    assert Toy.made.settings["rank"] == 6
    assert Toy.made.settings["axes"][0] == ContinuousAxis("day")
    assert not {"max_iter", "tol", "n_init"} & set(Toy.made.settings)


def test_defaults_that_help_shows_are_those_of_the_model():
    model = {name: parameter.default for name, parameter in inspect.signature(FunBaT).parameters.items()}
    kernel = ContinuousAxis().kernel
    assert isinstance(kernel, Sum)
    model["nu"] = kernel.parts[0].nu
    assert kernel == Matern(model["nu"]) + White()
    shown = {option.name: option.show_default for option in typer.main.get_command(app).commands["fit"].params}
    for name, option in {"n_init": "starts", "max_iter": "max_iter", "tol": "tol", "nu": "nu", "rank": "rank"}.items():
        assert shown[option].split(",")[0] == str(model[name])
    command = inspect.signature(fit).parameters
    for name in ("damping", "form", "duplicates", "likelihood"):
        assert command[name].default == model[name]
    assert command["no_main_effects"].default is not model["main_effects"]


def test_the_default_rank_fits_an_aspect_of_few_labels(folder):
    run(*FIT, "--form", "tucker")  # three days, two stations
    assert Toy.made.settings["rank"] == (3, 2)
    run(*FIT)
    assert Toy.made.settings["rank"] == 6


def test_fit_says_what_each_column_was_taken_for(folder):
    Path("data.csv").write_text("day,when,week,station,value\n0.5,2024-01-31,1,007,1\n1.5,2024-02-01,2,12,2\n")
    lines = run(*FIT).stdout.splitlines()
    assert lines[:4] == [
        "day: continuous, 2 coordinates from 0.5 to 1.5, Matern(nu=1.5) + White()",
        "when: continuous, 2 coordinates from 2024-01-31 00:00:00 to 2024-02-01 00:00:00, Matern(nu=1.5) + White()",
        "week: categorical, 2 labels: 1, 2; if near numbers mean alike: --continuous week",
        "station: categorical, 2 labels: 007, 12",
    ]


@pytest.mark.parametrize("text", ["2024-01-31 or so", "2024-13-31", "Monday"])
def test_words_that_are_no_dates_are_labels(folder, text):
    Path("data.csv").write_text(f"when,value\n{text},1\n2024-01-31,2\n")
    run("fit", "data.csv", "--value", "value", "--out", "m")
    assert Toy.made.settings["axes"] == (CategoricalAxis("when"),)
    run("fit", "data.csv", "--value", "value", "--out", "m", "--categorical", "when")
    assert Toy.made.X["when"].tolist() == [text, "2024-01-31"]


def test_dates_that_are_named_categorical_are_labels(folder):
    Path("data.csv").write_text("when,value\n2024-01-30,1\n2024-01-31,2\n")
    run("fit", "data.csv", "--value", "value", "--out", "m", "--categorical", "when")
    assert Toy.made.settings["axes"] == (CategoricalAxis("when"),)


def test_labels_that_are_named_categorical_stay_as_written(folder):
    run(*FIT)
    assert Toy.made.X["station"].tolist() == ["007", "12", "12"]
    pd.DataFrame({"day": [0.5, 1.5], "station": [7, 12], "value": [1.0, 2.0]}).to_parquet("data.parquet")
    run("fit", "data.parquet", "--value", "value", "--categorical", "station", "--out", "my.model")
    assert Toy.made.X["station"].tolist() == [7, 12]


def test_smoothness_of_one_column_overrules_that_of_all(folder):
    pd.DataFrame({"t": [0.5], "x": [1.5], "value": [1.0]}).to_csv("data.csv", index=False)
    run("fit", "data.csv", "--value", "value", "--out", "m", "--nu", "x=0.5", "--nu", "2.5")
    assert [axis.kernel for axis in Toy.made.settings["axes"]] == [Matern(2.5) + White(), Matern(0.5) + White()]


def test_the_default_smoothness_said_aloud_changes_nothing(folder):
    run(*FIT, "--nu", "1.5")
    assert Toy.made.settings["axes"][0] == ContinuousAxis("day")


def test_ignored_columns_are_no_aspects(folder):
    Path("data.csv").write_text("day,note,value\n0.5,hello,1\n")
    run("fit", "data.csv", "--value", "value", "--out", "m", "--ignore", "note")
    assert list(Toy.made.X.columns) == ["day"]


def test_predict_keeps_the_table_as_it_is_written_and_adds_four_columns(folder):
    run(*FIT)
    Path("new.csv").write_text("note,station,day\nNA,007,0.10\n,99,7\n")
    result = run("predict", "my.model", "new.csv", "--coverage", "0.5")
    assert result.stdout.splitlines() == [
        "note,station,day,mean,std,lower,upper",
        "NA,007,0.10,0.1,2.0,-0.4,0.6",
        ",99,7,7.0,2.0,6.5,7.5",
    ]
    assert list(Toy.seen.columns) == ["day", "station"]


def test_predict_reads_labels_with_the_type_that_the_model_was_fitted_on(folder):
    Path("data.csv").write_text("day,station,value\n0.5,007,1\n1.5,x9,2\n")
    run(*FIT)
    Path("new.csv").write_text("day,station\n0.5,007\n")
    run("predict", "my.model", "new.csv")
    assert Toy.seen["station"].tolist() == ["007"]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_predict_writes_a_file(folder, suffix):
    run(*FIT)
    Path(f"new.{suffix}").write_text("day,station\n1,12\n".replace(",", "\t" if suffix == "tsv" else ","))
    result = run("predict", "my.model", f"new.{suffix}", "--out", f"pred.{suffix}")
    assert result.stdout == ""
    table = pd.read_csv(f"pred.{suffix}", sep=None, engine="python")
    assert table.to_dict("list") == {
        **{"day": [1], "station": [12]},
        **{"mean": [1.0], "std": [2.0], "lower": [pytest.approx(0.1)], "upper": [pytest.approx(1.9)]},
    }


def test_dates_are_coordinates_in_fit_and_predict(folder):
    Path("data.csv").write_text("when,value\n2024-01-01,1\n2024-01-03,2\n")
    run("fit", "data.csv", "--value", "value", "--continuous", "when", "--out", "m")
    Path("new.csv").write_text("when\n2024-01-02\n")
    assert run("predict", "m", "new.csv").stdout.startswith("when,mean,std,lower,upper\n2024-01-02,")
    assert Toy.seen["when"].tolist() == [pd.Timestamp("2024-01-02")]


def test_info_shows_what_the_file_holds(folder):
    run(*FIT)
    text = run("info", "my.model").stdout
    for words in (
        f"Toy, written by probtensor {probtensor.__version__}",
        "form                        tucker",
        "noise (standard deviation)  0.25",
        "bound on the log evidence   -12.500000",
        "iterations                  7",
        "converged                   yes (the bound changed by less than tol)",
        "day: rank 3, continuous, 3 coordinates from 0.5 to 2.5, Matern(nu=1.5) + White()",
        "station: rank 3, categorical, 2 labels: ",
        "lengthscale                 0.5  2",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (Matern(2.5) + Linear(), "lengthscale (days)          0.5  2"),
        (Periodic(7.0), "lengthscale                 0.5  2"),
    ],
)
def test_info_gives_a_unit_to_lengthscales_that_have_one(folder, kernel, words):
    when = pd.DataFrame({"when": pd.to_datetime(["2024-01-01", "2024-01-03"])})
    Toy(axes=[ContinuousAxis("when", kernel)]).fit(when, [1.0, 2.0]).save("m")
    text = run("info", "m").stdout
    assert words in text
    assert f"2 coordinates from 2024-01-01 00:00:00 to 2024-01-03 00:00:00, {kernel}" in text


def test_version_and_help():
    assert run("--version").stdout == f"probtensor {probtensor.__version__}\n"
    assert "probtensor fit data.csv --value y --continuous time" in run("--help").stdout
    for command in ("demo", "fit", "predict", "info"):
        assert f"Usage: root {command}" in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "no.csv", "--value", "value", "--out", "m"), "Error: no.csv: No such file or directory"),
        (("fit", "data.xls", "--value", "value", "--out", "m"), "expected a name that ends in one of ('.csv', "),
        (("fit", "data.csv", "--value", "value", "--out", "no/m"), "--out: expected a name in a folder that exists"),
        (
            ("fit", "words.csv", "--value", "value", "--out", "m"),
            "expected real numbers in 'value', got dtype str, such as",
        ),
        (("fit", "holes.csv", "--value", "value", "--out", "m"), "holes.csv: expected values and columns beside them"),
        (("fit", "alone.csv", "--value", "value", "--out", "m"), "alone.csv: expected values and columns beside them"),
        (("fit", "data.csv", "--value", "speed", "--out", "m"), "expected columns among ['day', 'station', 'value']"),
        ((*FIT, "--continuous", "hour"), "continuous: expected columns among"),
        ((*FIT, "--ignore", "hour"), "--ignore: expected columns among"),
        ((*FIT, "--rank", "3;2"), "--rank: expected a number, or one for each aspect as in 3,2,4, got '3;2'"),
        ((*FIT, "--nu", "smooth"), "--nu: expected a number"),
        ((*FIT, "--resume"), "--resume: expected the folder of the checkpoints as --checkpoint, got none"),
        ((*FIT, "--nu", "1"), "nu: expected 0.5, 1.5 or 2.5, got 1.0"),
        ((*FIT, "--nu", "station=1.5"), "--nu: expected a continuous column among ['day'], got 'station'"),
        (("info", "data.csv"), "data.csv is not a probtensor model"),
        (("info", "nothing"), "no model file at nothing"),
        (("predict", "nothing", "data.csv"), "no model file at nothing"),
        (("demo", "--holdout", "1.5"), "holdout: expected a share between 0 and 1"),
    ],
)
def test_what_is_wrong_with_the_input_is_one_line_and_code_2(folder, arguments, words):
    Path("words.csv").write_text("day,value\n0.5,1.0\n1.5,n.d.\n")
    Path("holes.csv").write_text("day,value\n0.5,\n1.5,\n")
    Path("alone.csv").write_text("value\n0.5\n")
    result = run(*arguments, code=2)
    assert "Fitted" not in result.stdout
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        ("day,station,mean\n1,12,3\n", (), "expected no columns called mean, std, lower or upper, got ['mean']"),
        ("day\n1\n", (), "columns: expected ['station'] in the table, got ['day']"),
        ("day,station\n1,12\n", ("--coverage", "2"), "coverage: expected a number between 0 and 1, got 2.0"),
        ("day,station\n1,12\n", ("--out", "p.xls"), "--out: expected a name that ends in .csv, .tsv or .parquet"),
        ("day,station\nsoon,12\n", (), "day"),
    ],
)
def test_what_is_wrong_with_a_table_to_predict_is_one_line(folder, table, options, words):
    run(*FIT)
    Path("new.csv").write_text(table)
    result = run("predict", "my.model", "new.csv", *options, code=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_traceback_is_shown_when_asked_for(folder, monkeypatch):
    monkeypatch.setenv("PROBTENSOR_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="no model file"):
        run("info", "nothing")


def test_warnings_are_one_line_on_stderr(folder, monkeypatch):
    def warn(self, X, y, fit=Toy.fit, **running):
        warnings.warn("not converged:\n raise max_iter", UserWarning, stacklevel=2)
        return fit(self, X, y, **running)

    monkeypatch.setattr(Toy, "fit", warn)
    assert run(*FIT).stderr == "Warning: not converged: raise max_iter\n"


def test_a_warning_is_said_once(folder, monkeypatch):
    def warn(self, X, return_std=False, predict=Toy.predict):
        warnings.warn("unknown label", UserWarning, stacklevel=2)
        return predict(self, X, return_std)

    run(*FIT)
    monkeypatch.setattr(Toy, "predict", warn)
    assert run("predict", "my.model", "data.csv").stderr == "Warning: unknown label\n"


def test_help_answers_without_loading_what_the_commands_need():
    code = (
        "import sys\nfrom probtensor.cli import app\napp(['fit', '--help'], standalone_mode=False)\n"
        "ours = sorted(name for name in sys.modules if name.startswith('probtensor'))\n"
        "heavy = {'numpy', 'pandas', 'torch', 'pyro', 'mpi4py', 'matplotlib', 'scipy', 'sklearn', 'tensorly'}\n"
        "print('LOADED', ours, *heavy & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "--continuous" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED ['probtensor', 'probtensor.cli']"


def test_a_table_is_completed_from_the_command_line(tmp_path):
    """The model itself: noisy products of a wave in time and a weight of each station, a third of the cells hidden."""
    rng = np.random.default_rng(0)
    cells = pd.DataFrame([(day / 4, station) for day in range(24) for station in "abcde"], columns=["day", "station"])
    weight = cells["station"].map(dict(zip("abcde", (1.0, -2.0, 0.5, 1.5, -1.0), strict=True)))
    cells["value"] = 10.0 + weight * np.sin(cells["day"]) + 0.05 * rng.normal(size=len(cells))
    hidden = rng.uniform(size=len(cells)) < 0.33
    cells[~hidden].to_csv(tmp_path / "data.csv", index=False)
    cells[hidden].drop(columns="value").to_csv(tmp_path / "new.csv", index=False)
    paths = {name: str(tmp_path / name) for name in ("data.csv", "new.csv", "pred.csv", "my.model")}

    run("fit", paths["data.csv"], "--value", "value", "--rank", "2", "--form", "cp", "--out", paths["my.model"], "-q")
    code = "from probtensor.cli import app; app()"
    arguments = ["predict", paths["my.model"], paths["new.csv"], "--out", paths["pred.csv"]]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    predicted = pd.read_csv(paths["pred.csv"])
    truth = cells[hidden].reset_index(drop=True)
    assert predicted.columns.tolist() == ["day", "station", "mean", "std", "lower", "upper"]
    pd.testing.assert_frame_equal(predicted[["day", "station"]], truth[["day", "station"]], check_dtype=False)
    assert np.sqrt(np.mean((predicted["mean"] - truth["value"]) ** 2)) < 0.15  # the spread of the values is 1
    assert (predicted["lower"] < predicted["mean"]).all()
    assert (predicted["mean"] < predicted["upper"]).all()
    assert truth["value"].between(predicted["lower"], predicted["upper"]).mean() > 0.7
    text = run("info", paths["my.model"]).stdout
    assert "continuous, 24 coordinates from 0.0 to 5.75" in text
    assert "categorical, 5 labels: a, b, c, d, e" in text


@pytest.mark.mpi
def test_ranks_share_the_work_of_the_command_and_rank_zero_alone_speaks(tmp_path, run_mpi):
    X, y = load_il2()
    table = X.assign(y=y)[::9]
    table.to_csv(tmp_path / "il2.csv", index=False)
    arguments = ["fit", tmp_path / "il2.csv", "--value", "y", "--rank", "2", "--max-iter", "12", "--starts", "1"]
    alone = run(*map(str, arguments), "--out", str(tmp_path / "alone.model"), "--tol", "10", "--quiet")
    more = ["--tol", "10", "--quiet", "--checkpoint", tmp_path / "states", "--checkpoint-every", "5"]
    together = run_mpi("command.py", 3, *arguments, "--out", tmp_path / "ranks.model", *more)
    assert together.stdout.replace("ranks.model", "alone.model") == alone.stdout
    assert together.stderr == alone.stderr  # a warning, said once
    assert len(list((tmp_path / "states").iterdir())) == 2
    expected = load(tmp_path / "alone.model").predict(X, return_std=True)
    for ours, theirs in zip(load(tmp_path / "ranks.model").predict(X, return_std=True), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    again = run_mpi("command.py", 2, *arguments, "--out", tmp_path / "resumed.model", *more, "--resume")
    assert "Saved" in again.stdout
    wrong = run_mpi("command.py", 2, *arguments, "--out", tmp_path / "no" / "m", check=False)
    assert wrong.returncode != 0
    assert wrong.stderr.startswith("Error: --out: expected a name in a folder that exists")
    assert wrong.stderr.count("Error: --out") == 1


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Two small demonstrations with the same seed, and what they printed."""
    settings = {"seed": 3, "cp_rank": 2, "tucker_rank": 2, "parafac_ranks": (1, 3), "max_iter": 3, "progress": False}
    results, lines = [], []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            results.append(run_demo(tmp_path_factory.mktemp("demo") / "new", **settings, echo=lines.append))
    return results, lines


def test_the_demo_compares_four_methods_and_writes_its_files(demos):
    (result, _), lines = demos
    assert [score.rmse for score in result.scores] == sorted(score.rmse for score in result.scores)
    methods = {score.method: score for score in result.scores}
    assert set(methods) == {
        *("FunBaT CP, rank 2", "FunBaT Tucker, rank 2"),
        *("TensorLy masked PARAFAC, rank 3", "per-mode biases"),
    }
    assert methods["per-mode biases"].rmse == pytest.approx(0.127, abs=0.01)
    assert methods["TensorLy masked PARAFAC, rank 3"].rmse == pytest.approx(0.064, abs=0.006)
    for name, score in methods.items():
        assert (score.coverage is not None) == name.startswith("FunBaT")
        assert score.rmse < 0.2
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    text = "\n".join(lines)
    for words in (*methods, str(result.picture), *map(str, result.models), "3840 cells to learn from, 960 hidden"):
        assert words in text


def test_the_demo_gives_the_same_numbers_and_files_for_the_same_seed(demos):
    first, second = demos[0]
    assert [score[:3] for score in first.scores] == [score[:3] for score in second.scores]
    assert first.picture.read_bytes() == second.picture.read_bytes()
    for one, other in zip(first.models, second.models, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_saved_model_of_the_demo_predicts_what_it_predicted(demos):
    (result, _), _ = demos
    X, y = load_il2()
    _, test = split_rows(len(y), 0.2, seed=3)
    score = next(score for score in result.scores if "CP" in score.method)
    model = load(next(path for path in result.models if "cp" in path.name))
    assert rmse(y[test], model.predict(X.iloc[test])) == score.rmse


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, 1e-9, float("nan")])
def test_a_holdout_that_leaves_nothing_is_named(holdout):
    with pytest.raises(ValueError, match="holdout: expected a share between 0 and 1 that splits 10 rows"):
        split_rows(10, holdout, seed=0)
