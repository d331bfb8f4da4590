"""The diagonal of the Fisher matrix, reduced to rows and columns of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg.blocks import blocks
from eckart.moments.statistic import FLOAT64, SequenceStatistic

# Squared gradients that are held at once, in float64: 128 MB.
FISHER_ENTRIES = 2**24


@dataclass
class Fisher(SequenceStatistic):
    """Sums over sequences of the squared gradient of the weight (m, n): the weight has ONE gradient a sequence.

    Attributes:
        rows: (m,) float64, summed over each output row.
        columns: (n,) float64, summed over each input column.
        sequences: how many were seen.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    sequences: int = 0

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        return FLOAT64 * (out_features + in_features)

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add sequences: inputs (B, T, n) and output gradients (B, T, m), zero where padded.

        The gradient of W for one sequence is `g^T x`, (m, n): formed for each sequence, then squared.
        """
        m, n = gradients.shape[-1], inputs.shape[-1]
        rows = gradients.new_zeros(m, dtype=torch.float64)
        columns = inputs.new_zeros(n, dtype=torch.float64)
        for some in blocks(len(inputs), max(1, FISHER_ENTRIES // (m * n))):
            x = inputs[some].float()
            for part in blocks(m, max(1, FISHER_ENTRIES // n)):
                squared = torch.bmm(gradients[some, :, part].float().mT, x).square_().double()  # (some, part, n)
                rows[part] += squared.sum(dim=(0, 2))
                columns += squared.sum(dim=(0, 1))
        if self.rows is None or self.columns is None:
            self.rows, self.columns = rows, columns
        else:
            self.rows += rows
            self.columns += columns
        self.sequences += len(inputs)
