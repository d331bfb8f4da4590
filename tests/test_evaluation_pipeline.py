"""`eckart.evaluate` and `eckart.inspect`: models in memory and in folders, options, what stays as it was."""

from __future__ import annotations

import json
import random

import pytest
import torch
from architectures import BY_NAME
from test_data_models import bert_config, build, byte_tokenizer, llama, word_tokenizer
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel

import eckart
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.evaluation.recipe import EvaluationRecipe

TEXT = ["Call me Ishmael. Some years ago, having little money, I thought I would sail about a little."]
OWN_CODE = """
from transformers import BertConfig, BertModel


class OwnConfig(BertConfig):
    model_type = "own"


class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A causal model and its tokenizer."""
    path = tmp_path_factory.mktemp("evaluated") / "llama"
    llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compressed():
    return eckart.compress(llama(), method="svd", keep=0.5).model


def kept_state(model: PreTrainedModel) -> list[object]:
    """What a caller may have set on a model, and where its numbers are."""
    modes = [module.training for module in model.modules()]
    tensors = [(t.data_ptr(), t.dtype, t.device, t.requires_grad) for t in (*model.parameters(), *model.buffers())]
    randomness = random.getstate(), torch.get_rng_state().tolist()
    return [model.config.to_json_string(), id(model.config), modes, tensors, randomness]


def test_model_in_memory_is_scored_like_its_folder(folder, compressed, tokenizer, tmp_path):
    text = tmp_path / "held.txt"
    text.write_text(TEXT[0])
    options = {"data": text, "max_seq_length": 16, "device": "cpu"}
    stored = eckart.evaluate(folder, **options)
    held = eckart.evaluate(llama(), None, tokenizer, **options)
    assert {**held, "model": None, "latency": None} == {**stored, "model": None, "latency": None}
    assert (held["model"], held["task"]) == ("LlamaForCausalLM", "perplexity")
    both = eckart.evaluate(compressed, folder, **options)
    assert both["scores"]["perplexity"]["original"] == stored["scores"]["perplexity"]["model"]
    assert list(both["scores"]["perplexity"]) == ["original", "eckart", "int8", "int4", "eckart int8"]
    sizes = both["sizes"]
    assert sizes["elements"]["eckart"] < sizes["elements"]["original"] == sizes["elements"]["int4"]
    assert sizes["bytes"]["int4"] < sizes["bytes"]["int8"] < sizes["bytes"]["original"]
    half = eckart.evaluate(llama().bfloat16(), None, tokenizer, **options)
    assert half["scores"] == eckart.evaluate(llama().bfloat16().float(), None, tokenizer, **options)["scores"]
    itself = eckart.evaluate(compressed, compressed, tokenizer, data=TEXT, max_seq_length=16)
    assert itself["scores"]["KL to the original (nats)"]["eckart"] == 0
    assert any("factored itself" in note for note in itself["notes"])


def test_options_win_over_the_recipe_and_unknown_ones_are_refused(tokenizer):
    recipe = EvaluationRecipe(max_seq_length=16, max_tokens=40, task="perplexity")
    found = eckart.evaluate(llama(), None, tokenizer, data=TEXT, recipe=recipe, max_tokens=20)
    assert "first 20 tokens" in found["protocol"]
    assert "windows of 16 tokens" in found["protocol"]
    for options, message in (
        ({"max_token": 20}, "'max_token' is not an option; did you mean 'max_tokens'"),
        ({"asked": recipe}, "'asked' is not an option"),
        ({"task": "agremeent"}, "task = 'agremeent'.*agreement"),
        ({"recipe": {"max_tokens": 20}}, "recipe is a dict"),
        ({"device": "cuda:77"}, "no such device"),
        ({"data": "self"}, "own text"),
    ):
        with pytest.raises(UsageError, match=message):
            eckart.evaluate(llama(), None, tokenizer, **{"data": TEXT, **options})


def test_callers_models_stay_as_they_were(compressed, tokenizer):
    models = [compressed, llama().bfloat16(), llama()]
    for model in models:
        model.train()
        model.model.layers[0].eval()
        model.lm_head.requires_grad_(False)
    before = [kept_state(model) for model in models]
    found = eckart.evaluate(models[1], models[2], tokenizer, data=TEXT, max_seq_length=16)
    assert found["sizes"]["bytes"]["model"] == found["sizes"]["bytes"]["original"] / 2
    eckart.evaluate(compressed, models[2], tokenizer, data=TEXT, max_seq_length=16, task="agreement")
    for model in models[1:]:
        eckart.inspect(model)
    assert [kept_state(model) for model in models] == before


