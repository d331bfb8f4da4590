"""Block by block: what a runner computes, gathers, keeps and leaves behind, against whole passes of a model."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from architectures import BY_NAME, Architecture
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import eckart
from eckart.calibration import Calibration, calibrate
from eckart.calibration.layerwise import (
    LayerwiseError,
    LayerwiseRunner,
    StatisticsWindow,
    gather_layerwise,
    split_by_segment,
    trace_blocks,
)
from eckart.data import Batch, CalibrationData, load_data
from eckart.data.inference import evaluating, forward
from eckart.distributed import Processes
from eckart.errors import DataError, ModelError
from eckart.model import find_sites
from eckart.moments import Moments, common_calls, gather, halving, shared_inputs
from eckart.storage.cache import Cache

# One of those that differ in a head or an option alone.
ALIKE = {"bert", "bert-classes", "bert-regression", "roberta", "electra", "llama-tied", "mistral", "qwen3"}
NAMES = [name for name in BY_NAME if name not in ALIKE]
FORWARDS = frozenset({"gram"})
BACKWARDS = frozenset({"gram", "gradients", "fisher"})
# With two layers the last stand-in is the only one: none holds NaN before the tail.
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes longer than all the rest."""
    monkeypatch.setattr(halving.gc, "collect", lambda: 0)


@dataclass
class Case:
    """A model, what it is run on, and what one pass over it showed."""

    model: PreTrainedModel
    batches: list[Batch]
    names: list[str]
    groups: dict[str, tuple[str, ...]]
    common: dict[str, frozenset[int]]

    def run(self, batch: Batch) -> Any:
        """The output, or a loss to which every token adds a term of its own."""
        made = forward(self.model, batch.inputs)
        return loss_of(made) if torch.is_grad_enabled() else made

    def whole(self, needs: frozenset[str]) -> dict[str, Moments]:
        """By whole passes."""
        with evaluating(self.model):
            return gather(self.model, self.groups, self.batches, self.run, needs=needs, common=self.common)

    def runner(
        self, store: Any, *, backward: bool = True, run: Callable[[Batch], Any] | None = None
    ) -> LayerwiseRunner:
        """Before its first step, the model in evaluation mode."""
        first = self.batches[0].rows(0, 1)
        chain = trace_blocks(self.model, self.names, self.run, first, store, backward=backward)
        chain.run = run or self.run
        return LayerwiseRunner(chain, self.batches, store, name="runner")

    def windows(self, runner: LayerwiseRunner, needs: frozenset[str], **more: Any) -> Iterator[StatisticsWindow]:
        return gather_layerwise(runner, self.groups, needs=needs, common=self.common, **more)


def loss_of(made: Any) -> Tensor:
    logits = getattr(made, "logits", None)
    return (logits if logits is not None else made.last_hidden_state).sin().sum()


def deep(kind: Architecture) -> PreTrainedModel:
    return kind.model(**{key: 3 for key in LAYERS if key in kind.options})


def shorter(inputs: dict[str, Tensor], padding: str) -> dict[str, Tensor]:
    """The same texts with three tokens less on the padded side; images as they are."""
    cut = slice(3, None) if padding == "left" else slice(None, -3)
    return {key: value[:, cut] if value.dim() == 2 else value for key, value in inputs.items()}


@cache
def case(name: str, rows: int = 3) -> Case:
    """Batches of several lengths and sizes; of one row each where examples share a call."""
    kind = BY_NAME[name]
    inputs = kind.batches(rows=rows)
    inputs[1] = shorter(inputs[1], kind.padding)
    inputs[2] = {key: value[: rows - 1] for key, value in inputs[2].items()}
    model = deep(kind)
    return made_case(model, load_data(inputs, model=model).batches)


def made_case(model: PreTrainedModel, batches: list[Batch]) -> Case:
    names = [site.name for site in find_sites(model).chosen]
    first = batches[0].rows(0, 1).inputs
    twice = {key: torch.cat([value, value]) for key, value in first.items()}
    with evaluating(model):
        groups = shared_inputs(model, names, lambda: forward(model, first))
        common = common_calls(model, names, lambda: forward(model, first), lambda: forward(model, twice))
    if common:
        batches = [batch.rows(i, i + 1) for batch in batches for i in range(len(batch))]
    return Case(model, batches, names, groups, common)


