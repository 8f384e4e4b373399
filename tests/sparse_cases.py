"""The six sparse-coding models beside their slow twins of `reference_sparse`: one table of cases for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from probtensor.comm import Serial
from probtensor.inference.evolution import Evolution
from probtensor.inference.points import Points
from probtensor.inference.state_sets import Own, every_state, few_active
from probtensor.inference.truncated_em import Everything, Preselection, run
from probtensor.models.linear_coding import LinearCoding, LinearParameters
from probtensor.models.max_coding import MaxCoding, MaxParameters
from probtensor.models.spike_slab import SlabParameters, SpikeSlab
from tests import reference_sparse as ref

NAMES = ("bsc", "tsc", "dsc", "gsc", "gsc_full", "mca", "mmca")
KINDS = ("everything", "preselected", "own")
PHI = (0.0, 1.0, 2.5)
VALUES = {"tsc": (-1.0, 1.0), "dsc": PHI[1:]}
FUNCTIONS = {name: name.removesuffix("_full") for name in NAMES}


@dataclass(frozen=True)
class Case:
    """A model of the package, and the parameters of its twin."""

    name: str
    model: Any
    twin: dict[str, Any]

    @property
    def values(self) -> tuple[float, ...]:
        return VALUES.get(self.name, (1.0,))

    @property
    def H(self) -> int:
        return self.twin["W"].shape[1]

    def log_joint(self, y, s):
        return getattr(ref, f"log_joint_{FUNCTIONS[self.name]}")(y, s, **self.twin)

    def m_step(self, Y, states, q):
        return getattr(ref, f"m_step_{FUNCTIONS[self.name]}")(Y, states, q, self.twin)

    def sample(self, N, seed, missing=0.0):
        """Points; where some are missing, the last point has nothing at all."""
        rng = np.random.default_rng(seed)
        Y = getattr(ref, f"sample_{FUNCTIONS[self.name]}")(rng, N, **self.twin)[0]
        if missing:
            Y[rng.random(Y.shape) < missing] = np.nan
            Y[-1] = np.nan
        return Y

    def params(self, dtype=torch.float64):
        return tensors(self.name, self.twin, dtype)

    def code(self, y, s):
        """Posterior mean of the causes, given the state."""
        s = np.asarray(s, dtype=np.float64)
        if "gsc" not in self.name:
            return s
        return s * ref.slab_posterior(y, tuple(s), **self.twin)[0]

    def mean(self, y, s):
        """Posterior mean of the point without noise, given the state."""
        if "mca" in self.name:
            return ref.strongest(s, self.twin["W"], self.name == "mmca")
        return self.twin["W"] @ self.code(y, s)


def case(name: str, H: int = 4, D: int = 5, seed: int = 1, sigma: float = 0.7) -> Case:
    """A case with a random dictionary."""
    rng = np.random.default_rng(seed)
    W = rng.uniform(0.1 if name == "mca" else -2.0, 3.0, size=(D, H))
    match name:
        case "bsc":
            return Case(name, LinearCoding((1.0,)), {"W": W, "pi": 0.3, "sigma": sigma})
        case "tsc":
            return Case(name, LinearCoding((-1.0, 1.0), tied=True), {"W": W, "pi": 0.4, "sigma": sigma})
        case "dsc":
            twin = {"W": W, "phi": PHI, "probabilities": np.array([0.6, 0.3, 0.1]), "sigma": sigma}
            return Case(name, LinearCoding(PHI[1:]), twin)
        case "gsc" | "gsc_full":
            root = rng.normal(size=(H, 2 * H))
            Psi = rng.uniform(0.3, 1.5, H) if name == "gsc" else root @ root.T / (2 * H)
            twin = {"W": W, "pi": rng.uniform(0.2, 0.5, H), "mu": rng.normal(size=H), "Psi": Psi, "sigma": sigma}
            return Case(name, SpikeSlab(name == "gsc_full", H), twin)
        case _:
            return Case(name, MaxCoding(name == "mmca"), {"W": W, "pi": 0.3, "sigma": sigma})


def tensors(name: str, twin: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    """The package's parameters from those of the twin."""

    def t(x):
        return torch.tensor(np.asarray(x), dtype=dtype)

    W, variance = t(twin["W"]), t(twin["sigma"] ** 2)
    if "gsc" in name:
        return SlabParameters(W, t(twin["pi"]), t(twin["mu"]), t(twin["Psi"]), variance)
    if "mca" in name:
        return MaxParameters(W, t([1 - twin["pi"], twin["pi"]]).log(), variance)
    pi = twin.get("pi")
    prob = {"bsc": [1 - (pi or 0), pi], "tsc": [1 - (pi or 0), (pi or 0) / 2, (pi or 0) / 2]}
    return LinearParameters(W, t(prob.get(name, twin.get("probabilities"))).log(), variance)


def points(Y: np.ndarray, dtype: torch.dtype = torch.float64) -> Points:
    """All of them in one block."""
    return Points.of(torch.tensor(Y, dtype=dtype), bool(np.isnan(Y).any()))


def selection(kind: str, case: Case, like: torch.Tensor | None = None, n_states: int = 6) -> Any:
    """Everything; few candidates and two active; or states of each point's own."""
    like = torch.zeros((), dtype=torch.float64) if like is None else like
    if kind == "everything":
        return Everything(every_state(case.H, case.values, like))
    if kind == "preselected":
        return Preselection(few_active(min(3, case.H), 2, case.values, like), case.H)
    return Evolution(n_states, min(3, case.H), case.H, case.values)


def listed(states: Any, n: int) -> list[list[tuple[float, ...]]]:
    """States of each point, as tuples."""
    if isinstance(states, Own):
        found = states.values
    else:
        number = states.table.n_states(states.n_components)
        found = torch.stack([states.state(torch.full((n,), k)) for k in range(number)])
    return [[tuple(s) for s in found[:, :, k].tolist()] for k in range(n)]


def blocks(Y: np.ndarray, size: int) -> list[Points]:
    """Blocks of some points; all masked, or none."""
    whole = points(Y)
    parts = [torch.arange(start, min(start + size, len(Y))) for start in range(0, len(Y), size)]
    return [whole.take(part) for part in parts]


def step_run(case: Case, Y: np.ndarray, params: Any, chosen: Any, **settings: Any) -> Any:
    """`run` on one rank, in a few blocks, without a word."""
    settings = {"temperature": lambda step: 1.0, "max_iter": 30, "tol": 0.0, **settings}
    size = max(25, len(Y) // 4)
    return run(case.model, params, blocks(Y, size), chosen, comm=Serial(), quiet=True, progress=False, **settings)
