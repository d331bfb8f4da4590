"""The student, a model with its task and output head, and the teacher that fits it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.load import load
from eckart.checkpoint.source import resolve
from eckart.checkpoint.stored import stored_dtype, stored_tensors
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.data import Pooling, TaskData, head_classes, model_kind
from eckart.errors import CheckpointError, UsageError
from eckart.model import cast, factored_modules, has_output_head, shared_clone, unshare_storage
from eckart.recovery.base import ClosedFormRecovery, Recovery
from eckart.recovery.recipe import TuneRecipe
from eckart.recovery.training.data import load_labeled

AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
}
"""Task -> the class that loads a model with an output head for it."""


@dataclass
class Student:
    """The model before training.

    Attributes:
        model: in float32 on the CPU, apart from what the caller passed in: only the storage of numbers may be shared.
        tokenizer: of the model.
        dtype: in which the model is stored, and will be published.
        folder: where the model came from; None if it was passed in.
        new_head: parameters of the output head that were newly initialized.
        task: what is learned.
        rows: the labeled rows, where the task has labels.
        original: the model that was passed in.
    """

    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    folder: Path | None
    new_head: list[str]
    task: str
    rows: TaskData | None
    original: PreTrainedModel | None = None

    def output_head(self) -> tuple[str, ...]:
        """Modules that are trained whatever is frozen: what is newly initialized, and a classifier's output head."""
        names = {name.rpartition(".")[0] for name in self.new_head}
        if self.task in ("classification", "regression"):
            names |= {name for name, _ in self.model.named_children() if name != self.model.base_model_prefix}
        return tuple(sorted(names))

    def copy_for_training(self) -> PreTrainedModel:
        """A copy that shares no memory with the student, with every weight trained."""
        model = shared_clone(self.model)
        unshare_storage(model, self.model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return model

    def own_model(self) -> PreTrainedModel:
        """The model before training, in its dtype, sharing nothing with what the caller passed in."""
        cast(self.model, self.dtype)
        if self.original is not None:
            unshare_storage(self.model, self.original)
        return self.model


def open_student(recipe: TuneRecipe, given: PreTrainedModel | str, tokenizer: Any, data: Any) -> Student:
    """Open the model with an output head that fits the task, and its labeled rows where it has some."""
    folder = original = None
    new_head: list[str] = []
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    if isinstance(given, str):
        folder = resolve(given, recipe.revision, **trust)
        dtype = stored_dtype(stored_tensors(folder)) or torch.float32
        tokenizer = tokenizer or load_tokenizer(folder, **trust)
        model = load(folder, dtype=torch.float32, **trust)
    else:
        original = given
        dtype = next(p.dtype for p in given.parameters() if p.is_floating_point())
        model = shared_clone(given).to("cpu")  # type: ignore[arg-type]
        cast(model, torch.float32)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder or 'tokenizer'}: there is no tokenizer to read the text with. Put the tokenizer's files into the "
            "folder (tokenizer.save_pretrained), or pass tokenizer=..."
        )
    task, rows = find_task(recipe, model, data)
    if task != "embedding" and not _has_head_for(model, task):
        if folder is None:
            raise UsageError(
                f"task {task}: {type(model).__name__} has no output head for it. Load the model with "
                f"{AUTO_CLASSES[task]}, or pass its folder."
            )
        settings: dict[str, Any] = {}
        if rows is not None:
            classes = 1 if task == "regression" else max(2, 1 + max(int(row.label) for row in rows))
            kind = "regression" if task == "regression" else "single_label_classification"
            settings = {"num_labels": classes, "problem_type": kind}
        model = load(
            folder, auto_class=AUTO_CLASSES[task], dtype=torch.float32, new_head=new_head, settings=settings, **trust
        )
    if task in ("classification", "regression"):
        _set_up_classifier(model, task, tokenizer)
    return Student(model.eval(), tokenizer, dtype, folder, new_head, task, rows, original)


def _has_head_for(model: PreTrainedModel, task: str) -> bool:
    """Whether a model's class has an output head that fits a task."""
    heads = head_classes(model.config, type(model))
    if task == "masked":  # BART's head is also said to fill in words; heads for pretraining alone do, and more
        return heads[:1] in (("AutoModelForMaskedLM",), ("AutoModelForPreTraining",))
    return AUTO_CLASSES[task] in heads


def _set_up_classifier(model: PreTrainedModel, task: str, tokenizer: Any) -> None:
    config: Any = model.config
    config.problem_type = "regression" if task == "regression" else "single_label_classification"
    if (task == "regression") != (config.num_labels == 1):
        other = "regression" if config.num_labels == 1 else "classification"
        raise UsageError(
            f"task {task}: the model's output head has {config.num_labels} outputs. Use --task {other}, or start from "
            "a model without an output head."
        )
    if config.get_text_config().pad_token_id is None:  # classifiers on causal models find a text's end by its padding
        config.get_text_config().pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id


