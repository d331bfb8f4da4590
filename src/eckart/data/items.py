"""The items of what is passed from Python: texts, rows, chats, single examples or batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from eckart.data.model_ready import is_model_ready
from eckart.data.ready_examples import example_row, is_ready_example
from eckart.data.rows import SUFFIXES, DataRow
from eckart.errors import DataError, UsageError

DATASETS = ("Dataset", "IterableDataset")
"""Classes of the library `datasets` that hold rows."""


def as_items(data: Any) -> Iterable[Any]:
    """The items of what was passed from Python: texts, rows, chats or batches, in an order that every run repeats.

    A data frame gives its rows (iterated over, it gives the names of its columns), and so do a dictionary of columns
    and a `torch.utils.data.Dataset`; a single batch is one item.

    Raises:
        UsageError: if it holds no rows, or none in order.
    """
    if isinstance(data, set | frozenset):
        raise UsageError("data: a set has no order, each run would read another: pass a list, such as sorted(data)")
    if isinstance(data, str | bytes | bytearray) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise _no_rows(data)
    if isinstance(data, Mapping):
        return _items_of_mapping(data)
    if isinstance(columns := getattr(data, "columns", None), Iterable) and not isinstance(columns, str):
        return _items_of_frame(data)
    if not isinstance(data, Iterable):  # rows by number
        if not isinstance(data, Sized):
            raise _no_rows(data)
        return _Sequence(data)
    return data


def _items_of_mapping(data: Mapping[Any, Any]) -> Iterable[Any]:
    """A batch as it is; equally long lists as the columns of rows."""
    if is_model_ready(data):
        return [data]
    columns = {str(key): value for key, value in data.items() if isinstance(value, list | tuple)}
    if not columns or len(columns) < len(data) or len({len(value) for value in columns.values()}) > 1:
        raise _no_rows(data)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _items_of_frame(data: Any) -> Iterable[Any]:
    """The rows of a pandas, polars or pyarrow table; what is missing there is None."""
    if callable(getattr(data, "to_pylist", None)):
        return list(data.to_pylist())
    if callable(getattr(data, "to_dicts", None)):
        return list(data.to_dicts())
    if not callable(getattr(data, "to_dict", None)):
        raise _no_rows(data)
    return [{key: None if value != value else value for key, value in row.items()} for row in _records(data)]


def _records(data: Any) -> list[dict[Any, Any]]:
    try:
        return list(data.to_dict("records"))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"data: the rows of this {type(data).__name__} cannot be read ({error}): pass a list"
        ) from error


def _no_rows(data: Any) -> UsageError:
    return UsageError(
        f"data: {_a(data)} holds no rows: pass a file, a hub identifier, a list of strings, or a list of model-ready "
        "batches"
    )


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def first_item(data: Any) -> tuple[Any, Any]:
    """Read the first item of an iterable without consuming it.

    Args:
        data: As for :func:`open_source`.

    Returns:
        The first item (None if `data` is no iterable or is empty), and an equivalent of `data`.

    Raises:
        UsageError: If it holds no rows, or none in order.
    """
    named = data is None or isinstance(data, str | os.PathLike)
    if named or is_from_datasets(data, *DATASETS, "DatasetDict", "IterableDatasetDict"):
        return None, data
    data = as_items(data)
    if isinstance(data, list | tuple):
        return (data[0] if data else None), data
    items = iter(data)
    first = next(items, None)
    rest = chain([first], items) if first is not None else iter(())
    return first, _SizedIterator(rest, len(data)) if isinstance(data, Sized) else rest


def as_row(item: Any, index: int) -> DataRow:
    """The row of an item: a text, a mapping, a chat, or token ids.

    Raises:
        DataError: if it is neither.
    """
    where = f"data, item {index}"
    if isinstance(item, str):
        if index == 0 and _names_a_file(item):
            raise DataError(
                f"{where}: {item!r} is the name of a file, and a list is read as texts: pass the file or its folder"
            )
        return DataRow({"text": item}, where, index)
    if isinstance(item, Mapping) or is_ready_example(item):
        return example_row(item, index)
    if isinstance(item, list | tuple) and item and isinstance(item[0], Mapping):
        return DataRow({"messages": list(item)}, where, index)
    raise DataError(
        f"{where}: {_a(item)} is neither text, a row nor a batch: pass strings, dictionaries of columns, "
        "lists of token ids, or dictionaries of tensors"
    )


def _names_a_file(text: str) -> bool:
    path = Path(text)
    try:
        return path.suffix.lower() in SUFFIXES and path.is_file()
    except (OSError, ValueError):  # no name of a file
        return False


def is_from_datasets(data: Any, *classes: str) -> bool:
    """Whether an object is of one of these classes of `datasets`, without importing it: who has one did that."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, tuple(getattr(datasets, name) for name in classes))


@dataclass
class _SizedIterator:
    """An iterator whose number of items is known."""

    items: Iterator[Any]
    length: int

    def __iter__(self) -> Iterator[Any]:
        return self.items

    def __len__(self) -> int:
        return self.length


@dataclass
class _Sequence:
    """What has items by number alone, gone through in order."""

    items: Any

    def __iter__(self) -> Iterator[Any]:
        return (self.items[place] for place in range(len(self.items)))

    def __len__(self) -> int:
        return len(self.items)
