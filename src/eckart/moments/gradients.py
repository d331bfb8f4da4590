"""The Gram matrix of the output gradients."""

from __future__ import annotations

from eckart.moments.gram import OuterProducts
from eckart.moments.outer_products import gram_nbytes
from eckart.moments.statistic import GradientStatistic


class GradientGram(OuterProducts, GradientStatistic):
    """`sum g g^T` over tokens, g the gradient of the loss at a site's output for one token."""

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        return gram_nbytes(out_features)
