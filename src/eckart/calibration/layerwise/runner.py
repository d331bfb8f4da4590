"""Run a model block by block, forwards and backwards.

The parent model runs its own forward for every step, so that masks, rotary tables and whatever else an
architecture computes between its blocks are its own. Blocks before the step are replaced by stand-ins: the last of
them returns what it put out at its own step, the others a tensor of NaN, so that a model that reads them all the same
is found out. After the step the forward is stopped.

Backwards, what the stand-ins return are leaves: the gradient that reaches them is kept for the step that made
them. Each block runs once more, with gradients, from its kept input: the statistics are those of one whole
backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration.forward_context import ForwardContext
from eckart.calibration.layerwise.block_forward import BlockChain, BlockForward, ReachedError
from eckart.calibration.layerwise.blocks import LayerwiseError
from eckart.calibration.layerwise.hidden_states import HiddenStates, HiddenStateStore
from eckart.calibration.layerwise.output import flatten, structure_of
from eckart.errors import NumericalError
from eckart.moments import BatchLike, Gatherer, Halving, real_tokens
from eckart.moments.calls import argument, hooked


class LayerwiseRunner:
    """Runs all batches through a model, step by step.

    Args:
        chain: the model.
        batches: the data.
        store: keeps hidden states between two steps.
        context: entered while a step runs, given its block, or None for the tail: makes the model ready to run.
        name: keeps runners apart that share a store.
    """

    def __init__(
        self,
        chain: BlockChain,
        batches: Sequence[Any],
        store: HiddenStateStore,
        *,
        context: ForwardContext = lambda _: nullcontext(),
        name: str = "layerwise",
    ) -> None:
        self.chain = chain
        self.model = chain.model
        self.schedule = chain.schedule
        self.device = chain.device
        self.batches = list(batches)
        self.hidden_states = HiddenStates(store, name)
        self.context = context

    # -- one step, one batch -------------------------------------------------------------------------------------

    def run_block(self, step: int, batch: BatchLike, gatherer: Gatherer | None = None) -> None:
        """Run one step's block on a batch and keep what it puts out.

        Raises:
            LayerwiseError: the blocks do not form a chain.
        """
        with torch.no_grad():
            forward = BlockForward(self.chain, self.hidden_states, step, batch, gatherer)
            flat = self._checked(step, forward.to_block(), forward)
            made = {str(i): flat[i] for i in self.chain.structures[step].made}
            self._require_finite(made, step, batch)
            self.hidden_states.put("outputs", step, batch, made)

    def _require_finite(self, made: Mapping[str, Tensor], step: int, batch: BatchLike) -> None:
        """Name the block and the batch: what the next ones, or the loss, make of it tells neither.

        Raises:
            NumericalError: a block puts out what is not finite.
        """
        for values in made.values():
            if not values.is_floating_point() or values.dim() != 3:  # masks and biases may hold infinities
                continue
            rows = real_tokens(values, batch)
            if not bool(rows.float().sum().isfinite() | rows.isfinite().all()):
                raise NumericalError(
                    f"output of {self.schedule.steps[step]}, calibration examples {batch.examples[0]} to "
                    f"{batch.examples[-1]}: there are values that are NaN or infinite. Load the model in float32 or "
                    "bfloat16 (float16 overflows), or look at this batch's text."
                )

    def run_and_capture(self, step: int, batch: BatchLike, modules: Sequence[str]) -> dict[str, Tensor]:
        """Run one step's block as :meth:`run_block` does, and see what modules inside it are given.

        Returns:
            For each module the real tokens of its input, (tokens, n), in memory of its own.

        Raises:
            LayerwiseError: the blocks do not form a chain, or a module is not called in the step.
        """
        captured: dict[str, Tensor] = {}

        def note(name: str, given: Tensor) -> None:
            if name not in captured:
                rows = real_tokens(given, batch)
                # A model may go on to change in place what it gave, or what that is a view of.
                captured[name] = rows.clone() if rows.data_ptr() == given.data_ptr() else rows

        with self._watching(modules, note):
            self.run_block(step, batch)
        for module in modules:
            self._require_called(module, captured, step)
        return captured

    def capture_input(self, step: int, batch: BatchLike, module: str) -> Tensor:
        """What a module inside a step's block is given on a batch; the block runs only as far as that."""
        captured: dict[str, Tensor] = {}

        def note(name: str, given: Tensor) -> None:
            captured[name] = given
            raise ReachedError

        with self._watching([module], note), torch.no_grad():
            BlockForward(self.chain, self.hidden_states, step, batch, None).to_block()
        self._require_called(module, captured, step)
        return captured[module]

    def run_stream(self, step: int, batch: BatchLike) -> Tensor:
        """Run one step's block on a batch, with gradients where they are enabled; nothing is kept.

        Returns:
            What the next step works on, (..., n).

        Raises:
            LayerwiseError: the blocks do not form a chain.
        """
        forward = BlockForward(self.chain, self.hidden_states, step, batch, None)
        flat = self._checked(step, forward.to_block(), forward)
        stream: Tensor = flat[self.chain.structures[step].stream]
        return stream

    def run_last(self, batch: BatchLike) -> Any:
        """Run the last step's block and what comes after it, with gradients where they are enabled; nothing is kept.

        Returns:
            What the model returned.
        """
        return BlockForward(self.chain, self.hidden_states, self.schedule.tail - 1, batch, None).through_block()

    def kept_stream(self, step: int, batch: BatchLike) -> Tensor:
        """What :meth:`run_block` has kept of a step for the next one, (..., n), where the model computes."""
        stream = self.chain.structures[step].stream
        return self.hidden_states.outputs(step, batch)[str(stream)].to(self.device)

    def run_tail(self, batch: BatchLike, gatherer: Gatherer | None = None, *, backward: bool = False) -> Any:
        """Run what comes after the last block; backwards, the model returns a loss, whose gradients are kept.

        Returns:
            What the model returned.
        """
        tail = self.schedule.tail
        with torch.set_grad_enabled(backward):
            forward = BlockForward(self.chain, self.hidden_states, tail, batch, gatherer, gradients=backward)
            result = forward.to_end()
            if backward:
                result.backward()
                self.hidden_states.put("gradients", tail, batch, forward.gradients())
        return result

    def run_block_backward(self, step: int, batch: BatchLike, gatherer: Gatherer | None = None) -> None:
        """Run one step's block again, with gradients, and pass them on to the steps before."""
        above = self.hidden_states.get("gradients", step + 1, batch)
        with torch.enable_grad():
            forward = BlockForward(self.chain, self.hidden_states, step, batch, gatherer, gradients=True)
            flat = flatten(forward.to_block())
            made = [(flat[i], above.pop(f"{step}.{i}", None)) for i in self.chain.structures[step].made]
            pairs = [(tensor, grad) for tensor, grad in made if grad is not None and tensor.requires_grad]
            if pairs:
                torch.autograd.backward([tensor for tensor, _ in pairs], [grad.to(t.device) for t, grad in pairs])
        for key, grad in forward.gradients().items():
            above[key] = above[key].to(grad.device) + grad if key in above else grad
        self.hidden_states.put("gradients", step, batch, above)

    # -- all batches ---------------------------------------------------------------------------------------------

    @contextmanager
    def resident(self, step: int) -> Iterator[None]:
        """Keep the weights of the step's block in place while all batches run through it; the tail has no block."""
        with self.context(self.schedule.steps[step] if step < self.schedule.tail else None):
            yield

    def advance(self, step: int, halving: Halving | None = None) -> None:
        """Run a step on all batches, in halves where memory runs out, and drop what no later step reads."""
        halving = halving or Halving()

        def run(part: Any) -> None:
            self.split_batch(part)
            self.run_block(step, part)

        with self.resident(step):
            for batch in list(self.batches):
                halving.run(batch, run)
        self.drop_stream(step - 1)

    def for_each_batch(self, call: Callable[[Any, int], None]) -> None:
        """`call(batch, number)` for every batch; it may split batches by :meth:`split_batch` meanwhile."""
        for number, batch in enumerate(list(self.batches)):
            call(batch, number)

    def split_batch(self, part: Any) -> None:
        """Split the batch that `part` is some rows of, and its hidden states.

        Nothing is done if `part` is a whole batch, or more than one.

        Raises:
            LayerwiseError: a block puts out its examples in a way that cannot be told apart.
        """
        if any(batch.examples == part.examples for batch in self.batches):
            return
        wanted = set(part.examples)
        place = next((i for i, batch in enumerate(self.batches) if wanted <= set(batch.examples)), None)
        if place is None:
            return
        whole = self.batches[place]
        start = whole.examples.index(part.examples[0])
        cuts = sorted({0, start, start + len(part.examples), len(whole.examples)})
        pieces = [whole.rows(a, b) for a, b in itertools.pairwise(cuts)]
        self.hidden_states.split(whole, pieces, range(self.schedule.tail + 1), self._examples_axis)
        self.batches[place : place + 1] = pieces

    def follow(self, other: LayerwiseRunner) -> None:
        """Split the batches as those of another runner over the same data have been split."""
        for batch in other.batches:
            self.split_batch(batch)

    def drop_stream(self, step: int) -> None:
        """Drop the stream that a step put out, once no step will read it; the rest of its outputs stays."""
        if step < 0 or self.schedule.ends_run(step):
            return
        for batch in self.batches:
            if not self.hidden_states.has("outputs", step, batch):
                continue
            rest = self.hidden_states.get("outputs", step, batch)
            rest.pop(str(self.chain.structures[step].stream), None)
            if rest:
                self.hidden_states.put("rest", step, batch, rest)
            self.hidden_states.drop("outputs", step, batch)

    def drop_gradients(self, step: int) -> None:
        """Drop the gradients for the steps before `step`, once the step below has passed them on."""
        for batch in self.batches:
            self.hidden_states.drop("gradients", step, batch)

    def drop_outputs(self, step: int) -> None:
        """Drop all that a step put out, once the gradients have been passed on to the steps before it."""
        for batch in self.batches:
            self.hidden_states.drop("outputs", step, batch)
            self.hidden_states.drop("rest", step, batch)

    def drop_all(self) -> None:
        """Drop all hidden states."""
        for step in range(self.schedule.tail + 1):
            self.drop_outputs(step)
            self.drop_gradients(step)

    def can_resume_after(self, step: int) -> bool:
        """Whether all that the next step reads of the steps before was kept, as by a run that was interrupted."""
        states = self.hidden_states
        streams = [s for s in range(step) if self.schedule.ends_run(s)]
        others = [s for s in range(step) if not self.schedule.ends_run(s) and len(self.chain.structures[s].made) > 1]
        return all(
            all(states.has("outputs", s, batch) for s in (*streams, step))
            and all(states.has("outputs", s, batch) or states.has("rest", s, batch) for s in others)
            for batch in self.batches
        )

    def has_gradients(self, step: int) -> bool:
        """Whether the gradients for the steps before `step` were kept for every batch."""
        return all(self.hidden_states.has("gradients", step, batch) for batch in self.batches)

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _watching(self, modules: Sequence[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
        """`note(name, input)` at every call of the named modules."""

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                note(name, argument(args, kwargs))

            return hook

        found = {name: self.model.get_submodule(name) for name in modules}
        with hooked([m.register_forward_pre_hook(hook_of(n), with_kwargs=True) for n, m in found.items()]):
            yield

    def _require_called(self, module: str, captured: dict[str, Tensor], step: int) -> None:
        if module not in captured:
            raise LayerwiseError(f"{module} is not called in {self.schedule.steps[step]}")

    def _examples_axis(self, name: str, step: int, tensor: Tensor, examples: int) -> int | None:
        """The axis of examples of a leaf of a step's output, or of the gradient of any step's leaf."""
        maker, _, leaf = name.rpartition(".")
        source = int(maker) if maker else step
        axis = self.chain.structures[source].examples_axis(int(leaf), tensor, examples)
        if axis is None and int(leaf) == self.chain.structures[source].stream:
            raise LayerwiseError(f"what {self.schedule.steps[source]} puts out cannot be split between its examples")
        return axis

    def _checked(self, step: int, output: Any, forward: BlockForward) -> list[Any]:
        """The leaves of a block's output, whose structure must be what it was on the batch before."""
        found = structure_of(output, forward.known, self.schedule.steps[step])
        if not self.chain.structures.setdefault(step, found).matches(found):
            raise LayerwiseError(f"{self.schedule.steps[step]} puts out another structure for each batch")
        return flatten(output)
