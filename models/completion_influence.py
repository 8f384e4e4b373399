"""What each row does to a neural completion's loss on others: the members of its ensembles as modules.

References
----------
Oh, Kim, Rossi, Kumar (2021), "Influence-guided Data Augmentation for Neural Tensor Completion", CIKM, equation 2, for
influences summed over checkpoints of the training.
"""

from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from probtensor.inference.influence import Preconditioner, influence
from probtensor.models.completion_fit import Fitted, link_offset
from probtensor.models.completion_groups import Group, head_features
from probtensor.models.completion_links import inverse_link
from probtensor.models.completion_network import Kind, Parameters, before_output, output_name, places

__all__ = ["Member", "row_influence"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Member(nn.Module):
    """One member of an ensemble, over the numbers of given rows.

    Parameters
    ----------
    kind : Kind
    parameters : dict of str to Tensor
        Without the members' dimension.
    labels : Tensor, shape (n, K), int64
    features : Tensor, shape (n, n_features), or None
    offset : Tensor, shape (n,), or None
        What the member adds to, where the likelihood is not Gaussian.
    """

    labels: Tensor
    features: Tensor | None
    offset: Tensor | None

    def __init__(
        self, kind: Kind, parameters: Parameters, labels: Tensor, features: Tensor | None, offset: Tensor | None = None
    ) -> None:
        super().__init__()
        self._kind = kind
        last = output_name(kind)
        self.own = nn.ParameterDict({name: value for name, value in parameters.items() if name != last})
        if last is not None:
            self.output = nn.Linear(len(parameters[last]), 1, bias=False, device=labels.device)
            self.output.weight = nn.Parameter(parameters[last].T)
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """What the member adds to the offset, or with a known offset the sum, (n,), at rows of these numbers (n,)."""
        own = {name: value[None] for name, value in self.own.items()}
        features = None if self.features is None else self.features[rows][None]
        out, hidden = before_output(self._kind, own, places(self._kind, self.labels[rows], 1), features)
        if hidden is not None:
            out = out + self.output(hidden).squeeze(-1)
        return out[0] if self.offset is None else out[0] + self.offset[rows]


def member_state(kind: Kind, parameters: Parameters, number: int) -> Parameters:
    """The parameters of one member, as `Member.state_dict` names them."""
    last = output_name(kind)
    return {
        "output.weight" if name == last else f"own.{name}": value[number].T if name == last else value[number]
        for name, value in parameters.items()
    }


def row_influence(
    fitted: Fitted,
    labels: IntArray,
    smooth: FloatArray,
    values: FloatArray,
    n_query: int,
    *,
    parameters: Literal["last", "all"],
    preconditioner: Preconditioner | None,
) -> FloatArray:
    """Influence (n - n_query,) of the first rows on the summed loss of the last `n_query`, of all members' mean.

    Candidates count as they weigh in the prediction, among those that have networks. What a network adds to is taken as
    it is: effects do not move with a row.

    Parameters
    ----------
    fitted : Fitted
    labels : ndarray, shape (n, K + n_sides), int64
    smooth : ndarray, shape (n, q)
    values : ndarray, shape (n,)
        Standardised where they are Gaussian.
    n_query : int
    parameters, preconditioner
        See `probtensor.inference.influence.influence`.
    """
    n, M = len(labels), fitted.n_members
    pieces = fitted.effects.pieces(labels)[0]
    n_candidates = sum(len(group.best_epoch) for group in fitted.groups) // M
    weights = fitted.weights[len(fitted.weights) - n_candidates :]
    if weights.sum() == 0:
        weights = np.ones_like(weights)
    weights, total, first = weights / weights.sum(), np.zeros(n - n_query), 0
    for group in fitted.groups:
        device = group.parameters["bias"].device
        at = torch.from_numpy(labels[:, : len(group.kind.sizes)]).to(device)
        features = head_features(group.kind, group.on_effects, pieces[None].astype(np.float32), smooth, device)
        added_to, offset = link_offset(fitted, group, pieces), None
        left = values - added_to
        if fitted.likelihood != "gaussian":
            left, offset = values, torch.from_numpy(added_to.astype(np.float32)).to(device)
        target = torch.from_numpy(left.astype(np.float32)).to(device)
        for number in range(len(group.best_epoch)):
            weight = weights[first + number // M] / M
            if weight > 0:
                found = _member_influence(
                    group,
                    number,
                    (at, features, offset),
                    target,
                    n_query,
                    fitted.likelihood,
                    parameters=parameters,
                    preconditioner=preconditioner,
                )
                total += weight * found.double().cpu().numpy()
        first += len(group.best_epoch) // M
    return total


def _member_influence(
    group: Group,
    number: int,
    where: tuple[Tensor, Tensor | None, Tensor | None],
    target: Tensor,
    n_query: int,
    likelihood: str,
    *,
    parameters: Literal["last", "all"],
    preconditioner: Preconditioner | None,
) -> Tensor:
    own = {name: value[number] for name, value in group.parameters.items()}
    labels, features, offset = where
    member = Member(group.kind, own, labels, None if features is None else features[0], offset)
    rows = torch.arange(len(target), device=target.device)
    n = len(target) - n_query
    earlier = [
        (member_state(group.kind, state, number), float(rates[number]))
        for state, rates in group.checkpoints
        if rates[number] > 0
    ]
    final = member_state(group.kind, group.parameters, number)
    rate = float(np.mean([rate for _, rate in earlier])) if earlier else 1.0
    return influence(
        member,
        (rows[:n], target[:n]),
        (rows[n:], target[n:]),
        parameters=parameters,
        preconditioner=preconditioner,
        checkpoints=[*earlier, (final, rate)],
        inverse_link=None if likelihood == "gaussian" else partial(inverse_link, likelihood),
    )
