r"""White parts of functions: at each coordinate a value of its own, beside the smooth function's.

At one coordinate, ``u = g + e`` with ``e ~ N(0, V)``, ``V`` diagonal over the R functions, and the site
``exp(h' u - u' L u / 2)`` sees ``u``. As seen by ``g``, with ``e`` integrated out, it is the site of precision
``(1 + L V)^-1 L`` and shift ``(1 + L V)^-1 h``, times a constant. Given ``g``, ``u`` is normal of mean
``(1 + V L)^-1 (g + V h)`` and covariance ``(1 + V L)^-1 V``. So white parts need no state in the chain.
"""

import torch
from torch import Tensor

from probtensor.gaussian import square_root, standard_normal
from probtensor.inference.kalman import Sites, condition, site_log_normalizer
from probtensor.linalg import inverse

__all__ = ["add_white", "draw_white", "without_white"]


def without_white(variance: Tensor, sites: Sites) -> tuple[Sites, Tensor]:
    """The sites as the smooth functions see them.

    Parameters
    ----------
    variance : Tensor, shape (R,)
        Of the white parts.
    sites : Sites
        With `shift` of shape (n, R).

    Returns
    -------
    sites : Sites
    log_constant : Tensor, scalar
        Logarithm of the product of the factors that are left.
    """
    V = torch.diag(variance).expand_as(sites.precision)
    nothing = torch.zeros_like(sites.shift)
    shift, precision = condition(sites.shift[..., None], sites.precision, nothing[..., None], V)
    return Sites(precision, shift.squeeze(-1)), site_log_normalizer(nothing, V, sites).sum()


def add_white(variance: Tensor, sites: Sites, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n, R) and covariance (n, R, R) of the functions from those of their smooth parts.

    Parameters
    ----------
    variance : Tensor, shape (R,)
    sites : Sites
        At the n coordinates; of precision zero where no row was seen.
    mean, covariance : Tensor, shapes (n, R) and (n, R, R)
        Posterior of the smooth parts.
    """
    gain, left = _given_smooth(variance, sites)
    moved = mean + variance * sites.shift
    return (gain @ moved[..., None]).squeeze(-1), gain @ covariance @ gain.mT + left


def draw_white(variance: Tensor, sites: Sites, smooth: Tensor, generator: torch.Generator) -> Tensor:
    """Draws (S, n, R) of the functions, given draws (S, n, R) of their smooth parts."""
    gain, left = _given_smooth(variance, sites)
    moved = (smooth + variance * sites.shift)[..., None]
    normal = standard_normal(moved.shape, smooth, generator)
    return (gain @ moved + square_root(left) @ normal).squeeze(-1)


def _given_smooth(variance: Tensor, sites: Sites) -> tuple[Tensor, Tensor]:
    """``(1 + V L)^-1`` and ``(1 + V L)^-1 V``, each (n, R, R)."""
    one = torch.eye(len(variance), dtype=variance.dtype, device=variance.device)
    gain = inverse(one + variance[:, None] * sites.precision)
    left = gain * variance
    return gain, 0.5 * (left + left.mT)
