"""Text to tokenize, from rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eckart.data.columns import text_of
from eckart.data.rows import DataRow


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
