"""The batch that is running: its masks, its calls, and which of its updates are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class BatchLike(Protocol):
    """What a batch must offer: model-ready inputs, example numbers, masks of real tokens by length, its halves."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        ...

    @property
    def examples(self) -> tuple[int, ...]:
        """For each row, its place in the data."""
        ...

    def masks(self) -> dict[int, Tensor]:
        """Sequence length -> (B, T) mask of real tokens."""
        ...

    def rows(self, start: int, stop: int) -> BatchLike:
        """Some rows as a batch of their own; asked for where the whole does not fit in memory."""
        ...


# A statistic of a site and the number of the call that it comes from.
Update = tuple[str, int]


class Running:
    """The batch that is running, for the hooks.

    Attributes:
        common: site -> calls whose input has no axis of examples.
        number: of the batch, for errors.
        calls: how often each hook was called in this pass.
        pending: site -> (inputs, gradients) of all its calls, for modules that are called more than once.
        skipped: updates that were made for all rows of this batch before it was cut; they are not made again.
        made: updates of this pass.
    """

    def __init__(self, common: Mapping[str, frozenset[int]] | None = None) -> None:
        self.common = common or {}
        self.masks: dict[int, Tensor] = {}
        self.examples = 0
        self.number = 0
        self.calls: Counter[str] = Counter()
        self.pending: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.skipped: frozenset[Update] = frozenset()
        self.made: set[Update] = set()

    def begin(self, batch: BatchLike, number: int) -> None:
        """Start a pass."""
        self.forget()
        self.masks = batch.masks()
        self.examples = len(batch.examples)
        self.number = number

    def forget(self) -> None:
        """Drop all that belongs to a pass."""
        self.calls.clear()
        self.pending.clear()
        self.skipped = frozenset()
        self.made = set()

    def call(self, key: str) -> int:
        """The number of this call, from 0."""
        self.calls[key] += 1
        return self.calls[key] - 1

    def is_common(self, name: str, call: int) -> bool:
        """Whether this call's input has no axis of examples, so that no mask belongs to it."""
        return call in self.common.get(name, ())

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of real tokens in the layout of x (..., n) without its last axis; None: all are real."""
        mask = None
        if x.dim() == 3:
            mask = self.masks.get(x.shape[1])
            if mask is None or mask.shape[0] != x.shape[0]:
                mask = self.masks[x.shape[0]].mT if self._time_first(x) else None
        elif x.dim() == 2:  # some models flatten (B, T, n) to (B T, n)
            mask = next((m.reshape(-1) for m in self.masks.values() if m.numel() == x.shape[0]), None)
        if mask is None or bool(mask.all()):
            return None
        return mask.to(x.device)

    def rows(self, x: Tensor, common: bool = False) -> Tensor:
        """(tokens, n): the real tokens of x (..., n)."""
        mask = None if common else self.mask_of(x)
        return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]

    def by_sequence(self, x: Tensor, common: bool = False) -> Tensor:
        """(B, T, n) with padding zeroed; (B T, n), (B, n), (T, B, n) and (B W, T, n) are brought to that layout."""
        mask = None if common else self.mask_of(x)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        if self._time_first(x):
            return x.transpose(0, 1)
        if x.shape[0] % self.examples == 0:
            return x.reshape(self.examples, -1, x.shape[-1])
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _time_first(self, x: Tensor) -> bool:
        """Whether x is (T, B, n), as XLNet has it."""
        if x.dim() != 3 or x.shape[0] == self.examples:
            return False
        mask = self.masks.get(x.shape[0])
        return mask is not None and mask.shape[0] == x.shape[1]


def real_rows(x: Tensor, batch: BatchLike) -> Tensor:
    """(tokens, n): the real tokens of what a module of the model is given on a batch, padding removed."""
    running = Running()
    running.begin(batch, 0)
    return running.rows(x)
