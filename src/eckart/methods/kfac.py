"""KFAC-SVD: both sides weighted by the Kronecker-factored Fisher matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from eckart.linalg import Problem
    from eckart.moments import Moments

INPUT_SHRINKAGE = 0.1
GRADIENT_SHRINKAGE = 0.3


def metric(weight: Tensor, moments: Moments) -> Problem:
    """`|| H^(1/2) (W - W') G^(1/2) ||_F^2`, `H = E[g g^T]` token by token, `G = E[x x^T]`.

    Twice the second-order change of the loss per token, where the Fisher matrix is `H (x) G`. Both are
    shrunk toward their mean diagonal: estimated from fewer tokens than they have entries, their small
    eigenvalues are too small.
    """
    return _two_sided(weight, moments, "gradients")


def robust_metric(weight: Tensor, moments: Moments) -> Problem:
    """The same with gradients of which no token decides alone: clipped, and without the ends of each sequence."""
    return _two_sided(weight, moments, "robust-gradients")


def _two_sided(weight: Tensor, moments: Moments, gradients: str) -> Problem:
    from eckart.linalg import Problem

    return Problem(
        weight,
        left=moments[gradients].metric.shrunk(GRADIENT_SHRINKAGE),
        right=moments.input_metric.shrunk(INPUT_SHRINKAGE),
    )


METHOD = Method(
    name="kfac",
    title="KFAC-SVD",
    paper="Kronecker-factored Fisher as a two-sided metric: Martens & Grosse, ICML 2015, "
    "arXiv 1503.05671; as an SVD metric: KFAC-SVD, ICML 2026",
    metric=metric,
    needs=frozenset({"gram", "gradients"}),
    exact_for="the second-order change of the loss under a Kronecker-factored Fisher matrix",
    use="You want the metric of the default by itself: one size for all layers, without joint factors and refit. "
    "It needs backward passes, and no labels.",
)
