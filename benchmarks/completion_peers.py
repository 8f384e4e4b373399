"""Peers of neural tensor completion, plainly written: factorizations, CoSTCo, DAIN's network, TensorLy, FunBaT.

Each is a function of training labels (n, K), values (n,), test labels and a seed. A fifth of the training rows (18 % of
all, where a tenth is the test's) stops the gradient methods early and chooses every setting; TensorLy's decompositions
and FunBaT are fitted again to all training rows with what was chosen. Of the test rows nothing is used but labels.

References
----------
Liu, Li, Tsang, Liu (2019), "CoSTCo: A Neural Tensor Completion Model for Sparse Tensors", KDD. Oh, Kim, Rossi, Kumar
(2021), "Influence-guided Data Augmentation for Neural Tensor Completion", CIKM, for the network. Koren, Bell, Volinsky
(2009), "Matrix Factorization Techniques for Recommender Systems", Computer, for biases beside factors.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.datasets import Floats
from probtensor.baselines import PerModeBiases
from probtensor.estimator import UnknownLabelWarning
from probtensor.metrics import rmse
from probtensor.models import FunBaT

__all__ = ["PEERS", "Impossible", "Integers", "Method", "biases", "least_error"]

Integers = npt.NDArray[np.int64]
Method = Callable[[Integers, Floats, Integers, int], tuple[Floats, Floats | None]]

BATCH, EPOCHS, PATIENCE = 1024, 50, 10
LEAST_STEPS = 2000  # small tables: epochs go on to so many steps at most, and patience to a tenth of them
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PENALTIES = (1.0, 3.0, 10.0)  # as a ridge, in observations
RANK = 16  # of the two factorizations; the penalty chooses how much of it is used
RANKS = (1, 2, 4, 8)  # of TensorLy's decompositions
SWEEPS = 50  # of theirs
MOST_CELLS = 2_000_000  # of a dense array


class Impossible(Exception):
    """What a method cannot do on this table."""


class Network(nn.Module):
    """Predictions (n,) from labels (n, K), one table of embeddings for all modes."""

    def __init__(self, sizes: Integers, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("first", torch.from_numpy(np.cumsum([0, *sizes[:-1]])))
        self.table = nn.Embedding(int(sizes.sum()), width)
        nn.init.normal_(self.table.weight, std=scale)

    def embedded(self, labels: Tensor) -> Tensor:
        return self.table(labels + self.first)  # (n, K, width)

    def penalty(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Sum of squares of the parameters, from a batch: `shares` (n, K) of a label are one over its training rows."""
        return shares.new_zeros(())


class Factorization(Network):
    """Biases of all modes, and a product of the factors of some."""

    def __init__(self, sizes: Integers, modes: tuple[int, ...]) -> None:
        super().__init__(sizes, RANK + 1, 0.1)
        self.modes = list(modes)
        with torch.no_grad():
            self.table.weight[:, 0] = 0.0
            self.table.weight[:, 1:] += 0.5 if len(modes) > 2 else 0.0  # products of many small numbers do not learn

    def forward(self, labels: Tensor) -> Tensor:
        z = self.embedded(labels)
        return z[:, :, 0].sum(1) + z[:, self.modes, 1:].prod(1).sum(1)

    def penalty(self, labels: Tensor, shares: Tensor) -> Tensor:
        squares = self.embedded(labels).square()
        factors = squares[:, self.modes, 1:].sum(2)
        return ((shares * squares[:, :, 0]).sum(1) + (shares[:, self.modes] * factors).sum(1)).mean()


class CoSTCo(Network):
    """Embeddings of rank 20 as a picture of 20 x K: convolutions over modes, then over the rank; two dense layers."""

    def __init__(self, sizes: Integers, rank: int = 20, channels: int = 20) -> None:
        super().__init__(sizes, rank, 0.05)
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, (1, len(sizes))),
            nn.ReLU(),
            nn.Conv2d(channels, channels, (rank, 1)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, 1),
        )

    def forward(self, labels: Tensor) -> Tensor:
        return self.layers(self.embedded(labels).transpose(1, 2)[:, None]).squeeze(1)


