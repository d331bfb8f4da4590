"""DRONE: data-aware low-rank approximation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from eckart.linalg import Problem
    from eckart.moments import Moments


def metric(weight: Tensor, moments: Moments) -> Problem:
    """`E || W x - W' x ||^2 = || (W - W') G^(1/2) ||_F^2`, `G = E[x x^T]`."""
    from eckart.linalg import Problem

    return Problem(weight, right=moments.input_metric)


METHOD = Method(
    name="drone",
    title="DRONE",
    paper="Chen et al., DRONE: Data-aware Low-rank Compression for Large NLP Models, NeurIPS 2021",
    metric=metric,
    needs=frozenset({"gram"}),
    exact_for="the mean squared error of the layer's output on the calibration text",
    use="You have text and no time for backward passes. It is exact for the output error of each layer, and by "
    "far better than what looks at the weights alone.",
)
