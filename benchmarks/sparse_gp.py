"""GPyTorch's sparse Gaussian process as a reference; GPyTorch is imported when one is fitted."""

import importlib
import time
from typing import Any, Self

import torch

from benchmarks.datasets import Floats, Mask, NumberedColumns
from benchmarks.scores import Score, gaussian_score

__all__ = ["SparseGaussianProcess"]


class SparseGaussianProcess:
    """GPyTorch's stochastic variational Gaussian process on the first three columns, with its own Gaussian noise.

    Matérn 3/2 with one lengthscale a column, inducing points that start at random training rows and move, Adam on
    minibatches. Stops after `n_steps` or `seconds`, whichever comes first: a slower machine may get a worse fit.
    """

    def __init__(
        self, n_inducing: int = 500, n_steps: int = 500, seconds: float = 60.0, batch: int = 512, seed: int = 0
    ) -> None:
        self.n_inducing, self.n_steps, self.seconds, self.batch, self.seed = n_inducing, n_steps, seconds, batch, seed

    def fit(self, X: Any, y: Floats, inner: Mask | None = None) -> Self:
        """Fit to all rows at once: nothing is chosen on inner rows."""
        self._columns = NumberedColumns(X)
        self._fit(self._columns(X), y)
        return self

    def score(self, X: Any, y: Floats) -> Score:
        """Score of the Gaussian prediction."""
        mean, std = self.predict(X)
        assert std is not None
        return gaussian_score(y, mean, std)

    def _fit(self, X: Floats, y: Floats) -> None:
        gpytorch = _gpytorch()
        self._centre, self._scale = X[:, :3].mean(0), X[:, :3].std(0)
        self._y_centre, self._y_scale = float(y.mean()), float(y.std())
        inputs = self._inputs(X)
        targets = torch.from_numpy((y - self._y_centre) / self._y_scale).float()
        with torch.random.fork_rng():  # GPyTorch draws from the global generator, at its first evaluation too
            torch.manual_seed(self.seed)
            places = torch.unique(inputs, dim=0)
            first = places[torch.randperm(len(places))[: self.n_inducing]]
            self._model, self._likelihood = _variational(gpytorch, first), gpytorch.likelihoods.GaussianLikelihood()
            objective = gpytorch.mlls.VariationalELBO(self._likelihood, self._model, num_data=len(y))
            self._train(objective, inputs, targets)
        self._model.eval()
        self._likelihood.eval()

    def _train(self, objective: Any, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer = torch.optim.Adam([*self._model.parameters(), *self._likelihood.parameters()], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.n_steps, eta_min=1e-3)
        end, self.n_steps_ = time.perf_counter() + self.seconds, 0
        while True:
            for rows in torch.split(torch.randperm(len(targets)), self.batch):
                if self.n_steps_ >= self.n_steps or time.perf_counter() >= end:
                    return
                optimizer.zero_grad()
                loss = -objective(self._model(inputs[rows]), targets[rows])
                loss.backward()
                optimizer.step()
                schedule.step()
                self.n_steps_ += 1

    def _inputs(self, X: Floats) -> torch.Tensor:
        return torch.from_numpy((X[:, :3] - self._centre) / self._scale).float()

    def _moments(self, X: Floats) -> tuple[Floats, Floats]:
        with torch.no_grad():
            found = [self._likelihood(self._model(rows)) for rows in torch.split(self._inputs(X), 2048)]
        mean = torch.cat([f.mean for f in found]).double().numpy() * self._y_scale + self._y_centre
        return mean, torch.cat([f.variance for f in found]).double().sqrt().numpy() * self._y_scale

    def predict(self, X: Any) -> tuple[Floats, Floats | None]:
        """Mean and standard deviation of a new observation."""
        return self._moments(self._columns(X))


def _gpytorch() -> Any:
    try:
        return importlib.import_module("gpytorch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the sparse GP reference needs GPyTorch: pip install gpytorch") from error


def _variational(gpytorch: Any, first: torch.Tensor) -> Any:
    """A sparse variational GP whose inducing points start at the rows of `first`."""

    class Model(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            distribution = gpytorch.variational.CholeskyVariationalDistribution(len(first))
            super().__init__(
                gpytorch.variational.VariationalStrategy(self, first, distribution, learn_inducing_locations=True)
            )
            self.mean_module = gpytorch.means.ConstantMean()
            kernel = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=first.shape[1])
            kernel.lengthscale = 0.3
            self.covar_module = gpytorch.kernels.ScaleKernel(kernel)

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return Model()
