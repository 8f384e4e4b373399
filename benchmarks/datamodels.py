"""Do influence scores foretell training on other cells? The linear datamodelling score on the taxi fares.

Networks are trained on random halves of the training cells. Over these halves, the loss at a query cell is correlated
(Spearman) with minus the sum of the scores of the cells that were in the half; the mean over query cells is the score.
All networks train at once, each parameter with the networks first. Gradients are never formed: with δ what comes back
to a layer and h what goes in, two rows' gradients have the product ``sum over layers of (h·h' + 1) (δ·δ')``, and for
embeddings the products of δ where labels agree. So a network's scores are exact, in seconds.

References
----------
Park, Georgiev, Ilyas, Leclerc, Madry (2023), "TRAK: Attributing Model Behavior at Scale", ICML, for the score and for
averages over networks. Pruthi, Liu, Kale, Sundararajan (2020), "Estimating Training Data Influence by Tracing Gradient
Descent", NeurIPS, for sums over checkpoints.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import relu

from benchmarks.completion import load_cells
from benchmarks.datasets import Floats

__all__ = ["Cells", "correlations", "datamodel_lines", "initial", "kernels", "predict", "scores", "train"]

WIDTHS = (96, 128, 128, 32)
BATCH = 256
RATE = 1e-3
AT_A_TIME = 25  # networks
DAMPINGS = (1e-3, 3e-3, 1e-2)  # in mean squared norms of the gradients
CHOOSE = 200  # query cells that choose the damping; the others are reported

Parameters = dict[str, Tensor]


class Cells(NamedTuple):
    """Rows of the tables of embeddings (n, K), one table for all modes, and standardised values (n,)."""

    labels: Tensor
    values: Tensor


def datamodel_lines(folder: Path, n_halves: int, n_networks: int, epochs: int, checkpoints: Sequence[int]) -> list[str]:
    """Markdown lines: scores from one network and from several, and what noise allows."""
    train_cells, query, n_labels = _taxi(folder)
    n = len(train_cells.values)
    generator = torch.Generator().manual_seed(1)
    halves = torch.stack([torch.randperm(n, generator=generator)[: n // 2] for _ in range(n_halves)])
    inside = torch.zeros(n_halves, n).scatter_(1, halves, 1.0)
    losses = []
    for seed in (2, 3):  # the same halves twice, from other starts and in another order
        found = _in_groups(train_cells, halves, n_labels, epochs, (epochs,), seed)
        at = torch.cat([predict(parameters, query.labels) for (parameters,) in found])
        losses.append((at - query.values) ** 2)
    everything = torch.arange(n).expand(n_networks, n)
    found = _in_groups(train_cells, everything, n_labels, epochs, checkpoints, 4)
    table: dict[str, list[Tensor]] = {}
    for group in found:
        for m in range(len(group[0]["out"])):
            steps = [{name: value[m : m + 1] for name, value in parameters.items()} for parameters in group]
            for name, score in scores(steps, train_cells, query).items():
                table.setdefault(name, []).append(score)
    return _lines(table, inside, losses)


def _lines(table: dict[str, list[Tensor]], inside: Tensor, losses: list[Tensor]) -> list[str]:
    again = correlations(losses[0], losses[1])[CHOOSE:].mean()
    both = (losses[0] + losses[1]) / 2
    several = len(next(iter(table.values())))
    lines = [
        f"reliability r of a query cell's loss, over two trainings on the same halves: {again:.3f}; what a perfect "
        f"score reaches: sqrt(r) = {math.sqrt(again):.3f} on one training's losses, "
        f"sqrt(2 r / (1 + r)) = {math.sqrt(2 * again / (1 + again)):.3f} on the mean of two",
        "",
        f"| score | one network: on one training's losses | on the mean of two | {several} networks: one | two |",
        "|---|---|---|---|---|",
    ]
    for name, found in _chosen(table, inside, both).items():
        each = [
            [float(correlations(-inside @ score, target)[CHOOSE:].mean()) for target in (losses[0], both)]
            for score in (*found, torch.stack(found).mean(0))
        ]
        one = np.mean(each[:-1], axis=0)
        lines.append(f"| {name} | {one[0]:.3f} | {one[1]:.3f} | {each[-1][0]:.3f} | {each[-1][1]:.3f} |")
    return lines


def _chosen(table: dict[str, list[Tensor]], inside: Tensor, losses: Tensor) -> dict[str, list[Tensor]]:
    """Of the scores with a damping the one that is best on the first query cells."""
    found, best = {}, {}
    for name, several in table.items():
        kind = name.partition(", damping ")[0]
        value = float(correlations(-inside @ torch.stack(several).mean(0), losses)[:CHOOSE].mean())
        if value > best.get(kind, -2.0):
            best[kind], found[kind] = value, (name, several)
    return dict(found.values())


def correlations(a: Tensor, b: Tensor) -> Floats:
    """Spearman's correlation of each column of two matrices."""
    ranks = [rankdata(x.numpy(), axis=0) for x in (a, b)]
    a_, b_ = (x - x.mean(0) for x in ranks)
    return (a_ * b_).sum(0) / np.sqrt((a_**2).sum(0) * (b_**2).sum(0))


