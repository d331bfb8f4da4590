"""Batches that need no tokenizer: from a data loader, an image processor, a list of dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from eckart.data.batch import Batch
from eckart.data.padding import IGNORED, Shift, decoder_inputs, pad
from eckart.errors import DataError

ROW_KEYS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_features",
    "input_values",
    "decoder_input_ids",
)
"""Inputs whose first dimension is the batch; the first of these that is there gives the number of rows."""


def is_model_ready(item: Any) -> bool:
    """Whether an item is a model-ready batch, and not a row of text.

    Args:
        item: The first item of the data.

    Returns:
        True for a `Batch`, a mapping that holds tensors, arrays, or lists of lists of token ids, or these ids alone.
    """
    if isinstance(item, Batch):
        return True
    if isinstance(item, Tensor | numpy.ndarray):
        return item.ndim == 2 and _is_whole(item)
    if isinstance(item, list | tuple):  # of a `TensorDataset`
        return len(item) == 1 and isinstance(item[0], Tensor) and is_model_ready(item[0])
    if not isinstance(item, Mapping):
        return False
    if any(isinstance(value, Tensor | numpy.ndarray) for value in item.values()):
        return True
    ids = item.get("input_ids")
    return isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)


def _is_whole(values: Tensor | numpy.ndarray) -> bool:
    return not values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind in "iu"


def model_ready_batches(
    items: Iterable[Any], *, limit: int | None, shift: Shift | None = None, pad_id: int = 0
) -> Iterator[Batch]:
    """Convert batches to those that calibration needs.

    Args:
        items: `Batch`es, or mappings of tensors.
        limit: Rows after which to stop; None for all.
        shift: For encoder-decoders: makes decoder inputs from labels, if a batch has labels only.
        pad_id: The decoder's padding token.

    Yields:
        Batches on the CPU, at most `limit` rows in all.

    Raises:
        DataError: If a batch does not consist of tensors with a row for each example; the message names both.
    """
    seen = 0
    taken: set[int] = set()
    for number, item in enumerate(items):
        if limit is not None and seen >= limit:
            return
        batch = item if isinstance(item, Batch) else _from_mapping(item, number, seen, shift, pad_id)
        if limit is not None and seen + len(batch) > limit:
            batch = batch.rows(0, limit - seen)
        if taken & set(batch.examples):  # random draws are keyed by the number of an example
            batch = Batch(batch.inputs, tuple(range(max(taken) + 1, max(taken) + 1 + len(batch))))
        taken |= set(batch.examples)
        seen += len(batch)
        yield batch


def _from_mapping(item: Any, number: int, first: int, shift: Shift | None, pad_id: int) -> Batch:
    where = f"data, batch {number}"
    if isinstance(item, list | tuple) and len(item) == 1:
        item = item[0]
    if isinstance(item, Tensor | numpy.ndarray) and item.ndim == 2 and _is_whole(item):
        item = {"input_ids": item}
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: a {type(item).__name__} is not a batch: pass dictionaries of tensors")
    inputs: dict[str, Tensor] = {}
    lists = {str(name): value for name, value in item.items() if value is not None}
    if "attention_mask" not in lists and _is_ragged(lists.get("input_ids")):
        lists["attention_mask"] = [[1] * len(row) for row in lists["input_ids"]]
    for name, value in lists.items():
        try:
            if _is_ragged(value):
                fill = pad_id if name in ("input_ids", "decoder_input_ids") else IGNORED if name == "labels" else 0
                value = pad(value, fill)
            inputs[name] = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(
                f"{where}: {name!r} is not a tensor ({error}): remove columns that the model does not take"
            ) from error
    return make_batch(inputs, where, first, shift, pad_id)


def _is_ragged(value: Any) -> bool:
    """Whether lists of numbers differ in length, as a tokenizer returns them without padding."""
    return isinstance(value, list) and all(isinstance(row, list) for row in value) and len(set(map(len, value))) > 1


def make_batch(inputs: dict[str, Tensor], where: str, first: int, shift: Shift | None, pad_id: int) -> Batch:
    """Make a batch of tensors.

    Args:
        inputs: keyword arguments of the model's forward.
        where: what the batch is called in messages.
        first: number of its first example.
        shift: for encoder-decoders: makes decoder inputs from labels, if there are labels only.
        pad_id: the decoder's padding token.

    Raises:
        DataError: if there is no row for each example.
    """
    key = next((name for name in ROW_KEYS if name in inputs), next(iter(inputs), None))
    if key is None or inputs[key].dim() < 2 or inputs[key].shape[0] == 0:
        raise DataError(
            f"{where}: {key or 'nothing'!r} has no rows: every tensor needs a first dimension for the "
            "batch; wrap single examples in a DataLoader"
        )
    rows = inputs[key].shape[0]
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in inputs and mask in inputs and inputs[ids].shape[:1] != inputs[mask].shape[:1]:
            raise DataError(
                f"{where}: {ids!r} is {tuple(inputs[ids].shape)} and {mask!r} "
                f"{tuple(inputs[mask].shape)}: make them agree"
            )
    return Batch(_separate_sides(inputs, shift, pad_id), tuple(range(first, first + rows)))


def _separate_sides(inputs: dict[str, Tensor], shift: Shift | None, pad_id: int) -> dict[str, Tensor]:
    """Add the decoder's ids and mask, of another length than the encoder's, so that layers can tell them apart."""
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
