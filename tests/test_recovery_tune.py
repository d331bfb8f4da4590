"""`eckart.tune` from end to end: options, own recoveries, resuming, what is kept, published and refused."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from tiny import llama
from transformers import AutoModelForSequenceClassification
from tuning_problem import QUICK, interrupted, reader, tuning_folders
from typer.testing import CliRunner

import eckart
from eckart.checkpoint.description import described
from eckart.cli.app import app
from eckart.errors import CheckpointError, DataError, UsageError
from eckart.model import factored_modules
from eckart.recovery import DSEE, LoRA, Recovery, RecoveryContext, make_recovery, pipeline
from eckart.recovery.recipe import TuneRecipe, make_tune_recipe
from eckart.recovery.training import is_better


@pytest.fixture(scope="module")
def place():
    return tuning_folders()


def tuned(place, name, **options):
    return eckart.tune(place / name, **{"data": place / "text.txt", **QUICK, **options})


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20).view(2, 10)).logits


# -- distillation and adapters on a whole model -------------------------------------------------------------


@pytest.mark.parametrize("recovery", ["full", "ilkd", "lora"])
def test_loss_falls(place, recovery):
    result = tuned(place, "lowrank", recovery=recovery, teacher=place / "dense", max_steps=16, learning_rate=1e-2)
    training = result.report["training"]
    assert training["last_loss"] < training["first_loss"]


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


# -- options and recoveries ---------------------------------------------------------------------------------


def test_options_win_over_the_recipe(place):
    recipe = TuneRecipe(recovery="lora", recovery_option=("rank=3",), **{**QUICK, "max_steps": 1})
    named = {"data": place / "text.txt", "recipe": recipe}
    result = eckart.tune(place / "lowrank", max_steps=2, **named)
    assert result.report["training"]["steps"] == 2
    assert result.report["recovered_by"]["rank"] == 3
    assert result.recipe.model == str(place / "lowrank")
    other = eckart.tune(place / "lowrank", recovery="full", **named)  # settings of lora mean nothing to it
    assert (other.recipe.recovery, other.recipe.recovery_option) == ("full", ())
    with pytest.raises(UsageError, match="'max_step' is not an option; did you mean 'max_steps'"):
        eckart.tune(place / "lowrank", max_step=5, **named)
    with pytest.raises(UsageError, match="LoRA\\(\\.\\.\\.\\)"):
        eckart.tune(place / "lowrank", data="x", recovery=LoRA(), recovery_option="rank=2")
    with pytest.raises(UsageError, match="LoRA is not an object of a class on"):
        eckart.tune(place / "lowrank", data="x", recovery=LoRA)
    run = {"recovery": "lora", "recovery_option": ["rank=3"]}
    assert TuneRecipe.combine(run, {"recovery": "lora"}) == run
    assert TuneRecipe.combine(run, {"recovery": "full"}) == {"recovery": "full"}
    assert TuneRecipe.combine(run, {"recovery_option": ["rank=2"]})["recovery_option"] == ["rank=2"]


@dataclass
class Anchored(Recovery):
    """The task's loss, weighted."""

    title: ClassVar[str] = "a recovery of the user's own"
    weight: float = 1.0

    def loss(self, outputs, teacher_outputs, batch, task_loss):
        return self.weight * task_loss


@dataclass
class HalfLoRA(LoRA):
    """Another recovery under the name of its parent."""

    alpha: int = 2


def test_a_recovery_of_ones_own_trains_and_its_recipe_is_refused(place, tmp_path):
    plain = tuned(place, "lowrank", recovery="full", max_steps=1).report
    result = tuned(place, "lowrank", recovery=Anchored(weight=3.0), max_steps=1, output_dir=tmp_path / "own")
    assert result.report["training"]["first_loss"] == pytest.approx(3 * plain["training"]["first_loss"])
    assert result.report["recovery_settings"] == {"weight": 3.0}
    assert "weight=3.0" in (result.folder / "README.md").read_text()
    saved = yaml.safe_load((result.folder / "eckart" / "recipe.yaml").read_text())
    assert saved["recovery_option"] == ["weight=3.0"]
    with pytest.raises(UsageError, match=r"Anchored was passed from Python.*recovery=Anchored\(\.\.\.\)"):
        make_tune_recipe(saved)
    done = CliRunner().invoke(app, ["tune", "--config", str(result.folder / "eckart" / "recipe.yaml"), "--output-dir",
                                    str(tmp_path / "again")])  # fmt: skip
    assert done.exit_code == 2
    assert "was passed from Python" in " ".join(done.output.split())
    child = TuneRecipe(recovery=HalfLoRA(rank=2))
    assert child.recovery.endswith("HalfLoRA")
    with pytest.raises(UsageError, match="was passed from Python"):
        child.build_recovery()


