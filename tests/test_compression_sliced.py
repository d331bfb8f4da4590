"""Compression in form sliced: fewer neurons in feed-forward layers, other weights factored, or a stock checkpoint."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, output
from problems import close, normal
from safetensors.torch import load_file, save_file
from tiny import Workdir, llama, make_workdir, place, published
from torch import Tensor

import eckart
from eckart.checkpoint.load import load
from eckart.compression import refit, refit_slices
from eckart.compression.input_pairs import widened
from eckart.compression.neuron_layers import possible_layers
from eckart.compression.result import load_lines
from eckart.errors import ModelError, UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.model import dense_weight, sliced_features
from eckart.model.neurons import find_neurons
from eckart.moments.input_shift import InputShift

STOCK = """
import importlib.abc, json, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "eckart":
            raise ImportError("there is no eckart here")

sys.meta_path.insert(0, Refused())
try:
    import eckart
except ImportError:
    pass
else:
    raise SystemExit("eckart was imported")
import torch, transformers
from safetensors.torch import load_file

answers = {}
for name, (folder, auto, inputs) in json.loads(sys.argv[1]).items():
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        made = model.eval()(**load_file(inputs))
    apart = float((made.logits - load_file(f"{inputs}.expected")["logits"]).abs().max())
    answers[name] = [apart, {key: sorted(map(str, value)) for key, value in info.items() if value}]
