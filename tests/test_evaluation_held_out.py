"""Scores of held-out batches: perplexity of next tokens, accuracy of classes."""

import math

import pytest
import torch
from architectures import BY_NAME

from eckart.data import CalibrationData
from eckart.data.batch import Batch
from eckart.evaluation.quality import score_classes, score_next_tokens


def held_of(name: str, **more) -> CalibrationData:
    found = [dict(inputs) for inputs in BY_NAME[name].batches(count=2)]
    batches = []
    for number, inputs in enumerate(found):
        rows = len(inputs["input_ids"])
        batches.append(Batch(inputs | more, tuple(range(rows * number, rows * (number + 1)))))
    return CalibrationData(batches)


def test_perplexity_is_that_of_the_real_next_tokens():
    model, held = BY_NAME["llama"].model().eval(), held_of("llama")
    total, count = 0.0, 0
    for batch in held:
        with torch.no_grad():
            chances = model(**batch.inputs).logits.double().log_softmax(-1)
        mask = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
        for row in range(len(batch)):
            for place in range(1, mask.shape[1]):
                if mask[row, place]:
                    total -= float(chances[row, place - 1, batch.inputs["input_ids"][row, place]])
                    count += 1
    assert score_next_tokens(model, held) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_accuracy_counts_the_rows_whose_class_is_the_most_likely():
    model, held = BY_NAME["bert-classes"].model().eval(), held_of("bert-classes")
    right = []
    for batch in held:
        with torch.no_grad():
            right.append(model(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits.argmax(-1))
    for batch, classes in zip(held, right, strict=True):
        batch.inputs["labels"] = classes.clone()
    assert score_classes(model, held) == 1
    held.batches[0].inputs["labels"][0] = (right[0][0] + 1) % 3
    assert score_classes(model, held) == 1 - 1 / held.num_examples
