"""Kronecker products as methods: what can be asked for, and whole runs."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from architectures import Architecture
from problems import close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import eckart
from eckart.allocation import DENSE, Choice
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.config import check_recipe
from eckart.errors import UsageError
from eckart.forms import FORMS, Kronecker
from eckart.methods import METHODS, method_named


def test_no_refit_and_no_word_of_exactness():
    settings = Settings.of(METHODS["eckart"], Recipe(form="kronecker"))
    assert not settings.refit
    assert settings.notes == ("the refit was left out: form kronecker cannot be fitted again",)
    assert "approximate" in settings.method.exact_for
    assert "approximate" not in Settings.of(METHODS["kronecker"], Recipe()).method.exact_for.split(";")[0]
    with pytest.raises(UsageError, match="--refit: form kronecker cannot be fitted again"):
        Settings.of(METHODS["drone"], Recipe(form="kronecker", refit=True))


def test_stated_sizes_belong_to_their_form():
    for name in ("kronecker", "kngpt2"):
        with pytest.raises(
            UsageError, match=f"--form lowrank: {name} is its form, kronecker.*--method svd --form lowrank"
        ):
            Settings.of(METHODS[name], Recipe(form="lowrank"))
    stated = replace(METHODS["kngpt2"], fixed_form=False)
    with pytest.raises(UsageError, match="--form lowrank: kngpt2 states sizes of form kronecker"):
        Settings.of(stated, Recipe(form="lowrank"))
    assert Settings.of(stated, Recipe(form="lowrank", allocation="uniform")).allocation == "uniform"


# -- whole runs --------------------------------------------------------------------------------------

MODELS = {
    "bert": Architecture(
        "bert", "BertForSequenceClassification", "BertConfig",
        {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "hidden_dropout_prob": 0.0}, "AutoModelForSequenceClassification",
    ),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 96, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64}, "AutoModelForCausalLM",
    ),
    "llama": Architecture(
        "llama", "LlamaForCausalLM", "LlamaConfig",
        {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}, "AutoModelForCausalLM",
    ),
}  # fmt: skip
IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("method", ["kronecker", "kngpt2"])
@pytest.mark.parametrize("name", MODELS)
def test_compressed_saved_and_loaded(name, method, tmp_path):
    model = MODELS[name].model()
    result = eckart.compress(model, method=method, **({"keep": 0.5} if method == "kronecker" else {}))
    factored = {n: m for n, m in result.model.named_modules() if isinstance(m, Kronecker)}
    if method == "kronecker":
        assert len(factored) == len(result.plan.choices)
        assert 0.4 < result.report["kept"]["of_sites"] <= 0.5
    result.save_pretrained(tmp_path / "small")
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    again = kind.from_pretrained(tmp_path / "small").eval()
    assert sum(isinstance(m, Kronecker) for m in again.modules()) == len(factored)
    with torch.no_grad():
        expected = result.model(IDS).logits
        assert torch.equal(again(IDS).logits, expected)
        close(eckart.densify(again)(IDS).logits, expected, 1e-4)


def test_kngpt2_halves_the_odd_blocks():
    model = MODELS["gpt2"].model()
    result = eckart.compress(model, method="kngpt2")
    for site, choice in result.plan.choices.items():
        odd = site.startswith(("transformer.h.1.", "transformer.h.3."))
        assert choice == (Choice("kronecker", 1, (2, 1)) if odd else Choice(DENSE))
    one = result.model.get_submodule("transformer.h.1.attn.c_attn")
    assert [tuple(term.shape) for term in one.terms()] == [(1, 72, 48), (1, 2, 1)]
    assert any("--allocation uniform or loss" in note for note in result.report["notes"])
    again = check_recipe(Recipe, yaml.safe_load(result.recipe.to_yaml()))
    assert eckart.compress(model, recipe=again).plan.choices == result.plan.choices
    for size in ({"keep": 0.3}, {"keep_of": "model"}):
        with pytest.raises(UsageError, match=r"kngpt2 states its own sizes\. Leave --keep.* out.*--allocation uniform"):
            eckart.compress(model, method="kngpt2", **size)
    uniform_one = eckart.compress(model, method="kngpt2", keep=0.5, allocation="uniform")
    assert all(choice.form == "kronecker" for choice in uniform_one.plan.choices.values())


def test_by_loss_across_shapes_of_block_and_replayed(tmp_path):
    architecture = MODELS["llama"]
    model, data = architecture.model(), architecture.batches(rows=4, count=3)
    options = {"data": data, "targets": ["mlp.up_proj", "k_proj"]}
    made_ = eckart.compress(model, method="eckart", form="kronecker", keep=0.5, **options)
    assert made_.report["kept"]["of_sites"] <= 0.5
    assert len({choice.block for choice in made_.plan.choices.values()}) > 1
    notes = made_.report["notes"]
    assert "the refit was left out: form kronecker cannot be fitted again" in notes
    told = [note.split(":")[0] for note in notes if "approximate, alternating" in note]
    exact = {n for n, c in made_.plan.choices.items() if c.form == DENSE}
    assert sorted(told) == sorted(set(made_.plan.choices) - exact)  # of the chosen block alone
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(made_.plan.to_json()))
    again = eckart.compress(model, method="svd", plan=str(file), **options)
    assert again.plan.choices == made_.plan.choices


def test_a_plan_may_mix_forms_and_the_refit_leaves_blocks_alone(tmp_path):
    architecture = MODELS["llama"]
    model, data = architecture.model(), architecture.batches(rows=4, count=3)
    name, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    sites = {
        name: {"form": "kronecker", "rank": 2, "block": [16, 1]},
        other: {"form": "pivoted", "rank": 12},
    }
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"format_version": 1, "sites": sites}))
    result = eckart.compress(model, data=data, plan=str(file), refit=True)
    forms = {n: m.form for n, m in result.model.named_modules() if hasattr(m, "form")}
    assert forms == {name: "kronecker", other: "pivoted"}
    assert f"{name}: not refitted, form kronecker cannot be" in result.report["notes"]
    assert result.report["sites"][5]["block"] == [16, 1]


def test_the_mean_that_is_lost_goes_into_the_bias():
    """With the covariance as metric, the bias makes up for `(W - W') E[x]`."""
    architecture = MODELS["gpt2"]
    model, data = architecture.model(), architecture.batches(rows=4, count=3)
    centered = replace(method_named("drone"), name="centered", centered=True, form="kronecker")
    seen = []
    site = "transformer.h.0.attn.c_attn"
    handle = model.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    result = eckart.compress(model, data=data, method=centered, keep=0.5, targets=[site])
    handle.remove()
    module = result.model.get_submodule(site)
    assert module.form == "kronecker"
    change = (model.get_submodule(site).weight.mT - module.to_dense()).detach()
    shift = module.dense_bias() - model.get_submodule(site).bias
    mean = shift.detach()
    assert float(mean.abs().max()) > 1e-6
    # The mean of what calibrated: of all inputs that were seen, the one that explains the shift.
    expected = [change @ x.reshape(-1, x.shape[-1]).mean(0) for x in (torch.cat(seen[:1]), *seen)]
    assert min(float((e - mean).abs().max()) for e in expected) < 0.5 * float(mean.abs().max())


def test_registered():
    assert FORMS["kronecker"] is Kronecker
    assert not METHODS["kronecker"].needs_data
    assert not METHODS["kngpt2"].needs_data
