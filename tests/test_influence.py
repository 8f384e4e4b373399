"""Influence of training rows: against each row's own gradient, dense solves, and training again."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from probtensor.inference.fisher import GradientRing, inverse_product
from probtensor.inference.influence import MFAC, GaussNewton, influence, output_layer_influence

F64 = torch.float64


class Net(nn.Module):
    """Embeddings of two modes, a hidden layer, one output."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(5, 3), nn.Embedding(4, 2)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1, bias=bias))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        z = torch.cat([self.first(X[:, 0]), self.second(X[:, 1])], dim=1)
        return self.layers(z).squeeze(-1)


def problem(bias: bool = True, n: int = 40, m: int = 11):
    generator = torch.Generator().manual_seed(0)
    net = Net(bias).double()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=F64))
    X = torch.stack([torch.randint(size, (n + m,), generator=generator) for size in (5, 4)], dim=1)
    y = torch.randn(n + m, generator=generator, dtype=F64)
    return net, (X[:n], y[:n]), (X[n:], y[n:])


def gradients(net: nn.Module, rows, names=None) -> torch.Tensor:
    """Each row's own gradient, (n, P), one after the other."""
    params = {name: value.detach() for name, value in net.named_parameters()}
    names = list(params) if names is None else names

    def loss(chosen, x, y):
        return 0.5 * (functional_call(net, params | chosen, (x[None],)).squeeze(0) - y) ** 2

    found = vmap(grad(loss), in_dims=(None, 0, 0))({name: params[name] for name in names}, *rows)
    return torch.cat([found[name].reshape(len(rows[1]), -1) for name in names], dim=1)


