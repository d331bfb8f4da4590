"""Basis Sharing: one basis for the weights of adjacent layers."""

from __future__ import annotations

from eckart.methods.base import Method
from eckart.methods.drone import metric

METHOD = Method(
    name="basis-sharing",
    title="Basis Sharing",
    paper="Wang et al., Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression, ICLR 2025, "
    "arXiv 2410.03765: groups of two adjacent layers for what reads a normalized input (--layers-per-basis), "
    "every other weight by itself",
    metric=metric,
    needs=frozenset({"gram"}),
    exact_for="the squared error of the outputs of a group's layers together on the calibration text",
    form="shared-basis",
    use="Stored numbers count more than multiply-adds, and adjacent layers are alike. A basis is stored once for "
    "several layers and computed in each.",
)
