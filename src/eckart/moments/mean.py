"""The mean of the inputs, and how many tokens a site saw."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eckart.moments.statistic import FLOAT64, InputStatistic


@dataclass
class Mean(InputStatistic):
    """`sum x` over tokens. It is always gathered: a bias that is refitted needs it, and it counts the tokens.

    Attributes:
        count: tokens.
        total: (n,) float64.
    """

    count: int = 0
    total: Tensor | None = None

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        return FLOAT64 * in_features

    def update(self, rows: Tensor) -> None:
        sums = rows.float().sum(0).double()  # float32 within a batch, float64 over batches: all in float64 is slow
        self.total = sums if self.total is None else self.total.add_(sums)
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """`E[x]`, (n,), float64."""
        assert self.total is not None, "no token was seen"
        return self.total / max(self.count, 1)