def scores(steps: Sequence[Parameters], train_cells: Cells, query: Cells) -> dict[str, Tensor]:
    """What each training cell lowers each query cell's loss by, up to a factor: matrices (n_train, n_query).

    Sums over one network's checkpoints; with curvature, the last checkpoint alone.
    """
    n = len(train_cells.values)
    cells = Cells(*(torch.cat(pair) for pair in zip(train_cells, query, strict=True)))
    last, everything = torch.zeros(2, n, len(query.values))
    for parameters in steps:
        errors, of_last, of_all = kernels(parameters, cells)
        product = errors[:n, None] * errors[n:]
        last, everything = last + product * of_last[:n, n:], everything + product * of_all[:n, n:]
    found = {"output layer": last, "all parameters": everything}
    off, among, across = errors[:n, None], of_all[:n, :n], of_all[:n, n:]
    for damping in DAMPINGS:  # with J the rows of gradients and K = JJ': J (J'J / n + a)^-1 j = (K / n + a)^-1 J j
        found[f"Gauss–Newton, damping {damping:g}"] = off * _solved(among, across, damping) * errors[n:]
        fisher = _solved(off * among * off.T, off * across, damping)
        found[f"empirical Fisher, damping {damping:g}"] = fisher * errors[n:]
    return found


def _solved(K: Tensor, across: Tensor, damping: float) -> Tensor:
    """``(K / n + damping tr K / n)^-1 across``."""
    curvature = K / len(K)
    curvature.diagonal().add_(damping * float(curvature.trace()))
    return torch.cholesky_solve(across, torch.linalg.cholesky(curvature))


