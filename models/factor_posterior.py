"""What every posterior over the entries of a factorized tensor answers, and those that message passing finds.

`RowPosterior` is that of `probtensor.models.functional_tucker` with labels for coordinates: each row of a factor has a
normal distribution with a full covariance, and what all labels share has one more. `MixturePosterior` has several of
them in equal parts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probtensor.models.feature_rows import FeatureRows
from probtensor.models.funbat_state import read_posterior, write_posterior
from probtensor.models.functional_state import State
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.observation import Observation

__all__ = ["FactorFit", "FactorPosterior", "MixturePosterior", "RowPosterior", "read_rows"]


class FactorPosterior(ABC):
    """A posterior over ``f``, the noise-free entries, and over factors. Positions are those of labels, -1 unknown."""

    log_parameters: Tensor

    @abstractmethod
    def moments(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (n,) of ``f``, offset included, at positions (n, K)."""

    @abstractmethod
    def draw(self, positions: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Joint draws (n_samples, n) of ``f``, offset included."""

    @abstractmethod
    def factor(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (m, R_k) of the rows of a mode's factor, main effects left out."""

    @abstractmethod
    def effect(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and variance (m,) of a mode's main effect; None where the model has none."""

    @abstractmethod
    def core(self) -> Tensor | None:
        """Mean of the Tucker core; None for CP."""

    @abstractmethod
    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON values."""

    @property
    def device(self) -> torch.device:
        """Where the posterior is."""
        return self.log_parameters.device


class FactorFit(NamedTuple):
    """What a fit ends with.

    Attributes
    ----------
    posterior : FactorPosterior
    observation : Observation or None
        How real values come from entries.
    bound_history : list of float
    converged : bool
    relevance : Tensor, shape (R,)
        Root mean square of each CP component over the rows, in the unit of standardised values; of shape (0,) for
        Tucker.
    """

    posterior: FactorPosterior
    observation: Observation | None
    bound_history: list[float]
    converged: bool
    relevance: Tensor


@dataclass(frozen=True, eq=False)
class RowPosterior(FactorPosterior):
    """Posterior by message passing.

    Attributes
    ----------
    model : FunctionalTucker
        All its modes have exchangeable rows, or rows with features.
    state : State
    """

    model: FunctionalTucker
    state: State

    @property
    def log_parameters(self) -> Tensor:  # type: ignore[override]
        """Logarithms of the likelihood's parameters, (P,)."""
        return self.state.log_parameters

    def moments(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102 - inherited
        mean, variance = self.model.predict(self.state, list(positions.T))
        return mean + self.model.offset, variance

    def draw(self, positions: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        return self.model.sample(self.state, list(positions.T), n_samples, generator) + self.model.offset

    def factor(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        mean, covariance = self.model.functions_at(self.state, mode, labels)
        std = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        kept = slice(None) if self.model.form == "tucker" else self._components
        return mean[:, kept], std[:, kept]

    def effect(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: D102
        if self.model.form == "tucker" or self._components.stop == self.model.ranks[mode]:
            return None
        mean, covariance = self.model.functions_at(self.state, mode, labels)
        return mean[:, -1], covariance[:, -1, -1]

    def feature_effects(self, mode: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """Mean and standard deviation of features' coefficients: (p, R_k) of components, and (p,) of the main effect.

        The mode must have features.
        """
        functions = self.model.functions[mode]
        assert isinstance(functions, FeatureRows)
        mean, std = functions.coefficients(self.state.factors[mode].posterior)
        if self.model.form == "tucker" or self._components.stop == self.model.ranks[mode]:
            return (mean, std), None
        kept = self._components
        return (mean[:, kept], std[:, kept]), (mean[:, -1], std[:, -1])

    def core(self) -> Tensor | None:  # noqa: D102
        return None if self.state.core is None else self.state.core.mean.reshape(self.model.ranks)

    @property
    def _components(self) -> slice:
        """Interactions of a CP model, which come before the main effects."""
        return slice(0, int(torch.stack(list(self.model.free)).all(0).sum()))

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:  # noqa: D102
        arrays, meta = write_posterior(self.model, self.state, None)
        return arrays, meta | {"posterior": "rows"}


@dataclass(frozen=True, eq=False)
class MixturePosterior(FactorPosterior):
    """Posteriors that message passing found from several starts, in equal parts.

    Each covers one mode of the true posterior. Their bounds differ by tens of nats even where they predict alike, so
    that weights by the bound would keep one. Components of different members do not belong together: `factor`,
    `effect`, `feature_effects` and `core` are those of the first.

    Attributes
    ----------
    members : tuple of RowPosterior
        That of the highest bound first.
    """

    members: tuple[RowPosterior, ...]

    @property
    def log_parameters(self) -> Tensor:  # type: ignore[override]
        """Logarithms of the likelihood's parameters (P,), their mean over members."""
        return torch.stack([member.log_parameters for member in self.members]).mean(0)

    def moments(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102 - inherited
        means, variances = (torch.stack(x) for x in zip(*(m.moments(positions) for m in self.members), strict=True))
        mean = means.mean(0)
        return mean, variances.mean(0) + ((means - mean) ** 2).mean(0)

    def draw(self, positions: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        which = torch.randint(len(self.members), (n_samples,), generator=generator, device=generator.device).tolist()
        counts = [which.count(m) for m in range(len(self.members))]
        drawn = [
            iter(member.draw(positions, count, generator)) for member, count in zip(self.members, counts, strict=True)
        ]
        return torch.stack([next(drawn[m]) for m in which])

    def factor(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.members[0].factor(mode, labels)

    def effect(self, mode: int, labels: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: D102
        return self.members[0].effect(mode, labels)

    def feature_effects(self, mode: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """See `RowPosterior.feature_effects`."""
        return self.members[0].feature_effects(mode)

    def core(self) -> Tensor | None:  # noqa: D102
        return self.members[0].core()

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:  # noqa: D102
        states = [member.to_state() for member in self.members]
        arrays = {f"member.{m}.{name}": array for m, (own, _) in enumerate(states) for name, array in own.items()}
        return arrays, {"posterior": "mixture", "members": [about for _, about in states]}


def read_rows(
    model: FunctionalTucker, arrays: dict[str, Tensor], meta: dict[str, Any]
) -> RowPosterior | MixturePosterior:
    """The posterior whose `to_state` gave arrays and JSON values; `model` has the priors of the modes."""
    if meta["posterior"] == "rows":
        return RowPosterior(*read_posterior(model, arrays, meta)[:2])
    members = []
    for m, about in enumerate(meta["members"]):
        prefix = f"member.{m}."
        own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        members.append(RowPosterior(*read_posterior(model, own, about)[:2]))
    return MixturePosterior(tuple(members))
