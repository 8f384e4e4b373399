"""Sparse coding on points dealt to several ranks, against the same fit on one."""

import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from probtensor.comm import Comm, Serial, abort_on_error, world
from probtensor.models import BSC, DSC, GSC, MCA, MMCA, TSC, sparse_coding, sparse_fit

CODERS = [(cls, {}) for cls in (BSC, TSC, DSC, GSC, MCA, MMCA)] + [(GSC, {"full_covariance": True})]
SETTINGS = {"n_components": 4, "n_candidates": 3, "max_active": 2, "random_state": 0, "progress": False, "tol": 0.0}
SETTINGS |= {"annealing": 4, "renewals": 2, "max_iter": 4, "n_states": 8}


def points(N: int = 640, missing: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    S = rng.random((N, 3)) < 0.3
    Y = 4 * S @ np.kron(np.eye(3), np.ones((1, 3))) + 0.5 * rng.normal(size=(N, 9))
    Y[rng.random(Y.shape) < missing] = np.nan
    return Y


def shares(n: int, comm: Comm) -> slice:
    """Consecutive points of this rank, of unequal number; the second rank has none."""
    weights = np.arange(1, comm.size + 1.0)
    if comm.size > 2:
        weights[1] = 0
    ends = np.concatenate([[0], np.round(n * weights.cumsum() / weights.sum()).astype(int)])
    return slice(ends[comm.rank], ends[comm.rank + 1])


def fit(model, Y, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(Y, **more)


def results(model, Y) -> list[np.ndarray]:
    found = [model.components_, np.asarray(model.prior_), np.array([model.noise_std_]), np.array(model.bound_history_)]
    return [*found, model.transform(Y), model.reconstruct(Y), model.score_samples(Y)]


def check(cls, more, comm: Comm, Y: np.ndarray) -> None:
    mine = shares(len(Y), comm)
    model = fit(cls(**SETTINGS | more), Y[mine], comm=comm)
    found = results(model, Y[:50])
    everywhere = comm.gather_bytes(b"".join(x.tobytes() for x in found))
    assert len(set(everywhere)) == 1, f"the ranks disagree: {cls} {more}"
    if comm.is_root:
        alone = fit(cls(**SETTINGS | more), Y, comm=Serial())
        for x, right in zip(found, results(alone, Y[:50]), strict=True):
            np.testing.assert_allclose(x, right, rtol=1e-10, atol=1e-10, err_msg=f"{cls} {more}")


def check_seeds(comm: Comm) -> None:
    """Ranks whose seeds differ, or that draw their own, begin from one dictionary; the points stay their own."""
    Y = points()
    for seed in (comm.rank, np.random.default_rng(comm.rank), None):
        settings = SETTINGS | {"random_state": seed, "renewals": 0}
        model = fit(BSC(**settings), Y[shares(len(Y), comm)], comm=comm)
        assert len(set(comm.gather_bytes(model.transform(Y).tobytes()))) == 1
        if comm.is_root and isinstance(seed, int):
            alone = fit(BSC(**settings), Y)
            np.testing.assert_allclose(model.transform(Y), alone.transform(Y), rtol=1e-10, atol=1e-10)


def check_disk(comm: Comm) -> None:
    """An array on disk stays there: only rows of blocks that another rank began move."""
    folder = tempfile.mkdtemp() if comm.is_root else ""
    path = Path(comm.gather_bytes(folder.encode())[0].decode()) / "points.npy"
    if comm.is_root:
        np.save(path, points(1800))
    comm.barrier()
    check(BSC, {"renewals": 2}, comm, np.load(path, mmap_mode="r"))
    check(GSC, {"renewals": 0}, comm, np.load(path, mmap_mode="r")[:700])
    comm.barrier()
    if comm.is_root:
        shutil.rmtree(folder)


def check_refusal(comm: Comm) -> None:
    Y = points(60)
    last = comm.rank == comm.size - 1
    bad = Y.copy()
    bad[3, 1] = np.inf
    with pytest.raises(ValueError, match=rf"^rank {comm.size - 1}: Y: expected finite entries .*row 3, column 1"):
        BSC(**SETTINGS).fit(bad if last else Y, comm=comm)
    with pytest.raises(ValueError, match=rf"^rank {comm.size - 1}: tol: expected"):
        BSC(**SETTINGS | {"tol": -1.0 if last else 0.0}).fit(Y, comm=comm)
    with pytest.raises(ValueError, match=r"^Y: expected the same number of entries a point on all ranks, got \[8, 9\]"):
        BSC(**SETTINGS).fit(Y[:, :8] if last else Y, comm=comm)
    with pytest.raises(ValueError, match="Y: expected at least one point, got none"):
        BSC(**SETTINGS).fit(Y[:0], comm=comm)
    single = fit(BSC(**SETTINGS), Y.astype(np.float32) if last else Y, comm=comm)
    assert single.components_.dtype == np.float64
    single = fit(BSC(**SETTINGS), Y.astype(np.float32), comm=comm)
    assert single.components_.dtype == np.float32


def main() -> None:
    comm, what = world(), sys.argv[1]
    sparse_fit.SETTLE = sparse_fit.TRIAL = 3  # steps; fits of full length take long
    with abort_on_error(comm):
        if what == "selected":
            for number, (cls, more) in enumerate(CODERS):
                check(cls, more, comm, points(missing=0.2 * (number % 2)))
            check(BSC, {"data_cut": True, "renewals": 0, "max_iter": 8}, comm, points(1500))
        elif what == "evolved":
            for cls in (BSC, DSC, MCA):
                check(cls, {"states": "evolved", "renewals": 0, "max_iter": 2}, comm, points())
            check(GSC, {"states": "all"}, comm, points())
            check_seeds(comm)
            if comm.size > 1:
                check_refusal(comm)
            # Annealing and renewals on some of the blocks.
            sparse_coding.SAMPLE, sparse_coding.SAMPLE_A_COMPONENT = 600, 0
            check(BSC, {"renewals": 6}, comm, points(6000))
            check(BSC, {"states": "evolved", "renewals": 0, "max_iter": 1}, comm, points(1800))
            check_disk(comm)
        else:
            for cls, more in CODERS:
                check(cls, more | {"renewals": 1}, comm, points(3))
            for cls in (BSC, GSC, MCA):
                check(cls, {"states": "evolved", "annealing": 0, "renewals": 0}, comm, points(3, missing=0.2))
    if comm.is_root:
        print(f"ok on {comm.size}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
