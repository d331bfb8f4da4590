"""What blocks compute for rows of which tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.evaluation.sizes import count_sizes


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds of blocks: `a_l t + 2 d t^2` for t tokens that block l reads.

    Attributes:
        linear: a, of the linear layers of each block, for one token, as they are stored.
        width: d, of queries and of values, over all heads.
    """

    linear: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[str]) -> BlockCost:
        """Those of a model."""
        config: Any = model.config
        sizes = count_sizes(model, blocks).modules
        return cls(tuple(sizes[block].multiply_adds for block in blocks), int(config.get_text_config().hidden_size))

    def rows(self, tokens: Tensor) -> Tensor:
        """Multiply-adds of each row, (B,), of the tokens that each block reads, (B, blocks)."""
        read = tokens.double()
        return (read * torch.tensor(self.linear) + 2 * self.width * read.square()).sum(1)

    def mean(self, tokens: Tensor) -> float:
        """The mean over rows."""
        return float(self.rows(tokens).mean())
