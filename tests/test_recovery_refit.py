"""The refit of a published model: the answer of `eckart compress`, better outputs, what is left, refusals."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace as with_changes

import pytest
import torch
import yaml
from architectures import BY_NAME
from folders import model_folders
from typer.testing import CliRunner

import eckart
from eckart.allocation import DENSE
from eckart.cli.app import app
from eckart.data import Batch, load_data
from eckart.errors import ModelError, UsageError
from eckart.forms import FactoredLinear, LowRankSparse
from eckart.methods import METHODS
from eckart.model import (
    dense_weight,
    factored_modules,
    find_sites,
    replace_module,
    shared_parameters,
    sliced_features,
    store_factors,
)
from eckart.moments.input_shift import InputShift
from eckart.recovery import RecoveryContext, make_recovery
from eckart.storage.cache import Cache

QUICK = {"batch_size": 8, "max_seq_length": 32, "num_samples": 48, "eval_samples": 8}


def solved(student, teacher, batches: list[Batch], **options):
    """A copy of the student, solved again, and the recovery that did it."""
    recovery = make_recovery("refit", options)
    student = copy.deepcopy(student).eval()
    context = RecoveryContext(teacher, "causal", None, 0)
    with torch.no_grad():
        recovery.solve(student, context, batches, Cache(memory=sys.maxsize, folder=None))
    return student, recovery, context.notes


def weights(model) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            found[name] = module.to_dense().detach(), module.dense_bias()
        elif type(module).__name__ in ("Linear", "Conv1D"):
            found[name] = dense_weight(module), module.bias
    return found


def batches_of(architecture, model, count: int = 6) -> list[Batch]:
    return load_data(architecture.batches(rows=8, count=count), model=model).batches


# -- the answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form", "centered"), [
    ("llama", "pivoted", True), ("gpt2", "lowrank", True), ("bert", "lowrank", False),
])  # fmt: skip
def test_it_is_the_answer_of_compress(name, form, centered, monkeypatch, tmp_path):
    """The same weights as a refit while the model is compressed, dense ones that a plan leaves included."""
    monkeypatch.setattr("eckart.compression.prepare.hold_out", lambda loaded, _: (loaded, None))
    architecture = BY_NAME[name]
    model = architecture.model()
    batches = batches_of(architecture, model)
    method = with_changes(METHODS["drone"], name=f"drone-{centered}", centered=centered)
    asked = {"data": batches, "method": method}
    plan = eckart.compress(model, refit=False, form=form, keep=0.5, **asked).plan.to_json()
    plan["sites"][list(plan["sites"])[4]] = {"form": DENSE}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    before, wanted = (
        eckart.compress(model, refit=refit, plan=str(tmp_path / "plan.json"), **asked).model for refit in (False, True)
    )
    found, recovery, _ = solved(before, model, batches, centered=str(centered), dense="true")
    assert len(recovery.fits) >= 8
    here, there, old = weights(found), weights(wanted), weights(before)
    for site in recovery.fits:
        torch.testing.assert_close(here[site][0], there[site][0], rtol=1e-4, atol=1e-5)
        if here[site][1] is not None:
            torch.testing.assert_close(here[site][1], there[site][1], rtol=1e-4, atol=1e-5)
    changed = [site for site in recovery.fits if not torch.allclose(here[site][0], old[site][0], atol=1e-3)]
    assert len(changed) > len(recovery.fits) // 2


@pytest.mark.parametrize(("name", "form"), [("llama", "lowrank"), ("gpt2", "pivoted"), ("llama", "joint")])
def test_outputs_come_nearer_and_sizes_stay(name, form):
    architecture = BY_NAME[name]
    model = architecture.model()
    batches = batches_of(architecture, model, 10)
    student = eckart.compress(model, method="svd", keep=0.4, form=form).model
    found, recovery, _ = solved(student, model, batches[:8])
    assert {n: m.spec() for n, m in factored_modules(found).items()} == {
        n: m.spec() for n, m in factored_modules(student).items()
    }
    assert shared_parameters(found) == shared_parameters(student)
    assert bool(shared_parameters(student)) == (form == "joint")
    assert all(fit.after < fit.before for fit in recovery.fits.values())
    report = recovery.report()
    assert report["output_error"]["after"] < 0.9 * report["output_error"]["before"]
    assert report["refitted"] + len(report["left"]) == report["of"] == len(factored_modules(student))
    assert report["tokens"] == sum(batch.num_tokens for batch in batches[:8])

    def distance(one) -> float:
        with torch.no_grad():
            pairs = [[m(**b.inputs, output_hidden_states=True).hidden_states[-1] for m in (one, model)]
                     for b in batches[8:]]  # fmt: skip
        return float(sum((mine - its).square().sum() for mine, its in pairs))

    assert distance(found) < 0.97 * distance(student)


def test_what_is_dense_stays_unless_it_is_asked_for():
    architecture = BY_NAME["llama"]
    model = architecture.model()
    batches = batches_of(architecture, model)
    student = eckart.compress(model, method="svd", keep=0.4, ignore=["down_proj"]).model
    untouched = "model.layers.1.mlp.down_proj"
    for dense in (False, True):
        found, recovery, _ = solved(student, model, batches, dense=str(dense).lower())
        same = torch.equal(weights(found)[untouched][0], weights(student)[untouched][0])
        assert same == (not dense)
        assert (untouched in recovery.fits) == dense


def test_means_go_into_the_bias_where_they_are_asked_to():
    architecture = BY_NAME["bert"]
    model = architecture.model()
    student = eckart.compress(model, method="svd", keep=0.4).model
    batches, given = batches_of(architecture, model), weights(model)
    for centered in ("true", "false"):
        found, recovery, _ = solved(student, model, batches, centered=centered)
        here = weights(found)
        moved = [n for n in recovery.fits if not torch.allclose(here[n][1], given[n][1], atol=1e-5)]
        assert len(moved) == (len(recovery.fits) if centered == "true" else 0)


@pytest.mark.parametrize("bias", [True, False])
def test_output_error_is_what_direct_sums_say(bias):
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=stream) + 0.5
    moved = x @ torch.randn(6, 6, generator=stream) + 0.2
    weight, stored = torch.randn(2, 4, 6, generator=stream)
    b, b_now = torch.randn(2, 4, generator=stream) if bias else (None, None)
    statistics = InputShift.empty(6, torch.device("cpu"))
    statistics.update(x[:100], moved[:100])
    statistics.update(x[100:], moved[100:])
    y = torch.nn.functional.linear(x, weight, b).double()
    y_now = torch.nn.functional.linear(moved, stored, b_now).double()
    direct = ((y - y_now).square().sum() - y.square().sum()) / 300
    assert statistics.output_error(weight, b, stored, b_now) == pytest.approx(float(direct), rel=1e-5)


# -- what is left --------------------------------------------------------------------------------------------


def test_other_forms_and_places_are_left_and_named():
    architecture = BY_NAME["bert"]
    model = architecture.model()
    student = eckart.compress(model, method="svd", keep=0.4).model
    sites = {site.name: site for site in find_sites(model).chosen}
    kronecker, sparse = (f"encoder.layer.0.attention.self.{part}" for part in ("query", "key"))
    assert {kronecker, sparse} <= set(sites)
    width = sites[sparse].in_features
    left, right = torch.randn(width * width // 2, 1), torch.randn(1, 2)
    module, _ = store_factors(sites[kronecker], "kronecker", 1, left, right, torch.zeros(width), torch.float32, (2, 1))
    replace_module(student, kronecker, module)
    replace_module(student, sparse, LowRankSparse(width, width, 2, 3))
    kept = {name: weights(student)[name][0].clone() for name in (kronecker, sparse)}
    found, recovery, notes = solved(student, model, batches_of(architecture, model))
    for name, form in ((kronecker, "kronecker"), (sparse, "lowrank-sparse")):
        assert recovery.left[name] == f"form {form} cannot be"
        assert f"not refitted, form {form} cannot be: {name}" in notes
        assert torch.equal(weights(found)[name][0], kept[name])
    pooler = [name for name in sites if "pooler" in name or "cls" in name]
    assert all(name in recovery.left for name in pooler if name in factored_modules(student))


def test_shared_layers_have_nothing_to_solve():
    architecture = BY_NAME["albert"]
    model = architecture.model()
    student = eckart.compress(model, method="svd", keep=0.4).model
    with pytest.raises(ModelError, match=r"called by several layers.*--recovery distil"):
        solved(student, model, batches_of(architecture, model, 2))


# -- as a command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A causal model and a classifier with factored copies, text and labeled rows."""
    rows = [f"{'yes good fine' if i % 2 else 'no bad poor'} {i}\t{i % 2}" for i in range(80)]
    return model_folders(tmp_path_factory.mktemp("refit"), 0.4, rows)


