"""Bayesian adapters by variational inference: a normal posterior of the cores, for any likelihood, with Pyro.

A priori the cores are normal with mean zero, where the model is the base. The posterior is a normal distribution with
independent entries, with a covariance of low rank beside that, or with any covariance, around the trained cores at
first; its parameters are those of the largest evidence lower bound, by stochastic gradients. Factors and dense updates
stay as they are. Pyro is imported when a function here is called.

References
----------
Blundell et al. (2015), "Weight uncertainty in neural networks", ICML. Kucukelbir et al. (2017), "Automatic
differentiation variational inference", JMLR 18. Bingham et al. (2019), "Pyro: Deep Universal Probabilistic
Programming", JMLR 20.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from probtensor.models.adapter_cores import Inputs, check_acting, evaluating, trained_cores
from probtensor.models.flora import Adapters
from probtensor.resources import is_integer, is_number

__all__ = ["AdapterPosterior", "fit_variational"]

GUIDES = {
    "mean_field": "AutoNormal",
    "low_rank": "AutoLowRankMultivariateNormal",
    "full": "AutoMultivariateNormal",
}


class AdapterPosterior:
    """A posterior of an adapter's cores; made by `fit_variational`.

    Attributes
    ----------
    mean : Tensor, shape (P,)
        Of all cores' entries, layer by layer.
    covariance : Tensor, shape (P, P)
    layers : tuple of str
        The parameters whose cores are uncertain.
    bound_history : list of float
        Estimate of the evidence lower bound at each step.

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> adapters = inject_adapters(nn.Linear(3, 2), FLoRAConfig(r=1))
    >>> def log_likelihood(model, batch):
    ...     return -nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    >>> posterior = fit_variational(adapters, [(x, (x[:, 0] > 0).long())], log_likelihood, n_steps=20)
    >>> isinstance(posterior, AdapterPosterior)
    True
    """

    def __init__(
        self, adapters: Adapters, name: str, cores: dict[str, tuple[str, Tensor]], history: list[float]
    ) -> None:
        self._adapters, self._name = adapters, name
        self._keys = {key: core for key, core in cores.values()}
        self.layers, self.bound_history = tuple(cores), history
        self.mean: Tensor
        self.covariance: Tensor

    def outputs(self, x: Inputs, n_samples: int = 30, *, random_state: int = 0) -> Tensor:
        """Outputs of the model in evaluation mode under draws of the cores.

        Parameters
        ----------
        x : Tensor, or tuple of Tensors
            The model's inputs.
        n_samples : int, default 30
        random_state : int, default 0
            Seed of the draws.

        Returns
        -------
        Tensor, shape (n_samples, n, …)
            ``outputs(x).softmax(-1).mean(0)`` are probabilities of classes.

        Raises
        ------
        ValueError
            If the adapter does not act, or `n_samples` is below 1.
        """
        check_acting(self._adapters, self._name)
        if not (is_integer(n_samples) and n_samples >= 1):
            raise ValueError(f"n_samples: expected an integer of at least 1, got {n_samples!r}")
        generator = torch.Generator().manual_seed(random_state)
        noise = torch.randn(n_samples, len(self.mean), generator=generator, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.covariance)
        draws = self.mean + noise.to(self.mean) * values.clamp_min(0.0).sqrt() @ vectors.mT
        inputs = (x,) if isinstance(x, Tensor) else tuple(x)
        with evaluating(self._adapters.model), torch.no_grad():
            model = self._adapters.model
            return torch.stack([functional_call(model, _split(draw, self._keys), inputs) for draw in draws])

    @torch.no_grad()
    def set_mean(self) -> None:
        """Write the posterior's mean into the adapter, as its cores."""
        parameters = dict(self._adapters.model.named_parameters())
        for key, core in _split(self.mean, self._keys).items():
            parameters[key].copy_(core)


