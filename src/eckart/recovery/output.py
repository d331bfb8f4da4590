"""The output folder of a tuning: its lock, and the journal from which an interrupted training resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.fingerprint import fingerprint, weights_checksum
from eckart.errors import UsageError
from eckart.recovery.inputs import TuneInputs
from eckart.recovery.recipe import TuneRecipe
from eckart.recovery.training.data import TrainingData
from eckart.recovery.training.state import STAGE
from eckart.storage.journal import Journal
from eckart.storage.lock import OutputLock
from eckart.storage.publish import check_output

logger = logging.getLogger(__name__)

FREE_OPTIONS = ("model", "revision", "teacher", "teacher_revision", "data", "eval_data", "save_steps", "device",
                "trust_remote_code", "strict")  # fmt: skip
"""Options that may differ when a training resumes: models and data count by what they hold, wherever they lie."""


@contextmanager
def output_lock(
    output_dir: str | Path | None, inputs: TuneInputs, *, overwrite: bool, restart: bool
) -> Iterator[OutputLock | None]:
    """The lock on the output folder, which is refused before any work if it could not be published.

    Raises:
        UsageError: `overwrite` or `restart` without an output folder.
        CheckpointError: the folder is there already, holds something that is read, or cannot be written.
    """
    if output_dir is None:
        if overwrite or restart:
            raise UsageError("overwrite and restart are about a published folder: pass output_dir=... too.")
        yield None
        return
    read = [inputs.model, inputs.teacher, inputs.data, inputs.eval_data]
    read += [each.config.name_or_path for each in read if isinstance(each, PreTrainedModel)]
    check_output(output_dir, overwrite=overwrite, inputs=read)
    with OutputLock(output_dir) as lock:
        yield lock


def training_key(
    recipe: TuneRecipe, model: PreTrainedModel, teacher: PreTrainedModel | None, data: TrainingData
) -> dict[str, Any]:
    """What a training depends on: digests of the models and of the rows that were read, options, versions."""
    options = recipe.model_dump(mode="json", exclude_none=True, exclude=set(FREE_OPTIONS))
    key = {
        "command": "tune",
        "model": digest_model(model),
        **data.digests,
        "eckart": version("eckart"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "options": options,
    }
    return key if teacher is None else key | {"teacher": digest_model(teacher)}


def digest_model(model: PreTrainedModel) -> str:
    """Hash of a model's class, configuration and every byte of its weights, not of the place it came from."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    words = [fingerprint(model), f"{weights_checksum(model):08x}", json.dumps(config, sort_keys=True, default=str)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


@contextmanager
def training_journal(output_dir: str | Path | None, key: dict[str, Any], *, restart: bool) -> Iterator[Journal | None]:
    """The journal of the training that writes an output folder; None where there is no such folder.

    It is removed when the body ends, and kept when the body fails and a state has been written.

    Raises:
        CheckpointError: an unfinished training of other models, data or options lies there.
    """
    if output_dir is None:
        yield None
        return
    journal = Journal.open(output_dir, key, restart=restart)
    if journal.entries(STAGE):
        logger.warning("%s: an unfinished training resumes after %s.", journal.folder, journal.entries(STAGE)[-1])
    try:
        yield journal
    except BaseException:
        if not journal.entries(STAGE):
            journal.remove()
        raise
    journal.remove()
