"""Single files and renames that survive a kill: written under another name, brought to the disk, put in place."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TEMPORARY = ".tmp"


class Written(NamedTuple):
    """Size in bytes and CRC-32 of a file's content."""

    size: int
    checksum: int


def write_file(path: Path, pieces: Iterable[bytes | memoryview], *, sync: bool = False) -> Written:
    """Write a file under a temporary name, then rename it into place: it is complete or not there.

    Args:
        path: the file; an existing one is replaced.
        pieces: its content, one piece after the other.
        sync: bring the content to the disk before the rename, so that it survives a power cut as well.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    size = checksum = 0
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                checksum = zlib.crc32(piece, checksum)
                size += len(piece)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Written(size, checksum)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: only then does a renamed file survive a power cut.

    Args:
        folder: the folder itself; its files are synced where they are written.
    """
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux' ``renameat2``); False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, both_ways = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap(here, os.fsencode(one), here, os.fsencode(other), both_ways) == 0


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left, on the disk or in the user's quota."""
    # safetensors raises an error of its own, which has the code in its text only.
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or (
        type(error).__name__ == "SafetensorError" and "os error 28" in str(error)
    )
