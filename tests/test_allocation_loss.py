"""Allocation by loss: budgets are kept and spent where they lower the predicted loss most."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import few_examples

from eckart.allocation import (
    DENSE,
    Choice,
    Curve,
    Option,
    add,
    allocate,
    lower_hull,
    unite,
)
from eckart.errors import UsageError


def curve(costs: list[int], losses: list[float], site: str = "a", choices: list[Choice] | None = None) -> Curve:
    choices = choices or [Choice("lowrank", i + 1) for i in range(len(costs))]
    return Curve([Option.of_site(site, c, x) for c, x in zip(choices, losses, strict=True)], costs, losses)


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
        curves[name] = curve(stored, losses, name)
    return curves


def spent(curves: dict[str, Curve], choices: dict[str, Option]) -> int:
    return sum(c.costs[c.options.index(choices[name])] for name, c in curves.items())


def lost(curves: dict[str, Curve], choices: dict[str, Option]) -> float:
    return sum(c.losses[c.options.index(choices[name])] for name, c in curves.items())


def best(curves: dict[str, Curve], budget: int) -> float:
    """By trying everything."""
    options = [zip(c.costs, c.losses, strict=True) for c in curves.values()]
    sums = (tuple(map(sum, zip(*combination, strict=True))) for combination in itertools.product(*options))
    return min(loss for size, loss in sums if size <= budget)


def budgets(curves: dict[str, Curve]) -> range:
    """From the smallest that is possible to a little above the largest of use."""
    return range(sum(c.costs[0] for c in curves.values()), sum(c.costs[-1] for c in curves.values()) + 3)


def steepest_segment(curves: dict[str, Curve]) -> float:
    """The largest drop of one hull segment: what a greedy walk over hulls may miss the optimum by."""
    drops = [0.0]
    for c in curves.values():
        hull = lower_hull(c.costs, c.losses)
        drops += [c.losses[i] - c.losses[j] for i, j in itertools.pairwise(hull)]
    return max(drops)


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


def steps_that_fit(curves: dict[str, Curve], choices: dict[str, Option], left: int) -> list[tuple[str, int]]:
    found = []
    for name, c in curves.items():
        here = c.options.index(choices[name])
        for there in range(here + 1, len(c.costs)):
            if c.losses[there] < c.losses[here] and c.costs[there] - c.costs[here] <= left:
                found.append((name, there))
    return found


@few_examples
@given(curves=instances(convex=True))
def test_optimal_on_convex_curves_at_the_budgets_of_their_vertices(curves):
    segments = []
    for c in curves.values():
        for i, j in itertools.pairwise(lower_hull(c.costs, c.losses)):
            segments.append(((c.losses[j] - c.losses[i]) / (c.costs[j] - c.costs[i]), c.costs[j] - c.costs[i]))
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
    equal = {name: curve([1, 2], [5, 3], name) for name in ("b", "a", "c")}
    assert {name for name, option in allocate(equal, 4).items() if option.choices[name].rank == 2} == {"a"}
    assert {name for name, option in allocate(equal, 5).items() if option.choices[name].rank == 2} == {"a", "b"}


def test_hull_skips_what_no_budget_should_choose():
    assert lower_hull([1, 2, 3, 4], [10, 9, 2, 0]) == [0, 2, 3]
    assert lower_hull([1, 2, 3], [5, 5, 5]) == [0]
    assert lower_hull([1, 2, 3], [5, 6, 1]) == [0, 2]
    assert lower_hull([4], [1]) == [0]


def test_unspent_budget_goes_to_points_above_the_hull():
    """Rank 2 is on no hull, but it fits where the vertex does not."""
    curves = {"a": curve([1, 3, 4], [10, 9, 0])}
    assert allocate(curves, 3)["a"].choices["a"].rank == 2


def test_a_site_may_stay_dense():
    """One site matters far more: it keeps every number before the other gets a second one."""
    choices = [Choice("lowrank", 1), Choice("lowrank", 2), Choice(DENSE)]
    costs = [10, 20, 30]
    curves = {"a": curve(costs, [900, 500, 0], "a", choices), "b": curve(costs, [9, 5, 0], "b", choices)}
    found = allocate(curves, 40)
    assert (found["a"].choices, found["b"].choices) == ({"a": Choice(DENSE)}, {"b": Choice("lowrank", 1)})


@few_examples
@given(curves=instances(), scale=st.integers(1, 97))
def test_impossible_keep_names_the_smallest_that_works(curves, scale):
    curves = {name: Curve(c.options, [scale * s for s in c.costs], c.losses) for name, c in curves.items()}
    least, dense = (sum(c.costs[i] for c in curves.values()) for i in (0, -1))
    with pytest.raises(UsageError, match=f"budget of {least - 1} elements is below the {least}") as refusal:
        allocate(curves, least - 1)
    keep = named_keep(refusal.value)
    assert allocate(curves, int(keep * dense))
    assert int((keep - 1e-4) * dense) < least


@few_examples
@given(curves=instances())
def test_sum_of_curves_is_as_good_as_the_curves_apart(curves):
    """Allocating one budget to a sum of curves loses what allocating it to the curves does, at every vertex."""
    together = add(list(curves.values()))
    for cost, loss, option in zip(together.costs, together.losses, together.options, strict=True):
        assert set(option.choices) == set(curves)
        assert sum(option.losses.values()) == loss
        apart = allocate(curves, cost)
        assert loss >= best(curves, int(cost))
        assert loss <= lost(curves, apart) + steepest_segment(curves)
    assert list(together.costs) == sorted(set(together.costs))
    assert list(together.losses) == sorted(set(together.losses), reverse=True)


@few_examples
@given(curves=instances())
def test_united_curve_holds_the_best_option_of_every_cost(curves):
    united = unite(list(curves.values()))
    points = [point for c in curves.values() for point in zip(c.costs, c.losses, strict=True)]
    for cost in {cost for cost, _ in points}:
        reachable = [loss for own, loss in zip(united.costs, united.losses, strict=True) if own <= cost]
        assert min(reachable) == min(loss for own, loss in points if own <= cost)
    assert list(united.costs) == sorted(set(united.costs))
    assert list(united.losses) == sorted(set(united.losses), reverse=True)


def named_keep(error: UsageError) -> float:
    """The number in "the smallest keep ... is X"."""
    return float(re.search(r"smallest keep .*? is (\d\.\d+)", str(error)).group(1))
