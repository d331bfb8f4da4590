"""How often models run in a refit, what memory does to it, and sites that are solved together."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.allocation import Choice
from eckart.calibration.layerwise import LayerwiseRunner, trace_blocks
from eckart.compression.refit_groups import GroupRefit, refittable
from eckart.data import Batch, load_data
from eckart.data.inference import evaluating, forward
from eckart.forms import LowRank
from eckart.linalg import Metric, Problem
from eckart.methods import METHODS
from eckart.model import dense_weight, find_sites, shared_parameters
from eckart.moments import Moments, gather, halving, shared_inputs
from eckart.storage.cache import Cache

ROOM = sys.maxsize


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes longer than all the rest."""
    monkeypatch.setattr(halving.gc, "collect", lambda: 0)


class Trial:
    """A model, a changed copy, and a refit of the copy's last block."""

    def __init__(self, name: str = "llama", choice: Callable[[str], Choice] = lambda _: Choice("lowrank", 9)) -> None:
        kind = BY_NAME[name]
        self.model = kind.model()
        inputs = kind.batches(rows=6, count=3)
        self.data = load_data(inputs, model=self.model)
        self.changed = copy.deepcopy(self.model)
        self.sites = {site.name: site for site in find_sites(self.model).chosen}
        with torch.no_grad():
            for name in list(self.sites)[:3]:
                weight = self.changed.get_submodule(name).weight
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
        with evaluating(self.model):
            first = self.data.batches[0]
            self.groups = shared_inputs(self.model, list(self.sites), lambda: forward(self.model, first.inputs))
            moments = gather(
                self.model,
                self.groups,
                self.data.batches,
                lambda batch: forward(self.model, batch.inputs)[0].sin().sum(),
                needs=METHODS["kfac"].needs,
            )
        for entry in moments.values():
            entry.centered = False
        self.choices = {name: choice(name) for name in self.sites}
        self.work = GroupRefit(
            self.sites, self.choices, frozenset(self.sites), moments.__getitem__, METHODS["kfac"], spare=lambda: ROOM
        )

    def runner(self, model: PreTrainedModel, name: str) -> LayerwiseRunner:
        def run(batch: Batch) -> Any:
            return forward(model, batch.inputs)

        store = Cache(sys.maxsize, None)
        chain = trace_blocks(model, list(self.sites), run, self.data.batches[0].rows(0, 1), store)
        return LayerwiseRunner(chain, self.data.batches, store, name=name)

    def refit(self, watch: Callable[[PreTrainedModel, PreTrainedModel], Any] = lambda *_: None) -> list[str]:
        """Both blocks; `watch` is told of the models before the second."""
        with evaluating(self.model, self.changed):
            self.before, self.now = self.runner(self.model, "before"), self.runner(self.changed, "now")
            steps, _ = refittable(self.groups, self.before, [])
            self.before.advance(0)
            self.now.advance(0)
            watch(self.model, self.changed)
            return self.work.step(self.before, self.now, 1, steps[1])[0]

    def outputs(self) -> Tensor:
        with evaluating(self.changed), torch.no_grad():
            return torch.cat([forward(self.changed, batch.inputs)[0] for batch in self.data.batches])


def counted(calls: Counter[str], module: nn.Module, key: str) -> None:
    def count(*_: Any) -> None:
        calls[key] += 1

    module.register_forward_pre_hook(count)


@pytest.mark.parametrize(("spare", "passes"), [(ROOM, 1), (0, 4)])
def test_the_original_runs_a_block_once_and_again_only_where_memory_is_short(spare, passes):
    """Four groups: without room for what it saw, once more for each of the later ones."""
    trial, calls = Trial(), Counter()
    object.__setattr__(trial.work, "spare", lambda: spare)

    def watch(model: PreTrainedModel, changed: PreTrainedModel) -> None:
        for key, one in (("before", model), ("now", changed)):
            counted(calls, one.model.layers[1].input_layernorm, key)

    trial.refit(watch)
    assert calls == {"before": 3 * passes, "now": 3 * 4}
    found = trial.outputs()
    again = Trial()
    again.refit()
    assert torch.equal(again.outputs(), found)


