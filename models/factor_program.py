"""Bayesian CP and Tucker as Pyro programs: the density as it stands, and the closed bound of independent normals.

Density, for K modes with labels ``i`` and columns ``r``; ``z``, ``c`` and the core ``G`` are standard normal:

    u_k,i,r = sqrt(C_k,r) c_k,r + sqrt(V_k,r) z_k,i,r
    f       = offset + Σ_r w_r Π_k u_k,i_k,r + Σ_k b_k,i_k            (CP; the effects b are one column more a mode)
    f       = offset + G ×_1 [1, u_1,i_1] … ×_K [1, u_K,i_K]          (Tucker; the ones are there with main effects)
    y       ~ p(y | f)

What all labels of a mode share, ``c``, lets a component do without that mode. Relevance "gamma": ``w = 1``, and
``V + C`` has an inverse gamma prior. Relevance "horseshoe": ``V = 1`` but for effects, and ``w_r ~ C+(0, τ)``,
half-Cauchy.

`program` samples ``z``, ``c``, ``G`` and ``log w`` given ``V``, ``C`` and the likelihood's parameters, for any guide or
Markov chain. `mean_field_pair` is the same density under independent normals: then the moments of each ``f`` are exact
(`probtensor.models.bayesian_moments`), expectations of the likelihood are closed forms or sums over nodes, and the
bound has no noise but that of the choice of rows. It learns ``V``, ``C`` and the likelihood's parameters by the way.

References
----------
Zhao, Zhang, Cichocki (2015), "Bayesian CP Factorization of Incomplete Tensors with Automatic Rank Determination", IEEE
TPAMI 37. Carvalho, Polson, Scott (2010), "The horseshoe estimator for sparse signals", Biometrika 97. Papaspiliopoulos,
Roberts, Sköld (2007), "A General Framework for the Parametrization of Hierarchical Models", Statistical Science 22, for
the non-centred form.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor

from probtensor.cells import single_rows
from probtensor.inference.variational import PLATE
from probtensor.likelihoods import Likelihood
from probtensor.models.bayesian_moments import cp_moments, tucker_moments, tucker_values
from probtensor.predictive_base import normal_nodes

__all__ = ["FactorModel", "Parameters"]

Parameters = Mapping[str, Tensor]
Program = Callable[..., None]


@dataclass(frozen=True, eq=False)
class FactorModel:
    """The density of the module's docstring. Pure functions of parameters; holds no data.

    Attributes
    ----------
    sizes : tuple of int
        Labels of each mode.
    ranks : tuple of int
        Columns of each mode's factor, effects and ones not counted.
    form : {"cp", "tucker"}
    main_effects : bool
    likelihood : Likelihood
    offset : float
    relevance : {"gamma", "horseshoe"}
    relevance_prior : tuple of float
        Shape and rate, for "gamma".
    global_scale : float
        ``τ``, for "horseshoe".
    learn : bool
        Whether ``V`` and ``C`` are learned.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    form: Literal["cp", "tucker"]
    main_effects: bool
    likelihood: Likelihood
    offset: float = 0.0
    relevance: Literal["gamma", "horseshoe"] = "gamma"
    relevance_prior: tuple[float, float] = (1.0, 1e-3)
    global_scale: float = 0.1
    learn: bool = True

    def columns(self, mode: int) -> int:
        """Columns of a mode's factor with its effect."""
        return self.ranks[mode] + int(self.main_effects and self.form == "cp")

    @property
    def core_shape(self) -> tuple[int, ...]:
        """Of Tucker's core, ones included."""
        return tuple(rank + self.main_effects for rank in self.ranks)

    def hyper(self, parameters: Parameters, mode: int) -> Tensor:
        """``log V`` and ``log C`` of a mode, (2, columns)."""
        given = parameters[f"hyper.{mode}"]
        if self.relevance == "gamma":
            return given
        fixed = torch.zeros_like(given, dtype=torch.bool)
        fixed[0, : self.ranks[mode]] = True
        return torch.where(fixed, 0.0, given)

    def program(self, parameters: Parameters) -> Program:
        """The density as a Pyro model of ``(positions, values, count, precision)``, (n, K) and (n,) each.

        Parameters
        ----------
        parameters : mapping of str to Tensor
            "hyper.k", (2, columns), for each mode, and "log_parameters", (P,), of the likelihood; what else is there
            is not looked at.
        """
        pyro, dist = import_module("pyro"), import_module("pyro.distributions")
        like = parameters["hyper.0"]

        def normal(name: str, *shape: int) -> Tensor:
            zero = like.new_zeros(shape)
            found: Tensor = pyro.sample(name, dist.Normal(zero, 1.0).to_event(len(shape)))
            return found

        def model(positions: Tensor, values: Tensor, count: Tensor, precision: Tensor) -> None:
            drawn = {}
            for k, size in enumerate(self.sizes):
                drawn[f"factor.{k}"] = normal(f"factor_{k}", size, self.columns(k))
                drawn[f"common.{k}"] = normal(f"common_{k}", self.columns(k))
            if self.form == "tucker":
                drawn["core"] = normal("core", *self.core_shape)
            if self.relevance == "horseshoe":
                scale = like.new_full((self.ranks[0],), self.global_scale)
                prior = dist.TransformedDistribution(dist.HalfCauchy(scale), [dist.transforms.ExpTransform().inv])
                drawn["weight"] = pyro.sample("log_weight", prior.to_event(1)).exp()
            with pyro.plate(PLATE, len(values)):
                f = self.values(parameters, drawn, positions)
                entries = single_rows(values, count, precision)
                rows = self.likelihood.expected_log_prob(parameters["log_parameters"], entries, f, torch.zeros_like(f))
                pyro.factor("values", rows)

        return model

    def values(self, parameters: Parameters, drawn: Parameters, positions: Tensor) -> Tensor:
        """``f`` (n,) of draws: "factor.k" (I_k, columns), "common.k" (columns,), "core", "weight".

        A row more of "factor.k" is that of a label which is not known, position -1; zeros where there is none.
        """
        rows = []
        for k, labels in enumerate(positions.T):
            log_v, log_c = self.hyper(parameters, k)
            z = drawn[f"factor.{k}"]
            if len(z) == self.sizes[k]:
                z = torch.cat([z, torch.zeros_like(z[:1])])
            u = (0.5 * log_c).exp() * drawn[f"common.{k}"] + (0.5 * log_v).exp() * z
            rows.append(u.index_select(0, labels.remainder(len(z))))
        if self.form == "tucker":
            ones = [torch.cat([torch.ones_like(u[:, :1]), u], dim=1) if self.main_effects else u for u in rows]
            return self.offset + tucker_values(ones, drawn["core"])
        R = self.ranks[0]
        product = rows[0][:, :R]
        for u in rows[1:]:
            product = product * u[:, :R]
        f: Tensor = self.offset + (product * drawn["weight"] if "weight" in drawn else product).sum(1)
        for u in rows if self.main_effects else ():
            f = f + u[:, R]
        return f

    def mean_field_pair(self, start: Parameters) -> tuple[Program, Program]:
        """A model and a guide whose bound is that of independent normals, with moments in closed form.

        Parameters
        ----------
        start : mapping of str to Tensor
            As `probtensor.models.factor_guides.start_parameters` gives it. With `learn` False, "hyper.k" stay.
        """
        pyro = import_module("pyro")

        def parameters() -> dict[str, Tensor]:
            fixed = () if self.learn else tuple(name for name in start if name.startswith("hyper"))
            return {n: x if n in fixed else pyro.param(n, lambda x=x: x.clone()) for n, x in start.items()}

        def model(positions: Tensor, values: Tensor, count: Tensor, precision: Tensor) -> None:
            given = parameters()
            pyro.factor("divergence", -self.divergence(given))
            with pyro.plate(PLATE, len(values)):
                mean, variance = self.moments(given, positions)
                bounds = self.likelihood.bounds(values)
                log_parameters = torch.clamp(given["log_parameters"], *bounds)
                entries = single_rows(values, count, precision)
                pyro.factor("values", self.likelihood.expected_log_prob(log_parameters, entries, mean, variance))

        def guide(positions: Tensor, values: Tensor, count: Tensor, precision: Tensor) -> None:
            parameters()

        return model, guide

    def tables(self, parameters: Parameters, mode: int) -> tuple[Tensor, Tensor]:
        """Means and variances (I_k + 1, columns) of the rows of a factor; the last is of a label that is not known."""
        log_v, log_c = self.hyper(parameters, mode)
        mean, log_std = (parameters[f"factor.{mode}.{part}"] for part in ("mean", "log_std"))
        mean = torch.cat([mean, torch.zeros_like(mean[:1])])
        log_std = torch.cat([log_std, torch.zeros_like(mean[:1])])
        common, common_log_std = (parameters[f"common.{mode}.{part}"] for part in ("mean", "log_std"))
        means = (0.5 * log_c).exp() * common + (0.5 * log_v).exp() * mean
        return means, (log_c + 2 * common_log_std).exp() + (log_v + 2 * log_std).exp()

    def moments(self, parameters: Parameters, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (n,) of ``f`` at positions (n, K), -1 for a label that is not known."""
        means, variances = [], []
        for k, labels in enumerate(positions.T):
            mean, variance = self.tables(parameters, k)
            labels = labels.remainder(len(mean))
            means.append(mean.index_select(0, labels))
            variances.append(variance.index_select(0, labels))
        if self.form == "tucker":
            if self.main_effects:
                one = torch.ones_like(means[0][:, :1])
                means = [torch.cat([one, mean], dim=1) for mean in means]
                variances = [torch.cat([0 * one, variance], dim=1) for variance in variances]
            core = parameters["core.mean"], (2 * parameters["core.log_std"]).exp()
            mean, variance = tucker_moments(means, variances, *core)
            return self.offset + mean, variance
        R = self.ranks[0]
        inner = [m[:, :R] for m in means], [v[:, :R] for v in variances]
        mean, variance = cp_moments(*inner, *self.weights(parameters))
        if self.main_effects:
            mean = mean + sum(m[:, R] for m in means)
            variance = variance + sum(v[:, R] for v in variances)
        return self.offset + mean, variance.clamp(min=0)

    def weights(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Mean and variance (R,) of the components' weights."""
        if self.relevance == "gamma":
            one = parameters["hyper.0"].new_ones(self.ranks[0])
            return one, torch.zeros_like(one)
        mean, variance = parameters["weight.mean"], (2 * parameters["weight.log_std"]).exp()
        return (mean + variance / 2).exp(), (2 * mean + variance).exp() * torch.expm1(variance)

    def divergence(self, parameters: Parameters) -> Tensor:
        """Divergence of the independent normals from the prior, less the log densities of ``V`` and ``C``; a scalar."""
        total = parameters["hyper.0"].new_zeros(())
        for name, mean in parameters.items():
            if name.endswith(".mean") and name != "weight.mean":
                log_std = parameters[name.removesuffix("mean") + "log_std"]
                total = total + 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum()
        shape, rate = self.relevance_prior
        for k in range(len(self.sizes)):
            variance = self.hyper(parameters, k).exp().sum(0)
            total = total + (shape * variance.log() + rate / variance).sum()
        if self.relevance == "horseshoe":
            mean, log_std = parameters["weight.mean"], parameters["weight.log_std"]
            entropy = (0.5 * math.log(2 * math.pi * math.e) + log_std).sum()
            nodes, shares = (mean.new_tensor(x)[:, None] for x in normal_nodes())
            log_w = mean + log_std.exp() * nodes
            excess = 2 * (log_w - math.log(self.global_scale))
            density = math.log(2 / (math.pi * self.global_scale)) + log_w - torch.logaddexp(excess, 0 * excess)
            total = total - entropy - (shares * density).sum()
        return total
