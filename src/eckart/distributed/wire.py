"""Values as messages between processes: tensors as bytes, everything else as JSON.

torch.distributed's `*_object` functions would be shorter, but they unpickle what they receive, which can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PIECE = 64 * 2**20
"""Bytes that are sent at once: a bound on the zeros that a process without a part of a sum allocates for it."""

Layout = tuple[str, list[int], str]  # dtype, shape, kind of device


def layout_of(tensor: Tensor) -> Layout:
    """Dtype, shape and kind of device, as JSON has them."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.device.type


def dtype_of(layout: Layout) -> torch.dtype:
    """The dtype that a layout names."""
    return getattr(torch, layout[0])


def size_of(layout: Layout) -> int:
    """Bytes of a tensor of this layout."""
    return math.prod(layout[1]) * dtype_of(layout).itemsize


def empty(layout: Layout, own: torch.device) -> Tensor:
    """A tensor to receive into, on this process's device if that is of the kind that the layout names."""
    return torch.empty(layout[1], dtype=dtype_of(layout), device=own if own.type == layout[2] else layout[2])


def piece_bounds(layout: Layout) -> Iterator[tuple[int, int]]:
    """Start and stop, in elements, of the pieces in which a tensor of this layout is sent."""
    length, step = math.prod(layout[1]), PIECE // dtype_of(layout).itemsize
    for start in range(0, length, step):
        yield start, min(start + step, length)


def raw_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A contiguous tensor's memory in pieces of uint8: not every backend knows every dtype."""
    flat = tensor.detach().view(-1)
    for start, stop in piece_bounds(layout_of(tensor)):
        yield flat[start:stop].view(torch.uint8)


def as_bytes(value: Any) -> Tensor:
    """JSON as uint8 on the CPU."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def as_json(message: Tensor) -> Any:
    """The inverse of :func:`as_bytes`."""
    return json.loads(message.numpy().tobytes())


def serialize(value: Any, tensors: list[Tensor]) -> Any:
    """The JSON of a value, with the layout of each tensor in its place.

    Args:
        value: tensors and JSON values in dicts with string keys, lists and tuples.
        tensors: the tensors are appended here, contiguous, in the order of the JSON.

    Returns:
        JSON for :func:`deserialize`; a container is a pair of its kind and its content.

    Raises:
        TypeError: on any other value.
    """
    if isinstance(value, Tensor):
        tensors.append(value.detach().contiguous())
        return ["tensor", layout_of(value)]
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise TypeError(f"the key {strange[0]!r} is a {type(strange[0]).__name__}: keys that are sent are strings")
        return ["dict", {key: serialize(entry, tensors) for key, entry in value.items()}]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [serialize(entry, tensors) for entry in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be sent to another process: use tensors and JSON values")


def deserialize(message: Any, received: Callable[[Layout], Tensor]) -> Any:
    """The inverse of :func:`serialize`.

    Args:
        message: the JSON.
        received: returns the next tensor, of a given layout.
    """
    if not isinstance(message, list):
        return message
    kind, content = message
    if kind == "tensor":
        return received(content)
    if kind == "dict":
        return {key: deserialize(entry, received) for key, entry in content.items()}
    entries = [deserialize(entry, received) for entry in content]
    return entries if kind == "list" else tuple(entries)
