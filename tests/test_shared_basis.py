"""One basis for several weights: the paper's singular value decomposition, and what sharing costs."""

import pytest
import torch
from problems import close, normal, unchanged

from eckart.errors import UsageError
from eckart.linalg import Metric, Problem, factorise, shared_basis, weighted_error

WEIGHTS = [normal(10, 8), normal(6, 8, seed=1), normal(14, 8, seed=2)]
INPUTS = normal(40, 8, seed=3) @ normal(8, 8, seed=4)
GRAM = INPUTS.mT @ INPUTS


def error(weights, basis, parts, gram):
    metric = Metric(full=gram)
    pairs = zip(weights, parts, strict=True)
    return sum(float(weighted_error(weight - part @ basis, Metric(), metric)) for weight, part in pairs)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_is_the_decomposition_of_the_paper(rank):
    with unchanged(*WEIGHTS, GRAM):
        basis, parts, notes = shared_basis(WEIGHTS, GRAM, rank)
    assert basis.shape == (rank, 8)
    assert [part.shape for part in parts] == [(10, rank), (6, rank), (14, rank)]
    assert notes == ()
    root = torch.linalg.cholesky(GRAM)
    vectors, values, _ = torch.linalg.svd(torch.cat([root.mT @ weight.mT for weight in WEIGHTS], 1))
    project = root @ vectors[:, :rank] @ vectors[:, :rank].mT @ torch.linalg.inv(root)
    for weight, part in zip(WEIGHTS, parts, strict=True):
        close(part @ basis, weight @ project, 1e-8)
    tail = float(values[rank:].square().sum())
    assert error(WEIGHTS, basis, parts, GRAM) == pytest.approx(tail, rel=1e-8, abs=1e-8)


def test_alone_it_is_the_ordinary_factorisation_and_with_others_no_better():
    basis, (part,), _ = shared_basis(WEIGHTS[:1], GRAM, 3)
    left, right = factorise(Problem(WEIGHTS[0], right=Metric(full=GRAM))).truncated(3)
    close(part @ basis, left @ right, 1e-8)
    shared, (first, *_), _ = shared_basis(WEIGHTS, GRAM, 3)
    assert error(WEIGHTS[:1], shared, [first], GRAM) > error(WEIGHTS[:1], basis, [part], GRAM)


def test_singular_gram_and_no_gram():
    few = INPUTS[:3].mT @ INPUTS[:3]
    basis, parts, _ = shared_basis(WEIGHTS, few, 3)
    assert error(WEIGHTS, basis, parts, few) < 1e-8 * error(WEIGHTS, basis * 0, parts, few)
    basis, parts, _ = shared_basis(WEIGHTS, None, 2)
    tail = torch.linalg.svdvals(torch.cat(WEIGHTS))[2:].square().sum()
    found = sum(float((weight - part @ basis).square().sum()) for weight, part in zip(WEIGHTS, parts, strict=True))
    assert found == pytest.approx(float(tail), rel=1e-8)


def test_refusals():
    for weights, rank in ((WEIGHTS, 9), (WEIGHTS, 0), ([], 1), ([normal(4, 8), normal(4, 9)], 2)):
        with pytest.raises(UsageError, match=r"h\.0-1: .* cannot share a basis"):
            shared_basis(weights, None, rank, "h.0-1")
