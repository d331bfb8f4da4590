"""The order of a tuning: open student and teacher, read data, score, train or solve, score again, keep the better."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.save import stored_bytes
from eckart.config import refuse_fallbacks, resolve_device
from eckart.data import require_data
from eckart.model import preserve_random_state
from eckart.recovery.base import ClosedFormRecovery, Recovery, RecoveryContext
from eckart.recovery.device import on_device
from eckart.recovery.inputs import settle_inputs
from eckart.recovery.outlook import announce
from eckart.recovery.output import output_lock, training_journal, training_key
from eckart.recovery.prepare import finish_training, prepare_training
from eckart.recovery.recipe import TuneRecipe
from eckart.recovery.result import Clock, TuneResult, choose_better, make_report
from eckart.recovery.student import check_fits, find_pooling, open_student, open_teacher
from eckart.recovery.training import count_steps, load_training_data, solve, train
from eckart.storage.lock import output_path
from eckart.storage.publish import check_space

logger = logging.getLogger(__name__)


def tune(
    model: PreTrainedModel | str | Path | None,
    tokenizer: Any = None,
    *,
    data: Any = None,
    teacher: PreTrainedModel | str | Path | None = None,
    eval_data: Any = None,
    recovery: Recovery | str | None = None,
    recipe: TuneRecipe | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    report_progress: Callable[[str], None] = logger.info,
    **options: Any,
) -> TuneResult:
    """Train a model, factored or dense, or solve its factors again: to recover quality, or to learn a task.

    The better model by the score on held-out data is returned, the one before or the one after. Where the score is an
    accuracy, the trained model must be better by more than chance. Models that are passed in stay as they are.

    With `output_dir` the result is published there. Every `save_steps` steps the state is kept in `OUTPUT.partial/`, as
    tensors and JSON; the same call resumes from there after an interruption.

    Args:
        model: the student: a model, or the folder or hub name of one.
        tokenizer: of the student; default: the one in its folder.
        data: text or labeled rows: a file, a folder, a hub data set, a `datasets.Dataset`, a list of rows.
        teacher: the model to learn from: a model, or the folder or hub name of one.
        eval_data: other data to score on; without it a tenth of `data` is held out.
        recovery: an object such as `LoRA(rank=8)`, of a class of your own too, or the name of a registered one.
        recipe: all other options in one object; keyword options override it.
        output_dir: the folder to publish.
        overwrite: replace a model folder that was published there.
        restart: discard an unfinished training on the same output.
        verify: let a fresh process read the folder back, and compare, before it is published.
        report_progress: told what is done, and how long the rest takes.
        **options: fields of :class:`eckart.TuneRecipe`.

    Returns:
        The model, and what was asked, done and measured.

    Raises:
        EckartError: naming what failed, where, and what to do; then nothing is published.

    Example:
        >>> tune("smol-40", data="texts.txt", teacher="HuggingFaceTB/SmolLM2-135M", recovery=LoRA())  # doctest: +SKIP
    """
    # 1. The options; an output folder that cannot be written is refused.
    given = {"model": model, "teacher": teacher, "data": data, "eval_data": eval_data}
    recipe, recovery, inputs = settle_inputs(given, tokenizer, recovery, recipe, options)
    require_data(inputs.data, inputs.eval_data)
    device = resolve_device(recipe.device)
    logger.info("recovery %s on %s", recipe.recovery, device)
    clock = Clock()
    with preserve_random_state(), output_lock(output_dir, inputs, overwrite=overwrite, restart=restart) as lock:
        torch.manual_seed(recipe.seed)

        # 2. The student and the teacher.
        student = open_student(recipe, inputs.model, inputs.tokenizer, inputs.data, recovery)
        if output_dir is not None:
            check_space(output_path(output_dir), stored_bytes(student.model))
        check_fits(recovery, student)
        notes = [f"newly initialized: {', '.join(student.new_head)}"] if student.new_head else []
        if student.left_out:
            notes.append("trained without the language head that the model was saved with: no embedding reads it")
        teacher_model = None
        if recovery.needs_teacher or (recovery.own_teacher and student.task == "logits"):
            teacher_model = open_teacher(recipe, inputs.teacher, student).to(device)  # type: ignore[arg-type]
        elif inputs.teacher is not None and not recovery.own_teacher:
            notes.append(
                f"the teacher was not used for training: recovery {recipe.recovery} learns from the task alone"
            )
        pooling = find_pooling(recipe, student, inputs.teacher) if student.task == "embedding" else None

        # 3. The data: rows to train on, and a scorer on what is held out.
        training_data = load_training_data(
            recipe, inputs.data, inputs.eval_data, student.task, student.model, student.tokenizer, student.rows,
            teacher=teacher_model, pooling=pooling,
        )  # fmt: skip
        notes += training_data.notes
        scorer = training_data.scorer

        # 4. The score before.
        with clock("scoring"), on_device(device, student.model):
            before = scorer.score(student.model)
            scores = {"before": before.numbers}
            teacher_scores = {}
            if teacher_model is not None and not scorer.against_teacher:
                teacher_scores = {"teacher": scorer.score(teacher_model).numbers}

        key = training_key(recipe, student.model, teacher_model, training_data) if output_dir is not None else {}
        with training_journal(output_dir, key, restart=restart) as journal, ExitStack() as stack:
            # 5. A copy is prepared, then trained, or solved in closed form.
            context = RecoveryContext(
                teacher_model, student.task, recipe, count_steps(recipe, len(training_data.rows)),
                student.output_head(), notes, pooling=pooling, journal=journal,
            )  # fmt: skip
            outlook = announce(
                student.model, recovery, context, training_data, device, report_progress,
                scoring=clock.seconds["scoring"], published=output_dir is not None, verified=verify,
            )  # fmt: skip
            stack.enter_context(outlook)
            trained = prepare_training(student, recovery, context)
            if isinstance(recovery, ClosedFormRecovery):
                outlook.enter("solving")
                with clock("solving"):
                    done = {"solving": solve(trained, recovery, context, training_data, device)}
            else:
                outlook.enter("training")
                with clock("training"):
                    done = {
                        "training": train(trained, recovery, context, training_data, student.tokenizer, device, journal)
                    }

            # 6. It is finished as it will be published, and scored again.
            outlook.enter("scoring")
            trained = finish_training(trained, recovery, student)
            with clock("scoring"), on_device(device, trained):
                after = scorer.score(trained)
            scores |= {"after": after.numbers} | teacher_scores

            # 7. The better one is kept.
            kept, kept_stage = choose_better(student, trained, recovery, scorer, before, after, notes)

            # 8. The report, and the published folder.
            report = make_report(recipe, recovery, student, training_data, scores, device)
            report |= done | {"kept": kept_stage, "notes": notes, "seconds": clock.seconds}
            result = TuneResult(kept, report, recipe, student.tokenizer, student.folder, recovery=recovery)
            refuse_fallbacks(notes, strict=recipe.strict)
            if output_dir is not None:
                outlook.enter("publishing")
                result.save_pretrained(output_dir, overwrite=overwrite, lock=lock, verify=verify)
    return result
