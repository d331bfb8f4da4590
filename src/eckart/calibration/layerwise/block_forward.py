"""One forward of the parent model, up to the end of one block, with stand-ins for the blocks before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration.layerwise.blocks import BlockSchedule, LayerwiseError
from eckart.calibration.layerwise.hidden_states import HiddenStates
from eckart.calibration.layerwise.output import Constant, Key, Made, Passed, Structure, unflatten
from eckart.moments import BatchLike, Gatherer


@dataclass
class BlockChain:
    """A model as a chain of blocks.

    Attributes:
        model: in evaluation mode; modules inside its blocks may be replaced between two steps.
        schedule: its steps.
        run: runs the model on a batch, and returns its output or a loss.
        device: where it computes.
        structures: step -> how its output is made up.
        segment: the step that the forward at work is for.
    """

    model: nn.Module
    schedule: BlockSchedule
    run: Callable[[Any], Any]
    device: torch.device
    structures: dict[int, Structure] = field(default_factory=dict)
    segment: int = 0


class ReachedError(Exception):
    """Stops a forward pass where enough has been seen; a signal, no error."""


class BlockForward:
    """One forward of the parent model, with stand-ins for the blocks before a step.

    Args:
        chain: the model.
        hidden_states: what the blocks before put out.
        step: whose block runs.
        batch: what the model reads.
        gatherer: gathers statistics while the block runs, and not while the parent runs what was seen before.
        gradients: whether gradients at what the stand-ins give are kept.
    """

    def __init__(
        self,
        chain: BlockChain,
        hidden_states: HiddenStates,
        step: int,
        batch: BatchLike,
        gatherer: Gatherer | None,
        *,
        gradients: bool = False,
    ) -> None:
        self.chain = chain
        self.hidden_states = hidden_states
        self.step = step
        self.batch = batch
        self.gatherer = gatherer
        self.with_gradients = gradients
        self.position = 0
        self.known: dict[int, Key] = {}  # id of a tensor that a stand-in gave -> which one it is
        self.given: dict[Key, Tensor] = {}  # keeps those alive, so that no id is used twice
        self.leaves: dict[Key, Tensor] = {}
        self.loaded: dict[int, dict[str, Tensor]] = {}
        self.output: Any = None
        self.passes = False  # beyond the step's block

    def to_block(self) -> Any:
        """Run up to the end of the step's block, and return what it put out."""
        try:
            self._run()
        except ReachedError:
            return self.output
        raise LayerwiseError(f"{self.chain.schedule.steps[self.step]} is not called")

    def through_block(self) -> Any:
        """Run to the end, with the block of the last step and stand-ins for those before it."""
        self.passes = True
        return self._run()

    def to_end(self) -> Any:
        """Run to the end, with stand-ins for all blocks."""
        result = self._run()
        if self.position != self.chain.schedule.tail:
            raise LayerwiseError(f"{self.chain.schedule.steps[self.position]} is not called")
        return result

    def gradients(self) -> dict[str, Tensor]:
        """The gradients at what the stand-ins gave: `step.leaf` -> gradient."""
        return {f"{s}.{i}": leaf.grad for (s, i), leaf in self.leaves.items() if leaf.grad is not None}

    def _run(self) -> Any:
        blocks = {name: self.chain.model.get_submodule(name) for name in dict.fromkeys(self.chain.schedule.steps)}
        before = {name: module.__dict__.get("forward") for name, module in blocks.items()}
        for name, module in blocks.items():
            module.forward = self._replacement(name, module.forward)
        self.chain.segment = self.step
        self._pause_gatherer(self.step > 0)
        try:
            return self.chain.run(self.batch)
        finally:
            for name, module in blocks.items():
                if before[name] is None:
                    del module.forward
                else:
                    vars(module)["forward"] = before[name]
            self._pause_gatherer(False)

    def _replacement(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        """What a block's forward is replaced by: itself at the step, a stand-in before it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            here = self.position
            self.position += 1
            if here >= self.chain.schedule.tail or self.chain.schedule.steps[here] != name:
                raise LayerwiseError(f"{name} is called out of order")
            if here == self.step:
                self.output = own(*args, **kwargs)
                if self.passes:
                    return self.output
                raise ReachedError
            result = self._stand_in(here)
            if here == self.step - 1:
                self._pause_gatherer(False)
            return result

        return forward

    def _pause_gatherer(self, paused: bool) -> None:
        if self.gatherer is not None:
            self.gatherer.paused = paused

    def _stand_in(self, step: int) -> Any:
        structure = self.chain.structures[step]
        values: list[Any] = []
        for i, leaf in enumerate(structure.leaves):
            if isinstance(leaf, Constant):
                values.append(leaf.value)
            elif isinstance(leaf, Passed):
                values.append(self._tensor(leaf.key))
            else:
                assert isinstance(leaf, Made)
                unread = i == structure.stream and step < self.step - 1 and not self.chain.schedule.ends_run(step)
                values.append(self._nan() if unread else self._tensor((step, i)))
        return unflatten(values, structure)

    def _tensor(self, key: Key) -> Tensor:
        """What a step made, the same object however often it is asked for."""
        if key not in self.given:
            step, i = key
            if step not in self.loaded:
                self.loaded[step] = self.hidden_states.outputs(step, self.batch)
            tensor = self.loaded[step].pop(str(i)).to(self.chain.device)
            if self.with_gradients and tensor.is_floating_point():
                self.leaves[key] = tensor.requires_grad_()
                tensor = tensor.clone()  # a model may change it in place, which no leaf allows
            self.given[key] = tensor
            self.known[id(tensor)] = key
        return self.given[key]

    def _nan(self) -> Tensor:
        """Stands for a stream that nobody should read: NaN, of the shape of the one that the step gets."""
        last = self.step - 1
        like = self._tensor((last, self.chain.structures[last].stream))
        return like.new_full((1,), float("nan")).expand(like.shape)
