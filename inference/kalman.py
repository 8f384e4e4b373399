r"""Exact inference in a linear-Gaussian chain, parallel in time.

The chain is ``x_1 ~ N(0, P_1)``, ``x_j | x_{j-1} ~ N(A_j x_{j-1}, Q_j)`` and each step carries a *site*
``exp(h_j' u_j - u_j' L_j u_j / 2)`` on the observed part ``u_j = H x_j`` of the state. Sites are kept in
this information form, so a site of precision zero, or of any rank, needs no special case.

A *block* is a run of sites and transitions in turn; it acts on what comes before and after it through five arrays
(`Element`), and two blocks merge by `_merge`, an associative operation. Merging neighbours level by level gives log2(T)
levels of batched operations, on CPU and GPU. Going down again, the state before a block gives the state at the
boundaries inside it, and the information after a block gives the information there; the two together are the smoothed
state. Each step is such a boundary: its own site belongs to what comes after. No ``Q`` and no predicted covariance is
ever inverted: steps of length zero and nearly equal coordinates are exact, and all of it is differentiable.

References
----------
Särkkä and García-Fernández (2021), "Temporal parallelization of Bayesian smoothers", IEEE Trans. Automatic Control
66(1).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from probtensor.gaussian import square_root, standard_normal
from probtensor.linalg import inverse, solve, solve_and_log_det

__all__ = [
    "Chain",
    "Element",
    "Posterior",
    "Sites",
    "between",
    "condition",
    "information_of",
    "log_normalizer",
    "pull_back",
    "sample",
    "smooth",
    "smooth_between",
]


class Sites(NamedTuple):
    """Gaussian factors ``exp(shift' u - u' precision u / 2)`` on the observed part of each step.

    Attributes
    ----------
    precision : Tensor, shape (T, R, R)
        Symmetric, positive semi-definite; may be singular or zero.
    shift : Tensor, shape (T, R) or (T, R, S)
        Precision times mean; ``S`` columns share one precision.
    """

    precision: Tensor
    shift: Tensor


class Chain(NamedTuple):
    """A Gauss-Markov chain of T steps.

    Attributes
    ----------
    matrix : Tensor, shape (T, D, D)
        ``A_j``; ``A_1`` must be zero, since nothing comes before.
    noise : Tensor, shape (T, D, D)
        ``Q_j``; ``Q_1`` is the prior covariance of the first state.
    observe : Tensor, shape (R, D)
        ``H``: the part of the state that the sites see.
    """

    matrix: Tensor
    noise: Tensor
    observe: Tensor


class Posterior(NamedTuple):
    """What the data say at each step: from the left (predicted) and from the right (backward information).

    Attributes
    ----------
    mean : Tensor, shape (T, D, S)
        Predicted mean: the state given the sites before its own.
    covariance : Tensor, shape (T, D, D)
        Predicted covariance.
    shift : Tensor, shape (T, D, S)
        Shift of the backward information: the likelihood of its own and all later sites as a function of the state.
    precision : Tensor, shape (T, D, D)
        Precision of the backward information.
    """

    mean: Tensor
    covariance: Tensor
    shift: Tensor
    precision: Tensor


class Element(NamedTuple):
    """A block: the state after it given the one before, ``N(A x + b, C)``, and what its sites say of that one.

    That is ``exp(eta' x - x' J x / 2)``, up to a constant. All tensors have the blocks as first dimension.

    Attributes
    ----------
    A : Tensor, shape (n, D, D)
    state : Tensor, shape (n, D, D + S)
        ``[C, b]``.
    information : Tensor, shape (n, D, D + S)
        ``[J, eta]``.
    """

    A: Tensor
    state: Tensor
    information: Tensor


def smooth(chain: Chain, sites: Sites) -> Posterior:
    """Predicted states and backward information of all steps.

    Parameters
    ----------
    chain : Chain
        Prior, T steps.
    sites : Sites
        One site a step.

    Returns
    -------
    Posterior
        Combine with `condition` for smoothed moments. O(T D^3) operations in O(log T) batched calls.
    """
    return _posterior(_elements(chain, sites))


def between(chain: Chain, sites: Sites, steps: Tensor) -> Element:
    """What lies between some steps of a chain, with all sites there; the sites of these steps are left out.

    Parameters
    ----------
    chain : Chain
        T steps.
    sites : Sites
        One site a step.
    steps : Tensor, shape (M,), int64
        Sorted, distinct.

    Returns
    -------
    Element
        M + 1 blocks for `smooth_between`: one to each of the steps from the one before, the last to the chain's end.
    """
    others = Sites(*(x.index_fill(0, steps, 0.0) for x in sites))
    elements = _elements(chain, others)
    block = torch.searchsorted(steps, torch.arange(len(elements.A), device=steps.device))
    while len(block) > len(steps) + 1:
        # In each block every second element merges with the one after it.
        number = torch.arange(len(block), device=block.device)
        stays = (number - torch.searchsorted(block, block)) % 2 == 0
        left = (stays[:-1] & (block[1:] == block[:-1])).nonzero().squeeze(-1)
        merged = _merge(Element(*(x[left] for x in elements)), Element(*(x[left + 1] for x in elements)))
        elements = Element(*(x.index_copy(0, left, m)[stays] for x, m in zip(elements, merged, strict=True)))
        block = block[stays]
    return elements


def smooth_between(blocks: Element, observe: Tensor, sites: Sites) -> Posterior:
    """Predicted states and backward information of some steps of a chain: what `smooth` gives there.

    Parameters
    ----------
    blocks : Element
        What lies `between` the M steps.
    observe : Tensor, shape (R, D)
    sites : Sites
        Of the M steps, with `shift` of shape (M, R).
    """
    information = torch.cat([blocks.information[:1], blocks.information[1:] + information_of(observe, sites)])
    return _posterior(blocks._replace(information=information))


def condition(
    mean: Tensor, covariance: Tensor, shift: Tensor, precision: Tensor, entries: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Moments of ``N(mean, covariance)`` times ``exp(shift' x - x' precision x / 2)``.

    Parameters
    ----------
    mean, shift : Tensor, shape (..., D, S)
    covariance, precision : Tensor, shape (..., D, D)
        Both may be singular.
    entries : slice, default all
        Which entries of ``x`` are asked for, E.

    Returns
    -------
    mean : Tensor, shape (..., E, S)
    covariance : Tensor, shape (..., E, E)
    """
    met = torch.cat([covariance[..., entries], mean + covariance @ shift], dim=-1)
    found = solve(_one_plus(covariance, precision), met)[..., entries, :]
    E = found.shape[-2]
    return found[..., E:], _symmetric(found[..., :E])


