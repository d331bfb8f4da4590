"""The model that is trained: a copy of the student before, and as it will be published after."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from eckart.forms.transformers_internals import attention_of
from eckart.model import cast
from eckart.recovery.base import ClosedFormRecovery, Recovery, RecoveryContext
from eckart.recovery.student import Student


def prepare_training(student: Student, recovery: Recovery, context: RecoveryContext) -> PreTrainedModel:
    """Copy the student, and let the recovery prepare the copy; a recovery in closed form takes it as it is."""
    model = student.copy_for_training()
    if "attentions" in recovery.needed_outputs:
        for each in filter(None, (model, context.teacher)):
            each.set_attn_implementation("eager")  # other implementations return no attention maps
    torch.manual_seed(context.recipe.seed)
    if not isinstance(recovery, ClosedFormRecovery):
        recovery.prepare(model, context)
    return model


def finish_training(model: PreTrainedModel, recovery: Recovery, student: Student) -> PreTrainedModel:
    """Let the recovery finish the model, and round it to the type that it will be stored in: it is scored so."""
    model = recovery.finish(model).eval()
    if "attentions" in recovery.needed_outputs:
        model.set_attn_implementation(attention_of(student.model.config) or "eager")
    if student.dtype != torch.float32:
        cast(model, student.dtype)
        cast(model, torch.float32)  # to compute in
    return model
