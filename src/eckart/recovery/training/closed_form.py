"""A recovery in closed form: the text in batches, and the recovery that solves on it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.config import default_samples, resolve_device
from eckart.data import Batch
from eckart.data.inference import evaluating
from eckart.data.padding import by_length
from eckart.recovery.base import ClosedFormRecovery, RecoveryContext
from eckart.recovery.training.examples import Examples
from eckart.storage.cache import Cache


def solve(
    model: PreTrainedModel, recovery: ClosedFormRecovery, context: RecoveryContext, examples: Examples
) -> dict[str, Any]:
    """Make a model better in closed form, in place.

    Args:
        model: the student.
        recovery: solves.
        context: shared with the recovery.
        examples: the text; labels are left out. Of more rows than calibration takes by default, and no `num_samples`
            asked for, as many are drawn.

    Returns:
        `rows` and `tokens` that were read.
    """
    recipe = context.recipe
    device = resolve_device(recipe.device)
    batches = _batches(examples, context, recipe)
    for one in (model, context.teacher):
        if one is not None:
            one.to(device)  # type: ignore[arg-type]
    with evaluating(model), torch.no_grad():
        recovery.solve(model, context, batches, Cache(memory=sys.maxsize, folder=None))
    return {"rows": sum(map(len, batches)), "tokens": sum(batch.num_tokens for batch in batches)}


def _batches(examples: Examples, context: RecoveryContext, recipe: Any) -> list[Batch]:
    """The rows without labels, those of about equal lengths together."""
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in examples.rows]
    enough = default_samples(context.task)
    if recipe.num_samples is None and len(rows) > enough:
        context.notes.append(f"{enough} of {len(rows)} rows were solved on; --num-samples gives another number")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
        rows = [rows[i] for i in order[:enough].sort().values.tolist()]
    chosen = by_length([len(row["input_ids"]) for row in rows], recipe.batch_size)
    return [Batch(examples.collate([rows[i] for i in group]), tuple(group)) for group in chosen]
