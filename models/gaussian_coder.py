"""Sparse coding with spike-and-slab causes that add up: GSC."""

from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from probtensor.models.sparse_coding import FloatArray, SparseCoder
from probtensor.models.spike_slab import SlabParameters, SpikeSlab
from probtensor.resources import RandomState

__all__ = ["GSC"]


@final
class GSC(SparseCoder):
    """Gaussian (spike-and-slab) sparse coding: ``y ~ N(sum_h s_h z_h W_h, sigma^2)``, ``z ~ N(mu, Psi)``.

    Parameters
    ----------
    n_components : int, default 10
        Components ``H`` of the dictionary.
    full_covariance : bool, default False
        Whether slabs may be correlated.
    n_candidates : int, default 7
        Components of which a point's states may have more than one (``H'``); with fewer in all, all. For
        ``states="selected"``.
    max_active : int, default 4
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
    data_cut : bool, default True
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
    prior_ : ndarray, shape (H,)
        Probability ``pi_h`` of each cause to be active.
    slab_mean_ : ndarray, shape (H,)
        ``mu``; after `fit`, slabs have a mean square of one, and the dictionary has the scale.
    slab_covariance_ : ndarray, shape (H,) or (H, H)
        ``Psi``: variances, or the whole covariance.
        See `SparseCoder` for the others.

    References
    ----------
    Sheikh, Shelton, Lücke (2014), "A Truncated EM Approach for Spike-and-Slab Sparse Coding", JMLR 15.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> bars = np.kron(np.eye(3), np.ones((1, 3)))
    >>> codes = (rng.random((500, 3)) < 0.3) * rng.normal(2.0, 1.0, size=(500, 3))
    >>> Y = codes @ bars + 0.1 * rng.normal(size=(500, 9))
    >>> Y[rng.random(Y.shape) < 0.2] = np.nan  # missing entries
    >>> model = GSC(n_components=3, random_state=0, progress=False).fit(Y)
    >>> round(model.noise_std_, 1), model.prior_.round(1).tolist(), bool(np.isfinite(model.reconstruct(Y)).all())
    (0.1, [0.3, 0.3, 0.3], True)
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        full_covariance: bool = False,
        n_candidates: int = 7,
        max_active: int = 4,
        states: Literal["selected", "evolved", "all"] = "selected",
        n_states: int = 64,
        annealing: int = 40,
        temperature: float = 3.0,
        renewals: int = 12,
        data_cut: bool = True,
        max_iter: int = 200,
        tol: float = 1e-6,
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.full_covariance = full_covariance
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

    def _model(self) -> SpikeSlab:
        return SpikeSlab(self.full_covariance, min(self.max_active, self.n_components))

    def _set_prior(self, params: SlabParameters) -> None:
        self.prior_: npt.NDArray[Any] = params.prob.cpu().numpy()
        self.slab_mean_ = params.mean.cpu().numpy()
        self.slab_covariance_ = params.slab.cpu().numpy()

    def _prior_history(self, params: SlabParameters) -> dict[str, Tensor]:
        return {"prior": params.prob}

    def _standard(self, params: SlabParameters) -> SlabParameters:
        return self._model().rescaled(params)

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        covariance = self.slab_covariance_ if self.full_covariance else np.diag(self.slab_covariance_)
        slab = rng.multivariate_normal(self.slab_mean_.astype(np.float64), covariance.astype(np.float64), n_samples)
        return np.where(rng.random(slab.shape) < self.prior_, slab, 0.0)
