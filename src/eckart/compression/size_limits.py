"""The largest sizes that a plan may choose: factors beyond them need not be kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eckart.allocation import (
    DENSE,
    Bases,
    Choice,
    RankMultiples,
    fitting_choices,
    largest_shared_rank,
    read_plan,
)
from eckart.compression.budget import Budget
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.forms import form_named
from eckart.methods import Method
from eckart.model import Sites

Limits = dict[str, tuple[Choice, ...]]
"""Site -> for each shape of block that may be chosen, the largest choice."""


def largest_choices(
    sites: Sites,
    settings: Settings,
    recipe: Recipe,
    keep: float,
    budget: Budget,
    multiples: RankMultiples,
    bases: Bases = (),
) -> Limits:
    """For each site the largest choices that any plan may make of factors of its own.

    Args:
        sites: the weights that can be factored.
        settings: form and allocation.
        recipe: plan file.
        keep: the largest fraction that will be asked for.
        budget: at that fraction.
        multiples: of ranks.
        bases: sites of several layers that are to share a basis.
    """
    shapes = {site.name: site.shape for site in sites.chosen}
    form = settings.site_forms[0]
    if recipe.plan is not None:
        given = read_plan(Path(recipe.plan), shapes).choices
        return {name: _or_smallest(_own_factors(given[name]), shape, form) for name, shape in shapes.items()}
    if settings.allocation == "paper":
        own = {name: paper_size(settings.method, name, shape) for name, shape in shapes.items()}
        return {name: _or_smallest([own[name]], shape, form) for name, shape in shapes.items()}
    # Sites that no data reaches stay dense, and leave the others less than this.
    share = budget.elements / sum(rows * columns for rows, columns in shapes.values())
    limits: Limits = {}
    for group in bases:
        rank = largest_shared_rank(shapes, group, min(share, 1.0), settings.form, multiples=multiples)
        limits |= dict.fromkeys(group, (Choice(settings.form, max(rank, 1)),))
    for name, shape in shapes.items():
        if name in limits:
            continue
        if settings.allocation == "loss" or keep >= 1:
            found = _smaller_than_dense(shape, settings.site_forms)
        else:
            found = fitting_choices(shape, share, form, multiples=multiples)
        # Nothing that fits is refused when the plan is made, which knows the smallest keep.
        limits[name] = _or_smallest(found, shape, form)
    return limits


def largest_joint_rank(shapes: Sequence[tuple[int, int]], form: str, *, planned: bool) -> int:
    """The largest rank at which weights (out, in) with one input factor store fewer numbers than dense ones; 0 if none.

    Args:
        shapes: of the weights, of one width.
        form: that shares the factor.
        planned: whether a plan file may ask for more than that.
    """
    if planned:
        return min(sum(rows for rows, _ in shapes), shapes[0][1])
    named = {str(number): shape for number, shape in enumerate(shapes)}
    return largest_shared_rank(named, list(named), 1.0, form)


def paper_size(method: Method, name: str, shape: tuple[int, int]) -> Choice:
    """The size that the paper of the method states for a site."""
    assert method.paper_sizes is not None, f"{method.name} states no sizes"
    stated = method.paper_sizes(name, *shape)
    return Choice(DENSE) if stated is None else Choice(method.form, *stated)


def _own_factors(choice: Choice) -> list[Choice]:
    """The choice, if it is made of factors that the site has alone."""
    together = choice.form != DENSE and form_named(choice.form).shared_by in ("input", "neurons")
    return [] if together else [choice]


def _smaller_than_dense(shape: tuple[int, int], forms: Sequence[str]) -> list[Choice]:
    """For each shape of block the largest choice; of several forms, which have the same factors, the largest rank."""
    largest: dict[object, Choice] = {}
    for form in forms:
        kind = form_named(form)
        for block in kind.blocks(*shape):
            choice = Choice(form, kind.max_rank(*shape, block), block)
            if choice.rank > largest.get(block, Choice(form)).rank:
                largest[block] = choice
    return list(largest.values())


def _or_smallest(found: list[Choice], shape: tuple[int, int], form: str) -> tuple[Choice, ...]:
    """The choices that are not dense; rank 1 of the form where there are none."""
    factored = tuple(choice for choice in found if choice.form != DENSE)
    return factored or (Choice(form, 1, form_named(form).blocks(*shape)[0]),)
