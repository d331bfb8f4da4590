"""Single files and renames that survive a kill: written under another name, brought to the disk, put in place."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = ".tmp"


def write_file(
    path: Path, pieces: Iterable[bytes | memoryview], *, sync: bool = False, checksum_at: int | None = None
) -> int:
    """Write a file under a temporary name, then rename it into place; returns its size in bytes.

    Args:
        path: the file; it is complete afterwards, or as it was before.
        pieces: its content, one piece after the other.
        sync: bring the content to the disk before the rename, so that it survives a power cut as well.
        checksum_at: where to write the CRC-32 of the pieces, in 8 hexadecimal digits; None for no checksum.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    size = checksum = 0
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a link under that name is not followed
            for piece in pieces:
                file.write(piece)
                checksum = zlib.crc32(piece, checksum) if checksum_at is not None else 0
                size += len(piece)
            if checksum_at is not None:
                file.seek(checksum_at)
                file.write(f"{checksum:08x}".encode())
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


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


def system_error(error: BaseException) -> OSError | None:
    """What the system has said, also where a library's own error only quotes it; None for others."""
    if isinstance(error, OSError):
        return error
    # safetensors and tokenizers are written in Rust, whose errors are text: "File too large (os error 27)".
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left, on the disk or in the user's quota."""
    said = system_error(error)
    return said is not None and said.errno in (errno.ENOSPC, errno.EDQUOT)


def describe_failed_write(error: OSError, folder: Path, what: str, needed: int, then: str) -> str:
    """The message for a file of an unfinished run that cannot be written.

    Args:
        error: of the system.
        folder: that the file belongs to.
        what: what is in the file.
        needed: its bytes.
        then: what to do once there is space or permission to write, or instead.
    """
    if not disk_full(error):
        return f"{what} cannot be written to {folder} ({error.strerror}). Change the permissions and {then}"
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(home).free
    return f"The disk of {folder} is full: {what} needs {needed:,} bytes, {free:,} are free. Free some space and {then}"