@cache
def expected(name: str, needs: frozenset[str], rows: int = 3) -> dict[str, Moments]:
    return case(name, rows).whole(needs)


def possible(name: str, needs: frozenset[str]) -> frozenset[str]:
    """Albert calls one block several times: its squared gradients are of all calls together."""
    return needs - {"fisher"} if name == "albert" else needs


def waiting() -> Cache:
    return Cache(sys.maxsize, None)


def agree(found: dict[str, Moments], known: dict[str, Moments], tolerance: float = 1e-5) -> None:
    """Counts exactly; sums relative to their largest entry, or to what they are a difference of."""
    assert set(found) == set(known)
    for name, entry in known.items():
        state, other = entry.state(), found[name].state()
        assert other.keys() == state.keys(), name
        for key, tensor in state.items():
            if tensor.dim() == 0:
                assert int(other[key]) == int(tensor), (name, key)
                continue
            assert torch.isfinite(tensor).all()
            scale = tensor.abs().max()
            off = (other[key] - tensor).abs().max()
            assert off <= tolerance * scale, f"{name}, {key}: {float(off):.2g} of {float(scale):.2g}"


def together(windows: Iterator[StatisticsWindow]) -> dict[str, Moments]:
    """All statistics; each site in one window alone."""
    found: dict[str, Moments] = {}
    for window in windows:
        own = [name for members in window.groups.values() for name in members]
        assert sorted(window.moments) == sorted(own)
        assert not set(own) & set(found)
        found |= window.moments
    return found


# -- what a runner gives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "albert", "deberta"])
def test_layerwise_output_is_that_of_a_whole_pass(name):
    it, store = case(name), waiting()
    with evaluating(it.model):
        runner = it.runner(store)
        assert runner.schedule.tail >= 3
        for step in range(runner.schedule.tail):
            with runner.resident(step):
                runner.for_each_batch(lambda batch, _, step=step: runner.run_block(step, batch))
            runner.drop_stream(step - 1)
        compared = 0
        for batch in it.batches:
            plain, layerwise = (pytree.tree_leaves(made) for made in (it.run(batch), runner.run_tail(batch)))
            for one, other in zip(plain, layerwise, strict=True):
                if isinstance(one, Tensor):
                    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
                    compared += 1
        runner.drop_all()
    assert compared >= len(it.batches)
    assert store.keys() == []


@pytest.mark.parametrize("name", ["llama", "t5", "albert", "opt", "deberta"])
def test_statistics_forwards_are_those_of_whole_passes(name):
    it, store = case(name), waiting()
    with evaluating(it.model):
        windows = list(it.windows(it.runner(store, backward=False), FORWARDS))
    agree(together(iter(windows)), expected(name, FORWARDS))
    numbers = [int(window.name.rpartition("-")[2]) for window in windows]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= (1 if name == "albert" else 3)  # what a shared block says is complete at its last call
    assert store.keys() == []


