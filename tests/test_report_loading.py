"""The lines that load a published model give back the class that was saved; the card says what it is and does."""

import json
import re

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from test_data_models import bert_config, word_tokenizer
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import eckart
from eckart.compression.result import load_lines
from eckart.data.auto_classes import exact_auto_classes, head_classes
from eckart.report.card import render_model_card
from eckart.report.loading import Loading, find_loading
from eckart.report.results import list_results

BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
WAV = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16],
    "conv_stride": [5],
    "conv_kernel": [10],
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 50,
    "max_target_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
GPT2 = {"vocab_size": 99, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4}


def build(name: str, config: str, options: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def run(lines: str) -> PreTrainedModel:
    """What is in `model` after the lines."""
    found: dict = {}
    exec(lines, found)
    return found["model"]


class MyBert(transformers.BertForSequenceClassification):
    """A class that neither transformers nor a configuration names."""


# -- the class -------------------------------------------------------------------------------------------

SAVED = (
    ("BertModel", "BertConfig", BERT, "AutoModel", "feature-extraction"),
    ("BertForMultipleChoice", "BertConfig", BERT, "AutoModelForMultipleChoice", None),
    ("BertForPreTraining", "BertConfig", BERT, "AutoModelForPreTraining", None),
    ("BertLMHeadModel", "BertConfig", BERT | {"is_decoder": True}, "AutoModelForCausalLM", "text-generation"),
    ("GPT2DoubleHeadsModel", "GPT2Config", GPT2, "GPT2DoubleHeadsModel", None),
    ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "AutoModelForSpeechSeq2Seq",
     "automatic-speech-recognition"),
    ("WhisperForAudioClassification", "WhisperConfig", WHISPER, "AutoModelForAudioClassification",
     "audio-classification"),
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAV, "AutoModelForCTC", "automatic-speech-recognition"),
    ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAV, "AutoModelForAudioClassification",
     "audio-classification"),
    ("ViTModel", "ViTConfig", VISION, "AutoModel", "image-feature-extraction"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "options", "expected", "task"), SAVED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_lines_give_back_the_class_that_was_saved(name, config, options, expected, task, tmp_path):
    model = build(name, config, options)
    result = eckart.compress(model, method="svd", keep=0.6)
    loading = find_loading(result.model)
    assert (loading.name, loading.task, loading.needs_eckart) == (expected, task, True)
    folder = result.save_pretrained(tmp_path / "out")
    back = run(loading.lines(folder))
    assert type(back) is type(model)
    assert all(torch.equal(mine, back.state_dict()[key]) for key, mine in result.model.state_dict().items())
    card = ModelCard.load(folder / "README.md")
    assert loading.lines("out") in card.text
    assert card.data.pipeline_tag == task
    assert card.data.library_name == "transformers"


def test_of_several_auto_classes_the_telling_one():
    """Gemma 3 with images is loaded by four of them; one named like the class comes first."""
    images = transformers.Gemma3Config.__new__(transformers.Gemma3Config)
    assert exact_auto_classes(images, "Gemma3ForConditionalGeneration")[0] == "AutoModelForImageTextToText"
    fuyu = transformers.FuyuConfig.__new__(transformers.FuyuConfig)
    assert exact_auto_classes(fuyu, "FuyuForCausalLM")[:2] == ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    bert = BertConfig(**BERT)
    assert exact_auto_classes(bert, "LlamaForCausalLM") == ()
    assert exact_auto_classes(bert, MyBert) == ()


def test_kind_of_head_of_a_class_that_nothing_names():
    config = BertConfig(**BERT)
    assert head_classes(config, MyBert) == ("AutoModelForSequenceClassification",)  # of the class that it is made from
    assert head_classes(config, "OddForTokenClassification") == ("AutoModelForTokenClassification",)
    config.auto_map = {"AutoModelForMaskedLM": "modeling_odd.OddHead", "AutoConfig": "configuration_odd.OddConfig"}
    assert head_classes(config, "OddHead") == ("AutoModelForMaskedLM",)
    assert head_classes(config, "Other") == ()


