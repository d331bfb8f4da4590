"""Joint: low-rank, `W_i' = B_i A`, with one A for weights that read one input, and one product with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from eckart.forms.base import copy_into
from eckart.forms.linear import Block
from eckart.forms.lowrank import LowRank
from eckart.forms.shared_product import shared_product
from eckart.linalg import Factorization, Problem, factorize_stacked


class Joint(LowRank):
    """`h = A x`, `y_i = B_i h + b_i`: queries, keys and values, or gate and up, of one input x.

    Stored as k n numbers once for a group and k m_i for each weight of it; computed likewise, k n multiply-adds once
    for an input and k m_i for each (:mod:`eckart.forms.shared_product`). That `first` of all is one parameter is said
    by the plan (`basis`), the checkpoint's ties and :func:`eckart.model.share_parameters`.

    A holds what several weights need, so k may be larger than m_i.
    """

    form: ClassVar[str] = "joint"
    paper: ClassVar[str] = "Eckart & Young 1936, for weights stacked under the block-diagonal metric of their outputs"
    use: ClassVar[str] = (
        "Queries, keys and values, or gate and up: weights that read one input. The default takes it wherever "
        "it is predicted to lose less than separate factors."
    )
    shared_parameter: ClassVar[str | None] = "first.weight"
    shared_by: ClassVar[str] = "input"

    @classmethod
    def full_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """n: with an input factor of the whole space any weights can be held."""
        return in_features

    @classmethod
    def shared_elements(cls, in_features: int, rank: int) -> int:
        """k n, the numbers of A."""
        return rank * in_features

    @classmethod
    def solve_group(cls, problem: Problem, heights: Sequence[int], limit: int, what: str) -> list[Factorization]:
        """One input factor for all, exactly: :func:`eckart.linalg.factorize_stacked`."""
        return [found.kept(limit) for found in factorize_stacked(problem, heights, what)]

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Fill the factors as they are: one A for all members. The solver has evened their norms."""
        copy_into(self.first.weight, right, "joint input factor")
        copy_into(self.second.weight, left, "output factor of a joint group")
        if bias is not None:
            copy_into(self.second.bias, bias, "bias")
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        return self.second(shared_product(self.first, x, self.sharers))