print(json.dumps(answers))
"""


def compressed(name: str, **options: Any) -> tuple[Any, eckart.Result]:
    model = BY_NAME[name].model()
    if "plan" not in options:
        options = {"form": "sliced", "keep": 0.7, **options}
    options = {"refit": False, **options}
    return model, eckart.compress(model, data=BY_NAME[name].batches(rows=8, count=4), **options)


def forms(result: eckart.Result) -> set[str]:
    return {choice.form for choice in result.plan.choices.values()}


def ranks(result: eckart.Result) -> set[int]:
    return {choice.rank for choice in result.plan.choices.values() if choice.form == "sliced"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "phi3", "mixtral", "vit"])
def test_layers_lose_neurons_within_the_budget(name):
    model, result = compressed(name)
    assert "sliced" in forms(result)
    assert len(ranks(result)) > (name != "vit")  # one size a layer
    features = sliced_features(result.model)
    assert set(features) == {n for n, choice in result.plan.choices.items() if choice.form == "sliced"}
    for site, found in features.items():
        choice = result.plan.choices[site]
        assert found.kept == choice.rank
        weight = result.model.get_submodule(site).weight
        assert weight.numel() == choice.stored(*shape_of(model, result, site))
    assert 0.6 < result.report["kept"]["of_sites"] <= 0.7
    sizes = count_sizes(result.model, list(result.plan.choices)).named
    after = result.report["sizes"]["sites"]["after"]
    assert (sizes.elements, sizes.multiply_adds) == (after["elements"], after["multiply_adds"])
    inputs = BY_NAME[name].batches(count=1)[0]
    before = output(model, inputs)
    assert float((output(result.model, inputs) - before).norm()) < 0.5 * float(before.norm())
    assert not sliced_features(model)


def shape_of(model: Any, result: eckart.Result, site: str) -> tuple[int, int]:
    return next(tuple(row["shape"]) for row in result.report["sites"] if row["site"] == site)


def test_predicted_loss_decides_between_layers():
    _, loss = compressed("llama")
    _, uniform = compressed("llama", allocation="uniform")
    assert ranks(uniform) == {32}
    assert forms(uniform) == {"sliced", "joint", "lowrank"}
    predicted = {n: row["predicted_loss"] for n, row in loss.plan.to_json()["sites"].items() if "predicted_loss" in row}
    readers = [name for name in predicted if name.endswith("down_proj")]
    assert len(readers) == 2
    # What makes the neurons has no loss of its own.
    assert not [name for name in predicted if name.endswith(("gate_proj", "up_proj"))]
    inputs = BY_NAME["llama"].batches(rows=32, count=1, seed=7)[0]
    before = output(BY_NAME["llama"].model(), inputs)
    apart = [float((output(each.model, inputs) - before).square().sum()) for each in (loss, uniform)]
    assert apart[0] < apart[1]


@pytest.mark.parametrize("method", ["svd", "drone"])
def test_other_methods(method):
    _, result = compressed("llama", method=method)
    assert ranks(result) == {32}
    assert forms(result) == {"sliced", "lowrank"}
    assert ("approximate" in result.report["exact_for"]) == (method == "drone")


def test_everything_is_kept():
    for allocation in ("loss", "uniform"):
        _, result = compressed("llama", keep=1.0, allocation=allocation)
        assert forms(result) == {"dense"}
        assert not sliced_features(result.model)


def test_too_small_a_budget_is_refused():
    with pytest.raises(UsageError, match=r"--keep 0\.001 .*smallest keep that can be reached is"):
        compressed("llama", keep=0.001)
    with pytest.raises(UsageError, match=r"--keep 0\.1 .*smallest keep that can be reached is 0\.4"):
        compressed("llama", keep=0.1, stock=True)
    with pytest.raises(UsageError, match=r"--keep 0\.1 .*smallest keep that can be reached is 0\.4"):
        compressed("llama", keep=0.1, stock=True, allocation="uniform")


def test_targets_leave_layers_whole():
    _, result = compressed("llama", targets=["*.layers.0.mlp.*", "layers.1.mlp.gate_proj"], keep=0.8)
    sliced = {name for name, choice in result.plan.choices.items() if choice.form == "sliced"}
    assert sliced == {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}


# -- the refit ------------------------------------------------------------------------------------------


def moved_neurons(width: int = 9, count: int = 5, tokens: int = 400, offset: float = 0.5) -> tuple[Tensor, Tensor]:
    """Neurons of an original, and of those that are left, moved ones."""
    before = normal(tokens, width) @ normal(width, width, seed=1) + offset
    now = before[:, [0, 2, 3, 5, 8][:count]] + 0.3 * normal(tokens, count, seed=2) + 0.2 * before[:, [1]]
    return before, now


@pytest.mark.parametrize("centered", [False, True])
def test_a_reader_is_fitted_to_what_it_reads_now(centered, monkeypatch):
    monkeypatch.setattr(refit_slices, "RIDGE", 0.0)
    monkeypatch.setattr(refit_slices, "LEAST_RIDGE", 1e-12)
    before, now = moved_neurons()
    weight = normal(4, 9, seed=3)
    shift = InputShift.empty(9, torch.device("cpu"))
    for part in (slice(0, 150), slice(150, 400)):
        shift.update(before[part], widened(now[part], 9))
    shift.require_finite("down")
    found = refit_slices.refit_reader(shift, weight, normal(4, 5, seed=4), centered=centered)
    x, y = (rows - rows.mean(0) if centered else rows for rows in (before, now))
    close(found.mT, torch.linalg.lstsq(y, x @ weight.mT).solution, 1e-4)


def test_directions_that_were_not_seen_keep_the_corrected_weight():
    before, now = moved_neurons(tokens=40)
    now = torch.cat([now[:, :4], torch.zeros(40, 1, dtype=now.dtype)], 1)  # the last neuron never fires
    shift = InputShift.empty(9, torch.device("cpu"))
    shift.update(before, widened(now, 9))
    shift.require_finite("down")
    old = normal(4, 5, seed=4)
    found = refit_slices.refit_reader(shift, normal(4, 9, seed=3), old, centered=False)
    close(found[:, 4], old[:, 4], 1e-9)
    assert float((found[:, :4] - old[:, :4]).abs().amin()) > 0
    nothing = InputShift.empty(9, torch.device("cpu"))
    nothing.update(before, torch.zeros_like(before))
    nothing.require_finite("down")
    assert torch.equal(refit_slices.refit_reader(nothing, normal(4, 9, seed=3), old, centered=False), old)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("gpt2", {}), ("bart", {}), ("phi3", {"stock": True}), ("gpt2", {"stock": True})],
    ids=["llama", "gpt2", "bart", "phi3 stock", "gpt2 stock"],
)
def test_refit_comes_nearer_and_keeps_the_sizes(name, options):
    model = BY_NAME[name].model()
    data, inputs = BY_NAME[name].batches(rows=8, count=18), BY_NAME[name].batches(rows=32, count=1, seed=9)[0]
    before = output(model, inputs)
    apart, found = [], []
    for fitted in (False, True):
        result = eckart.compress(
            model, data=data, form="sliced", keep=0.6 + 0.1 * len(options), refit=fitted, **options
        )
        apart.append(float((output(result.model, inputs) - before).norm()))
        found.append(result)
    assert apart[1] < 0.99 * apart[0]
    assert found[0].plan.choices == found[1].plan.choices
    assert sliced_features(found[0].model) == sliced_features(found[1].model)
    assert not [note for note in found[1].report["notes"] if "refit" in note and "pooler" not in note]
    for site, choice in found[1].plan.choices.items():
        if choice.form == "sliced":
            one, other = (result.model.get_submodule(site) for result in found)
            assert one.weight.shape == other.weight.shape
            # What makes neurons in the first layer may read what it always did.
            assert choice.basis is not None or not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("distances", "kept"),
    [((3, 2, 1), "partly"), ((3, 1, 2), "all"), ((1, 2, 3), "none"), ((1, 3, 2), "none")],
    ids=["slices stay", "all", "worse", "both worse"],
)
def test_held_out_text_says_which_refit_is_kept(distances, kept, monkeypatch):
    measured: list[Any] = []
    measure = refit.measure_quality

    def noting(*args: Any) -> Any:
        measured.append(measure(*args))
        return measured[-1]

    monkeypatch.setattr(refit, "measure_quality", noting)
    monkeypatch.setattr(
        refit, "distance_to_original", lambda found: distances[next(i for i, m in enumerate(measured) if m is found)]
    )
    model, plain = compressed("llama", keep=0.6)
    result = eckart.compress(model, data=BY_NAME["llama"].batches(rows=8, count=4), form="sliced", keep=0.6, refit=True)
    assert len(measured) == 3
    last = "model.layers.1.mlp.down_proj"
    factored = next(n for n, c in plain.plan.choices.items() if "layers.1" in n and c.form not in ("sliced", "dense"))
    for name, changed in ((last, kept == "all"), (factored, kept != "none")):
        one, other = (dense_of(each.model.get_submodule(name)) for each in (plain, result))
        assert torch.equal(one, other) != changed
    notes = " ".join(result.report["notes"])
    assert ("layers with fewer neurons were not refitted" in notes) == (kept == "partly")
    assert ("the refit was left out" in notes) == (kept == "none")
    quality = result.report["quality"]["agreement"]
    assert quality == measured[("none", "all", "partly").index(kept)]["agreement"]


def dense_of(module: Any) -> Tensor:
    return module.to_dense() if hasattr(module, "to_dense") else dense_weight(module)


# -- a plan file --------------------------------------------------------------------------------------


def test_a_plan_makes_the_same_model_and_what_cannot_be_is_refused(tmp_path):
    _, first = compressed("llama")
    file = tmp_path / "plan.json"
    plan = first.plan.to_json()
    file.write_text(json.dumps(plan))
    _, again = compressed("llama", plan=str(file))
    assert again.plan.choices == first.plan.choices
    inputs = BY_NAME["llama"].batches(count=1)[0]
    close(output(again.model, inputs), output(first.model, inputs), 1e-6)
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    assert plan["sites"][up]["basis"] == down
    rank = plan["sites"][down]["rank"]
    edits: list[tuple[dict[str, Any], str]] = [
        ({up: {"rank": rank - 1}}, f"site {up}: {rank - 1} neurons, but {down}, which reads them, keeps {rank}"),
        ({up: {"form": "dense"}}, f"site {up}: {down} keeps {rank} neurons, and .* give all of them form sliced"),
        ({up: {"basis": None}}, f"site {up}: .*give all of them form sliced with that rank and basis {down!r}"),
        ({up: {"block": [5, 5]}}, "must be two whole numbers"),
        ({up: {"block": [1, 1]}}, "neither whole columns nor whole rows"),
        ({"model.layers.0.self_attn.o_proj": {"form": "sliced", "rank": 4, "block": [32, 1]}}, "no trial of the model"),
    ]
    for changes, message in edits:
        sites = {name: {**entry, **changes.get(name, {})} for name, entry in plan["sites"].items()}
        sites = {
            name: {key: value for key, value in entry.items() if value is not None} for name, entry in sites.items()
        }
        file.write_text(json.dumps({**plan, "sites": sites}))
        with pytest.raises(UsageError, match=message):
            compressed("llama", plan=str(file))


# -- stock checkpoints ---------------------------------------------------------------------------------


def test_transformers_alone_loads_a_stock_checkpoint(server, tmp_path):
    jobs = {}
    for name in ("llama", "gpt2", "mixtral", "bart"):
        model, result = compressed(name, form=None, stock=True, keep=0.75)
        assert forms(result) == {"sliced", "dense"}
        assert len(ranks(result)) == 1
        assert not sliced_features(result.model)
        assert 0.5 < result.report["kept"]["of_sites"] <= 0.75
        inputs = BY_NAME[name].batches(count=1)[0]
        folder, file = result.save_pretrained(tmp_path / name), tmp_path / f"{name}.inputs"
        save_file({key: value.contiguous() for key, value in inputs.items()}, file)
        save_file({"logits": output(result.model, inputs).contiguous()}, f"{file}.expected")
        config = json.loads((folder / "config.json").read_text())
        assert "quantization_config" not in config
        assert "auto_map" not in config
        assert "import eckart" not in load_lines(result, folder) + (folder / "README.md").read_text()
        old = model.config.to_dict()
        changed = {key: value for key, value in config.items() if type(value) is int and value != old.get(key)}
        assert set(changed.values()) == ranks(result)
        jobs[name] = (str(folder), BY_NAME[name].auto, str(file))
    answers = json.loads(server.run_code(STOCK, json.dumps(jobs), bare=True).strip().splitlines()[-1])
    for name, (apart, info) in answers.items():
        assert not info, name
        assert apart < 1e-4 * (1 + float(load_file(f"{jobs[name][2]}.expected")["logits"].abs().max())), name


def test_a_stock_checkpoint_is_compressed_further(tmp_path):
    _, result = compressed("llama", form=None, stock=True)
    again = load(result.save_pretrained(tmp_path / "out"))
    further = eckart.compress(again, data=BY_NAME["llama"].batches(rows=8, count=4), form="sliced", refit=False)
    assert "sliced" in forms(further)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bloom", {}, "BloomForCausalLM: no number of its configuration says how wide"),
        ("mamba", {}, "MambaForCausalLM: no feed-forward layer of it can lose neurons"),
        ("llama", {"form": "lowrank"}, "--stock --form lowrank: transformers alone loads ordinary layers"),
        ("llama", {"embeddings": "lowrank"}, "--stock --embeddings lowrank"),
        ("llama", {"ignore": ["layers.0.mlp.up_proj"]}, "no number of its configuration says how wide"),
    ],
    ids=["no number", "no layer", "form", "embeddings", "ignored"],
)
def test_what_cannot_be_stock_is_refused(name, options, message, monkeypatch):
    def late(*_: Any) -> None:
        raise AssertionError("statistics were gathered first")

    monkeypatch.setattr("eckart.compression.factorize.SiteFactorizer.run", late)
    with pytest.raises(UsageError, match=message):
        compressed(name, **{"form": None, "stock": True, **options})


def test_without_eckart_alone_its_other_checkpoints_are_refused(tmp_path):
    _, result = compressed("llama")
    folder = result.save_pretrained(tmp_path / "out")
    assert load_lines(result, folder).startswith("import eckart")
    assert "import eckart" in (folder / "README.md").read_text()
    again = load(folder)
    with pytest.raises(ModelError, match="already"):
        eckart.compress(again, data=BY_NAME["llama"].batches(count=2))


# -- block by block, interrupted, by several processes -------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Workdir:
    workdir = make_workdir(tmp_path_factory.mktemp("workdir"))
    place(llama(num_hidden_layers=2), workdir.model)
    return workdir


SLICED = ("--form", "sliced", "--dtype", "float32")


@pytest.fixture(scope="module")
def streamed(server, workdir, tmp_path_factory) -> Path:
    """What a run block by block publishes."""
    folder = tmp_path_factory.mktemp("streamed") / "out"
    done = server(workdir.words(folder, *SLICED, "--stream", "on"))
    assert done.code == 0, done.said
    return folder


def same_model(one: Path, other: Path) -> None:
    first, second = (load(folder) for folder in (one, other))
    assert sliced_features(first) == sliced_features(second)
    assert sliced_features(first)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        close(a, b, 1e-4)


def test_block_by_block_is_as_a_whole(server, workdir, streamed, tmp_path):
    done = server(workdir.words(tmp_path / "out", *SLICED, "--stream", "off"))
    assert done.code == 0, done.said
    same_model(tmp_path / "out", streamed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_an_interrupted_run_resumes(server, workdir, streamed, tmp_path):
    words = workdir.words(tmp_path / "out", *SLICED, "--stream", "on")
    killed = server(words, "<solve_site")
    assert killed.code == -9
    done = server(words)
    assert done.code == 0, done.said
    found, expected = published(tmp_path / "out"), published(streamed)
    assert found == expected
    (tmp_path / "late").mkdir()
    killed = server(workdir.words(tmp_path / "late/out", *SLICED, "--stream", "on"), "<_verify")
    assert killed.code == -9
    done = server(workdir.words(tmp_path / "late/out", *SLICED, "--stream", "on"))
    assert done.code == 0, done.said
    assert published(tmp_path / "late/out") == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_an_interrupted_refit_resumes(server, workdir, streamed, tmp_path):
    words = workdir.words(tmp_path / "out", *SLICED, "--stream", "on")
    ticks = server(workdir.words(tmp_path / "whole", *SLICED, "--stream", "on")).ticks
    last = max(i for i, tick in enumerate(ticks) if tick == "<Journal.write")
    assert server(words, last + 1).code == -9
    done = server(words)
    assert done.code == 0, done.said
    assert published(tmp_path / "out") == published(streamed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_make_the_model_of_one(server, workdir, streamed, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = workdir.words(tmp_path / "out", *SLICED, "--stream", "on")
    started = [server.start(words, environ={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)]
    done = [server.wait(one) for one in started]
    assert [one.code for one in done] == [0, 0], [one.said for one in done]
    same_model(tmp_path / "out", streamed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3", "mixtral", "bart", "gpt-neox", "vit", "t5"])
def test_layers_that_may_be_hold_those_that_are(name):
    model = eckart.model.with_separate_experts(BY_NAME[name].model())
    sites = eckart.model.find_sites(model).chosen
    layers, _ = find_neurons(model, sites, BY_NAME[name].batches(count=1)[0])
    guessed = {reader: set(writers) for reader, *writers in possible_layers(sites, model)}
    assert set(guessed) == {layer.reader for layer in layers}
    for layer in layers:
        assert set(layer.writers) <= guessed[layer.reader]


def test_factors_of_sliced_layers_are_not_made(monkeypatch):
    from eckart.compression import factorize

    seen: dict[str, int] = {}
    solve = factorize.solve_site

    def noting(site: Any, *args: Any, **named: Any) -> Any:
        found = solve(site, *args, **named)
        seen[site.name] = len(found.factors)
        return found

    monkeypatch.setattr(factorize, "solve_site", noting)
    model, _ = compressed("llama")
    layers, _ = find_neurons(model, eckart.model.find_sites(model).chosen, BY_NAME["llama"].batches(count=1)[0])
    inside = {name for layer in layers for name in layer.names}
    assert {name for name, count in seen.items() if count == 0} == inside
    seen.clear()
    compressed("llama", form=None, stock=True)
    assert set(seen.values()) == {0}
