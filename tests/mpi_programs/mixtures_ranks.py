"""Mixtures and noisy-OR on points dealt to several ranks, against the same fit on one."""

import sys
from typing import Any

import numpy as np
import pytest

from probtensor.comm import Comm, Serial, abort_on_error, world
from probtensor.models import MoG, MoP, NoisyOR

SETTINGS: dict[str, Any] = {"n_components": 3, "random_state": 0, "progress": False}


def points(kind: str, holes: bool) -> np.ndarray:
    """Some thousand points, so that the start is on some of them only."""
    rng = np.random.default_rng(0)
    if kind == "noisy-or":
        fires = (rng.random((1500, 3, 1)) < 0.3) & (
            rng.random((1500, 3, 6)) < 0.9 * np.kron(np.eye(3), np.ones((1, 2)))
        )
        Y = fires.any(1).astype(float)
    else:
        Y = 2.0 * rng.integers(0, 3, (6000, 1)) + rng.normal(size=(6000, 4))
        Y = rng.poisson(np.exp(0.4 * Y)).astype(float) if kind == "mop" else Y
    Y[(rng.random(Y.shape) < 0.1) & holes] = np.nan
    return Y


def split(n: int, comm: Comm) -> slice:
    """Stretches of unequal length; of three ranks, the second has none."""
    ends = {1: [0, n], 2: [0, n // 3, n], 3: [0, n // 3, n // 3, n]}[comm.size]
    return slice(ends[comm.rank], ends[comm.rank + 1])


def check(model: Any, Y: np.ndarray, comm: Comm) -> None:
    model.fit(Y[split(len(Y), comm)], comm=comm)
    results = [model.components_, model.prior_, np.array(model.bound_history_), model.transform(Y[:50])]
    assert len(set(comm.gather_bytes(b"".join(x.tobytes() for x in results)))) == 1, "the ranks disagree"
    if comm.is_root:
        alone = type(model)(**model.get_params()).fit(Y, comm=Serial())
        expected = [alone.components_, alone.prior_, np.array(alone.bound_history_), alone.transform(Y[:50])]
        for x, right in zip(results, expected, strict=True):
            np.testing.assert_allclose(x, right, rtol=1e-10, atol=1e-12)


def main() -> None:
    comm = world()
    with abort_on_error(comm):
        for holes in (False, True):
            for covariance in ("diag", "full", "spherical"):
                check(MoG(covariance=covariance, n_init=2, renewals=2, **SETTINGS), points("mog", holes), comm)
            check(MoP(n_init=2, renewals=2, **SETTINGS), points("mop", holes), comm)
            check(NoisyOR(**SETTINGS, renewals=2, max_iter=30, tol=1e-5), points("noisy-or", holes), comm)
        with pytest.raises(
            ValueError, match=rf"^rank {comm.size - 1}: Y: expected counts" if comm.size > 1 else "^Y: "
        ):
            MoP().fit(np.full((5, 2), -1.0 if comm.rank == comm.size - 1 else 1.0), comm=comm)
    if comm.is_root:
        print(f"ok on {comm.size}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
