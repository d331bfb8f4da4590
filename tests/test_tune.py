"""Recovery by training: the rooms, going on, heads, publishing, refusals."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import scaled
from tiny import DEMO, llama, text
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel
from typer.testing import CliRunner

import eckart
from eckart.checkpoint.description import described
from eckart.cli.app import app
from eckart.errors import CheckpointError, DataError, UsageError
from eckart.model import factored_modules
from eckart.recovery import RECOVERIES, RecoveryContext, make_recovery
from eckart.recovery.pipeline import tune_checkpoint
from eckart.recovery.recipe import make_tune_recipe
from eckart.recovery.training import better

QUICK = {"max_steps": 6, "batch_size": 4, "max_seq_length": 16, "learning_rate": 3e-3, "num_samples": 40,
         "eval_samples": 8}  # fmt: skip


def tokenizer():
    found = AutoTokenizer.from_pretrained(DEMO)
    found.add_special_tokens({"mask_token": "<mask>"})
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def bert_config(**more):
    return BertConfig(
        vocab_size=8256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense causal model, the same factored in both forms, encoders, text and labeled rows."""
    folder = tmp_path_factory.mktemp("tune")
    reader = tokenizer()
    text(folder)
    dense = llama(num_hidden_layers=2, tie_word_embeddings=True)
    dense.to(torch.float32).save_pretrained(folder / "dense")
    reader.save_pretrained(folder / "dense")
    for form in ("lowrank", "pivoted"):
        result = eckart.compress(dense, reader, method="svd", keep=0.5, form=form)
        result.save_pretrained(folder / form)
    torch.manual_seed(0)
    for name, kind in (("bert", BertModel), ("bert-mlm", BertForMaskedLM)):
        model = scaled(kind(bert_config()))
        result = eckart.compress(model, reader, method="svd", keep=0.5)
        result.save_pretrained(folder / name)
    words = ["yes good fine", "no bad poor"]
    rows = [f"{words[i % 2]} {i}\t{words[(i // 2) % 2]}\t{i % 2}\t{(i % 2) * 2.5}" for i in range(40)]
    (folder / "rows.tsv").write_text("text\tother\tlabel\tscore\n" + "\n".join(rows) + "\n")
    return folder


def tuned(place, name, **options):
    options = {"data": place / "text.txt", **QUICK, **options}
    return eckart.tune(place / name, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20).view(2, 10)).logits


@pytest.mark.parametrize("recovery", ["full", "distil", "noach-goldberg", "ilkd", "lora"])
@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
def test_loss_falls_and_forms_stay(place, recovery, form):
    result = tuned(place, form, recovery=recovery, teacher=place / "dense", max_steps=16, learning_rate=1e-2)
    training = result.report["training"]
    falls = recovery != "noach-goldberg"  # its two stages have losses of their own
    assert not falls or training["last_loss"] < training["first_loss"]
    before = eckart.load(place / form)
    assert {n: m.spec() for n, m in factored_modules(result.model).items()} == {
        n: m.spec() for n, m in factored_modules(before).items()
    }
    assert sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in before.parameters())
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert result.model.config._attn_implementation == before.config._attn_implementation


def test_the_teacher_itself_has_nothing_to_learn(place):
    model = eckart.load(place / "dense")
    for recovery in ("distil", "ilkd"):
        recovery = make_recovery(recovery, {"attention": "1", "task": "0"})
        model.set_attn_implementation("eager")
        recovery.prepare(model, RecoveryContext(model, "causal", SimpleNamespace(temperature=2.0), 1))
        batch = {"input_ids": torch.arange(20).view(2, 10), "attention_mask": torch.ones(2, 10).long()}
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        assert abs(float(recovery.loss(outputs, outputs, batch, outputs.logits.sum()))) < 1e-7
        other = llama(num_hidden_layers=4)
        other.set_attn_implementation("eager")
        theirs = other(**batch, output_hidden_states=True, output_attentions=True)
        assert float(recovery.loss(outputs, theirs, batch, outputs.logits.sum())) > 1e-2


