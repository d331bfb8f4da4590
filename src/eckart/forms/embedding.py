"""Factored embeddings.

All store `codes`, a few numbers for each token, and `expand`, which makes them wide:

    low-rank     e_i = P c_i,                    codes (v, k),    P (d, k)
    Kronecker    e_i = a_i (x) b,                codes (v, d/f),  b (f, 1)
    SAFE         e_i = P (c_i + attention_i(c)), codes (v, k),    P (d, k)

Kronecker: KnGPT2, Edalati et al. 2021, arXiv 2110.08152. SAFE: Subformer, Reid et al. 2021, arXiv 2101.00234.
The table is never made to look rows up.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.forms.base import Factored, StoredSize, compute_dtype, copy_into
from eckart.forms.lazy import LazyWeight
from eckart.forms.transformers_internals import mark_initialized
from eckart.linalg import TableFactors, table_factors, tied_factors


class ScaledEmbedding(nn.Embedding):
    """Rows times a number: what a model such as Gemma has, put back by `densify`."""

    scale: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up, giving (..., d)."""
        return _scaled(super().forward(input), self.scale)


class FactoredEmbedding(Factored):
    """An embedding whose table is `codes` in `blocks` of `rank` numbers, each made wide by `expand`.

    A subclass sets `form`, `needs`, `exact_for` and `paper`; one that is not `k` numbers a token overrides `size`,
    `largest`, `least_keep` and `solve`, one that does more than look up also `coded`.

    Attributes:
        needs: what it is made of, as methods say it.
        exact_for: what it minimizes.
        paper: authors, year, identifier.
        contextual: whether a row depends on the tokens around it; then `__init__` takes `causal`, whether later tokens
            are hidden, and a causal model must run without a key-value cache.
        advice: what a run says to whoever chose it, or "".
        num_embeddings: v.
        embedding_dim: d.
        rank: k, numbers of a block of the codes.
        blocks: how many a token has; 1 but for Kronecker.
        padding_idx: as in `nn.Embedding`.
        scale: what looked-up rows are multiplied with; the table itself, as a tied head reads it, is not.
    """

    sizes: ClassVar[tuple[str, ...]] = ("num_embeddings", "embedding_dim", "rank")
    needs: ClassVar[str] = "data"
    exact_for: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    contextual: ClassVar[bool] = False
    advice: ClassVar[str] = ""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        scale: float = 1.0,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(num_embeddings, embedding_dim):
            raise UsageError(
                f"form {self.form}: rank {rank} is outside 1..{min(num_embeddings, embedding_dim)} for a table of "
                f"{num_embeddings} x {embedding_dim}; choose a rank inside."
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.rank = rank
        self.blocks = blocks
        self.padding_idx = padding_idx
        self.scale = scale
        self.codes = nn.Embedding(num_embeddings, blocks * rank, padding_idx)
        self.expand = nn.Linear(rank, embedding_dim // blocks, bias=False)

    @classmethod
    def options(cls, spec: dict[str, Any]) -> dict[str, Any]:
        """Arguments besides the sizes, from a spec.

        Raises:
            UsageError: if one is not what it should be.
        """
        padding, scale = spec.get("padding_idx"), spec.get("scale", 1.0)
        if padding is not None and (isinstance(padding, bool) or not isinstance(padding, int)):
            raise UsageError(f"module spec of form {cls.form}: padding_idx must be a token's number, not {padding!r}.")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise UsageError(f"module spec of form {cls.form}: scale must be a number, not {scale!r}.")
        return {"padding_idx": padding, "scale": float(scale)}

    @classmethod
    def size(cls, rows: int, width: int, rank: int) -> StoredSize:
        """What the form stores for a (rows, width) table, and multiply-adds per token."""
        return StoredSize(rank * (rows + width), rank * width)

    @classmethod
    def largest(cls, rows: int, width: int, keep: float) -> int:
        """The largest rank that stores at most a fraction of the table; 0 if none does."""
        budget, rank = keep * rows * width, min(rows, width)
        while rank and cls.size(rows, width, rank).parameters > budget:
            rank -= 1
        return rank

    @classmethod
    def least_keep(cls, rows: int, width: int) -> float:
        """The smallest fraction of a (rows, width) table for which :meth:`largest` finds a size."""
        return cls.size(rows, width, 1).parameters / (rows * width)

    @classmethod
    def solve(cls, table: Tensor, lookups: Tensor, inputs: Tensor | None, size: int, what: str) -> TableFactors:
        """The factors that :meth:`store` takes.

        Args:
            table: E, (v, d).
            lookups: (v,), how often each token is looked up, summing to 1.
            inputs: (d, d), the second moment of what a tied output layer multiplies with the table; None without one.
            size: the rank, or what the form has in its place.
            what: the table's name in errors and notes.
        """
        if inputs is None:
            return table_factors(table, lookups, size, what)
        return tied_factors(table, lookups, inputs, size, what=what)

    def spec(self) -> dict[str, Any]:
        """All that :func:`eckart.forms.build` needs to rebuild the module, as JSON values."""
        return super().spec() | {"padding_idx": self.padding_idx, "scale": self.scale}

    def multiply_adds(self) -> int:
        """Per token; looking codes up costs none."""
        return self.rank * self.embedding_dim

    def store(self, left: Tensor, right: Tensor) -> None:
        """Fill the module with the table whose blocks are `left @ right`, norms split evenly between both.

        Args:
            left: (v blocks, rank).
            right: (rank, d / blocks).
        """
        left, right = left.double(), right.double()
        ratio = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).clamp(1e-12, 1e12).sqrt()
        copy_into(self.codes.weight, (left * ratio).reshape(self.num_embeddings, -1), "embedding codes")
        copy_into(self.expand.weight, (right / ratio[:, None]).mT, "embedding factor")

    def to_dense(self) -> Tensor:
        """The table, (v, d), as it is before `scale`."""
        return table_of(self.codes.weight, self.expand.weight)

    def dense(self) -> nn.Embedding:
        """The ordinary embedding that this one stands for."""
        table = self.to_dense().detach()
        kind = nn.Embedding if self.scale == 1 else ScaledEmbedding
        module = kind(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")
        module.weight = nn.Parameter(table)
        if isinstance(module, ScaledEmbedding):
            module.scale = self.scale
        return module

    @property
    def weight(self) -> Tensor:
        """The table, computed when something reads its values; dtype and shape are free."""
        return lazy_table(self, (self.num_embeddings, self.embedding_dim))

    def coded(self, ids: Tensor) -> Tensor:
        """Codes of tokens, (..., blocks rank)."""
        return self.codes(ids)

    def forward(self, input: Tensor) -> Tensor:
        """Look ids (...) up, giving (..., d)."""
        codes = self.coded(input)
        if self.blocks > 1:
            codes = codes.unflatten(-1, (self.blocks, self.rank))  # (..., blocks, rank)
        rows = self.expand(codes)
        return _scaled(rows.flatten(-2) if self.blocks > 1 else rows, self.scale)

    def extra_repr(self) -> str:
        """Shape and rank, as `print(model)` shows them."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, blocks={self.blocks}"


def table_of(codes: Tensor, expand: Tensor) -> Tensor:
    """(v, d) from codes (v, blocks rank) and expand (d / blocks, rank)."""
    dtype = compute_dtype(codes.dtype)
    blocks = codes.to(dtype).unflatten(-1, (-1, expand.shape[1]))  # (v, blocks, rank)
    return (blocks @ expand.to(dtype).mT).flatten(-2).to(codes.dtype)


def _scaled(rows: Tensor, scale: float) -> Tensor:
    # In the rows' own type, as models that scale do.
    return rows if scale == 1 else rows * torch.full((), scale, dtype=rows.dtype, device=rows.device)


def lazy_table(module: Factored, shape: tuple[int, int]) -> Tensor:
    """The table of a module, computed when something reads its values."""
    lazy = LazyWeight.of(module.to_dense, shape, next(module.parameters()))
    mark_initialized(lazy)  # no model draws numbers for a table that is not stored
    return lazy