def test_rows_in_memory_are_scored_by_the_task_that_fits():
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(("the cat", "a dog", "it ran", "good"))]
    classifier, scorer = (build(BertForSequenceClassification, bert_config(num_labels=n)) for n in (2, 1))
    words = word_tokenizer()
    assert set(eckart.evaluate(classifier, None, words, data=rows)["scores"]) == {"accuracy", "F1", "Matthews"}
    found = eckart.evaluate(scorer, None, words, data=[row | {"label": i / 2} for i, row in enumerate(rows)])
    assert (found["task"], set(found["scores"])) == ("regression", {"Spearman", "Pearson"})
    pairs = [{"a": one["text"], "b": "the cat ran", "score": i} for i, one in enumerate(rows)]
    columns = {"data_column": "a", "data_target_column": "b", "data_label_column": "score"}
    encoder = build(BertModel, bert_config())
    assert eckart.evaluate(encoder, None, words, data=pairs, **columns)["task"] == "similarity"
    with pytest.raises(UsageError, match="--against MODEL"):
        eckart.evaluate(encoder, None, words, data=pairs)
    texts = [row["text"] for row in rows]
    against = eckart.evaluate(encoder, build(BertModel, bert_config(), 1), words, data=texts, baselines=False)
    assert against["task"] == "embedding"
    assert list(against["scores"]["worst 1 - cosine"]) == ["model"]
    with pytest.raises(UsageError, match="labeled rows"):
        eckart.evaluate(classifier, None, words, task="classification")
    with pytest.raises(UsageError, match="BertModel"):
        eckart.evaluate(classifier, encoder, words, data=rows)
    with pytest.raises(CheckpointError, match="tokenizer="):
        eckart.evaluate(encoder, encoder, data=texts)


def test_inspect_takes_a_model_or_a_folder(folder, compressed):
    stored = eckart.inspect(str(folder), ignore="*.mlp.*")
    assert stored == eckart.inspect(llama(), ignore=["*.mlp.*"], device="cpu")
    recipe = eckart.InspectionRecipe(ignore="*.self_attn.*")
    assert stored == eckart.inspect(llama(), recipe=recipe, ignore=["*.mlp.*"])
    with pytest.raises(UsageError, match="'ignored' is not an option; did you mean 'ignore'"):
        eckart.inspect(llama(), ignored="*.mlp.*")
    assert {row["kind"] for row in stored["kinds"]} == {f"model.layers.*.self_attn.{n}_proj" for n in "qkvo"}
    assert stored["groups"][0]["kinds"] == [f"model.layers.*.self_attn.{n}_proj" for n in "qkv"]
    with pytest.raises(ModelError, match="factored"):
        eckart.inspect(compressed)
    with pytest.raises(UsageError, match=r"nothing\.here"):
        eckart.inspect(llama(), targets="nothing.here")


def test_a_model_of_images_is_probed_with_an_image(caplog):
    found = eckart.inspect(BY_NAME["vit"].model())
    assert any(len(group["kinds"]) == 3 for group in found["groups"]), "queries, keys and values read one tensor"
    assert not caplog.records


def test_own_code_of_a_model_runs_only_when_trusted(tmp_path):
    build(BertModel, bert_config()).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((tmp_path / "config.json").read_text())
    named = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": named}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"data": ["the cat sat"], "task": "embedding"}
    for call in (lambda: eckart.inspect(tmp_path), lambda: eckart.evaluate(tmp_path, tmp_path, **options)):
        with pytest.raises(CheckpointError, match="trust"):
            call()
    assert eckart.inspect(tmp_path, trust_remote_code=True)["model"] == "OwnModel"
    trusted = eckart.evaluate(tmp_path, tmp_path, **options, trust_remote_code=True, baselines=False)
    assert trusted["scores"]["1 - cosine to the original"]["model"] == pytest.approx(0, abs=1e-6)


def test_text_that_the_model_was_calibrated_on_is_noted(folder, tmp_path):
    eckart.compress(
        str(folder), method="drone", data="stdlib", num_samples=2, max_seq_length=16, output_dir=tmp_path / "out"
    )
    options = {"data": "stdlib", "max_tokens": 64, "max_seq_length": 16}
    assert not eckart.evaluate(tmp_path / "out", **options)["notes"]
    notes = eckart.evaluate(tmp_path / "out", data_split="train", **options)["notes"]
    assert [note for note in notes if "calibrated on stdlib" in note]
