"""Rows and tokens taken out of what a block is called with.

transformers gives every block the masks and positions of the whole batch. Once rows or tokens have left the hidden
state, they must leave these too. Which axis of a tensor counts rows (B) and which tokens (T) is told by its shape:

| shape | what | rows | tokens |
|---|---|---|---|
| (B,) | a number a row | 0 | |
| (B or 1, T) | mask of padding, position ids | 0 | 1 |
| (B or 1, T, n) | rotary tables | 0 | 1; of whole numbers 2 as well: distances |
| (B or 1, heads or 1, T or 1, T) | mask of attention, bias of positions | 0 | 2 and 3 |

An axis of size 1 is broadcast, and stays. Whatever has another shape is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

GONE = -1
"""In place of a token's number: nothing is there, and attention does not look at it."""


@dataclass(frozen=True)
class Narrowing:
    """What is left of a batch.

    Attributes:
        batch: rows of the whole batch, B.
        length: tokens of its rows, T.
        rows: numbers of the rows that are left, (r,); None for all.
        tokens: for each of these rows the numbers of the tokens that are left, (r, t), :data:`GONE` where a row has
            fewer than others; None for all.
    """

    batch: int
    length: int
    rows: Tensor | None = None
    tokens: Tensor | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """A tensor of the whole batch without what has left."""
        if self.rows is not None and _counts_rows(tensor, self.batch, self.length):
            tensor = tensor.index_select(0, self.rows.to(tensor.device))
        if self.tokens is None:
            return tensor
        tokens = self.tokens.to(tensor.device)
        axes = _token_axes(tensor, len(tokens), self.length)
        for axis in axes:
            shape = [1] * tensor.dim()
            shape[0], shape[axis] = tokens.shape
            tensor = torch.take_along_dim(tensor, tokens.clamp_min(0).view(shape), dim=axis)
        if axes and bool((tokens < 0).any()):
            tensor = _hide(tensor, tokens < 0, axes[-1])
        return tensor

    def take_all(self, values: Any, stream: Tensor) -> Any:
        """Arguments of a block without what has left.

        Args:
            values: tuples, lists and dictionaries of tensors and of anything else.
            stream: the hidden state, which has been narrowed where it was made.
        """
        if self.rows is None and self.tokens is None:
            return values
        return pytree.tree_map(lambda leaf: self.take(leaf) if _narrows(leaf, stream) else leaf, values)


def _narrows(leaf: Any, stream: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf is not stream


def _counts_rows(tensor: Tensor, batch: int, length: int) -> bool:
    """Whether the first axis of a tensor counts rows."""
    if tensor.dim() == 0 or len(tensor) != batch:
        return False
    return tensor.dim() != 2 or tensor.shape[1] in (1, length)  # else a table of some other kind


def _token_axes(tensor: Tensor, rows: int, length: int) -> tuple[int, ...]:
    """The axes of a tensor that count tokens; the last of them counts what attention looks at."""
    if tensor.dim() < 2 or len(tensor) not in (1, rows):
        return ()
    whole = not tensor.is_floating_point()
    candidates = {2: (1,), 3: (1, 2) if whole else (1,), 4: (2, 3)}.get(tensor.dim(), ())
    return tuple(axis for axis in candidates if tensor.shape[axis] == length)


def _hide(tensor: Tensor, gone: Tensor, axis: int) -> Tensor:
    """Let attention not look at places that hold nothing; (r, t) of them."""
    shape = [1] * tensor.dim()
    shape[0], shape[axis] = gone.shape
    added = tensor.dim() == 4 and tensor.is_floating_point()  # to the scores
    return tensor.masked_fill(gone.view(shape), torch.finfo(tensor.dtype).min if added else 0)
