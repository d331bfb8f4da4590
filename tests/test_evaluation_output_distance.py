"""The distance of outputs is the KL of predictions, or 1 - cosine of embeddings."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME

from eckart.data import Batch, CalibrationData
from eckart.evaluation.agreement import compare_predictions
from eckart.evaluation.output_distance import OutputDistance
from eckart.evaluation.quality import distance_to_original, measure_quality


def both(name):
    model, other = BY_NAME[name].model(), BY_NAME[name].model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    inputs = BY_NAME[name].batches(count=1)[0]
    return model, other, Batch(inputs, tuple(range(len(next(iter(inputs.values()))))))


@pytest.mark.parametrize("name", ["llama", "bert-mlm", "bert-classes", "bert", "bert-regression", "vit"])
def test_it_is_what_models_are_compared_by(name):
    model, other, batch = both(name)
    distance = OutputDistance.of(model, batch, None)
    with torch.no_grad():
        parts = distance.rows(model, distance.run(model, batch), batch)
        reference = distance.reference(parts)
        others = distance.rows(other, distance.run(other, batch), batch)
    assert float(distance.between(parts, reference).abs().max()) < 1e-5
    found = distance.between(others, reference).double()
    expected = distance_to_original(measure_quality(other, model, CalibrationData([batch], {}), None))
    assert float(found.mean()) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert float(found.mean()) > 1e-6


def test_several_labels_are_distributions_of_their_own():
    model, other, batch = both("bert-classes")
    model.config.problem_type = other.config.problem_type = "multi_label_classification"
    distance = OutputDistance.of(model, batch, None)
    assert distance.kind == "labels"
    with torch.no_grad():
        reference = distance.reference(distance.rows(model, distance.run(model, batch), batch))
        found = distance.between(distance.rows(other, distance.run(other, batch), batch), reference).mean()
    assert float(found) == pytest.approx(compare_predictions(other, model, [batch])["kl"], rel=1e-6)


def test_a_class_that_the_original_rules_out_costs_nothing():
    distance = OutputDistance("classes")
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 0.0, 1.0]])
    reference = distance.reference([logits])
    torch.testing.assert_close(distance.between([logits], reference), torch.zeros(2), atol=1e-6, rtol=0)
    other = torch.tensor([[0.5, 0.5, -torch.inf], [2.0, 0.0, 1.0]])
    p = torch.tensor([0.0, 1.0]).softmax(-1)
    expected = (p * (p.log() - torch.tensor(0.5).log())).sum()
    torch.testing.assert_close(distance.between([other], reference)[0], expected, rtol=1e-5, atol=0)


def test_many_rows_are_taken_in_pieces():
    stream = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 300, 7, generator=stream)
    distance = OutputDistance("classes")
    found = distance.between([other], distance.reference([logits]))
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
