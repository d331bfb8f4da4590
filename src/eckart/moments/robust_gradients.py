"""The Gram matrix of the output gradients, of which no token decides alone."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.moments.gram import OuterProducts
from eckart.moments.outer_products import gram_nbytes
from eckart.moments.statistic import SequenceStatistic

SMALLEST, LARGEST = 0.1, 10.0
"""Norms of a sequence's gradients are kept between these times their mean."""

ENDS = 8
"""One in so many tokens is left out at the start of a sequence, and as many at its end."""


class RobustGradientGram(OuterProducts, SequenceStatistic):
    """`sum g' g'^T` over the tokens of the middle of each sequence, g' their clipped gradients.

    The norm of a gradient is kept between .1 and 10 times the mean norm of its sequence, and the first and the last
    eighth of the tokens of a sequence are left out: the first have little before them, the last little after them that
    they could change. As LEMS (ICML 2026) has it; that the mean is one sequence's, and not one of the whole text, lets
    sums over other batches be added.

    The default method does without. On a causal model its excess fell with it by .0018 at a keep of .6 and by .0001 at
    .4, the mean of three seeds; that of kfac with allocated low-rank factors rose by .010 at both, one seed.
    """

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        return gram_nbytes(out_features)

    def update(self, inputs: Tensor, gradients: Tensor) -> None:  # type: ignore[override]
        """Add sequences: inputs (B, T, n) and output gradients (B, T, m), zero where padded."""
        gradients = gradients.float()
        norms = gradients.norm(dim=-1)  # (B, T)
        counted = in_the_middle((norms > 0) | (inputs != 0).any(-1))
        mean = (norms * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
        clipped = torch.minimum(torch.maximum(norms, SMALLEST * mean), LARGEST * mean)
        # A gradient of zero has no direction to be given a length in.
        scaled = gradients * torch.where(norms > 0, clipped / norms, 0.0).unsqueeze(-1)
        super().update(scaled[counted])


def in_the_middle(real: Tensor) -> Tensor:
    """Which tokens are counted, (B, T): the real ones, without the first and the last eighth of a sequence.

    Args:
        real: (B, T), True where there is no padding, on whatever side that is.
    """
    place, length = real.cumsum(1) - 1, real.sum(1, keepdim=True)
    left_out = length // ENDS
    return real & (place >= left_out) & (place < length - left_out)
