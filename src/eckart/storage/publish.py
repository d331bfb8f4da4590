"""Whole folders or nothing: written beside the target, synced, then renamed into place."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eckart.errors import CheckpointError
from eckart.storage.lock import OutputLock, output_path

logger = logging.getLogger(__name__)


def check_output(
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    source: str | Path | None = None,
    needed_bytes: int = 0,
) -> Path:
    """Refuse an output folder that could not be published, before any work is done.

    Args:
        output_dir: the folder to be written.
        overwrite: whether a model folder that is already there may be replaced.
        source: the folder that is read from.
        needed_bytes: what will be written.

    Returns:
        The absolute path of the folder.

    Raises:
        CheckpointError: it is there already, touches the source, or cannot be written.
    """
    target = output_path(output_dir)
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link. Give the folder it points to: {target.resolve()}")
    _check_apart(target, source)
    if target.exists():
        _check_replaceable(target, overwrite)
    home = next(parent for parent in target.parents if parent.exists())
    probe = home / f".eckart-{uuid.uuid4().hex}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{home} cannot be written to ({error.strerror}), so {target.name} cannot be placed there. "
            "Choose another --output-dir or change the permissions."
        ) from error
    free = shutil.disk_usage(home).free
    if needed_bytes > free:
        raise CheckpointError(
            f"{target} needs {needed_bytes:,} bytes and {home} has {free:,} free. Free some, or choose "
            "another --output-dir."
        )
    return target


@contextmanager
def publish(
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    source: str | Path | None = None,
    needed_bytes: int = 0,
    lock: OutputLock | None = None,
) -> Iterator[Path]:
    """Write into a staging folder; it becomes ``output_dir`` if the body ends without an exception.

    Killed at any instant, it leaves the old output or the new one. What is left beside them, the next run on
    the same output removes.

    Args:
        output_dir: the folder to be published.
        overwrite: replace a model folder that is already there.
        source: the folder that is read from.
        needed_bytes: what will be written.
        lock: the lock on ``output_dir`` if the caller holds it already.

    Yields:
        The empty staging folder.

    Raises:
        CheckpointError: see :func:`check_output`; or the disk is full, or the folder cannot be put in place.
    """
    target = check_output(output_dir, overwrite=overwrite, source=source, needed_bytes=needed_bytes)
    if lock is not None and lock.held and lock.target == target:
        with _staged(target, overwrite, lock) as staging:
            yield staging
    else:
        with OutputLock(target) as own, _staged(target, overwrite, own) as staging:
            yield staging


@contextmanager
def _staged(target: Path, overwrite: bool, lock: OutputLock) -> Iterator[Path]:
    suffix = uuid.uuid4().hex[:8]
    staging = target.with_name(f"{target.name}.partial-{suffix}")
    aside = target.with_name(f"{target.name}.old-{suffix}")
    lock.note(staging=staging.name, aside=aside.name)
    staging.mkdir()
    try:
        yield staging
        _sync(staging)
        _place(staging, target, aside, overwrite)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if disk_full(error):
            raise CheckpointError(
                f"The disk of {target.parent} is full; nothing was published. Free some space, or choose "
                "another --output-dir, and run again."
            ) from error
        raise
    finally:
        lock.note(staging=None, aside=None)


def _place(staging: Path, target: Path, aside: Path, overwrite: bool) -> None:
    """Put the staging folder in the target's place; the old one goes last."""
    old: Path | None = None
    try:
        if target.exists():
            _check_replaceable(target, overwrite)
            if _exchange(staging, target):
                old = staging
            else:
                target.rename(aside)
                old = aside
                try:
                    staging.rename(target)
                except BaseException:
                    aside.rename(target)
                    raise
        else:
            staging.rename(target)
    except OSError as error:
        if disk_full(error):
            raise
        raise CheckpointError(
            f"{target} cannot be put in place ({error.strerror}); nothing was published. Check the "
            f"permissions of {target.parent}, or choose another --output-dir."
        ) from error
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning("%s is published, but the output before, %s, cannot be removed.", target, old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux' ``renameat2``); False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, both_ways = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap(here, os.fsencode(one), here, os.fsencode(other), both_ways) == 0


def _check_apart(target: Path, source: str | Path | None) -> None:
    """Refuse an output that is the source, lies in it, or holds it."""
    for origin, name in ((source, "the source"), (Path.cwd(), "the current folder")):
        if origin is None or not Path(origin).exists():
            continue
        home, there = Path(origin).resolve(), target.resolve()
        inside = home in there.parents and name == "the source"
        if there == home or inside or there in home.parents:
            relation = "is" if there == home else f"lies inside {name}" if inside else "holds"
            place = f"{relation} {home}" if inside else f"{relation} {name} {home}"
            raise CheckpointError(f"The output {target} {place}. Choose an --output-dir beside it.")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse to replace what is there without leave, and anything but a model folder even with leave."""
    if not target.is_dir():
        raise CheckpointError(f"{target} is there already and is no folder. Choose another --output-dir.")
    if not overwrite:
        raise CheckpointError(
            f"{target} is there already. Pass --overwrite to replace it, or choose another --output-dir."
        )
    names = sorted(path.name for path in target.iterdir())
    if names and not {"config.json", "modules.json"} & set(names):
        raise CheckpointError(
            f"{target} does not look like a model folder (found: {', '.join(names[:8])}), so --overwrite "
            "does not replace it. Move it away, or choose another --output-dir."
        )


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left, on the disk or in the user's quota.

    Args:
        error: what a write raised.

    Returns:
        True if so.
    """
    # safetensors raises an error of its own, which carries the code in its text only.
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or (
        type(error).__name__ == "SafetensorError" and "os error 28" in str(error)
    )


def _sync(folder: Path) -> None:
    """Bring every file and folder to the disk, innermost first."""
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            (Path(root) / name).chmod(mode)  # safetensors writes files that only their owner can read
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a renamed file is there for good only after that.

    Args:
        folder: the folder itself; its files are synced where they are written.
    """
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