def test_padding_is_left_out_and_layers_are_mapped():
    recovery = make_recovery("distil", {"logits": "0"})
    deep = [torch.full((1, 3, 4), float(i)) for i in range(5)]
    shallow = [deep[0], deep[2].clone(), deep[4].clone()]
    for layer in shallow:
        layer[:, 2] = 99.0
    outputs, theirs = SimpleNamespace(hidden_states=shallow), SimpleNamespace(hidden_states=deep)
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert float(recovery.loss(outputs, theirs, batch, torch.zeros(()))) == 0
    assert float(recovery.loss(outputs, theirs, {}, torch.zeros(()))) > 0


def test_divergence_is_of_the_softened_teacher_from_the_student():
    recovery = make_recovery("distil", {"hidden": "0", "temperature": "2"})
    mine, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    recovery.context, recovery._temperature = SimpleNamespace(task="causal"), 2.0
    p, q = (theirs.double() / 2).softmax(-1), (mine.double() / 2).softmax(-1)
    wanted = 4 * (p * (p / q).log()).sum(-1).mean()
    found = recovery.loss(SimpleNamespace(logits=mine), SimpleNamespace(logits=theirs), {}, torch.zeros(()))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["lowrank", "pivoted", "dense"])
def test_adapters_merge_exactly(place, form):
    model = eckart.load(place / form)
    names = [name for name, _ in model.named_modules()]
    first, size = logits(model), sum(p.numel() for p in model.parameters())
    recovery = make_recovery("lora", {"rank": "3"})
    recovery.prepare(model, RecoveryContext(None, "causal", None, 1))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    apart = logits(model)
    merged = recovery.finish(model)
    torch.testing.assert_close(logits(merged), apart, rtol=1e-4, atol=1e-5)
    assert (apart - first).abs().max() > 1e-2
    assert [name for name, _ in merged.named_modules()] == names
    assert sum(p.numel() for p in merged.parameters()) == size


