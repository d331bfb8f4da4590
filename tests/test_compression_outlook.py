"""What a run says before it starts: what it will do, its stages with their costs, and about how long that takes."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from architectures import BY_NAME
from tiny import llama, place, text
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart
from eckart.calibration import take_samples
from eckart.compression import distil
from eckart.compression import outlook as outlooks
from eckart.compression.open_run import open_in_memory
from eckart.compression.outlook import (
    MEASURING,
    announce,
    announce_comparison,
    describe_forms,
    describe_stages,
    plan_stages,
    time_pass,
)
from eckart.compression.prepare import prepare
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.methods import method_named
from eckart.progress import Stage
from eckart.speed.bench import bench
from eckart.storage.store import MemoryStore

TOLD = re.compile(r"^(a few seconds|about .*) in all$")
SMALL = {"num_samples": 32, "max_seq_length": 16, "batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outlook")
    place(llama(num_hidden_layers=2), folder / "llama")
    text(folder)
    return folder


@pytest.fixture(scope="module")
def context(folder):
    """Of a model in memory, with data."""
    recipe = Recipe(model=str(folder / "llama"), data=str(folder / "text.txt"), method="kfac", **SMALL)
    settings = Settings.of(method_named("kfac"), recipe)
    run = open_in_memory(None, None, None, recipe, [settings], report_progress=lambda _: None)
    context = prepare(run, None, [settings], [0.5])
    context.refining = context.distilling = context.data
    return context


def stages_of(context, method="eckart", published=True, verified=True, **options):
    recipe = Recipe(method=method, **options)
    settings = Settings.of(method_named(method), recipe)
    found = plan_stages(context, settings, recipe, published=published, verified=verified)
    assert len({stage.name for stage in found}) == len(found)
    return {stage.name: stage for stage in found}


EVERY = {"effort": "best", "refine": True, "calibrate_curves": True}


def test_every_stage_is_there_in_the_order_of_the_run_with_a_cost(context):
    names = [*stages_of(context, **EVERY, latency=True, quantize="int8", max_loss="1%")]
    assert names == ["statistics", "factors", "curves", "plan", "refit", "refinement", "distillation", "rounding",
                     "latency", "rounded originals", "publishing"]  # fmt: skip
    assert [*stages_of(context, "svd", published=False)] == ["factors", "quality"]
    for stage in stages_of(context, **EVERY, latency=True, quantize="int8", max_loss="1%").values():
        assert stage.passes + stage.seconds > 0


def test_a_training_weighs_as_much_as_the_text_that_it_reads(context, monkeypatch):
    whole = stages_of(context, **EVERY)["distillation"].passes
    text = take_samples(context.data, context.data.num_examples * 3 // 4)
    monkeypatch.setattr(distil, "TRAINING", replace(distil.TRAINING, epochs=1))
    measuring = 2 * MEASURING * context.held_out.num_tokens / context.data.num_tokens
    monkeypatch.setattr(context, "distilling", text)
    part = stages_of(context, **EVERY)["distillation"].passes
    share = text.num_tokens / context.data.num_tokens
    assert part - measuring == pytest.approx(share * (whole - measuring), rel=1e-6)


def test_costs_are_in_proportion(context):
    plain, drone, best = (
        stages_of(context),
        stages_of(context, "drone"),
        stages_of(context, **EVERY),
    )
    assert plain["statistics"].passes > 2 * drone["statistics"].passes > 0
    refinement, distillation = (best[name].passes for name in ("refinement", "distillation"))
    assert min(refinement, distillation) > 5 * best["statistics"].passes > 5 * best["curves"].passes > 0
    assert 0.5 < plain["refit"].passes / plain["statistics"].passes < 4
    assert plain["rounded originals"].passes < plain["statistics"].passes
    twice = stages_of(context, rounds=2)
    assert twice["statistics"].passes == 2 * plain["statistics"].passes
    assert plain["publishing"].seconds > stages_of(context, verified=False)["publishing"].seconds
    assert plain["factors"].seconds > 0


def test_a_pass_is_timed_where_the_model_is_in_memory(context, monkeypatch):
    assert time_pass(context) > 0
    ticks = iter([10.0, 10.5])
    monkeypatch.setattr(outlooks, "_now", lambda _: next(ticks))
    batches = context.data.batches
    whole = 0.5 * sum(batch.num_tokens for batch in batches) / batches[0].num_tokens
    assert time_pass(context) == pytest.approx(whole)
    streamed = SimpleNamespace(data=context.data, workspace=SimpleNamespace(streaming=True))
    assert time_pass(streamed) is None
    monkeypatch.setattr(outlooks, "forward", lambda *_: 1 / 0)
    assert time_pass(context) is None


def test_images_are_counted_as_samples():
    said = []
    case = BY_NAME["vit"]
    eckart.compress(case.model(), data=case.batches(rows=8), method="drone", report_progress=said.append)
    assert any(re.match(r"\d+ samples to calibrate on, \d more to measure on; batches of \d$", line) for line in said)
    assert sum(bool(TOLD.match(line)) for line in said) == 1


def test_costs_are_told_in_times_the_statistics():
    stages = [Stage("statistics", 4), Stage("refit", 6), Stage("plan", 0.1), Stage("publishing", seconds=8)]
    told = describe_stages(stages, 2.0)
    assert told == "stages, in times the statistics: statistics 1, refit 1.5, plan <0.1, publishing 1"
    assert describe_stages(stages, None).endswith("statistics 1, refit 1.5, plan <0.1, publishing")
    assert describe_stages(stages[1:], 2.0) == "stages: refit, plan, publishing"


def test_a_compression_says_what_it_will_do_before_its_first_stage(folder, tmp_path):
    said = []
    result = eckart.compress(
        folder / "llama", data=folder / "text.txt", keep=0.5, output_dir=tmp_path / "out", report_progress=said.append,
        **SMALL,
    )  # fmt: skip
    start = next(i for i, line in enumerate(said) if line.startswith("eckart, forms to choose from: "))
    offered = said[start].removeprefix("eckart, forms to choose from: ").partition(";")[0].split(" and ")
    chosen = {choice.form for choice in result.plan.choices.values()} - {"dense"}
    assert chosen <= {*offered}
    assert f"forms chosen: {result.report['form']}; " in str(result)
    assert "keep 0.5 of the numbers; 14 weights with" in said[start]
    assert said[start + 1] == "32 samples with 512 tokens to calibrate on, 8 more to measure on; batches of 8"
    assert said[start + 2].startswith("stages, in times the statistics: statistics 1, factors ")
    assert TOLD.match(said[start + 3])
    told = [line for line in said[start + 4 :] if line.startswith("stage ")]
    names = [re.match(r"stage (\d) of 5: ([a-z ]+); (a few|about).* left$", line).groups()[:2] for line in told]
    assert names == [("1", "statistics"), ("2", "factors"), ("3", "refit"), ("4", "rounded originals"),
                     ("5", "publishing")]  # fmt: skip
    assert result.report["seconds"]["factorization"] >= 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "forms to choose from: joint and lowrank and sliced"),
        ({"method": "drone"}, "form lowrank"),
        ({"method": "svd", "form": "joint"}, "forms to choose from: joint and lowrank"),
        ({"form": "sliced", "stock": True}, "form sliced"),
        ({"plan": "plan.json"}, "forms as planned"),
    ],
)
def test_the_forms_to_choose_from_are_told(options, told):
    recipe = Recipe(**options)
    assert describe_forms(Settings.of(method_named(recipe.method), recipe), recipe) == told


def test_a_comparison_counts_its_runs(folder):
    said = []
    asked = {"methods": ["svd", "drone"], "keeps": [0.7, 0.5], "data": folder / "text.txt", "latency": False}
    eckart.compare(folder / "llama", report_progress=said.append, **asked, **SMALL).as_dict()
    assert any(line.startswith("4 runs: 2 methods at 2 sizes; 14 weights with") for line in said)
    told = [line.split(";")[0] for line in said if line.startswith("stage ")]
    assert told == [
        "stage 1 of 6: statistics", "stage 2 of 6: svd at keep 0.7", "stage 3 of 6: rounded originals",
        "stage 4 of 6: svd at keep 0.5", "stage 5 of 6: drone at keep 0.7", "stage 6 of 6: drone at keep 0.5",
    ]  # fmt: skip
    assert sum(bool(TOLD.match(line)) for line in said) == 1


def test_a_resumed_run_is_said_to_be_one(context):
    said = []
    recipe = Recipe(method="svd")
    settings = Settings.of(method_named("svd"), recipe)
    announce(context, settings, recipe, said.append)
    assert "an earlier run has done a part of it" not in said
    context.workspace.store.write(outlooks.FACTORS, "one", {}, {})
    announce(context, settings, recipe, said.append)
    context.workspace.store = MemoryStore()
    assert "an earlier run has done a part of it" in said


def test_runs_of_a_comparison_share_factors(context):
    rows = [Settings.of(method_named("svd"), Recipe(method="svd"))]
    found = announce_comparison(context, rows, [0.7, 0.5], Recipe(latency=False), lambda _: None)
    first, second = (stage for stage in found.stages if "keep" in stage.name)
    assert first.seconds > second.seconds == 0
    assert first.passes == second.passes > 0


def test_an_evaluation_names_the_models_that_it_scores(folder, monkeypatch):
    said = []
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    small = eckart.compress(model, method="svd", keep=0.5).model
    eckart.evaluate(small, model, tokenizer, data=folder / "text.txt", task="perplexity", latency=False,
                    max_seq_length=16, max_tokens=512, report_progress=said.append)  # fmt: skip
    assert said[0] == "perplexity of 5 models: original, eckart, int8, int4, eckart int8"
    assert [line.split(";")[0] for line in said[1:]] == [
        f"stage {i} of 5: {name}" for i, name in enumerate(("original", "eckart", "int8", "int4", "eckart int8"), 1)
    ]
    assert said[1] == "stage 1 of 5: original"  # nothing is known yet
    assert all(line.endswith(" left") for line in said[2:])
    said.clear()
    monkeypatch.setattr("eckart.progress.LONG", 0.0)
    eckart.evaluate(small, model, tokenizer, data=folder / "text.txt", task="perplexity", latency=False,
                    max_seq_length=16, max_tokens=512, report_progress=said.append)  # fmt: skip
    assert said[2].endswith(" left (less text: --max-tokens 50000, without int8 and int4: --no-baselines)")
    assert not any("--max-tokens" in line for line in said[3:])


def test_a_benchmark_says_how_long_it_takes_at_least(folder):
    said = []
    bench({"small": llama(num_hidden_layers=2)}, batch_sizes=(1, 2), lengths=(4,), repeats=1, seconds=0.01,
          decode=False, baselines=False, device="cpu", report_progress=said.append)  # fmt: skip
    assert said[0] == "1 model (small) at 2 sizes, in turn"
    assert said[1] == "a few seconds in all, at least"
    assert [line.split(";")[0] for line in said[2:]] == [
        "stage 1 of 2: prefill, 1 x 4 tokens", "stage 2 of 2: prefill, 2 x 4 tokens",
    ]  # fmt: skip


def test_a_training_says_its_steps_and_a_solving_its_rows(folder, tmp_path):
    small = eckart.compress(folder / "llama", method="svd", keep=0.5, output_dir=tmp_path / "small").folder
    asked = {"data": folder / "text.txt", "teacher": folder / "llama", "num_samples": 40, "max_seq_length": 16}
    said = []
    eckart.tune(small, recovery="distil", max_steps=2, batch_size=4, report_progress=said.append, **asked)
    assert said[0].startswith("distil: 2 steps with 4 rows each, of 40, with a teacher; the score before took ")
    assert TOLD.match(said[1])
    assert [line.split(";")[0] for line in said[2:]] == ["stage 1 of 2: training", "stage 2 of 2: scoring"]
    said.clear()
    eckart.tune(small, recovery="refit", report_progress=said.append, **asked)
    assert said[0].startswith("refit: on 40 rows, with a teacher; ")
    assert said[2].startswith("stage 1 of 2: solving; ")
