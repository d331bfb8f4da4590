"""Labels of every head: classes, scores, and several of either at once; what does not fit is refused first."""

from __future__ import annotations

import numpy
import pytest
import torch
from test_data_models import WORDS, bert_config, build, llama, t5, target_tokenizer, word_tokenizer
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

import eckart
from eckart.data import load_data, load_task
from eckart.data.labels import labels_of
from eckart.data.rows import DataRow
from eckart.errors import DataError, UsageError
from eckart.evaluation.tasks import score_classification, score_regression

MULTI = {"problem_type": "multi_label_classification"}
NAMES = {"label2id": {"joy": 0, "fear": 1, "rage": 2}, "id2label": {0: "joy", 1: "fear", 2: "rage"}}
TOKENIZER = word_tokenizer()


def rows_of(values):
    return [DataRow({"label": value}, f"f:{line}", line) for line, value in enumerate(values)]


def read(values, **options):
    return labels_of(rows_of(values), "label", label2id=NAMES["label2id"], **{"regression": False, **options})


def classifier(labels=3, **more) -> PreTrainedModel:
    return build(BertForSequenceClassification, bert_config(num_labels=labels, **more)).eval()


def bert(kind: type) -> PreTrainedModel:
    return build(kind, bert_config())


def texts(labels):
    return [{"text": " ".join(WORDS[i % 20 : i % 20 + 4]), "label": labels[i % len(labels)]} for i in range(24)]


@pytest.mark.parametrize(
    "values",
    [
        [[1, 0, 1], [0, 0, 0]],
        [(1, 0, 1), (0, 0, 0)],
        [numpy.array([1, 0, 1]), torch.tensor([0, 0, 0])],
        [[True, False, True], [False, False, False]],
        ["[1, 0, 1]", "[0, 0, 0]"],
        [[0, 2], []],
        [["joy", "rage"], []],
        ['["joy", "rage"]', "[]"],
    ],
)
def test_labels_that_hold_together_are_read_in_every_form(values):
    assert read(values, multi_label=True, outputs=3) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_lists_of_zeros_and_ones_may_be_classes():
    assert read([[0, 1], [1]], multi_label=True, outputs=3) == [
        [1, 1, 0],
        [0, 1, 0],
    ]  # not as long as the model is wide
    assert read([[0, 1], [1, 0]], multi_label=True, outputs=2) == [[0, 1], [1, 0]]
    assert read([[0, 1], [2]], multi_label=None) == [[1, 1, 0], [0, 0, 1]]
    assert read([1, 2], multi_label=None) == [1, 2]
    assert read([[0.5, 2], ["3", 4]], regression=True, outputs=2) == [[0.5, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1], {"multi_label": True, "outputs": 3}, "f:0: label 1 .*is no list.*0 or 1 for each of 3"),
        ([[3]], {"multi_label": True, "outputs": 3}, "f:0: label 3 .*has 3 classes"),
        ([["awe"]], {"multi_label": True, "outputs": 3}, "f:0: label .awe. .*not in label2id"),
        ([[0.5, 1, 0]], {"multi_label": True, "outputs": 3}, "not a class"),
        ([[1, 0]], {}, "f:0: label .*is a list.*problem_type"),
        ([[1, 0]], {"regression": True}, "is a list, and this head gives one score"),
        ([0.5], {"regression": True, "outputs": 2}, "gives 2 scores"),
        ([[1, 2, 3]], {"regression": True, "outputs": 2}, "gives 2 scores"),
        ([3], {"outputs": 3}, "label 3 .*has 3 classes"),
    ],
)
def test_labels_that_do_not_fit_are_named(values, options, message):
    with pytest.raises(DataError, match=message):
        read(values, **options)