LAST = ["layers.2.weight", "layers.2.bias"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parameters", ["last", "all"])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_scores_are_products_of_gradients(bias: bool, parameters: str, chunk: int) -> None:
    net, train, query = problem(bias)
    names = None if parameters == "all" else LAST[: 1 + bias]
    expected = gradients(net, train, names) @ gradients(net, query, names).sum(0)
    found = influence(net, train, query, parameters=parameters, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    magnitude = influence(net, train, query, parameters=parameters, signed=False)
    torch.testing.assert_close(magnitude, expected.abs(), rtol=1e-10, atol=1e-10)


def test_scores_from_what_the_output_layer_was_given_are_those_of_the_module() -> None:
    net, train, query = problem()
    parts = []
    for X, y in (train, query):
        z = torch.cat([net.first(X[:, 0]), net.second(X[:, 1])], dim=1)
        hidden = net.layers[:2](z).detach()
        parts += [hidden, (net.layers[2](hidden).squeeze(-1) - y).detach()]
    found = output_layer_influence([(*parts, rate) for rate in (0.5, 0.25)])
    torch.testing.assert_close(found, 0.75 * influence(net, train, query), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="steps: expected at least one checkpoint, got none"):
        output_layer_influence([])


def test_scores_add_up_over_checkpoints() -> None:
    net, train, query = problem()
    states = [{name: value.detach() * size for name, value in net.state_dict().items()} for size in (0.5, 1.0)]
    expected = torch.zeros(len(train[1]), dtype=F64)
    for state, rate in zip(states, (0.1, 0.3), strict=True):
        other = Net().double()
        other.load_state_dict(state)
        expected += rate * influence(other, train, query, parameters="all")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    steps = list(zip(states, (0.1, 0.3), strict=True))
    found = influence(net, train, query, parameters="all", checkpoints=steps)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    preconditioned = influence(net, train, query, checkpoints=steps[:1], preconditioner=GaussNewton(0.1))
    assert preconditioned.isfinite().all()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_hand_made_example() -> None:
    module = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        module[0].bias.fill_(0.5)
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    query = torch.tensor([[1.0, 1.0]], dtype=F64), torch.tensor([3.0], dtype=F64)
    # Errors: 0.5 and -0.5 at the training rows, 0.5 at the query row, whose gradient is 0.5 (1, 1, 1).
    expected = torch.tensor([0.5 * 0.5 * 2, -0.5 * 0.5 * 2], dtype=F64)
    for parameters in ("last", "all"):
        torch.testing.assert_close(influence(module, train, query, parameters=parameters), expected, rtol=0, atol=1e-12)


def test_a_step_on_a_row_lowers_the_query_loss_as_predicted() -> None:
    net, train, query = problem()
    scores = influence(net, train, query, parameters="all")

    def query_loss(module: nn.Module) -> float:
        return float(0.5 * ((module(query[0]).detach() - query[1]) ** 2).sum())

    before, rate, rows = query_loss(net), 1e-6, gradients(net, train)
    for row in range(5):
        other, start = Net().double(), 0
        other.load_state_dict(net.state_dict())
        with torch.no_grad():
            for value in other.parameters():
                value -= rate * rows[row, start : start + value.numel()].reshape(value.shape)
                start += value.numel()
        assert before - query_loss(other) == pytest.approx(rate * float(scores[row]), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("m", [1, 7, 60])
def test_products_with_the_damped_fisher_matrix_equal_the_dense_solve(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    G, v = torch.randn(m, 20, generator=generator, dtype=F64), torch.randn(20, generator=generator, dtype=F64)
    dense = torch.linalg.solve(0.1 * torch.eye(20, dtype=F64) + G.T @ G / m, v)
    torch.testing.assert_close(inverse_product(G, v, 0.1), dense, rtol=1e-8, atol=1e-8)


def test_a_ring_holds_the_last_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, v = torch.randn(9, 20, generator=generator, dtype=F64), torch.randn(20, generator=generator, dtype=F64)
    ring = GradientRing(4, 0.1)
    torch.testing.assert_close(ring.product(v), v / 0.1)
    for count, row in enumerate(rows, start=1):
        ring.push(row)
        last = rows[max(0, count - 4) : count]
        torch.testing.assert_close(ring.product(v), inverse_product(last, v, 0.1), rtol=1e-8, atol=1e-8)


def test_preconditioned_scores_equal_dense_ones() -> None:
    net, train, query = problem()
    rows, v = gradients(net, train), gradients(net, query).sum(0)
    one = torch.eye(rows.shape[1], dtype=F64)
    fisher = rows.T @ rows / len(rows) + 0.1 * one
    found = influence(net, train, query, parameters="all", preconditioner=MFAC(len(rows), 0.1))
    torch.testing.assert_close(found, rows @ torch.linalg.solve(fisher, v), rtol=1e-8, atol=1e-8)
    errors = net(train[0]).detach() - train[1]
    jacobian = rows / errors[:, None]
    curvature = jacobian.T @ jacobian / len(rows) + 0.1 * one
    found = influence(net, train, query, parameters="all", preconditioner=GaussNewton(0.1, steps=500, tol=1e-13))
    torch.testing.assert_close(found, rows @ torch.linalg.solve(curvature, v), rtol=1e-8, atol=1e-8)


def test_training_without_a_row_changes_the_loss_as_predicted_on_a_linear_model() -> None:
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(200, 4, generator=generator, dtype=F64), torch.randn(200, generator=generator, dtype=F64)
    query = torch.randn(10, 4, generator=generator, dtype=F64), torch.randn(10, generator=generator, dtype=F64)
    damping = 1e-6

    def trained(keep: torch.Tensor) -> nn.Module:
        A, b = X[keep], y[keep]
        module = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Flatten(0)).double()
        with torch.no_grad():
            module[0].weight.copy_(torch.linalg.solve(A.T @ A + 200 * damping * torch.eye(4, dtype=F64), A.T @ b)[None])
        return module

    everything = torch.ones(200, dtype=torch.bool)
    whole = trained(everything)
    scores = influence(whole, (X, y), query, parameters="all", preconditioner=GaussNewton(damping))

    def loss(module: nn.Module) -> float:
        return float(0.5 * ((module(query[0]).detach() - query[1]) ** 2).sum())

    changes = []
    for row in range(50):
        keep = everything.clone()
        keep[row] = False
        changes.append(loss(trained(keep)) - loss(whole))
    predicted = scores[:50] / 200
    correlation = torch.corrcoef(torch.stack([torch.tensor(changes, dtype=F64), predicted]))[0, 1]
    assert correlation > 0.995
    assert float(predicted.norm() / torch.tensor(changes).norm()) == pytest.approx(1, abs=0.1)


def test_refusals_name_the_argument() -> None:
    net, train, query = problem()
    with pytest.raises(
        ValueError, match=r"query: expected inputs \(n, …\) and values \(n,\), got \(11, 2\) and \(3,\)"
    ):
        influence(net, train, (query[0], query[1][:3]))
    with pytest.raises(
        ValueError, match='parameters: expected "last" or "all", got "some"'.replace('"some"', "'some'")
    ):
        influence(net, train, query, parameters="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='parameters: expected "all" for a module without'):
        influence(nn.Flatten(0), (train[1][:, None], train[1]), (query[1][:, None], query[1]))
    with pytest.raises(ValueError, match="damping: expected a number above 0, got 0"):
        influence(net, train, query, preconditioner=GaussNewton(0))
    with pytest.raises(ValueError, match="size: expected an integer of at least 1, got 0"):
        GradientRing(0, 0.1)
