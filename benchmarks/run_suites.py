"""The suites of `python -m benchmarks run`: data that a clean clone has, unless a folder with more is given."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import NMF, FastICA, MiniBatchDictionaryLearning
from sklearn.exceptions import ConvergenceWarning

from benchmarks import completion
from benchmarks.completion_peers import PEERS
from benchmarks.head_to_head import Case, Method
from benchmarks.run_adapters import adapter_cases
from benchmarks.run_data import Split, bars, cells, il2, planted, surface
from benchmarks.run_peers import (
    bayespy_cp,
    biases,
    by_codes,
    chosen,
    installed,
    peer,
    pyttb_cp,
    sparse_gp,
    tensorly,
    trees,
)
from benchmarks.scores import point_errors
from benchmarks.sparse import bars_found
from probtensor.axes import CategoricalAxis, ContinuousAxis
from probtensor.estimator import TensorRegressor, UnknownLabelWarning
from probtensor.kernels import Matern, White
from probtensor.metrics import coverage
from probtensor.models import BSC, MCA, AlternatingMinimization, BayesianCP, FunBaT, NeuralTensorCompletion

__all__ = ["SUITES"]


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


def il2_model(seed: int) -> FunBaT:
    smooth = [ContinuousAxis(name, kernel=Matern(1.5) + White()) for name in ("time", "dose")]
    axes = [CategoricalAxis("ligand"), *smooth, CategoricalAxis("cell")]
    return FunBaT(rank=32, axes=axes, random_state=seed, progress=False, device="cpu")


def network(seed: int) -> NeuralTensorCompletion:
    return NeuralTensorCompletion(random_state=seed, progress=False, device="cpu")


def low_rank(seed: int) -> AlternatingMinimization:
    return AlternatingMinimization(random_state=seed, progress=False, device="cpu")


def funbat(seed: int) -> FunBaT:
    return FunBaT(random_state=seed, progress=False, device="cpu")


def bayesian(seed: int) -> BayesianCP:
    return BayesianCP(rank=16, random_state=seed, progress=False, device="cpu")


def funbat_cases(quick: bool, data: Path | None) -> list[Case]:
    ranks = (2, 5, 10) if quick else (2, 5, 10, 16, 24, 32, 40)
    sweeps = 50 if quick else 300
    references = (peer("per-mode biases", biases), peer("HistGradientBoosting", trees))
    table = peer("TensorLy PARAFAC(mask), rank chosen", chosen(tensorly, ranks))
    pyttb = "pyttb", peer("pyttb gcp_opt(mask), rank chosen", chosen(pyttb_cp, ranks))
    gp, gp_out = installed(
        [
            ("gpytorch", peer("GPyTorch, sparse GP", sparse_gp(*((100, 200) if quick else (300, 400))))),
            pyttb,
            ("bayespy", peer("BayesPy CP, rank ≤ 16", bayespy_cp(16, sweeps))),
        ]
    )
    cp, cp_out = installed([pyttb, ("bayespy", peer("BayesPy CP, rank ≤ 32", bayespy_cp(32, sweeps)))])
    model = ours("FunBaT, rank 6", funbat) if quick else ours("FunBaT, rank 32", il2_model)
    waves = (ours("FunBaT", funbat), *references, table, *gp)
    return [
        Case("waves over place and time", surface, waves, left_out=gp_out),
        Case("IL-2, a fifth hidden", il2, (model, table, *references, *cp), left_out=cp_out),
    ]


def completion_cases(quick: bool, data: Path | None) -> list[Case]:
    models = (
        ours("NeuralTensorCompletion", network),
        ours("AlternatingMinimization", low_rank),
        ours("FunBaT", funbat),
        ours("BayesianCP", bayesian),
    )
    references = (peer("per-mode biases", biases), peer("HistGradientBoosting", trees))
    methods = (*models, *(peer(PEERS[name][0], by_codes(name)) for name in ("cp", "costco")), *references)
    ranks = (2, 3, 6) if quick else (1, 2, 3, 4, 5, 6, 8)
    optional, left_out = installed(
        [
            ("pyttb", peer("pyttb gcp_opt(mask), rank chosen", chosen(pyttb_cp, ranks))),
            ("bayespy", peer("BayesPy CP, rank ≤ 16", bayespy_cp(16, 50 if quick else 300))),
        ]
    )
    table = peer("TensorLy PARAFAC(mask), rank chosen", chosen(tensorly, ranks))
    found = [Case("planted CP tensor and effects", planted, (*methods, table, *optional), left_out=left_out)]
    for name in () if data is None else ("taxi", "delay"):
        methods_here = (*methods, peer(PEERS["parafac"][0], by_codes("parafac")))
        found.append(Case(completion.COMPLETION_SETS[name][0], cells(data, name), methods_here))
    return found


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
    "adapters": lambda quick, data: adapter_cases(quick),
    "sparse_coding": sparse_cases,
}
