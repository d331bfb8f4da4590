"""Activation-aware SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from eckart.linalg import Problem
    from eckart.moments import Moments

ALPHA = 0.5


def metric(weight: Tensor, moments: Moments) -> Problem:
    """`|| (W - W') diag(mean|x|)^alpha ||_F^2`, alpha = 0.5; stored squared, as every metric is."""
    from eckart.linalg import Metric, Problem

    return Problem(weight, right=Metric(diagonal=moments["absolute"].mean ** (2 * ALPHA)))


METHOD = Method(
    name="asvd",
    title="activation-aware SVD",
    paper="Yuan et al., ASVD: Activation-aware Singular Value Decomposition, 2023, arXiv 2312.05821",
    metric=metric,
    needs=frozenset({"absolute"}),
    exact_for="the weight error with each input feature weighted by its mean magnitude to the power 0.5",
    use="Memory for the Gram matrices of the inputs is short: it keeps one number for each input feature, and "
    "needs forward passes alone.",
)
