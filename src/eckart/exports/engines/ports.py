"""What a graph reads and returns, by name, with the axes whose sizes are left open; and batches to try it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.model_kind import max_positions, pad_token

BATCH, LENGTH, PAST, TOTAL = "batch", "length", "past", "total"
"""Texts; tokens of each; tokens that keys and values are known of; both together."""


@dataclass(frozen=True)
class Port:
    """One tensor that a graph reads.

    Attributes:
        name: of the input.
        axes: of its shape: a name where the size is left open, else the size.
        floating: whether it holds float32 numbers; else int64.
    """

    name: str
    axes: tuple[str | int, ...]
    floating: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape when the open axes have these sizes."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)


@dataclass(frozen=True)
class Shape:
    """Sizes of the open axes, and how many tokens of the last text are padding."""

    batch: int
    length: int
    past: int = 0
    padding: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """By the names of the axes."""
        return {BATCH: self.batch, LENGTH: self.length, PAST: self.past, TOTAL: self.past + self.length}


TRACED = Shape(2, 6, padding=2)
TRIED = (Shape(1, 1), Shape(1, 5), Shape(3, 11, padding=7), Shape(3, 4, padding=1))
"""Shapes that what was written is run on: one text and several, lengths, padding."""

TRACED_CAUSAL = Shape(2, 4, past=3, padding=1)
TRIED_CAUSAL = (Shape(1, 5), Shape(3, 7, padding=4), Shape(1, 1, past=6), Shape(3, 1, past=8, padding=5),
                Shape(2, 4, past=3))  # fmt: skip
"""Likewise: prompts, one more token, several more."""


def make_batch(
    model: PreTrainedModel, tokenizer: Any, ports: Sequence[Port], shape: Shape, seed: int
) -> dict[str, Any]:
    """Random numbers of the right kind for every input.

    Args:
        model: whose vocabulary tokens are drawn from.
        tokenizer: its padding token is used; may be None.
        ports: the inputs.
        shape: of the batch. Padding is on the right of an encoder's text, on the left of a decoder's.
        seed: of the numbers.

    Returns:
        name -> tensor.
    """
    stream = torch.Generator().manual_seed(seed)
    sizes = shape.sizes
    causal = any(PAST in port.axes for port in ports)
    mask = torch.ones(shape.batch, sizes[TOTAL], dtype=torch.long)
    if shape.padding:
        mask[-1, slice(None, shape.padding) if causal else slice(-shape.padding, None)] = 0
    ids = _draw_tokens(model, tokenizer, (shape.batch, shape.length), stream)
    ids[mask[:, shape.past :] == 0] = pad_token(tokenizer, model.config)
    batch: dict[str, Tensor] = {}
    for port in ports:
        if port.name == "input_ids":
            batch[port.name] = ids
        elif port.name == "attention_mask":
            batch[port.name] = mask
        elif port.name == "position_ids":
            batch[port.name] = (mask.cumsum(1) - 1).clamp(min=0)[:, shape.past :]
        elif port.floating:
            batch[port.name] = torch.randn(port.shape(sizes), generator=stream)
        else:
            batch[port.name] = torch.zeros(port.shape(sizes), dtype=torch.long)
    return batch


def fitting(shapes: Sequence[Shape], model: PreTrainedModel) -> list[Shape]:
    """Those of the shapes that a model has positions for."""
    limit = max_positions(model.config, model)
    return [shape for shape in shapes if limit is None or shape.past + shape.length <= limit]


def _draw_tokens(model: PreTrainedModel, tokenizer: Any, shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
    """Token ids other than the padding token's: many models look for it."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 8))
    ids = torch.randint(vocabulary, shape, generator=stream)
    return torch.where(ids == pad_token(tokenizer, model.config), (ids + 1) % vocabulary, ids)
