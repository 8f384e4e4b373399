"""The suites of `python -m benchmarks run`: data that a clean clone has, unless a folder with more is given."""

import importlib.util
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import NMF, FastICA, MiniBatchDictionaryLearning
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from benchmarks import adapters, completion
from benchmarks.adapters_cuda import LoRA
from benchmarks.completion_peers import PEERS
from benchmarks.datasets import Floats
from benchmarks.head_to_head import Case, Method
from benchmarks.scores import point_errors
from benchmarks.sparse import bars_found
from benchmarks.sparse_gp import SparseGaussianProcess
from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.baselines import MaskedParafac, PerModeBiases
from probtensor.datasets import load_il2
from probtensor.demo import split_rows
from probtensor.estimator import TensorRegressor, UnknownLabelWarning
from probtensor.kernels import Matern, White
from probtensor.metrics import coverage
from probtensor.models import (
    BSC,
    MCA,
    AlternatingMinimization,
    FLoRAConfig,
    FunBaT,
    NeuralTensorCompletion,
    inject_adapters,
)

__all__ = ["SUITES"]


class Split(NamedTuple):
    """A table with rows held out; `seed` is that of the split and of the methods."""

    X: pd.DataFrame
    y: Floats
    X_test: pd.DataFrame
    y_test: Floats
    seed: int


def split(X: pd.DataFrame, y: Floats, seed: int, share: float = 0.2) -> Split:
    train, test = split_rows(len(y), share, seed)
    return Split(X.iloc[train], y[train], X.iloc[test], y[test], seed)


def ours(name: str, make: Callable[[int], TensorRegressor]) -> Method:
    """A model of ours: errors, density, CRPS and coverage of its predictive distribution."""

    def run(data: Split) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownLabelWarning)
            model = make(data.seed).fit(data.X, data.y)
            predictive = model.predictive(data.X_test)
            error, absolute = point_errors(data.y_test, predictive.mean)
            inside = coverage(data.y_test, *predictive.interval(0.9))
        nll, crps = -float(predictive.log_prob(data.y_test).mean()), float(predictive.crps(data.y_test).mean())
        return {"rmse": error, "mae": absolute, "nll": nll, "crps": crps, "inside 90 %": 100 * inside}

    return Method(name, True, run)


def peer(name: str, predict: Callable[[Split], Floats]) -> Method:
    """A peer with point predictions."""

    def run(data: Split) -> dict[str, float]:
        with warnings.catch_warnings():
            for kind in (UnknownLabelWarning, ConvergenceWarning):
                warnings.simplefilter("ignore", kind)
            error, absolute = point_errors(data.y_test, predict(data))
        return {"rmse": error, "mae": absolute}

    return Method(name, False, run)


def biases(data: Split) -> Floats:
    return PerModeBiases().fit(data.X, data.y).predict(data.X_test)


def trees(data: Split) -> Floats:
    """Columns as numbers where they are, else as categories."""
    both = pd.concat([data.X, data.X_test])
    encoded = both.apply(lambda column: column if column.dtype.kind == "f" else pd.factorize(column)[0])
    model = HistGradientBoostingRegressor(random_state=data.seed).fit(encoded[: len(data.X)], data.y)
    return np.asarray(model.predict(encoded[len(data.X) :]))


def parafac(ranks: Sequence[int]) -> Callable[[Split], Floats]:
    """TensorLy's, the rank chosen on an eighth of the training rows."""

    def predict(data: Split) -> Floats:
        inner = split(data.X, data.y, data.seed, 1 / 8)
        errors = {}
        for rank in ranks:
            model = MaskedParafac(rank=rank, random_state=data.seed).fit(inner.X, inner.y)
            errors[rank] = point_errors(inner.y_test, np.asarray(model.predict(inner.X_test)))[0]
        best = min(errors, key=lambda rank: errors[rank])
        return np.asarray(MaskedParafac(rank=best, random_state=data.seed).fit(data.X, data.y).predict(data.X_test))

    return predict


def by_codes(name: str) -> Callable[[Split], Floats]:
    """A peer of `completion_peers`, on the labels' numbers."""

    def predict(data: Split) -> Floats:
        both = pd.concat([data.X, data.X_test]).apply(lambda column: pd.factorize(column, sort=True)[0])
        codes = both.to_numpy(np.int64)
        return PEERS[name][1](codes[: len(data.X)], data.y, codes[len(data.X) :], data.seed)[0]

    return predict


