"""Recovery, from a model to a better one: loaded, trained or solved again, scored before and after, published."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from eckart.checkpoint.description import attach_config
from eckart.checkpoint.fingerprint import files_fingerprint
from eckart.checkpoint.source import resolve
from eckart.errors import UsageError
from eckart.forms.transformers_internals import attention_of
from eckart.model import cast, shared_parameters
from eckart.recovery import ClosedFormRecovery, RecoveryContext
from eckart.recovery.recipe import TuneRecipe, make_tune_recipe
from eckart.recovery.result import TuneResult
from eckart.recovery.student import Student, check_fits, head_of, load_student, load_teacher, pooling_of
from eckart.recovery.training import Examples, better, load_examples, solve, train
from eckart.storage.journal import Journal
from eckart.storage.lock import OutputLock
from eckart.storage.publish import check_output

logger = logging.getLogger(__name__)

KEYS = ("save_steps", "device")
"""Options that a training may be gone on from with another value."""


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
    """Train a model, factored or dense, or solve its factors again, so that quality comes back or it learns a task.

    The model that is passed in stays as it is. The better of the two, by the score on held-out data, is returned: the
    trained one only where an accuracy has risen by more than chance would raise it.

    Args:
        model: the student: a model, or the folder of one.
        tokenizer: its tokenizer; that of the folder if None.
        data: text or labeled rows: a file, a folder, a hub data set, a `datasets.Dataset`, a list of rows.
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
    inputs: Sequence[str | Path | None] = (),
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
        overwrite: replace it if it is there, and holds only what eckart has published there.
        inputs: what else was read and is never replaced, such as the file of the recipe.
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
    check_output(output_dir, overwrite=overwrite, inputs=[*inputs, *recipe.inputs, folder])
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
        try:
            result = _tune(recipe, None, None, recipe.data, recipe.teacher, recipe.eval_data, journal, stop_after)
        except BaseException:
            if not journal.entries("state"):  # nothing to go on from, and nothing to be refused by
                journal.remove()
            raise
        published = result.save_pretrained(output_dir, overwrite=overwrite, lock=lock)
        journal.remove()
    return result, published


def _check_asked(recipe: TuneRecipe, data: Any, teacher: Any) -> None:
    if data is None:
        raise UsageError("--data: there is nothing to train on. Name text or labeled rows: --data FILE")
    if recipe.build_recovery().needs_teacher and teacher is None:
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
    recovery = recipe.build_recovery()
    _check_asked(recipe, data, teacher)
    seconds: dict[str, float] = {}
    with _random_state(), ExitStack() as stack:
        torch.manual_seed(recipe.seed)
        student = load_student(recipe, model, tokenizer, data)
        check_fits(recovery, student)
        notes = [f"newly initialized: {', '.join(student.new_head)}"] if student.new_head else []
        taught = load_teacher(recipe, teacher, student) if recovery.needs_teacher else None
        if teacher is not None and taught is None:
            notes.append(f"--teacher was not read: recovery {recipe.recovery} learns from the task alone")
        if taught is not None and isinstance(teacher, PreTrainedModel):
            taught = copy.deepcopy(taught)  # its attention and device may be changed
        pooling = pooling_of(recipe, student, teacher) if student.task == "embedding" else None
        examples = load_examples(
            recipe, data, eval_data, student.task, student.model, student.tokenizer, student.rows, teacher=taught,
            pooling=pooling,
        )  # fmt: skip
        notes += examples.notes
        with _timed(seconds, "scoring"):
            before = examples.scorer.score(student.model)
            scored = taught is not None and not examples.scorer.against_teacher
            extra = {"teacher": examples.scorer.score(taught).numbers} if scored and taught is not None else {}
        total = recipe.max_steps or max(1, math.ceil(math.ceil(len(examples.rows) / recipe.batch_size) * recipe.epochs))
        trained = copy.deepcopy(student.model)
        for parameter in trained.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        context = RecoveryContext(
            taught, student.task, recipe, total, head_of(trained, student), notes, pooling=pooling
        )
        if "attentions" in recovery.wants:
            own = attention_of(trained.config)
            stack.callback(lambda: trained.set_attn_implementation(own or "eager"))
            trained.set_attn_implementation("eager")  # others return no attention maps
            if taught is not None:
                taught.set_attn_implementation("eager")
        torch.manual_seed(recipe.seed)
        if isinstance(recovery, ClosedFormRecovery):
            with _timed(seconds, "solving"):
                done = {"solving": solve(trained, recovery, context, examples)}
        else:
            recovery.prepare(trained, context)
            with _timed(seconds, "training"):
                done = {"training": train(trained, recovery, context, examples, student.tokenizer, journal,
                                          stop_after=stop_after)}  # fmt: skip
            if stop_after is not None and done["training"]["steps"] < total:
                raise KeyboardInterrupt
        trained = recovery.finish(trained.to("cpu")).eval()  # type: ignore[arg-type]
        _rounded(trained, student.dtype)
        with _timed(seconds, "scoring"):
            after = examples.scorer.score(trained)
    kept = trained
    scores = {"before": before.numbers, "after": after.numbers} | extra
    name, worse = examples.scorer.criterion, not better(examples.scorer, after, before)
    found = f"{before.numbers[name]:.4g} before, {after.numbers[name]:.4g}"
    if worse and recovery.shrinks:
        notes.append(f"{name} {found} in the smaller model that was asked for")
    elif worse:
        how = "did not make it better beyond chance" if after.right else "made it worse"
        notes.append(
            f"recovery {recipe.recovery} {how} ({name} {found} after): the model before it is kept. {recovery.remedy}"
        )
        kept = copy.deepcopy(student.model)
    cast(kept, student.dtype)
    if shared_parameters(kept):
        attach_config(kept)  # or `save_pretrained` would leave out what it says nothing of
    report = _report(recipe, student, examples, recovery.report(), scores)
    report |= done | {"kept": "after" if kept is trained else "before", "notes": notes, "seconds": seconds}
    return TuneResult(kept.eval(), report, recipe, student.tokenizer, student.folder)


def _report(
    recipe: TuneRecipe, student: Student, examples: Examples, recovery: dict[str, Any], scores: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format_version": 1,
        "kind": "tune",
        "model": type(student.model).__name__,
        "recipe": recipe.model_dump(mode="json"),
        "recovery": recipe.recovery,
        "paper": type(recipe.build_recovery()).paper,
        "task": student.task,
        "data": examples.description,
        "new_head": student.new_head,
        "recovered_by": recovery,
        "protocol": examples.scorer.protocol,
        "criterion": examples.scorer.criterion,
        "scores": scores,
    }


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
