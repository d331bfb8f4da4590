"""Tensors that lie in files: the system reads them when they are used, and may forget them again.

``from_pretrained`` maps a checkpoint's files, and its parameters are views of them; what it has to compute while it
loads (fused experts, another type than the stored one) comes to lie in memory, and is written out and mapped here.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from eckart.checkpoint.load import load
from eckart.errors import CheckpointError
from eckart.forms.transformers_internals import ONE_BY_ONE
from eckart.storage.files import sync_folder

# Bytes. A tensor that has no more may lie in memory: a file for each norm and bias would save nothing.
SMALL = 1 << 20
MAPS = Path("/proc/self/maps")


def load_mapped(folder: str | Path, *, scratch: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model of which only what is used takes memory: :func:`eckart.checkpoint.load.load`, on the CPU.

    At most one weight at a time is in memory: transformers' copies of it while it is made, which is two of a fused one.
    Writing into the parameters changes memory, never the files.

    Args:
        folder: a folder, or a name on the hub.
        scratch: where weights are written that transformers makes instead of reading them. The files lose their names
            as soon as they are mapped, where the system allows it: they take room there until the model is gone or the
            process ends, however it ends.
        trust_remote_code: allow the model's own Python code to run.

    Returns:
        The model in eval mode, in the types that ``load`` gives it. Its larger parameters are views of files.

    Raises:
        CheckpointError: as for ``load``; or ``scratch`` cannot be written to.
    """
    with _one_by_one(), _written_out(scratch) as write_out:
        model = load(folder, dtype="auto", trust_remote_code=trust_remote_code)
        for parameter in model.parameters():  # ties may have been made by other ways
            write_out(parameter)
    return model


def spool(module: nn.Module, path: Path, *, recurse: bool = True) -> None:
    """Move a module's numbers into a file: its parameters and buffers become views of it.

    They stay the objects that they are, so that ties stay ties. Buffers that no checkpoint holds are left alone, and so
    is what is on the meta device.

    Args:
        module: any module; its tensors are on the CPU afterwards.
        path: the file. It is there as a whole and on the disk, or not at all.
        recurse: also the modules below it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, child in module.named_modules() if recurse else [("", module)]:
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            stored = tensor is not None and name not in child._non_persistent_buffers_set
            if stored and tensor is not None and tensor.numel() and not tensor.is_meta:
                tensors[f"{prefix}.{name}".lstrip(".")] = tensor
    if tensors:
        _move(tensors, path, lasting=True)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in a file; False where the system does not tell (only Linux does)."""
    if tensor.device.type != "cpu" or not tensor.numel() or not MAPS.exists():
        return False
    place = tensor.data_ptr()
    with MAPS.open() as lines:
        for line in lines:
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            start, _, end = span.partition("-")
            if int(start, 16) <= place < int(end, 16):
                return inode != "0"
    return False


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Otherwise transformers' threads compute tensors ahead of those that are written out."""
    before = os.environ.get(ONE_BY_ONE)
    os.environ[ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ONE_BY_ONE]
        else:
            os.environ[ONE_BY_ONE] = before


@contextmanager
def _written_out(scratch: Path) -> Iterator[Callable[[Tensor], None]]:
    """Write out each larger parameter that is given to a module while it lies in memory.

    Yields:
        What writes out one tensor, if it is large and in memory.
    """
    folders: list[Path] = []
    numbers = itertools.count()
    thread = threading.get_ident()

    def write_out(tensor: Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.nbytes <= SMALL or is_mapped(tensor):
            return
        if not folders:  # one of its own: several models may share the scratch
            folders.append(_new_folder(scratch))
        _trim()  # before: what the one before this was made of is free by now
        path = folders[0] / f"{next(numbers)}.safetensors"
        _move({"weight": tensor}, path, lasting=False)
        with suppress(OSError):  # Windows keeps the names of files that are open
            path.unlink()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        # The hook sees every module of the process, also those that others build meanwhile.
        if threading.get_ident() == thread:
            write_out(parameter)

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield write_out
    finally:
        handle.remove()
        for folder in folders:
            _trim()
            with suppress(OSError):
                folder.rmdir()


def _new_folder(scratch: Path) -> Path:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="loaded-", dir=scratch))
    except OSError as error:
        raise _unwritable(scratch, error) from error


def _trim() -> None:
    """Give freed memory back: glibc keeps blocks of up to 32 MB, a whole model of small experts in the end."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            return


def _move(tensors: Mapping[str, Tensor], path: Path, *, lasting: bool) -> None:
    """Write tensors to a file, and make them views of it; those that share their numbers are written once."""
    same: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        same.setdefault(place, []).append(name)
    _write({names[0]: tensors[names[0]].detach().contiguous() for names in same.values()}, path, lasting=lasting)
    with safe_open(path, framework="pt") as file:
        for names in same.values():
            view = file.get_tensor(names[0])
            for name in names:
                tensors[name].data = view


def _write(tensors: dict[str, Tensor], path: Path, *, lasting: bool) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a link under that name would be followed
        save_file(tensors, partial, metadata={"format": "pt"})
        if lasting:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
        if lasting:
            sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({error}). Weights that do not fit in memory wait there: free space on that disk, "
        "or choose another folder for them."
    )
