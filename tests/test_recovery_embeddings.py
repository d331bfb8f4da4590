"""Sentence encoders taught their original's embeddings: the loss, the score, pooling, what is published, refusals."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from architectures import scaled
from tiny import DEMO
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
)
from typer.testing import CliRunner

import eckart
from eckart.cli.app import app
from eckart.data import Pooling
from eckart.data.stdlib import documents
from eckart.errors import DataError, UsageError
from eckart.recovery import RecoveryContext, make_recovery

QUICK = {"batch_size": 8, "max_seq_length": 24, "num_samples": 60}
POOLED = {"cls": ("cls", False), "mean": ("mean", True)}


def as_sentence_encoder(folder, mode: str, normalize: bool) -> None:
    """The files of sentence-transformers beside a model."""
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    for path, _ in parts[1:]:
        (folder / path).mkdir()
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": mode == "cls",
                    "pooling_mode_mean_tokens": mode == "mean"})
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Bare encoders, as sentence-transformers keeps them and without its files, the same factored, texts."""
    folder = tmp_path_factory.mktemp("embedding")
    reader = AutoTokenizer.from_pretrained(DEMO)
    if reader.pad_token_id is None:
        reader.pad_token = reader.eos_token
    torch.manual_seed(0)
    config = {"vocab_size": 8256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
    encoder = scaled(BertModel(BertConfig(**config)))
    masked = BertForMaskedLM(BertConfig(**config))
    masked.bert.load_state_dict(encoder.state_dict(), strict=False)
    causal = scaled(LlamaModel(LlamaConfig(**config)))
    for name, model in {"cls": encoder, "mean": encoder, "plain": encoder, "masked": masked, "causal": causal}.items():
        model.save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
        if name in POOLED:
            as_sentence_encoder(folder / name, *POOLED[name])
        if name != "masked":
            result = eckart.compress(model, reader, method="svd", keep=0.3, source_folder=folder / name)
            result.save_pretrained(folder / f"{name}-30")
    two = T5Model(T5Config(vocab_size=8256, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                           decoder_start_token_id=0))  # fmt: skip
    two.save_pretrained(folder / "two")
    reader.save_pretrained(folder / "two")
    lines = [line.strip() for _, text in documents("train") for line in text.splitlines()[:200] if len(line) > 30]
    (folder / "texts.txt").write_text("\n".join(lines[:160]))
    return folder


def tuned(place, name="cls", **options):
    given = {"data": place / "texts.txt", "teacher": place / name, **QUICK, **options}
    return eckart.tune(place / f"{name}-30", **given)


def distances(model, teacher, reader, texts, pooling) -> list[float]:
    found = []
    for text in texts:
        batch = reader(text, return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            one, other = (pooling(m(**batch), batch["attention_mask"]) for m in (model, teacher))
        found.append(1 - float(torch.nn.functional.cosine_similarity(one, other)))
    return found


def test_embeddings_come_nearer_by_a_refit(place):
    report = tuned(place, "plain", recovery="refit").report
    assert report["kept"] == "after"
    assert not any("made it worse" in note for note in report["notes"])
    before, after = (report["scores"][when]["1 - cosine"] for when in ("before", "after"))
    assert after < 0.9 * before


def test_an_embedding_model_saved_with_a_language_head_is_taught_embeddings(place, tmp_path):
    source = shutil.copytree(place / "masked", tmp_path / "headed")
    as_sentence_encoder(source, "mean", True)
    small = eckart.compress(source, method="svd", keep=0.3, output_dir=tmp_path / "small").folder
    given = {"data": place / "texts.txt", "teacher": source, "max_steps": 2, "recovery": "distil", **QUICK}
    result = eckart.tune(small, **given, learning_rate=0.003, output_dir=tmp_path / "tuned")
    assert "1 - cosine" in result.report["scores"]["after"]
    assert result.report["kept"] == "after"
    assert type(result.model) is BertModel
    assert any("without the language head" in note for note in result.report["notes"])
    with pytest.raises(UsageError, match="has an output head"):  # no folder says that it embeds
        eckart.tune(place / "masked", **given, task="embedding")
    with pytest.raises(DataError, match="no mask token"):  # another task is taught where it is named
        eckart.tune(small, **given, task="masked")


def test_the_published_folder_is_a_sentence_encoder(place, tmp_path):
    from sentence_transformers import SentenceTransformer

    words = ["tune", place / "mean-30", "--recovery", "noach-goldberg", "--teacher", place / "mean", "--data",
             place / "texts.txt", "--batch-size", 8, "--max-steps", 24, "--learning-rate", 0.003, "--output-dir",
             tmp_path / "out"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/eckart/report.json").read_text())
    assert report["task"] == "embedding"
    assert report["kept"] == "after"
    before, after = (report["scores"][when]["1 - cosine"] for when in ("before", "after"))
    assert after < 0.9 * before
    assert "teacher" not in report["scores"]
    assert "pooled by mean" in done.output
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_text() == (place / "mean" / name).read_text()
    texts = ["a list of names", "return the first one that is there"]
    vectors = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts, convert_to_tensor=True)
    model, reader = eckart.load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = reader(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        pooled = Pooling(("mean",), normalize=True)(model(**batch), batch["attention_mask"])
    torch.testing.assert_close(vectors.cpu(), pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "mode"), [("cls", "cls"), ("plain", "mean")])
def test_the_score_is_the_distance_of_embeddings_pooled_as_the_folder_says(place, tmp_path, name, mode):
    texts = (place / "texts.txt").read_text().splitlines()[:12]
    (tmp_path / "held.txt").write_text("\n".join(texts))
    result = tuned(place, name, eval_data=tmp_path / "held.txt", max_steps=1, learning_rate=1e-9)
    model, teacher = eckart.load(place / f"{name}-30"), eckart.load(place / name)
    reader = AutoTokenizer.from_pretrained(place / name)
    wanted = distances(model, teacher, reader, texts, Pooling((mode,)))
    scores = result.report["scores"]["before"]
    assert scores["1 - cosine"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert scores["worst 1 - cosine"] == pytest.approx(max(wanted), rel=1e-4)
    assert result.report["data"]["pooling"] == [mode]
    other = distances(model, teacher, reader, texts, Pooling(("cls" if mode == "mean" else "mean",)))
    assert abs(sum(other) - sum(wanted)) > 1e-2


def test_a_student_without_pooling_is_pooled_as_its_teacher_is(place):
    result = tuned(place, "plain", teacher=place / "cls", max_steps=1)
    assert result.report["data"]["pooling"] == ["cls"]


def test_the_loss_is_one_minus_cosine_and_hidden_states():
    recovery = make_recovery("distil", {"sentence": "3", "hidden": "0.5"})
    recovery.context = RecoveryContext(None, "embedding", None, 1, pooling=Pooling())
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    mine, theirs = torch.randn(2, 2, 3, 4)
    outputs, wanted = (SimpleNamespace(last_hidden_state=h, hidden_states=(h, h)) for h in (mine, theirs))
    pooled = [torch.stack([h[0, :2].mean(0), h[1].mean(0)]) for h in (mine, theirs)]
    cosine = torch.nn.functional.cosine_similarity(*pooled)
    error = (mine - theirs).square().mean(-1)[mask.bool()].mean()
    found = recovery.loss(outputs, wanted, {"attention_mask": mask}, torch.zeros(()))
    torch.testing.assert_close(found, 3 * (1 - cosine).mean() + 0.5 * error)
    assert float(recovery.loss(outputs, outputs, {"attention_mask": mask}, torch.zeros(()))) == pytest.approx(
        0, abs=1e-6
    )


def test_weights_of_another_task_leave_nothing(place):
    with pytest.raises(UsageError, match=r"nothing to minimize.*sentence=1"):
        tuned(place, recovery_option=("sentence=0", "hidden=0"), max_steps=1)
    recovery = make_recovery("distil", {"logits": "0", "hidden": "0"})
    with pytest.raises(UsageError, match=r"nothing to minimize.*logits=1"):
        recovery.prepare(BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=9)),
                     RecoveryContext(SimpleNamespace(), "causal", SimpleNamespace(temperature=1), 1))  # fmt: skip


def test_a_teacher_with_a_head_teaches_with_its_body(place):
    one, other = (tuned(place, "plain", teacher=place / name, max_steps=2) for name in ("masked", "plain"))
    assert one.report["scores"] == other.report["scores"]
    refitted = tuned(place, "plain", teacher=place / "masked", recovery="refit")
    assert refitted.report["recovered_by"]["refitted"] == 12


def test_a_causal_body_reads_separate_texts(place):
    result = tuned(place, "causal", max_steps=16, learning_rate=3e-3)
    assert result.report["task"] == "embedding"
    assert result.report["data"]["kind"] == "encoder"
    scores = result.report["scores"]
    assert scores["after"]["1 - cosine"] < scores["before"]["1 - cosine"]


def test_features_alone_can_be_learnt(place):
    result = tuned(place, recovery="ilkd", recovery_option="task=0", max_steps=4)
    assert set(result.report["recovered_by"]["mean_terms"]) == {"hidden", "attention", "embedding"}


@pytest.mark.parametrize(("options", "words"), [
    ({"recovery": "full"}, "recovery full, task embedding: it learns from.*--recovery distil or refit"),
    ({"recovery": "lora"}, "recovery lora, task embedding.*--data-label-column COLUMN"),
    ({"recovery": "losparse", "model": "cls"}, "recovery losparse, task embedding"),
    ({"recovery": "losparse-distil", "model": "cls"}, "recovery losparse-distil, task embedding"),
    ({"recovery": "dsee", "model": "cls"}, "recovery dsee, task embedding"),
    ({"recovery": "ilkd"}, "has the weight 1.*--recovery-option task=0"),
    ({"recovery": "distil", "recovery_option": "task=0.5"}, "has the weight 0.5"),
    ({"teacher": None}, "--teacher MODEL"),
    ({"task": "embedding", "model": "masked"}, "BertForMaskedLM has an output head.*Leave --task out"),
    ({"task": "embedding", "model": "two", "teacher": "two"}, "T5Model reads two texts.*Give its encoder"),
    ({"model": "two", "teacher": "two"}, "T5Model has no output head.*encoders of sentence embeddings"),
    ({"task": "embedding", "recovery": "refit", "model": "cls"}, "no factored weight"),
])  # fmt: skip
def test_refusals_name_the_way_out(place, options, words):
    given = {"model": "cls-30", "teacher": "cls", **options}
    model, teacher = (place / path if path else None for path in (given.pop("model"), given.pop("teacher")))
    with pytest.raises(UsageError, match=words):
        eckart.tune(model, data=place / "texts.txt", teacher=teacher, **QUICK, **given)
