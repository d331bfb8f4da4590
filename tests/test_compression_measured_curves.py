"""Curves scaled by what each cut alone does to the output of the whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from architectures import BY_NAME, Architecture
from tiny import llama, place

import eckart
from eckart.allocation import Choice, Plan
from eckart.calibration.layerwise import LayerwiseError
from eckart.compression.measured_curves import (
    LARGEST_RATIO,
    UnitError,
    ratios_of,
    scale_curves,
    units_of,
)
from eckart.compression.plan_builder import Solved
from eckart.data import Batch
from eckart.errors import UsageError
from eckart.evaluation.agreement import compare_predictions
from eckart.model import replace_module, shared_clone

OPTIONS = {"method": "eckart", "refit": False, "keep": 0.5, "form": "lowrank", "target": "none"}
SMALL = Architecture(
    "llama",
    "LlamaForCausalLM",
    "LlamaConfig",
    {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "AutoModelForCausalLM",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    names: tuple[str, ...]


@pytest.fixture(scope="module")
def model():
    return SMALL.model()


@pytest.fixture(scope="module")
def batches():
    return SMALL.batches(rows=4, count=4)


@pytest.fixture(scope="module")
def measured(model, batches):
    return eckart.compress(model, data=batches, calibrate_curves=True, **OPTIONS)


@pytest.fixture(scope="module")
def unmeasured(model, batches):
    return eckart.compress(model, data=batches, **OPTIONS)


def test_each_unit_is_measured_alone_on_the_whole_model(model, batches, measured, unmeasured):
    """Against models in which one weight alone is replaced, run from the beginning."""
    curves = {tuple(entry["sites"]): entry for entry in measured.report["curves"]}
    assert set(curves) == set(units_of(unmeasured.plan))
    rows = sum(len(batch["input_ids"]) for batch in batches[:1])
    for name in (next(iter(unmeasured.plan.predicted)), "model.layers.2.mlp.down_proj"):
        alone = shared_clone(model)
        replace_module(alone, name, unmeasured.model.get_submodule(name))
        found = [
            compare_predictions(alone, model, [Batch(batch, tuple(range(rows)))])["kl"] for batch in batches
        ]  # rows are drawn from the batches; each has as many
        entry = curves[(name,)]
        assert min(found) * 0.9 < entry["measured"] < max(found) * 1.1
        assert entry["predicted"] == pytest.approx(unmeasured.plan.predicted[name])


def test_the_plan_follows_what_was_measured(measured, unmeasured):
    """What costs more than was predicted, beside the others, gets more; the budget stays."""
    assert "curves" not in unmeasured.report
    assert measured.report["kept"]["of_sites"] <= 0.5
    ratios = ratios_of([UnitError(tuple(e["sites"]), e["predicted"], e["measured"]) for e in measured.report["curves"]])
    before, after = unmeasured.plan.choices, measured.plan.choices
    gained = [name for name in before if after[name].rank > before[name].rank]
    lost = [name for name in before if 0 < after[name].rank < before[name].rank]
    assert gained
    assert lost
    mean = lambda names: sum(math.log(ratios[name]) for name in names) / len(names)  # noqa: E731
    assert mean(gained) > mean(lost) + 0.1


def test_embeddings_are_measured_by_their_cosine():
    bert = BY_NAME["bert"]
    found = eckart.compress(bert.model(), data=bert.batches(rows=4, count=3), calibrate_curves=True, **OPTIONS)
    assert all(0 < entry["measured"] < 2 for entry in found.report["curves"])


def test_the_original_and_its_forwards_stay_as_they_were(model, batches, measured):
    again = SMALL.model()
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert all("forward" not in vars(module) for module in model.modules())


def test_ratios_are_relative_and_bounded():
    def unit(name, predicted, measured):
        return UnitError((name,), predicted, measured)

    found = ratios_of([unit("a", 1.0, 20.0), unit("b", 2.0, 10.0)])
    assert found == {"a": pytest.approx(2.0), "b": pytest.approx(0.5)}
    wide = ratios_of([unit("a", 1.0, 1e9), unit("b", 1.0, 1e-9), unit("c", 0.0, 1.0), unit("d", 1.0, math.nan)])
    assert wide == {"a": pytest.approx(LARGEST_RATIO), "b": pytest.approx(1 / LARGEST_RATIO)}
    assert ratios_of([unit("a", 0.0, 1.0)]) == {}
    assert ratios_of([UnitError(("a", "b"), 1.0, 4.0), unit("c", 1.0, 1.0)]) == {
        "a": pytest.approx(2.0), "b": pytest.approx(2.0), "c": pytest.approx(0.5)
    }  # fmt: skip


def test_curves_of_groups_are_scaled_by_the_mean_of_their_sites():
    layer = Layer(("a", "c"))
    one = torch.tensor([4.0, 1.0, 0.0])
    solved = Solved({"a": {None: one}, "b": None, "c": {None: one}}, joint={("a", "c"): one}, sliced={layer: one})
    scaled = scale_curves(solved, {"a": 4.0})
    assert torch.equal(scaled.sites["a"][None], 4 * one)
    assert torch.equal(scaled.sites["c"][None], one)
    assert scaled.sites["b"] is None
    torch.testing.assert_close(scaled.joint["a", "c"], 2 * one)
    torch.testing.assert_close(scaled.sliced[layer], 2 * one)


def test_units_are_what_shares_something():
    plan = Plan({
        "a": Choice("joint", 3), "b": Choice("lowrank", 2), "c": Choice("joint", 3, basis="a"), "d": Choice("dense"),
        "e": Choice("sliced", 4, basis="f"), "f": Choice("sliced", 4),
    })  # fmt: skip
    assert units_of(plan) == [("a", "c"), ("b",), ("f", "e")]


@pytest.mark.parametrize("more", [{"allocation": "uniform"}, {"method": "svd"}])
def test_it_is_refused_where_no_curves_choose(model, batches, more):
    with pytest.raises(UsageError, match="--calibrate-curves with --allocation uniform"):
        eckart.compress(model, data=batches, **{**OPTIONS, "calibrate_curves": True, **more})


def test_another_method_can_measure_too(model, batches):
    options = {"data": batches, "method": "kfac", "allocation": "loss", "keep": 0.5, "target": "none"}
    assert "curves" not in eckart.compress(model, **options).report
    assert eckart.compress(model, calibrate_curves=True, **options).report["curves"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("curves")
    (home / "text.txt").write_text("all the words of a text that is read again and again\n" * 200)
    return place(llama(num_hidden_layers=2, tie_word_embeddings=False), home / "llama")


def compress_folder(folder, output, stream, **more):
    return eckart.compress(
        folder, data=str(folder.parent / "text.txt"), output_dir=output, stream=stream, num_samples=4,
        max_seq_length=16, calibrate_curves=True, **{**OPTIONS, "form": None, "keep": 0.3, **more},
    )  # fmt: skip


def test_a_model_larger_than_memory_is_measured_block_by_block_with_the_same_numbers(folder, tmp_path):
    """Weights of one input and a layer with fewer neurons among them."""
    whole, streamed = (compress_folder(folder, tmp_path / stream, stream) for stream in ("off", "on"))
    found, expected = streamed.report["curves"], whole.report["curves"]
    assert {len(entry["sites"]) for entry in expected} == {1, 3}
    assert [entry["sites"] for entry in found] == [entry["sites"] for entry in expected]
    for one, other in zip(expected, found, strict=True):
        assert other["measured"] == pytest.approx(one["measured"], rel=0.02)
    assert streamed.plan.choices == whole.plan.choices


def test_what_was_measured_is_not_measured_again(folder, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def fail(*_, **__):
        raise KilledError

    expected = compress_folder(folder, tmp_path / "whole", "on").report["curves"]
    with monkeypatch.context() as patch:
        patch.setattr("eckart.compression.pipeline.build_report", fail)
        with pytest.raises(KilledError):
            compress_folder(folder, tmp_path / "out", "on")
    monkeypatch.setattr("eckart.compression.choose_plan.measure_units", fail)
    assert compress_folder(folder, tmp_path / "out", "on").report["curves"] == expected


def test_curves_that_cannot_be_measured_block_by_block_are_noted(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise LayerwiseError("it has no list of blocks")

    monkeypatch.setattr("eckart.compression.trials.run_variants_by_block", fail)
    report = compress_folder(folder, tmp_path / "out", "on").report
    assert "curves" not in report
    assert any("curves were not measured" in note and "--stream off" in note for note in report["notes"])
