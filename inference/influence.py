r"""Which training rows a network's predictions owe something to: gradients of losses against each other.

The loss of a row is ``l(theta) = (p(x; theta) - y)^2 / 2``. To first order, a small step of gradient descent on
training row j lowers the query rows' summed loss by its size times ``<grad l_j, v>``, with ``v`` the query rows' summed
gradient: that is the influence of row j (TracIn). With ``v`` replaced by ``H^-1 v`` it is the influence function: what
leaving row j out of the training would raise the query loss by, times the number of rows.

With the inverse ``m`` of a canonical link, the loss is the negative log-likelihood of a value of mean ``m(p)``, such as
a binary value or a count: its derivative by ``p`` is then ``m(p) - y``, which takes the place of ``p - y``.

All rows' scores come from one forward-mode pass (`torch.func.jvp`), in memory for the parameters and a chunk of rows;
no row's gradient is ever stored. Those of the output layer alone have a closed form.

References
----------
Pruthi, Liu, Kale, Sundararajan (2020), "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS,
equation 1. Koh, Liang (2017), "Understanding Black-box Predictions via Influence Functions", ICML. Frantar, Kurtic,
Alistarh (2021), "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from probtensor.comm import Comm, Serial
from probtensor.inference.fisher import inverse_product

__all__ = ["MFAC", "GaussNewton", "Preconditioner", "influence", "output_layer_influence"]

Rows = tuple[Tensor, Tensor]  # inputs (n, …) and values (n,)
HiddenStep = tuple[Tensor, Tensor, Tensor, Tensor, float]  # hidden, errors, those of the query rows, rate
Parameters = dict[str, Tensor]
Link = Callable[[Tensor], Tensor] | None  # from predictions to means; None: they are the same
CHUNK = 4096  # rows in one pass


class Preconditioner(Protocol):
    """What the query rows' gradient is multiplied by.

    Examples
    --------
    >>> class Halved:
    ...     def apply(self, module, names, train, v, comm, inverse_link=None):
    ...         return v / 2
    >>> module = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    >>> rows = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 4.0])
    >>> halved = influence(module, rows, rows, preconditioner=Halved())
    >>> torch.equal(halved, influence(module, rows, rows) / 2)
    True
    """

    def apply(
        self, module: nn.Module, names: Sequence[str], train: Rows, v: Tensor, comm: Comm, inverse_link: Link = None
    ) -> Tensor:
        """The product with `v`, shape (P,), the parameters `names` in their order."""
        ...


def influence(
    module: nn.Module,
    train: Rows,
    query: Rows,
    *,
    parameters: Literal["last", "all"] = "last",
    preconditioner: Preconditioner | None = None,
    signed: bool = True,
    checkpoints: Sequence[tuple[Parameters, float]] | None = None,
    chunk: int = CHUNK,
    comm: Comm | None = None,
    inverse_link: Link = None,
) -> Tensor:
    """Influence of each training row on the summed loss of the query rows.

    Parameters
    ----------
    module : Module
        Gives predictions (n,) for inputs (n, …). It is left as it is.
    train, query : tuple of Tensor
        Inputs (n, …) and values (n,); on several ranks, this rank's own.
    parameters : {"last", "all"}, default "last"
        Gradients with respect to the last `torch.nn.Linear` of one output, bias included, or to all parameters.
    preconditioner : MFAC or GaussNewton, optional
        Default: none, TracIn's scores.
    signed : bool, default True
        Whether harmful rows have negative scores; else magnitudes.
    checkpoints : sequence of (state, rate), optional
        Parameters at some times of the training, as `Module.state_dict` has them, and their learning rates: scores are
        added up over them. Default: the module's own, at rate 1.
    chunk : int, default 4096
        Rows in one pass.
    comm : Comm, optional
        The ranks that share the rows: the query rows' gradient is one sum a checkpoint.
    inverse_link : callable, optional
        Means of the values from predictions, such as `torch.sigmoid` for binary values and `torch.exp` for counts,
        whose negative log-likelihood the loss then is. Default: half the squared error.

    Returns
    -------
    Tensor, shape (n,)
        Of this rank's training rows.

    Raises
    ------
    ValueError
        If shapes do not fit, or there is no such output layer.

    Examples
    --------
    >>> module = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    >>> with torch.no_grad():
    ...     _ = module[0].weight.fill_(1.0), module[0].bias.fill_(0.0)
    >>> train = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 2.0])
    >>> query = torch.tensor([[1.0]]), torch.tensor([0.5])
    >>> influence(module, train, query)  # errors 1 and 0 at the training rows, 1/2 at the query row
    tensor([1., 0.])
    """
    comm = Serial() if comm is None else comm
    for name, (inputs, values) in (("train", train), ("query", query)):
        if values.ndim != 1 or len(inputs) != len(values):
            raise ValueError(
                f"{name}: expected inputs (n, …) and values (n,), got {tuple(inputs.shape)} and {tuple(values.shape)}"
            )
    if parameters not in ("last", "all"):
        raise ValueError(f'parameters: expected "last" or "all", got {parameters!r}')
    now = {name: value.detach() for name, value in module.named_parameters()}
    steps = [(now, 1.0)] if checkpoints is None else checkpoints
    total = train[1].new_zeros(len(train[1]))
    for state, rate in steps:
        at = now | {name: state[name].detach().to(now[name]) for name in now}
        if parameters == "last" and preconditioner is None:
            scores = _of_output_layer(module, at, train, query, chunk, comm, inverse_link)
        else:
            names = list(now) if parameters == "all" else _output_names(module)
            v = comm.sum(_summed_gradient(module, at, names, query, chunk, inverse_link))
            if preconditioner is not None:
                with _placed(module, at):
                    v = preconditioner.apply(module, names, train, v, comm, inverse_link)
            moved = (_along(module, at, names, part, v, inverse_link) for part in _parts(train, chunk))
            scores = torch.cat([*moved, total[:0]])
        total = total + rate * scores
    return total if signed else total.abs()


@final
@dataclass(frozen=True)
class GaussNewton:
    """``(J'WJ / n + damping)^-1`` over all training rows, by conjugate gradients: J is never formed.

    ``W`` is the derivative of the inverse link, and one without.

    Attributes
    ----------
    damping : float
        Above 0.
    steps : int
        Of conjugate gradients at most: two passes over the training rows each.
    tol : float
        Stop when the residual's norm has fallen to this share.

    Examples
    --------
    >>> module = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    >>> x = torch.arange(6.0)[:, None]
    >>> scores = influence(module, (x, x[:, 0]), (x[:2], x[:2, 0]), preconditioner=GaussNewton(1e-6))
    >>> scores.shape
    torch.Size([6])
    """

    damping: float = 1e-3
    steps: int = 100
    tol: float = 1e-10

    def apply(
        self, module: nn.Module, names: Sequence[str], train: Rows, v: Tensor, comm: Comm, inverse_link: Link = None
    ) -> Tensor:
        """The product with `v`."""
        if not self.damping > 0:
            raise ValueError(f"damping: expected a number above 0, got {self.damping!r}")
        n = float(comm.sum(v.new_tensor([float(len(train[1]))])))
        at = {name: value.detach() for name, value in module.named_parameters()}

        def product(x: Tensor) -> Tensor:
            mine = torch.zeros_like(x)
            for inputs, _ in _parts(train, CHUNK):
                predict = _predictions(module, at, names, inputs)
                chosen = tuple(at[name] for name in names)
                _, moved = _forward(_means(predict, inverse_link), chosen, x)
                mine += _flatten(vjp(predict, *chosen)[1](moved))
            return comm.sum(mine) / n + self.damping * x

        return _conjugate_gradients(product, v, self.steps, self.tol)


@final
@dataclass(frozen=True)
class MFAC:
    """``(F + damping)^-1`` with F the empirical Fisher matrix of some training rows' gradients: M-FAC's static form.

    Attributes
    ----------
    n_gradients : int
        Training rows of this rank whose gradients are taken, evenly spaced; memory is this times the parameters.
    damping : float
        Above 0.

    Examples
    --------
    >>> module = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    >>> x = torch.arange(6.0)[:, None]
    >>> scores = influence(module, (x, x[:, 0]), (x[:2], x[:2, 0]), preconditioner=MFAC(n_gradients=6, damping=0.1))
    >>> scores.shape
    torch.Size([6])
    """

    n_gradients: int = 256
    damping: float = 1e-3

    def apply(
        self, module: nn.Module, names: Sequence[str], train: Rows, v: Tensor, comm: Comm, inverse_link: Link = None
    ) -> Tensor:
        """The product with `v`."""
        if comm.size > 1:
            raise ValueError("preconditioner: expected GaussNewton on several ranks, got MFAC")
        at = {name: value.detach() for name, value in module.named_parameters()}
        count = min(self.n_gradients, len(train[1]))
        rows = torch.linspace(0, len(train[1]) - 1, count, device=v.device).round().long()
        gradients = [
            _summed_gradient(module, at, names, (train[0][row : row + 1], train[1][row : row + 1]), 1, inverse_link)
            for row in rows.tolist()
        ]
        return inverse_product(torch.stack(gradients), v, self.damping)


def output_layer_influence(steps: Iterable[HiddenStep]) -> Tensor:
    """Influence through an output layer with a bias, from what the layer was given: no pass through the network.

    Training that ends an epoch with predictions of all rows has these at hand. Two products of a matrix and a vector a
    checkpoint; a generator as argument lets one checkpoint after the other be in memory.

    Parameters
    ----------
    steps : iterable of (hidden, errors, query_hidden, query_errors, rate)
        One a checkpoint: what the layer was given (n, d), predictions less values (n,), the same of the query rows,
        (m, d) and (m,), and the learning rate.

    Returns
    -------
    Tensor, shape (n,)
        As ``influence(..., parameters="last")`` gives it.

    Raises
    ------
    ValueError
        If there is no checkpoint.

    Examples
    --------
    >>> hidden, errors = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 0.0])
    >>> output_layer_influence([(hidden, errors, torch.tensor([[1.0]]), torch.tensor([0.5]), 1.0)])
    tensor([1., 0.])
    """
    total: Tensor | None = None
    for hidden, errors, query_hidden, query_errors, rate in steps:
        scores = errors * torch.addmv(query_errors.sum(), hidden, query_errors @ query_hidden)
        total = rate * scores if total is None else total.add_(scores, alpha=rate)
    if total is None:
        raise ValueError("steps: expected at least one checkpoint, got none")
    return total


def _of_output_layer(
    module: nn.Module, at: Parameters, train: Rows, query: Rows, chunk: int, comm: Comm, inverse_link: Link
) -> Tensor:
    """Scores ``(p_j - y_j) (h_j G[:-1] + G[-1])``, with G the query rows' sum of ``(p - y) [h, 1]``."""
    weight = at[_output_names(module)[0]]
    mine = weight.new_zeros(weight.numel() + 1)
    for inputs, values in _parts(query, chunk):
        errors, hidden = _errors_and_hidden(module, at, inputs, values, inverse_link)
        mine += torch.cat([errors @ hidden, errors.sum()[None]])
    G = comm.sum(mine)
    bias = G[-1] if len(_output_names(module)) > 1 else torch.zeros_like(G[-1])
    scores = [train[1].new_zeros(0)]
    for inputs, values in _parts(train, chunk):
        errors, hidden = _errors_and_hidden(module, at, inputs, values, inverse_link)
        scores.append(errors * (hidden @ G[:-1] + bias))
    return torch.cat(scores)


