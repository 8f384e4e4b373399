"""Stochastic variational inference of any Pyro model and guide, over the ranks of a job.

A model and a guide are functions of this rank's rows: tensors whose first axis is the row. What all rows share is
sampled outside, what belongs to a row inside a plate named "rows". All ranks draw the same shared values at a step,
from a generator that the step's number seeds. With N rows in all, a batch B of them and P ranks, rank r computes

    L_r = E_q[log p(z) − log q(z)] + P (N / |B|) Σ_{i in B on r} E_q[log p(y_i | z)],

so that the mean of ``L_r`` over the ranks is the usual estimate of the evidence lower bound, however the rows are dealt
and however uneven that is; a rank without rows in a batch has the first term alone. Gradients are summed in the order
of the parameters' names, and every rank takes the same step. A row's batch is a hash of its key and the epoch, so it
does not depend on which rank has it.

Pyro is imported when a fit starts. Parameters are in a scope of Pyro's store, and leave it with the fit.

References
----------
Hoffman, Blei, Wang, Paisley (2013), "Stochastic Variational Inference", JMLR 14. Ranganath, Gerrish, Blei (2014),
"Black Box Variational Inference", AISTATS. Bingham et al. (2019), "Pyro: Deep Universal Probabilistic Programming",
JMLR 20.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probtensor.blocks import mixed
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm, Serial
from probtensor.resources import is_integer, is_number, threads_for

__all__ = ["PLATE", "VariationalFit", "fit_svi", "load_pyro", "seeded"]

PLATE = "rows"

Program = Callable[..., Any]


@dataclass(frozen=True)
class VariationalFit:
    """What `fit_svi` found.

    Attributes
    ----------
    params : dict of str to Tensor
        Parameters of model and guide by their names, in their own ranges.
    bound_history : list of float
        Estimate of the evidence lower bound at each step, of all rows.
    converged : bool
        Whether the bound stopped growing before `n_steps`.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDelta
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("rows", len(y)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> fit = fit_svi(model, AutoDelta(model), [torch.tensor([1.0, 3.0])], n_steps=400, learning_rate=0.1)
    >>> round(fit.params["AutoDelta.mean"].item(), 1), len(fit.bound_history) == fit.n_iter
    (2.0, True)
    """

    params: dict[str, Tensor]
    bound_history: list[float]
    converged: bool
    _store: dict[str, Any] = field(repr=False)

    @property
    def n_iter(self) -> int:
        """Steps taken."""
        return len(self.bound_history)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Within this block Pyro's store holds the fitted parameters, and nothing else."""
        pyro = load_pyro()
        with pyro.get_param_store().scope(self._store):
            yield

    def draw(self, guide: Program, *rows: Tensor, n_samples: int = 100, random_state: int = 0) -> dict[str, Tensor]:
        """Draws of what the guide samples; no global generator is moved.

        Parameters
        ----------
        guide : callable
        *rows : Tensor
            Its arguments.
        n_samples : int, default 100
        random_state : int, default 0

        Returns
        -------
        dict of str to Tensor, shape (n_samples, …)
        """
        pyro = load_pyro()
        draws: dict[str, list[Tensor]] = {}
        with seeded(random_state, 0, rows), self.scope(), torch.no_grad():
            for _ in range(n_samples):
                for name, site in pyro.poutine.trace(guide).get_trace(*rows).nodes.items():
                    if site["type"] == "sample" and not site["is_observed"]:
                        draws.setdefault(name, []).append(site["value"])
        return {name: torch.stack(values) for name, values in draws.items()}


def fit_svi(
    model: Program,
    guide: Program,
    rows: Sequence[Tensor],
    *,
    comm: Comm | None = None,
    keys: Tensor | None = None,
    batch_size: int | None = None,
    n_steps: int = 2000,
    learning_rate: float = 0.02,
    decay: float = 0.1,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    elbo: Any = None,
    tol: float = 1e-4,
    window: int = 100,
    random_state: int = 0,
    checkpoints: Checkpoints | None = None,
    report: Callable[[int, float], None] | None = None,
) -> VariationalFit:
    """Maximise the evidence lower bound of a Pyro model by a guide.

    Parameters
    ----------
    model, guide : callable
        Of the rows' tensors, ``model(*rows)``. What belongs to single rows is in ``pyro.plate("rows", n)``, in the
        guide too, and after all that is shared. The plate has the size of the rows given; what is in it is scaled
        here.
    rows : sequence of Tensor, shape (n, …)
        Of this rank; there may be none on some.
    comm : Comm, optional
        The ranks that fit together. Default: this process alone.
    keys : Tensor, shape (n,), int64, optional
        At least 0: what rows are dealt to batches by. Default: their numbers, through all ranks.
    batch_size : int, optional
        Rows of a batch on all ranks, on average. Default: all.
    n_steps : int, default 2000
        Steps at most.
    learning_rate, decay : float
        Of Adam; the rate falls evenly in its logarithm, to `decay` times itself at the last step.
    optimizer : callable, optional
        From the list of parameters to an optimiser of torch, in place of Adam.
    elbo : ELBO of Pyro, optional
        Default ``Trace_ELBO()``.
    tol : float, default 1e-4
        Stop when, twice in a row, the mean bound of a window is not higher than that of the window before by more than
        this share of itself, or of the number of rows if that is more. 0: never.
    window : int, default 100
        Steps whose bounds are averaged.
    random_state : int, default 0
        Seed; Pyro's and torch's global generators are left as they were.
    checkpoints : Checkpoints, optional
        Where the state goes, and from where the fit goes on.
    report : callable, optional
        Called after each step with its number and bound; on all ranks.

    Returns
    -------
    VariationalFit

    Raises
    ------
    ValueError
        If rows differ in length, there are none on any rank, a setting is malformed, or ranks have other parameters.
    FloatingPointError
        If the bound is not finite.

    Notes
    -----
    An `AutoGuide` of Pyro keeps its fitted parameters itself, and can be called afterwards; a function that calls
    ``pyro.param`` finds them in `VariationalFit.scope`.

    Examples
    --------
    The mean of normal values whose prior is normal too:

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("rows", len(y)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> fit = fit_svi(model, AutoNormal(model), [torch.tensor([1.0, 2.0, 3.0])], n_steps=1500, tol=0.0)
    >>> round(fit.params["AutoNormal.locs.mean"].item(), 1), round(fit.params["AutoNormal.scales.mean"].item(), 1)
    (1.5, 0.5)
    """
    comm = Serial() if comm is None else comm
    _check(rows, batch_size, n_steps, learning_rate, decay, tol, window)
    shared = _Rows(rows, keys, batch_size, comm)
    pyro = load_pyro()
    objective = pyro.infer.Trace_ELBO() if elbo is None else elbo
    with pyro.get_param_store().scope(), threads_for(len(rows[0])):
        first, scale = shared.batch(0)
        with seeded(random_state, 0, rows), _Scaled(pyro, scale):
            objective.differentiable_loss(model, guide, *first)  # parameters come to be
        free = dict(sorted(pyro.get_param_store().named_parameters()))
        _agree(free, comm)
        leaves = list(free.values())
        stepper = torch.optim.Adam(leaves, lr=learning_rate) if optimizer is None else optimizer(leaves)
        falling = torch.optim.lr_scheduler.ExponentialLR(stepper, decay ** (1 / n_steps))
        history: list[float] = []
        if checkpoints is not None and (found := checkpoints.read()) is not None:
            history = _restore(found, free, stepper, falling)
        converged = _has_converged(history, tol, window, shared.n_total)
        while len(history) < n_steps and not converged:
            step = len(history)
            batch, scale = shared.batch(step)
            with seeded(random_state, step + 1, rows), _Scaled(pyro, scale):
                loss = objective.differentiable_loss(model, guide, *batch)
            if len(pyro.get_param_store()) != len(free):
                new = sorted(set(dict(pyro.get_param_store().named_parameters())) - set(free))
                raise ValueError(f"model, guide: expected the parameters of the first step, got {new} at step {step}")
            gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, leaves, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]
            total = comm.sum(torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in flat)])) / comm.size
            history.append(-float(total[0]))
            if not math.isfinite(history[-1]):
                raise FloatingPointError(f"the bound is {history[-1]} at step {step}; try a lower learning_rate")
            parts = torch.split(total[1:], [leaf.numel() for leaf in leaves])
            for leaf, part in zip(leaves, parts, strict=True):
                leaf.grad = part.view_as(leaf).to(leaf.dtype)
            stepper.step()
            falling.step()
            if report is not None:
                report(len(history), history[-1])
            if checkpoints is not None and checkpoints.due():
                checkpoints.write(*_state(free, stepper, falling, history))
            converged = len(history) % window == 0 and _has_converged(history, tol, window, shared.n_total)
        params = {name: pyro.param(name).detach().clone() for name in free}
        kept = pyro.get_param_store().get_state()
    for leaf in leaves:
        leaf.grad = None
    return VariationalFit(params, history, converged, kept)


