"""Perplexity and agreement with the original."""

from __future__ import annotations

import math

import pytest
import torch
from test_data_models import bert_config, build, byte_tokenizer, gpt2, llama, t5, target_tokenizer, word_tokenizer
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from eckart.data import Batch, Pooling, load_data
from eckart.errors import DataError, UsageError
from eckart.evaluation import divergence as divergence_module
from eckart.evaluation.agreement import compare_embeddings, compare_predictions, embed_sentences
from eckart.evaluation.divergence import compare_distributions, negative_log_likelihood
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
def test_perplexity_equals_a_loop_by_hand(make):
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


def test_a_token_is_scored_against_the_next_one():
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


def test_batch_size_and_max_tokens():
    model = llama()
    results = [measure_perplexity(model, PLAIN, TEXT, window=16, batch_size=size, disable=True) for size in (1, 2, 8)]
    for result in results[1:]:
        assert result["nll_per_token"] == pytest.approx(results[0]["nll_per_token"], abs=1e-6)
    assert results[2] == measure_perplexity(model, PLAIN, TEXT, window=16, batch_size=8, disable=True)
    short = measure_perplexity(model, PLAIN, TEXT, window=16, max_tokens=20, disable=True)
    assert short["tokens"] == 18
    assert short == measure_perplexity(model, PLAIN, TEXT[:20], window=16, max_tokens=20, disable=True)


def test_modes_and_dtype_are_left_alone():
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


def test_what_is_not_finite_is_said_and_kept():
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
def test_perplexity_refusals(options, error, message):
    with pytest.raises(error, match=message):
        measure_perplexity(llama(), PLAIN, **({"text": TEXT, "disable": True} | options))


def test_pieces_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(37, 11, generator=generator), torch.randn(37, 11, generator=generator)
    targets = torch.randint(11, (37,), generator=generator)
    whole = negative_log_likelihood(a, targets), *compare_distributions(a, b)
    monkeypatch.setattr(divergence_module, "PIECE", 25)
    for one, other in zip(whole, (negative_log_likelihood(a, targets), *compare_distributions(a, b)), strict=True):
        assert torch.equal(one, other)
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    assert torch.allclose(whole[1], (p * (p / q).log()).sum(-1), atol=1e-6)


def test_kl_of_ruled_out_classes():
    ruled_out = torch.tensor([[0.0, -torch.inf]])
    assert float(compare_distributions(torch.tensor([[0.0, 0.0]]), ruled_out)[0]) == pytest.approx(math.log(2))
    assert float(compare_distributions(ruled_out, ruled_out)[0]) == 0
    assert float(compare_distributions(ruled_out, torch.tensor([[0.0, 0.0]]))[0]) == math.inf


def agreement_by_hand(model, reference, batches):
    total, same, count = 0.0, 0, 0
    for batch in batches:
        inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
        with torch.no_grad():
            q = model.eval()(**inputs).logits.double().log_softmax(-1)
            p = reference.eval()(**inputs).logits.double().log_softmax(-1)
        mask = batch.inputs.get("decoder_attention_mask", batch.inputs["attention_mask"])
        if p.dim() == 2:
            p, q, mask = p[:, None], q[:, None], mask[:, :1]
        for row, place in mask.nonzero().tolist():
            total += float((p[row, place].exp() * (p[row, place] - q[row, place])).sum())
            same += int(p[row, place].argmax() == q[row, place].argmax())
            count += 1
    return total / count, same / count, count


SENTENCES = ["the cat sat on the mat", "a dog", "it was good and bad", "one two three four . then red", "road"]


def pairs_of_models():
    words, targets = word_tokenizer(), target_tokenizer()
    masked = [build(BertForMaskedLM, bert_config(), seed) for seed in (0, 1)]
    classes = [build(BertForSequenceClassification, bert_config(num_labels=3), seed) for seed in (0, 1)]
    yield "causal", [llama(0), llama(1)], load_data([TEXT], tokenizer=PLAIN, model=llama(), max_seq_length=16)
    yield "masked", masked, load_data(SENTENCES, tokenizer=words, model=masked[0], batch_size=3)
    yield "classes", classes, load_data(SENTENCES, tokenizer=words, model=classes[0], batch_size=3)
    yield "seq2seq", [t5(0), t5(1)], load_data(SENTENCES, tokenizer=targets, model=t5(), batch_size=3)


@pytest.mark.parametrize(("models", "data"), [case[1:] for case in pairs_of_models()], ids=lambda _: "")
def test_agreement_equals_a_loop_by_hand(models, data):
    kl, top1, count = agreement_by_hand(*models, data)
    for model in models:
        model.train()
    found = compare_predictions(*models, data, disable=True)
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["top1"] == pytest.approx(top1)
    assert found["tokens"] == count
    assert found["finite"]
    assert all(model.training for model in models)
    itself = compare_predictions(models[0], models[0], data, disable=True)
    assert (itself["kl"], itself["top1"]) == (0, 1)