def test_batches_hold_them():
    model = classifier(**MULTI, **NAMES)
    data = load_data(texts([["joy"], ["fear", "rage"]]), tokenizer=TOKENIZER, model=model, label_column="label")
    labels = {e: row.tolist() for batch in data for e, row in zip(batch.examples, batch.inputs["labels"], strict=True)}
    assert labels[0] == [1, 0, 0]
    assert labels[1] == [0, 1, 1]
    report = eckart.compress(model, TOKENIZER, data=texts([[0], [1, 2]]), data_label_column="label", keep=0.6).report
    assert (report["curvature"], report["allocation"]) == ("labels", "loss")
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (
            lambda: build(BertForMaskedLM, bert_config()),
            {"data_label_column": "label"},
            UsageError,
            "BertForMaskedLM has no",
        ),
        (
            lambda: bert(BertForTokenClassification),
            {"data_label_column": "label"},
            UsageError,
            "has no head",
        ),
        (lambda: bert(BertModel), {"data_label_column": "label"}, UsageError, "has no head"),
        (lambda: llama(vocab_size=30), {"data_label_column": "label"}, UsageError, "has no head"),
        (classifier, {"curvature": "labels"}, UsageError, "--curvature labels: the data has no labels"),
        (lambda: bert(BertForTokenClassification), {"curvature": "labels"}, UsageError, "no labels"),
        (lambda: bert(BertModel), {"curvature": "labels"}, UsageError, "no labels"),
        (lambda: classifier(**MULTI), {"data_label_column": "label"}, DataError, "is no list"),
        (lambda: classifier(labels=2), {"data_label_column": "label"}, DataError, "has 2 classes"),
    ],
)
def test_labels_that_a_head_cannot_use_never_turn_into_another_method(make, options, kind, message):
    with pytest.raises(kind, match=message):
        eckart.compress(make().eval(), TOKENIZER, data=texts([0, 1, 2]), data_column="text", keep=0.6, **options)


def test_a_model_of_two_sides_has_labels_where_targets_are_given():
    rows = [{"text": row["text"], "target": "the cat"} for row in texts([0])]
    options = {"data": rows, "keep": 0.6, "curvature": "labels", "data_column": "text"}
    with pytest.raises(UsageError, match="--data-target-column"):
        eckart.compress(t5(), target_tokenizer(), **options)
    assert (
        eckart.compress(t5(), target_tokenizer(), data_target_column="target", **options).report["curvature"]
        == "labels"
    )
    masked = build(BertForMaskedLM, bert_config()).eval()  # its labels are the text itself
    report = eckart.compress(masked, TOKENIZER, data=rows, data_column="text", keep=0.6, curvature="labels").report
    assert report["curvature"] == "labels"


def test_heads_of_several_labels_are_scored():
    from sklearn.metrics import f1_score, matthews_corrcoef

    model = classifier(**MULTI, **NAMES)
    rows = texts([["joy"], ["fear", "rage"], [], ["joy", "fear", "rage"]])
    task = load_task(rows, label2id=NAMES["label2id"], multi_label=True, outputs=3)
    found = score_classification(model, TOKENIZER, task)
    gold, guess = torch.tensor(task.labels).bool(), []
    with torch.no_grad():
        for row in rows:
            guess.append(model(**TOKENIZER([row["text"]], return_tensors="pt", padding=True)).logits[0] > 0)
    guess = torch.stack(guess)
    assert found["accuracy"] == float((guess == gold).all(1).float().mean())
    assert found["right"] == (guess == gold).all(1).tolist()
    assert found["f1"] == pytest.approx(f1_score(gold, guess, average="micro"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(gold.flatten(), guess.flatten()))
    scores = eckart.evaluate(model, tokenizer=TOKENIZER, data=rows, latency=False)
    assert scores["task"] == "classification"
    assert scores["scores"]["F1"]["model"] == pytest.approx(found["f1"])
    with pytest.raises(DataError, match="is no list"):
        eckart.evaluate(model, tokenizer=TOKENIZER, data=texts([0, 1]), latency=False)


def test_heads_of_several_scores_are_scored_and_measured():
    from scipy.stats import pearsonr

    model = classifier(labels=2, problem_type="regression")
    rows = [{**row, "label": [i * 0.5, -(i % 7)]} for i, row in enumerate(texts([0]))]
    found = eckart.evaluate(model, tokenizer=TOKENIZER, data=rows, latency=False)
    assert found["task"] == "regression"
    with torch.no_grad():
        logits = torch.cat([model(**TOKENIZER([r["text"]], return_tensors="pt", padding=True)).logits for r in rows])
    expected = [pearsonr(logits[:, i], [row["label"][i] for row in rows]).statistic for i in (0, 1)]
    assert found["scores"]["Pearson"]["model"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    with pytest.raises(DataError, match=r"1 scores a row, but .* gives 2"):
        score_regression(model, TOKENIZER, load_task(texts([0.5, 1.0]), regression=True))
    report = eckart.compress(model, TOKENIZER, data=rows, data_label_column="label", keep=0.6).report
    assert report["curvature"] == "labels"
    assert "embedding" in report["quality"]  # no softmax over scores
