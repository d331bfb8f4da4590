"""What a tuning teaches each head, with labels and without, and what it leaves as it was."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_data_models import WORDS, bert_config, build, llama_config, t5, target_tokenizer, word_tokenizer
from torch.nn import functional
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForSequenceClassification,
)

import eckart
from eckart.data.inference import forward
from eckart.errors import DataError, UsageError
from eckart.recovery import RecoveryContext, make_recovery

MULTI = "multi_label_classification"
TEXTS = [" ".join(WORDS[i % 20 : i % 20 + 2 + i % 5]) for i in range(40)]
QUICK = {"max_steps": 4, "batch_size": 8, "device": "cpu"}


def labeled(label):
    return [{"text": text, "label": label(text, place)} for place, text in enumerate(TEXTS)]


def saved(folder, kind, tokenizer=None, seed=0, **more):
    build(kind, bert_config(**more), seed).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


def has_dog(text, _):
    return int("dog" in text.split())


# -- several labels at once ---------------------------------------------------------------------------------------


def test_a_head_of_several_labels_stays_one(tmp_path):
    folder = saved(tmp_path / "m", BertForSequenceClassification, num_labels=2, problem_type=MULTI)
    rows = labeled(lambda text, i: [has_dog(text, i), int("red" in text)])
    result = eckart.tune(folder, data=rows, recovery="full", output_dir=tmp_path / "out", **{**QUICK, "max_steps": 30},
                         learning_rate=3e-3)  # fmt: skip
    assert result.report["kept"] == "after"
    assert eckart.load(tmp_path / "out").config.problem_type == MULTI
    loss = functional.binary_cross_entropy_with_logits
    model, data = result.model, word_tokenizer()(TEXTS, return_tensors="pt", padding=True)
    gold = torch.tensor([row["label"] for row in rows]).float()
    with torch.no_grad():
        assert loss(model(**data).logits, gold) < loss(eckart.load(folder)(**data).logits, gold)
    with pytest.raises(DataError, match="is no list"):
        eckart.tune(folder, data=labeled(has_dog), recovery="full", **QUICK)
    bare = saved(tmp_path / "bare", BertModel)
    made = eckart.tune(bare, data=rows, data_label_column="label", recovery="full", **QUICK).model.config
    assert (made.problem_type, made.num_labels) == (MULTI, 2)


def test_a_teacher_of_several_labels_is_learned_by_its_sigmoids(tmp_path):
    teacher = build(BertForSequenceClassification, bert_config(num_labels=3, problem_type=MULTI), 1)
    student = build(BertForSequenceClassification, bert_config(num_labels=3, problem_type=MULTI), 0)
    result = eckart.tune(student, word_tokenizer(), data=TEXTS, teacher=teacher, **{**QUICK, "max_steps": 12})
    assert result.report["task"] == "logits"
    assert (
        result.report["scores"]["after"]["KL to the teacher"] < result.report["scores"]["before"]["KL to the teacher"]
    )
    recovery = make_recovery("distil", {"hidden": "0"})

    recovery.prepare(student, RecoveryContext(teacher, "logits", SimpleNamespace(temperature=2.0), 1))
    mine, its = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (its / 2).sigmoid(), (mine / 2).sigmoid()
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = recovery.loss(SimpleNamespace(logits=mine), SimpleNamespace(logits=its), {}, torch.zeros(()))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    single = build(BertForSequenceClassification, bert_config(num_labels=3), 1)
    with pytest.raises(UsageError, match="its problem_type is single_label_classification"):
        eckart.tune(student, word_tokenizer(), data=TEXTS, teacher=single, **QUICK)


# -- classifiers on decoders --------------------------------------------------------------------------------------


def test_the_padding_token_0_is_a_token(tmp_path):
    model = build(LlamaForSequenceClassification, llama_config(pad_token_id=None, num_labels=2, vocab_size=30))
    model.save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    result = eckart.tune(tmp_path / "m", data=labeled(has_dog), recovery="full", **QUICK, learning_rate=1e-3)
    assert result.report["kept"] == "after"
    tuned = result.model
    assert tuned.config.pad_token_id == 0 == word_tokenizer().pad_token_id
    padded = word_tokenizer()(TEXTS[:8], return_tensors="pt", padding=True)
    del padded["token_type_ids"]
    with torch.no_grad():
        together = tuned(**padded).logits
        alone = [tuned(input_ids=row[mask.bool()][None]).logits for row, mask in zip(*padded.values(), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    nothing = word_tokenizer()
    nothing.pad_token = None
    assert (
        nothing.pad_token_id is nothing.eos_token_id is None
    )  # then none is published, and training goes all the same
    done = eckart.tune(model, nothing, data=labeled(has_dog), recovery="full", **QUICK, learning_rate=1e-3)
    assert done.model.config.pad_token_id is None


# -- predictions of a teacher, without labels ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForQuestionAnswering, BertForSequenceClassification])
def test_heads_are_taught_without_labels(kind, tmp_path):
    folder = saved(tmp_path / "m", kind)
    teacher = build(kind, bert_config(), 1)
    result = eckart.tune(folder, data=TEXTS, teacher=teacher, output_dir=tmp_path / "out",
                         **{**QUICK, "max_steps": 16})  # fmt: skip
    report = result.report
    assert report["task"] == "logits"
    scores = {when: row["KL to the teacher"] for when, row in report["scores"].items()}
    assert scores["after"] < scores["before"]
    assert set(scores) == {"before", "after"}
    assert type(eckart.load(tmp_path / "out")) is kind


def test_both_sides_of_a_model_are_taught():
    student, teacher = t5(0), t5(1)
    rows = [{"text": text, "target": " ".join(text.split()[::-1])} for text in TEXTS]
    for target in ("target", None):
        result = eckart.tune(student, target_tokenizer(), data=rows, data_column="text", data_target_column=target,
                             teacher=teacher, recovery=make_recovery("distil", {"embedding": "1"}),
                             **{**QUICK, "max_steps": 12})  # fmt: skip
        assert result.report["task"] == "logits"
        scores = {when: row["KL to the teacher"] for when, row in result.report["scores"].items()}
        assert scores["after"] < scores["before"]
        assert result.report["recovered_by"]["mean_terms"].keys() == {"logits", "hidden", "embedding"}


def test_padding_is_no_part_of_what_is_taught():
    recovery = make_recovery("distil", {"hidden": "0"})

    for kind in (BertForTokenClassification, BertForQuestionAnswering):
        models = [build(kind, bert_config(), seed).eval() for seed in (0, 1)]
        recovery.prepare(models[0], RecoveryContext(models[1], "logits", SimpleNamespace(temperature=1.0), 1))
        ids = torch.tensor([[5, 6, 7, 8]])
        padded = {"input_ids": functional.pad(ids, (0, 3)), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0]])}
        with torch.no_grad():
            found = [
                float(recovery.loss(*(forward(m, batch) for m in models), batch, torch.zeros(())))
                for batch in ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, padded)
            ]
        assert found[0] == pytest.approx(found[1], rel=1e-4)
        assert found[0] > 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (BertForTokenClassification, {"recovery": "full"}, "recovery full can train. Tuned are .*token classification"),
        (BertForQuestionAnswering, {"recovery": "lora", "data_label_column": "label"}, "Tuned are .*question"),
        (BertForMultipleChoice, {"teacher": True}, "BertForMultipleChoice has no output head.*Tuned are"),
        (BertForMultipleChoice, {"teacher": True, "task": "logits"}, "makes no predictions on text. Tuned are"),
        (BertModel, {"teacher": True, "task": "logits"}, "makes no predictions on text"),
        (BertForSequenceClassification, {"recovery": "full", "task": "logits"}, "no teacher .*--recovery distil"),
        (BertForTokenClassification, {"teacher": True, "recovery": "ilkd"}, "task=0"),
    ],
)
def test_heads_that_cannot_be_tuned_are_refused_with_those_that_can(kind, options, words, tmp_path):
    model = build(kind, bert_config())
    teacher = model if options.pop("teacher", None) else None
    with pytest.raises(UsageError, match=words):
        eckart.tune(model, word_tokenizer(), data=labeled(has_dog), teacher=teacher, **QUICK, **options)


# -- the model before ---------------------------------------------------------------------------------------------


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}, load_file(folder / "model.safetensors")  # noqa: SIM118


@pytest.mark.parametrize("loaded", [False, True])
def test_the_model_before_is_kept_bit_for_bit(tmp_path, monkeypatch, loaded):
    folder = tmp_path / "m"
    monkeypatch.setattr("eckart.recovery.result.is_better", lambda *_: False)
    model = build(LlamaForSequenceClassification, llama_config(pad_token_id=None, num_labels=2, vocab_size=30))
    model.bfloat16().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    stored = load_file(file)
    wide = [name for name in stored if "norm" in name or "score" in name]
    save_file(stored | {name: torch.randn(stored[name].shape) for name in wide}, file, {"format": "pt"})
    before = eckart.load(folder, dtype=torch.float32) if loaded else folder
    result = eckart.tune(before, word_tokenizer(), data=labeled(has_dog), recovery="full", output_dir=tmp_path / "out",
                         **QUICK)  # fmt: skip
    assert result.report["kept"] == "before"
    if not loaded:
        assert tensors(tmp_path / "out")[0] == tensors(folder)[0]
    for name, value in tensors(tmp_path / "out")[1].items():
        assert torch.equal(value.double(), tensors(folder)[1][name].double()), name
    old, new = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert new | {"dtype": old["dtype"]} == old
    card = (tmp_path / "out" / "README.md").read_text()
    assert "this is the model before" in card
    cells = [cell.strip() for line in card.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert "before" in cells
    assert "after" not in cells
