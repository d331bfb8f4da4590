"""The output layer that is tied to a factored embedding: it multiplies with the table in two steps, on its numbers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from eckart.errors import UsageError
from eckart.forms.base import Factored
from eckart.forms.embedding import lazy_table, table_of


class Numbers(nn.Module):
    """A matrix under the name that a tied embedding gives it; nothing to call."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


class TiedHead(Factored):
    """`y = x E'^T + b` on the numbers of a factored embedding E', which the two share.

    Attributes:
        in_features: d.
        out_features: v.
        rank: k.
        blocks: as the embedding's.
    """

    form: ClassVar[str] = "tied-head"
    paper: ClassVar[str] = "this library: a tied output layer of the factored table that its embedding stores"
    use: ClassVar[str] = "No plan chooses it: an output layer that is tied to factored embeddings is stored in it."
    bias: nn.Parameter | None
    sizes: ClassVar[tuple[str, ...]] = ("in_features", "out_features", "rank", "blocks")

    def __init__(self, in_features: int, out_features: int, rank: int, blocks: int, bias: bool = False) -> None:
        super().__init__()
        if rank < 1 or blocks < 1 or in_features % blocks:
            raise UsageError(
                f"form {self.form}: {blocks} blocks of rank {rank} do not make a table of {out_features} x "
                f"{in_features}; take both from the embedding that the head is tied to."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.blocks = blocks
        self.codes = Numbers(out_features, blocks * rank)
        self.expand = Numbers(in_features // blocks, rank)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @classmethod
    def options(cls, spec: dict[str, Any]) -> dict[str, Any]:
        """Arguments besides the sizes, from a spec."""
        return {"bias": bool(spec.get("bias", False))}

    def spec(self) -> dict[str, Any]:
        """All that :func:`eckart.forms.build` needs to rebuild the module, as JSON values."""
        return super().spec() | {"bias": self.bias is not None}

    def multiply_adds(self) -> int:
        """Per token."""
        return self.rank * self.in_features + self.codes.weight.numel()

    def to_dense(self) -> Tensor:
        """E', (v, d)."""
        return table_of(self.codes.weight, self.expand.weight)

    def dense(self) -> nn.Linear:
        """The ordinary Linear; its weight is to be tied again, its bias is this module's own."""
        module = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        module.weight = nn.Parameter(self.to_dense().detach())
        module.register_parameter("bias", self.bias)
        return module

    @property
    def weight(self) -> Tensor:
        """E', computed when something reads its values; dtype and shape are free."""
        return lazy_table(self, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., d), giving (..., v)."""
        if self.blocks > 1:
            x = x.unflatten(-1, (self.blocks, -1))  # (..., blocks, d / blocks)
        codes = functional.linear(x, self.expand.weight.mT)
        if self.blocks > 1:
            codes = codes.flatten(-2)
        return functional.linear(codes, self.codes.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape and rank, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
