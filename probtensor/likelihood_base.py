"""What a model asks of a likelihood: expectations under a Gaussian, and the Gaussian factor that stands for it."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Self

import numpy as np
from torch import Tensor

from probtensor.predictive_base import Predictive

__all__ = ["Entries", "Likelihood", "refuse", "to_numpy"]


class Entries(NamedTuple):
    """What the rows of each entry of the tensor say; an entry is one row, or all rows of one cell merged.

    Attributes
    ----------
    count : Tensor, shape (n,)
        Number of its rows, or the sum of their weights.
    weight : Tensor, shape (n,)
        Sum of the rows' relative precisions; `count` where nothing is known about precision.
    value : Tensor, shape (n,)
        Precision-weighted mean.
    scatter : Tensor, shape (n,)
        Weighted sum of squared deviations from that mean.
    log_weight : Tensor, shape (n,)
        Sum of the logarithms of the rows' relative precisions.

    Examples
    --------
    A cell with two rows, 1 and 3, of weight one each:

    >>> import torch
    >>> entries = Entries(*torch.tensor([[2.0], [2.0], [2.0], [2.0], [0.0]]))
    >>> entries.value.item(), entries.scatter.item()
    (2.0, 2.0)
    """

    count: Tensor  # type: ignore[assignment]  # nobody counts the elements of this tuple
    weight: Tensor
    value: Tensor
    scatter: Tensor
    log_weight: Tensor


class Likelihood(ABC):
    """How an observed value scatters around a function of its entry ``f``.

    Pure functions of float64 tensors, on any device. Expectations are under ``f_n ~ N(mean_n, variance_n)``.

    Attributes
    ----------
    name : str
    location_scale : bool
        Whether values may be standardised before fitting.
    exact : bool
        Whether `sites` is the optimum of coordinate ascent, so that no damping is needed.
    cold : float
        How often each row counts in a fit's first sweeps. More than once where one row says so little that components
        would vanish before they find what many rows share.

    Examples
    --------
    >>> import torch
    >>> from probtensor.likelihoods import Poisson, StudentT
    >>> [(likelihood.name, likelihood.location_scale) for likelihood in (Poisson(), StudentT())]
    [('poisson', False), ('student-t', True)]
    """

    name: ClassVar[str]
    location_scale: ClassVar[bool]
    exact: ClassVar[bool]
    cold: ClassVar[float] = 1.0

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the P parameters, whose logarithms are learned."""
        return ()

    def start(self, share: float, like: Tensor) -> Tensor:
        """Log-parameters (P,) to start from, of the dtype and on the device of `like`.

        Parameters
        ----------
        share : float
            Share of the values' variance, which is one, that starts as noise.
        like : Tensor
        """
        return like.new_zeros(len(self.parameters))

    def bounds(self, like: Tensor) -> Tensor:
        """Least and greatest log-parameters, shape (2, P)."""
        return like.new_zeros(2, len(self.parameters))

    def light_tailed(self) -> Self:
        """The likelihood with light tails and the same log-parameters; itself where the tails are light."""
        return self

    @abstractmethod
    def check(self, y: Tensor) -> None:
        """Raise a ValueError that names y if it holds values (n,) that cannot occur; NaN, a missing value, may."""

    @abstractmethod
    def offset(self, mean: float) -> float:
        """``f`` at which ``E y = mean``, kept finite; 0 where values may be standardised."""

    @abstractmethod
    def expected_log_prob(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> Tensor:
        """``E log p(y_n | f_n)``, or a lower bound of it.

        Parameters
        ----------
        log_parameters : Tensor, shape (P,)
            The result is differentiable in them.
        entries : Entries
        mean, variance : Tensor, shape (n,)
            Of ``f``; the variance may be 0.

        Returns
        -------
        Tensor, shape (n,)
        """

    @abstractmethod
    def sites(self, log_parameters: Tensor, entries: Entries, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussian factors ``exp(shift f - precision f^2 / 2)`` that stand for the likelihood near the moments.

        A natural-gradient step of length one on `expected_log_prob`, L: ``precision = -2 dL/dvariance``,
        ``shift = dL/dmean + precision mean``.

        Parameters
        ----------
        log_parameters, entries, mean, variance
            As in `expected_log_prob`.

        Returns
        -------
        precision : Tensor, shape (n,)
            Not negative.
        shift : Tensor, shape (n,)

        References
        ----------
        Khan and Lin (2017), "Conjugate-Computation Variational Inference", AISTATS, for the update. Opper and
        Archambeau (2009), "The Variational Gaussian Approximation Revisited", Neural Computation 21, for the
        derivatives.
        """

    @abstractmethod
    def predictive(self, log_parameters: Tensor, mean: Tensor, variance: Tensor) -> Predictive:
        """Distribution of new values, ``f`` integrated out, for moments (n,) of ``f``."""


def to_numpy(x: Tensor) -> np.ndarray:
    """The numbers on the CPU, float64, without gradient."""
    return np.asarray(x.detach().double().cpu().numpy())


def refuse(bad: Tensor, y: Tensor, expected: str) -> None:
    """Raise a ValueError that names y if any element is `bad`, and says what was `expected`."""
    if bool(bad.any()):
        raise ValueError(f"y: expected {expected}, got {float(y[bad][0]):g} ({int(bad.sum())} such of {y.numel()})")
