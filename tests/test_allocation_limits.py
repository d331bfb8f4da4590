"""What a run predicts for each choice, and the largest rank of each site: nothing beyond it is kept."""

import itertools
import json
from collections.abc import Iterable

import pytest
import torch
from problems import LAYERS, answer_of, error_of, every_form, layer

from eckart.allocation import DENSE, EXACT, Choice, Curve, RankMultiples
from eckart.compression.budget import Budget
from eckart.compression.curves import site_curve
from eckart.compression.plan_builder import Solved, make_plan
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.size_limits import Limits, largest_choices
from eckart.compression.solve_site import solve_site
from eckart.errors import UsageError
from eckart.forms import FORMS
from eckart.linalg import factorize
from eckart.methods import METHODS
from eckart.model import Site, Sites


def elements_of(shapes: dict[str, tuple[int, int]]):
    """What choices cost: the elements that they store."""
    return lambda choices: sum(choice.stored(*shapes[name]) for name, choice in choices.items())


def curve_of(name: str, shape: tuple[int, int], form: str, losses, multiple: int | None) -> Curve:
    return site_curve(name, shape, [form], losses, RankMultiples(fixed=multiple), elements_of({name: shape}))


def predicted_curve(found, method: str, form: str, multiple: int | None) -> tuple[Curve, object, object]:
    """What a run predicts for one site."""
    rows, columns = found.weight.shape
    settings = Settings(METHODS[method], form, "loss", refit=False)
    site = Site("proj", "linear", rows, columns, False)
    largest = [Choice(form, min(rows, columns))]
    losses = solve_site(site, found.weight, found.moments, settings, largest, curve=True).losses
    problem = found.problem_of(method)
    made = curve_of("proj", site.shape, form, losses, multiple)
    return made, problem, factorize(problem)


@pytest.mark.parametrize(("method", "multiple"), [("kfac", 1), ("kfac", 3), ("fwsvd", None), ("asvd", None)])
@every_form
def test_predicted_loss_is_the_second_order_change_of_that_choice(method, form, multiple):
    """`1/2 (tokens / sequences) || H^(1/2) (W - W'_k) G^(1/2) ||^2` of the very factors that are stored."""
    found = layer(20, 16)
    made, _, solved = predicted_curve(found, method, form, multiple)
    kfac = found.problem_of("kfac")
    tokens, sequences = 96, 8
    for option, stored, loss in zip(made.options, made.costs, made.losses, strict=True):
        choice = option.choices["proj"]
        assert stored == choice.stored(20, 16)
        if choice.form == DENSE:
            assert loss == 0
            continue
        assert choice.rank % (multiple or 1) == 0
        left, right = solved.truncated(choice.rank)
        assert loss == pytest.approx(0.5 * tokens / sequences * error_of(kfac, left @ right), rel=1e-8)
    assert list(made.costs) == sorted(set(made.costs))
    assert made.options[-1].choices == {"proj": Choice(DENSE)}


def test_kfac_prediction_is_the_solvers_own_curve():
    made, problem, solved = predicted_curve(LAYERS["square"], "kfac", "lowrank", 1)
    for option, loss in zip(made.options[:-1], made.losses, strict=False):
        choice = option.choices["proj"]
        assert loss == pytest.approx(6 * float(solved.curve[choice.rank]), rel=1e-12)
        assert loss == pytest.approx(6 * error_of(problem, answer_of(problem, choice.rank)), rel=1e-8)


SHAPES = {"a": (64, 48), "b": (48, 64), "c": (40, 40), "d": (96, 24)}


def sites_of(shapes: dict[str, tuple[int, int]]) -> Sites:
    return Sites(tuple(Site(name, "linear", *shape, has_bias=False) for name, shape in shapes.items()), {})


def budget_of(shapes: dict[str, tuple[int, int]], keep: float, outside: int = 0) -> Budget:
    """`outside`: elements beside the sites, where keep is of the whole model."""
    inside = sum(rows * columns for rows, columns in shapes.values())
    return Budget(int(keep * (inside + outside)) - outside, outside, inside + outside, keep, "model")


def limits_and_plan(
    shapes: dict[str, tuple[int, int]],
    form: str,
    keep: float,
    *,
    reached: Iterable[str],
    recipe: Recipe = Recipe(),  # noqa: B008 - it is frozen
    outside: int = 0,
) -> tuple[Limits, dict[str, Choice]]:
    """The limits, and what a plan at the same uniform budget chooses where only some sites are reached."""
    settings, sites = Settings(METHODS["svd"], form, "uniform", refit=False), sites_of(shapes)
    budget = budget_of(shapes, keep, outside)
    multiples = RankMultiples(fixed=recipe.rank_multiple)
    limits = largest_choices(sites, settings, recipe, keep, budget, multiples)
    plan = make_plan(sites, settings, recipe, Solved(dict.fromkeys(reached)), budget, "", multiples)
    return limits, plan.choices


