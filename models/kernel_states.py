r"""Every kernel as a linear-Gaussian chain: what the smoother needs to know of it.

Conventions are those of `state_space`: ``R`` independent components, each a block of ``d`` entries of one state, and
column states. All methods give blocks, shape (..., R, d, d), with the hyperparameters of all components as rows of one
tensor (n_hyperparameters, R), no logarithms.

* `Matern`: the closed forms of `state_space`.
* `Periodic`: entry 0 is a constant, entries ``2j - 1`` and ``2j`` are the harmonic ``j``, a point that turns by
  ``2 pi j gap / period`` without noise, of prior covariance ``variance q_j`` times one. The value is the sum of the
  constant and of the first coordinates. ``q_j`` are the Fourier coefficients of
  ``exp((cos(theta) - 1) / l^2)`` up to ``j = n_harmonics``, scaled to the sum one.
* `Linear`: the value and the rise over half the axis's range, without noise. Its prior is not stationary.
* `Sum`: the states of the parts, one after the other; the value is the sum of theirs.

`White` has no state: `probtensor.models.white` adds it to what the others give.

References
----------
Solin and Särkkä (2014), "Explicit link between periodic covariance functions and state space models", equations 20 to
27. Hartikainen and Särkkä (2010), "Kalman filtering and smoothing solutions to temporal Gaussian process regression
models".
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

from probtensor.kernels import Kernel, Linear, Matern, Periodic, Sum
from probtensor.models.state_space import (
    Transition,
    matern_blocks,
    matern_covariance,
    state_dim,
    stationary_blocks,
)

__all__ = ["Extent", "KernelState", "kernel_state"]

VARIANCES = (1e-4, 1e4)  # of values in their standard deviations


class Extent(NamedTuple):
    """Where the coordinates of an axis lie: the middle and the length of their range, and how many there are."""

    middle: float
    range: float
    size: int


class KernelState(ABC):
    """The state-space form of one kernel.

    Attributes
    ----------
    observe : tuple of float
        The d weights with which the state's entries enter the value.
    """

    observe: tuple[float, ...]

    @abstractmethod
    def step(self, gaps: Tensor, hyper: Tensor) -> Transition:
        """The steps over gaps (n,), blocks of shape (n, R, d, d)."""

    @abstractmethod
    def prior(self, coordinates: Tensor, hyper: Tensor) -> Tensor:
        """The state's covariance at coordinates (n,), (n, R, d, d); (1, R, d, d) where it is the same everywhere."""

    @abstractmethod
    def covariance(self, x: Tensor, y: Tensor, hyper: Tensor) -> Tensor:
        """The kernel itself between coordinates (n,) and (m,), shape (R, n, m), for dense checks."""

    @abstractmethod
    def start(self) -> list[float]:
        """Hyperparameters to start from; the variances sum up to one."""

    @abstractmethod
    def bounds(self) -> list[tuple[float, float]]:
        """Lower and upper bound of each hyperparameter."""


@final
class MaternState(KernelState):
    """`Matern`; hyperparameters are lengthscale and variance."""

    def __init__(self, kernel: Matern, extent: Extent) -> None:
        self.nu = kernel.nu
        self.extent = extent
        self.observe = (1.0,) + (0.0,) * (state_dim(kernel.nu) - 1)

    def step(self, gaps: Tensor, hyper: Tensor) -> Transition:
        return matern_blocks(self.nu, gaps, hyper[0], hyper[1])

    def prior(self, coordinates: Tensor, hyper: Tensor) -> Tensor:
        return stationary_blocks(self.nu, hyper[1])[None]

    def covariance(self, x: Tensor, y: Tensor, hyper: Tensor) -> Tensor:
        return matern_covariance(self.nu, x[:, None] - y, hyper[0, :, None, None], hyper[1, :, None, None])

    def start(self) -> list[float]:
        return [self.extent.range / 5, 1.0]

    def bounds(self) -> list[tuple[float, float]]:
        # A lengthscale below the mean spacing of many coordinates says nothing but "unrelated", and overfits.
        shortest = self.extent.range / max(self.extent.size - 1, 10)
        return [(shortest, self.extent.range * 100), VARIANCES]


