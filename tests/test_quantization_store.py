"""Quantized models: what is rounded, what it computes, and that folders bring it back to the bit."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME, output
from joint_groups import joined
from safetensors.torch import load_file, save_file
from torch import nn

import eckart
from eckart.checkpoint.save import save
from eckart.checkpoint.stored import stored_size, stored_tensors
from eckart.errors import CheckpointError, ModelError, NumericalError, UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.forms.quantized import QuantizedLinear, pack_nibbles, unpack_nibbles
from eckart.model import cast, shared_clone, shared_parameters
from eckart.quantization import KINDS, kind_of, quantize, quantized_layers
from eckart.quantization.quantize import round_weight

pytest.importorskip("torchao", reason="needs torchao: pip install 'eckart[quant]'")
ALLOWED = {"int8": 0.03, "int8-dynamic": 0.04, "int4": 0.4}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.detach() - other.detach()).norm() / other.detach().norm())


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert-classes"])
def factored(request):
    """A factored model with joint groups, its batch and what it gives."""
    model, groups, batch = joined(request.param, 0.6)
    return model, groups, batch, output(model, batch)


@pytest.fixture(scope="module", params=list(KINDS))
def saved(request, factored, tmp_path_factory):
    """A quantized copy, how it was made, the folder it was saved to, and the model's own batch and output."""
    model, groups, batch, before = factored
    model = copy.deepcopy(model)
    made = quantize(model, request.param)
    folder = save(model, tmp_path_factory.mktemp("quantized") / "model")
    return model, made, folder, groups, batch, before


def test_a_saved_quantized_model_comes_back_to_the_bit(saved):
    model, made, folder, groups, batch, before = saved
    expected = output(model, batch)
    assert 0 < distance(expected, before) < ALLOWED[made.kind]
    loaded = eckart.load(folder)
    assert torch.equal(output(loaded, batch), expected)
    assert kind_of(loaded) == made.kind
    assert set(quantized_layers(loaded)) == set(made.layers)
    assert shared_parameters(loaded) == shared_parameters(model)
    for members in groups:
        assert len({id(loaded.get_submodule(member).first.qdata) for member in members}) == 1
    assert count_sizes(loaded).model == count_sizes(model).model
    again = save(loaded, folder.with_name(f"{made.kind} again"))
    assert load_file(again / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert torch.equal(output(eckart.load(again), batch), expected)


def test_a_file_takes_the_bytes_of_integers_and_says_so(saved):
    model, made, folder, _, _, _ = saved
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert config["quantization"]["kind"] == made.kind
    assert set(config["quantization"]["layers"]) == set(made.layers)
    tensors = load_file(folder / "model.safetensors")
    layer = quantized_layers(model)[made.layers[0]]
    numbers = layer.in_features * layer.out_features
    assert tensors[f"{made.layers[0]}.qdata"].nbytes == numbers // (2 if made.kind == "int4" else 1)
    assert tensors[f"{made.layers[0]}.weight"].numel() == 0  # what stops programs without eckart


def test_scales_keep_their_type_when_a_model_is_cast(saved):
    model, made, folder, _, batch, _ = saved
    expected = output(model, batch)
    scale = torch.float16 if made.kind == "int4" else torch.float32
    loaded = eckart.load(folder, dtype=torch.bfloat16)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    cast_clone = shared_clone(model)
    cast(cast_clone, torch.bfloat16)
    for other in (loaded, moved, cast_clone):
        layers = quantized_layers(other).values()
        assert {layer.scale.dtype for layer in layers} == {scale}
        assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
        assert output(other, batch).dtype == torch.bfloat16
        assert distance(output(other, batch).float(), expected) < 0.1
    assert torch.equal(output(model, batch), expected)


def test_dequantized_layers_hold_the_rounded_numbers(saved):
    model, made, _, groups, batch, _ = saved
    plain = eckart.dequantize(copy.deepcopy(model))
    assert kind_of(plain) is None
    changed = distance(output(plain, batch), output(model, batch))
    assert 1e-3 < changed < 0.03 if made.kind == "int8-dynamic" else changed < 1e-5  # inputs are rounded no more
    for members in groups:
        assert len({id(plain.get_submodule(member).first.weight) for member in members}) == 1
    types = {type(plain.get_submodule(name)).__name__ for name in made.layers}
    assert types <= {"Linear", "Conv1D"}


def test_what_is_left_is_named_with_its_reason(saved):
    model, made, _, _, _, _ = saved
    kinds = {type(model.get_submodule(name)).__name__ for name in made.left}
    assert "Embedding" in kinds
    assert any("output head" in reason for reason in made.left.values())
    assert "left as floating-point numbers" in made.notes[-1]
    assert not set(made.left) & set(made.layers)


def test_a_product_that_layers_share_is_computed_once(saved, monkeypatch):
    _, _, folder, groups, batch, _ = saved
    model = eckart.load(folder)
    made: list[int] = []
    whole = QuantizedLinear.forward

    def counted(layer, x):
        made.append(id(layer.qdata))
        return whole(layer, x)

    monkeypatch.setattr(QuantizedLinear, "forward", counted)
    output(model, batch)
    for members in groups:
        assert made.count(id(model.get_submodule(members[0]).first.qdata)) == 1
    assert len(made) == len(quantized_layers(model)) - sum(len(members) - 1 for members in groups)


def test_numbers_of_a_narrow_type_are_rounded_once(factored, tmp_path):
    model, _, _, _ = factored
    narrow = copy.deepcopy(model)
    cast(narrow, torch.bfloat16)
    wide = copy.deepcopy(narrow)
    cast(wide, torch.float32)
    for each in (narrow, wide):
        quantize(each, "int8")
    for name, layer in quantized_layers(narrow).items():
        assert torch.equal(layer.qdata, wide.get_submodule(name).qdata), name
        assert layer.dtype == torch.bfloat16
    # What a folder of the narrow type takes, counted on the model that is held wide.
    folder = save(narrow, tmp_path / "narrow")
    stored = stored_size(stored_tensors(folder))[1]
    assert count_sizes(wide, dtype=torch.bfloat16).model.bytes == count_sizes(narrow).model.bytes == stored


def test_dense_layers_are_quantized_too_and_clones_keep_theirs():
    architecture = BY_NAME["gpt2"]
    model, batch = architecture.model(), architecture.batches(count=1)[0]
    clone = shared_clone(model)
    before = output(model, batch)
    quantize(clone, "int8")
    assert {layer.source for layer in quantized_layers(clone).values()} == {"conv1d"}
    assert 0 < distance(output(clone, batch), before) < ALLOWED["int8"]
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize(("columns", "group"), [(64, 32), (40, 20), (24, 24), (8, 8), (37, None), (7, None)])
def test_groups_of_four_bits_divide_a_row(columns, group):
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(columns, 64)
            self.even = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    model, x = Body(), torch.randn(5, columns)
    before = model(x)
    made = quantize(model, "int4")
    assert getattr(model.layer, "group", None) == group
    assert ("layer" in made.left) == (group is None)
    if group is not None:
        assert 0 < distance(model(x), before) < ALLOWED["int4"]


def test_numbers_of_four_bits_survive_packing():
    numbers = torch.randint(-8, 8, (5, 9), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_nibbles(numbers)
    assert packed.shape == (5, 5)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, 9), numbers)