def kernels(parameters: Parameters, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    """Errors (n,) of one network, and products (n, n) of predictions' gradients: output layer, all parameters."""
    one = {name: value[:1] for name, value in parameters.items()}
    inputs, outputs = _layers(one, cells.labels)
    last = inputs[-1] @ inputs[-1].T + 1
    back = one["out"][0].T.expand(len(cells.values), -1)  # of the prediction, by the last hidden values
    everything = last.clone()
    for layer in range(len(inputs) - 2, -1, -1):
        back = back * (inputs[layer + 1] > 0)
        everything += (inputs[layer] @ inputs[layer].T + 1) * (back @ back.T)
        back = back @ one[f"weight{layer}"][0].T
    for labels, part in zip(cells.labels.T, back.tensor_split(cells.labels.shape[1], dim=1), strict=True):
        everything += (labels[:, None] == labels) * (part @ part.T)
    return outputs - cells.values, last, everything


def initial(n_networks: int, n_labels: int, n_modes: int, generator: torch.Generator) -> Parameters:
    """Random parameters, networks first."""

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(n_networks, *shape, generator=generator)

    found = {"table": normal(0.1, n_labels, WIDTHS[0] // n_modes)}
    for layer, (fan_in, fan_out) in enumerate(pairwise(WIDTHS)):
        found[f"weight{layer}"] = normal(math.sqrt(2 / fan_in), fan_in, fan_out)
        found[f"shift{layer}"] = normal(0.0, 1, fan_out)
    return found | {"out": normal(1 / math.sqrt(WIDTHS[-1]), WIDTHS[-1], 1), "out_shift": normal(0.0, 1, 1)}


def forward(parameters: Parameters, labels: Tensor) -> Tensor:
    """Predictions (M, B) from rows in the tables (M, B, K)."""
    table = parameters["table"]
    M, B, _ = labels.shape
    place = labels + table.shape[1] * torch.arange(M)[:, None, None]
    hidden = table.flatten(0, 1).index_select(0, place.reshape(-1)).view(M, B, -1)
    for layer in range(len(WIDTHS) - 1):
        hidden = relu(torch.baddbmm(parameters[f"shift{layer}"], hidden, parameters[f"weight{layer}"]))
    return torch.baddbmm(parameters["out_shift"], hidden, parameters["out"]).squeeze(-1)


@torch.no_grad()
def predict(parameters: Parameters, labels: Tensor) -> Tensor:
    """Predictions (M, n) at rows of the tables (n, K)."""
    M = len(parameters["out"])
    return torch.cat([forward(parameters, part.expand(M, *part.shape)) for part in labels.split(BATCH)], dim=1)


def _layers(one: Parameters, labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """What goes into each layer of one network, (n, width), and its predictions (n,)."""
    inputs = [one["table"][0][labels].flatten(1)]
    for layer in range(len(WIDTHS) - 1):
        inputs.append(relu(inputs[-1] @ one[f"weight{layer}"][0] + one[f"shift{layer}"][0]))
    return inputs, (inputs[-1] @ one["out"][0] + one["out_shift"][0]).squeeze(1)


def train(
    parameters: Parameters, cells: Cells, rows: Tensor, epochs: int, kept: Sequence[int], generator: torch.Generator
) -> list[Parameters]:
    """Train each network on its rows (M, n) by Adam; parameters after the epochs that are `kept`."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=RATE)
    found, n = [], rows.shape[1]
    for epoch in range(1, epochs + 1):
        order = torch.stack([torch.randperm(n, generator=generator) for _ in rows])
        for batch in rows.gather(1, order).tensor_split(math.ceil(n / BATCH), dim=1):
            loss = (forward(leaves, cells.labels[batch]) - cells.values[batch]).square().mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in kept:
            found.append({name: value.detach().clone() for name, value in leaves.items()})
    return found


def _in_groups(
    cells: Cells, rows: Tensor, n_labels: int, epochs: int, kept: Sequence[int], seed: int
) -> list[list[Parameters]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        train(initial(len(part), n_labels, cells.labels.shape[1], generator), cells, part, epochs, kept, generator)
        for part in rows.split(AT_A_TIME)
    ]


def _taxi(folder: Path) -> tuple[Cells, Cells, int]:
    """Training cells (72 %) and query cells (the test tenth and the rest of the 18 %, up to 700) of split seed 0."""
    X, y = load_cells(folder, "taxi")
    most, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=0)
    inner, validation = train_test_split(np.arange(len(most)), test_size=0.2, random_state=0)
    rows = most[inner]
    query = np.concatenate([most[validation][:CHOOSE], test[:500]])
    sizes = X.max(0) + 1
    labels = torch.from_numpy(X + np.cumsum([0, *sizes[:-1]]))
    values = torch.from_numpy((y - y[rows].mean()) / y[rows].std()).float()
    return Cells(labels[rows], values[rows]), Cells(labels[query], values[query]), int(sizes.sum())
