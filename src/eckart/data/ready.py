"""Batches that are model-ready already: from a data loader, an image processor, a list of dictionaries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from eckart.data.batch import Batch
from eckart.data.padding import IGNORED, Shift, decoder_inputs
from eckart.errors import DataError

ROW_KEYS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_features",
    "input_values",
    "decoder_input_ids",
)
"""Inputs whose first dimension is the batch, most telling first."""


def is_ready(item: Any) -> bool:
    """Tell a model-ready batch from a row of text.

    Args:
        item: The first item of the data.

    Returns:
        True for a `Batch`, or a mapping that holds tensors, arrays, or lists of lists of token ids.
    """
    if isinstance(item, Batch):
        return True
    if not isinstance(item, Mapping):
        return False
    if any(isinstance(value, Tensor | numpy.ndarray) for value in item.values()):
        return True
    ids = item.get("input_ids")
    return isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)


def ready_batches(
    items: Iterable[Any], *, limit: int | None, shift: Shift | None = None, pad_id: int = 0
) -> Iterator[Batch]:
    """Bring batches into the form that calibration needs.

    Args:
        items: `Batch`es, or mappings of tensors.
        limit: Rows after which to stop; None for all.
        shift: For encoder-decoders: from labels to decoder inputs, where a batch brings labels alone.
        pad_id: The decoder's padding token.

    Yields:
        Batches on the CPU, at most `limit` rows in all.

    Raises:
        DataError: If a batch is not of tensors with a row per example; the message names batch and key.
    """
    seen = 0
    taken: set[int] = set()
    for number, item in enumerate(items):
        if limit is not None and seen >= limit:
            return
        batch = item if isinstance(item, Batch) else _from_mapping(item, number, seen, shift, pad_id)
        if limit is not None and seen + len(batch) > limit:
            batch = batch.rows(0, limit - seen)
        if taken & set(batch.examples):  # two examples of one number would be taken for one
            batch = Batch(batch.inputs, tuple(range(max(taken) + 1, max(taken) + 1 + len(batch))))
        taken |= set(batch.examples)
        seen += len(batch)
        yield batch


def digest_batches(batches: Iterable[Batch]) -> str:
    """Return the SHA-256 of what batches hold.

    Args:
        batches: The batches.

    Returns:
        The digest in hexadecimal.
    """
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch.inputs):
            value = batch.inputs[name].contiguous()
            total.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            total.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _from_mapping(item: Any, number: int, first: int, shift: Shift | None, pad_id: int) -> Batch:
    if not isinstance(item, Mapping):
        raise DataError(f"data, batch {number}: a {type(item).__name__} is no batch: pass dictionaries of tensors")
    inputs: dict[str, Tensor] = {}
    for name, value in item.items():
        if value is None:
            continue
        try:
            inputs[str(name)] = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"data, batch {number}: {name!r} is no tensor ({error}): remove columns that the model does not take"
            ) from error
    key = next((name for name in ROW_KEYS if name in inputs), next(iter(inputs), None))
    if key is None or inputs[key].dim() < 2 or inputs[key].shape[0] == 0:
        raise DataError(
            f"data, batch {number}: {key or 'nothing'!r} has no rows: every tensor needs a first dimension for the "
            "batch; wrap single examples in a DataLoader"
        )
    rows = inputs[key].shape[0]
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in inputs and mask in inputs and inputs[ids].shape[:1] != inputs[mask].shape[:1]:
            raise DataError(
                f"data, batch {number}: {ids!r} is {tuple(inputs[ids].shape)} and {mask!r} "
                f"{tuple(inputs[mask].shape)}: make them agree"
            )
    return Batch(_sides_apart(inputs, shift, pad_id), tuple(range(first, first + rows)))


def _sides_apart(inputs: dict[str, Tensor], shift: Shift | None, pad_id: int) -> dict[str, Tensor]:
    """Give the decoder's side of a batch its ids, its mask and a length of its own."""
    source, ids, labels = inputs.get("input_ids"), inputs.get("decoder_input_ids"), inputs.get("labels")
    source_length = source.shape[1] if source is not None and source.dim() == 2 else 0
    if ids is None:
        if shift is None or labels is None or labels.dim() != 2:
            return inputs
        return inputs | decoder_inputs(labels, shift, pad_id, source_length)
    if ids.shape[1] != source_length:
        return inputs
    mask = inputs.get("decoder_attention_mask", torch.ones_like(ids))
    widened = {
        "decoder_input_ids": torch.nn.functional.pad(ids, (0, 1), value=pad_id),
        "decoder_attention_mask": torch.nn.functional.pad(mask, (0, 1), value=0),
    }
    if labels is not None and labels.shape == ids.shape:
        widened["labels"] = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)
    return inputs | widened
