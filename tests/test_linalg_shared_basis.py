"""A basis for several weights at once: the paper's decomposition, one weight alone, a singular Gram, refusals."""

import pytest
import torch
from problems import close, normal, unchanged

from eckart.errors import UsageError
from eckart.linalg import Metric, Problem, factorize, shared_basis, weighted_error

WEIGHTS = [normal(10, 8), normal(6, 8, seed=1), normal(14, 8, seed=2)]
INPUTS = normal(40, 8, seed=3) @ normal(8, 8, seed=4)
GRAM = INPUTS.mT @ INPUTS


def solved(weights, gram, rank, limit=None):
    """The basis, the coefficients, the error that is predicted, and notes."""
    problem = Problem(torch.cat(weights), right=Metric(full=gram))
    parts = shared_basis(problem, [len(weight) for weight in weights], limit)
    factors = [part.truncated(rank) for part in parts]
    assert all(torch.equal(right, factors[0][1]) for _, right in factors)
    assert all(torch.equal(part.curve, parts[0].curve) for part in parts)
    return (
        factors[0][1],
        [left for left, _ in factors],
        float(parts[0].curve[rank]),
        [n for p in parts for n in p.notes],
    )


def error(weights, basis, parts, gram):
    metric = Metric(full=gram)
    pairs = zip(weights, parts, strict=True)
    return sum(float(weighted_error(weight - part @ basis, Metric(), metric)) for weight, part in pairs)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_is_the_decomposition_of_the_paper(rank):
    with unchanged(*WEIGHTS, GRAM):
        basis, parts, predicted, notes = solved(WEIGHTS, GRAM, rank)
    assert basis.shape == (rank, 8)
    assert [part.shape for part in parts] == [(10, rank), (6, rank), (14, rank)]
    assert notes == []
    root = torch.linalg.cholesky(GRAM)
    vectors, values, _ = torch.linalg.svd(torch.cat([root.mT @ weight.mT for weight in WEIGHTS], 1))
    project = root @ vectors[:, :rank] @ vectors[:, :rank].mT @ torch.linalg.inv(root)
    for weight, part in zip(WEIGHTS, parts, strict=True):
        close(part @ basis, weight @ project, 1e-8)
    tail = float(values[rank:].square().sum())
    assert error(WEIGHTS, basis, parts, GRAM) == pytest.approx(tail, rel=1e-8, abs=1e-8)
    assert predicted == pytest.approx(tail, rel=1e-8, abs=1e-8)
    if rank == 8:  # of full rank it is all of them
        for weight, part in zip(WEIGHTS, parts, strict=True):
            close(part @ basis, weight, 1e-9)


def test_alone_it_is_the_ordinary_factorization_and_with_others_no_better():
    basis, (part,), _, _ = solved(WEIGHTS[:1], GRAM, 3)
    left, right = factorize(Problem(WEIGHTS[0], right=Metric(full=GRAM))).truncated(3)
    close(part @ basis, left @ right, 1e-8)
    shared, (first, *_), _, _ = solved(WEIGHTS, GRAM, 3)
    assert error(WEIGHTS[:1], shared, [first], GRAM) > error(WEIGHTS[:1], basis, [part], GRAM)


def test_no_other_basis_is_better():
    basis, parts, _, _ = solved(WEIGHTS, GRAM, 3)
    best = error(WEIGHTS, basis, parts, GRAM)
    for seed in range(20):
        other = basis + 10.0 ** -(seed % 5) * normal(3, 8, seed=seed)
        fitted = [weight @ GRAM @ other.mT @ torch.linalg.inv(other @ GRAM @ other.mT) for weight in WEIGHTS]
        assert error(WEIGHTS, other, fitted, GRAM) >= best * (1 - 1e-9)


def test_singular_gram_and_no_gram():
    few = INPUTS[:3].mT @ INPUTS[:3]
    basis, parts, _, _ = solved(WEIGHTS, few, 3)
    assert error(WEIGHTS, basis, parts, few) < 1e-8 * error(WEIGHTS, basis * 0, parts, few)
    basis, parts, _, _ = solved(WEIGHTS, few, 8)  # what the Gram does not see is kept
    for weight, part in zip(WEIGHTS, parts, strict=True):
        close(part @ basis, weight, 1e-9)
    basis, parts, _, _ = solved(WEIGHTS, None, 2)
    tail = torch.linalg.svdvals(torch.cat(WEIGHTS))[2:].square().sum()
    found = sum(float((weight - part @ basis).square().sum()) for weight, part in zip(WEIGHTS, parts, strict=True))
    assert found == pytest.approx(float(tail), rel=1e-8)


def test_a_limit_keeps_the_ranks_up_to_it():
    whole, limited = solved(WEIGHTS, GRAM, 3), solved(WEIGHTS, GRAM, 3, limit=4)
    assert torch.equal(whole[0], limited[0])
    with pytest.raises(UsageError, match="were kept up to rank 4"):
        solved(WEIGHTS, GRAM, 5, limit=4)


def test_refusals():
    problem = Problem(torch.cat(WEIGHTS), right=Metric(full=GRAM))
    for heights in ([10, 6], [], [30, 0]):
        with pytest.raises(UsageError, match=r"h\.0-1: .* cannot share a basis"):
            shared_basis(problem, heights, None, "h.0-1")
    weighed = Problem(problem.target, Metric(diagonal=torch.ones(30)), problem.right)
    with pytest.raises(UsageError, match=r"not under a metric of their outputs.*--metric drone"):
        shared_basis(weighed, [10, 6, 14])