def sparse_gp(data: Split) -> Floats:
    return (
        SparseGaussianProcess(seed=data.seed)
        .fit(data.X.to_numpy(float), data.y)
        .predict(data.X_test.to_numpy(float))[0]
    )


def surface(seed: int) -> Split:
    """A smooth function of place and time with noise, a fifth hidden: sums and products of waves."""
    rng = np.random.default_rng(seed)
    place, time_ = rng.integers(0, 40, 3000) / 40, rng.integers(0, 200, 3000) / 20
    wave = np.sin(6 * place) * np.cos(time_) + 0.5 * np.cos(9 * place) * np.sin(2.3 * time_) + np.sin(0.5 * time_)
    return split(pd.DataFrame({"place": place, "time": time_}), wave + 0.2 * rng.normal(size=3000), seed)


def il2(seed: int) -> Split:
    X, y = load_il2()
    return split(X, y, seed)


def il2_model(seed: int) -> FunBaT:
    smooth = [ContinuousAxis(name, kernel=Matern(1.5) + White()) for name in ("time", "dose")]
    axes = [CategoricalAxis("ligand"), *smooth, CategoricalAxis("cell")]
    return FunBaT(rank=32, axes=axes, random_state=seed, progress=False, device="cpu")


def planted(seed: int) -> Split:
    """Labels of three modes: effects and a CP tensor of rank 3 with noise, 6 % of the cells seen."""
    rng = np.random.default_rng(seed)
    sizes = (60, 50, 40)
    cells = rng.choice(np.prod(sizes), 7200, replace=False)
    index = np.stack(np.unravel_index(cells, sizes), axis=1)
    factors = [rng.normal(size=(size, 3)) for size in sizes]
    effects = [rng.normal(size=size) for size in sizes]
    y = np.prod([f[i] for f, i in zip(factors, index.T, strict=True)], axis=0).sum(1)
    y = y + sum(e[i] for e, i in zip(effects, index.T, strict=True)) + 0.3 * rng.normal(size=len(y))
    return split(pd.DataFrame(index, columns=["a", "b", "c"]).astype(str), y, seed)


def network(seed: int) -> NeuralTensorCompletion:
    return NeuralTensorCompletion(random_state=seed, progress=False, device="cpu")


def low_rank(seed: int) -> AlternatingMinimization:
    return AlternatingMinimization(random_state=seed, progress=False, device="cpu")


def funbat(seed: int) -> FunBaT:
    return FunBaT(random_state=seed, progress=False, device="cpu")


def funbat_cases(quick: bool, data: Path | None) -> list[Case]:
    ranks = (2, 5, 10) if quick else (2, 5, 10, 16, 24, 32, 40)
    references = (peer("per-mode biases", biases), peer("HistGradientBoosting", trees))
    table = peer("TensorLy PARAFAC(mask), rank chosen", parafac(ranks))
    gp = (peer("GPyTorch, sparse GP", sparse_gp),) if importlib.util.find_spec("gpytorch") else ()
    il2_case = Case("IL-2, a fifth hidden", il2, (ours("FunBaT, rank 32", il2_model), table, *references))
    if quick:
        il2_case = Case("IL-2, a fifth hidden", il2, (ours("FunBaT, rank 6", funbat), table, *references))
    return [Case("waves over place and time", surface, (ours("FunBaT", funbat), *references, *gp)), il2_case]


def completion_cases(quick: bool, data: Path | None) -> list[Case]:
    models = (
        ours("NeuralTensorCompletion", network),
        ours("AlternatingMinimization", low_rank),
        ours("FunBaT", funbat),
    )
    peers = [peer(PEERS[name][0], by_codes(name)) for name in ("cp", "costco", "parafac")]
    methods = (*models, *peers, peer("per-mode biases", biases), peer("HistGradientBoosting", trees))
    cases = [Case("planted CP tensor and effects", planted, methods)]
    for name in () if data is None else ("taxi", "delay"):
        cases.append(Case(completion.COMPLETION_SETS[name][0], _cells(data, name), methods))
    return cases


