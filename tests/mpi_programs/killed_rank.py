"""A fit with checkpoints of which one rank is killed; without one to kill it ends, and is compared with a whole one."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from probtensor.checkpoints import Checkpoints
from probtensor.comm import world
from probtensor.models import FunBaT
from tests.test_checkpoints import CASES, SETTINGS, fit, numbers, table


def main() -> None:
    folder, victim, sweeps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    comm = world()
    due, counted = Checkpoints.due, []

    def count(self: Checkpoints) -> bool:
        counted.append(1)
        if comm.rank == victim and len(counted) == sweeps:
            (folder.parent / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return due(self)

    Checkpoints.due = count
    case = "heavy tails, calibrated"
    X, y = table()
    rows = np.random.default_rng(comm.size).permutation(len(y))[comm.rank :: comm.size]
    options = {"checkpoint": folder, "checkpoint_every": 1, "resume": True, "comm": comm}
    settings = SETTINGS | CASES[case] | {"max_iter": 40}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = FunBaT(**settings).fit(X.iloc[rows], y[rows], **options)
    if comm.is_root:
        Checkpoints.due = due
        CASES[case] |= {"max_iter": 40}
        whole = fit(case, None)
        for ours, theirs in zip(numbers(model), numbers(whole), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        print(f"ok on {comm.size}", flush=True)


if __name__ == "__main__":
    main()
