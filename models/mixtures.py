"""Mixtures: MoG of normal distributions, MoP of Poisson distributions.

A mixture is a sparse code in which exactly one component is on in each point, and EM is exact: the bound is the
log-likelihood. Manners are those of the sparse coders; codes are responsibilities.
"""

from abc import ABC, abstractmethod
from typing import Any, Self, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probtensor.comm import Comm
from probtensor.inference.points import PointBlocks, Summary, block_size
from probtensor.inference.truncated_em import Result
from probtensor.models.mixture_densities import (
    Covariance,
    GaussianMixture,
    GaussianParameters,
    PoissonMixture,
    PoissonParameters,
)
from probtensor.models.mixture_fit import OneOfAll, Plan, fit_mixture
from probtensor.models.sparse_coding import FloatArray, SparseCoder
from probtensor.resources import RandomState, is_integer, is_number, resolve_device, shared_generator

__all__ = ["Mixture", "MoG", "MoP"]

SAMPLE = 2000  # points, and this many a component more, for starts and renewals
SAMPLE_A_COMPONENT = 100


class Mixture(SparseCoder, ABC):
    """A component for each point.

    Attributes
    ----------
    components_ : ndarray, shape (H, D)
        Means of the components.
    prior_ : ndarray, shape (H,)
        Probability ``pi_h`` of each component.
    bound_ : float
        Log-likelihood a point.
    bound_history_ : list of float
        The log-likelihood a point before each step on all points, and at the end.
    parameter_history_ : dict of str to ndarray
        Prior, and noise where there is any, at these steps.
    n_iter_ : int
        Steps of EM on all points.
    converged_ : bool
    n_features_in_ : int
        Entries ``D`` of a point.
    """

    n_init: int
    prior_: npt.NDArray[Any]

    def predict(self, Y: Any) -> npt.NDArray[np.int64]:
        """The most probable component of each point.

        Parameters
        ----------
        Y : array_like, shape (N, D)
            NaN is a missing entry.

        Returns
        -------
        ndarray, shape (N,), int64
        """
        labels: npt.NDArray[np.int64] = self._each(Y, lambda p: p.q.argmax(0))  # type: ignore[assignment]
        return labels

    def fit_predict(self, Y: Any, y: None = None, *, comm: Comm | None = None) -> npt.NDArray[np.int64]:
        """Fit, and return the most probable component of each point; see `fit` and `predict`."""
        return self.fit(Y, comm=comm).predict(Y)

    def partial_fit(self, Y: Any, y: None = None) -> Self:
        """Learn from a batch; see `SparseCoder.partial_fit`."""
        if not hasattr(self, "components_"):
            return self.fit(Y)
        before = self._params
        super().partial_fit(Y)
        self._sums = self._model().carried(self._sums, before, self._params, self._masked)
        return self

    def _check(self) -> None:
        for name, least in (("n_components", 1), ("n_init", 1), ("renewals", 0), ("max_iter", 0)):
            value = getattr(self, name)
            if not (is_integer(value) and value >= least):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if not (is_number(self.tol) and self.tol >= 0):
            raise ValueError(f"tol: expected a number of at least 0, got {self.tol!r}")

    def _selection(self, search: bool = False) -> Any:
        return OneOfAll(self.n_components)

    def _blocks(
        self, array: npt.NDArray[Any], masked: bool, first: int = 0, tail: npt.NDArray[Any] | None = None
    ) -> PointBlocks:
        device = resolve_device(self.device)
        size = block_size(self.n_components * array.shape[1], device)
        return PointBlocks(array, array[:0] if tail is None else tail, size, first, masked, self._dtype(), device)

    @abstractmethod
    def _first(self, means: Tensor, summary: Summary) -> Any:
        """Parameters to begin with."""

    def _learn(self, blocks: PointBlocks, summary: Summary, comm: Comm) -> Result[Any]:
        n_points = SAMPLE + (SAMPLE_A_COMPONENT + self._more_points(blocks.array.shape[1])) * self.n_components
        return fit_mixture(
            self._model(),
            lambda means: self._first(means, summary),
            blocks,
            summary,
            Plan(self.n_init, self.renewals, n_points, self.max_iter, self.tol),
            n_components=self.n_components,
            comm=comm,
            generator=shared_generator(self.random_state, comm),
            keep=self._history,
            progress=self.progress,
        )

    def _more_points(self, n_features: int) -> int:
        """Points a component that a start needs beyond those of any model."""
        return 0

    def _set_prior(self, params: Any) -> None:
        self.prior_ = params.log_prob.exp().cpu().numpy()

    def _prior_history(self, params: Any) -> dict[str, Tensor]:
        return {"prior": params.log_prob.exp()}

    def _draw(self, n_samples: int, rng: np.random.Generator) -> FloatArray:
        prob = self.prior_.astype(np.float64) / self.prior_.sum(dtype=np.float64)
        return np.eye(len(prob))[rng.choice(len(prob), n_samples, p=prob)]


