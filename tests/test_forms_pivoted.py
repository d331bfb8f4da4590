"""The pivoted form: its two ways of running, its fallback, its bias."""

import math

import pytest
import torch
from problems import close, normal
from test_forms_conformance import check_runs_as_dense

from eckart.errors import UsageError
from eckart.forms import LowRank, Pivoted, pivoted
from eckart.model import Site, store_factors


def factors(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(rows, rank) / rank**0.5, normal(rank, columns, seed=1) / columns**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_ways_are_taken(dtype, monkeypatch):
    for way, bound in (("expanded", math.inf), ("gathered", 0.0)):
        monkeypatch.setitem(pivoted.EXPAND_BELOW, dtype, bound)
        module = Pivoted(16, 24, 5).to(dtype)
        module.store(*factors(24, 16, 5), normal(24))
        with torch.no_grad():
            module.eval()(normal(2, 16, dtype=dtype))
        assert module._prepared[0][0] == way
        module.lean = True
        module.train().eval()
        with torch.no_grad():
            module(normal(2, 16, dtype=dtype))
        assert module._prepared is None


@pytest.mark.parametrize(("source", "with_bias"), [("linear", True), ("conv1d", True), ("linear", False)])
def test_a_deficient_basis_is_refused_and_stored_low_rank(source, with_bias):
    rows, columns, rank = 40, 30, 12
    left, right = factors(rows, columns, rank)
    left[:, -1] = left[:, 0]
    bias = normal(rows, seed=3) if with_bias else None
    module = Pivoted(columns, rows, rank, with_bias)
    before = module.to_dense().detach().clone()
    assert "above its bound" in module.store(left, right, bias)
    assert torch.equal(module.to_dense(), before)  # nothing has been written
    site = Site("h.0.proj", source, rows, columns, with_bias)
    fallback, note = store_factors(site, "pivoted", rank, left, right, bias, torch.float64)
    assert note.startswith("h.0.proj: max|C| = inf")
    assert f"stored low-rank at rank {fallback.rank} instead of {rank}" in note
    assert (type(fallback), fallback.source) == (LowRank, source)
    allowed = Pivoted.size(rows, columns, rank).parameters
    assert fallback.size(rows, columns, fallback.rank).parameters <= allowed
    assert fallback.size(rows, columns, fallback.rank + 1).parameters > allowed or fallback.rank == rank
    close(fallback.to_dense(), left[:, : fallback.rank] @ right[: fallback.rank], 1e-9)
    check_runs_as_dense(fallback)
    zero, note = store_factors(site, "pivoted", 3, 0 * left[:, :3], 0 * right[:3], bias, torch.float32)
    assert note is not None
    assert not zero.to_dense().any()


def test_coefficients_above_the_bound_are_refused(monkeypatch):
    monkeypatch.setattr(pivoted, "BOUND", 0.1)
    assert "above its bound 0.1" in Pivoted(16, 24, 5).store(*factors(24, 16, 5), None)


def test_the_folded_bias_is_as_exact_as_the_bias():
    """In bfloat16 the fold is computed from what was stored of C, not from C before rounding."""
    module = Pivoted(50, 60, 20).to(torch.bfloat16)
    bias = normal(60, seed=2, dtype=torch.bfloat16)
    module.store(*factors(60, 50, 20), bias)
    close(module.dense_bias().double(), bias.double(), 1.5e-2)
    check_runs_as_dense(module.eval())


def test_a_form_that_does_not_fit_names_the_remedy():
    left, right = factors(10, 8, 3)
    with pytest.raises(UsageError, match=r"does not fit torch\.float16.*--dtype"):
        Pivoted(8, 10, 3).to(torch.float16).store(left * 1e12, right, None)
