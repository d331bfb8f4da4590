"""A form as a user of the library writes one: everything that it needs stands in its class."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from eckart.forms import Block, FactoredLinear, StoredSize


class ScaledLowRank(FactoredLinear):
    """`y = s * (B (A x)) + b`: the rows of B have length one, and s holds their lengths."""

    form: ClassVar[str] = "scaled-lowrank"

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, source: str = "linear"
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, source)
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=False)
        self.scale = nn.Parameter(torch.ones(out_features))
        self.offset = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def size(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> StoredSize:
        numbers = rank * (out_features + in_features)
        return StoredSize(numbers + out_features, numbers)

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        lengths = left.norm(dim=1)
        with torch.no_grad():
            self.first.weight.copy_(right)
            self.second.weight.copy_(left / lengths.clamp_min(1e-30)[:, None])
            self.scale.copy_(lengths)
            if bias is not None:
                self.offset.copy_(bias)
        return None

    def to_dense(self) -> Tensor:
        left = self.scale[:, None].float() * self.second.weight.float()
        return (left @ self.first.weight.float()).to(self.scale.dtype)

    def dense_bias(self) -> Tensor | None:
        return self.offset

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)) * self.scale
        return y if self.offset is None else y + self.offset