def test_one_object_serves_several_tunings(place):
    recovery = DSEE(rank=2, rounds=2, prune="unstructured")
    first, second = (tuned(place, "dense", recovery=recovery, max_steps=2) for _ in range(2))
    assert torch.equal(logits(first.model), logits(second.model))
    assert recovery.adapter is None
    assert first.recovery.adapter is not None


# -- devices and steps ----------------------------------------------------------------------------------------


class ReachedError(Exception):
    """A training has come as far as a test looks."""


@pytest.mark.parametrize(("asked", "used"), [("auto", "cuda"), ("cuda:1", "cuda:1")])
def test_a_tuning_uses_the_device_that_was_asked_for(place, monkeypatch, asked, used):
    devices = []

    def stop(*given):
        devices.append(given[5])
        raise ReachedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: own(*size, **more))  # it is there
    monkeypatch.setattr(pipeline, "on_device", lambda device, *models: devices.append(device) or nullcontext())
    monkeypatch.setattr(pipeline, "train", stop)
    with pytest.raises(ReachedError):
        tuned(place, "lowrank", recovery="full", device=asked)
    assert devices == [torch.device(used)] * 2


def test_accumulated_gradients_are_those_of_one_large_batch(place):
    options = {"recovery": "full", "num_samples": 4, "epochs": 2, "max_steps": None, "device": "cpu"}
    whole = tuned(place, "lowrank", batch_size=4, **options)
    parts = tuned(place, "lowrank", batch_size=2, gradient_accumulation=2, **options)
    assert whole.report["training"]["steps"] == parts.report["training"]["steps"] == 2
    assert whole.report["device"] == "cpu"
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not torch.equal(logits(whole.model), logits(eckart.load(place / "lowrank")))


def test_models_that_are_passed_in_are_not_copied(place, monkeypatch):
    opened = []
    for name in ("open_student", "open_teacher"):
        own = getattr(pipeline, name)
        monkeypatch.setattr(pipeline, name, lambda *given, own=own: opened.append(own(*given)) or opened[-1])
    model, teacher = eckart.load(place / "lowrank"), eckart.load(place / "dense")
    result = eckart.tune(model, reader(), data=place / "text.txt", teacher=teacher, recovery="distil", **QUICK)
    for one, original in ((opened[0].model, model), (opened[1], teacher)):
        assert one is not original
        assert next(one.parameters()).data_ptr() == next(original.parameters()).data_ptr()
    assert next(result.model.parameters()).data_ptr() != next(model.parameters()).data_ptr()


# -- resuming -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(place, tmp_path_factory):
    """A student, a teacher and data, and how to begin and resume a training on them, which was interrupted."""
    folder = tmp_path_factory.mktemp("unfinished")
    for name in ("lowrank", "dense"):
        shutil.copytree(place / name, folder / name)
    for name in ("text.txt", "held.txt"):
        (folder / name).write_text((place / "text.txt").read_text()[: 9000 if name == "text.txt" else 3000])

    def run(folder, output, **more):
        named = {"teacher": folder / "dense", "data": folder / "text.txt", "eval_data": folder / "held.txt"}
        options = {**QUICK, "recovery": "distil", "save_steps": 2, "output_dir": output, **more}
        return eckart.tune(folder / "lowrank", **named, **options)

    with interrupted(4):
        run(folder, folder / "out")
    return folder, run


@pytest.fixture
def inputs(unfinished, tmp_path):
    """The same in copies that may be changed."""
    source, run = unfinished
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path, lambda folder=tmp_path, **more: run(folder, tmp_path / "out", **more)


