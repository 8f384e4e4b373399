"""Functional Bayesian CP and Tucker as a Pyro program: for one's own likelihoods, and as a second way to a posterior.

The model is that of `FunBaT` without main effects: mode k has R latent functions, Gaussian processes over a continuous
axis, exchangeable rows over labels, and

    f_n = Σr u^1_r(x_n^1) … u^K_r(x_n^K),   or   f_n = W ×1 u^1(x_n^1) … ×K u^K(x_n^K) with W ~ N(0, 1).

Functions are written in standard normal noise, so that a sampler or a guide sees independent variables of unit scale a
priori. A process is a chain of states, ``x_j = A_j x_{j−1} + L_j z_j`` with ``L_j L_jᵀ = Q_j`` (see `state_space`),
whose paths come from a scan of log2(T) steps; no T × T matrix appears.

References
----------
Fang et al. (2024), "Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor Data", ICLR. Hillis, Steele
(1986), "Data parallel algorithms", Communications of the ACM 29, for the scan.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from probtensor.axes import Axis
from probtensor.contract import multilinear
from probtensor.models.latent_functions import GaussianProcess, LatentFunctions, latent_functions
from probtensor.resources import is_integer

__all__ = ["functional_program", "gaussian_noise", "noise_shape", "prior_values"]

Scatter = Callable[[Tensor], Any]  # noise-free entries (n,) -> a distribution of Pyro over n values


def functional_program(
    axes: Sequence[Axis],
    rank: int,
    likelihood: Callable[[], Scatter] | None = None,
    *,
    form: Literal["cp", "tucker"] = "cp",
    hyperparameters: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A Pyro model of observed entries, for `fit_svi`, `fit_nuts` or Pyro itself.

    Parameters
    ----------
    axes : sequence of Axis
        Fitted, as `Observations.from_table` has them.
    rank : int
        Functions of each mode.
    likelihood : callable, optional
        Called once a run, before the plate of rows: samples what the rows share, and returns a function from
        noise-free entries (n,) to a distribution of Pyro. Default: `gaussian_noise`.
    form : {"cp", "tucker"}, default "cp"
    hyperparameters : mapping of str to Tensor, shape (H, R), optional
        Logarithms by the axis's name, as `FunBaT` learns them. A mode that is not in it has them sampled, from normal
        distributions of standard deviation one about FunBaT's start.
    dtype : torch.dtype, default torch.float64

    Returns
    -------
    callable
        ``model(positions, values)``: int64 (n, K) and (n,), or None to draw values. Its sites: "noise_NAME" and, where
        sampled, "log_hyperparameters_NAME" for each axis, "core", and those of the likelihood. It returns ``f`` (n,).

    Raises
    ------
    ValueError
        If an axis is not fitted, the rank is no integer of at least 1, or a name is unknown.

    Examples
    --------
    Counts over time, with a guide of independent normals:

    >>> import numpy as np, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from probtensor import Observations
    >>> from probtensor.inference.variational import fit_svi
    >>> rng = np.random.default_rng(0)
    >>> t = np.linspace(0.0, 6.0, 60)
    >>> data = Observations.from_table(t[:, None], rng.poisson(np.exp(1 + np.sin(t))))
    >>> def counts():
    ...     level = pyro.sample("level", dist.Normal(torch.tensor(0.0).double(), 2.0))
    ...     return lambda f: dist.Poisson(torch.exp(level + f))
    >>> model = functional_program(data.axes, 1, counts)
    >>> rows = [data.positions, data.values]
    >>> fit = fit_svi(model, AutoNormal(model), rows, n_steps=300, learning_rate=0.05)
    >>> bool(fit.bound_history[-1] > fit.bound_history[0])
    True
    """
    if not (is_integer(rank) and rank >= 1):
        raise ValueError(f"rank: expected an integer of at least 1, got {rank!r}")
    if form not in ("cp", "tucker"):
        raise ValueError(f"form: expected 'cp' or 'tucker', got {form!r}")
    names = [str(axis.name) for axis in axes]
    for name, axis in zip(names, axes, strict=True):
        if not axis.is_fitted:
            raise ValueError(f"axes: expected fitted axes, got {name!r} that is not")
    given = dict(hyperparameters or {})
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"hyperparameters: expected names among {names}, got {unknown}")
    modes = [latent_functions(axis, torch.zeros((), dtype=dtype)) for axis in axes]
    scatter_of = gaussian_noise if likelihood is None else likelihood

    def model(positions: Tensor, values: Tensor | None = None) -> Tensor:
        pyro: Any = import_module("pyro")
        dist = import_module("pyro.distributions")
        rows = []
        for k, (name, f) in enumerate(zip(names, modes, strict=True)):
            start = f.initial_hyperparameters(rank)
            logs = given.get(name)
            if logs is None:
                logs = pyro.sample(f"log_hyperparameters_{name}", dist.Normal(start, 1.0).to_event(2))
            zero = start.new_zeros(noise_shape(f, rank))
            noise = pyro.sample(f"noise_{name}", dist.Normal(zero, 1.0).to_event(2))
            rows.append(prior_values(f, logs, noise)[positions[:, k]])
        if form == "cp":
            entries = torch.stack(rows).prod(0).sum(1)
        else:
            zero = torch.zeros([rank] * len(rows), dtype=dtype)
            core = pyro.sample("core", dist.Normal(zero, 1.0).to_event(len(rows)))
            entries = multilinear(core, rows)
        scatter = scatter_of()
        with pyro.plate("rows", len(positions)):
            pyro.sample("values", scatter(entries), obs=values)
        return entries

    return model


