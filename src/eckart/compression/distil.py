"""Train all blocks of the smaller model together to predict what the original predicts, and keep that if it is better.

    min  mean_t KL(p_0(. | x_<=t) || p(. | x_<=t))

over all parameters of all blocks of the smaller model p; p_0 is the original (Hinton et al. 2015, arXiv 1503.02531;
after an SVD: Noach & Goldberg, AACL 2020). Blocks that are trained one after another cannot see how their errors add
up; these can. It needs the whole model in memory, with the optimizer's state of all that is trained, so it is done
where a run has the model in memory anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.calibration import show_steps
from eckart.calibration.backward_probe import NO_GRADIENTS
from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import all_blocks
from eckart.compression.context import CompressionContext
from eckart.compression.equal_noise import find_equal_noise
from eckart.compression.keep_better import keep_if_better
from eckart.compression.memory_estimate import vocabulary
from eckart.compression.output_error import OutputError, distance_by_token
from eckart.compression.refine_blocks import put_values, rounded, training_copies, without_gradients
from eckart.compression.stages import Stages
from eckart.compression.train_block import BlockTraining, train_block
from eckart.compression.training_text import (
    STEP_TOKENS,
    TrainingText,
    batches_of,
    count_passes,
    describe_passes,
)
from eckart.config import DISTILLED
from eckart.data.inference import evaluating
from eckart.distributed.memory import format_bytes, free_memory
from eckart.errors import UsageError, is_out_of_memory
from eckart.evaluation.output_distance import OutputDistance
from eckart.model import ComputePlacement, WeightLoader, shared_clone

TRAINING = BlockTraining(epochs=DISTILLED, rate=0.15, part=True)
"""The rate is a part of the random change of all parameters that would do as much harm as the compression did, less for
more blocks (:data:`DEPTH_POWER`). If it is still too large, the training goes too far in a good direction, and part of
the way is kept."""

DEPTH_POWER = 2 / 3
"""The power of the number of blocks that the rate is divided by: the changes of a step are not random, and what they do
adds up from block to block. 1/2 would be right for effects that are independent, 1 for effects in one direction; models
of 6 and of 30 blocks were trained well with 2/3."""

MEASURED = 4
"""To find that change, one of this many held-out steps is enough."""

COST = 10.0
"""How much longer a distillation takes than gathering the statistics, about."""

COPIES = 6
"""Numbers in float32 for each parameter that is trained: its value now, before the training and at its best, gradient,
and two of the optimizer."""

TABLES = 6
"""Tables in float32 as large as the logits of a step: those of both models, what is made of them, and gradients."""

LEFT_OUT = "the distillation was left out"


def plan_distillation(context: CompressionContext) -> str:
    """Say what a distillation will take, or refuse one that cannot be, before the long work.

    Returns:
        A line for people.

    Raises:
        UsageError: it cannot be.
    """
    why = why_not(context)
    if why is not None:
        raise UsageError(f"--distil: {why}. Leave --distil out.")
    assert context.distilling is not None
    passes = describe_passes(context, context.distilling, TRAINING.epochs, COST)
    return f"distillation: all blocks together, {passes}"


def why_not(context: CompressionContext) -> str | None:
    """Why the blocks cannot be trained together, or None if they can."""
    workspace, data = context.workspace, context.distilling
    if workspace.streaming:
        return "it needs the whole model in memory, and this run works block by block"
    text = None if data is None else TrainingText.of(data.batches, workspace.processes)
    if data is None or text is None:
        return "there is too little text: a part must be held out, to tell what is better"
    blocks = all_blocks(context.model)
    if not blocks:
        return "the model has no blocks"
    if outside(context.model, blocks) >= {name for name, _ in context.model.named_parameters()}:
        return "the blocks have no weights of their own"
    with forward_context(context.model, context.weights, blocks)(None):
        if distance_by_token(context.model, data.batches[0], context.pooling) is None:
            return "the model does not predict each token"
    needed, free = memory_needed(context.model, blocks, workspace.processes.size), free_memory(context.weights.device)
    if context.weights.device.type == "cpu":
        needed *= workspace.processes.size  # in the same memory
    enough = torch.tensor([float(free is None or needed <= free)])
    workspace.processes.all_reduce({"enough": enough})  # all go the same way
    if int(enough) < workspace.processes.size:
        return f"it takes up to {format_bytes(needed)} of memory, and less is free"
    return None


def memory_needed(model: PreTrainedModel, blocks: Sequence[str], processes: int) -> int:
    """Bytes that a process takes to train all blocks together, for a smaller model as large as the original at most."""
    fixed, stored = outside(model, blocks), dict(model.named_parameters())
    trained = sum(p.numel() for name, p in stored.items() if name not in fixed)
    everything = sum(p.numel() for p in stored.values())
    widened = everything if any(p.dtype != torch.float32 for p in stored.values()) else 0
    logits = STEP_TOKENS * vocabulary(model)
    return 4 * (COPIES * trained + widened + (trained if processes > 1 else 0) + TABLES * logits)


def distil_if_better(
    context: CompressionContext,
    seed: int,
    compressed: PreTrainedModel,
    measured: dict[str, Any] | None,
    stages: Stages,
) -> tuple[PreTrainedModel, dict[str, Any] | None, list[str]]:
    """Train a copy of the model, and return it unless held-out text says that it was better before.

    Args:
        context: the original and the data.
        seed: of the order of the text.
        compressed: the smaller model; it is not changed.
        measured: its quality on held-out text, where it was measured.
        stages: is told what the training brought.

    Returns:
        The better of the two models, its measured quality where it was measured, and notes.
    """
    return keep_if_better(
        context, compressed, measured, stages, "distillation", LEFT_OUT, lambda: distil_model(context, seed, compressed)
    )


def distil_model(
    context: CompressionContext, seed: int, compressed: PreTrainedModel
) -> tuple[PreTrainedModel, list[str]]:
    """Make a copy of the compressed model in which all blocks are trained together.

    Returns:
        The copy, or `compressed` itself where no gradient can be had or memory runs out; and notes.
    """
    processes, data = context.workspace.processes, context.distilling
    assert data is not None
    text = TrainingText.of(data.batches, processes)
    assert text is not None
    original, distilled = context.model, shared_clone(compressed)
    stored = {name: p.dtype for name, p in distilled.named_parameters()}
    blocks = all_blocks(original)
    loader = WeightLoader(distilled, ComputePlacement(context.weights.device, torch.float32))
    training = replace(TRAINING, epochs=count_passes(context, data, TRAINING.epochs), seed=seed)
    distance = OutputDistance("classes", context.pooling)
    error = OutputError(
        distance, original, distilled, partial(distance.run, original), partial(distance.run, distilled), loader.device
    )
    steps, held = [batches_of(text.batches, [examples]) for examples in text.steps], text.held
    measured_on = batches_of(text.batches, held[::MEASURED])
    runs = False  # whether the models were seen to run, so that what fails afterwards is the backward pass
    try:
        with without_gradients(distilled), ExitStack() as stack:
            stack.enter_context(forward_context(original, context.weights, blocks)(None))
            stack.enter_context(evaluating(distilled))
            stack.enter_context(loader.held(""))
            copies = stack.enter_context(training_copies(distilled, outside(distilled, blocks)))
            parameters = list(copies.values())
            noise = find_equal_noise(parameters, measured_on, error, training.least, processes, seed)
            runs = True
            scale = noise / len(blocks) ** DEPTH_POWER
            with torch.enable_grad():
                fit = train_block(
                    parameters, steps, batches_of(text.batches, held), error, training, processes, scale, _show
                )
            values = {name: rounded(name, p, stored[name]) for name, p in copies.items()} if fit.epoch else {}
    except NO_GRADIENTS as failure:
        memory = is_out_of_memory(failure)
        if processes.size > 1 or not (runs or memory):  # the other processes wait for this one's gradients
            raise
        what = "memory ran out" if memory else "no backward pass runs through the model"
        return compressed, [f"{LEFT_OUT}: {what} ({type(failure).__name__}: {_first_line(failure)})"]
    if not values:
        return compressed, [f"{LEFT_OUT}: text that is not trained on is predicted no better"]
    put_values(distilled, "", values)
    return distilled, []


def _show(order: Sequence[int]) -> Iterable[int]:
    return show_steps(order, "distilling")


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [""])[0]


def outside(model: nn.Module, blocks: Sequence[str]) -> set[str]:
    """Names of the parameters that are not in blocks alone: embeddings, heads, and what blocks share with them."""
    inside = {id(module) for block in blocks for module in model.get_submodule(block).modules()}
    others = {id(p) for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) in others}
