"""Data augmentation for tensor completion: new cells where entities matter, with values that a model predicts.

A sparse tensor is completed by a model; the model, or a better one, predicts cells that nobody observed; and a second
model is fitted to the observed and the new cells together. Which cells are added follows the importance of their
entities, in DAIN the influence that the entities' cells had on the loss of validation cells.

What was measured (docs/completion.md): the new cells help where their values come from a better model than the one that
is trained on them, and then the more the better; whose entities they have matters little.

References
----------
Oh, Kim, Rossi, Kumar (2021), "Influence-guided Data Augmentation for Neural Tensor Completion", CIKM.
"""

import inspect
import math
import os
import warnings
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import check_is_fitted

from probtensor.calibration import ScaleMixture
from probtensor.columns import to_cpu_array
from probtensor.data import as_table
from probtensor.estimator import UnknownLabelWarning
from probtensor.inference.influence import Preconditioner
from probtensor.intake import row_numbers
from probtensor.metrics import rmse
from probtensor.models.augmentation_cells import codes_among, draw_cells, entities_of, entity_shares
from probtensor.models.augmentation_estimators import fitted_clone, paper_network
from probtensor.models.completion import NeuralTensorCompletion
from probtensor.models.completion_stacking import calibrate
from probtensor.persistence import estimator_from, write_state
from probtensor.predictive import NormalMixture
from probtensor.resources import RandomState, is_number, make_generator, unchanged_on_failure

