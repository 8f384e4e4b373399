"""Sparse coding with binary causes of which the strongest wins: MCA and MMCA."""

from typing import Literal, final

import numpy as np
from torch import Tensor

from probtensor.models.max_coding import MaxCoding, MaxParameters
from probtensor.models.sparse_coding import FloatArray, SparseCoder
from probtensor.resources import RandomState

__all__ = ["MCA", "MMCA"]

MAX_CANDIDATES = 12  # their sets, 2^12, are columns of a table with a row for each state


@final
class MCA(SparseCoder):
    """Maximal causes analysis: ``y_d ~ N(max_h s_h W_dh, sigma^2)``, ``W >= 0``, ``s_h ~ Bernoulli(pi)``.

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
    Lücke, Sahani (2008), "Maximal Causes for Non-linear Component Extraction", JMLR 9.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> bars = np.array([[5, 5, 5, 0, 0], [0, 0, 5, 5, 5]])  # where both are, the entry is 5, not 10
    >>> Y = ((rng.random((500, 2)) < 0.3)[:, :, None] * bars).max(1) + 0.5 * rng.normal(size=(500, 5))
    >>> model = MCA(n_components=2, random_state=0, progress=False).fit(Y)
    >>> round(model.noise_std_, 1), round(model.prior_, 1), model.components_.max(1).round().tolist()
    (0.5, 0.3, [5.0, 5.0])
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

    def _check(self) -> None:
        super()._check()
        check_sets(self)

    def _model(self) -> MaxCoding:
        return MaxCoding(signed=False)

    def _set_prior(self, params: MaxParameters) -> None:
        self.prior_ = float(params.log_prob[1].exp())

    def _prior_history(self, params: MaxParameters) -> dict[str, Tensor]:
        return {"prior": params.log_prob[1].exp()}

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        return (rng.random((n_samples, self.n_components)) < self.prior_).astype(np.float64)

    def _decode(self, codes: FloatArray) -> FloatArray:
        return strongest(codes, self.components_)


@final
class MMCA(SparseCoder):
    """Maximum-magnitude causes analysis: as `MCA`, where the largest magnitude wins and keeps its sign.

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
    Bornschein, Henniges, Lücke (2013), "Are V1 Simple Cells Optimized for Visual Occlusions?", PLoS Computational
    Biology 9(6).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> bars = np.array([[5, -5, 0, 0], [0, 8, 8, 0], [0, 0, -6, 6]])
    >>> parts = (rng.random((500, 3)) < 0.3)[:, :, None] * bars
    >>> largest = np.take_along_axis(parts, np.abs(parts).argmax(1)[:, None], 1)[:, 0]
    >>> model = MMCA(n_components=3, random_state=0, progress=False).fit(largest + 0.5 * rng.normal(size=(500, 4)))
    >>> round(model.noise_std_, 1), sorted(np.abs(model.components_).max(1).round().tolist())
    (0.5, [5.0, 6.0, 8.0])
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

    def _check(self) -> None:
        super()._check()
        check_sets(self)

    def _model(self) -> MaxCoding:
        return MaxCoding(signed=True)

    def _set_prior(self, params: MaxParameters) -> None:
        self.prior_ = float(params.log_prob[1].exp())

    def _prior_history(self, params: MaxParameters) -> dict[str, Tensor]:
        return {"prior": params.log_prob[1].exp()}

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        return (rng.random((n_samples, self.n_components)) < self.prior_).astype(np.float64)

    def _decode(self, codes: FloatArray) -> FloatArray:
        return strongest(codes, self.components_)


def check_sets(coder: SparseCoder) -> None:
    """Raise ValueError where the sets of candidates are too many."""
    if coder.states == "selected" and min(coder.n_candidates, coder.n_components) > MAX_CANDIDATES:
        raise ValueError(f"n_candidates: expected at most {MAX_CANDIDATES}, got {coder.n_candidates}")
    if coder.states == "all" and coder.n_components > MAX_CANDIDATES:
        raise ValueError(
            f'states: expected "selected" or "evolved" for more than {MAX_CANDIDATES} components, got "all"'
        )


def strongest(codes: FloatArray, components: FloatArray) -> FloatArray:
    """Of ``codes[n, h] * components[h, d]`` that of the largest magnitude over h, shape (N, D)."""
    result = np.zeros((len(codes), components.shape[1]))
    for code, component in zip(codes.T, components, strict=True):
        candidate = code[:, None] * component
        result = np.where(np.abs(candidate) > np.abs(result), candidate, result)
    return result
