"""Neural tensor completion, as an estimator."""

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from tqdm import tqdm

from probtensor.axes import Axis, ContinuousAxis
from probtensor.calibration import ScaleMixture, inflated
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.data import Duplicates
from probtensor.estimator import TensorRegressor
from probtensor.intake import Table, Where
from probtensor.models.completion_effects import Effects
from probtensor.models.completion_fit import Fitted, Group, Settings, fit_completion, moments
from probtensor.models.completion_network import Kind
from probtensor.predictive import NormalMixture
from probtensor.resources import RandomState, is_integer, is_number, make_generator, resolve_device

__all__ = ["NeuralTensorCompletion"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_BINS = 64  # labels of a continuous mode
WAVES = 4  # sines and cosines of a continuous mode, a factor 2 apart
SHOW_AFTER = 1.0  # seconds before a progress bar appears
HEADS = ("mlp", "costco", None)


class NeuralTensorCompletion(TensorRegressor):
    """Completion of a tensor by effects of labels and their combinations, factors, and ensembles of networks.

    Candidates from plain to rich are fitted side by side: effects of labels, pairs and triples of labels, shrunk in
    closed form; effects and factors; effects, factors and a network that has the effects among its inputs; and a
    network with biases and factors of its own. Each kind is an ensemble whose members leave out a part of the rows
    each, and stop by it. Predictions of rows by members that have not seen them choose the candidates' weights and the
    width of intervals. So one setting serves tables in which labels add up, and others in which they interact.

    Parameters
    ----------
    rank : int, default 8
        Factors of each mode, for interactions of any number of modes; 0 for none.
    head : {"mlp", "costco", None}, default "mlp"
        Network over the modes' embeddings: a perceptron, CoSTCo's convolutions, or none.
    axes : sequence of Axis, optional
        What the modes mean. Default: by column, floats and dates continuous, all else categorical. Continuous modes
        have up to 64 bins as labels, and smooth features of the coordinate as inputs of the network; kernels are not
        used.
    biases : bool, default True
        Whether there are effects of labels in closed form, beside those that networks learn.
    interactions : bool, default True
        Whether pairs and triples of labels have effects too (pairs only, with six modes or more).
    embedding : int, default 16
        Numbers that the network knows of each label.
    hidden : sequence of int, default (128, 64)
        Widths of the network's layers; the first is the number of channels with ``head="costco"``.
    weight_decay : float or sequence of float, default (1.0, 10.0)
        Decoupled decay of all parameters, in multiples of the learning rate; each gives candidates of its own.
    n_members : int, default 5
        Members of each ensemble. Each leaves out a fifth of the rows, or one in `n_members` if that is less.
    learning_rate : float, default 0.01
        Highest rate of AdamW; it rises at first and then falls with the cosine.
    batch_size : int, default 1024
    max_epochs : int, default 15
    patience : int, default 4
        Epochs without a better member after which an ensemble stops.
    duplicates : {"observations", "error", "sum", "mean"}, default "observations"
        What rows with equal coordinates are.
    device : str, default "auto"
        Of the networks: "cpu", "cuda", or a GPU where there is one.
    random_state : int, Generator, RandomState or None, default None
        Seed of the folds, the starts and the order of rows. No global generator is read or moved.
    progress : bool, default True
        Show a progress bar on long fits.

    Attributes
    ----------
    weights_ : dict of str to float
        Weight of each candidate in the mean; they sum to one.
    strengths_ : dict of tuple of str to float
        Shrinkage of the effects of each subset of modes, in rows; subsets that did not help are left out.
    best_epochs_ : dict of str to tuple of int
        Of each candidate's members; 0 is the start.
    noise_std_ : float
        Standard deviation that the effects leave to the noise, in the unit of y.
    axes_, y_mean_, y_scale_, n_features_in_, feature_names_in_
        See `TensorRegressor`.

    Notes
    -----
    A label that was not seen has no effects and the mean of the others' factors and embeddings; intervals are then
    wider by the spread of the mode's effects. Fits on several ranks, checkpoints and ``noise_std`` are not supported.

    References
    ----------
    Liu, Li, Tsang, Liu (2019), "CoSTCo: A Neural Tensor Completion Model for Sparse Tensors", KDD. Breiman (1996),
    "Stacked regressions", Machine Learning 24.

    Examples
    --------
    >>> import pandas as pd
    >>> rng = np.random.default_rng(0)
    >>> i, j = rng.integers(0, 10, size=(2, 400))
    >>> y = np.sin(i) + np.cos(j) + 0.1 * rng.normal(size=400)
    >>> X = pd.DataFrame({"row": i, "column": j})
    >>> model = NeuralTensorCompletion(head=None, random_state=0).fit(X[:300], y[:300])
    >>> bool(np.sqrt(np.mean((model.predict(X[300:]) - y[300:]) ** 2)) < 0.15)
    True
    """

    _fitted: Fitted
    _edges: dict[str, FloatArray]

    def __init__(
        self,
        rank: int = 8,
        head: Literal["mlp", "costco"] | None = "mlp",
        axes: Sequence[Axis] | None = None,
        *,
        biases: bool = True,
        interactions: bool = True,
        embedding: int = 16,
        hidden: Sequence[int] = (128, 64),
        weight_decay: float | Sequence[float] = (1.0, 10.0),
        n_members: int = 5,
        learning_rate: float = 0.01,
        batch_size: int = 1024,
        max_epochs: int = 15,
        patience: int = 4,
        duplicates: Duplicates = "observations",
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.rank = rank
        self.head = head
        self.axes = axes
        self.biases = biases
        self.interactions = interactions
        self.embedding = embedding
        self.hidden = hidden
        self.weight_decay = weight_decay
        self.n_members = n_members
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.duplicates = duplicates
        self.device = device
        self.random_state = random_state
        self.progress = progress

    @property
    def weights_(self) -> dict[str, float]:
        """Weight of each candidate in the mean; they sum to one."""
        check_is_fitted(self, "axes_")
        return dict(zip(self._candidates(), self._fitted.weights.tolist(), strict=True))

    @property
    def best_epochs_(self) -> dict[str, tuple[int, ...]]:
        """Epochs of each candidate's members; 0 is the start."""
        check_is_fitted(self, "axes_")
        M = self._fitted.n_members
        epochs = [
            group.best_epoch[first : first + M]
            for group in self._fitted.groups
            for first in range(0, len(group.best_epoch), M)
        ]
        names = self._candidates()
        return dict(zip(names[len(names) - len(epochs) :], epochs, strict=True))

    @property
    def strengths_(self) -> dict[tuple[str, ...], float]:
        """Shrinkage of the effects of each subset of modes."""
        check_is_fitted(self, "axes_")
        names = [str(axis.name) for axis in self.axes_]
        effects = self._fitted.effects
        pairs = zip(effects.subsets, effects.strengths, strict=True)
        return {tuple(names[mode] for mode in subset): strength for subset, strength in pairs}

    @property
    def noise_std_(self) -> float:
        """Standard deviation that the effects leave to the noise, in the unit of y."""
        check_is_fitted(self, "axes_")
        return math.sqrt(self._fitted.effects.noise_variance) * self.y_scale_

    def _candidates(self) -> list[str]:
        single = self.biases or not self._fitted.groups
        M = self._fitted.n_members
        decays = self._settings().weight_decay
        names = [
            f"{group.name}, decay {decay:g}"
            for group in self._fitted.groups
            for decay in decays[: len(group.best_epoch) // M]
        ]
        return ["effects", *names] if single else names

    def _settings(self) -> Settings:
        for name, least in (("rank", 0), ("embedding", 1), ("n_members", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not (is_integer(value) and value >= least):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        for name in ("max_epochs", "patience"):
            value = getattr(self, name)
            if not (is_integer(value) and value >= 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if self.head not in HEADS:
            raise ValueError(f'head: expected "mlp", "costco" or None, got {self.head!r}')
        layers: Any = self.hidden
        hidden: list[Any] = list(layers) if np.iterable(layers) else []
        if not hidden or not all(is_integer(width) and width >= 1 for width in hidden):
            raise ValueError(f"hidden: expected integers of at least 1, one a layer, got {self.hidden!r}")
        given = self.weight_decay
        decays: list[Any] = list(given) if isinstance(given, Sequence | np.ndarray) else [given]
        if not decays or not all(is_number(x) and 0 <= x < math.inf for x in decays):
            raise ValueError(f"weight_decay: expected a number of at least 0, or several, got {given!r}")
        if not (is_number(self.learning_rate) and 0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate!r}")
        if max(decays) * self.learning_rate >= 1:
            raise ValueError(f"weight_decay: expected less than 1 / learning_rate, got {given!r}")
        return Settings(
            bool(self.biases),
            bool(self.interactions),
            int(self.rank),
            self.head,
            int(self.embedding),
            tuple(int(width) for width in hidden),
            tuple(float(decay) for decay in decays),
            int(self.n_members),
            float(self.learning_rate),
            int(self.batch_size),
            int(self.max_epochs),
            int(self.patience),
        )

    def _fit(self, table: Table, comm: Comm, checkpoints: Checkpoints | None) -> None:
        settings = self._settings()
        if comm.size > 1:
            raise ValueError(f"comm: expected one rank, NeuralTensorCompletion fits on one only; got {comm.size}")
        if checkpoints is not None:
            raise ValueError("checkpoint: expected None, NeuralTensorCompletion writes no checkpoints")
        if table.precision is not None:
            raise ValueError("noise_std: expected None, NeuralTensorCompletion learns the noise; use sample_weight")
        positions = table.positions.cpu().numpy()
        self._edges = {
            str(axis.name): _edges(axis.coordinates) for axis in self.axes_ if isinstance(axis, ContinuousAxis)
        }
        encoded = [
            axis.coordinates[at] if isinstance(axis, ContinuousAxis) else at
            for axis, at in zip(self.axes_, positions.T, strict=True)
        ]
        labels, smooth = self._labels(encoded)
        values = table.values.double().cpu().numpy()
        weight = np.ones(len(values)) if table.count is None else table.count.double().cpu().numpy()
        device = resolve_device(self.device)
        with tqdm(desc="epochs", delay=SHOW_AFTER, disable=not self.progress) as bar:

            def report(name: str, epoch: int, loss: float) -> None:
                bar.set_postfix_str(f"{name}: RMSE {math.sqrt(loss) * self.y_scale_:.4g}", refresh=False)
                bar.update()

            generator = make_generator(self.random_state)
            self._fitted = fit_completion(
                labels, self._sizes(), smooth, values, weight, settings, generator, device, report
            )

    def _sizes(self) -> tuple[int, ...]:
        return tuple(
            len(self._edges[str(axis.name)]) + 1 if isinstance(axis, ContinuousAxis) else axis.size
            for axis in self.axes_
        )

    def _labels(self, encoded: Sequence[npt.NDArray[Any]]) -> tuple[IntArray, FloatArray]:
        """Labels (n, K), -1 where unknown, and smooth features (n, q) of the continuous modes."""
        labels, smooth = [], [np.zeros((len(encoded[0]), 0))]
        for axis, column in zip(self.axes_, encoded, strict=True):
            if isinstance(axis, ContinuousAxis):
                labels.append(np.searchsorted(self._edges[str(axis.name)], column).astype(np.int64))
                smooth.append(_waves(np.asarray(column, dtype=np.float64), axis.coordinates))
            else:
                unseen = np.append(~self._seen[str(axis.name)], True)
                labels.append(np.where(unseen[column], -1, column).astype(np.int64))
        return np.stack(labels, axis=1), np.concatenate(smooth, axis=1)

    def _predictive(self, where: Where) -> NormalMixture:
        labels, smooth = self._labels([column.cpu().numpy() for column in where.encoded])
        mean, variance = moments(self._fitted, labels, smooth, bool(self.biases))
        mixture = self._fitted.mixture
        unit = np.sqrt(inflated(variance, mixture.inflation) + self._fitted.effects.noise_variance)
        return NormalMixture(mean, unit[:, None] * mixture.scales.numpy(), mixture.weights.numpy())

    def _draw(self, where: Where, n_samples: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        return torch.from_numpy(self._predictive(where).sample(n_samples, rng).T.copy())

    def _fitted_device(self) -> torch.device:
        return self._fitted.groups[0].parameters["bias"].device if self._fitted.groups else torch.device("cpu")

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON values that `from_state` makes the fitted model of."""
        fitted, arrays = self._fitted, {}
        for s in range(len(fitted.effects.subsets)):
            for name in ("known", "effects", "weights"):
                arrays[f"effects.{s}.{name}"] = torch.from_numpy(getattr(fitted.effects, name)[s])
        arrays["weights"] = torch.from_numpy(fitted.weights)
        arrays["scales"], arrays["scale_weights"] = fitted.mixture.scales, fitted.mixture.weights
        arrays |= {f"edges.{name}": torch.from_numpy(edges) for name, edges in self._edges.items()}
        for g, group in enumerate(fitted.groups):
            arrays |= {f"group.{g}.{name}": value for name, value in group.parameters.items()}
        groups = [[group.name, list(group.kind), group.on_effects, list(group.best_epoch)] for group in fitted.groups]
        effects = fitted.effects
        return arrays, {
            "params": self._params_state(),
            "subsets": [list(subset) for subset in effects.subsets],
            "sizes": list(effects.sizes),
            "strengths": list(effects.strengths),
            "noise_variance": effects.noise_variance,
            "inflation": fitted.mixture.inflation,
            "groups": json.loads(json.dumps(groups)),
            "n_members": fitted.n_members,
        }

    def _restore(self, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        device = resolve_device(self.device)
        parts = {
            name: [arrays[f"effects.{s}.{name}"].numpy() for s in range(len(meta["subsets"]))]
            for name in ("known", "effects", "weights")
        }
        effects = Effects(
            tuple(tuple(subset) for subset in meta["subsets"]),
            tuple(meta["sizes"]),
            parts["known"],
            parts["effects"],
            parts["weights"],
            tuple(meta["strengths"]),
            meta["noise_variance"],
        )
        groups = []
        for g, (name, kind, on_effects, best_epoch) in enumerate(meta["groups"]):
            sizes, rank, head, width, hidden, n_features = kind
            prefix = f"group.{g}."
            parameters = {key[len(prefix) :]: v.to(device) for key, v in arrays.items() if key.startswith(prefix)}
            kind = Kind(tuple(sizes), rank, head, width, tuple(hidden), n_features)
            groups.append(Group(name, kind, on_effects, parameters, tuple(best_epoch)))
        mixture = ScaleMixture(meta["inflation"], arrays["scales"], arrays["scale_weights"])
        self._edges = {key[len("edges.") :]: v.numpy() for key, v in arrays.items() if key.startswith("edges.")}
        self._fitted = Fitted(effects, groups, arrays["weights"].numpy(), mixture, meta["n_members"])


def _edges(coordinates: FloatArray) -> FloatArray:
    """Edges between bins of about as many distinct coordinates each; one coordinate a bin where they are few."""
    first = np.linspace(0, len(coordinates), min(MAX_BINS, len(coordinates)) + 1)[1:-1].round().astype(np.int64)
    edges: FloatArray = 0.5 * (coordinates[first - 1] + coordinates[first])
    return edges


def _waves(column: FloatArray, coordinates: FloatArray) -> FloatArray:
    """A line and waves over the range of the coordinates, (n, 1 + 2 WAVES); constant outside."""
    low, high = coordinates[0], coordinates[-1]
    unit = (column.clip(low, high) - low) / (high - low if high > low else 1.0)
    phase = math.pi * unit[:, None] * 2.0 ** np.arange(WAVES)
    return np.concatenate([2 * unit[:, None] - 1, np.sin(phase), np.cos(phase)], axis=1)
