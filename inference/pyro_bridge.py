r"""Sparse coding with any prior and any noise, by Pyro: gradients where no closed-form M-step is known.

Given each point's states ``K_n`` (see `probtensor.inference.state_sets`), a model is two functions of named parameters:
the log prior of states and the log likelihood of points. Pyro sees one latent variable a point, the *number* of its
state, uniform over the S states; what that uniform choice lacks is a factor ``log p(s) + log S``. Enumerated in
parallel, it gives ``ELBO = sum_n log sum_{s in K_n} p(y_n, s)``, the bound of truncated EM, without sampling. (Binary
variables, enumerated one by one, would cost 2^H.)

Pyro is imported when a function here is called. Parameters live in a scope of Pyro's store and leave it with it.

References
----------
Bingham et al. (2019), "Pyro: Deep Universal Probabilistic Programming", JMLR 20. Lücke (2016), "Truncated Variational
Expectation Maximization", arXiv 1610.03113.
"""

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probtensor.inference.state_sets import Own, Selected

__all__ = ["StatesFit", "each_state", "enumerated_model", "fit_states", "negative_elbo"]

LogPrior = Callable[..., Tensor]  # (states (n, S, H), **parameters) -> (n, S)
LogLikelihood = Callable[..., Tensor]  # (y (n, D), states (n, S, H), **parameters) -> (n, S)


class StatesFit(NamedTuple):
    """What `fit_states` found.

    Attributes
    ----------
    params : dict of str to Tensor
    bound_history : list of float
        Bound a point before each step, and at the end.
    posterior : Tensor, shape (n, S)
        Probability of each state of each point.

    Examples
    --------
    >>> fit = StatesFit({"W": torch.ones(2, 1)}, [-3.0, -2.5], torch.tensor([[0.9, 0.1]]))
    >>> fit.posterior.argmax(1).tolist()  # the most probable state of each point
    [0]
    """

    params: dict[str, Tensor]
    bound_history: list[float]
    posterior: Tensor


def each_state(states: Selected | Own) -> Tensor:
    """States of each point, written out.

    Parameters
    ----------
    states : Selected or Own

    Returns
    -------
    Tensor, shape (n, S, H)

    Examples
    --------
    >>> from probtensor.inference.state_sets import Own
    >>> values = torch.tensor([[[0.0], [0.0]], [[1.0], [0.0]]])  # two states of two components, one point
    >>> each_state(Own(values)).tolist()
    [[[0.0, 0.0], [1.0, 0.0]]]
    """
    if isinstance(states, Own):
        return states.values.movedim(-1, 0)
    n, index = states.index.shape[1], torch.arange(states.table.n_states(states.n_components))
    found = [states.state(number.expand(n).to(states.index.device)) for number in index]
    return torch.stack(found).movedim(-1, 0)


def enumerated_model(
    log_prior: LogPrior,
    log_likelihood: LogLikelihood,
    start: Mapping[str, Tensor],
    constraints: Mapping[str, Any] | None = None,
) -> Callable[[Tensor, Tensor], None]:
    """A Pyro model of points and their states, to be enumerated in parallel.

    Parameters
    ----------
    log_prior : callable
        Of states (n, S, H) and the parameters by name: log prior, shape (n, S).
    log_likelihood : callable
        Of points (n, D), states (n, S, H) and the parameters by name: log likelihood, shape (n, S). What entries are
        missing is its affair.
    start : mapping of str to Tensor
        First value of each parameter.
    constraints : mapping of str to torch.distributions.constraints.Constraint, optional
        Of parameters that cannot have every value.

    Returns
    -------
    callable
        Of points (n, D) and their states (n, S, H), each state of a point once.

    Examples
    --------
    >>> from torch.distributions import Bernoulli, Normal
    >>> model = enumerated_model(
    ...     lambda s, W: Bernoulli(torch.tensor(0.5)).log_prob(s).sum(-1),
    ...     lambda y, s, W: Normal(s @ W.T, 1.0).log_prob(y[:, None]).sum(-1),
    ...     {"W": torch.tensor([[2.0]])},
    ... )
    >>> y, states = torch.tensor([[2.0]]), torch.tensor([[[0.0], [1.0]]])
    >>> value, gradients = negative_elbo(model, y, states)
    >>> round(value, 3), list(gradients)  # minus log((N(2; 0, 1) + N(2; 2, 1)) / 2)
    (1.485, ['W'])
    """
    pyro = _pyro()

    limits = constraints or {}
    real = torch.distributions.constraints.real

    def model(y: Tensor, states: Tensor) -> None:
        named = {name: pyro.param(name, value.clone, limits.get(name, real)) for name, value in start.items()}
        n, S = states.shape[:2]
        prior, likelihood = log_prior(states, **named), log_likelihood(y, states, **named)
        row = torch.arange(n, device=y.device)
        with pyro.plate("points", n):
            uniform = pyro.distributions.Categorical(logits=prior.new_zeros(n, S))
            number = pyro.sample("state", uniform, infer={"enumerate": "parallel"})  # (S, 1) when enumerated
            pyro.factor("prior", prior[row, number] + math.log(S))
            pyro.factor("likelihood", likelihood[row, number])

    return model


