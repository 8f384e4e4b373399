"""Ridge regressions of all labels of a mode at once: by conjugate gradients, or exactly.

Cells ``n`` have labels ``i_n = (i_1, …, i_N)``, values and weights ``w_n``. Mode ``k`` has a table ``X``, one row a
label: its factors, and its effect where there are effects. A cell's predictor is linear in its row of the table, with
the design ``z_n = (u_1[i_1] * … without mode k …, 1)``. The rows of ``X`` are ridge regressions apart from each other,

    minimise over x_i:  sum_{n of i} w_n (e_n + z_n . (x_i^old - x_i))^2 + x_i . L_i x_i,    L_i diagonal,

with normal matrices ``A_i = sum w_n z_n z_n' + L_i`` and residuals ``e_n``. `solve_exactly` forms ``A_i``:
``O(nnz R^2 + rows R^3)``. `solve_by_gradients` does not: an inner step multiplies by ``A_i`` for all rows in two passes
over the cells, ``t_n = z_n . d_i`` (a product of dense matrices at given cells) and ``sum_n w_n t_n z_n`` (a sparse
matrix times a dense one): ``O(nnz R)``. It starts from the table as it is: what it leaves undone the next sweep goes on
with.

The preconditioner is one small matrix for all rows: ``A_i`` is near ``W_i S + c_i L`` where row ``i`` sees designs as
others do, with ``W_i`` its summed weights and ``S`` the mean of ``z z'``. With ``Q' S Q = D`` and ``Q' L Q = 1`` its
inverse is ``Q (W_i D + c_i)^-1 Q'`` for every row. It makes the steps independent of the basis of the factors, so that
orthogonal factors (QR) between half sweeps would change nothing but rounding.

References
----------
Gu, Song, Yin, Zhang (2023), "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time",
for alternating regressions that need only be approximate; theirs are sketched and preconditioned. Hestenes, Stiefel
(1952), "Methods of Conjugate Gradients for Solving Linear Systems". Pilászy, Zibriczky, Tikk (2010), "Fast ALS-based
Matrix Factorization for Explicit and Implicit Feedback Datasets", RecSys, for a few inner steps from the old factors.
"""

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from probtensor.comm import Comm

__all__ = [
    "Designs",
    "Ridge",
    "View",
    "make_view",
    "predictor",
    "second_moment",
    "solve_by_gradients",
    "solve_exactly",
    "whiten",
]

PIECE = 2**22  # numbers of designs that are in memory at a time
BLOCK = 2**19  # numbers that all steps of some labels work on, so that they stay in the cache
FEWER = 0.7  # share of the cells below which the others are left out of further steps
SEGMENT = 8, 256  # cells of a row that are multiplied at a time, at least and at most


class View(NamedTuple):
    """Cells of this rank in the order of one mode's labels.

    Attributes
    ----------
    order : Tensor, shape (n,), int64
        Where each cell stands among the rank's.
    ends : Tensor, shape (size + 1,), int64
        Cells of label ``i`` are those from ``ends[i]`` to ``ends[i + 1]``.
    others : Tensor, shape (N - 1, n), int64
        Labels of the other modes.
    weight : Tensor, shape (n,), or None
        None: all ones.
    n_cells : Tensor, shape (size,), int64
        Cells of each label, over all ranks.
    total : Tensor, shape (size,)
        Their summed weights.
    comm : Comm
    """

    order: Tensor
    ends: Tensor
    others: Tensor
    weight: Tensor | None
    n_cells: Tensor
    total: Tensor
    comm: Comm

    def weighted(self, numbers: Tensor) -> Tensor:
        """Numbers (n,) times the weights."""
        return numbers if self.weight is None else self.weight * numbers

    def blocks(self, width: int) -> Iterator[tuple[int, int, "View"]]:
        """Labels from one to another that have few numbers together, and their cells: alike on all ranks."""
        per_cell = width if len(self.others) > 1 else 1  # of two modes, designs are rows of a table
        block = (self.n_cells.cumsum(0) - self.n_cells) * per_cell // BLOCK
        bounds = [0, *(block.diff().nonzero()[:, 0] + 1).tolist(), len(self.n_cells)]
        ends = self.ends[torch.tensor(bounds, device=self.ends.device)].tolist()
        for (low, high), (first, end) in zip(pairwise(bounds), pairwise(ends), strict=True):
            weight = None if self.weight is None else self.weight[first:end]
            cells = self.order[first:end], self.ends[low : high + 1] - first, self.others[:, first:end], weight
            yield low, high, View(*cells, self.n_cells[low:high], self.total[low:high], self.comm)


