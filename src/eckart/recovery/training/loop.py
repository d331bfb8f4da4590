"""The training loop: AdamW, a linear schedule with warmup, and a recovery that is called at fixed points.

The order of the batches depends on the seed and the step alone, and every other random draw is kept in the journal: a
training that was interrupted ends with the weights that it would have had.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from eckart.data.last_token import padding_named, tell_padding
from eckart.errors import NumericalError, UsageError
from eckart.progress import show_bar
from eckart.recovery.base import Recovery, RecoveryContext
from eckart.recovery.training.data import TrainingData
from eckart.recovery.training.masking import mask_tokens
from eckart.recovery.training.order import epoch_batches
from eckart.recovery.training.state import load_state, save_state
from eckart.storage.journal import Journal

CLIP_NORM = 1.0
"""Largest norm of a step's gradients; longer ones are scaled down to it."""

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Parameters without weight decay by their names, as in transformers' Trainer."""


def count_steps(recipe: Any, rows: int) -> int:
    """Optimizer steps of a whole training on so many rows."""
    batches = math.ceil(rows / recipe.batch_size)
    steps = math.ceil(batches / recipe.gradient_accumulation)
    return recipe.max_steps or max(1, math.ceil(steps * recipe.epochs))


def train(
    model: PreTrainedModel,
    recovery: Recovery,
    context: RecoveryContext,
    data: TrainingData,
    tokenizer: Any,
    device: torch.device,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Train a prepared model in place, on one device; afterwards it is on the CPU and in evaluation mode.

    Args:
        model: the student, prepared by the recovery.
        recovery: its loss and hooks.
        context: shared with the recovery.
        data: what is trained on.
        tokenizer: names the mask token.
        device: to compute on.
        journal: keeps the state every `save_steps` steps; a training that it holds is resumed.

    Returns:
        `steps`, `learning_rate`, `resumed_from`, `first_loss` and `last_loss`: means over the first and last tenth of
        the steps.

    Raises:
        NumericalError: the loss is not finite.
        UsageError: gradient checkpointing was asked for, and the model's class has none.
    """
    recipe = context.recipe
    rate = recipe.learning_rate or recovery.learning_rate
    set_seed(recipe.seed)
    model.to(device)  # type: ignore[arg-type]
    if context.teacher is not None:
        context.teacher.to(device).eval()  # type: ignore[arg-type]
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=rate, fused=fused)
    losses = load_state(journal, model, recovery, optimizer) if journal is not None else []
    resumed_from = len(losses)
    if recipe.gradient_checkpointing:
        _checkpoint_gradients(model)
    model.train()
    shown = None if sys.stderr is not None else True
    bar = show_bar(what="training", total=context.total_steps, initial=resumed_from, disable=shown)
    with bar:
        for step, groups in _rows_of_steps(data, recipe, resumed_from, context.total_steps):
            context.step = step
            batches = [data.collate([data.rows[row] for row in rows]) for rows in groups]
            if context.task == "masked":  # a step that is repeated masks the same tokens
                first = recipe.seed * 1_000_003 + step * recipe.gradient_accumulation
                vocabulary = int(model.config.vocab_size)
                batches = [mask_tokens(b, tokenizer, vocabulary, first + i) for i, b in enumerate(batches)]
            losses.append(_add_gradients(model, recovery, context, batches, device))
            recovery.after_backward(model, step)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            for group in optimizer.param_groups:
                group["lr"] = rate * _schedule(step, context.total_steps, recipe.warmup)
            optimizer.step()
            optimizer.zero_grad()
            recovery.after_step(model, step)
            bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
            bar.update()
            if journal is not None and len(losses) % recipe.save_steps == 0:
                save_state(journal, model, recovery, optimizer, losses)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval().to("cpu")
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "learning_rate": rate,
        "resumed_from": resumed_from,
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
    }


def _rows_of_steps(data: TrainingData, recipe: Any, start: int, total: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Each step from `start` on, and the rows of its batches; the last step of an epoch may have fewer batches."""
    lengths = [len(row["input_ids"]) for row in data.rows]
    together = recipe.gradient_accumulation
    steps = math.ceil(math.ceil(len(lengths) / recipe.batch_size) / together)
    for epoch in range(start // steps, math.ceil(total / steps)):
        batches = epoch_batches(lengths, recipe.batch_size, recipe.seed, epoch)
        for step in range(max(start, epoch * steps), min(total, (epoch + 1) * steps)):
            place = (step - epoch * steps) * together
            yield step, batches[place : place + together]


def _add_gradients(
    model: PreTrainedModel,
    recovery: Recovery,
    context: RecoveryContext,
    batches: list[dict[str, Tensor]],
    device: torch.device,
) -> float:
    """Gradients of the mean loss over a step's batches; returns that loss."""
    total = 0.0
    for batch in batches:
        there = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16) if context.recipe.bf16 else nullcontext():
            loss = _loss(model, recovery, context, there) / len(batches)
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"The loss of step {context.step + 1} is {float(loss.detach())}. Lower --learning-rate, or check the "
                "data and the teacher."
            )
        loss.backward()
        total += float(loss.detach())
    return total


def _loss(model: PreTrainedModel, recovery: Recovery, context: RecoveryContext, batch: dict[str, Tensor]) -> Tensor:
    batch, padding = tell_padding(model, batch)
    with padding_named(model, padding):
        outputs = model(**batch, **_arguments(model, recovery))
    taught = None
    if recovery.needs_teacher and context.teacher is not None:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), padding_named(context.teacher, padding):
            taught = context.teacher(**inputs, **_arguments(context.teacher, recovery))
    own = getattr(outputs, "loss", None)  # a model without an output head has none
    own = own if own is not None else torch.zeros((), device=batch["input_ids"].device)
    return recovery.loss(outputs, taught, batch, own)


def _arguments(model: PreTrainedModel, recovery: Recovery) -> dict[str, bool]:
    more = {f"output_{name}": True for name in recovery.needed_outputs}
    if "use_cache" in inspect.signature(model.forward).parameters:
        more["use_cache"] = False
    return more


def _schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: up from 0 in the warmup, then down to 0."""
    rising = round(warmup * total)
    if step < rising:
        return step / max(1, rising)
    return max(0.0, (total - step) / max(1, total - rising))


def _parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameters that are trained: those with weight decay, and biases and norms without it."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[id(parameter) in norms or NO_DECAY.search(name.lower()) is not None].append(parameter)
    return [{"params": found[0], "weight_decay": decay}, {"params": found[1], "weight_decay": 0.0}]


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise UsageError(
            f"gradient_checkpointing: {type(model).__name__} does not support it. Leave it out, and lower --batch-size "
            "(with --gradient-accumulation) to save memory."
        ) from None
