"""DSEE: a small update on fixed places, neurons that are found by trial, and an adapter of its own."""

import copy

import pytest
import torch
import transformers
from architectures import BY_NAME, output
from problems import close, normal
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuning_problem import accuracy, bert, gpt2, logits, prepare_model, train

from eckart.checkpoint.save import save
from eckart.checkpoint.stored import stored_tensors
from eckart.errors import CheckpointError, UsageError
from eckart.linalg import low_rank_sparse_split
from eckart.model import dense_weight, find_sites
from eckart.model.neurons import find_neurons, magnitudes, remove_neurons
from eckart.recovery import DSEE, Adapter, load_adapter, save_adapter
from eckart.recovery.pruning.heads import find_heads
from eckart.recovery.pruning.heads import magnitudes as head_magnitudes
from eckart.recovery.training.adapter import AdaptedLinear, adapted_modules, merge

STEPS = 20


def small(**options) -> DSEE:
    return DSEE(**{"rank": 4, "positions": 8, "rounds": 8, **options})


# -- the update -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_update_is_what_it_says(conv):
    dense = Conv1D(10, 8) if conv else nn.Linear(8, 10)
    places = torch.tensor([3, 17, 18, 79])
    module = AdaptedLinear(dense, 3, 6.0, places).double()
    with torch.no_grad():
        for parameter, seed in ((module.down, 1), (module.up, 2), (module.values, 3)):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    update = 2 * normal(10, 3, seed=2) @ normal(3, 8, seed=1)
    for place, value in zip(places.tolist(), normal(4, seed=3), strict=True):
        update[place // 8, place % 8] += value
    close(module.update(), update, 1e-12)
    x = normal(2, 5, 8)
    expected = x @ (dense_weight(dense) + update).mT + dense.bias
    close(module(x), expected, 1e-12)
    close(module.weight + 0, (dense_weight(dense) + update).mT if conv else dense_weight(dense) + update, 1e-12)
    model = nn.ModuleDict({"proj": module})
    merge(model)
    assert type(model["proj"]) is type(dense)
    close(model["proj"](x), expected, 1e-6)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"down", "up", "values"}


def test_starts_at_the_pretrained_model_and_learns_on_fixed_places():
    model, recovery = bert(), small()
    pretrained = copy.deepcopy(model)
    prepare_model(model, recovery, STEPS)
    assert torch.equal(logits(model), logits(pretrained))
    found = adapted_modules(model)
    assert [name.rpartition(".")[2] for name in found] == ["query", "value"] * 2
    places = {name: module.positions.clone() for name, module in found.items()}
    for name, module in found.items():
        split = low_rank_sparse_split(dense_weight(pretrained.get_submodule(name)), 4, 8, 8)
        assert torch.equal(module.positions, split.positions)
    train(model, recovery, STEPS, rate=0.03)
    for name, module in found.items():
        assert torch.equal(module.positions, places[name])
        assert torch.equal(module.dense.weight, pretrained.get_submodule(name).weight)  # frozen
        assert float(module.values.abs().max()) > 0
    expected = logits(model)
    model = recovery.finish(model)
    assert not adapted_modules(model)
    assert not any("input_gate" in name for name, _ in model.named_parameters())
    close(logits(model), expected, 1e-5)
    assert accuracy(model) > 0.9
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, pretrained.get_parameter(name))
        assert changed == (name.startswith("classifier") or name.removesuffix(".weight") in found), name


def test_a_seed_draws_another_a_for_each_site():
    draws = []
    for seed in (0, 0, 1):
        found = adapted_modules(prepare_model(bert(), small(seed=seed), STEPS))
        draws.append([module.down.detach() for module in found.values()])
    assert all(torch.equal(one, other) for one, other in zip(*draws[:2], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(*draws[1:], strict=True))
    assert not any(torch.equal(draws[0][0], other) for other in draws[0][1:])


def test_trains_less_than_a_hundredth_of_bert_base():
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig())
    recovery = DSEE()
    prepare_model(model, recovery, STEPS)
    report = recovery.report()
    adapted = 24 * (16 * 2 * 768 + 64)
    assert report["model_elements"] == 109_483_778
    assert report["trained"] == adapted + 2 * 768 + 2 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["trained"] / report["model_elements"] < 0.01


