r"""Laplace's approximation in the curvature's own basis: spectra, the evidence, and its maximum over hyperparameters.

At trained parameters θ with generalised Gauss–Newton curvature ``H = Σ J_iᵀ Λ_i J_i`` (J: derivatives of a row's
outputs, Λ: curvature of its negative log likelihood by the outputs) and a normal prior of mean 0 and precision δ,

    log evidence = log p(y | θ) − δ|θ|²/2 + (P log δ − log det(H + δ))/2 [ + gᵀ(H + δ)⁻¹g/2 ],

with the gradient ``g`` of log likelihood and log prior. The bracket, "newton", takes the mode of the linearised model
instead of θ. A linear model with normal noise then has its exact evidence and posterior, wherever θ is; for a
network that is trained to its mode the bracket vanishes.

Structures of H: "full"; "diagonal"; "kronecker", where the block of each parameter tensor (R1, …, RN) is
``M(1) ⊗ … ⊗ M(N) / tr^(N−1)`` with the sums ``M(n)`` of squares of the derivatives' unfoldings: the trace is right, and
so is the block where derivatives of all rows factorise alike.

References
----------
MacKay (1992), "A practical Bayesian framework for backpropagation networks", Neural Computation 4. Immer, Korzepa,
Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization", AISTATS. Antorán et al. (2022),
"Adapting the linearised Laplace model evidence for modern deep learning", ICML. Gupta, Koren, Singer (2018), "Shampoo:
preconditioned stochastic tensor optimization", ICML: the Kronecker factors by mode.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Curvature", "Hyperparameters", "Spectrum", "Summary", "log_evidence", "maximize_evidence", "step_to_mode"]

STRUCTURES = ("full", "kronecker", "diagonal")
MAX_FULL = 20_000  # parameters: 3.2 GB
LOG_BOUNDS = (math.log(1e-10), math.log(1e10))


class Hyperparameters(NamedTuple):
    """Precision of the prior, and variance of normal noise (1 for other likelihoods).

    Examples
    --------
    >>> found = Hyperparameters(precision=4.0, noise_variance=1.0)
    >>> found.precision**-0.5  # the prior's standard deviation
    0.5
    """

    precision: float
    noise_variance: float


class Summary(NamedTuple):
    """What the evidence needs of the data.

    Attributes
    ----------
    curvature : Tensor, shape (P,)
        Eigenvalues of H, for noise of variance 1.
    gradient : Tensor, shape (P,)
        Of the log likelihood, for noise of variance 1, in the basis of the eigenvectors.
    parameters : Tensor, shape (P,)
        In that basis.
    fit : float
        Log likelihood, or for normal noise the sum of squared residuals.
    n_outputs : int or None
        Number of observed values, for normal noise.

    Examples
    --------
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> Summary(curvature=one, gradient=one, parameters=one, fit=1.0, n_outputs=1).n_outputs
    1
    """

    curvature: Tensor
    gradient: Tensor
    parameters: Tensor
    fit: float
    n_outputs: int | None


class Spectrum:
    """Eigenvalues and eigenvectors of a curvature.

    Attributes
    ----------
    values : Tensor, shape (P,)
        At least 0.

    Examples
    --------
    >>> curvature = Curvature("diagonal", [(2,)])
    >>> curvature.add([torch.tensor([[1.0, 2.0]], dtype=torch.float64)])
    >>> spectrum = curvature.spectrum()
    >>> spectrum.values.tolist(), spectrum.rotate([torch.tensor([[5.0, 6.0]], dtype=torch.float64)]).tolist()
    ([1.0, 4.0], [[5.0, 6.0]])
    """

    def __init__(self, values: Tensor, turn: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.values, self._turn = values.clamp_min(0.0), turn

    def rotate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Vectors in the basis of the eigenvectors.

        Parameters
        ----------
        tensors : sequence of Tensor, shapes (m, *shape)
            The parts of m vectors, one for each of the parameter tensors.

        Returns
        -------
        Tensor, shape (m, P)
        """
        return self._turn(tensors)


