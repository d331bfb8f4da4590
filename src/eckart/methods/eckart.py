"""eckart: the default, what the benchmarks of this repository show to be best."""

from __future__ import annotations

from eckart.methods.base import Method
from eckart.methods.kfac import metric

METHOD = Method(
    name="eckart",
    title="eckart (KFAC metric, joint factors and sliced layers, allocated by loss, refitted)",
    paper="this library: the metric of KFAC-SVD; one input factor for weights that read one input, and fewer neurons "
    "in feed-forward layers, where that is predicted to lose less; ranks from one budget by the predicted loss, and a "
    "closed-form refit of every weight on the inputs that the compressed model gives it; where stored numbers count "
    "more than speed, the pivoted form of Zhao et al. (ICML 2025, arXiv 2501.19090)",
    metric=metric,
    needs=frozenset({"gram", "gradients"}),
    exact_for="the second-order change of the loss under a Kronecker-factored Fisher matrix",
    form="joint",
    smallest_form="pivoted-joint",
    slices=True,
    allocation="loss",
    centered=True,
    refit=True,
    use="Always, unless you compare methods: it was the best method at equal size on every model that was "
    "measured here. It needs text and backward passes.",
)
