"""What every registered recovery must do, whatever it is: one line in the registry brings it here."""

from __future__ import annotations

import copy
import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tuning_problem import QUICK, interrupted, is_closed_form, reader, tuning_folders

import eckart
from eckart.adaptive import behaviors_of
from eckart.errors import UsageError
from eckart.model import factored_modules
from eckart.recovery import RECOVERIES, make_recovery
from eckart.recovery.recipe import TuneRecipe, make_tune_recipe
from eckart.recovery.settings import settings_in_words, settings_of

SETTINGS = {
    "lora": {"dropout": "0.2", "rank": "3"},
    "losparse": {"keep": "0.5", "every": "1", "final": "0.1"},
    "losparse-distil": {"keep": "0.5", "every": "1", "final": "0.1"},
    "token-skipping": {"speedup": "1.2", "soft": "0.4"},
    "early-exit": {"threshold": "0.69", "epochs": "2"},
    "dsee": {"prune": "structured", "score": "gates", "heads": "0.5", "prune_at": "0.3", "rank": "2", "rounds": "2"},
}
"""Settings with which a short training shows what a recovery does; the others have good defaults for that."""


OF_ENCODERS = ("token-skipping",)
"""Recoveries of models whose tokens see all others."""

OF_CLASSIFIERS = ("early-exit",)
"""Recoveries of models that give one answer a text."""


def representatives(*names):
    """The first recovery of each kind: those that share these methods take the same path, whatever their settings."""
    first = {}
    for name in RECOVERIES:
        first.setdefault(tuple(getattr(RECOVERIES[name], member, None) for member in names), name)
    return list(first.values())


def make_case(name):
    """A recovery, a student that it can start from, and the options of a short tuning."""
    kind = RECOVERIES[name]
    folder = tuning_folders()
    dense = folder / ("deep" if name == "sandwich" else "dense")
    student = dense if kind.needs_dense_model or name == "sandwich" else folder / "pivoted"
    if name in OF_ENCODERS:
        dense = student = folder / "bert-mlm"
    data = {"data": folder / "text.txt"}
    if name in OF_CLASSIFIERS:
        student, data = folder / "classifier", {"data": folder / "rows.tsv", "data_label_column": "label"}
    options = {key: value for key, value in QUICK.items() if key not in kind.unused_options}
    teacher = {"teacher": dense} if kind.needs_teacher else {}
    return SimpleNamespace(
        name=name, kind=kind, student=student, teacher=teacher, recovery=make_recovery(name, SETTINGS.get(name)),
        options={**data, **options}, closed=is_closed_form(kind),
    )  # fmt: skip


@pytest.fixture(params=list(RECOVERIES))
def case(request):
    """Every registered recovery."""
    return make_case(request.param)


RESUMED = representatives("prepare", "state", "restore", "finish", "solve")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The published result of a recovery's short tuning, each made once."""

    @cache
    def run(name):
        case = make_case(name)
        saved = {} if case.closed else {"save_steps": 2}
        folder = tmp_path_factory.mktemp(name) / "whole"
        return eckart.tune(
            case.student, output_dir=folder, recovery=case.recovery, **case.teacher, **case.options, **saved
        )

    return run


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20).view(2, 10)).logits


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)


@pytest.mark.parametrize("case", RESUMED, indirect=True)
def test_a_tuning_is_published_as_scored_and_resumes_to_the_same_weights(case, whole, tmp_path):
    whole = whole(case.name)
    asked = {"recovery": case.recovery, **case.teacher, **case.options}
    asked |= {} if case.closed else {"save_steps": 2}
    report = whole.report
    assert set(report["scores"]) == {"before", "after"} | set(case.teacher)
    assert report["scores"]["before"] != report["scores"]["after"]
    assert report["recovery_settings"] == settings_of(case.recovery)
    assert whole.folder.name == "whole"
    loaded = eckart.load(whole.folder)
    assert torch.equal(logits(loaded), logits(whole.model))
    assert same_weights(loaded, whole.model)
    # The recipe that lies there makes the same run.
    recipe = make_tune_recipe(yaml.safe_load((whole.folder / "eckart" / "recipe.yaml").read_text()))
    assert recipe.build_recovery() == make_recovery(case.name, SETTINGS.get(case.name))
    if not case.closed:
        assert report["training"]["steps"] == 6
        with interrupted(6):
            eckart.tune(case.student, output_dir=tmp_path / "parts", **asked)
        left = [path.suffix for path in (tmp_path / "parts.partial").rglob("*") if path.is_file()]
        assert set(left) == {".json", ".safetensors"}
        assert left.count(".safetensors") == 2  # the last state, and the one before it
    again = eckart.tune(recipe.model, recipe=recipe, output_dir=tmp_path / "parts")
    assert not (tmp_path / "parts.partial").exists()
    assert same_weights(again.model, whole.model)
    assert again.report["scores"] == report["scores"]
    if not case.closed:
        assert again.report["training"] == {**report["training"], "resumed_from": 4}
        assert again.report["recovered_by"] == report["recovered_by"]


