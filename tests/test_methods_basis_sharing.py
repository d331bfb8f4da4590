"""Basis Sharing as a method: who shares, in which size, and whole runs that store each basis once."""

import json
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME, output, scaled
from problems import close, normal
from safetensors import safe_open
from tiny import make_workdir
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormModel,
)

import eckart
from eckart.allocation import Choice, Plan
from eckart.calibration.layerwise import StatisticsWindow, block_of
from eckart.compression.basis_groups import adjacent, reading_a_norm
from eckart.compression.factor_store import FactorStore
from eckart.compression.factorize import SiteFactorizer
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.data.inference import evaluating, forward
from eckart.distributed import Processes
from eckart.errors import UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.forms import FORMS, SharedBasis, build
from eckart.methods import METHODS
from eckart.model import dense_weight, find_sites, shared_parameters
from eckart.moments import Moments
from eckart.storage.store import MemoryStore

DEEP = {"gpt2": {"n_layer": 4}, "t5": {"num_layers": 4, "num_decoder_layers": 4}}
CLASSES = {"gpt2": AutoModelForCausalLM, "llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


def deep(name):
    return BY_NAME[name].model(**DEEP.get(name, {"num_hidden_layers": 4}))


def stored(folder):
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def groups_of(plan):
    return {frozenset(group) for group in plan.bases}


# -- who shares --------------------------------------------------------------------------------------

READERS = {
    "gpt2": {"c_attn", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "bert": {"query", "key", "value", "intermediate.dense"},
    "distilbert": {"q_lin", "k_lin", "v_lin", "lin1"},
    "modernbert": {"Wqkv", "Wi"},
    "t5": {"q", "k", "v", "wi_0", "wi_1"},
    "opt": {"q_proj", "k_proj", "v_proj", "fc1"},
    "phi3": {"qkv_proj", "gate_up_proj"},
    "gpt-neox": {"query_key_value", "dense_h_to_4h"},
    "vit": {"query", "key", "value", "intermediate.dense", "fc1", "q_proj", "k_proj", "v_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj"},  # tokens of experts are picked out of what a norm put out
    "mamba": {"in_proj"},
}


def readers(model, batch):
    sites = find_sites(model).chosen
    with evaluating(model):
        return sites, reading_a_norm(sites, model, lambda: forward(model, batch))


@pytest.mark.parametrize("name", READERS)
def test_reading_a_norm(name):
    model = BY_NAME[name].model()
    sites, found = readers(model, BY_NAME[name].batches(rows=1)[0])
    inside = {site.name for site in sites if block_of(site.name, model) is not None}
    assert found & inside == {n for n in inside if any(n.endswith(f".{end}") for end in READERS[name])}
    assert 0 < len(found) < len(sites)


def test_a_word_in_a_models_name_is_no_normalization():
    config = RobertaPreLayerNormConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = scaled(RobertaPreLayerNormModel(config)).eval()
    _, found = readers(model, BY_NAME["bert"].batches(rows=1)[0])
    ends = {name.split(".", 3)[-1] for name in found if ".layer." in name}
    assert ends == {"attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"}


def test_adjacent_layers_of_one_role():
    model = deep("llama")
    sites = find_sites(model).chosen

    def roles(bases):
        return {tuple(int(name.split(".")[2]) for name in group) for group in bases}

    assert len(adjacent(sites, model)) == 7 * 2
    assert roles(adjacent(sites, model)) == {(0, 1), (2, 3)}
    assert roles(adjacent(sites, model, 3)) == {(0, 1, 2)}
    assert adjacent(sites, model, 1) == []
    without = find_sites(model, ignore=["model.layers.0.*"]).chosen
    assert roles(adjacent(without, model)) == {(2, 3)}  # the first layer's mate stays alone
    for group in adjacent(sites, model):
        assert len({name.split(".", 3)[3] for name in group}) == 1
    both = adjacent(find_sites(deep("t5")).chosen, deep("t5"))
    assert all(len({name.split(".")[0] for name in group}) == 1 for group in both)  # not across encoder and decoder


# -- what is asked for -------------------------------------------------------------------------------


def test_the_module_may_be_wider_than_its_outputs_and_stores_one_basis():
    right, lefts = normal(7, 16), (normal(4, 7, seed=1), normal(4, 7, seed=2))
    modules = [SharedBasis(16, 4, 7, False).double() for _ in lefts]
    for module, left in zip(modules, lefts, strict=True):
        assert module.store(left, right, None) is None
        close(module.to_dense(), left @ right, 1e-12)
    assert torch.equal(modules[0].first.weight, modules[1].first.weight)
    assert build(json.loads(json.dumps(modules[0].spec()))).spec() == modules[0].spec()
    with pytest.raises(UsageError, match=r"rank 17 is outside 1\.\.16"):
        SharedBasis(16, 4, 17)


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("basis-sharing", {"allocation": "loss"}, r"--allocation loss: .* Use --allocation uniform"),
        ("eckart", {"form": "shared-basis"}, r"--allocation loss: .*--method basis-sharing"),
        ("basis-sharing", {"metric": "kfac"}, r"weighs the outputs .* Use --metric drone, asvd or svd"),
        ("basis-sharing", {"metric": "fwsvd"}, "cannot share a basis under it"),
        ("basis-sharing", {"refit": True}, "--refit: form shared-basis cannot be fitted again"),
        (
            "drone",
            {"layers_per_basis": 2},
            r"--layers-per-basis 2: layers share nothing in form lowrank; use --form shared-basis",
        ),
    ],
)
def test_what_cannot_be_is_refused(method, options, named):
    with pytest.raises(UsageError, match=named):
        Settings.of(METHODS[method], Recipe(**options))


