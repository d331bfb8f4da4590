"""The nearest sums of Kronecker products, and the weighted ones."""

import itertools

import pytest
import torch
from problems import LAYERS, close, error_of, kronecker_sum, normal

from eckart.errors import UsageError
from eckart.linalg import Metric, Problem, kronecker_factorize, rearranged, rearranged_back
from eckart.linalg.kronecker import alternating

# (out, in, block)
CASES = {
    "balanced": (24, 18, (4, 6)),
    "rows": (24, 18, (2, 1)),
    "columns": (24, 18, (1, 3)),
    "wide blocks": (6, 40, (3, 20)),
    "one row": (1, 12, (1, 3)),
    "whole weight": (4, 6, (4, 6)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def candidates(left, right, count=12):
    """Factors of the same size, near and far."""
    for i in range(count):
        scale = 10.0 ** -(i % 6)
        yield left + scale * normal(*left.shape, seed=i), right + scale * normal(*right.shape, seed=i + count)


@every_case
def test_nearest_sum_for_every_number_of_terms(case):
    rows, columns, block = case
    problem = Problem(normal(rows, columns))
    solved = kronecker_factorize(problem, block, 1)
    inner = block[0] * block[1]
    full = min(inner, rows * columns // inner)
    assert len(solved.curve) == full + 1
    for rank in range(1, full + 1):
        left, right = solved.truncated(rank)
        error = error_of(problem, kronecker_sum(left, right, rows, columns, block))
        assert error == pytest.approx(float(solved.curve[rank]), abs=1e-10 * float(solved.curve[0]))
        assert all(error_of(problem, kronecker_sum(*c, rows, columns, block)) >= error for c in candidates(left, right))
    assert float(solved.curve[-1]) == 0
    close(rearranged_back(solved.left @ solved.right, (rows, columns), block), problem.target, 1e-10)


@every_case
def test_a_sum_of_products_is_found_again(case):
    rows, columns, block = case
    inner = block[0] * block[1]
    weight = kronecker_sum(normal(rows * columns // inner, 1), normal(1, inner, seed=1), rows, columns, block)
    left, right = kronecker_factorize(Problem(weight), block, 1).truncated(1)
    close(kronecker_sum(left, right, rows, columns, block), weight, 1e-10)
    close(rearranged_back(rearranged(weight, block), (rows, columns), block), weight, 0)


def test_blocks_that_do_not_divide_are_refused():
    for block in ((5, 1), (1, 7), (0, 1), (48, 1)):
        with pytest.raises(UsageError, match=r"do not divide a weight of 24 x 18"):
            kronecker_factorize(Problem(normal(24, 18)), block, 1)


def test_metrics_that_are_kronecker_products_are_solved_exactly():
    rows, columns, block = 24, 18, (4, 6)
    left = torch.kron(normal(6).abs() + 0.1, normal(4, seed=1).abs() + 0.1)
    right = torch.kron(normal(3, seed=2).abs() + 0.1, normal(6, seed=3).abs() + 0.1)
    for problem in (
        Problem(normal(rows, columns), Metric(diagonal=left), Metric(diagonal=right)),
        Problem(normal(rows, columns), right=Metric(diagonal=right)),
    ):
        solved = kronecker_factorize(problem, block, 2)
        assert not solved.notes
        for rank in (1, 5, 17):
            factors = solved.truncated(rank)
            error = error_of(problem, kronecker_sum(*factors, rows, columns, block))
            assert error == pytest.approx(float(solved.curve[rank]), rel=1e-9)
            plain = kronecker_factorize(Problem(problem.target), block, 2).truncated(rank)
            for other in (plain, *candidates(*factors)):
                assert error_of(problem, kronecker_sum(*other, rows, columns, block)) > error


@pytest.mark.parametrize("name", ["tall", "wide", "few-tokens-tall", "dead-wide", "zero-weight"])
@pytest.mark.parametrize("method", ["drone", "kfac", "asvd", "fwsvd"])
def test_other_metrics_approximately_and_never_worse_than_without_them(method, name):
    problem = LAYERS[name].problem_of(method)
    rows, columns = problem.target.shape
    for block in ((4, 1), (2, 3), (1, 4)):
        if rows % block[0] or columns % block[1]:
            continue
        rank = 2
        plain = kronecker_factorize(Problem(problem.target), block, rank).truncated(rank)
        left, right, history = alternating(problem, block, plain)
        start = error_of(problem, kronecker_sum(*plain, rows, columns, block))
        assert history[0] == pytest.approx(start, rel=1e-9, abs=1e-12)
        assert all(after < before for before, after in itertools.pairwise(history))
        assert history[-1] == pytest.approx(
            error_of(problem, kronecker_sum(left, right, rows, columns, block)), abs=1e-12
        )
        solved = kronecker_factorize(problem, block, rank)
        if not solved.notes:  # a diagonal that blocks of one row or column do not cut
            assert method in ("asvd", "fwsvd")
            assert float(solved.curve[rank]) <= history[-1] * (1 + 1e-9) + 1e-20
            continue
        assert "approximate, alternating least squares at 2 terms" in solved.notes[0]
        assert f"objective {history[0]:.6g}" in solved.notes[0]
        error = error_of(problem, kronecker_sum(*solved.truncated(rank), rows, columns, block))
        assert error == pytest.approx(history[-1], rel=1e-6, abs=1e-12)
        assert error == pytest.approx(float(solved.curve[rank]), rel=1e-6, abs=1e-12)
        assert bool((solved.curve.diff() <= 0).all())


def test_the_metric_is_felt():
    """Against plain Van Loan it gains much where the data is far from white."""
    problem = LAYERS["tall"].problem_of("drone")
    plain = kronecker_factorize(Problem(problem.target), (4, 4), 2).truncated(2)
    weighted = kronecker_factorize(problem, (4, 4), 2).truncated(2)
    assert error_of(problem, kronecker_sum(*weighted, 20, 12, (4, 4))) < 0.75 * error_of(
        problem, kronecker_sum(*plain, 20, 12, (4, 4))
    )


def test_inputs_stay_and_bits_repeat():
    problem = LAYERS["tall"].problem_of("drone")
    before = problem.target.clone()
    first, second = (kronecker_factorize(problem, (4, 4), 3) for _ in range(2))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(problem.target, before)
