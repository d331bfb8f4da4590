"""The batch that runs at the moment: its masks, its calls, and what of it has been added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class BatchLike(Protocol):
    """What a batch must offer: inputs, example numbers, masks of real tokens by length, some of its rows."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        ...

    @property
    def examples(self) -> tuple[int, ...]:
        """For each row, its place in the data: no two batches share one."""
        ...

    def masks(self) -> dict[int, Tensor]:
        """Sequence length -> (B, T) mask of real tokens."""
        ...

    def rows(self, start: int, stop: int) -> BatchLike:
        """Some rows as a batch of their own; asked for where the whole does not fit in memory."""
        ...


Update = tuple[str, int]
"""A statistic of a site, and the number of the call of that site in this pass."""


class CurrentBatch:
    """The batch that runs at the moment, for the hooks.

    Attributes:
        common: site -> calls whose input has no axis of examples.
        masks: sequence length -> (B, T) mask of real tokens.
        examples: how many rows the batch has.
        number: of the batch, for errors.
        calls: how often each hook was called in this pass.
        pieces: site -> (inputs, gradients) of all its calls, for modules that are called more than once.
        added_before: updates that a pass over more rows, these among them, had made before memory ran out. They are
            not made again.
        added: updates of this pass.
    """

    def __init__(self, common: Mapping[str, frozenset[int]] | None = None) -> None:
        self.common = common or {}
        self.masks: dict[int, Tensor] = {}
        self.examples = 0
        self.number = 0
        self.calls: Counter[str] = Counter()
        self.pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.added_before: frozenset[Update] = frozenset()
        self.added: set[Update] = set()

    def start(self, batch: BatchLike, number: int) -> None:
        """Start a pass."""
        self.reset()
        self.masks = batch.masks()
        self.examples = len(batch.examples)
        self.number = number

    def reset(self) -> None:
        """Drop all that belongs to a pass."""
        self.calls.clear()
        self.pieces.clear()
        self.added_before = frozenset()
        self.added = set()

    def count_call(self, hook: str) -> int:
        """The number of this call, from 0."""
        self.calls[hook] += 1
        return self.calls[hook] - 1

    def is_common(self, site: str, call: int) -> bool:
        """Whether this call's input has no axis of examples, so that no mask belongs to it."""
        return call in self.common.get(site, ())

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of real tokens in the layout of x (..., n) without its last axis, on the CPU; None: all are real."""
        mask = None
        if x.dim() == 3:
            mask = self.masks.get(x.shape[1])
            if mask is None or mask.shape[0] != x.shape[0]:
                mask = self.masks[x.shape[0]].mT if self._time_first(x) else None
        elif x.dim() == 2:  # some models flatten (B, T, n) to (B T, n)
            mask = next((m.reshape(-1) for m in self.masks.values() if m.numel() == x.shape[0]), None)
        return None if mask is None or bool(mask.all()) else mask

    def real_tokens(self, x: Tensor, common: bool = False) -> Tensor:
        """(tokens, n): the real tokens of x (..., n)."""
        mask = None if common else self.mask_of(x)
        rows = x.reshape(-1, x.shape[-1])
        if mask is None:
            return rows
        # Their numbers are found where the mask is, on the CPU: a device need not wait to learn how many there are.
        return rows.index_select(0, mask.reshape(-1).nonzero()[:, 0].to(x.device))

    def by_sequence(self, x: Tensor, common: bool = False) -> Tensor:
        """(B, T, n) with padding zeroed; (B T, n), (B, n), (T, B, n) and (B W, T, n) are brought to that layout."""
        mask = None if common else self.mask_of(x)
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.device)
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


def real_tokens(x: Tensor, batch: BatchLike) -> Tensor:
    """(tokens, n): the real tokens of what a module of the model is given on a batch."""
    current = CurrentBatch()
    current.start(batch, 0)
    return current.real_tokens(x)
