"""One basis for a group of weights from several layers (Basis Sharing, arXiv 2410.03765)."""

from __future__ import annotations

from collections.abc import Sequence

from eckart.errors import UsageError
from eckart.linalg.joint import split_rows
from eckart.linalg.solve import Factorization, Problem, factorize


def shared_basis(
    problem: Problem, heights: Sequence[int], limit: int | None = None, what: str = "group"
) -> list[Factorization]:
    """`min sum_i || (W_i - B_i A) C ||_F^2` over one A for all: `C C^T` is the sum of the group's input Grams.

    The paper takes the SVD of `[C^T W_1^T | C^T W_2^T | ...]`, whose leading left singular vectors, taken back through
    `C^-T`, are the basis. This is the rank-k problem of the weights stacked into one matrix, which
    :func:`~eckart.linalg.factorize` solves without an inverse, for a singular Gram too.

    At rank k are stored `k n + sum_i k m_i` numbers.

    Args:
        problem: its target (sum m_i, n) holds the W_i stacked; its right metric is the group's.
        heights: m_i.
        limit: the largest rank that will be asked for; None for all, min(sum m_i, n).
        what: the group's name in errors and notes.

    Returns:
        For each weight its factors B_i (m_i, r) and A (r, n), the same A; `squared` is the whole group's, so that each
        curve is the error of all of them together. Notes of fallbacks are the first one's.

    Raises:
        UsageError: if the heights are not those of the target, or outputs are weighed, which mixes the layers.
        NumericalError: if a number is not finite.
    """
    rows, columns = problem.target.shape
    if sum(heights) != rows or min(heights, default=0) < 1 or not problem.left.is_identity:
        raise UsageError(
            f"{what}: weights of {list(heights)} outputs cannot share a basis as a {rows} x {columns} matrix, or not "
            "under a metric of their outputs; stack the weights, and weigh their inputs only: --metric "
            "drone, asvd or svd."
        )
    solved = factorize(problem, what)
    if limit is not None:
        solved = solved.kept(limit)
    return split_rows(solved, heights)
