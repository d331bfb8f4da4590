"""What a trial shows of a model: whether rows can leave its batch, what its head reads, what its blocks put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.adaptive.attach import ATTRIBUTE, attach, detach
from eckart.adaptive.behavior import Behavior
from eckart.adaptive.walk import Walk
from eckart.errors import ModelError

TOLERANCE = 1e-3
"""Largest difference, of the largest logit, of a row whose batch has become smaller: other kernels round otherwise."""


@contextmanager
def behaving(
    model: PreTrainedModel, behavior: Behavior, blocks: Sequence[str], *, alone: bool = False
) -> Iterator[None]:
    """A behavior for as long as the body runs; after the model's own, or without them."""
    attach(model, behavior, blocks)
    controller = vars(model)[ATTRIBUTE]
    before = controller.behaviors
    if alone:
        controller.behaviors = {behavior.name: behavior}
    try:
        yield
    finally:
        controller.behaviors = before
        detach(model, behavior.name)


@dataclass
class RowLeaves(Behavior):
    """One row leaves after a block, whatever it is."""

    name: ClassVar[str] = "trial: a row leaves"

    row: int = 0
    block: int = 1

    def after_block(self, walk: Walk) -> None:
        """See :class:`Behavior`."""
        if walk.done == self.block and not walk.is_last:
            walk.keep_rows(walk.rows != self.row)


@dataclass
class Nudge(Behavior):
    """One token of the last hidden state is changed."""

    name: ClassVar[str] = "trial: a token changes"

    token: int = 0

    def after_block(self, walk: Walk) -> None:
        """See :class:`Behavior`."""
        if walk.is_last:
            stream = torch.Generator().manual_seed(0)
            noise = torch.randn(walk.hidden.shape[-1], generator=stream).to(walk.hidden)
            hidden = walk.hidden.clone()
            hidden[:, self.token] += 3 * hidden.std() * noise
            walk.hidden = hidden


@dataclass
class Recording(Behavior):
    """Keeps what a function makes of the hidden states of some blocks, and how many tokens each block was given.

    Attributes:
        after: numbers of blocks.
        pool: hidden states (r, t, n) and which are tokens (r, t) -> (r, n).
        states: number of blocks -> one tensor for each pass, on the CPU.
        tokens: for each block one tensor for each pass, (r,).
    """

    name: ClassVar[str] = "trial: states are kept"

    after: tuple[int, ...]
    pool: Callable[[Tensor, Tensor], Tensor]
    states: dict[int, list[Tensor]] = field(default_factory=dict)
    tokens: list[list[Tensor]] = field(default_factory=list)

    def before_block(self, walk: Walk, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """See :class:`Behavior`."""
        if len(self.tokens) <= walk.done:
            self.tokens.append([])
        self.tokens[walk.done].append(walk.real.sum(1).cpu())
        return args, kwargs

    def after_block(self, walk: Walk) -> None:
        """See :class:`Behavior`."""
        if walk.done in self.after:
            self.states.setdefault(walk.done, []).append(self.pool(walk.hidden, walk.real).float().cpu())


def require_rows_can_leave(
    model: PreTrainedModel, blocks: Sequence[str], run: Callable[[], Tensor], rows: int, after: Sequence[int]
) -> None:
    """Refuse a model in which what one row gives depends on the others being there.

    Args:
        model: in evaluation mode.
        blocks: names of the blocks in the order of their calls.
        run: makes a pass over so many rows, and returns its logits (rows, C).
        rows: two at least.
        after: numbers of blocks after which rows are to leave.

    Raises:
        ModelError: naming the block.
    """
    whole = run()
    scale = float(whole.abs().amax())
    for block in after:
        try:
            with behaving(model, RowLeaves(rows - 1, block), blocks):
                found = run()
        except ModelError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(
                f"{type(model).__name__}: no row can leave its batch after block {block} ({type(error).__name__}: "
                f"{error}). Choose other blocks, or distil it into a model of fewer: --recovery sandwich"
            ) from error
        off = float((found[:-1] - whole[:-1]).abs().amax())
        if not off <= TOLERANCE * scale:
            raise ModelError(
                f"{type(model).__name__}: once a row has left its batch after block {block}, the others differ by "
                f"{off:.2g} of {scale:.2g}. Choose other blocks, or distil it into a model of fewer: --recovery "
                "sandwich"
            )


def find_pooling(model: PreTrainedModel, blocks: Sequence[str], run: Callable[[], Tensor], tokens: int) -> str:
    """What a model's head reads of the last hidden state: the "first" token, or the "mean" of all.

    Args:
        model: in evaluation mode.
        blocks: names of the blocks in the order of their calls.
        run: makes a pass over one row of so many tokens, and returns its logits.
        tokens: three at least.

    Raises:
        ModelError: it reads the last token, or none.
    """
    with behaving(model, Behavior(), blocks, alone=True):
        plain = run()
    read = []
    for token in (0, tokens // 2, tokens - 1):
        with behaving(model, Nudge(token), blocks, alone=True):
            read.append(not torch.allclose(run(), plain, rtol=1e-4, atol=1e-6))
    if read == [True, False, False]:
        return "first"
    if all(read):
        return "mean"
    what = "the last token" if read == [False, False, True] else "neither the first token nor all of them"
    raise ModelError(
        f"{type(model).__name__}: its head reads {what}, and heads after other blocks can read the first token or the "
        "mean of all. Distil it into a model of fewer blocks: --recovery sandwich"
    )
