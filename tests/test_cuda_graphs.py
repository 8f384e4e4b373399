"""Captured functions on a GPU give what the functions give."""

import pytest
import torch

from probtensor.cuda_graphs import Captured
from probtensor.gaussian import Gamma
from probtensor.kernels import Linear, Matern, Periodic, White
from probtensor.models.functional_tucker import FunctionalTucker
from probtensor.models.latent_functions import ExchangeableRows, GaussianProcess
from tests.reference import F64

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_results_are_those_of_the_arguments_and_stay_as_they_are():
    double = Captured(lambda x, y: (x + y, x * y))
    one, two = torch.ones(3, device="cuda"), torch.full((3,), 2.0, device="cuda")
    first = double(one, two)
    second = double(two, two)
    assert [x.tolist() for x in first] == [[3.0] * 3, [2.0] * 3]
    assert [x.tolist() for x in second] == [[4.0] * 3, [4.0] * 3]
    assert double(torch.ones(2, device="cuda"), torch.ones(2, device="cuda"))[0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_an_update_as_a_graph_is_the_update(damping: float):
    times = torch.linspace(0, 1, 13, dtype=F64, device="cuda")
    kernel = Matern(1.5) + Periodic(0.3, 2) + Linear() + White()
    functions = (GaussianProcess(times, Matern(2.5)), GaussianProcess(times, kernel), ExchangeableRows(7, times))
    free = (torch.tensor([True, True, False], device="cuda"),) * 3
    like = torch.ones((), dtype=F64, device="cuda")
    model = FunctionalTucker(functions, free, "cp", Gamma(like, like), damping=damping, learn=False)
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [f.size for f in functions]
    state = model.start(torch.ones(2 + 2 * sum(sizes), dtype=F64, device="cuda"), torch.Generator().manual_seed(0))
    for k, mode in enumerate(model.modes):
        old = state.factors[k]
        a = torch.randn(sizes[k], 3, generator=generator, dtype=F64, device="cuda")
        row, column = torch.triu_indices(3, 3, device="cuda")
        statistics = torch.cat([(a[:, :, None] * a[:, None, :])[:, row, column], a], dim=1)
        arguments = statistics, like, *old.sites, old.log_hyperparameters, state.square
        with torch.no_grad():
            expected = mode._optimum(*arguments)
        for scale in (1.0, 2.0):
            found = mode._captured(scale * statistics, *arguments[1:])
        with torch.no_grad():
            expected_twice = mode._optimum(2.0 * statistics, *arguments[1:])
        assert all(torch.equal(x, y) for x, y in zip(found, expected_twice, strict=True))
        assert not torch.equal(found[-3], expected[-3])
