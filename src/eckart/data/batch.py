"""A batch of model-ready data, and a list of batches with a description."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, on the CPU.

    Attributes:
        inputs: Keyword arguments of the model's forward; `labels` only if the task has labels of its own.
        examples: For each row, its place in the data. Random draws are keyed by (seed, example), so that splitting a
            batch changes nothing.
    """

    inputs: dict[str, Tensor]
    examples: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def masks(self) -> dict[int, Tensor]:
        """Return the masks of real tokens by sequence length.

        A layer of an encoder-decoder knows its side by the length of its input: `load_data` makes the two sides of a
        batch of different lengths.

        Returns:
            Sequence length T -> bool (B, T), or (B C, T) for C choices a row; True for a real token. Empty for inputs
            without tokens (images).
        """
        masks = {}
        for ids, mask in SIDES:
            real = _real_tokens(self.inputs, ids, mask)
            if real is not None:
                masks[real.shape[1]] = real
        return masks

    @property
    def num_tokens(self) -> int:
        """The real tokens of both sides; 0 for inputs without tokens."""
        return sum(int(mask.sum()) for mask in self.masks().values())

    def rows(self, start: int, stop: int) -> Batch:
        """Return the rows from `start` up to, not including, `stop` as a batch.

        Tensors without a row for each example are shared whole.
        """
        size = len(self)
        parts = {k: v[start:stop] if v.dim() and v.shape[0] == size else v for k, v in self.inputs.items()}
        return Batch(parts, self.examples[start:stop])


def padding_share(batches: Iterable[Batch]) -> float:
    """Which part of the tokens that a model computes is padding, and of the multiply-adds of its linear layers."""
    real, computed = 0, 0
    for batch in batches:
        for mask in batch.masks().values():
            real, computed = real + int(mask.sum()), computed + mask.numel()
    return 1 - real / computed if computed else 0.0


SIDES = (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))
"""The token ids and the mask of each side of a model."""


def _real_tokens(inputs: dict[str, Tensor], ids: str, mask: str) -> Tensor | None:
    given = inputs.get(mask)
    if given is None and ids in inputs:
        given = torch.ones_like(inputs[ids])
    if given is None or given.dim() not in (2, 3):
        return None
    return given.bool().reshape(-1, given.shape[-1])  # (B, T), or (B C, T) for C choices in a row


@dataclass
class CalibrationData:
    """Batches, and a description of the data.

    Attributes:
        batches: The batches, in order.
        description: JSON for reports and resume keys: source, revision, column, samples, tokens, seed and the SHA-256
            of the text that was read.
    """

    batches: list[Batch]
    description: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def num_examples(self) -> int:
        """Rows in all batches."""
        return sum(len(batch) for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Real tokens in all batches, padding left out."""
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def has_labels(self) -> bool:
        """Whether every batch has labels."""
        return bool(self.batches) and all("labels" in batch.inputs for batch in self.batches)
