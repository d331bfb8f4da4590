"""Low-rank: `W' = B A`, two plain Linears."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from eckart.forms.base import StoredSize, compute_dtype, copy_into
from eckart.forms.linear import Block, FactoredLinear


class LowRank(FactoredLinear):
    """`y = B (A x) + b`, stored as k (m + n) numbers: `first` is A (k, n), `second` is B (m, k) and b."""

    form: ClassVar[str] = "lowrank"
    paper: ClassVar[str] = "Eckart & Young, Psychometrika 1936"
    use: ClassVar[str] = (
        "A weight by itself. Two plain Linear layers: every engine, every device and every export takes it."
    )

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, source: str = "linear"
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, source)
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def size(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> StoredSize:
        """k (m + n) numbers and as many multiply-adds."""
        numbers = rank * (out_features + in_features)
        return StoredSize(numbers, numbers)

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Fill the factors, each rank-one term's norm split evenly between both sides."""
        left, right = left.double(), right.double()
        # Even norms keep both factors inside the range of half precision.
        ratio = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).clamp(1e-12, 1e12).sqrt()
        copy_into(self.first.weight, right / ratio[:, None], "low-rank input factor")
        copy_into(self.second.weight, left * ratio, "low-rank output factor")
        if bias is not None:
            copy_into(self.second.bias, bias, "bias")
        return None

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """B and A as they are stored."""
        return self.second.weight.detach().double(), self.first.weight.detach().double()

    def to_dense(self) -> Tensor:
        """`B A`."""
        dtype = compute_dtype(self.first.weight.dtype)
        return (self.second.weight.to(dtype) @ self.first.weight.to(dtype)).to(self.first.weight.dtype)

    def dense_bias(self) -> Tensor | None:
        """b."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        return self.second(self.first(x))
