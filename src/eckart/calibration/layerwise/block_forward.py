"""One forward of the parent model, up to the end of one block, with stand-ins for the blocks before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from eckart.calibration.layerwise.blocks import LayerwiseError
from eckart.calibration.layerwise.output import Constant, Key, Made, Passed, unflatten

if TYPE_CHECKING:
    from eckart.calibration.layerwise.runner import LayerwiseRunner


class BatchLike(Protocol):
    """Rows of data that can be cut."""

    @property
    def examples(self) -> tuple[int, ...]:
        """For each row, its place in the data: no two batches share one."""
        ...

    def rows(self, start: int, stop: int) -> Any:
        """The rows from `start` up to `stop` as a batch of their own."""
        ...


class Armed(Protocol):
    """What gathers statistics while a block runs, and must not while the parent runs what was seen before."""

    paused: bool


class Reached(Exception):  # noqa: N818 - a signal, not an error
    """Stops a forward pass where enough has been seen."""


class BlockForward:
    """One forward of the parent model, with stand-ins for the blocks before a step."""

    def __init__(
        self, walk: LayerwiseRunner, step: int, batch: BatchLike, watch: Armed | None, *, gradients: bool = False
    ) -> None:
        self.walk = walk
        self.step = step
        self.batch = batch
        self.watch = watch
        self.with_gradients = gradients
        self.position = 0
        self.known: dict[int, Key] = {}  # id of a tensor that a stand-in gave -> what it is
        self.given: dict[Key, Tensor] = {}  # keeps those alive, so that no id is used twice
        self.leaves: dict[Key, Tensor] = {}
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.output: Any = None

    def to_block(self) -> Any:
        """Run up to the end of the step's block, and return what it put out."""
        try:
            self._run()
        except Reached:
            return self.output
        raise LayerwiseError(f"{self.walk.order.steps[self.step]} is not called")

    def to_end(self) -> Any:
        """Run to the end, with stand-ins for all blocks."""
        result = self._run()
        if self.position != self.walk.order.tail:
            raise LayerwiseError(f"{self.walk.order.steps[self.position]} is not called")
        return result

    def gradients(self) -> dict[str, Tensor]:
        """What reached the leaves: `step.leaf` of what a stand-in gave -> gradient."""
        return {f"{s}.{i}": leaf.grad for (s, i), leaf in self.leaves.items() if leaf.grad is not None}

    def _run(self) -> Any:
        blocks = {name: self.walk.model.get_submodule(name) for name in dict.fromkeys(self.walk.order.steps)}
        before = {name: module.__dict__.get("forward") for name, module in blocks.items()}
        for name, module in blocks.items():
            module.forward = self._instead(name, module.forward)
        self.walk.segment = self.step
        self._arm(self.step == 0)
        try:
            return self.walk.run(self.batch)
        finally:
            for name, module in blocks.items():
                if before[name] is None:
                    del module.forward
                else:
                    vars(module)["forward"] = before[name]
            self._arm(True)

    def _instead(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            here = self.position
            self.position += 1
            if here >= self.walk.order.tail or self.walk.order.steps[here] != name:
                raise LayerwiseError(f"{name} is called out of order")
            if here == self.step:
                self.output = own(*args, **kwargs)
                raise Reached
            result = self._stand_in(here)
            if here == self.step - 1:
                self._arm(True)
            return result

        return forward

    def _arm(self, armed: bool) -> None:
        if self.watch is not None:
            self.watch.paused = not armed

    def _stand_in(self, step: int) -> Any:
        structure = self.walk.structures[step]
        values: list[Any] = []
        for i, leaf in enumerate(structure.leaves):
            if isinstance(leaf, Constant):
                values.append(leaf.value)
            elif isinstance(leaf, Passed):
                values.append(self._tensor(leaf.key))
            else:
                assert isinstance(leaf, Made)
                unread = i == structure.stream and step < self.step - 1 and not self.walk.order.ends_run(step)
                values.append(self._nothing() if unread else self._tensor((step, i)))
        return unflatten(values, structure)

    def _tensor(self, key: Key) -> Tensor:
        """What a step made, the same object however often it is asked for."""
        if key not in self.given:
            step, i = key
            if step not in self.kept:
                self.kept[step] = self.walk.waiting(step, self.batch)
            tensor = self.kept[step].pop(str(i)).to(self.walk.device)
            if self.with_gradients and tensor.is_floating_point():
                self.leaves[key] = tensor.requires_grad_()
                tensor = tensor.clone()  # a model may change it in place, which no leaf allows
            self.given[key] = tensor
            self.known[id(tensor)] = key
        return self.given[key]

    def _nothing(self) -> Tensor:
        """Stands for a stream that nobody should read: NaN, of the shape of the one that the step gets."""
        last = self.step - 1
        like = self._tensor((last, self.walk.structures[last].stream))
        return like.new_full((1,), float("nan")).expand(like.shape)
