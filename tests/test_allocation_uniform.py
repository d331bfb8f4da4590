"""Uniform allocation: every site or group of sites keeps the same fraction."""

import re

import pytest
from problems import every_form, normal

from eckart.allocation import (
    DENSE,
    Choice,
    OverBudgetError,
    RankMultiples,
    rank_steps,
    shared_uniform,
    stored_elements,
    uniform,
)
from eckart.errors import UsageError
from eckart.forms import Kronecker
from eckart.linalg import Problem, kronecker_factorize

SHAPES = {"a": (64, 48), "b": (48, 64), "c": (40, 40), "d": (96, 24)}


@pytest.mark.parametrize("multiple", [1, 8])
@every_form
def test_uniform_takes_the_largest_rank_that_fits_everywhere(form, multiple):
    for keep in (0.9, 0.7, 0.5, 0.35):
        for name, choice in uniform(SHAPES, keep, form, multiples=RankMultiples(fixed=multiple)).items():
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


def test_rank_steps_are_multiples_or_every_rank_of_a_small_weight():
    assert list(rank_steps(30, 8)) == [8, 16, 24]
    assert list(rank_steps(5, 8)) == [1, 2, 3, 4, 5]
    assert list(rank_steps(0, 8)) == []


def named_keep(error: UsageError) -> float:
    """The number in "the smallest keep ... is X"."""
    return float(re.search(r"smallest keep .*? is (\d\.\d+)", str(error)).group(1))


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
def test_uniform_takes_the_block_of_least_error(keep):
    shapes = {name: SHAPES[name] for name in "abc"}
    solved = {
        name: {b: kronecker_factorize(Problem(normal(*shape)), b, 1).curve for b in Kronecker.blocks(*shape)}
        for name, shape in shapes.items()
    }
    choices = uniform(shapes, keep, "kronecker", errors=solved)
    for name, choice in choices.items():
        budget = keep * shapes[name][0] * shapes[name][1]
        others = [
            float(solved[name][block][rank])
            for block in Kronecker.blocks(*shapes[name])
            for rank in range(1, Kronecker.max_rank(*shapes[name], block) + 1)
            if Kronecker.size(*shapes[name], rank, block).parameters <= budget
        ]
        assert choice.stored(*shapes[name]) <= budget
        assert float(solved[name][choice.block][choice.rank]) == min(others)
    assert stored_elements(choices, shapes) <= keep * sum(rows * columns for rows, columns in shapes.values())


def test_uniform_of_blocks_names_the_smallest_keep():
    with pytest.raises(UsageError, match=r"a cannot be stored that small in form kronecker.* is 0\.0365"):
        uniform({"a": (64, 48)}, 0.001, "kronecker")
    assert uniform({"a": (64, 48)}, 0.0365, "kronecker")["a"].stored(64, 48) == 2 * 56


GROUPED = {"0.q": (24, 16), "1.q": (24, 16), "0.k": (4, 32), "1.k": (4, 32), "o": (16, 24)}
GROUPS = [("0.q", "1.q"), ("0.k", "1.k")]


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3])
def test_every_group_keeps_the_same_fraction(keep):
    choices = shared_uniform(GROUPED, GROUPS, keep, "shared-basis")
    for (one, other), (rows, columns) in zip(GROUPS, ((48, 16), (8, 32)), strict=True):
        rank = int(keep * rows * columns // (columns + rows))
        assert choices[one] == Choice("shared-basis", rank)
        assert choices[other] == Choice("shared-basis", rank, basis=one)
        assert stored_elements({n: choices[n] for n in (one, other)}, GROUPED) == rank * (columns + rows)
        assert rank * (columns + rows) <= keep * rows * columns < (rank + 1) * (columns + rows)
    assert choices["o"] == uniform({"o": GROUPED["o"]}, keep, "lowrank")["o"]
    assert shared_uniform(GROUPED, GROUPS, 1.0, "shared-basis") == {name: Choice(DENSE) for name in GROUPED}
    rounded = shared_uniform(GROUPED, GROUPS, keep, "shared-basis", multiples=RankMultiples(fixed=4))
    assert all(choice.rank % 4 == 0 or choice.rank < 4 for choice in rounded.values())
    assert stored_elements(rounded, GROUPED) <= stored_elements(choices, GROUPED)
    if keep == 0.9:  # more than each alone could use
        assert choices["0.k"].rank > min(GROUPED["0.k"])


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3])
def test_a_group_of_pivot_columns_has_the_largest_rank_that_fits(keep):
    """Its numbers are no multiple of the rank: k (n - k) once, k m_i and n of each."""
    shapes = {"q": (24, 32), "k": (8, 32), "o": (32, 24)}
    choices = shared_uniform(shapes, [("q", "k")], keep, "pivoted-joint")
    rank = choices["q"].rank
    assert choices["k"] == Choice("pivoted-joint", rank, basis="q")

    def numbers(rank):
        return rank * (32 - rank) + rank * 32 + 2 * 32

    assert stored_elements({n: choices[n] for n in ("q", "k")}, shapes) == numbers(rank)
    assert numbers(rank) <= keep * 32 * 32 < numbers(rank + 1)
    assert choices["o"].form == "pivoted"


def test_groups_name_the_smallest_keep_that_works():
    for shapes, bases in ((GROUPED, GROUPS), ({n: GROUPED[n] for n in GROUPS[1]}, GROUPS[1:])):
        with pytest.raises(OverBudgetError, match=r"the smallest keep that every .* can reach is") as refused:
            shared_uniform(shapes, bases, 0.01, "shared-basis")
        total = sum(rows * columns for rows, columns in shapes.values())
        keep = refused.value.needed / total
        assert stored_elements(shared_uniform(shapes, bases, keep, "shared-basis"), shapes) <= keep * total
        with pytest.raises(OverBudgetError):
            shared_uniform(shapes, bases, keep * 0.99, "shared-basis")


@pytest.mark.parametrize(
    ("width", "multiple"), [(4096, 64), (1024, 64), (768, 16), (384, 8), (128, 8), (48, 2), (8, 1)]
)
def test_ranks_are_multiples_of_what_the_target_computes_fast(width, multiple):
    for target in ("cpu", "cuda"):
        assert RankMultiples(target).of((width, 2 * width), "lowrank") == multiple
    assert RankMultiples("none").of((width, 2 * width), "lowrank") == 1
    assert RankMultiples("cuda", fixed=3).of((width, 2 * width), "lowrank") == 3


def test_both_parts_of_a_pivoted_weight_are_multiples():
    """k rows are stored as they are, m - k as coefficients: 1,000 = 8 * 125 has no common multiple of 64."""
    for rows, multiple in ((4096, 64), (1056, 32), (1000, 8)):
        assert RankMultiples("cuda").of((rows, 4096), "pivoted") == min(multiple, 64)
        assert (rows - RankMultiples("cuda").of((rows, 4096), "pivoted")) % multiple == 0


def test_ranks_below_the_first_multiple_meet_a_small_budget():
    assert list(RankMultiples("cpu").ranks((1024, 1024), "lowrank", 200)) == [1, 2, 4, 8, 16, 32, 64, 128, 192]
    assert list(RankMultiples("none").ranks((1024, 1024), "lowrank", 4)) == [1, 2, 3, 4]
    assert list(RankMultiples("none", fixed=64).ranks((1024, 1024), "lowrank", 200)) == [64, 128, 192]
    assert list(RankMultiples("none", fixed=64).ranks((1024, 1024), "lowrank", 3)) == [1, 2, 3]