@pytest.mark.parametrize("name", NAMES)
def test_statistics_backwards_are_those_of_whole_passes(name):
    it, store = case(name), waiting()
    needs = possible(name, BACKWARDS)
    with evaluating(it.model):
        windows = list(it.windows(it.runner(store), needs))
    agree(together(iter(windows)), expected(name, needs))
    numbers = [int(window.name.rpartition("-")[2]) for window in windows]
    assert numbers == sorted(set(numbers), reverse=True)
    assert store.keys() == []


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_no_more_waits_than_the_steps_ahead_will_read(name):
    it = case(name)
    with evaluating(it.model):
        for needs in (FORWARDS, BACKWARDS):
            store = waiting()
            runner = it.runner(store, backward=needs != FORWARDS)
            for window in it.windows(runner, needs):
                here = int(window.name.rpartition("-")[2])
                kept: dict[str, set[int]] = {"outputs": set(), "rest": set(), "gradients": set()}
                for key in store.keys("runner/"):
                    kept[key.split("/")[1]].add(int(key.split("/")[2]))
                if needs == FORWARDS:  # all that is read later, of earlier steps, is what each put out for several
                    last = {step for step in range(here) if runner.schedule.ends_run(step)}
                    assert kept["outputs"] == last | ({here - 1, here} & set(range(runner.schedule.tail)))
                    several = {step for step in range(here - 1) if len(runner.chain.structures[step].made) > 1}
                    assert kept["rest"] == several - last
                    assert not kept["gradients"]
                    continue
                assert kept["outputs"] == set(range(min(here + 1, runner.schedule.tail)))
                assert kept["gradients"] == {here, here + 1} & set(range(runner.schedule.tail + 1))
                assert not kept["rest"]


def test_fisher_of_a_shared_block_is_refused():
    it = case("albert")
    with evaluating(it.model), pytest.raises(LayerwiseError, match=r"albert_layers\.0\..* called by several blocks"):
        it.windows(it.runner(waiting()), BACKWARDS)


def test_the_architectures_hold_what_is_hard_to_run_block_by_block():
    """Shared tensors that blocks pass on, several of their own, masks, shared blocks, groups over many blocks."""
    names = ("t5", "albert", "bart", "opt")
    with evaluating(*(case(name).model for name in names)):
        runners = {name: case(name).runner(waiting(), backward=False) for name in names}
    kinds = {type(leaf).__name__ for s in runners["t5"].chain.structures.values() for leaf in s.leaves}
    assert kinds == {"Made", "Passed", "Constant"}
    assert len(runners["t5"].chain.structures[3].made) == 3  # the stream, and two position biases for all that follow
    assert runners["bart"].schedule.ends_run(2)
    assert not runners["bart"].schedule.ends_run(3)
    assert len(set(runners["albert"].schedule.steps)) == 1
    assert runners["opt"].schedule.between
    groups = case("t5").groups
    assert max(map(len, groups.values())) == 6  # keys and values of three layers read the encoder's output
    assert max(map(len, split_by_segment(groups, runners["t5"].schedule).values())) == 3
    assert case("deberta").common


# -- broken off and taken up again ---------------------------------------------------------------------------

RESUMED = ("llama", "t5", "opt", "albert")