@final
class PeriodicState(KernelState):
    """`Periodic`; hyperparameters are the lengthscale without unit and the variance."""

    def __init__(self, kernel: Periodic) -> None:
        self.period = kernel.period
        self.n_harmonics = kernel.n_harmonics
        self.observe = (1.0,) + (1.0, 0.0) * kernel.n_harmonics

    def step(self, gaps: Tensor, hyper: Tensor) -> Transition:
        angle = self._phase(gaps)[:, None] * torch.arange(1, self.n_harmonics + 1, device=gaps.device)  # (n, J)
        cos, sin = torch.cos(angle), torch.sin(angle)
        d = len(self.observe)
        matrix = gaps.new_zeros(gaps.shape[0], d, d)
        matrix[:, 0, 0].fill_(1.0)
        first = torch.arange(1, d, 2, device=gaps.device)
        matrix[:, first, first] = matrix[:, first + 1, first + 1] = cos
        matrix[:, first, first + 1], matrix[:, first + 1, first] = sin, -sin
        matrix = matrix[:, None].expand(-1, hyper.shape[1], -1, -1)
        return Transition(matrix, torch.zeros_like(matrix))

    def prior(self, coordinates: Tensor, hyper: Tensor) -> Tensor:
        q = self._coefficients(hyper[0]) * hyper[1, :, None]  # (R, J + 1)
        return torch.diag_embed(torch.cat([q[:, :1], q[:, 1:].repeat_interleave(2, dim=1)], dim=1))[None]

    def covariance(self, x: Tensor, y: Tensor, hyper: Tensor) -> Tensor:
        order = torch.arange(self.n_harmonics + 1, device=x.device)
        waves = torch.cos(self._phase(x[:, None] - y)[..., None] * order)  # (n, m, J + 1)
        return torch.einsum("nmj,rj,r->rnm", waves, self._coefficients(hyper[0]), hyper[1])

    def start(self) -> list[float]:
        return [1.0, 1.0]

    def bounds(self) -> list[tuple[float, float]]:
        # Below 2.2 / J more than 3 % of the variance would lie in harmonics beyond the last, J, which are cut off: the
        # shape is then the truncation's, no longer the kernel's (below 1, 12 %, for J = 1). From 10 on the first
        # harmonic has less than 1 % of the variance, the second 3e-5: a sine next to a constant, of which a larger l
        # changes nothing but the ratio.
        return [(min(2.2 / self.n_harmonics, 1.0), 10.0), VARIANCES]

    def _phase(self, differences: Tensor) -> Tensor:
        """Angles in [0, 2 pi); whole periods go first, so that far coordinates lose no digits."""
        return torch.remainder(differences, self.period) * (2 * math.pi / self.period)

    def _coefficients(self, lengthscale: Tensor) -> Tensor:
        """Fourier coefficients ``q_0`` to ``q_J`` of each component, (R, J + 1), of sum one.

        They are Bessel functions, ``q_j ~ I_j(1 / l^2)``. The trapezoid sum over a period gives them as the discrete
        Fourier transform: its error is the coefficients of order ``n - J`` and beyond, which are below rounding for
        ``l > 10 / (n - J)``, and it needs neither a recurrence nor its derivative.
        """
        J = self.n_harmonics
        n = 16 * J + 64
        theta = torch.arange(n, dtype=lengthscale.dtype, device=lengthscale.device) * (2 * math.pi / n)
        order = torch.arange(J + 1, dtype=lengthscale.dtype, device=lengthscale.device)
        # Modulo n before the cosine: the angles stay small, the sum exact.
        turns = torch.remainder(order[:, None] * torch.arange(n, device=theta.device), n) * (2 * math.pi / n)
        values = torch.exp((torch.cos(theta) - 1) / lengthscale[:, None] ** 2)  # (R, n)
        q = (values @ torch.cos(turns).T).clamp(min=0.0)  # rounding may leave -1e-17 where nothing is
        q = torch.cat([q[:, :1], 2 * q[:, 1:]], dim=1)
        return q / q.sum(1, keepdim=True)