@final
class MoG(Mixture):
    """Mixture of normal distributions: component h with probability ``pi_h``, then ``y ~ N(W_h, Sigma_h)``.

    Parameters
    ----------
    n_components : int, default 10
        Components ``H``.
    covariance : {"diag", "full", "spherical"}, default "diag"
        Of each component.
    min_std : float, default 1e-3
        Least standard deviation of a component, relative to that of the data. Without one, a component may shrink
        around a single point, and the likelihood has no maximum.
    n_init : int, default 4
        Short starts, of which the best goes on.
    renewals : int, default 30
        How often, at most, a component that is hardly missed is begun anew.
    max_iter : int, default 200
        Steps of EM on all points at most.
    tol : float, default 1e-6
        Stop when the log-likelihood a point changes by less, relative to it, three times in a row.
    device : str, default "auto"
        "cpu", "cuda" or "cuda:n"; "auto" takes a GPU if there is one.
    random_state : int, Generator, RandomState or None
        Seed of the start.
    progress : bool, default True
        Show a progress bar once the fit has taken a second.

    Attributes
    ----------
    covariances_ : ndarray, shape (H, D), (H, D, D) or (H,)
        ``Sigma_h``: variances of each entry, whole covariances, or one variance.
    noise_std_ : float
        Root of the mean variance within components.
        See `Mixture` for the others.

    References
    ----------
    Ghahramani, Jordan (1994), "Supervised Learning from Incomplete Data via an EM Approach", NIPS 6.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> Y = rng.normal(size=(300, 2)) + 10 * rng.integers(0, 2, (300, 1))
    >>> model = MoG(n_components=2, random_state=0, progress=False).fit(Y)
    >>> [round(float(x)) for x in sorted(model.components_[:, 0])], model.transform(Y).shape
    ([0, 10], (300, 2))
    """

    covariances_: npt.NDArray[Any]

    def __init__(
        self,
        n_components: int = 10,
        *,
        covariance: Covariance = "diag",
        min_std: float = 1e-3,
        n_init: int = 4,
        renewals: int = 30,
        max_iter: int = 200,
        tol: float = 1e-6,
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.covariance = covariance
        self.min_std = min_std
        self.n_init = n_init
        self.renewals = renewals
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _check(self) -> None:
        super()._check()
        if self.covariance not in ("diag", "full", "spherical"):
            raise ValueError(f'covariance: expected "diag", "full" or "spherical", got {self.covariance!r}')
        if not (is_number(self.min_std) and 0 < self.min_std < 1):
            raise ValueError(f"min_std: expected a number above 0 and below 1, got {self.min_std!r}")

    def _model(self) -> GaussianMixture:
        return GaussianMixture(self.covariance)

    def _first(self, means: Tensor, summary: Summary) -> GaussianParameters:
        known = summary.variance
        size = known.max() or max(float(np.abs(summary.mean).max()) ** 2, 1.0)  # for entries that are all the same
        variance = torch.from_numpy(np.where(known > 0, known, size)).to(means)
        return self._model().start(means, variance, self.min_std**2 * variance)

    def _more_points(self, n_features: int) -> int:
        return 2 * n_features if self.covariance == "full" else 0

    def _noise(self, params: GaussianParameters) -> Tensor:
        return (params.log_prob.exp() @ self._model().variances(params).mean(1)).sqrt()

    def _set_prior(self, params: GaussianParameters) -> None:
        super()._set_prior(params)
        self.covariances_ = params.covariance.cpu().numpy()

    def _observe(self, codes: FloatArray, rng: np.random.Generator) -> FloatArray:
        normal = rng.normal(size=(len(codes), self.n_features_in_))
        label, covariance = codes.argmax(1), self.covariances_.astype(np.float64)
        if self.covariance == "full":
            noise = (np.linalg.cholesky(covariance)[label] @ normal[:, :, None])[:, :, 0]
        else:
            noise = normal * np.sqrt(covariance.reshape(len(covariance), -1))[label]
        return np.asarray(self._decode(codes) + noise)


@final
class MoP(Mixture):
    """Mixture of Poisson distributions: component h with probability ``pi_h``, then ``y_d ~ Poisson(W_dh)``.

    Parameters
    ----------
    n_components : int, default 10
        Components ``H``.
    n_init : int, default 4
        Short starts, of which the best goes on.
    renewals : int, default 30
        How often, at most, a component that is hardly missed is begun anew.
    max_iter : int, default 200
        Steps of EM on all points at most.
    tol : float, default 1e-6
        Stop when the log-likelihood a point changes by less, relative to it, three times in a row.
    device : str, default "auto"
        "cpu", "cuda" or "cuda:n"; "auto" takes a GPU if there is one.
    random_state : int, Generator, RandomState or None
        Seed of the start.
    progress : bool, default True
        Show a progress bar once the fit has taken a second.

    Attributes
    ----------
        See `Mixture`; there is no ``noise_std_``.

    References
    ----------
    Keck, Savin, Lücke (2012), "Feedforward Inhibition and Synaptic Scaling", PLoS Computational Biology 8(3).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> Y = rng.poisson(np.where(rng.integers(0, 2, (300, 1)), [9, 1], [1, 9]))
    >>> model = MoP(n_components=2, random_state=0, progress=False).fit(Y)
    >>> [round(float(x)) for x in sorted(model.components_[:, 0])], model.transform(Y).shape
    ([1, 9], (300, 2))
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        n_init: int = 4,
        renewals: int = 30,
        max_iter: int = 200,
        tol: float = 1e-6,
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.n_init = n_init
        self.renewals = renewals
        self.max_iter = max_iter
        self.tol = tol
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _model(self) -> PoissonMixture:
        return PoissonMixture()

    def _first(self, means: Tensor, summary: Summary) -> PoissonParameters:
        H = means.shape[1]
        tiny = torch.finfo(means.dtype).tiny ** 0.5
        return PoissonParameters(means.clamp(min=tiny), means.new_full((H,), 1 / H).log())

    def _noise(self, params: PoissonParameters) -> None:
        return None

    def _observe(self, codes: FloatArray, rng: np.random.Generator) -> FloatArray:
        return rng.poisson(self._decode(codes)).astype(np.float64)

    def _check_values(self, array: npt.NDArray[Any]) -> None:
        for start in range(0, len(array), 2**16):
            part = array[start : start + 2**16]
            bad = (part < 0) | (part != np.floor(part)) & ~np.isnan(part)
            if bad.any():
                row, column = (int(x[0]) for x in bad.nonzero())
                raise ValueError(
                    f"Y: expected counts (NaN where missing), got {part[row, column]} in row {start + row}, "
                    f"column {column}"
                )
