"""What a tuning is called with: the recipe, the recovery, and models and data as objects or by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from eckart.config import merge_recipe
from eckart.errors import UsageError
from eckart.recovery.base import Recovery
from eckart.recovery.recipe import TuneRecipe

NAMED = ("model", "teacher", "data", "eval_data")
"""What is given as an object, or by a name that the recipe keeps."""


@dataclass(frozen=True)
class TuneInputs:
    """What is read: each an object, or the name of a folder, a file or something on the hub.

    Attributes:
        model: the student.
        tokenizer: None for that of the model's folder.
        teacher: None where there is none.
        data: text or labeled rows.
        eval_data: None for a tenth of `data`.
    """

    model: Any
    tokenizer: Any
    teacher: Any
    data: Any
    eval_data: Any


def settle_inputs(
    given: Mapping[str, Any],
    tokenizer: Any,
    recovery: Recovery | str | None,
    recipe: TuneRecipe | None,
    options: Mapping[str, Any],
) -> tuple[TuneRecipe, Recovery, TuneInputs]:
    """Put the arguments of :func:`eckart.tune` together: what is given wins over the recipe.

    Args:
        given: the arguments in :data:`NAMED`; None for one that was not given.
        tokenizer: of the model.
        recovery: an object, a name, or None for the recipe's.
        recipe: None for default options.
        options: fields of the recipe.

    Raises:
        UsageError: an option that is not known, has a bad value or does not go with the recovery; or no model, no data
            or no teacher where there must be one.
    """
    content = dict(options)
    for name, value in given.items():
        if value is not None:  # the recipe keeps names; what is an object, it cannot
            content[name] = str(value) if isinstance(value, str | Path) else None
    if recovery is not None:
        content["recovery"] = recovery
        if "recovery_option" in options and not isinstance(recovery, str):
            raise UsageError(
                "recovery_option: the recovery is an object, which has its settings already. Give them to its class: "
                f"{type(recovery).__name__}(...)"
            )
    settled = merge_recipe(TuneRecipe, recipe, content, "eckart.tune")
    if recovery is None or isinstance(recovery, str):
        built = settled.build_recovery()
    else:  # a fresh one: the same object may be passed to several tunings
        built = replace(recovery) if is_dataclass(recovery) else copy.copy(recovery)
    settled.check_used(built)
    found = {name: getattr(settled, name) if given[name] is None or isinstance(given[name], str | Path) else given[name]
             for name in NAMED}  # fmt: skip
    if built.own_teacher and found["teacher"] is None:
        found["teacher"] = found["model"]
    inputs = TuneInputs(tokenizer=tokenizer, **found)
    _check_complete(settled, built, inputs)
    return settled, built, inputs


def _check_complete(recipe: TuneRecipe, recovery: Recovery, inputs: TuneInputs) -> None:
    if inputs.model is None:
        raise UsageError("model: there is none to train. Name the folder of one: eckart tune DIR ...")
    if inputs.data is None:
        raise UsageError("--data: there is nothing to train on. Name text or labeled rows: --data FILE")
    if recovery.needs_teacher and inputs.teacher is None:
        raise UsageError(
            f"--teacher: recovery {recipe.recovery} learns from a teacher. Name the model that this one was made from: "
            "--teacher MODEL; or train on the task alone: --recovery full"
        )