def pull_back(matrix: Tensor, noise: Tensor, shift: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Information about ``x_j`` as information about ``x_{j-1}``, when ``x_j | x_{j-1} ~ N(matrix x_{j-1}, noise)``.

    Parameters
    ----------
    matrix, noise : Tensor, shape (..., D, D)
    shift : Tensor, shape (..., D, S)
    precision : Tensor, shape (..., D, D)

    Returns
    -------
    shift : Tensor, shape (..., D, S)
    precision : Tensor, shape (..., D, D)
    """
    back = matrix.mT @ _inverse_one_plus(precision, noise)
    return back @ shift, _symmetric(back @ precision @ matrix)


def log_normalizer(chain: Chain, sites: Sites, posterior: Posterior | None = None) -> Tensor:
    """Log of the integral of the prior times all sites (``log Z``).

    Each step's site is integrated over what the sites before it predict. The gradient comes from the smoother, not from
    autograd's walk back through all levels: with what is known before and after step j held fixed, ``log Z`` depends on
    that step's transition and site only through one small Gaussian integral.

    Parameters
    ----------
    chain : Chain
    sites : Sites
        With `shift` of shape (T, R).
    posterior : Posterior, optional
        What `smooth` gave for the same chain and sites; spares smoothing again.

    Returns
    -------
    Tensor, scalar
        Once differentiable in every argument. For sites that stand for observations ``y ~ N(u, 1 / L)`` it is the
        log-likelihood less the sites' own constants.
    """
    A, Q, H = chain
    with torch.no_grad():
        posterior = smooth(chain, sites) if posterior is None else Posterior(*(x.detach() for x in posterior))
    value = site_log_normalizer((H @ posterior.mean).squeeze(-1), H @ posterior.covariance @ H.T, sites).sum()
    if not any(x.requires_grad for x in (*chain, *sites)):
        return value
    D = A.shape[-1]
    own = information_of(H, sites)
    with torch.no_grad():
        mean, covariance = condition(posterior.mean, posterior.covariance, own[..., D:], own[..., :D])
        mean, covariance = (torch.cat([torch.zeros_like(x[:1]), x[:-1]]) for x in (mean, covariance))
    own = own - own.detach()  # it is part of the posterior's information already
    after = Sites(posterior.precision + own[..., :D], (posterior.shift + own[..., D:]).squeeze(-1))
    local = site_log_normalizer((A @ mean).squeeze(-1), A @ covariance @ A.mT + Q, after).sum()
    return value.detach() + (local - local.detach())


def site_log_normalizer(mean: Tensor, covariance: Tensor, sites: Sites) -> Tensor:
    """Log of the integral of ``N(u; mean, covariance)`` times a site, for a batch.

    Parameters
    ----------
    mean : Tensor, shape (T, R)
    covariance : Tensor, shape (T, R, R)
    sites : Sites
        With `shift` of shape (T, R).

    Returns
    -------
    Tensor, shape (T,)
    """
    L, h = sites
    Lm = (L @ mean[..., None]).squeeze(-1)
    rest = h - Lm
    gained, log_det = solve_and_log_det(_one_plus(covariance, L), covariance @ rest[..., None])
    linear: Tensor = (mean * (h - 0.5 * Lm)).sum(-1)
    quadratic: Tensor = (rest * gained.squeeze(-1)).sum(-1)
    return linear + 0.5 * (quadratic - log_det)


def information_of(observe: Tensor, sites: Sites) -> Tensor:
    """``[precision, shift]`` of the sites as factors of the whole state, shape (T, D, D + S).

    Parameters
    ----------
    observe : Tensor, shape (R, D)
    sites : Sites
    """
    columns = sites.shift[..., None] if sites.shift.ndim == 2 else sites.shift
    return observe.T @ torch.cat([sites.precision @ observe, columns], dim=-1)


def _elements(chain: Chain, sites: Sites) -> Element:
    """T + 1 blocks, one to each step from the one before, with the latter's site; the last, its site, leads nowhere."""
    A, Q, H = chain
    known = information_of(H, sites)
    columns = known.shape[-1] - Q.shape[-1]
    return Element(pad(A, (0, 0, 0, 0, 0, 1)), pad(Q, (0, columns, 0, 0, 0, 1)), pad(known, (0, 0, 0, 0, 1, 0)))


def _merge(first: Element, second: Element) -> Element:
    """The block `first` followed by the block `second`."""
    D = first.A.shape[-1]
    gain = _inverse_one_plus(first.state[..., :D], second.information[..., :D])
    forward, back = torch.bmm(second.A, gain), torch.bmm(gain, first.A).mT
    return Element(
        A=torch.bmm(forward, first.A),
        state=torch.baddbmm(second.state, forward, _met(first.state, second.information, second.A.mT, 1)),
        information=torch.baddbmm(first.information, back, _met(second.information, first.state, first.A, -1)),
    )


def _met(one: Tensor, other: Tensor, matrix: Tensor, sign: int) -> Tensor:
    """``[X matrix, x + sign X y]`` for ``[X, x]`` of `one` and ``y`` of `other`, shape (n, D, D + S)."""
    D = matrix.shape[-1]
    X, x, y = one[..., :D], one[..., D:], other[..., D:]
    return torch.cat([torch.bmm(X, matrix), torch.baddbmm(x, X, y, alpha=sign)], dim=-1)


class _Level(NamedTuple):
    """Blocks of one level by pairs of neighbours; `odd` is the last one if it has no partner, else empty."""

    first: Element
    second: Element
    odd: Element


def _levels(blocks: Element) -> tuple[list[_Level], Element]:
    """The blocks, their merged pairs, the pairs of these, …, and the one block of all.

    An odd last one moves up alone.
    """
    levels = []
    while (n := len(blocks.A)) > 1:
        even = n - n % 2
        places = slice(0, even, 2), slice(1, even, 2), slice(even, n)
        level = _Level(*(Element(*(x[place] for x in blocks)) for place in places))
        merged = _merge(level.first, level.second)
        blocks = Element(*(torch.cat(x) for x in zip(merged, level.odd, strict=True))) if n % 2 else merged
        levels.append(level)
    return levels, blocks


def _posterior(blocks: Element) -> Posterior:
    """What is known at the steps between the blocks."""
    D = blocks.A.shape[-1]
    levels, root = _levels(Element(*(x[:-1] for x in blocks)))
    state, information = _forward(levels, root)[1:], _backward(levels, root, blocks.information[-1:])[1:]
    return Posterior(state[..., D:], state[..., :D], information[..., D:], information[..., :D])


def _forward(levels: list[_Level], root: Element) -> Tensor:
    """``[covariance, mean]`` given what comes before, at the n + 1 boundaries of blocks, (n + 1, D, D + S).

    Before the first block it is zero.
    """
    known = torch.cat([torch.zeros_like(root.state), root.state])
    for first, _, odd in reversed(levels):
        D = first.A.shape[-1]
        before = known[: len(first.A)]
        met = _met(before, first.information, first.A.mT, 1)
        given = solve(_one_plus(before[..., :D], first.information[..., :D]), met)
        known = _with_middles(known, torch.baddbmm(first.state, first.A, given), len(odd.A))
    return known


def _backward(levels: list[_Level], root: Element, end: Tensor) -> Tensor:
    """``[precision, shift]`` of what comes after, at the n + 1 boundaries of blocks but the first, (n + 1, D, D + S).

    After the last block comes `end`, (1, D, D + S).
    """
    known = torch.cat([root.information, end])
    for _, second, odd in reversed(levels):
        D = second.A.shape[-1]
        after = known[1 : len(second.A) + 1]
        met = _met(after, second.state, second.A, -1)
        given = solve(_one_plus(after[..., :D], second.state[..., :D]), met)
        known = _with_middles(known, torch.baddbmm(second.information, second.A.mT, given), len(odd.A))
    return known


def _with_middles(outer: Tensor, middle: Tensor, odd: int) -> Tensor:
    """What belongs to the boundaries of blocks, from that of the pairs' boundaries and of those inside the pairs.

    An `odd` last block of its own ends where all do.
    """
    half = len(middle)
    known = outer.new_empty(2 * half + 1 + odd, *outer.shape[1:])
    known[: 2 * half + 1 : 2] = outer[: half + 1]
    known[1 : 2 * half : 2] = middle
    if odd:
        known[-1] = outer[-1]
    return known


def sample(chain: Chain, sites: Sites, n_samples: int, generator: torch.Generator) -> Tensor:
    """Joint draws of the whole chain given the sites, by Matheron's rule: a prior draw, corrected by smoothing.

    Parameters
    ----------
    chain : Chain
    sites : Sites
        With `shift` of shape (T, R).
    n_samples : int
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor, shape (n_samples, T, D)
    """
    T = chain.matrix.shape[0]

    def noise(root: Tensor) -> Tensor:
        return root @ standard_normal((T, root.shape[-1], n_samples), root, generator)

    state = torch.cat([torch.zeros_like(chain.noise), noise(square_root(chain.noise))], dim=-1)
    prior = _forward(*_levels(Element(chain.matrix, state, torch.zeros_like(state))))[1:, :, chain.noise.shape[-1] :]
    seen = chain.observe @ prior
    replay = sites.precision @ seen + noise(square_root(sites.precision))  # the sites, had they come from this draw
    posterior = smooth(chain, Sites(sites.precision, sites.shift[..., None] - replay))
    return (prior + condition(*posterior)[0]).movedim(-1, 0)


def _one_plus(left: Tensor, right: Tensor) -> Tensor:
    """``1 + left @ right``."""
    product = left @ right
    product.diagonal(dim1=-2, dim2=-1).add_(1)
    return product


def _inverse_one_plus(left: Tensor, right: Tensor) -> Tensor:
    """Inverse of ``1 + left @ right``; regular for every pair of symmetric positive semi-definite matrices."""
    return inverse(_one_plus(left, right))


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