def test_class_of_ones_own_is_imported_or_named(tmp_path):
    model = MyBert(BertConfig(**BERT))
    model.save_pretrained(tmp_path / "mine")
    lines = find_loading(model).lines(tmp_path / "mine")
    assert type(run(lines)) is MyBert
    assert "eckart" not in lines

    class Hidden(transformers.BertModel):
        pass

    assert find_loading(Hidden(BertConfig(**BERT))).lines("x") == (
        '# Hidden: your own class\n\nmodel = Hidden.from_pretrained("x")'
    )


CODE = """from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, width=8, **more):
        self.width = width
        super().__init__(**more)


class ToyForCausalLM(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.up = nn.Linear(config.width, config.width)
        self.post_init()


class ToyOther(ToyForCausalLM):
    pass
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A folder whose model brings its own code."""
    folder = tmp_path_factory.mktemp("remote") / "toy"
    folder.mkdir()
    (folder / "modeling_toy.py").write_text(CODE)
    named = {"AutoConfig": "modeling_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    content = {"model_type": "toy", "architectures": ["ToyForCausalLM"], "auto_map": named}
    (folder / "config.json").write_text(json.dumps(content))
    made = get_class_from_dynamic_module("modeling_toy.ToyForCausalLM", folder)
    made(made.config_class()).save_pretrained(folder.parent / "x")
    (folder / "model.safetensors").write_bytes((folder.parent / "x" / "model.safetensors").read_bytes())
    return folder


def test_model_with_code_of_its_own_is_loaded_with_trust(remote):
    model = eckart.load(remote, trust_remote_code=True)
    loading = find_loading(model)
    lines = loading.lines(remote)
    assert lines == (
        f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{remote}", '
        "trust_remote_code=True)"
    )
    assert type(run(lines)) is type(model)
    other = get_class_from_dynamic_module("modeling_toy.ToyOther", remote)(model.config)
    assert find_loading(other).lines("x") == 'import eckart\n\nmodel = eckart.load("x", trust_remote_code=True)'


# -- sentence-transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected", "task"),
    [
        (None, "SentenceTransformer", "sentence-similarity"),
        ({}, "SentenceTransformer", "sentence-similarity"),
        ({"model_type": "CrossEncoder"}, "CrossEncoder", "text-ranking"),
        ({"model_type": "SparseEncoder"}, "SparseEncoder", "feature-extraction"),
        ({"model_type": "ColBERT"}, "MultiVectorEncoder", "sentence-similarity"),
        ({"model_type": "Unheard"}, "SentenceTransformer", "sentence-similarity"),
    ],
)
def test_kind_of_sentence_transformers_is_read_from_its_folder(said, expected, task, tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    if said is not None:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(said))
    loading = find_loading(build("BertModel", "BertConfig", BERT), tmp_path)
    assert (loading.name, loading.task, loading.library) == (expected, task, "sentence-transformers")
    assert loading.with_arguments(backend="onnx").lines("x") == (
        f"from sentence_transformers import {expected}  # pip install sentence-transformers\n\n"
        f'model = {expected}("x", backend="onnx")'
    )


def test_cross_encoder_of_older_versions_is_known_by_its_configuration(tmp_path):
    model = build("BertForSequenceClassification", "BertConfig", BERT | {"num_labels": 1})
    assert find_loading(model, tmp_path).name == "AutoModelForSequenceClassification"
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.2.0"}
    assert find_loading(model, tmp_path).name == "CrossEncoder"


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("SentenceTransformer", BertModel),
        ("CrossEncoder", BertForSequenceClassification),
        ("SparseEncoder", BertForMaskedLM),
        ("MultiVectorEncoder", BertModel),
    ],
)
def test_lines_load_every_kind_of_sentence_transformers_as_its_own(name, head, tmp_path):
    kind = getattr(pytest.importorskip("sentence_transformers"), name, None)
    if kind is None:
        pytest.skip(f"this sentence-transformers has no {name}")
    torch.manual_seed(0)
    options = {"num_labels": 1} if name == "CrossEncoder" else {}
    head(bert_config(**options)).save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    kind(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "original"))
    result = eckart.compress(
        str(tmp_path / "original"), method="svd", form="lowrank", keep=0.5, output_dir=tmp_path / "small"
    )
    model = run(load_lines(result, result.folder))
    assert type(model) is kind
    assert type(model[0].auto_model) is head
    card, page = ((tmp_path / "small" / file).read_text() for file in ("README.md", "eckart/report.html"))
    assert f'{name}("small")' in card
    assert all("# pip install sentence-transformers\n" in text for text in (card, page))


