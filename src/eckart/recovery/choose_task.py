"""What a tuning teaches: the task that was asked for, or the one that fits the model's head and the data."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from eckart.data import TaskData, head_classes, model_kind
from eckart.data.columns import NoSuchColumnError
from eckart.data.model_kind import head_problem
from eckart.errors import UsageError
from eckart.model import has_output_head
from eckart.recovery.base import Recovery
from eckart.recovery.recipe import TuneRecipe
from eckart.recovery.training.data import load_labeled

AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
}
"""Task -> the class that loads a model with an output head for it."""

TAUGHT = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
)
"""What loads heads whose predictions on text can be learned from a teacher's."""

TUNABLE = (
    "Tuned are classifiers and regressions of a text (AutoModelForSequenceClassification), masked and causal language "
    "models (AutoModelForMaskedLM, AutoModelForCausalLM) and encoders of sentence embeddings (AutoModel); by a "
    "teacher's predictions, without labels (--recovery distil --teacher MODEL), also token classification, question "
    "answering and sequence-to-sequence (AutoModelForTokenClassification, ...QuestionAnswering, ...Seq2SeqLM)"
)
"""All heads that can be tuned, in words."""


def find_task(recipe: TuneRecipe, model: PreTrainedModel, data: Any, recovery: Recovery) -> tuple[str, TaskData | None]:
    """The task that was asked for, or that fits, and the labeled rows if it has labels.

    Raises:
        UsageError: the model's head is none that can be tuned, or not for this task; all that can be are listed.
        DataError: the labels cannot be read.
    """
    task: str | None = recipe.task if recipe.task != "auto" else _task_of_head(recipe, model, recovery)
    if task == "embedding":
        _check_pooled(model)
    if task == "logits":
        _check_taught(model, recovery)
    if task in ("masked", "causal", "embedding", "logits"):
        return task, None
    classifies = has_head_for(model, "classification")
    problem = head_problem(model) if classifies else None
    try:
        rows = load_labeled(recipe, data, model=model if classifies else None, task=task)
    except NoSuchColumnError:
        if recipe.data_label_column is None and recipe.task == "auto" and problem and _is_taught(recovery):
            return "logits", None  # a teacher's predictions need no labels
        raise
    if task is None:
        scores = any(isinstance(row.label, float) for row in rows)
        task = "regression" if scores else "classification"
    return task, rows


def has_head_for(model: PreTrainedModel, task: str) -> bool:
    """Whether a model's class has an output head that fits a task."""
    heads = head_classes(model.config, type(model))
    if task == "logits":
        return not set(heads).isdisjoint(TAUGHT)
    if task == "masked":  # BART's head is also said to fill in words; heads for pretraining alone do, and more
        return heads[:1] in (("AutoModelForMaskedLM",), ("AutoModelForPreTraining",))
    return AUTO_CLASSES[task] in heads


def _is_taught(recovery: Recovery) -> bool:
    """Whether there is a model whose predictions are learned."""
    return recovery.needs_teacher or recovery.own_teacher


def _task_of_head(recipe: TuneRecipe, model: PreTrainedModel, recovery: Recovery) -> str | None:
    """The task that a head is for; None for labels on a model that has none yet."""
    if has_head_for(model, "classification"):
        return "regression" if head_problem(model) == "regression" else "classification"
    kind, headed = model_kind(model.config, model), has_output_head(model)
    if recipe.data_label_column is None and not headed and kind != "encoder-decoder":
        return "embedding"
    if recipe.data_label_column is None and headed:
        if has_head_for(model, "masked"):
            return "masked"
        if kind == "causal":
            return "causal"
    if has_head_for(model, "logits") and _is_taught(recovery):
        return "logits"
    if recipe.data_label_column is None or headed:
        raise UsageError(
            f"--task: {type(model).__name__} has no output head that recovery {recovery.name or 'of your own'} can "
            f"train. {TUNABLE}."
        )
    return None


def _check_taught(model: PreTrainedModel, recovery: Recovery) -> None:
    if not has_head_for(model, "logits"):
        raise UsageError(f"--task logits: {type(model).__name__} makes no predictions on text. {TUNABLE}.")
    if not _is_taught(recovery):
        raise UsageError(
            f"--task logits: recovery {recovery.name} has no teacher whose predictions could be learned. Give "
            "--recovery distil --teacher MODEL, or labels: --data-label-column COLUMN"
        )


def _check_pooled(model: PreTrainedModel) -> None:
    """Refuse a model whose output is not the embeddings of one text's tokens.

    Raises:
        UsageError: naming its own task, or what can be done.
    """
    name = type(model).__name__
    if has_output_head(model):
        raise UsageError(
            f"--task embedding: {name} has an output head, whose outputs its users read. Leave --task out, or save the "
            "model without it first: AutoModel.from_pretrained(...).save_pretrained(...)"
        )
    if model_kind(model.config, model) == "encoder-decoder":
        raise UsageError(
            f"--task embedding: {name} reads two texts, and a sentence embedding is made of one. Give its encoder "
            "alone, or name another --task"
        )
