"""Budgets are kept and spent, predictions are the solver's, and a plan that cannot be says why."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import LAYERS, answer_of, error_of, every_form, few_examples, layer

from eckart.allocation import (
    DENSE,
    Choice,
    Curve,
    Plan,
    allocate,
    lower_hull,
    rank_steps,
    read_plan,
    stored_elements,
    uniform,
)
from eckart.compression import plan_builder
from eckart.compression.budget import Budget
from eckart.compression.factorize import solve
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.errors import UsageError
from eckart.forms import FORMS
from eckart.linalg import factorize
from eckart.methods import METHODS
from eckart.model import Site, Sites


def curve(stored: list[int], losses: list[float]) -> Curve:
    return Curve([Choice("lowrank", i + 1) for i in range(len(stored))], stored, losses)


@st.composite
def instances(draw: st.DrawFn, convex: bool = False) -> dict[str, Curve]:
    """Up to four sites of up to five options; losses fall, on convex curves ever more slowly."""
    curves = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        count = draw(st.integers(1, 5))
        steps = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
        drops = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
        stored = list(itertools.accumulate(steps))
        if convex:
            slopes = sorted(drops, reverse=True)
            drops = [slope * step for slope, step in zip(slopes, steps, strict=True)]
        losses = [float(sum(drops[i + 1 :])) for i in range(count)]
        curves[name] = curve(stored, losses)
    return curves


def spent(curves: dict[str, Curve], choices: dict[str, Choice]) -> int:
    return sum(c.stored[c.choices.index(choices[name])] for name, c in curves.items())


def lost(curves: dict[str, Curve], choices: dict[str, Choice]) -> float:
    return sum(c.losses[c.choices.index(choices[name])] for name, c in curves.items())


def best(curves: dict[str, Curve], budget: int) -> float:
    """By trying everything."""
    options = [zip(c.stored, c.losses, strict=True) for c in curves.values()]
    sums = (tuple(map(sum, zip(*combination, strict=True))) for combination in itertools.product(*options))
    return min(loss for size, loss in sums if size <= budget)


def budgets(curves: dict[str, Curve]) -> range:
    """From the smallest that is possible to a little above the largest of use."""
    return range(sum(c.stored[0] for c in curves.values()), sum(c.stored[-1] for c in curves.values()) + 3)


def steepest_segment(curves: dict[str, Curve]) -> float:
    """The largest drop of one hull segment: what a greedy walk over hulls may miss the optimum by."""
    drops = [0.0]
    for c in curves.values():
        hull = lower_hull(c.stored, c.losses)
        drops += [c.losses[i] - c.losses[j] for i, j in itertools.pairwise(hull)]
    return max(drops)


# -- by loss -----------------------------------------------------------------------------------------


@few_examples
@given(curves=instances())
def test_budget_is_kept_filled_and_near_the_optimum(curves):
    previous = float("inf")
    for budget in budgets(curves):
        choices = allocate(curves, budget)
        size, loss = spent(curves, choices), lost(curves, choices)
        assert size <= budget
        assert not steps_that_fit(curves, choices, budget - size)
        assert loss <= previous  # never worse with more to spend
        assert best(curves, budget) <= loss <= best(curves, budget) + steepest_segment(curves)
        previous = loss
    assert loss == sum(min(c.losses) for c in curves.values())


def steps_that_fit(curves: dict[str, Curve], choices: dict[str, Choice], left: int) -> list[tuple[str, int]]:
    found = []
    for name, c in curves.items():
        here = c.choices.index(choices[name])
        for there in range(here + 1, len(c.stored)):
            if c.losses[there] < c.losses[here] and c.stored[there] - c.stored[here] <= left:
                found.append((name, there))
    return found


@few_examples
@given(curves=instances(convex=True))
def test_optimal_on_convex_curves_at_the_budgets_of_their_vertices(curves):
    segments = []
    for c in curves.values():
        for i, j in itertools.pairwise(lower_hull(c.stored, c.losses)):
            segments.append(((c.losses[j] - c.losses[i]) / (c.stored[j] - c.stored[i]), c.stored[j] - c.stored[i]))
    budget = budgets(curves).start
    for _, size in [(0, 0), *sorted(segments)]:
        budget += size
        assert lost(curves, allocate(curves, budget)) == pytest.approx(best(curves, budget))


@few_examples
@given(curves=instances())
def test_choice_does_not_depend_on_the_order_of_sites(curves):
    turned = dict(reversed(curves.items()))
    for budget in budgets(curves):
        assert allocate(turned, budget) == allocate(curves, budget)


def test_ties_go_to_the_first_name():
    equal = {name: curve([1, 2], [5, 3]) for name in ("b", "a", "c")}
    assert {name for name, choice in allocate(equal, 4).items() if choice.rank == 2} == {"a"}
    assert {name for name, choice in allocate(equal, 5).items() if choice.rank == 2} == {"a", "b"}


def test_hull_skips_what_no_budget_should_choose():
    assert lower_hull([1, 2, 3, 4], [10, 9, 2, 0]) == [0, 2, 3]
    assert lower_hull([1, 2, 3], [5, 5, 5]) == [0]
    assert lower_hull([1, 2, 3], [5, 6, 1]) == [0, 2]
    assert lower_hull([4], [1]) == [0]


def test_unspent_budget_goes_to_points_above_the_hull():
    """Rank 2 is on no hull, but it fits where the vertex does not."""
    curves = {"a": curve([1, 3, 4], [10, 9, 0])}
    assert allocate(curves, 3)["a"].rank == 2


def test_a_site_may_stay_dense():
    """One site matters far more: it keeps every number before the other gets a second one."""
    choices = [Choice("lowrank", 1), Choice("lowrank", 2), Choice(DENSE)]
    curves = {"a": Curve(choices, [10, 20, 30], [900, 500, 0]), "b": Curve(choices, [10, 20, 30], [9, 5, 0])}
    assert allocate(curves, 40) == {"a": Choice(DENSE), "b": Choice("lowrank", 1)}


@few_examples
@given(curves=instances(), scale=st.integers(1, 97))
def test_impossible_keep_names_the_smallest_that_works(curves, scale):
    curves = {name: Curve(c.choices, [scale * s for s in c.stored], c.losses) for name, c in curves.items()}
    least, dense = (sum(c.stored[i] for c in curves.values()) for i in (0, -1))
    with pytest.raises(UsageError, match=f"budget of {least - 1} elements is below the {least}") as refusal:
        allocate(curves, least - 1)
    keep = named_keep(refusal.value)
    assert allocate(curves, int(keep * dense))
    assert int((keep - 1e-4) * dense) < least


def named_keep(error: UsageError) -> float:
    """The number in "the smallest keep ... is X"."""
    return float(re.search(r"smallest keep .*? is (\d\.\d+)", str(error)).group(1))


# -- predictions -------------------------------------------------------------------------------------


def predicted_curve(found, method: str, form: str, multiple: int | None) -> tuple[Curve, object, object]:
    """What a run predicts for one site."""
    rows, columns = found.weight.shape
    settings = Settings(METHODS[method], form, "loss", refit=False)
    site = Site("proj", "linear", rows, columns, False)
    largest = [Choice(form, min(rows, columns))]
    losses = solve(site, found.weight, found.moments, settings, largest, curve=True).losses
    problem = found.problem_of(method)
    made = plan_builder._curve(site.shape, settings, Recipe(rank_multiple=multiple), losses)
    return made, problem, factorize(problem)


@pytest.mark.parametrize("multiple", [None, 1, 3])
@pytest.mark.parametrize("method", METHODS)
@every_form
def test_predicted_loss_is_the_second_order_change_of_that_choice(method, form, multiple):
    """`1/2 (tokens / sequences) || H^(1/2) (W - W'_k) G^(1/2) ||^2` of the very factors that are stored."""
    found = layer(20, 16)
    made, _, solved = predicted_curve(found, method, form, multiple)
    kfac = found.problem_of("kfac")
    tokens, sequences = 96, 8
    for choice, stored, loss in zip(made.choices, made.stored, made.losses, strict=True):
        assert stored == choice.stored(20, 16)
        if choice.form == DENSE:
            assert loss == 0
            continue
        assert choice.rank % (multiple or 1) == 0
        left, right = solved.truncated(choice.rank)
        assert loss == pytest.approx(0.5 * tokens / sequences * error_of(kfac, left @ right), rel=1e-8)
    assert list(made.stored) == sorted(set(made.stored))
    assert made.choices[-1] == Choice(DENSE)


def test_kfac_prediction_is_the_solvers_own_curve():
    made, problem, solved = predicted_curve(LAYERS["square"], "kfac", "lowrank", 1)
    for choice, loss in zip(made.choices[:-1], made.losses, strict=False):
        assert loss == pytest.approx(6 * float(solved.curve[choice.rank]), rel=1e-12)
        assert loss == pytest.approx(6 * error_of(problem, answer_of(problem, choice.rank)), rel=1e-8)


# -- uniform -----------------------------------------------------------------------------------------

SHAPES = {"a": (64, 48), "b": (48, 64), "c": (40, 40), "d": (96, 24)}


@pytest.mark.parametrize("multiple", [1, 8])
@every_form
def test_uniform_takes_the_largest_rank_that_fits_everywhere(form, multiple):
    for keep in (0.9, 0.7, 0.5, 0.35):
        for name, choice in uniform(SHAPES, keep, form, multiple=multiple).items():
            allowed = keep * SHAPES[name][0] * SHAPES[name][1]
            assert choice.stored(*SHAPES[name]) <= allowed
            if choice.rank % multiple == 0:
                assert Choice(form, choice.rank + multiple).stored(*SHAPES[name]) > allowed
            else:  # too small for a multiple
                assert choice.rank < multiple
                assert Choice(form, choice.rank + 1).stored(*SHAPES[name]) > allowed


@every_form
def test_uniform_at_keep_one_leaves_everything(form):
    assert set(uniform(SHAPES, 1.0, form).values()) == {Choice(DENSE)}


@pytest.mark.parametrize("shapes", [{"big": (64, 64), "small": (7, 5)}, {"odd": (29, 31)}, {"a": (3, 3), "b": (2, 9)}])
@every_form
def test_uniform_names_the_smallest_keep_that_works(form, shapes):
    with pytest.raises(UsageError, match=r"--keep 0\.001: .*Raise --keep.*--ignore") as refusal:
        uniform(shapes, 0.001, form)
    keep = named_keep(refusal.value)
    choices = uniform(shapes, keep, form)
    assert stored_elements(choices, shapes) <= keep * sum(rows * columns for rows, columns in shapes.values())
    with pytest.raises(UsageError, match="smallest keep"):
        uniform(shapes, keep - 1e-4, form)


@every_form
def test_a_vector_cannot_be_made_smaller(form):
    with pytest.raises(UsageError, match=r"score cannot be stored that small.*is 1\.0000"):
        uniform({"score": (1, 30)}, 0.9, form)


def test_rank_steps():
    assert list(rank_steps(30, 8)) == [8, 16, 24]
    assert list(rank_steps(5, 8)) == [1, 2, 3, 4, 5]
    assert list(rank_steps(0, 8)) == []


# -- the largest rank of each site: nothing beyond it is kept -----------------------------------------


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
) -> tuple[plan_builder.Limits, dict[str, Choice]]:
    """The limits, and what a plan at the same uniform budget chooses where only some sites are reached."""
    settings, sites = Settings(METHODS["svd"], form, "uniform", refit=False), sites_of(shapes)
    budget = budget_of(shapes, keep, outside)
    limits = plan_builder.largest_choices(sites, settings, recipe, keep, budget)
    plan = plan_builder.make_plan(sites, settings, recipe, dict.fromkeys(reached), {}, budget, "")
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
    found = plan_builder.largest_choices(sites_of(SHAPES), settings, Recipe(), 0.1, budget_of(SHAPES, 0.1))
    limits = {name: choice.rank for name, (choice,) in found.items()}
    for name, (rows, columns) in SHAPES.items():
        assert Choice(form, limits[name]).stored(rows, columns) < rows * columns
        assert Choice(form, limits[name] + 1).stored(rows, columns) >= rows * columns
    curves = {
        name: plan_builder._curve(shape, settings, Recipe(rank_multiple=1), {None: torch.arange(100.0).flip(0)})
        for name, shape in SHAPES.items()
    }
    assert limits == {name: max(choice.rank for choice in c.choices) for name, c in curves.items()}


@every_form
def test_a_site_whose_factors_save_nothing_keeps_one_rank_all_the_same(form):
    settings = Settings(METHODS["kfac"], form, "loss", refit=False)
    shapes = {"score": (1, 30)}
    assert plan_builder.largest_choices(sites_of(shapes), settings, Recipe(), 0.5, budget_of(shapes, 0.5)) == {
        "score": (
            Choice(FORMS[form].unshared_form if FORMS[form].shared_parameter else form, 1),
        )  # what shares with none
    }


@pytest.mark.parametrize("allocation", ["loss", "uniform"])
def test_a_given_plan_says_how_far_factors_are_kept(allocation, tmp_path):
    content = PLAN.to_json()
    del content["sites"]["d"]
    settings = Settings(METHODS["kfac"], "pivoted", allocation, refit=False)
    recipe = Recipe(plan=str(written(tmp_path, content)))
    limits = plan_builder.largest_choices(sites_of(SHAPES), settings, recipe, 0.5, budget_of(SHAPES, 0.5))
    assert {name: choice.rank for name, (choice,) in limits.items()} == {"a": 12, "b": 8, "c": 1, "d": 1}
    assert [limits[name][0].form for name in "abcd"] == ["pivoted", "lowrank", "pivoted", "pivoted"]


# -- the plan ----------------------------------------------------------------------------------------

PLAN = Plan(
    {"a": Choice("pivoted", 12), "b": Choice("lowrank", 8), "c": Choice(DENSE), "d": Choice("lowrank", 3)},
    model="abc123",
    predicted={"a": 0.25},
)


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_plan_round_trip(tmp_path):
    content = PLAN.to_json()
    assert content["sites"]["a"] == {"form": "pivoted", "rank": 12, "predicted_loss": 0.25}
    assert content["sites"]["c"] == {"form": "dense"}
    again = read_plan(written(tmp_path, content), SHAPES)
    assert (again.choices, again.model) == (PLAN.choices, PLAN.model)


def test_edited_plan(tmp_path):
    content = PLAN.to_json()
    content["sites"]["a"] = {"form": "lowrank", "rank": 5}
    content["sites"]["b"] = {"form": "dense"}
    del content["sites"]["d"], content["model"]
    again = read_plan(written(tmp_path, content), SHAPES)
    assert again.choices == {"a": Choice("lowrank", 5), **{name: Choice(DENSE) for name in "bcd"}}
    assert again.model == ""


def plan_with(**site: object) -> dict:
    content = PLAN.to_json()
    content["sites"]["a"] = site
    return content


BAD_PLANS = {
    "not JSON": ('{"sites": \n oops}', "not JSON at line 2"),
    "not an object": ([1, 2], "it needs an object 'sites'"),
    "no sites": ({"format_version": 1}, "it needs an object 'sites'"),
    "sites are a list": ({"format_version": 1, "sites": []}, "it needs an object 'sites'"),
    "newer version": ({**PLAN.to_json(), "format_version": 2}, "format_version is 2, this eckart reads 1"),
    "no version": ({"sites": {}}, "format_version is None"),
    "unknown site": (
        {"format_version": 1, "sites": {"h.9.q": {"form": "dense"}}},
        r"site 'h\.9\.q' is not one of this model's 4 sites",
    ),
    "site is a number": ({"format_version": 1, "sites": {"a": 7}}, "site a: needs an object with 'form' and 'rank'"),
    "no form": (plan_with(rank=3), "site a: needs an object with 'form'"),
    "unknown form": (plan_with(form="lowrnk", rank=3), "site a: form 'lowrnk' is not known"),
    "form is a list": (plan_with(form=["lowrank"], rank=3), r"site a: form \['lowrank'\] is not known"),
    "no rank": (plan_with(form="lowrank"), r"site a: rank None must be a whole number in 1\.\.48"),
    "rank too large": (plan_with(form="lowrank", rank=49), r"site a: rank 49 .* for a weight of 64 x 48"),
    "rank zero": (plan_with(form="lowrank", rank=0), "site a: rank 0"),
    "rank negative": (plan_with(form="lowrank", rank=-3), "site a: rank -3"),
    "rank is true": (plan_with(form="lowrank", rank=True), "site a: rank True"),
    "rank is a fraction": (plan_with(form="lowrank", rank=3.0), r"site a: rank 3\.0"),
    "rank is text": (plan_with(form="lowrank", rank="3"), "site a: rank '3'"),
}


@pytest.mark.parametrize(("content", "named"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plan_is_refused_by_file_site_and_field(content, named, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=re.escape(str(path)) + "[^§]*" + named):
        read_plan(path, SHAPES)


def test_plan_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.json: cannot be read"):
        read_plan(tmp_path / "nowhere.json", SHAPES)
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path, SHAPES)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / "plan.json", SHAPES)


def test_stored_elements_counts_every_site():
    dense = sum(rows * columns for rows, columns in SHAPES.values())
    assert stored_elements({name: Choice(DENSE) for name in SHAPES}, SHAPES) == dense
    assert stored_elements({"a": Choice("lowrank", 2), "c": Choice(DENSE)}, SHAPES) == 2 * (64 + 48) + 1600
    assert stored_elements({"a": Choice("pivoted", 2)}, SHAPES) == 2 * (64 + 48 - 2) + 64
