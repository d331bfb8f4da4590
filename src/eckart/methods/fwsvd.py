"""Fisher-weighted SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.errors import NumericalError
from eckart.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from eckart.linalg import Metric, Problem
    from eckart.moments import Moments

# Rows of zero Fisher (a dead output) keep this share of the mean row's weight, or they could not be
# scaled back.
FLOOR = 1e-6

PAPER = "Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022, arXiv 2207.00112"


def _floored(importance: Tensor | None, like: Tensor) -> Metric:
    from eckart.linalg import Metric

    assert importance is not None
    mean = float(importance.mean())
    if mean == 0:
        raise NumericalError(
            "fwsvd: every gradient of this site is zero, so its Fisher information says nothing; "
            "leave it dense with --ignore, or use --method drone."
        )
    return Metric(diagonal=(importance / mean).clamp_min(FLOOR).to(like.device))


def metric(weight: Tensor, moments: Moments) -> Problem:
    """`|| diag(sqrt(f)) (W - W') ||_F^2`, f_i the Fisher information summed over row i of W (out, in).

    The paper gives one importance to each row of W; with `y = W x`, as here and in PyTorch, a row is one
    output. Implementations differ in the axis: `--metric fwsvd-columns` weighs the other one. f is the
    empirical Fisher with own labels, and the true one (targets drawn from the model) without.
    """
    from eckart.linalg import Problem

    return Problem(weight, left=_floored(moments["fisher"].rows, weight))


def column_metric(weight: Tensor, moments: Moments) -> Problem:
    """`|| (W - W') diag(sqrt(f)) ||_F^2`, f_j the Fisher information summed over column j of W (out, in)."""
    from eckart.linalg import Problem

    return Problem(weight, right=_floored(moments["fisher"].columns, weight))


METHOD = Method(
    name="fwsvd",
    title="Fisher-weighted SVD",
    paper=PAPER,
    metric=metric,
    needs=frozenset({"fisher"}),
    exact_for="the weight error with each output row weighted by its Fisher information",
    use="You want the paper's own numbers, or have labeled data of a classifier. It weighs outputs alone: on "
    "decoders it is little better than svd in the tables of this project.",
)
COLUMNS = Method(
    name="fwsvd-columns",
    title="Fisher-weighted SVD, by input",
    paper=PAPER,
    metric=column_metric,
    needs=frozenset({"fisher"}),
    exact_for="the weight error with each input column weighted by its Fisher information",
    use="You want to see what the other reading of the paper gives: importance by input, which is better than by "
    "output on the causal model and the encoder that were measured.",
)
