"""Whole folders or nothing: written beside the target, synced, then renamed into place."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eckart.errors import CheckpointError, is_out_of_memory
from eckart.storage.files import disk_full, exchange, sync_folder, system_error
from eckart.storage.lock import OutputLock, output_path
from eckart.storage.manifest import not_published, write_manifest

logger = logging.getLogger(__name__)


PROBE = ".eckart-probe"
BESIDE = len(".partial-01234567")  # the longest of what is added to a name
SHOWN = 120  # characters of a path in a message

PUBLISHED: list[Path] = []
"""Folders that this process has put in place: what goes wrong after that must not say that nothing was published."""


def check_output(
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[Any] = (),
    needed_bytes: int = 0,
) -> Path:
    """Refuse an output folder that could not be published, before any work is done.

    What may be replaced, for every command: with `overwrite` a folder that is empty, or that holds what eckart has
    published there and nothing else (:func:`eckart.storage.manifest.not_published`). Inputs never, nor a folder that
    holds an input or lies inside one.

    Args:
        output_dir: the folder to be written.
        overwrite: whether a folder that eckart published earlier may be replaced.
        inputs: what the run reads: model, teacher, data, plan, config file. Paths of files and folders; what is no
            existing path (a name on the hub, a model in memory) is passed over.
        needed_bytes: what will be written.

    Returns:
        The absolute path of the folder.

    Raises:
        CheckpointError: it is there already, is or touches an input, or cannot be written.
    """
    target = output_path(output_dir)
    check_name(target)
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link. Give the folder it points to: {target.resolve()}")
    _check_apart(target, inputs)
    if target.exists():
        if os.path.ismount(target):
            raise CheckpointError(
                f"{target} is where a disk is mounted, and cannot be put in place as a whole. Choose a folder inside "
                f"it: --output-dir {target / 'model'}"
            )
        _check_replaceable(target, overwrite)
    home = next(parent for parent in target.parents if parent.exists())
    try:
        probe_folder(home)
    except OSError as error:
        raise CheckpointError(
            f"{home} cannot be written to ({error.strerror}), so {target.name} cannot be placed there. "
            "Choose another --output-dir or change the permissions."
        ) from error
    check_space(target, needed_bytes)
    return target


def check_name(target: Path) -> None:
    """Refuse an output whose name leaves no room for those of the folders that are made beside it.

    Raises:
        CheckpointError: naming the limit.
    """
    home = target.parent
    try:
        while not home.exists():
            home = home.parent
        target.exists()
        longest = os.pathconf(home, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(target)[:SHOWN]!r} cannot be a path ({getattr(error, 'strerror', None) or error}). Choose another "
            "--output-dir."
        ) from error
    for name in target.relative_to(home).parts:
        if len(os.fsencode(name)) > longest - BESIDE:
            raise CheckpointError(
                f"{name[:40]}... is a name of {len(os.fsencode(name))} bytes; {home} takes {longest}, {BESIDE} of "
                "which are for the folders that a run makes beside it. Choose a shorter --output-dir."
            )


def probe_folder(folder: Path) -> None:
    """Try whether a file can be made in a folder, in a way that leaves none behind, killed or not.

    Raises:
        OSError: it cannot.
    """
    nameless = getattr(os, "O_TMPFILE", None)
    if nameless is not None:
        try:
            os.close(os.open(folder, nameless | os.O_WRONLY, 0o600))
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
    probe = folder / PROBE  # one name for all: what a killed run has left is removed by the next
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
    probe.unlink(missing_ok=True)


def check_space(target: Path, needed_bytes: int) -> None:
    """Refuse an output that does not fit on its disk.

    Raises:
        CheckpointError: with both numbers.
    """
    home = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(home).free
    if needed_bytes > free:
        raise CheckpointError(
            f"{target} needs {needed_bytes:,} bytes and {home} has {free:,} free. Free some, or choose "
            "another --output-dir."
        )


@contextmanager
def publish(
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[Any] = (),
    needed_bytes: int = 0,
    lock: OutputLock | None = None,
) -> Iterator[Path]:
    """Write into a staging folder; it becomes ``output_dir`` if the body ends without an exception.

    Killed at any instant, it leaves the old output or the new one. What is left beside them, the next run on
    the same output removes.

    Args:
        output_dir: the folder to be published.
        overwrite: replace a folder that eckart published earlier.
        inputs: what the run reads, see :func:`check_output`.
        needed_bytes: what will be written.
        lock: the lock on ``output_dir`` if the caller holds it already.

    Yields:
        The empty staging folder.

    Raises:
        CheckpointError: see :func:`check_output`; or the disk is full, or the folder cannot be put in place.
    """
    target = check_output(output_dir, overwrite=overwrite, inputs=inputs, needed_bytes=needed_bytes)
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
        write_manifest(staging)
        _sync(staging)
        _place(staging, target, aside, overwrite)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if disk_full(error):
            raise CheckpointError(
                f"The disk of {target.parent} is full; nothing was published. Free some space, or choose "
                "another --output-dir, and run again."
            ) from error
        if (said := system_error(error)) is not None and not is_out_of_memory(error):
            raise CheckpointError(
                f"{target} cannot be written ({said.strerror}); nothing was published. Check the disk and the limits "
                "of its files (ulimit -f, quota), or choose another --output-dir, and run again."
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
            if exchange(staging, target):
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
    PUBLISHED.append(target)
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            logger.warning("%s is published, but the output before, %s, cannot be removed.", target, old)


def existing_inputs(inputs: Sequence[Any]) -> Iterator[tuple[Path, Path]]:
    """Of what a run reads, the paths that exist: as they were given, and with links followed."""
    for given in inputs:
        if not isinstance(given, str | os.PathLike) or not os.fspath(given):  # a model that was built has the name ""
            continue
        try:
            path = output_path(os.fspath(given))
            if path.exists():
                yield path, path.resolve()
        except (OSError, ValueError):  # too long for a path, or with a NUL: it names something else
            continue


def _check_apart(target: Path, inputs: Sequence[Any]) -> None:
    """Refuse an output that is an input, lies inside one, or holds one; or that holds the current folder."""
    there = target.resolve()
    for given, home in existing_inputs(inputs):
        for path, place in ((given, target), (home, there)):
            if path == place or path in place.parents or place in path.parents:
                relation = "lies inside" if path in place.parents else "holds"
                what = "is an input" if path == place else f"{relation} {given}, an input"
                raise CheckpointError(
                    f"The output {target} {what} of this run. Inputs are never replaced: choose an --output-dir beside "
                    "them."
                )
    current = Path.cwd()
    if current == there or there in current.parents:
        relation = "is" if current == there else "holds"
        raise CheckpointError(f"The output {target} {relation} the current folder. Choose another --output-dir.")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse to replace a folder without permission, and what eckart did not publish even with it."""
    if not target.is_dir():
        raise CheckpointError(f"{target} is there already and is not a folder. Choose another --output-dir.")
    if not overwrite:
        raise CheckpointError(
            f"{target} is there already. Pass --overwrite to replace it, or choose another --output-dir."
        )
    if (problem := not_published(target)) is not None:
        raise CheckpointError(
            f"{target} is not replaced: {problem}. --overwrite deletes only what eckart has published. Move the folder "
            "away, or choose another --output-dir."
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
