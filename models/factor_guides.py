"""Posteriors of `FactorModel` by stochastic variational inference: independent normals, or guides of Pyro.

All start from what message passing found: from nothing, independent normals lose components that they would keep.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from probtensor.blocks import add_up
from probtensor.checkpoints import Checkpoints
from probtensor.comm import Comm
from probtensor.gaussian import standard_normal
from probtensor.inference.variational import VariationalFit, fit_svi, load_pyro, seeded
from probtensor.intake import Table
from probtensor.likelihoods import Likelihood
from probtensor.models.factor_posterior import FactorPosterior, RowPosterior
from probtensor.models.factor_program import FactorModel, Parameters

__all__ = [
    "DrawnFactors",
    "Guide",
    "MeanField",
    "drawn_factors",
    "factor_model",
    "factor_model_from",
    "fit_guide",
    "read_factors",
    "relevance_of",
    "start_parameters",
]

Guide = Literal["mean_field", "low_rank", "full"]
MAX_FULL = 2_000  # latent numbers of a guide with a full covariance
DRAWS = 400  # of a guide, kept for predictions
CHUNK = 2**22  # numbers in the largest temporary of moments
SURE = 0.05  # standard deviation of what a guide starts at


def factor_model(posterior: RowPosterior, relevance: Literal["gamma", "horseshoe"]) -> FactorModel:
    """The density whose posterior by message passing this is, or the same with a horseshoe."""
    given = posterior.model
    assert given.likelihood is not None
    K = len(given.functions)
    effects = not all(bool(free.all()) for free in given.free)
    extra = (1 if given.form == "tucker" else K) * int(effects)
    return FactorModel(
        tuple(f.size for f in given.functions),
        tuple(rank - extra for rank in given.ranks),
        given.form,
        effects,
        given.likelihood,
        given.offset,
        relevance,
        given.relevance_prior,
        learn=given.learn,
    )


def start_parameters(posterior: RowPosterior, model: FactorModel) -> dict[str, Tensor]:
    """Parameters of independent normals with the means, and variances of about, that message passing found."""
    state, found = posterior.state, {}
    for k, (functions, factor) in enumerate(zip(posterior.model.functions, state.factors, strict=True)):
        hyper = factor.log_hyperparameters
        everywhere = torch.cat([functions.everywhere(), functions.everywhere().new_full((1,), -1)])
        mean, covariance = posterior.model.functions_at(state, k, everywhere)
        std = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        spread = (0.5 * hyper[0]).exp()
        mean = mean if model.form == "tucker" else mean[:, : model.columns(k)]
        found[f"hyper.{k}"] = hyper.clone()
        found[f"common.{k}.mean"] = mean[-1] / (0.5 * hyper[1]).exp()
        found[f"common.{k}.log_std"] = torch.full_like(mean[-1], math.log(SURE))
        found[f"factor.{k}.mean"] = (mean[:-1] - mean[-1]) / spread
        found[f"factor.{k}.log_std"] = (std[:-1] / spread).clamp(1e-4, 1.0).log()
    if state.core is not None:
        shape = model.core_shape
        found["core.mean"] = state.core.mean.reshape(shape).clone()
        found["core.log_std"] = state.core.covariance.diagonal().clamp(min=1e-8).sqrt().log().reshape(shape)
    if model.relevance == "horseshoe":
        R = model.ranks[0]
        log_scale = sum(0.5 * found[f"hyper.{k}"][0, :R] for k in range(len(model.sizes)))
        for k in range(len(model.sizes)):
            hyper = found[f"hyper.{k}"]
            hyper[1, :R] -= hyper[0, :R]  # what has the unit of V, which is one now
        found["weight.mean"] = torch.as_tensor(log_scale)
        found["weight.log_std"] = torch.full_like(found["weight.mean"], math.log(SURE))
    found["log_parameters"] = state.log_parameters.clone()
    return found


@dataclass(frozen=True, eq=False)
class MeanField(FactorPosterior):
    """Independent normals of all numbers.

    Attributes
    ----------
    model : FactorModel
    parameters : mapping of str to Tensor
    """

    model: FactorModel
    parameters: Parameters

    @property
    def log_parameters(self) -> Tensor:  # type: ignore[override]
        """Logarithms of the likelihood's parameters, (P,)."""
        return self.parameters["log_parameters"]

    @torch.no_grad()
    def moments(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102 - inherited
        width = 2 * math.prod(1 + r for r in self.model.core_shape) if self.model.form == "tucker" else 64
        parts = [self.model.moments(self.parameters, part) for part in torch.split(positions, max(CHUNK // width, 1))]
        mean, variance = (torch.cat(x) for x in zip(*parts, strict=True))
        return mean, variance

    @torch.no_grad()
    def draw(self, positions: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        found = []
        for _ in range(n_samples):
            drawn = {}
            for name, mean in sorted(self.parameters.items()):  # a file gives them in any order
                if name.endswith(".mean"):
                    std = self.parameters[f"{name.removesuffix('mean')}log_std"].exp()
                    drawn[name.removesuffix(".mean")] = mean + std * standard_normal(mean.shape, mean, generator)
            for k in range(len(self.model.sizes)):
                drawn[f"factor.{k}"] = with_unknown(drawn[f"factor.{k}"], generator)
            if "weight" in drawn:
                drawn["weight"] = drawn["weight"].exp()
            found.append(self.model.values(self.parameters, drawn, positions))
        return torch.stack(found)

    @torch.no_grad()
    def factor(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        mean, variance = (x[labels.remainder(len(x))] for x in self.model.tables(self.parameters, mode))
        R = self.model.ranks[mode]
        return mean[:, :R], variance[:, :R].sqrt()

    @torch.no_grad()
    def effect(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: D102
        if self.model.columns(mode) == self.model.ranks[mode]:
            return None
        mean, variance = (x[labels.remainder(len(x))] for x in self.model.tables(self.parameters, mode))
        return mean[:, -1], variance[:, -1]

    def core(self) -> Tensor | None:  # noqa: D102
        return self.parameters.get("core.mean")

    @torch.no_grad()
    def component_squares(self, positions: Tensor) -> Tensor:
        """``E`` of each CP component's square at positions (n, K), summed over them, (R,)."""
        R = self.model.ranks[0]
        mean, variance = self.model.weights(self.parameters)
        second = (mean**2 + variance).expand(len(positions), R)
        for k, labels in enumerate(positions.T):
            m, v = self.model.tables(self.parameters, k)
            second = second * (m**2 + v)[labels.remainder(len(m)), :R]
        return second.sum(0)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:  # noqa: D102
        return {f"svi.{name}": value for name, value in self.parameters.items()}, _about("mean_field", self.model)


@dataclass(frozen=True, eq=False)
class DrawnFactors(FactorPosterior):
    """Draws from a guide or a Markov chain.

    Attributes
    ----------
    model : FactorModel
    parameters : mapping of str to Tensor
        "hyper.k" and "log_parameters".
    drawn : mapping of str to Tensor, shape (S, …)
        As `FactorModel.values` takes them, with a row of each factor for labels that are not known.
    """

    model: FactorModel
    parameters: Parameters
    drawn: Parameters

    @property
    def log_parameters(self) -> Tensor:  # type: ignore[override]
        """Logarithms of the likelihood's parameters, (P,)."""
        return self.parameters["log_parameters"]

    def moments(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102 - inherited
        n_draws = len(self.drawn["factor.0"])
        total, square = (positions.new_zeros(len(positions), dtype=self.log_parameters.dtype) for _ in range(2))
        for s in range(n_draws):
            f = self._at(s, positions)
            total, square = total + f, square + f**2
        mean = total / n_draws
        return mean, (square / n_draws - mean**2).clamp(min=0) * n_draws / (n_draws - 1)

    def draw(self, positions: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        chosen = torch.randint(len(self.drawn["factor.0"]), (n_samples,), generator=generator)
        return torch.stack([self._at(s, positions) for s in chosen.tolist()])

    def factor(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        u = self._rows(mode, labels)[..., : self.model.ranks[mode]]
        return u.mean(0), u.std(0)

    def effect(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: D102
        if self.model.columns(mode) == self.model.ranks[mode]:
            return None
        b = self._rows(mode, labels)[..., -1]
        return b.mean(0), b.var(0)

    def core(self) -> Tensor | None:  # noqa: D102
        return self.drawn["core"].mean(0) if "core" in self.drawn else None

    def _rows(self, mode: int, labels: Tensor) -> Tensor:
        log_v, log_c = self.model.hyper(self.parameters, mode)
        z, c = self.drawn[f"factor.{mode}"], self.drawn[f"common.{mode}"]
        u: Tensor = (0.5 * log_c).exp() * c[:, None] + (0.5 * log_v).exp() * z[:, labels.remainder(z.shape[1])]
        return u

    def _at(self, s: int, positions: Tensor) -> Tensor:
        return self.model.values(self.parameters, {name: x[s] for name, x in self.drawn.items()}, positions)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:  # noqa: D102
        arrays = {f"svi.{name}": value for name, value in self.parameters.items()}
        return arrays | {f"drawn.{name}": x for name, x in self.drawn.items()}, _about("drawn", self.model)


def fit_guide(
    model: FactorModel,
    guide: Guide,
    start: Mapping[str, Tensor],
    table: Table,
    comm: Comm,
    checkpoints: Checkpoints | None = None,
    **settings: Any,
) -> tuple[MeanField | DrawnFactors, VariationalFit]:
    """The posterior by a guide, from rows of this rank and start parameters; `settings` are those of `fit_svi`."""
    one = torch.ones_like(table.values)
    columns = [table.positions, table.values] + [one if x is None else x for x in (table.count, table.precision)]
    settings = {"comm": comm, "keys": table.key, "checkpoints": checkpoints, **settings}
    if guide == "mean_field":
        fitted = fit_svi(*model.mean_field_pair(start), columns, **settings)
        kept = {name: x.detach() for name, x in start.items()} | fitted.params
        bounds = model.likelihood.bounds(table.values)
        kept["log_parameters"] = torch.clamp(kept["log_parameters"], *bounds)
        return MeanField(model, kept), fitted
    auto, infer = import_module("pyro.infer.autoguide"), import_module("pyro.infer.autoguide.initialization")
    program = model.program(start)
    means = {name.removesuffix(".mean").replace(".", "_"): x for name, x in start.items() if name.endswith(".mean")}
    if "weight" in means:
        means["log_weight"] = means.pop("weight")
    size = sum(x.numel() for x in means.values())
    if guide == "full" and size > MAX_FULL:
        raise ValueError(f'guide: expected another than "full" for {size:,} numbers (at most {MAX_FULL:,}), got "full"')
    kind = auto.AutoMultivariateNormal if guide == "full" else auto.AutoLowRankMultivariateNormal
    posterior = kind(program, init_loc_fn=infer.init_to_value(values=means))
    with load_pyro().get_param_store().scope(), seeded(0, 0, columns):
        posterior(columns[0].new_zeros(1, len(model.sizes)), one.new_zeros(1), *one.new_ones(2, 1))  # makes parameters
    # Independent at first, each number as sure as message passing is of it.
    names = [x.replace("log_weight", "weight").replace("_", ".") for x in posterior.prototype_trace.stochastic_nodes]
    spread = torch.cat([start[f"{name}.log_std"].exp().reshape(-1) for name in names])
    nn = import_module("pyro.nn")
    posterior.scale = nn.PyroParam(spread, posterior.scale_constraint)
    fitted = fit_svi(program, posterior, columns, **settings)
    drawn = fitted.draw(posterior, *columns, n_samples=DRAWS)
    drawn = {name: comm.broadcast(x.contiguous()) for name, x in drawn.items() if not name.startswith("_")}
    return drawn_factors(model, start, drawn), fitted


def drawn_factors(model: FactorModel, parameters: Parameters, drawn: Mapping[str, Tensor]) -> DrawnFactors:
    """The posterior of draws (S, …) by the sites of `FactorModel.program`."""
    named = {("log_weight" if name == "log_weight" else name.replace("_", ".")): x for name, x in drawn.items()}
    if "log_weight" in named:
        named["weight"] = named.pop("log_weight").exp()
    generator = torch.Generator().manual_seed(0)
    for k in range(len(model.sizes)):
        named[f"factor.{k}"] = torch.stack([with_unknown(z, generator) for z in named[f"factor.{k}"]])
    kept = {name: x for name, x in parameters.items() if name == "log_parameters" or name.startswith("hyper")}
    return DrawnFactors(model, kept, named)


def with_unknown(z: Tensor, generator: torch.Generator) -> Tensor:
    """Rows (I, R) and one more from the prior."""
    return torch.cat([z, standard_normal((1, z.shape[1]), z, generator)])


def relevance_of(posterior: MeanField | DrawnFactors, table: Table, comm: Comm) -> Tensor:
    """Root mean square of each CP component over the rows of all ranks, (R,); of shape (0,) for Tucker."""
    R = posterior.model.ranks[0]
    if posterior.model.form == "tucker":
        return table.values.new_zeros(0)

    def squares(part: Table) -> Tensor:
        found = _squares(posterior, part.positions)
        return torch.cat([found, found.new_tensor([float(len(part.values))])])

    total = comm.sum(*add_up(squares(part) for part in table.blocks()))
    return (total[:R] / total[R]).sqrt()


def _squares(posterior: MeanField | DrawnFactors, positions: Tensor) -> Tensor:
    if isinstance(posterior, MeanField):
        return posterior.component_squares(positions)
    drawn, R = posterior.drawn, posterior.model.ranks[0]
    total = posterior.log_parameters.new_zeros(R)
    few = range(0, len(drawn["factor.0"]), 10)
    for s in few:
        product = drawn["weight"][s].expand(len(positions), R) if "weight" in drawn else torch.ones_like(total)[None]
        for k, labels in enumerate(positions.T):
            log_v, log_c = posterior.model.hyper(posterior.parameters, k)
            u = (0.5 * log_c).exp() * drawn[f"common.{k}"][s] + (0.5 * log_v).exp() * drawn[f"factor.{k}"][s]
            product = product * u[labels, :R]
        total = total + (product**2).sum(0) / len(few)
    return total


def _about(kind: str, model: FactorModel) -> dict[str, Any]:
    settings = {
        name: getattr(model, name) for name in ("sizes", "ranks", "form", "main_effects", "offset", "relevance")
    }
    return {"posterior": kind, "model": settings}


def factor_model_from(settings: Mapping[str, Any], likelihood: Likelihood) -> FactorModel:
    """The density that a file names."""
    sizes, ranks = tuple(settings["sizes"]), tuple(settings["ranks"])
    return FactorModel(**{**settings, "sizes": sizes, "ranks": ranks}, likelihood=likelihood)


def read_factors(model: FactorModel, arrays: Parameters, kind: str) -> MeanField | DrawnFactors:
    """What `to_state` wrote."""
    parameters = {name.removeprefix("svi."): x for name, x in arrays.items() if name.startswith("svi.")}
    if kind == "mean_field":
        return MeanField(model, parameters)
    drawn = {name.removeprefix("drawn."): x for name, x in arrays.items() if name.startswith("drawn.")}
    return DrawnFactors(model, parameters, drawn)