def test_what_is_passed_in_stays_as_it_was(case):
    model = eckart.load(case.student, dtype=torch.bfloat16).train()
    next(model.parameters()).requires_grad_(False)
    teacher = eckart.load(case.teacher["teacher"], dtype=torch.bfloat16).train() if case.teacher else None

    def seen():
        for each in filter(None, (model, teacher)):
            yield copy.deepcopy(vars(each.config)), [module.training for module in each.modules()]
            tensors = (*each.named_parameters(), *each.named_buffers())
            yield [
                (name, t.dtype, t.requires_grad, t.data_ptr(), float(t.detach().double().sum())) for name, t in tensors
            ]
        yield torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = list(seen())
    named = {"teacher": teacher} if teacher is not None else {}
    options = case.options if case.closed else {**case.options, "max_steps": 2, "bf16": True}
    result = eckart.tune(model, reader(), recovery=case.recovery, **named, **options)
    assert list(seen()) == before
    mine = {t.data_ptr() for each in filter(None, (model, teacher)) for t in each.parameters()}
    assert not mine & {t.data_ptr() for t in result.model.parameters()}
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    if case.name not in OF_ENCODERS:  # attention maps are read there
        assert result.model.config._attn_implementation == model.config._attn_implementation
    if not case.kind.needs_dense_model and case.name != "sandwich":
        assert {n: m.spec() for n, m in factored_modules(result.model).items()} == {
            n: m.spec() for n, m in factored_modules(model).items()
        }
        added = result.report["recovered_by"].get("added_parameters", 0)
        assert sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in model.parameters()) + added
    if case.name in OF_CLASSIFIERS:
        assert behaviors_of(result.model)
        assert not behaviors_of(model)
        return
    assert result.model.get_output_embeddings().weight is result.model.get_input_embeddings().weight


def test_what_cannot_be_is_refused_with_the_way_out(case):
    folder = tuning_folders()
    if case.kind.needs_teacher and not case.kind.own_teacher:
        with pytest.raises(UsageError, match="--teacher MODEL"):
            eckart.tune(case.student, recovery=case.name, data=folder / "text.txt")
    if case.kind.needs_dense_model:
        given = {**case.teacher, "recovery": case.name, "data": folder / "text.txt", "max_seq_length": 16}
        with pytest.raises(UsageError, match=f"recovery {case.name} starts from a dense model.*--recovery distil"):
            eckart.tune(folder / "pivoted", **given)
    with pytest.raises(UsageError, match=f"{case.name} does not have it"):
        make_recovery(case.name, {"nothing_like_it": "1"})
    for option in case.kind.unused_options:
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: recovery {case.name}"):
            make_tune_recipe(
                {
                    "recovery": case.name,
                    option: True if option in ("bf16", "gradient_checkpointing") else 1 - (option == "warmup"),
                }
            )
    with pytest.raises(UsageError, match=f"eckart tune DIR --recovery {case.name} "):
        eckart.compress(None, method=case.name)


def test_settings_in_words_make_an_equal_object(case):
    words = dict(word.split("=", 1) for word in settings_in_words(case.recovery))
    assert make_recovery(case.name, words) == case.recovery
    recipe = TuneRecipe(recovery=case.recovery)
    assert recipe.recovery == case.name
    assert recipe.build_recovery() == case.recovery
    assert case.kind.title
    assert case.name in RECOVERIES.about(case.name)["name"]


@pytest.mark.parametrize("case", [name for name in RESUMED if not is_closed_form(RECOVERIES[name])], indirect=True)
def test_steps_with_checkpointing_train_the_same_weights(case, whole):
    plain = whole(case.name).report["training"]
    asked = {"recovery": case.recovery, **case.teacher, **case.options, "gradient_checkpointing": True}
    found = eckart.tune(case.student, **asked).report["training"]
    for key in ("first_loss", "last_loss"):
        assert found[key] == pytest.approx(plain[key], rel=1e-4)


@pytest.mark.parametrize("case", ["full", "distil"], indirect=True)
def test_steps_in_bfloat16_train_nearly_the_same_weights(case, whole):
    plain = whole(case.name).report["training"]
    found = eckart.tune(case.student, recovery=case.recovery, **case.teacher, **case.options, bf16=True).report
    for key in ("first_loss", "last_loss"):
        assert found["training"][key] == pytest.approx(plain[key], rel=0.05)
        assert found["training"][key] != plain[key]
