"""The estimators that augmentation fits: any of scikit-learn's kind, and the network of the paper."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.base import clone
from sklearn.utils.validation import has_fit_parameter

from probtensor.models.completion import NeuralTensorCompletion

__all__ = ["fitted_clone", "paper_network"]

FloatArray = npt.NDArray[np.float64]


def paper_network(progress: bool = True) -> NeuralTensorCompletion:
    """The network that the paper augments: a perceptron over embeddings, nothing else, stopped early."""
    return NeuralTensorCompletion(
        biases=False,
        rank=0,
        embedding=32,
        hidden=(128, 128, 32),
        weight_decay=0.0,
        n_members=1,
        n_checkpoints=50,
        learning_rate=1e-3,
        max_epochs=50,
        patience=10,
        progress=progress,
    )


def fitted_clone(
    estimator: Any,
    rng: np.random.Generator,
    table: pd.DataFrame,
    values: FloatArray,
    weight: FloatArray | None,
    validation: tuple[pd.DataFrame, FloatArray],
) -> Any:
    """A clone with a seed of its own, fitted."""
    model = clone(estimator)
    if "random_state" in model.get_params(deep=False):
        model.set_params(random_state=int(rng.integers(2**31)))
    given: dict[str, Any] = {}
    if weight is not None:
        if not has_fit_parameter(model, "sample_weight"):
            raise ValueError(f"sample_weight: expected None, {type(model).__name__} takes no weights; got some")
        given["sample_weight"] = weight
    if has_fit_parameter(model, "X_val"):
        given |= {"X_val": validation[0], "y_val": validation[1]}
    return model.fit(table, values, **given)
