"""Bayesian CP and Tucker with features of labels, on rows dealt to several ranks, against the serial fit."""

import warnings

import numpy as np
import pandas as pd
import pytest

from probtensor.comm import abort_on_error, world
from probtensor.estimator import UnknownLabelWarning
from probtensor.models import BayesianCP, BayesianTucker


def main() -> None:
    warnings.simplefilter("ignore", UnknownLabelWarning)
    comm = world()
    with abort_on_error(comm):
        rng = np.random.default_rng(0)
        X = np.stack([rng.integers(0, size, 600) for size in (15, 8)], axis=1)
        table = pd.DataFrame({"size": np.sin(np.arange(20.0)), "group": list("abcd") * 5})
        y = table["size"].to_numpy()[X[:, 0]] * (X[:, 1] - 3) + 0.1 * rng.normal(size=len(X))
        cold = np.stack([np.arange(12, 22), np.arange(10) % 8], axis=1)
        ends = np.linspace(0, 600, comm.size + 1).astype(int)
        mine = slice(ends[comm.rank], ends[comm.rank + 1])
        side = {"mode_0": table}
        for model in (
            BayesianCP(3, random_state=0, progress=False, tol=1e-2, calibration=0.4),
            BayesianTucker(2, random_state=0, progress=False, tol=1e-2),
        ):
            here = model.fit(X[mine], y[mine], side_information=side, comm=comm)
            found = np.stack(here.predict(cold, return_std=True)), here.bound_history_
            assert len(set(comm.gather_bytes(found[0].tobytes()))) == 1, "the same bits on all ranks"
            alone = model.fit(X, y, side_information=side)
            wanted = np.stack(alone.predict(cold, return_std=True)), alone.bound_history_
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        if comm.size > 1:
            other = table if comm.is_root else table[:18]
            with pytest.raises(ValueError, match="side_information: expected the same tables on every rank"):
                model.fit(X[mine], y[mine], side_information={"mode_0": other}, comm=comm)
        if comm.is_root:
            print(f"ok on {comm.size}", flush=True)


if __name__ == "__main__":
    main()
