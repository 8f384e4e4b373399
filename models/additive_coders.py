"""Sparse coding with discrete causes that add up: BSC, TSC and DSC."""

from collections.abc import Sequence
from typing import Any, Literal, final

import numpy as np
from torch import Tensor

from probtensor.models.linear_coding import LinearCoding, LinearParameters
from probtensor.models.sparse_coding import FloatArray, SparseCoder
from probtensor.resources import RandomState, is_number

__all__ = ["BSC", "DSC", "TSC"]


@final
class BSC(SparseCoder):
    """Binary sparse coding: ``y ~ N(sum_h s_h W_h, sigma^2)``, ``s_h ~ Bernoulli(pi)``.

    Parameters
    ----------
    n_components : int, default 10
        Components ``H`` of the dictionary.
    n_candidates : int, default 8
        Components of which a point's states may have more than one (``H'``); with fewer in all, all. For
        ``states="selected"``.
    max_active : int, default 5
        Components in use in a state at most (``gamma``).
    states : {"selected", "evolved", "all"}, default "selected"
        Which states posterior sums run over: none, each component alone, and those of the candidates; `n_states` that
        each point keeps and betters; or all there are.
    n_states : int, default 64
        For ``states="evolved"``.
    annealing : int, default 40
        Steps in which the temperature falls to one.
    temperature : float, default 3
        At the start.
    renewals : int, default 12
        How often, at most, a component that is hardly missed is begun anew.
    data_cut : bool, default False
        Whether M-steps leave out as many badly explained points as are expected to have more than `max_active` causes.
        The bound may then fall a little. For ``states="selected"``.
    max_iter : int, default 200
        Steps of EM on all points at most.
    tol : float, default 1e-6
        Stop when the bound a point changes by less, relative to it, three times in a row.
    device : str, default "auto"
        "cpu", "cuda" or "cuda:n"; "auto" takes a GPU if there is one.
    random_state : int, Generator, RandomState or None
        Seed of the start.
    progress : bool, default True
        Show a progress bar once the fit has taken a second.

    Attributes
    ----------
    prior_ : float
        Probability ``pi`` of a cause to be active.
        See `SparseCoder` for the others.

    References
    ----------
    Henniges, Puertas, Bornschein, Eggert, Lücke (2010), "Binary Sparse Coding", LVA/ICA.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> bars = np.kron(np.eye(3), np.ones((1, 3)))
    >>> Y = 5 * (rng.random((400, 3)) < 0.3) @ bars + 0.5 * rng.normal(size=(400, 9))
    >>> model = BSC(n_components=3, random_state=0, progress=False).fit(Y)
    >>> round(model.noise_std_, 1), model.transform(Y).shape
    (0.5, (400, 3))
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        n_candidates: int = 8,
        max_active: int = 5,
        states: Literal["selected", "evolved", "all"] = "selected",
        n_states: int = 64,
        annealing: int = 40,
        temperature: float = 3.0,
        renewals: int = 12,
        data_cut: bool = False,
        max_iter: int = 200,
        tol: float = 1e-6,
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.n_candidates = n_candidates
        self.max_active = max_active
        self.states = states
        self.n_states = n_states
        self.annealing = annealing
        self.temperature = temperature
        self.renewals = renewals
        self.data_cut = data_cut
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _model(self) -> LinearCoding:
        return LinearCoding((1.0,))

    def _set_prior(self, params: LinearParameters) -> None:
        self.prior_ = float(params.log_prob[1].exp())

    def _prior_history(self, params: LinearParameters) -> dict[str, Tensor]:
        return {"prior": params.log_prob[1].exp()}

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        return (rng.random((n_samples, self.n_components)) < self.prior_).astype(np.float64)


@final
class TSC(SparseCoder):
    """Ternary sparse coding: ``y ~ N(sum_h s_h W_h, sigma^2)``, ``s_h`` is -1 or 1 with probability ``pi / 2`` each.

    Parameters
    ----------
    n_components : int, default 10
        Components ``H`` of the dictionary.
    n_candidates : int, default 7
        Components of which a point's states may have more than one (``H'``); with fewer in all, all. For
        ``states="selected"``.
    max_active : int, default 5
        Components in use in a state at most (``gamma``).
    states : {"selected", "evolved", "all"}, default "selected"
        Which states posterior sums run over: none, each component alone, and those of the candidates; `n_states` that
        each point keeps and betters; or all there are.
    n_states : int, default 64
        For ``states="evolved"``.
    annealing : int, default 40
        Steps in which the temperature falls to one.
    temperature : float, default 3
        At the start.
    renewals : int, default 12
        How often, at most, a component that is hardly missed is begun anew.
    data_cut : bool, default False
        Whether M-steps leave out as many badly explained points as are expected to have more than `max_active` causes.
        The bound may then fall a little. For ``states="selected"``.
    max_iter : int, default 200
        Steps of EM on all points at most.
    tol : float, default 1e-6
        Stop when the bound a point changes by less, relative to it, three times in a row.
    device : str, default "auto"
        "cpu", "cuda" or "cuda:n"; "auto" takes a GPU if there is one.
    random_state : int, Generator, RandomState or None
        Seed of the start.
    progress : bool, default True
        Show a progress bar once the fit has taken a second.

    Attributes
    ----------
    prior_ : float
        Probability ``pi`` of a cause not to be 0.
        See `SparseCoder` for the others.

    References
    ----------
    Exarchakis, Henniges, Eggert, Lücke (2012), "Ternary Sparse Coding", LVA/ICA.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> bars = np.kron(np.eye(3), np.ones((1, 3)))
    >>> signs = rng.choice([-1, 0, 1], p=[0.15, 0.7, 0.15], size=(400, 3))
    >>> Y = 5 * signs @ bars + 0.5 * rng.normal(size=(400, 9))
    >>> model = TSC(n_components=3, random_state=0, progress=False).fit(Y)
    >>> round(model.noise_std_, 1), sorted(np.abs(model.components_).max(1).round().tolist())
    (0.5, [5.0, 5.0, 5.0])
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        n_candidates: int = 7,
        max_active: int = 5,
        states: Literal["selected", "evolved", "all"] = "selected",
        n_states: int = 64,
        annealing: int = 40,
        temperature: float = 3.0,
        renewals: int = 12,
        data_cut: bool = False,
        max_iter: int = 200,
        tol: float = 1e-6,
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.n_candidates = n_candidates
        self.max_active = max_active
        self.states = states
        self.n_states = n_states
        self.annealing = annealing
        self.temperature = temperature
        self.renewals = renewals
        self.data_cut = data_cut
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _values(self) -> tuple[float, ...]:
        return (-1.0, 1.0)

    def _model(self) -> LinearCoding:
        return LinearCoding((-1.0, 1.0), tied=True)

    def _set_prior(self, params: LinearParameters) -> None:
        self.prior_ = float(params.log_prob[1:].exp().sum())

    def _prior_history(self, params: LinearParameters) -> dict[str, Tensor]:
        return {"prior": params.log_prob[1:].exp().sum()}

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        shape = n_samples, self.n_components
        return np.where(rng.random(shape) < self.prior_, rng.choice([-1.0, 1.0], shape), 0.0)


