"""What is believed of the functions over a continuous axis: how smooth, how periodic, with or without a trend.

A kernel is the covariance of two values of one function, less the hyperparameters that are learned. Kernels are plain
values: hashable, comparable, and readable from the dict that `to_state` gives. A sum of kernels is the kernel of a sum
of independent functions: ``Matern(1.5) + Periodic(365.25) + Linear()``.

References
----------
Hartikainen and Särkkä (2010), "Kalman filtering and smoothing solutions to temporal Gaussian process regression
models". Solin and Särkkä (2014), "Explicit link between periodic covariance functions and state space models".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, final

__all__ = ["Kernel", "Linear", "Matern", "Periodic", "Sum", "White", "kernel_from_state"]


@dataclass(frozen=True)
class Kernel(ABC):
    """A covariance over a continuous axis. Use `Matern`, `Periodic`, `Linear`, `White` and their sums.

    Examples
    --------
    >>> kernel = Matern(1.5) + Periodic(365.25)
    >>> isinstance(kernel, Kernel), [type(part).__name__ for part in kernel.parts]
    (True, ['Matern', 'Periodic'])
    """

    @property
    @abstractmethod
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of what is learned, in order; those of variances end in "variance"."""

    @property
    def lengthscales(self) -> tuple[str, ...]:
        """Names of those hyperparameters that are in the unit of the axis."""
        return ()

    def __add__(self, other: object) -> Sum:
        return Sum((self, other)) if isinstance(other, Kernel) else NotImplemented

    def to_state(self) -> dict[str, Any]:
        """Return everything as a dict that JSON can hold, floats bit for bit; `kernel_from_state` reads it."""
        return {"kind": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self)}}


@final
@dataclass(frozen=True)
class Matern(Kernel):
    """Functions without a plan: nearby values are similar, far ones unrelated.

    Learned: ``lengthscale``, in the unit of the axis (days for dates), and ``variance``.

    Parameters
    ----------
    nu : {0.5, 1.5, 2.5}, default 1.5
        Smoothness: functions are continuous, once, or twice differentiable.

    Raises
    ------
    ValueError
        If `nu` is anything else.

    Examples
    --------
    >>> Matern() == Matern(nu=1.5), Matern().hyperparameters
    (True, ('lengthscale', 'variance'))
    """

    nu: float = 1.5

    def __post_init__(self) -> None:
        if not _is(Real, self.nu) or self.nu not in (0.5, 1.5, 2.5):
            raise ValueError(f"nu: expected 0.5, 1.5 or 2.5, got {self.nu!r}")
        object.__setattr__(self, "nu", float(self.nu))

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of what is learned, in order."""
        return ("lengthscale", "variance")

    @property
    def lengthscales(self) -> tuple[str, ...]:
        """Names of those hyperparameters that are in the unit of the axis."""
        return ("lengthscale",)


@final
@dataclass(frozen=True)
class Periodic(Kernel):
    r"""Functions that repeat themselves exactly, of any shape within the period.

    ``k(x, y) = variance * exp((cos(2 pi (x - y) / period) - 1) / l^2)``, as a Fourier series that ends after
    `n_harmonics` and is scaled so that its variance is ``variance`` again. Learned: ``lengthscale``, the ``l`` above,
    which has no unit (about 0.3: much detail; above 2: nearly a sine), and ``variance``.

    Parameters
    ----------
    period : float
        In the unit of the axis; days where it holds dates or durations (365.25 for the seasons).
    n_harmonics : int, default 7
        The finest detail is ``period / n_harmonics`` long. A function costs a state of ``2 n_harmonics + 1`` numbers,
        and the time of a fit grows with the cube of it, its memory with the square.

    Raises
    ------
    ValueError
        If `period` is not a positive finite number or `n_harmonics` no positive integer.

    Notes
    -----
    Nothing is forgotten along the axis: what all rows say adds up in one state. Keep values in float64; in float32,
    many rows of little noise leave no correct digit.

    References
    ----------
    Solin and Särkkä (2014), "Explicit link between periodic covariance functions and state space models".

    Examples
    --------
    >>> season = Periodic(365.25, n_harmonics=3)
    >>> Matern(1.5) + season
    Matern(nu=1.5) + Periodic(period=365.25, n_harmonics=3)
    >>> (Matern(1.5) + season).hyperparameters
    ('lengthscale', 'variance', 'periodic_lengthscale', 'periodic_variance')
    """

    period: float
    n_harmonics: int = 7

    def __post_init__(self) -> None:
        period, count = self.period, self.n_harmonics
        if not _is(Real, period) or not (period > 0 and math.isfinite(period)):
            raise ValueError(f"period: expected a positive finite number, got {period!r}")
        if not _is(Integral, count) or count < 1:
            raise ValueError(f"n_harmonics: expected a positive integer, got {count!r}")
        object.__setattr__(self, "period", float(period))
        object.__setattr__(self, "n_harmonics", int(count))

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of what is learned, in order."""
        return ("lengthscale", "variance")


