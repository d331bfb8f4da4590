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
from torch.nn import functional

from eckart.errors import ModelError, UsageError
from eckart.forms.base import Factored, StoredSize, compute_dtype, copy_into
from eckart.forms.lazy import LazyWeight

SAFE_HEADS = 4


class ScaledEmbedding(nn.Embedding):
    """Rows times a number: what a model such as Gemma has, put back by `densify`."""

    scale: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up, giving (..., d)."""
        return _scaled(super().forward(input), self.scale)


class FactoredEmbedding(Factored):
    """An embedding whose table is `codes` in `blocks` of `rank` numbers, each made wide by `expand`.

    Class attributes:
        needs: what it is made of, as methods say it.
        exact_for: what it minimizes.
        paper: authors, year, identifier.

    Attributes:
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


class LowRankEmbedding(FactoredEmbedding):
    """`e_i = P c_i`: k (v + d) numbers."""

    form: ClassVar[str] = "lowrank-embedding"
    exact_for: ClassVar[str] = (
        "the squared error of the rows that the calibration text looks up; with a tied head's error added, approximate"
    )
    paper: ClassVar[str] = "SVD of rows weighted by how often tokens occur"


class KroneckerEmbedding(FactoredEmbedding):
    """`e_i = a_i (x) b`: v d / f numbers and the f of b (KnGPT2).

    Attributes:
        factor: f, a divisor of d.
    """

    form: ClassVar[str] = "kronecker-embedding"
    exact_for: ClassVar[str] = LowRankEmbedding.exact_for
    paper: ClassVar[str] = "Edalati et al. 2021, KnGPT2, arXiv 2110.08152"
    sizes: ClassVar[tuple[str, ...]] = ("num_embeddings", "embedding_dim", "factor")

    def __init__(
        self, num_embeddings: int, embedding_dim: int, factor: int, padding_idx: int | None = None, scale: float = 1.0
    ) -> None:
        if factor < 1 or embedding_dim % factor:
            raise UsageError(f"form {self.form}: factor {factor} does not divide the width {embedding_dim}.")
        super().__init__(num_embeddings, embedding_dim, 1, padding_idx, scale, embedding_dim // factor)
        self.factor = factor

    @classmethod
    def size(cls, rows: int, width: int, rank: int) -> StoredSize:
        """v d / f + f numbers; `rank` is the factor f."""
        return StoredSize(rows * (width // rank) + rank, width)

    @classmethod
    def largest(cls, rows: int, width: int, keep: float) -> int:
        """The least factor f with 1 / f <= keep; the f numbers of b come on top. 0 if there is none."""
        return next((f for f in range(2, width + 1) if width % f == 0 and 1 / f <= keep), 0)


class SafeEmbedding(LowRankEmbedding):
    """Self-attentive factored embedding: `e_i = P (c_i + O attention_i(c))`, attention over the sequence in width k.

    Before training O is zero, so that it is the low-rank embedding, to the bit; it is worth its numbers only once it
    has been trained to follow the original (`eckart tune`). Codes are brought to unit root mean square before the
    attention, without parameters.

    What may be attended to is told by the ids alone, whatever the model: with `causal` no later token, and never a
    token whose id is `padding_idx`; a token always sees itself. A causal model's embedding must be given the whole
    sequence at each step: generate without a key-value cache.

    Attributes:
        causal: whether later tokens are hidden.
        heads: of the attention.
    """

    form: ClassVar[str] = "safe-embedding"
    needs: ClassVar[str] = "data + training"
    exact_for: ClassVar[str] = "what lowrank is, until its attention is trained (eckart tune)"
    paper: ClassVar[str] = "Reid et al. 2021, Subformer, arXiv 2101.00234"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        scale: float = 1.0,
        causal: bool = True,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, rank, padding_idx, scale)
        self.causal = causal
        self.heads = SAFE_HEADS if rank % SAFE_HEADS == 0 else 1
        self.query, self.key, self.value, self.out = (nn.Linear(rank, rank, bias=False) for _ in range(4))

    @classmethod
    def options(cls, spec: dict[str, Any]) -> dict[str, Any]:
        """Arguments besides the sizes, from a spec."""
        return super().options(spec) | {"causal": bool(spec.get("causal", True))}

    @classmethod
    def size(cls, rows: int, width: int, rank: int) -> StoredSize:
        """k (v + d) + 4 k^2 numbers; attention scores are left out of the multiply-adds, as everywhere."""
        return StoredSize(rank * (rows + width + 4 * rank), rank * (width + 4 * rank))

    @classmethod
    def largest(cls, rows: int, width: int, keep: float) -> int:
        """As for the others, in multiples of the number of heads where it is that large."""
        rank = super().largest(rows, width, keep)
        return rank - rank % SAFE_HEADS if rank >= SAFE_HEADS else rank

    def spec(self) -> dict[str, Any]:
        """All that :func:`eckart.forms.build` needs to rebuild the module, as JSON values."""
        return super().spec() | {"causal": self.causal}

    def multiply_adds(self) -> int:
        """Per token."""
        return self.size(self.num_embeddings, self.embedding_dim, self.rank).multiply_adds

    def store(self, left: Tensor, right: Tensor) -> None:
        """As for low-rank; the attention is drawn, always the same way, and its output is zero."""
        super().store(left, right)
        stream = torch.Generator().manual_seed(0)
        for layer in (self.query, self.key, self.value):
            drawn = torch.randn(self.rank, self.rank, generator=stream) / self.rank**0.5
            copy_into(layer.weight, drawn.to(layer.weight.device), "embedding attention")
        with torch.no_grad():
            self.out.weight.zero_()

    def to_dense(self) -> Tensor:
        """There is no table.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "a safe embedding is no table: what a token becomes depends on the tokens around it, so it cannot be made "
            "dense. Keep the factored model, or compress again with --embeddings lowrank."
        )

    def coded(self, ids: Tensor) -> Tensor:
        """Codes of tokens (..., T) after the attention, (..., T, rank)."""
        codes = self.codes(ids)
        flat = codes.reshape(-1, *codes.shape[-2:])  # (B, T, rank)
        mixed = functional.rms_norm(flat, (self.rank,))
        query, key, value = (
            layer(mixed).unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # (B, heads, T, rank / heads)
            for layer in (self.query, self.key, self.value)
        )
        mask = self._visible(ids.reshape(-1, ids.shape[-1]))[:, None]
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return codes + self.out(found.transpose(-2, -3).flatten(-2)).reshape(codes.shape)

    def _visible(self, ids: Tensor) -> Tensor:
        """(B, T, T): whether a token (row) sees another one (column), by ids (B, T) alone."""
        length = ids.shape[-1]
        itself = torch.eye(length, dtype=torch.bool, device=ids.device)
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device)
        seen = (seen.tril() if self.causal else seen).expand(len(ids), -1, -1)
        if self.padding_idx is not None:
            seen = seen & (ids != self.padding_idx)[:, None, :]
        return seen | itself


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
    lazy._is_hf_initialized = True  # type: ignore[attr-defined]  # no model draws numbers for a table that is not there
    return lazy
