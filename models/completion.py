"""Neural tensor completion, as an estimator."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from tqdm import tqdm

from probtensor.axes import Axis, CategoricalAxis, ContinuousAxis
from probtensor.calibration import inflated
from probtensor.checkpoints import Checkpoints
from probtensor.columns import to_cpu_array
from probtensor.comm import Comm, refuse_together
from probtensor.data import Duplicates
from probtensor.estimator import TensorRegressor
from probtensor.inference.influence import Preconditioner
from probtensor.intake import Table, Where, row_keys
from probtensor.models.completion_files import fitted_from_state, fitted_to_state
from probtensor.models.completion_findings import Findings
from probtensor.models.completion_fit import fit_completion, moments
from probtensor.models.completion_groups import Data
from probtensor.models.completion_influence import row_influence
from probtensor.models.completion_inputs import bin_edges, distinct_keys, encode, n_labels
from probtensor.models.completion_links import Likelihood, check_values
from probtensor.models.completion_progress import Progress
from probtensor.models.completion_settings import Settings, settings_of
from probtensor.models.completion_stacking import discrete
from probtensor.models.side_information import (
    check_the_same,
    side_codes,
    side_features,
    side_of,
    sides_from_state,
    sides_to_state,
)
from probtensor.predictive import NormalMixture, Predictive
from probtensor.resources import RandomState, resolve_device, shared_generator

__all__ = ["NeuralTensorCompletion"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SHOW_AFTER = 1.0  # seconds before a progress bar appears


class NeuralTensorCompletion(Findings, TensorRegressor):
    """Completion of a tensor by effects of labels and their combinations, factors, and ensembles of networks.

    Candidates from plain to rich are fitted side by side: effects of labels, pairs and triples of labels, shrunk in
    closed form; products of factors of pairs of modes, and of all modes, by alternating ridge regression (real values
    alone); effects and factors by gradients; effects, factors and a network that has the effects among its inputs; and
    a network with biases and factors of its own. What is trained is an ensemble whose members leave out a part of the
    rows each, and stop by it.
    Predictions of rows by what has not seen them choose the candidates' weights and the width of intervals. So one
    setting serves tables in which labels add up, and others in which they interact.

    Parameters
    ----------
    rank : int, default 8
        Factors of each mode, for interactions of any number of modes; 0 for none, not of pairs either.
    head : {"mlp", "costco", None}, default "mlp"
        Network over the modes' embeddings: a perceptron, CoSTCo's convolutions, or none.
    likelihood : {"gaussian", "bernoulli", "poisson"}, default "gaussian"
        Of the values: real numbers, 0 and 1, or counts. Effects and networks then add up to the value, to the log odds
        of a 1, or to the logarithm of the expected count.
    axes : sequence of Axis, optional
        What the modes mean. Default: by column, floats and dates continuous, all else categorical. Continuous modes
        have up to 64 bins as labels, and smooth features of the coordinate as inputs of the network; kernels are not
        used.
    biases : bool, default True
        Whether there are effects of labels in closed form, beside those that networks learn.
    interactions : bool, default True
        Whether pairs and triples of labels have effects too (pairs only, with six modes or more), and pairs factors.
    embedding : int, default 16
        Numbers that the network knows of each label.
    hidden : sequence of int, default (128, 64)
        Widths of the network's layers; the first is the number of channels with ``head="costco"``.
    weight_decay : float or sequence of float, default (0.1, 1.0, 10.0)
        Decoupled decay of all parameters, in multiples of the learning rate; each gives candidates of its own.
    n_members : int, default 5
        Members of each ensemble. Each leaves out a fifth of the rows, or one in `n_members` if that is less.
    learning_rate : float, default 0.01
        Highest rate of AdamW; it rises at first and then falls with the cosine.
    batch_size : int, default 1024
    max_epochs : int, default 15
    patience : int, default 4
        Epochs without a better member after which an ensemble stops.
    n_checkpoints : int, default 1
        Times of the training that `influence` looks at: the best epoch, and others evenly spaced before it.
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
    pair_strengths_ : dict of tuple of str to float
        Shrinkage of the factors of each pair of modes, in rows; pairs that did not help are left out.
    best_epochs_ : dict of str to tuple of int
        Of each candidate's members; 0 is the start.
    validation_rmse_ : dict of str to ndarray, shape (epochs + 1, n_members)
        Of each candidate's members on their rows held out, from the start on, in the unit of y; Gaussian values only.
    validation_deviance_ : dict of str to ndarray, shape (epochs + 1, n_members)
        The same as mean deviances, for any likelihood: of Gaussian values, the squared error.
    noise_std_ : float
        Standard deviation that the effects leave to the noise, in the unit of y; Gaussian values only.
    axes_, y_mean_, y_scale_, n_features_in_, feature_names_in_
        See `TensorRegressor`.

    Notes
    -----
    A label that was not seen has no effects and the mean of the others' factors and embeddings; intervals are then
    wider by the spread of the mode's effects. Folds and batches are hashes of rows and of a seed. ``noise_std`` is not
    supported.

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

    _edges: dict[str, FloatArray]

    def __init__(
        self,
        rank: int = 8,
        head: Literal["mlp", "costco"] | None = "mlp",
        axes: Sequence[Axis] | None = None,
        *,
        likelihood: Likelihood = "gaussian",
        biases: bool = True,
        interactions: bool = True,
        embedding: int = 16,
        hidden: Sequence[int] = (128, 64),
        weight_decay: float | Sequence[float] = (0.1, 1.0, 10.0),
        n_members: int = 5,
        learning_rate: float = 0.01,
        batch_size: int = 1024,
        max_epochs: int = 15,
        patience: int = 4,
        n_checkpoints: int = 1,
        duplicates: Duplicates = "observations",
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.rank = rank
        self.head = head
        self.axes = axes
        self.likelihood = likelihood
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
        self.n_checkpoints = n_checkpoints
        self.duplicates = duplicates
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _settings(self) -> Settings:
        return settings_of(self.get_params(deep=False))

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        side_information: Mapping[str, pd.DataFrame] | None = None,
        noise_std: Any = None,
        comm: Comm | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
    ) -> Self:
        """Fit the model to observed entries.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
            Coordinates of the observed entries, one column a mode. Entries that are missing have no row.
        y : array_like, shape (n,)
            Their values. The results are float32 where y is, else float64.
        sample_weight : array_like, shape (n,), optional
            How often each row counts, above 0. Default: once.
        X_val, y_val : optional
            Validation rows: nothing is trained on them; they choose strengths, epochs, weights and the width of
            intervals. Default: folds of the training rows, one for each member; then all rows train some members, and
            predictions are better.
        side_information : mapping of str to DataFrame, optional
            What is known of the labels of some categorical modes: tables of numbers, strings, categories or truth
            values, indexed by label. Labels that no training row has may be among them, and are then predicted by
            their features; `unknown` flags them all the same.
        noise_std
            Not supported.
        comm : Comm, optional
            The ranks that fit together, each with its own rows, validation rows among them; see
            `probtensor.comm.world`. A fit depends on how many there are by rounding alone; long trainings amplify that
            of single precision.
        checkpoint : path-like, optional
            Folder for the state of the training; SIGTERM writes it too, at the end of an epoch, and ends the process. A
            fit of the same rows with the same parameters can go on from there, and ends with the same bits.
        checkpoint_every : int, default 10
            Epochs from one checkpoint to the next, of all ensembles in turn.
        resume : bool, default False
            Go on from the newest checkpoint in the folder, if there is one. What comes before and after the training of
            networks is done again.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If rows are malformed, empty or not finite, or a parameter does not fit the data.
        """
        if (X_val is None) != (y_val is None):
            missing, given = ("X_val", "y_val") if X_val is None else ("y_val", "X_val")
            raise ValueError(f"{missing}: expected one with {given}, got None")
        self._given = None if X_val is None else (X_val, y_val), side_information
        try:
            return super().fit(
                X,
                y,
                sample_weight,
                noise_std=noise_std,
                comm=comm,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                resume=resume,
            )
        finally:
            del self._given

    def _fit(self, table: Table, comm: Comm, checkpoints: Checkpoints | None) -> None:
        settings = self._settings()
        if table.precision is not None:
            raise ValueError("noise_std: expected None, NeuralTensorCompletion learns the noise; use sample_weight")
        data = self._data(table, comm)
        device = resolve_device(self.device)
        with tqdm(desc="epochs", delay=SHOW_AFTER, disable=not (self.progress and comm.is_root)) as bar:

            def report(name: str, epoch: int, loss: float) -> None:
                gaussian = settings.likelihood == "gaussian"
                shown = f"RMSE {math.sqrt(loss) * self.y_scale_:.4g}" if gaussian else f"deviance {loss:.4g}"
                bar.set_postfix_str(f"{name}: {shown}", refresh=False)
                bar.update()

            generator = shared_generator(self.random_state, comm)
            seed = int(torch.randint(2**62, (1,), generator=generator))
            progress = Progress(checkpoints, seed, data, comm, device)
            self._fitted = fit_completion(data, settings, device, report, comm, progress)

    def _data(self, table: Table, comm: Comm) -> Data:
        """Rows of this rank, and the validation rows that it was given."""
        validation, side_information = self._given
        positions = table.positions.cpu().numpy()
        self._edges = bin_edges(self.axes_)
        if len(set(comm.gather_bytes(b"no" if validation is None else b"yes"))) > 1:
            raise ValueError("X_val: expected validation rows, of which there may be none, on every rank or on no rank")
        self._sides = refuse_together(comm, lambda: side_of(side_information, self.axes_))
        check_the_same(self._sides, comm)
        encoded = [
            axis.coordinates[at] if isinstance(axis, ContinuousAxis) else at
            for axis, at in zip(self.axes_, positions.T, strict=True)
        ]
        of_labels = [side_codes(side, self._labels(side.mode))[positions[:, side.mode]] for side in self._sides]
        labels, smooth = self._encode(encoded, of_labels)
        values = table.values.double().cpu().numpy()
        refuse_together(comm, lambda: check_values(self.likelihood, values, "y"))
        weight = np.ones(len(values)) if table.count is None else table.count.double().cpu().numpy()
        keys = distinct_keys(table.key.cpu().numpy(), weight)
        own = np.ones(len(values), dtype=bool)
        if validation is not None:
            may_be_empty = comm.size > 1
            more = refuse_together(comm, lambda: self._rows(*validation, "X_val", "y_val", may_be_empty))
            n = len(more[2])
            more_keys = row_keys(torch.from_numpy(more[0]), torch.from_numpy(more[2])).numpy()
            labels, smooth, values = (np.concatenate(pair) for pair in zip((labels, smooth, values), more, strict=True))
            weight, own, keys = (
                np.append(weight, np.ones(n)),
                np.append(own, np.zeros(n, bool)),
                np.append(keys, more_keys),
            )
        return Data(labels, n_labels(self.axes_, self._edges), self._sides, smooth, values, weight, keys, own)

    def _labels(self, mode: int) -> Any:
        axis = self.axes_[mode]
        assert isinstance(axis, CategoricalAxis)
        return np.asarray(axis.labels, dtype=object)

    def _encode(
        self, encoded: Sequence[npt.NDArray[Any]], of_labels: Sequence[IntArray]
    ) -> tuple[IntArray, FloatArray]:
        """Labels and rows of the sides' tables (n, K + n_sides), smooth features and features of labels (n, q)."""
        labels, smooth = encode(self.axes_, self._edges, self._seen, encoded)
        codes = np.stack(of_labels, axis=1) if of_labels else labels[:, :0]
        return np.append(labels, codes, axis=1), np.append(smooth, side_features(self._sides, codes), axis=1)

    def _encode_where(self, where: Where) -> tuple[IntArray, FloatArray]:
        columns = [where.table[self.axes_[side.mode].name] for side in self._sides]
        of_labels = [side_codes(side, column) for side, column in zip(self._sides, columns, strict=True)]
        return self._encode([column.cpu().numpy() for column in where.encoded], of_labels)

    def _rows(
        self, X: Any, y: Any, name: str, values_name: str, may_be_empty: bool = False
    ) -> tuple[IntArray, FloatArray, FloatArray]:
        """Labels, smooth features and standardised values of rows that were given to the fitted axes."""
        where = Where(self.axes_, self._columns(X), torch.device("cpu"))
        values = np.array(to_cpu_array(y), dtype=np.float64)
        if values.shape != (len(where),):
            raise ValueError(f"{values_name}: expected shape ({len(where)},) as {name} has rows, got {values.shape}")
        if not (len(values) or may_be_empty) or not np.isfinite(values).all():
            raise ValueError(f"{values_name}: expected finite values, at least one, got {values}")
        check_values(str(self.likelihood), values, values_name)
        labels, smooth = self._encode_where(where)
        return labels, smooth, (values - self.y_mean_) / self.y_scale_

    def influence(
        self,
        X: Any,
        y: Any,
        X_query: Any,
        y_query: Any,
        *,
        parameters: Literal["last", "all"] = "all",
        preconditioner: Preconditioner | None = None,
        signed: bool = True,
    ) -> FloatArray:
        """What training on each row did, or would do, to the loss of other rows.

        Parameters
        ----------
        X, y : shape (n, K), (n,)
            Rows that are scored.
        X_query, y_query : shape (m, K), (m,)
            Rows whose summed loss is looked at, half the squared error or the negative log-likelihood of other values;
            best rows that were held out.
        parameters : {"all", "last"}, default "all"
            Of all of a network's parameters, or of the last layer's alone.
        preconditioner : MFAC or GaussNewton, optional
            See `probtensor.inference.influence`.
        signed : bool, default True
            Whether rows that raise the loss have negative scores; else magnitudes.

        Returns
        -------
        ndarray, shape (n,)
            By how much a step of gradient descent on the row, of size one, lowers the loss, in the unit of y squared,
            or of log-likelihood: the mean over members, summed over `n_checkpoints` times of the training. Of the
            networks, by the weights that they have among themselves in the prediction; the effects in closed form stay
            as they are.

        Raises
        ------
        ValueError
            If rows are malformed, or the model has no network.
        """
        check_is_fitted(self, "axes_")
        if parameters not in ("last", "all"):
            raise ValueError(f'parameters: expected "last" or "all", got {parameters!r}')
        if not self._fitted.groups:
            raise ValueError("head, rank: expected a network or factors, whose rows have an influence; got neither")
        rows, query = self._rows(X, y, "X", "y"), self._rows(X_query, y_query, "X_query", "y_query")
        labels, smooth, values = (np.concatenate(pair) for pair in zip(rows, query, strict=True))
        found = row_influence(
            self._fitted,
            labels,
            smooth,
            values,
            len(query[2]),
            parameters=parameters,
            preconditioner=preconditioner,
        )
        scores: FloatArray = found * self.y_scale_**2
        return scores if signed else np.abs(scores)

    def _location_scale(self) -> bool:
        return self._settings().likelihood == "gaussian"

    def _predictive(self, where: Where) -> Predictive:
        labels, smooth = self._encode_where(where)
        mean, variance, strange = moments(self._fitted, labels, smooth, bool(self.biases))
        if self._fitted.spread is not None:
            return discrete(self._fitted.likelihood, mean, variance, self._fitted.spread, strange)
        mixture = self._fitted.mixture
        unit = inflated(variance, mixture.inflation) + self._fitted.effects.noise_variance
        scales = np.sqrt(unit[:, None] * mixture.scales.numpy() ** 2 + strange[:, None])
        return NormalMixture(mean, scales, mixture.weights.numpy())

    def _draw(self, where: Where, n_samples: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        return torch.from_numpy(self._predictive(where).sample(n_samples, rng).T.copy())

    def _fitted_device(self) -> torch.device:
        return self._fitted.groups[0].parameters["bias"].device if self._fitted.groups else torch.device("cpu")

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON values that `from_state` makes the fitted model of."""
        arrays, meta = fitted_to_state(self._fitted)
        arrays |= {f"edges.{name}": torch.from_numpy(edges) for name, edges in self._edges.items()}
        of_sides, about = sides_to_state(self._sides)
        return arrays | of_sides, {"params": self._params_state(), **meta, **about}

    def _restore(self, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self._edges = {key[len("edges.") :]: v.numpy() for key, v in arrays.items() if key.startswith("edges.")}
        self._sides = sides_from_state(arrays, meta)
        self._fitted = fitted_from_state(arrays, meta, resolve_device(self.device))
