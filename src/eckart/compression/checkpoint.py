"""A run from a checkpoint to a checkpoint: what is checked before anything is computed, loaded, and published.

:func:`eckart.compress` works on a model in memory; here the model is named by a folder or a name on the hub.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from eckart.checkpoint.open import find_checkpoint, open_model
from eckart.compression.memory_estimate import scratch, workspace
from eckart.compression.pipeline import compare, compress
from eckart.compression.recipe import Recipe, make_recipe
from eckart.compression.result import Result
from eckart.compression.settings import Settings
from eckart.config import resolve_device
from eckart.distributed import silence_other_processes, start_processes
from eckart.errors import UsageError
from eckart.methods import method_named
from eckart.report.compression import list_quality
from eckart.storage.lock import OutputLock, output_path
from eckart.storage.publish import check_output

logger = logging.getLogger(__name__)

WHOLE_SHARD, STREAMED_SHARD = "50GB", "2GB"
"""The largest file of weights; one at a time is written from memory."""

OWN_STEPS = ("factorization", "replacement", "refit")
"""Steps of a comparison that each method takes by itself."""


def text_reader(recipe: Recipe, methods: Sequence[str]) -> str | None:
    """Which of the methods reads text under this recipe, in words; None if none does and no data is named."""
    for name in methods:
        settings = Settings.of(method_named(name), recipe)
        if settings.needs(planned=recipe.plan is not None):
            return f"method {name}"
    return f"--data {recipe.data}" if recipe.data is not None else None


def compress_checkpoint(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path | None] = (),
    restart: bool = False,
    tell: Callable[[str], None] = logger.info,
) -> tuple[Result, Path]:
    """Compress the model that a recipe names, and publish the result.

    What can be refused is refused before anything is computed: the output folder, the source, a missing tokenizer.
    The output is locked for the whole run. Under a launcher that starts several processes (torchrun), they share the
    text and the sites, and the first one publishes.

    Args:
        recipe: with `model`; stored numbers get the checkpoint's own type where it names none.
        output_dir: a folder that is not there yet.
        overwrite: replace it if it is there, and holds only what eckart has published there.
        inputs: what else was read and is never replaced, such as the file of the recipe.
        restart: throw away what an unfinished run on the same output has done.
        tell: is told how the model will be worked on, and what that takes.

    Returns:
        The result, and the published folder.

    Raises:
        EckartError: naming what failed, where, and what to do; then nothing is published.
    """
    if recipe.model is None:
        raise UsageError("model: there is none to compress. Name a folder or a model on the hub (MODEL, or `model:`).")
    processes = start_processes(str(resolve_device(recipe.device)))
    silence_other_processes(processes)
    reader = text_reader(recipe, [recipe.method])
    with processes.failing_together():
        if processes.main:
            check_output(output_dir, overwrite=overwrite, inputs=[*inputs, *recipe.inputs])
        found = find_checkpoint(recipe.model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
        if recipe.dtype is None:
            recipe = recipe.model_copy(update={"dtype": str(found.dtype).removeprefix("torch.")})
        needed = int(recipe.keep * found.elements) * getattr(torch, str(recipe.dtype)).itemsize
        if processes.main:
            check_output(output_dir, overwrite=overwrite, inputs=[found.folder], needed_bytes=needed)
    settings = Settings.of(method_named(recipe.method), recipe)
    with ExitStack() as stack:
        with processes.failing_together():
            lock = stack.enter_context(OutputLock(output_dir)) if processes.main else None
        place, how = stack.enter_context(
            workspace(
                found.folder,
                Path(output_dir),
                recipe,
                settings,
                processes,
                restart=restart,
                trust_remote_code=recipe.trust_remote_code,
            )
        )
        tell(how)
        with processes.failing_together():
            where = scratch(place) if place.streaming else None
            source = open_model(found, device=str(processes.device), needs_text=reader, scratch=where)
        result = compress(source.model, source.tokenizer, recipe=recipe, source_folder=source.folder, workspace=place)
        result.report["notes"][:0] = source.warnings
        published = output_path(output_dir)
        with processes.failing_together():
            if processes.main:
                shard = STREAMED_SHARD if place.streaming else WHOLE_SHARD
                published = result.save_pretrained(output_dir, overwrite=overwrite, lock=lock, max_shard_size=shard)
        return result, published


def compare_checkpoint(recipe: Recipe, methods: Sequence[str], keeps: Sequence[float]) -> dict[str, Any]:
    """Compress the model that a recipe names by several methods at several sizes; nothing is published.

    Args:
        recipe: everything but method and keep.
        methods: names.
        keeps: fractions.

    Returns:
        `rows`: `method`, `keep`, `of_sites`, `of_model`, `elements`, `bytes`, `quality` on held-out text, `seconds`
        of the factors alone; `original`: its sizes; `notes`. All plain JSON values.

    Raises:
        EckartError: naming what failed.
    """
    if recipe.model is None:
        raise UsageError("model: there is none to compare on. Name a folder or a model on the hub.")
    for keep in keeps:
        make_recipe({"keep": keep}, "--keep")
    for name in methods:
        make_recipe({"method": name}, "--methods")
    reader = text_reader(recipe, methods)
    found = find_checkpoint(recipe.model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    if recipe.dtype is None:
        recipe = recipe.model_copy(update={"dtype": str(found.dtype).removeprefix("torch.")})
    source = open_model(found, device=str(resolve_device(recipe.device)), needs_text=reader)
    rows: list[dict[str, Any]] = []
    notes: list[str] = list(source.warnings)
    for name, keep, result in compare(
        source.model, source.tokenizer, methods=methods, keeps=keeps, recipe=recipe, source_folder=source.folder
    ):
        made, seconds = result.report, result.report["seconds"]
        after = made["sizes"]["model"]["after"]
        rows.append(
            {
                "method": name,
                "keep": keep,
                "of_sites": made["kept"]["of_sites"],
                "of_model": made["kept"]["of_model"],
                "elements": after["elements"],
                "bytes": after["bytes"],
                "multiply_adds": after["multiply_adds"],
                "quality": list_quality(made),
                "seconds": round(sum(seconds.get(step, 0.0) for step in OWN_STEPS), 2),
            }
        )
        shared = {step: value for step, value in seconds.items() if step not in (*OWN_STEPS, "measuring")}
    if shared:
        steps = ", ".join(f"{step} {value:.1f} s" for step, value in shared.items())
        notes.append(f"seconds are those of factoring alone; shared by all methods: {steps}")
    return {"rows": rows, "original": made["sizes"]["model"]["before"], "notes": notes}
