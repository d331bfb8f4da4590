"""One run per output folder, by a lock of the operating system that dies with its process."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from eckart.errors import CheckpointError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# A link under the lock's name would let the file that it points to be written over.
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


HELD: set[Path] = set()
"""Outputs that this process has locked: it must not end without letting go of them."""


def output_path(output_dir: str | Path) -> Path:
    """The absolute path of an output folder, ``~`` and ``..`` resolved but links kept.

    Args:
        output_dir: as the user gave it.

    Returns:
        The path.

    Raises:
        UsageError: no path can be so.
    """
    if "\0" in os.fspath(output_dir):
        raise UsageError(f"{os.fspath(output_dir)!r} cannot be a path. Choose another --output-dir.")
    return Path(os.path.abspath(os.path.expanduser(output_dir)))


class OutputLock:
    """Holds ``.OUTPUT.lock`` next to the output folder while a run works on it.

    The file says who holds it and what a process that was killed would leave behind; the next holder clears
    that up. Where the file system has no locks a warning is logged and the run goes on.

    Args:
        output_dir: the output folder, which need not exist.

    Example:
        >>> with OutputLock("smol-70"):  # doctest: +SKIP
        ...     ...
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.target = output_path(output_dir)
        self.path = self.target.parent / f".{self.target.name}.lock"
        self._file: int | None = None
        self._record: dict[str, Any] = {}

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def __enter__(self) -> OutputLock:
        """Take the lock and clear up after a process that was killed while it held it.

        Raises:
            CheckpointError: another run holds it, or nothing can be written there.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}), so {self.target.name} cannot be placed there. "
                "Choose another --output-dir or change the permissions."
            ) from error
        self._recover(_read(self._file))
        HELD.add(self.target)
        self._record = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the lock file, then let go."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
            HELD.discard(self.target)

    def note(self, **leftovers: str | None) -> None:
        """Record what would be left behind if the process were killed now.

        Args:
            leftovers: ``staging`` and ``aside``, names of folders next to the target, or None when gone.
        """
        self._record |= leftovers
        self._write()

    def _take(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o644)
            if fcntl is None:
                logger.warning("%s: this system has no file locks; do not start a second run on it.", self.target)
                return file
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(file)
                os.close(file)
                raise CheckpointError(
                    f"Another run (pid {holder.get('pid', 'unknown')} on "
                    f"{holder.get('host', 'this machine')}, since {holder.get('started', 'just now')}) is "
                    f"writing {self.target}. Wait for it, stop it, or choose another --output-dir."
                ) from None
            except OSError as error:
                logger.warning("%s cannot be locked (%s); do not start a second run on it.", self.target, error)
                return file
            try:  # The holder before may have removed the file between our opening and locking it.
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            os.close(file)

    def _recover(self, left: dict[str, Any]) -> None:
        """Remove the staging folder of a killed run, and give back an output that it had moved aside."""
        for kind in ("aside", "staging"):
            name = left.get(kind)
            # Others may have written the record: only names that publish gives are touched.
            own = rf"{re.escape(self.target.name)}\.(partial|old)-[0-9a-f]{{8}}"
            if not isinstance(name, str) or not re.fullmatch(own, name):
                continue
            folder = self.target.parent / name
            if folder.is_symlink() or not folder.is_dir():
                continue
            if kind == "aside" and not self.target.exists():
                logger.warning("A run that was killed had moved %s aside; it is put back.", self.target)
                folder.rename(self.target)
            else:
                logger.warning("Removing %s, left behind by a run that was killed.", folder)
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self) -> None:
        if self._file is not None:
            content = json.dumps(self._record).encode()
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, content, 0) if hasattr(os, "pwrite") else os.write(self._file, content)
            os.fsync(self._file)


def _read(file: int) -> dict[str, Any]:
    try:
        os.lseek(file, 0, os.SEEK_SET)
        content = json.loads(os.read(file, 65536) or b"{}")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
