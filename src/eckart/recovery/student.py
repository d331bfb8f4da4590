"""The student, a model with its task and output head, and the teacher that fits it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.adaptive import behaviors_of, detach
from eckart.checkpoint.exact import load_exactly
from eckart.checkpoint.load import load
from eckart.checkpoint.source import resolve
from eckart.checkpoint.stored import stored_dtype, stored_tensors
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.data import Pooling, TaskData
from eckart.data.model_kind import CLASSIFIERS, has_head, head_problem, problem_of
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.evaluation.sentence import find_pooling as read_pooling
from eckart.model import cast, factored_modules, has_output_head, shared_clone, unshare_storage
from eckart.quantization import kind_of
from eckart.recovery.base import ClosedFormRecovery, Recovery
from eckart.recovery.choose_task import AUTO_CLASSES, find_task, has_head_for
from eckart.recovery.recipe import TuneRecipe


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
        trust_remote_code: whether the model's own code may run.
        left_out: whether the folder's model has a language head, which nobody reads and the student has not.
    """

    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    folder: Path | None
    new_head: list[str]
    task: str
    rows: TaskData | None
    original: PreTrainedModel | None = None
    trust_remote_code: bool = False
    left_out: bool = False

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
        """The model before training, bit for bit and with its configuration, sharing nothing with the caller's.

        A head that was newly initialized is part of it.
        """
        if self.original is not None:
            model: PreTrainedModel = shared_clone(self.original).to("cpu")  # type: ignore[arg-type]
            unshare_storage(model, self.original)
            return model
        if self.folder is None or self.new_head:
            cast(self.model, self.dtype)
            return self.model
        return load_exactly(self.folder, trust_remote_code=self.trust_remote_code)


def open_student(
    recipe: TuneRecipe, given: PreTrainedModel | str, tokenizer: Any, data: Any, recovery: Recovery
) -> Student:
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
    left_out = folder is not None and _head_unread(recipe, folder, model)
    if left_out:
        model = load(folder, auto_class="AutoModel", dtype=torch.float32, **trust)  # type: ignore[arg-type]
    if (kind := kind_of(model)) is not None:
        raise ModelError(
            f"{folder or type(model).__name__} is quantized ({kind}): nothing can train integers. Tune the model in "
            f"floating point that it was made from, and quantize the result: eckart export DIR --format factored "
            f"--quantize {kind}"
        )
    if tokenizer is None:
        raise CheckpointError(
            f"{folder or 'tokenizer'}: there is no tokenizer to read the text with. Put the tokenizer's files into the "
            "folder (tokenizer.save_pretrained), or pass tokenizer=..."
        )
    task, rows = find_task(recipe, model, data, recovery)
    if task != "embedding" and not has_head_for(model, task):
        if folder is None:
            raise UsageError(
                f"task {task}: {type(model).__name__} has no output head for it. Load the model with "
                f"{AUTO_CLASSES[task]}, or pass its folder."
            )
        settings = _settings_of_new_head(task, rows) if rows is not None else {}
        model = load(
            folder, auto_class=AUTO_CLASSES[task], dtype=torch.float32, new_head=new_head, settings=settings, **trust
        )
    if task in ("classification", "regression"):
        _set_up_classifier(model, task, tokenizer)
    trusted = recipe.trust_remote_code
    return Student(model.eval(), tokenizer, dtype, folder, new_head, task, rows, original, trusted, left_out)


def _head_unread(recipe: TuneRecipe, folder: Path, model: PreTrainedModel) -> bool:
    """Whether a folder holds an embedding model that was saved with a language head, and its embeddings are taught."""
    embeds = recipe.task == "embedding" or (recipe.task == "auto" and recipe.data_label_column is None)
    return embeds and has_output_head(model) and read_pooling(folder, model) is not None


def _settings_of_new_head(task: str, rows: TaskData) -> dict[str, Any]:
    """What the configuration says of a head that is made for these labels."""
    labels = [row.label for row in rows]
    if task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if isinstance(labels[0], list):
        return {"num_labels": len(labels[0]), "problem_type": "multi_label_classification"}
    classes = max(2, 1 + max(int(label) for label in labels if not isinstance(label, list)))
    return {"num_labels": classes, "problem_type": "single_label_classification"}


def _set_up_classifier(model: PreTrainedModel, task: str, tokenizer: Any) -> None:
    config: Any = model.config
    if (task == "regression") != (problem_of(config) == "regression"):
        other = "classification" if task == "regression" else "regression"
        raise UsageError(
            f"task {task}: the model's output head has {config.num_labels} outputs for a {problem_of(config)}. Use "
            f"--task {other}, or start from a model without an output head."
        )
    text = config.get_text_config()
    if text.pad_token_id is None:  # classifiers on causal models find a text's end by its padding
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        text.pad_token_id = next((token for token in known if token is not None and token < text.vocab_size), None)


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
            "or predictions (--recovery distil or refit, with --teacher MODEL), or name the labels of another task "
            "(--data-label-column COLUMN)"
        )
    if others := [name for name in behaviors_of(student.model) if name not in recovery.keeps_behaviors]:
        raise UsageError(
            f"recovery {recovery.name}: the model has {' and '.join(others)}, which was made for its weights as they "
            "are. Give the model that it was made from, and let it do less for easy inputs after this."
        )
    factored = next(iter(factored_modules(student.model)), None)
    if recovery.needs_dense_model and factored is not None:
        raise UsageError(
            f"recovery {recovery.name} starts from a dense model, and {factored} is factored already. Give the "
            "original, or its dense weights (eckart export DIR --format dense); the factors themselves are trained by "
            "--recovery distil, full or lora."
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
    detach(model)  # what is learned is what the whole of it says
    if student.task == "embedding":
        bare: Any = model.base_model
        model = bare if has_output_head(model) else model
    elif not has_head_for(model, student.task):
        raise UsageError(
            f"--teacher {name}: {type(model).__name__} has no output head for task {student.task}. Train the teacher "
            "on the task first (eckart tune TEACHER --recovery full), or give one that has been."
        )
    labels = has_head(student.model.config, student.model, *CLASSIFIERS, "AutoModelForTokenClassification")
    mine: Any = student.model.config
    theirs: Any = model.config
    for key, here, there in (
        ("vocabulary", mine.get_text_config().vocab_size, theirs.get_text_config().vocab_size),
        ("number of labels", mine.num_labels, theirs.num_labels),
        ("problem_type", head_problem(student.model), head_problem(model)),
    ):
        labeled = student.task in ("classification", "regression") or (student.task == "logits" and labels)
        if here != there and (key == "vocabulary" or labeled):
            raise UsageError(
                f"--teacher {name}: its {key} is {there}, the student's {here}. Give the model that the student was "
                "made from, or train on the task alone: --recovery full"
            )
    if theirs.get_text_config().pad_token_id is None:
        theirs.get_text_config().pad_token_id = mine.get_text_config().pad_token_id
    return model.eval().requires_grad_(False)
