"""Factors made ready for rounding: the space between them is free, and most of it rounds badly.

`W' = B A = (B M^-1)(M A)` for every invertible M (k, k), and rounding sees which one was taken. Here M is chosen in two
steps, both without data and without a cost when the model runs:

1. Balanced: `B = U S^1/2`, `A = S^1/2 V^T` of the singular value decomposition `B A = U S V^T`. Of all M this one has
   the least `||B|| ||A||` (Frobenius), to which the error of rounding both factors is proportional.
2. Rotated: `B Q^T`, `Q A` for an orthogonal Q whose entries are all about 1 / sqrt(k), with random signs. The columns
   of the balanced B, and what `A x` puts in, fall from the first to the last; after the rotation they are all alike, so
   that no scale, of a row of B, of a group of it or of a token's activations, is spent on a few large numbers. QuaRot
   (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456) rotates by Hadamard matrices, which most ranks have none of; the
   Hartley transform is of every size, and no entry is above sqrt(2 / k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIGNS = 0
"""Seed of the signs of all rotations: one model gives the same factors every time."""


def balance_for_rounding(lefts: Sequence[Tensor], right: Tensor) -> tuple[list[Tensor], Tensor]:
    """Factors of the same products `B_i A`, balanced and rotated.

    Args:
        lefts: the B_i, (m_i, k) each: of one weight, or of all that share A.
        right: A, (k, n).

    Returns:
        The new B_i and A, in float64.
    """
    stacked = torch.cat([left.double() for left in lefts])  # (m, k)
    new_left, new_right = balanced(stacked, right.double())
    rotation = flat_rotation(len(right), right.device)
    found = (new_left @ rotation.mT).split([len(left) for left in lefts])
    return list(found), rotation @ new_right


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """`U S^1/2` and `S^1/2 V^T` of `left @ right = U S V^T`, without forming the product.

    Args:
        left: (m, k).
        right: (k, n); k may be larger than m or n: then trailing columns and rows are zero.

    Returns:
        (m, k) and (k, n).
    """
    rank = len(right)
    outer, mixed_left = torch.linalg.qr(left)  # (m, a), (a, k), a = min(m, k)
    inner, mixed_right = torch.linalg.qr(right.mT)  # (n, b), (b, k)
    u, s, vh = torch.linalg.svd(mixed_left @ mixed_right.mT, full_matrices=False)
    root = s.sqrt()
    new_left, new_right = (outer @ u) * root, root[:, None] * (vh @ inner.mT)
    short = rank - len(root)
    if short:
        new_left = torch.nn.functional.pad(new_left, (0, short))
        new_right = torch.nn.functional.pad(new_right, (0, 0, 0, short))
    return new_left, new_right


def flat_rotation(size: int, device: torch.device | str = "cpu") -> Tensor:
    """An orthogonal matrix (size, size) in float64 without large entries: Hartley's, with random signs of its columns.

    `Q_ij = (cos t + sin t) s_j / sqrt(k)`, `t = 2 pi i j / k`. It is always the same one of a size.
    """
    steps = torch.arange(size)
    angle = (steps[:, None] * steps % size).double() * (2 * math.pi / size)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(SIGNS)) * 2 - 1
    return ((angle.cos() + angle.sin()) * signs / math.sqrt(size)).to(device)
