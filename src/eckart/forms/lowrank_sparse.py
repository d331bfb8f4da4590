"""Low-rank + sparse: `W' = B A + S`, where most rows of S are zero and not stored."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.forms.base import StoredSize, compute_dtype, copy_into
from eckart.forms.linear import Block, FactoredLinear
from eckart.forms.lowrank import LowRank


class LowRankSparse(FactoredLinear):
    """`y = B (A x) + b`, and `S x` added at the rows that S has.

    Stored are A (k, n), `first`; B (m, k) and b, `second`; the rows of S that are not zero (rows, n), `sparse`; and
    `places`, which of the m outputs each of those rows belongs to, ascending: k (m + n) + rows n numbers and as many
    indices as rows. LoSparse (Li et al. 2023, arXiv 2306.11222) only masks the other rows; here they are not there.

    Attributes:
        rows: how many rows of S are stored, 1..m.
    """

    form: ClassVar[str] = "lowrank-sparse"
    paper: ClassVar[str] = "Li et al. 2023, LoSparse, arXiv 2306.11222"
    use: ClassVar[str] = "No plan chooses it: the recovery losparse leaves it behind."
    sizes: ClassVar[tuple[str, ...]] = ("in_features", "out_features", "rank", "rows")
    refits: ClassVar[bool] = False  # S is not solved for
    places: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, rows: int, bias: bool = True, source: str = "linear"
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, source)
        if not 1 <= rows <= out_features:
            raise UsageError(
                f"form {self.form}: {rows} sparse rows are outside 1..{out_features} for a weight of "
                f"{out_features} x {in_features}; without any, use the form lowrank."
            )
        self.rows = rows
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)
        self.sparse = nn.Linear(in_features, rows, bias=False)
        self.register_buffer("places", torch.arange(rows, dtype=torch.int32))

    @classmethod
    def size(
        cls, out_features: int, in_features: int, rank: int, block: Block | None = None, rows: int = 0
    ) -> StoredSize:
        """k (m + n) + rows n numbers and multiply-adds, and an index for each row."""
        numbers = rank * (out_features + in_features) + rows * in_features
        return StoredSize(numbers + rows, numbers, rows)

    def multiply_adds(self) -> int:
        """Multiply-adds per token."""
        return self.size(self.out_features, self.in_features, self.rank, rows=self.rows).multiply_adds

    def find_damage(self) -> str | None:
        """The places must be as many different outputs, ascending."""
        return None if self.places.is_meta or self._may_be(self.places.cpu()) else "places are not outputs in order"

    def _may_be(self, places: Tensor) -> bool:
        inside = len(places) == self.rows and int(places[0]) >= 0 and int(places[-1]) < self.out_features
        return inside and not bool((places.diff() <= 0).any())

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Fill the module with `W' = left @ right`: the rows of S that there are become zero."""
        zero = right.new_zeros(self.rows, self.in_features)
        self.store_sparse(left, right, zero, torch.arange(self.rows), bias)
        return None

    def store_sparse(self, left: Tensor, right: Tensor, sparse: Tensor, places: Tensor, bias: Tensor | None) -> None:
        """Fill the module with `left @ right` and rows of S; the factors are stored as they are given.

        Args:
            left: B, (m, k).
            right: A, (k, n).
            sparse: rows of S, (rows, n).
            places: (rows,) the output of each, ascending.
            bias: (m,) or None.

        Raises:
            UsageError: if the places are not distinct outputs in ascending order, or a number does not fit the dtype.
        """
        host = places.detach().long().cpu()
        if not self._may_be(host):
            raise UsageError(
                f"form {self.form}: the places of {self.rows} sparse rows must be as many different outputs in "
                f"0..{self.out_features - 1}, ascending; sort them."
            )
        copy_into(self.first.weight, right, "low-rank input factor")
        copy_into(self.second.weight, left, "low-rank output factor")
        copy_into(self.sparse.weight, sparse, "sparse rows")
        with torch.no_grad():
            self.places.copy_(host)
        if bias is not None:
            copy_into(self.second.bias, bias, "bias")

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """B and A as they are stored."""
        return self.second.weight.detach().double(), self.first.weight.detach().double()

    def to_dense(self) -> Tensor:
        """`B A`, and S added at its rows."""
        dtype = compute_dtype(self.first.weight.dtype)
        low_rank = self.second.weight.to(dtype) @ self.first.weight.to(dtype)
        return low_rank.index_add(0, self.places, self.sparse.weight.to(dtype)).to(self.first.weight.dtype)

    def dense_bias(self) -> Tensor | None:
        """b."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        added = self.sparse(x)  # (..., rows)
        # On the last axis `index_add` is a hundred times slower on a CPU.
        return self.second(self.first(x)).scatter_add(-1, self.places.long().expand_as(added), added)

    def extra_repr(self) -> str:
        """Shape, rank and rows, as `print(model)` shows them."""
        return f"{super().extra_repr()}, rows={self.rows}"


class MaskedLowRankSparse(LowRankSparse):
    """The same with all rows of S and a mask of those that are still there: what LoSparse trains.

    Pruned rows are zero in the forward whatever an optimizer's momentum makes of them, and get no gradient.
    """

    alive: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, source: str = "linear"):
        super().__init__(in_features, out_features, rank, out_features, bias, source)
        self.register_buffer("alive", torch.ones(out_features, dtype=torch.bool), persistent=False)

    def prune(self, alive: Tensor) -> None:
        """Keep the rows that were kept and are True in `alive`, (m,); the others become zero."""
        self.alive &= alive.to(self.alive.device)
        self.clear()

    def clear(self) -> None:
        """Write zeros where rows are pruned."""
        with torch.no_grad():
            self.sparse.weight[~self.alive] = 0

    def to_dense(self) -> Tensor:
        """`B A + S`, pruned rows of S left out."""
        dtype = compute_dtype(self.first.weight.dtype)
        low_rank = self.second.weight.to(dtype) @ self.first.weight.to(dtype)
        return (low_rank + self._masked().to(dtype)).to(self.first.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        return self.second(self.first(x)) + nn.functional.linear(x, self._masked())

    def _masked(self) -> Tensor:
        return self.sparse.weight * self.alive[:, None]

    def compact(self) -> FactoredLinear:
        """The form without the pruned rows: the same numbers, low-rank alone where no row is left."""
        kept = self.alive.nonzero().flatten()
        common: dict[str, Any] = {"bias": self.has_bias, "source": self.source}
        shape = (self.in_features, self.out_features, self.rank)
        with torch.device("meta"):
            empty = LowRankSparse(*shape, len(kept), **common) if len(kept) else LowRank(*shape, **common)
        module = empty.to(self.first.weight.dtype).to_empty(device=self.first.weight.device)
        pairs = [(module.first.weight, self.first.weight), (module.second.weight, self.second.weight)]
        if self.has_bias:
            pairs.append((module.second.bias, self.second.bias))
        if isinstance(module, LowRankSparse):
            pairs += [(module.sparse.weight, self.sparse.weight[kept]), (module.places, kept)]
        with torch.no_grad():
            for to, of in pairs:
                to.copy_(of)
        return module.train(self.training)
