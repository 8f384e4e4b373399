"""Maximise a smooth function of a few bounded parameters, by SciPy's L-BFGS-B on autograd's gradient."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

__all__ = ["maximize"]


def maximize(
    objective: Callable[[Tensor], Tensor],
    start: Tensor,
    bounds: Tensor,
    max_iter: int,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A few steps uphill; the value at the result is never below that at `start`.

    Parameters
    ----------
    objective : callable
        Takes a tensor shaped as `start`, gives a differentiable scalar.
    start : Tensor, any shape
    bounds : Tensor, shape (2, *start.shape)
        Lower and upper bounds.
    max_iter : int
        Iterations of L-BFGS-B.
    total : callable, optional
        Where each rank knows a part of the objective: sums a float64 vector over the ranks, with the same result on
        all of them. Value and gradient travel together, and all ranks take the same steps.

    Returns
    -------
    Tensor
        Shaped as `start`, same dtype and device.
    """

    def negative(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).to(start).reshape(start.shape).requires_grad_()
        with torch.enable_grad():
            value = objective(x)
            (gradient,) = torch.autograd.grad(value, x)
        found = torch.cat([value.detach().reshape(1), gradient.reshape(-1)]).double()
        found = found if total is None else total(found)
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
