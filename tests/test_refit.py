"""What the refit is given on its runner through two models, what it leaves alone, and what it solves."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from architectures import BY_NAME, ZOO
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Choice
from eckart.calibration.layerwise import LayerwiseError, LayerwiseRunner, trace_blocks
from eckart.compression.refit_groups import GroupRefit, refittable
from eckart.data import Batch, load_data
from eckart.data.inference import evaluating, forward
from eckart.errors import NumericalError
from eckart.methods import METHODS
from eckart.model import dense_weight, find_sites
from eckart.moments import Moments, common_calls, gather, input_shift, shared_inputs
from eckart.moments.input_shift import InputShift
from eckart.storage.cache import Cache


def names_of(model: PreTrainedModel) -> list[str]:
    return [site.name for site in find_sites(model).chosen]


def start_runner(model: PreTrainedModel, batches: list[Batch], name: str = "runner") -> LayerwiseRunner:
    def run(batch: Batch) -> Any:
        return forward(model, batch.inputs)

    store = Cache(sys.maxsize, None)
    chain = trace_blocks(model, names_of(model), run, batches[0].rows(0, 1), store)
    return LayerwiseRunner(chain, batches, store, name=name)


def plain_inputs(model: PreTrainedModel, batches: list[Batch], names: list[str]) -> dict[str, list[list[Tensor]]]:
    """Module -> for each batch what it is given, call by call, in one plain forward pass."""
    seen: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for batch in batches:
        for calls in seen.values():
            calls.append([])

        def note(name: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name][-1].append((args[0] if args else next(iter(kwargs.values()))).clone())

        handles = [
            model.get_submodule(n).register_forward_pre_hook(
                lambda *found, n=n, note=note: note(n, *found), with_kwargs=True
            )
            for n in seen
        ]
        forward(model, batch.inputs)
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_captured_inputs_are_those_of_a_plain_forward(architecture):
    """Every site of a block, those in its middle included, at every step that calls it."""
    model = architecture.model()
    batches = load_data(architecture.batches(count=2), model=model).batches
    with evaluating(model):
        seen = plain_inputs(model, batches, names_of(model))
        runner = start_runner(model, batches)
        inside = {
            n: runner.schedule.segments[n]
            for n, calls in seen.items()
            if all(calls) and n not in runner.schedule.between
        }
        captured = 0
        for step in range(runner.schedule.tail):
            for name, segments in inside.items():
                if step not in segments:
                    continue
                for batch, calls in zip(batches, seen[name], strict=True):
                    first = len(calls) // len(segments) * segments.index(step)  # of the calls in this step
                    torch.testing.assert_close(
                        runner.capture_input(step, batch, name), calls[first], rtol=1e-5, atol=1e-5
                    )
                    captured += 1
            runner.advance(step)
        for module in model.modules():
            assert not module._forward_pre_hooks
            assert "forward" not in vars(module)
    assert captured == len(batches) * sum(len(segments) for segments in inside.values())
    assert len(inside) >= 0.75 * len(seen)


def test_captured_input_depends_on_what_was_replaced_before_it_in_the_block():
    """And nothing behind the module runs."""
    architecture = BY_NAME["llama"]
    model = architecture.model()
    batches = load_data(architecture.batches(count=1), model=model).batches
    layer = model.model.layers[1]
    with evaluating(model):
        runner = start_runner(model, batches)
        runner.advance(0)
        before = runner.capture_input(1, batches[0], "model.layers.1.mlp.down_proj")
        layer.self_attn.o_proj.weight.data = -layer.self_attn.o_proj.weight.data
        expected = plain_inputs(model, batches, names_of(model))["model.layers.1.mlp.down_proj"][0][0]
        layer.mlp.down_proj.forward = None
        found = runner.capture_input(1, batches[0], "model.layers.1.mlp.down_proj")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - before).abs().max() > 0.1 * before.abs().max()


def test_capture_input_refuses_a_module_that_the_step_does_not_call():
    architecture = BY_NAME["llama"]
    model = architecture.model()
    batches = load_data(architecture.batches(count=1), model=model).batches
    with evaluating(model):
        runner = start_runner(model, batches)
        with pytest.raises(LayerwiseError, match=r"layers\.1\.mlp\.up_proj is not called in model\.layers\.0"):
            runner.capture_input(0, batches[0], "model.layers.1.mlp.up_proj")
        assert not model.model.layers[1].mlp.up_proj._forward_pre_hooks


# -- which sites are solved again ----------------------------------------------------------------------------


def refittable_of(name: str) -> tuple[dict[int, dict[str, tuple[str, ...]]], list[str], dict[str, tuple[str, ...]]]:
    architecture = BY_NAME[name]
    model = architecture.model()
    batches = load_data(architecture.batches(count=1), model=model).batches
    names, one = names_of(model), batches[0].rows(0, 1).inputs
    twice = {key: torch.cat([value, value]) for key, value in one.items()}
    with evaluating(model):
        groups = shared_inputs(model, names, lambda: forward(model, one))
        leave = common_calls(model, names, lambda: forward(model, one), lambda: forward(model, twice))
        steps, notes = refittable(groups, start_runner(model, batches), sorted(leave))
    return steps, notes, groups


def test_every_group_of_a_chain_is_solved_at_its_own_step():
    steps, notes, groups = refittable_of("llama")
    assert notes == []
    assert list(steps) == [0, 1]
    assert {leader: members for own in steps.values() for leader, members in own.items()} == groups
    assert all(f"layers.{step}." in name for step, own in steps.items() for m in own.values() for name in m)


def test_keys_and_values_of_all_decoder_layers_are_solved_layer_by_layer():
    steps, notes, groups = refittable_of("t5")
    assert notes == []
    crossing = next(members for members in groups.values() if len(members) == 4)
    parts = [members for own in steps.values() for members in own.values() if set(members) & set(crossing)]
    assert [len(members) for members in parts] == [2, 2]
    assert list(steps) == [0, 1, 2, 3]


def test_a_block_that_layers_share_is_left_as_it_is():
    steps, notes, _ = refittable_of("albert")
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert steps == {}
    assert notes[0].startswith(f"not refitted, called by several layers: {layer}.attention.query, ")
    assert notes[1:] == ["not refitted, outside the blocks: albert.encoder.embedding_hidden_mapping_in"]


def test_what_is_outside_the_blocks_is_left_as_it_is():
    steps, notes, groups = refittable_of("opt")
    assert notes == ["not refitted, outside the blocks: model.decoder.project_in, model.decoder.project_out"]
    assert {name for own in steps.values() for name in own} == {n for n in groups if "project_" not in n}


def test_what_reads_relative_positions_too_is_left_as_it_is():
    steps, notes, groups = refittable_of("deberta")
    prefix = "deberta.encoder.layer"
    left = [f"{prefix}.{i}.attention.self.{n}_proj" for i in (0, 1) for n in ("key", "query")]
    assert notes == [f"{name}: not refitted, it reads more than one input" for name in left]
    solved = {name for own in steps.values() for members in own.values() for name in members}
    assert solved == {name for members in groups.values() for name in members} - set(left)
    assert f"{prefix}.0.attention.self.value_proj" in solved


# -- what is solved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_site_gets_the_least_squares_answer_on_what_it_is_given_now(name, monkeypatch):
    """The sites of a block one after the other, each on the inputs that those before it leave; ranks stay."""
    monkeypatch.setattr(input_shift, "RIDGE", 0.0)
    monkeypatch.setattr(input_shift, "LEAST_RIDGE", 1e-6)  # the features behind a layer norm add up to a constant
    architecture = BY_NAME[name]
    model = architecture.model()
    batches = load_data(architecture.batches(rows=8), model=model).batches  # 288 tokens
    changed = copy.deepcopy(model)
    sites = {site.name: site for site in find_sites(model).chosen}
    with torch.no_grad():
        for site in list(sites)[:3]:  # what an earlier block lost
            weight = changed.get_submodule(site).weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    drone = METHODS["drone"]
    with evaluating(model, changed):
        groups = shared_inputs(model, list(sites), lambda: forward(model, batches[0].inputs))
        moments = gather(model, groups, batches, lambda batch: forward(model, batch.inputs) and None, needs=drone.needs)
        for site, entry in moments.items():
            entry.centered = sites[site].has_bias
        before, now = start_runner(model, batches, "before"), start_runner(changed, batches, "now")
        steps, notes = refittable(groups, before, [])
        assert notes == []
        choices = {n: Choice(DENSE) if i % 2 else Choice("lowrank", 9) for i, n in enumerate(sites)}
        work = GroupRefit(sites, choices, frozenset(sites), moments.__getitem__, drone)
        before.advance(0)
        now.advance(0)
        solved = [name for members in steps[1].values() for name in members]
        old = plain_inputs(model, batches, list(sites))
        assert work.step(before, now, 1, steps[1]) == (solved, [])
        new = plain_inputs(changed, batches, list(sites))
    assert {choices[site].form for site in solved} == {DENSE, "lowrank"}
    for site in solved:
        x, y = (torch.cat([calls[0].reshape(-1, calls[0].shape[-1]) for calls in seen[site]]) for seen in (old, new))
        assert (x - y).abs().max() > 1e-3 * x.abs().max()
        module = changed.get_submodule(site)
        rank = min(sites[site].shape)
        if choices[site].form != DENSE:
            rank = 9
            assert (module.form, module.rank) == ("lowrank", 9)
        wanted = model.get_submodule(site)(x).detach().double()
        error = (module(y).detach().double() - wanted).square().sum()
        least = least_error(y.double(), wanted, rank, sites[site].has_bias)
        assert float(error) == pytest.approx(float(least), rel=1e-4)
        kept = (model.get_submodule(site)(y).detach().double() - wanted).square().sum()
        assert rank == 9 or error < 0.9 * kept


def least_error(inputs: Tensor, wanted: Tensor, rank: int, bias: bool) -> Tensor:
    """Of any matrix of that rank: what least squares leaves, and the singular values of its fit beyond the rank."""
    if bias:
        inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
    left, values, _ = torch.linalg.svd(inputs, full_matrices=False)
    left = left[:, values > 1e-5 * values[0]]  # what the inputs span
    fit = left @ (left.mT @ wanted)
    return (wanted - fit).square().sum() + torch.linalg.svdvals(fit)[rank:].square().sum()


def test_sites_without_statistics_are_left_as_they_are():
    architecture = BY_NAME["llama"]
    model = architecture.model()
    batches = load_data(architecture.batches(count=1), model=model).batches
    changed = copy.deepcopy(model)
    sites = {site.name: site for site in find_sites(model).chosen}
    kept = "model.layers.0.mlp.down_proj"
    moments = {kept: Moments(InputShift.empty(48, torch.device("cpu")).statistics())}
    with evaluating(model, changed):
        before, now = start_runner(model, batches), start_runner(changed, batches)
        groups = shared_inputs(model, list(sites), lambda: forward(model, batches[0].inputs))
        steps, _ = refittable(groups, before, [])
        work = GroupRefit(sites, dict.fromkeys(sites, Choice(DENSE)), {kept}, moments.__getitem__, METHODS["drone"])
        assert work.step(before, now, 0, steps[0]) == ([kept], [])
    for name in sites:
        assert torch.equal(dense_weight(changed.get_submodule(name)), dense_weight(model.get_submodule(name)))


def test_numbers_that_overflow_in_the_compressed_model_are_named():
    architecture = BY_NAME["llama"]
    model = architecture.model()
    batches = load_data(architecture.batches(count=1), model=model).batches
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0] = float("inf")
    sites = {site.name: site for site in find_sites(model).chosen}
    with evaluating(model, changed):
        before, now = start_runner(model, batches), start_runner(model, batches)
        now.model = now.chain.model = changed
        now.chain.run = lambda batch: forward(changed, batch.inputs)
        groups = {"model.layers.0.mlp.down_proj": ("model.layers.0.mlp.down_proj",)}
        work = GroupRefit(sites, dict.fromkeys(sites, Choice(DENSE)), set(sites), {}.__getitem__, METHODS["drone"])
        with pytest.raises(NumericalError, match=r"input of model\.layers\.0\.mlp\.down_proj in the compressed model"):
            work.step(before, now, 0, groups)


def pair(tokens: int = 4000, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    before = torch.randn(tokens, width, generator=stream) + 0.5
    return before, before @ torch.randn(width, width, generator=stream) + 0.1


@pytest.mark.parametrize("centered", [False, True])
def test_target_is_the_least_squares_answer(centered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_shift, "RIDGE", 0.0)
    monkeypatch.setattr(input_shift, "LEAST_RIDGE", 1e-12)
    before, now = pair()
    statistics = InputShift.empty(6, torch.device("cpu"))
    statistics.update(before[:1500], now[:1500])
    statistics.update(before[1500:], now[1500:])
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    x, y = (before - before.mean(0), now - now.mean(0)) if centered else (before, now)
    expected = torch.linalg.lstsq(y.double(), (x @ weight.mT).double()).solution.mT
    torch.testing.assert_close(statistics.target(weight, centered=centered).double(), expected, rtol=1e-3, atol=1e-3)


def test_inputs_that_did_not_move_leave_the_weight() -> None:
    before, _ = pair()
    statistics = InputShift.empty(6, torch.device("cpu"))
    statistics.update(before, before)
    weight = torch.randn(5, 6)
    assert torch.equal(statistics.target(weight, centered=False), weight)


def test_nothing_seen_and_dead_inputs_leave_the_weight() -> None:
    statistics = InputShift.empty(6, torch.device("cpu"))
    weight = torch.randn(5, 6)
    assert torch.equal(statistics.target(weight, centered=False), weight)
    statistics.update(torch.randn(9, 6), torch.zeros(9, 6))
    assert torch.equal(statistics.target(weight, centered=True), weight)