def gaussian_noise() -> Scatter:
    """Normal noise of one standard deviation, "noise_std", log-normal about e⁻¹ a priori: for standardised values.

    Examples
    --------
    >>> import pyro
    >>> with pyro.plate("rows", 2):  # as within a model
    ...     pass
    >>> gaussian_noise()(torch.zeros(3, dtype=torch.float64)).batch_shape
    torch.Size([3])
    """
    pyro: Any = import_module("pyro")
    dist = import_module("pyro.distributions")
    std = pyro.sample("noise_std", dist.LogNormal(torch.tensor(-1.0, dtype=torch.float64), 1.0))
    return lambda f: dist.Normal(f, std)


def noise_shape(f: LatentFunctions, rank: int) -> tuple[int, int]:
    """Shape of the standard normal noise that functions of a mode are written in.

    Examples
    --------
    >>> from probtensor import CategoricalAxis
    >>> f = latent_functions(CategoricalAxis("cell").fit(["a", "b"]), torch.zeros((), dtype=torch.float64))
    >>> noise_shape(f, 3)
    (3, 3)
    """
    if not isinstance(f, GaussianProcess):
        return f.size + 1, rank  # the first row is the labels' common mean's
    white = rank if "white_variance" in f.named(f.initial_hyperparameters(rank)) else 0
    return f.size, f.state_size(rank) + white


def prior_values(f: LatentFunctions, log_hyperparameters: Tensor, noise: Tensor) -> Tensor:
    """Values of a mode's functions under their prior, as a linear function of standard normal noise.

    Parameters
    ----------
    f : LatentFunctions
    log_hyperparameters : Tensor, shape (H, R)
    noise : Tensor, shape `noise_shape`

    Returns
    -------
    Tensor, shape (T, R)

    Examples
    --------
    >>> from probtensor import CategoricalAxis
    >>> f = latent_functions(CategoricalAxis("cell").fit(["a", "b"]), torch.zeros((), dtype=torch.float64))
    >>> noise = torch.zeros(noise_shape(f, 3), dtype=torch.float64)
    >>> prior_values(f, f.initial_hyperparameters(3), noise).tolist()  # no noise: the prior mean
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    named = f.named(log_hyperparameters)
    if not isinstance(f, GaussianProcess):
        return named["mean_variance"].sqrt() * noise[:1] + named["variance"].sqrt() * noise[1:]
    chain = f.chain(log_hyperparameters, f.coordinates)
    D = chain.matrix.shape[-1]
    steps = _root(chain.noise) @ noise[:, :D, None]
    values = (chain.observe @ _paths(chain.matrix, steps)).squeeze(-1)
    if "white_variance" in named:
        values = values + named["white_variance"].sqrt() * noise[:, D:]
    return values


def _root(covariance: Tensor) -> Tensor:
    """Lower triangular L with ``L Lᵀ`` = covariance (T, D, D), which may be singular: then columns are zero."""
    least = 1e-13 * covariance.diagonal(dim1=1, dim2=2).amax(1)
    columns = []
    for j in range(covariance.shape[-1]):
        pivot = covariance[:, j, j]
        kept = (pivot > least)[:, None]
        column = torch.where(kept, covariance[:, :, j] / torch.where(kept[:, 0], pivot, 1.0).sqrt()[:, None], 0.0)
        columns.append(column)
        covariance = covariance - column[:, :, None] * column[:, None, :]
    return torch.stack(columns, 2)


def _paths(matrix: Tensor, steps: Tensor) -> Tensor:
    """``x_j = A_j x_{j−1} + s_j`` for all j, (T, D, 1), by doubling: after round m the state knows 2^m steps back."""
    reach = 1
    while reach < len(matrix):
        before = torch.cat([torch.zeros_like(steps[:reach]), steps[:-reach]])
        steps = steps + matrix @ before
        matrix = torch.cat([torch.zeros_like(matrix[:reach]), matrix[reach:] @ matrix[:-reach]])
        reach *= 2
    return steps
