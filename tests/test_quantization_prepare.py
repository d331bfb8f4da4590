"""Models made ready for rounding: the same function, in forms and factors that survive it."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import output
from joint_groups import joined
from torch import nn

from eckart.errors import UsageError
from eckart.evaluation.rounding import round_to_nearest
from eckart.forms import LowRank, LowRankSparse, Pivoted
from eckart.model import factored_modules, shared_parameters
from eckart.quantization import KINDS, prepare


def forms_of(model: nn.Module) -> set[str]:
    return {form.form for form in factored_modules(model).values()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-classes"])
@pytest.mark.parametrize(
    ("form", "group_form", "expected"),
    [
        ("pivoted", "pivoted-joint", {"lowrank", "joint"}),
        ("lowrank", "joint", {"lowrank", "joint"}),
        ("lowrank", "shared-basis", {"lowrank", "shared-basis"}),
    ],
)
def test_a_prepared_model_computes_what_it_computed(architecture, form, group_form, expected):
    model, groups, batch = joined(architecture, 0.3, form, group_form)
    twin = copy.deepcopy(model)
    before, ties = output(model, batch), shared_parameters(model)
    notes = prepare(model, "int8")
    torch.testing.assert_close(output(model, batch), before, rtol=1e-4, atol=2e-5)
    assert forms_of(model) == (expected if groups else {"lowrank"})  # GPT-2 has one matrix for queries, keys, values
    assert shared_parameters(model) == ties
    for members in groups:
        assert len({id(model.get_submodule(member).first.weight) for member in members}) == 1
    assert bool(notes) == (form == "pivoted")
    assert torch.equal(output(twin, batch), before)
    for name, module in factored_modules(model).items():
        assert not torch.equal(module.first.weight, twin.get_submodule(name).first.weight), name


def test_numbers_that_clones_share_are_left_to_them():
    model, _, batch = joined("llama", 0.3)
    clone = copy.deepcopy(model)
    for one, other in zip(model.modules(), clone.modules(), strict=True):
        other._parameters = dict(one._parameters)
    before = output(clone, batch)
    prepare(model, "int4")
    assert torch.equal(output(clone, batch), before)


def test_what_two_factors_would_make_larger_than_the_weight_becomes_dense():
    model, _, batch = joined("llama", 0.8, "pivoted", "pivoted-joint")
    before = output(model, batch)
    (note,) = prepare(model, "int8")
    assert not factored_modules(model)
    assert not shared_parameters(model)
    torch.testing.assert_close(output(model, batch), before, rtol=1e-4, atol=2e-5)
    assert "are now dense" in note


def test_the_note_says_how_many_numbers_the_conversion_adds():
    model, _, _ = joined("llama", 0.3, "pivoted", "pivoted-joint")
    stored = sum(tensor.numel() for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    (note,) = prepare(model, "int8")
    now = sum(tensor.numel() for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    assert f"{now - stored:+,} numbers" in note


def rounded_error(module: nn.Module, dense: torch.Tensor) -> float:
    """Relative error of the matrix after all leaves have been rounded to 8 bits."""
    with torch.no_grad():
        for leaf in module.modules():
            if isinstance(leaf, nn.Linear):
                leaf.weight.copy_(round_to_nearest(leaf.weight, 8))
    return float((module.to_dense().detach() - dense).norm() / dense.norm())


def filled(form: type[LowRank] | type[Pivoted], decay: float) -> nn.Module:
    stream = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(96, 24, generator=stream))[0] * torch.logspace(0, -decay, 24)
    right = torch.linalg.qr(torch.randn(64, 24, generator=stream))[0].mT
    module = form(64, 96, 24, bias=False)
    assert module.store(left, right, None) is None
    return nn.Sequential(module)


@pytest.mark.parametrize(("form", "share"), [(Pivoted, 0.5), (LowRank, 0.8)])
def test_rounding_loses_less_of_a_prepared_weight(form, share):
    plain = filled(form, 2.0)
    ready = copy.deepcopy(plain)
    prepare(ready, "int8")
    dense = plain[0].to_dense().detach()
    assert rounded_error(ready[0], dense) < share * rounded_error(plain[0], dense)


def test_the_low_rank_part_of_a_weight_with_sparse_rows_is_balanced_and_the_rows_stay():
    stream = torch.Generator().manual_seed(0)
    module = LowRankSparse(12, 10, 3, 2)
    module.store_sparse(
        torch.randn(10, 3, generator=stream), torch.randn(3, 12, generator=stream),
        torch.randn(2, 12, generator=stream), torch.tensor([1, 7]), torch.randn(10, generator=stream),
    )  # fmt: skip
    x, model = torch.randn(4, 12, generator=stream), nn.Sequential(module)
    before, rows, factor = model(x), module.sparse.weight.clone(), module.first.weight.clone()
    assert prepare(model, "int8") == []
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(module.sparse.weight, rows)
    assert not torch.equal(module.first.weight, factor)


def test_what_cannot_be_prepared_is_refused():
    model, _, _ = joined("llama", 0.3)
    with pytest.raises(UsageError, match=r"int3.*int8, int8-dynamic, int4"):
        prepare(model, "int3")
    model._hf_peft_config_loaded = True
    with pytest.raises(UsageError, match="merge_and_unload"):
        prepare(model, "int8")
    assert set(KINDS) == {"int8", "int8-dynamic", "int4"}
