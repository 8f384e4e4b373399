"""What all predictive distributions share: one for each of n rows, in the user's unit, as NumPy arrays.

All distributions are finite mixtures. Where a mixing variable is continuous (the weight of a Student-t cell, the
noise-free entry of a count), equally spaced nodes stand for it: the trapezoidal rule converges exponentially on the
whole line (Trefethen and Weideman 2014), and unlike quantiles of equal probability its nodes reach far into the tails.

References
----------
Trefethen, Weideman (2014), "The Exponentially Convergent Trapezoidal Rule", SIAM Review 56. Gneiting, Raftery (2007),
"Strictly Proper Scoring Rules, Prediction, and Estimation", JASA 102, equations 20 and 21, for the CRPS.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import special

__all__ = ["Array", "Predictive", "normal_nodes", "weight_nodes"]

Array = npt.NDArray[np.float64]

WEIGHT_NODES = 24
OUTSIDE = 1e-8, 1e-10  # probability of a weight below and above all nodes
CHUNK = 2**21  # numbers in the largest temporary


def normal_nodes(step: float = 0.4, reach: float = 9.6) -> tuple[Array, Array]:
    """Nodes and weights, each (M,), of expectations under a standard normal.

    For functions with singularities away from the real line, such as the logistic one at ``i pi``, these are better
    than as many Gauss-Hermite nodes, and for polynomials and exponentials as good.

    Examples
    --------
    >>> z, weights = normal_nodes()
    >>> len(z), round(float(weights @ z**4), 12)
    (49, 3.0)
    """
    m = round(reach / step)
    z = step * np.arange(-m, m + 1)
    weights = np.exp(-0.5 * z**2)
    return as_array(z), as_array(weights / weights.sum())


def weight_nodes(shape: Array, rate: Array) -> tuple[Array, Array]:
    """Nodes for gamma distributed weights: equally spaced in their logarithm.

    Parameters
    ----------
    shape, rate : ndarray, shape (n,)
        All finite, or all infinite: weights of one.

    Returns
    -------
    weights, probability : ndarray, shape (n, M)

    Examples
    --------
    >>> weights, probability = weight_nodes(np.array([2.0]), np.array([4.0]))
    >>> weights.shape, round(float((weights * probability).sum()), 4)
    ((1, 24), 0.5)
    """
    if np.isinf(shape).all():
        return np.ones((len(shape), 1)), np.ones((len(shape), 1))
    a = shape[:, None]
    low, high = np.log(special.gammaincinv(a, OUTSIDE[0])), np.log(special.gammainccinv(a, OUTSIDE[1]))
    x = low + (high - low) * np.linspace(0, 1, WEIGHT_NODES)
    log_density = a * x - np.exp(x)
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    return np.exp(x) / rate[:, None], density / density.sum(axis=1, keepdims=True)


class Predictive(ABC):
    """Distributions of n values. In `cdf`, `log_prob` and `crps`, y has shape (n,) or is a number; NaN is missing.

    Examples
    --------
    >>> from probtensor.predictive import NormalMixture
    >>> normal = NormalMixture(np.zeros(3), np.ones((3, 1)), np.ones(1))  # three standard normal values
    >>> lower, upper = normal.interval(0.9)
    >>> isinstance(normal, Predictive), upper.round(2).tolist()
    (True, [1.64, 1.64, 1.64])
    """

    @property
    @abstractmethod
    def mean(self) -> Array:
        """Means, shape (n,)."""

    @property
    @abstractmethod
    def std(self) -> Array:
        """Standard deviations, shape (n,)."""

    @abstractmethod
    def cdf(self, y: npt.ArrayLike) -> Array:
        """Probability of a value up to y, (n,); NaN for a missing one."""

    @abstractmethod
    def log_prob(self, y: npt.ArrayLike) -> Array:
        """Log density, or log probability of a discrete value, (n,); 0 for a missing one."""

    @abstractmethod
    def crps(self, y: npt.ArrayLike) -> Array:
        """Continuous ranked probability score, ``int (F(x) - 1{x >= y})^2 dx``, (n,); NaN for a missing one."""

    @abstractmethod
    def sample(self, n_samples: int, generator: np.random.Generator) -> Array:
        """Independent draws, shape (n, n_samples)."""

    def quantile(self, p: float | Sequence[float] | Array) -> Array:
        """The least value of which `cdf` is at least p.

        Parameters
        ----------
        p : float or sequence of float
            Probabilities, from 0 to 1.

        Returns
        -------
        ndarray, shape (n,), or (n, len(p)) for a sequence

        Raises
        ------
        ValueError
            If a p is no probability.
        """
        wanted = np.asarray(p, dtype=np.float64)
        if wanted.ndim > 1 or not np.all((wanted >= 0) & (wanted <= 1)):
            raise ValueError(f"p: expected a probability or a sequence of them, got {p!r}")
        if wanted.ndim == 0:
            return self._quantile(float(wanted))
        return np.stack([self._quantile(x) for x in wanted.tolist()], 1) if len(wanted) else np.empty((self._n, 0))

    def interval(self, coverage: float) -> tuple[Array, Array]:
        """Lower and upper ends, each (n,), of central intervals.

        Raises
        ------
        ValueError
            If `coverage` is not between 0 and 1.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage: expected a probability between 0 and 1, got {coverage!r}")
        return self._quantile((1 - coverage) / 2), self._quantile((1 + coverage) / 2)

    def affine(self, scale: float, shift: float) -> "Predictive":
        """The distributions of ``scale * y + shift``; for a location-scale family.

        Raises
        ------
        TypeError
            For counts and binary values, which have no unit.
        """
        raise TypeError(f"{type(self).__name__} has no unit: affine is for location-scale families")

    @property
    def _n(self) -> int:
        return len(self.mean)

    @abstractmethod
    def _quantile(self, p: float) -> Array: ...

    def _values(self, y: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Values (n,), 0 where one is missing, and where that is."""
        values = np.asarray(y, dtype=np.float64)
        if values.shape not in ((), (self._n,)):
            raise ValueError(f"y: expected shape ({self._n},), got {values.shape}")
        values = np.broadcast_to(values, (self._n,))
        missing = np.isnan(values)
        return np.where(missing, 0.0, values), missing


def finite(name: str, values: npt.ArrayLike, ndim: int) -> Array:
    """The argument `name` as float64, checked for being finite and of `ndim` axes."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or not np.all(np.isfinite(array)):
        raise ValueError(f"{name}: expected finite numbers, {ndim}-dimensional, got {values!r}")
    return array


def matrix(name: str, values: npt.ArrayLike, n: int | None = None) -> Array:
    """The argument `name` as float64, checked for being finite, not negative, and of shape (n, M), M > 0."""
    array = finite(name, values, 2)
    if array.shape[1] == 0 or (n is not None and len(array) != n):
        raise ValueError(f"{name}: expected shape ({'n' if n is None else n}, M) with M > 0, got {array.shape}")
    if np.any(array < 0):
        raise ValueError(f"{name}: expected numbers >= 0, got {array.min():g}")
    return array


def probabilities(weights: npt.ArrayLike, components: Array) -> Array:
    """The argument ``weights``, shape (M,) or (n, M), checked and repeated to the (n, M) of the components."""
    array = finite("weights", weights, np.ndim(weights))
    n, m = components.shape
    if array.shape not in ((m,), (n, m)):
        raise ValueError(f"weights: expected shape ({m},) or ({n}, {m}), got {array.shape}")
    if np.any(array < 0) or not np.allclose(array.sum(axis=-1), 1, rtol=0, atol=1e-6):
        raise ValueError("weights: expected probabilities >= 0 that sum to 1")
    return np.broadcast_to(array / array.sum(axis=-1, keepdims=True), (n, m))


def draw_components(weights: Array, n_samples: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    """Numbers (n, n_samples) of components drawn with probabilities (n, M)."""
    uniform = generator.random((len(weights), n_samples))
    chosen = np.zeros(uniform.shape, dtype=np.intp)
    for edge in np.cumsum(weights, axis=1)[:, :-1].T:
        chosen += uniform >= edge[:, None]
    return chosen


def chunks(n: int, width: int) -> Iterator[slice]:
    """Slices of n rows with at most CHUNK numbers in each, at `width` a row."""
    step = max(CHUNK // max(width, 1), 1)
    return (slice(first, first + step) for first in range(0, n, step))


def as_array(values: npt.ArrayLike) -> Array:
    """For functions whose result has no type."""
    return np.asarray(values, dtype=np.float64)
