"""Ranks of weights that share bases: the same fraction of every group, as the paper does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from eckart.allocation.plan import DENSE, Choice
from eckart.allocation.ranks import EXACT, OverBudgetError, RankMultiples, rank_steps, smallest_keep
from eckart.allocation.uniform import uniform
from eckart.forms import form_named

Bases = Sequence[Sequence[str]]
"""Groups of sites that share a basis, each of at least two."""


def shared_uniform(
    shapes: Mapping[str, tuple[int, int]], bases: Bases, keep: float, form: str, *, multiples: RankMultiples = EXACT
) -> dict[str, Choice]:
    """The largest rank of each group whose stored numbers are at most `keep` of its matrices; others as by `uniform`.

    A group of weights (m_i, n) has the rank `floor(keep n sum m_i / (n + sum m_i))`.

    Args:
        shapes: site -> (out, in).
        bases: groups; each has one width n.
        keep: fraction of the matrices of each group, in (0, 1]; 1 leaves everything dense.
        form: name of the form that shares.
        multiples: what ranks are multiples of, where there is such a rank that fits.

    Returns:
        Site -> choice; the first of a group holds the basis that the others name.

    Raises:
        OverBudgetError: if some group or site cannot be that small, naming it and the smallest keep that can.
    """
    if keep >= 1:
        return {name: Choice(DENSE) for name in shapes}
    choices: dict[str, Choice] = {}
    total = sum(rows * columns for rows, columns in shapes.values())
    most, tightest, least = 0, "", 0.0
    for group in bases:
        elements, once = sum(shapes[name][0] * shapes[name][1] for name in group), _stored(shapes, group, form, 1)
        rank = largest_shared_rank(shapes, group, keep, form, multiples=multiples)
        if rank < 1:
            needed = -(-once * total // elements)
            if needed > most:
                most, tightest, least = needed, group[0], smallest_keep(once, elements)
            continue
        choices[group[0]] = Choice(form, rank)
        choices |= {name: Choice(form, rank, basis=group[0]) for name in group[1:]}
    together = {name for group in bases for name in group}
    alone = {name: shape for name, shape in shapes.items() if name not in together}
    try:
        choices |= uniform(alone, keep, form_named(form).unshared_form, multiples=multiples)
    except OverBudgetError as error:
        inside = sum(rows * columns for rows, columns in alone.values())
        raise OverBudgetError(str(error), max(most, -(-error.needed * total // inside))) from None
    if tightest:
        raise OverBudgetError(
            f"--keep {keep:g}: {tightest} and what shares its basis cannot be stored that small; the smallest keep "
            f"that every group can reach is {least:.4f}. Raise --keep, or --ignore the sites.",
            most,
        )
    return choices


def largest_shared_rank(
    shapes: Mapping[str, tuple[int, int]],
    group: Sequence[str],
    keep: float,
    form: str,
    *,
    multiples: RankMultiples = EXACT,
) -> int:
    """The largest rank at which a group stores at most `keep` of its matrices, and less than all; 0 if none does."""
    outputs, columns = sum(shapes[name][0] for name in group), shapes[group[0]][1]
    elements, ranks = outputs * columns, range(1, min(outputs, columns) + 1)

    def count_fitting(numbers: float) -> int:
        return bisect_right(ranks, numbers, key=lambda rank: _stored(shapes, group, form, rank))

    largest = count_fitting(elements - 1)
    fitting = min(largest, count_fitting(keep * elements))
    multiple = multiples.of((sum(shapes[name][0] for name in group), shapes[group[0]][1]), form)
    return max((rank for rank in rank_steps(largest, multiple) if rank <= fitting), default=fitting)


def _stored(shapes: Mapping[str, tuple[int, int]], group: Sequence[str], form: str, rank: int) -> int:
    """Numbers that a group stores at a rank: the shared ones once. Of a shared factor, `k (n + sum m_i)`."""
    kind, columns = form_named(form), shapes[group[0]][1]
    each = sum(kind.size(shapes[name][0], columns, rank).parameters for name in group)
    return each - (len(group) - 1) * kind.shared_elements(columns, rank)
