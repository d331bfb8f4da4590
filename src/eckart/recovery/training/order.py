"""The order in which rows are trained on: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

POOL = 32
"""Batches that are filled from rows drawn together: a larger pool pads less, a smaller one mixes more."""


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of like length in one batch, which then has little padding to compute; batches in random order.

    Rows are shuffled, sorted by length within pools of :data:`POOL` batches, and cut into batches that are shuffled
    again; the batch that is not full comes last.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: of the order.
        epoch: each has another order.

    Returns:
        Numbers of rows; every row once.
    """
    draws = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    rows = torch.randperm(len(lengths), generator=draws).tolist()
    pool = POOL * batch_size
    rows = [
        row
        for start in range(0, len(rows), pool)
        for row in sorted(rows[start : start + pool], key=lengths.__getitem__)
    ]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    full = len(rows) // batch_size
    return [*(batches[i] for i in torch.randperm(full, generator=draws).tolist()), *batches[full:]]
