"""One basis for a group of weights that stand in several layers (Basis Sharing, arXiv 2410.03765)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.linalg.metric import Metric
from eckart.linalg.solve import Problem, factorise


def shared_basis(
    weights: Sequence[Tensor], gram: Tensor | None, rank: int, what: str = "group"
) -> tuple[Tensor, list[Tensor], tuple[str, ...]]:
    """`min sum_i || (W_i - B_i A) C ||_F^2` over one A for all: `C C^T` is the sum of the group's input Grams.

    The paper takes the SVD of `[C^T W_1^T | C^T W_2^T | ...]`, whose leading left singular vectors, taken back through
    `C^-T`, are the basis. That is the rank-k problem of the weights laid one upon the other, which
    :func:`~eckart.linalg.factorise` solves without an inverse, for a singular Gram too.

    Stored are `k n + sum_i k m_i` numbers.

    Args:
        weights: W_i, (m_i, n).
        gram: (n, n), summed over the layers that the weights stand in; None for the identity.
        rank: k, at most min(sum m_i, n).
        what: the group's name in errors and notes.

    Returns:
        The basis A (k, n), the coefficients B_i (m_i, k), and notes of fallbacks.

    Raises:
        UsageError: if there is no weight, they read inputs of different widths, or the rank is out of range.
        NumericalError: if a number is not finite.
    """
    widths = {weight.shape[1] for weight in weights}
    heights = [weight.shape[0] for weight in weights]
    if len(widths) != 1 or not 1 <= rank <= min([sum(heights), *widths]):
        raise UsageError(
            f"{what}: {len(heights)} weights of widths {sorted(widths)} and {sum(heights)} outputs together cannot "
            f"share a basis of rank {rank}: take weights of one width, and a rank of at most it and of all outputs."
        )
    found = factorise(Problem(torch.cat(list(weights)), right=Metric(full=gram)), what)
    left, right = found.truncated(rank)
    return right, list(left.split(heights)), found.notes
