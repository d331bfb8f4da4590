"""The mask of attention that a block is called with, made or narrowed to some of its tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("attention_mask", "mask", "attn_mask")
"""What blocks call it."""


def with_mask(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Tensor) -> tuple[Any, Any]:
    """What a block is called with, so that attention looks at some tokens only.

    Args:
        block: names its mask as transformers does.
        args: of the call.
        kwargs: of the call.
        seen: (B, T) bool, the tokens that may be looked at.

    Returns:
        The arguments with the mask narrowed: of floating-point numbers that are added to the scores, or of ones and
        zeros. Where there was none it is made, (B, 1, 1, T), in the type of the hidden state.
    """
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    name = next((name for name in NAMES if name in names), None)
    if name is None:
        return args, kwargs
    place = names.index(name)
    given = args[place] if place < len(args) else kwargs.get(name)
    hidden = args[0] if args else kwargs["hidden_states"]
    mask = narrow_mask(given, seen, hidden)
    if place < len(args):
        return (*args[:place], mask, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: mask}


def narrow_mask(mask: Tensor | None, seen: Tensor, hidden: Tensor) -> Tensor:
    """A mask that hides what is not seen, beside what it hid before; see :func:`with_mask`."""
    if mask is not None and mask.dim() == 2:  # (B, T), of ones and zeros
        return mask.masked_fill(~seen, 0)
    hides = ~seen[:, None, None, :]
    if mask is None:
        mask = hidden.new_zeros(()).expand(hides.shape)
    added = mask.is_floating_point()
    return mask.masked_fill(hides, torch.finfo(mask.dtype).min if added else 0)
