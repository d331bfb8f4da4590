"""Walk through a model block by block, forwards and backwards, with one block at work at a time.

The parent model runs its own forward for every step, so that masks, rotary tables and whatever else an
architecture computes between its blocks are its own. Blocks before the step are stand-ins: the last of them gives
back what it put out when its own step was walked, the others a tensor of NaN, so that a model that reads
them all the same is found out. After the step the forward is stopped.

Backwards, what the stand-ins give back are leaves: the gradient that reaches them is kept for the step that made
them. Each block runs once more, with gradients, from its cached input: the statistics are those of one whole
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eckart.calibration.layerwise.block_forward import Armed, BatchLike, BlockForward, Reached
from eckart.calibration.layerwise.blocks import BlockSchedule, LayerwiseError
from eckart.calibration.layerwise.output import Structure, flatten, structure_of


class HiddenStateStore(Protocol):
    """Where tensors wait between two steps; what it gives back may be changed in place."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a key."""
        ...

    def get(self, key: str) -> dict[str, Tensor]:
        """What was kept under a key."""
        ...

    def has(self, key: str) -> bool:
        """Whether something was."""
        ...

    def drop(self, key: str) -> None:
        """Forget it."""
        ...


class LayerwiseRunner:
    """A model on its way through its blocks, with all batches side by side.

    Args:
        model: in evaluation mode; modules inside its blocks may be replaced between two steps.
        order: its steps, see :func:`eckart.calibration.layerwise.schedule_of`.
        run: runs the model on a batch, and returns what :meth:`finish` is to get: its output, or a loss.
        batches: the data.
        store: where tensors wait.
        held: entered while a step is walked, given its block, or None for the tail: makes ready to run.
        device: where they compute; None for the CPU.
        name: keeps walks apart that share a store.
    """

    def __init__(
        self,
        model: nn.Module,
        order: BlockSchedule,
        run: Callable[[Any], Any],
        batches: Sequence[Any],
        store: HiddenStateStore,
        *,
        held: Callable[[str | None], Any] = lambda _: nullcontext(),
        device: torch.device | None = None,
        name: str = "walk",
    ) -> None:
        self.model = model
        self.order = order
        self.run = run
        self.batches = list(batches)
        self.store = store
        self.held = held
        self.device = device or torch.device("cpu")
        self.name = name
        self.structures: dict[int, Structure] = {}
        self.segment = 0  # that the pass at work is for

    # -- one step, one batch -------------------------------------------------------------------------------------

    def forward(self, step: int, batch: BatchLike, watch: Armed | None = None) -> None:
        """Run one step's block on a batch and keep what it puts out.

        Raises:
            UnwalkableError: the blocks do not form a chain.
        """
        with torch.no_grad():
            going = BlockForward(self, step, batch, watch)
            output = going.to_block()
            flat = self._looked_at(step, output, going)
            made = {str(i): flat[i] for i in self.structures[step].made}
            self.store.put(self._out(step, batch), made)

    def look(self, step: int, batch: BatchLike, module: str) -> Tensor:
        """What a module inside a step's block is given on a batch; the block runs only as far as that."""
        got: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            got.append(args[0] if args else next(iter(kwargs.values())))
            raise Reached

        handle = self.model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                BlockForward(self, step, batch, None).to_block()
        finally:
            handle.remove()
        if not got:
            raise LayerwiseError(f"{module} is not called in {self.order.steps[step]}")
        return got[0]

    def finish(self, batch: BatchLike, watch: Armed | None = None, *, backward: bool = False) -> Any:
        """Run what comes after the last block; backwards, `run` gives a loss, whose gradients are kept.

        Returns:
            What `run` returned.
        """
        tail = self.order.tail
        with torch.set_grad_enabled(backward):
            going = BlockForward(self, tail, batch, watch, gradients=backward)
            result = going.to_end()
            if backward:
                result.backward()
                self.store.put(self._up(tail, batch), going.gradients())
        return result

    def backward(self, step: int, batch: BatchLike, watch: Armed | None = None) -> None:
        """Run one step's block again, with gradients, and pass them on to the steps before."""
        above = self.store.get(self._up(step + 1, batch))
        with torch.enable_grad():
            going = BlockForward(self, step, batch, watch, gradients=True)
            flat = flatten(going.to_block())
            made = [(flat[i], above.pop(f"{step}.{i}", None)) for i in self.structures[step].made]
            pairs = [(tensor, grad) for tensor, grad in made if grad is not None and tensor.requires_grad]
            if pairs:
                torch.autograd.backward([tensor for tensor, _ in pairs], [grad.to(t.device) for t, grad in pairs])
        for key, grad in going.gradients().items():
            above[key] = above[key].to(grad.device) + grad if key in above else grad
        self.store.put(self._up(step, batch), above)

    # -- all batches ---------------------------------------------------------------------------------------------

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Have the step's block at hand while all batches run through it; the tail has none."""
        with self.held(self.order.steps[step] if step < self.order.tail else None):
            yield

    def each(self, what: Callable[[Any, int], None]) -> None:
        """Call `what(batch, number)` for every batch; it may cut batches by :meth:`cut` on the way."""
        for number, batch in enumerate(list(self.batches)):
            what(batch, number)

    def cut(self, part: Any) -> None:
        """Take notice that a batch turned out too large, and `part` is some of its rows: cut what waits for it.

        Raises:
            UnwalkableError: a block puts out its examples in a way that cannot be told apart.
        """
        if any(batch.examples == part.examples for batch in self.batches):
            return
        whole = next(batch for batch in self.batches if set(part.examples) <= set(batch.examples))
        start = whole.examples.index(part.examples[0])
        stop = start + len(part.examples)
        spans = [(a, b) for a, b in ((0, start), (start, stop), (stop, len(whole.examples))) if a < b]
        pieces = [whole.rows(a, b) for a, b in spans]
        for kind in ("out", "kept", "up"):
            for step in range(self.order.tail + 1):
                key = f"{self.name}/{kind}/{step}/{_label(whole)}"
                if not self.store.has(key):
                    continue
                tensors = self.store.get(key)
                axes = {name: self._axis(name, step, tensor, len(whole.examples)) for name, tensor in tensors.items()}
                for piece, (a, b) in zip(pieces, spans, strict=True):
                    self.store.put(
                        f"{self.name}/{kind}/{step}/{_label(piece)}",
                        {name: _rows(t, a, b, axes[name], kind) for name, t in tensors.items()},
                    )
                self.store.drop(key)
        place = next(i for i, batch in enumerate(self.batches) if batch is whole)
        self.batches[place : place + 1] = pieces

    def forget(self, step: int) -> None:
        """Drop the stream that a step put out, once no step will read it; what else it put out stays."""
        if step < 0 or self.order.ends_run(step):
            return
        for batch in self.batches:
            if not self.store.has(self._out(step, batch)):
                continue
            kept = self.store.get(self._out(step, batch))
            kept.pop(str(self.structures[step].stream), None)
            if kept:
                self.store.put(self._kept(step, batch), kept)
            self.store.drop(self._out(step, batch))

    def forget_gradients(self, step: int) -> None:
        """Drop the gradients that waited for the steps before `step`, once the step below has passed them on."""
        for batch in self.batches:
            self.store.drop(self._up(step, batch))

    def forget_step(self, step: int) -> None:
        """Drop all that a step put out, once the gradients have been passed on to the steps before it."""
        for batch in self.batches:
            self.store.drop(self._out(step, batch))
            self.store.drop(self._kept(step, batch))

    def forget_all(self) -> None:
        """Drop everything that waits."""
        for batch in self.batches:
            for step in range(self.order.tail + 1):
                for key in (self._out(step, batch), self._kept(step, batch), self._up(step, batch)):
                    self.store.drop(key)

    def waits_at(self, step: int) -> bool:
        """Whether all that the next step needs of the steps before is at hand, as after a run that was broken off."""
        streams = [s for s in range(step) if self.order.ends_run(s)]
        others = [s for s in range(step) if not self.order.ends_run(s) and len(self.structures[s].made) > 1]
        return all(
            all(self.store.has(self._out(s, batch)) for s in (*streams, step))
            and all(self.store.has(self._out(s, batch)) or self.store.has(self._kept(s, batch)) for s in others)
            for batch in self.batches
        )

    def gradients_wait_at(self, step: int) -> bool:
        """Whether the gradients for the steps before `step` are at hand for every batch."""
        return all(self.store.has(self._up(step, batch)) for batch in self.batches)

    def waiting(self, step: int, batch: BatchLike) -> dict[str, Tensor]:
        """What a step put out on a batch, as far as it has not been dropped: leaf -> tensor."""
        whole, rest = self._out(step, batch), self._kept(step, batch)
        return self.store.get(whole if self.store.has(whole) else rest)

    # -- inside --------------------------------------------------------------------------------------------------

    def _out(self, step: int, batch: BatchLike) -> str:
        return f"{self.name}/out/{step}/{_label(batch)}"

    def _kept(self, step: int, batch: BatchLike) -> str:
        return f"{self.name}/kept/{step}/{_label(batch)}"

    def _up(self, step: int, batch: BatchLike) -> str:
        return f"{self.name}/up/{step}/{_label(batch)}"

    def _axis(self, name: str, step: int, tensor: Tensor, examples: int) -> int | None:
        """The axis of examples of what waits: a leaf of a step's output, or the gradient of any step's leaf."""
        made, _, leaf = name.rpartition(".")
        source = int(made) if made else step
        axis = self.structures[source].examples_axis(int(leaf), tensor, examples)
        if axis is None and int(leaf) == self.structures[source].stream:
            raise LayerwiseError(f"what {self.order.steps[source]} puts out cannot be cut between its examples")
        return axis

    def _looked_at(self, step: int, output: Any, going: BlockForward) -> list[Any]:
        """The leaves of a block's output, whose structure must be what it was on the batch before."""
        found = structure_of(output, going.known, self.order.steps[step])
        if not self.structures.setdefault(step, found).matches(found):
            raise LayerwiseError(f"{self.order.steps[step]} puts out something else for each batch")
        return flatten(output)


def _label(batch: BatchLike) -> str:
    return f"{batch.examples[0]}-{batch.examples[-1]}"


def _rows(tensor: Tensor, start: int, stop: int, axis: int | None, kind: str) -> Tensor:
    """The rows of a tensor that has one for each example; what all share stays whole, its gradient with the first."""
    if axis is not None:
        return tensor.narrow(axis, start, stop - start)
    return tensor if kind != "up" or start == 0 else torch.zeros_like(tensor)
