"""What a tuning will do and about how long it takes, said before the long work begins.

Costs are in passes of the student over a batch of the training. What one takes, a short timing on the first batch says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from eckart.data.inference import evaluating, forward
from eckart.progress import Outlook, Stage, describe_seconds
from eckart.recovery.base import ClosedFormRecovery, Recovery, RecoveryContext
from eckart.recovery.device import on_device
from eckart.recovery.training.data import TrainingData

logger = logging.getLogger(__name__)

STEP, TEACHER = 3.5, 1.0
"""Passes that a step of the training takes, with the optimizer, and that its teacher takes."""

SOLVING = {"refit": 6.0, "block": 30.0}
"""Passes over each row that recoveries in closed form, or block by block, take."""

LOADING = 10.0
"""Seconds in which a fresh process begins and reads a folder back."""


def plan_training(recovery: Recovery, context: RecoveryContext, rows: int) -> Stage:
    """What the training, or the solving, costs.

    Args:
        recovery: what is done.
        context: knows the steps.
        rows: to train on.
    """
    recipe = context.recipe
    if isinstance(recovery, ClosedFormRecovery):
        passes = SOLVING.get(str(recipe.recovery), SOLVING["refit"]) * rows / recipe.batch_size
        return Stage("solving", passes)
    each = STEP + (TEACHER if context.teacher is not None else 0.0)
    return Stage("training", context.total_steps * recipe.gradient_accumulation * each)


def announce(
    model: PreTrainedModel,
    recovery: Recovery,
    context: RecoveryContext,
    data: TrainingData,
    device: torch.device,
    report: Callable[[str], None],
    *,
    scoring: float,
    published: bool,
    verified: bool,
) -> Outlook:
    """Say what a tuning will do and about how long that takes.

    Args:
        model: the student.
        recovery: what is done.
        context: knows steps and teacher.
        data: rows to train on.
        device: computes.
        report: is told.
        scoring: seconds that the scores before have taken.
        published: whether there is a folder to publish.
        verified: whether it is read back.

    Returns:
        The outlook, before its first stage.
    """
    recipe, rows = context.recipe, len(data.rows)
    work = plan_training(recovery, context, rows)
    models = 2 if context.teacher is not None else 1  # that were scored before
    stages = [work, Stage("scoring", seconds=scoring / models)]
    if published:
        stages.append(Stage("publishing", seconds=LOADING * verified + 1))
    outlook = Outlook(stages, report, _time_batch(model, data, recipe.batch_size, device))
    if work.name == "training":
        together = recipe.batch_size * recipe.gradient_accumulation
        what = f"{context.total_steps:,} steps with {together} rows each, of {rows:,}"
    else:
        what = f"on {rows:,} rows"
    teacher = ", with a teacher" if context.teacher is not None else ""
    report(f"{recipe.recovery}: {what}{teacher}; the score before took {scoring:.0f} s")
    if outlook.seconds is not None:
        report(f"{describe_seconds(outlook.seconds)} in all")
    return outlook


def _time_batch(model: PreTrainedModel, data: TrainingData, size: int, device: torch.device) -> float | None:
    """Seconds of a pass over the first batch; None where the model does not run alone on it."""
    inputs = {name: value for name, value in data.collate(data.rows[:size]).items() if name != "labels"}
    try:
        with on_device(device, model), evaluating(model):
            forward(model, {name: value[:1] for name, value in inputs.items()})
            _wait(device)
            start = time.perf_counter()
            forward(model, inputs)
            _wait(device)
            return time.perf_counter() - start
    except Exception as error:  # the training says so
        logger.info("a pass was not timed: %s", error)
        return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
