"""Configurations and weight files that do not belong together: refused by name, and before anything is allocated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama, place
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import eckart
from eckart.checkpoint.load import blank, load
from eckart.checkpoint.open import find_checkpoint, open_model
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.distributed.memory import MemoryWatch
from eckart.errors import CheckpointError, ModelError


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return place(llama(num_hidden_layers=1), tmp_path_factory.mktemp("dense") / "llama", torch.float32)


@pytest.fixture(scope="module")
def factored(dense) -> Path:
    """In both pivoted forms, each with an index that is stored."""
    recipe = eckart.Recipe(method="svd", form="pivoted", keep=0.6)
    return eckart.compress(dense, recipe=recipe, output_dir=dense.parent / "small").folder


def edited(source: Path, target: Path, config=None, tensors=None) -> Path:
    shutil.copytree(source, target)
    if config is not None:
        content = json.loads((target / "config.json").read_text())
        config(content)
        (target / "config.json").write_text(json.dumps(content))
    if tensors is not None:
        weights = load_file(target / "model.safetensors")
        tensors(weights)
        save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


# -- the configuration -------------------------------------------------------------------------------

UNREADABLE = {
    "activation": ({"hidden_act": "nonesuch"}, "LlamaForCausalLM cannot be built from .*config.json .*nonesuch"),
    "size as text": ({"intermediate_size": "64"}, "config.json is no configuration .*intermediate_size"),
    "heads that do not divide": ({"num_attention_heads": 5}, r"config\.json.*(attention heads|num_heads|divisible)"),
    "architectures as an object": ({"architectures": {"a": 1}}, "architectures in .*config.json .*not a list of names"),
    "architectures as text": ({"architectures": "LlamaForCausalLM"}, "not a list of names of classes"),
    "unknown type": ({"model_type": "nonesuch"}, "config.json is no configuration"),
    "negative size": ({"hidden_size": -32}, "config.json"),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers in .*config.json is 1,000,000,000, but"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_configuration_that_cannot_be_is_named_and_never_the_tokenizer(case, dense, tmp_path):
    fields, words = UNREADABLE[case]
    folder = edited(dense, tmp_path / "bad", lambda config: config.update(fields))
    for use in (load, blank, lambda folder: open_model(find_checkpoint(folder))):
        with pytest.raises(CheckpointError, match=f"(?s){words}") as refusal:
            use(folder)
        assert "tokenizer" not in str(refusal.value).lower()


@pytest.mark.parametrize("fields", [{"dtype": 7}, {"intermediate_size": -32}], ids=["type", "negative size"])
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_what_stops_a_class_while_it_loads_is_told_as_the_configuration_s(kind, fields, request, tmp_path):
    folder = edited(request.getfixturevalue(kind), tmp_path / "bad", lambda config: config.update(fields))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_a_configuration_of_another_quantizer_is_refused(factored):
    with pytest.raises(ValueError, match=r"EckartConfig .* BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(factored, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


STRAY = {
    "empty quantization": {"quantization_config": {}},
    "no quantization": {"quantization_config": None},
    "block of another model": {"text_config": {"a": 1}},
    "empty block": {"text_config": {}},
    "another empty block": {"decoder": {}},
}


@pytest.mark.parametrize("case", STRAY)
def test_blocks_that_are_stray_or_empty_are_passed_over(case, dense, tmp_path):
    folder = edited(dense, tmp_path / "stray", lambda config: config.update(STRAY[case]))
    result = eckart.compress(folder, method="svd", keep=0.6, output_dir=tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(result.folder)(torch.arange(6)[None]).logits.isfinite().all()
    assert load_tokenizer(folder) is not None


def test_folder_without_architectures_is_told_what_to_add(dense, tmp_path):
    folder = edited(dense, tmp_path / "bare", lambda config: config.pop("architectures"))
    with pytest.raises(CheckpointError, match=r'Add the class .* "architectures": \["LlamaForCausalLM"\]'):
        eckart.compress(folder, method="svd", output_dir=tmp_path / "out")


# -- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size"])
def test_sizes_of_the_configuration_are_compared_before_they_are_allocated(field, dense, factored, tmp_path):
    """A gigabyte and more would be drawn at random, to be refused for its shape afterwards."""
    size = 10_000_000
    for source in (dense, factored):
        folder = edited(source, tmp_path / source.name, lambda config: config.update({field: size}))
        for use in (load, AutoModelForCausalLM.from_pretrained)[: 1 + (source is factored)]:
            with MemoryWatch() as memory, pytest.raises(CheckpointError, match=f"{size}|is .*x {size}"):
                use(folder)
            assert memory.peak - memory.before < 200_000_000


def test_numbers_that_the_files_do_not_hold_at_all_are_refused_before_they_are_drawn(dense, tmp_path):
    folder = edited(
        dense, tmp_path / "wide", lambda config: config.update(tie_word_embeddings=False, num_hidden_layers=999)
    )
    with MemoryWatch() as memory, pytest.raises(CheckpointError, match=r"asks for [\d,]+ numbers, .* hold [\d,]+\."):
        load(folder)
    assert memory.peak - memory.before < 200_000_000


# -- types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_of_a_quantized_model_without_its_configuration_are_no_numbers(dtype, dense, tmp_path):
    def quantize(weights):
        for name, weight in weights.items():
            if "_proj" in name:
                weights[name] = (weight / weight.abs().max() * 100).to(dtype)

    folder = edited(dense, tmp_path / "rounded", tensors=quantize)
    with pytest.raises(ModelError, match=r"_proj\.weight in .*safetensors is stored as (u?int|F8).*_config is missing"):
        eckart.compress(folder, method="svd", output_dir=tmp_path / "out")
    with pytest.raises(ModelError, match="6 other weights are like it"):
        load(folder)


# -- what is lost ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"])
def test_factored_folder_without_a_tensor_outside_the_forms_is_never_filled_at_random(lost, factored, tmp_path):
    folder = edited(factored, tmp_path / "lost", tensors=lambda weights: weights.pop(lost))
    for use in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(CheckpointError, match=f"(?s)missing.*{lost}"):
            use(folder)


def test_another_head_may_be_new(factored):
    model = AutoModelForSequenceClassification.from_pretrained(factored, num_labels=3)
    assert model.score.weight.shape == (3, 32)
    assert AutoModel.from_pretrained(factored).norm.weight.isfinite().all()


ORDERS = {
    "out of range": lambda order: order * 0 + 10**6,
    "negative": lambda order: order - 1,
    "one place twice": lambda order: order.where(order > 0, order.max()),
}


@pytest.mark.parametrize("case", ORDERS)
def test_index_that_is_no_order_is_refused(case, factored, tmp_path):
    def change(weights):
        name = next(name for name in weights if name.endswith(".order"))
        weights[name] = ORDERS[case](weights[name])

    folder = edited(factored, tmp_path / "shuffled", tensors=change)
    for use in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(
            CheckpointError, match=r"damaged: in module .*proj order does not name each of 0\.\.\d+ once"
        ):
            use(folder)