class Curvature:
    """Sum of the outer products of rows, kept in one of the structures.

    Parameters
    ----------
    structure : {"full", "kronecker", "diagonal"}
    shapes : sequence of tuple of int
        Of the parameter tensors.

    Raises
    ------
    ValueError
        If the structure is unknown, or "full" for more than 20,000 parameters.

    Examples
    --------
    >>> curvature = Curvature("full", [(2,)])
    >>> curvature.add([torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)])
    >>> curvature.spectrum().values.tolist()
    [1.0, 4.0]
    """

    def __init__(self, structure: str, shapes: Sequence[tuple[int, ...]]) -> None:
        if structure not in STRUCTURES:
            raise ValueError(f"structure: expected one of {', '.join(STRUCTURES)}, got {structure!r}")
        self.structure, self.shapes = structure, tuple(shapes)
        self.n = sum(math.prod(shape) for shape in self.shapes)
        if structure == "full" and self.n > MAX_FULL:
            raise ValueError(f"structure: expected 'kronecker' or 'diagonal' for {self.n:,} parameters, got 'full'")
        self._sums: list[Tensor] = []
        self._rows: list[Tensor] = []  # of "full", while they are fewer than parameters

    def add(self, rows: Sequence[Tensor]) -> None:
        """Add rows, shapes (m, *shape)."""
        if self.structure == "full":
            self._rows.append(_flat(rows))
            if not self._sums and sum(map(len, self._rows)) < self.n:
                return
            rows_seen = torch.cat(self._rows)
            terms = [rows_seen.mT @ rows_seen]
            self._rows = []
        elif self.structure == "diagonal":
            terms = [_flat(rows).square().sum(0)]
        else:
            unfoldings = [row.movedim(n, 0).flatten(1) for row in rows for n in range(1, row.ndim)]
            terms = [unfolding @ unfolding.mT for unfolding in unfoldings]
        self._sums = [a + b for a, b in zip(self._sums, terms, strict=True)] if self._sums else terms

    def spectrum(self) -> Spectrum:
        """Eigenvalues, and the basis that belongs to them."""
        if self.structure == "diagonal":
            return Spectrum(self._sums[0], _flat)
        if self._rows:
            return _thin(torch.cat(self._rows))
        found = [torch.linalg.eigh(total) for total in self._sums]
        if self.structure == "full":
            values, vectors = found[0]
            return Spectrum(values, lambda tensors: _flat(tensors) @ vectors)
        parts, bases, start = [], [], 0
        for shape in self.shapes:
            block = found[start : start + len(shape)]
            start += len(shape)
            trace = block[0][0].sum().clamp_min(torch.finfo(block[0][0].dtype).tiny)
            product = block[0][0]
            for values, _ in block[1:]:
                product = (product[:, None] * (values / trace)).flatten()
            parts.append(product)
            bases.append([vectors for _, vectors in block])

        def turn(tensors: Sequence[Tensor]) -> Tensor:
            turned = []
            for tensor, basis in zip(tensors, bases, strict=True):
                for n, vectors in enumerate(basis, start=1):
                    tensor = torch.tensordot(tensor, vectors, ([n], [0])).movedim(-1, n)
                turned.append(tensor)
            return _flat(turned)

        return Spectrum(torch.cat(parts), turn)


def _thin(rows: Tensor) -> Spectrum:
    """Of the sum of outer products of few rows (m, P): a basis of all P, of which m reflections are kept."""
    m, n = rows.shape
    reflectors, scales = torch.geqrf(rows.mT)
    vectors, roots, _ = torch.linalg.svd(reflectors[:m].triu())

    def turn(tensors: Sequence[Tensor]) -> Tensor:
        turned = torch.ormqr(reflectors, scales, _flat(tensors).mT, transpose=True).mT
        return torch.cat([turned[:, :m] @ vectors, turned[:, m:]], 1)

    return Spectrum(F.pad(roots.square(), (0, n - m)), turn)


