"""The low-rank + sparse form, and the masked one that trains into it."""

import pytest
import torch
from problems import close, normal
from torch import nn
from torch.nn import functional

from eckart.errors import UsageError
from eckart.forms import FORMS, LowRank, LowRankSparse, MaskedLowRankSparse, build
from eckart.model import to_dense_modules

PLACES = torch.tensor([1, 4, 5, 9])


def made(dtype=torch.float64, bias=True, source="linear") -> LowRankSparse:
    module = LowRankSparse(8, 10, 3, 4, bias, source).to(dtype)
    given = normal(10, seed=4) if bias else None
    module.store_sparse(normal(10, 3), normal(3, 8, seed=1), normal(4, 8, seed=2), PLACES, given)
    return module.eval()


def dense_of_made() -> torch.Tensor:
    dense = normal(10, 3) @ normal(3, 8, seed=1)
    dense[PLACES] += normal(4, 8, seed=2)
    return dense


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_form_applies_its_matrix(dtype, tolerance, bias):
    module = made(dtype, bias)
    close(module.to_dense().double(), dense_of_made(), tolerance)
    for x in (normal(2, 3, 8), normal(4, 8), normal(8)):
        expected = functional.linear(x, dense_of_made(), normal(10, seed=4) if bias else None)
        with torch.no_grad():
            output = module(x.to(dtype))
        assert output.shape == expected.shape
        close(output.double(), expected, tolerance)


def test_form_size_is_what_is_stored():
    for bias in (True, False):
        module = made(torch.bfloat16, bias)
        size = LowRankSparse.size(10, 8, 3, rows=4)
        tensors = module.state_dict().values()
        extra = 10 if bias else 0
        assert sum(t.numel() for t in tensors) == size.parameters + extra
        assert sum(t.nbytes for t in tensors) == size.bytes(torch.bfloat16) + 2 * extra
        assert size.multiply_adds == module.multiply_adds() == 3 * 18 + 4 * 8


def test_form_spec_round_trip_and_dense_again():
    for source in ("linear", "conv1d"):
        module = made(torch.float32, source=source)
        again = build(module.spec())
        assert type(again) is LowRankSparse
        again.load_state_dict(module.state_dict())
        assert torch.equal(again.to_dense(), module.to_dense())
        assert "rows=4" in repr(again)
        holder = to_dense_modules(nn.ModuleDict({"proj": again}))
        x = normal(3, 8, dtype=torch.float32)
        close(holder["proj"](x), module(x), 1e-5)
        assert module.weight.shape == ((10, 8) if source == "linear" else (8, 10))
    assert LowRankSparse.form not in FORMS  # no rank alone describes it: plans do not choose it


def test_form_stores_a_plain_low_rank_matrix():
    module = made()
    assert module.store(normal(10, 3), normal(3, 8, seed=1), None) is None
    close(module.to_dense(), normal(10, 3) @ normal(3, 8, seed=1), 1e-12)


def test_form_refusals():
    factors = normal(10, 3), normal(3, 8), normal(4, 8)
    for places in ([1, 4, 4, 9], [4, 1, 5, 9], [-1, 4, 5, 9], [1, 4, 5, 10], [1, 4, 5]):
        with pytest.raises(UsageError, match="ascending"):
            made().store_sparse(*factors, torch.tensor(places), None)


def test_form_gradients():
    module = made()
    x = normal(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


def masked() -> MaskedLowRankSparse:
    module = MaskedLowRankSparse(8, 10, 3).double()
    module.store_sparse(
        normal(10, 3), normal(3, 8, seed=1), normal(10, 8, seed=2), torch.arange(10), normal(10, seed=4)
    )
    return module


def test_pruned_rows_are_removed_and_nothing_else_changes():
    module = masked()
    module.prune(torch.arange(10) % 3 == 0)
    x = normal(5, 8)
    small = module.compact()
    assert small.places.tolist() == [0, 3, 6, 9]
    assert small.sparse.weight.shape == (4, 8)
    close(small(x), module(x), 1e-12)
    assert torch.equal(small.to_dense(), module.to_dense())
    module.prune(torch.zeros(10, dtype=torch.bool))
    empty = module.compact()
    assert type(empty) is LowRank
    close(empty(x), module(x), 1e-12)


def test_masks_only_shrink_and_pruned_rows_stay_zero():
    module = masked()
    first = torch.arange(10) < 6
    module.prune(first)
    module.prune(torch.arange(10) > 3)
    assert module.alive.nonzero().flatten().tolist() == [4, 5]
    with torch.no_grad():
        module.sparse.weight.add_(1)  # an optimizer's momentum
    x = normal(5, 8)
    low_rank = functional.linear(x, normal(10, 3) @ normal(3, 8, seed=1), normal(10, seed=4))
    close(module(x)[:, ~module.alive], low_rank[:, ~module.alive], 1e-12)
    module(x).square().sum().backward()
    assert not module.sparse.weight.grad[~module.alive].any()
    assert bool(module.sparse.weight.grad[module.alive].any(1).all())
    module.clear()
    assert not module.sparse.weight[~module.alive].any()
