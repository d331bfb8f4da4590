"""Uniform allocation: every site keeps the same fraction, as the papers do."""

from __future__ import annotations

import math
from collections.abc import Mapping

from eckart.allocate.plan import DENSE, Choice, OverBudgetError, rank_steps, smallest_keep
from eckart.forms import FactoredLinear, form_named


def uniform(shapes: Mapping[str, tuple[int, int]], keep: float, form: str, *, multiple: int = 1) -> dict[str, Choice]:
    """The largest rank of each site whose stored numbers are at most `keep` of its matrix.

    Args:
        shapes: site -> (out, in).
        keep: fraction of each matrix, in (0, 1]; 1 leaves everything dense.
        form: name of the form.
        multiple: ranks are multiples of this where the site is large enough.

    Returns:
        Site -> choice.

    Raises:
        OverBudgetError: if some site cannot be that small, naming it and the smallest keep that can.
    """
    if keep >= 1:
        return {name: Choice(DENSE) for name in shapes}
    kind = form_named(form)
    choices: dict[str, Choice] = {}
    least, tightest = 0.0, ""
    for name, (rows, columns) in shapes.items():
        budget = keep * rows * columns
        fitting = [
            rank
            for rank in rank_steps(kind.max_rank(rows, columns), multiple)
            if kind.size(rows, columns, rank).parameters <= budget
        ]
        # A site too small for a multiple that fits falls back to the largest rank that does.
        rank = fitting[-1] if fitting else _largest(kind, rows, columns, budget)
        if rank == 0:
            smallest = smallest_keep(kind.size(rows, columns, 1).parameters, rows * columns)
            if smallest > least:
                least, tightest = smallest, name
        choices[name] = Choice(form, max(rank, 1))
    if tightest:
        raise OverBudgetError(
            f"--keep {keep:g}: {tightest} cannot be stored that small in form {form}; the smallest keep that "
            f"every site can reach is {least:.4f}. Raise --keep, use --allocation loss, or --ignore the site.",
            math.ceil(least * sum(rows * columns for rows, columns in shapes.values())),
        )
    return choices


def _largest(kind: type[FactoredLinear], rows: int, columns: int, budget: float) -> int:
    ranks = range(1, kind.max_rank(rows, columns) + 1)
    return max(
        (r for r in ranks if kind.size(rows, columns, r).parameters <= budget),
        default=0,
    )
