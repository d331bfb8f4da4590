"""Sums of outer products of the rows of batches, for :mod:`eckart.moments.gram` and its like.

Summed in float64, but for matrices wider than :data:`eckart.linalg.WIDE`: the products of one batch are those of
float32, and their sum is the same in whatever order batches come and processes share them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.linalg import WIDE
from eckart.linalg.blocks import blocks
from eckart.moments.statistic import FLOAT32, FLOAT64

# A Gram is symmetric: from twice this width on only blocks on and above the diagonal are computed. Measured on a CPU,
# 1,024 tokens of float32: width 384 in blocks of 128 takes .62 of one product, width 1,536 in blocks of 384 .55 of it.
BLOCK = 128

WIDER, GPU_WIDER = 384, 1024
"""The same from width 1,024 on, and on a GPU, where launches of small products cost more than they save."""


def add_gram(total: Tensor, rows: Tensor, buffer: Tensor | None = None) -> None:
    """Add `rows^T rows` to the upper block triangle of `total`, in place.

    Args:
        total: (n, n) running sum, float32 or float64; below the block diagonal it is not touched.
        rows: (tokens, n), float32.
        buffer: see :func:`add_product`; allocated here where it is not given.
    """
    width = rows.shape[1]
    parts = _parts(width, rows.device.type)
    if buffer is None and total.dtype != rows.dtype:  # before anything is added
        buffer = rows.new_empty(parts[0].stop * width)
    for part in parts:
        add_product(total[part, part.start :], rows[:, part].mT, rows[:, part.start :], buffer)


def _parts(width: int, device: str) -> list[slice]:
    """Columns of each product; all begin at multiples of `BLOCK`."""
    block = GPU_WIDER if device != "cpu" else WIDER if width >= 1024 else BLOCK
    return list(blocks(width, block)) if width >= 2 * block else [slice(0, width)]


def add_product(total: Tensor, left: Tensor, right: Tensor, buffer: Tensor | None = None) -> None:
    """`total += left @ right` in place; a float64 total gets the float32 product, made in `buffer` (float32, flat)."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        buffer = left.new_empty(total.numel()) if buffer is None else buffer
        total += torch.mm(left, right, out=buffer[: total.numel()].view(total.shape))


def empty_gram(width: int, like: Tensor) -> Tensor:
    """(width, width) zeros on the device of `like`, in the type that a Gram of this width is summed in."""
    return like.new_zeros(width, width, dtype=torch.float32 if width > WIDE else torch.float64)


def gram_nbytes(width: int) -> int:
    """Bytes of :func:`empty_gram`."""
    return width * width * (FLOAT32 if width > WIDE else FLOAT64)


def fill_lower(total: Tensor) -> None:
    """Fill in, in place, what :func:`add_gram` leaves out: symmetric then, up to rounding."""
    # In the smallest blocks: what was computed in larger ones is there on both sides of their own diagonal.
    for part in blocks(len(total), BLOCK):
        total[part.stop :, part] = total[part, part.stop :].mT