@contextmanager
def counted(it: Case, runner: LayerwiseRunner) -> Iterator[Counter[int]]:
    """How often each step's own block ran, watched at a site inside it; a shared one counts at its first step."""
    calls: Counter[int] = Counter()
    inside = {block: next(n for n in it.names if n.startswith(f"{block}.")) for block in runner.schedule.steps}
    handles = []
    for block, name in inside.items():
        step = runner.schedule.steps.index(block)

        def count(*_: Any, step: int = step) -> None:
            calls[step] += 1

        handles.append(it.model.get_submodule(name).register_forward_hook(count))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("needs", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_resumes_after_its_last_window(name, needs, tmp_path):
    it = case(name)
    needs, backward = possible(name, needs), needs != FORWARDS
    known = expected(name, needs)
    with evaluating(it.model):
        every = [window.name for window in it.windows(it.runner(waiting(), backward=backward), needs)]
        for stop in sorted({1, len(every) - 1} - {0}):
            folder = tmp_path / str(stop)
            first = it.windows(it.runner(Cache(0, folder, durable=True), backward=backward), needs)
            done = list(itertools.islice(first, stop))
            first.close()

            store = Cache(0, folder, durable=True)
            runner = it.runner(store, backward=backward)
            with counted(it, runner) as calls:
                rest = list(it.windows(runner, needs, done=[window.name for window in done]))
            assert [window.name for window in (*done, *rest)] == every
            agree(together(iter([*done, *rest])), known)
            if name == "albert":  # a single block
                continue
            each = len(it.batches) * (2 if name == "deberta" else 1)  # its site is called twice a pass
            number = int(done[-1].name.rpartition("-")[2])
            last = int(every[-1].rpartition("-")[2])
            todo = range(last, number) if backward else range(number + 1, min(last + 1, runner.schedule.tail))
            assert calls == dict.fromkeys(todo, each)
            if rest:
                assert store.keys() == []


@pytest.mark.parametrize(("name", "needs"), [("llama", FORWARDS), ("t5", BACKWARDS)])
def test_a_resumed_run_without_hidden_states_starts_anew(name, needs):
    it = case(name)
    needs, backward = possible(name, needs), needs != FORWARDS
    known = expected(name, needs)
    with evaluating(it.model):
        every = list(it.windows(it.runner(waiting(), backward=backward), needs))
        store = waiting()
        runner = it.runner(store, backward=backward)
        with counted(it, runner) as calls:
            rest = list(it.windows(runner, needs, done=[every[0].name]))
        assert [window.name for window in rest] == [window.name for window in every[1:]]
        agree(together(iter([every[0], *rest])), known)
        assert calls[0] >= len(it.batches)
        assert store.keys() == []


def test_windows_may_be_done_in_any_order():
    it = case("llama")
    for needs in (FORWARDS, BACKWARDS):
        with evaluating(it.model):
            every = [window.name for window in it.windows(it.runner(waiting()), needs)]
            for done in ([every[1]], [every[0], every[2]], every):
                found = list(it.windows(it.runner(waiting()), needs, done=done))
                assert [window.name for window in found] == [name for name in every if name not in done]
                known = expected("llama", needs)
                agree(together(iter(found)), {n: known[n] for w in found for n in w.moments})


class Stop(BaseException):
    """Breaks a run off wherever it is, as a user at the keyboard does."""


@pytest.mark.parametrize(("name", "needs"), [("llama", FORWARDS), ("t5", BACKWARDS)])
def test_interrupted_in_the_middle_of_a_step(name, needs, tmp_path):
    """At any pass of any batch: what was written of a step by then is not taken for all of it."""
    it = case(name)
    needs, backward = possible(name, needs), needs != FORWARDS
    known = expected(name, needs)
    with evaluating(it.model):
        for after in itertools.count(1, 4 if name == "llama" else 23):
            passes = itertools.count(1)

            def run(batch: Batch, passes: Iterator[int] = passes, after: int = after) -> Any:
                if next(passes) == after:
                    raise Stop
                return it.run(batch)

            folder = tmp_path / str(after)
            done: list[StatisticsWindow] = []
            try:
                for window in it.windows(it.runner(Cache(0, folder, durable=True), backward=backward, run=run), needs):
                    done.append(window)
                break
            except Stop:
                pass
            store = Cache(0, folder, durable=True)
            runner = it.runner(store, backward=backward)
            rest = list(it.windows(runner, needs, done=[window.name for window in done]))
            agree(together(iter([*done, *rest])), known)
            assert store.keys() == []
    assert after >= 9


# -- memory that runs out in the middle of a runner ------------------------------------------------------------


class Full:
    """Runs a case's model, and once runs out of memory at some place, the n-th time that five rows are there."""

    def __init__(self, it: Case, place: str, after: int) -> None:
        self.it = it
        self.place = place
        self.left = after
        self.rows = 0

    def raises(self, place: str) -> None:
        if place == self.place and self.rows == 5:
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes.")

    def run(self, batch: Batch) -> Any:
        self.rows = len(batch)
        return self.it.run(batch)

    def step(self, _: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
        """At the end of a site in the second step's block."""
        if not torch.is_grad_enabled():
            self.raises("step")
            return made
        self.raises("step again")
        made = made if made.requires_grad else made.detach().requires_grad_().clone()
        made.register_hook(lambda _: self.raises("gradient"))
        return made

    def finish(self, _: nn.Module, args: Any, made: Any) -> None:
        if torch.is_grad_enabled():
            self.raises("tail")


@contextmanager
def full(it: Case, runner: LayerwiseRunner, place: str, after: int) -> Iterator[Full]:
    failing = Full(it, place, after)
    runner.chain.run = failing.run
    site = next(name for name in it.names if name.startswith(f"{runner.schedule.steps[1]}."))
    handles = [
        it.model.get_submodule(site).register_forward_hook(failing.step),
        it.model.register_forward_hook(failing.finish),
    ]
    try:
        yield failing
    finally:
        for handle in handles:
            handle.remove()


SPLIT = {
    "albert": ("step", "step again", "gradient", "tail"),
    "xlnet": ("step", "gradient"),
    "opt": ("step", "tail"),
    "bloom": ("step again", "gradient"),
    "t5": ("step", "gradient", "tail"),
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_batch_that_is_split_on_the_way_changes_nothing(name):
    """Of two times the second is when the first batch went through that place."""
    it = case(name, rows=5)
    both = possible(name, BACKWARDS)
    places = [(place, both, 1 if place in ("step", "gradient") else 2) for place in SPLIT[name]]
    with evaluating(it.model):
        for place, needs, after in (("step", FORWARDS, 2), *places):
            store = waiting()
            runner = it.runner(store, backward=needs != FORWARDS)
            with full(it, runner, place, after) as failing:
                found = together(it.windows(runner, needs))
            assert failing.left <= 0
            assert max(len(batch) for batch in runner.batches) == 2  # from then on no more is run at once
            assert [e for batch in runner.batches for e in batch.examples] == list(range(14))
            agree(found, expected(name, needs, rows=5))
            assert store.keys() == []


def test_what_all_examples_share_is_not_split():
    """Of an outer loss's gradients at it each piece has a part: the first one all of it."""
    it, store = case("t5", rows=5), waiting()
    with evaluating(it.model):
        runner = it.runner(store)
        batch = runner.batches[0]
        for step in (0, 1):
            runner.run_block(step, batch)
        stream, bias = (runner.hidden_states.outputs(0, batch)[str(leaf)] for leaf in runner.chain.structures[0].made)
        assert (len(stream), len(bias)) == (5, 1)
        store.put("runner/gradients/1/0-4", {"0.0": stream, "0.1": bias})
        whole = runner.hidden_states.outputs(1, batch)["0"]
        runner.split_batch(batch.rows(2, 3))
        assert [piece.examples for piece in runner.batches[:4]] == [(0, 1), (2,), (3, 4), (5, 6, 7, 8, 9)]
        pieces = runner.batches[:3]
        for number, piece in enumerate(pieces):
            assert torch.equal(runner.hidden_states.outputs(0, piece)["1"], bias)
            gradient = store.get(f"runner/gradients/1/{piece.examples[0]}-{piece.examples[-1]}")["0.1"]
            assert torch.equal(gradient, bias if number == 0 else torch.zeros_like(bias))
        assert torch.equal(torch.cat([runner.hidden_states.outputs(0, piece)["0"] for piece in pieces]), stream)
        assert torch.equal(torch.cat([runner.hidden_states.outputs(1, piece)["0"] for piece in pieces]), whole)
        assert not store.has("runner/gradients/1/0-4")
        before = list(runner.batches)
        runner.split_batch(before[1])  # is there
        assert runner.batches == before
        runner.drop_all()
    assert store.keys() == []


# -- models that cannot be run so ----------------------------------------------------------------------------


class Config(PretrainedConfig):
    model_type = "small"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return x + self.down((self.up(x) + sum(m.mean(-1, keepdim=True) for m in more)).tanh())


class Small(PreTrainedModel):
    """A chain of four blocks, which can be run block by block."""

    config_class = Config
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__(Config())
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 12)
        self.side = nn.Linear(12, 12)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.head = nn.Linear(12, 96)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.through(self.side(self.embed(input_ids)), input_ids)))

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Skips(Small):
    """Block 3 reads what block 0 put out, as in a U-Net."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[3](first + self.blocks[2](self.blocks[1](first)))


class SkipsOne(Small):
    """Block 2 reads what block 0 put out, beside what block 1 did."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[3](self.blocks[2](self.blocks[1](first), first))