def log_evidence(summary: Summary, precision: Tensor, noise_variance: Tensor, newton: bool = False) -> Tensor:
    """Logarithm of the approximate evidence.

    Parameters
    ----------
    summary : Summary
    precision, noise_variance : Tensor, shape ()
    newton : bool, default False
        See the module's docstring.

    Returns
    -------
    Tensor, shape ()

    Examples
    --------
    One value y = 2, one parameter with mode 1 under a prior and a noise of variance 1; the evidence is N(2; 0, 2):

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> evidence = log_evidence(Summary(one, one, one, 1.0, 1), one[0], one[0])
    >>> normal = torch.distributions.Normal(0.0, 2**0.5)
    >>> round(evidence.item() - normal.log_prob(torch.tensor(2.0)).item(), 5)
    0.0
    """
    curvature = summary.curvature / noise_variance
    square = summary.parameters.square().sum()
    value = (precision.log() * len(curvature) - (curvature + precision).log().sum() - precision * square) / 2
    if newton:
        value = value + (_slope(summary, precision, noise_variance).square() / (curvature + precision)).sum() / 2
    if summary.n_outputs is None:
        return value + summary.fit
    return value - summary.fit / (2 * noise_variance) - summary.n_outputs / 2 * (2 * math.pi * noise_variance).log()


def step_to_mode(summary: Summary, found: Hyperparameters) -> Tensor:
    """What leads from the parameters to the mode of the linearised model, shape (P,), in the basis of eigenvectors.

    Examples
    --------
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> step_to_mode(Summary(one, one, one, 1.0, 1), Hyperparameters(1.0, 1.0)).tolist()  # it is the mode
    [0.0]
    """
    precision, noise = (torch.tensor(value, dtype=torch.float64) for value in found)
    return _slope(summary, precision, noise) / (summary.curvature / noise + precision)


def maximize_evidence(
    summary: Summary, precision: float | None, noise_variance: float | None, newton: bool = False
) -> Hyperparameters:
    """The hyperparameters of the largest evidence, those left out that are given.

    The search is over logarithms, from the best point of a coarse grid. An evidence that grows without end (parameters
    that are all zero want an infinite precision) stops at 1e-10 or 1e10.

    Parameters
    ----------
    summary : Summary
    precision, noise_variance : float or None
        None: to be found.
    newton : bool, default False

    Examples
    --------
    >>> parameters = torch.full((50,), 2.0, dtype=torch.float64)  # known nearly exactly
    >>> summary = Summary(torch.full_like(parameters, 1e6), 0 * parameters, parameters, 0.0, None)
    >>> round(maximize_evidence(summary, None, None).precision, 2)  # one over their mean square
    0.25
    """
    noise = 1.0 if summary.n_outputs is None else noise_variance
    given = (precision, noise)
    if precision is not None and noise is not None:
        return Hyperparameters(precision, noise)

    def both(logs: Tensor) -> list[Tensor]:
        free = iter(logs.exp())
        return [next(free) if value is None else torch.tensor(value, dtype=torch.float64) for value in given]

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(logs, dtype=torch.float64, requires_grad=True)
        first, second = both(at)
        value = -log_evidence(summary, first, second, newton)
        (gradient,) = torch.autograd.grad(value, at)
        return float(value.detach()), gradient.numpy()

    residual = max(summary.fit / (summary.n_outputs or 1), math.exp(LOG_BOUNDS[0]))
    grid = [[]] if precision is not None else [[value] for value in np.linspace(*LOG_BOUNDS, 24)]
    starts = [[*point, math.log(residual)] if noise is None else point for point in grid]
    start = min(starts, key=lambda point: loss(np.array(point))[0])
    best = minimize(loss, np.array(start), jac=True, method="L-BFGS-B", bounds=[LOG_BOUNDS] * len(start))
    return Hyperparameters(*(float(value) for value in both(torch.from_numpy(best.x))))


def _slope(summary: Summary, precision: Tensor, noise_variance: Tensor) -> Tensor:
    """Gradient of log likelihood and log prior."""
    return summary.gradient / noise_variance - precision * summary.parameters


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)
