"""A model meets the data: padding that it cannot tell, tokens that it does not have, inputs that it does not take."""

from __future__ import annotations

import pytest
import torch
from test_data_models import bert_config, build, gpt2, llama, llama_config, t5, target_tokenizer, word_tokenizer
from transformers import (
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import eckart
from eckart.data import load_data
from eckart.data.explain import inputs_of
from eckart.data.inference import forward, run
from eckart.data.model_kind import pad_token
from eckart.errors import DataError, UsageError

TEXTS = ["the cat sat", "a big red dog ran on the road", "good ."] * 8
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 50}
    tokens = {"vocab_size": 259, "max_target_positions": 40, "pad_token_id": 0, "decoder_start_token_id": 3}
    return build(
        WhisperForConditionalGeneration, WhisperConfig(**sizes, **heads, **tokens, bos_token_id=1, eos_token_id=2)
    )


def clip():
    towers = {"text_config": {**SMALL, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 97}}
    towers["vision_config"] = {**SMALL, "image_size": 16, "patch_size": 4}
    return build(CLIPModel, CLIPConfig(**towers, projection_dim=16)).eval()


# -- classifiers that read the last token -------------------------------------------------------------------------


def last_token_model(make, pad):
    if make == "gpt2":
        config = gpt2().config
        config.pad_token_id, config.num_labels = pad, 3
        return build(GPT2ForSequenceClassification, config).eval()
    return build(LlamaForSequenceClassification, llama_config(pad_token_id=pad, num_labels=3)).eval()


def one_by_one(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])


def padded(rows, side, fill):
    width = max(map(len, rows))
    gaps = [[fill] * (width - len(row)) for row in rows]
    ids = [row + gap if side == "right" else gap + row for row, gap in zip(rows, gaps, strict=True)]
    mask = [
        [1] * len(r) + [0] * len(g) if side == "right" else [0] * len(g) + [1] * len(r)
        for r, g in zip(rows, gaps, strict=True)
    ]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return inputs


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", [None, 0, 2])
@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_padding_is_never_read_as_the_end_of_a_text(make, pad, side):
    model = last_token_model(make, pad)
    rows = [[5, 6, 7, 8, 9], [1, 1, 10], [3, 4]]
    if pad is None:  # no token is padding: any may begin a text, and end it
        rows += [[0, 4], [6, 0], [7, 1]]
    expected = one_by_one(model, rows)
    for fill in (0, 1, 2, 77):  # whatever stands where nothing is to be read
        inputs = padded(rows, side, fill)
        with torch.no_grad():
            torch.testing.assert_close(forward(model, inputs).logits, expected, rtol=1e-4, atol=1e-5)
    equal = [row[:2] for row in rows]
    with torch.no_grad():
        found = forward(model, {"input_ids": torch.tensor(equal)}).logits  # no mask at all
        alone = forward(model, {key: value[1:2] for key, value in padded(rows, side, 0).items()}).logits
    torch.testing.assert_close(found, one_by_one(model, equal), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-4, atol=1e-5)
    assert model.config.pad_token_id == pad
    with pytest.raises(TypeError):
        forward(model, padded(rows, side, 0), unheard_of=torch.zeros(1, dtype=torch.long), attention_mask=3)
    assert model.config.pad_token_id == pad


def test_a_decoder_that_classifies_is_compressed_without_a_padding_token():
    model = build(LlamaForSequenceClassification, llama_config(pad_token_id=None, num_labels=1, vocab_size=30)).eval()
    before = model.config.to_dict()
    result = eckart.compress(model, word_tokenizer(), data=TEXTS, keep=0.6, batch_size=4, latency=True)
    assert result.report["quality"]["examples"]
    assert result.report["latency"]["batch"] == 4
    scores = eckart.evaluate(
        model, model, word_tokenizer(), data=[{"text": text, "label": len(text)} for text in TEXTS]
    )
    assert scores["latency"]["speedup"]
    assert model.config.to_dict() == before
    assert result.model.config.pad_token_id is None


