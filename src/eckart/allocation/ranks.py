"""Ranks to choose from, and the refusal of a budget that none of them meets."""

from __future__ import annotations

from collections.abc import Sequence

from eckart.errors import UsageError


class OverBudgetError(UsageError):
    """A budget that no choice of sizes meets.

    Attributes:
        needed: stored elements, over the sites that were to be allocated, that would be enough.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


def smallest_keep(needed: int, dense: int) -> float:
    """The least keep of four digits whose budget, `keep * dense`, reaches `needed` elements; at most 1."""
    steps = -(-needed * 10_000 // dense)
    while steps < 10_000 and steps / 10_000 * dense < needed:  # the product of two floats may fall just short
        steps += 1
    return min(steps / 10_000, 1.0)


def rank_steps(largest: int, multiple: int) -> Sequence[int]:
    """Ranks to choose from: multiples of `multiple`, or every rank where a weight is that small."""
    if largest < multiple:
        return range(1, largest + 1)
    return range(multiple, largest + 1, multiple)