# -- pruning --------------------------------------------------------------------------------------------


def test_unstructured_masks_the_frozen_weights_alone():
    model, recovery = bert(), small(prune="unstructured", fraction=0.3)
    sites = find_sites(model).chosen
    pretrained = copy.deepcopy(model)
    prepare_model(model, recovery, STEPS)
    zeros = []

    def watch(step):
        weights = [_dense(model, site.name) for site in sites]
        zeros.append(sum(int((weight == 0).sum()) for weight in weights))

    train(model, recovery, STEPS, watch=watch)
    count = int(0.3 * sum(site.elements for site in sites))
    assert zeros == [0] * (STEPS // 2 - 1) + [count] * (STEPS // 2 + 1)
    for site in sites:
        before, now = dense_weight(pretrained.get_submodule(site.name)), _dense(model, site.name)
        assert torch.equal(now, before * (before.abs() > float(recovery.state()["threshold"])))
    expected = logits(model)
    close(logits(recovery.finish(model)), expected, 1e-5)
    assert recovery.report()["zeros"] == count
    assert recovery.report()["threshold"] > 0
    assert recovery.report()["multiply_adds_saved"] == 0  # zeros save nothing by themselves


def _dense(model, name):
    module = model.get_submodule(name)
    return dense_weight(module.dense if isinstance(module, AdaptedLinear) else module)


@pytest.mark.parametrize(("make", "score"), [(bert, "gates"), (gpt2, "magnitude")])
def test_structured_removes_what_it_masked(make, score, tmp_path):
    model = make(**{"n_head" if make is gpt2 else "num_attention_heads": 4})
    targets = "" if make is gpt2 else "query,dense"
    recovery = small(prune="structured", fraction=0.25, heads=0.5, score=score, targets=targets)
    width, sizes = 64 if make is gpt2 else 32, sum(p.numel() for p in model.parameters())
    prepare_model(model, recovery, STEPS)
    train(model, recovery, STEPS)
    gates = {name: gate.detach().clone() for name, gate in model.named_parameters() if name.endswith("input_gate")}
    assert sorted(map(len, gates.values())) == [4, 4, width, width]
    assert all(int((gate == 0).sum()) == (2 if len(gate) == 4 else width // 4) for gate in gates.values())
    if score == "gates":
        assert all(bool((gate[gate != 0] != 1).any()) for gate in gates.values())
    expected = logits(model)
    model = recovery.finish(model)
    close(logits(model), expected, 1e-5)
    report = recovery.report()
    assert report["removed_neurons"] == 2 * width // 4
    assert report["removed_heads"] == 4
    assert set(report["heads"].values()) == {2}
    for name, gate in gates.items():
        reader = model.get_submodule(name.removesuffix(".input_gate"))
        assert dense_weight(reader).shape[1] == (8 if len(gate) == 4 else 3 * width // 4)
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert report["multiply_adds_after"] == sum(linear)
    saved = 2 * (2 * 16 * (width // 4) + 4 * 16 * 8)
    assert report["multiply_adds_before"] - report["multiply_adds_after"] == saved
    biases = 2 * (width // 4 + 3 * 8)
    assert report["elements_after"] == sizes - saved - biases == sum(p.numel() for p in model.parameters())
    save(model, tmp_path / "out")
    stored = [torch.Size(entry.shape).numel() for entry in stored_tensors(tmp_path / "out").values()]
    assert sum(stored) == report["elements_after"]
    again = type(model).from_pretrained(tmp_path / "out")  # its configuration says how wide it is
    assert torch.equal(logits(again), logits(model))


def test_gates_are_penalised_until_they_are_pruned():
    model, recovery = bert(), small(prune="structured", score="gates", penalty=0.5, heads=0.5)
    prepare_model(model, recovery, STEPS)
    task = torch.tensor(1.0)
    close(recovery.loss(None, None, {}, task), torch.tensor(1 + 0.5 * (64 + 4)), 1e-6)  # gates at 1
    train(model, recovery, STEPS)
    close(recovery.loss(None, None, {}, task), task, 1e-6)


@pytest.mark.parametrize("score", ["magnitude", "gates"])
def test_what_matters_least_goes_and_the_rest_stays_as_it_is(score):
    model = bert(num_attention_heads=4)
    recovery = small(prune="structured", fraction=0.5, heads=0.25, score=score, prune_at=0, penalty=0.5)
    prepare_model(model, recovery, STEPS)
    gates = [gate for name, gate in model.named_parameters() if name.endswith("input_gate")]
    with torch.no_grad():
        for number, gate in enumerate(gates):
            gate.copy_(normal(len(gate), seed=number))
    values = [gate.detach().clone() for gate in gates]
    if score == "gates":
        total = sum(value.abs().sum() for value in values)
        close(recovery.loss(None, None, {}, torch.tensor(1.0)), 1 + 0.5 * total, 1e-6)
    recovery.after_step(model, 0)
    layers = [*find_neurons(bert(num_attention_heads=4), find_sites(bert()).chosen, model.dummy_inputs)[0]]
    whole = bert(num_attention_heads=4)
    for gate, value in zip(gates, values, strict=True):
        (name,) = [name for name, parameter in model.named_parameters() if parameter is gate]
        reader = name.removesuffix(".input_gate")
        scores = value.abs()
        if score == "magnitude" and len(gate) == 4:
            heads = next(heads for heads in _heads(whole) if heads.reader == reader)
            scores = head_magnitudes(whole, heads, _dense)
        elif score == "magnitude":
            layer = next(layer for layer in layers if layer.reader == reader)
            scores = magnitudes(_dense(whole, reader), [_dense(whole, writer) for writer in layer.writers])
        gone = set(scores.argsort()[: len(gate) // (4 if len(gate) == 4 else 2)].tolist())
        assert set((gate == 0).nonzero().flatten().tolist()) == gone
        assert torch.equal(gate[gate != 0], value[gate != 0])


def _heads(model):
    return find_heads(model, find_sites(model).chosen, model.dummy_inputs, 0.25).heads


@pytest.mark.parametrize("prune", ["unstructured", "structured"])
def test_what_was_pruned_stays_pruned_when_a_training_resumes(prune):
    recoveries = [small(prune=prune, score="gates", heads=0.25) for _ in range(2)]
    models = [prepare_model(bert(num_attention_heads=4), recovery, 4) for recovery in recoveries]
    train(models[0], recoveries[0], 3)
    models[1].load_state_dict(models[0].state_dict())
    recoveries[1].restore({name: value.clone() for name, value in recoveries[0].state().items()})
    one, other = (recovery.state() for recovery in recoveries)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    gates = [parameter.detach().clone() for name, parameter in models[1].named_parameters() if "input_gate" in name]
    for recovery, model in zip(recoveries, models, strict=True):
        train(model, recovery, 2)
    for gate, before in zip((p for n, p in models[1].named_parameters() if "input_gate" in n), gates, strict=True):
        assert torch.equal(gate, before)
    first, second = (recovery.finish(model) for recovery, model in zip(recoveries, models, strict=True))
    assert torch.equal(logits(first), logits(second))
    for key in ("removed_heads", "removed_neurons", "multiply_adds_after"):
        assert recoveries[0].report()[key] == recoveries[1].report()[key]
    assert recoveries[0].report().get("threshold") == recoveries[1].report().get("threshold")
    assert recoveries[1].adapter.description == recoveries[0].adapter.description


# -- neurons --------------------------------------------------------------------------------------------

EXPECTED = {"bert": (1, 48), "llama": (2, 48), "gpt2": (1, 128), "gpt-neox": (1, 48)}


@pytest.mark.parametrize("name", EXPECTED)
def test_neurons_are_found_in_every_layer(name):
    model = BY_NAME[name].model()
    writers, width = EXPECTED[name]
    found, _ = find_neurons(model, find_sites(model).chosen, model.dummy_inputs)
    assert len(found) >= 2
    assert {(len(layer.writers), layer.width) for layer in found} == {(writers, width)}
    assert not any("attn" in layer.reader or "attention" in layer.reader for layer in found)


@pytest.mark.parametrize("name", ["bart", "llama", "opt", "t5"])
def test_removal_is_the_model_without_them_and_its_configuration_says_so(name):
    model = BY_NAME[name].model()
    batch = BY_NAME[name].batches(count=1)[0]
    layers, _ = find_neurons(model, find_sites(model).chosen, model.dummy_inputs)
    kept = {}
    for number, layer in enumerate(layers):
        kept[layer] = torch.arange(layer.width) % 3 != number % 3
        with torch.no_grad():
            dense_weight(model.get_submodule(layer.reader))[:, ~kept[layer]] = 0
    expected, before = output(model, batch), sum(p.numel() for p in model.parameters())
    assert remove_neurons(model, kept) is None
    close(output(model, batch), expected, 1e-5)
    with torch.device("meta"):
        again = type(model)(model.config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) < before


def test_removal_that_no_configuration_can_say_is_not_done():
    model = bert()
    layers, _ = find_neurons(model, find_sites(model).chosen, model.dummy_inputs)
    before = logits(model)
    reason = remove_neurons(model, {layers[0]: torch.arange(32) > 3})  # of one layer of two
    assert "configuration" in reason
    assert torch.equal(logits(model), before)
    assert model.config.intermediate_size == 32


class Chain(nn.Module):
    """Two linear layers, and something between or beside them."""

    def __init__(self, between, beside=None):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.between, self.beside = between, beside

    def forward(self, x):
        hidden = self.between(self.up(x))
        out = self.down(hidden)
        return (out + self.beside(hidden) if self.beside else out,)


@pytest.mark.parametrize(
    ("between", "beside", "count"),
    [
        (torch.relu, None, 1),
        (lambda h: torch.nn.functional.layer_norm(h, (10,)), None, 0),  # mixes neurons
        (lambda h: h.flip(-1), None, 0),  # puts them in another order
        (lambda h: h.cumsum(-2), None, 0),  # mixes tokens
        (torch.relu, lambda h: h.sum(-1, keepdim=True), 0),  # somebody else reads them
    ],
    ids=["neurons", "mixed", "flipped", "along tokens", "read twice"],
)
def test_only_what_a_trial_proves(between, beside, count):
    torch.manual_seed(0)
    model = Chain(between, beside)
    found, left = find_neurons(model, find_sites(model).chosen, {"x": torch.randn(2, 5, 6)})
    assert (len(found), len(left)) == (count, 1 - count)
    assert model.training


def test_magnitude_is_the_product_of_norms():
    reader, writers = normal(4, 3), [normal(3, 5, seed=1), normal(3, 5, seed=2)]
    expected = [reader[:, j].norm() * (writers[0][j].norm() ** 2 + writers[1][j].norm() ** 2).sqrt() for j in range(3)]
    close(magnitudes(reader, writers).double(), torch.stack(expected), 1e-6)


# -- the adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", ["none", "unstructured", "structured"])
def test_adapter_round_trip(prune, tmp_path):
    pretrained = bert(num_attention_heads=4)
    model, recovery = bert(num_attention_heads=4), small(prune=prune, alpha=6.0)
    prepare_model(model, recovery, STEPS)
    train(model, recovery, STEPS)
    expected = logits(model)
    with pytest.raises(UsageError, match="finish"):
        recovery.save_adapter(tmp_path)
    recovery.finish(model)
    recovery.save_adapter(tmp_path)
    again = load_adapter(bert(num_attention_heads=4), tmp_path)
    close(logits(again), expected, 1e-6)
    assert not torch.equal(logits(again), logits(pretrained))
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in pretrained.parameters())
    if prune == "none":
        second = tmp_path / "second"
        save_adapter(again, second)
        one, other = Adapter.load(tmp_path), Adapter.load(second)
        assert one.description == other.description
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())


def test_adapter_refusals(tmp_path):
    with pytest.raises(UsageError, match="no update to save"):
        save_adapter(bert(), tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(bert(), tmp_path)
    save_adapter(prepare_model(bert(), small(), STEPS), tmp_path)
    for other in (bert(hidden_size=8), gpt2()):
        with pytest.raises(CheckpointError, match="does not fit"):
            load_adapter(other, tmp_path)
    text = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="format 2"):
        load_adapter(bert(), tmp_path)


def test_refusals():
    for options in ({"prune": "heads"}, {"score": "l1"}, {"rank": 0}, {"fraction": 1}, {"prune_at": 2}, {"rounds": 0}):
        with pytest.raises(UsageError, match="recovery dsee"):
            DSEE(**options)
