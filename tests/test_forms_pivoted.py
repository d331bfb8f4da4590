"""The pivoted form: its two ways of running, its fallback, its bias."""

import copy
import math
import pickle

import pytest
import torch
from problems import close, normal
from test_forms_conformance import check_runs_as_dense
from torch import nn

from eckart.errors import UsageError
from eckart.forms import LowRank, Pivoted, build, pivoted
from eckart.model import Site, deserialize_module, serialize_module, store_factors


def factors(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(rows, rank) / rank**0.5, normal(rank, columns, seed=1) / columns**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_ways_are_taken(dtype, monkeypatch):
    for way, bound in (("expanded", math.inf), ("gathered", 0.0)):
        monkeypatch.setitem(pivoted.EXPAND_BELOW, ("cpu", dtype), bound)
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


# -- the index of the outputs --------------------------------------------------------------------------


def stored(seed=0):
    module = Pivoted(16, 24, 5)
    assert module.store(normal(24, 5, seed=seed), normal(5, 16, seed=seed + 1), normal(24, seed=2)) is None
    return module.eval()


def _loaded(module, other):
    module.load_state_dict(other.state_dict())
    return module


def _loaded_in_a_model(module, other):
    model = nn.ModuleDict({"proj": module})
    model.load_state_dict(nn.ModuleDict({"proj": other}).state_dict(), assign=True)
    return model["proj"]


def _loaded_on_meta(module, other):
    with torch.device("meta"):
        empty = build(module.spec())
    empty.load_state_dict(other.state_dict(), assign=True)
    return empty


def _made_empty_and_loaded(module, other):
    return _loaded(module.to("meta").to_empty(device="cpu"), other)


def _assigned(module, other):
    module.first, module.second = other.first, other.second
    module.order = other.order
    return module


def _deserialized(module, other):
    model = nn.ModuleDict({"proj": module})
    tensors, spec = serialize_module(other)
    assert "inverse" not in tensors
    deserialize_module(model, "proj", tensors, spec)
    return model["proj"]


def _put_into_its_tables(module, other):
    for table in ("first", "second"):
        getattr(module, table)._parameters.update(getattr(other, table)._parameters)
    module._buffers["order"] = other.order
    return module.eval()


def _stored_again(module, other):
    assert module.store(normal(24, 5, seed=7), normal(5, 16, seed=8), normal(24, seed=2)) is None
    return module


def _pickled(module, other):
    return pickle.loads(pickle.dumps(other))


def _copied(module, other):
    return copy.deepcopy(other)


def _cast(module, other):
    return other.double().float()


EVENTS = [
    _loaded, _loaded_in_a_model, _loaded_on_meta, _made_empty_and_loaded, _assigned, _deserialized,
    _put_into_its_tables, _stored_again, _pickled, _copied, _cast,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_the_index_is_there_before_anything_is_traced(event):
    module, other = stored(), stored(7)
    found = event(module, other)
    x = normal(3, 16, dtype=torch.float32)
    expected = (x.double() @ other.to_dense().double().mT + other.dense_bias().double()).float()
    with torch.no_grad():
        program = torch.export.export(nn.Sequential(found), (x,))
        close(program.module()(x), expected, 1e-5)
        close(found(x), expected, 1e-5)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("index_select" in name for name in names) == 1
    assert sum("cat" in name for name in names) == 1
    assert not any("sort" in name or "gather" in name for name in names)


def test_the_index_is_not_stored_and_is_made_once(monkeypatch):
    module = stored()
    assert set(module.state_dict()) == {
        "order", "first.weight", "first.bias", "second.weight", "second.bias", "weight",
    }  # fmt: skip
    x = normal(3, 16, dtype=torch.float32)
    module(x)
    monkeypatch.setattr(torch, "argsort", lambda *_: pytest.fail("sorted again"))
    for _ in range(2):
        module(x)
        module.to_dense()
        with torch.no_grad():
            module(x)
    inverse = module.inverse
    monkeypatch.undo()
    module.train().eval()
    assert module.inverse is inverse


def test_an_order_that_was_changed_in_place_is_seen():
    module, other = stored(), stored(7)
    module.first, module.second = other.first, other.second
    module.order.copy_(other.order)
    check_runs_as_dense(module)
    close(module.to_dense(), other.to_dense(), 1e-6)


def test_gradients_pass_an_index_made_in_inference_mode():
    with torch.inference_mode():
        module = stored()
        module.refresh()
    other = Pivoted(16, 24, 5)
    with torch.inference_mode():
        other.load_state_dict(module.state_dict())
    other(normal(3, 16, dtype=torch.float32)).sum().backward()
    assert float(other.first.weight.grad.abs().max()) > 0


def test_without_gradients_both_products_are_written_into_one_tensor(monkeypatch):
    """One gather, no concatenation: the outputs are copied once."""
    monkeypatch.setitem(pivoted.EXPAND_BELOW, ("cpu", torch.float32), 0.0)
    module = Pivoted(16, 24, 5, bias=False)
    module.store(normal(24, 5), normal(5, 16), None)
    x = normal(3, 16, dtype=torch.float32)
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::gather"] == 1
    assert not {"aten::copy_", "aten::cat", "aten::index_select"} & set(counts)
