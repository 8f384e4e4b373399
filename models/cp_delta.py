"""The update of a weight in CP form: a sum of outer products, one for each component.

For a weight of shape (I1, …, IN), with a core ``g`` (R,) and factors ``A(n)`` (In, R) with columns ``a(n)_r``:

    ΔW = Σr g_r a(1)_r ∘ a(2)_r ∘ … ∘ a(N)_r,        W = W0 + s·ΔW,        s = alpha·(2R)^(N/2)/√R

It is a Tucker update whose core is zero off the superdiagonal. For matrices it is ``A(1) diag(g) A(2)ᵀ``, LoRA with the
size of each component apart. Columns have the norm that they have in `tucker_delta`, ``|a(n)_r|² = In/(2R)``, so a step
of ``lr`` in the core moves the weight by about ``alpha·lr``. A rank may exceed a mode's size.

References
----------
Hitchcock (1927), "The expression of a tensor or a polyadic as a sum of products", J. Math. Phys. 6.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from probtensor.models.adapter_config import FLoRAConfig
from probtensor.models.adapter_modules import Delta
from probtensor.models.tucker_delta import Tucker

__all__ = ["CPDelta", "cp_scale"]


def cp_scale(alpha: float, n_modes: int, rank: int) -> float:
    """Scale ``s`` that makes a step in the core move the weight by ``alpha`` times its size.

    Examples
    --------
    >>> cp_scale(1.0, 2, 4), cp_scale(1.0, 4, 4)
    (4.0, 32.0)
    """
    return float(alpha * (2 * rank) ** (n_modes / 2) / math.sqrt(rank))


class CPDelta(Delta):
    """One adapter's update of one parameter in CP form.

    Parameters
    ----------
    shape : sequence of int
    ranks : sequence of int
        One number, the rank.
    scale, seed, config, dropout
        As in `Delta`.
    dtype, device
        Of the adapter's parameters.

    Attributes
    ----------
    core : Parameter, shape (R,)
    factor_0, factor_1, … : Parameter, shape (In, R)
    ranks : tuple of int
        Of the Tucker form in which layers see it: a core of shape (R, R, I3, …), factors of the first two modes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        scale: float,
        seed: int,
        config: FLoRAConfig,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        (rank,) = ranks
        super().__init__(shape, (*(rank, rank)[: len(shape)], *shape[2:]), scale, seed, config, dropout)
        self.rank = rank
        self.core = nn.Parameter(torch.zeros(self.rank, dtype=dtype, device=device))
        for n, size in enumerate(shape):
            self.register_parameter(
                f"factor_{n}", nn.Parameter(torch.empty(size, self.rank, dtype=dtype, device=device))
            )
        self.reset_parameters()

    @property
    def update(self) -> Tucker:
        """Core, factors and scale of the Tucker form."""
        core, factors = self.core, self.factors
        for A in factors[2:]:
            core = core.unsqueeze(-1) * A.mT.reshape(self.rank, *[1] * (core.ndim - 1), -1)  # type: ignore[assignment, union-attr]
        if len(factors) > 1:
            core = torch.diag_embed(core.movedim(0, -1), dim1=0, dim2=1)  # type: ignore[assignment]
        return Tucker(core, (*factors[:2], *[None] * len(factors[2:])), self.scale)

    def as_dict(self) -> dict[str, Any]:
        """What files hold beside the tensors."""
        return {**super().as_dict(), "ranks": [self.rank], "form": "cp"}

    def reset_parameters(self) -> None:
        """Go back to the random start: orthonormal columns where there is room for them, else of their norm."""
        generator, factors = torch.Generator().manual_seed(self.seed), []
        for size in self.shape:
            columns = torch.randn(size, self.rank, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(columns)[0] if self.rank <= size else columns / columns.norm(dim=0)
            factors.append(basis * math.sqrt(size / (2 * self.rank)))
        self.start(factors)