class Perceptron(Network):
    """DAIN's network: embeddings side by side, dense layers."""

    def __init__(self, sizes: Integers, widths: tuple[int, ...] = (96, 256, 256, 64)) -> None:
        super().__init__(sizes, widths[0] // len(sizes), 0.1)
        inputs = widths[0] // len(sizes) * len(sizes)
        pairs = itertools.pairwise([inputs, *widths[1:]])
        self.layers = nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())))
        self.out = nn.Linear(widths[-1], 1)

    def forward(self, labels: Tensor) -> Tensor:
        return self.out(self.layers(self.embedded(labels).flatten(1))).squeeze(1)


def trained(
    module: Network,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    generator: torch.Generator,
    rate: float = 1e-3,
    strength: float = 0.0,
) -> float:
    """Train by Adam; leaves the weights of the best epoch, returns its mean squared error on the rows held out."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    labels, values = train
    shares = 1 / torch.stack([torch.bincount(column)[column] for column in labels.T], dim=1)
    n_batches = math.ceil(len(values) / BATCH)
    epochs, patience = max(EPOCHS, LEAST_STEPS // n_batches), max(PATIENCE, LEAST_STEPS // 10 // n_batches)
    best, best_epoch, weights = math.inf, 0, deepcopy(module.state_dict())
    for epoch in range(epochs):
        for rows in torch.randperm(len(values), generator=generator).tensor_split(n_batches):
            loss = (module(labels[rows]) - values[rows]).square().mean()
            if strength:
                loss = loss + strength * module.penalty(labels[rows], shares[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = float((_in_parts(module, held_out[0]) - held_out[1]).square().mean())
        if error < best:
            best, best_epoch, weights = error, epoch, deepcopy(module.state_dict())
        elif epoch - best_epoch >= patience:
            break
    module.load_state_dict(weights)
    return best


def by_gradient(
    make: Callable[[Integers], Network],
    X: Integers,
    y: Floats,
    X_test: Integers,
    seed: int,
    *,
    rate: float = 1e-3,
    strengths: tuple[float, ...] = (0.0,),
) -> tuple[Floats, None]:
    """Trained on four fifths of the rows, stopped early on the fifth, which chooses the penalty too."""
    sizes = np.maximum(X.max(0), X_test.max(0)) + 1
    train, held_out = _fifth(len(y), seed)
    center, scale = y[train].mean(), y[train].std()
    rows = [
        (torch.from_numpy(X[part]), torch.from_numpy((y[part] - center) / scale).float()) for part in (train, held_out)
    ]
    generator, found = torch.Generator().manual_seed(seed), []
    for strength in strengths:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = make(sizes)
        error = trained(module, *rows, generator, rate, strength)
        found.append((error, module))
    module = min(found, key=lambda pair: pair[0])[1]
    with torch.no_grad():
        return center + scale * _in_parts(module, torch.from_numpy(X_test)).double().numpy(), None


def least_error(errors: list[float]) -> int:
    """Place of the least error; one that is not a number never wins."""
    return int(np.argmin(np.nan_to_num(errors, nan=np.inf)))


def biases(X: Integers, y: Floats, X_test: Integers, seed: int) -> tuple[Floats, None]:
    """Additive effects; the ridge of least error on a fifth of the rows."""
    return _effects(X, y, seed)[0].predict(X_test), None


def decomposition(kind: str, X: Integers, y: Floats, X_test: Integers, seed: int) -> tuple[Floats, None]:
    """TensorLy with a mask; rank, and whether effects or the mean are taken off first, from a fifth of the rows."""
    sizes = np.maximum(X.max(0), X_test.max(0)) + 1
    if math.prod(sizes.tolist()) > MOST_CELLS:
        raise Impossible(f"a dense array of {math.prod(sizes.tolist()):,} cells")
    train, held_out = _fifth(len(y), seed)
    whole, part = _effects(X, y, seed)
    means = {True: (whole.predict, part.predict), False: (_constant(y), _constant(y[train]))}
    settings = [(rank, effects) for effects in (True, False) for rank in RANKS]
    errors = []
    for rank, effects in settings:
        mean = means[effects][1]
        predict = _tensorly(kind, rank, sizes, X[train], y[train] - mean(X[train]), seed)
        errors.append(rmse(y[held_out], mean(X[held_out]) + predict(X[held_out])))
    rank, effects = settings[least_error(errors)]
    mean = means[effects][0]
    return mean(X_test) + _tensorly(kind, rank, sizes, X, y - mean(X), seed)(X_test), None


def _tensorly(kind: str, rank: int, sizes: Integers, X: Integers, y: Floats, seed: int) -> Callable[[Integers], Floats]:
    from tensorly import cp_to_tensor, tucker_to_tensor
    from tensorly.decomposition import parafac, tucker

    scale = y.std()
    dense, mask = np.zeros((2, *sizes))
    cells, counts = np.unique(X, axis=0, return_counts=True)  # a cell seen twice (check-ins) has its mean
    np.add.at(dense, tuple(X.T), y / scale)
    dense[tuple(cells.T)] /= counts
    mask[tuple(X.T)] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "parafac":
            found = parafac(dense, rank, n_iter_max=SWEEPS, init="random", mask=mask, tol=1e-6, random_state=seed)
            full = cp_to_tensor(found)
        else:
            ranks = [min(rank, int(size)) for size in sizes]
            found = tucker(dense, ranks, n_iter_max=SWEEPS, init="random", mask=mask, tol=1e-6, random_state=seed)
            full = tucker_to_tensor(found)
    return lambda cells: scale * full[tuple(cells.T)]


def funbat(X: Integers, y: Floats, X_test: Integers, seed: int, **settings: object) -> tuple[Floats, Floats]:
    """FunBaT of this house, every column of labels categorical."""
    model = FunBaT(random_state=seed, progress=False, device="cpu", **settings)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UnknownLabelWarning)
        model.fit(X, y)
        return model.predict(X_test), np.stack(model.predict_interval(X_test, 0.9))


def _effects(X: Integers, y: Floats, seed: int) -> tuple[PerModeBiases, PerModeBiases]:
    """Additive effects of all rows and of four fifths of them, with the ridge of least error on the fifth."""
    train, held_out = _fifth(len(y), seed)
    models = [PerModeBiases(ridge).fit(X[train], y[train]) for ridge in RIDGES]
    best = least_error([rmse(y[held_out], model.predict(X[held_out])) for model in models])
    return PerModeBiases(RIDGES[best]).fit(X, y), models[best]


def _fifth(n: int, seed: int) -> list[Integers]:
    return train_test_split(np.arange(n), test_size=0.2, random_state=seed)


def _constant(y: Floats) -> Callable[[Integers], Floats]:
    return lambda X: np.full(len(X), y.mean())


def _in_parts(module: Network, labels: Tensor) -> Tensor:
    return torch.cat([module(part) for part in labels.split(16 * BATCH)])


def _factorization(modes: tuple[int, ...] | None, *rows: object) -> tuple[Floats, None]:
    X: Integers = rows[0]  # type: ignore[assignment]
    chosen = tuple(range(X.shape[1])) if modes is None else modes
    return by_gradient(partial(Factorization, modes=chosen), *rows, rate=5e-3, strengths=PENALTIES)  # type: ignore[arg-type]


PEERS: dict[str, tuple[str, Method]] = {  # name on the command line: label, method
    "mf": ("biases + matrix factorization of modes 0, 1 (Adam)", partial(_factorization, (0, 1))),
    "cp": ("biases + CP (Adam)", partial(_factorization, None)),
    "costco": ("CoSTCo", partial(by_gradient, CoSTCo)),
    "mlp": ("MLP [96, 256, 256, 64]", partial(by_gradient, Perceptron)),
    "parafac": ("TensorLy parafac(mask)", partial(decomposition, "parafac")),
    "tucker": ("TensorLy tucker(mask)", partial(decomposition, "tucker")),
    "funbat": ("FunBaT()", funbat),
}
