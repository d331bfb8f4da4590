"""Pairs of what a group of sites reads in the original and in the compressed model, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from eckart.calibration.layerwise import KeptTensors, LayerwiseRunner, replaying
from eckart.errors import NumericalError
from eckart.moments import Halving, real_tokens


class InputPairs:
    """The inputs of the groups of one block, group by group, in the order of the forward pass.

    The pass for the first group is one of the original's whole block: it sees the inputs of all groups, and gives what
    the next block reads. Those of the later groups are kept; where memory does not hold them, the original runs again.

    The compressed model runs once a group, as far as its input, and once to the block's end. Sites that have been
    solved put out in all later passes what they did in the first, so that each computes once, where memory holds that.

    Args:
        before: runs the original.
        now: runs the compressed model, whose sites change between two groups.
        step: the block.
        leaders: a site of each group.
        kept: keeps inputs of the original and outputs of the compressed model.
        halving: runs batches, in halves where memory runs out.
    """

    def __init__(
        self,
        before: LayerwiseRunner,
        now: LayerwiseRunner,
        step: int,
        leaders: Sequence[str],
        kept: KeptTensors,
        halving: Halving,
    ) -> None:
        self.before = before
        self.now = now
        self.step = step
        self.leaders = leaders
        self.kept = kept
        self.halving = halving
        self.solved: list[str] = []  # sites of the compressed model that change no more

    def for_each(self, leader: str, add: Callable[[Tensor, Tensor], None]) -> None:
        """`add(x, x~)` for the real tokens of every batch, or of parts of it: (tokens, n) of both models.

        Where neurons were taken away, zeros stand after those that are left.

        Args:
            leader: the next one.
            add: adds all or nothing, where memory runs out.

        Raises:
            NumericalError: the models do not read inputs of one shape.
            LayerwiseError: the blocks do not form a chain.
        """

        def run(part: Any) -> None:
            for runner in (self.before, self.now):
                runner.split_batch(part)
            x = self._original(leader, part)
            with replaying(self.now.model, self.solved, self.kept, part):
                y = real_tokens(self.now.capture_input(self.step, part, leader), part)
            y = widened(y, x.shape[-1])
            if x.shape != y.shape:
                raise NumericalError(
                    f"{leader} reads {tuple(x.shape)} in the original and {tuple(y.shape)} in the compressed model"
                )
            add(x, y)

        self.before.follow(self.now)
        self.now.follow(self.before)
        with self.before.resident(self.step), self.now.resident(self.step):
            for batch in list(self.now.batches):
                self.halving.run(batch, run)

    def finish(self) -> None:
        """Bring the compressed model to the end of the block, and drop what no later step reads."""

        def run(part: Any) -> None:
            self.now.split_batch(part)
            with replaying(self.now.model, self.solved, self.kept, part, keep=False):
                self.now.run_block(self.step, part)

        with self.now.resident(self.step):
            for batch in list(self.now.batches):
                self.halving.run(batch, run)
        for runner in (self.now, self.before):
            runner.drop_stream(self.step - 1)

    def _original(self, leader: str, part: Any) -> Tensor:
        if leader != self.leaders[0]:
            kept = self.kept.take(leader, part)
            return kept if kept is not None else real_tokens(self.before.capture_input(self.step, part, leader), part)
        captured = self.before.run_and_capture(self.step, part, self.leaders)
        for later in self.leaders[1:]:
            self.kept.put(later, part, captured.pop(later))
        return captured[leader]


def widened(inputs: Tensor, width: int) -> Tensor:
    """Inputs (tokens, k) with zeros after them, (tokens, width); as they are where they are no narrower."""
    missing = width - inputs.shape[-1]
    return functional.pad(inputs, (0, missing)) if missing > 0 else inputs
