"""What a fitted neural completion says of itself: weights, epochs, learning curves, strengths of effects, noise."""

import math
from abc import abstractmethod

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from probtensor.axes import Axis
from probtensor.models.completion_fit import Fitted
from probtensor.models.completion_settings import Settings
from probtensor.models.side_information import Side

__all__ = ["Findings"]

FloatArray = npt.NDArray[np.float64]


class Findings:
    """Attributes of `NeuralTensorCompletion` that are made of what a fit has left."""

    biases: bool
    axes_: tuple[Axis, ...]
    y_scale_: float
    _fitted: Fitted
    _sides: tuple[Side, ...]

    @property
    def weights_(self) -> dict[str, float]:
        """Weight of each candidate in the mean; they sum to one."""
        check_is_fitted(self, "axes_")
        return dict(zip(self._candidates(), self._fitted.weights.tolist(), strict=True))

    @property
    def best_epochs_(self) -> dict[str, tuple[int, ...]]:
        """Epochs of each candidate's members; 0 is the start."""
        check_is_fitted(self, "axes_")
        M = self._fitted.n_members
        epochs = [
            group.best_epoch[first : first + M]
            for group in self._fitted.groups
            for first in range(0, len(group.best_epoch), M)
        ]
        names = self._candidates()
        return dict(zip(names[len(names) - len(epochs) :], epochs, strict=True))

    @property
    def validation_deviance_(self) -> dict[str, FloatArray]:
        """Mean deviance (epochs + 1, n_members) of each candidate's members on their rows held out."""
        check_is_fitted(self, "axes_")
        M = self._fitted.n_members
        curves = [
            self.y_scale_**2 * group.history[:, first : first + M].double().numpy()
            for group in self._fitted.groups
            for first in range(0, len(group.best_epoch), M)
        ]
        names = self._candidates()
        return dict(zip(names[len(names) - len(curves) :], curves, strict=True))

    @property
    def validation_rmse_(self) -> dict[str, FloatArray]:
        """RMSE (epochs + 1, n_members) of each candidate's members on their rows held out, in the unit of y."""
        self._need_gaussian("validation_rmse_", "; see validation_deviance_")
        return {name: np.sqrt(curves) for name, curves in self.validation_deviance_.items()}

    @property
    def strengths_(self) -> dict[tuple[str, ...], float]:
        """Shrinkage of the effects of each subset of modes, and of features."""
        check_is_fitted(self, "axes_")
        names = [str(axis.name) for axis in self.axes_]
        names += [f"features of {names[side.mode]}" for side in self._sides]
        effects = self._fitted.effects
        pairs = zip(effects.subsets, effects.strengths, strict=True)
        return {tuple(names[mode] for mode in subset): strength for subset, strength in pairs if subset}

    @property
    def pair_strengths_(self) -> dict[tuple[str, str], float]:
        """Shrinkage of the factors of each pair of modes, in rows."""
        check_is_fitted(self, "axes_")
        pairs, names = self._fitted.pairs, [str(axis.name) for axis in self.axes_]
        if pairs is None:
            return {}
        return {(names[a], names[b]): strength for (a, b), strength in zip(pairs.pairs, pairs.strengths, strict=True)}

    @property
    def noise_std_(self) -> float:
        """Standard deviation that the effects leave to the noise, in the unit of y."""
        self._need_gaussian("noise_std_", "")
        return math.sqrt(self._fitted.effects.noise_variance) * self.y_scale_

    def _need_gaussian(self, name: str, instead: str) -> None:
        check_is_fitted(self, "axes_")
        if self._fitted.likelihood != "gaussian":
            raise AttributeError(f'{name}: expected likelihood="gaussian", got {self._fitted.likelihood!r}{instead}')

    def _candidates(self) -> list[str]:
        single = self.biases or not self._fitted.groups
        M = self._fitted.n_members
        decays = self._settings().weight_decay
        names = [
            f"{group.name}, decay {decay:g}"
            for group in self._fitted.groups
            for decay in decays[: len(group.best_epoch) // M]
        ]
        products = {"factors of pairs": self._fitted.pairs, "factors of all modes": self._fitted.products}
        return ["effects"] * single + [name for name, found in products.items() if found is not None] + names

    @abstractmethod
    def _settings(self) -> Settings:
        """The constructor's parameters, checked."""