@pytest.mark.parametrize("outside", [0, 1000])
@pytest.mark.parametrize("multiple", [None, 8])
@every_form
def test_uniform_factors_are_kept_up_to_the_rank_of_the_plan(form, multiple, outside):
    recipe = Recipe(rank_multiple=multiple)
    for keep in (0.35, 0.5, 0.7, 0.9, 0.99):
        limits, choices = limits_and_plan(SHAPES, form, keep, reached=SHAPES, recipe=recipe, outside=outside)
        assert limits == {name: (choice,) for name, choice in choices.items()}


@pytest.mark.parametrize("multiple", [None, 8])
@every_form
def test_no_plan_asks_for_more_where_some_sites_are_not_reached(form, multiple):
    """They stay dense, and the others get less than was counted with."""
    smaller = 0
    for some in itertools.chain.from_iterable(itertools.combinations(SHAPES, size) for size in (1, 2, 3)):
        for keep in (0.9, 0.97):
            recipe = Recipe(rank_multiple=multiple)
            try:
                limits, choices = limits_and_plan(SHAPES, form, keep, reached=some, recipe=recipe)
            except UsageError:  # what stays dense leaves too little
                continue
            assert all(choices[name].rank <= limits[name][0].rank for name in some)
            smaller += sum(choices[name].rank < limits[name][0].rank for name in some)
            assert {choices[name] for name in SHAPES if name not in some} == {Choice(DENSE)}
    assert smaller


@every_form
def test_a_site_that_can_only_stay_dense_limits_no_other(form):
    """A vector cannot be made smaller; where no token reaches it nobody asks it to be."""
    limits, choices = limits_and_plan(SHAPES | {"score": (1, 30)}, form, 0.5, reached=SHAPES)
    assert all(0 < choices[name].rank <= limits[name][0].rank for name in SHAPES)


@every_form
def test_by_loss_any_rank_that_saves_something_may_be_asked_for(form):
    settings = Settings(METHODS["kfac"], form, "loss", refit=False)
    found = largest_choices(sites_of(SHAPES), settings, Recipe(), 0.1, budget_of(SHAPES, 0.1), EXACT)
    form = FORMS[form].unshared_form if FORMS[form].shared_parameter else form  # of a site by itself
    limits = {name: choice.rank for name, (choice,) in found.items()}
    for name, (rows, columns) in SHAPES.items():
        assert Choice(form, limits[name]).stored(rows, columns) < rows * columns
        assert Choice(form, limits[name] + 1).stored(rows, columns) >= rows * columns
    curves = {
        name: curve_of(name, shape, form, {None: torch.arange(100.0).flip(0)}, 1) for name, shape in SHAPES.items()
    }
    assert limits == {name: max(o.choices[name].rank for o in c.options) for name, c in curves.items()}


@every_form
def test_a_site_whose_factors_save_nothing_keeps_one_rank_all_the_same(form):
    settings = Settings(METHODS["kfac"], form, "loss", refit=False)
    shapes = {"score": (1, 30)}
    assert largest_choices(sites_of(shapes), settings, Recipe(), 0.5, budget_of(shapes, 0.5), EXACT) == {
        "score": (
            Choice(FORMS[form].unshared_form if FORMS[form].shared_parameter else form, 1),
        )  # what shares with none
    }


@pytest.mark.parametrize("allocation", ["loss", "uniform"])
def test_a_given_plan_says_how_far_factors_are_kept(allocation, tmp_path):
    sites = {"a": {"form": "pivoted", "rank": 12}, "b": {"form": "lowrank", "rank": 8}, "c": {"form": "dense"}}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"format_version": 1, "sites": sites}))
    settings = Settings(METHODS["kfac"], "pivoted", allocation, refit=False)
    recipe = Recipe(plan=str(file))
    limits = largest_choices(sites_of(SHAPES), settings, recipe, 0.5, budget_of(SHAPES, 0.5), EXACT)
    assert {name: choice.rank for name, (choice,) in limits.items()} == {"a": 12, "b": 8, "c": 1, "d": 1}
    assert [limits[name][0].form for name in "abcd"] == ["pivoted", "lowrank", "pivoted", "pivoted"]
