"""Block by block or all at once: the same statistics, plan, factors and figures, whatever is kept where."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, Inputs, output
from torch import Tensor, nn
from transformers import PreTrainedModel

import eckart
from eckart.calibration import calibrate
from eckart.compression.workspace import Workspace
from eckart.data import load_data
from eckart.forms import FactoredLinear
from eckart.model import ComputePlacement, WeightLoader, find_sites
from eckart.moments import Moments
from eckart.storage.cache import Cache

MODELS = ("gpt2", "llama-tied", "t5", "albert", "mixtral")
# The default reads all that kfac and drone read, and allocates by it; svd reads nothing.
RUNS = [(name, "eckart") for name in MODELS]
RUNS += [("gemma3", "drone"), ("albert", "fwsvd"), ("llama", "fwsvd"), ("gpt2", "svd")]
EVERYTHING = frozenset({"gram", "absolute", "gradients", "fisher"})
FLOAT = ComputePlacement(torch.device("cpu"), torch.float32)


def batches(name: str) -> list[Inputs]:
    """Of two lengths where the model reads texts; one of them is held out to measure on."""
    found = BY_NAME[name].batches()
    found[1] = {key: value[:, :-3] for key, value in found[1].items()}
    return found


def block_by_block(folder: Path, memory: int = 0) -> Workspace:
    return Workspace(compute=FLOAT, hidden_states=Cache(memory=memory, folder=folder / "waiting", durable=True))


def products(model: nn.Module) -> dict[str, Tensor]:
    """The matrix that each factored module stands for."""
    return {n: m.to_dense().detach() for n, m in model.named_modules() if isinstance(m, FactoredLinear)}


def figures(found: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested JSON."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from figures(value, f"{path}/{key}")
    elif isinstance(found, list):
        for i, value in enumerate(found):
            yield from figures(value, f"{path}/{i}")
    elif isinstance(found, int | float):
        yield path, found


def near(found: Tensor, expected: Tensor, tolerance: float, where: str = "") -> None:
    assert found.shape == expected.shape
    off, scale = (found.double() - expected.double()).abs().max(), expected.double().abs().max()
    assert off <= tolerance * scale, f"{where}: {float(off):.2g} of {float(scale):.2g}"


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_a_run_block_by_block_gives_what_a_run_in_memory_gives(name, method, tmp_path):
    model, data = BY_NAME[name].model(), batches(name)
    options = {"data": data, "method": method, "keep": 0.6, "refit": method == "eckart"}
    whole = eckart.compress(model, **options)
    place = block_by_block(tmp_path)
    found = eckart.compress(model, workspace=place, **options)

    assert found.plan.choices == whole.plan.choices
    assert found.plan.predicted.keys() == whole.plan.predicted.keys()
    for site, loss in whole.plan.predicted.items():
        assert found.plan.predicted[site] == pytest.approx(loss, rel=1e-4), site
    matrices = products(found.model)
    assert matrices.keys() == products(whole.model).keys()
    assert any(choice.form != "dense" for choice in whole.plan.choices.values())
    for site, matrix in products(whole.model).items():
        near(matrices[site], matrix, 1e-4, site)
    near(output(found.model, data[0]), output(whole.model, data[0]), 1e-4)

    one, other = whole.report, found.report
    unlike = {key for key in one if one[key] != other[key]}
    assert unlike <= {"calibrated", "quality", "stages", "seconds", "notes", "sites"}
    for a, b in zip(one.get("stages", ()), other.get("stages", ()), strict=True):
        assert a == {**b, "distance": pytest.approx(b["distance"], rel=1e-3)}
    assert one["sizes"] == other["sizes"]
    for key in ("quality", "sites"):
        numbers = dict(figures(other[key]))
        assert numbers.keys() == dict(figures(one[key])).keys()
        for path, number in figures(one[key]):
            assert numbers[path] == pytest.approx(number, rel=1e-4, abs=1e-7), path
    assert dict(figures(one["quality"]))
    shared = name == "albert" and method == "fwsvd"
    how = "at once" if method == "svd" else "in whole passes, 1 blocks" if shared else "block by block, "
    assert one["calibrated"] == "at once"
    assert other["calibrated"].startswith(how)
    told = [re.sub(r"[\d.e-]+", "", note) for note in one["notes"]]
    if shared:
        assert "called by several blocks, and fisher needs all its calls together" in other["notes"].pop(0)
    assert [re.sub(r"[\d.e-]+", "", note) for note in other["notes"]] == told
    assert place.hidden_states is not None
    assert place.hidden_states.keys() == []


@pytest.mark.parametrize(("name", "some"), [("llama", 20_000)])
def test_memory_or_files_for_hidden_states_give_the_same_bits(name, some, tmp_path):
    model, data = BY_NAME[name].model(), batches(name)
    places = [block_by_block(tmp_path / str(memory), memory) for memory in (0, some)]
    first, other = (eckart.compress(model, data=data, keep=0.6, refit=True, workspace=place) for place in places)
    assert other.plan == first.plan
    state = other.model.state_dict()
    assert state.keys() == first.model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in first.model.state_dict().items())
    reports = [{key: value for key, value in it.report.items() if key != "seconds"} for it in (first, other)]
    assert reports[0] == reports[1]


# -- stored in half precision, computed in single --------------------------------------------------------------


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """As `from_pretrained(dtype=torch.bfloat16)` makes it: what is not stored stays as it is."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32."""
    wide = copy.deepcopy(model)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    return wide