def _output_layer(module: nn.Module) -> tuple[str, nn.Linear]:
    layers = [(name, x) for name, x in module.named_modules() if isinstance(x, nn.Linear) and x.out_features == 1]
    if not layers:
        raise ValueError('parameters: expected "all" for a module without a torch.nn.Linear of one output, got "last"')
    return layers[-1]


def _output_names(module: nn.Module) -> list[str]:
    name, layer = _output_layer(module)
    prefix = f"{name}." if name else ""
    return [f"{prefix}{own}" for own, _ in layer.named_parameters(recurse=False)]


@torch.no_grad()
def _errors_and_hidden(
    module: nn.Module, at: Parameters, inputs: Tensor, values: Tensor, inverse_link: Link
) -> tuple[Tensor, Tensor]:
    """Prediction errors (n,) and what the output layer is given (n, d)."""
    seen: list[Tensor] = []
    handle = _output_layer(module)[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        predicted = functional_call(module, at, (inputs,))
    finally:
        handle.remove()
    return _error(predicted, values, inverse_link), seen[-1].reshape(len(values), -1)


def _error(predicted: Tensor, values: Tensor, inverse_link: Link) -> Tensor:
    """Derivative (n,) of each row's loss by its prediction."""
    return (predicted if inverse_link is None else inverse_link(predicted)) - values


def _means(predict: Callable[..., Tensor], inverse_link: Link) -> Callable[..., Tensor]:
    """Means of the values (n,) as a function of some parameters."""
    return predict if inverse_link is None else lambda *chosen: inverse_link(predict(*chosen))


def _predictions(module: nn.Module, at: Parameters, names: Sequence[str], inputs: Tensor) -> Callable[..., Tensor]:
    """Predictions (n,) as a function of some parameters."""

    def predict(*chosen: Tensor) -> Tensor:
        result: Tensor = functional_call(module, at | dict(zip(names, chosen, strict=True)), (inputs,))
        return result

    return predict


def _summed_gradient(
    module: nn.Module, at: Parameters, names: Sequence[str], rows: Rows, chunk: int, inverse_link: Link
) -> Tensor:
    """Gradient of the rows' summed loss, shape (P,): one backward pass."""
    chosen = tuple(at[name] for name in names)
    total = torch.zeros_like(_flatten(chosen))
    for inputs, values in _parts(rows, chunk):
        predicted, back = vjp(_predictions(module, at, names, inputs), *chosen)[:2]
        total += _flatten(back(_error(predicted, values, inverse_link)))
    return total


def _along(
    module: nn.Module, at: Parameters, names: Sequence[str], rows: Rows, v: Tensor, inverse_link: Link
) -> Tensor:
    """Each row's gradient times `v`, shape (n,): one forward-mode pass."""
    inputs, values = rows
    chosen = tuple(at[name] for name in names)
    predicted, moved = _forward(_predictions(module, at, names, inputs), chosen, v)
    return _error(predicted, values, inverse_link) * moved


def _forward(predict: Callable[..., Tensor], chosen: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions, and how they move when the parameters move along `v`: both (n,)."""
    with warnings.catch_warnings():
        # PyTorch's rules for forward mode are made with what it calls deprecated.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        predicted, moved = jvp(predict, chosen, _unflatten(v, chosen))[:2]
    return predicted.detach(), moved.detach()


class _placed:
    """A module with other parameters for a while."""

    def __init__(self, module: nn.Module, at: Parameters) -> None:
        self._module, self._at = module, at

    def __enter__(self) -> None:
        self._before = {name: value.data for name, value in self._module.named_parameters()}
        for name, value in self._module.named_parameters():
            value.data = self._at[name]

    def __exit__(self, *_: object) -> None:
        for name, value in self._module.named_parameters():
            value.data = self._before[name]


def _conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tol: float) -> Tensor:
    """Solution of ``A x = b`` for a positive definite A that is known by its products."""
    x, left = torch.zeros_like(b), b.clone()
    direction, size = left.clone(), left @ left
    goal = tol**2 * size
    for _ in range(steps):
        if size <= goal:
            break
        moved = product(direction)
        share = size / (direction @ moved)
        x, left = x + share * direction, left - share * moved
        size, before = left @ left, size
        direction = left + (size / before) * direction
    return x


def _parts(rows: Rows, chunk: int) -> Iterator[Rows]:
    inputs, values = rows
    for first in range(0, len(values), chunk):
        yield inputs[first : first + chunk], values[first : first + chunk]


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _unflatten(vector: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = torch.split(vector, [x.numel() for x in like])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, like, strict=True))
