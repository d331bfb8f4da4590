"""Narrower value heads: the best directions of each, the best weight that reads them, and the true error."""

import pytest
import torch
from problems import close, normal
from torch import Tensor

from eckart.errors import NumericalError
from eckart.linalg import Metric, Problem, narrow_heads, slice_in_order, slice_neurons, weighted_error

HEADS, WIDTH, OUT = 4, 6, 10


def problem(*, apart: bool = False, dead: int = 0, seed: int = 0) -> Problem:
    """A weight that reads four heads, under correlated metrics; or heads that are not correlated with each other."""
    total = HEADS * WIDTH
    decay = torch.logspace(0, -1.5, WIDTH, dtype=torch.float64).repeat(HEADS)
    read = (normal(500, total, seed=seed) * decay) @ (0.12 * normal(total, total, seed=seed + 1) + torch.eye(total))
    read[:, :dead] = 0
    given = normal(200, OUT, seed=seed + 2) @ normal(OUT, OUT, seed=seed + 3)
    inputs = read.mT @ read / 500
    if apart:
        inputs = inputs * torch.block_diag(*[torch.ones(WIDTH, WIDTH)] * HEADS)
    weight = normal(OUT, total, seed=seed + 4)
    return Problem(weight, Metric(full=given.mT @ given, scale=1 / 200), Metric(full=inputs))


def whole(directions: Tensor, heads: int = HEADS) -> Tensor:
    """P as one matrix."""
    return torch.block_diag(*directions.repeat_interleave(heads // len(directions), 0))


def error_of(given: Problem, directions: Tensor, weight: Tensor) -> float:
    return float(weighted_error(given.target - weight @ whole(directions), given.left, given.right))


def best_error(given: Problem, directions: Tensor) -> float:
    """With the best reader of these directions, as it is written."""
    p, c = whole(directions), given.right.matrix
    return error_of(given, directions, torch.linalg.solve(p @ c @ p.mT, given.target @ c @ p.mT, left=False))


def per_head(given: Problem) -> list[Problem]:
    parts = [slice(h * WIDTH, (h + 1) * WIDTH) for h in range(HEADS)]
    inner = given.right.matrix
    return [Problem(given.target[:, p], given.left, Metric(full=inner[p, p])) for p in parts]


def tail_of(given: Problem, width: int) -> float:
    """Of the squared singular values of `H^(1/2) W C^(1/2)`."""
    left, right = (torch.linalg.cholesky(side.matrix) for side in (given.left, given.right))
    return float(torch.linalg.svdvals(left.mT @ given.target @ right)[width:].square().sum())


def test_heads_by_themselves_lose_the_tails_of_their_singular_values():
    given = problem(apart=True)
    found = narrow_heads(given, HEADS, HEADS)
    for width in range(WIDTH + 1):
        tail = sum(tail_of(one, width) for one in per_head(given))
        assert float(found.curve[width]) == pytest.approx(tail, rel=1e-8, abs=1e-8 * float(found.curve[0]))


def test_the_curve_is_the_error_of_the_best_reader():
    given = problem()
    found = narrow_heads(given, HEADS, HEADS)
    assert len(found.curve) == WIDTH + 1
    for width in range(1, WIDTH):
        directions, weight = found.narrowed(width)
        assert directions.shape == (HEADS, width, WIDTH)
        assert weight.shape == (OUT, HEADS * width)
        close(directions @ directions.mT, torch.eye(width, dtype=torch.float64).expand(HEADS, -1, -1), 1e-10)
        assert error_of(given, directions, weight) == pytest.approx(float(found.curve[width]), rel=1e-5)
        assert best_error(given, directions) == pytest.approx(float(found.curve[width]), rel=1e-5)
        # What the others do for a head is worth something.
        assert float(found.curve[width]) < 0.99 * sum(tail_of(one, width) for one in per_head(given))


def test_full_width_changes_nothing():
    for made in (HEADS, 2):
        given = problem(dead=2)
        directions, weight = narrow_heads(given, HEADS, made).narrowed(WIDTH)
        close(weight @ whole(directions), given.target, 1e-8)
    for width in (0, WIDTH + 1):
        with pytest.raises(ValueError, match="corrections are known"):
            narrow_heads(problem(), HEADS, HEADS).narrowed(width)


@pytest.mark.parametrize("seed", range(3))
def test_other_directions_lose_more(seed):
    given = problem(seed=10 * seed)
    inputs = [one.right.matrix for one in per_head(given)]
    for width in (2, 4):
        found = float(narrow_heads(given, HEADS, HEADS).curve[width])
        reader = [torch.linalg.svd(one.target).Vh[:width] for one in per_head(given)]
        values = [torch.linalg.eigh(one).eigenvectors.flip(1).mT[:width] for one in inputs]
        random = [torch.linalg.qr(normal(WIDTH, width, seed=seed + h)).Q.mT for h in range(HEADS)]
        plain = narrow_heads(Problem(given.target), HEADS, HEADS).narrowed(width)[0]
        close(whole(plain).mT @ whole(plain), sum_of_projections(reader), 1e-8)
        for other in (reader, values, random):
            assert found < 0.98 * best_error(given, torch.stack(list(other)))


def sum_of_projections(directions: list[Tensor]) -> Tensor:
    return torch.block_diag(*[one.mT @ one for one in directions])


def test_heads_that_share_values_share_directions():
    given = problem()
    # Two heads that read the same numbers are one head whose weights add up.
    given = Problem(given.target, given.left, Metric(full=torch.block_diag(*[given.right.matrix[:6, :6]] * HEADS)))
    found = narrow_heads(given, HEADS, 2)
    directions, weight = found.narrowed(3)
    assert directions.shape == (2, 3, WIDTH)
    assert weight.shape == (OUT, HEADS * 3)
    assert error_of(given, directions, weight) == pytest.approx(float(found.curve[3]), rel=1e-5)
    alone = narrow_heads(given, HEADS, HEADS)
    assert float(alone.curve[3]) < float(found.curve[3])
    for pair in range(2):
        columns = slice(2 * pair * WIDTH, 2 * (pair + 1) * WIDTH)
        stacked = torch.cat(given.target[:, columns].split(WIDTH, 1))
        left = Metric(full=torch.block_diag(*[given.left.matrix] * 2))
        one = narrow_heads(Problem(stacked, left, Metric(full=given.right.matrix[:6, :6])), 1, 1)
        close(one.turns[0, :3].mT @ one.turns[0, :3], found.turns[pair, :3].mT @ found.turns[pair, :3], 1e-8)


def test_silent_heads_and_numbers_that_are_not_finite():
    silent = Problem(normal(OUT, HEADS * WIDTH), Metric(), Metric(full=torch.zeros(24, 24, dtype=torch.float64)))
    found = narrow_heads(silent, HEADS, HEADS)
    assert float(found.curve.abs().max()) == 0
    assert bool(found.narrowed(2)[1].isfinite().all())
    for broken in (
        Problem(problem().target * torch.nan),
        Problem(problem().target, Metric(), Metric(full=torch.full((24, 24), torch.nan))),
    ):
        with pytest.raises(NumericalError, match="o_proj"):
            narrow_heads(broken, HEADS, HEADS, "o_proj")


def test_the_order_of_neurons_may_be_given():
    given = problem()
    greedy = slice_neurons(given)
    again = slice_in_order(given, greedy.order)
    close(again.curve, greedy.curve, 1e-12)
    close(again.corrected(7)[1], greedy.corrected(7)[1], 1e-10)