@pytest.mark.parametrize(("spare", "computed"), [(ROOM, 1), (0, 3)])
def test_a_site_that_is_solved_computes_once_a_batch(spare, computed, monkeypatch):
    """As far as memory holds what it put out: query and key of four groups else in each of the passes after theirs."""
    trial, calls = Trial(), Counter()
    object.__setattr__(trial.work, "spare", lambda: spare)
    plain = LowRank.forward

    def count(module: LowRank, x: Tensor) -> Tensor:
        calls[next(name for name, one in trial.changed.named_modules() if one is module)] += 1
        return plain(module, x)

    monkeypatch.setattr(LowRank, "forward", count)
    trial.refit()
    with evaluating(trial.model, trial.changed):
        trial.work.advance(trial.before, trial.now, 1)
    runs = {name.rpartition(".")[2]: number / 3 for name, number in calls.items()}
    rerun = computed - 1
    assert runs == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), 1 + 1.5 * rerun),
        "o_proj": 1 + rerun,
        **dict.fromkeys(("gate_proj", "up_proj"), 1 + rerun / 2),
        "down_proj": 1,
    }


def test_a_part_of_the_inputs_is_kept_where_a_part_fits():
    trial, calls = Trial(), Counter()
    width, tokens = 32, trial.data.batches[0].num_tokens
    object.__setattr__(trial.work, "spare", lambda: 4 * tokens * width)  # what o_proj reads of one batch
    trial.refit(lambda model, _: counted(calls, model.model.layers[1].input_layernorm, "before"))
    assert calls["before"] == 3 * 4 - 1


@pytest.mark.parametrize("spare", [ROOM, 0])
def test_both_models_are_advanced_to_the_end_of_the_block(spare):
    trial, calls = Trial(), Counter()
    object.__setattr__(trial.work, "spare", lambda: spare)
    trial.refit()
    for module in trial.changed.model.layers[1].modules():
        counted(calls, module, type(module).__name__)
    with evaluating(trial.model, trial.changed):
        trial.work.advance(trial.before, trial.now, 1)
        assert calls["LlamaDecoderLayer"] == len(trial.data.batches)
        for runner, model in ((trial.before, trial.model), (trial.now, trial.changed)):
            for batch in runner.batches:
                assert not runner.hidden_states.has("outputs", 0, batch)
                expected = forward(model, batch.inputs)[0]
                torch.testing.assert_close(runner.run_tail(batch)[0], expected, rtol=1e-5, atol=1e-5)
        assert not any("forward" in vars(module) for module in trial.changed.modules())


@pytest.mark.parametrize("where", ["before", "now"])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_memory_that_runs_out_halves_batches_of_both_models(where, name, caplog):
    expected = Trial()
    expected.refit()
    trial, sizes = Trial(), []

    def watch(model: PreTrainedModel, changed: PreTrainedModel) -> None:
        def full(_: nn.Module, args: Any) -> None:
            sizes.append(len(args[0]))
            if len(args[0]) > 3:
                raise torch.OutOfMemoryError

        (model if where == "before" else changed).get_submodule(name).register_forward_pre_hook(full)

    trial.refit(watch)
    assert [len(b) for b in trial.now.batches] == [len(b) for b in trial.before.batches] == [3] * 6
    assert sum(size > 3 for size in sizes) == 1  # later batches start at the size that fits
    torch.testing.assert_close(trial.outputs(), expected.outputs(), rtol=1e-3, atol=1e-4)
    assert [r.getMessage() for r in caplog.records] == ["out of memory at 6 examples: continuing with half"]


