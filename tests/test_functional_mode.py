"""The update of one mode: that a GPU need not be waited for. What it computes, test_functional_tucker.py checks."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from probtensor.kernels import Kernel, Linear, Matern, Periodic, White
from probtensor.models.functional_mode import Mode
from probtensor.models.functional_start import no_sites
from probtensor.models.latent_functions import ExchangeableRows, GaussianProcess, LatentFunctions
from tests.reference import F64, f64

# What waits for a GPU or copies from the CPU: a graph cannot hold it.
WAITING = {"_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "_unique2", "equal"}
CHECKING = {"linalg_inv", "linalg_solve", "linalg_cholesky", "linalg_eigh", "_linalg_eigh", "_linalg_svd"}


class Names(TorchDispatchMode):
    """Collects the names of all operations, with "bool index" for a mask as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        places = args[1] if "index" in func.name() and isinstance(args[1], list | tuple) else []
        if any(x is not None and x.dtype == torch.bool for x in places):
            self.seen.add("bool index")
        return func(*args, **(kwargs or {}))


def process(kernel: Kernel) -> GaussianProcess:
    return GaussianProcess(torch.linspace(0, 1, 13, dtype=F64), kernel)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize(
    "functions",
    [
        process(Matern(0.5)),
        process(Matern(1.5)),
        process(Matern(2.5) + White()),
        process(Periodic(0.3, 2) + Linear() + White()),
        ExchangeableRows(7, f64(0.0)),
    ],
    ids=["1/2", "3/2", "5/2 + white", "periodic + linear + white", "labels"],
)
@torch.no_grad()
def test_an_update_never_looks_at_its_numbers(functions: LatentFunctions, damping: float):
    mode = Mode(functions, torch.tensor([True, False, True]), damping)
    hyper = functions.initial_hyperparameters(2)
    old = no_sites(functions.size, hyper)
    statistics = torch.rand(functions.size, 9, generator=torch.Generator().manual_seed(0), dtype=F64)
    arguments = statistics, f64(1.0), old, hyper, f64(100.0)
    mode.optimum(*arguments)  # constants are made at the first call
    with Names() as names:
        mode.optimum(*arguments)
    assert "bmm" in names.seen
    assert names.seen & (WAITING | CHECKING | {"bool index"}) == set()
