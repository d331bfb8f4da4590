"""The card of a model speaks of its task, and what it says of origin and scores stays when the folder is exported."""

import json

import pytest
import torch
from architectures import BY_NAME
from huggingface_hub import ModelCard
from tiny import DEMO, llama, place
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, BertForSequenceClassification

import eckart
from eckart.data import CalibrationData
from eckart.data.batch import Batch
from eckart.evaluation.agreement import compare_predictions
from eckart.exports.card import BEFORE, keep_of_card, read_measured
from eckart.exports.pipeline import export
from eckart.report.card import name_original
from eckart.report.compression import render_compression
from eckart.report.words import to_plain_text

SMALL = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip
CARD = "---\nlicense: mit\nlanguage: en\nbase_model: org/original\npipeline_tag: text-classification\n---\n# it\n"


def classifier(**more) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3, **more))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A classifier that was compressed, of a folder with a card."""
    folder = tmp_path_factory.mktemp("card")
    model = classifier()
    model.save_pretrained(folder / "original")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder / "original")
    (folder / "original/README.md").write_text(CARD)
    texts = [f"{'good' if i % 2 else 'bad'} text number {i}" for i in range(64)]
    return eckart.compress(folder / "original", data=texts, keep=0.5, method="drone", latency=True, num_samples=32,
                           max_seq_length=16, output_dir=folder / "small")  # fmt: skip


def test_the_card_of_a_classifier_speaks_of_examples(published):
    card = (published.folder / "README.md").read_text()
    assert "| KL to the original per example (nats, held-out data) |" in card
    assert "| same answer as the original |" in card
    assert "token (nats" not in card
    assert "likely token" not in card
    assert "milliseconds of one forward pass" in card
    shown = to_plain_text(render_compression(published.report), 200)
    assert "nats per example, same answer " in shown
    assert "nats a token" not in shown


@pytest.mark.parametrize(
    ("make", "unit"),
    [
        (lambda: BY_NAME["bert-mlm"].model(), "token"),
        (classifier, "example"),
        (lambda: classifier(problem_type="multi_label_classification"), "label"),
        (lambda: BertForQuestionAnswering(BertConfig(**SMALL)), "end of a span"),
    ],
    ids=["token", "example", "label", "span"],
)
def test_what_a_distribution_belongs_to(make, unit):
    model = make()
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    found = compare_predictions(model, model, CalibrationData([Batch({"input_ids": ids}, (0, 1))]), disable=True)
    assert found["unit"] == unit


def test_an_export_keeps_origin_scores_and_latency(published, tmp_path):
    out = export(published.folder, tmp_path / "dense")
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == ("mit", "en", "text-classification")
    before = ModelCard.load(published.folder / "README.md")
    values = [[entry.metric_value for entry in one.data.eval_results] for one in (before, card)]
    assert values[0] == values[1] != []
    assert f"| measured | {BEFORE} | original |" in card.text
    assert "| KL to the original per example (nats, held-out data) |" in card.text
    assert "| milliseconds of one forward pass" in card.text
    assert "| bytes |" not in card.text  # they are those of the export now
    assert "It is an ordinary checkpoint, and loads without eckart." in card.text
    assert "pip install eckart" not in card.text
    assert "original, made smaller with eckart" in card.text
    assert str(published.folder.parent) not in str(card)


def test_rounding_changes_results_on_the_hub_but_not_those_of_before(published):
    exact, rounded = (keep_of_card(published.folder, exact=exact) for exact in (True, False))
    assert exact.pop("results")
    assert exact == rounded
    assert exact["license"] == "mit"


def test_the_base_model_of_a_card_comes_first(published, tmp_path):
    assert keep_of_card(published.folder, exact=False)["base_model"] == str(published.folder.parent / "original")
    (tmp_path / "README.md").write_text(CARD)
    assert keep_of_card(tmp_path, exact=False) == {
        "license": "mit", "language": "en", "pipeline_tag": "text-classification", "measured": {},
        "base_model": "org/original",
    }  # fmt: skip
    assert name_original("org/original") == "org/original"
    assert name_original("/home/someone/model") == "model"
    assert name_original(None) is None


def test_a_tuned_folder_is_measured_by_its_scores(tmp_path):
    (tmp_path / "eckart").mkdir()
    report = {"kind": "tune", "kept": "after", "scores": {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.75}}}
    (tmp_path / "eckart/report.json").write_text(json.dumps(report))
    assert read_measured(tmp_path) == {"accuracy": {"before": 0.5, BEFORE: 0.75}}
    (tmp_path / "eckart/report.json").write_text(json.dumps({"sizes": 3}))
    assert read_measured(tmp_path) == {}
    assert keep_of_card(tmp_path / "nothing", exact=True)["measured"] == {}


def test_a_folder_without_factors_keeps_its_card_when_it_is_rounded(tmp_path):
    pytest.importorskip("torchao")
    folder = place(llama(num_hidden_layers=1), tmp_path / "plain")
    (folder / "README.md").write_text(CARD)
    out = export(folder, tmp_path / "int8", quantize="int8")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "org/original"
    assert card.data.license == "mit"
