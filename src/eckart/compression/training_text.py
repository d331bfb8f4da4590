"""The text that a smaller model is trained on: cut into steps, some of which are held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eckart.calibration.grow_batches import grow_batches
from eckart.compression.context import CompressionContext
from eckart.data import Batch, CalibrationData
from eckart.distributed import Processes

STEP_TOKENS = 1024
"""Tokens of a step of the training at most, padding counted, unless one row has more."""

SAMPLE = 128
"""Tokens that a sample counts as that has none, such as an image."""

LEAST_STEPS = 16
"""Steps that the text is cut into at least, as far as it has so many rows."""

HELD_OUT = 8
"""One of so many steps is not trained on."""

MOST_HELD = 12
"""No more steps than that, which tell a better model from a worse one well enough."""

Examples = tuple[int, ...]


@dataclass(frozen=True)
class TrainingText:
    """The rows that a process runs, and which of them are a step.

    Attributes:
        batches: this process's rows of every step.
        steps: examples of all processes in each step that is trained on.
        held: the same, of those that are not.
    """

    batches: list[Batch]
    steps: tuple[Examples, ...]
    held: tuple[Examples, ...]

    @classmethod
    def of(cls, batches: Sequence[Batch], processes: Processes) -> TrainingText | None:
        """Cut batches into steps, and divide the rows of each among the processes.

        Returns:
            None where there are fewer than two steps: none could be held out.
        """
        tokens = min(STEP_TOKENS, sum(_tokens(batch) for batch in batches) // LEAST_STEPS)
        steps = [part for batch in grow_batches(batches, tokens) for part in _cut(batch, tokens)]
        if len(steps) < 2:
            return None
        apart = max(HELD_OUT, -(-len(steps) // MOST_HELD))
        held = range(apart // 2, len(steps), apart) if len(steps) > apart // 2 else [len(steps) - 1]
        chosen = {step.examples for step in (steps[i] for i in held)}
        own = []
        for step in steps:
            start, stop = (len(step) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
            own += [step.rows(start, stop)] if stop > start else []
        examples = [step.examples for step in steps]
        return cls(own, tuple(e for e in examples if e not in chosen), tuple(e for e in examples if e in chosen))


def _cut(batch: Batch, tokens: int) -> list[Batch]:
    """Pieces of a batch of so many tokens at most, but of one row at least."""
    length = _tokens(batch) // max(1, len(batch))
    rows = max(1, tokens // length) if length else len(batch)
    return [batch.rows(i, min(i + rows, len(batch))) for i in range(0, len(batch), rows)]


def _tokens(batch: Batch) -> int:
    return sum(mask.numel() for mask in batch.masks().values()) or SAMPLE * len(batch)


def size_of(batches: Sequence[Batch]) -> int:
    """Tokens, or of data without any, such as images, samples."""
    return sum(batch.num_tokens for batch in batches) or sum(len(batch) for batch in batches)


def batches_of(batches: Iterable[Batch], steps: Sequence[Examples]) -> list[Batch]:
    """The batches that hold rows of steps."""
    wanted = [set(examples) for examples in steps]
    return [batch for batch in batches if any(set(batch.examples) <= examples for examples in wanted)]


def whole_passes(wanted: int, there: int) -> int:
    """Passes over what is there that come nearest to as much as is wanted; one at least."""
    return max(1, round(wanted / max(1, there)))


def count_passes(context: CompressionContext, text: CalibrationData, same: int) -> int:
    """Passes over a text that take as long as so many over the text that the statistics read."""
    assert context.data is not None
    return whole_passes(same * size_of(context.data.batches), size_of(text.batches))


def times_of_statistics(context: CompressionContext, text: CalibrationData, same: int, cost: float) -> float:
    """How much longer a training takes than gathering the statistics, about.

    Args:
        context: knows the text of the statistics.
        text: that is trained on.
        same: passes over the text of the statistics that take as long.
        cost: how much longer these take than the statistics.
    """
    assert context.data is not None
    return cost * count_passes(context, text, same) * size_of(text.batches) / (same * size_of(context.data.batches))


def describe_passes(context: CompressionContext, text: CalibrationData, same: int, cost: float) -> str:
    """Say how long a training takes; the arguments are those of :func:`times_of_statistics`."""
    cut = TrainingText.of(text.batches, context.workspace.processes)
    assert cut is not None
    passes, times = count_passes(context, text, same), times_of_statistics(context, text, same, cost)
    often = "" if passes == 1 else f"{passes} passes of "
    return f"{often}{len(cut.steps)} steps, about {times:.0f} times as long as the statistics"
