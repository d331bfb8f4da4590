"""Tensors that a run will want again soon: in memory up to a limit, beyond it in files that are mapped.

The files are safetensors (https://huggingface.co/docs/safetensors/index#format), written here rather than by the
library: piece by piece, with a checksum on the way, without a second copy in memory, and under a temporary name of
ours, so that what a killed process leaves is recognized.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote

import torch
from safetensors import safe_open
from torch import Tensor

from eckart.errors import CheckpointError
from eckart.storage.files import TEMPORARY, Written, disk_full, write_file
from eckart.storage.shards import read_header

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
PIECE = 4 * 1024 * 1024  # bytes that are written and summed at once, still in the processor's cache the second time
ALIGNMENT = 64  # of torch's own memory; products of matrices that lie elsewhere may differ in their last bits
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, sync: bool = False) -> Written:
    """Write tensors to a safetensors file, as :func:`write_file` does.

    Args:
        path: the file.
        tensors: dense tensors by name, on any device; they may share memory and have any strides.
        sync: as for :func:`write_file`.

    Returns:
        Its size and checksum.
    """
    return write_file(path, _pieces(tensors), sync=sync)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file: a page is read when it is looked at, and may be given up again.

    Args:
        path: the file. Changing a tensor in place does not change it.

    Returns:
        The tensors, contiguous and aligned (the few that are not in the file are loaded), in the writer's order.

    Raises:
        CheckpointError: the file is truncated, garbled or cannot be read.
    """
    names = list(read_header(path))  # its order is the writer's; the library goes by offset
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in names}
    return {name: tensor if tensor.data_ptr() % ALIGNMENT == 0 else _copy(tensor) for name, tensor in tensors.items()}


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of the elements of some tensors, whatever they share.

    Args:
        tensors: tensors by name.

    Returns:
        Their sum.
    """
    return sum(map(_bytes, tensors.values()))


class Cache:
    """Sets of tensors by key, each handed out as a copy that is the same whether it was kept in memory or in a file.

    A set goes to memory while there is room and to a file otherwise. Copies are contiguous, on the CPU and detached,
    in the order of the set that was put.

    Args:
        memory: bytes of tensors that may be kept in memory.
        folder: where the files go, made when the first is written. It belongs to this cache alone: what an earlier one
            left there is taken over where `durable`, and removed otherwise. None: a temporary folder.
        durable: write every set to a file as well, and leave the files on close. They outlive the process, killed or
            not. They are not synced: after a power cut a file may be cut short, which shows as if it were not there.

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
            self._kept[key] = {name: _copy(tensor) for name, tensor in tensors.items()}
            self._in_memory += size
            if not self.durable:
                self._remove(key)

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key, fresh: the caller may change them in place.

        Args:
            key: as it was put.

        Returns:
            Tensors by name.

        Raises:
            CheckpointError: the file is damaged or cannot be read.
            KeyError: nothing was put there.
        """
        if key in self._kept:
            return {name: _copy(tensor) for name, tensor in self._kept[key].items()}
        if key not in self._files:
            raise KeyError(key)
        path = self._path(key)
        try:
            return {name: _copy(tensor) for name, tensor in read_tensors(path).items()}
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} was damaged while the run went on ({_reason(error)}). Check the disk of {path.parent}, and "
                "run the same command again."
            ) from error

    def has(self, key: str) -> bool:
        """Whether a key can be had; a file that is gone or cut short does not count.

        Args:
            key: as it was put.

        Returns:
            True if so.
        """
        return key in self._kept or (key in self._files and _sound(self._path(key)))

    def drop(self, key: str) -> None:
        """Forget a key, in memory and on the disk; one that is not there is left at that.

        Args:
            key: as it was put.
        """
        self._forget(key)
        self._remove(key)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with some text.

        Args:
            prefix: the text; every key begins with the empty one.

        Returns:
            The keys, sorted as text.
        """
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
        """Count the whole files of an earlier process, or remove them where this cache does not outlive its own."""
        for path in sorted(folder.iterdir()):
            name = path.name.removesuffix(TEMPORARY)
            key = unquote(name.removesuffix(SUFFIX))
            if not key or name != _name(key) or not path.is_file():
                continue  # not ours
            if name == path.name and self.durable and _sound(path):
                self._files[key] = path.stat().st_size
            else:
                logger.debug("%s, left by an earlier run, is removed.", path)
                path.unlink()

    def _write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        folder = self._folder or Path(tempfile.gettempdir())
        try:
            if self._folder is None:
                self._own = tempfile.TemporaryDirectory(prefix="eckart-cache-", ignore_cleanup_errors=True)
                folder = self._folder = Path(self._own.name)
            folder.mkdir(parents=True, exist_ok=True)
            self._files[key] = write_tensors(self._path(key), tensors).size
        except OSError as error:
            what, needed = f"{key!r} of the cache", tensor_bytes(tensors)
            way = "set TMPDIR to a folder on a larger disk" if self._own else "choose another --output-dir"
            then = f"run the same command again, or {way}."
            raise CheckpointError(write_failed(error, folder, what, needed, then)) from error

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / _name(key)

    def _forget(self, key: str) -> None:
        self._in_memory -= tensor_bytes(self._kept.pop(key, {}))

    def _remove(self, key: str) -> None:
        if key in self._files:
            self._path(key).unlink(missing_ok=True)
            del self._files[key]


def write_failed(error: OSError, folder: Path, what: str, needed: int, then: str) -> str:
    """What to say when a file of an unfinished run cannot be written.

    Args:
        error: what the system said.
        folder: where it was to go.
        what: what was to be written.
        needed: its bytes.
        then: what to do once there is room or leave to write, or instead.

    Returns:
        The message.
    """
    if not disk_full(error):
        return f"{what} cannot be written to {folder} ({error.strerror}). Change the permissions and {then}"
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(home).free
    return f"The disk of {folder} is full: {what} needs {needed:,} bytes, {free:,} are free. Free some space and {then}"


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the header in the order given, the data in one that keeps it aligned."""
    # There are no gaps between tensors, so those that end where the next may begin go first; among the rest, the widest
    # elements, so that each begins at a multiple of its element size at least.
    order = sorted(tensors, key=lambda name: (_bytes(tensors[name]) % ALIGNMENT > 0, -tensors[name].element_size()))
    spans, position = {}, 0
    for name in order:
        end = position + _bytes(tensors[name])
        spans[name], position = [position, end], end
    header = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or name == "__metadata__":
            raise TypeError(f"a safetensors file cannot hold {name!r}, {tensor.dtype} {tensor.layout}")
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": spans[name]}
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    yield len(raw).to_bytes(8, "little") + raw
    for name in order:
        tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg()
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy(tensor: Tensor) -> Tensor:
    # Contiguous always: from a file it is, and another layout may be summed in another order.
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _name(key: str) -> str:
    return quote(key, safe="") + SUFFIX


def _sound(path: Path) -> bool:
    try:
        read_header(path)
    except CheckpointError:
        return False
    return True


def _reason(error: CheckpointError) -> str:
    return str(error).split(". ")[0]