class _LogLikelihood(nn.Module):
    """A user's function of the model, so that cores can be put in the place of the model's own."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)


def fit_variational(
    adapters: Adapters,
    batches: Iterable[Any],
    log_likelihood: Callable[[nn.Module, Any], Tensor],
    *,
    name: str | None = None,
    guide: Literal["mean_field", "low_rank", "full"] = "mean_field",
    prior_precision: float = 1.0,
    n_steps: int = 1000,
    learning_rate: float = 0.02,
    n_draws: int = 2,
    start_scale: float = 0.05,
    subset: Literal["core", "all"] | Sequence[str] = "core",
    random_state: int = 0,
) -> AdapterPosterior:
    """A normal posterior of an adapter's cores, by steps on the evidence lower bound.

    Parameters
    ----------
    adapters : Adapters
        Trained, or at their start; they are left as they are.
    batches : iterable
        All training rows, in a list that is gone through again and again, one batch a step.
    log_likelihood : callable
        From the model and a batch to the log likelihood, *summed* over the batch's rows, shape ().
    name : str, optional
        Of the adapter; default: the active one.
    guide : {"mean_field", "low_rank", "full"}, default "mean_field"
    prior_precision : float, default 1.0
        Of each entry; `fit_laplace` finds one from the data.
    n_steps : int, default 1000
    learning_rate : float, default 0.02
        At first; it falls to a hundredth.
    n_draws : int, default 2
        Draws for each gradient.
    start_scale : float, default 0.05
        Standard deviations at first.
    subset : "core", "all" or sequence of str, default "core"
        As in `fit_laplace`.
    random_state : int, default 0
        Seed of the draws; global generators are left as they were.

    Returns
    -------
    AdapterPosterior

    Raises
    ------
    ValueError
        If an argument is out of range or the adapter does not act; of Pyro, if the log likelihood is NaN.
    FloatingPointError
        If the bound is not finite.

    References
    ----------
    Kucukelbir et al. (2017), JMLR 18. Bingham et al. (2019), JMLR 20.

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> labels = (x[:, 0] > 0).long()
    >>> model = nn.Linear(3, 2)
    >>> adapters = inject_adapters(model, FLoRAConfig(r=1))
    >>> def log_likelihood(model, batch):
    ...     return -nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    >>> posterior = fit_variational(adapters, [(x, labels)], log_likelihood, n_steps=50)
    >>> posterior.outputs(x).softmax(-1).mean(0).shape
    torch.Size([50, 2])
    """
    if guide not in GUIDES:
        raise ValueError(f"guide: expected one of {', '.join(GUIDES)}, got {guide!r}")
    for argument, number in (
        ("prior_precision", prior_precision),
        ("learning_rate", learning_rate),
        ("start_scale", start_scale),
    ):
        if not (is_number(number) and 0 < number < math.inf):
            raise ValueError(f"{argument}: expected a positive number, got {number!r}")
    for argument, count in (("n_steps", n_steps), ("n_draws", n_draws)):
        if not (is_integer(count) and count >= 1):
            raise ValueError(f"{argument}: expected an integer of at least 1, got {count!r}")
    rows = list(batches)
    if not rows:
        raise ValueError("batches: expected at least one, got none")
    name = adapters._one(name)
    check_acting(adapters, name)
    cores = trained_cores(adapters, name, subset)
    shapes = {f"model.{key}": core for key, core in cores.values()}
    start = torch.cat([core.flatten() for core in shapes.values()])
    function = _LogLikelihood(adapters.model, log_likelihood)
    import_module("pyro.infer.autoguide")
    import_module("pyro.optim")
    pyro: Any = import_module("pyro")

    def model(batch: Any) -> None:
        prior = pyro.distributions.Normal(torch.zeros_like(start), prior_precision**-0.5).to_event(1)
        drawn = pyro.sample("cores", prior)
        value = functional_call(function, _split(drawn, shapes), (batch,))
        pyro.factor("likelihood", len(rows) * value)

    history = []
    frozen = [(p, p.requires_grad) for p in adapters.model.parameters()]
    with torch.random.fork_rng(), pyro.get_param_store().scope(), evaluating(adapters.model):
        torch.manual_seed(random_state)
        at_start = pyro.infer.autoguide.init_to_value(values={"cores": start})
        kind = getattr(pyro.infer.autoguide, GUIDES[guide])
        normal = kind(model, init_loc_fn=at_start, init_scale=start_scale)
        falling = {"lr": learning_rate, "lrd": 0.01 ** (1 / n_steps), "betas": (0.9, 0.99), "clip_norm": math.inf}
        optimizer = pyro.optim.ClippedAdam(falling)
        svi = pyro.infer.SVI(model, normal, optimizer, pyro.infer.Trace_ELBO(num_particles=n_draws))
        try:
            for parameter, _ in frozen:
                parameter.requires_grad_(False)
            for step in range(n_steps):
                history.append(-float(svi.step(rows[step % len(rows)])))
                if not math.isfinite(history[-1]):
                    raise FloatingPointError(f"the bound is {history[-1]} at step {step}; try a lower learning_rate")
        finally:
            for parameter, flag in frozen:
                parameter.requires_grad_(flag)
        posterior = AdapterPosterior(adapters, name, cores, history)
        posterior.mean, posterior.covariance = _moments(normal, guide)
    return posterior


@torch.no_grad()
def _moments(normal: Any, guide: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a guide."""
    if guide == "mean_field":
        mean, scale = normal.locs.cores, normal.scales.cores
        return mean.detach().to(torch.float64, copy=True), torch.diag(scale.detach().to(torch.float64).square())
    found = normal.get_posterior()
    return found.mean.detach().to(torch.float64, copy=True), found.covariance_matrix.detach().to(torch.float64)


def _split(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cores from a vector of all their entries."""
    parts = torch.split(vector, [core.numel() for core in like.values()])
    return {key: part.reshape(core.shape).to(core) for (key, core), part in zip(like.items(), parts, strict=True)}
