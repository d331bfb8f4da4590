"""From solved sites and a budget to a plan: curves in units of loss, uniform ranks, or a plan that was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path

from torch import Tensor, nn

from eckart.allocate import (
    DENSE,
    Choice,
    Curve,
    OverBudgetError,
    Plan,
    allocate,
    rank_steps,
    read_plan,
    smallest_keep,
    uniform,
)
from eckart.errors import UsageError
from eckart.forms import form_named
from eckart.measure import sizes
from eckart.methods import METHODS, Method
from eckart.model import Sites, saved_numbers
from eckart.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """A recipe's choices with the method's own filled in.

    Attributes:
        method: with the metric that is used.
        form: name of the stored form.
        allocation: "uniform" or "loss".
        refit: whether sites are solved again on the compressed model's own inputs.
    """

    method: Method
    form: str
    allocation: str
    refit: bool

    @classmethod
    def of(cls, method: Method, recipe: Recipe) -> Settings:
        """What the recipe says, and the method where it says nothing.

        Raises:
            UsageError: if a refit is asked of a metric that knows no input Gram.
        """
        if recipe.metric is not None:
            other = METHODS[recipe.metric]
            method = with_changes(
                method, metric=other.metric, needs=other.needs, exact_for=other.exact_for, centred=other.centred
            )
        refit = method.refit if recipe.refit is None else recipe.refit
        if "gram" not in method.needs and refit:
            if recipe.refit:
                raise UsageError(
                    f"--refit: the metric of {recipe.metric or method.name} does not look at inputs, so there is "
                    "nothing to fit again; use --metric drone or kfac, or leave --refit out."
                )
            refit = False
        return cls(method, recipe.form or method.form, recipe.allocation or method.allocation, refit)

    def needs(self, *, planned: bool = False) -> frozenset[str]:
        """Statistics to gather; `planned`: ranks are given, so no curve in units of loss is needed."""
        needs = self.method.needs
        if self.allocation == "loss" and not planned:
            needs = needs | METHODS["kfac"].needs
        return needs | (frozenset({"gram"}) if self.refit else frozenset())


@dataclass(frozen=True)
class Budget:
    """Elements that may be stored, and what they are a fraction of.

    Attributes:
        elements: of the matrices of all sites.
        outside: elements of the model that are counted but in no site; 0 where `keep` is of the sites.
        dense: what `keep` is a fraction of.
        keep: as it was asked for.
        of: "sites" or "model".
    """

    elements: int
    outside: int
    dense: int
    keep: float
    of: str

    @classmethod
    def of_recipe(cls, model: nn.Module, sites: Sites, recipe: Recipe) -> Budget:
        """The budget of a recipe's keep."""
        inside = sum(site.elements for site in sites.chosen)
        whole = inside if recipe.keep_of == "sites" else sizes(model).model.elements
        outside = whole - inside
        if recipe.keep_of == "model":  # embeddings count as they will be stored
            outside -= saved_numbers(model, recipe.embeddings, recipe.embeddings_keep, recipe.ignore)
        elements = int(round(recipe.keep * whole, 6)) - outside
        return cls(elements, outside, whole, recipe.keep, recipe.keep_of)

    def refusal(self, needed: int, why: str) -> UsageError:
        """The error of a budget that is too small: `needed` elements of the sites would do."""
        least = smallest_keep(needed + self.outside, self.dense)
        return UsageError(
            f"--keep {self.keep:g} --keep-of {self.of}: {why}. The smallest keep that can be reached is {least:.4f}: "
            "raise --keep, or name more --targets."
        )