def statistics(model: PreTrainedModel, name: str, needs: frozenset[str], **more: Any) -> tuple[dict[str, Moments], str]:
    """All of them, and how they were gathered."""
    data = load_data(batches(name), model=model)
    calibration = calibrate(model, [site.name for site in find_sites(model).chosen], data, needs=needs, **more)
    found: dict[str, Moments] = {}
    for window in calibration.windows():
        found |= window.moments
    return found, calibration.how


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("llama", frozenset({"gram"})),
        ("t5", EVERYTHING),
        ("albert", EVERYTHING),
    ],
)
def test_statistics_are_those_of_the_model_in_single_precision(name, needs, tmp_path):
    model = halved(BY_NAME[name].model())
    needs = needs - {"fisher"} if name == "albert" else needs
    expected, how = statistics(widened(model), name, needs)
    assert how == "at once"
    model.train()  # with dropout, were it run so
    waiting = Cache(0, tmp_path / "waiting", durable=True)
    found, how = statistics(model, name, needs, weights=WeightLoader(model, FLOAT), hidden_states=waiting)
    assert how.startswith("block by block")
    assert set(found) == set(expected)
    for site, entry in expected.items():
        one, other = found[site].state(), entry.state()
        assert one.keys() == other.keys()
        for key, tensor in other.items():
            if tensor.dim() == 0:
                assert int(one[key]) == int(tensor), (site, key)
            else:
                near(one[key], tensor, 1e-5, f"{site}, {key}")
    assert waiting.keys() == []


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize(("name", "method"), [("llama-tied", "eckart"), ("mixtral", "svd")])
def test_a_model_in_half_precision_is_left_as_it_was(name, method, tmp_path):
    """The same objects, types and bits, ties and modes, though all of it computed in float32 meanwhile."""
    model, data = halved(BY_NAME[name].model()), batches(name)
    model.train()
    before = tensors_of(model)
    bits = {key: tensor.detach().clone() for key, tensor in before.items()}
    flags = {key: (tensor.dtype, tensor.requires_grad, tensor.data_ptr()) for key, tensor in before.items()}
    result = eckart.compress(model, data=data, method=method, keep=0.6, workspace=block_by_block(tmp_path))
    after = tensors_of(model)
    assert list(after) == list(before)
    for key, tensor in after.items():
        assert tensor is before[key], key
        assert (tensor.dtype, tensor.requires_grad, tensor.data_ptr()) == flags[key]
        assert torch.equal(tensor, bits[key])
        assert tensor.grad is None
    for module_name, module in model.named_modules():
        assert module.training
        assert "forward" not in vars(module), module_name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.dtype == torch.bfloat16 for p in result.model.parameters())


@pytest.mark.parametrize(("name", "method"), [("llama", "kfac")])
def test_the_plan_of_a_model_in_half_precision_is_that_of_its_copy_in_single(name, method, tmp_path):
    model, data = halved(BY_NAME[name].model()), batches(name)
    whole = eckart.compress(widened(model), data=data, method=method, keep=0.6)
    found = eckart.compress(model, data=data, method=method, keep=0.6, workspace=block_by_block(tmp_path))
    assert found.plan.choices == whole.plan.choices
    matrices = products(found.model)
    for site, matrix in products(whole.model).items():
        near(matrices[site], matrix, 2**-6, site)  # the factors are rounded to 8 bits


# -- factors are kept up to what may be asked for ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "kfac"])
def test_a_plan_file_is_followed_block_by_block(method, tmp_path):
    model, data = BY_NAME["llama"].model(), batches("llama")
    names = [site.name for site in find_sites(model).chosen]
    forms = [{"form": "dense"} if i % 3 == 0 else {"form": "lowrank", "rank": 3 + i} for i in range(len(names))]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"format_version": 1, "sites": dict(zip(names, forms, strict=True))}))
    place = block_by_block(tmp_path)
    result = eckart.compress(model, data=data, method=method, plan=str(file), workspace=place)
    matrices = products(result.model)
    assert list(matrices) == [name for i, name in enumerate(names) if i % 3]
    whole = products(eckart.compress(model, data=data, method=method, plan=str(file)).model)
    for name, matrix in matrices.items():
        assert result.model.get_submodule(name).rank == 3 + names.index(name)
        near(matrix, whole[name], 1e-4, name)
    for name in set(names) - set(matrices):
        assert torch.equal(result.model.get_submodule(name).weight, model.get_submodule(name).weight)
