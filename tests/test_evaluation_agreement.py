"""How near a model's predictions and embeddings are to the original's."""

from __future__ import annotations

import math

import pytest
import torch
from test_data_models import bert_config, build, byte_tokenizer, llama, t5, target_tokenizer, word_tokenizer
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from eckart.data import load_data
from eckart.errors import DataError, NumericalError, UsageError
from eckart.evaluation import divergence as divergence_module
from eckart.evaluation.agreement import compare_embeddings, compare_predictions, standard_error
from eckart.evaluation.divergence import compare_distributions, negative_log_likelihood
from eckart.evaluation.quality import distance_to_original, measure_quality

TEXT = "Call me Ishmael. Some years ago – never mind how long precisely – having little money, I thought I would sail."
PLAIN = byte_tokenizer()


def test_distributions_do_not_depend_on_the_size_of_a_piece(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(37, 11, generator=generator), torch.randn(37, 11, generator=generator)
    targets = torch.randint(11, (37,), generator=generator)
    whole = negative_log_likelihood(a, targets), *compare_distributions(a, b)
    monkeypatch.setattr(divergence_module, "PIECE", 25)
    for one, other in zip(whole, (negative_log_likelihood(a, targets), *compare_distributions(a, b)), strict=True):
        assert torch.equal(one, other)
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    assert torch.allclose(whole[1], (p * (p / q).log()).sum(-1), atol=1e-6)


def test_class_that_the_original_rules_out_costs_nothing():
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
def test_agreement_equals_a_loop_over_tokens(models, data):
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


def test_standard_error_is_that_of_examples():
    values, counts = torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.ones(4, dtype=torch.long)
    assert standard_error(values, counts) == pytest.approx(float(values.std()) / 2)
    assert standard_error(values * 3, counts * 3) == pytest.approx(float(values.std()) / 2)
    assert standard_error(values[:1], counts[:1]) is None
    assert standard_error(torch.tensor([1.0, math.inf]), counts[:2]) is None
    assert standard_error(torch.tensor([2.0, 4.0, 0.0]), torch.tensor([1, 2, 0])) == pytest.approx(0)  # mean 2 in both
    # Of a model: the examples alone, one after another, have the spread.
    models = [build(BertForMaskedLM, bert_config(), seed) for seed in (0, 1)]
    data = load_data(SENTENCES, tokenizer=word_tokenizer(), model=models[0], batch_size=3)
    alone = [
        compare_predictions(*models, [batch.rows(row, row + 1)], disable=True)
        for batch in data
        for row in range(len(batch))
    ]
    assert all(found["standard_error"] is None for found in alone)
    sums, sizes = (torch.tensor([found[name] for found in alone]) for name in ("kl", "tokens"))
    expected = standard_error(sums * sizes, sizes)
    assert expected > 0
    assert compare_predictions(*models, data, disable=True)["standard_error"] == pytest.approx(expected, rel=1e-4)


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


def test_agreement_refuses_outputs_that_cannot_be_compared():
    data = load_data([TEXT], tokenizer=PLAIN, model=llama(), max_seq_length=16)
    with pytest.raises(UsageError, match="no logits"):
        compare_predictions(llama().model, llama(), data, disable=True)
    with pytest.raises(UsageError, match="differ in shape"):
        compare_predictions(llama(), llama(vocab_size=300), data, disable=True)
    with pytest.raises(DataError, match="no real token"):
        compare_predictions(llama(), llama(), [], disable=True)
    score = build(BertForSequenceClassification, bert_config(num_labels=1))
    with pytest.raises(UsageError, match="no logits of several classes"):
        compare_predictions(score, score, load_data(SENTENCES, tokenizer=word_tokenizer(), model=score), disable=True)
    broken = llama()
    broken.lm_head.weight.data[0] = torch.nan
    found = compare_predictions(broken, llama(), data, disable=True)
    assert math.isnan(found["kl"])
    assert not found["finite"]


def test_embeddings_are_compared_without_head_and_padding():
    models = [build(BertModel, bert_config(), seed) for seed in (0, 1)]
    masked = build(BertForMaskedLM, bert_config())
    masked.bert.load_state_dict(models[0].state_dict(), strict=False)
    data = [load_data(SENTENCES, tokenizer=word_tokenizer(), model=models[0], batch_size=size) for size in (1, 8)]
    one, eight = (compare_embeddings(*models, batches, disable=True) for batches in data)
    assert one["cosine_distance"] == pytest.approx(eight["cosine_distance"], abs=1e-5)
    assert one["sentences"] == len(SENTENCES)
    assert one["worst"] >= one["cosine_distance"] > 0.01
    assert one["standard_error"] == pytest.approx(eight["standard_error"], rel=1e-3)
    assert 0 < one["standard_error"] < one["worst"]
    # A head does not matter: the backbone's embeddings are compared.
    assert compare_embeddings(masked, models[0], data[1], disable=True)["cosine_distance"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="no sentence"):
        compare_embeddings(*models, [], disable=True)


def test_quality_compares_what_the_original_puts_out():
    data = load_data(SENTENCES, tokenizer=word_tokenizer(), model=build(BertModel, bert_config()), batch_size=8)
    expected = {"agreement": (BertForSequenceClassification, {"num_labels": 3}), "embedding": (BertModel, {})}
    for name, (kind, more) in expected.items():
        models = [build(kind, bert_config(**more), seed) for seed in (0, 1)]
        found = measure_quality(*models, data, None)
        assert set(found) == {name, "examples", "tokens"}
        assert distance_to_original(found) > 0.001
    score = build(BertForSequenceClassification, bert_config(num_labels=1))
    assert distance_to_original(measure_quality(score, score, data, None)) == pytest.approx(0, abs=1e-6)


def test_quality_refuses_outputs_of_different_shapes():
    data = load_data([TEXT], tokenizer=PLAIN, model=llama(), max_seq_length=16)
    with pytest.raises(UsageError, match="logits differ in shape"):  # not turned into a comparison of embeddings
        measure_quality(llama(), llama(vocab_size=300), data, None)
    broken = llama()
    broken.lm_head.weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        measure_quality(broken, llama(), data, None)
