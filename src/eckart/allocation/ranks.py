"""Ranks to choose from, and the refusal of a budget that none of them meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eckart.errors import UsageError
from eckart.forms import form_named

WIDE = 1024
"""From this width on, ranks are multiples of :data:`WIDE_MULTIPLE`."""

WIDE_MULTIPLE = 64
"""A tile of a matrix product: of tensor cores, and of the vector units of a CPU."""

LEAST_MULTIPLE = 8
"""Rows of 16 bytes in half precision; smaller weights than 16 times this have multiples of less."""


class OverBudgetError(UsageError):
    """A budget that no choice of sizes meets.

    Attributes:
        needed: what would be enough for the sites that were to be allocated, in the unit of the budget.
    """

    def __init__(self, message: str, needed: float) -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class RankMultiples:
    """What the ranks of a weight are multiples of, so that the products of the target run at full speed.

    A product with a rank that is no multiple of the target's tile takes as long as one with the next multiple, or
    longer; half-precision rows that are no multiple of 16 bytes take slower kernels.

    Attributes:
        target: "cpu", "cuda", or "none": every rank, the exact sizes of the papers.
        fixed: so much for every weight, whatever the target.
    """

    target: str = "none"
    fixed: int | None = None

    def of(self, shape: tuple[int, int], form: str) -> int:
        """The multiple for a weight (out, in)."""
        if self.fixed is not None:
            return self.fixed
        return 1 if self.target == "none" else form_named(form).rank_multiple(*shape, default_multiple(shape))

    def ranks(self, shape: tuple[int, int], form: str, largest: int) -> Sequence[int]:
        """Ranks of a weight to choose from by predicted loss, up to the largest.

        Of a target, also 1, 2, 4, ... below the first multiple, so that a small budget can be met.
        """
        multiple = self.of(shape, form)
        if self.fixed is not None:
            return rank_steps(largest, multiple)
        halves = [multiple >> shift for shift in range(multiple.bit_length() - 1, 0, -1)]
        return [rank for rank in (*halves, *range(multiple, largest + 1, multiple)) if rank <= largest]


EXACT = RankMultiples()


def default_multiple(shape: tuple[int, int]) -> int:
    """64 from width 1,024 on; 16 from 512 on; 8 below, and less where a weight is so small that 8 would be coarse."""
    smaller = min(shape)
    if smaller >= WIDE:
        return WIDE_MULTIPLE
    multiple = 2 * LEAST_MULTIPLE if smaller >= 512 else LEAST_MULTIPLE
    while multiple > 1 and smaller < 16 * multiple:
        multiple //= 2
    return multiple


def smallest_keep(needed: float, dense: float) -> float:
    """The least keep of four digits whose budget, `keep * dense`, reaches what is needed; at most 1."""
    steps = -(-needed * 10_000 // dense)
    while steps < 10_000 and steps / 10_000 * dense < needed:  # the product of two floats may fall just short
        steps += 1
    return min(steps / 10_000, 1.0)


def rank_steps(largest: int, multiple: int) -> Sequence[int]:
    """Ranks to choose from: multiples of `multiple`, or every rank where a weight is that small."""
    if largest < multiple:
        return range(1, largest + 1)
    return range(multiple, largest + 1, multiple)
