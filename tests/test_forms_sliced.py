"""The form `sliced`: fewer neurons in ordinary layers, from the statistics to a checkpoint and back to full size."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from architectures import BY_NAME, output
from problems import close
from torch import nn
from transformers.pytorch_utils import Conv1D

import eckart
from eckart.allocation import Choice
from eckart.calibration import calibrate
from eckart.checkpoint import compare_files
from eckart.checkpoint.description import attach_config
from eckart.checkpoint.load import load
from eckart.checkpoint.save import save
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.solve_slicing import SlicedLayer, solve_slicing
from eckart.data import load_data
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.forms import Sliced
from eckart.methods import METHODS
from eckart.model import (
    SlicedFeatures,
    dense_weight,
    deserialize_module,
    find_sites,
    replace_module,
    serialize_module,
    shared_clone,
    sliced_features,
    with_separate_experts,
)
from eckart.model.neurons import find_neurons

NAMES = ["llama", "gpt2", "bert", "phi3", "mixtral", "t5"]


def solved_layers(name: str, method: str = "eckart", **more: Any) -> tuple[Any, list[SlicedLayer]]:
    """A model with the slicing of all its layers."""
    model = with_separate_experts(BY_NAME[name].model(**more))
    sites = {site.name: site for site in find_sites(model).chosen}
    batches = BY_NAME[name].batches(rows=8, count=4)
    data = load_data(batches, tokenizer=None, model=model)
    settings = Settings.of(METHODS[method], Recipe(allocation="loss", refit=False))
    found = calibrate(model, list(sites), data, needs=settings.needs())
    moments = {n: entry for window in found.windows([]) for n, entry in window.moments.items()}
    layers, _ = find_neurons(model, list(sites.values()), batches[0])
    return model, [
        solve_slicing(
            layer, sites[layer.reader], dense_weight(model.get_submodule(layer.reader)), moments[layer.reader],
            settings, layer.width, curve=True,
        )
        for layer in layers
    ]  # fmt: skip


def sliced(model: Any, layers: list[SlicedLayer], keep: float, dtype: torch.dtype | None = None) -> Any:
    """A copy of the model in which so many neurons of every layer are left."""
    smaller = shared_clone(model)
    for found in layers:
        for name, module in found.modules(model, round(keep * found.layer.width), dtype).items():
            replace_module(smaller, name, module)
    return smaller if dtype is None else smaller.to(dtype)


@pytest.fixture(scope="module", params=NAMES)
def case(request) -> tuple[str, Any, list[SlicedLayer]]:
    return request.param, *solved_layers(request.param)


def test_all_neurons_are_the_model_itself_and_fewer_are_no_better(case):
    name, model, layers = case
    inputs = BY_NAME[name].batches(count=1)[0]
    before = output(model, inputs)
    close(output(sliced(model, layers, 1.0), inputs), before, 1e-4)
    apart = [float((output(sliced(model, layers, keep), inputs) - before).square().sum()) for keep in (0.8, 0.5, 0.2)]
    assert 0 < apart[0] < apart[1] < apart[2]
    for found in layers:
        assert bool((found.losses.diff() <= 0).all())
        assert float(found.losses[0]) > 0
        assert float(found.losses[-1]) == 0


def test_layers_are_ordinary_ones_of_another_size(case):
    name, model, layers = case
    smaller = sliced(model, layers, 0.5)
    for found in layers:
        reader, kept = found.layer.reader, round(0.5 * found.layer.width)
        for each in found.layer.names:
            module = smaller.get_submodule(each)
            assert type(module) is (Conv1D if name == "gpt2" else nn.Linear)
            rows, columns = dense_weight(module).shape
            shape = dense_weight(model.get_submodule(each)).shape
            assert (rows, columns) == (
                (shape[0], kept) if each == reader else (shape[0] // found.layer.width * kept, shape[1])
            )
            assert (module.bias is None) == (model.get_submodule(each).bias is None)
    names = [each for found in layers for each in found.layer.names]
    size, whole = (count_sizes(each, names).named for each in (smaller, model))
    assert size.multiply_adds == pytest.approx(0.5 * whole.multiply_adds, rel=1e-9)
    assert size.elements < 0.53 * whole.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_loaded_and_in_full_size_again(case, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_files, "MOST", 0)  # as for models that are not tiny
    name, model, layers = case
    smaller = sliced(model, layers, 0.4, dtype)
    inputs = BY_NAME[name].batches(count=1)[0]
    expected = output(smaller, inputs)
    folder = save(smaller, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"]["modules"]
    assert set(sliced_features(smaller)) <= set(said)
    assert said[layers[0].layer.reader] == {
        "form": "sliced", "of": layers[0].layer.width, "kept": round(0.4 * layers[0].layer.width), "rows": [],
    }  # fmt: skip
    again, info = getattr(transformers, BY_NAME[name].auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sliced_features(again) == sliced_features(smaller)
    for one, other in zip(again.parameters(), smaller.parameters(), strict=True):
        assert torch.equal(one, other)
    close(output(again, inputs), expected, 1e-5 if dtype == torch.float32 else 2e-2)
    close(output(load(folder), inputs), expected, 1e-5 if dtype == torch.float32 else 2e-2)
    dense = eckart.densify(again)
    assert not sliced_features(dense)
    assert getattr(dense.config, "quantization_config", None) is None
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in BY_NAME[name].model().named_parameters()
    }
    close(output(dense, inputs), expected, 1e-5 if dtype == torch.float32 else 2e-2)


def test_means_of_what_went_are_in_the_bias():
    for name, centered in (("gpt2", True), ("bert", True), ("llama", False)):
        model, layers = solved_layers(name)
        found = layers[0]
        assert (found.mean is not None) == centered
        reader, kept = found.layer.reader, found.slicing.corrected(5)[0]
        module, old = found.modules(model, 5)[reader], model.get_submodule(reader)
        if not centered:
            continue
        at_mean = dense_weight(module).double() @ found.mean[kept].double() + module.bias.double()
        close(at_mean, dense_weight(old).double() @ found.mean.double() + old.bias.double(), 1e-6)
        assert not torch.equal(module.bias, old.bias)


@pytest.mark.parametrize("method", ["drone", "svd"])
def test_other_metrics(method):
    _, layers = solved_layers("llama", method)
    for found in layers:
        assert found.losses.shape == (49,)
        assert float(found.losses[0]) > float(found.losses[24]) > 0
    kfac = solved_layers("llama")[1][0]
    assert float(layers[0].losses[24]) > 0.99 * float(kfac.losses[24])


def test_kept_across_an_interruption(case):
    name, model, layers = case
    for found in layers[:2]:
        tensors, content = found.serialize()
        again = SlicedLayer.deserialize(tensors, json.loads(json.dumps(content)))
        assert again.layer == found.layer
        for one, other in zip(found.modules(model, 9).values(), again.modules(model, 9).values(), strict=True):
            assert torch.equal(one.weight, other.weight)
        packed = {each: serialize_module(module) for each, module in found.modules(model, 9).items()}
        other = shared_clone(model)
        for each, (tensors, spec) in packed.items():
            for _ in range(2):  # onto a layer of full size, and onto a smaller one
                deserialize_module(other, each, tensors, json.loads(json.dumps(spec)))
        expected = shared_clone(model)
        for each, module in found.modules(model, 9).items():
            replace_module(expected, each, module)
        inputs = BY_NAME[name].batches(count=1)[0]
        assert torch.equal(output(other, inputs), output(expected, inputs))
        assert sliced_features(other) == sliced_features(expected)


def test_only_the_triangle_is_stored(monkeypatch):
    from eckart.linalg import blocks

    monkeypatch.setattr(blocks.blocks, "__defaults__", (8,))
    _, layers = solved_layers("llama")
    tensors, content = layers[0].serialize()
    stored = sum(value.numel() for key, value in tensors.items() if key.startswith("lower"))
    assert stored == 8 * 8 * (1 + 2 + 3 + 4 + 5 + 6)
    again = SlicedLayer.deserialize(tensors, content)
    assert torch.equal(again.slicing.lower, layers[0].slicing.lower)


# -- what is refused --------------------------------------------------------------------------------


def test_a_sliced_model_is_not_compressed_again():
    model, layers = solved_layers("llama")
    smaller = sliced(model, layers, 0.5)
    with pytest.raises(ModelError, match=r"is already sliced.*eckart\.densify"):
        find_sites(smaller)
    attach_config(smaller)
    dense = eckart.densify(smaller)
    assert find_sites(dense).chosen


def test_without_eckart_it_does_not_load(tmp_path, monkeypatch):
    model, layers = solved_layers("llama")
    folder = save(sliced(model, layers, 0.5), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": 50}, "sliced: 50 columns were there, but the layer is 32 x 48"),
        ({"kept": 49}, "no more kept than there were"),
        ({"kept": 0}, "sizes must be whole"),
        ({"rows": [1, 1]}, "sliced: 96 rows were there"),
        ({"of": None}, "sizes must be whole"),
        ({"rows": 3}, "sliced: TypeError"),
    ],
    ids=str,
)
def test_descriptions_that_cannot_be_are_refused(change, message, tmp_path):
    model, layers = solved_layers("llama")
    folder = save(sliced(model, layers, 0.5), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.down_proj"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"Module model.layers.0.mlp.down_proj in .*{message}"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_only_linear_layers_are_sliced():
    with pytest.raises(UsageError, match="sliced: Embedding is not a linear layer"):
        SlicedFeatures(8, 4).apply(nn.Embedding(8, 4))


def test_numbers_that_do_not_fit_the_type_are_refused():
    model, layers = solved_layers("llama")
    found = layers[0]
    big = SlicedLayer(found.layer, found.slicing.kept(20))
    big.slicing.mixed.mul_(1e9)
    with pytest.raises(UsageError, match=r"mlp\.down_proj: corrected weight: .*does not fit torch\.float16"):
        big.modules(model, 12, torch.float16)


# -- the form in a plan -------------------------------------------------------------------------------


def test_sizes_of_the_form():
    assert Choice("sliced", 10, (32, 1)).stored(32, 48) == 320
    assert Choice("sliced", 10, (1, 32)).stored(48, 32) == 320
    assert Choice("sliced", 10, (2, 32)).stored(96, 32) == 640
    assert Sliced.full_rank(32, 48) == 48
    assert Sliced.full_rank(96, 32, (2, 32)) == 48
    assert Sliced.max_rank(32, 48, (32, 1)) == 47
    assert set(Sliced.blocks(48, 32)) == {(48, 1), (1, 32), (2, 32)}
    assert (2, 31) not in Sliced.blocks(9, 31)
    for wrong in ((5, 5), (3, 1), (1, 3)):
        with pytest.raises(UsageError, match=f"{wrong[0]} x {wrong[1]} are neither whole columns nor whole rows"):
            Sliced.full_rank(32, 48, wrong)
    with pytest.raises(UsageError, match="its modules are ordinary ones of another size"):
        Sliced(32, 48, 5)
