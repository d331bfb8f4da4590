"""Models of every head are measured by what they put out; one whose output says nothing is published all the same."""

from __future__ import annotations

import pytest
import torch
from test_data_first_pass import TEXTS, clip
from test_data_models import bert_config, build, word_tokenizer
from torch.nn import functional
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers.utils import ModelOutput

import eckart
from eckart.data import load_data
from eckart.errors import UsageError
from eckart.evaluation.agreement import compare_predictions
from eckart.evaluation.outputs import compare_outputs
from eckart.evaluation.quality import distance_to_original, measure_quality


def loaded(model, size=4):
    return load_data(TEXTS, tokenizer=word_tokenizer(), model=model, batch_size=size, num_samples=24)


def two(kind, **more):
    return [build(kind, bert_config(**more), seed).eval() for seed in (0, 1)]


def both(models, batch):
    with torch.no_grad():
        return [model(**batch.inputs) for model in models]


def test_labels_that_hold_together_are_compared_one_by_one():
    models = two(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    data = loaded(models[0])
    kl, same, count = 0.0, 0, 0
    for batch in data:
        q, p = (output.logits.double().sigmoid() for output in both(models, batch))
        kl += float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum())
        same += int(((p > 0.5) == (q > 0.5)).sum())
        count += p.numel()
    found = compare_predictions(*models, data)
    assert found["kl"] == pytest.approx(kl / count, rel=1e-5)
    assert found["top1"] == pytest.approx(same / count)
    assert found["tokens"] == count == 72
    assert "agreement" in measure_quality(*models, data, None)
    one = two(BertForSequenceClassification, num_labels=1, problem_type="multi_label_classification")
    assert measure_quality(*one, data, None)["agreement"]["tokens"] == 24
    scores = two(BertForSequenceClassification, num_labels=3, problem_type="regression")
    assert "embedding" in measure_quality(*scores, data, None)  # a softmax over scores says nothing


def test_spans_are_compared_among_real_tokens():
    models = two(BertForQuestionAnswering)
    results = [compare_predictions(*models, loaded(models[0], size)) for size in (1, 24)]
    assert results[0]["kl"] == pytest.approx(results[1]["kl"], rel=1e-4)  # whatever the padding
    kl = 0.0
    for batch in loaded(models[0], 1):
        q, p = both(models, batch)
        for name in ("start_logits", "end_logits"):
            kl += float(functional.kl_div(q[name].log_softmax(-1), p[name].softmax(-1), reduction="sum"))
    assert results[0]["kl"] == pytest.approx(kl / 48, rel=1e-4)
    assert results[0]["tokens"] == 48


def images(count=24):
    torch.manual_seed(0)
    ids, pixels = torch.randint(3, 97, (count, 9)), torch.randn(count, 3, 16, 16)
    return [{"input_ids": ids[i : i + 2], "pixel_values": pixels[i : i + 2]} for i in range(0, count, 2)]


def test_two_towers_are_measured_by_their_own_outputs():
    model = clip()
    result = eckart.compress(model, data=images(), keep=0.6)
    measured = result.report["quality"]["embedding"]
    assert set(measured["outputs"]) >= {"image_embeds", "text_embeds"}
    assert 0 < measured["cosine_distance"] < 1
    data = load_data(images(), model=model)
    expected = torch.cat([1 - functional.cosine_similarity(a.image_embeds, b.image_embeds)
                          for batch in data for a, b in [both([model, result.model], batch)]])  # fmt: skip
    assert compare_outputs(result.model, model, data)["worst"] >= float(expected.max()) - 1e-6
    assert distance_to_original(measure_quality(model, model, data, None)) == pytest.approx(0, abs=1e-6)
    found = eckart.evaluate(result.model, model, word_tokenizer(), task="embedding", data=images(), latency=False)
    assert found["scores"]["1 - cosine to the original"]["eckart"] > 0


def test_maps_are_measured_too():
    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], hidden_sizes=[16], num_attention_heads=[2], sr_ratios=[1], patch_sizes=[3],
        strides=[2], mlp_ratios=[2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    model = build(SegformerForSemanticSegmentation, config).eval()
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(12)]
    report = eckart.compress(model, data=batches, keep=0.8, method="drone").report
    assert report["quality"]["embedding"]["outputs"] == ["logits"]


class Flags(BertModel):
    """Puts out nothing that could be compared."""

    def forward(self, input_ids=None, attention_mask=None):
        hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return ModelOutput(flags=hidden[:, 0] > 0)


@pytest.mark.parametrize("refit", [False, None, True])
def test_what_cannot_be_compared_is_not_thrown_away(refit):
    model, torch_seed = build(Flags, bert_config()).eval(), torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(4, 20, (2, 6), generator=torch_seed)} for _ in range(12)]
    result = eckart.compress(model, data=batches, keep=0.6, method="drone", refit=refit)
    assert result.report["quality"] is None
    assert any("the quality was not measured" in note for note in result.report["notes"])
    assert result.report["kept"]["of_sites"] <= 0.6
    if refit is None:
        with pytest.raises(UsageError, match=r"--max-loss.*--keep"):
            eckart.compress(model, data=batches, max_loss="5%", method="drone")
