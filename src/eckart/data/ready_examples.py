"""Single examples that need no tokenizer: rows of token ids, images, features; put together into batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from eckart.data.batch import Batch
from eckart.data.model_ready import make_batch
from eckart.data.padding import IGNORED, Shift, by_length
from eckart.data.rows import DataRow
from eckart.errors import DataError

DIMENSIONS = {"input_ids": 1, "pixel_values": 3, "input_features": 2, "input_values": 1}
"""Inputs of a single example -> their dimensions; a batch has one more."""

TAKEN = (*DIMENSIONS, "attention_mask", "token_type_ids", "labels", "decoder_input_ids", "decoder_attention_mask",
         "position_ids", "bbox", "pixel_mask", "pixel_attention_mask")  # fmt: skip
"""Columns that are read of rows where the model is not known."""


def is_ready_example(item: Any) -> bool:
    """Whether an item is one example that a model reads as it is: token ids, or a mapping with them or an image."""
    if not isinstance(item, Mapping):
        return _dimensions(item) == 1 and _is_whole(item)
    return any(_dimensions(item.get(name)) == count for name, count in DIMENSIONS.items())


def example_row(item: Any, index: int) -> DataRow:
    """The row of an item."""
    values = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
    return DataRow({str(key): value for key, value in values.items()}, f"data, item {index}", index)


def example_batches(
    rows: Sequence[DataRow],
    *,
    model: Any,
    batch_size: int,
    max_length: int | None,
    pad_id: int,
    shift: Shift | None,
    labels: Sequence[Any] | None = None,
) -> Iterator[Batch]:
    """Put single examples into batches of about equal lengths.

    Args:
        rows: the examples, of the columns that the model takes; all others are left out.
        model: says which columns it takes; None where it is not loaded.
        batch_size: examples a batch.
        max_length: token ids an example; None for all that it has.
        pad_id: fills up token ids; masks and types are filled up with 0, labels with -100.
        shift: for encoder-decoders: makes decoder inputs from labels.
        labels: of each row, in place of those in a column of this name.

    Raises:
        DataError: if an example cannot be read, or two of a batch cannot be put together.
    """
    names = _names_taken(model)
    encoded = [_tensors(row, names, max_length) for row in rows]
    if labels is not None:
        encoded = [own | {"labels": torch.tensor(label)} for own, label in zip(encoded, labels, strict=True)]
    lengths = [len(own["input_ids"]) if "input_ids" in own else 0 for own in encoded]
    for chosen in by_length(lengths, batch_size):
        keys = [key for key in encoded[chosen[0]] if all(key in encoded[i] for i in chosen)]
        inputs = {key: _stack([encoded[i][key] for i in chosen], key, rows[chosen[0]].where, pad_id) for key in keys}
        batch = make_batch(inputs, rows[chosen[0]].where, 0, shift, pad_id)
        yield Batch(batch.inputs, tuple(rows[i].index for i in chosen))


def _names_taken(model: Any) -> tuple[str, ...]:
    return TAKEN if model is None else tuple(inspect.signature(model.forward).parameters)


def _tensors(row: DataRow, names: Sequence[str], max_length: int | None) -> dict[str, Tensor]:
    found = {}
    for name in names:
        if (value := row.values.get(name)) is None:
            continue
        try:
            found[name] = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(f"{row.where}: {name!r} is not a tensor ({error}): correct or remove the row") from error
    length = len(found["input_ids"]) if found.get("input_ids") is not None and found["input_ids"].dim() else 0
    if "input_ids" in found and "attention_mask" not in found:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    for name, value in found.items():
        if max_length is not None and value.dim() == 1 and len(value) == length:
            found[name] = value[:max_length]
    return found


def _stack(values: Sequence[Tensor], name: str, where: str, pad_id: int) -> Tensor:
    if len({value.shape for value in values}) == 1:
        return torch.stack(list(values))
    if any(value.dim() != 1 for value in values):
        shapes = sorted({tuple(value.shape) for value in values})
        raise DataError(
            f"{where}: {name!r} has the shapes {', '.join(map(str, shapes))} in one batch: make them alike, or pass "
            "batches"
        )
    fill = pad_id if name in ("input_ids", "decoder_input_ids") else IGNORED if name == "labels" else 0
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


def _dimensions(value: Any) -> int:
    if isinstance(value, Tensor | numpy.ndarray):
        return value.ndim
    if isinstance(value, list | tuple) and value and not isinstance(value[0], str | bytes | Mapping):
        return 1 + _dimensions(value[0])
    return 0


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point()
    if isinstance(value, numpy.ndarray):
        return value.dtype.kind in "iu"
    return all(isinstance(entry, int | numpy.integer) and not isinstance(entry, bool) for entry in value)
