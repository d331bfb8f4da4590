"""MoDeGPT: pairs of weights that a module multiplies are made smaller together."""

from __future__ import annotations

from eckart.methods.base import Method
from eckart.methods.drone import metric

# Of its three kinds of modules only the first can be stored so that the model's own class computes it: feed-forward
# layers with fewer neurons. Rotary pairs of queries and keys, and directions of values, would have to be as many in
# every head and layer for that, and most configurations have no number of their own for them
# (`eckart.narrow_value_heads` serves those that do). Attention is low-rank here, weight by weight, under the same Gram
# matrix. Left out too: the sparsity of each layer by how much it changes its input; all layers keep the same part.
METHOD = Method(
    name="modegpt",
    title="MoDeGPT (fewer neurons by ridge leverage)",
    paper="Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression, ICLR 2025, "
    "arXiv 2408.09632: its Nystrom approximation of feed-forward layers; low-rank attention and uniform sizes, "
    "in place of the paper's",
    metric=metric,
    needs=frozenset({"gram"}),
    exact_for="the best correction of the neurons that are kept; which ones are is a heuristic",
    by_leverage=True,
    use="You compare with the paper. The default also takes neurons away where that is predicted to lose less, and "
    "corrects the others for them under the gradients of the loss.",
)
