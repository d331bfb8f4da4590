"""Choose form and rank of every site within a budget: by predicted loss, uniformly, as a paper or a plan file says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart.allocation import (
    DENSE,
    EXACT,
    Bases,
    Choice,
    OverBudgetError,
    Plan,
    RankMultiples,
    allocate,
    read_plan,
    shared_uniform,
    uniform,
)
from eckart.compression.budget import Budget, describe_dense
from eckart.compression.curves import Cost, Losses, Shapes, joint_curve, site_curve, unit_curves
from eckart.compression.neuron_layers import (
    Layers,
    by_width,
    counts,
    names_of,
    sliced_choices,
    sliced_curve,
)
from eckart.compression.pricing import Pricing, price_elements
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.size_limits import largest_joint_rank, paper_size
from eckart.errors import UsageError
from eckart.model import Sites, sliced_features
from eckart.model.neurons import NeuronLayer


@dataclass(frozen=True)
class Solved:
    """What the factors of a model say of the sizes that it can have.

    Attributes:
        sites: site -> predicted losses, or, where ranks are uniform and there are several shapes of block to choose
            from, errors in the method's own metric; None where nothing is chosen by them.
        dense: sites that stay dense -> why.
        bases: sites of several layers that are to share a basis.
        joint: sites that may have one input factor -> their predicted loss together at every rank, or None.
        sliced: layers that may lose neurons -> predicted loss with 0, 1, ... neurons, or None.
    """

    sites: Mapping[str, Losses | None]
    dense: Mapping[str, str] = field(default_factory=dict)
    bases: Bases = ()
    joint: Mapping[tuple[str, ...], Tensor | None] = field(default_factory=dict)
    sliced: Mapping[NeuronLayer, Tensor | None] = field(default_factory=dict)


def make_plan(
    sites: Sites,
    settings: Settings,
    recipe: Recipe,
    solved: Solved,
    budget: Budget,
    fingerprint: str,
    multiples: RankMultiples = EXACT,
    pricing: Pricing | None = None,
) -> Plan:
    """Choose the form and rank of every site.

    Args:
        sites: the weights that can be factored.
        settings: method, form and allocation.
        recipe: keep, plan file.
        solved: what is known of the factors.
        budget: what all sites together may store.
        fingerprint: of the model, written into the plan.
        multiples: of ranks.
        pricing: what is paid where ranks are chosen by predicted loss; None for stored elements.

    Raises:
        UsageError: if the budget cannot be met or a plan file does not fit, naming file and site.
    """
    shapes = {site.name: site.shape for site in sites.chosen}
    if recipe.plan is not None:
        return _plan_of_file(recipe.plan, shapes, solved, fingerprint)
    reached = {name: shape for name, shape in shapes.items() if name in solved.sites}
    fixed = sum(site.elements for site in sites.chosen if site.name not in reached)
    budget = budget.leaving_out(fixed)
    predicted: Mapping[str, float] = {}
    pricing = pricing or price_elements(shapes, budget)
    try:
        if settings.allocation == "paper":
            choices = {name: paper_size(settings.method, name, shape) for name, shape in reached.items()}
        elif settings.allocation == "uniform":
            inside = sum(rows * columns for rows, columns in reached.values())
            # What stays dense counts too, so the others keep a little less than was asked for.
            choices = _uniform_choices(reached, (budget.elements - fixed) / inside, settings, solved, multiples)
        else:
            left = pricing.rest([name for name in shapes if name not in reached])
            choices, predicted = _allocated_choices(reached, left, settings, solved, multiples, pricing.cost)
    except OverBudgetError as error:
        if pricing.seconds is not None:
            raise
        dense = {name: solved.dense.get(name, "no statistics") for name in shapes if name not in reached}
        raise budget.make_error(
            int(error.needed) + fixed,
            "the smallest factors of the eligible weights store more",
            describe_dense(dense, shapes, budget.of),
        ) from error
    for name in shapes:
        choices.setdefault(name, Choice(DENSE))
    return Plan({name: choices[name] for name in shapes}, fingerprint, dict(predicted))


def _plan_of_file(file: str, shapes: Shapes, solved: Solved, fingerprint: str) -> Plan:
    plan = read_plan(Path(file), shapes)
    if plan.model and plan.model != fingerprint:
        raise UsageError(
            f"--plan {file}: it was made for another model ({plan.model[:12]}, this one is "
            f"{fingerprint[:12]}). Make a plan for this model, or remove the entry 'model' to use it all the same."
        )
    missing = [n for n, c in plan.choices.items() if c.form != DENSE and n not in solved.sites]
    if missing:
        raise UsageError(
            f"--plan {file}: site {missing[0]} cannot be factored: "
            f'{solved.dense.get(missing[0], "no statistics")}. Set its form to "dense".'
        )
    # What was predicted for the plan as it was made says nothing of one that a person may have edited.
    return with_changes(plan, model=fingerprint, predicted={}, reasons={})


def _uniform_choices(
    shapes: Shapes, keep: float, settings: Settings, solved: Solved, multiples: RankMultiples
) -> dict[str, Choice]:
    layers = _layers_among(solved, shapes) if settings.rest else []
    if layers or settings.stock:
        sliced, shapes = _uniform_slices(layers, shapes, keep, settings, multiples)
        return sliced | _uniform_choices(
            shapes, 1.0 if settings.stock else keep, _without_slices(settings), solved, multiples
        )
    groups = _among(solved.joint if settings.joins else solved.bases, shapes)
    if groups or settings.factored_form not in settings.site_forms:
        return shared_uniform(shapes, groups, keep, settings.factored_form, multiples=multiples)
    return uniform(shapes, keep, settings.factored_form, multiples=multiples, errors=solved.sites)


def _without_slices(settings: Settings) -> Settings:
    return with_changes(settings, form=settings.factored_form, rest="", stock=False)


def _uniform_slices(
    layers: Layers, shapes: Shapes, keep: float, settings: Settings, multiples: RankMultiples
) -> tuple[dict[str, Choice], Shapes]:
    """The same fraction of the neurons of every layer, and the shapes of the weights that are in no layer."""
    inside = set(names_of(layers))
    rest = {name: shape for name, shape in shapes.items() if name not in inside}
    own = sum(shapes[name][0] * shapes[name][1] for name in inside)
    others = sum(rows * columns for rows, columns in rest.values())
    if settings.stock:  # the others stay dense, so that the layers keep less than was asked for
        keep = (keep * (own + others) - others) / own if own else 1.0
    choices: dict[str, Choice] = {}
    for layer in layers:
        fitting = int(keep * layer.width + 1e-9)
        if fitting < 1:
            least = max(1 / each.width for each in layers)
            needed = least * own + others if settings.stock else least * (own + others)
            raise OverBudgetError(f"{layer.reader}: at a keep of {keep:.4f} no neuron would be left", needed)
        count = max(counts(layer, shapes, multiples, fitting, stock=settings.stock), default=fitting)
        dense = dict.fromkeys(layer.names, Choice(DENSE))
        choices |= dense if fitting >= layer.width else sliced_choices(layer, shapes, count)
    return choices, rest


def _allocated_choices(
    shapes: Shapes, budget: float, settings: Settings, solved: Solved, multiples: RankMultiples, cost: Cost
) -> tuple[dict[str, Choice], dict[str, float]]:
    """Choices whose summed predicted loss is least, and their predicted losses."""
    layers = _layers_among(solved, shapes)
    sliced = set(names_of(layers)) if settings.rest else set()  # either all of a layer or none of it
    curves = {}
    for name, shape in shapes.items():
        forms, losses = settings.site_forms, solved.sites[name]
        if settings.stock or name in sliced:
            forms, losses = (), {}
        assert losses is not None, "ranks are allocated by curves that were not made"
        curves[name] = site_curve(name, shape, forms, losses, multiples, cost)
    alternatives = []
    for group in by_width(layers) if settings.stock else [[layer] for layer in layers]:
        losses_of = {layer: known for layer in group if (known := solved.sliced[layer]) is not None}
        if len(losses_of) == len(group):
            alternatives.append(
                (names_of(group), sliced_curve(group, shapes, losses_of, multiples, cost, stock=settings.stock))
            )
    for members, together in solved.joint.items():
        if settings.stock or sliced & set(members):
            continue
        largest = largest_joint_rank([shapes[name] for name in members], settings.joint_form, planned=False)
        if together is not None and largest > 0:
            curve = joint_curve(members, shapes, settings.joint_form, together, largest, multiples, cost)
            alternatives.append((members, curve))
    options = allocate(unit_curves(curves, alternatives), budget).values()
    choices = {name: choice for option in options for name, choice in option.choices.items()}
    return choices, {name: loss for option in options for name, loss in option.losses.items()}


def _layers_among(solved: Solved, names: Collection[str]) -> Layers:
    """The layers with only these sites, of which no joint group has a part and something else."""
    groups = [set(group) for group in solved.joint]
    return [
        layer
        for layer in solved.sliced
        if set(layer.names) <= set(names)
        and all(group <= set(layer.names) or group.isdisjoint(layer.names) for group in groups)
    ]


def _among(groups: Any, names: Mapping[str, object]) -> Bases:
    """The groups with only these sites; a group of one site is dropped."""
    found = [tuple(name for name in group if name in names) for group in groups]
    return [group for group in found if len(group) > 1]


def stored_choices(compressed: nn.Module, sites: Sites, plan: Plan) -> dict[str, Choice]:
    """The choices as they are stored, also where a form fell back to another one."""
    choices: dict[str, Choice] = {}
    sliced = sliced_features(compressed)
    for site in sites.chosen:
        module: Any = compressed.get_submodule(site.name)
        basis = plan.choices[site.name].basis
        if site.name in sliced:  # ordinary modules, whose size says the rank
            choices[site.name] = with_changes(plan.choices[site.name], rank=sliced[site.name].kept)
            continue
        factored = hasattr(module, "form")
        choices[site.name] = Choice(module.form, module.rank, module.block, basis) if factored else Choice(DENSE)
    return choices