class Refuses(Small):
    """Looks at what skips its blocks."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        first = self.blocks[0](x)
        x = self.blocks[2](self.blocks[1](first))
        if first.isnan().any():
            raise ValueError("these are no numbers")
        return self.blocks[3](x)


class Listless(Small):
    """Its blocks have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = self.blocks
        del self.blocks

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.fourth(self.third(self.second(self.first(x))))


class Inside(Small):
    """A block that runs another one."""

    def __init__(self) -> None:
        super().__init__()
        second = self.blocks[1]
        second.forward = lambda x: Block.forward(second, self.blocks[2](x))

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.blocks[3](self.blocks[1](self.blocks[0](x)))


class Writing(Block):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return x.add_(super().forward(x).tanh())


class InPlace(Small):
    """Each block gives back the tensor that it was given, with other numbers in it."""

    block = Writing


class Everywhere(Small):
    """Every block reads what a weight between the embedding and the blocks puts out."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        side = x
        for block in self.blocks:
            x = block(x, side)
        return x


class Wanders(Small):
    """The order of its blocks depends on the text."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        order = (0, 1, 2, 3) if ids.shape[1] == 9 else (0, 2, 1, 3)
        for i in order:
            x = self.blocks[i](x)
        return x


class Exits(Small):
    """How many blocks run depends on the text."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks[: 4 if ids.shape[1] == 9 else 3]:
            x = block(x)
        return x


class Counting(Block):
    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return super().forward(x), x.shape[1]


class Changes(Small):
    """Beside the stream each block puts out a number that depends on the text."""

    block = Counting

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x, length = block(x)
            x = x / length
        return x


TRIED = {
    Skips: r"block by block, other numbers of its output are finite",
    SkipsOne: r"block by block, other numbers of its output are finite",
    Refuses: r"with stand-ins for its blocks it fails: ValueError: these are no numbers",
    Listless: r"it has no list of blocks",
    Inside: r"blocks\.2 is called inside blocks\.1",
    InPlace: r"blocks\.1 puts out no floating-point tensor of its own",
}
"""Found out on one example."""

LATER = {
    Wanders: r"blocks\.[12] is called out of order",
    Exits: r"blocks\.3 is not called",
    Changes: r"blocks\.0 puts out another structure for each batch",
}
"""Found out on the way, on text that is not like the first."""


def texts() -> CalibrationData:
    """Two lengths, the first one twice."""
    stream = torch.Generator().manual_seed(3)
    return load_data([{"input_ids": torch.randint(4, 96, (3, length), generator=stream)} for length in (9, 7, 9)])


def calibrated(model: PreTrainedModel, needs: frozenset[str], **more: Any) -> Calibration:
    names = [site.name for site in find_sites(model).chosen]
    return calibrate(model, names, texts(), needs=needs, **more)


every_need = pytest.mark.parametrize("needs", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])
REFUSED = {**TRIED, **LATER}


@every_need
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_model_that_cannot_be_run_block_by_block_is_run_whole_with_a_note(kind, needs):
    whole = calibrated(kind(), needs)
    known = together(whole.windows())
    at_once = 1 if needs == FORWARDS else 2
    # Four blocks, and all that is outside; without a list of blocks every group is one of its own.
    parts = {1: 5, 2: 3}[at_once] if kind is not Listless else len(whole.groups) // at_once
    model, store = kind(), waiting()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before = state_of(model)
    found = calibrated(model, needs, hidden_states=store, blocks_at_once=at_once)
    if kind in TRIED:
        assert found.how == f"in whole passes, {at_once} blocks at a time"
    windows = list(found.windows())
    agree(together(iter(windows)), known)
    assert found.how == f"in whole passes, {at_once} blocks at a time"
    assert len(found.notes) == 1
    why = rf"{kind.__name__} cannot be run block by block \(.*{REFUSED[kind]}.*\): whole passes instead"
    assert re.fullmatch(why, found.notes[0])
    if kind in TRIED or needs != FORWARDS:
        assert len(windows) == parts
    assert len({window.name for window in windows}) == len(windows) >= parts
    assert store.keys() == []
    assert state_of(model) == before


def test_a_weight_that_every_block_reads_allows_forwards_only():
    for at_once in (1, 2):
        found = calibrated(Everywhere(), FORWARDS, hidden_states=waiting(), blocks_at_once=at_once)
        assert found.how == "block by block, 4 blocks"
        assert found.notes == []
        windows = list(found.windows())
        assert len(windows) == 5  # the weight comes with the first block
        agree(together(iter(windows)), together(calibrated(Everywhere(), FORWARDS).windows()))

        found = calibrated(Everywhere(), BACKWARDS, hidden_states=waiting(), blocks_at_once=at_once)
        assert found.how == f"in whole passes, {at_once} blocks at a time"
        assert (
            "Everywhere cannot be run block by block (block by block, other numbers of its output are" in found.notes[0]
        )
        windows = list(found.windows())
        assert len(windows) == (5 if at_once == 1 else 3)
        agree(together(iter(windows)), together(calibrated(Everywhere(), BACKWARDS).windows()))


class Spoiling(Block):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9))


class Spoils(Small):
    """Each block changes what it is given, and puts out something new."""

    block = Spoiling


@every_need
def test_blocks_may_change_what_they_are_given(needs):
    found = calibrated(Spoils(), needs, hidden_states=waiting())
    assert (found.how, found.notes) == ("block by block, 4 blocks", [])
    agree(together(found.windows()), together(calibrated(Spoils(), needs).windows()))


class Counts(Small):
    """Puts out something else every time."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        self.passes = getattr(self, "passes", 0) + 1
        return super().through(x, ids) + 0.01 * self.passes