def test_its_needs_and_settings():
    assert METHODS["basis-sharing"].needs_data
    assert not METHODS["basis-sharing"].needs_gradients
    assert FORMS["shared-basis"] is SharedBasis
    assert Settings.of(METHODS["asvd"], Recipe(form="shared-basis", layers_per_basis=3)).allocation == "uniform"
    for bad in (0, -1, True):
        with pytest.raises(ValueError, match="layers_per_basis"):
            Recipe(layers_per_basis=bad)


# -- whole runs --------------------------------------------------------------------------------------


def compressed(name, keep=0.5, **options):
    model, architecture = deep(name), BY_NAME[name]
    return model, eckart.compress(
        model, data=architecture.batches(count=4), **{"method": "basis-sharing", **options}, keep=keep
    )


@pytest.mark.parametrize("name", CLASSES)
def test_each_basis_is_stored_once_and_loads_as_one(name, tmp_path):
    _, result = compressed(name)
    batch = BY_NAME[name].batches()[0]
    logits = output(result.model, batch)
    ties = shared_parameters(result.model)
    assert ties == {f"{n}.first.weight": f"{c.basis}.first.weight" for n, c in result.plan.choices.items() if c.basis}
    assert ties
    kept = result.report["kept"]
    assert 0.45 < kept["of_sites"] <= 0.5
    assert result.report["sizes"]["sites"]["after"]["elements"] - biases(result) == kept["matrix_elements_after"]
    rows = result.report["sites"]
    assert sum(row["after"]["elements"] for row in rows) == result.report["sizes"]["sites"]["after"]["elements"]
    assert sum(row["after"]["bytes"] for row in rows) == result.report["sizes"]["sites"]["after"]["bytes"]
    result.save_pretrained(tmp_path / "m")
    written = stored(tmp_path / "m")
    assert sum(t.numel() for t in written.values()) == result.report["sizes"]["model"]["after"]["elements"]
    assert not set(ties) & set(written)
    assert set(ties.values()) <= set(written)
    plan = json.loads((tmp_path / "m" / "eckart" / "plan.json").read_text())
    assert sum("basis" in entry for entry in plan["sites"].values()) == len(ties)
    again, info = CLASSES[name].from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    again.eval()
    assert shared_parameters(again) == ties
    assert torch.equal(output(again, batch), logits)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(output(eckart.load(tmp_path / "twice"), batch), logits)
    assert shared_parameters(again.to(torch.bfloat16)) == ties
    dense = eckart.densify(eckart.load(tmp_path / "m"))
    close(output(dense, batch), logits, 1e-4)
    assert not shared_parameters(dense)
    head = dense.get_output_embeddings()
    assert (head.weight is dense.get_input_embeddings().weight) == (name != "llama")


def biases(result):
    modules = [result.model.get_submodule(row["site"]) for row in result.report["sites"]]
    return sum(module.dense_bias().numel() for module in modules if module.dense_bias() is not None)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_error_is_the_singular_tail_of_the_stacked_problem(name):
    """Of the sum over the group's layers of the squared errors of their outputs, on the text itself."""
    model, batch = deep(name), BY_NAME[name].batches(rows=8, count=1)
    result = eckart.compress(model, data=batch, method="basis-sharing", keep=0.5)
    for group in result.plan.bases:
        seen = {}
        handles = [
            model.get_submodule(site).register_forward_pre_hook(lambda _, args, site=site: seen.update({site: args[0]}))  # noqa: B023
            for site in group
        ]
        output(model, batch[0])
        for handle in handles:
            handle.remove()
        inputs = {site: x.reshape(-1, x.shape[-1]).double() for site, x in seen.items()}
        weights = {site: dense_weight(model.get_submodule(site)).double() for site in group}
        values, vectors = torch.linalg.eigh(sum(x.mT @ x for x in inputs.values()))
        root = vectors * values.clamp_min(0).sqrt()
        tail = torch.linalg.svdvals(torch.cat([root.mT @ weight.mT for weight in weights.values()], 1))
        rank = result.plan.choices[group[0]].rank
        expected = float(tail[rank:].square().sum())
        gram = sum(x.mT @ x for x in inputs.values())
        changes = [weights[n] - result.model.get_submodule(n).to_dense().detach().double() for n in group]
        assert sum(float(((d @ gram) * d).sum()) for d in changes) == pytest.approx(expected, rel=1e-4)


