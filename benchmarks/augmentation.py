"""What augmentation brings: DAIN's forms against one network, and against several at the same cost.

Rows are split as the released code of DAIN does it: 72 % train, 18 % choose epochs, 10 % test. All forms of a split
start from networks of the same settings, those of the paper: a perceptron [96, 128, 128, 32].
"""

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import train_test_split

from benchmarks.completion import COMPLETION_SETS, in_processes, load_cells
from benchmarks.completion_peers import Integers
from benchmarks.datasets import Floats
from probtensor.estimator import UnknownLabelWarning
from probtensor.metrics import rmse
from probtensor.models import DAIN, NeuralTensorCompletion
from probtensor.models.augmentation_estimators import paper_network

__all__ = ["augmentation_lines"]

Rows = tuple[Integers, Floats, Integers, Floats, Integers]  # X, y, X_val, y_val, X_test
Form = Callable[[Rows, int, str], Floats]

PUBLISHED = {"predictor": "self", "keep": "always", "ratio": 0.5}


def networks(n: int, **settings: Any) -> Form:
    """The mean of n networks."""

    def predict(rows: Rows, seed: int, device: str) -> Floats:
        X, y, X_val, y_val, X_test = rows
        found = []
        for member in range(n):
            model = paper_network().set_params(
                random_state=1000 * seed + member, progress=False, device=device, n_checkpoints=1, **settings
            )
            found.append(np.asarray(model.fit(X, y, X_val=X_val, y_val=y_val).predict(X_test)))
        return np.mean(found, axis=0)

    return predict


def dain(**settings: Any) -> Form:
    def predict(rows: Rows, seed: int, device: str) -> Floats:
        X, y, X_val, y_val, X_test = rows
        network = paper_network().set_params(progress=False, device=device)
        model = DAIN(network, random_state=seed, **settings)
        return np.asarray(model.fit(X, y, X_val=X_val, y_val=y_val, X_exclude=X_test).predict(X_test))

    return predict


def whole(rows: Rows, seed: int, device: str) -> Floats:
    X, y, X_val, y_val, X_test = rows
    model = NeuralTensorCompletion(random_state=seed, progress=False, device=device)
    return np.asarray(model.fit(X, y, X_val=X_val, y_val=y_val).predict(X_test))


FORMS: dict[str, Form] = {
    "one network": networks(1),
    "DAIN as published": dain(**PUBLISHED),
    "entities by frequency": dain(**PUBLISHED, importance="frequency"),
    "entities uniformly": dain(**PUBLISHED, importance="uniform"),
    "helpful influence alone": dain(**PUBLISHED, sign="helpful"),
    "mean instead of sum, all parameters": dain(**PUBLISHED, aggregate="mean", parameters="all"),
    "one network, a third of the batch size": networks(1, batch_size=341),
    "two networks": networks(2),
    "five networks": networks(5),
    "**DAIN()**": dain(),
    "DAIN(), entities uniformly": dain(importance="uniform"),
    "NeuralTensorCompletion()": whole,
}


def one_form(folder: Path, name: str, label: str, seed: int, device: str) -> tuple[float, float]:
    """Test RMSE and seconds."""
    torch.set_num_threads(1)
    X, y = load_cells(folder, name)
    rest, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=seed)
    train, check = train_test_split(rest, test_size=0.2, random_state=seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownLabelWarning)
        predicted = FORMS[label]((X[train], y[train], X[check], y[check], X[test]), seed, device)
    return rmse(y[test], predicted), time.perf_counter() - start


def augmentation_lines(folder: Path, names: list[str], seeds: list[int], device: str, jobs: int) -> Iterator[str]:
    """A table a data set: test RMSE, differences to one, two and five networks with standard errors, seconds."""
    tasks = [(folder, name, label, seed, device) for name in reversed(names) for label in FORMS for seed in seeds]
    found = in_processes(one_form, tasks, jobs)
    for name in names:
        digits = COMPLETION_SETS[name][1]
        pairs = {label: [found[folder, name, label, seed, device] for seed in seeds] for label in FORMS}
        errors = pd.DataFrame({label: [error for error, _ in each] for label, each in pairs.items()})
        seconds = {label: np.mean([second for _, second in each]) for label, each in pairs.items()}
        yield from (f"{name}: splits {seeds}", "")
        yield from ("| | RMSE | to one network | to two | to five | seconds |", "|---|---|---|---|---|---|")
        for label in FORMS:
            parts = [f"{errors[label].mean():.{digits}f} ± {errors[label].std():.{digits}f}"]
            for other in ("one network", "two networks", "five networks"):
                gap = errors[label] - errors[other]
                parts.append("–" if label == other else f"{gap.mean():+.{digits}f} ± {gap.sem():.{digits}f}")
            yield f"| {label} | {' | '.join(parts)} | {seconds[label]:.1f} |"
        yield ""
