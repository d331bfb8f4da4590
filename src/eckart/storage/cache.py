"""Tensors that a run needs again soon: in memory up to a limit, beyond it in files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote

from torch import Tensor

from eckart.errors import CheckpointError
from eckart.storage.files import TEMPORARY, describe_failed_write
from eckart.storage.shards import read_header
from eckart.storage.tensor_file import SUFFIX, copied, find_damage, read_tensors, tensor_bytes, write_tensors

logger = logging.getLogger(__name__)


class Cache:
    """Sets of tensors by key; a copy is returned that does not depend on whether it was in memory or in a file.

    A set is kept in memory while there is space, and in a file otherwise. Copies are contiguous, on the CPU and
    detached, in the order of the set that was put.

    Args:
        memory: bytes of tensors that may be kept in memory.
        folder: of the files, made when the first is written. It belongs to this cache alone: files of an earlier cache
            are taken over where `durable`, and removed otherwise. None: a temporary folder.
        durable: write every set to a file as well, and leave the files on close. They survive a kill of the process.
            Those that are damaged when they are taken over (truncated in a power cut, say) are removed.

    Raises:
        ValueError: durable without a folder.

    Example:
        >>> with Cache(memory=2**30, folder=None) as cache:
        ...     cache.put("out/12/0-7", {"stream": torch.ones(2, 3)})
        ...     cache.get("out/12/0-7")["stream"].shape
        torch.Size([2, 3])
    """

    def __init__(self, memory: int, folder: Path | None, *, durable: bool = False) -> None:
        if durable and folder is None:
            raise ValueError("a durable cache needs a folder")
        self.memory = memory
        self.durable = durable
        self._folder = folder
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._files: dict[str, int] = {}
        self._in_memory = 0
        if folder is not None and folder.is_dir():
            self._take_over(folder)

    @property
    def in_memory(self) -> int:
        """Bytes of tensors kept in memory."""
        return self._in_memory

    @property
    def on_disk(self) -> int:
        """Bytes of files."""
        return sum(self._files.values())

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy of some tensors; what the key held before is replaced.

        Args:
            key: any text, such as ``out/12/0-7``.
            tensors: dense tensors by name.

        Raises:
            CheckpointError: the file cannot be written, or the disk is full.
            ValueError: the key is empty.
        """
        if not key:
            raise ValueError("the key of a cache entry cannot be empty")
        size, before = tensor_bytes(tensors), tensor_bytes(self._kept.get(key, {}))
        keep = self._in_memory - before + size <= self.memory
        if self.durable or not keep:
            self._write(key, tensors)
        self._forget(key)
        if keep:
            self._kept[key] = {name: copied(tensor) for name, tensor in tensors.items()}
            self._in_memory += size
            if not self.durable:
                self._remove(key)

    def get(self, key: str) -> dict[str, Tensor]:
        """Copies of the tensors of a key, which the caller may change in place.

        Raises:
            CheckpointError: the file is damaged or cannot be read.
            KeyError: nothing was put there.
        """
        if key in self._kept:
            return {name: copied(tensor) for name, tensor in self._kept[key].items()}
        if key not in self._files:
            raise KeyError(key)
        path = self._path(key)
        try:
            return {name: copied(tensor) for name, tensor in read_tensors(path).items()}
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} was damaged during the run ({str(error).split('. ')[0]}). Check the disk of {path.parent}, "
                "and run the same command again."
            ) from error

    def has(self, key: str) -> bool:
        """Whether there is a set under a key; a file that is gone or truncated does not count."""
        if key in self._kept or key not in self._files:
            return key in self._kept
        try:
            read_header(self._path(key))
        except CheckpointError:
            return False
        return True

    def drop(self, key: str) -> None:
        """Forget a key, in memory and on the disk, if it is there."""
        self._forget(key)
        self._remove(key)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with some text, sorted."""
        return sorted(key for key in {*self._kept, *self._files} if key.startswith(prefix))

    def close(self) -> None:
        """Forget everything; files are removed unless the cache is durable."""
        self._kept.clear()
        self._in_memory = 0
        if not self.durable:
            for key in list(self._files):
                self._remove(key)
            if self._folder is not None:
                try:
                    self._folder.rmdir()
                except OSError:
                    logger.debug("%s is left: it was never made, or holds other files.", self._folder)
        self._files.clear()
        if self._own is not None:
            self._own.cleanup()
            self._own = self._folder = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_over(self, folder: Path) -> None:
        """Use the undamaged files of an earlier process, where this cache is durable; remove the others."""
        for path in sorted(folder.iterdir()):
            name = path.name.removesuffix(TEMPORARY)
            key = unquote(name.removesuffix(SUFFIX))
            if not key or name != _name(key) or not path.is_file():
                continue  # not ours
            if not self.durable or name != path.name:
                logger.debug("%s, left by an earlier run, is removed.", path)
                path.unlink()
            elif (damage := find_damage(path)) is not None:
                logger.warning("%s. What it held is computed again.", damage)
                path.unlink()
            else:
                self._files[key] = path.stat().st_size

    def _write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        folder = self._folder or Path(tempfile.gettempdir())
        try:
            if self._folder is None:
                self._own = tempfile.TemporaryDirectory(prefix="eckart-cache-", ignore_cleanup_errors=True)
                folder = self._folder = Path(self._own.name)
            folder.mkdir(parents=True, exist_ok=True)
            self._files[key] = write_tensors(self._path(key), tensors)
        except OSError as error:
            what, needed = f"{key!r} of the cache", tensor_bytes(tensors)
            way = "set TMPDIR to a folder on a larger disk" if self._own else "choose another --output-dir"
            then = f"run the same command again, or {way}."
            raise CheckpointError(describe_failed_write(error, folder, what, needed, then)) from error

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / _name(key)

    def _forget(self, key: str) -> None:
        self._in_memory -= tensor_bytes(self._kept.pop(key, {}))

    def _remove(self, key: str) -> None:
        if key in self._files:
            self._path(key).unlink(missing_ok=True)
            del self._files[key]


def _name(key: str) -> str:
    return quote(key, safe="") + SUFFIX
