"""Perplexity of a causal model on running text."""

from __future__ import annotations

import math

import pytest
import torch
from test_data_models import byte_tokenizer, gpt2, llama

from eckart.errors import DataError, UsageError
from eckart.evaluation.perplexity import measure_perplexity

TEXT = "Call me Ishmael. Some years ago – never mind how long precisely – having little money, I thought I would sail."
PLAIN, WITH_BOS = byte_tokenizer(), byte_tokenizer(bos=True)


def by_hand(model, ids, window, bos=None):
    """Sum -log p(token | what stands before it in its window), one token at a time."""
    total, count = 0.0, 0
    size = window - (bos is not None)
    for start in range(0, len(ids), size):
        part = ([bos] if bos is not None else []) + ids[start : start + size]
        for place in range(1, len(part)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([part[:place]])).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[part[place]])
            count += 1
    return total, count


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_perplexity_equals_a_loop_over_tokens(make):
    model = make().eval()
    ids = PLAIN(TEXT)["input_ids"]
    total, count = by_hand(model, ids, 16)
    found = measure_perplexity(model, PLAIN, TEXT, window=16, batch_size=3, disable=True)
    assert found["tokens"] == count
    assert found["nll_per_token"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["finite"]
    assert "non-overlapping windows of 16 tokens" in found["protocol"]
    # A token a byte here: what is not scored is the first byte of each window.
    assert found["bytes"] == pytest.approx(len(ids) - math.ceil(len(ids) / 16), abs=4)  # the dashes have 3 bytes
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["bytes"], rel=1e-5)


def test_token_is_scored_against_the_next_one():
    """A model that puts all its weight on "the same token again" is right on a run of equal tokens only."""
    model = llama(vocab_size=259, tie_word_embeddings=False).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(20 * model.model.embed_tokens.weight)
    alike = measure_perplexity(model, PLAIN, "a" * 32, window=16, disable=True)["nll_per_token"]
    other = measure_perplexity(model, PLAIN, "ab" * 16, window=16, disable=True)["nll_per_token"]
    assert alike < 0.1 < 5 < other


def test_perplexity_with_bos_scores_every_token():
    model = llama().eval()
    ids = PLAIN(TEXT)["input_ids"]
    total, count = by_hand(model, ids, 16, bos=0)
    found = measure_perplexity(model, WITH_BOS, TEXT, window=16, disable=True)
    assert found["tokens"] == count == len(ids)
    assert found["nll_per_token"] == pytest.approx(total / count, abs=1e-5)
    assert found["bytes"] == len(TEXT.encode())
    assert "BOS" in found["protocol"]


def test_strided_windows_score_each_token_once():
    model = llama().eval()
    ids = PLAIN(TEXT)["input_ids"]
    logps, done = [], 0
    for start in range(0, len(ids), 6):
        end = min(start + 16, len(ids))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:end]])).logits[0].double().log_softmax(-1)
        logps += [float(logits[place - start - 1, ids[place]]) for place in range(max(done, start + 1), end)]
        done = end
        if end == len(ids):
            break
    found = measure_perplexity(model, PLAIN, TEXT, window=16, stride=6, disable=True)
    assert found["tokens"] == len(logps) == len(ids) - 1
    assert found["nll_per_token"] == pytest.approx(-sum(logps) / len(logps), abs=1e-5)
    assert "stride 6" in found["protocol"]
    assert measure_perplexity(model, PLAIN, TEXT, window=16, stride=16, disable=True) == measure_perplexity(
        model, PLAIN, TEXT, window=16, disable=True
    )


def test_documents_are_joined_by_eos():
    model = llama().eval()
    texts = ["abc déf", "", "ghi"]
    ids = [*PLAIN(texts[0])["input_ids"], 1, 1, *PLAIN(texts[2])["input_ids"]]
    total, count = by_hand(model, ids, 64)
    found = measure_perplexity(model, PLAIN, texts, window=64, disable=True)
    assert (found["tokens"], found["bytes"]) == (count, len("bc défghi".encode()))
    assert found["nll_per_token"] == pytest.approx(total / count, abs=1e-5)
    assert "EOS" in found["protocol"]


def test_perplexity_does_not_depend_on_batch_size_and_stops_at_max_tokens():
    model = llama()
    results = [measure_perplexity(model, PLAIN, TEXT, window=16, batch_size=size, disable=True) for size in (1, 2, 8)]
    for result in results[1:]:
        assert result["nll_per_token"] == pytest.approx(results[0]["nll_per_token"], abs=1e-6)
    assert results[2] == measure_perplexity(model, PLAIN, TEXT, window=16, batch_size=8, disable=True)
    short = measure_perplexity(model, PLAIN, TEXT, window=16, max_tokens=20, disable=True)
    assert short["tokens"] == 18
    assert short == measure_perplexity(model, PLAIN, TEXT[:20], window=16, max_tokens=20, disable=True)


def test_perplexity_leaves_training_mode_and_dtype():
    model = llama().bfloat16()
    model.train()
    model.model.layers[0].eval()
    measure_perplexity(model, PLAIN, TEXT, window=16, disable=True)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert model.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="no logits"):
        measure_perplexity(model.model, PLAIN, TEXT, window=16, disable=True)
    assert model.model.training


def test_perplexity_reports_tokens_that_are_not_finite():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[PLAIN("I")["input_ids"][0]] = torch.nan
    found = measure_perplexity(model, PLAIN, TEXT, window=16, disable=True)
    assert not found["finite"]
    assert found["nonfinite_tokens"] > 0
    assert math.isnan(found["perplexity"])
    worse = llama()
    with torch.no_grad():
        worse.lm_head.weight.mul_(1e6)
    hopeless = measure_perplexity(worse, PLAIN, TEXT, window=16, disable=True)
    assert hopeless["perplexity"] == math.inf
    assert hopeless["finite"]
    assert math.isfinite(hopeless["nll_per_token"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 65}, UsageError, "64 positions"),
        ({"window": 1}, UsageError, "window"),
        ({"window": 16, "stride": 17}, UsageError, "stride"),
        ({"window": 16, "stride": 0}, UsageError, "stride"),
        ({"window": 16, "batch_size": 0}, UsageError, "batch_size"),
        ({"text": "a"}, DataError, "longer text"),
        ({"text": ""}, DataError, "longer text"),
        ({"text": []}, DataError, "longer text"),
    ],
)
def test_perplexity_refuses_options_that_leave_nothing_to_score(options, error, message):
    with pytest.raises(error, match=message):
        measure_perplexity(llama(), PLAIN, **({"text": TEXT, "disable": True} | options))
