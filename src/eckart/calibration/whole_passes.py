"""Gather statistics in whole passes through a model, of some blocks' sites at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from eckart.calibration.forward_context import ForwardContext
from eckart.calibration.layerwise import Groups, StatisticsWindow, split_by_block
from eckart.data import Batch
from eckart.data.inference import progress
from eckart.moments import Step, gather

WHOLE = "whole"
"""Name of the window of all sites."""


@dataclass(frozen=True)
class WholePasses:
    """Passes over all batches.

    Attributes:
        model: the model.
        context: makes it ready to run.
        batches: the data.
        step: runs the model on a batch.
        needs: names of statistics.
        common: as for :func:`eckart.moments.gather`.
        blocks_at_once: how many blocks' sites are gathered in one pass; None: all sites.
    """

    model: nn.Module
    context: ForwardContext
    batches: Sequence[Batch]
    step: Step
    needs: frozenset[str]
    common: Mapping[str, frozenset[int]]
    blocks_at_once: int | None

    @property
    def description(self) -> str:
        """How statistics are gathered, in words."""
        number = self.blocks_at_once
        return "at once" if number is None else f"in whole passes, {number} blocks at a time"

    def windows(self, groups: Groups, done: Collection[str] = ()) -> Iterator[StatisticsWindow]:
        """Gather, one window a pass.

        Args:
            groups: leader -> members.
            done: names of windows that are not needed any more.
        """
        for window in self._split(groups):
            if window.name not in done:
                with self.context(None):
                    total = len(self.batches)
                    batches: Iterable[Batch] = progress(self.batches, what="calibrating", total=total)
                    found = gather(self.model, window.groups, batches, self._loss, needs=self.needs, common=self.common)
                window.moments.update(found)
                del found
                yield window

    def _loss(self, batch: Batch) -> Tensor | None:
        loss = self.step(batch)
        return loss if loss is not None and loss.requires_grad else None  # it may depend on no site of a window

    def _split(self, groups: Groups) -> Iterator[StatisticsWindow]:
        """Groups, so many blocks' at a time."""
        blocks = list(split_by_block(groups, self.model).values())
        if len(blocks) == 1:  # there is no list of blocks
            blocks = [{leader: members} for leader, members in groups.items()]
        number = self.blocks_at_once or max(len(blocks), 1)
        for start in range(0, len(blocks), number):
            together = {leader: members for part in blocks[start : start + number] for leader, members in part.items()}
            # Named by what it holds: a resumed run may split the blocks differently.
            leaders = list(together)
            name = WHOLE if number >= len(blocks) else f"{leaders[0]} to {leaders[-1]}, {len(leaders)} inputs"
            yield StatisticsWindow(name, together, {})


def one_example_each(batches: Sequence[Batch]) -> list[Batch]:
    """Every example as a batch of its own."""
    return [batch.rows(i, i + 1) for batch in batches for i in range(len(batch))]
