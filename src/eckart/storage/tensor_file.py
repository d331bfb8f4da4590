"""Files of tensors that prove themselves: safetensors with a checksum of the whole file in the header.

The format is https://huggingface.co/docs/safetensors/index#format. It is written here and not by the `safetensors`
package, because that has no checksum, and lets data begin at any multiple of 8 bytes: products of matrices that are
mapped from there may differ in their last bits from those of the same matrices in torch's own memory.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from eckart.errors import CheckpointError
from eckart.storage.files import write_file
from eckart.storage.shards import read_header

SUFFIX = ".safetensors"
PIECE = 4 * 1024 * 1024  # bytes that are written and summed at once, still in the processor's cache the second time
ALIGNMENT = 64  # of torch's own memory
CHECKSUM = "crc32"
BEGIN = 8 + len(f'{{"__metadata__": {{"{CHECKSUM}": "')  # where the checksum's 8 digits are in every file
UNSET = "0" * 8  # stands for the digits while the checksum is computed
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, sync: bool = False
) -> int:
    """Write tensors to a file, without a second copy of them in memory; returns the size in bytes.

    Args:
        path: the file. It is complete, or as it was before.
        tensors: dense tensors by name, on any device; they may share memory and have any strides.
        metadata: text that is stored with them.
        sync: bring the file to the disk, so that it survives a power cut as well.
    """
    return write_file(path, _pieces(tensors, metadata or {}), sync=sync, checksum_at=BEGIN)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file: a page is read when it is used, and the system may drop it again.

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
    return {name: tensor if tensor.data_ptr() % ALIGNMENT == 0 else copied(tensor) for name, tensor in tensors.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The text that is stored with the tensors.

    Raises:
        CheckpointError: the file is truncated, garbled or cannot be read.
    """
    read_header(path)
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def find_damage(path: Path) -> str | None:
    """What is wrong with a file, after reading all of it; None for a file that is as it was written.

    Raises:
        PermissionError: that it cannot be read is no damage.
    """
    try:
        with path.open("rb") as file:
            read_header(path)
            start = file.read(BEGIN + len(UNSET))
            checksum = zlib.crc32(start[:BEGIN] + UNSET.encode())
            while piece := file.read(PIECE):
                checksum = zlib.crc32(piece, checksum)
    except CheckpointError as error:
        return str(error).split(". ")[0]
    except PermissionError:
        raise
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if start[BEGIN:] == f"{checksum:08x}".encode() else f"{path} is damaged: its checksum differs"


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of the elements of some tensors, whatever memory they share."""
    return sum(map(_bytes, tensors.values()))


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU; contiguous always, for another layout may be summed in another order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a file: the header in the order given, the data in one that keeps it aligned."""
    # There are no gaps between tensors, so those that end where the next may begin go first; among the rest, the widest
    # elements, so that each begins at a multiple of its element size at least.
    order = sorted(tensors, key=lambda name: (_bytes(tensors[name]) % ALIGNMENT > 0, -tensors[name].element_size()))
    spans, position = {}, 0
    for name in order:
        end = position + _bytes(tensors[name])
        spans[name], position = [position, end], end
    header: dict[str, object] = {"__metadata__": {CHECKSUM: UNSET, **metadata}}
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
