"""Pivoted joint: an input factor for weights that read one input, in its fewest numbers, and one gather for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from eckart.forms.base import StoredSize, compute_dtype, copy_into, describe_bad_order
from eckart.forms.linear import Block, FactoredLinear
from eckart.forms.shared_product import shared_product
from eckart.linalg import Factorization, Problem, factorize_stacked, pivoted_factors


class PivotedJoint(FactoredLinear):
    """`h = x_p + D x_r`, `y_i = B_i h + b_i`, x_p k of the inputs and x_r the others: the joint form in fewer numbers.

    After Zhao et al.'s pivoting of rows: k columns of `A = A_p [I D]` are taken into the B_i, the others are a
    combination D (k, n - k) of them, stored once for a group; each weight has k m_i numbers and n column numbers. The
    input is put in order once for all that read it, where pivoted rows put each output in order.

    Pivots are chosen from A alone, as the same for all members.
    """

    form: ClassVar[str] = "pivoted-joint"
    paper: ClassVar[str] = "Zhao et al., ICML 2025, arXiv 2501.19090, of columns, for weights of one input"
    use: ClassVar[str] = (
        "Weights that read one input, where stored numbers count more than speed. --optimise size takes it."
    )
    shared_parameter: ClassVar[str | None] = "first.weight"
    shared_by: ClassVar[str] = "input"
    unshared_form: ClassVar[str] = "pivoted"
    rounded_as: ClassVar[str | None] = "joint"
    order: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, source: str = "linear"
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, source)
        self.first = nn.Linear(in_features - rank, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)
        self.register_buffer("order", torch.arange(in_features, dtype=torch.int32))

    @classmethod
    def size(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> StoredSize:
        """k (m + n - k) numbers and multiply-adds, and the n column numbers of the order."""
        numbers = rank * (out_features + in_features - rank)
        return StoredSize(numbers + in_features, numbers, in_features)

    @classmethod
    def full_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """n: with all inputs as pivots any weights can be held."""
        return in_features

    @classmethod
    def rank_multiple(cls, out_features: int, in_features: int, wanted: int) -> int:
        """One that n - k, the width of D, is a multiple of as well."""
        return math.gcd(wanted, in_features)

    @classmethod
    def shared_elements(cls, in_features: int, rank: int) -> int:
        """k (n - k), the numbers of D."""
        return rank * (in_features - rank)

    @classmethod
    def solve_group(cls, problem: Problem, heights: Sequence[int], limit: int, what: str) -> list[Factorization]:
        """One input factor for all, exactly: :func:`eckart.linalg.factorize_stacked`."""
        return [found.kept(limit) for found in factorize_stacked(problem, heights, what)]

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Choose pivot columns and fill. Never refused: of whatever rank A is, k orthonormal rows span its rows."""
        rows, mixed = torch.linalg.qr(right.double().mT)  # A = mixed^T rows^T, rows (n, k) orthonormal
        found = pivoted_factors(rows, torch.eye(self.rank, dtype=rows.dtype, device=rows.device))
        copy_into(self.first.weight, found.rest.mT, "combination of columns")
        copy_into(self.second.weight, left.double() @ mixed.mT @ found.pivots.mT, "pivot columns")
        with torch.no_grad():
            self.order.copy_(found.order)
        if bias is not None:
            copy_into(self.second.bias, bias, "bias")
        return None

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """B, and `[I D]` in column order."""
        rest = self.first.weight.detach().double()
        eye = torch.eye(self.rank, dtype=rest.dtype, device=rest.device)
        return self.second.weight.detach().double(), torch.cat([eye, rest], dim=1)[:, torch.argsort(self.order)]

    def find_damage(self) -> str | None:
        """The order must name every place once: another index would compute something else without a word."""
        return describe_bad_order(self.order)

    def to_dense(self) -> Tensor:
        """`[B, B D]` in column order."""
        dtype = compute_dtype(self.first.weight.dtype)
        pivots = self.second.weight.to(dtype)
        columns = torch.cat([pivots, pivots @ self.first.weight.to(dtype)], dim=1)
        return columns[:, torch.argsort(self.order)].to(self.first.weight.dtype)

    def dense_bias(self) -> Tensor | None:
        """b."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        return self.second(shared_product(self.first, x, self.sharers, self._hidden))

    def _hidden(self, x: Tensor) -> Tensor:
        """h, (..., k)."""
        pivots, rest = x.index_select(-1, self.order).split([self.rank, self.in_features - self.rank], dim=-1)
        return pivots + self.first(rest)