__all__ = ["DAIN"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CHOICES = {
    "importance": ("influence", "frequency", "uniform"),
    "aggregate": ("sum", "mean"),
    "sign": ("absolute", "helpful"),
    "parameters": ("last", "all"),
    "keep": ("weighted", "if_better", "always"),
}


class DAIN(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Influence-guided data augmentation: fit, find the entities that matter, add cells of theirs, fit again.

    Parameters
    ----------
    estimator : estimator, optional
        The model that is fitted twice: any with ``fit`` and ``predict`` for tables of cells; ``fit`` is given
        ``sample_weight``, ``X_val`` and ``y_val`` where it takes them. Default: the network of the paper, a perceptron
        over embeddings, as `NeuralTensorCompletion`.
    ratio : float, default 3.0
        New cells for each training cell; 0.5 in the paper. The second fit takes ``1 + ratio`` times as long.
    importance : {"influence", "frequency", "uniform"}, default "influence"
        What makes an entity important: its cells' influence on the loss of the validation cells (`estimator` then has a
        method ``influence``); their number; or that it has one.
    aggregate : {"sum", "mean"}, default "sum"
        Of an entity's cells.
    sign : {"absolute", "helpful"}, default "absolute"
        Whether cells that raise the validation loss count as much as those that lower it, or not at all.
    parameters : {"last", "all"}, default "last"
        Of the network, for its gradients.
    preconditioner : MFAC or GaussNewton, optional
        See `probtensor.inference.influence`.
    predictor : estimator or "self", optional
        What gives the new cells their values: an estimator that is fitted to the training cells (in sklearn's
        ``FrozenEstimator``, a fitted one stays as it is), or the trained `estimator` itself, as in the paper.
        Default: effects of labels and their combinations, and factors, ``NeuralTensorCompletion(head=None)``.
    keep : {"weighted", "if_better", "always"}, default "weighted"
        The prediction: a weighted mean of the two models, its weight that of least squared error on the validation
        cells; that of the second if it is better on them, else that of the first; or that of the second.
    validation_fraction : float, default 0.2
        Share of the cells that are held out to measure influence, stop training and calibrate, where `fit` is not given
        any.
    random_state : int, Generator, RandomState or None, default None
        Seed of the validation cells, the new cells, and the estimators.
    progress : bool, default True
        Show progress bars on long fits of the default `estimator`; one that is given has its own setting.

    Attributes
    ----------
    estimator_, augmented_estimator_ : estimator
        Fitted to the training cells, and to these and the new ones.
    cell_importance_ : Series, shape (n,)
        Importance of each row, in the unit of influence, with its sign; NaN for rows held out. The index is that of X.
    entity_importance_ : dict of str to Series
        For each mode, the share of each of its labels, which sum to one; the largest first.
    X_augmented_, y_augmented_ : DataFrame, ndarray
        The new cells and their values: ``ratio`` times the training cells, or fewer where there are not so many free.
    validation_rmse_ : dict of str to float
        Of the first model, the second, and what is kept of them.
    weight_ : float
        Of the second model in the prediction, from 0 to 1.
    n_features_in_, feature_names_in_
        Number and names of the modes.

    Notes
    -----
    The authors of the paper have applied for a patent on their pipeline (US 2023/0244926).

    As published: ``DAIN(ratio=0.5, predictor="self", keep="always")``. Table and advice: docs/completion.md. In short:
    the default `NeuralTensorCompletion` alone predicts better than a plain network with any augmentation.

    References
    ----------
    Oh, Kim, Rossi, Kumar (2021), "Influence-guided Data Augmentation for Neural Tensor Completion", CIKM, algorithm 1.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> i, j = rng.integers(0, 10, size=(2, 80))
    >>> X, y = pd.DataFrame({"user": i, "item": j}), i + 0.1 * rng.normal(size=80)
    >>> quick = NeuralTensorCompletion(rank=2, hidden=(8,), max_epochs=3, n_members=1, biases=False)
    >>> model = DAIN(quick, ratio=0.25, random_state=0).fit(X, y)
    >>> model.X_augmented_.shape, list(model.entity_importance_)
    ((16, 2), ['user', 'item'])
    """

    def __init__(
        self,
        estimator: Any = None,
        ratio: float = 3.0,
        *,
        importance: Literal["influence", "frequency", "uniform"] = "influence",
        aggregate: Literal["sum", "mean"] = "sum",
        sign: Literal["absolute", "helpful"] = "absolute",
        parameters: Literal["last", "all"] = "last",
        preconditioner: Preconditioner | None = None,
        predictor: Any = None,
        keep: Literal["weighted", "if_better", "always"] = "weighted",
        validation_fraction: float = 0.2,
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.estimator = estimator
        self.ratio = ratio
        self.importance = importance
        self.aggregate = aggregate
        self.sign = sign
        self.parameters = parameters
        self.preconditioner = preconditioner
        self.predictor = predictor
        self.keep = keep
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.progress = progress

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None, X_exclude: Any = None
    ) -> Self:
        """Fit the model twice.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
            Coordinates of the observed cells, one column a mode.
        y : array_like, shape (n,)
            Their values.
        sample_weight : array_like, shape (n,), optional
            How often each row counts, above 0; the new cells count once. Default: once.
        X_val, y_val : optional
            Validation cells. Default: a share of the rows of X.
        X_exclude : DataFrame or array_like, shape (m, K), optional
            Cells that are not to be added, such as those of a test; they are used for nothing else.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If rows are malformed, or a parameter is not as it should be.
        """
        self._check()
        if (X_val is None) != (y_val is None):
            missing, given = ("X_val", "y_val") if X_val is None else ("y_val", "X_val")
            raise ValueError(f"{missing}: expected one with {given}, got None")
        table, values = as_table(X), np.array(to_cpu_array(y), dtype=np.float64)
        if values.shape != (len(table),):
            raise ValueError(f"y: expected shape ({len(table)},) to match X, got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"y: expected finite values, got {values[~np.isfinite(values)][0]}")
        given_weight = row_numbers(sample_weight, "sample_weight", len(table))
        weight = None if given_weight is None else given_weight.numpy()
        rng = np.random.default_rng(make_generator(self.random_state).initial_seed())
        train = np.arange(len(table))
        if X_val is None:
            if len(table) < 2:
                raise ValueError(f"X: expected at least two rows, one to validate, got {len(table)}")
            order, n_val = rng.permutation(len(table)), math.ceil(self.validation_fraction * len(table))
            n_val = min(n_val, len(table) - 1)
            train, held_out = np.sort(order[n_val:]), np.sort(order[:n_val])
            check, checked = table.iloc[held_out], values[held_out]
        else:
            check, checked = self._like(X_val, table, "X_val"), np.array(to_cpu_array(y_val), dtype=np.float64)
        if checked.shape != (len(check),) or not len(checked) or not np.isfinite(checked).all():
            raise ValueError(f"y_val: expected finite values of shape ({len(check)},), at least one, got {checked}")
        own, own_values = table.iloc[train], values[train]
        own_weight = None if weight is None else weight[train]
        excluded = [check] if X_exclude is None else [check, self._like(X_exclude, table, "X_exclude")]
        with unchanged_on_failure(self):
            self.n_features_in_, self.feature_names_in_ = table.shape[1], np.array(table.columns, dtype=object)
            self._fit((own, own_values, own_weight), (check, checked), excluded, rng)
            scores = np.full(len(table), np.nan)
            scores[train] = self._scores
            del self._scores
            self.cell_importance_ = pd.Series(scores, index=table.index, name="importance")
        return self

    def _check(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if not (is_number(self.ratio) and 0 <= self.ratio < math.inf):
            raise ValueError(f"ratio: expected a number of at least 0, got {self.ratio!r}")
        if not (is_number(self.validation_fraction) and 0 < self.validation_fraction < 1):
            raise ValueError(f"validation_fraction: expected a number in (0, 1), got {self.validation_fraction!r}")
        likelihood = getattr(self._estimator(), "likelihood", "gaussian")
        if likelihood not in ("gaussian", "student-t"):
            raise ValueError(f'estimator: expected one of real values, got one with likelihood="{likelihood}"')
        if isinstance(self.predictor, str) and self.predictor != "self":
            raise ValueError(f'predictor: expected an estimator, None or "self", got {self.predictor!r}')
        if self.importance == "influence" and not hasattr(self._estimator(), "influence"):
            raise ValueError(
                'importance: expected "frequency" or "uniform" with an estimator that has no method influence, '
                f"such as {type(self.estimator).__name__}, got {self.importance!r}"
            )

    def _estimator(self) -> Any:
        return paper_network(self.progress) if self.estimator is None else self.estimator

    def _fit(
        self,
        rows: tuple[pd.DataFrame, FloatArray, FloatArray | None],
        validation: tuple[pd.DataFrame, FloatArray],
        excluded: list[pd.DataFrame],
        rng: np.random.Generator,
    ) -> None:
        table, values, weight = rows
        self.estimator_ = fitted_clone(self._estimator(), rng, table, values, weight, validation)
        scores = np.ones(len(table))
        if self.importance == "influence":
            how = {"parameters": self.parameters, "preconditioner": self.preconditioner}
            scores = self.estimator_.influence(table, values, *validation, **how)
        codes, labels = entities_of(table)
        cells = np.abs(scores) if self.sign == "absolute" else scores.clip(min=0)
        aggregate = "mean" if self.importance == "uniform" else self.aggregate
        shares = entity_shares(codes, cells, [len(part) for part in labels], aggregate)
        self.entity_importance_ = {
            str(name): pd.Series(share, index=pd.Index(part, name=name), name="importance").sort_values(
                ascending=False, kind="stable"
            )
            for name, part, share in zip(table.columns, labels, shares, strict=True)
        }
        taken = np.concatenate([codes, *(codes_among(labels, other) for other in excluded)])
        new = draw_cells(shares, math.floor(self.ratio * len(table)), taken, rng)
        self.X_augmented_ = pd.DataFrame(
            {name: pd.Series(part.take(at)) for name, part, at in zip(table.columns, labels, new.T, strict=True)}
        )
        self._scores, self.y_augmented_ = scores, np.zeros(0)
        self.augmented_estimator_ = self.estimator_
        if len(new):
            predictor = self.estimator_
            if self.predictor != "self":
                effects = NeuralTensorCompletion(head=None, progress=False)
                chosen = effects if self.predictor is None else self.predictor
                predictor = fitted_clone(chosen, rng, table, values, weight, validation)
            self.y_augmented_ = np.asarray(predictor.predict(self.X_augmented_), dtype=np.float64)
            both = pd.concat([table, self.X_augmented_], ignore_index=True)
            more = None if weight is None else np.append(weight, np.ones(len(new)))
            all_values = np.append(values, self.y_augmented_)
            self.augmented_estimator_ = fitted_clone(self._estimator(), rng, both, all_values, more, validation)
        self._choose(*validation)

    def _choose(self, table: pd.DataFrame, values: FloatArray) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownLabelWarning)
            first, second = self._predictions(table)
            unit = self._unit(table)
        step = second - first
        best = float(step @ (values - first)) / max(float(step @ step), np.finfo(np.float64).tiny)
        better = float(rmse(values, second) < rmse(values, first))
        self.weight_ = {"weighted": min(max(best, 0.0), 1.0), "if_better": better, "always": 1.0}[self.keep]
        kept = first + self.weight_ * step
        self.validation_rmse_ = {
            name: rmse(values, mean) for name, mean in {"first": first, "second": second, "kept": kept}.items()
        }
        self._mixture = calibrate((values - kept) / unit, np.zeros(len(values)), 1.0)

    def _predictions(self, table: pd.DataFrame) -> list[FloatArray]:
        fitted = [self.estimator_, self.augmented_estimator_]
        return [np.asarray(model.predict(table), dtype=np.float64) for model in fitted]

    def _unit(self, table: pd.DataFrame) -> FloatArray:
        """Standard deviations that the first model gives, or one, before calibration."""
        if "return_std" not in inspect.signature(self.estimator_.predict).parameters:
            return np.ones(len(table))
        std = np.asarray(self.estimator_.predict(table, return_std=True)[1], dtype=np.float64)
        return std.clip(min=np.finfo(np.float64).tiny)

    def predict(self, X: Any, return_std: bool = False) -> FloatArray | tuple[FloatArray, FloatArray]:
        """Predictive mean of y, and its standard deviation.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
        return_std : bool, default False

        Returns
        -------
        mean : ndarray, shape (n,)
        std : ndarray, shape (n,)
            Only with ``return_std=True``; noise included.
        """
        table = self._columns(X)
        first, second = self._predictions(table)
        mean = first + self.weight_ * (second - first)
        if not return_std:
            return mean
        mixture = self._mixture
        return mean, self._unit(table) * float((mixture.weights @ mixture.scales**2).sqrt())

    def predictive(self, X: Any) -> NormalMixture:
        """The predictive distribution of y, its width calibrated on the validation cells.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
        """
        table = self._columns(X)
        scales = self._unit(table)[:, None] * self._mixture.scales.numpy()
        return NormalMixture(np.asarray(self.predict(table)), scales, self._mixture.weights.numpy())

    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[FloatArray, FloatArray]:
        """Central predictive intervals of y.

        Parameters
        ----------
        X : DataFrame or array_like, shape (n, K)
        coverage : float, default 0.9
            Probability of the interval, between 0 and 1.

        Returns
        -------
        lower, upper : ndarray, shape (n,)
        """
        if not (is_number(coverage) and 0 < coverage < 1):
            raise ValueError(f"coverage: expected a probability between 0 and 1, got {coverage!r}")
        lower, upper = self.predictive(X).interval(coverage)
        return lower, upper

    def _columns(self, X: Any) -> pd.DataFrame:
        check_is_fitted(self, "weight_")
        return self._like(X, pd.DataFrame(columns=self.feature_names_in_), "X")

    @staticmethod
    def _like(X: Any, table: pd.DataFrame, name: str) -> pd.DataFrame:
        other = as_table(X)
        if sorted(other.columns) != sorted(table.columns):
            raise ValueError(f"{name}: expected the columns {list(table.columns)}, got {list(other.columns)}")
        return other[list(table.columns)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one file; `probtensor.load` reads it and predicts the same bits.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        ValueError
            If the estimators are not of probtensor.
        """
        check_is_fitted(self, "weight_")
        arrays = {"scales": self._mixture.scales, "weights": self._mixture.weights}
        parts = {}
        for name in ("estimator_", "augmented_estimator_"):
            model = getattr(self, name)
            if not hasattr(model, "state"):
                raise ValueError(f"estimator: expected a model of probtensor to save, got {type(model).__name__}")
            kind, own, meta = model.state()
            arrays |= {f"{name}.{key}": value for key, value in own.items()}
            parts[name] = [kind, meta]
        params = {name: getattr(self, name) for name in ("ratio", "importance", "aggregate", "sign", "parameters")}
        params |= {"keep": self.keep, "validation_fraction": self.validation_fraction}
        meta = {
            "params": params,
            "parts": parts,
            "inflation": self._mixture.inflation,
            "weight": self.weight_.hex(),
            "validation_rmse": self.validation_rmse_,
            "columns": [str(name) for name in self.feature_names_in_],
        }
        write_state(path, f"{type(self).__module__}.{type(self).__qualname__}", arrays, meta)

    @classmethod
    def from_state(cls, arrays: dict[str, torch.Tensor], meta: dict[str, Any]) -> Self:
        """Fitted estimator from what `save` wrote, without importances, new cells, predictor; use `probtensor.load`."""
        model = cls(**meta["params"])
        for name, (kind, own) in meta["parts"].items():
            part = {key[len(name) + 1 :]: value for key, value in arrays.items() if key.startswith(f"{name}.")}
            setattr(model, name, estimator_from(kind, part, own))
        model.estimator = clone(model.estimator_)
        model._mixture = ScaleMixture(meta["inflation"], arrays["scales"], arrays["weights"])
        model.weight_, model.validation_rmse_ = float.fromhex(meta["weight"]), meta["validation_rmse"]
        model.feature_names_in_ = np.array(meta["columns"], dtype=object)
        model.n_features_in_ = len(meta["columns"])
        return model
