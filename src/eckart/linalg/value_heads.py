"""Fewer directions in the value heads of an attention: which ones, and what reads them then.

Between the values of a head, `v_h = V_h x` (d numbers a token), and what the output projection reads there is nothing
but a weighted sum over tokens, which is linear. So any P_h (r, d) may be put between: the head makes `P_h v_h`, by the
rows `P_h V_h`, and a reader W' (m, heads r) takes the place of W (m, heads d). With P the block-diagonal matrix of all
P_h, the best reader and its error in a metric H of the outputs, C that of what the projection reads, are

    W' = W C P^T (P C P^T)^-1,      || H^(1/2) (W - W' P) C^(1/2) ||_F^2.

The directions of each head are those of the singular value decomposition of `H^(1/2) W_h C_h^(1/2)`, the joint one of
value and output projection with V_h in `C_h = V_h E[x x^T] V_h^T` (x averaged over tokens as the attention does): the
best for a head by itself (Eckart & Young 1936 under two metrics). W' also corrects each head for the others.

One orthogonal matrix a head turns its channels so that the first r of them are the best r, for every r at once; the
rest is what taking whole neurons away is: see :mod:`eckart.linalg.slice`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg.decompose import checked_eigh, require_finite
from eckart.linalg.metric import Metric
from eckart.linalg.slice import Slicing, slice_in_order
from eckart.linalg.solve import Problem


@dataclass(frozen=True)
class NarrowedHeads:
    """The directions of every value head in the order in which they are worth keeping, for every width.

    Attributes:
        turns: (g, d, d) orthogonal, of each head that is made; its rows are the directions, the best first.
        slicing: of the turned channels that are read, one direction of all heads after another.
        heads: how many heads are read: a multiple of g, those that share values one after another.
    """

    turns: Tensor
    slicing: Slicing
    heads: int

    @property
    def curve(self) -> Tensor:
        """(d + 1,) squared error with 0, 1, ..., d directions a head, float64; the last entry is 0."""
        return self.slicing.curve[:: self.heads]

    def narrowed(self, width: int) -> tuple[Tensor, Tensor]:
        """The directions of every head, P (g, r, d), and the weight that reads them, W' (m, heads r).

        Raises:
            ValueError: for less than one, or more than there are.
        """
        _, weight = self.slicing.corrected(width * self.heads)
        return self.turns[:, :width], weight


def narrow_heads(problem: Problem, heads: int, made: int, what: str = "weight") -> NarrowedHeads:
    """Order the directions of the value heads that a weight reads, and correct it for those that go.

    Args:
        problem: the weight W (m, heads d) as its target, H (m, m) the metric of its outputs, C (heads d, heads d) that
            of its inputs. A singular C gets a relative floor. Computed in float64.
        heads: how many heads it reads.
        made: g, how many are made; `heads / g` neighbours share the values of one, and so its directions. What is best
            for them is then found with the mean of their C_h.
        what: the site's name, used in errors and notes.

    Returns:
        Directions, curve and corrections of every width.

    Raises:
        NumericalError: if the weight or a metric is not finite.
    """
    require_finite(problem.target, what)
    weight = problem.target.detach().double()
    full = problem.right.dense(torch.float64).to(weight.device) if not problem.right.is_identity else None
    right = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device) if full is None else full
    require_finite(right, f"{what}: metric of its inputs")
    width = weight.shape[1] // heads
    own = _own_blocks(weight.mT @ problem.left.times(weight), heads, width).unflatten(0, (made, -1)).sum(1)
    seen = _own_blocks(right, heads, width).unflatten(0, (made, -1)).mean(1)
    turns = torch.stack([_directions(k, c, what) for k, c in zip(own, seen, strict=True)])
    # As if turned channels were what is read: W P^T and P C P^T, every P_h orthogonal and of full size.
    turn = torch.block_diag(*turns.repeat_interleave(heads // made, 0))
    order = torch.arange(heads * width, device=weight.device).unflatten(0, (heads, width)).T.flatten()
    turned = Problem(weight @ turn.mT, problem.left, Metric(full=turn @ right @ turn.mT))
    return NarrowedHeads(turns, slice_in_order(turned, order, what), heads)


def _own_blocks(matrix: Tensor, heads: int, width: int) -> Tensor:
    """The diagonal blocks of a matrix (heads d, heads d), as (heads, d, d)."""
    return matrix.unflatten(0, (heads, width)).unflatten(2, (heads, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _directions(own: Tensor, seen: Tensor, what: str) -> Tensor:
    """Orthonormal rows, the first r of which span the best r directions, for every r.

    With V the eigenvectors of `C^(1/2) K C^(1/2)`, `K = W^T H W`, they are the rows of `V^T C^(-1/2)`; so are, but for
    their lengths, those of `V^T C^(1/2) K`, which inverts nothing. The QR decomposition fills up with any others.
    """
    values, vectors, _ = checked_eigh(seen, f"{what}: metric of the values of a head")
    root = vectors * values.sqrt() @ vectors.mT
    _, best, _ = checked_eigh(root @ own @ root, f"{what}: values of a head")
    return torch.linalg.qr(own @ root @ best).Q.mT.contiguous()
