"""A fit that ends before its time goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import ConvergenceWarning

from probtensor.checkpoints import Checkpoints, CheckpointWarning
from probtensor.models import FunBaT

if TYPE_CHECKING:
    from tests.conftest import RunMpi

SETTINGS = {"rank": 2, "n_init": 2, "tol": 0.0, "max_iter": 24, "random_state": 0, "progress": False}
CASES = {
    "heavy tails, calibrated": {"calibration": 0.2},
    "gaussian": {"likelihood": "gaussian", "nugget": False, "calibration": 0},
    "counts": {"likelihood": "poisson", "rank": 1},
    "tucker": {"form": "tucker", "calibration": 0, "max_iter": 20},
    "one start, no seed": {"n_init": 1, "random_state": None, "calibration": 0.2},
}


class Interrupted(Exception):
    """The job ends here."""


def table(counts: bool = False) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"time": rng.integers(0, 30, 400) / 3, "cell": rng.choice(list("abcde"), 400)})
    clean = np.sin(X["time"]) * (1 + (X["cell"] == "c")) + (X["cell"] == "d")
    if counts:
        return X, rng.poisson(np.exp(0.5 + clean)).astype(float)
    return X, (clean + 0.1 * rng.standard_t(4, 400)).to_numpy()


def fit(case: str, folder: Path | None, **options: object) -> FunBaT:
    X, y = table(case == "counts")
    given = {} if folder is None else {"checkpoint": folder}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return FunBaT(**SETTINGS | CASES[case]).fit(X, y, **given | options)


def numbers(model: FunBaT) -> list[np.ndarray]:
    X, _ = table()
    found = [*model.predict(X, return_std=True), *model.predict_interval(X[:9]), np.array(model.bound_history_)]
    return [*found, model.relevance_, np.array(model.phase_starts_), np.array([model.n_iter_, model.y_mean_])]


def fit_interrupted(case: str, folder: Path, writes: int) -> None:
    """A fit whose job ends right after that many checkpoints."""
    done, write = [], Checkpoints.write

    def once_more(self, arrays, meta):
        write(self, arrays, meta)
        done.append(meta)
        if len(done) == writes:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "write", once_more)
        with pytest.raises(Interrupted):
            fit(case, folder, checkpoint_every=4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("writes", [1, 3, 4, 7])
def test_a_fit_that_was_interrupted_ends_with_the_same_bits(case, writes, tmp_path):
    fit_interrupted(case, tmp_path / "a", writes)
    assert len(list((tmp_path / "a").iterdir())) == min(writes, 2)
    resumed = fit(case, tmp_path / "a", checkpoint_every=4, resume=True)
    if case == "one start, no seed":  # the seed is in the file: going on twice is the same
        again = fit(case, tmp_path / "a", checkpoint_every=4, resume=True)
        for ours, theirs in zip(numbers(resumed), numbers(again), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        return
    whole = fit(case, tmp_path / "b", checkpoint_every=4)
    for ours, theirs in zip(numbers(resumed), numbers(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_checkpoints_change_nothing_where_rows_have_optimal_factors(tmp_path):
    for ours, theirs in zip(*(numbers(fit("heavy tails, calibrated", f)) for f in (None, tmp_path)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "empty", "a flipped bit"])
def test_a_damaged_file_is_passed_over_for_the_one_before(damage, tmp_path):
    fit_interrupted("gaussian", tmp_path / "a", 5)
    _, last = files(tmp_path / "a")
    data = bytearray(last.read_bytes())
    if damage == "a flipped bit":
        data[-9] ^= 1
    last.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "a flipped bit": bytes(data)}[damage])
    with pytest.warns(CheckpointWarning, match=rf"{last.name} .*looking for an earlier checkpoint"):
        resumed = fit("gaussian", tmp_path / "a", checkpoint_every=4, resume=True)
    whole = fit("gaussian", tmp_path / "b", checkpoint_every=4)
    for ours, theirs in zip(numbers(resumed), numbers(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_nothing_to_go_on_from_is_a_new_start(tmp_path):
    assert fit("gaussian", tmp_path / "new" / "folder", resume=True).n_iter_ == 24


def test_the_two_last_files_are_kept(tmp_path):
    fit("gaussian", tmp_path, checkpoint_every=5)
    assert [file.name for file in files(tmp_path)] == [f"checkpoint-{n:08d}.safetensors" for n in (25, 30)]


def test_checkpoints_of_another_fit_are_refused(tmp_path):
    fit("gaussian", tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint: expected a folder without checkpoints, .* resume=True goes on"):
        fit("gaussian", tmp_path)
    with pytest.raises(ValueError, match="checkpoint: expected one of a fit of these rows with these parameters"):
        fit("heavy tails, calibrated", tmp_path, resume=True)
    X, y = table()
    with pytest.raises(ValueError, match="checkpoint: expected one of a fit of these rows with these parameters"):
        FunBaT(**SETTINGS | CASES["gaussian"]).fit(X[1:], y[1:], checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("every", [0, 1.5, True, "2"])
def test_a_bad_interval_is_named(every, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every: expected an integer of at least 1, got"):
        fit("gaussian", tmp_path, checkpoint_every=every)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint: expected a folder to write to"):
        fit("gaussian", tmp_path / "file")


def test_sigterm_writes_a_checkpoint_and_ends_the_process(tmp_path, root):
    program = f"""
import sys
sys.path.insert(0, {str(root)!r})
from tests.test_checkpoints import *
CASES["gaussian"]["max_iter"] = 100_000
from pathlib import Path
fit("gaussian", Path({str(tmp_path)!r}), checkpoint_every=10**6)
"""
    environment = os.environ | {"PYTHONPATH": str(root)}
    waiter = "from probtensor.checkpoints import Checkpoints\nCheckpoints.due_ = Checkpoints.due\n"
    waiter += "Checkpoints.due = lambda self: print('sweep', flush=True) or self.due_()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", waiter + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    for _ in range(30):
        assert process.stdout.readline() == b"sweep\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    (file,) = files(tmp_path)
    assert int(file.stem.split("-")[1]) >= 30
    process.communicate()


@pytest.mark.mpi
def test_a_job_whose_ranks_are_killed_twenty_times_ends_at_the_uninterrupted_result(run_mpi: RunMpi, tmp_path):
    """Each time on another number of ranks, at a random iteration of a random rank."""
    rng = np.random.default_rng(0)
    for kill in range(20):
        n = 1 + kill % 3
        folder = tmp_path / "fit"
        result = run_mpi("killed_rank.py", n, folder, rng.integers(n), rng.integers(1, 4), check=False)
        assert result.returncode != 0
        assert time.time() - float((tmp_path / "killed").read_text()) < 10, f"kill {kill}"
        (tmp_path / "killed").unlink()
    assert run_mpi("killed_rank.py", 2, folder, -1, 0, timeout=120).stdout == "ok on 2\n"