@pytest.mark.parametrize(("name", "options"), [
    ("pivoted", {"recovery": "distil", "teacher": "dense"}),
    ("lowrank", {"recovery": "lora", "recovery_option": ("dropout=0.2",)}),
    ("bert-mlm", {"recovery": "full"}),
    ("dense", {"recovery": "losparse", "recovery_option": ("keep=0.5", "every=1", "final=0.1")}),
    ("dense", {"recovery": "dsee", "recovery_option": (
        "prune=structured", "score=gates", "heads=0.5", "prune_at=0.3", "rank=2", "rounds=2")}),
])  # fmt: skip
def test_going_on_gives_the_same_model(place, tmp_path, name, options):
    if "teacher" in options:
        options = {**options, "teacher": str(place / options["teacher"])}
    # three steps make an epoch's end lie on either side of where it is broken off
    asked = {"model": str(place / name), "data": str(place / "text.txt"), **QUICK, "num_samples": 14, **options}
    recipe = make_tune_recipe({**asked, "save_steps": 2})
    whole, _ = tune_checkpoint(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tune_checkpoint(recipe, tmp_path / "broken", stop_after=5)
    left = tmp_path / "broken.partial"
    kinds = {path.suffix for path in left.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    told = []
    resumed, _ = tune_checkpoint(recipe, tmp_path / "broken", tell=told.append)
    assert resumed.report["training"]["resumed_from"] == 4
    assert "step 4" in told[0]
    assert not left.exists()
    for (key, mine), (_, theirs) in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), key
    assert whole.report["training"]["last_loss"] == resumed.report["training"]["last_loss"]


def test_a_bare_factored_encoder_gets_a_head_and_reloads_elsewhere(place, tmp_path):
    output = tmp_path / "classifier"
    words = ["tune", place / "bert", "--recovery", "full", "--data", place / "rows.tsv", "--data-column", "text",
             "--data-pair-column", "other", "--data-label-column", "label", "--epochs", 12, "--batch-size", 8,
             "--learning-rate", 0.01, "--output-dir", output]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    report = json.loads((output / "eckart" / "report.json").read_text())
    assert report["new_head"] == ["classifier.bias", "classifier.weight"]
    assert report["scores"]["after"]["accuracy"] == 1.0
    assert report["kept"] == "after"
    model = eckart.load(output)
    assert factored_modules(model)
    found = model(input_ids=torch.arange(20).view(2, 10)).logits.tolist()
    program = (
        "import sys, json, torch, eckart; from transformers import AutoModelForSequenceClassification as A;"
        "m = A.from_pretrained(sys.argv[1]);"
        "print(json.dumps(m(input_ids=torch.arange(20).view(2, 10)).logits.tolist()))"
    )
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", program, output], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert json.loads(said.stdout.splitlines()[-1]) == found


def test_scores_make_a_regression_head(place):
    result = eckart.tune(place / "bert", data=place / "rows.tsv", data_column="text", data_label_column="score",
                         recovery="full", **QUICK)  # fmt: skip
    assert result.report["task"] == "regression"
    assert result.model.config.num_labels == 1


def test_a_worse_model_is_not_published(place):
    before = eckart.load(place / "lowrank")
    result = eckart.tune(before, tokenizer(), data=place / "text.txt", recovery="full",
                         **{**QUICK, "learning_rate": 2.0})  # fmt: skip
    assert result.report["kept"] == "before"
    assert any("made it worse" in note for note in result.report["notes"])
    assert torch.equal(logits(result.model), logits(before))


@pytest.mark.parametrize(("recovery", "options", "smaller"), [
    ("losparse", ("keep=0.4",), True), ("dsee", ("prune=unstructured",), False),
    ("dsee", ("prune=structured", "heads=0.5"), True),
])  # fmt: skip
def test_a_smaller_model_is_published_whatever_it_scores(place, recovery, options, smaller, tmp_path):
    result = tuned(place, "dense", recovery=recovery, recovery_option=options, learning_rate=2.0)
    assert result.report["kept"] == "after"
    assert any("smaller model that was asked for" in note for note in result.report["notes"])
    dense = eckart.load(place / "dense")
    size = sum(p.numel() for p in result.model.parameters())
    assert (size < sum(p.numel() for p in dense.parameters())) == smaller
    pruned = result.model.model.layers[0].mlp.up_proj
    assert smaller or bool((pruned.weight == 0).float().mean() > 0.2)
    result.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(eckart.load(tmp_path / "out")), logits(result.model))
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("import eckart" in card) == bool(described(result.model)) == ("loads without eckart" not in card)