class Ridge(NamedTuple):
    """Penalties ``scale_i * strength_r`` on the squares of a table's entries.

    Attributes
    ----------
    strength : Tensor, shape (R,)
        Above 0.
    scale : Tensor, shape (size,)
        Above 0.
    """

    strength: Tensor
    scale: Tensor

    def of(self, table: Tensor) -> Tensor:
        """The penalties' slopes, (size, R), halved."""
        return self.scale[:, None] * (table * self.strength)


def make_view(labels: Tensor, mode: int, size: int, weight: Tensor | None, comm: Comm) -> View:
    """The order of cells at labels (n, N), int64, by one mode's."""
    order = torch.argsort(labels[:, mode], stable=True)
    counts = torch.bincount(labels[:, mode], minlength=size)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sorted_weight = None if weight is None else weight[order]
    total = counts.double() if sorted_weight is None else torch.segment_reduce(sorted_weight, "sum", offsets=ends)
    columns = torch.stack([labels[:, k][order] for k in range(labels.shape[1]) if k != mode])
    return View(order, ends, columns, sorted_weight, comm.sum(counts), comm.sum(total), comm)


def predictor(factors: Sequence[Tensor], effects: Sequence[Tensor], labels: Tensor) -> Tensor:
    """What is predicted at labels (n, N): the products' sum and the effects."""
    found = torch.zeros(len(labels), dtype=factors[0].dtype, device=labels.device)
    step = max(1, PIECE // (factors[0].shape[1] + 1))
    for first in range(0, len(labels), step):
        columns = labels[first : first + step].T
        product = factors[0][columns[0]]
        for factor, column in zip(factors[1:], columns[1:], strict=True):
            product *= factor[column]
        found[first : first + step] = product.sum(dim=1)
    for effect, column in zip(effects, labels.T, strict=False):
        found += effect[column]
    return found


class _Piece(NamedTuple):
    """Cells from ``first`` to ``end``, of labels from ``low`` on: where each stands in the dense matrix of designs."""

    first: int
    end: int
    low: int
    ends: Tensor
    column: Tensor
    designs: Tensor

    def pattern(self, numbers: Tensor) -> Tensor:
        """Numbers (end - first,) as a sparse matrix, a row a label."""
        shape = len(self.ends) - 1, len(self.designs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch calls CSR matrices a beta
            return torch.sparse_csr_tensor(self.ends, self.column, numbers, shape, check_invariants=False)


class Designs:
    """The designs ``z_n`` of a view's cells, and products with them; of many cells of three modes or more, made anew.

    Parameters
    ----------
    view : View
    tables : sequence of Tensor, shape (size, R)
        Factors of the other modes.
    with_effects : bool
        Whether a column of ones follows.
    """

    def __init__(self, view: View, tables: Sequence[Tensor], with_effects: bool) -> None:
        self.view, self._tables, self._with_effects = view, tables, with_effects
        self.width = tables[0].shape[1] + with_effects
        self._kept: list[_Piece] | None = None
        n_entries = (len(view.ends) - 1) * len(tables[0])
        if len(tables) == 1 and len(view.order) <= n_entries:  # sparse patterns have no more entries than the matrix
            whole = _with_one(tables[0]) if with_effects else tables[0]
            self._kept = [_Piece(0, len(view.order), 0, view.ends, view.others[0], whole)]
        elif len(view.order) * self.width <= PIECE:
            self._kept = list(self._pieces())

    def pull(self, numbers: Tensor) -> Tensor:
        """``sum_n numbers_n z_n`` of each label over the cells of all ranks, (size, R), from numbers (n,)."""
        mine = numbers.new_zeros(len(self.view.ends) - 1, self.width)
        for piece in self._pieces():
            product = piece.pattern(numbers[piece.first : piece.end]) @ piece.designs
            mine[piece.low : piece.low + len(product)] += product
        return self.view.comm.sum(mine)

    def push(self, table: Tensor) -> Tensor:
        """``z_n . x_i`` of each cell, (n,), from a table (size, R)."""
        found = table.new_zeros(len(self.view.order))
        for piece in self._pieces():
            rows = table[piece.low : piece.low + len(piece.ends) - 1]
            zero = piece.pattern(found[piece.first : piece.end])
            product = torch.sparse.sampled_addmm(zero, rows, piece.designs.T, beta=0.0)
            found[piece.first : piece.end] = product.values()
        return found

    def of(self, cells: Tensor | slice) -> Tensor:
        """Designs (m, R) of some cells."""
        found = self._tables[0].index_select(0, self.view.others[0, cells])
        for table, column in zip(self._tables[1:], self.view.others[1:], strict=True):
            found *= table.index_select(0, column[cells])
        return _with_one(found) if self._with_effects else found

    def take(self, rows: Tensor) -> "tuple[Designs, Tensor]":
        """Those of some labels (size,), bool, and where their cells were, (m,)."""
        view, counts = self.view, self.view.ends.diff()
        cells = torch.repeat_interleave(rows, counts).nonzero()[:, 0]
        ends = torch.cat([counts.new_zeros(1), counts[rows].cumsum(0)])
        weight = None if view.weight is None else view.weight[cells]
        part = View(
            view.order[cells], ends, view.others[:, cells], weight, view.n_cells[rows], view.total[rows], view.comm
        )
        return Designs(part, self._tables, self._with_effects), cells

    def _pieces(self) -> Iterator[_Piece]:
        if self._kept is not None:
            yield from self._kept
            return
        view, n = self.view, len(self.view.order)
        step = max(1, PIECE // self.width)
        for first in range(0, n, step):
            end = min(first + step, n)
            bounds = torch.tensor([first, end - 1], device=view.ends.device)
            low, high = (torch.searchsorted(view.ends, bounds, right=True) - 1).tolist()
            ends = view.ends[low : high + 2].clamp(first, end) - first
            column = torch.arange(end - first, device=view.ends.device)
            yield _Piece(first, end, low, ends, column, self.of(slice(first, end)))


def _with_one(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_ones(len(table), 1)], dim=1)


def second_moment(tables: Sequence[Tensor], totals: Sequence[Tensor], with_effects: bool) -> Tensor:
    """``S``, (R, R): mean of ``z z'`` over the cells, exact for two modes; for more, as if modes were independent.

    Parameters
    ----------
    tables : sequence of Tensor, shape (size, R)
        Factors of the other modes.
    totals : sequence of Tensor, shape (size,)
        Summed weights of their labels.
    with_effects : bool
        Whether a column of ones follows.
    """
    width = tables[0].shape[1] + with_effects
    found = torch.ones(width, width, dtype=totals[0].dtype, device=totals[0].device)
    for table, total in zip(tables, totals, strict=True):
        whole = _with_one(table) if with_effects else table
        found *= whole.T @ (total[:, None] * whole) / total.sum()
    return found


def whiten(second_moment: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """``D``, (R,), and ``Q``, (R, R): of ``Q' S Q = D`` and ``Q' L Q = 1``, with the diagonal (R,) of ``L``."""
    root = strength.rsqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * second_moment * root)
    return values.clamp(min=0), root[:, None] * vectors


def solve_by_gradients(
    designs: Designs,
    table: Tensor,
    residual: Tensor,
    ridge: Ridge,
    whitened: tuple[Tensor, Tensor],
    n_inner: int,
    inner_tol: float,
) -> tuple[Tensor, Tensor]:
    """Preconditioned conjugate gradients from a table towards its regressions, for all rows at once.

    Rows that have come near enough are left; the cells of the others are what a further step costs.

    Parameters
    ----------
    designs : Designs
    table : Tensor, shape (size, R)
    residual : Tensor, shape (n,)
        What the table leaves of the values, in the view's order.
    ridge : Ridge
    whitened : tuple of Tensor, shape (R,), (R, R)
        `whiten` of the second moment; of any positive semidefinite matrix is right, of a good one fast.
    n_inner : int
        Steps at most.
    inner_tol : float
        Share of the squared gradient, in the preconditioner's norm, at which a row is left.

    Returns
    -------
    table : Tensor, shape (size, R)
    residual : Tensor, shape (n,)
    """
    values, basis = whitened
    inverse = 1 / (designs.view.total[:, None] * values + ridge.scale[:, None])

    def precondition(left: Tensor, inverse: Tensor) -> Tensor:
        return (left @ basis * inverse) @ basis.T

    table, residual = table.clone(), residual.clone()
    working: tuple[Tensor, Tensor] | None = None  # rows and cells that are worked on; None: all
    left = designs.pull(designs.view.weighted(residual)) - ridge.of(table)
    direction = precondition(left, inverse)
    slope = (left * direction).sum(dim=1)
    enough = inner_tol * slope
    for step in range(n_inner):
        along = designs.push(direction)
        product = designs.pull(designs.view.weighted(along)) + ridge.of(direction)
        bend = (direction * product).sum(dim=1)
        length = torch.where(bend > 0, slope / bend, 0.0)
        move, change = length[:, None] * direction, torch.repeat_interleave(length, designs.view.ends.diff()) * along
        if working is None:
            table += move
            residual -= change
        else:
            table.index_add_(0, working[0], move)
            residual.index_add_(0, working[1], change, alpha=-1)
        left = left - length[:, None] * product
        better = precondition(left, inverse)
        before, slope = slope, (left * better).sum(dim=1)
        active = slope > enough
        if step == n_inner - 1 or not active.any():
            break
        direction = better + torch.where(before > 0, slope / before, 0.0)[:, None] * direction
        if designs.view.total[active].sum() < FEWER * designs.view.total.sum():
            kept = active.nonzero()[:, 0]
            designs, places = designs.take(active)
            working = (kept, places) if working is None else (working[0][kept], working[1][places])
            left, direction, inverse = left[kept], direction[kept], inverse[kept]
            slope, enough, ridge = slope[kept], enough[kept], ridge._replace(scale=ridge.scale[kept])
    return table, residual


def solve_exactly(designs: Designs, table: Tensor, residual: Tensor, ridge: Ridge) -> tuple[Tensor, Tensor]:
    """The regressions' solutions by normal matrices and Cholesky factors.

    Rows are cut into segments of one length, the last of each filled up with zeros, so that many small products are
    one batched one.

    Parameters
    ----------
    designs, table, residual, ridge
        See `solve_by_gradients`.
    """
    view, (size, R) = designs.view, table.shape
    device, n = table.device, len(view.order)
    left = designs.pull(view.weighted(residual)) - ridge.of(table)
    length = min(max(n // max(2 * size, 1), SEGMENT[0]), SEGMENT[1])
    n_segments = (view.ends.diff() + length - 1) // length
    row = torch.repeat_interleave(n_segments)
    number = torch.arange(len(row), device=device) - (n_segments.cumsum(0) - n_segments)[row]
    begin, end, at = view.ends[row] + length * number, view.ends[row + 1], torch.arange(length, device=device)
    gram = table.new_zeros(size, R, R)
    for some in torch.split(torch.arange(len(row), device=device), max(1, PIECE // (4 * R * max(R, length)))):
        cell = begin[some, None] + at
        inside = cell < end[some, None]
        cell = cell.clamp(max=n - 1)
        z = designs.of(cell.reshape(-1)).reshape(len(some), length, R)
        z *= (inside.to(z) if view.weight is None else inside * view.weight[cell].sqrt())[:, :, None]
        gram.index_add_(0, row[some], torch.bmm(z.transpose(1, 2), z))
    gram = view.comm.sum(gram)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.scale[:, None] * ridge.strength)
    move = torch.cholesky_solve(left[:, :, None], torch.linalg.cholesky(gram))[:, :, 0]
    return table + move, residual - designs.push(move)