def refit(place, name="llama", **options):
    teacher = place / name
    return eckart.tune(place / f"{name}-40", **{"data": place / "text.txt", "teacher": teacher, "recovery": "refit",
                                                **QUICK, **options})  # fmt: skip


def test_the_command_publishes_what_it_measured(place, tmp_path):
    words = ["tune", place / "llama-40", "--recovery", "refit", "--teacher", place / "llama", "--data",
             place / "text.txt", "--num-samples", 100, "--max-seq-length", 32, "--output-dir",
             tmp_path / "out"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "14 of 14 weights solved again on 3.20 k tokens, on cpu" in done.output
    report = json.loads((tmp_path / "out/eckart/report.json").read_text())
    assert report["recovered_by"]["output_error"]["after"] < report["recovered_by"]["output_error"]["before"]
    assert report["solving"] == {"rows": 100, "tokens": 3200}
    assert "training" not in report
    assert not (tmp_path / "out.partial").exists()
    recipe = yaml.safe_load((tmp_path / "out/eckart/recipe.yaml").read_text())
    assert "epochs" not in recipe  # so that the file can be given to --config again


def test_a_worse_one_is_not_kept(place, monkeypatch):
    monkeypatch.setattr("eckart.recovery.result.is_better", lambda *_: False)
    result = refit(place)
    assert result.report["kept"] == "before"
    old = weights(eckart.load(place / "llama-40"))
    assert all(torch.equal(w, old[n][0]) for n, (w, _) in weights(result.model).items())
    assert any("--num-samples" in note and "made it worse" in note for note in result.report["notes"])


def test_a_classifier_is_fitted_on_its_tasks_text(place):
    result = refit(place, "classifier", data=place / "rows.tsv", data_column="text", data_label_column="label")
    assert result.report["task"] == "classification"
    error = result.report["recovered_by"]["output_error"]
    assert error["after"] < error["before"]
    assert {"accuracy", "F1"} <= set(result.report["scores"]["after"])


def test_more_rows_than_it_takes_are_drawn_from(place, monkeypatch):
    monkeypatch.setattr(sys.modules["eckart.recovery.training.closed_form"], "default_samples", lambda kind: 20)
    result = refit(place, num_samples=None)
    assert result.report["solving"]["rows"] == 20
    assert any(note.startswith("20 of ") and "--num-samples" in note for note in result.report["notes"])


def test_an_interrupted_run_starts_again(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("eckart.recovery.refit.refittable", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            refit(place, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert refit(place, output_dir=tmp_path / "out").folder == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("options", "words"), [
    ({"teacher": None}, "--teacher MODEL"),
    ({"teacher": "llama-40"}, "factored itself.*Give the original"),
    ({"max_steps": 5}, "--max-steps: recovery refit is in closed form.*Leave --max-steps out"),
    ({"learning_rate": 1e-3, "epochs": 1}, "--epochs, --learning-rate: recovery refit"),
    ({"recovery_option": "rank=3"}, "refit does not have it"),
    ({"model": "llama"}, "no factored weight that can be solved again.*eckart compress MODEL"),
    ({"model": "bare-40", "teacher": "classifier", "data": "rows.tsv", "data_column": "text",
      "data_label_column": "label"},
     "no output head for task classification.*--recovery full"),
])  # fmt: skip
def test_refusals_name_the_way_out(place, options, words):
    for key in ("teacher", "data"):
        if options.get(key):
            options[key] = place / options[key]
    model = place / options.pop("model", "llama-40")
    with pytest.raises(UsageError, match=words):
        eckart.tune(model, **{"data": place / "text.txt", "teacher": place / "llama", "recovery": "refit", **QUICK,
                              **options})  # fmt: skip


def test_a_teacher_with_other_names_is_refused():
    llama_like, bert = BY_NAME["llama"].model(), BY_NAME["bert"].model()
    student = eckart.compress(llama_like, method="svd", keep=0.4).model
    with pytest.raises(UsageError, match=r"the teacher has no such weight.*--teacher MODEL"):
        solved(student, bert, batches_of(BY_NAME["llama"], llama_like, 1))


# -- layers with fewer neurons ---------------------------------------------------------------------------------


def test_what_reads_fewer_neurons_is_solved_and_what_makes_them_is_left():
    architecture = BY_NAME["gpt2"]
    teacher = architecture.model()
    data = architecture.batches(rows=8, count=6)
    student = eckart.compress(teacher, data=data, form="sliced", keep=0.6, refit=False).model
    after, recovery, notes = solved(student, teacher, batches_of(architecture, teacher))
    features = sliced_features(student)
    assert sliced_features(after) == features
    readers = {name for name, found in features.items() if not found.rows}
    assert len(readers) == 2
    assert readers <= set(recovery.fits)
    assert not set(recovery.fits) & (set(features) - readers)
    assert all(recovery.fits[name].after < recovery.fits[name].before for name in readers)
    assert any("which of its neurons are left is not known" in note for note in notes)
    before = weights(student)
    for name in features:
        assert torch.equal(weights(after)[name][0], before[name][0]) == (name not in readers)
    with pytest.raises(UsageError, match="factored itself"):
        solved(student, student, batches_of(architecture, teacher))
