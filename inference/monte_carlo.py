"""Markov chains for any Pyro model of few numbers: the no-U-turn sampler, with what tells whether to believe it.

Chains are exact in the limit, and need the gradient of all rows at every step: for small problems, and to check what
variational inference says. Pyro is imported when chains start.

References
----------
Hoffman, Gelman (2014), "The No-U-Turn Sampler", JMLR 15. Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021),
"Rank-Normalization, Folding, and Localization: An Improved R-hat", Bayesian Analysis 16, for limits of the diagnostics.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from probtensor.inference.variational import load_pyro, seeded
from probtensor.resources import is_integer, threads_for

__all__ = ["ChainWarning", "Chains", "fit_nuts"]

MOST_R_HAT = 1.05


class ChainWarning(UserWarning):
    """Chains have not met, or steps of theirs diverged.

    Examples
    --------
    >>> issubclass(ChainWarning, UserWarning)  # warnings.simplefilter("ignore", ChainWarning) silences it
    True
    """


@dataclass(frozen=True)
class Chains:
    """Draws, and what they are worth.

    Attributes
    ----------
    draws : dict of str to Tensor, shape (n_chains, n_samples, …)
        By the model's sites.
    r_hat, n_effective : dict of str to Tensor, shape (…)
        Split potential scale reduction, near 1 where chains agree, and effective number of independent draws.
    n_divergent : int
        Steps after the warm-up that left the path of the true dynamics: where there are many, the chains leave parts of
        the posterior out.

    Examples
    --------
    >>> one = {"mean": torch.tensor(1.0)}
    >>> chains = Chains({"mean": torch.zeros(2, 300)}, r_hat=one, n_effective=one, n_divergent=0)
    >>> chains.merged["mean"].shape  # both chains' draws
    torch.Size([600])
    """

    draws: dict[str, Tensor]
    r_hat: dict[str, Tensor]
    n_effective: dict[str, Tensor]
    n_divergent: int

    @property
    def merged(self) -> dict[str, Tensor]:
        """Draws of all chains one after the other, (n_chains * n_samples, …)."""
        return {name: x.flatten(0, 1) for name, x in self.draws.items()}


def fit_nuts(
    model: Callable[..., Any],
    rows: Sequence[Tensor],
    *,
    n_samples: int = 1000,
    n_warmup: int = 500,
    n_chains: int = 2,
    max_tree_depth: int = 10,
    start: Mapping[str, Tensor] | None = None,
    compiled: bool = False,
    random_state: int = 0,
) -> Chains:
    """Draw from the posterior of a Pyro model.

    Parameters
    ----------
    model : callable
        Of the rows' tensors, ``model(*rows)``; without parameters of its own.
    rows : sequence of Tensor, shape (n, …)
        All of them, on this process.
    n_samples, n_warmup : int, default 1000, 500
        Draws of each chain that are kept, and before them.
    n_chains : int, default 2
        One after the other.
    max_tree_depth : int, default 10
        A draw takes ``2**max_tree_depth`` gradients at most.
    start : mapping of str to Tensor, optional
        Values of sites, such as a variational posterior's means, that all chains start near. Default: draws from the
        prior's middle.
    compiled : bool, default False
        Trace the density once by ``torch.jit``: several times faster, if its operations do not depend on values.
    random_state : int, default 0
        Seed; global generators are left as they were.

    Returns
    -------
    Chains

    Raises
    ------
    ValueError
        If a number is none of at least 1 (two chains or more, four draws or more).

    Warns
    -----
    ChainWarning
        If an `r_hat` is above 1.05 or steps diverged.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("rows", len(y)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> chains = fit_nuts(model, [torch.tensor([1.0, 2.0, 3.0])], n_samples=300, n_warmup=100)
    >>> bool(abs(chains.merged["mean"].mean() - 1.5) < 0.15), chains.draws["mean"].shape
    (True, torch.Size([2, 300]))
    """
    least = {"n_samples": (n_samples, 4), "n_warmup": (n_warmup, 1), "n_chains": (n_chains, 2)}
    for name, (value, low) in least.items():
        if not (is_integer(value) and value >= low):
            raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
    pyro = load_pyro()
    infer, stats = import_module("pyro.infer"), import_module("pyro.ops.stats")
    settings: dict[str, Any] = {"ignore_jit_warnings": True}
    if start is not None:
        settings["init_strategy"] = infer.autoguide.initialization.init_to_value(values=dict(start))
    found: list[dict[str, Tensor]] = []
    n_divergent = 0
    with pyro.get_param_store().scope(), threads_for(len(rows[0])):
        for chain in range(n_chains):
            with seeded(random_state, chain, rows):
                kernel = infer.NUTS(model, max_tree_depth=max_tree_depth, jit_compile=compiled, **settings)
                sampler = infer.MCMC(kernel, n_samples, n_warmup, disable_progbar=True)
                with warnings.catch_warnings():
                    if compiled:
                        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
                    sampler.run(*rows)
                found.append(sampler.get_samples())
                n_divergent += sum(len(steps) for steps in sampler.diagnostics()["divergences"].values())
    draws = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    r_hat = {name: stats.split_gelman_rubin(x, 0, 1) for name, x in draws.items()}
    n_effective = {name: stats.effective_sample_size(x, 0, 1) for name, x in draws.items()}
    worst = max(float(x.max()) for x in r_hat.values())
    if worst > MOST_R_HAT or n_divergent:
        warnings.warn(
            f"r_hat is up to {worst:.3f}, {n_divergent} steps diverged: draw more, or give the model another form",
            ChainWarning,
            stacklevel=2,
        )
    return Chains(draws, r_hat, n_effective, n_divergent)
