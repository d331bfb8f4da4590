"""`--quantize` of compress, eval, compare and export: what is published, scored and shown."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from tiny import llama, place
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import eckart
from eckart.config import QuantizationKind
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.exports.densify import Dense
from eckart.quantization import KINDS, kind_of, quantized_layers
from eckart.report.compression import list_card_rows
from eckart.report.scores import render_comparison, render_scores
from eckart.report.words import to_plain_text

pytest.importorskip("torchao", reason="needs torchao: pip install 'eckart[quant]'")
TEXTS = [f"def add_{n}(x):\n    return x + {n}\n" for n in range(40)]
SMALL = {"num_samples": 6, "max_seq_length": 32, "batch_size": 2, "latency": False}
DRONE = {**SMALL, "method": "drone"}
EVALUATED = {"max_seq_length": 32, "max_tokens": 300, "batch_size": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a model in float32."""
    return place(llama(num_hidden_layers=2), tmp_path_factory.mktemp("original") / "model", torch.float32)


@pytest.fixture(scope="module")
def published(original, tmp_path_factory):
    """The original, pivoted, compressed to int8 and published."""
    folder = tmp_path_factory.mktemp("quantized") / "int8"
    return eckart.compress(original, data=TEXTS, keep=0.5, form="pivoted", quantize="int8", output_dir=folder, **DRONE)


@pytest.fixture(scope="module")
def factored(original, tmp_path_factory):
    """The same in floating point."""
    folder = tmp_path_factory.mktemp("factored") / "float"
    return eckart.compress(original, data=TEXTS, keep=0.5, form="pivoted", output_dir=folder, **DRONE)


def test_compress_publishes_the_rounded_model_and_reports_what_rounding_cost(published, factored):
    report = published.report
    rounding = report["quantization"]
    loaded = eckart.load(published.folder)
    assert kind_of(loaded) == "int8"
    assert rounding["layers"] == len(quantized_layers(loaded))
    assert report["sizes"]["model"]["after"] == count_sizes(loaded).model.as_dict()
    assert rounding["before"]["size"] == factored.report["sizes"]["model"]["after"]
    assert rounding["before"]["quality"]["agreement"]["kl"] == factored.report["quality"]["agreement"]["kl"]
    before, after = rounding["before"]["quality"]["agreement"]["kl"], report["quality"]["agreement"]["kl"]
    assert before != after
    assert abs(after - before) < 0.02 * before + 1e-4
    assert report["sizes"]["model"]["after"]["bytes"] < rounding["before"]["size"]["bytes"]
    assert {choice.form for choice in published.plan.choices.values()} == {"lowrank"}  # as it is stored
    assert any("would not survive rounding" in note for note in report["notes"])
    text = str(published)
    assert "rounded to int8" in text
    assert "-> " in text
    assert list_card_rows(report)["bytes"]["before rounding"] == rounding["before"]["size"]["bytes"]
    assert "before rounding" in (published.folder / "README.md").read_text()
    assert "quantize: int8" in (published.folder / "eckart" / "recipe.yaml").read_text()


