"""One pass through the blocks of a model, from which rows and tokens leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.adaptive.narrow import Narrowing


class Walk:
    """What is left of a batch between two blocks.

    Args:
        model: that is run.
        blocks: that a pass calls.
        inputs: name -> value, what the model is called with.
        options: behavior -> keywords of this call.

    Attributes:
        done: blocks that have been called.
        hidden: what the last of them put out, (r, t, n), for the rows and tokens that are left.
        batch: rows of the whole batch, B.
        length: tokens of its rows, T.
        rows: numbers of the rows that are left, (r,).
        tokens: numbers of the tokens that are left of each, (r, t), -1 where there is none; None for all of them.
        real: which of these are tokens and no padding, (r, t) bool.
        memory: behavior -> what it keeps until the pass ends.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: int, inputs: Mapping[str, Any], options: dict[str, dict[str, Any]]
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.inputs = inputs
        self.options = options
        self.memory: dict[str, Any] = {name: {} for name in options}
        self.done = 0
        self.started = False
        self.output: Any = None  # of the last block that ran, as its class returns it
        self._whole: Tensor | None = None  # (B, T, n): what tokens were when they left
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self, hidden: Tensor) -> None:
        """The first block is called with a hidden state (B, T, n)."""
        self.started = True
        self.hidden = hidden
        self.batch, self.length = hidden.shape[:2]
        self.rows = torch.arange(self.batch, device=hidden.device)
        self.tokens: Tensor | None = None
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
            self.real = mask.to(hidden.device).bool()
        else:
            self.real = torch.ones_like(hidden[..., 0], dtype=torch.bool)

    @property
    def is_last(self) -> bool:
        """Whether all blocks have been called."""
        return self.done == self.blocks

    def keep_rows(self, stay: Tensor) -> None:
        """Let rows leave; stay: (r,) bool."""
        if bool(stay.all()):
            return
        self._taken.clear()
        chosen = stay.nonzero().flatten()
        self.hidden, self.rows, self.real = (each[chosen] for each in (self.hidden, self.rows, self.real))
        if self.tokens is not None:
            self.tokens = self.tokens[chosen]

    def keep_tokens(self, kept: Tensor) -> None:
        """Let tokens leave; those that stay keep what the next blocks make of them, the others what they are.

        Args:
            kept: for each row the places in it that stay, in their order, (r, t'); -1 where there are no more.
        """
        self._whole = self._put_back(self._whole)
        self._taken.clear()
        place, there = kept.clamp_min(0), kept >= 0
        before = self.tokens if self.tokens is not None else self._numbers(self.hidden)
        self.hidden = torch.take_along_dim(self.hidden, place[..., None], dim=1)
        self.real = self.real.gather(1, place) & there
        self.tokens = before.gather(1, place).masked_fill(~there, -1)

    def narrowed(self, values: Any, stream: Tensor) -> Any:
        """Arguments that were made for the whole batch, for what is left of it."""
        rows = self.rows if len(self.rows) < self.batch else None
        if rows is None and self.tokens is None:
            return values
        return _Memory(self._taken, Narrowing(self.batch, self.length, rows, self.tokens)).take_all(values, stream)

    def restored(self) -> Tensor:
        """The hidden state of the whole batch, (B, T, n): rows that have left are 0, tokens are what they were last."""
        whole = self._put_back(self._whole)
        self._whole = None
        return whole

    def _numbers(self, hidden: Tensor) -> Tensor:
        return torch.arange(self.length, device=hidden.device).expand(len(hidden), -1)

    def _put_back(self, whole: Tensor | None) -> Tensor:
        """The hidden state of the whole batch, with what is left of it brought up to date."""
        if self.tokens is None and len(self.rows) == self.batch:
            return self.hidden
        if whole is None:
            whole = self.hidden.new_zeros(self.batch, self.length, self.hidden.shape[-1])
        else:
            whole = whole.clone()
        if self.tokens is None:
            whole[self.rows] = self.hidden
        else:
            row, place = (self.tokens >= 0).nonzero(as_tuple=True)
            whole[self.rows[row], self.tokens[row, place]] = self.hidden[row, place]
        return whole


class _Memory(Narrowing):
    """A narrowing that remembers: every block is called with the same masks."""

    def __init__(self, known: dict[int, tuple[Tensor, Tensor]], of: Narrowing) -> None:
        super().__init__(of.batch, of.length, of.rows, of.tokens)
        object.__setattr__(self, "_known", known)

    def take(self, tensor: Tensor) -> Tensor:
        known: dict[int, tuple[Tensor, Tensor]] = self._known  # type: ignore[attr-defined]
        found = known.get(id(tensor))
        if found is None:  # the tensor is kept too, so that nothing else gets its id
            found = known[id(tensor)] = tensor, super().take(tensor)
        return found[1]
