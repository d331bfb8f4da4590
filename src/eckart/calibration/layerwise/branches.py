"""Variants of a model that differ from it in few modules, run block by block together with it.

A variant branches off at the first block that it differs in: what comes before is the model's own, and is not computed
again. The weights of each block are brought in once for all variants, so that the model may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eckart.calibration.layerwise.blocks import BlockSchedule, block_of
from eckart.calibration.layerwise.hidden_states import HiddenStates, Kind
from eckart.calibration.layerwise.runner import LayerwiseRunner
from eckart.model.replace import replaced
from eckart.moments import BatchLike


@dataclass(frozen=True)
class Branch:
    """A variant of a model.

    Attributes:
        modules: name -> what takes its place.
        blocks: those that hold the modules; None stands for those that are in no block.
        start: the first step that differs.
    """

    modules: Mapping[str, nn.Module]
    blocks: frozenset[str | None]
    start: int

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], model: nn.Module, schedule: BlockSchedule) -> Branch:
        """The branch of some modules; one with a module outside the blocks begins at the first step."""
        blocks = frozenset(block_of(name, model) for name in modules)
        start = min((schedule.steps.index(b) if b in schedule.steps else 0 for b in blocks), default=0)
        return cls(modules, blocks, start)

    def differs_in(self, block: str | None) -> bool:
        """Whether the modules run between the block before and the end of this one; None for the tail."""
        return None in self.blocks or block in self.blocks


class _BranchStates(HiddenStates):
    """The hidden states of a branch; those of the steps before it begins are the model's."""

    def __init__(self, trunk: HiddenStates, name: str, start: int) -> None:
        super().__init__(trunk.store, name)
        self._trunk = trunk
        self._start = start

    def get(self, kind: Kind, step: int, batch: BatchLike) -> dict[str, Tensor]:
        return self._trunk.get(kind, step, batch) if step < self._start else super().get(kind, step, batch)

    def has(self, kind: Kind, step: int, batch: BatchLike) -> bool:
        return self._trunk.has(kind, step, batch) if step < self._start else super().has(kind, step, batch)

    def drop(self, kind: Kind, step: int, batch: BatchLike) -> None:
        if step >= self._start:
            super().drop(kind, step, batch)


def run_branches(
    trunk: LayerwiseRunner,
    branches: Mapping[str, Branch],
    see: Callable[[str | None, Any, Any], None],
    *,
    ready: Callable[..., AbstractContextManager[None]] = lambda *_: nullcontext(),
    show: Callable[[range], Iterable[int]] = lambda steps: steps,
) -> None:
    """Run a model and its branches on all batches.

    Args:
        trunk: the model before its first step.
        branches: by key.
        see: `see(key, batch, output)` of every branch on every batch, after that of the model itself under None.
        ready: entered with the names of a branch's modules while they are in place: brings their weights in.
        show: passes the steps on, as a progress bar does.

    Raises:
        LayerwiseError: the blocks do not form a chain.
    """
    runners = {key: _runner_of(trunk, key, branch) for key, branch in branches.items()}
    steps = trunk.schedule.steps

    @contextmanager
    def in_place(branch: Branch, block: str | None) -> Iterator[None]:
        """The modules of a branch in the model, while it runs up to the end of a block; None for the tail."""
        with ExitStack() as stack:
            if branch.differs_in(block):
                stack.enter_context(replaced(trunk.model, branch.modules))
                stack.enter_context(ready(*branch.modules))
            yield

    for step in show(range(trunk.schedule.tail)):
        with trunk.resident(step):
            for batch in trunk.batches:
                trunk.run_block(step, batch)
                for key, branch in branches.items():
                    if branch.start <= step:
                        with in_place(branch, steps[step]):
                            runners[key].run_block(step, batch)
        for runner in (trunk, *runners.values()):
            runner.drop_stream(step - 1)
    with trunk.resident(trunk.schedule.tail):
        for batch in trunk.batches:
            see(None, batch, trunk.run_tail(batch))
            for key, branch in branches.items():
                with in_place(branch, None):
                    output = runners[key].run_tail(batch)
                see(key, batch, output)
    for runner in (*runners.values(), trunk):
        runner.drop_all()


def _runner_of(trunk: LayerwiseRunner, key: str, branch: Branch) -> LayerwiseRunner:
    states = trunk.hidden_states
    runner = LayerwiseRunner(trunk.chain, trunk.batches, states.store, context=trunk.context)
    runner.hidden_states = _BranchStates(states, f"{states.name}.{key}", branch.start)
    return runner
