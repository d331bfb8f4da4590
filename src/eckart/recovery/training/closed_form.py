"""A recovery in closed form: the text in batches, and the recovery that solves on it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.config import default_samples
from eckart.data import Batch
from eckart.data.inference import evaluating
from eckart.data.padding import by_length
from eckart.recovery.base import ClosedFormRecovery, RecoveryContext
from eckart.recovery.device import on_device
from eckart.recovery.training.data import TrainingData
from eckart.storage.cache import Cache


def solve(
    model: PreTrainedModel,
    recovery: ClosedFormRecovery,
    context: RecoveryContext,
    data: TrainingData,
    device: torch.device,
) -> dict[str, Any]:
    """Make a model better in closed form, in place, on a device; afterwards it is on the CPU.

    Args:
        model: the student.
        recovery: solves.
        context: shared with the recovery.
        data: the text; labels are left out where the recovery reads none. Of more rows than calibration, or the
            recovery, takes by default, and no `num_samples` asked for, as many are drawn.
        device: to compute on.

    Returns:
        `rows` and `tokens` that were read.
    """
    batches = _batches(data, context, recovery)
    context.held_out = _group(data, data.held, context) if recovery.reads_labels else []
    with on_device(device, model), evaluating(model), torch.no_grad():
        recovery.solve(model, context, batches, Cache(memory=sys.maxsize, folder=None))
    return {"rows": sum(map(len, batches)), "tokens": sum(batch.num_tokens for batch in batches)}


def _batches(data: TrainingData, context: RecoveryContext, recovery: ClosedFormRecovery) -> list[Batch]:
    """The rows, those of about equal lengths together."""
    recipe = context.recipe
    left_out = () if recovery.reads_labels else ("labels",)
    rows = [{key: value for key, value in row.items() if key not in left_out} for row in data.rows]
    enough = recovery.most_rows or default_samples("causal" if context.task == "causal" else "encoder")
    if recipe.num_samples is None and len(rows) > enough:
        context.notes.append(f"{enough} of {len(rows)} rows were solved on; --num-samples gives another number")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
        rows = [rows[i] for i in order[:enough].sort().values.tolist()]
    return _group(data, rows, context)


def _group(data: TrainingData, rows: list[dict[str, Any]], context: RecoveryContext) -> list[Batch]:
    """Batches of rows of about equal lengths."""
    chosen = by_length([len(row["input_ids"]) for row in rows], context.recipe.batch_size)
    return [Batch(data.collate([rows[i] for i in group]), tuple(group)) for group in chosen]