class _Rows:
    """Rows of this rank, and which of them each step takes."""

    def __init__(self, rows: Sequence[Tensor], keys: Tensor | None, batch_size: int | None, comm: Comm) -> None:
        self._rows, self._comm = tuple(rows), comm
        n = len(rows[0])
        sizes = [int(size) for size in comm.gather_bytes(str(n).encode())]
        self.n_total = sum(sizes)
        if self.n_total == 0:
            raise ValueError("rows: expected at least one row on some rank, got none")
        start = sum(sizes[: comm.rank])
        self._keys = np.arange(start, start + n) if keys is None else keys.cpu().numpy().astype(np.int64)
        if len(self._keys) != n:
            raise ValueError(f"keys: expected {n} numbers, one a row, got {len(self._keys)}")
        self.n_batches = 1 if batch_size is None else max(1, round(self.n_total / batch_size))
        owner = next(rank for rank, size in enumerate(sizes) if size)
        self._filler = tuple(_first_row(x, comm, owner) for x in rows)
        self._epoch, self._numbers, self._counts = -1, np.empty(0, dtype=np.int64), np.empty(0)

    def batch(self, step: int) -> tuple[tuple[Tensor, ...], float]:
        """Rows of a step, and what multiplies their terms; where there are none, one that is multiplied by 0."""
        if self.n_batches == 1:
            rows, n_rows = self._rows, self.n_total
        else:
            epoch, number = divmod(step, self.n_batches)
            if epoch != self._epoch:
                self._epoch, self._numbers = epoch, mixed(self._keys, epoch) % self.n_batches
                counts = np.bincount(self._numbers, minlength=self.n_batches)
                self._counts = self._comm.sum(torch.from_numpy(counts)).numpy()
            taken = torch.from_numpy(np.flatnonzero(self._numbers == number)).to(self._rows[0].device)
            rows, n_rows = tuple(x[taken] for x in self._rows), int(self._counts[number])
        if len(rows[0]) == 0:
            return self._filler, 0.0
        return rows, self._comm.size * self.n_total / n_rows


