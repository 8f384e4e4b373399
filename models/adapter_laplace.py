"""Bayesian adapters after training: a Laplace posterior of the cores, and predictions that say how sure they are.

A trained adapter is left as it is. Its cores (few numbers) get a normal posterior around their trained values, from the
generalised Gauss–Newton curvature of the loss and a prior of mean zero, where the model is the base; the prior's
precision, and the variance of normal noise, are those of the largest evidence. Predictions are those of the model
made linear in the cores, whose outputs are normal, with variances ``J (H + δ)⁻¹ Jᵀ``. The algebra is in
`probtensor.inference.laplace`.

References
----------
Immer, Korzepa, Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization", AISTATS.
Daxberger et al. (2021), "Laplace redux: effortless Bayesian deep learning", NeurIPS 34. Yang et al. (2024), "Bayesian
low-rank adaptation for large language models", ICLR. Lu, Ie, Sha (2020), "Mean-field approximation to Gaussian-softmax
integral with application to uncertainty estimation", arXiv 2006.07584: the probit approximation for several classes,
MacKay's (1992, Neural Computation 4) for two. Wenzel et
al. (2020), "How good is the Bayes posterior in deep neural networks really?", ICML: temperatures.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from probtensor.inference.laplace import (
    Curvature,
    Hyperparameters,
    Spectrum,
    Summary,
    log_evidence,
    maximize_evidence,
    step_to_mode,
)
from probtensor.models.adapter_cores import Inputs, rows_with_derivatives, trained_cores
from probtensor.models.flora import Adapters
from probtensor.resources import is_integer, is_number

__all__ = ["AdapterLaplace", "Prediction", "fit_laplace"]


class Prediction(NamedTuple):
    """A predictive distribution.

    Attributes
    ----------
    mean : Tensor, shape (n, outputs)
        Of the value, or the probability of each class.
    std : Tensor, shape (n, outputs)
        Standard deviation of the value, noise included; for classes, that of the probability over the posterior.

    Examples
    --------
    >>> prediction = Prediction(torch.tensor([[0.2, 0.8]]), torch.tensor([[0.1, 0.1]]))
    >>> prediction.mean.argmax(1).tolist()
    [1]
    """

    mean: Tensor
    std: Tensor


class AdapterLaplace:
    """A posterior of an adapter's cores; made by `fit_laplace`.

    The model must keep the adapter, active and not merged; predictions are made in evaluation mode.

    Attributes
    ----------
    layers : tuple of str
        The parameters whose cores are uncertain.
    prior_precision, noise_variance : float
        The latter 1 for classes.
    log_marginal_likelihood : float
        Comparable between ranks, layers, and structures "full" of the same data.
    effective_parameters : float
        How many directions the data determine.
    temperature : float
        By which covariances of classes' outputs are multiplied: 0 keeps the trained outputs; see `tune_temperature`.

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> adapters = inject_adapters(torch.nn.Linear(3, 2), FLoRAConfig(r=1))
    >>> posterior = fit_laplace(adapters, [(x, x[:, :2])], likelihood="regression", mode="newton")
    >>> posterior.layers, posterior.predict(x).std.shape, posterior.noise_variance > 0
    (('weight',), torch.Size([40, 2]), True)
    """

    def __init__(
        self,
        adapters: Adapters,
        name: str,
        cores: dict[str, tuple[str, Tensor]],
        likelihood: str,
        jacobian: str,
        newton: bool,
    ) -> None:
        self._adapters, self._name, self._likelihood, self._newton = adapters, name, likelihood, newton
        self._cores = {key: value for key, value in cores.values()}
        self._jacobian = jacobian
        self.layers = tuple(cores)
        self.temperature = 1.0
        self._spectrum: Spectrum
        self._summary: Summary

    def _finish(self, spectrum: Spectrum, summary: Summary, found: Hyperparameters) -> None:
        self._spectrum, self._summary = spectrum, summary
        self.prior_precision, self.noise_variance = found
        precision, noise = (torch.tensor(value, dtype=torch.float64) for value in found)
        self.log_marginal_likelihood = float(log_evidence(summary, precision, noise, self._newton))
        curvature = summary.curvature / self.noise_variance
        self._precisions = curvature + self.prior_precision
        self.effective_parameters = float((curvature / self._precisions).sum())

    def covariance(self) -> Tensor:
        """Posterior covariance of all cores' entries, layer by layer, shape (P, P)."""
        shapes = [core.shape for core in self._cores.values()]
        eye = torch.eye(sum(map(math.prod, shapes)), dtype=torch.float64, device=self._precisions.device)
        parts = torch.split(eye, [math.prod(shape) for shape in shapes], 1)
        turned = self._spectrum.rotate([p.reshape(-1, *shape) for p, shape in zip(parts, shapes, strict=True)])
        return turned / self._precisions @ turned.mT

    def outputs(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Normal distribution of the model's outputs: no noise, temperature 1.

        Parameters
        ----------
        x : Tensor, or tuple of Tensors, shape (n, …)
            The model's inputs.

        Returns
        -------
        mean : Tensor, shape (n, outputs)
        covariance : Tensor, shape (n, outputs, outputs)
        """
        means, covariances = [], []
        for mean, jacobians in self._rows(x):
            turned = self._spectrum.rotate([each.flatten(0, 1) for each in jacobians]).reshape(*mean.shape, -1)
            if self._newton:
                mean = mean + turned @ step_to_mode(
                    self._summary, Hyperparameters(self.prior_precision, self.noise_variance)
                )
            means.append(mean)
            covariances.append(turned / self._precisions @ turned.mT)
        return torch.cat(means), torch.cat(covariances)

    def predict(self, x: Inputs, n_samples: int | None = None, *, random_state: int = 0) -> Prediction:
        """The predictive distribution.

        Parameters
        ----------
        x : Tensor, or tuple of Tensors, shape (n, …)
            The model's inputs.
        n_samples : int, optional
            For classes: probabilities are means over so many draws of the outputs, instead of the probit approximation.
        random_state : int, default 0
            Seed of the draws.

        Returns
        -------
        Prediction

        Raises
        ------
        ValueError
            If the adapter does not act, or `n_samples` is given for values or is below 1.
        """
        mean, covariance = self.outputs(x)
        variance = covariance.diagonal(dim1=1, dim2=2)
        if self._likelihood == "regression":
            if n_samples is not None:
                raise ValueError(f"n_samples: expected None, as values have a normal distribution, got {n_samples!r}")
            return Prediction(mean, (variance + self.noise_variance).sqrt())
        covariance = self.temperature * covariance
        if n_samples is None:
            probabilities = _probit(mean, covariance)
            slopes = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
            spread = (slopes @ covariance @ slopes).diagonal(dim1=1, dim2=2)
            return Prediction(probabilities, spread.clamp_min(0.0).sqrt())
        if not (is_integer(n_samples) and n_samples >= 1):
            raise ValueError(f"n_samples: expected an integer of at least 1, got {n_samples!r}")
        values, vectors = torch.linalg.eigh(covariance)  # may be singular: fewer directions than outputs
        root = vectors * values.clamp_min(0.0).sqrt()[:, None]
        generator = torch.Generator().manual_seed(random_state)
        noise = torch.randn(n_samples, *mean.shape, generator=generator, dtype=torch.float64).to(mean.device)
        draws = (mean + torch.einsum("nij,snj->sni", root, noise)).softmax(-1)
        return Prediction(draws.mean(0), draws.std(0, correction=0))

    def tune_temperature(self, batches: Iterable[tuple[Inputs, Tensor]]) -> float:
        """Choose the temperature under which rows that were not trained on are most probable (probit); classes only.

        Below 1, the posterior is narrower than the evidence has it: a network that fits its rows perfectly has little
        curvature left, and its posterior is too wide.

        Parameters
        ----------
        batches : iterable of (inputs, labels)

        Returns
        -------
        float
            Also kept as `temperature`.

        Raises
        ------
        ValueError
            For values, or without a batch.
        """
        if self._likelihood == "regression":
            raise ValueError("likelihood: expected 'classification' for a temperature, got 'regression'")
        parts = [(*self.outputs(x), labels) for x, labels in batches]
        if not parts:
            raise ValueError("batches: expected at least one, got none")
        mean, covariance, labels = (torch.cat(each) for each in zip(*parts, strict=True))

        def loss(log_temperature: float) -> float:
            T = math.exp(log_temperature)
            return float(F.nll_loss(_probit(mean, T * covariance).log(), labels.to(mean.device)))

        start = min(range(-12, 5), key=loss)  # several valleys are possible
        self.temperature = math.exp(minimize_scalar(loss, bounds=(start - 1.0, start + 1.0), method="bounded").x)
        return self.temperature

    def _rows(self, x: Inputs) -> Iterator[tuple[Tensor, list[Tensor]]]:
        return rows_with_derivatives(self._adapters, self._name, self._cores, x, self._jacobian)


def fit_laplace(
    adapters: Adapters,
    batches: Iterable[tuple[Inputs, Tensor]],
    *,
    name: str | None = None,
    likelihood: Literal["classification", "regression"] = "classification",
    structure: Literal["full", "kronecker", "diagonal"] = "full",
    prior_precision: float | Literal["marglik"] = "marglik",
    noise_variance: float | Literal["marglik"] = "marglik",
    subset: Literal["core", "all"] | Sequence[str] = "core",
    mode: Literal["trained", "newton"] = "trained",
    jacobian: Literal["vmap", "loop"] = "vmap",
) -> AdapterLaplace:
    """Laplace's approximation to the posterior of a trained adapter's cores.

    Parameters
    ----------
    adapters : Adapters
        With a model whose outputs are logits (n, classes), or values (n,) or (n, outputs).
    batches : iterable of (inputs, targets)
        All training rows, once: a DataLoader, or a list. Inputs: a tensor or a tuple of tensors. Targets: numbers of
        classes (n,), or values in the shape of the outputs.
    name : str, optional
        Of the adapter; default: the active one.
    likelihood : {"classification", "regression"}
        Softmax, or normal noise of one variance.
    structure : {"full", "kronecker", "diagonal"}, default "full"
        Of the curvature; "full" is exact, for up to 20,000 parameters.
    prior_precision, noise_variance : float or "marglik"
        "marglik": that of the largest evidence. The noise is of regression only.
    subset : "core", "all" or sequence of str, default "core"
        Cores of updates of low rank, dense updates too (heads in ``modules_to_save``, biases), or parameters' names.
    mode : {"trained", "newton"}, default "trained"
        Whether predictions keep the trained outputs, or move to the mode of the linearised model, which is exact for
        models that are linear in the cores, and helps where training stopped early or used another prior.
    jacobian : {"vmap", "loop"}, default "vmap"
        "loop" takes rows and outputs one by one, for layers that `torch.func.vmap` cannot take (recurrent ones, PReLU).

    Returns
    -------
    AdapterLaplace

    Raises
    ------
    ValueError
        If an argument is out of range, the adapter does not act, targets do not fit the outputs, or there are no rows.

    Notes
    -----
    The theory wants cores at the mode of their prior. Where training had none and ended at a perfect fit, variances
    come out far too wide: then `fit_by_evidence`, or, with rows to spare, `AdapterLaplace.tune_temperature`.

    References
    ----------
    Immer, Korzepa, Bauer (2021), AISTATS. Daxberger et al. (2021), NeurIPS 34. Antorán et al. (2022), ICML: "newton".

    Examples
    --------
    >>> from probtensor.models import FLoRAConfig, inject_adapters
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(50, 3, generator=generator)
    >>> labels = (x[:, 0] > 0).long()
    >>> adapters = inject_adapters(torch.nn.Linear(3, 2), FLoRAConfig(r=1))
    >>> posterior = fit_laplace(adapters, [(x, labels)], prior_precision=1.0)
    >>> probabilities, std = posterior.predict(x)
    >>> probabilities.shape, bool((std > 0).all())
    (torch.Size([50, 2]), True)
    """
    for argument, given, choices in (
        ("likelihood", likelihood, ("classification", "regression")),
        ("mode", mode, ("trained", "newton")),
        ("jacobian", jacobian, ("vmap", "loop")),
    ):
        if given not in choices:
            raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {given!r}")
    wanted = []
    for argument, number in (("prior_precision", prior_precision), ("noise_variance", noise_variance)):
        if number != "marglik" and not (is_number(number) and 0 < number < math.inf):
            raise ValueError(f"{argument}: expected 'marglik' or a positive number, got {number!r}")
        wanted.append(None if number == "marglik" else float(number))
    name = adapters._one(name)
    cores = trained_cores(adapters, name, subset)
    laplace = AdapterLaplace(adapters, name, cores, likelihood, jacobian, mode == "newton")
    regression = likelihood == "regression"
    curvature = Curvature(structure, [tuple(core.shape) for _, core in cores.values()])
    fit, count, slope = 0.0, 0, [torch.zeros_like(core, dtype=torch.float64) for _, core in cores.values()]
    for x, targets in batches:
        start = 0
        for outputs, jacobians in laplace._rows(x):
            value, residual, root = (_normal if regression else _softmax)(
                outputs, targets[start : start + len(outputs)]
            )
            fit, count, start = fit + value, count + outputs.numel(), start + len(outputs)
            slope = [s + torch.einsum("nc,nc...->...", residual, J) for s, J in zip(slope, jacobians, strict=True)]
            if root is not None:
                jacobians = [torch.einsum("nck,nc...->nk...", root, J) for J in jacobians]
            curvature.add([J.flatten(0, 1) for J in jacobians])
        if start != len(targets):
            raise ValueError(f"batches: expected a target for each of {start} rows, got {len(targets)}")
    if count == 0:
        raise ValueError("batches: expected at least one row, got none")
    spectrum = curvature.spectrum()
    theta = [core.to(torch.float64)[None] for _, core in cores.values()]
    turned = [spectrum.rotate(each)[0] for each in ([s[None] for s in slope], theta)]
    summary = Summary(spectrum.values, turned[0], turned[1], fit, count if regression else None)
    laplace._finish(spectrum, summary, maximize_evidence(summary, wanted[0], wanted[1], mode == "newton"))
    return laplace


def _softmax(outputs: Tensor, labels: Tensor) -> tuple[float, Tensor, Tensor | None]:
    """Log likelihood, its derivatives by the outputs, and a root of its curvature."""
    if labels.ndim != 1 or labels.is_floating_point() or outputs.shape[1] < 2:
        raise ValueError(
            f"batches: expected numbers of classes (n,) for logits (n, classes), got {labels.dtype} "
            f"{tuple(labels.shape)} for {tuple(outputs.shape)}"
        )
    labels = labels.to(outputs.device)
    log_p = outputs.log_softmax(1)
    p = log_p.exp()
    value = float(log_p.gather(1, labels[:, None]).sum())
    residual = F.one_hot(labels, outputs.shape[1]) - p
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]  # times its transpose: diag(p) − ppᵀ
    return value, residual, root


def _normal(outputs: Tensor, values: Tensor) -> tuple[float, Tensor, Tensor | None]:
    """Sum of squared residuals, and the residuals."""
    if len(values) != len(outputs) or values.numel() != outputs.numel():
        raise ValueError(f"batches: expected values like outputs {tuple(outputs.shape)}, got {tuple(values.shape)}")
    residual = values.reshape(outputs.shape).to(outputs) - outputs
    return float(residual.square().sum()), residual, None


def _probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean softmax of normal outputs, by the variances of their differences: what all share counts for nothing."""
    variance = covariance.diagonal(dim1=1, dim2=2)
    spread = (variance[:, :, None] + variance[:, None] - 2 * covariance).clamp_min(0.0)
    scaled = (mean[:, None] - mean[:, :, None]) / (1 + math.pi / 8 * spread).sqrt()
    return (-scaled.logsumexp(-1)).softmax(1)
