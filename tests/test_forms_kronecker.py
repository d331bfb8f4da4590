"""The Kronecker form: its definition, the cheaper order, and the shapes of block that can be chosen."""

import pytest
import torch
from problems import close, kronecker_sum, normal
from torch.utils.flop_counter import FlopCounterMode

from eckart.errors import UsageError
from eckart.forms import Kronecker

# (out, in, block)
CASES = {
    "outer first": (24, 18, (2, 1)),
    "inner first": (6, 40, (3, 20)),
    "columns": (24, 18, (1, 3)),
    "one row": (1, 12, (1, 3)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_sum_of_products_by_its_definition_in_the_cheaper_order(case):
    rows, columns, block = case
    inner = block[0] * block[1]
    rank = Kronecker.full_rank(rows, columns, block)
    left, right = normal(rows * columns // inner, rank), normal(rank, inner, seed=1)
    expected = kronecker_sum(left, right, rows, columns, block)
    module = Kronecker.empty(rows, columns, rank, bias=True, block=block, dtype=torch.float64)
    assert module.store(left, right, normal(rows, seed=2)) is None
    x = normal(2, 3, columns)
    close(module.to_dense(), expected, 1e-11)
    with FlopCounterMode(display=False) as counter:
        close(module(x), x @ expected.mT + normal(rows, seed=2), 1e-11)
    outer, inner_terms = module.terms()
    close(torch.einsum("rij,rkl->ikjl", outer, inner_terms).reshape(rows, columns), expected, 1e-11)
    assert f"block={block[0]}x{block[1]}" in repr(module)
    (m2, n2), (m1, n1) = block, (rows // block[0], columns // block[1])
    ways = rank * n2 * n1 * m1 + rank * m1 * n2 * m2, rank * n1 * n2 * m2 + rank * m2 * n1 * m1
    assert module.multiply_adds() == Kronecker.size(rows, columns, rank, block).multiply_adds == min(ways)
    flops = counter.get_total_flops() - 2 * 6 * rows * columns  # without the product that it is compared with
    assert flops == 2 * 6 * min(ways)


def test_blocks_that_do_not_divide_are_refused():
    for block in ((5, 1), (1, 7), (0, 1), (48, 1)):
        with pytest.raises(UsageError, match="do not divide"):
            Kronecker(18, 24, 1, block_out=block[0], block_in=block[1])


SHAPES = {"a": (64, 48), "b": (48, 64), "c": (40, 40), "odd": (15, 21), "prime": (29, 31), "row": (1, 30)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_has_blocks_that_save_without_computing_more(shape):
    dense = shape[0] * shape[1]
    for block in Kronecker.blocks(*shape):
        assert shape[0] % block[0] == shape[1] % block[1] == 0
        largest = Kronecker.max_rank(*shape, block)

        def saves(rank, block=block):
            size = Kronecker.size(*shape, rank, block)
            possible = rank <= Kronecker.full_rank(*shape, block)
            return possible and size.parameters < dense and size.multiply_adds <= dense

        assert saves(largest)
        assert not saves(largest + 1)
    possible = max(Kronecker.max_rank(*shape, block) for block in Kronecker.blocks(*shape)) >= 1
    assert possible == (min(shape) > 1)  # a vector is cheapest as it is