def negative_elbo(
    model: Callable[[Tensor, Tensor], None], y: Tensor, states: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Minus the bound of all points at the model's first parameters, and its gradients.

    Parameters
    ----------
    model : callable
        From `enumerated_model`.
    y : Tensor, shape (n, D)
    states : Tensor, shape (n, S, H)

    Returns
    -------
    value : float
    gradients : dict of str to Tensor
        By the parameters' unconstrained values.

    Examples
    --------
    >>> from torch.distributions import Bernoulli, Normal
    >>> def prior(s, W):
    ...     return Bernoulli(torch.tensor(0.5)).log_prob(s).sum(-1)
    >>> def likelihood(y, s, W):
    ...     return Normal(s @ W.T, 1.0).log_prob(y[:, None]).sum(-1)
    >>> model = enumerated_model(prior, likelihood, {"W": torch.tensor([[2.0]])})
    >>> value, gradients = negative_elbo(model, torch.tensor([[2.0]]), torch.tensor([[[0.0], [1.0]]]))
    >>> round(value, 3), gradients["W"].shape
    (1.485, torch.Size([1, 1]))
    """
    pyro = _pyro()

    with pyro.get_param_store().scope():
        loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, _no_guide, y, states)
        free = dict(pyro.get_param_store().named_parameters())
        gradients = torch.autograd.grad(loss, list(free.values()))
    return float(loss.detach()), dict(zip(free, gradients, strict=True))


def fit_states(
    y: Tensor,
    states: Tensor,
    log_prior: LogPrior,
    log_likelihood: LogLikelihood,
    start: Mapping[str, Tensor],
    *,
    constraints: Mapping[str, Any] | None = None,
    n_steps: int = 300,
    learning_rate: float = 0.05,
) -> StatesFit:
    """Learn parameters by steps of Adam on the bound of all points.

    Parameters
    ----------
    y : Tensor, shape (n, D)
    states : Tensor, shape (n, S, H)
        Each state of a point once; see `each_state`.
    log_prior, log_likelihood, start, constraints
        See `enumerated_model`.
    n_steps : int, default 300
    learning_rate : float, default 0.05

    Returns
    -------
    StatesFit

    Raises
    ------
    ValueError
        If shapes do not fit; of Pyro, if a log density is NaN.
    FloatingPointError
        If the bound is not finite.

    Examples
    --------
    Binary causes and Laplace noise:

    >>> from torch.distributions import Bernoulli, Laplace, constraints
    >>> from probtensor.inference.state_sets import every_state
    >>> y = torch.tensor([[0.1, 2.0], [3.0, 0.2], [2.9, 2.1], [0.0, -0.1]])
    >>> states = every_state(2, (1.0,), y).values.expand(4, 4, 2)
    >>> fit = fit_states(
    ...     y,
    ...     states,
    ...     lambda s, W, scale: Bernoulli(torch.tensor(0.5)).log_prob(s).sum(-1),
    ...     lambda y, s, W, scale: Laplace(s @ W.T, scale).log_prob(y[:, None]).sum(-1),
    ...     {"W": torch.tensor([[0.0, 2.0], [1.0, 0.0]]), "scale": torch.tensor(1.0)},
    ...     constraints={"scale": constraints.positive},
    ... )
    >>> bool(fit.bound_history[-1] > fit.bound_history[0])
    True
    """
    if y.ndim != 2 or states.ndim != 3 or len(states) != len(y):
        raise ValueError(
            f"states: expected shape (n, S, H) for y of shape (n, D), got {tuple(states.shape)} for {tuple(y.shape)}"
        )
    pyro = _pyro()

    model, history = enumerated_model(log_prior, log_likelihood, start, constraints), []
    with pyro.get_param_store().scope():
        elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
        svi = pyro.infer.SVI(model, _no_guide, pyro.optim.Adam({"lr": learning_rate}), elbo)
        for step in range(n_steps + 1):
            loss = svi.step(y, states) if step < n_steps else svi.evaluate_loss(y, states)
            history.append(-float(loss) / len(y))
            if not math.isfinite(history[-1]):
                raise FloatingPointError(f"the bound is {history[-1]} after {step} steps; try a lower learning_rate")
        params = {name: pyro.param(name).detach().clone() for name in start}
    with torch.no_grad():
        joint = log_prior(states, **params) + log_likelihood(y, states, **params)
    return StatesFit(params, history, joint.softmax(1))


def _no_guide(y: Tensor, states: Tensor) -> None:
    """Nothing is drawn: all is enumerated."""


def _pyro() -> Any:
    """Pyro, which is typed in part only."""
    import_module("pyro.infer")
    import_module("pyro.optim")
    return import_module("pyro")
