"""One input factor for several weights that read the same input.

    minimize over A (k, n) and B_i:   sum_i || L_i (T_i - B_i A) R ||_F^2,    H_i = L_i^T L_i,  G = R R^T

The T_i stacked are one target whose outputs are weighed by the block-diagonal metric of the H_i, and the B_i stacked
are its left factor: the problem of :mod:`eckart.linalg.solve`, of which no block need be inverted, because A comes
from the side of the input:

    A = V^T C^-1,   B_i = T_i C V,   C C^T = G,   V the leading eigenvectors of   C^T ( sum_i T_i^T H_i T_i ) C.

As for one weight, the other side is inverted where it is smaller, or where G is singular and the H_i are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.linalg.block_metric import stack_metrics
from eckart.linalg.metric import Metric
from eckart.linalg.solve import Factorization, Factors, Problem, curve_under, factorize


def factorize_jointly(problems: Sequence[Problem], what: str = "group") -> list[Factorization]:
    """Solve for every rank at once, exactly, as :func:`~eckart.linalg.factorize` does for one weight.

    Args:
        problems: one for each weight; their right metrics are the same, for they read one input. Heights, and kinds of
            the left metrics, are free.
        what: the group's name in errors and notes.

    Returns:
        For each weight its factors B_i (m_i, r) and A (r, n), the same A, r = min(sum m_i, n), which may be above m_i.
        `squared` is the whole group's, so that each curve is the error of all of them together. Notes of fallbacks are
        the first one's.

    Raises:
        UsageError: if there is no problem, or they are not of the same input.
        NumericalError: if a target or a metric is not finite, or nothing converges.
    """
    return factorize_stacked(stack_problems(problems, what), [len(problem.target) for problem in problems], what)


def factorize_stacked(problem: Problem, heights: Sequence[int], what: str = "group") -> list[Factorization]:
    """The same for a problem that is stacked already, as :func:`stack_problems` does.

    Args:
        problem: its target (sum m_i, n) holds the T_i.
        heights: m_i.
        what: the group's name in errors and notes.

    Raises:
        UsageError: if the heights are not those of the target.
        NumericalError: if a number is not finite, or nothing converges.
    """
    if sum(heights) != len(problem.target) or min(heights, default=0) < 1:
        raise UsageError(f"{what}: weights of {list(heights)} outputs are not a stack of {len(problem.target)} rows.")
    return split_rows(factorize(problem, what).changed(_evened), heights)


def _evened(left: Tensor, right: Tensor) -> Factors:
    """Split the norm of each rank-one term of the whole group evenly between A and the B_i: in range when rounded."""
    ratio = (right.double().norm(dim=1) / left.double().norm(dim=0).clamp_min(1e-300)).clamp(1e-12, 1e12).sqrt()
    ratio = ratio.to(right.dtype)
    return left * ratio, right / ratio[:, None]


def group_curve_under(solved: Sequence[Factorization], problems: Sequence[Problem], what: str = "group") -> Tensor:
    """Squared error of each truncation of a group that shares A, in the metrics of other problems.

    Args:
        solved: of each weight, with one A.
        problems: targets and metrics to measure in, in the same order.
        what: the group's name in errors.

    Returns:
        (r + 1,) `sum_i tr(H_i E_ik G E_ik^T)`, `E_ik = T_i - B_ik A_k`, for k = 0 .. r, float64, clamped at 0.

    Raises:
        UsageError: if the problems are not of the same input.
    """
    left = torch.cat([found.left for found in solved])
    return curve_under(
        replace(solved[0], seen_factors=(left, solved[0].right), completion=None), stack_problems(problems, what)
    )


def stack_problems(problems: Sequence[Problem], what: str = "group") -> Problem:
    """One problem for all: targets stacked, outputs weighed in blocks.

    Raises:
        UsageError: if there is no problem, or they are not of the same input.
    """
    if not problems:
        raise UsageError(f"{what}: a group of no weights cannot share a factor. Name one weight at least.")
    first = problems[0]
    for place, other in enumerate(problems):
        if other.target.shape[1] != first.target.shape[1] or not _same(other.right, first.right):
            raise UsageError(
                f"{what}: weights 1 and {place + 1} cannot share an input factor, for their inputs are not the same "
                f"({first.target.shape[1]} and {other.target.shape[1]} features, or other metrics). Group weights that "
                "read one input, and center all or none of them."
            )
    targets = [problem.target for problem in problems]
    left = stack_metrics([problem.left for problem in problems], [len(target) for target in targets])
    return Problem(torch.cat(targets), left, first.right)


def split_rows(solved: Factorization, heights: Sequence[int]) -> list[Factorization]:
    """Factors of stacked weights as those of each weight, with one A; views of the stacked ones."""
    sizes = list(heights)

    def share(place: int) -> Factorization:
        def own(factors: Factors) -> Factors:
            return factors[0].split(sizes)[place], factors[1]

        # `solved` keeps what it has completed: one decomposition for all.
        later = None if solved.completion is None else lambda: own(solved.factors)
        return Factorization(own(solved.seen_factors), solved.squared, () if place else solved.notes, later)

    return [share(place) for place in range(len(sizes))]


def _same(one: Metric, other: Metric) -> bool:
    """Whether two metrics weigh alike."""
    if (one.scale, one.ridge) != (other.scale, other.ridge):
        return False
    pairs = ((one.diagonal, other.diagonal), (one.full, other.full), (one.mean, other.mean))
    return all(
        a is b or (a is not None and b is not None and a.shape == b.shape and bool((a == b).all())) for a, b in pairs
    )
