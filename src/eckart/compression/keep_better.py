"""Keep what a stage made of the smaller model if held-out text says that it is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from eckart.compression.assemble import set_lean
from eckart.compression.context import CompressionContext
from eckart.compression.measure import measure_quality
from eckart.compression.stages import Stages
from eckart.errors import NumericalError, OtherProcessError
from eckart.evaluation.quality import distance_to_original


def keep_if_better(
    context: CompressionContext,
    compressed: PreTrainedModel,
    measured: dict[str, Any] | None,
    stages: Stages,
    stage: str,
    left_out: str,
    make: Callable[[], tuple[PreTrainedModel, list[str]]],
) -> tuple[PreTrainedModel, dict[str, Any] | None, list[str]]:
    """Run a stage that makes a changed copy of the smaller model.

    Args:
        context: the original and the data.
        compressed: the smaller model.
        measured: its quality on held-out text, where it was measured.
        stages: is told what the stage brought.
        stage: its name.
        left_out: how a note begins that says that the copy was not kept.
        make: makes the copy, with notes; `compressed` itself where that could not be.

    Returns:
        The better of the two models, its measured quality where it was measured, and notes.
    """
    try:
        with context.timer.step(stage):
            changed, notes = make()
        set_lean(changed, context.workspace.streaming)
        if changed is compressed or context.held_out is None:
            return changed, measured, notes
        with context.timer.step("measuring"):
            before = measured or measure_quality(context, compressed)
            after = measure_quality(context, changed) if before else {}
    except (NumericalError, OtherProcessError) as error:  # all processes take the same way
        return compressed, measured, [f"{left_out}: {error}"]
    if not before:
        return changed, None, notes
    near, far = distance_to_original(before), distance_to_original(after)
    better = far <= near
    if not stages.found:
        stages.add("factors", near, kept=True)
    stages.add(stage, far, kept=better)
    if better:
        return changed, after, notes
    notes.append(f"{left_out}: held-out distance to the original {near:.4g} before it, {far:.4g} after")
    return compressed, before, notes