def test_agreement_does_not_depend_on_padding():
    models = [build(BertForMaskedLM, bert_config(), seed) for seed in (0, 1)]
    results = [
        compare_predictions(
            *models, load_data(SENTENCES, tokenizer=word_tokenizer(), model=models[0], batch_size=size), disable=True
        )
        for size in (1, 8)
    ]
    assert results[0]["kl"] == pytest.approx(results[1]["kl"], abs=1e-5)
    assert results[0]["tokens"] == results[1]["tokens"]


def test_agreement_refusals():
    data = load_data([TEXT], tokenizer=PLAIN, model=llama(), max_seq_length=16)
    with pytest.raises(UsageError, match="no logits"):
        compare_predictions(llama().model, llama(), data, disable=True)
    with pytest.raises(UsageError, match="differ in shape"):
        compare_predictions(llama(), llama(vocab_size=300), data, disable=True)
    with pytest.raises(DataError, match="no real token"):
        compare_predictions(llama(), llama(), [], disable=True)
    score = build(BertForSequenceClassification, bert_config(num_labels=1))
    with pytest.raises(UsageError, match="one score"):
        compare_predictions(score, score, load_data(SENTENCES, tokenizer=word_tokenizer(), model=score), disable=True)
    broken = llama()
    broken.lm_head.weight.data[0] = torch.nan
    found = compare_predictions(broken, llama(), data, disable=True)
    assert math.isnan(found["kl"])
    assert not found["finite"]


def test_embedding_cosine():
    models = [build(BertModel, bert_config(), seed) for seed in (0, 1)]
    masked = build(BertForMaskedLM, bert_config())
    masked.bert.load_state_dict(models[0].state_dict(), strict=False)
    data = [load_data(SENTENCES, tokenizer=word_tokenizer(), model=models[0], batch_size=size) for size in (1, 8)]
    one, eight = (compare_embeddings(*models, batches, disable=True) for batches in data)
    assert one["cosine_distance"] == pytest.approx(eight["cosine_distance"], abs=1e-5)
    assert one["sentences"] == len(SENTENCES)
    assert one["worst"] >= one["cosine_distance"] > 0.01
    # A head does not matter: the backbone's embeddings are compared.
    assert compare_embeddings(masked, models[0], data[1], disable=True)["cosine_distance"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="no sentence"):
        compare_embeddings(*models, [], disable=True)


def test_pooling_modes():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert torch.equal(Pooling()(hidden, mask), torch.stack([hidden[0, :3].mean(0), hidden[1, 2:].mean(0)]))
    assert torch.equal(Pooling(("cls",))(hidden, mask), torch.stack([hidden[0, 0], hidden[1, 2]]))
    assert torch.equal(Pooling(("lasttoken",))(hidden, mask), torch.stack([hidden[0, 2], hidden[1, 3]]))
    assert torch.equal(Pooling(("max",))(hidden, mask), torch.stack([hidden[0, 2], hidden[1, 3]]))
    both = Pooling(("cls", "max"), normalize=True)(hidden, mask)
    assert both.shape == (2, 6)
    assert torch.allclose(both.norm(dim=-1), torch.ones(2))
    spoilt = hidden.clone()
    spoilt[0, 3] = torch.nan
    assert torch.equal(Pooling()(spoilt, mask), Pooling()(hidden, mask))
    assert torch.equal(Pooling()(hidden), hidden.mean(1))
    assert Pooling()(hidden.bfloat16(), mask).dtype == torch.float32
    with pytest.raises(UsageError, match="no last hidden state"):
        Pooling()(torch.zeros(2, 3))


def test_pooling_passes_gradients():
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    Pooling(normalize=True)(hidden, torch.tensor([[1, 1, 0, 0]] * 2))[:, 0].sum().backward()
    assert hidden.grad[:, 2:].abs().max() == 0
    assert hidden.grad[:, :2].abs().min() > 0


def test_pooling_from_a_folder(tmp_path):
    assert Pooling.from_folder(tmp_path) is None
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert Pooling.from_folder(tmp_path) == Pooling(("cls",))
    config.write_text('{"embedding_dimension": 8, "pooling_mode": ["mean", "max"]}')
    assert Pooling.from_folder(tmp_path) == Pooling(("mean", "max"))
    (tmp_path / "modules.json").write_text(
        '[{"path": "", "type": "sentence_transformers.models.Transformer"},'
        ' {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},'
        ' {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]'
    )
    config.write_text('{"pooling_mode": "lasttoken"}')
    assert Pooling.from_folder(tmp_path) == Pooling(("lasttoken",), normalize=True)
    config.write_text('{"pooling_mode": "weightedmean"}')
    with pytest.raises(DataError, match=r"config\.json: pooling mode 'weightedmean'.*mean, cls"):
        Pooling.from_folder(tmp_path)
    config.write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not readable as JSON"):
        Pooling.from_folder(tmp_path)


def test_the_encoders_side_is_pooled():
    ids = torch.tensor([[5, 6, 7]])
    batch = Batch({"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 5]])}, (0,))
    model = t5().eval()
    with torch.no_grad():
        expected = model.encoder(input_ids=ids).last_hidden_state.mean(1).double()
        assert torch.allclose(embed_sentences(model, batch), expected, atol=1e-6)
