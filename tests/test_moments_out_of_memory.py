"""Memory that runs out at any moment: the batch continues in halves, and nothing is lost or counted twice."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import is_out_of_memory
from eckart.moments import Gatherer, Moments, gather, halving, sampled_loss, shared_inputs
from eckart.moments.absolute import Absolute
from eckart.moments.fisher import Fisher
from eckart.moments.gradients import GradientGram
from eckart.moments.gram import Gram
from eckart.moments.mean import Mean


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Collecting garbage takes longer than all the rest."""
    monkeypatch.setattr(halving.gc, "collect", lambda: 0)


NEEDS = frozenset({"gram", "absolute", "gradients", "fisher"})
ROWS, TOKENS = 7, 5


class Batch:
    """Token numbers, some of them padding."""

    def __init__(self, ids: Tensor, mask: Tensor, examples: tuple[int, ...]) -> None:
        self.inputs = {"ids": ids}
        self.mask = mask
        self.examples = examples

    def masks(self) -> dict[int, Tensor]:
        return {self.mask.shape[1]: self.mask}

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(self.inputs["ids"][start:stop], self.mask[start:stop], self.examples[start:stop])


class Twice(nn.Module):
    """Two projections of one input, one that runs twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6)
        self.gate = nn.Linear(6, 6)
        self.up = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.gate(x).tanh() * self.up(x)
        return self.head(self.twice(self.twice(x).tanh()))


NAMES = ("gate", "up", "twice", "head")


def batches() -> list[Batch]:
    stream = torch.Generator().manual_seed(1)
    found = []
    for first in (0, ROWS):
        mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
        mask[1, 3:] = mask[4, :2] = mask[ROWS - 1, 1:] = False
        ids = torch.randint(0, 20, (ROWS, TOKENS), generator=stream)
        found.append(Batch(ids, mask, tuple(range(first, first + ROWS))))
    return found


def step_of(model: Twice) -> Callable[[Batch], Tensor]:
    def step(batch: Batch) -> Tensor:
        outputs = SimpleNamespace(logits=model(batch.inputs["ids"]))
        return sampled_loss(outputs, batch.masks(), batch.examples, 0)

    return step


def gathered(model: Twice) -> dict[str, Moments]:
    groups = shared_inputs(model, NAMES, lambda: model(batches()[0].inputs["ids"]))
    assert groups == {"gate": ("gate", "up"), "twice": ("twice",), "head": ("head",)}
    return gather(model, groups, batches(), step_of(model), needs=NEEDS)


def agree(found: dict[str, Moments], expected: dict[str, Moments]) -> None:
    """Counts exactly, sums up to rounding."""
    for name, entry in expected.items():
        state = found[name].state()
        assert state.keys() == entry.state().keys()
        for key, tensor in entry.state().items():
            if tensor.dim() == 0:
                assert int(state[key]) == int(tensor), (name, key)
            else:
                torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))


class Failing:
    """Raises where more than `fits` rows are run: at the `after`-th time that it is asked."""

    def __init__(self, error: Callable[[], Exception], after: int, fits: int = 1) -> None:
        self.error = error
        self.after = after
        self.fits = fits
        self.seen = 0

    def __call__(self, rows: int) -> None:
        if rows > self.fits:
            self.seen += 1
            if self.seen > self.after:
                self.seen = 0
                raise self.error()


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator:"
ERRORS: dict[str, Callable[[], Exception]] = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes."),
    "python": MemoryError,
    "cpu": lambda: RuntimeError(f"{ALLOCATOR} can't allocate memory: you tried to allocate 9 bytes."),
    "windows": lambda: RuntimeError(f"{ALLOCATOR} not enough memory: you tried to allocate 9 bytes."),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_errors_of_memory_are_known(error):
    assert is_out_of_memory(error())


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def fail_in_forward(model: Twice, name: str, failing: Failing) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: failing(len(args[0])))


def fail_in_backward(model: Twice, name: str, failing: Failing) -> None:
    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_().clone()
        output.register_hook(lambda gradient: failing(len(gradient)))
        return output

    model.get_submodule(name).register_forward_hook(hook)


@pytest.mark.parametrize(("fits", "after"), [(1, 0), (2, 1), (6, 1)])
@pytest.mark.parametrize("name", ["gate", "twice", "head"])
@pytest.mark.parametrize("place", [fail_in_forward, fail_in_backward])
def test_halves_add_up_to_the_whole(place, name, after, fits):
    """`after` 1: at the second call of a module that runs twice, or after a batch went through."""
    expected = gathered(Twice())
    model = Twice()
    failing = Failing(ERRORS["accelerator"], after, fits)
    groups = shared_inputs(model, NAMES, lambda: model(batches()[0].inputs["ids"]))
    place(model, name, failing)
    found = gather(model, groups, batches(), step_of(model), needs=NEEDS)
    agree(found, expected)
    assert {entry.sequences for entry in found.values()} == {2 * ROWS}


@pytest.mark.parametrize("again", [0, 2])
@pytest.mark.parametrize(
    ("kind", "updates"),
    [(Mean, 4), (Gram, 4), (Absolute, 4), (GradientGram, 5), (Fisher, 4)],
    ids=lambda value: str(value),
)
def test_memory_runs_out_between_the_updates_of_a_pass(monkeypatch, kind, updates, again):
    """At each update of a pass in turn; and once more, so many updates later, in one of the halves."""
    expected = gathered(Twice())
    update = kind.update
    for first in range(updates):
        waiting = [first, again]

        def failing(self, *args, waiting=waiting):
            if waiting and waiting[0] == 0:
                waiting.pop(0)
                raise MemoryError
            if waiting:
                waiting[0] -= 1
            update(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "update", failing)
            found = gathered(Twice())
        assert not waiting
        agree(found, expected)


@pytest.mark.parametrize("kind", [Mean, Absolute, Gram, GradientGram])
def test_an_update_adds_all_or_nothing(monkeypatch, kind):
    statistic = kind()
    statistic.update(torch.ones(3, 4))
    failed = 0
    for name in ("abs", "sum", "float", "new_empty"):
        before = {key: tensor.clone() for key, tensor in statistic.state().items()}
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, name, lambda *_, **__: (_ for _ in ()).throw(MemoryError))
            with contextlib.suppress(MemoryError):
                statistic.update(torch.ones(3, 4))
                continue  # this kind does without
        failed += 1
        assert all(torch.equal(tensor, before[key]) for key, tensor in statistic.state().items())
    assert failed >= 2


def test_one_row_that_does_not_fit_is_an_error():
    model = Twice()
    fail_in_forward(model, "twice", Failing(ERRORS["python"], 0, fits=0))
    with pytest.raises(MemoryError):
        gather(model, {"head": ("head",)}, batches(), step_of(model), needs=NEEDS)
    assert all(p.requires_grad for p in model.parameters())


def test_other_errors_are_raised_at_once():
    model = Twice()
    fail_in_forward(model, "head", Failing(lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0))
    with pytest.raises(RuntimeError, match="mat1"):
        gather(model, {"head": ("head",)}, batches(), step_of(model), needs=NEEDS)


def test_later_batches_start_at_the_size_that_fits(caplog):
    model, sizes = Twice(), []
    fail_in_forward(model, "head", Failing(ERRORS["accelerator"], 0, fits=3))
    with (
        caplog.at_level(logging.WARNING, "eckart"),
        Gatherer(model, {"head": ("head",)}, needs=frozenset({"gram"})) as gatherer,
    ):

        def run(batch: Batch) -> None:
            sizes.append(len(batch.examples))
            model(batch.inputs["ids"])

        for number, batch in enumerate(batches()):
            gatherer.run_in_parts(batch, number, run)
    assert sizes == [7, 3, 2, 2, 3, 2, 2]
    assert (gatherer.times_halved, gatherer.max_rows) == (1, 3)
    assert [r.getMessage() for r in caplog.records] == ["out of memory at 7 examples: continuing with half"]
    assert gatherer.moments["head"].sequences == 2 * ROWS


def test_nothing_of_a_failed_pass_stays_alive():
    """The memory must be free before the half runs."""
    model = Twice()
    alive: list[weakref.ref[Tensor]] = []

    def run(batch: Batch) -> None:
        assert not any(tensor() is not None for tensor in alive)
        output = model(batch.inputs["ids"])
        alive.append(weakref.ref(output))
        if len(batch.examples) > 2:
            output.sum().backward()
            raise MemoryError

    with Gatherer(model, {"twice": ("twice",)}, needs=NEEDS) as gatherer:
        gatherer.run_in_parts(batches()[0], 0, run)
    assert gatherer.times_halved == 2
