"""Components of CP models: how alike two models are, which component is which, and whether they are too many.

Plain numpy on factor matrices (n_k, R), one a mode. The order of components, and their signs and lengths as long as
these cancel over the modes, are free: each function says what it does about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

__all__ = ["Alignment", "align_components", "core_consistency", "factor_match_score"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]


class Alignment(NamedTuple):
    """A CP model with its components in the order and with the signs of another.

    Attributes
    ----------
    factors : list of arrays (n_k, R) of float64
        ``factors[k] = given[k][:, permutation] * signs[k]``: the same tensor as before.
    permutation : array (R,) of int
        Which of the given components stands where.
    signs : array (K, R) of float64
        Plus or minus one; their product over the modes is one.
    congruence : array (R,) of float64
        Product over the modes of the cosines between the paired columns: 1 for components that are the same up to
        lengths, -1 for opposite ones, 0 if a column of either is zero.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> factors = [rng.normal(size=(5, 2)), rng.normal(size=(4, 2))]
    >>> found = align_components([factor[:, ::-1] for factor in factors], factors)
    >>> found.permutation.tolist(), found.congruence.round(6).tolist()
    ([1, 0], [1.0, 1.0])
    """

    factors: list[FloatArray]
    permutation: IntArray
    signs: FloatArray
    congruence: FloatArray


def align_components(factors: Sequence[npt.ArrayLike], reference: Sequence[npt.ArrayLike]) -> Alignment:
    """Reorder the components of a CP model, and flip signs, so that they look like those of a reference.

    Components are paired so that the sum of their congruences (products over the modes of cosines) is greatest. Then
    each pair takes the signs with the greatest sum of cosines that leave the component as it is: an even number of
    modes is flipped. Lengths stay.

    Parameters
    ----------
    factors : sequence of arrays (n_k, R)
        The model to align, a factor matrix a mode. Weights belong into one of them.
    reference : sequence of arrays (n_k, R)
        The model to align it with; sizes and rank agree.

    Returns
    -------
    Alignment
        The aligned factors, permutation, signs and congruences.

    Raises
    ------
    ValueError
        If the lists are empty or differ in length, sizes or rank, or hold a value that is not finite.

    See Also
    --------
    factor_match_score : one number for two models; there signs are of no account.

    References
    ----------
    Lorenzo-Seva and ten Berge (2006), Tucker's Congruence Coefficient as a Meaningful Index of Factor Similarity,
    Methodology 2, 57-64.

    Examples
    --------
    >>> reference = [np.eye(3), np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])]
    >>> aligned = align_components([-2.0 * f[:, [1, 2, 0]] for f in reference], reference)
    >>> aligned.permutation.tolist(), aligned.signs.tolist()
    ([2, 0, 1], [[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    >>> bool(np.allclose(aligned.factors[0], 2.0 * reference[0]))
    True
    """
    given, wanted = _factors("factors", factors), _factors("reference", reference)
    _check_shapes("factors", given, "reference", wanted)
    cosines = np.stack([_unit_columns(w).T @ _unit_columns(g) for w, g in zip(wanted, given, strict=True)])
    _, permutation = linear_sum_assignment(cosines.prod(axis=0), maximize=True)
    components = np.arange(len(permutation))
    paired = cosines[:, components, permutation]  # (K, R)
    signs = np.where(paired < 0.0, -1.0, 1.0)
    odd = signs.prod(axis=0) < 0.0
    signs[np.abs(paired).argmin(axis=0)[odd], components[odd]] *= -1.0
    aligned = [factor[:, permutation] * sign for factor, sign in zip(given, signs, strict=True)]
    return Alignment(aligned, np.asarray(permutation, dtype=np.intp), signs, np.clip(paired.prod(axis=0), -1.0, 1.0))


def core_consistency(tensor: npt.ArrayLike, factors: Sequence[npt.ArrayLike]) -> float:
    """Core consistency (CORCONDIA) of a CP model, in percent: whether its components are all that links the modes.

    The Tucker core ``G`` that fits the tensor best with the model's factors is compared with the core ``T`` of the
    CP model, ones on the superdiagonal: ``100 (1 - sum (G - T)^2 / R)``. Near 100 the CP model is apt; values below
    about 50 and negative ones tell of too many components, or of a structure that is not CP's. A high value does not
    rule out too few components.

    The lengths of a component's columns are made equal first, since the core depends on how its length is shared
    between the modes. ``G`` is the tensor times the pseudoinverse of each factor, mode after mode: no Kronecker product
    is formed. If the columns of a factor depend on each other, of all best cores the smallest one is taken.

    Parameters
    ----------
    tensor : array (n_1, ..., n_K) of float
        The data. NaN marks a missing cell, which takes the model's value.
    factors : sequence of arrays (n_k, R)
        The factor matrices of the fitted model. Weights belong into one of them.

    Returns
    -------
    float
        At most 100.

    Raises
    ------
    ValueError
        If sizes do not agree, no cell is observed, or a value is infinite.

    References
    ----------
    Bro and Kiers (2003), A new efficient method for determining the number of components in PARAFAC models, Journal
    of Chemometrics 17, 274-286. The core by pseudoinverses: Papalexakis and Faloutsos (2015), Fast efficient and
    scalable core consistency diagnostic for the PARAFAC decomposition for big sparse tensors, ICASSP.

    Examples
    --------
    >>> eye = np.eye(2)
    >>> tensor = np.einsum("ir,jr,kr->ijk", eye, eye, eye)
    >>> core_consistency(tensor, [eye, eye, eye])
    100.0
    >>> tensor[0, 0, 1] = 1.0
    >>> core_consistency(tensor, [eye, eye, eye])
    50.0
    """
    matrices = _factors("factors", factors)
    data = np.asarray(tensor, dtype=np.float64)
    shape, rank, n_modes = tuple(len(m) for m in matrices), matrices[0].shape[1], len(matrices)
    if data.shape != shape:
        raise ValueError(f"tensor: expected the shape of the factors, {shape}, got {data.shape}")
    missing = np.isnan(data)
    if np.all(missing) or np.any(np.isinf(data)):
        raise ValueError("tensor: expected finite values, NaN where a cell is missing, and not NaN alone")
    lengths = np.stack([np.linalg.norm(m, axis=0) for m in matrices])  # (K, R)
    even = lengths.prod(axis=0) ** (1.0 / n_modes)
    matrices = [_unit_columns(m) * even for m in matrices]
    if np.any(missing):
        cells = np.nonzero(missing)
        data = data.copy()
        data[cells] = np.prod([m[at] for m, at in zip(matrices, cells, strict=True)], axis=0).sum(axis=1)
    core = data
    for matrix in matrices:  # the first mode goes, and comes back last
        core = np.tensordot(core, np.linalg.pinv(matrix), axes=(0, 1))
    core[(np.arange(rank),) * n_modes] -= 1.0
    return float(100.0 * (1.0 - np.sum(core**2) / rank))


def factor_match_score(
    factors_a: Sequence[npt.ArrayLike], factors_b: Sequence[npt.ArrayLike]
) -> tuple[float, npt.NDArray[np.intp]]:
    """Similarity of two CP models, whatever the order, signs and scales of their components.

    The similarity of two components is the product over the modes of the absolute cosine between their columns. The
    components are paired so that the sum of similarities is greatest, and the score is the mean over the pairs.

    Parameters
    ----------
    factors_a, factors_b : sequence of arrays (n_k, R)
        One factor matrix a mode; sizes and rank R agree between the two models. A component with a zero column in
        any mode adds nothing to its tensor: two such components are alike, and unlike every other one.

    Returns
    -------
    score : float
        Between 0 and 1; 1 when the components are the same up to order, sign and scale.
    permutation : array (R,) of int
        ``factors_b[k][:, permutation]`` lines up with ``factors_a[k]``.

    Raises
    ------
    ValueError
        If the lists are empty or differ in length, sizes or rank, or hold a value that is not finite.

    Examples
    --------
    >>> a = [np.eye(3), np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])]
    >>> order = [1, 2, 0]
    >>> score, permutation = factor_match_score(a, [-2.0 * f[:, order] for f in a])
    >>> round(score, 12), permutation.tolist()
    (1.0, [2, 0, 1])
    """
    a, b = _factors("factors_a", factors_a), _factors("factors_b", factors_b)
    _check_shapes("factors_b", b, "factors_a", a)
    unit_a, unit_b = [_unit_columns(f) for f in a], [_unit_columns(f) for f in b]
    rank = a[0].shape[1]
    similarity = np.ones((rank, rank))
    for u, v in zip(unit_a, unit_b, strict=True):
        similarity *= np.abs(u.T @ v)
    null_a, null_b = (np.any([~np.any(f, axis=0) for f in units], axis=0) for units in (unit_a, unit_b))
    similarity[np.ix_(null_a, null_b)] = 1.0
    _, permutation = linear_sum_assignment(similarity, maximize=True)
    score = float(np.mean(np.minimum(similarity[np.arange(rank), permutation], 1.0)))
    return score, np.asarray(permutation, dtype=np.intp)


def _factors(argument: str, factors: Sequence[npt.ArrayLike]) -> list[FloatArray]:
    """Return the factor matrices of a model as float64, checked."""
    matrices = [_factor(argument, mode, factor) for mode, factor in enumerate(factors)]
    shapes = [matrix.shape for matrix in matrices]
    if not matrices or len({shape[1] for shape in shapes}) != 1:
        raise ValueError(f"{argument}: expected matrices with one number of columns (at least 1), got shapes {shapes}")
    return matrices


def _check_shapes(argument: str, factors: list[FloatArray], other: str, expected: list[FloatArray]) -> None:
    """Refuse a model whose sizes or rank are not those of another."""
    shapes, wanted = [f.shape for f in factors], [f.shape for f in expected]
    if shapes != wanted:
        raise ValueError(f"{argument}: expected the shapes of {other}, {wanted}, got {shapes}")


def _factor(argument: str, mode: int, factor: npt.ArrayLike) -> FloatArray:
    """Return one factor matrix as float64, checked."""
    matrix = np.asarray(factor, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{argument}[{mode}]: expected a matrix (n_k, R) with entries, got shape {matrix.shape}")
    if not np.all(np.isfinite(matrix)):
        raise ValueError(f"{argument}[{mode}]: expected finite numbers, got NaN or infinity")
    return matrix


def _unit_columns(factor: FloatArray) -> FloatArray:
    """Scale columns to length one; zero columns stay zero, tiny and huge ones keep their angle."""
    largest = np.max(np.abs(factor), axis=0)
    scaled = factor / np.where(largest == 0.0, 1.0, largest)
    unit: FloatArray = scaled / np.maximum(np.linalg.norm(scaled, axis=0), 1.0)
    return unit
