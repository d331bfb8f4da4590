"""The order in which rows are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 32
"""Batches that are filled from rows drawn together: a larger pool pads less, a smaller one mixes more."""


class ByLength(Sampler[int]):
    """Rows of like length in one batch, which then has little padding to compute; batches in random order.

    Rows are shuffled, sorted by length within pools of :data:`POOL` batches, and cut into batches that are shuffled
    again; the batch that is not full comes last. An epoch's order depends on the seed and its number alone, so that a
    training that is gone on with sees the rows it would have seen.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """All rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Numbers of rows; so many after each other are a batch."""
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=draws).tolist()
        pool = POOL * self.batch_size
        rows = [
            row
            for start in range(0, len(rows), pool)
            for row in sorted(rows[start : start + pool], key=self.lengths.__getitem__)
        ]
        full = len(rows) // self.batch_size
        for i in torch.randperm(full, generator=draws).tolist():
            yield from rows[i * self.batch_size : (i + 1) * self.batch_size]
        yield from rows[full * self.batch_size :]
