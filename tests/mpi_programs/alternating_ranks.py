"""Alternating minimization on rows dealt to several ranks, against the same fit on one."""

import warnings

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning

from probtensor.comm import Comm, Serial, abort_on_error, world
from probtensor.models import AlternatingMinimization

N = 4500  # two blocks: of three ranks one gets no rows


def table(n_modes: int) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, (40, 30, 5)[:n_modes], size=(N, n_modes))
    product = np.ones((N, 2))
    for column in labels.T:
        product *= rng.normal(size=(40, 2))[column]
    X = pd.DataFrame(labels, columns=["user", "film", "hour"][:n_modes])
    X["user"] = [f"user {i}" for i in X["user"]]
    return X, product.sum(axis=1) + 0.2 * rng.normal(size=N)


def shares(comm: Comm) -> np.ndarray:
    """Rows of this rank, in any order; with several ranks, none for rank 0."""
    order = np.random.default_rng(1).permutation(N)
    if comm.size == 1:
        return order
    return order[:0] if comm.is_root else np.array_split(order, comm.size - 1)[comm.rank - 1]


def check(comm: Comm, n_modes: int, **settings: object) -> None:
    X, y = table(n_modes)
    weight = np.random.default_rng(2).integers(1, 4, N).astype(float)

    def fitted(comm: Comm) -> AlternatingMinimization:
        rows = shares(comm)
        model = AlternatingMinimization(rank=3, random_state=0, progress=False, device="cpu", **settings)
        return model.fit(X.iloc[rows], y[rows], weight[rows], comm=comm)

    model = fitted(comm)
    found = np.stack(model.predict(X[:200], return_std=True))
    assert len(set(comm.gather_bytes(found.tobytes()))) == 1, "the ranks disagree"
    if comm.is_root:
        alone = fitted(Serial())
        assert (model.ridge_, model.n_iter_) == (alone.ridge_, alone.n_iter_)
        np.testing.assert_allclose(found, np.stack(alone.predict(X[:200], return_std=True)), rtol=1e-6, atol=1e-6)


def main() -> None:
    comm = world()
    with abort_on_error(comm), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(comm, 2)
        check(comm, 2, solver="exact", init="random")
        check(comm, 3, ridge=0.3)
        if comm.is_root:
            print(f"ok on {comm.size}")


main()