def test_a_model_whose_passes_differ_is_refused():
    it = made_case(Counts(), texts().batches)
    with (
        evaluating(it.model),
        pytest.raises(LayerwiseError, match=r"block by block, its output differs by 0\.\d+ of \d"),
    ):
        it.runner(waiting())


class Again(Small):
    """Between the blocks a weight is called that was called in front of them."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[3](self.blocks[2](x + self.side(x)))


def test_each_call_of_a_weight_between_the_blocks_counts_once():
    for needs in (FORWARDS, BACKWARDS - {"fisher"}):
        found = calibrated(Again(), needs, hidden_states=waiting())
        assert found.how == "block by block, 4 blocks"
        agree(together(found.windows()), together(calibrated(Again(), needs).windows()))
    found = calibrated(Again(), BACKWARDS, hidden_states=waiting())
    assert "side is called by several blocks, and fisher needs all its calls together" in found.notes[0]
    agree(together(found.windows()), together(calibrated(Again(), BACKWARDS).windows()))


@every_need
def test_a_chain_is_run_block_by_block(needs):
    """The model that the others differ from."""
    found = calibrated(Small(), needs, hidden_states=waiting())
    windows = list(found.windows())
    assert (found.how, found.notes, len(windows)) == ("block by block, 4 blocks", [], 5)
    agree(together(iter(windows)), together(calibrated(Small(), needs).windows()))


@every_need
@pytest.mark.parametrize("kind", [Skips, Exits], ids=lambda kind: kind.__name__)
def test_windows_of_whole_passes_that_are_done_are_not_made_again(kind, needs, tmp_path):
    known = together(calibrated(kind(), needs).windows())
    every = [window.name for window in calibrated(kind(), needs, hidden_states=waiting()).windows()]
    for stop in (1, len(every) - 1):
        folder = tmp_path / str(stop)
        windows = calibrated(kind(), needs, hidden_states=Cache(0, folder, durable=True)).windows()
        done = list(itertools.islice(windows, stop))
        windows.close()
        again = calibrated(kind(), needs, hidden_states=Cache(0, folder, durable=True))
        rest = list(again.windows([window.name for window in done]))
        assert [window.name for window in (*done, *rest)] == every
        agree(together(iter([*done, *rest])), known)


@pytest.mark.parametrize("kind", LATER, ids=lambda kind: kind.__name__)
def test_a_late_refusal_ends_the_work_of_several_processes(kind):
    """The other processes continue block by block, and would wait for windows that never come."""
    found = calibrated(
        kind(), BACKWARDS, hidden_states=waiting(), processes=Processes(1, 2)
    )  # its share: the second batch
    with pytest.raises(
        ModelError, match=rf"{kind.__name__} cannot be run block by block .*{LATER[kind]}.* in a single process"
    ):
        list(found.windows())


def test_refit_is_left_out_where_the_blocks_are_no_chain():
    batches = [batch.inputs for batch in texts().batches] * 3
    for kind, reason in LATER.items():
        result = eckart.compress(kind(), data=batches, keep=0.7, method="drone", refit=True)
        left_out = [note for note in result.report["notes"] if "refit was left out" in note]
        assert len(left_out) == 1
        assert re.search(rf"{kind.__name__} cannot be run block by block \({reason}\)", left_out[0])


class Flat(Small):
    """Blocks that see all tokens of all examples in a row."""

    def through(self, x: Tensor, ids: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        for block in self.blocks:
            flat = block(flat)
        return flat.reshape(x.shape)


@every_need
def test_a_batch_that_cannot_be_split_is_run_whole(needs):
    model, store = Flat(), waiting()
    failing = iter([False, True])

    def full(*_: Any) -> None:
        if next(failing, False):
            raise MemoryError

    known = together(calibrated(Flat(), needs).windows())
    found = calibrated(model, needs, hidden_states=store)
    assert found.how == "block by block, 4 blocks"
    handle = model.blocks[1].down.register_forward_hook(full)
    windows = list(found.windows())
    handle.remove()
    assert next(failing, None) is None
    assert "what blocks.0 puts out cannot be split between its examples" in found.notes[0]
    agree(together(iter(windows)), known)
    assert store.keys() == []


# -- errors, and what is left behind -------------------------------------------------------------------------


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """All that a runner touches: modes, flags, gradients, hooks, `forward` attributes."""
    modules = {
        name: (
            module.training,
            vars(module).get("forward"),
            [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }
    parameters = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return modules, parameters, torch.is_grad_enabled()


def mixed(model: PreTrainedModel) -> PreTrainedModel:
    """In every mode at once."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    own = model.blocks[2]
    own.forward = lambda *args: Block.forward(own, *args)  # as offloading libraries put it there
    return model


