"""Shared parameters: in memory, in a file, cast, cloned, loaded and unshared."""

import copy
import json
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME, output
from safetensors import safe_open
from transformers import AutoConfig, AutoModel

import eckart
from eckart.calibration.layerwise import all_blocks
from eckart.checkpoint.description import FORMAT_VERSION, WRITTEN, EckartConfig, attach_config, detach_config
from eckart.errors import CheckpointError, ModelError
from eckart.evaluation.sizes import count_sizes
from eckart.model import cast, share_parameters, shared_clone, shared_parameters, unshare_parameters

DEEP = {"gpt2": {"n_layer": 4}, "t5": {"num_layers": 4, "num_decoder_layers": 4}}
MODELS = ["gpt2", "llama-tied", "bert-mlm", "t5"]  # Conv1D with bias, no bias, a tied head, two stacks

LOAD = """
import sys, torch
import transformers
kind, folder, *refused = sys.argv[1:]
assert ("eckart" in sys.modules) != bool(refused)
for other in refused:
    try:
        getattr(transformers, kind).from_pretrained(other)
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error), error
    else:
        raise AssertionError("loaded without eckart")
model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
print(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
with torch.no_grad():
    logits = model.eval()(**torch.load(folder + "/batch.pt")).logits
torch.save(logits, folder + "/logits.pt")
print(sum(p.numel() for p in model.parameters()))
"""


def made(name):
    """A model of four blocks whose third is its second, and the ties."""
    model = BY_NAME[name].model(**DEEP.get(name, {"num_hidden_layers": 4}))
    _, one, other, *_ = all_blocks(model)
    ties = {f"{other}.{n}": f"{one}.{n}" for n, _ in model.get_submodule(other).named_parameters()}
    before = count_sizes(model).model.elements
    share_parameters(model, ties)
    return model, ties, before


def tensors(folder):
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", MODELS)
def test_shared_parameters_are_saved_once_and_loaded_shared(name, tmp_path, server):
    model, ties, before = made(name)
    batch = BY_NAME[name].batches()[0]
    logits = output(model, batch)
    assert shared_parameters(model) == ties
    attach_config(model)
    model.save_pretrained(tmp_path / "m")
    written = tensors(tmp_path / "m")
    assert sum(t.numel() for t in written.values()) == count_sizes(model).model.elements == before - block_size(model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": WRITTEN, "format_version": 2, "modules": {}, "ties": ties}
    if name == "gpt2":
        torch.save(batch, tmp_path / "m" / "batch.pt")
        *_, keys, size = server.run_code(LOAD, type(model).__name__, tmp_path / "m").splitlines()
        assert keys == "[] []"
        assert int(size) == sum(p.numel() for p in model.parameters())
        assert torch.equal(torch.load(tmp_path / "m" / "logits.pt"), logits)
    for more in ({}, {"device_map": "auto"}, {"dtype": torch.bfloat16}):
        again = type(model).from_pretrained(tmp_path / "m", **more).eval()
        assert shared_parameters(again) == ties
        assert all(again.get_parameter(t) is again.get_parameter(s) for t, s in ties.items())
        if "dtype" not in more:
            again.tie_weights()  # the class's own ties; a Conv1D's bias is no output head's
            again.tie_weights(recompute_mapping=False)
            assert torch.equal(output(again, batch), logits)
            again.save_pretrained(tmp_path / "twice")
            assert torch.equal(output(eckart.load(tmp_path / "twice"), batch), logits)
    body = AutoModel.from_pretrained(tmp_path / "m")
    assert len(shared_parameters(body)) == len(ties)


def block_size(model):
    return sum(p.numel() for p in model.get_submodule(all_blocks(model)[1]).parameters())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_clones_and_casts_stay_shared_and_get_one_gradient(name):
    model, ties, _ = made(name)
    for other in (copy.deepcopy(model), shared_clone(model), copy.deepcopy(model).half(), model.to(torch.float64)):
        assert shared_parameters(other) == ties
    cast(model, torch.float32)
    assert shared_parameters(model) == ties
    attach_config(model)
    assert model.load_state_dict(model.state_dict()) == ([], [])
    assert shared_parameters(model) == ties
    found = model(**BY_NAME[name].batches()[0])
    found.logits.square().mean().backward()
    (target, source), *_ = ties.items()
    assert model.get_parameter(target).grad is model.get_parameter(source).grad


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_densified_model_shares_nothing_and_loads_without_eckart(name, tmp_path, server):
    model, ties, before = made(name)
    batch = BY_NAME[name].batches()[0]
    logits = output(model, batch)
    attach_config(model)
    model.save_pretrained(tmp_path / "shared")
    with pytest.raises(ModelError, match=rf"{len(ties)} parameters are still those of others"):
        detach_config(model)
    eckart.densify(model)
    assert not shared_parameters(model)
    assert count_sizes(model).model.elements == before
    assert torch.equal(output(model, batch), logits)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    if name != "gpt2":
        return
    torch.save(batch, tmp_path / "dense" / "batch.pt")
    server.run_code(LOAD, type(model).__name__, tmp_path / "dense", tmp_path / "shared", bare=True)
    assert torch.equal(torch.load(tmp_path / "dense" / "logits.pt"), logits)


def test_replaced_parameter_is_not_shared_any_more():
    model, ties, _ = made("llama")
    target = next(iter(ties))
    owner = model.get_submodule(target.rpartition(".")[0])
    owner.weight = torch.nn.Parameter(owner.weight.detach().clone())
    assert shared_parameters(model) == {t: s for t, s in ties.items() if t != target}
    unshare_parameters(model)
    assert not shared_parameters(model)


def test_refusals(tmp_path):
    model, ties, _ = made("llama")
    with pytest.raises(ModelError, match=r"up_proj\.weight cannot share .*q_proj\.weight: their shapes are"):
        share_parameters(model, {"model.layers.3.mlp.up_proj.weight": "model.layers.0.self_attn.q_proj.weight"})
    attach_config(model)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    target, source = next(iter(ties.items()))
    for change, named in (
        ({"ties": {target: "model.layers.1.mlp.wide.weight"}}, "names model.layers.1.mlp.wide"),
        ({"ties": {target: source.replace("weight", "bias")}}, "has no parameter 'bias'"),
        ({"ties": {target: "model.layers.1.mlp.up_proj.weight"}}, "but their shapes are"),
        ({"ties": [target]}, "not in eckart's format 2: ties"),
        ({"ties": {target: 3}}, "not in eckart's format 2: ties"),
        ({"format_version": 1}, "not in eckart's format 1: ties"),
        ({"format_version": FORMAT_VERSION + 1}, f"reads up to {FORMAT_VERSION}"),
    ):
        changed = {**content, "quantization_config": {**content["quantization_config"], **change}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=named.replace("[", r"\[")):
            eckart.load(tmp_path)


def test_checkpoint_without_shared_parameters_has_format_1(tmp_path):
    model = BY_NAME["llama"].model()
    result = eckart.compress(model, method="svd", keep=0.5)
    result.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(config) == {"quant_method", "format_version", "modules"}
    assert config["format_version"] == 1
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["modules"] == config["modules"]
    assert EckartConfig(config["modules"], {}).to_dict() == config