def test_a_layer_that_lost_neurons_is_rounded_and_loaded(original, tmp_path):
    result = eckart.compress(
        original, data=TEXTS, keep=0.5, form="sliced", quantize="int8", output_dir=tmp_path / "sliced", **DRONE
    )
    loaded = eckart.load(result.folder)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert "sliced" in {choice.form for choice in result.plan.choices.values()}
    dense = eckart.densify(eckart.load(result.folder, dtype=torch.float32))
    with torch.no_grad():
        found, wanted = dense(ids).logits, eckart.load(result.folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_eval_scores_dense_and_factored_beside_themselves_rounded(original, factored):
    found = eckart.evaluate(
        factored.folder, original, data=TEXTS, task="perplexity", quantize="int4", latency=True, **EVALUATED
    )
    columns = {"original", "eckart", "original int4", "eckart int4", "int8", "int4", "eckart int8"}
    assert set(found["scores"]["perplexity"]) == set(found["sizes"]["bytes"]) == columns
    assert set(found["latency"]["seconds"]) == {"original", "eckart", "original int4", "eckart int4"}
    size = found["sizes"]["bytes"]
    assert size["eckart int4"] < size["eckart int8"] < size["eckart"] < size["original"]
    assert size["eckart int8"] < size["int8"]
    assert size["original int4"] < size["original"]
    scores = found["scores"]["perplexity"]
    assert scores["eckart int8"] == pytest.approx(scores["eckart"], rel=0.01)
    assert scores["eckart int4"] != scores["eckart"]
    assert "eckart int4" in to_plain_text(render_scores(found))


def test_a_quantized_folder_is_scored_as_it_is(original, published):
    found = eckart.evaluate(published.folder, original, data=TEXTS, task="perplexity", latency=False, **EVALUATED)
    assert set(found["sizes"]["bytes"]) == {"original", "eckart", "int8", "int4"}
    assert found["sizes"]["bytes"]["eckart"] == published.report["sizes"]["model"]["after"]["bytes"]
    with pytest.raises(UsageError, match="quantized already"):
        eckart.evaluate(published.folder, data=TEXTS, task="perplexity", quantize="int8", latency=False, **EVALUATED)
    turned = eckart.evaluate(original, published.folder, data=TEXTS, task="perplexity", latency=False, **EVALUATED)
    assert any("no int8 and int4 beside it" in note for note in turned["notes"])


def test_compare_shows_the_original_rounded_the_same_way(original):
    found = eckart.compare(
        original, data=TEXTS, methods=["drone"], keeps=[0.6], quantize="int8", **{**SMALL, "latency": None}
    ).as_dict()
    (row,) = found["rows"]
    rounded = found["original_rounded"]
    assert row["rounded"] == rounded["kind"] == "int8"
    assert row["bytes"] < row["before_rounding"]["bytes"]
    assert row["bytes"] < rounded["bytes"] < found["original"]["bytes"]
    assert rounded["quality"]["KL to the original"] < row["quality"]["KL to the original"]
    assert rounded["latency"]["speedup"]["eckart"] > 0
    text = to_plain_text(render_comparison(found))
    assert text.count("int8") == 2
    assert "drone int8" in text


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_dense_export_is_one_that_transformers_loads_alone(kind, factored, tmp_path):
    folder = eckart.export(factored.folder, tmp_path / "dense", quantize=kind)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    ids = torch.arange(5, 25)[None]
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found, wanted = loaded(ids).logits, eckart.load(factored.folder)(ids).logits
    assert 0 < float((found - wanted).norm() / wanted.norm()) < (0.5 if kind == "int4" else 0.05)
    assert not quantized_layers(loaded)
    record = json.loads((folder / "eckart" / "export.json").read_text())
    assert record["quantize"] == kind
    assert record["left"]["lm_head" if "lm_head" in record["left"] else next(iter(record["left"]))]
    assert record["bytes"] == (folder / "model.safetensors").stat().st_size
    assert "pip install torchao" in (folder / "README.md").read_text()


def test_a_folder_in_floating_point_is_quantized_afterwards(factored, published, tmp_path):
    folder = eckart.export(factored.folder, tmp_path / "later", format="factored", quantize="int8")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(eckart.load(folder)(ids).logits, published.model(ids).logits)
    assert "import eckart" in (folder / "README.md").read_text()
    with pytest.raises(UsageError, match="--quantize int8"):
        eckart.export(factored.folder, tmp_path / "same", format="factored")


def test_save_pretrained_writes_what_a_model_in_memory_became(factored, tmp_path):
    model = eckart.load(factored.folder)
    eckart.quantize(model, "int4")
    model.save_pretrained(tmp_path / "rounded")
    loaded, ids = eckart.load(tmp_path / "rounded"), torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        eckart.dequantize(loaded).save_pretrained(tmp_path / "back")
        back = eckart.load(tmp_path / "back")
        assert kind_of(back) is None
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_quantized_folder_is_exported_with_its_rounded_numbers(published, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(Dense, "check", lambda self, source, quantize: given.append(kind_of(source.model)))
    folder = eckart.export(published.folder, tmp_path / "dense")
    assert given == [None]  # no format needs to know how eckart stores integers
    ids = torch.arange(5, 25)[None]
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not hasattr(loaded.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, published.model(ids).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match="rounding its numbers again"):
        eckart.export(published.folder, tmp_path / "twice", quantize="int8")


def test_what_cannot_be_quantized_is_refused(original, published, tmp_path):
    with pytest.raises(UsageError, match=r"--stock and --quantize int8.*eckart export"):
        eckart.compress(original, data=TEXTS, form="sliced", stock=True, quantize="int8", **SMALL)
    with pytest.raises(UsageError, match=r"int8-dynamic"):
        eckart.compress(original, data=TEXTS, quantize="int3", **SMALL)
    with pytest.raises((ModelError, UsageError), match=r"quantized.*without --quantize|quantized"):
        eckart.tune(published.folder, data=TEXTS, recovery="full", output_dir=tmp_path / "tuned", max_steps=1)
    with pytest.raises(UsageError, match="int9"):
        eckart.export(published.folder, tmp_path / "x", quantize="int9")
    with pytest.raises((ModelError, CheckpointError), match=r"quantized|factored"):
        eckart.compress(published.folder, data=TEXTS, keep=0.3, **SMALL)


def test_recipes_and_kinds_name_the_same():
    assert get_args(QuantizationKind) == tuple(KINDS)


def test_dense_gpt2_is_refused_with_the_ways_that_there_are(tmp_path):
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    source = place(GPT2LMHeadModel(config), tmp_path / "gpt2", torch.float32)
    with pytest.raises(ModelError, match=r"4 x Conv1D, which transformers does not.*--format onnx or openvino"):
        eckart.export(source, tmp_path / "dense", format="dense", quantize="int8")
    assert not (tmp_path / "dense").exists()