def change_weights(folder):
    model = eckart.load(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(folder)


CHANGES = {
    "data": lambda folder: (folder / "text.txt").write_text((folder / "text.txt").read_text().replace("a", "o")),
    "eval_data": lambda folder: (folder / "held.txt").write_text((folder / "held.txt").read_text().replace("a", "b")),
    "teacher": lambda folder: change_weights(folder / "dense"),
    "model": lambda folder: change_weights(folder / "lowrank"),
}


@pytest.mark.parametrize("changed", [("data", "teacher"), ("eval_data", "model")], ids="-".join)
def test_a_training_does_not_resume_on_other_inputs(inputs, changed):
    folder, run = inputs
    for what in changed:
        CHANGES[what](folder)
    with pytest.raises(CheckpointError, match="cannot be continued by this one:") as refused:
        run()
    lines = [line for line in str(refused.value).splitlines() if line.startswith("  - ")]
    assert sorted(line[4:].split(": ")[0] for line in lines) == sorted(changed)
    assert not (folder / "out").exists()
    assert (folder / "out.partial").exists()


def test_a_training_resumes_on_equal_inputs_wherever_they_lie(inputs):
    folder, run = inputs
    with pytest.raises(CheckpointError, match="learning_rate"):
        run(learning_rate=1e-4)
    (folder / "moved").mkdir()
    for name in ("lowrank", "dense", "text.txt", "held.txt"):
        (folder / name).rename(folder / "moved" / name)
    result = run(folder / "moved", save_steps=3)
    assert result.report["training"]["resumed_from"] == 2
    assert result.report["training"]["steps"] == 6
    assert not (folder / "out.partial").exists()


def test_restart_drops_what_is_unfinished(inputs):
    _, run = inputs
    assert run(restart=True).report["training"]["resumed_from"] == 0


def test_a_training_that_fails_before_its_first_state_leaves_nothing(place, tmp_path):
    with interrupted(2):
        tuned(place, "lowrank", recovery="full", output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError):
        tuned(place, "lowrank", recovery="full", output_dir=place / "lowrank", overwrite=True)
    with pytest.raises(CheckpointError):
        tuned(place, "lowrank", recovery="distil", teacher=place / "dense", output_dir=place / "dense", overwrite=True)
    with pytest.raises(UsageError, match="pass output_dir"):
        tuned(place, "lowrank", recovery="full", overwrite=True)


# -- output heads -----------------------------------------------------------------------------------------------


def test_a_bare_factored_encoder_gets_an_output_head_and_reloads(place, tmp_path):
    output = tmp_path / "classifier"
    words = ["tune", place / "bert", "--recovery", "full", "--data", place / "rows.tsv", "--data-column", "text",
             "--data-target-column", "other", "--data-label-column", "label", "--epochs", 12, "--batch-size", 8,
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
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(output)), logits(model))


def test_scores_make_a_regression_head(place):
    result = tuned(place, "bert", data=place / "rows.tsv", data_column="text", data_label_column="score",
                   recovery="full")  # fmt: skip
    assert result.report["task"] == "regression"
    assert result.model.config.num_labels == 1


def test_a_new_output_head_learns_whatever_is_frozen(place):
    result = eckart.tune(place / "bert", data=place / "rows.tsv", data_column="text", data_label_column="label",
                         recovery="lora", epochs=2, batch_size=9, max_seq_length=16)  # fmt: skip
    assert result.model.config.num_labels == 2
    assert result.report["training"]["steps"] == 2 * 4  # 36 rows, the others are held out
    head = 2 * 32 + 2
    pooler = sum(p.numel() for p in result.model.bert.pooler.parameters())
    adapters = sum(8 * (leaf.in_features + leaf.out_features) for form in factored_modules(result.model).values()
                   for leaf in form.modules() if isinstance(leaf, torch.nn.Linear))  # fmt: skip
    assert result.report["recovered_by"]["trained"] in (adapters + head, adapters + head + pooler)


def test_masked_tokens_are_learned(place):
    result = tuned(place, "bert-mlm", recovery="full", max_steps=2)
    assert result.report["task"] == "masked"
    assert "masked perplexity" in result.report["scores"]["after"]


