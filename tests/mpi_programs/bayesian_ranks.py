"""Bayesian CP on rows dealt to several ranks, against the serial fit."""

import numpy as np

from probtensor.comm import abort_on_error, world
from probtensor.models import BayesianCP, BayesianTucker


def main() -> None:
    comm = world()
    with abort_on_error(comm):
        rng = np.random.default_rng(0)
        X = np.stack([rng.integers(0, size, 600) for size in (9, 8, 7)], axis=1)
        y = np.sin(X[:, 0]) * np.cos(X[:, 1]) * (X[:, 2] - 3) + 0.1 * rng.normal(size=len(X))
        counts = rng.poisson(np.exp(y)).astype(float)
        positive = {"prior": "gamma", "random_state": 0, "progress": False}
        levels = np.digitize(y, [-1.0, 0.0, 1.0]).astype(float)
        ends = np.linspace(0, 600, comm.size + 1).astype(int) if comm.size > 1 else [0, 600]
        mine = slice(ends[comm.rank], ends[comm.rank + 1])
        for model, values in (
            (BayesianCP(3, random_state=0, progress=False, tol=1e-2, calibration=0.4), y),
            (BayesianCP(2, guide="mean_field", n_steps=20, batch_size=150, random_state=0, progress=False), y),
            (BayesianCP(2, likelihood="ordinal", random_state=0, progress=False, tol=1e-1), levels),
            (BayesianCP(1, guide="low_rank", n_steps=10, random_state=0, progress=False, calibration=0), y),
            (BayesianCP(3, tol=1e-2, calibration=0.4, **positive), np.exp(y)),
            (BayesianCP(3, tol=1e-1, n_init=2, likelihood="poisson", **positive), counts),
            (BayesianTucker(2, random_state=0, progress=False, tol=1e-2), y),
            (BayesianCP(3, random_state=0, progress=False, tol=1e-2, n_members=2, calibration=0.4), y),
        ):
            here = model.fit(X[mine], values[mine], comm=comm)
            found = np.stack(here.predict(X, return_std=True)), here.relevance_, here.bound_history_
            assert len(set(comm.gather_bytes(found[0].tobytes()))) == 1, "the same bits on all ranks"
            alone = model.fit(X, values)
            wanted = np.stack(alone.predict(X, return_std=True)), alone.relevance_, alone.bound_history_
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        if comm.is_root:
            print(f"ok on {comm.size}", flush=True)


if __name__ == "__main__":
    main()
