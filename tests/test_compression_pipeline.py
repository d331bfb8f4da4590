"""A whole run in memory: what is promised of every result, and the real demo model compressed by the default."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from architectures import BY_NAME, Architecture
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import eckart
from eckart.compression.open_run import open_in_memory
from eckart.data.stdlib import documents
from eckart.errors import CheckpointError, DataError, NumericalError, UsageError
from eckart.evaluation.quality import distance_to_original
from eckart.linalg import Metric, Problem
from eckart.methods import METHODS
from eckart.model import shared_clone

DEMO = Path(eckart.__file__).parent / "demo" / "model"
SMALL = Architecture(
    "llama",
    "LlamaForCausalLM",
    "LlamaConfig",
    {
        "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "AutoModelForCausalLM",
)  # fmt: skip


@pytest.fixture
def model() -> PreTrainedModel:
    return SMALL.model()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return SMALL.batches(rows=8, count=4)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("keep_of", ["sites", "model"])
@pytest.mark.parametrize("method", ["eckart", "drone"])
def test_budget_is_kept_and_the_original_untouched(model, batches, method, keep_of):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = eckart.compress(model, data=batches, method=method, keep=0.75, keep_of=keep_of)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.report["kept"]["of_" + keep_of] <= 0.75
    assert result.report["kept"]["of_" + keep_of] > 0.65  # and most of it is spent
    stored = {value.data_ptr(): value.numel() for value in result.model.state_dict().values()}  # what is shared once
    assert sum(stored.values()) == result.report["sizes"]["model"]["after"]["elements"]


def test_same_seed_gives_the_same_bits_and_another_seed_another_model(model, batches):
    first, second, other = (eckart.compress(model, data=batches, keep=0.5, seed=seed).model for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)


def test_plan_is_replayed_to_the_bit(model, batches, tmp_path):
    made = eckart.compress(model, data=batches, keep=0.5)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(made.plan.to_json()))
    again = eckart.compress(model, data=batches, plan=str(file))
    assert again.plan.choices == made.plan.choices
    assert same(made.model, again.model)


def test_a_multiple_larger_than_any_rank_is_refused():
    model = BY_NAME["llama"].model()
    with pytest.raises(UsageError, match=r"--rank-multiple 99,999,999: the largest rank .* is \d+"):
        eckart.compress(model, method="svd", keep=0.5, rank_multiple=99_999_999)


def test_plan_of_another_model_is_refused(model, batches, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(eckart.compress(model, method="svd", keep=0.5).plan.to_json()))
    other = SMALL.model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.neg_()
    with pytest.raises(UsageError, match=r"plan\.json: it was made for another model .* Make a plan for this model"):
        eckart.compress(other, method="svd", plan=str(file))


def absolute_metric(weight, moments):
    return Problem(weight, right=Metric(diagonal=moments["absolute"].mean))


OWN = replace(METHODS["asvd"], name="mine", metric=absolute_metric)


def test_own_method_is_used_and_its_recipe_never_runs_another_one(model, batches, monkeypatch):
    monkeypatch.setattr(METHODS, "_added", {})
    result = eckart.compress(model, data=batches, method=OWN, keep=0.5)
    assert result.report["method"] == "mine"
    assert all(row["form"] == "lowrank" for row in result.report["sites"])
    recipe = yaml.safe_load(result.recipe.to_yaml())
    assert recipe["method"] == "mine"
    monkeypatch.setattr(METHODS, "_added", {})  # another process does not know it
    with pytest.raises(UsageError, match="'mine'"):
        eckart.compress(model, data=batches, **recipe)


def test_own_method_may_not_take_the_name_of_another(model, batches):
    with pytest.raises(UsageError, match="name of its own"):
        eckart.compress(model, data=batches, method=replace(OWN, name="svd"), keep=0.5)


def test_compared_own_method_can_be_saved(model, batches, tmp_path):
    comparison = eckart.compare(model, methods=["svd", OWN], keeps=[0.5], data=batches)
    results = {name: result for name, _, result in comparison}
    assert list(results) == ["svd", "mine"]
    folder = results["mine"].save_pretrained(tmp_path / "mine")
    assert yaml.safe_load((folder / "eckart" / "recipe.yaml").read_text())["method"] == "mine"
    found = comparison.as_dict()
    assert [row["method"] for row in found["rows"]] == ["svd", "mine"]
    assert found["original"] == results["svd"].report["sizes"]["model"]["before"]


def test_options_win_over_the_recipe_and_unknown_ones_are_refused(model, batches):
    recipe = eckart.Recipe(method="svd", keep=0.9)
    for call in (
        lambda **more: eckart.compress(model, data=batches, recipe=recipe, **more),
        lambda **more: next(
            iter(eckart.compare(model, data=batches, methods=["svd"], keeps=[0.5], recipe=recipe, **more))
        )[2],
    ):
        assert call(keep_of="model").recipe.keep_of == "model"
        with pytest.raises(UsageError, match=r"'kep' is not an option; did you mean 'keep'"):
            call(kep=0.5)
    assert eckart.compress(model, recipe=recipe, keep=0.5).report["kept"]["of_sites"] <= 0.5


def test_caller_keeps_its_model_as_it_was(model, batches):
    model.train()
    model.lm_head.weight.requires_grad_(False)
    model.config.use_cache = True

    def state():
        modes = [module.training for module in model.modules()]
        trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return modes, trains, model.config.to_dict(), model.device

    before = state()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    eckart.compress(model, data=batches, keep=0.5, embeddings="lowrank")
    for _ in eckart.compare(model, data=batches, methods=["svd"], keeps=[0.5]):
        pass
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert state() == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_model_is_copied_to_the_device_that_computes_and_stays_where_it_is(model, monkeypatch):
    told = []
    monkeypatch.setattr("eckart.compression.open_run.device_of", lambda recipe, model: torch.device("meta"))
    run = open_in_memory(model, None, None, eckart.Recipe(), [], report_progress=told.append)
    assert {p.device.type for p in run.model.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert told == ["computing on meta"]


def test_folder_gives_the_bits_of_the_model_in_memory_and_is_published(model, batches, tmp_path):
    model.save_pretrained(tmp_path / "model")
    expected = eckart.compress(model, data=batches, keep=0.5)
    told = []
    held = eckart.compress(tmp_path / "model", data=batches, keep=0.5)
    published = eckart.compress(
        tmp_path / "model", data=batches, keep=0.5, output_dir=tmp_path / "small", report_progress=told.append
    )
    assert held.folder is None
    assert published.folder == tmp_path / "small"
    assert any("on cpu" in line for line in told)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert all(same(expected.model, other) for other in (held.model, published.model, loaded))
    for there in (tmp_path / "model", model):
        with pytest.raises(CheckpointError, match="--overwrite"):
            eckart.compress(there, data=batches, keep=0.5, output_dir=tmp_path / "small")


def test_model_whose_memory_is_not_known_is_worked_on_block_by_block(model, batches, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("eckart.compression.memory_estimate.blank", lambda *_, **__: 1 / 0)
    told = []
    result = eckart.compress(
        tmp_path / "model", data=batches, method="drone", keep=0.5, output_dir=tmp_path / "small",
        report_progress=told.append,
    )  # fmt: skip
    assert "block by block" in told[0]
    assert "cannot be estimated (ZeroDivisionError" in told[0]
    assert result.report["calibrated"].startswith("block by block")


def test_impossible_keep_names_the_least_and_that_one_works(model, batches):
    with pytest.raises(UsageError, match=r"--keep 0.01 .* smallest keep that can be reached is ([\d.]+)") as caught:
        eckart.compress(model, data=batches, keep=0.01)
    least = float(str(caught.value).split("reached is ")[1].split(":")[0])
    assert eckart.compress(model, data=batches, keep=least).report["kept"]["of_sites"] <= least


def test_keep_of_model_names_the_least_of_the_model(model):
    with pytest.raises(
        UsageError, match=r"--keep-of model: .* smallest keep that can be reached is ([\d.]+)"
    ) as caught:
        eckart.compress(model, method="svd", keep=0.2, keep_of="model")
    least = float(str(caught.value).split("reached is ")[1].split(":")[0])
    assert eckart.compress(model, method="svd", keep=least, keep_of="model").report["kept"]["of_model"] <= least


def test_without_data_the_error_names_the_ways_out(model):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with pytest.raises(DataError, match=r"self") as caught:
        eckart.compress(model, tokenizer, keep=0.5)
    assert "--data FILE" in str(caught.value)


def test_refit_that_makes_it_worse_is_left_out(model, batches, monkeypatch):
    plain = eckart.compress(model, data=batches, keep=0.5, refit=False)

    def harm(context, settings, plan, compressed, *rest):
        fitted = shared_clone(compressed)
        fitted.model.norm.weight = torch.nn.Parameter(torch.randn(48))
        return fitted, []

    monkeypatch.setattr("eckart.compression.refit.refit_blocks", harm)
    result = eckart.compress(model, data=batches, keep=0.5)
    assert any("refit was left out" in note for note in result.report["notes"])
    assert torch.equal(result.model(batches[0]["input_ids"]).logits, plain.model(batches[0]["input_ids"]).logits)


def test_refit_of_a_metric_without_inputs_is_refused(model, batches):
    with pytest.raises(UsageError, match=r"--refit: .* --metric drone"):
        eckart.compress(model, data=batches, method="svd", refit=True)


def test_stored_dtype(model, batches):
    result = eckart.compress(model, data=batches, keep=0.5, dtype="bfloat16", optimise="size")
    assert {value.dtype for value in result.model.state_dict().values()} == {torch.bfloat16, torch.int32}
    assert next(model.parameters()).dtype == torch.float32


@pytest.fixture(scope="module")
def demo_results():
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = [body for _, body in documents("calibration")][:30]
    rows = [replace(METHODS["eckart"], name="eckart without refit", refit=False), "eckart", "svd", "svd-llm", "kfac"]
    results = eckart.compare(model, tokenizer, methods=rows, keeps=[0.5], data=text, num_samples=24, max_seq_length=64)
    return {name: distance_to_original(result.report["quality"]) for name, _, result in results}


def test_on_a_real_model_methods_come_in_the_order_that_their_papers_claim(demo_results):
    """KL to the original on held-out text, keep .5: each step of the default is worth something."""
    order = ["eckart", "eckart without refit", "svd-llm", "svd"]
    assert sorted(order, key=demo_results.__getitem__) == order
    assert demo_results["kfac"] < demo_results["svd"]
    assert demo_results["eckart"] < 0.5 * demo_results["svd-llm"]


def test_model_with_one_score_is_measured_by_its_features():
    bert = Architecture(
        "regression",
        "BertForSequenceClassification",
        "BertConfig",
        {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_labels": 1},
        "AutoModelForSequenceClassification",
        data="text",
    )  # fmt: skip
    result = eckart.compress(bert.model(), data=bert.batches(count=4), keep=0.5)
    assert 0 < result.report["quality"]["embedding"]["cosine_distance"] < 0.5


def test_training_the_result_leaves_the_original_alone(model, batches):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = eckart.compress(model, data=batches, keep=0.5)
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)
    result.model(batches[0]["input_ids"], labels=batches[0]["input_ids"]).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dead_inputs_and_little_text_are_survived(model, batches):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.zero_()
    result = eckart.compress(model, data=batches, keep=0.5, method="drone", refit=True)
    assert torch.isfinite(result.model(batches[0]["input_ids"]).logits).all()
    single = eckart.compress(model, data=[{key: value[:1] for key, value in batches[0].items()}], keep=0.5)
    assert any("refit was left out" in note for note in single.report["notes"])


def test_numbers_that_are_not_finite_are_named(model):
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.norm\.weight: 1 of 48 entries are NaN or infinite\. Check"):
        eckart.compress(model, method="svd", keep=0.5)


def test_a_cast_that_overflows_is_refused_by_name(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e6
    with pytest.raises(NumericalError, match=r"embed_tokens\.weight: .* --dtype"):
        eckart.compress(model, method="svd", keep=0.5, dtype="float16")


@pytest.mark.parametrize("wrong", [torch.nn.Linear(4, 4), 3])
def test_only_a_transformers_model_is_taken(wrong):
    with pytest.raises(UsageError, match=r"model: .* from_pretrained"):
        eckart.compress(wrong, method="svd")


@pytest.mark.parametrize("form", ["joint", "pivoted-joint"])
def test_rows_of_sites_add_up_to_the_sizes_of_all(model, batches, form):
    """What is shared, and a product that is computed once, counts at one site."""
    report = eckart.compress(model, data=batches, form=form, allocation="uniform", method="drone", keep=0.5).report
    assert form in report["form"]
    for key in ("elements", "multiply_adds"):
        assert sum(row["after"][key] for row in report["sites"]) == report["sizes"]["sites"]["after"][key]
