"""A model and variants of it, run together: each gives what it gives when it is run alone."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from architectures import BY_NAME, output
from torch import nn

from eckart.calibration.variants import run_variants, run_variants_by_block
from eckart.data import Batch
from eckart.model import WeightLoader, replaced
from eckart.storage.cache import Cache

CHANGED = {
    "llama": (["model.layers.1.mlp.down_proj"], ["model.layers.0.self_attn.q_proj", "lm_head"], ["lm_head"]),
    "bert-mlm": (["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self.query"],),
    "t5": (["decoder.block.1.layer.0.SelfAttention.q"], ["encoder.block.1.layer.0.SelfAttention.k"]),
    "albert": (["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"],),
}


@pytest.fixture(scope="module", params=list(CHANGED))
def case(request):
    """A model, variants of it and batches."""
    found = BY_NAME[request.param]
    model = found.model()
    variants = {}
    for place, names in enumerate(CHANGED[request.param]):
        modules = {name: copy.deepcopy(model.get_submodule(name)) for name in names}
        for module in modules.values():
            with torch.no_grad():
                module.weight.mul_(0.5 + place)
        variants[place + 3] = modules
    inputs = found.batches(rows=2, count=2)
    return model, variants, [Batch(given, (2 * i, 2 * i + 1)) for i, given in enumerate(inputs)]


def alone(model, variants, batches):
    expected = {}
    with torch.no_grad():
        for batch in batches:
            expected[None, batch.examples] = output(model, batch.inputs)
            for place, modules in variants.items():
                with replaced(model, modules):
                    expected[place, batch.examples] = output(model, batch.inputs)
    return expected


def check(model, variants, batches, run):
    found, before = {}, dict(model.named_modules())
    order = []

    def see(place, batch, value):
        found[place, batch.examples] = value.clone()
        order.append(place)

    run(lambda batch: output(model, batch.inputs), see)
    expected = alone(model, variants, batches)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert order == [None, *variants] * len(batches)
    assert dict(model.named_modules()) == before
    first = batches[0].examples
    assert all(not torch.allclose(found[place, first], found[None, first]) for place in variants)


def test_one_batch_after_the_other(case):
    model, variants, batches = case
    check(model, variants, batches, lambda run, see: run_variants(model, variants, batches, run, see, what="test"))


def test_block_after_block(case):
    model, variants, batches = case
    states = Cache(memory=sys.maxsize, folder=None)
    weights = WeightLoader(model, None)

    def run_all(run, see):
        run_variants_by_block(model, variants, batches, run, see, weights=weights, hidden_states=states, what="test")

    check(model, variants, batches, run_all)
    assert states.in_memory == 0


def test_what_comes_before_a_variant_is_computed_once():
    model, batch = BY_NAME["llama"].model(), Batch(BY_NAME["llama"].batches(count=1)[0], (0, 1))
    last = len(model.model.layers) - 1
    variants = {i: {f"model.layers.{last}.mlp.down_proj": nn.Linear(48, 32, bias=False)} for i in range(3)}
    variants |= {3: {"model.layers.0.mlp.down_proj": nn.Linear(48, 32, bias=False)}}
    ran: list[int] = []
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    run_variants_by_block(
        model, variants, [batch], lambda b: output(model, b.inputs), lambda *_: None,
        weights=WeightLoader(model, None), hidden_states=Cache(memory=sys.maxsize, folder=None), what="test",
    )  # fmt: skip
    assert last > 0
    assert ran.count(last) == ran.count(0) + 3