@final
class LinearState(KernelState):
    """`Linear`; the hyperparameter is the variance."""

    observe = (1.0, 0.0)

    def __init__(self, extent: Extent) -> None:
        self.middle = extent.middle
        self.unit = extent.range / 2

    def step(self, gaps: Tensor, hyper: Tensor) -> Transition:
        matrix = torch.eye(2, dtype=gaps.dtype, device=gaps.device).repeat(gaps.shape[0], 1, 1)
        matrix[:, 0, 1] = gaps / self.unit
        matrix = matrix[:, None].expand(-1, hyper.shape[1], -1, -1)
        return Transition(matrix, torch.zeros_like(matrix))

    def prior(self, coordinates: Tensor, hyper: Tensor) -> Tensor:
        z = (coordinates - self.middle) / self.unit
        one = torch.ones_like(z)
        unit = torch.stack([1 + z**2, z, z, one], dim=-1).reshape(-1, 1, 2, 2)
        return unit * hyper[0, :, None, None]

    def covariance(self, x: Tensor, y: Tensor, hyper: Tensor) -> Tensor:
        a, b = (x - self.middle) / self.unit, (y - self.middle) / self.unit
        return hyper[0, :, None, None] * (1 + torch.outer(a, b))

    def start(self) -> list[float]:
        return [1.0]

    def bounds(self) -> list[tuple[float, float]]:
        return [VARIANCES]


@final
class SumState(KernelState):
    """`Sum`; the hyperparameters are those of the parts, in their order."""

    def __init__(self, kernel: Sum, extent: Extent) -> None:
        self.parts = [kernel_state(part, extent) for part in kernel.parts]
        self.counts = [len(part.hyperparameters) for part in kernel.parts]
        self.observe = tuple(weight for part in self.parts for weight in part.observe)
        self.is_variance = [name.endswith("variance") for name in kernel.hyperparameters]

    def step(self, gaps: Tensor, hyper: Tensor) -> Transition:
        steps = [part.step(gaps, h) for part, h in self._each(hyper)]
        return Transition(_side_by_side([x.matrix for x in steps]), _side_by_side([x.noise for x in steps]))

    def prior(self, coordinates: Tensor, hyper: Tensor) -> Tensor:
        priors = [part.prior(coordinates, h) for part, h in self._each(hyper)]
        n = max(len(x) for x in priors) if len(coordinates) else 0
        return _side_by_side([x.expand(n, -1, -1, -1) if len(x) == 1 else x for x in priors])

    def covariance(self, x: Tensor, y: Tensor, hyper: Tensor) -> Tensor:
        return torch.stack([part.covariance(x, y, h) for part, h in self._each(hyper)]).sum(0)

    def start(self) -> list[float]:
        # The parts share a variance of one, so that a sum starts as far from zero as one kernel.
        starts = [value for part in self.parts for value in part.start()]
        return [value / len(self.parts) if v else value for value, v in zip(starts, self.is_variance, strict=True)]

    def bounds(self) -> list[tuple[float, float]]:
        return [pair for part in self.parts for pair in part.bounds()]

    def _each(self, hyper: Tensor) -> Iterator[tuple[KernelState, Tensor]]:
        """Each part with its own hyperparameters."""
        end = 0
        for part, count in zip(self.parts, self.counts, strict=True):
            start, end = end, end + count
            yield part, hyper[start:end]


def kernel_state(kernel: Kernel, extent: Extent) -> KernelState:
    """The state-space form of a kernel over an axis.

    Parameters
    ----------
    kernel : Kernel
    extent : Extent
        Of the axis's coordinates.

    Examples
    --------
    >>> kernel_state(Matern(1.5) + Periodic(1.0, 2), Extent(0.0, 1.0, 9)).observe
    (1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    """
    match kernel:
        case Matern():
            return MaternState(kernel, extent)
        case Periodic():
            return PeriodicState(kernel)
        case Linear():
            return LinearState(extent)
        case Sum():
            return SumState(kernel, extent)
    raise TypeError(f"kernel: expected Matern, Periodic, Linear or a sum of them, got {type(kernel).__name__}")


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    """Blocks (n, R, d_p, d_p) of several parts as one block (n, R, d, d) a component, the parts along its diagonal."""
    d = sum(x.shape[-1] for x in blocks)
    full = blocks[0].new_zeros(*blocks[0].shape[:-2], d, d)
    a = 0
    for x in blocks:
        b = a + x.shape[-1]
        full[..., a:b, a:b] = x
        a = b
    return full
