"""Tucker updates written out: one einsum over all indices, with identities for the factors that are left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LETTERS = "abcdefgh"


def dense_delta(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """``ΔW[i1, …, iN] = Σ G[r1, …, rN] Π A(n)[in, rn]`` in one einsum."""
    N = core.ndim
    full = [torch.eye(core.shape[n], dtype=core.dtype) if A is None else A for n, A in enumerate(factors)]
    small, large = LETTERS[:N], LETTERS[:N].upper()
    terms = ",".join([small, *(large[n] + small[n] for n in range(N))])
    return torch.einsum(f"{terms}->{large}", core, *full)


def delta_by_loops(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """The same, entry by entry."""
    sizes = [core.shape[n] if A is None else A.shape[0] for n, A in enumerate(factors)]
    total = torch.zeros(sizes, dtype=core.dtype)
    for i in itertools.product(*map(range, sizes)):
        for r in itertools.product(*map(range, core.shape)):
            parts = [float(i[n] == r[n]) if A is None else float(A[i[n], r[n]]) for n, A in enumerate(factors)]
            total[i] += core[r] * math.prod(parts)
    return total


def cp_by_loops(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``ΔW[i1, …, iN] = Σr g[r] Π A(n)[in, r]``, entry by entry."""
    core, factors = core.detach(), [A.detach() for A in factors]
    total = torch.zeros([len(A) for A in factors], dtype=core.dtype)
    for i in itertools.product(*map(range, total.shape)):
        total[i] = sum(core[r] * math.prod(float(A[i[n], r]) for n, A in enumerate(factors)) for r in range(len(core)))
    return total
