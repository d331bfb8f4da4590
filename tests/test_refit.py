"""The walk through two models and what is solved on it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import ZOO, Architecture

from eckart.data import Batch
from eckart.data.inference import evaluating, forward
from eckart.model import find_sites
from eckart.recover import moved
from eckart.recover.moved import MovedInputs
from eckart.recover.walk import Walker, block_of, chains

WALKED = [
    a
    for a in ZOO
    if a.name in {"llama", "gpt2", "bert", "t5", "bart", "vit", "gemma3", "gpt-neox", "deberta", "mixtral"}
]


@pytest.mark.parametrize("architecture", WALKED, ids=lambda a: a.name)
def test_walker_sees_what_a_plain_forward_sees(architecture: Architecture) -> None:
    model = architecture.model()
    batches = [Batch(inputs, tuple(range(4))) for inputs in architecture.batches(count=2)]
    names = [site.name for site in find_sites(model).chosen]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with evaluating(model):
        for batch in batches:
            calls: dict[str, torch.Tensor] = {}

            def note(name: str, module: object, args: tuple, kwargs: dict, calls: dict = calls) -> None:
                calls.setdefault(name, args[0] if args else next(iter(kwargs.values())))

            handles = [
                model.get_submodule(n).register_forward_pre_hook(partial(note, n), with_kwargs=True) for n in names
            ]
            forward(model, batch.inputs)
            for handle in handles:
                handle.remove()
            for name, x in calls.items():
                seen[name].append(x)
        checked = 0
        for blocks in chains(names, model):
            walker = Walker.start(model, blocks, [partial(forward, model, batch.inputs) for batch in batches])
            assert walker is not None
            for index, block in enumerate(blocks):
                for name in (n for n in names if block_of(n, model) == block):
                    for found, expected in zip(walker.inputs(index, name), seen[name], strict=True):
                        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                        checked += 1
                walker.advance(index)
    assert checked >= len(names)


def test_shared_blocks_are_no_chain() -> None:
    albert = next(a for a in ZOO if a.name == "albert")
    model = albert.model()
    names = [site.name for site in find_sites(model).chosen]
    with evaluating(model):
        for blocks in chains(names, model):
            assert Walker.start(model, blocks, [partial(forward, model, albert.batches()[0])]) is None


def pair(tokens: int = 4000, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    before = torch.randn(tokens, width, generator=stream) + 0.5
    return before, before @ torch.randn(width, width, generator=stream) + 0.1


@pytest.mark.parametrize("centred", [False, True])
def test_target_is_the_least_squares_answer(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "RIDGE", 0.0)
    monkeypatch.setattr(moved, "LEAST_RIDGE", 1e-12)
    before, now = pair()
    statistics = MovedInputs.empty(6, torch.device("cpu"))
    statistics.update(before[:1500], now[:1500], "x")
    statistics.update(before[1500:], now[1500:], "x")
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    x, y = (before - before.mean(0), now - now.mean(0)) if centred else (before, now)
    expected = torch.linalg.lstsq(y.double(), (x @ weight.mT).double()).solution.mT
    torch.testing.assert_close(statistics.target(weight, centred=centred).double(), expected, rtol=1e-3, atol=1e-3)


def test_inputs_that_did_not_move_leave_the_weight() -> None:
    before, _ = pair()
    statistics = MovedInputs.empty(6, torch.device("cpu"))
    statistics.update(before, before, "x")
    weight = torch.randn(5, 6)
    assert torch.equal(statistics.target(weight, centred=False), weight)


def test_nothing_seen_and_dead_inputs_leave_the_weight() -> None:
    statistics = MovedInputs.empty(6, torch.device("cpu"))
    weight = torch.randn(5, 6)
    assert torch.equal(statistics.target(weight, centred=False), weight)
    statistics.update(torch.randn(9, 6), torch.zeros(9, 6), "x")
    assert torch.equal(statistics.target(weight, centred=True), weight)
