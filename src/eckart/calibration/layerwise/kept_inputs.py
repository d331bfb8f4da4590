"""Inputs of a block's modules, seen in one pass and kept for the passes that follow, as far as memory holds them."""

from __future__ import annotations

from torch import Tensor

from eckart.moments import BatchLike


class KeptInputs:
    """Inputs by module and batch, where they compute.

    What does not fit is not kept, in files neither: the inputs of all modules of a block are several times as large as
    what it puts out, so writing and reading them takes as long as running that one block again, which needs no disk.

    Args:
        memory: bytes that may be kept.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def put(self, module: str, batch: BatchLike, rows: Tensor) -> None:
        """Keep what a module was given, if there is room for it."""
        if rows.nbytes <= self.memory:
            self.memory -= rows.nbytes
            self._kept[module, batch.examples] = rows

    def take(self, module: str, batch: BatchLike) -> Tensor | None:
        """What a module was given on a batch, which is kept no longer; None if it was not."""
        rows = self._kept.pop((module, batch.examples), None)
        if rows is not None:
            self.memory += rows.nbytes
        return rows
