"""Whole texts, for scores on running text."""

from __future__ import annotations

from typing import Any

from eckart.data.columns import find_text_column, peek_rows, text_of
from eckart.data.source import open_source
from eckart.errors import DataError


def load_documents(
    data: Any,
    *,
    tokenizer: Any = None,
    config: str | None = None,
    split: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    max_characters: int | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Read texts in the order of the data.

    Args:
        data: as for :func:`eckart.data.load_data`, "self" left out. None for WikiText-2 from the hub.
        tokenizer: its chat template renders chats.
        config: the hub data set's configuration.
        split: of the hub data set ("test" if None) or of "stdlib" ("held" if None).
        column: the column that holds the text.
        revision: the hub data set's revision.
        max_characters: reading stops after so many.

    Returns:
        The documents (the rows of a running text joined into one), and a description as JSON.

    Raises:
        DataError: if they cannot be found or read, or hold no text.
    """
    split = split or ("held" if data == "stdlib" else "test")
    asked = (column,) if column is not None else ()
    source = open_source(data, config=config, split=split, revision=revision, asked=asked, whole_text=True)
    head, rows = peek_rows(source.rows, source.name)
    column = find_text_column(head, source.name, asked=column or source.column)
    texts: list[str] = []
    size = 0
    for row in rows:
        text, _ = text_of(row, column, tokenizer)
        if text.strip() or source.running:
            texts.append(text)
            size += len(text)
        if max_characters is not None and size >= max_characters:
            break
    if not any(text.strip() for text in texts):
        raise DataError(f"{source.name}: column {column!r} holds no text: pass data that hold text")
    return ["".join(texts)] if source.running else texts, {**source.description, "column": column}
