"""Two processes train adapters under DDP and FSDP: the numbers are those of one process with all rows.

Started once by ``tests/test_flora_torch.py``, with a file where the processes meet: the second is a fork of the first,
so that libraries are loaded once.
"""

from __future__ import annotations

import os
import sys

import torch
import torch._dynamo  # optimizers load it
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from probtensor.models import FLoRAConfig, inject_adapters
from probtensor.models.flora import Adapters


def adapted() -> tuple[nn.Module, Adapters]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Bilinear(6, 6, 3)
    )
    model = Doubled(model)
    return model, inject_adapters(model, FLoRAConfig(r=2))


class Doubled(nn.Module):
    """The last layer takes its input twice: one layer without a forward of ours."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.first, self.last = layers[:-1], layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h, h)


def train(model: nn.Module, adapters: Adapters, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def main() -> None:
    size, meeting = 2, sys.argv[1]
    child = os.fork()  # before autograd starts
    rank = int(child == 0)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    alone, expected = adapted()
    train(alone, expected, x)

    model, adapters = adapted()
    train(DistributedDataParallel(model), adapters, x[rank::size])
    for one, other in zip(adapters.trainable_parameters(), expected.trainable_parameters(), strict=True):
        torch.testing.assert_close(one, other)

    model, adapters = adapted()
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    train(sharded, adapters, x[rank::size])
    with FullyShardedDataParallel.summon_full_params(sharded):
        for one, other in zip(adapters.trainable_parameters(), expected.trainable_parameters(), strict=True):
            torch.testing.assert_close(one, other)
    dist.destroy_process_group()
    if rank == 0:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("equal")


if __name__ == "__main__":
    main()
