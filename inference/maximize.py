"""Maximise a smooth function of a few bounded parameters, by SciPy's L-BFGS-B on autograd's gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from probtensor.blocks import Total, total_here

__all__ = ["maximize"]


def maximize(
    objective: Callable[..., Tensor],
    start: Tensor,
    bounds: Tensor,
    max_iter: int,
    parts: Sequence[Any] | None = None,
    total: Total = total_here,
) -> Tensor:
    """A few steps uphill; the value at the result is never below that at `start`.

    Parameters
    ----------
    objective : callable
        Takes a tensor shaped as `start`, and a part if there are any; gives a differentiable scalar.
    start : Tensor, any shape
    bounds : Tensor, shape (2, *start.shape)
        Lower and upper bounds.
    max_iter : int
        Iterations of L-BFGS-B.
    parts : sequence, optional
        What the objective is a sum over, for example rows.
    total : callable, optional
        Sums float64 vectors, one a part: over all ranks, if each has some, with the same result on all of them. Value
        and gradient travel together, and all ranks take the same steps. Default: over the parts.

    Returns
    -------
    Tensor
        Shaped as `start`, same dtype and device.

    Examples
    --------
    >>> start, bounds = torch.zeros(2, dtype=torch.float64), torch.tensor([[-9.0, -9.0], [9.0, 1.0]])
    >>> maximize(lambda x: -((x - 2) ** 2).sum(), start, bounds.double(), max_iter=20).round(decimals=3).tolist()
    [2.0, 1.0]
    """

    def value_and_gradient(x: Tensor, *part: Any) -> Tensor:
        with torch.enable_grad():
            value = objective(x, *part)
            (gradient,) = torch.autograd.grad(value, x)
        return torch.cat([value.detach().reshape(1), gradient.reshape(-1)]).double()

    def negative(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).to(start).reshape(start.shape).requires_grad_()
        found = value_and_gradient(x) if parts is None else total(value_and_gradient(x, part) for part in parts)
        return -found[0].item(), -found[1:].cpu().numpy()

    x0 = start.reshape(-1).double().cpu().numpy()
    result = minimize(
        negative,
        x0,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds.reshape(2, -1).double().cpu().numpy().T,
        options={"maxiter": max_iter, "maxfun": 2 * max_iter + 2},
    )
    return torch.from_numpy(result.x).to(start).reshape(start.shape)
