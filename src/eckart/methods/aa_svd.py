"""AA-SVD: factors anchored to the outputs of the original, on the inputs of the compressed model."""

from __future__ import annotations

from eckart.methods.base import Method
from eckart.methods.drone import metric

# Its closed form, min || W X - W' X' || with X' as the compressed model gives it, is what a refit solves, block by
# block from the factors of DRONE, which are those of the first block.
METHOD = Method(
    name="aa-svd",
    title="AA-SVD (anchored, adaptive SVD)",
    paper="AA-SVD, 2026, arXiv 2604.02119: uniform ranks, each weight solved in closed form on the inputs that the "
    "compressed model gives it, and then each block trained to put out what the original's does",
    metric=metric,
    needs=frozenset({"gram"}),
    exact_for="the mean squared error of the layer's output on the inputs that the compressed model gives it",
    refit=True,
    use="You compare with the paper, or cannot run the whole model backward: blocks are trained one by one.",
    refined=True,
)
