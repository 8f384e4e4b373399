"""Networks over the labels of a tensor's modes, many members at once: every parameter has the members first.

A member predicts

    ``sum_k b_k[i_k] + sum_r g_r (prod_k (1 + c_k[i_k, r]) - 1 - sum_k c_k[i_k, r]) + head(e_1[i_1], ..., e_K[i_K])``

on top of an offset: effects of labels, interactions of rank ``R`` between any number of modes (with two modes this is
plain matrix factorization), and a network of embeddings. Biases, gates ``g`` and the network's last layer start at
zero, so that a member starts at the offset.

References
----------
Liu, Li, Tsang, Liu (2019), "CoSTCo: A Neural Tensor Completion Model for Sparse Tensors", KDD. Rendle (2010),
"Factorization Machines", ICDM, for interactions without main effects.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu

from probtensor.models.completion_links import deviances

__all__ = [
    "Batch",
    "Kind",
    "Rows",
    "before_output",
    "fill_unknown",
    "forward",
    "initial",
    "output_name",
    "places",
    "predict",
    "row_losses",
]

Parameters = dict[str, Tensor]

CHUNK = 2**24  # numbers in the largest temporary of a prediction


class Kind(NamedTuple):
    """What the members of one batch have; `sizes` are the modes' labels, one more each for an unknown label.

    Attributes
    ----------
    sizes : tuple of int
    rank : int
        Of the interactions; 0: none.
    head : str or None
        "mlp", "costco" or None.
    width : int
        Of the embeddings.
    hidden : tuple of int
        Widths of the head's layers.
    n_features : int
        Numbers known of a row, inputs of the head beside the embeddings.
    """

    sizes: tuple[int, ...]
    rank: int
    head: str | None
    width: int
    hidden: tuple[int, ...]
    n_features: int = 0


class Batch(NamedTuple):
    """Rows of each member: labels (M, B, K), features (M, B, q), targets, weights and offsets (M, B)."""

    labels: Tensor
    features: Tensor | None
    target: Tensor
    weight: Tensor
    offset: Tensor | None = None


def initial(kind: Kind, n_members: int, generator: torch.Generator, dtype: torch.dtype) -> Parameters:
    """Random parameters, on the CPU."""

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(n_members, *shape, generator=generator, dtype=dtype)

    K, rows = len(kind.sizes), sum(size + 1 for size in kind.sizes)
    parameters = {"bias": normal(0.0, rows, 1)}
    if kind.rank and K > 1:
        parameters["factor"], parameters["gate"] = normal(0.1, rows, kind.rank), normal(0.0, kind.rank, 1)
    if kind.head is None:
        return parameters
    parameters["embedding"] = normal(0.3, rows, kind.width)
    widths = [K * kind.width + kind.n_features, *kind.hidden]
    if kind.head == "costco":
        channels = kind.hidden[0]
        parameters["across"], parameters["across_bias"] = (
            normal(math.sqrt(2 / K), K, channels),
            normal(0.0, 1, channels),
        )
        widths[0] = channels * kind.width + kind.n_features
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        parameters[f"weight{layer}"] = normal(math.sqrt(2 / fan_in), fan_in, fan_out)
        parameters[f"shift{layer}"] = normal(0.0, 1, fan_out)
    parameters["out"] = normal(0.0, widths[-1], 1)
    return parameters


def forward(kind: Kind, parameters: Parameters, labels: Tensor, features: Tensor | None) -> Tensor:
    """What members add to the offset, (M, B).

    Parameters
    ----------
    kind : Kind
    parameters : dict of str to Tensor, members first
    labels : Tensor, shape (M, B, K), int64
        Rows in the tables of parameters, of all members one after the other.
    features : Tensor, shape (M, B, n_features), or None
    """
    out, last = before_output(kind, parameters, labels, features)
    name = output_name(kind)
    return out if last is None or name is None else out + torch.bmm(last, parameters[name]).squeeze(-1)


def output_name(kind: Kind) -> str | None:
    """The parameter that the last layer multiplies by: that of the head, else the gates of the interactions."""
    if kind.head is not None:
        return "out"
    return "gate" if kind.rank and len(kind.sizes) > 1 else None


def before_output(
    kind: Kind, parameters: Parameters, labels: Tensor, features: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What does not go through the last layer, (M, B), and what goes into it, (M, B, width); see `forward`."""
    M, B, K = labels.shape

    def look_up(name: str) -> Tensor:  # (M, B, K, width)
        table = parameters[name]
        return table.flatten(0, 1).index_select(0, labels.reshape(-1)).view(M, B, K, -1)

    out = look_up("bias").sum(dim=2).squeeze(-1)
    if "factor" in parameters:
        factor = look_up("factor")
        product = 1 + factor[:, :, 0]
        for k in range(1, K):
            product = product * (1 + factor[:, :, k])
        product = product - 1 - factor.sum(dim=2)
        if kind.head is None:
            return out, product
        out = out + torch.bmm(product, parameters["gate"]).squeeze(-1)
    if kind.head is None:
        return out, None
    hidden = look_up("embedding")
    if kind.head == "costco":
        mixed = torch.matmul(hidden.transpose(2, 3).flatten(1, 2), parameters["across"]) + parameters["across_bias"]
        hidden = relu(mixed).view(M, B, -1)
    else:
        hidden = hidden.flatten(2)
    if features is not None:
        hidden = torch.cat([hidden, features], dim=2)
    layer = 0
    while f"weight{layer}" in parameters:
        hidden = relu(torch.baddbmm(parameters[f"shift{layer}"], hidden, parameters[f"weight{layer}"]))
        layer += 1
    return out, hidden