def _cells(folder: Path, name: str) -> Callable[[int], Split]:
    def load(seed: int) -> Split:
        index, y = completion.load_cells(folder, name)
        return split(
            pd.DataFrame(index, columns=[f"mode {k}" for k in range(index.shape[1])]).astype(str), y, seed, 0.1
        )

    return load


def adapter_cases(quick: bool, data: Path | None) -> list[Case]:
    layers = adapters.LAYERS[:1] + adapters.LAYERS[5:6] + adapters.LAYERS[8:9] if quick else adapters.LAYERS
    simple = [layer for layer in layers if isinstance(layer.make(), nn.Conv2d | nn.Conv3d | nn.Linear)]
    simple = [layer for layer in simple if getattr(layer.make(), "groups", 1) == 1]
    return [_layer_case(layer, 5 if quick else 15) for layer in simple]


def _layer_case(layer: adapters.Layer, repeats: int) -> Case:
    """Milliseconds of forward and backward with an adapter, over the frozen layer's; as many parameters."""

    def made(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        handle = inject_adapters(adapted := layer.make(), FLoRAConfig(r=16, kernel_r=2))
        number = sum(parameter.numel() for parameter in handle.trainable_parameters())
        modules = {"frozen": layer.make().requires_grad_(False), "ours": adapted, "lora": LoRA(layer.make(), number)}
        return {"modules": modules, "x": torch.randn(layer.shape, requires_grad=True)}

    def timed(name: str) -> Callable[[Any], Mapping[str, float]]:
        def run(data: dict[str, Any]) -> dict[str, float]:
            pairs = []
            for _ in range(repeats):
                steps = [adapters.step_seconds(data["modules"][key], data["x"]) for key in ("frozen", name)]
                pairs.append((steps[1] / steps[0], 1e3 * steps[1]))
            ratio, milliseconds = (statistics.median(column) for column in zip(*pairs, strict=True))
            kept = adapters.saved_bytes(data["modules"][name], data["x"]) / 1e6
            return {"over frozen": ratio, "ms": milliseconds, "kept, MB": kept}

        return run

    methods = (Method("FLoRA", True, timed("ours")), Method("LoRA (PEFT's operations)", False, timed("lora")))
    return Case(layer.name, made, methods, decides="over frozen")


def bars(seed: int) -> dict[str, Any]:
    """2,000 pictures of 5 × 5 with ten bars, each there with probability 0.2, and noise."""
    rng = np.random.default_rng(seed)
    W = np.zeros((10, 5, 5))
    for k in range(5):
        W[k, k, :] = W[5 + k, :, k] = 10.0
    W = W.reshape(10, 25)
    s = rng.random((2000, 10)) < 0.2
    return {"Y": s @ W + rng.normal(size=(2000, 25)), "W": W.T, "seed": seed}


def sparse_cases(quick: bool, data: Path | None) -> list[Case]:
    def components(make: Callable[[int], Any], name: str, is_ours: bool = False) -> Method:
        def run(data: dict[str, Any]) -> dict[str, float]:
            Y = np.maximum(data["Y"], 0) if name == "NMF" else data["Y"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = make(data["seed"]).fit(Y)
            return {"found": float(bars_found(model.components_, data["W"]))}

        return Method(name, is_ours, run)

    settings: dict[str, Any] = {"n_components": 10}
    return [
        Case(
            "ten bars, 2,000 pictures",
            bars,
            (
                components(lambda seed: BSC(**settings, random_state=seed, progress=False), "BSC", True),
                components(lambda seed: MCA(**settings, random_state=seed, progress=False), "MCA", True),
                components(
                    lambda seed: MiniBatchDictionaryLearning(**settings, random_state=seed),
                    "MiniBatchDictionaryLearning",
                ),
                components(lambda seed: NMF(**settings, random_state=seed, max_iter=1000), "NMF"),
                components(lambda seed: FastICA(**settings, random_state=seed, max_iter=1000), "FastICA"),
            ),
            decides="found",
        )
    ]


SUITES: dict[str, Callable[[bool, Path | None], list[Case]]] = {
    "funbat": funbat_cases,
    "completion": completion_cases,
    "adapters": adapter_cases,
    "sparse_coding": sparse_cases,
}
