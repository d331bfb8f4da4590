"""Recovery by training, from a model to a better one: loaded, trained, scored before and after, published."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from eckart.checkpoint.fingerprint import files_fingerprint
from eckart.checkpoint.journal import Journal
from eckart.checkpoint.load import load
from eckart.checkpoint.lock import OutputLock
from eckart.checkpoint.plugin import mark
from eckart.checkpoint.publish import check_output
from eckart.checkpoint.source import resolve
from eckart.checkpoint.stored import stored_dtype, stored_tensors
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.data import TaskData, kind_of
from eckart.errors import CheckpointError, UsageError
from eckart.model import cast, has_head, shared_parameters
from eckart.recover import Context
from eckart.training import Examples, better, load_examples, train
from eckart.training.examples import load_labelled
from eckart.tuned import TuneResult
from eckart.tuning_recipe import TuneRecipe, make_tune_recipe

logger = logging.getLogger(__name__)

HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
}
ENDINGS = {
    "classification": ("ForSequenceClassification",),
    "regression": ("ForSequenceClassification",),
    "masked": ("ForMaskedLM", "ForPreTraining"),
    "causal": ("ForCausalLM", "LMHeadModel"),
}
KEYS = ("save_steps", "device")
"""Options that a training may be gone on from with another value."""


@dataclass
class _Student:
    """The model before training, in float32 on the CPU, with the type that it is stored in."""

    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    folder: Path | None
    new_head: list[str]
    task: str
    rows: TaskData | None


def tune(
    model: PreTrainedModel | str | Path,
    tokenizer: Any = None,
    *,
    data: Any = None,
    teacher: PreTrainedModel | str | Path | None = None,
    eval_data: Any = None,
    recipe: TuneRecipe | None = None,
    **options: Any,
) -> TuneResult:
    """Train a model, factored or dense, so that quality comes back, or so that it learns a task.

    The model that is passed in stays as it is. The better of the two, by the score on held-out data, is returned.

    Args:
        model: the student: a model, or the folder of one.
        tokenizer: its tokenizer; that of the folder if None.
        data: text or labelled rows: a file, a folder, a hub data set, a `datasets.Dataset`, a list of rows.
        teacher: what is learnt from: a model, a folder, or a name on the hub.
        eval_data: other data to score on; a tenth of `data` is held out without it.
        recipe: or give the fields of :class:`eckart.TuneRecipe` as keyword arguments.
        **options: see `recipe`.

    Returns:
        The model, and what was asked, done and measured.

    Raises:
        EckartError: naming what cannot be read or does not fit.

    Example:
        >>> result = eckart.tune("smol-40", data="texts.txt", teacher="HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> result.save_pretrained("smol-40-tuned")  # doctest: +SKIP
    """
    if recipe is None:
        named = {"model": model, "data": data, "teacher": teacher, "eval_data": eval_data}
        options |= {key: str(value) for key, value in named.items() if isinstance(value, str | Path)}
        recipe = make_tune_recipe(options, "tune")
    return _tune(
        recipe,
        model if not isinstance(model, str | Path) else None,
        tokenizer,
        data if data is not None else recipe.data,
        teacher if teacher is not None else recipe.teacher,
        eval_data if eval_data is not None else recipe.eval_data,
        None,
    )


def tune_checkpoint(
    recipe: TuneRecipe,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    tell: Callable[[str], None] = logger.info,
    stop_after: int | None = None,
) -> tuple[TuneResult, Path]:
    """Train the model that a recipe names, and publish the better of the two.

    Every `save_steps` steps the state is kept in `OUTPUT.partial/`, as tensors and JSON; the same command goes on from
    there after it was broken off.

    Args:
        recipe: with `model`.
        output_dir: a folder that is not there yet.
        overwrite: replace a model folder that is.
        restart: throw away what an unfinished training on the same output has done.
        tell: is told where a training is gone on from.
        stop_after: break off after this step, as if killed.

    Returns:
        The result, and the published folder.

    Raises:
        EckartError: naming what failed, where, and what to do; then nothing is published.
    """
    if recipe.model is None:
        raise UsageError("model: there is none to train. Name the folder of one: eckart tune DIR ...")
    folder = resolve(recipe.model, None, trust_remote_code=recipe.trust_remote_code)
    check_output(output_dir, overwrite=overwrite, source=folder)
    _check_asked(recipe, recipe.data, recipe.teacher)
    with OutputLock(output_dir) as lock:
        asked = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in KEYS}
        key = {
            "command": "tune",
            "model": files_fingerprint(folder),
            "eckart": version("eckart"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "options": {name: value for name, value in asked.items() if value is not None},
        }
        journal = Journal.open(output_dir, key, restart=restart)
        if journal.entries("state"):
            tell(f"going on from {journal.entries('state')[-1]} of an unfinished training")
        result = _tune(recipe, None, None, recipe.data, recipe.teacher, recipe.eval_data, journal, stop_after)
        published = result.save_pretrained(output_dir, overwrite=overwrite, lock=lock)
        journal.remove()
    return result, published


def _check_asked(recipe: TuneRecipe, data: Any, teacher: Any) -> None:
    if data is None:
        raise UsageError("--data: there is nothing to train on. Name text or labelled rows: --data FILE")
    if recipe.room().needs_teacher and teacher is None:
        raise UsageError(
            f"--teacher: recovery {recipe.recovery} learns from a teacher. Name the model that this one was made from: "
            "--teacher MODEL; or train on the task alone: --recovery full"
        )


def _tune(
    recipe: TuneRecipe,
    model: PreTrainedModel | None,
    tokenizer: Any,
    data: Any,
    teacher: Any,
    eval_data: Any,
    journal: Journal | None,
    stop_after: int | None = None,
) -> TuneResult:
    room = recipe.room()
    _check_asked(recipe, data, teacher)
    seconds: dict[str, float] = {}
    with _random_state(), ExitStack() as stack:
        torch.manual_seed(recipe.seed)
        student = _student(recipe, model, tokenizer, data)
        notes = [f"newly initialised: {', '.join(student.new_head)}"] if student.new_head else []
        taught = _teacher(recipe, teacher, student) if room.needs_teacher else None
        if taught is not None and isinstance(teacher, PreTrainedModel):
            taught = copy.deepcopy(taught)  # its attention and device may be changed
        examples = load_examples(recipe, data, eval_data, student.task, student.model, student.tokenizer, student.rows)
        notes += examples.notes
        with _timed(seconds, "scoring"):
            before = examples.exam.score(student.model)
            extra = {"teacher": examples.exam.score(taught)} if taught is not None else {}
        total = recipe.max_steps or max(1, math.ceil(math.ceil(len(examples.rows) / recipe.batch_size) * recipe.epochs))
        trained = copy.deepcopy(student.model)
        for parameter in trained.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        context = Context(taught, student.task, recipe, total, _head(trained, student), notes)
        if "attentions" in room.wants:
            own = trained.config._attn_implementation
            stack.callback(lambda: trained.set_attn_implementation(own or "eager"))
            trained.set_attn_implementation("eager")  # others return no attention maps
            if taught is not None:
                taught.set_attn_implementation("eager")
        torch.manual_seed(recipe.seed)
        room.prepare(trained, context)
        with _timed(seconds, "training"):
            steps = train(trained, room, context, examples, student.tokenizer, journal, stop_after=stop_after)
        if stop_after is not None and steps["steps"] < total:
            raise KeyboardInterrupt
        trained = room.finish(trained.to("cpu")).eval()  # type: ignore[arg-type]
        _rounded(trained, student.dtype)
        with _timed(seconds, "scoring"):
            after = examples.exam.score(trained)
    kept = trained
    worse, name = not better(examples.exam, after, before), examples.exam.criterion
    if worse and room.shrinks:
        notes.append(f"{name} {before[name]:.4g} before, {after[name]:.4g} in the smaller model that was asked for")
    elif worse:
        notes.append(
            f"training made it worse ({name} {before[name]:.4g} before, {after[name]:.4g} after): the model before it "
            "is kept. Try a lower --learning-rate, more data, or fewer --epochs"
        )
        kept = copy.deepcopy(student.model)
    cast(kept, student.dtype)
    if shared_parameters(kept):
        mark(kept)  # or `save_pretrained` would leave out what it says nothing of
    report = _report(recipe, student, examples, room.report(), steps, {"before": before, "after": after} | extra)
    report |= {"kept": "after" if kept is trained else "before", "notes": notes, "seconds": seconds}
    return TuneResult(kept.eval(), report, recipe, student.tokenizer, student.folder)


def _report(
    recipe: TuneRecipe, student: _Student, examples: Examples, room: dict[str, Any], steps: dict[str, Any], scores: Any
) -> dict[str, Any]:
    return {
        "format_version": 1,
        "kind": "tune",
        "model": type(student.model).__name__,
        "recipe": recipe.model_dump(mode="json"),
        "recovery": recipe.recovery,
        "paper": type(recipe.room()).paper,
        "task": student.task,
        "data": examples.description,
        "new_head": student.new_head,
        "recovered_by": room,
        "training": steps,
        "protocol": examples.exam.protocol,
        "criterion": examples.exam.criterion,
        "scores": scores,
    }


def _student(recipe: TuneRecipe, model: PreTrainedModel | None, tokenizer: Any, data: Any) -> _Student:
    """The model with a head that fits the task, and its labelled rows where it has some."""
    folder = None
    new_head: list[str] = []
    dtype = torch.float32
    if model is None:
        if recipe.model is None:
            raise UsageError("model: there is none to train. Pass a model, or the folder of one.")
        folder = resolve(recipe.model, None, trust_remote_code=recipe.trust_remote_code)
        dtype = stored_dtype(stored_tensors(folder)) or torch.float32
        tokenizer = tokenizer or load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
        model = load(folder, dtype=torch.float32, trust_remote_code=recipe.trust_remote_code)
    else:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if dtype != torch.float32:
            model = copy.deepcopy(model)
            cast(model, torch.float32)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder or 'tokenizer'}: there is no tokenizer, and there is nothing to read text with. Put the "
            "tokenizer's files into the folder (tokenizer.save_pretrained), or pass tokenizer=..."
        )
    task, rows = _task(recipe, model, data)
    if not type(model).__name__.endswith(ENDINGS[task]):
        if folder is None:
            raise UsageError(
                f"task {task}: {type(model).__name__} has no head for it. Load the model with {HEADS[task]}, or pass "
                "its folder."
            )
        settings: dict[str, Any] = {}
        if rows is not None:
            classes = 1 if task == "regression" else max(2, 1 + max(int(row.label) for row in rows))
            kind = "regression" if task == "regression" else "single_label_classification"
            settings = {"num_labels": classes, "problem_type": kind}
        model = load(
            folder, auto_class=HEADS[task], dtype=torch.float32, new_head=new_head, settings=settings,
            trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
    config: Any = model.config
    if task in ("classification", "regression"):
        config.problem_type = "regression" if task == "regression" else "single_label_classification"
        if (task == "regression") != (config.num_labels == 1):
            raise UsageError(
                f"task {task}: the model's head has {config.num_labels} outputs. Use --task "
                f"{'regression' if config.num_labels == 1 else 'classification'}, or start from a model without a head."
            )
        if config.get_text_config().pad_token_id is None:  # heads on causal models find a text's end by its padding
            config.get_text_config().pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return _Student(model.eval(), tokenizer, dtype, folder, new_head, task, rows)


def _task(recipe: TuneRecipe, model: PreTrainedModel, data: Any) -> tuple[str, TaskData | None]:
    """The task that was asked for or fits, and the labelled rows if it has labels."""
    name, config = type(model).__name__, model.config
    task: str | None = recipe.task if recipe.task != "auto" else None
    if task is None:
        if name.endswith("ForSequenceClassification"):
            task = "regression" if config.num_labels == 1 else "classification"
        elif recipe.data_label_column is None and has_head(model):
            if name.endswith(ENDINGS["masked"]):
                task = "masked"
            elif kind_of(config, model) == "causal":
                task = "causal"
        if task is None and recipe.data_label_column is None:
            raise UsageError(
                f"--task: {name} has no head that says what to learn. Name the labels (--data-label-column COLUMN), or "
                "the task: --task classification, regression, masked or causal"
            )
    if task in ("masked", "causal"):
        return task, None
    label2id = getattr(config, "label2id", None) if name.endswith("ForSequenceClassification") else None
    rows = load_labelled(recipe, data, label2id=label2id, task=task)
    if task is None:
        task = "regression" if any(isinstance(row.label, float) for row in rows) else "classification"
    return task, rows


def _teacher(recipe: TuneRecipe, teacher: Any, student: _Student) -> PreTrainedModel:
    """The model that is learnt from, checked to speak the student's language."""
    if isinstance(teacher, PreTrainedModel):
        model = teacher
    else:
        folder = resolve(str(teacher), None, trust_remote_code=recipe.trust_remote_code)
        model = load(folder, dtype=torch.float32, trust_remote_code=recipe.trust_remote_code)
    where = f"--teacher {teacher if not isinstance(teacher, PreTrainedModel) else type(teacher).__name__}"
    if not type(model).__name__.endswith(ENDINGS[student.task]):
        raise UsageError(
            f"{where}: {type(model).__name__} has no head for task {student.task}. Train the teacher on the task first "
            "(eckart tune TEACHER --recovery full), or give one that has been."
        )
    mine: Any = student.model.config
    theirs: Any = model.config
    for key, here, there in (
        ("vocabulary", mine.get_text_config().vocab_size, theirs.get_text_config().vocab_size),
        ("number of labels", mine.num_labels, theirs.num_labels),
    ):
        if here != there and (key == "vocabulary" or student.task == "classification"):
            raise UsageError(
                f"{where}: its {key} is {there}, the student's {here}. Give the model that the student was made from, "
                "or train on the task alone: --recovery full"
            )
    if theirs.get_text_config().pad_token_id is None:
        theirs.get_text_config().pad_token_id = mine.get_text_config().pad_token_id
    return model.eval()


def _head(model: PreTrainedModel, student: _Student) -> tuple[str, ...]:
    """Modules that are trained whatever is frozen: what is new, and a classifier's head."""
    new = {name.rpartition(".")[0] for name in student.new_head}
    if student.task in ("classification", "regression"):
        new |= {name for name, _ in model.named_children() if name != model.base_model_prefix}
    return tuple(sorted(new))


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round to the type that the model will be stored in, and compute in float32: it is scored as it is published."""
    if dtype != torch.float32:
        cast(model, dtype)
        cast(model, torch.float32)


@contextmanager
def _random_state() -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = round(seconds.get(step, 0.0) + time.perf_counter() - start, 2)