def make_plan(
    sites: Sites,
    settings: Settings,
    recipe: Recipe,
    solved: Mapping[str, Tensor | None],
    dense: Mapping[str, str],
    budget: Budget,
    mark: str,
) -> Plan:
    """Which form and rank every site gets.

    Args:
        sites: what was found.
        settings: method, form and allocation.
        recipe: keep, plan file, rank multiple.
        solved: site -> (r + 1,) predicted loss at rank 0 .. r, or None where ranks are uniform.
        dense: sites that stay dense -> why.
        budget: what all sites together may store.
        mark: fingerprint of the model, written into the plan.

    Raises:
        UsageError: if the budget cannot be met or a plan file does not fit, naming file and site.
    """
    shapes = {site.name: site.shape for site in sites.chosen}
    if recipe.plan is not None:
        plan = read_plan(Path(recipe.plan), shapes)
        if plan.model and plan.model != mark:
            raise UsageError(
                f"--plan {recipe.plan}: it was made for another model ({plan.model[:12]}, this one is {mark[:12]}). "
                "Make a plan for this model, or remove the entry 'model' to use it all the same."
            )
        missing = [n for n, c in plan.choices.items() if c.form != DENSE and n not in solved]
        if missing:
            raise UsageError(
                f"--plan {recipe.plan}: site {missing[0]} cannot be factored: "
                f'{dense.get(missing[0], "no statistics")}. Set its form to "dense".'
            )
        return with_changes(plan, model=mark)
    reached = {name: shape for name, shape in shapes.items() if name in solved}
    fixed = sum(site.elements for site in sites.chosen if site.name not in reached)
    predicted: dict[str, float] = {}
    try:
        if settings.allocation == "uniform":
            inside = sum(rows * columns for rows, columns in reached.values())
            # What stays dense counts too, so the others keep a little less than was asked for.
            keep = (budget.elements - fixed) / inside
            choices = uniform(reached, keep, settings.form, multiple=recipe.rank_multiple or 1)
        else:
            curves = {name: _curve(shape, settings, recipe, solved[name]) for name, shape in reached.items()}
            choices = allocate(curves, budget.elements - fixed)
            predicted = {name: curve.losses[list(curve.choices).index(choices[name])] for name, curve in curves.items()}
    except OverBudgetError as error:
        raise budget.refusal(error.needed + fixed, "the smallest factors of the eligible weights store more") from error
    for name in shapes:
        choices.setdefault(name, Choice(DENSE))
    choices = {name: choices[name] for name in shapes}
    return Plan(choices, mark, predicted)


def largest_ranks(sites: Sites, settings: Settings, recipe: Recipe, keep: float, budget: Budget) -> dict[str, int]:
    """For each site the largest rank that any plan may give it: factors beyond it need not be kept.

    Args:
        sites: what was found.
        settings: form and allocation.
        recipe: plan file, rank multiple.
        keep: the largest fraction that will be asked for.
        budget: at that fraction.
    """
    shapes = {site.name: site.shape for site in sites.chosen}
    most = {name: form_named(settings.form).max_rank(*shape) for name, shape in shapes.items()}
    if recipe.plan is not None:
        given = read_plan(Path(recipe.plan), shapes).choices
        return {name: given[name].rank if name in given and given[name].form != DENSE else 1 for name in shapes}
    if settings.allocation == "loss" or keep >= 1:
        return {name: max(rank, 1) for name, rank in most.items()}
    # Sites that no data reaches stay dense, and leave the others less than this.
    share = budget.elements / sum(rows * columns for rows, columns in shapes.values())
    return {name: _uniform_rank(shape, share, settings, recipe) for name, shape in shapes.items()}


def _uniform_rank(shape: tuple[int, int], keep: float, settings: Settings, recipe: Recipe) -> int:
    """The rank of a weight that keeps a fraction of its numbers; 1 where none is that small."""
    try:
        return uniform({"": shape}, keep, settings.form, multiple=recipe.rank_multiple or 1)[""].rank or 1
    except OverBudgetError:  # refused when the plan is made, which knows the smallest keep
        return 1


def _curve(shape: tuple[int, int], settings: Settings, recipe: Recipe, losses: Tensor | None) -> Curve:
    """What the site can be, and the loss that each option is predicted to cost."""
    assert losses is not None, "ranks are allocated by curves that were not made"
    form = form_named(settings.form)
    ranks = rank_steps(form.max_rank(*shape), recipe.rank_multiple or default_multiple(shape))
    choices = [Choice(settings.form, rank) for rank in ranks] + [Choice(DENSE)]
    stored = [choice.stored(*shape) for choice in choices]
    return Curve(choices, stored, [float(losses[rank]) for rank in ranks] + [0.0])


def default_multiple(shape: tuple[int, int]) -> int:
    """Ranks in multiples of 8 for hardware's sake, finer where a weight is small."""
    multiple = 8
    while multiple > 1 and min(shape) < 64 * multiple:
        multiple //= 2
    return multiple
