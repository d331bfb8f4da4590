"""Text to tokenize, from rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from eckart.data.columns import text_of
from eckart.data.rows import DataRow
from eckart.data.source import RowSource
from eckart.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextExample:
    """A text to tokenize.

    Attributes:
        text: The text.
        where: File and line, for messages.
        index: The row's place in the data.
        chat: Whether a chat template wrote it, special tokens included.
        pair: The second text of the row, if there is one.
    """

    text: str
    where: str
    index: int
    chat: bool = False
    pair: str | None = None


def example_of(row: DataRow, column: str, pair_column: str | None = None, tokenizer: Any = None) -> TextExample:
    """Read the text of a row, and its second text.

    Raises:
        DataError: If a cell holds something else; the message names file and line.
    """
    text, chat = text_of(row, column, tokenizer)
    pair = text_of(row, pair_column, tokenizer)[0] if pair_column is not None else None
    return TextExample(text, row.where, row.index, chat, pair)


def choose_rows(source: RowSource, column: str, tokenizer: Any, count: int, seed: int) -> list[DataRow]:
    """Choose rows that hold text, uniformly without replacement.

    Data in random order are read only until there are enough.

    Raises:
        DataError: If no row holds text.
    """
    chosen: list[DataRow] = []
    for row in source.rows:
        if source.sampled and len(chosen) == count:
            break
        if text_of(row, column, tokenizer)[0].strip():
            chosen.append(row)
    if not chosen:
        raise DataError(f"{source.name}: column {column!r} holds no text: pass data that hold text")
    if len(chosen) > count:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[place] for place in order[:count].sort().values.tolist()]
    elif len(chosen) < count:
        logger.info("%s: %d texts, %d were asked for", source.name, len(chosen), count)
    return chosen
