"""Open what a compression works on: a model in memory, or a checkpoint with the workspace that it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.adaptive import refuse_adaptive
from eckart.checkpoint.open import find_checkpoint, open_model
from eckart.checkpoint.save import check_savable
from eckart.compression.memory_estimate import estimate_result
from eckart.compression.open_workspace import open_workspace
from eckart.compression.options import device_of
from eckart.compression.recipe import Recipe
from eckart.compression.result import Result
from eckart.compression.settings import Settings
from eckart.compression.workspace import Workspace
from eckart.config import resolve_device
from eckart.data import require_data
from eckart.distributed import silence_other_processes, start_processes
from eckart.errors import UsageError
from eckart.model import shared_clone, with_separate_experts
from eckart.model.preserve import preserve_state
from eckart.storage.journal import Journal, remove_unfinished
from eckart.storage.lock import OutputLock, output_path
from eckart.storage.publish import check_output, check_space

logger = logging.getLogger(__name__)

WHOLE_SHARD, STREAMED_SHARD = "50GB", "2GB"
"""The largest file of weights that is written; the numbers of one file are in memory while it is."""


@dataclass(frozen=True)
class CompressionRun:
    """An opened model with all that a compression needs besides.

    Attributes:
        model: on the device that computes, or in its files where it is worked on block by block.
        tokenizer: reads text; None where there is none.
        recipe: what was asked, with the type of the stored numbers filled in.
        workspace: where to compute and to keep intermediate results.
        source_folder: where the model came from.
        warnings: what is odd about the checkpoint but not wrong.
        publish: publishes a result where an output folder was asked for, and returns the result.
    """

    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe
    workspace: Workspace
    source_folder: Path | None
    warnings: tuple[str, ...] = ()
    publish: Callable[[Result], Result] = field(default=lambda result: result)


@contextmanager
def open_run(
    model: PreTrainedModel | str | Path | None,
    tokenizer: Any,
    data: Any,
    recipe: Recipe,
    rows: Sequence[Settings],
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    inputs: Sequence[Any] = (),
    source_folder: str | Path | None = None,
    workspace: Workspace | None = None,
    verify: bool = False,
    report_progress: Callable[[str], None],
) -> Iterator[CompressionRun]:
    """Open a model for a compression; see :func:`eckart.compress` for the arguments.

    What can be refused is refused before anything is computed: the output folder, a damaged checkpoint, a missing
    tokenizer.

    Args:
        rows: settings of the methods that will run.
    """
    if not isinstance(model, PreTrainedModel | str | Path | None):
        raise UsageError(
            f"model: {type(model).__name__} is not a transformers model. Pass what from_pretrained returns, or the "
            "name or folder of one."
        )
    require_data(data, recipe.data)
    if isinstance(model, PreTrainedModel):
        refuse_adaptive(
            model, "which was made for its weights as they are",
            "Take it off first (eckart.adaptive.detach(model)), compress, and let the result do less for easy inputs: "
            "eckart.tune(..., recovery='early-exit')",
        )  # fmt: skip
    if output_dir is None:
        yield open_in_memory(
            model, tokenizer, data, recipe, rows, source_folder=source_folder, workspace=workspace,
            report_progress=report_progress,
        )  # fmt: skip
    elif isinstance(model, PreTrainedModel):
        check_savable(model, source_folder)
        target = check_output(output_dir, overwrite=overwrite, inputs=[source_folder, *inputs, *recipe.inputs])
        check_space(target, _result_bytes(model, recipe))
        with OutputLock(output_dir) as lock:
            run = open_in_memory(
                model, tokenizer, data, recipe, rows, source_folder=source_folder, workspace=workspace,
                report_progress=report_progress,
            )  # fmt: skip
            yield with_changes(run, publish=_publisher(output_dir, run.workspace, overwrite, lock, verify))
            remove_unfinished(output_dir)
    else:
        with _from_folder(
            recipe, rows[0], output_dir, tokenizer, data, overwrite=overwrite, restart=restart, inputs=inputs,
            verify=verify, report_progress=report_progress,
        ) as run:  # fmt: skip
            yield run


def _result_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """What will be published at least of a model in memory; what cannot be known before is refused where it is met."""
    own = recipe.dtype or str(model.dtype).removeprefix("torch.")
    try:
        return estimate_result(with_separate_experts(model), recipe.model_copy(update={"dtype": own}))
    except UsageError:
        raise
    except Exception as error:
        logger.info("the size of the result is not known before it is made (%s)", error)
        return 0


def open_in_memory(
    model: PreTrainedModel | str | Path | None,
    tokenizer: Any,
    data: Any,
    recipe: Recipe,
    rows: Sequence[Settings],
    *,
    source_folder: str | Path | None = None,
    workspace: Workspace | None = None,
    report_progress: Callable[[str], None],
) -> CompressionRun:
    """Open a model that is worked on as a whole, where nothing is published."""
    if isinstance(model, PreTrainedModel):
        place = workspace or Workspace()
        there = model if place.compute is not None else _on_device(model, recipe, report_progress)
        folder = Path(source_folder) if source_folder is not None else None
        return CompressionRun(there, tokenizer, recipe, place, folder)
    if recipe.model is None:
        raise UsageError("model: there is none to compress. Name a folder or a model on the hub (MODEL, or `model:`).")
    if recipe.stream == "on":
        raise UsageError("--stream on: work block by block needs a folder for what is done. Name one: --output-dir DIR")
    device = device_of(recipe)
    found = find_checkpoint(recipe.model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    recipe = _with_dtype(recipe, found.dtype)
    reader = _text_reader(recipe, rows, data) if tokenizer is None else None
    opened = open_model(found, device=str(device), needs_text=reader)
    report_progress(f"in memory, as a whole, on {device}")
    opened.model.to(device)  # type: ignore[arg-type]
    return CompressionRun(
        opened.model, tokenizer or opened.tokenizer, recipe, Workspace(), opened.folder, tuple(opened.warnings)
    )


def keep_unchanged(model: Any) -> AbstractContextManager[None]:
    """Leave the global random state as it was, and of a model in memory all that a computation might change."""
    return preserve_state(model) if isinstance(model, PreTrainedModel) else preserve_state()


def _on_device(model: PreTrainedModel, recipe: Recipe, report_progress: Callable[[str], None]) -> PreTrainedModel:
    """The caller's model, or a copy of it where another device computes: the caller's own is not moved."""
    device = device_of(recipe, model)
    if device == model.device:
        return model
    report_progress(f"computing on {device}")
    return shared_clone(model).to(device)  # type: ignore[arg-type]


@contextmanager
def _from_folder(
    recipe: Recipe,
    settings: Settings,
    output_dir: str | Path,
    tokenizer: Any,
    data: Any,
    *,
    overwrite: bool,
    restart: bool,
    inputs: Sequence[Any],
    verify: bool,
    report_progress: Callable[[str], None],
) -> Iterator[CompressionRun]:
    """A checkpoint with a locked output folder, as a whole or block by block, in one process or several."""
    if recipe.model is None:
        raise UsageError("model: there is none to compress. Name a folder or a model on the hub (MODEL, or `model:`).")
    processes = start_processes(str(resolve_device(recipe.device)))
    silence_other_processes(processes)
    with processes.failing_together():
        if processes.main:
            check_output(output_dir, overwrite=overwrite, inputs=[*inputs, *recipe.inputs])
        found = find_checkpoint(recipe.model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
        recipe = _with_dtype(recipe, found.dtype)
        if processes.main:
            check_output(output_dir, overwrite=overwrite, inputs=[found.folder])
    with ExitStack() as stack:
        with processes.failing_together():
            lock = stack.enter_context(OutputLock(output_dir)) if processes.main else None
        place, how = stack.enter_context(
            open_workspace(found.folder, Path(output_dir), recipe, settings, processes, restart=restart)
        )
        report_progress(f"on {processes.device}, {how}")
        with processes.failing_together():
            reader = _text_reader(recipe, [settings], data) if tokenizer is None else None
            scratch = place.store.path("weights") if isinstance(place.store, Journal) else None
            opened = open_model(found, device=str(processes.device), needs_text=reader, scratch=scratch)
        if not place.streaming:
            opened.model.to(processes.device)  # type: ignore[arg-type]
        publish = _publisher(output_dir, place, overwrite, lock, verify)
        yield CompressionRun(
            opened.model, tokenizer or opened.tokenizer, recipe, place, opened.folder, tuple(opened.warnings), publish
        )


def _publisher(
    output_dir: str | Path, workspace: Workspace, overwrite: bool, lock: OutputLock | None, verify: bool
) -> Callable[[Result], Result]:
    """What publishes a result; of several processes, the first one does."""
    processes = workspace.processes

    def publish(result: Result) -> Result:
        folder = output_path(output_dir)
        with processes.failing_together():
            if processes.main:
                shard = STREAMED_SHARD if workspace.streaming else WHOLE_SHARD
                folder = result.save_pretrained(
                    output_dir, overwrite=overwrite, lock=lock, max_shard_size=shard, verify=verify
                )
        return with_changes(result, folder=folder)

    return publish


def _with_dtype(recipe: Recipe, stored: torch.dtype) -> Recipe:
    """The recipe with the checkpoint's own type of numbers where it names none."""
    if recipe.dtype is not None:
        return recipe
    return recipe.model_copy(update={"dtype": str(stored).removeprefix("torch.")})


def _text_reader(recipe: Recipe, rows: Sequence[Settings], data: Any) -> str | None:
    """What reads text and so needs a tokenizer, in words; None if nothing does, or the data are batches already."""
    if data is not None and not isinstance(data, str | Path):
        first = data[0] if isinstance(data, list | tuple) and data else None
        return "the data" if isinstance(first, str) else None
    for settings in rows:
        if settings.needs(planned=recipe.plan is not None):
            return f"method {settings.method.name}"
    if any(settings.trains for settings in rows):
        return "the distillation" if any(settings.distils for settings in rows) else "the refinement"
    return f"--data {recipe.data}" if recipe.data is not None else None
