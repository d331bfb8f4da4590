"""What heads are trained on: one pass over the text, in which each block's pooled hidden states are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.adaptive.trial import Recording, behaving, find_pooling, require_rows_can_leave
from eckart.calibration.layerwise.blocks import LayerwiseError, all_blocks, schedule_of
from eckart.data import Batch
from eckart.data.inference import forward, progress
from eckart.errors import ModelError
from eckart.evaluation.sizes import count_sizes


@dataclass(frozen=True)
class ExitStates:
    """What one pass over N rows showed.

    Attributes:
        states: number of blocks -> pooled hidden states after them, (N, n).
        logits: of the model's own head, (N, C).
        labels: (N,) or (N, C); None where there are none.
        costs: multiply-adds of the blocks up to each one, (N, L): column l is what a row that leaves after block l + 1
            has cost.
        tail: multiply-adds of what comes after the blocks, for a row.
    """

    states: dict[int, Tensor]
    logits: Tensor
    labels: Tensor | None
    costs: Tensor
    tail: int

    def of(self, rows: Tensor) -> ExitStates:
        """Some of the rows; their numbers."""
        labels = None if self.labels is None else self.labels[rows]
        states = {after: each[rows] for after, each in self.states.items()}
        return replace(self, states=states, logits=self.logits[rows], labels=labels, costs=self.costs[rows])

    def part(self, number: int, parts: int) -> ExitStates:
        """One of several pooled states that were kept side by side."""
        states = {after: each.chunk(parts, 1)[number] for after, each in self.states.items()}
        return replace(self, states=states)

    def costs_of(self, exits: Sequence[int], head: int) -> tuple[Tensor, float]:
        """Multiply-adds of a row that leaves at each exit or stays to the end, (N, exits + 1); of all without exits.

        Args:
            exits: numbers of blocks.
            head: multiply-adds of one head.
        """
        passed = torch.arange(1, len(exits) + 1).double() * head
        early = self.costs[:, [after - 1 for after in exits]] + passed
        late = self.costs[:, -1:] + len(exits) * head
        return torch.cat([early, late], 1) + self.tail, float((self.costs[:, -1] + self.tail).sum())


def find_blocks(model: PreTrainedModel, batch: Batch) -> tuple[str, ...]:
    """Names of the blocks that a pass calls, in the order of the calls.

    Raises:
        ModelError: the model cannot be walked block by block.
    """
    try:
        steps = schedule_of(model, all_blocks(model), lambda: forward(model, batch.inputs)).steps
    except LayerwiseError as error:
        raise ModelError(
            f"{type(model).__name__} cannot be walked block by block ({error}), so nothing can leave between its "
            "blocks. Distil it into a smaller model instead: --recovery distil"
        ) from error
    lists = dict.fromkeys(step.rpartition(".")[0] for step in steps)
    if len(lists) > 1:
        raise ModelError(
            f"{type(model).__name__} runs the blocks of {len(lists)} lists ({', '.join(lists)}), and rows can leave "
            "one chain of blocks. Distil it into a smaller model instead: --recovery distil"
        )
    return steps


def try_exits(model: PreTrainedModel, blocks: Sequence[str], exits: Sequence[int], batches: Sequence[Batch]) -> str:
    """Try whether rows can leave at these exits; returns what the model's own head reads: "first" or "mean".

    Raises:
        ModelError: they cannot, or the head reads something else.
    """
    batch = next((batch for batch in batches if len(batch) > 1), batches[0])
    few = batch.rows(0, min(3, len(batch)))
    if len(few) > 1:
        require_rows_can_leave(model, blocks, lambda: forward(model, few.inputs).logits, len(few), exits)
    row = max(batches, key=lambda each: int(each.num_tokens / len(each))).rows(0, 1)
    return find_pooling(model, blocks, lambda: forward(model, row.inputs).logits, max(1, row.num_tokens))


def record_states(
    model: PreTrainedModel,
    blocks: Sequence[str],
    exits: Sequence[int],
    pool: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[Batch],
) -> ExitStates:
    """Run the model once over all rows.

    Args:
        model: in evaluation mode; tokens may leave it, rows may not.
        blocks: names of its blocks in the order of their calls.
        exits: numbers of blocks after which there is to be a head.
        pool: what a head reads.
        batches: with labels or without.
    """
    recording = Recording(tuple(exits), pool)
    logits, labels = [], []
    with behaving(model, recording, blocks), torch.no_grad():
        for batch in progress(batches, what="hidden states"):
            logits.append(forward(model, batch.inputs).logits.float().cpu())
            labels.append(batch.inputs.get("labels"))
    told = [each for each in labels if each is not None]
    tokens = torch.stack([torch.cat(passes) for passes in recording.tokens], 1)  # (N, L)
    each, tail = _multiply_adds(model, blocks)
    return ExitStates(
        {after: torch.cat(found) for after, found in recording.states.items()},
        torch.cat(logits),
        torch.cat(told) if len(told) == len(labels) else None,
        (tokens * torch.tensor(each)).cumsum(1).double(),
        tail,
    )


def _multiply_adds(model: Any, blocks: Sequence[str]) -> tuple[list[int], int]:
    """Multiply-adds of each call of a block, per token; and of what comes after them, per row."""
    sizes = count_sizes(model, dict.fromkeys(blocks))
    inside = [sizes.modules[name].multiply_adds for name in blocks]
    return inside, max(0, sizes.model.multiply_adds - sizes.named.multiply_adds)
