"""Kronecker embedding: `e_i = a_i (x) b` (KnGPT2, Edalati et al. 2021, arXiv 2110.08152)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from eckart.errors import UsageError
from eckart.forms.base import StoredSize
from eckart.forms.embedding import FactoredEmbedding
from eckart.linalg import TableFactors, in_blocks


class KroneckerEmbedding(FactoredEmbedding):
    """`e_i = a_i (x) b`: v d / f numbers and the f of b (KnGPT2).

    Attributes:
        factor: f, a divisor of d.
    """

    form: ClassVar[str] = "kronecker-embedding"
    needs: ClassVar[str] = "data"
    exact_for: ClassVar[str] = (
        "the squared error of the rows that the calibration text looks up; with a tied head's error added, approximate"
    )
    paper: ClassVar[str] = "Edalati et al. 2021, KnGPT2, arXiv 2110.08152"
    use: ClassVar[str] = "You want the setting of KnGPT2. It loses far more than the low-rank table at equal numbers."
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

    @classmethod
    def least_keep(cls, rows: int, width: int) -> float:
        """1 / d: a number for each token."""
        return 1 / width

    @classmethod
    def solve(cls, table: Tensor, lookups: Tensor, inputs: Tensor | None, size: int, what: str) -> TableFactors:
        """Rank one of the rows in blocks: :func:`eckart.linalg.in_blocks`."""
        blocks = in_blocks(table, lookups, inputs, table.shape[1] // size)
        return super().solve(*blocks, 1, what)
