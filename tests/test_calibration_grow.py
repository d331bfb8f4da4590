"""Batches joined to larger ones: which, how large, and that no result depends on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from architectures import BY_NAME

import eckart
from eckart.calibration import calibrate
from eckart.calibration.grow_batches import (
    CPU_TOKENS,
    FLOAT32,
    GPU_TOKENS,
    RunningMemory,
    grow_batches,
    running_memory,
    tokens_at_once,
)
from eckart.data import Batch, load_data
from eckart.model import find_sites


def batch(first: int, rows: int, length: int, **more: torch.Tensor) -> Batch:
    ids = torch.arange(rows * length).view(rows, length) + first
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    return Batch(inputs, tuple(range(first, first + rows)))


def test_neighbors_of_one_length_are_joined_up_to_a_number_of_tokens():
    batches = [batch(0, 2, 5), batch(10, 1, 5), batch(20, 2, 5), batch(30, 2, 4), batch(40, 1, 4), batch(50, 9, 5)]
    grown = grow_batches(batches, 15)
    assert [one.examples for one in grown] == [(0, 1, 10), (20, 21), (30, 31, 40), tuple(range(50, 59))]
    for name in ("input_ids", "attention_mask"):
        joined = torch.cat([batches[0].inputs[name], batches[1].inputs[name]])
        assert torch.equal(grown[0].inputs[name], joined)
    assert grown[1] is batches[2]
    assert grow_batches(batches, 0) == batches
    assert grow_batches([], 15) == []


@pytest.mark.parametrize(
    "other",
    [
        batch(9, 2, 4, labels=torch.zeros(2)),
        batch(9, 2, 4, labels=torch.zeros(2, 2), bias=torch.zeros(2)),
        batch(9, 2, 4, labels=torch.zeros(2, dtype=torch.long), bias=torch.zeros(2)),
        batch(9, 2, 4, labels=torch.zeros(3), bias=torch.zeros(2)),
        batch(9, 2, 4, labels=torch.tensor(0.0), bias=torch.zeros(2)),
    ],
    ids=["other names", "other shapes", "other type", "no row for each example", "a number"],
)
def test_what_differs_in_more_than_its_rows_stays_apart(other):
    one = batch(0, 2, 4, labels=torch.zeros(2), bias=torch.zeros(2))
    assert len(grow_batches([one, other], 99)) == 2
    assert len(grow_batches([other, one], 99)) == 2
    assert len(grow_batches([one, batch(9, 1, 4, labels=torch.zeros(1), bias=torch.zeros(1))], 99)) == 1


def test_images_stay_as_they_are():
    images = [Batch({"pixel_values": torch.zeros(1, 3, 4, 4)}, (i,)) for i in range(3)]
    assert grow_batches(images, 99) == images


def test_memory_of_a_gpu_decides(monkeypatch):
    """All of it, not what is free: the same in every run."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100_000))
    cuda = torch.device("cuda")
    assert tokens_at_once(cuda, RunningMemory(100, 10_000)) == 400
    assert tokens_at_once(cuda, RunningMemory(1, 0)) == GPU_TOKENS
    assert tokens_at_once(cuda, RunningMemory(1, 60_000)) == 0
    assert tokens_at_once(torch.device("cpu"), RunningMemory(10**9, 10**12)) == CPU_TOKENS


def test_running_memory():
    model = BY_NAME["llama"].model()
    names = [site.name for site in find_sites(model).chosen]
    shapes = [site.shape for site in find_sites(model).chosen]
    block, vocabulary = sum(map(sum, shapes)) // 2, len(model.lm_head.weight)
    elements = sum(p.numel() for p in model.parameters())
    whole = running_memory(model, names, backward=True, blockwise=False)
    assert whole == RunningMemory(FLOAT32 * (4 * block + 6 * vocabulary), FLOAT32 * elements)
    one = running_memory(model, names, backward=False, blockwise=True)
    assert one.per_token == FLOAT32 * (block + 3 * vocabulary)
    assert one.fixed == whole.fixed - FLOAT32 * sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_statistics_do_not_depend_on_it(name):
    """Up to the rounding of float32: other products, and the same draws."""
    kind = BY_NAME[name]
    model = kind.model()
    data = load_data(kind.batches(rows=2, count=3), model=model)
    names = [site.name for site in find_sites(model).chosen]
    needs = frozenset({"gram", "gradients", "fisher"})
    plain = calibrate(model, names, data, needs=needs)
    grown = calibrate(model, names, data, needs=needs, grow=True)
    assert (plain.batch_tokens, grown.batch_tokens) == (0, CPU_TOKENS)
    calls = []
    handle = model.get_submodule(names[0]).register_forward_hook(lambda *_: calls.append(1))
    found = grown.moments
    handle.remove()
    assert len(calls) == 1
    for site, entry in plain.moments.items():
        state = found[site].state()
        for key, value in entry.state().items():
            scale = float(value.abs().max()) if value.dim() else 0.0
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-5 * scale)


def test_examples_that_share_a_call_stay_alone():
    kind = BY_NAME["deberta"]
    model = kind.model()
    data = load_data(kind.batches(rows=2, count=2), model=model)
    found = calibrate(
        model, [site.name for site in find_sites(model).chosen], data, needs=frozenset({"gram"}), grow=True
    )
    assert found.common
    assert found.batch_tokens == 0


def test_a_compression_grows_batches_unless_their_size_is_asked_for():
    kind = BY_NAME["llama"]
    data = kind.batches(rows=4, count=6)
    outputs, sizes = [], []
    for options in ({}, {"batch_size": 4}):
        model = kind.model()
        rows: list[int] = []
        handle = model.model.layers[0].input_layernorm.register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(len(args[0]))
        )
        result = eckart.compress(model, data=data, keep=0.6, form="lowrank", **options)
        handle.remove()
        sizes.append(max(rows))
        with torch.no_grad():
            outputs.append(torch.cat([result.model(input_ids=one["input_ids"]).logits for one in data]))
    assert sizes == [4 * 5, 4]  # one of six batches is held out
    # Rounding of the sums in float32, as factors and ranks pass it on.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3 * float(outputs[1].abs().max()))