def places(kind: Kind, labels: Tensor, n_members: int) -> Tensor:
    """Rows (M, n, K) in the tables of all members, from labels (n, K) or (M, n, K); -1 is an unknown label."""
    first = torch.tensor([0, *(size + 1 for size in kind.sizes)], device=labels.device).cumsum(0)
    unknown = torch.tensor(kind.sizes, device=labels.device)
    row = torch.where(labels < 0, unknown, labels) + first[:-1]
    member = torch.arange(n_members, device=labels.device)[:, None, None] * int(first[-1])
    return row + member


def predict(kind: Kind, parameters: Parameters, labels: Tensor, features: Tensor | None) -> Tensor:
    """What each member adds to the offset, (M, n), at labels (n, K) and features (F, n, n_features)."""
    M = len(parameters["bias"])
    widest = max([len(kind.sizes) * max(kind.width, kind.rank, 1) * 2, *kind.hidden])
    if kind.head == "costco":
        widest = max(widest, kind.width * kind.hidden[0])
    step = max(CHUNK // (M * widest), 1)
    parts = []
    for first in range(0, len(labels), step):
        part = places(kind, labels[first : first + step], M)
        known = None
        if features is not None:
            known = features[:, first : first + step].repeat(M // len(features), 1, 1)
        parts.append(forward(kind, parameters, part, known))
    return torch.cat(parts, dim=1) if parts else parameters["bias"].new_zeros(M, 0)


class Rows(NamedTuple):
    """Training rows: labels (n, K), features (F, n, n_features) or None, targets (F, n), weights (n,).

    Member ``m`` has the features, targets and offsets of fold ``m % F``. Gaussian targets are what the offset leaves;
    with another likelihood targets are the values, and `offset` (F, n) is added to what members predict.
    """

    labels: Tensor
    features: Tensor | None
    target: Tensor
    weight: Tensor
    offset: Tensor | None = None
    likelihood: str = "gaussian"

    def take(self, rows: Tensor) -> Batch:
        """The rows (M, B) of each member."""
        fold = (torch.arange(len(rows), device=rows.device) % len(self.target))[:, None]
        features = None if self.features is None else self.features[fold, rows]
        offset = None if self.offset is None else self.offset[fold, rows]
        return Batch(self.labels[rows], features, self.target[fold, rows], self.weight[rows], offset)


def row_losses(kind: Kind, parameters: Parameters, batch: Batch, likelihood: str = "gaussian") -> Tensor:
    """Deviance of each row of a batch, (M, B); the squared error of Gaussian values."""
    eta = forward(kind, parameters, places(kind, batch.labels, len(batch.target)), batch.features)
    return deviances(likelihood, eta if batch.offset is None else eta + batch.offset, batch.target)


@torch.no_grad()
def fill_unknown(kind: Kind, parameters: Parameters, seen: Tensor) -> Parameters:
    """Give labels that a member has not seen the mean of those that it has seen of the mode.

    Parameters
    ----------
    kind : Kind
    parameters : dict of str to Tensor, members first
    seen : Tensor, shape (M, rows), bool
        Rows in a member's tables whose label it was trained on.
    """
    filled = dict(parameters)
    tables, first = [name for name in ("bias", "factor", "embedding") if name in parameters], 0
    for name in tables:
        filled[name] = parameters[name].clone()
    for size in kind.sizes:
        mode = slice(first, first + size + 1)
        known = seen[:, mode, None]
        for name in tables:
            table = parameters[name][:, mode]
            mean = (table * known).sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp(min=1)
            filled[name][:, mode] = torch.where(known, table, mean)
        first += size + 1
    return filled
