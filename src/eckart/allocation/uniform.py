"""Uniform allocation: every site keeps the same fraction, as the papers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from eckart.allocation.plan import DENSE, Choice
from eckart.allocation.ranks import EXACT, OverBudgetError, RankMultiples, rank_steps, smallest_keep
from eckart.forms import Block, form_named


def uniform(
    shapes: Mapping[str, tuple[int, int]],
    keep: float,
    form: str,
    *,
    multiples: RankMultiples = EXACT,
    errors: Mapping[str, Mapping[Block | None, Sequence[float] | Tensor] | None] | None = None,
) -> dict[str, Choice]:
    """The largest rank of each site whose stored numbers are at most `keep` of its matrix.

    Of a form that cuts weights into blocks, the shape of block whose error at that rank is least.

    Args:
        shapes: site -> (out, in).
        keep: fraction of each matrix, in (0, 1]; 1 leaves everything dense.
        form: name of the form.
        multiples: what ranks are multiples of, where the site is large enough.
        errors: site -> shape of block -> error at rank 0, 1, ...; where they are not known, the shape that stores most
            of what may be stored is taken.

    Returns:
        Site -> choice.

    Raises:
        OverBudgetError: if some site cannot be that small, naming it and the smallest keep that can.
    """
    if keep >= 1:
        return {name: Choice(DENSE) for name in shapes}
    choices: dict[str, Choice] = {}
    least, tightest = 0.0, ""
    for name, shape in shapes.items():
        fitting = fitting_choices(shape, keep, form, multiples=multiples)
        if not fitting:
            smallest = min(Choice(form, 1, block).stored(*shape) for block in form_named(form).blocks(*shape))
            needed = smallest_keep(smallest, shape[0] * shape[1])
            if needed > least:
                least, tightest = needed, name
            continue
        known = (errors or {}).get(name)
        if known is None:
            choices[name] = max(fitting, key=lambda choice: choice.stored(*shape))
        else:
            choices[name] = min((c for c in fitting if c.block in known), key=lambda c: float(known[c.block][c.rank]))
    if tightest:
        raise OverBudgetError(
            f"--keep {keep:g}: {tightest} cannot be stored that small in form {form}; the smallest keep that "
            f"every site can reach is {least:.4f}. Raise --keep, use --allocation loss, or --ignore the site.",
            math.ceil(least * sum(rows * columns for rows, columns in shapes.values())),
        )
    return choices


def fitting_choices(
    shape: tuple[int, int], keep: float, form: str, *, multiples: RankMultiples = EXACT
) -> list[Choice]:
    """For each shape of block the largest rank whose stored numbers are at most `keep` of the matrix, if there is one.

    Args:
        shape: (out, in).
        keep: fraction of the matrix.
        form: name of the form.
        multiples: what ranks are multiples of, where the matrix is large enough.
    """
    kind, budget = form_named(form), keep * shape[0] * shape[1]
    multiple = multiples.of(shape, form)
    found: list[Choice] = []
    for block in kind.blocks(*shape):
        largest = kind.max_rank(*shape, block)
        # A site too small for a multiple that fits falls back to the largest rank that does.
        for ranks in (rank_steps(largest, multiple), range(1, largest + 1)):
            fitting = [rank for rank in ranks if Choice(form, rank, block).stored(*shape) <= budget]
            if fitting:
                found.append(Choice(form, fitting[-1], block))
                break
    return found
