"""Neurons are found by trial in every architecture, fused gates and separate experts included."""

from contextlib import contextmanager

import pytest
import torch
from architectures import BY_NAME, ZOO
from problems import close, normal
from test_model_experts import drawn as mixture
from torch import nn

from eckart.model import dense_weight, find_sites, replace_module, with_separate_experts
from eckart.model.neurons import NeuronLayer, find_neurons, magnitudes, remove_neurons, sliced_layers

TWO = {"llama", "llama-tied", "mistral", "qwen3", "gemma3", "t5"}
FUSED = {"phi3", "modernbert", "mixtral", "qwen3-moe"}
# Layers of the two blocks (of an encoder's and a decoder's), or experts; ALBERT calls its layer twice a pass, and what
# Mamba's last layer reads depends on earlier tokens.
COUNTS = {"albert": 0, "mamba": 0, "t5": 4, "bart": 4, "mixtral": 8, "qwen3-moe": 32}


def found_in(model, inputs):
    return find_neurons(model, find_sites(model).chosen, inputs)[0]


@pytest.mark.parametrize("architecture", ZOO, ids=[architecture.name for architecture in ZOO])
def test_neurons_of_every_architecture(architecture):
    model = with_separate_experts(architecture.model())
    layers = found_in(model, architecture.batches(rows=2, count=1)[0])
    assert len(layers) == COUNTS.get(architecture.name, 2)
    rows = ((1,), (1,)) if architecture.name in TWO else ((1, 1),) if architecture.name in FUSED else ((1,),)
    assert all(layer.rows == rows for layer in layers)
    assert not any("attn" in layer.reader or "attention." in layer.reader for layer in layers)
    model.train()
    for layer in layers:
        assert dense_weight(model.get_submodule(layer.reader)).shape[1] == layer.width


def test_rows_in_turn():
    layers = found_in(model := with_separate_experts(mixture("gpt-oss")), {"input_ids": torch.arange(12)[None]})
    assert len(layers) == 8
    assert {layer.rows for layer in layers} == {((2,),)}
    layer = layers[0]
    assert layer.rows_of(layer.writers[0], torch.tensor([1, 3])).tolist() == [2, 3, 6, 7]
    weight = dense_weight(model.get_submodule(layer.writers[0]))
    assert torch.equal(layer.neuron_rows(layer.writers[0], weight)[3], weight[6:8])


def test_rows_of_both_halves():
    layer = NeuronLayer("down", ("gate_up",), 5, ((1, 1),))
    assert layer.rows_of("gate_up", torch.tensor([0, 3])).tolist() == [0, 3, 5, 8]
    weight = normal(10, 4)
    assert torch.equal(layer.neuron_rows("gate_up", weight)[3], weight[[3, 8]])
    whole = magnitudes(normal(6, 5, seed=1), [layer.neuron_rows("gate_up", weight)])
    apart = magnitudes(normal(6, 5, seed=1), [weight[:5], weight[5:]])
    close(whole, apart, 1e-6)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral", "modernbert", "bert"])
def test_fewer_neurons_are_the_model_without_the_others(name):
    model = with_separate_experts(BY_NAME[name].model())
    inputs = BY_NAME[name].batches(count=1)[0]
    for number, layer in enumerate(found_in(model, inputs)):
        stay = (torch.arange(layer.width) % 3 != number % 3).nonzero().flatten()
        gone = (torch.arange(layer.width) % 3 == number % 3).nonzero().flatten()
        old = {each: model.get_submodule(each) for each in layer.names}
        with torch.no_grad():
            dense_weight(old[layer.reader])[:, gone] = 0
            expected = model(**inputs)[0]
        for each, module in sliced_layers(old, layer, stay).items():
            assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in old[each].parameters())
            replace_module(model, each, module)
        with torch.no_grad():
            close(model(**inputs)[0], expected, 1e-5)


def test_the_model_runs_once_and_layers_are_tried_where_they_are():
    model = BY_NAME["llama"].model()
    held = []

    @contextmanager
    def hold(name):
        held.append(name)
        yield

    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    layers, _ = find_neurons(model, find_sites(model).chosen, {"input_ids": torch.arange(8)[None]}, hold)
    handle.remove()
    assert len(runs) == 1
    assert "model.layers.1.mlp" in held
    assert "" not in held
    assert len(layers) == 2


class FixedWidth(nn.Module):
    """Its own code knows how many neurons there are."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return (self.down(self.up(x).relu().view(*x.shape[:-1], 10)),)


class SecondResult(nn.Module):
    """A block that also gives away its neurons."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        hidden = self.up(x).relu()
        return self.down(hidden), hidden


@pytest.mark.parametrize(
    ("model", "why"),
    [(FixedWidth(), "with fewer neurons its code"), (SecondResult(), "no trial shows that its inputs")],
    ids=["fixed", "seen"],
)
def test_code_that_does_not_do_with_fewer(model, why):
    layers, left = find_neurons(model, find_sites(model).chosen, {"x": normal(2, 5, 6).float()})
    assert not layers
    assert why in left["down"]


def test_configuration_of_several_widths():
    model = BY_NAME["bart"].model(encoder_ffn_dim=48, decoder_ffn_dim=40)
    layers = found_in(model, BY_NAME["bart"].batches(count=1)[0])
    kept = {layer: torch.arange(layer.width) < (30 if layer.width == 48 else 20) for layer in layers}
    assert remove_neurons(model, kept) is None
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (30, 20)


def test_the_experts_of_a_layer_are_brought_in_once():
    model = with_separate_experts(BY_NAME["mixtral"].model())
    inside, brought = [], []

    @contextmanager
    def hold(name):
        if name.endswith("experts") and name not in inside:
            brought.append(name)
        inside.append(name)
        yield
        inside.pop()

    layers, _ = find_neurons(model, find_sites(model).chosen, {"input_ids": torch.arange(8)[None]}, hold)
    assert len(layers) == 8
    assert brought == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
