"""SHA-256 of data: what journals and reports know them by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from eckart.data.batch import Batch


def digest_batches(batches: Iterable[Batch]) -> str:
    """The SHA-256, in hexadecimal, of the names, types, shapes and numbers of all inputs."""
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch.inputs):
            value = batch.inputs[name].contiguous()
            total.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            total.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_rows(*columns: Iterable[Any]) -> str:
    """The SHA-256, in hexadecimal, of texts, labels and the like, row by row.

    The digest of `digest_rows(texts)` changes with every text, their number and their order; that of
    `digest_rows(texts, pairs, labels)` also with what stands beside them.

    Args:
        columns: iterables of one length, of strings, numbers or None.
    """
    total = hashlib.sha256()
    for row in zip(*columns, strict=True):
        # The length goes before the value: ("ab", "c") and ("a", "bc") are different rows.
        for value in row:
            data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else repr(value).encode()
            total.update(f"{type(value).__name__}:{len(data)}:".encode())
            total.update(data)
    return total.hexdigest()
