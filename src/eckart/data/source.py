"""Rows of whatever `--data` names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eckart.config import is_too_long
from eckart.data import hub, stdlib
from eckart.data.items import DATASETS, as_items, as_row, is_from_datasets
from eckart.data.rows import SUFFIXES, DataRow, list_files, read_path
from eckart.errors import DataError

SHUFFLE_ABOVE = 100_000
"""A data set of more rows than this is read in random order, and only as far as needed."""

SHUFFLE_BUFFER = 1_000
"""Buffer in which a streamed data set is shuffled, in rows."""


@dataclass
class RowSource:
    """Rows, and where they come from.

    Attributes:
        rows: The rows; can be read once.
        name: Name of the data in messages.
        description: Source, config, split and revision, as JSON.
        column: The column of text if the source decides it, or None.
        sampled: The rows come in random order (or in the only order there is) and may be too many to read all.
        running: The rows are pieces of one text, to be joined without special tokens between them.
    """

    rows: Iterator[DataRow]
    name: str
    description: dict[str, Any]
    column: str | None = None
    sampled: bool = False
    running: bool = False


def open_source(
    data: Any,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    asked: tuple[str, ...] = (),
    whole_text: bool = False,
    seed: int = 0,
) -> RowSource:
    """Open the data that the user named.

    Args:
        data: None (WikiText-2), "stdlib", a file, a folder, a hub identifier, a `datasets` object, or an iterable
            of strings, rows (dictionaries) or chats; one without a length is read only as far as needed.
        config: The hub data set's configuration.
        split: The hub data set's split.
        revision: The hub data set's revision.
        asked: Columns that the user named; they decide whether a table has a header.
        whole_text: A .txt file is one row.
        seed: For the order of data that are too many to read all.

    Returns:
        The rows.

    Raises:
        DataError: If there are no data of that name.
        UsageError: If `data` is of a type that holds no rows.
    """
    if data is None:
        identifier, default_config, column = hub.DEFAULT
        source = _from_hub(identifier, config or default_config, split, revision, seed)
        source.column = column
        return source
    if isinstance(data, str | os.PathLike):
        return _from_name(os.fspath(data), config, split, revision, asked, whole_text, seed)
    if is_from_datasets(data, "DatasetDict", "IterableDatasetDict"):
        if split not in data:
            raise DataError(f"data: no split {split!r}: name one of {', '.join(map(str, data))}")
        data = data[split]
    if is_from_datasets(data, *DATASETS):
        note = {"source": f"datasets.{type(data).__name__}", "split": str(data.split) if data.split else None}
        return _from_dataset(data, "data set", note, seed)
    rows = (as_row(item, index) for index, item in enumerate(as_items(data)))
    return RowSource(rows, "data", {"source": type(data).__name__}, sampled=not isinstance(data, Sized))


def require_data(*named: Any) -> None:
    """Refuse a file or folder of data that is not there or cannot be read, before anything takes time.

    Args:
        named: what the user gave as data. What is no name, and a name that may be one of the hub, is not looked at.

    Raises:
        DataError: naming the file.
    """
    for data in named:
        if isinstance(data, str | os.PathLike) and os.fspath(data) not in WORDS:
            _find_local(os.fspath(data))


WORDS = ("stdlib", "self")
"""Names of data that are neither a path nor on the hub."""


def _find_local(name: str) -> Path | None:
    """The file or folder of that name, None for what may be on the hub.

    Raises:
        DataError: there is none, and it looks like one; or nothing in it can be read.
    """
    if is_too_long(name):
        raise DataError(f"{name[:80]!r}...: too long for a path or a name on the hub: check it")
    path = Path(name).expanduser()
    if path.exists():
        list_files(path)
        return path
    if path.suffix.lower() in SUFFIXES or name.startswith((".", "~", os.sep)):
        raise DataError(f"{name}: no such file or folder: check the path (read from {Path.cwd()})")
    return None


def _from_name(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    asked: tuple[str, ...],
    whole_text: bool,
    seed: int,
) -> RowSource:
    if name == "stdlib":
        part = split if split in ("calibration", "held") else "calibration"
        pairs = stdlib.documents(part)
        modules = (DataRow({"text": text}, f"stdlib module {module}", i) for i, (module, text) in enumerate(pairs))
        return RowSource(modules, "stdlib", {"source": "stdlib", "split": part}, column="text")
    path = _find_local(name)
    if path is not None:
        rows = read_path(path, asked=asked, whole_text=whole_text)
        return RowSource(rows, name, {"source": str(path.resolve())})
    return _from_hub(name, config, split, revision, seed)


def _from_hub(identifier: str, config: str | None, split: str, revision: str | None, seed: int) -> RowSource:
    data, note = hub.open_hub(identifier, config=config, split=split, revision=revision)
    return _from_dataset(data, identifier, note, seed, running=identifier in hub.RUNNING_TEXT)


def _from_dataset(
    data: Any,
    name: str,
    note: dict[str, Any],
    seed: int,
    running: bool = False,
) -> RowSource:
    sampled = True
    indexed: Iterable[tuple[int, Any]]
    if not hasattr(data, "__len__"):  # an IterableDataset
        # A row's index is its place in the shuffled stream, which the seed decides.
        indexed = enumerate(data if running else data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
    elif len(data) > SHUFFLE_ABOVE and not running:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        indexed = ((index, data[index]) for index in order)
    else:
        sampled = running
        indexed = enumerate(data)
    rows = (DataRow(dict(values), f"{name}, row {index}", index) for index, values in indexed)
    return RowSource(rows, name, note, sampled=sampled, running=running)
