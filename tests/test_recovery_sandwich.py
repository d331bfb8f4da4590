"""The Subformer's sandwich as a recovery: what is shared, what it starts from, what is published, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME, output
from problems import close
from safetensors import safe_open
from tiny import DEMO, llama, text
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuning_problem import bert, gpt2, logits, prepare_model, train

import eckart
from eckart.calibration.layerwise import all_blocks
from eckart.checkpoint.description import attach_config
from eckart.errors import UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.linalg import Problem, kronecker_factorize, rearranged_back
from eckart.model import shared_parameters
from eckart.recovery import RecoveryContext, Sandwich, make_recovery

QUICK = {"max_steps": 4, "batch_size": 4, "max_seq_length": 16, "learning_rate": 3e-3, "num_samples": 40,
         "eval_samples": 8}  # fmt: skip
TASK = {"logits": 0.0, "hidden": 0.0, "task": 1.0}
MAKERS = {"bert": lambda: bert(num_hidden_layers=5), "gpt2": lambda: gpt2(n_layer=5)}


class Asked:
    temperature = 2.0


def prepared(model, teacher=None, **options):
    recovery = Sandwich(**options)
    context = RecoveryContext(teacher or model, "classification", Asked(), 20)
    recovery.prepare(model, context)
    return recovery, context


def numbers(block):
    return [p.detach().clone() for p in block.parameters()]


def central_of(model):
    blocks = all_blocks(model)
    return [model.get_submodule(block) for block in blocks[1:-1]]


# -- what is shared ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["mean", "middle"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_all_blocks_but_the_first_and_the_last_are_one(make, start):
    model, original = make(), make()
    blocks = all_blocks(model)
    before = sum(p.numel() for p in model.parameters())
    recovery, _ = prepared(model, start=start)
    first, *others = central_of(model)
    for other in others:
        for name, parameter in other.named_parameters():
            assert parameter is first.get_parameter(name)
    for block in (blocks[0], blocks[-1]):
        for name, parameter in model.get_submodule(block).named_parameters():
            assert torch.equal(parameter, original.get_submodule(block).get_parameter(name))
            assert parameter is not first.get_parameter(name)
    theirs = [numbers(block) for block in central_of(original)]
    for i, parameter in enumerate(first.parameters()):
        expected = theirs[1][i] if start == "middle" else torch.stack([t[i] for t in theirs]).mean(0)
        close(parameter, expected, 1e-6)
        assert parameter.requires_grad
    once = sum(p.numel() for p in first.parameters())
    report = recovery.report()
    assert report["elements_before"] == before
    assert report["elements_after"] == before - 2 * once == count_sizes(model).model.elements
    assert report["shared"] == {blocks[0].rpartition(".")[0]: blocks[1:-1]}
    assert recovery.shrinks
    assert Sandwich().start == "mean"


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_they_learn_together_and_from_the_task_alone(make):
    model, teacher = make(), make()
    recovery, _ = prepared(model, teacher, **TASK)
    ties = shared_parameters(model)
    start = numbers(central_of(model)[0])
    train(model, recovery, 20, teacher)
    assert shared_parameters(model) == ties
    assert all(not torch.equal(a, b) for a, b in zip(start, central_of(model)[0].parameters(), strict=True) if a.any())
    assert recovery.finish(model) is model


def test_both_sides_of_an_encoder_decoder_and_a_short_list():
    model = BY_NAME["t5"].model(num_layers=4, num_decoder_layers=5)
    recovery, _ = prepared(model, hidden=0.0)
    assert {parent: len(names) for parent, names in recovery.report()["shared"].items()} == {
        "encoder.block": 2,
        "decoder.block": 3,
    }
    output(model, BY_NAME["t5"].batches()[0])
    model = BY_NAME["t5"].model(num_layers=2, num_decoder_layers=5)
    recovery, context = prepared(model, hidden=0.0)
    assert list(recovery.report()["shared"]) == ["decoder.block"]
    assert any("encoder.block share nothing: encoder.block has 2 blocks" in note for note in context.notes)


# -- factored models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lowrank", "pivoted", "shared-basis"])
def test_factored_blocks_start_from_the_best_factors_of_the_mean(form):
    dense = llama(num_hidden_layers=6)
    model = eckart.compress(dense, method="svd", form=form, keep=0.6, allocation="uniform").model
    blocks = central_of(model)
    name = "mlp.up_proj"
    mean = torch.stack([block.get_submodule(name).to_dense().detach().double() for block in blocks]).mean(0)
    first = model.get_submodule(all_blocks(model)[0]).get_submodule(name)
    outer = first.to_dense().detach().clone()
    prepared(model)
    found = blocks[0].get_submodule(name)
    assert found.form == form
    values = torch.linalg.svdvals(mean)
    error = (found.to_dense().detach().double() - mean).norm() ** 2
    assert float(error) == pytest.approx(float(values[found.rank :].square().sum()), rel=1e-3)
    for block in blocks:
        assert torch.equal(block.get_submodule(name).to_dense(), found.to_dense())
        assert all(p is found.get_parameter(n) for n, p in block.get_submodule(name).named_parameters())
    assert torch.equal(first.to_dense(), outer)  # also where it shared its basis with the second block
    assert all(p is not found.get_parameter(n) for n, p in first.named_parameters())


def test_products_start_from_the_nearest_ones_to_the_mean(tmp_path):
    dense = llama(num_hidden_layers=6)
    sites = {f"model.layers.{i}.mlp.up_proj": {"form": "kronecker", "rank": 2, "block": [16, 1]} for i in range(6)}
    (tmp_path / "plan.json").write_text(json.dumps({"format_version": 1, "sites": sites}))
    model = eckart.compress(dense, method="svd", plan=str(tmp_path / "plan.json")).model
    weights = [model.get_submodule(name).to_dense().detach().double() for name in list(sites)[1:-1]]
    prepared(model)
    found = model.get_submodule("model.layers.1.mlp.up_proj")
    left, right = kronecker_factorize(Problem(torch.stack(weights).mean(0)), (16, 1), 2).truncated(2)
    close(found.to_dense(), rearranged_back(left @ right, (48, 32), (16, 1)), 1e-5)


@pytest.mark.parametrize("start", ["mean", "middle"])
def test_a_factored_model_is_published_and_loaded(start, tmp_path):
    dense = llama(num_hidden_layers=6)
    model = eckart.compress(dense, method="svd", form="pivoted", keep=0.6).model
    prepared(model, start=start)
    attach_config(model)
    model.save_pretrained(tmp_path)
    again = eckart.load(tmp_path)
    ids = {"input_ids": torch.arange(20).view(2, 10)}
    assert torch.equal(output(again, ids), output(model, ids))
    assert shared_parameters(again) == shared_parameters(model)
    assert written(tmp_path) == count_sizes(model).model.elements
    close(output(eckart.densify(again), ids), output(model, ids), 1e-4)


def written(folder):
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


# -- refusals ----------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(UsageError, match=r"recovery sandwich: bert\.encoder\.layer has 3 blocks, .* it takes 4"):
        prepared(bert(num_hidden_layers=3))
    with pytest.raises(UsageError, match=r"albert_layer_groups has 1 blocks"):
        prepared(BY_NAME["albert"].model())
    with pytest.raises(UsageError, match="start must be one of mean, middle, not 'first'"):
        make_recovery("sandwich", {"start": "first"})
    odd = bert(num_hidden_layers=5)
    odd.bert.encoder.layer[2].intermediate.dense = torch.nn.Linear(16, 40)
    with pytest.raises(
        UsageError, match=r"layer\.1 and bert\.encoder\.layer\.2 differ.*intermediate\.dense\.weight is \(32, 16\) in"
    ):
        prepared(odd)
    data = BY_NAME["llama"].batches(count=4)
    uneven = eckart.compress(BY_NAME["llama"].model(num_hidden_layers=6), data=data, method="kfac", allocation="loss")
    with pytest.raises(UsageError, match=r"differ, so that they cannot share weights: .*--allocation uniform"):
        prepared(uneven.model)
    shared = eckart.compress(
        BY_NAME["llama"].model(num_hidden_layers=6, num_key_value_heads=1),
        data=data,
        method="basis-sharing",
        keep=0.9,
    ).model
    with pytest.raises(UsageError, match=r"k_proj of form shared-basis cannot hold the mean.*start=middle"):
        prepared(shared)


# -- whole trainings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandwich")
    text(folder)
    llama(num_hidden_layers=5, tie_word_embeddings=True).to(torch.float32).save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder / "dense")
    return folder


def test_a_tuned_model_is_published_loaded_trained_on_and_exported(place, tmp_path):
    options = {"data": place / "text.txt", "teacher": place / "dense", **QUICK}
    result = eckart.tune(place / "dense", recovery="sandwich", **options)
    training = result.report["training"]
    assert training["last_loss"] < training["first_loss"]
    assert result.report["kept"] == "after"  # the smaller model is what was asked for
    recovery = result.report["recovered_by"]
    assert recovery["elements_after"] < recovery["elements_before"]
    ids = {"input_ids": torch.arange(20).view(2, 10)}
    expected = output(result.model, ids)
    result.model.save_pretrained(tmp_path / "by-transformers")
    assert torch.equal(output(eckart.load(tmp_path / "by-transformers"), ids), expected)
    result.save_pretrained(tmp_path / "out")
    assert written(tmp_path / "out") == recovery["elements_after"] == count_sizes(result.model).model.elements
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(output(loaded.eval(), ids), expected)
    again = eckart.tune(tmp_path / "out", recovery="distil", **options)  # trained on, it stays shared
    assert shared_parameters(again.model) == shared_parameters(result.model)
    plain = eckart.export(tmp_path / "out", tmp_path / "plain")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    assert torch.equal(output(eckart.load(plain), ids), expected)


def test_untied_it_scores_as_it_did(place):
    model = prepare_model(bert(num_hidden_layers=5), Sandwich(**TASK, temperature=2.0), 4, bert(num_hidden_layers=5))
    expected = logits(model)
    attach_config(model)
    assert torch.equal(logits(eckart.densify(model)), expected)
