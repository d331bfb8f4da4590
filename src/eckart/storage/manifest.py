"""The list of files that eckart has published in a folder: with it, ``--overwrite`` knows what it may delete."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from eckart.errors import CheckpointError
from eckart.storage.files import write_file

MANIFEST = "eckart/files.json"
FORMAT = "eckart published files"
ENDS = 64 * 1024  # bytes at either end of a file that are compared: a whole config, the last weights of a model


def write_manifest(folder: Path) -> None:
    """List all files of a folder that is about to be published, in ``eckart/files.json``."""
    files = {name: _stamp(folder / name) for name in _entries(folder) if name != MANIFEST}
    (folder / "eckart").mkdir(exist_ok=True)
    content = {"format": FORMAT, "files": files, "sha256": {name: _sha256(folder / name) for name in files}}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def renew(folder: Path, name: str) -> None:
    """Enter a file that eckart has written into a published folder again; nothing where there is no list of files.

    Raises:
        CheckpointError: the list cannot be written.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT and isinstance(content["files"], dict)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return
    if not known:
        return
    content["files"][name] = _stamp(folder / name)
    if isinstance(content.get("sha256"), dict):
        content["sha256"][name] = _sha256(folder / name)
    try:
        write_file(path, [(json.dumps(content, indent=2) + "\n").encode()])
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}), so that {name} counts as changed. Change the permissions, "
            "and write the report again."
        ) from error


def find_changes(folder: Path) -> tuple[int, list[str]]:
    """Hold every file of a published folder against its hash.

    Returns:
        How many files were read, and what is wrong: files that are gone, changed, or were never written by eckart.

    Raises:
        CheckpointError: there is no list of what was published, or it was written before there were hashes.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        hashes = content["sha256"] if content["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        hashes = None
    if not isinstance(hashes, dict):
        raise CheckpointError(
            f"{path} is no list of published files with their hashes. Give a folder that this version of eckart has "
            "published, or publish it again."
        )
    there = [name for name in _entries(folder) if name != MANIFEST]
    problems = [f"{name} is gone" for name in hashes if name not in there]
    for name in there:
        if name not in hashes:
            problems.append(f"{name} was not written by eckart")
        elif (folder / name).is_symlink() or _sha256(folder / name) != hashes[name]:
            problems.append(f"{name} was changed after eckart wrote it")
    return len(there), problems


def not_published(folder: Path) -> str | None:
    """Why a folder is not exactly what eckart has published, for a message; None where it is, or where it is empty.

    Files are compared by name, size and their first and last 64 KiB: edited files and weights that were trained further
    count as foreign, like files that were added. Files that are gone do not matter.
    """
    try:
        names = list(_entries(folder))
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    if not names:
        return None
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = content["files"] if content["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        files = None
    if not isinstance(files, dict):
        return f"it was not published by eckart: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} lie there"
    for name in names:
        if name == MANIFEST:
            continue
        if name not in files:
            return f"{name} was not written by eckart"
        if (folder / name).is_symlink() or _stamp(folder / name) != files[name]:
            return f"{name} was changed after eckart wrote it"
    return None


def _entries(folder: Path) -> Iterator[str]:
    """Relative names of everything in a folder but the folders themselves, sorted; links are not followed."""

    def unreadable(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in sorted([*files, *(name for name in folders if (Path(root) / name).is_symlink())]):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _sha256(path: Path) -> str | None:
    """The hash of a file; None for what is not an ordinary file or cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _stamp(path: Path) -> list[int] | None:
    """Size, and CRC-32 of both ends; None for what is not an ordinary file or cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            checksum = zlib.crc32(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            return [size, zlib.crc32(file.read(ENDS), checksum)]
    except OSError:
        return None