class BrokenError(RuntimeError):
    """Of a model's own."""


@every_need
@pytest.mark.parametrize("where", ["blocks.2", "head"])
def test_a_models_own_errors_are_raised_and_the_model_is_left_as_it_was(where, needs):
    """At any pass. Only an error while the blocks are traced is a reason to run the model whole instead."""
    raised = 0
    for after in itertools.count():
        model = mixed(Small())
        before = state_of(model)
        calls = itertools.count()
        found = None

        def fail(*_: Any, calls: Iterator[int] = calls, after: int = after) -> None:
            if next(calls) == after:
                raise BrokenError("the block's own")

        handle = model.get_submodule(where).register_forward_hook(fail)
        try:
            found = calibrated(model, needs, hidden_states=waiting())
            list(found.windows())
        except (BrokenError, DataError, ModelError) as error:
            seen = error
        else:
            seen = None
        handle.remove()
        assert state_of(model) == before
        if next(calls) <= after:
            break
        if seen is None:
            assert found is not None
            assert "with stand-ins for its blocks it fails: BrokenError: the block's own" in found.notes[0]
            continue
        raised += 1
        assert "the block's own" in str(seen)
        # Before the runner a backward pass is tried as well; a plain pass tells what the model was given.
        assert isinstance(seen.__cause__ or seen, BrokenError) or found is None
    assert raised >= 5


@every_need
def test_an_abandoned_run_leaves_the_model_as_it_was(needs):
    every = 5
    for stop in range(every + 1):
        model = mixed(Small())
        before = state_of(model)
        windows = calibrated(model, needs, hidden_states=waiting()).windows()
        assert len(list(itertools.islice(windows, stop))) == stop
        windows.close()
        assert state_of(model) == before