def test_the_model_passed_in_and_the_random_state_stay(place):
    model = eckart.load(place / "lowrank")
    first = logits(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    result = eckart.tune(model, tokenizer(), data=place / "text.txt", recovery="lora", **QUICK)
    assert torch.equal(logits(model), first)
    assert not torch.equal(logits(result.model), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_what_is_published_is_what_was_scored(place, tmp_path, monkeypatch):
    exams = []
    monkeypatch.setattr(
        "eckart.recovery.pipeline.better", lambda scorer, *scores: exams.append(scorer) or better(scorer, *scores)
    )
    model, teacher = (eckart.load(place / name, dtype=torch.bfloat16) for name in ("lowrank", "dense"))
    before, told = (copy.deepcopy(each).float() for each in (model, teacher))
    attention = teacher.config._attn_implementation
    result = eckart.tune(model, tokenizer(), data=place / "text.txt", recovery="ilkd", teacher=teacher, **QUICK)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.report["kept"] == "after"
    scores = result.report["scores"]
    assert scores["before"] == exams[0].score(before).numbers != scores["after"]
    again = exams[0].score(copy.deepcopy(result.model).float()).numbers  # by another attention code
    assert scores["after"] == pytest.approx(again, rel=1e-5)
    assert scores["teacher"]["perplexity"] == pytest.approx(exams[0].score(told).numbers["perplexity"], rel=1e-2)
    assert scores["teacher"] != scores["before"]
    assert teacher.config._attn_implementation == attention


def test_a_head_learns_whatever_is_frozen(place):
    result = eckart.tune(place / "bert", data=place / "rows.tsv", data_column="text", data_label_column="label",
                         recovery="lora", epochs=2, batch_size=9, max_seq_length=16)  # fmt: skip
    assert result.model.config.num_labels == 2
    assert result.report["training"]["steps"] == 2 * 4  # 36 rows, the others are held out
    head = 2 * 32 + 2
    pooler = sum(p.numel() for p in result.model.bert.pooler.parameters())
    adapters = sum(8 * (leaf.in_features + leaf.out_features) for form in factored_modules(result.model).values()
                   for leaf in form.modules() if isinstance(leaf, torch.nn.Linear))  # fmt: skip
    assert result.report["recovered_by"]["trained"] in (adapters + head, adapters + head + pooler)


def test_two_states_are_kept_and_no_more(place, tmp_path):
    asked = {"model": str(place / "lowrank"), "data": str(place / "text.txt"), **QUICK, "recovery": "full"}
    with pytest.raises(KeyboardInterrupt):
        tune_checkpoint(make_tune_recipe({**asked, "save_steps": 1}), tmp_path / "out", stop_after=4)
    assert len(list((tmp_path / "out.partial/entries/state").glob("*.safetensors"))) == 2
    result, _ = tune_checkpoint(make_tune_recipe({**asked, "save_steps": 1}), tmp_path / "out")
    assert result.report["training"]["resumed_from"] in (3, 4)


def test_going_on_takes_the_same_options(place, tmp_path):
    asked = {"model": str(place / "lowrank"), "data": str(place / "text.txt"), **QUICK, "recovery": "full"}
    with pytest.raises(KeyboardInterrupt):
        tune_checkpoint(make_tune_recipe({**asked, "save_steps": 2}), tmp_path / "out", stop_after=3)
    with pytest.raises(CheckpointError, match="learning_rate"):
        tune_checkpoint(make_tune_recipe({**asked, "learning_rate": 1e-4}), tmp_path / "out")
    result, _ = tune_checkpoint(make_tune_recipe({**asked, "save_steps": 3}), tmp_path / "out")
    assert result.report["training"]["resumed_from"] == 2
    assert result.report["training"]["steps"] == 6


def test_a_teacher_of_another_vocabulary_is_refused(place):
    with pytest.raises(UsageError, match="its vocabulary is 8200, the student's 8192"):
        tuned(place, "lowrank", teacher=llama(num_hidden_layers=2, vocab_size=8200))


@pytest.mark.parametrize(("options", "kind", "words"), [
    ({"recovery": "distill"}, UsageError, "Did you mean 'distil'"),
    ({"recovery": "lora", "recovery_option": "rnk=3"}, UsageError, "did you mean 'rank'"),
    ({"recovery": "lora", "recovery_option": "rank=x"}, UsageError, "rank='x'"),
    ({"learning_rat": 1}, UsageError, "did you mean 'learning_rate'"),
    ({"epochs": True}, UsageError, "not a boolean"),
    ({"recovery": "distil"}, UsageError, "--teacher MODEL"),
    ({"data": None, "recovery": "full"}, UsageError, "--data FILE"),
    ({"recovery": "full", "name": "bert"}, UsageError, "--data-label-column COLUMN"),
    ({"recovery": "full", "name": "bert", "task": "classification", "data": "rows.tsv", "data_column": "text",
      "data_label_column": "nothing"}, DataError, "nothing"),
    ({"recovery": "distil", "teacher": "bert-mlm"}, UsageError, "no head for task causal"),
])  # fmt: skip
def test_refusals_name_the_way_out(place, options, kind, words):
    name = options.pop("name", "lowrank")
    for key in ("data", "teacher"):
        if options.get(key):
            options[key] = str(place / options[key])
    with pytest.raises(kind, match=words):
        tuned(place, name, **options)


def test_every_recovery_is_listed():
    said = CliRunner().invoke(app, ["methods"]).output
    assert all(name in said for name in RECOVERIES)
