"""SAFE: a self-attentive factored embedding (Subformer, Reid et al. 2021, arXiv 2101.00234)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from eckart.errors import ModelError
from eckart.forms.base import StoredSize, copy_into
from eckart.forms.lowrank_embedding import LowRankEmbedding

SAFE_HEADS = 4


class SafeEmbedding(LowRankEmbedding):
    """Self-attentive factored embedding: `e_i = P (c_i + O attention_i(c))`, attention over the sequence in width k.

    Before training O is zero, so that it is the low-rank embedding, to the bit; it is worth its numbers only once it
    has been trained to follow the original (`eckart tune`). Codes are brought to unit root mean square before the
    attention, without parameters.

    Which tokens are visible follows from the ids alone, in every model: with `causal` no later token, and never a
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
    use: ClassVar[str] = (
        "You train afterwards: its attention is worth its numbers only once eckart tune has trained it."
    )
    contextual: ClassVar[bool] = True
    advice: ClassVar[str] = "as good as low-rank until it is trained to follow the original: `eckart tune`"
    no_dense: ClassVar[str | None] = (
        "a safe embedding is not a table: what a token becomes depends on the tokens around it, so it cannot be made "
        "dense. Keep the factored model, or compress again with --embeddings lowrank."
    )

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
        raise ModelError(self.no_dense)

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