# -- the card --------------------------------------------------------------------------------------------------


def test_results_are_in_the_hubs_own_form():
    hub = {"source": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"}
    scores = {"perplexity": 18.25, "Odd one, 50 %": 0.5, "nan": float("nan"), "text": "x"}
    card = render_model_card(
        "me/smol-70",
        loading=Loading("AutoModelForCausalLM", task="text-generation"),
        results=list_results(scores, hub, None, "text-generation"),
    )
    (entry,) = yaml.safe_load(card.split("---")[1])["model-index"]
    assert entry["name"] == "smol-70"
    (result,) = entry["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {
        "name": "Salesforce/wikitext", "type": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test",
    }  # fmt: skip
    assert [(m["type"], m["name"], m["value"]) for m in result["metrics"]] == [
        ("perplexity", "perplexity", 18.25), ("odd_one_50", "Odd one, 50 %", 0.5),
    ]  # fmt: skip
    assert "model-index" not in render_model_card("x")


def test_results_tell_no_path_of_this_machine():
    (result,) = list_results({"kl": 0.5}, {"source": "/home/me/secret/texts.txt"}, "held-out part", None)
    assert (result.dataset_name, result.dataset_type, result.task_type) == (
        "texts.txt (held-out part)",
        "text",
        "other",
    )
    assert list_results({"kl": 0.5}, None, None, None)[0].dataset_name == "the data given"


def test_card_of_an_export_says_its_own():
    card = render_model_card(
        "me/smol-onnx",
        base_model="me/smol",
        loading='from optimum.onnxruntime import ORTModel\n\nmodel = ORTModel("{name}")',
        library_name="onnx",
        summary="made smaller with eckart and exported to ONNX",
        about=["First.", "Second."],
        records="`eckart/export.json` says what was compared.",
        pipeline_tag="text-generation",
        tags=["onnx"],
    )
    about = yaml.safe_load(card.split("---")[1])
    assert (about["library_name"], about["pipeline_tag"]) == ("onnx", "text-generation")
    assert "onnx" in about["tags"]
    text = card.split("---", 2)[2]
    assert "me/smol, made smaller with eckart and exported to ONNX." in text
    assert 'model = ORTModel("me/smol-onnx")\n```\n\nFirst.\n\nSecond.\n\n## How' in text
    assert "plan.json" not in text
    assert "export.json" in text
    assert "pip install" not in text
    told = render_model_card("x", notice="`pip install onnxruntime` first.")
    assert "```\n\n`pip install onnxruntime` first.\n" in told
    assert "pip install eckart" not in told


def test_card_of_a_compression_has_task_and_numbers(tmp_path):
    torch.manual_seed(0)
    model = build("GPT2LMHeadModel", "GPT2Config", GPT2)
    batches = [{"input_ids": torch.randint(0, 99, (2, 16))} for _ in range(8)]
    result = eckart.compress(model, data=batches, keep=0.6, method="drone")
    folder = result.save_pretrained(tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    numbers = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    assert numbers["KL to the original"] == pytest.approx(result.report["quality"]["agreement"]["kl"])
    assert {entry.task_type for entry in card.data.eval_results} == {"text-generation"}
    assert re.search(r"\| same most likely token", card.text)