@final
@dataclass(frozen=True)
class Linear(Kernel):
    """Straight lines of unknown intercept and slope: a trend that goes on outside the data.

    ``k(x, y) = variance * (1 + a b)`` where ``a`` and ``b`` are ``x`` and ``y`` counted from the middle of the axis's
    coordinates, in half their range. Learned: ``variance``, of the value in the middle and of the rise from there to
    the end.

    Examples
    --------
    >>> Linear().hyperparameters, (Matern() + Linear()).hyperparameters
    (('variance',), ('lengthscale', 'variance', 'linear_variance'))
    """

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of what is learned, in order."""
        return ("variance",)


@final
@dataclass(frozen=True)
class White(Kernel):
    """What each coordinate has for itself, unrelated to its neighbours: a part of a sum.

    Beside `Matern`, it keeps the smooth part smooth where single coordinates stand out, and widens what is said of
    coordinates that were never seen. It costs no state. Learned: ``variance``.

    Examples
    --------
    >>> (Matern() + White()).hyperparameters
    ('lengthscale', 'variance', 'white_variance')
    """

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of what is learned, in order."""
        return ("variance",)


@final
@dataclass(frozen=True, repr=False)
class Sum(Kernel):
    """The sum of independent functions of several kernels; ``+`` makes it.

    Learned: everything that its parts learn, in their order. Names carry the kind of the part and, from its second of
    a kind on, a number ("periodic_2_variance"); those of the first `Matern` stay plain.

    Parameters
    ----------
    parts : sequence of Kernel
        At least two, of which at most one is `White`; the parts of a sum among them stand in its place.

    Raises
    ------
    ValueError
        If there are fewer than two, more than one `White`, or something else than kernels.

    Examples
    --------
    >>> Sum([Matern(0.5), Periodic(7.0)]) + Linear() == Matern(0.5) + (Periodic(7.0) + Linear())
    True
    """

    parts: tuple[Kernel, ...]

    def __post_init__(self) -> None:
        given: Any = self.parts  # anything, before it is looked at
        flat: list[Kernel] = []
        for part in given if isinstance(given, (tuple, list)) else (given,):
            if not isinstance(part, Kernel):
                raise ValueError(f"parts: expected kernels, got {part!r}")
            flat.extend(part.parts if isinstance(part, Sum) else (part,))
        if len(flat) < 2:
            raise ValueError(f"parts: expected at least two kernels, got {given!r}")
        if sum(isinstance(part, White) for part in flat) > 1:
            raise ValueError(f"parts: expected at most one White, got {given!r}")
        object.__setattr__(self, "parts", tuple(flat))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of what is learned, in order."""
        pairs = zip(self._prefixes(), self.parts, strict=True)
        return tuple(prefix + name for prefix, part in pairs for name in part.hyperparameters)

    @property
    def lengthscales(self) -> tuple[str, ...]:
        """Names of those hyperparameters that are in the unit of the axis."""
        pairs = zip(self._prefixes(), self.parts, strict=True)
        return tuple(prefix + name for prefix, part in pairs for name in part.lengthscales)

    def to_state(self) -> dict[str, Any]:
        """Return everything as a dict that JSON can hold; `kernel_from_state` reads it."""
        return {"kind": "Sum", "parts": [part.to_state() for part in self.parts]}

    def _prefixes(self) -> list[str]:
        seen: dict[type, int] = {}
        prefixes = []
        for part in self.parts:
            seen[type(part)] = number = seen.get(type(part), 0) + 1
            kind = type(part).__name__.lower()
            plain = "" if isinstance(part, Matern) else f"{kind}_"
            prefixes.append(plain if number == 1 else f"{kind}_{number}_")
        return prefixes


def _is(kind: type, value: object) -> bool:
    """Whether a value is a number of an abstract kind, NumPy's types too, and no truth value."""
    return isinstance(value, kind) and not isinstance(value, bool)


def kernel_from_state(state: dict[str, Any]) -> Kernel:
    """Return the kernel whose `to_state` gave `state`; raise ValueError for a state of another kind.

    Examples
    --------
    >>> kernel = Matern(2.5) + Periodic(24.0)
    >>> kernel_from_state(kernel.to_state()) == kernel
    True
    """
    settings = dict(state)
    kind = settings.pop("kind", None)
    if kind == "Sum":
        return Sum(tuple(map(kernel_from_state, settings["parts"])))
    classes: dict[str, type[Kernel]] = {cls.__name__: cls for cls in (Matern, Periodic, Linear, White)}
    if kind not in classes:
        raise ValueError(f"state: expected a kind among {sorted([*classes, 'Sum'])}, got {kind!r}")
    return classes[kind](**settings)