def test_memory_that_runs_out_while_the_compressed_model_advances():
    trial = Trial()
    trial.refit()
    trial.work._pairs.clear()

    def full(_: nn.Module, args: Any) -> None:
        if len(args[0]) > 3:
            raise MemoryError

    handle = trial.changed.model.layers[1].mlp.up_proj.register_forward_pre_hook(full)
    with evaluating(trial.changed):
        trial.now.advance(1, trial.work.halving)
        handle.remove()
        assert [len(batch) for batch in trial.now.batches] == [3] * 6
        trial.before.follow(trial.now)
        assert [batch.examples for batch in trial.before.batches] == [batch.examples for batch in trial.now.batches]
        found = torch.cat([trial.now.run_tail(batch)[0] for batch in trial.now.batches])
    torch.testing.assert_close(found, trial.outputs(), rtol=1e-5, atol=1e-5)


def test_one_row_that_does_not_fit_is_an_error():
    trial = Trial()

    def full(*_: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        trial.refit(lambda _, changed: changed.model.layers[1].input_layernorm.register_forward_pre_hook(full))


# -- together ------------------------------------------------------------------------------------------------

LAYER = "model.layers.1"
TOGETHER = (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.v_proj")


def sharing(name: str) -> Choice:
    if name not in TOGETHER:
        return Choice("lowrank", 9)
    return Choice("shared-basis", 9, basis=None if name == TOGETHER[0] else TOGETHER[0])


def test_sites_that_share_a_parameter_are_solved_together():
    """The rank-9 optimum of their stacked targets under one metric of the inputs and each one's own of its outputs."""
    trial = Trial(choice=sharing)
    problems: dict[str, Problem] = {}

    def metric(target: Tensor, moments: Moments) -> Problem:
        problem = METHODS["kfac"].metric(target, moments)
        problems[next(n for n in trial.sites if trial.work.moments(n)["gradients"] is moments["gradients"])] = problem
        return problem

    object.__setattr__(trial.work, "method", copy.copy(METHODS["kfac"]))
    object.__setattr__(trial.work.method, "metric", metric)
    assert set(TOGETHER) < set(trial.refit())
    modules = [trial.changed.get_submodule(name) for name in TOGETHER]
    assert [module.form for module in modules] == ["shared-basis"] * 3
    assert len({id(module.get_parameter(module.shared_parameter)) for module in modules}) == 1
    assert set(shared_parameters(trial.changed)) == {f"{name}.{modules[0].shared_parameter}" for name in TOGETHER[1:]}

    def root(metric: Metric) -> Tensor:
        values, vectors = torch.linalg.eigh(metric.dense(torch.float64))
        return vectors * values.clamp_min(0).sqrt() @ vectors.mT

    own = [problems[name] for name in TOGETHER]
    right = root(own[0].right)
    whole = torch.cat([root(p.left) @ p.target.double() @ right for p in own])
    kept = torch.cat(
        [root(p.left) @ dense_weight(m).detach().double() @ right for p, m in zip(own, modules, strict=True)]
    )
    least = torch.linalg.svdvals(whole)[9:].square().sum()
    assert float((whole - kept).square().sum()) == pytest.approx(float(least), rel=1e-3)


def test_sites_that_share_with_one_that_is_left_are_left_too():
    trial = Trial(choice=sharing)
    object.__setattr__(trial.work, "solved", frozenset(trial.sites) - {TOGETHER[2]})
    with evaluating(trial.model, trial.changed):
        before, now = trial.runner(trial.model, "before"), trial.runner(trial.changed, "now")
        steps, _ = refittable(trial.groups, before, [])
        before.advance(0)
        now.advance(0)
        changed, notes = trial.work.step(before, now, 1, steps[1])
    assert notes == [
        f"{name}: not refitted, {TOGETHER[2]} shares its input factor and cannot be" for name in TOGETHER[:2]
    ]
    assert not set(TOGETHER) & set(changed)
    assert all(isinstance(trial.changed.get_submodule(name), nn.Linear) for name in TOGETHER)
