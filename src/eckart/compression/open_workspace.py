"""Decide how a checkpoint is worked on, as a whole or block by block, and set up what that needs."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eckart.checkpoint.fingerprint import files_fingerprint
from eckart.compression.factor_store import STAGE as FACTORS
from eckart.compression.memory_estimate import CACHE_MEMORY, MemoryEstimate, is_too_large, try_estimate
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.workspace import Workspace
from eckart.distributed import OtherProcessError, Processes
from eckart.distributed.memory import format_bytes
from eckart.errors import CheckpointError, EckartError
from eckart.model import ComputePlacement
from eckart.storage.cache import Cache
from eckart.storage.journal import Journal, remove_unfinished
from eckart.storage.lock import output_path
from eckart.storage.publish import check_space
from eckart.storage.run_key import KEY_FILE

FREE_TO_CHANGE = (
    "model", "revision", "data", "data_config", "data_split", "data_revision", "stream", "cache_memory", "device",
    "trust_remote_code", "strict",
)  # fmt: skip
"""Options that do not change the result: a run may be resumed with others. The text itself is compared by a digest."""


@contextmanager
def open_workspace(
    folder: Path, output_dir: Path, recipe: Recipe, settings: Settings, processes: Processes, *, restart: bool = False
) -> Iterator[tuple[Workspace, str]]:
    """Set up where a checkpoint is worked on.

    Args:
        folder: the checkpoint.
        output_dir: what will be published; the journal of an unfinished run lies beside it, as `OUTPUT.partial`.
        recipe: what is asked for.
        settings: the method.
        processes: share the work.
        restart: discard an unfinished run.

    Yields:
        The workspace, and a sentence on what was chosen and what it takes. The journal is removed on leaving if the
        body ended without an exception, or if it holds nothing that a later run could use.

    Raises:
        CheckpointError: the unfinished run was a different one, or the disk is too small.
    """
    with processes.failing_together():
        estimate, unknown = try_estimate(folder, recipe, settings, processes)
    target = output_path(output_dir)
    unfinished = target.with_name(f"{target.name}.partial").is_dir()
    streaming = recipe.stream == "on" or (recipe.stream == "auto" and (unfinished or is_too_large(estimate)))
    at_once = estimate.at_once if estimate is not None else 1
    # Each process sees its own memory; all do as the first one does.
    streaming, at_once = processes.broadcast([streaming, at_once])
    size = f"its memory cannot be estimated ({unknown})" if estimate is None else None
    with processes.failing_together():
        if estimate is not None and processes.main:
            beside = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model"))
            check_space(target, estimate.result + beside)
    if not streaming:
        yield Workspace(processes=processes), f"in memory, as a whole: {size or estimate.whole}"  # type: ignore[union-attr]
        if processes.main:
            remove_unfinished(target)
            remove_other_journals(target)
        return
    journal = _open_journal(folder, target, recipe, processes, restart)
    try:
        with processes.failing_together():
            _check_space(journal, estimate, processes)
        memory = int((recipe.cache_memory if recipe.cache_memory is not None else CACHE_MEMORY) * 1e9)
        cache = Cache(memory, journal.path("waiting"), durable=True)
        takes = size or f"{estimate.streamed}; {format_bytes(estimate.disk)} of disk"  # type: ignore[union-attr]
        done = len(journal.entries(FACTORS))
        how = f"block by block: {takes}" + (f"; resumed, {done} windows are done" if done else "")
        compute = ComputePlacement(processes.device, torch.float32 if processes.device.type == "cpu" else None)
        yield Workspace(compute, journal, cache, processes, at_once, journal.path("cast")), how
    except BaseException as error:
        refused = isinstance(error, EckartError) and not isinstance(error, CheckpointError | OtherProcessError)
        useful = journal.entries(FACTORS) if refused else (journal.folder / "entries").exists()
        if not useful:  # an empty journal would only refuse the next run its options
            journal.remove()
        raise
    cache.close()
    journal.remove()
    if processes.main:  # the others of this run remove their own, perhaps at this moment
        remove_other_journals(target, at_least=processes.size)


def _open_journal(folder: Path, target: Path, recipe: Recipe, processes: Processes, restart: bool) -> Journal:
    """The journal of this process, new or of the same run that was interrupted."""
    place = target if processes.main else target.with_name(f"{target.name}.rank{processes.rank}")
    key = _run_key(folder, recipe, processes)
    with processes.failing_together():  # before any of them begins anew
        if restart and processes.main:
            remove_other_journals(target)
    with processes.failing_together():
        return Journal.open(place, key, restart=restart)


def remove_other_journals(target: Path, at_least: int = 1) -> None:
    """Remove journals of other processes of an earlier run, which may have had more of them: from which rank on."""
    for folder in target.parent.glob(f"{glob.escape(target.name)}.rank*.partial"):
        rank = folder.name.removeprefix(f"{target.name}.rank").removesuffix(".partial")
        if rank.isdecimal() and int(rank) >= at_least and (folder / KEY_FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _check_space(journal: Journal, estimate: MemoryEstimate | None, processes: Processes) -> None:
    """Refuse a disk that is too small, before hours of work; each process keeps modules of its own."""
    if estimate is None:
        return
    # What an unfinished run has written already is not needed again.
    there = sum(file.stat().st_size for file in journal.folder.rglob("*") if file.is_file())
    needed = max(0, estimate.disk - there) if processes.main else 0
    needed += (processes.size - 1) * estimate.modules if processes.main else 0
    journal.check_space(needed, "the factors and hidden states of all blocks, and the result")


def _run_key(folder: Path, recipe: Recipe, processes: Processes) -> dict[str, Any]:
    """What the result depends on; a digest of the text is compared when the text has been read."""
    asked = {name: value for name, value in recipe.model_dump(mode="json").items() if name not in FREE_TO_CHANGE}
    if recipe.plan is not None:
        asked["plan"] = Path(recipe.plan).read_text(encoding="utf-8")
    return {
        "model": files_fingerprint(folder),
        "eckart": version("eckart"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "processes": processes.size,
        "process": processes.rank,
        "device": processes.device.type,
        "options": {name: value for name, value in asked.items() if value is not None},
    }