def _first_row(column: Tensor, comm: Comm, owner: int) -> Tensor:
    row = column[:1] if comm.rank == owner else column.new_zeros((1, *column.shape[1:]))
    return comm.broadcast(row.contiguous(), root=owner)


@contextmanager
def _Scaled(pyro: Any, scale: float) -> Iterator[None]:
    """Multiply the log density of each site in the plate of rows."""

    class Scaled(pyro.poutine.messenger.Messenger):  # type: ignore[misc]
        def _pyro_sample(self, message: Any) -> None:
            if any(frame.name == PLATE for frame in message["cond_indep_stack"]):
                message["scale"] = message["scale"] * scale

    with Scaled():
        yield


@contextmanager
def seeded(random_state: int, step: int, rows: Sequence[Tensor]) -> Iterator[None]:
    """Global generators with a seed of their own, and afterwards as they were.

    Examples
    --------
    >>> before = torch.get_rng_state()
    >>> with seeded(random_state=0, step=0, rows=[]):
    ...     first = torch.rand(1)
    >>> with seeded(random_state=0, step=0, rows=[]):
    ...     again = torch.rand(1)
    >>> torch.equal(first, again), torch.equal(before, torch.get_rng_state())
    (True, True)
    """
    devices = sorted({x.device.index or 0 for x in rows if x.device.type == "cuda"})
    seed = int(mixed(np.array([step]), int(random_state))[0]) % 2**32
    with torch.random.fork_rng(devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(seed)
        yield


def _agree(free: dict[str, Tensor], comm: Comm) -> None:
    """Give all ranks the first values of rank 0, if they have the same parameters."""
    shapes = json.dumps({name: list(value.shape) for name, value in free.items()})
    expected, *others = (found.decode() for found in comm.gather_bytes(shapes.encode()))
    for rank, found in enumerate(others, 1):
        if found != expected:
            raise ValueError(f"model, guide: expected rank 0's parameters {expected}, got {found} on rank {rank}")
    with torch.no_grad():
        for value in free.values():
            value.copy_(comm.broadcast(value.detach().contiguous()))


def _has_converged(history: list[float], tol: float, window: int, n_rows: int) -> bool:
    if tol == 0 or len(history) < 3 * window:
        return False
    means = [math.fsum(history[-window * k :][:window]) / window for k in (3, 2, 1)]
    least = tol * max(n_rows, abs(means[-1]))
    return means[1] - means[0] < least and means[2] - means[1] < least


def _state(
    free: dict[str, Tensor], stepper: torch.optim.Optimizer, falling: Any, history: list[float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arrays = {f"param.{name}": value.detach() for name, value in free.items()}
    arrays["bound_history"] = torch.tensor(history, dtype=torch.float64)
    of_steps = stepper.state_dict()
    for number, state in of_steps["state"].items():
        arrays |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return arrays, {"groups": of_steps["param_groups"], "schedule": falling.state_dict()}


def _restore(
    found: tuple[dict[str, Tensor], dict[str, Any]],
    free: dict[str, Tensor],
    stepper: torch.optim.Optimizer,
    falling: Any,
) -> list[float]:
    arrays, meta = found
    with torch.no_grad():
        for name, value in free.items():
            value.copy_(arrays[f"param.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    stepper.load_state_dict({"state": state, "param_groups": meta["groups"]})
    falling.load_state_dict(meta["schedule"])
    history: list[float] = arrays["bound_history"].tolist()
    return history


def _check(
    rows: Sequence[Tensor],
    batch_size: int | None,
    n_steps: int,
    learning_rate: float,
    decay: float,
    tol: float,
    window: int,
) -> None:
    lengths = [len(x) for x in rows]
    if not rows or len(set(lengths)) > 1:
        raise ValueError(f"rows: expected tensors of one length, got lengths {lengths}")
    counts = {"n_steps": n_steps, "window": window} | ({} if batch_size is None else {"batch_size": batch_size})
    for name, value in counts.items():
        if not (is_integer(value) and value >= 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    for name, number in (("learning_rate", learning_rate), ("decay", decay)):
        if not (is_number(number) and 0 < number < math.inf):
            raise ValueError(f"{name}: expected a number above 0, got {number!r}")
    if not (is_number(tol) and tol >= 0):
        raise ValueError(f"tol: expected a number of at least 0, got {tol!r}")


def load_pyro() -> Any:
    """Pyro, which is typed in part only.

    Examples
    --------
    >>> load_pyro().__name__
    'pyro'
    """
    import_module("pyro.infer")
    return import_module("pyro")
