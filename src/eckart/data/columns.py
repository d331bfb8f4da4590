"""Find the columns of text and labels, and read their cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from eckart.data.rows import DataRow, is_number
from eckart.errors import DataError

TEXT_NAMES = ("text", "sentence", "content")
"""Names of a text column, used if the user names none."""

LABEL_NAMES = ("label", "labels", "score")
"""Names of a label column, used if the user names none."""

PEEK = 100
"""Number of rows that are read to find a column."""


def peek_rows(rows: Iterator[DataRow], source: str) -> tuple[list[DataRow], Iterator[DataRow]]:
    """Read the first rows without consuming them.

    Args:
        rows: The rows.
        source: Name of the data, for messages.

    Returns:
        The first rows, and an iterator over all rows.

    Raises:
        DataError: If there is no row.
    """
    first = list(islice(rows, PEEK))
    if not first:
        raise DataError(f"{source}: no rows: pass data that holds text")
    return first, chain(first, rows)


def find_text_column(
    first: Sequence[DataRow], source: str, *, asked: str | None, taken: Sequence[str | None] = ()
) -> str:
    """Find the column that holds the text.

    Args:
        first: The first rows.
        source: Name of the data, for messages.
        asked: The column that the user named.
        taken: Columns that hold something else.

    Returns:
        The column that was named; else the one called text, sentence or content; else the only one of text.

    Raises:
        DataError: If that leaves none or several; the message lists the columns.
    """
    columns = _columns(first)
    if asked is not None:
        return _existing(asked, columns, source)
    free = [name for name in columns if name not in taken]
    named = [name for name in free if name.lower() in TEXT_NAMES]
    textual = [name for name in free if _is_textual(first, name)]
    for choice in (named, textual):
        if len(choice) == 1:
            return choice[0]
    raise DataError(f"{source}: which column holds the text? There are {_listed(columns)}: name one with --data-column")


def find_label_column(
    first: Sequence[DataRow], source: str, *, asked: str | None, taken: Sequence[str | None] = ()
) -> str:
    """Find the column that holds the label.

    Args:
        first: The first rows.
        source: Name of the data, for messages.
        asked: The column that the user named.
        taken: Columns that hold something else.

    Returns:
        The column that was named; else the one called label, labels or score; else the only one of numbers.

    Raises:
        DataError: If that leaves none or several; the message lists the columns.
    """
    columns = _columns(first)
    if asked is not None:
        return _existing(asked, columns, source)
    free = [name for name in columns if name not in taken]
    named = [name for name in free if name.lower() in LABEL_NAMES]
    numeric = [name for name in free if all(is_number(row.values.get(name)) for row in first)]
    for choice in (named, numeric):
        if len(choice) == 1:
            return choice[0]
    raise DataError(f"{source}: which column holds the label? There are {_listed(columns)}: name it (label_column)")


def require_column(column: str, first: Sequence[DataRow], source: str) -> str:
    """Return the column if it exists.

    Raises:
        DataError: If it does not; the message lists the columns.
    """
    return _existing(column, _columns(first), source)


def cell_value(row: DataRow, column: str) -> Any:
    """Return the value of a row in a column.

    Raises:
        DataError: If there is none; the message names file and line.
    """
    value = row.values.get(column)
    if value is None:
        raise DataError(
            f"{row.where}: no value in column {column!r} (columns: {_listed(list(row.values))}): fill or remove the row"
        )
    return value


def text_of(row: DataRow, column: str, tokenizer: Any = None) -> tuple[str, bool]:
    """Return the text of a row; the tokenizer's chat template turns chat messages into text.

    Args:
        row: The row.
        column: The column that holds text or a list of `{role, content}` messages.
        tokenizer: Only its chat template is used.

    Returns:
        The text, and whether a chat template wrote it.

    Raises:
        DataError: If the cell holds something else, or there is no chat template.
    """
    value = cell_value(row, column)
    if isinstance(value, str):
        return value, False
    if not _is_chat(value):
        raise DataError(
            f"{row.where}: column {column!r} holds a {type(value).__name__}, not text nor a list of "
            "{role, content} messages: name a column of text"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{row.where}: column {column!r} holds chat messages, but the tokenizer has no chat template: "
            "set tokenizer.chat_template, or name a column of plain text"
        )
    try:
        return tokenizer.apply_chat_template(value, tokenize=False), True
    except Exception as error:  # templates raise whatever their author wrote
        raise DataError(
            f"{row.where}: the chat template cannot write column {column!r} ({error}): correct or remove the row"
        ) from error


def _columns(first: Sequence[DataRow]) -> list[str]:
    return list(dict.fromkeys(name for row in first for name in row.values))


def _existing(column: str, columns: list[str], source: str) -> str:
    if column in columns:
        return column
    raise DataError(f"{source}: no column {column!r}: name one of {_listed(columns)}")


def _listed(columns: list[str]) -> str:
    return ", ".join(repr(name) for name in columns) or "none"


def _is_textual(first: Sequence[DataRow], column: str) -> bool:
    values = [value for row in first if (value := row.values.get(column)) is not None]
    textual = [value for value in values if isinstance(value, str) or _is_chat(value)]
    # Every cell of a .csv is a string: a column of numbers is not text.
    return bool(values) and len(textual) == len(values) and not all(is_number(value) for value in values)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in value)
    )
