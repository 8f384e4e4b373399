"""Products with the inverse of a damped empirical Fisher matrix, whose gradients are stored: those of M-FAC.

The matrix ``F = G'G / m`` of m gradients, the rows of G (m, P), is never formed; by Woodbury's identity m equations
are left.

References
----------
Frantar, Kurtic, Alistarh (2021), "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS:
the static form and the dynamic one.
"""

from typing import final

import torch
from torch import Tensor

__all__ = ["GradientRing", "inverse_product"]


def inverse_product(gradients: Tensor, v: Tensor, damping: float) -> Tensor:
    """``(damping + G'G / m)^-1 v`` without a matrix of the parameters' size, by Woodbury's identity.

    Parameters
    ----------
    gradients : Tensor, shape (m, P)
        ``G``.
    v : Tensor, shape (P,)
    damping : float
        Above 0.

    Returns
    -------
    Tensor, shape (P,)
        O(m P) operations and a solve of m equations.

    Examples
    --------
    >>> G, v = torch.eye(2), torch.tensor([3.0, 6.0])
    >>> inverse_product(G, v, damping=1.0)  # G'G / m is half the identity
    tensor([2., 4.])
    """
    m = len(gradients)
    gram = gradients @ gradients.T
    gram.diagonal().add_(damping * m)
    explained: Tensor = gradients.T @ torch.linalg.solve(gram, gradients @ v)
    return (v - explained) / damping


@final
class GradientRing:
    """The last m gradients, and products with the inverse of their damped Fisher matrix: M-FAC's dynamic form.

    A new gradient takes the place of the oldest, and changes one row and column of the Gram matrix: O(m P) operations,
    as a product takes.

    Parameters
    ----------
    size : int
        ``m``.
    damping : float
        Above 0.

    Examples
    --------
    >>> ring = GradientRing(size=2, damping=1.0)
    >>> for gradient in torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]]):  # the first one is forgotten
    ...     ring.push(gradient)
    >>> ring.product(torch.tensor([3.0, 6.0]))
    tensor([2., 4.])
    """

    def __init__(self, size: int, damping: float) -> None:
        if not size >= 1:
            raise ValueError(f"size: expected an integer of at least 1, got {size!r}")
        if not damping > 0:
            raise ValueError(f"damping: expected a number above 0, got {damping!r}")
        self.size, self.damping = size, damping
        self._gradients: Tensor | None = None
        self._gram: Tensor | None = None
        self._count = 0

    def push(self, gradient: Tensor) -> None:
        """Take in a gradient (P,)."""
        if self._gradients is None or self._gram is None:
            self._gradients = gradient.new_zeros(self.size, len(gradient))
            self._gram = gradient.new_zeros(self.size, self.size)
        place = self._count % self.size
        self._gradients[place] = gradient
        self._gram[place] = self._gram[:, place] = self._gradients @ gradient
        self._count += 1

    def product(self, v: Tensor) -> Tensor:
        """``(damping + G'G / m)^-1 v`` with the gradients so far, shape (P,)."""
        m = min(self._count, self.size)
        if m == 0 or self._gradients is None or self._gram is None:
            return v / self.damping
        G = self._gradients[:m]
        gram = self._gram[:m, :m].clone()
        gram.diagonal().add_(self.damping * m)
        explained: Tensor = G.T @ torch.linalg.solve(gram, G @ v)
        return (v - explained) / self.damping