# -- what is kept -------------------------------------------------------------------------------------------------


def test_a_worse_model_is_not_published(place):
    before = eckart.load(place / "lowrank")
    result = eckart.tune(before, reader(), data=place / "text.txt", recovery="full", **{**QUICK, "learning_rate": 2.0})
    assert result.report["kept"] == "before"
    assert any("made it worse" in note for note in result.report["notes"])
    assert torch.equal(logits(result.model), logits(before))
    with torch.no_grad():
        next(result.model.parameters()).zero_()
    assert bool(next(before.parameters()).any())


@pytest.mark.parametrize(("recovery", "options", "smaller"), [
    ("losparse", ("keep=0.4",), True), ("dsee", ("prune=unstructured",), False),
    ("dsee", ("prune=structured", "heads=0.5"), True),
])  # fmt: skip
def test_a_smaller_model_is_published_whatever_it_scores(place, recovery, options, smaller, tmp_path, monkeypatch):
    monkeypatch.setattr("eckart.recovery.result.is_better", lambda *_: False)
    result = tuned(place, "dense", recovery=recovery, recovery_option=options, learning_rate=9.0, max_steps=3)
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


def test_what_is_published_is_what_was_scored(place, monkeypatch):
    scorers = []
    monkeypatch.setattr(
        "eckart.recovery.result.is_better", lambda scorer, *found: scorers.append(scorer) or is_better(scorer, *found)
    )
    model, teacher = (eckart.load(place / name, dtype=torch.bfloat16) for name in ("lowrank", "dense"))
    before, taught = (copy.deepcopy(each).float() for each in (model, teacher))
    result = eckart.tune(model, reader(), data=place / "text.txt", recovery="ilkd", teacher=teacher, **QUICK)
    assert result.report["kept"] == "after"
    scores = result.report["scores"]
    assert scores["before"] == scorers[0].score(before).numbers != scores["after"]
    assert scores["after"] == scorers[0].score(copy.deepcopy(result.model).float()).numbers
    assert scores["teacher"] == scorers[0].score(taught).numbers != scores["before"]


def test_a_teacher_that_nobody_learns_from_is_noted(place):
    result = tuned(place, "lowrank", teacher=place / "dense", recovery="full", max_steps=1)
    assert "the teacher was not used for training: recovery full learns from the task alone" in result.report["notes"]


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_teacher_of_another_vocabulary_is_refused(place):
    with pytest.raises(UsageError, match="its vocabulary is 8200, the student's 8192"):
        tuned(place, "lowrank", teacher=llama(num_hidden_layers=2, vocab_size=8200))


@pytest.mark.parametrize(("options", "kind", "words"), [
    ({"recovery": "distill"}, UsageError, "Did you mean 'distil'"),
    ({"recovery": "lora", "recovery_option": "rnk=3"}, UsageError, "did you mean 'rank'"),
    ({"recovery": "lora", "recovery_option": "rank=x"}, UsageError, "rank='x'"),
    ({"recovery": "lora", "recovery_option": "rank"}, UsageError, "write name=value"),
    ({"learning_rat": 1}, UsageError, "did you mean 'learning_rate'"),
    ({"epochs": True}, UsageError, "not a boolean"),
    ({"device": "tpu9"}, UsageError, "no such device"),
    ({"data": None, "recovery": "full"}, UsageError, "--data FILE"),
    ({"recovery": "full", "name": "bert"}, UsageError, "--data-label-column COLUMN"),
    ({"recovery": "full", "name": "bert", "task": "classification", "data": "rows.tsv", "data_column": "text",
      "data_label_column": "nothing"}, DataError, "nothing"),
    ({"recovery": "distil", "teacher": "bert-mlm"}, UsageError, "no output head for task causal"),
])  # fmt: skip
def test_refusals_name_the_way_out(place, options, kind, words):
    name = options.pop("name", "lowrank")
    for key in ("data", "teacher"):
        if options.get(key):
            options[key] = str(place / options[key])
    with pytest.raises(kind, match=words):
        tuned(place, name, **options)
