"""Neural completion on rows dealt to several ranks, against the same fit on one.

Started by ``tests/test_completion_mpi.py`` with a folder for checkpoints that is not there yet.
"""

import sys
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from torch import Tensor

from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm, Serial, abort_on_error, world
from probtensor.estimator import UnknownLabelWarning
from probtensor.models import NeuralTensorCompletion, completion_effects, completion_pairs

N = 4200  # two blocks: of three ranks one gets no rows
QUICK = {"rank": 2, "hidden": (8,), "embedding": 4, "max_epochs": 3, "n_members": 2, "random_state": 0}
QUICK |= {"batch_size": 800, "progress": False, "device": "cpu"}

# Each pass is hundreds of sums over the ranks, of which none can go on while another has no core to run on.
completion_effects.PASSES = completion_effects.LINK_PASSES = 1
completion_effects.SWEEPS, completion_effects.TRIAL_SWEEPS, completion_pairs.TRIAL_SWEEPS = 3, 1, 2


def table(likelihood: str) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(0)
    film, user, hour = rng.integers(0, 30, N), rng.integers(0, 20, N), rng.integers(0, 12, N) / 2
    features = pd.DataFrame({"size": rng.normal(size=33)}, index=[f"film {i:02}" for i in range(33)])
    eta = features["size"].to_numpy()[film] + 0.5 * rng.normal(size=20)[user] + np.sin(hour)
    eta += 0.5 * rng.normal(size=30)[film] * rng.normal(size=20)[user]
    X = pd.DataFrame({"film": features.index.to_numpy()[film], "user": user, "hour": hour})
    if likelihood == "gaussian":
        y = eta + 0.3 * rng.normal(size=N)
    else:
        y = rng.poisson(np.exp(0.5 * eta)) if likelihood == "poisson" else rng.random(N) < 1 / (1 + np.exp(-eta))
    X, y = pd.concat([X, X[:50]], ignore_index=True), np.append(y, y[:50]).astype(float)  # rows that repeat
    return X, y, features


def shares(n: int, comm: Comm, seed: int) -> np.ndarray:
    """Rows of this rank, in any order; with several ranks, none for rank 0."""
    order = np.random.default_rng(seed).permutation(n)
    if comm.size == 1:
        return order
    ends = np.linspace(0, 1, comm.size) ** 2
    parts = np.split(order, (ends[1:-1] * n).astype(int))
    return parts[comm.rank - 1] if comm.rank else order[:0]


def numbers(model: NeuralTensorCompletion, X: pd.DataFrame) -> np.ndarray:
    new = X[:60].copy()
    new.loc[:9, "film"] = "film 32"
    new.loc[10:19, "user"] = 99
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownLabelWarning)
        predictive = model.predictive(new)
    return np.stack([predictive.mean, predictive.std])


def check(likelihood: str, comm: Comm, *, validate: bool = False, side: bool = False, **settings: object) -> None:
    X, y, features = table(likelihood)
    weight = np.random.default_rng(1).integers(1, 4, len(y)).astype(float)
    n_train = 4150 if validate else len(y)

    def fitted(comm: Comm) -> NeuralTensorCompletion:
        rows, more = shares(n_train, comm, 2), n_train + shares(len(y) - n_train, comm, 3)
        given = {"X_val": X.iloc[more], "y_val": y[more]} if validate else {}
        given |= {"side_information": {"film": features}} if side else {}
        model = NeuralTensorCompletion(**QUICK | {"likelihood": likelihood} | settings)
        return model.fit(X.iloc[rows], y[rows], weight[rows], comm=comm, **given)

    model = fitted(comm)
    found = numbers(model, X)
    assert len(set(comm.gather_bytes(found.tobytes()))) == 1, f"the ranks disagree: {likelihood}"
    if comm.is_root:
        alone = fitted(Serial())
        assert model.axes_ == alone.axes_
        assert model.best_epochs_ == alone.best_epochs_
        assert model.strengths_ == alone.strengths_
        expected = numbers(alone, X)
        scale = 1e-4 * np.std(y)
        np.testing.assert_allclose(found, expected, rtol=3e-4, atol=3 * scale)


def check_few(comm: Comm) -> None:
    """Fewer rows than a network needs, and than there are ranks."""
    X, y, _ = table("gaussian")
    for n in (1, 29):
        mine = np.arange(n)[comm.rank :: comm.size]
        model = NeuralTensorCompletion(**QUICK).fit(X.iloc[mine], y[mine], comm=comm)
        if comm.is_root:
            alone = NeuralTensorCompletion(**QUICK).fit(X[:n], y[:n])
            np.testing.assert_allclose(model.predict(X[:n]), alone.predict(X[:n]), rtol=1e-6)


def check_refusals(comm: Comm) -> None:
    X, y, features = table("poisson")
    bad = np.where(np.arange(len(y)) == 3, 0.5, y) if comm.is_root else y
    with pytest.raises(ValueError, match=r"^rank \d: y: expected whole numbers"):
        NeuralTensorCompletion(**QUICK, likelihood="poisson").fit(X, bad, comm=comm)
    given = {"X_val": X, "y_val": y} if comm.is_root else {}
    with pytest.raises(ValueError, match=r"^X_val: expected validation rows"):
        NeuralTensorCompletion(**QUICK).fit(X, y, comm=comm, **given)
    with pytest.raises(ValueError, match=r"^side_information: expected the same tables on every rank"):
        NeuralTensorCompletion(**QUICK).fit(
            X, y, comm=comm, side_information={"film": features + 1 / (1 + comm.rank) * features**2}
        )
    with pytest.raises(ValueError, match=r"^rank 0: X_val|^rank 0: y_val: expected finite"):
        NeuralTensorCompletion(**QUICK).fit(
            X, y, comm=comm, X_val=X[:2], y_val=[np.nan, 1.0] if comm.is_root else [0.0, 1.0]
        )


def check_checkpoints(comm: Comm, folder: str) -> None:
    """A fit that ends early on two ranks goes on there, and on one."""
    X, y, _ = table("gaussian")
    rows = shares(len(y), comm, 2)
    write = Checkpoints.write

    def stop(self: Checkpoints, arrays: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
        write(self, arrays, meta)
        if self._step == 5:
            raise KeyboardInterrupt

    def fitted(comm: Comm, rows: np.ndarray, **options: object) -> np.ndarray:
        return numbers(NeuralTensorCompletion(**QUICK).fit(X.iloc[rows], y[rows], comm=comm, **options), X)

    Checkpoints.write = stop
    with pytest.raises(KeyboardInterrupt):
        fitted(comm, rows, checkpoint=folder, checkpoint_every=1)
    Checkpoints.write = write
    found = fitted(comm, rows, checkpoint=folder, resume=True)
    np.testing.assert_array_equal(found, fitted(comm, rows))
    if comm.is_root:
        alone = fitted(Serial(), np.arange(len(y)), checkpoint=folder, resume=True)
        np.testing.assert_allclose(alone, found, rtol=3e-4, atol=3e-4)


def check_fits(comm: Comm) -> None:
    check("gaussian", comm)
    if comm.size == 1:
        return
    check("gaussian", comm, validate=True, side=True)
    check("gaussian", comm, biases=False, head="costco")
    check("poisson", comm, side=True)
    check("bernoulli", comm, head=None, validate=True)
    check_few(comm)
    check_refusals(comm)


def main() -> None:
    comm = world()
    with abort_on_error(comm):
        check_fits(comm)
        if comm.size == 2:
            check_checkpoints(comm, sys.argv[1])
    if comm.is_root:
        print(f"ok on {comm.size}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
