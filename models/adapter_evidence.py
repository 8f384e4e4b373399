"""Cores at the mode of the prior that the evidence chooses: rounds of training and of Laplace's approximation.

An adapter that was trained without a prior may fit its rows perfectly: the curvature is then nearly zero, the evidence
chooses a wide prior, and the posterior is far too wide. Here the cores go to the mode under the prior chosen so far,
the evidence there gives the next prior, and so on; factors stay.

References
----------
MacKay (1992), "A practical Bayesian framework for backpropagation networks", Neural Computation 4. Immer et al. (2021),
"Scalable marginal likelihood estimation for model selection in deep learning", ICML.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from probtensor.models.adapter_cores import Inputs, check_acting, evaluating, trained_cores
from probtensor.models.adapter_laplace import AdapterLaplace, fit_laplace
from probtensor.models.flora import Adapters
from probtensor.resources import is_integer, is_number

__all__ = ["fit_by_evidence"]


def fit_by_evidence(
    adapters: Adapters,
    batches: Iterable[tuple[Inputs, Tensor]],
    *,
    name: str | None = None,
    n_rounds: int = 5,
    n_steps: int = 60,
    learning_rate: float = 0.01,
    first_precision: float = 1.0,
    **options: Any,
) -> AdapterLaplace:
    """Train a trained adapter's cores further, *in place*, under the prior of the largest evidence.

    Parameters
    ----------
    adapters : Adapters
        Trained.
    batches : iterable of (inputs, targets)
        All training rows, as for `fit_laplace`; one batch a step.
    name : str, optional
        Of the adapter; default: the active one.
    n_rounds : int, default 5
    n_steps : int, default 60
        Steps of Adam in each round; the model is in evaluation mode.
    learning_rate : float, default 0.01
        Falls to zero in each round.
    first_precision : float, default 1.0
        The prior's precision in the first round.
    **options
        Of `fit_laplace`: likelihood, structure, subset, …; ``mode`` stays "trained".

    Returns
    -------
    AdapterLaplace
        Of the last round.

    Raises
    ------
    ValueError
        As `fit_laplace`, and if a number here is out of range.

    References
    ----------
    Immer et al. (2021), "Scalable marginal likelihood estimation for model selection in deep learning", ICML.

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> adapters = inject_adapters(torch.nn.Linear(3, 2), FLoRAConfig(r=1))
    >>> posterior = fit_by_evidence(adapters, [(x, (x[:, 0] > 0).long())], n_rounds=3)
    >>> 0 < posterior.prior_precision < 1e3
    True
    """
    for argument, number in (("learning_rate", learning_rate), ("first_precision", first_precision)):
        if not (is_number(number) and 0 < number < math.inf):
            raise ValueError(f"{argument}: expected a positive number, got {number!r}")
    for argument, count in (("n_rounds", n_rounds), ("n_steps", n_steps)):
        if not (is_integer(count) and count >= 1):
            raise ValueError(f"{argument}: expected an integer of at least 1, got {count!r}")
    if "mode" in options:
        raise ValueError(f"mode: expected none, as cores go to the mode themselves, got {options['mode']!r}")
    name, rows = adapters._one(name), list(batches)
    check_acting(adapters, name)
    regression = options.get("likelihood") == "regression"
    posterior = fit_laplace(adapters, rows, name=name, **options)
    precision, noise = first_precision, posterior.noise_variance
    for _ in range(n_rounds):
        _train(
            adapters, name, rows, options.get("subset", "core"), precision, noise, regression, n_steps, learning_rate
        )
        posterior = fit_laplace(adapters, rows, name=name, **options)
        precision, noise = posterior.prior_precision, posterior.noise_variance
    return posterior


def _train(
    adapters: Adapters,
    name: str,
    rows: list[tuple[Inputs, Tensor]],
    subset: Any,
    precision: float,
    noise: float,
    regression: bool,
    n_steps: int,
    learning_rate: float,
) -> None:
    """Lead cores to the mode under a prior."""
    model, found = adapters.model, trained_cores(adapters, name, subset)
    cores = {key: core.requires_grad_() for key, core in found.values()}
    n_rows = sum(len(targets) for _, targets in rows)
    optimizer = torch.optim.Adam(list(cores.values()), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, n_steps)
    with evaluating(model):
        for step in range(n_steps):
            x, targets = rows[step % len(rows)]
            outputs = functional_call(model, cores, (x,) if isinstance(x, Tensor) else tuple(x))
            if regression:
                nll = (outputs - targets.reshape(outputs.shape)).square().sum() / (2 * noise)
            else:
                nll = F.cross_entropy(outputs, targets.to(outputs.device), reduction="sum")
            prior = precision / 2 * sum(core.square().sum() for core in cores.values())
            gradients = torch.autograd.grad(nll / len(targets) + prior / n_rows, list(cores.values()))
            for core, gradient in zip(cores.values(), gradients, strict=True):
                core.grad = gradient
            optimizer.step()
            schedule.step()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, core in cores.items():
            parameters[key].copy_(core)
