"""SVD-LLM: truncation-aware whitening."""

from __future__ import annotations

from eckart.methods.base import Method
from eckart.methods.drone import metric

# The paper whitens by a Cholesky factor C of G and truncates the SVD of W C. Any C with C C^T = G has
# the same optimum, which is DRONE's; one solver serves both, without the inverse of C that fails for a
# singular G. The conformance tests compare it with the paper's own construction.
METHOD = Method(
    name="svd-llm",
    title="SVD-LLM (whitening)",
    paper="Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model "
    "Compression, ICLR 2025, arXiv 2403.07378",
    metric=metric,
    needs=frozenset({"gram"}),
    exact_for="the mean squared error of the layer's output on the calibration text",
    use="You want to compare with the paper of this name. Its optimum is that of drone, and so are its factors.",
)