def test_of_one_layer_it_is_drone():
    _, alone = compressed("llama", layers_per_basis=1)
    _, drone = compressed("llama", method="drone")
    assert alone.plan.choices == drone.plan.choices
    batch = BY_NAME["llama"].batches()[0]
    assert torch.equal(output(alone.model, batch), output(drone.model, batch))


def test_of_full_rank_nothing_changes(tmp_path):
    model, batch = deep("llama"), BY_NAME["llama"].batches()[0]
    shapes = {site.name: site.shape for site in find_sites(model).chosen}
    choices = {name: Choice("lowrank", min(shape)) for name, shape in shapes.items()}
    for one, other in adjacent(find_sites(model).chosen, model):
        rank = min(2 * shapes[one][0], shapes[one][1])
        choices |= {one: Choice("shared-basis", rank), other: Choice("shared-basis", rank, basis=one)}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(Plan(choices).to_json()))
    result = eckart.compress(model, data=BY_NAME["llama"].batches(count=4), method="drone", plan=str(file))
    assert shared_parameters(result.model)
    close(output(result.model, batch), output(model, batch), 1e-4)


def test_a_plan_is_replayed_and_its_metric_looked_at(tmp_path):
    model, result = compressed("llama", layers_per_basis=3)
    assert {len(group) for group in result.plan.bases} == {3}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(result.plan.to_json()))
    data, batch = BY_NAME["llama"].batches(count=4), BY_NAME["llama"].batches()[0]
    again = eckart.compress(model, data=data, method="drone", plan=str(file))
    assert again.plan.choices == result.plan.choices
    assert torch.equal(output(again.model, batch), output(result.model, batch))
    with pytest.raises(UsageError, match=r"--method kfac: its metric weighs the outputs"):
        eckart.compress(model, data=data, method="kfac", plan=str(file))


def test_other_metrics_and_no_data():
    for options in ({"metric": "asvd"}, {"metric": "svd"}, {"method": "svd", "form": "shared-basis"}):
        _, result = compressed("llama", **options)
        assert shared_parameters(result.model)
        assert result.report["kept"]["of_sites"] <= 0.5
    bare = eckart.compress(deep("llama"), method="svd", form="shared-basis", keep=0.5)  # runs its own dummy inputs
    assert groups_of(bare.plan) == groups_of(result.plan)
    images = BY_NAME["vit"].model()
    images.config.image_size = 7  # not what it was built for: it takes no image of this size
    with pytest.raises(UsageError, match=r"no pass runs through ViTForImageClassification without data.*Give --data"):
        eckart.compress(images, method="svd", form="shared-basis", keep=0.5)


def test_a_small_budget_is_refused_before_anything_is_run():
    with pytest.raises(UsageError, match=r"--keep 0\.01 .*The smallest keep that can be reached is"):
        eckart.compress(deep("llama"), data="org/nowhere", method="basis-sharing", keep=0.01)


def test_compared_with_other_methods():
    model, data = deep("llama"), BY_NAME["llama"].batches(count=4)
    rows = eckart.compare(model, data=data, methods=["basis-sharing", "drone"], keeps=[0.5])
    for method, keep, result in rows:
        assert bool(shared_parameters(result.model)) == (method == "basis-sharing")
        assert result.report["kept"]["of_sites"] <= keep
        single = eckart.compress(model, data=data, method=method, keep=keep)
        assert single.plan.choices == result.plan.choices
        close(output(result.model, data[0]), output(single.model, data[0]), 1e-4)


# -- window by window --------------------------------------------------------------------------------


def statistics(width, seed):
    moments = Moments.empty({"gram"})
    for statistic in moments.shared.values():
        statistic.update(normal(40, width, seed=seed).float())
    moments.sequences = 4
    return moments


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 12), "o": nn.Linear(8, 8)}) for _ in range(3))


def filled(windows, bases, store=None):
    model = Blocks().double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    sites = {site.name: site for site in find_sites(model).chosen}
    limits = {name: (Choice("shared-basis" if name.endswith("q") else "lowrank", 4),) for name in sites}
    settings = Settings.of(METHODS["basis-sharing"], Recipe())
    factors = FactorStore(store or MemoryStore(), Processes(), torch.device("cpu"))
    done = factors.finished_windows()
    SiteFactorizer(factors, model, sites, settings, limits, curve=False, bases=bases).run(
        window for window in windows if window.name not in done
    )
    return factors