@final
class DSC(SparseCoder):
    """Discrete sparse coding: ``y ~ N(sum_h s_h W_h, sigma^2)``, ``s_h`` is 0 or one of the given values.

    Parameters
    ----------
    n_components : int, default 10
        Components ``H`` of the dictionary.
    values : sequence of float, default (1, 2)
        Values of a cause other than 0: the dictionary takes the scale.
    n_candidates : int, default 7
        Components of which a point's states may have more than one (``H'``); with fewer in all, all. For
        ``states="selected"``.
    max_active : int, default 5
        Components in use in a state at most (``gamma``).
    states : {"selected", "evolved", "all"}, default "selected"
        Which states posterior sums run over: none, each component alone, and those of the candidates; `n_states` that
        each point keeps and betters; or all there are.
    n_states : int, default 64
        For ``states="evolved"``.
    annealing : int, default 40
        Steps in which the temperature falls to one.
    temperature : float, default 3
        At the start.
    renewals : int, default 12
        How often, at most, a component that is hardly missed is begun anew.
    data_cut : bool, default False
        Whether M-steps leave out as many badly explained points as are expected to have more than `max_active` causes.
        The bound may then fall a little. For ``states="selected"``.
    max_iter : int, default 200
        Steps of EM on all points at most.
    tol : float, default 1e-6
        Stop when the bound a point changes by less, relative to it, three times in a row.
    device : str, default "auto"
        "cpu", "cuda" or "cuda:n"; "auto" takes a GPU if there is one.
    random_state : int, Generator, RandomState or None
        Seed of the start.
    progress : bool, default True
        Show a progress bar once the fit has taken a second.

    Attributes
    ----------
    prior_ : ndarray, shape (1 + V,)
        Probability of a cause to be 0, then of each of `values`.
        See `SparseCoder` for the others.

    References
    ----------
    Exarchakis, Lücke (2017), "Discrete Sparse Coding", Neural Computation 29(11).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> bars = np.kron(np.eye(3), np.ones((1, 3)))
    >>> causes = rng.choice([0, 1, 2], p=[0.6, 0.3, 0.1], size=(400, 3))
    >>> Y = 5 * causes @ bars + 0.5 * rng.normal(size=(400, 9))
    >>> model = DSC(n_components=3, values=(1.0, 2.0), random_state=0, progress=False).fit(Y)
    >>> round(model.noise_std_, 1), model.prior_.round(1).tolist()
    (0.5, [0.6, 0.3, 0.1])
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        values: Sequence[float] = (1.0, 2.0),
        n_candidates: int = 7,
        max_active: int = 5,
        states: Literal["selected", "evolved", "all"] = "selected",
        n_states: int = 64,
        annealing: int = 40,
        temperature: float = 3.0,
        renewals: int = 12,
        data_cut: bool = False,
        max_iter: int = 200,
        tol: float = 1e-6,
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.values = values
        self.n_candidates = n_candidates
        self.max_active = max_active
        self.states = states
        self.n_states = n_states
        self.annealing = annealing
        self.temperature = temperature
        self.renewals = renewals
        self.data_cut = data_cut
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _check(self) -> None:
        given: list[Any] = list(self.values) if hasattr(self.values, "__len__") else []
        values = [float(value) for value in given if is_number(value) and np.isfinite(value) and value != 0]
        if not values or len(set(values)) < len(given):
            raise ValueError(f"values: expected distinct finite numbers other than 0, got {self.values!r}")
        super()._check()

    def _values(self) -> tuple[float, ...]:
        return tuple(float(value) for value in self.values)

    def _model(self) -> LinearCoding:
        return LinearCoding(self._values())

    def _set_prior(self, params: LinearParameters) -> None:
        self.prior_ = params.log_prob.exp().cpu().numpy()

    def _prior_history(self, params: LinearParameters) -> dict[str, Tensor]:
        return {"prior": params.log_prob.exp()}

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        prob = self.prior_.astype(np.float64) / self.prior_.sum(dtype=np.float64)
        return rng.choice([0.0, *self._values()], (n_samples, self.n_components), p=prob)
