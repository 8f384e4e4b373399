"""A neural completion that ends before its time goes on at its epoch, and ends with the same bits.

On several ranks: ``test_completion_mpi.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import probtensor as pt
from probtensor.checkpoints import Checkpoints
from probtensor.models import NeuralTensorCompletion

SETTINGS = {"rank": 2, "hidden": (8,), "embedding": 4, "max_epochs": 5, "n_members": 2, "random_state": 0}
SETTINGS |= {"batch_size": 64, "patience": 3, "n_checkpoints": 2, "progress": False, "device": "cpu"}
CASES = {
    "gaussian": {},
    "counts": {"likelihood": "poisson"},
    "no biases, costco": {"biases": False, "head": "costco"},
    "no seed": {"random_state": None},
}


class Interrupted(Exception):
    """The job ends here."""


def table(case: str = "gaussian") -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    index = np.stack([rng.integers(0, size, 400) for size in (12, 10, 4)], axis=1)
    eta = rng.normal(size=12)[index[:, 0]] * rng.normal(size=10)[index[:, 1]] + rng.normal(size=4)[index[:, 2]]
    y = rng.poisson(np.exp(eta)) if case == "counts" else eta + 0.1 * rng.normal(size=400)
    return pd.DataFrame(index, columns=list("abc")), y.astype(float)


def fit(case: str, folder: Path | None, **options: object) -> NeuralTensorCompletion:
    given = {} if folder is None else {"checkpoint": folder, "checkpoint_every": 1}
    return NeuralTensorCompletion(**SETTINGS | CASES[case]).fit(*table(case), **given | options)


def numbers(model: NeuralTensorCompletion) -> list[np.ndarray]:
    X, y = table()
    y = np.round(np.abs(y)) if model.likelihood == "poisson" else y
    found = [*model.predict(X, return_std=True), model.influence(X[:20], y[:20], X[20:], y[20:])]
    return [*found, *model.validation_deviance_.values(), np.array(list(model.weights_.values()))]


@cache
def whole(case: str) -> list[np.ndarray]:
    """Numbers of the fit that was not interrupted."""
    return numbers(fit(case, None))


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
            fit(case, folder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("writes", [1, 4, 5])
def test_a_fit_that_was_interrupted_ends_with_the_same_bits(case, writes, tmp_path):
    fit_interrupted(case, tmp_path, writes)
    resumed = fit(case, tmp_path, resume=True)
    # The seed is in the file: going on twice is the same.
    expected = numbers(fit(case, tmp_path, resume=True)) if case == "no seed" else whole(case)
    for ours, theirs in zip(numbers(resumed), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_fit_goes_on_after_its_last_ensemble_began(tmp_path):
    fit_interrupted("gaussian", tmp_path, 12)
    resumed = fit("gaussian", tmp_path, resume=True)
    for ours, theirs in zip(numbers(resumed), whole("gaussian"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


CODE = """
import sys
from pathlib import Path
from tests.test_completion_checkpoints import fit
fit("gaussian", Path(sys.argv[1]), resume=True).save(sys.argv[2])
"""


def test_a_killed_fit_goes_on_and_ends_with_the_same_bits(tmp_path, root):
    folder, file = tmp_path / "a", tmp_path / "a.model"
    command = [sys.executable, "-c", CODE, str(folder), str(file)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    at = int(np.random.default_rng().integers(1, 8))
    with subprocess.Popen(command, env=environment, cwd=root) as process:
        end = time.monotonic() + 120
        while process.poll() is None and not list(folder.glob(f"checkpoint-{at:08d}*")) and time.monotonic() < end:
            time.sleep(0.001)
        process.kill()
    assert process.returncode in (-signal.SIGKILL, 0), f"at epoch {at}"
    subprocess.run(command, env=environment, cwd=root, check=True, timeout=120)
    for ours, theirs in zip(numbers(pt.load(file)), whole("gaussian"), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"killed at epoch {at}")


def test_checkpoints_of_another_fit_are_refused(tmp_path):
    X, y = table()
    films = pd.DataFrame({"size": np.arange(12.0)})
    given = {"X_val": X[:50], "y_val": y[:50], "side_information": {"a": films}}
    fit("gaussian", tmp_path, **given)
    with pytest.raises(ValueError, match="checkpoint: expected a folder without checkpoints"):
        fit("gaussian", tmp_path, **given)
    with pytest.raises(ValueError, match="checkpoint: expected one of a fit of these rows with these parameters"):
        fit("no biases, costco", tmp_path, resume=True, **given)
    for other in ({"y_val": y[50:100]}, {"side_information": {"a": films.assign(size=[1.0] + [0.0] * 11)}}):
        with pytest.raises(ValueError, match="checkpoint: expected one of a fit with these validation rows"):
            fit("gaussian", tmp_path, resume=True, **given | other)
    assert np.isfinite(fit("gaussian", tmp_path, resume=True, **given).predict(X)).all()