def check_fits(recovery: Recovery, student: Student) -> None:
    """Refuse a recovery that does not fit the student.

    Raises:
        UsageError: naming one that does.
    """
    if isinstance(recovery, ClosedFormRecovery) and student.new_head:
        raise UsageError(
            f"recovery {recovery.name}: the model has no output head for task {student.task}, and a new one "
            "would have to be trained. Train it first (--recovery full), or give a model that has one."
        )
    reason = recovery.refusal(student.task)
    if reason is not None:
        raise UsageError(
            f"recovery {recovery.name}, task {student.task}: {reason}. Learn from the original's sentence embeddings "
            "(--recovery distil or refit, with --teacher MODEL), or name the labels of another task "
            "(--data-label-column COLUMN)"
        )
    factored = next(iter(factored_modules(student.model)), None)
    if recovery.needs_dense_model and factored is not None:
        raise UsageError(
            f"recovery {recovery.name} starts from a dense model, and {factored} is factored already. Give the "
            "original, or its dense weights (eckart export DIR --format dense); the factors themselves are trained by "
            "--recovery distil, full or lora."
        )


def find_task(recipe: TuneRecipe, model: PreTrainedModel, data: Any) -> tuple[str, TaskData | None]:
    """The task that was asked for, or that fits, and the labeled rows if it has labels."""
    name, config = type(model).__name__, model.config
    task: str | None = recipe.task if recipe.task != "auto" else None
    if task is None:
        if _has_head_for(model, "classification"):
            task = "regression" if config.num_labels == 1 else "classification"
        elif (
            recipe.data_label_column is None
            and not has_output_head(model)
            and model_kind(config, model) != "encoder-decoder"
        ):
            task = "embedding"
        elif recipe.data_label_column is None and has_output_head(model):
            if _has_head_for(model, "masked"):
                task = "masked"
            elif model_kind(config, model) == "causal":
                task = "causal"
        if task is None and recipe.data_label_column is None:
            raise UsageError(
                f"--task: {name} has no output head that says what to learn. Name the labels (--data-label-column "
                "COLUMN), or the task: --task classification, regression, masked, causal, or embedding for an encoder "
                "alone"
            )
    if task == "embedding":
        _check_pooled(model)
    if task in ("masked", "causal", "embedding"):
        return task, None
    label2id = getattr(config, "label2id", None) if _has_head_for(model, "classification") else None
    rows = load_labeled(recipe, data, label2id=label2id, task=task)
    if task is None:
        task = "regression" if any(isinstance(row.label, float) for row in rows) else "classification"
    return task, rows


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


def find_pooling(recipe: TuneRecipe, student: Student, teacher: Any) -> Pooling:
    """How the tokens of a text become its embedding: as the student's folder says, or the teacher's; else the mean.

    Args:
        recipe: whether the teacher may bring its own code.
        student: may come from a folder.
        teacher: a model, or the folder or hub name of one.
    """
    folders = [student.folder]
    if not isinstance(teacher, PreTrainedModel):
        folders.append(resolve(str(teacher), recipe.teacher_revision, trust_remote_code=recipe.trust_remote_code))
    found = (Pooling.from_folder(folder) for folder in folders if folder is not None)
    return next((pooling for pooling in found if pooling is not None), Pooling()).reading(student.tokenizer)


def open_teacher(recipe: TuneRecipe, teacher: Any, student: Student) -> PreTrainedModel:
    """Open the model to learn from, and check that it fits the student.

    A model that is passed in stays as it is: its numbers are shared, all else is copied.

    Raises:
        UsageError: it has another vocabulary, other labels, or no output head for the task.
    """
    if isinstance(teacher, PreTrainedModel):
        name = type(teacher).__name__
        model = shared_clone(teacher)
        cast(model, torch.float32)
    else:
        name = str(teacher)
        folder = resolve(name, recipe.teacher_revision, trust_remote_code=recipe.trust_remote_code)
        model = load(folder, dtype=torch.float32, trust_remote_code=recipe.trust_remote_code)
    if student.task == "embedding":
        bare: Any = model.base_model
        model = bare if has_output_head(model) else model
    elif not _has_head_for(model, student.task):
        raise UsageError(
            f"--teacher {name}: {type(model).__name__} has no output head for task {student.task}. Train the teacher "
            "on the task first (eckart tune TEACHER --recovery full), or give one that has been."
        )
    mine: Any = student.model.config
    theirs: Any = model.config
    for key, here, there in (
        ("vocabulary", mine.get_text_config().vocab_size, theirs.get_text_config().vocab_size),
        ("number of labels", mine.num_labels, theirs.num_labels),
    ):
        if here != there and (key == "vocabulary" or student.task == "classification"):
            raise UsageError(
                f"--teacher {name}: its {key} is {there}, the student's {here}. Give the model that the student was "
                "made from, or train on the task alone: --recovery full"
            )
    if theirs.get_text_config().pad_token_id is None:
        theirs.get_text_config().pad_token_id = mine.get_text_config().pad_token_id
    return model.eval().requires_grad_(False)
