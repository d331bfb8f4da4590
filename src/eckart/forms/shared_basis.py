"""Shared basis: low-rank, `W_i' = B_i A`, with one A for the weights of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from eckart.forms.base import copy_into
from eckart.forms.linear import Block
from eckart.forms.lowrank import LowRank
from eckart.linalg import Factorization, Problem, shared_basis


class SharedBasis(LowRank):
    """`y = B_i (A x) + b_i`, stored as k n numbers once for all layers that read A, and k m_i for each.

    Wang et al., Basis Sharing, ICLR 2025, arXiv 2410.03765. The module alone is a low-rank one; that `first` of several
    is one parameter is said by the plan (`basis`), the checkpoint's ties and :func:`eckart.model.share_parameters`.
    Products are not shared, for each layer has its own input: k (m_i + n) multiply-adds.

    A holds what several weights need, so k may be larger than m_i.
    """

    form: ClassVar[str] = "shared-basis"
    paper: ClassVar[str] = "Wang et al., ICLR 2025, arXiv 2410.03765"
    use: ClassVar[str] = (
        "Adjacent layers are alike, and stored numbers count more than multiply-adds. --method basis-sharing takes it."
    )
    refits: ClassVar[bool] = False
    shared_parameter: ClassVar[str | None] = "first.weight"

    @classmethod
    def full_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """n: with a basis of the whole space any weights can be held."""
        return in_features

    @classmethod
    def shared_elements(cls, in_features: int, rank: int) -> int:
        """k n, the numbers of A."""
        return rank * in_features

    @classmethod
    def solve_group(cls, problem: Problem, heights: Sequence[int], limit: int, what: str) -> list[Factorization]:
        """One basis for all: :func:`eckart.linalg.shared_basis`."""
        return shared_basis(problem, heights, min(limit, *problem.target.shape), what)

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Fill the factors. The scale of each row of A depends on A alone, so that all layers store the same A.

        It is the square root of the row's norm: as the stacked B_i are orthonormal, it splits each term's norm
        evenly between A and them.
        """
        left, right = left.double(), right.double()
        scale = right.norm(dim=1).clamp(1e-24, 1e24).sqrt()
        copy_into(self.first.weight, right / scale[:, None], "shared basis")
        copy_into(self.second.weight, left * scale, "coefficients of a shared basis")
        if bias is not None:
            copy_into(self.second.bias, bias, "bias")
        return None
