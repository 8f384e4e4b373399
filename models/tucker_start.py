"""Where message passing for a Tucker form starts: at the components that the CP form finds.

From columns of its own a Tucker core must find factors of all modes at once, and ends where CP does not. Components are
a Tucker form themselves, whose core is superdiagonal; each mode keeps the directions that matter most.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.comm import Comm
from probtensor.contract import outer_rows, pack
from probtensor.gaussian import Gaussian
from probtensor.inference.message_passing import run
from probtensor.models.feature_rows import FeatureRows
from probtensor.models.functional_state import Rows, State
from probtensor.models.functional_tucker import FunctionalTucker

__all__ = ["core_of_components", "start_from_components"]

COMPONENTS = 20  # of the CP form at most
CORE_VARIANCE = 1e-6  # of each number of the core, until its first update


def core_of_components(
    components: Sequence[Tensor], columns: Sequence[Tensor], free: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Factors and core of the Tucker form nearest to a CP form, mode by mode: its truncated HOSVD.

    Parameters
    ----------
    components : sequence of Tensor, shape (T_k, R)
        Factors of the CP form.
    columns : sequence of Tensor, shape (T_k, R_k)
        What stands in columns that the CP form has no direction for.
    free : sequence of Tensor, shape (R_k,), bool
        Which columns are not one everywhere.

    Returns
    -------
    factors : list of Tensor, shape (T_k, R_k)
        Their free columns have a mean square of one.
    core : Tensor, shape (prod R_k,)

    References
    ----------
    De Lathauwer, De Moor, Vandewalle (2000), "A Multilinear Singular Value Decomposition", SIAM J. Matrix Anal. Appl.
    21, of a tensor in CP form: the Gram matrices of its unfoldings need no cell of it.
    """
    grams = torch.stack([A.T @ A for A in components])
    factors, weights = [], []
    for k, (A, column, latent) in enumerate(zip(components, columns, free, strict=True)):
        others = grams[[j for j in range(len(grams)) if j != k]].prod(0)
        values, vectors = torch.linalg.eigh(others)
        mean = torch.zeros_like(A[:1]) if latent.all() else A.mean(0, keepdim=True)
        left, strength, _ = torch.linalg.svd((A - mean) @ vectors * values.clamp(min=0).sqrt(), full_matrices=False)
        kept = min(int(latent.sum()), int((strength > 1e-6 * strength[0]).sum()))
        factor, place = column.clone(), latent.nonzero().squeeze(-1)[:kept]
        factor[:, place] = left[:, :kept] * len(A) ** 0.5
        weight = A.new_zeros(column.shape[1], A.shape[1])
        weight[~latent] = mean
        weight[place] = factor[:, place].T @ A / len(A)
        factors.append(factor)
        weights.append(weight.T)
    return factors, outer_rows(weights).sum(0)


def start_from_components(
    model: FunctionalTucker,
    rows: Sequence[Rows],
    *,
    comm: Comm,
    settings: tuple[int, float, int],
    generator: torch.Generator,
) -> State:
    """A state of the Tucker form from a fit of the CP form to the same rows.

    Parameters
    ----------
    model : FunctionalTucker
        Of the Tucker form.
    rows : sequence of Rows
        Of this rank, in parts.
    comm : Comm
    settings : tuple
        `max_iter`, `tol` and `n_init` of the CP fit; see `probtensor.inference.message_passing.run`.
    generator : torch.Generator
        In the same state on every rank.
    """
    K, device = len(model.free), model.free[0].device
    effects = 0 if model.free[0].all() else K
    rank = min([COMPONENTS, *(f.most_functions - 1 for f in model.functions if isinstance(f, FeatureRows))])
    free = [torch.tensor([True] * rank + [j == k for j in range(effects)], device=device) for k in range(K)]
    cp = replace(model, form="cp", free=tuple(free), pairs=True)
    statistics = comm.sum(*add_up(model.local_start(part) for part in rows))
    (max_iter, tol, n_init), scale = settings, float(statistics[0])
    found = run(
        cp,
        rows,
        comm=comm,
        generator=generator,
        max_iter=max_iter,
        tol=tol,
        scale=scale,
        n_init=n_init,
        progress=False,
    ).state
    own = model.start(statistics, generator)
    means, core = core_of_components([f.mean for f in found.factors], [f.mean for f in own.factors], model.free)
    factors = [
        factor._replace(mean=mean, second=pack(mean[:, :, None] * mean[:, None, :]))
        for factor, mean in zip(own.factors, means, strict=True)
    ]
    covariance = CORE_VARIANCE * torch.eye(len(core), dtype=core.dtype, device=core.device)
    return found._replace(factors=tuple(factors), core=Gaussian(core, covariance))
