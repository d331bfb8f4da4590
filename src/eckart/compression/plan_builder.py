"""Choose form and rank of every site within a budget: by predicted loss, uniformly, as a paper or a plan file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart.allocation import (
    DENSE,
    Bases,
    Choice,
    Curve,
    OverBudgetError,
    Plan,
    allocate,
    fitting_choices,
    largest_shared_rank,
    rank_steps,
    read_plan,
    shared_uniform,
    uniform,
)
from eckart.compression.budget import Budget
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.errors import UsageError
from eckart.forms import Block, form_named
from eckart.methods import Method
from eckart.model import Sites

Losses = Mapping[Block | None, Tensor]
"""Shape of block -> (r + 1,) loss at rank 0 .. r; a form without blocks has one curve, under None."""


def make_plan(
    sites: Sites,
    settings: Settings,
    recipe: Recipe,
    solved: Mapping[str, Losses | None],
    dense: Mapping[str, str],
    budget: Budget,
    fingerprint: str,
    bases: Bases = (),
) -> Plan:
    """Choose the form and rank of every site.

    Args:
        sites: the weights that can be factored.
        settings: method, form and allocation.
        recipe: keep, plan file, rank multiple.
        solved: site -> predicted losses, or, where ranks are uniform and there are several shapes of block to choose
            from, errors in the method's own metric; None where nothing is chosen by them.
        dense: sites that stay dense -> why.
        budget: what all sites together may store.
        fingerprint: of the model, written into the plan.
        bases: sites that are to share a basis; those that stay dense are left out of their group.

    Raises:
        UsageError: if the budget cannot be met or a plan file does not fit, naming file and site.
    """
    shapes = {site.name: site.shape for site in sites.chosen}
    if recipe.plan is not None:
        plan = read_plan(Path(recipe.plan), shapes)
        if plan.model and plan.model != fingerprint:
            raise UsageError(
                f"--plan {recipe.plan}: it was made for another model ({plan.model[:12]}, this one is "
                f"{fingerprint[:12]}). Make a plan for this model, or remove the entry 'model' to use it all the same."
            )
        missing = [n for n, c in plan.choices.items() if c.form != DENSE and n not in solved]
        if missing:
            raise UsageError(
                f"--plan {recipe.plan}: site {missing[0]} cannot be factored: "
                f'{dense.get(missing[0], "no statistics")}. Set its form to "dense".'
            )
        return with_changes(plan, model=fingerprint)
    reached = {name: shape for name, shape in shapes.items() if name in solved}
    fixed = sum(site.elements for site in sites.chosen if site.name not in reached)
    predicted: dict[str, float] = {}
    try:
        if settings.allocation == "paper":
            choices = {name: _paper_size(settings.method, name, shape) for name, shape in reached.items()}
        elif settings.allocation == "uniform":
            inside = sum(rows * columns for rows, columns in reached.values())
            # What stays dense counts too, so the others keep a little less than was asked for.
            keep = (budget.elements - fixed) / inside
            multiple = recipe.rank_multiple or 1
            if form_named(settings.form).shared_parameter is not None:
                choices = shared_uniform(reached, _among(bases, reached), keep, settings.form, multiple=multiple)
            else:
                choices = uniform(reached, keep, settings.form, multiple=multiple, errors=solved)
        else:
            curves = {name: _curve(shape, settings, recipe, solved[name]) for name, shape in reached.items()}
            choices = allocate(curves, budget.elements - fixed)
            predicted = {name: curve.losses[list(curve.choices).index(choices[name])] for name, curve in curves.items()}
    except OverBudgetError as error:
        raise budget.make_error(
            error.needed + fixed, "the smallest factors of the eligible weights store more"
        ) from error
    for name in shapes:
        choices.setdefault(name, Choice(DENSE))
    choices = {name: choices[name] for name in shapes}
    return Plan(choices, fingerprint, predicted)


def _among(bases: Bases, names: Mapping[str, object]) -> Bases:
    """The groups with only these sites; a group of one site is dropped."""
    found = [tuple(name for name in group if name in names) for group in bases]
    return [group for group in found if len(group) > 1]


def _paper_size(method: Method, name: str, shape: tuple[int, int]) -> Choice:
    """The size that the paper of the method states for a site."""
    assert method.paper_sizes is not None, f"{method.name} states no sizes"
    stated = method.paper_sizes(name, *shape)
    return Choice(DENSE) if stated is None else Choice(method.form, *stated)


Limits = dict[str, tuple[Choice, ...]]
"""Site -> for each shape of block that may be chosen, the largest choice."""


def largest_choices(
    sites: Sites, settings: Settings, recipe: Recipe, keep: float, budget: Budget, bases: Bases = ()
) -> Limits:
    """For each site the largest choices that any plan may make: factors beyond them need not be kept.

    Args:
        sites: the weights that can be factored.
        settings: form and allocation.
        recipe: plan file, rank multiple.
        keep: the largest fraction that will be asked for.
        budget: at that fraction.
        bases: sites that are to share a basis.
    """
    shapes = {site.name: site.shape for site in sites.chosen}
    if recipe.plan is not None:
        given = read_plan(Path(recipe.plan), shapes).choices
        return {name: _or_smallest([given[name]], shape, settings.form) for name, shape in shapes.items()}
    if settings.allocation == "paper":
        own = {name: _paper_size(settings.method, name, shape) for name, shape in shapes.items()}
        return {name: _or_smallest([own[name]], shape, settings.form) for name, shape in shapes.items()}
    # Sites that no data reaches stay dense, and leave the others less than this.
    share = budget.elements / sum(rows * columns for rows, columns in shapes.values())
    limits: Limits = {}
    form = settings.form
    if form_named(form).shared_parameter is not None:
        for group in bases:
            rank = largest_shared_rank(shapes, group, min(share, 1.0), form, multiple=recipe.rank_multiple or 1)
            limits |= dict.fromkeys(group, (Choice(form, max(rank, 1)),))
        form = form_named(form).unshared_form
    for name, shape in shapes.items():
        if name in limits:
            continue
        if settings.allocation == "loss" or keep >= 1:
            found = _smaller_than_dense(shape, form)
        else:
            found = fitting_choices(shape, share, form, multiple=recipe.rank_multiple or 1)
        # Nothing that fits is refused when the plan is made, which knows the smallest keep.
        limits[name] = _or_smallest(found, shape, form)
    return limits


def _smaller_than_dense(shape: tuple[int, int], form: str) -> list[Choice]:
    kind = form_named(form)
    found = [Choice(form, kind.max_rank(*shape, block), block) for block in kind.blocks(*shape)]
    return [choice for choice in found if choice.rank > 0]


def _or_smallest(found: list[Choice], shape: tuple[int, int], form: str) -> tuple[Choice, ...]:
    """The choices that are not dense; rank 1 of the form where there are none."""
    factored = tuple(choice for choice in found if choice.form != DENSE)
    return factored or (Choice(form, 1, form_named(form).blocks(*shape)[0]),)


def _curve(shape: tuple[int, int], settings: Settings, recipe: Recipe, losses: Losses | None) -> Curve:
    """All sizes that a site can have, each with its predicted loss."""
    assert losses is not None, "ranks are allocated by curves that were not made"
    form, multiple = form_named(settings.form), recipe.rank_multiple or default_multiple(shape)
    points: dict[int, tuple[float, Choice]] = {shape[0] * shape[1]: (0.0, Choice(DENSE))}
    for block, curve in losses.items():
        for rank in rank_steps(form.max_rank(*shape, block), multiple):
            choice, loss = Choice(settings.form, rank, block), float(curve[rank])
            stored = choice.stored(*shape)
            if stored not in points or loss < points[stored][0]:  # of two shapes of block with one size, the better
                points[stored] = loss, choice
    ordered = sorted(points)
    return Curve([points[n][1] for n in ordered], ordered, [points[n][0] for n in ordered])


def default_multiple(shape: tuple[int, int]) -> int:
    """Ranks are multiples of 8, which matrix products like, and of less where a weight is small."""
    multiple = 8
    while multiple > 1 and min(shape) < 64 * multiple:
        multiple //= 2
    return multiple


def stored_choices(compressed: nn.Module, sites: Sites, plan: Plan) -> dict[str, Choice]:
    """The choices as they are stored, also where a form fell back to another one."""
    choices: dict[str, Choice] = {}
    for site in sites.chosen:
        module: Any = compressed.get_submodule(site.name)
        basis = plan.choices[site.name].basis
        factored = hasattr(module, "form")
        choices[site.name] = Choice(module.form, module.rank, module.block, basis) if factored else Choice(DENSE)
    return choices
