"""Passes that begin at a block give what a whole pass gives."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME, output
from torch import nn

from eckart.calibration.resumed_pass import ResumedPass
from eckart.data.inference import forward

INSIDE = {
    "llama": ("model.layers.1.mlp.down_proj", 1),
    "bert-mlm": ("bert.encoder.layer.1.attention.self.query", 1),
    "t5": ("decoder.block.1.layer.0.SelfAttention.q", 3),  # after the two blocks of the encoder
    "albert": (
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
        0,
    ),  # one block, called again and again
    "vit": ("vit.layers.1.mlp.fc1", 1),
}


def whole(model, inputs):
    with torch.no_grad():
        return output(model, inputs)


@pytest.mark.parametrize("name", [name for name in INSIDE if name in BY_NAME])
def test_a_changed_model_gives_what_a_whole_pass_gives(name):
    model, inputs = BY_NAME[name].model(), BY_NAME[name].batches(count=1)[0]
    module, call = INSIDE[name]
    once = ResumedPass(model, lambda: output(model, inputs))
    assert torch.equal(once.output, whole(model, inputs))
    start = once.start_of([module])
    assert start == call
    assert torch.equal(once.run_from(start), once.output)
    with torch.no_grad():
        model.get_submodule(module).weight.mul_(0.5)
    changed = once.run_from(start)
    assert not torch.allclose(changed, once.output)
    assert torch.equal(changed, whole(model, inputs))
    assert "forward" not in vars(model.get_submodule(module.rpartition(".")[0]))


def test_blocks_before_are_not_run_and_nothing_is_left_behind():
    model, inputs = BY_NAME["llama"].model(), BY_NAME["llama"].batches(count=1)[0]
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.model.layers)
    ]
    once = ResumedPass(model, lambda: forward(model, inputs).logits)
    everything = list(ran)
    assert everything == list(range(len(model.model.layers)))
    ran.clear()
    once.run_from(1)
    assert ran == everything[1:]
    for handle in handles:
        handle.remove()
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_a_module_outside_all_blocks_takes_a_whole_pass():
    model, inputs = BY_NAME["llama"].model(), BY_NAME["llama"].batches(count=1)[0]
    once = ResumedPass(model, lambda: forward(model, inputs).logits)
    assert once.start_of(["lm_head"]) == 0
    assert once.start_of(["model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"]) == 0


def test_what_blocks_change_in_place_is_not_what_was_recorded():
    class Block(nn.Module):
        def forward(self, x):
            x += 1
            return x * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block(), Block()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Model(), torch.arange(3.0)
    once = ResumedPass(model, lambda: model(x.clone()))
    assert torch.equal(once.run_from(2), once.output)
    assert torch.equal(once.run_from(2), once.output)