def test_labels_leave_the_configuration_as_it_is():
    model = build(BertForSequenceClassification, bert_config(num_labels=2))
    forward(model, {"input_ids": torch.tensor([[5, 6]])}, labels=torch.tensor([1]))
    assert model.config.problem_type is None


# -- tokens without an embedding ----------------------------------------------------------------------------------


def grown_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[NEWPAD]"})
    return tokenizer


def test_padding_takes_an_id_that_the_model_has():
    config = bert_config()
    config.pad_token_id = None
    tokenizer = grown_tokenizer()
    assert tokenizer.pad_token_id >= config.vocab_size
    assert pad_token(tokenizer, config) < config.vocab_size
    data = load_data(TEXTS, tokenizer=tokenizer, model=build(BertModel, config))
    assert all(int(batch.inputs["input_ids"].max()) < config.vocab_size for batch in data)


def test_a_token_without_an_embedding_is_named():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["zebra"])
    model = build(BertModel, bert_config())
    token = tokenizer.convert_tokens_to_ids("zebra")
    message = rf"token {token} \('zebra'\), a real one, lies beyond the model's {token} embeddings"
    with pytest.raises(DataError, match=message):
        load_data(["the cat zebra"] * 9, tokenizer=tokenizer, model=model)
    with pytest.raises(DataError, match=r"token -1.*lies beyond"):
        load_data([{"input_ids": torch.tensor([[5, -1]])}], model=model)
    with pytest.raises(DataError, match="token 300, a masked one, lies beyond"):
        load_data([{"input_ids": torch.tensor([[5, 300]]), "attention_mask": torch.tensor([[1, 0]])}], model=model)
    classifier = build(BertForSequenceClassification, bert_config())
    rows = [{"text": "the cat zebra", "label": 1}]
    with pytest.raises(DataError, match=message):
        eckart.evaluate(classifier, tokenizer=tokenizer, data=rows, latency=False)
    causal = llama(vocab_size=20)
    with pytest.raises(DataError, match="lies beyond the model's 20 embeddings"):
        eckart.evaluate(causal, tokenizer=word_tokenizer(), data=["the cat . four"], latency=False)


# -- inputs that a model does not take ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "data", "kind", "parts"),
    [
        (whisper, TEXTS, UsageError, ("cannot run on input_ids", "reads input_features", "decoder_input_ids")),
        (whisper, [{"input_features": torch.randn(2, 8, 100)}] * 4, DataError, ("needs decoder_input_ids or labels",)),
        (clip, TEXTS, DataError, ("cannot run on input_ids", "pixel_values")),
        (lambda: build(BertForMultipleChoice, bert_config()), TEXTS, DataError, ("(batch, choices, tokens)",)),
        (lambda: build(BertModel, bert_config()), [{"pixel_values": torch.randn(2, 3, 4, 4)}] * 4, UsageError,
         ("cannot run on pixel_values (1, 3, 4, 4)", "reads input_ids")),
    ],
    ids=["text for sounds", "one side", "one tower", "choices", "images for text"],
)  # fmt: skip
def test_what_a_model_cannot_read_is_told_with_what_it_takes(make, data, kind, parts):
    model = make().eval()
    with pytest.raises(kind) as caught:
        eckart.compress(model, word_tokenizer(), data=data, keep=0.6)
    for part in ("data: ", type(model).__name__, "all that it takes: ", *parts):
        assert part in str(caught.value)
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 700


def test_every_command_tells_it():
    model = build(BertForMultipleChoice, bert_config()).eval()
    with pytest.raises(DataError, match="all that it takes"):
        eckart.evaluate(model, model, word_tokenizer(), task="agreement", data=TEXTS, latency=False)
    with pytest.raises(UsageError, match=r"--task perplexity.*encoder-decoder.*--task agreement"):
        eckart.evaluate(t5(), tokenizer=target_tokenizer(), task="perplexity", data=TEXTS, latency=False)


def test_memory_that_runs_out_is_not_explained():
    class Full(BertModel):
        def forward(self, input_ids):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(build(Full, bert_config()), {"input_ids": torch.tensor([[5]])})
    assert inputs_of(build(BertModel, bert_config())) == [
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states",
        "encoder_attention_mask",
    ]  # fmt: skip
