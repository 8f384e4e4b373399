"""Variational inference on rows dealt to several ranks, against the same steps on one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from probtensor.comm import Comm, Serial, abort_on_error, world
from probtensor.inference.variational import VariationalFit, fit_svi

N = 300


def table() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.poisson(torch.exp(0.5 * x[:, 0] - 0.3 * x[:, 1]), generator=generator)
    return x, y, torch.arange(N)


def model(x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(x.new_tensor(2.0), x.new_tensor(2.0)))
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(3), scale).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(torch.exp(x @ weights)), obs=y)


def run(comm: Comm, taken: Tensor, batch_size: int | None) -> VariationalFit:
    x, y, keys = (column[taken] for column in table())
    settings = {"batch_size": batch_size, "n_steps": 100, "learning_rate": 0.05, "tol": 0.0}
    return fit_svi(model, AutoNormal(model), [x, y], comm=comm, keys=keys, **settings)


def main() -> None:
    comm = world()
    with abort_on_error(comm):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
        ends = [0, 0, N] if comm.size == 2 else [0, 4, N // 3, N]  # a rank without rows; ragged ones
        mine = order if comm.size == 1 else order[ends[comm.rank] : ends[comm.rank + 1]]
        for batch_size in (None, 8):  # of eight rows, three ranks often have none
            here, alone = run(comm, mine, batch_size), run(Serial(), torch.arange(N), batch_size)
            torch.testing.assert_close(
                torch.tensor(here.bound_history), torch.tensor(alone.bound_history), rtol=1e-8, atol=0
            )
            for name, value in alone.params.items():
                torch.testing.assert_close(here.params[name], value, rtol=1e-8, atol=1e-8)
                bits = comm.gather_bytes(here.params[name].numpy().tobytes())
                assert len(set(bits)) == 1, "the same bits on all ranks"

        def other(x: Tensor, y: Tensor) -> None:
            model(x, y)
            pyro.param("one" if comm.is_root else "another", torch.tensor(1.0))

        if comm.size > 1:
            with pytest.raises(ValueError, match="expected rank 0's parameters"):
                fit_svi(other, AutoNormal(model), [table()[0], table()[1]], comm=comm)
        if comm.is_root:
            print(f"ok on {comm.size}", flush=True)


if __name__ == "__main__":
    main()
