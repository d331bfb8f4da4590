"""A sentence-transformers folder is its whole pipeline: embeddings are those of `SentenceTransformer(folder)`."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from test_data_models import WORDS, bert_config, build, byte_tokenizer, llama_config, word_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, BertModel, LlamaForCausalLM, LlamaModel

import eckart
from eckart.data import Pooling, load_data
from eckart.errors import DataError, UsageError
from eckart.evaluation.agreement import embed_sentences
from eckart.evaluation.model import open_model
from eckart.evaluation.recipe import EvaluationRecipe

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import modules as parts

TEXTS = [" ".join(WORDS[i : i + n]) for i, n in ((0, 3), (4, 9), (2, 5), (11, 2), (6, 12))]
PAIRS = [{"sentence1": one, "sentence2": other, "score": i * i} for i, (one, other) in enumerate(pairwise(TEXTS))]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    build(BertModel, bert_config()).save_pretrained(folder)
    word_tokenizer(limit=30).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build(LlamaModel, llama_config()).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 60
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


def dense(inside, outside, activation=None, **more):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = parts.Dense(inside, outside, activation_function=activation or nn.Tanh(), **more)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layer


def layer_norm(width):
    layer = parts.LayerNorm(width)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    return layer


def saved(backbone, folder, *after, pooling=None, settings=None, general=None, **more):
    """A folder with this pipeline; `settings` and `general` are put into its two configurations."""
    first = parts.Transformer(str(backbone))
    model = st.SentenceTransformer(modules=[first, parts.Pooling(32, **(pooling or {})), *after], device="cpu", **more)
    model.save(str(folder))
    for name, changes in (("sentence_bert_config.json", settings), ("config_sentence_transformers.json", general)):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})))
    return folder


def ours(folder, texts=TEXTS):
    opened = open_model(folder, EvaluationRecipe(device="cpu"))
    pooling = opened.pooling.reading(opened.tokenizer)
    data = load_data(
        texts, tokenizer=opened.tokenizer, model=opened.model, pooling=pooling, num_samples=9, batch_size=3
    )
    assert data.description["kind"] == "encoder"
    found = {}
    with torch.no_grad():
        for batch in data:
            found |= dict(zip(batch.examples, embed_sentences(opened.model, batch, pooling), strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


def theirs(folder, texts=TEXTS):
    return torch.tensor(st.SentenceTransformer(str(folder), device="cpu").encode(texts)).double()


PIPELINES = {
    **{mode: {"pooling": {"pooling_mode": mode}} for mode in parts.Pooling.POOLING_MODES},
    "two modes": {"pooling": {"pooling_mode": ("mean", "cls")}},
    "dense": {"after": lambda: [dense(32, 8)]},
    "dense of another activation": {"after": lambda: [dense(32, 8, nn.Identity(), bias=False), parts.Normalize()]},
    "residual": {"after": lambda: [dense(32, 32, nn.GELU(), use_residual=True), dense(32, 4, use_residual=True)]},
    "normalized between": {"after": lambda: [parts.Normalize(), dense(32, 8), parts.Dropout(0.5), layer_norm(8)]},
    "prompt": {"prompts": {"q": "a big red film : "}, "default_prompt_name": "q"},
    "prompts that nobody asked for": {"prompts": {"query": "a big red film : "}},
    "prompt left out": {
        "prompts": {"q": "a big red film : "}, "default_prompt_name": "q",
        "pooling": {"include_prompt": False, "pooling_mode": ("mean", "weightedmean", "cls", "max")},
    },
    "short": {"settings": {"max_seq_length": 5}},
    "short by its tokenizer": {"settings": {"processor_kwargs": {"model_max_length": 6}}},
    "lower case": {"settings": {"do_lower_case": True}, "texts": [text.upper() for text in TEXTS]},
    "truncated": {"general": {"truncate_dim": 7}, "after": lambda: [dense(32, 16)]},
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_embeddings_are_those_of_sentence_transformers(backbone, tmp_path, name):
    options = dict(PIPELINES[name])
    texts, after = options.pop("texts", TEXTS), options.pop("after", list)
    folder = saved(backbone, tmp_path / "st", *after(), **options)
    torch.testing.assert_close(ours(folder, texts), theirs(folder, texts), rtol=1e-4, atol=1e-5)


def test_old_layouts_are_read(backbone, tmp_path):
    folder = saved(backbone, tmp_path / "st", settings={"max_seq_length": 5})
    (folder / "sentence_bert_config.json").rename(folder / "sentence_roberta_config.json")
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_cls_token": true, "pooling_mode_weightedmean_tokens": true}'
    )
    torch.testing.assert_close(ours(folder), theirs(folder), rtol=1e-4, atol=1e-5)
    assert ours(folder).shape == (5, 64)


@pytest.mark.parametrize("head", [None, "causal"])
def test_a_decoder_reads_sentences_and_not_running_text(decoder, tmp_path, head):
    folder = saved(decoder, tmp_path / "st", parts.Normalize(), pooling={"pooling_mode": "lasttoken"})
    if head:  # as Qwen3-Embedding is saved
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    torch.testing.assert_close(ours(folder), theirs(folder), rtol=1e-4, atol=1e-5)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS * 8))
    result = eckart.compress(str(folder), data=str(file), keep=0.6, output_dir=tmp_path / "out", device="cpu")
    report = result.report
    assert report["data"]["kind"] == "encoder"
    assert report["data"]["calibration_examples"] + report["data"]["held_out_examples"] == 40
    # what is reported is what a user of the folder finds
    before, after = theirs(folder), theirs(tmp_path / "out")
    distance = 1 - (before * after).sum(1)
    assert 0 < report["quality"]["embedding"]["cosine_distance"] <= float(distance.max()) * 1.01
    assert report["quality"]["embedding"]["cosine_distance"] >= float(distance.min()) * 0.99
    assert type(eckart.load(tmp_path / "out")) is (LlamaForCausalLM if head else LlamaModel)


def test_similarity_is_that_of_sentence_transformers(backbone, tmp_path):
    from scipy.stats import pearsonr

    folder = saved(
        backbone, tmp_path / "st", dense(32, 8), settings={"max_seq_length": 12},
        prompts={"q": "a big red film : "}, default_prompt_name="q",
    )  # fmt: skip
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)  # a head that the pipeline does not read
    model = st.SentenceTransformer(str(folder), device="cpu")
    one, other = (
        model.encode([row[key] for row in PAIRS], normalize_embeddings=True) for key in ("sentence1", "sentence2")
    )
    expected = pearsonr((one * other).sum(-1), [row["score"] for row in PAIRS]).statistic
    for options in ({"task": "similarity"}, {"data_label_column": "score"}):
        found = eckart.evaluate(str(folder), data=PAIRS, latency=False, device="cpu", **options)
        assert found["task"] == "similarity"
        assert found["scores"]["Pearson"]["model"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: parts.CNN(32, 32), "module CNN"),
        (lambda: dense(32, 8, module_input_name="token_embeddings"), "module Dense of token_embeddings"),
        (lambda: dense(32, 8, nn.Softplus(beta=2)), None),
    ],
)
def test_what_is_not_computed_is_refused(backbone, tmp_path, make, reason):
    before = isinstance(make(), parts.CNN)
    folder = tmp_path / "st"
    if before:
        first = [parts.Transformer(str(backbone)), make(), parts.Pooling(32)]
        st.SentenceTransformer(modules=first, device="cpu").save(str(folder))
    else:
        saved(backbone, folder, make())
    if reason is None:  # torch's own class, made without its options: sentence-transformers does the same
        torch.testing.assert_close(ours(folder), theirs(folder), rtol=1e-4, atol=1e-5)
        return
    with pytest.raises(UsageError, match=rf"--task similarity.*{reason}.*--task embedding"):
        eckart.evaluate(str(folder), data=PAIRS, task="similarity", latency=False)
    assert Pooling.from_folder(folder).left_out


def test_code_of_its_own_and_other_pipelines_are_refused(backbone, tmp_path):
    folder = saved(backbone, tmp_path / "st")
    file = folder / "modules.json"
    modules = json.loads(file.read_text())
    file.write_text(json.dumps([{**modules[0], "type": "custom_st.Transformer"}, modules[1]]))
    with pytest.raises(UsageError, match=r"module custom_st\.Transformer"):
        eckart.evaluate(str(folder), data=PAIRS, task="similarity", latency=False)
    file.write_text(json.dumps([modules[0]]))
    with pytest.raises(UsageError, match="has no module Pooling"):
        eckart.evaluate(str(folder), data=PAIRS, task="similarity", latency=False)
    file.write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text("[1]")
    with pytest.raises(DataError, match=r"config_sentence_transformers\.json: holds a list"):
        eckart.evaluate(str(folder), data=PAIRS, task="similarity", latency=False)
    (folder / "config_sentence_transformers.json").unlink()
    dense_folder = saved(backbone, tmp_path / "other", dense(32, 8))
    config = dense_folder / "2_Dense" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"activation_function": "os.system"}))
    with pytest.raises(UsageError, match=r"Dense with activation os\.system"):
        eckart.evaluate(str(dense_folder), data=PAIRS, task="similarity", latency=False)
