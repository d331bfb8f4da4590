"""Truncated SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from eckart.linalg import Problem
    from eckart.moments import Moments


def metric(weight: Tensor, moments: Moments) -> Problem:
    """`|| W - W' ||_F^2`: every weight counts the same, no data is asked."""
    from eckart.linalg import Problem

    return Problem(weight)


METHOD = Method(
    name="svd",
    title="truncated SVD",
    paper="Eckart & Young, Psychometrika 1936",
    metric=metric,
    exact_for="the error of the weights themselves",
    use="There is no data, or you want the baseline that every paper compares with. It takes seconds, and loses "
    "most of all methods but the Kronecker products.",
)
