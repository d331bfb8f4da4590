"""Kronecker: `W' = sum_i A_i (x) B_i`, two plain Linears on a reshaped input."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.forms.base import StoredSize, compute_dtype, copy_into
from eckart.forms.linear import Block, FactoredLinear
from eckart.linalg import Factorization, Problem, kronecker_curve_under, kronecker_factorize, rearranged_back

FACTORS = (2, 16)
"""Blocks of so many rows or columns are tried beside the balanced one."""


class Kronecker(FactoredLinear):
    """`y = sum_i (A_i (x) B_i) x + b`, stored as r (m1 n1 + m2 n2) numbers for blocks of m2 x n2.

    With x laid out as X (n1, n2), row by row, and y as Y (m1, m2): `Y = sum_i A_i X B_i^T`. The products with all A_i
    are one Linear and those with all B_i another; the cheaper one goes first, and which that is follows from the
    sizes. W' is never formed.

    Attributes:
        rank: r, the number of terms: at most min(m1 n1, m2 n2), where every W' is such a sum.
        block_out: m2, rows of B.
        block_in: n2, columns of B.
    """

    form: ClassVar[str] = "kronecker"
    paper: ClassVar[str] = "Van Loan & Pitsianis 1993"
    use: ClassVar[str] = (
        "You compare with papers on Kronecker products. At equal numbers it lost more than low rank on three of the "
        "four models of the survey."
    )
    sizes: ClassVar[tuple[str, ...]] = (*FactoredLinear.sizes, "block_out", "block_in")
    refits: ClassVar[bool] = False
    weighted_exactly: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        source: str = "linear",
        *,
        block_out: int,
        block_in: int,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, source, (block_out, block_in))
        self.block_out, self.block_in = block_out, block_in
        rows, columns = self._outer
        self.outer_first = _outer_first(out_features, in_features, rank, (block_out, block_in))
        if self.outer_first:  # by all A_i, then by all B_i
            self.first = nn.Linear(columns, rank * rows, bias=False)
            self.second = nn.Linear(rank * block_in, block_out, bias=False)
        else:  # by all B_i, then by all A_i
            self.first = nn.Linear(block_in, rank * block_out, bias=False)
            self.second = nn.Linear(rank * columns, rows, bias=False)
        # Either Linear puts out part of an output's index, so neither can add a number for each.
        self.offset = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def block(self) -> Block:
        """(m2, n2)."""
        return self.block_out, self.block_in

    @property
    def _outer(self) -> tuple[int, int]:
        """(m1, n1)."""
        return self.out_features // self.block_out, self.in_features // self.block_in

    # -- sizes -----------------------------------------------------------------------------------------

    @classmethod
    def blocks(cls, out_features: int, in_features: int) -> tuple[Block, ...]:
        """The balanced block, then f x 1 and 1 x f for f = 2 and 16 where they divide the weight.

        Balanced: of all divisors, those for which a term stores the fewest numbers, m1 n1 + m2 n2, and of these the
        block whose shape is nearest to the weight's. Terms of f x 1 or 1 x f store a share 1 / f of the weight each
        and take the same share of its multiply-adds; all that r of f = 2, 4 or 8 can be, 16 r / f of f = 16 can be.
        """
        found = [_balanced(out_features, in_features)]
        found += [(factor, 1) for factor in FACTORS if out_features % factor == 0]
        found += [(1, factor) for factor in FACTORS if in_features % factor == 0]
        return tuple(dict.fromkeys(found))

    @classmethod
    def full_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """min(m1 n1, m2 n2); of the balanced block where none is given.

        Raises:
            UsageError: if the block does not divide the weight.
        """
        rows, columns = block or _balanced(out_features, in_features)
        if min(rows, columns) < 1 or out_features % rows or in_features % columns:
            raise UsageError(
                f"form {cls.form}: blocks of {rows} x {columns} do not divide a weight of {out_features} x "
                f"{in_features}; choose divisors of its sides."
            )
        inner = rows * columns
        return min(inner, out_features * in_features // inner)

    @classmethod
    def size(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> StoredSize:
        """r (m1 n1 + m2 n2) numbers, and the multiply-adds of the cheaper order; of the balanced block by default."""
        block = block or _balanced(out_features, in_features)
        inner = block[0] * block[1]
        numbers = rank * (out_features * in_features // inner + inner)
        return StoredSize(numbers, min(_multiply_adds(out_features, in_features, rank, block)))

    @classmethod
    def max_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """The largest rank that stores fewer numbers than the dense weight and computes no more; 0 if none does.

        A balanced block is small long before it is fast: at half the numbers of a square weight of 768 it would take
        sixteen times the multiply-adds.
        """
        once = cls.size(out_features, in_features, 1, block).multiply_adds  # r terms take r times as many
        stored = super().max_rank(out_features, in_features, block)
        return min(stored, out_features * in_features // once)

    @classmethod
    def rank_multiple(cls, out_features: int, in_features: int, wanted: int) -> int:
        """1: its rank counts terms, and is the side of no product."""
        return 1

    @classmethod
    def block_arguments(cls, block: Block | None) -> dict[str, Any]:
        """Rows and columns of B."""
        assert block is not None
        return {"block_out": block[0], "block_in": block[1]}

    @classmethod
    def factor_elements(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> int:
        """As many as are stored: the factors are those of the rearranged weight."""
        return cls.size(out_features, in_features, rank, block).parameters

    # -- solving ---------------------------------------------------------------------------------------

    @classmethod
    def solve(cls, problem: Problem, block: Block | None, limit: int, what: str) -> Factorization:
        """The nearest sums of Kronecker products: :func:`eckart.linalg.kronecker_factorize`."""
        assert block is not None
        return kronecker_factorize(problem, block, limit, what)

    @classmethod
    def errors_under(cls, solved: Factorization, problem: Problem, block: Block | None, limit: int) -> Tensor:
        """Squared error of each sum in another problem's metric."""
        assert block is not None
        rows, columns = problem.target.shape
        return kronecker_curve_under(solved, problem, block, (rows, columns), limit)

    @classmethod
    def times(cls, left: Tensor, right: Tensor, vector: Tensor, block: Block | None) -> Tensor:
        """`sum_i (A_i (x) B_i) v` of the rearranged factors."""
        assert block is not None
        shape = (left.shape[0] * block[0] * block[1] // len(vector), len(vector))
        return rearranged_back(left @ right, shape, block) @ vector

    # -- storing ---------------------------------------------------------------------------------------

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Fill the factors, each term's norm split evenly between both sides.

        Args:
            left: (m1 n1, r), the A_i, row by row.
            right: (r, m2 n2), the B_i, row by row.
            bias: (out,) or None.
        """
        left, right = left.double(), right.double()
        ratio = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).clamp(1e-12, 1e12).sqrt()
        outer = (left * ratio).mT.reshape(self.rank, *self._outer)  # (r, m1, n1)
        inner = (right / ratio[:, None]).reshape(self.rank, *self.block)  # (r, m2, n2)
        first, second = (outer, inner) if self.outer_first else (inner, outer)
        copy_into(self.first.weight, first.flatten(0, 1), "first Kronecker factor")
        copy_into(self.second.weight, second.transpose(0, 1).flatten(1), "second Kronecker factor")
        if bias is not None:
            assert self.offset is not None
            copy_into(self.offset, bias, "bias")
        return None

    def terms(self) -> tuple[Tensor, Tensor]:
        """All A_i (r, m1, n1) and all B_i (r, m2, n2), as they are stored."""
        one = self.first.weight.unflatten(0, (self.rank, -1))
        other = self.second.weight.unflatten(1, (self.rank, -1)).transpose(0, 1)
        return (one, other) if self.outer_first else (other, one)

    def to_dense(self) -> Tensor:
        """`sum_i A_i (x) B_i`."""
        dtype = compute_dtype(self.first.weight.dtype)
        outer, inner = (term.to(dtype).flatten(1) for term in self.terms())
        dense = rearranged_back(outer.mT @ inner, (self.out_features, self.in_features), self.block)
        return dense.to(self.first.weight.dtype)

    def dense_bias(self) -> Tensor | None:
        """b."""
        return self.offset

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        x = x.unflatten(-1, (-1, self.block_in))  # (..., n1, n2)
        if self.outer_first:
            x = x.mT  # (..., n2, n1)
        hidden = self.first(x).unflatten(-1, (self.rank, -1))  # (..., n2, r, m1) or (..., n1, r, m2)
        y = self.second(hidden.transpose(-1, -3).flatten(-2))  # (..., m1, m2) or (..., m2, m1)
        y = (y if self.outer_first else y.mT).flatten(-2)
        return y if self.offset is None else y + self.offset.to(y.dtype)

    def extra_repr(self) -> str:
        """Shape, terms and blocks, as `print(model)` shows them."""
        return f"{super().extra_repr()}, block={self.block_out}x{self.block_in}"


def _multiply_adds(out_features: int, in_features: int, rank: int, block: Block) -> tuple[int, int]:
    """Per token: by the A_i first, and by the B_i first."""
    m2, n2 = block
    m1, n1 = out_features // m2, in_features // n2
    return rank * m1 * n2 * (n1 + m2), rank * n1 * m2 * (n2 + m1)


def _outer_first(out_features: int, in_features: int, rank: int, block: Block) -> bool:
    outer, inner = _multiply_adds(out_features, in_features, rank, block)
    return outer <= inner


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _balanced(out_features: int, in_features: int) -> Block:
    """Of all divisors, the block of the fewest numbers a term, and the nearest in shape to the weight."""
    elements = out_features * in_features

    def cost(block: Block) -> tuple[int, float, Block]:
        inner = block[0] * block[1]
        stretch = abs(math.log(block[0] / block[1]) - math.log(out_features / in_features) / 2)
        return elements // inner + inner, round(stretch, 9), block

    return min(((m2, n2) for m2 in _divisors(out_features) for n2 in _divisors(in_features)), key=cost)