def windows_of(layers):
    for i in layers:
        names = [f"layers.{i}.q", f"layers.{i}.o"]
        yield StatisticsWindow(f"segment-{i}", {n: (n,) for n in names}, {n: statistics(8, i) for n in names})


def test_windows_wait_for_each_other_in_any_order():
    whole = StatisticsWindow("whole", {}, {})
    for window in windows_of(range(3)):
        whole.groups.update(window.groups)
        whole.moments.update(window.moments)
    bases = [("layers.0.q", "layers.1.q", "layers.2.q")]
    expected = filled([whole], bases)
    for order in ((0, 1, 2), (2, 0, 1)):
        found = filled(windows_of(order), bases)
        assert set(found.summary.losses) == set(expected.summary.losses)
        for name in expected.summary.losses:
            for one, other in zip(found[name].factors[None].factors, expected[name].factors[None].factors, strict=True):
                close(one, other, 1e-9)


def test_a_run_that_was_broken_off_knows_what_waits():
    bases = [("layers.0.q", "layers.1.q")]
    expected = filled(windows_of(range(3)), bases)
    store = MemoryStore()

    def broken():
        yield next(iter(windows_of([0])))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(broken(), bases, store)
    found = filled(windows_of(range(3)), bases, store)
    for name in ("layers.0.q", "layers.1.q"):
        assert torch.equal(found[name].factors[None].left, expected[name].factors[None].left)


def test_a_site_that_nothing_reaches_leaves_its_group():
    bases = [("layers.0.q", "layers.1.q", "layers.2.q")]
    summary = filled(windows_of([0, 1]), bases).summary  # the last one's window never comes
    assert {name for name in summary.losses if name.endswith("q")} == {"layers.0.q", "layers.1.q"}
    assert summary.dense == {}
    empty = list(windows_of(range(3)))
    empty[1].moments["layers.1.q"] = Moments.empty({"gram"})
    summary = filled(empty, bases).summary
    assert {name for name in summary.losses if name.endswith("q")} == {"layers.0.q", "layers.2.q"}
    assert summary.dense == {"layers.1.q": "no token of the calibration data reached it"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("workdir"))


def streamed(workdir, output, stream):
    recipe = Recipe(
        model=str(workdir.model), data=str(workdir.text), num_samples=12, max_seq_length=32, batch_size=4,
        method="basis-sharing", keep=0.5, dtype="float32", stream=stream,
    )  # fmt: skip
    return eckart.compress(recipe=recipe, output_dir=output)


@pytest.fixture(scope="module")
def small(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "small"
    return folder, streamed(workdir, folder, "off")


def test_block_by_block_it_is_the_same(workdir, small, tmp_path):
    (folder, whole), part = small, streamed(workdir, tmp_path / "part", "on")
    assert part.report["calibrated"].startswith("block by block")
    assert part.plan.choices == whole.plan.choices
    assert any(choice.basis for choice in part.plan.choices.values())
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    logits = output(eckart.load(folder), inputs)
    loaded = eckart.load(tmp_path / "part")
    close(output(loaded, inputs), logits, 1e-4)
    assert len(shared_parameters(loaded)) == 10


# -- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recovery", ["distil", "lora"])
def test_training_keeps_what_is_shared(workdir, small, tmp_path, recovery, monkeypatch):
    monkeypatch.setattr("eckart.recovery.result.is_better", lambda *_: True)  # four steps bring little
    folder, result = small
    ties = shared_parameters(result.model)
    quick = {"max_steps": 4, "batch_size": 4, "max_seq_length": 16, "num_samples": 20, "eval_samples": 4}
    tuned = eckart.tune(
        folder, data=str(workdir.text), teacher=str(workdir.model), recovery=recovery, learning_rate=3e-3, **quick
    )
    assert tuned.report["kept"] == "after"
    assert shared_parameters(tuned.model) == ties
    assert count_sizes(tuned.model).model == count_sizes(result.model).model
    basis = next(iter(ties))
    moved = not torch.equal(tuned.model.get_parameter(basis), result.model.get_parameter(basis))
    assert moved == (recovery == "distil")
    assert any("weights are shared" in note for note in tuned.report["notes"]) == (recovery == "lora")
    tuned.save_pretrained(tmp_path / "tuned")
    assert not set(ties) & set(stored(tmp_path / "tuned"))
    again = eckart.load(tmp_path / "tuned")
    assert shared_parameters(again) == ties
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    assert torch.equal(output(again, inputs), output(tuned.model, inputs))
