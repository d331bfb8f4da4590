"""Train the blocks of the smaller model one after another, and keep that if it is better."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration import show_steps
from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import LayerwiseError, LayerwiseRunner, all_blocks, start_runner
from eckart.compression.assemble import Assembly
from eckart.compression.context import CompressionContext
from eckart.compression.keep_better import keep_if_better
from eckart.compression.output_error import distance_by_token
from eckart.compression.refine_blocks import (
    BlockRefinement,
    NoBackwardError,
    left_as_they_are,
    put_values,
    without_gradients,
)
from eckart.compression.refit import resume_step
from eckart.compression.stages import Stages
from eckart.compression.train_block import BlockFit, BlockTraining
from eckart.compression.training_text import TrainingText, count_passes, describe_passes
from eckart.data import CalibrationData
from eckart.errors import ModelError, UsageError
from eckart.model import ComputePlacement, WeightLoader, shared_clone

STAGE = "refined"
"""The stage of a run under which the parameters of refined blocks are stored."""

TRAINING = BlockTraining()

COST = 8.0
"""How much longer a refinement takes than gathering the statistics, about."""

LEFT_OUT = "the refinement was left out"


def plan_refinement(context: CompressionContext) -> str:
    """Say what a refinement will take, or refuse one that cannot be, before the long work.

    Returns:
        A line for people.

    Raises:
        UsageError: there is too little text to hold some of it out, the model cannot be run block by block, or its
            layers are one and the same block.
    """
    data = context.refining
    text = None if data is None else TrainingText.of(data.batches, context.workspace.processes)
    if data is None or text is None:
        raise UsageError(
            "--refine: there is too little text: a part must be held out, to tell which epoch is best. "
            "Give more: --num-samples, --data."
        )
    try:
        runner = _start_runner(context, context.model, context.weights, data, "trial")
    except LayerwiseError as error:
        raise UsageError(
            f"--refine: {type(context.model).__name__} cannot be run block by block ({error}). Leave --refine out, and "
            "train the result as a whole instead: eckart tune DIR --recovery distil"
        ) from error
    if all(count > 1 for count in Counter(runner.schedule.steps).values()):
        raise UsageError(
            f"--refine: the layers of {type(context.model).__name__} are one and the same block, which cannot be "
            "trained for each of them. Leave --refine out, and train the result as a whole instead: eckart tune DIR "
            "--recovery distil"
        )
    blocks = len(runner.schedule.steps)
    return f"refinement: {blocks} blocks, {describe_passes(context, data, TRAINING.epochs, COST)}"


def refine_if_better(
    context: CompressionContext,
    seed: int,
    compressed: PreTrainedModel,
    assembly: Assembly,
    measured: dict[str, Any] | None,
    stages: Stages,
) -> tuple[PreTrainedModel, dict[str, Any] | None, list[str]]:
    """Train a copy of the model block by block, and return it unless held-out text says that it was better before.

    Args:
        context: the original and the data.
        seed: of the order of the text.
        compressed: the smaller model; it is not changed.
        assembly: shares what is stored.
        measured: its quality on held-out text, where it was measured.
        stages: is told what the training brought.

    Returns:
        The better of the two models, its measured quality where it was measured, and notes.
    """
    return keep_if_better(
        context, compressed, measured, stages, "refinement", LEFT_OUT,
        lambda: refine_model(context, seed, compressed, assembly),
    )  # fmt: skip


def refine_model(
    context: CompressionContext, seed: int, compressed: PreTrainedModel, assembly: Assembly
) -> tuple[PreTrainedModel, list[str]]:
    """Make a copy of the compressed model in which every block is trained, one after another.

    A block that an interrupted run has finished is read from the store.

    Returns:
        The copy, or `compressed` itself where it cannot be run block by block; and notes.
    """
    processes, data = context.workspace.processes, context.refining
    assert data is not None
    text = TrainingText.of(data.batches, processes)
    assert text is not None
    refined = shared_clone(compressed)
    own = CalibrationData(text.batches)
    with without_gradients(refined):
        loader = WeightLoader(refined, ComputePlacement(context.weights.device, torch.float32))
        try:
            with forward_context(context.model, context.weights, all_blocks(context.model))(None):
                distance = distance_by_token(context.model, data.batches[0], context.pooling)
            before = _start_runner(context, context.model, context.weights, own, "original")
            now = _start_runner(context, refined, loader, own, "refined")
        except LayerwiseError as error:
            why = f"{type(refined).__name__} cannot be run block by block ({error})"
            return compressed, [f"{LEFT_OUT}: {why}"]
        training = replace(TRAINING, epochs=count_passes(context, data, TRAINING.epochs), seed=seed)
        work = BlockRefinement(before, now, text, distance, training, processes)
        done = set(context.workspace.finished(STAGE))
        steps = range(now.schedule.tail)
        notes: list[str] = []

        def keep(step: int, values: dict[str, Tensor], fit: BlockFit | None) -> None:
            context.workspace.keep(STAGE, str(step), values, {"fit": vars(fit) if fit is not None else None})
            _install(refined, assembly, now, step)

        for step in steps:
            if str(step) in done:
                assembly.share_entry(STAGE, str(step))
                _install(refined, assembly, now, step)
        first = next((step for step in steps if str(step) not in done), len(steps))
        start = resume_step(first, before, now, processes) if 0 < first < len(steps) else first
        try:
            work.run(show_steps(range(start, len(steps)), "refining"), set(map(int, done)), keep)
        except LayerwiseError as error:  # this text takes another way through the model than the example that was tried
            why = f"{type(refined).__name__} cannot be run block by block ({error})"
            if processes.size > 1 and isinstance(error, NoBackwardError):  # the others wait for this one's gradients
                raise ModelError(f"{why}. Leave --refine out.") from error
            refined, notes = compressed, [f"{LEFT_OUT}: {why}"]
        finally:
            before.drop_all()
            now.drop_all()
        if refined is not compressed:
            notes += left_as_they_are(now)
    return refined, notes


def _start_runner(
    context: CompressionContext,
    model: PreTrainedModel,
    weights: WeightLoader,
    data: CalibrationData,
    name: str,
) -> LayerwiseRunner:
    assert context.refining is not None
    return start_runner(
        model,
        context.names,
        data.batches,
        context.refining.batches[0].rows(0, 1),
        context.workspace.hidden_state_cache(),
        context=forward_context(model, weights, all_blocks(model)),
        device=weights.device,
        name=name,
    )


def _install(refined: PreTrainedModel, assembly: Assembly, now: LayerwiseRunner, step: int) -> None:
    """Put the stored parameters of a step in place."""
    put_values(refined, now.schedule.steps[step], assembly.workspace.store.read(STAGE, str(step))[0])
