"""Bayesian CP and Tucker decompositions of sparse tensors whose modes have labels."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from probtensor.axes import Axis
from probtensor.data import Duplicates
from probtensor.likelihoods import Likelihood
from probtensor.models.bayesian_regressor import FactorRegressor
from probtensor.resources import RandomState

__all__ = ["BayesianCP", "BayesianTucker"]


class BayesianCP(FactorRegressor):
    """Bayesian CP decomposition of sparse entries: products of factors with automatic relevance, and main effects.

    An entry is ``f = Σ_r Π_k u_k,i_k,r + Σ_k b_k,i_k``; observed values scatter around it by a likelihood. The rows of
    a factor scatter around a mean that the labels of the mode share, so that a component may do without a mode, and a
    label that was never seen has that mean and a wide interval. The density is written out in
    `probtensor.models.factor_program`, which also gives it to Pyro, for guides and chains of one's own.

    Parameters
    ----------
    rank : int, default 20
        Components at most; see `effective_rank_`.
    axes : sequence of Axis, optional
        What the modes mean. Default: by column. Whatever the axis, each distinct value is a label of its own, floats
        and dates too: for smooth functions of them see `FunBaT`.
    prior : {"normal", "gamma"}, default "normal"
        Of factors. "gamma": they are not negative, and neither is ``f``, whose unit is that of y; see Notes.
    likelihood : str or Likelihood, default "gaussian"
        How values scatter: "gaussian", "student-t" (4 degrees of freedom), "bernoulli" (logit link), "poisson",
        "negative-binomial" (log link), or "ordinal": the distinct values of y are levels, with cut points between them.
        With `prior="gamma"`: "gaussian", "student-t", or "poisson" with the rate ``f`` itself.
    relevance : {"gamma", "horseshoe"}, default "gamma"
        What makes components vanish that explain nothing: a gamma prior on one over the variance of each column, or
        weights of components with a horseshoe prior (not with `guide="rows"` or `prior="gamma"`).
    relevance_prior : tuple of float, default (1.0, 0.001)
        Shape and rate of that gamma prior, for values standardised to one.
    main_effects : bool, default True
        Give each mode an effect of its own beside the products. Not used with `prior="gamma"`: there a component that
        is constant in all modes but one takes its place.
    guide : {"auto", "rows", "mean_field", "low_rank", "full"}, default "auto"
        The family that the posterior is taken from. "rows": each row of a factor has a normal distribution with a full
        covariance, by closed-form updates (natural gradients where the likelihood is not conjugate). "mean_field":
        independent normals, by the gradient of a bound in closed form. "low_rank", "full": normals over all numbers, by
        Pyro's guides, given variances and noise; "full" for small tensors. The last three start from "rows". "auto":
        "rows", or "mean_field" with the horseshoe. With `prior="gamma"` it must be "auto".
    calibration : float or "auto", default "auto"
        Share of the rows held out at first, to shape intervals by what predictions miss them by; then the fit goes on
        with all rows. "auto": a tenth where that is 200 rows or more, else 0. Gaussian and Student-t likelihoods only.
    max_iter : int, default 200
        Sweeps of "rows", or of `prior="gamma"`, at most.
    tol : float, default 1e-3
        Sweeps stop when the bound changes over two of them by less than this share of itself, or of the number of rows
        if that is more; with `prior="gamma"` and counts, by less than a tenth of that.
    n_init : int, default 1
        Starts of the sweeps; each gets ten, then the one with the highest bound goes on.
    n_members : int, default 1
        Fits from as many starts, each to the end; predictions are those of their mixture in equal parts, with intervals
        calibrated on it. Costs as many fits, and lowers errors where starts end in optima that differ. Factors, main
        effects, `bound_` and `relevance_` are those of the member with the highest bound. With `guide="rows"` and
        `prior="normal"` only.
    learn_hyperparameters : bool, default True
        Whether the columns' variances are learned; else they are one, and 0.01 for what labels share.
    n_steps, learning_rate, batch_size : int, float, int or None; default 1000, 0.01, None
        Of the other guides: see `probtensor.inference.variational.fit_svi`.
    duplicates : {"observations", "error", "sum", "mean"}, default "observations"
        What rows with equal coordinates are.
    unlisted : {"missing", "zero"}, default "missing"
        What cells without a row are; "zero", at no more cost, with `prior="gamma"` and `likelihood="poisson"` only.
    device : str, default "auto"
        "cpu", "cuda", or a GPU where there is one.
    random_state : int, Generator, RandomState or None, default None
        Seed of the start, the rows held out and the draws. No global generator is read or moved.
    progress : bool, default True
        Show a progress bar on long fits.

    Attributes
    ----------
    bound_, bound_history_ : float, list of float
        Evidence lower bound of the values in their own unit; the last, and after each sweep or step.
    n_iter_, converged_ : int, bool
    noise_std_ : float
        Standard deviation (Student-t: scale) of a row's noise, in the unit of y; Gaussian and Student-t only.
    rank_ : tuple of int
        Columns of each mode's factor, after components that explain nothing were dropped.
    relevance_ : ndarray, shape (R,)
        Root mean square of each component over the observed entries, in the unit of y (of the log odds or the logarithm
        for other values), strongest first.
    effective_rank_ : int
        Components of which `relevance_` is more than 2 % of the standard deviation of y; with a normal prior and values
        without a unit, than 0.02.
    axes_, y_mean_, y_scale_, n_features_in_, feature_names_in_
        See `TensorRegressor`.

    Notes
    -----
    With `prior="gamma"` all numbers are independent in the posterior, each at its optimum in turn, in closed form; the
    bound never falls (but for "student-t" where its tails grow heavy, after 16 sweeps). Counts: Poisson factorization,
    with gamma posteriors; the components' weights have a prior of shape ``1 / rank``, and columns a variance that is
    learned: `probtensor.models.nonnegative_counts`. Real values: an exponential prior, gamma of shape one, whose
    posterior is normal and cut off at zero, and a mean for each column that is learned; their mean must be above zero:
    `probtensor.models.nonnegative_values`. From one start two components may end up saying the same: give
    `n_init=4`. Standard deviations of factors are too small, about half of the true ones in small tensors.

    References
    ----------
    Zhao, Zhang, Cichocki (2015), "Bayesian CP Factorization of Incomplete Tensors with Automatic Rank Determination",
    IEEE TPAMI 37, for the posterior by rows and the relevance. Khan, Lin (2017), "Conjugate-Computation Variational
    Inference", AISTATS, for other likelihoods. Carvalho, Polson, Scott (2010), "The horseshoe estimator for sparse
    signals", Biometrika 97. Schein, Paisley, Blei, Wallach (2015), "Bayesian Poisson Tensor Factorization for Inferring
    Multilateral Relations from Sparse Dyadic Event Counts", KDD. Brouwer, Frellsen, Lió (2017), "Comparative Study of
    Inference Methods for Bayesian Nonnegative Matrix Factorisation", ECML, for real values with non-negative factors.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = np.stack([rng.integers(0, size, size=600) for size in (12, 10, 8)], axis=1)
    >>> u, v, w = (rng.normal(size=size) for size in (12, 10, 8))
    >>> y = u[X[:, 0]] * v[X[:, 1]] * w[X[:, 2]] + 0.1 * rng.normal(size=600)
    >>> model = BayesianCP(rank=4, random_state=0).fit(X[:500], y[:500])
    >>> model.effective_rank_, bool(np.sqrt(np.mean((model.predict(X[500:]) - y[500:]) ** 2)) < 0.15)
    (1, True)

    Counts as a sum of non-negative parts:

    >>> counts = rng.poisson(3 * np.abs(u[X[:, 0]] * v[X[:, 1]] * w[X[:, 2]]))
    >>> parts = BayesianCP(rank=4, prior="gamma", likelihood="poisson", random_state=0).fit(X, counts)
    >>> parts.effective_rank_, bool(parts.factor("mode_0")[0].min() >= 0)
    (1, True)
    """

    form: ClassVar[Literal["cp", "tucker"]] = "cp"

    def __init__(
        self,
        rank: int | Sequence[int] = 20,
        axes: Sequence[Axis] | None = None,
        *,
        prior: Literal["normal", "gamma"] = "normal",
        likelihood: str | Likelihood = "gaussian",
        relevance: Literal["gamma", "horseshoe"] = "gamma",
        relevance_prior: tuple[float, float] = (1.0, 0.001),
        main_effects: bool = True,
        guide: Literal["auto", "rows", "mean_field", "low_rank", "full"] = "auto",
        calibration: float | Literal["auto"] = "auto",
        max_iter: int = 200,
        tol: float = 1e-3,
        n_init: int = 1,
        n_members: int = 1,
        learn_hyperparameters: bool = True,
        n_steps: int = 1000,
        learning_rate: float = 0.01,
        batch_size: int | None = None,
        duplicates: Duplicates = "observations",
        unlisted: Literal["missing", "zero"] = "missing",
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.rank = rank
        self.axes = axes
        self.prior = prior
        self.likelihood = likelihood
        self.relevance = relevance
        self.relevance_prior = relevance_prior
        self.main_effects = main_effects
        self.guide = guide
        self.calibration = calibration
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.n_members = n_members
        self.learn_hyperparameters = learn_hyperparameters
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.duplicates = duplicates
        self.unlisted = unlisted
        self.device = device
        self.random_state = random_state
        self.progress = progress


class BayesianTucker(FactorRegressor):
    """Bayesian Tucker decomposition of sparse entries: every column of a mode's factor with every one of the others.

    An entry is ``f = G ×_1 [1, u_1,i_1] … ×_K [1, u_K,i_K]``: the ones make room in the core ``G`` for a constant, main
    effects and interactions of fewer modes. Priors, posterior and likelihoods are those of `BayesianCP`; the core is
    standard normal, and columns that explain nothing shrink with their variance. Sweeps start from the components of a
    CP fit, of which each mode keeps the strongest directions. Factors have either sign.

    Parameters
    ----------
    rank : int or sequence of int, default 3
        Columns of all modes' factors, or of each mode's. More of them often predict better; cost grows with the square
        of the ranks' product.
    axes : sequence of Axis, optional
        What the modes mean. Default: by column. Whatever the axis, each distinct value is a label of its own, floats
        and dates too: for smooth functions of them see `FunBaT`.
    likelihood : str or Likelihood, default "gaussian"
        How values scatter: "gaussian", "student-t" (4 degrees of freedom), "bernoulli" (logit link), "poisson",
        "negative-binomial" (log link), or "ordinal": the distinct values of y are levels, with cut points between them.
    relevance : {"gamma", "horseshoe"}, default "gamma"
        What makes components vanish that explain nothing: a gamma prior on one over the variance of each column, or
        weights of components with a horseshoe prior (CP only).
    relevance_prior : tuple of float, default (1.0, 0.001)
        Shape and rate of that gamma prior, for values standardised to one.
    main_effects : bool, default True
        Add a column of ones to each factor.
    guide : {"auto", "rows", "mean_field", "low_rank", "full"}, default "auto"
        The family that the posterior is taken from. "rows": each row of a factor has a normal distribution with a full
        covariance, by closed-form updates (natural gradients where the likelihood is not conjugate). "mean_field":
        independent normals, by the gradient of a bound in closed form. "low_rank", "full": normals over all numbers, by
        Pyro's guides, given variances and noise; "full" for small tensors. The last three start from "rows". "auto":
        "rows".
    calibration : float or "auto", default "auto"
        Share of the rows held out at first, to shape intervals by what predictions miss them by; then the fit goes on
        with all rows. "auto": a tenth where that is 200 rows or more, else 0. Gaussian and Student-t likelihoods only.
    max_iter : int, default 200
        Sweeps of "rows" at most.
    tol : float, default 1e-3
        Sweeps stop when the bound changes over two of them by less than this share of itself, or of the number of rows
        if that is more.
    n_init : int, default 1
        Starts of the CP fit; each gets ten sweeps, then the one with the highest bound goes on.
    n_members : int, default 1
        Fits from as many starts, each to the end; predictions are those of their mixture in equal parts, with intervals
        calibrated on it. Costs as many fits, and lowers errors where starts end in optima that differ. Factors, the
        core and `bound_` are those of the member with the highest bound. With `guide="rows"` only.
    learn_hyperparameters : bool, default True
        Whether the columns' variances are learned; else they are one, and 0.01 for what labels share.
    n_steps, learning_rate, batch_size : int, float, int or None; default 1000, 0.01, None
        Of the other guides: see `probtensor.inference.variational.fit_svi`.
    duplicates : {"observations", "error", "sum", "mean"}, default "observations"
        What rows with equal coordinates are.
    device : str, default "auto"
        "cpu", "cuda", or a GPU where there is one.
    random_state : int, Generator, RandomState or None, default None
        Seed of the start, the rows held out and the draws. No global generator is read or moved.
    progress : bool, default True
        Show a progress bar on long fits.

    Attributes
    ----------
    bound_, bound_history_ : float, list of float
        Evidence lower bound of the values in their own unit; the last, and after each sweep or step.
    n_iter_, converged_ : int, bool
    noise_std_ : float
        Standard deviation (Student-t: scale) of a row's noise, in the unit of y; Gaussian and Student-t only.
    rank_ : tuple of int
        Columns of each mode's factor, after components that explain nothing were dropped.
    core_ : ndarray
        Mean of the core, in standardised units; with main effects index 0 of a mode is the column of ones.
    axes_, y_mean_, y_scale_, n_features_in_, feature_names_in_
        See `TensorRegressor`.

    References
    ----------
    Tucker (1966), "Some mathematical notes on three-mode factor analysis", Psychometrika 31. Chu, Ghahramani (2009),
    "Probabilistic Models for Incomplete Multi-dimensional Arrays", AISTATS.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = np.stack([rng.integers(0, size, size=600) for size in (12, 10, 8)], axis=1)
    >>> u, v, w = (rng.normal(size=size) for size in (12, 10, 8))
    >>> y = u[X[:, 0]] * v[X[:, 1]] * w[X[:, 2]] + 0.1 * rng.normal(size=600)
    >>> model = BayesianTucker(rank=2, random_state=0).fit(X[:500], y[:500])
    >>> model.core_.shape, bool(np.sqrt(np.mean((model.predict(X[500:]) - y[500:]) ** 2)) < 0.2)
    ((3, 3, 3), True)
    """

    form: ClassVar[Literal["cp", "tucker"]] = "tucker"

    def __init__(
        self,
        rank: int | Sequence[int] = 3,
        axes: Sequence[Axis] | None = None,
        *,
        likelihood: str | Likelihood = "gaussian",
        relevance: Literal["gamma", "horseshoe"] = "gamma",
        relevance_prior: tuple[float, float] = (1.0, 0.001),
        main_effects: bool = True,
        guide: Literal["auto", "rows", "mean_field", "low_rank", "full"] = "auto",
        calibration: float | Literal["auto"] = "auto",
        max_iter: int = 200,
        tol: float = 1e-3,
        n_init: int = 1,
        n_members: int = 1,
        learn_hyperparameters: bool = True,
        n_steps: int = 1000,
        learning_rate: float = 0.01,
        batch_size: int | None = None,
        duplicates: Duplicates = "observations",
        device: str = "auto",
        random_state: RandomState = None,
        progress: bool = True,
    ) -> None:
        self.rank = rank
        self.axes = axes
        self.likelihood = likelihood
        self.relevance = relevance
        self.relevance_prior = relevance_prior
        self.main_effects = main_effects
        self.guide = guide
        self.calibration = calibration
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.n_members = n_members
        self.learn_hyperparameters = learn_hyperparameters
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.duplicates = duplicates
        self.device = device
        self.random_state = random_state
        self.progress = progress