def test_a_layer_of_the_stored_numbers_is_what_it_says():
    stream = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (6, 24), dtype=torch.int8, generator=stream)
    scale, bias, x = (torch.rand(shape, generator=stream) for shape in ((6, 3), (6,), (4, 24)))
    layer = QuantizedLinear.of(numbers, scale, bias, group=8, dtype=torch.float32)
    weight = numbers.unflatten(1, (3, 8)) * scale.half().float()[..., None]
    torch.testing.assert_close(layer(x), x @ weight.flatten(1).mT + bias)
    torch.testing.assert_close(layer.weight + 0, weight.flatten(1))
    numbers[0, 0] = 7  # not the layer's own
    layer.qdata.data.zero_()
    layer.qdata.data = pack_nibbles(torch.ones_like(numbers))
    torch.testing.assert_close(layer(x), x @ scale.half().float().repeat_interleave(8, 1).mT + bias)


def test_what_cannot_go_on_is_refused_with_the_way_out(saved, tmp_path, monkeypatch):
    model, _, folder, _, _, _ = saved
    with pytest.raises(UsageError, match=r"quantized already.*eckart\.dequantize\(model\)"):
        quantize(copy.deepcopy(model), "int8")
    with pytest.raises(ModelError, match="already factored"):
        eckart.compress(model, keep=0.5, method="svd")
    clone = copy.deepcopy(model)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UsageError, match=r"pip install 'eckart\[quant\]'"):
        quantize(clone, "int8")
    with pytest.raises(UsageError, match=r"pip install 'eckart\[quant\]'"):
        eckart.load(folder)


def test_a_dense_quantized_model_is_no_original_to_compress():
    model = BY_NAME["llama"].model()
    quantize(model, "int8")
    with pytest.raises(ModelError, match="its weights are integers"):
        eckart.compress(model, keep=0.5, method="svd")
    with torch.no_grad():
        model = BY_NAME["llama"].model()
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.up_proj"):
        quantize(model, "int8")


def broken(folder: Path, target: Path, change) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["quantization"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_damaged_folders_are_refused(saved, tmp_path):
    _, made, folder, _, _, _ = saved
    tensors = load_file(folder / "model.safetensors")
    lost = broken(folder, tmp_path / "lost", lambda stated: None)
    save_file(
        {name: value for name, value in tensors.items() if name != f"{made.layers[-1]}.scale"},
        lost / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="missing from the weights"):
        eckart.load(lost)
    for number, (change, message) in enumerate(
        [
            (lambda stated: stated.update(kind="int3"), "not in eckart's format"),
            (lambda stated: stated["layers"].update({"lm_head.none": {}}), "lm_head"),
            (lambda stated: stated["layers"][made.layers[0]].update(group=5), "quantized layer|not in"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            eckart.load(broken(folder, tmp_path / str(number), change))


def test_scales_of_four_bits_are_fitted_to_most_numbers_of_a_group():
    stream = torch.Generator().manual_seed(0)
    weight = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(64, 64, generator=stream).clamp(1e-4, 1 - 1e-4))
    integers, scale = round_weight(weight, 32, "layer")
    found = (integers.unflatten(1, (-1, 32)) * scale[..., None]).flatten(1)
    assert (found - weight).norm() < 0.97 * (round_to_nearest(weight, 4, 32) - weight).norm()


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """By the largest number of a group."""
    blocks = weight.unflatten(1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return ((blocks / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).flatten(1)
