"""LEMS: ranks by curves of the measured loss."""

from __future__ import annotations

from eckart.methods.base import Method
from eckart.methods.kfac import robust_metric

# What was taken where its paper is open: the mean norm that clips a gradient is that of its own sequence; each curve is
# measured at the rank that a first plan gives it. Its depth factor is left out: see compression/measured_curves.py.
METHOD = Method(
    name="lems",
    title="LEMS (KFAC metric on clipped gradients, ranks by measured loss)",
    paper="LEMS, ICML 2026: predicted curves scaled by the measured KL of the whole model with one weight cut; "
    "clipped gradients; ranks on the hull of the curves in place of its licensed integer solver",
    metric=robust_metric,
    needs=frozenset({"gram", "robust-gradients"}),
    exact_for="the second-order change of the loss under a Kronecker-factored Fisher matrix of clipped gradients",
    allocation="loss",
    calibrated_curves=True,
    use="You compare with the paper: the metric of kfac on clipped gradients, and curves that are measured. It runs "
    "the whole model once for each weight, so that it takes longest of all.",
)
