"""Attention heads: found by trial, removed from models of many families, and described so that they load again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from architectures import BY_NAME, output
from problems import close
from torch import nn
from tuning_problem import bert, logits, prepare_model, train

import eckart
from eckart.checkpoint.save import save
from eckart.checkpoint.stored import stored_size, stored_tensors
from eckart.errors import CheckpointError, UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.model import PrunedHeads, dense_weight, find_sites, pruned_heads
from eckart.recovery import DSEE
from eckart.recovery.pruning.heads import find_heads, magnitudes, remove_heads

# family: attentions found, heads in each, heads that go together, how it is said that they are fewer
EXPECTED = {
    "bert": (2, 4, 1, "module"),
    "roberta": (2, 4, 1, "module"),
    "distilbert": (2, 4, 1, "module"),
    "deberta-apart": (2, 4, 1, "module"),
    "electra": (2, 4, 1, "module"),
    "modernbert": (2, 4, 1, "module"),
    "gpt2": (2, 4, 1, "module"),
    "opt": (2, 4, 1, "module"),
    "gpt-neox": (2, 4, 1, "module"),
    "bart": (6, 4, 1, "module"),
    "llama": (2, 2, 2, "config"),
    "qwen3": (2, 2, 2, "config"),
    "phi3": (2, 2, 2, "config"),
}


def found(model, fraction=0.5):
    return find_heads(model, find_sites(model).chosen, model.dummy_inputs, fraction)


def silenced(model, heads, kept):
    """Set what the other heads put out to zero."""
    columns = kept.repeat_interleave(heads.size)
    with torch.no_grad():
        dense_weight(model.get_submodule(heads.reader))[:, ~columns] = 0


@pytest.mark.parametrize("name", EXPECTED)
def test_removal_is_the_model_with_silent_heads_and_loads_again(name, tmp_path):
    architecture = BY_NAME[name]
    model, batches = architecture.model(), architecture.batches(count=1)[0]
    attentions, count, each, said = EXPECTED[name]
    before = output(model, batches)
    have = found(model)
    assert torch.equal(output(model, batches), before)
    assert len(have.heads) == attentions
    assert {(heads.count, heads.each) for heads in have.heads} == {(count, each)}
    assert bool(have.config) == (said == "config")
    kept = {heads: torch.arange(count) % 2 == number % 2 for number, heads in enumerate(have.heads)}
    for heads, mask in kept.items():
        silenced(model, heads, mask)
    expected, size = output(model, batches), count_sizes(model).model.elements
    gone = 0
    for heads in kept:  # half of them
        gone += sum(p.numel() for name, _ in heads.writers for p in model.get_submodule(name).parameters()) // 2
        gone += model.get_submodule(heads.reader).weight.numel() // 2
    remove_heads(model, kept, have.config)
    close(output(model, batches), expected, 1e-5)
    save(model, tmp_path / "out")
    assert stored_size(stored_tensors(tmp_path / "out"))[0] == count_sizes(model).model.elements == size - gone
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == (said == "module")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(again, batches), output(model, batches))


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "llama"])
def test_attributes_follow_where_the_code_reads_them(name):
    model = BY_NAME[name].model()
    have = found(model)
    remove_heads(model, {heads: torch.arange(heads.count) > 0 for heads in have.heads}, have.config)
    module = model.get_submodule(have.heads[0].module)
    if name == "bert":
        assert (module.self.num_attention_heads, module.self.all_head_size, module.self.layer_idx) == (3, 24, 0)
    elif name == "gpt2":
        assert (module.num_heads, module.split_size, module.embed_dim) == (3, 24, 32)
    elif name == "opt":
        assert (module.num_heads, module.head_dim, module.embed_dim) == (3, 8, 32)
    else:
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
        assert module.config is model.config
        assert module.num_key_value_groups == 2
        assert not pruned_heads(model)


def test_generation_and_other_attention_code_agree():
    model = BY_NAME["gpt2"].model()
    have = found(model)
    remove_heads(model, {heads: torch.arange(4) != 1 for heads in have.heads}, have.config)
    ids = torch.arange(4, 10).view(1, 6)
    made = [model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*made)
    first = output(model, {"input_ids": ids})
    model.set_attn_implementation("eager")
    close(output(model, {"input_ids": ids}), first, 1e-5)


def test_where_the_configuration_cannot_say_it_each_attention_does(tmp_path):
    # 3 heads of width 8 do not divide a width of 32, which Llama's configuration refuses.
    model = BY_NAME["llama"].model(num_key_value_heads=4)
    have = found(model, 0.25)
    assert not have.config
    kept = {heads: torch.arange(4) != 1 + number for number, heads in enumerate(have.heads)}
    remove_heads(model, kept, have.config)
    assert [cut.kept for cut in pruned_heads(model).values()] == [(0, 2, 3), (0, 1, 3)]
    save(model, tmp_path / "out")
    again = eckart.load(tmp_path / "out")
    inputs = BY_NAME["llama"].batches(count=1)[0]
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert eckart.load(tmp_path / "out", auto_class="AutoModel").layers[0].self_attn.k_proj.out_features == 24
    eckart.export(tmp_path / "out", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
    close(output(dense, inputs), output(model, inputs), 1e-5)


def test_a_configuration_speaks_for_every_attention_or_for_none():
    model = BY_NAME["llama"].model()
    assert found(model).config
    module = model.model.layers[1].self_attn
    module.v_proj.register_forward_hook(lambda module, args, output: output + output.mean(-1, keepdim=True))
    have = found(model)
    assert [heads.module for heads in have.heads] == ["model.layers.0.self_attn"]
    assert list(have.left) == ["model.layers.1.self_attn"]
    assert not have.config


def test_zeros_take_the_place_of_heads_in_fused_projections():
    model, inputs = BY_NAME["gpt2"].model(), BY_NAME["gpt2"].batches(count=1)[0]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    have = found(model)
    remove_heads(model, {heads: torch.arange(4) != 2 for heads in have.heads}, have.config)
    expected = output(model, inputs)
    eckart.densify(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    close(output(model, inputs), expected, 1e-5)
    assert model.transformer.h[0].attn.split_size == 32
    assert not pruned_heads(model)


@pytest.mark.parametrize(("name", "words"), [
    ("bloom", "with fewer heads its code does not do"),  # its positions are a number for each head of the model
    ("t5", "with fewer heads its code does not do"),  # so are its position biases
    ("albert", "more than once a pass"),
    ("deberta", "more than once a pass"),
])  # fmt: skip
def test_what_cannot_be_shown_is_left_with_its_reason(name, words):
    have = found(BY_NAME[name].model())
    assert not have.heads
    assert have.left
    assert all(words in reason for reason in have.left.values())


class Mixed(nn.Module):
    """An attention of four heads, and something on the way that may keep them from being heads."""

    def __init__(self, how):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.how = how

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.how == "across":
            v = v + v.mean(1, keepdim=True)
        elif self.how == "two":
            v = v.unflatten(1, (-1, 2)).flip(2).cumsum(2).flip(2).flatten(1, 2)
        elif self.how == "counted":
            v = v * v.shape[1]
        made = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(made) + (v.mean() if self.how == "beside" else 0)


class Around(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.attention = Mixed(how)
        self.config = transformers.LlamaConfig(num_attention_heads=8)

    def forward(self, x):
        return (self.attention(x),)


@pytest.mark.parametrize(
    ("how", "found", "reason"),
    [
        ("", [(4, 4)], None),
        ("two", [(2, 8)], None),  # the first of each two reads the second
        ("across", [], "no parts of its width"),
        ("beside", [], "read elsewhere too"),
        ("counted", [], "does not do what it does without"),
    ],
)
def test_only_what_a_trial_proves(how, found, reason):
    torch.manual_seed(0)
    model = Around(how)
    have = find_heads(model, find_sites(model).chosen, {"x": torch.randn(2, 5, 16)}, 0.5)
    assert [(heads.count, heads.size) for heads in have.heads] == found
    assert [reason in why for why in have.left.values()] == ([True] if reason else [])
    assert model.training
    assert model.config.use_cache


def test_a_fraction_of_few_heads_may_be_none():
    have = found(BY_NAME["llama"].model(), 0.25)
    assert not have.heads
    assert all("0.25 of 2" in reason for reason in have.left.values())


def test_magnitude_is_the_product_of_norms():
    model = BY_NAME["gpt2"].model()
    heads = found(model).heads[0]
    scores = magnitudes(model, heads, lambda model, name: dense_weight(model.get_submodule(name)))
    attention = model.get_submodule(heads.module)
    rows = dense_weight(attention.c_attn).view(3, 4, 8, 32).square().sum((0, 2, 3)).sqrt()
    columns = dense_weight(attention.c_proj).view(32, 4, 8).square().sum((0, 2)).sqrt()
    close(scores, rows * columns, 1e-5)


# -- what a checkpoint says ----------------------------------------------------------------------------

SPEC = {"form": "heads", "of": 4, "kept": [0, 2], "rows": {"q": [2]}, "columns": {"o": 2}, "numbers": {"n": 2}}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o, self.n = nn.Linear(3, 8), nn.Linear(8, 3), 4


def test_spec_round_trip_and_back():
    cut, module = PrunedHeads.from_spec(SPEC), Attention()
    assert cut.spec() == SPEC
    whole = copy.deepcopy(module)
    cut.apply(module)
    assert (module.q.weight.shape, module.q.bias.shape, module.o.weight.shape, module.n) == ((4, 3), (4,), (3, 4), 2)
    assert torch.equal(module.q.weight, whole.q.weight[[0, 1, 4, 5]])
    assert torch.equal(module.o.weight, whole.o.weight[:, [0, 1, 4, 5]])
    cut.undo(module)
    assert torch.equal(module.q.weight[[0, 1, 4, 5]], whole.q.weight[[0, 1, 4, 5]])
    assert not module.q.weight[[2, 3, 6, 7]].any()
    assert not module.o.weight[:, [2, 3, 6, 7]].any()
    assert torch.equal(module.o.bias, whole.o.bias)
    assert (module.n, module.q.out_features, module.o.in_features) == (4, 8, 8)


@pytest.mark.parametrize(("changes", "words"), [
    ({"of": 5}, "q, which has 8"), ({"of": 0}, "1 or more"), ({"of": "4"}, "whole"), ({"kept": []}, r"some of 0\.\.3"),
    ({"kept": [2, 0]}, r"some of 0\.\.3"), ({"kept": [4]}, r"some of 0\.\.3"), ({"rows": {"q": []}}, "whole"),
    ({"rows": {}}, "whole"), ({"rows": {"x": [2]}}, "no linear layer x"), ({"rows": {"q": 2}}, "rows"),
    ({"columns": {"o": 3}}, "o, which has 8"), ({"numbers": {"m": 2}}, "no whole number m"),
    ({"numbers": {"training": 2}}, "no whole number training"), ({"numbers": {"x.n": 2}}, "no module x"),
])  # fmt: skip
def test_spec_refusals(changes, words):
    with pytest.raises(UsageError, match=words):
        PrunedHeads.from_spec({**SPEC, **changes}).apply(Attention())


def test_a_damaged_description_is_named(tmp_path):
    model, recovery = bert(num_attention_heads=4), DSEE(rank=2, positions=4, rounds=2, prune="structured")
    model = recovery.finish(prepare_model(model, recovery, 0))
    save(model, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["bert.encoder.layer.0.attention"]["of"] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"bert\.encoder\.layer\.0\.attention .*8 of 4 rows or columns are 32"):
        eckart.load(tmp_path / "out")


def test_a_tuned_model_without_some_heads_is_loaded_by_transformers(tmp_path):
    model = bert(num_attention_heads=4)
    recovery = DSEE(rank=2, positions=4, rounds=4, prune="structured", score="gates", heads=0.5)
    model = recovery.finish(train(prepare_model(model, recovery, 6), recovery, 6))
    assert recovery.report()["removed_heads"] == 4
    save(model, tmp_path / "out")
    auto = transformers.AutoModelForSequenceClassification
    again, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(model))
    assert again.bert.encoder.layer[1].attention.self.num_attention_heads == 2
