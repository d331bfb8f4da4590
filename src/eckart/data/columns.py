"""Find the columns of text and labels, and read their cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from eckart.data.chat import read_chat, write_chat
from eckart.data.names import LABEL_NAMES, PAIR_NAMES, TEXT_NAMES, normalize_name
from eckart.data.rows import DataRow
from eckart.data.table import is_number
from eckart.errors import DataError

PEEK = 100
"""Number of rows that are read to find a column."""

TOOLS = "tools"
"""The column that describes the functions that a chat may call."""


class NoSuchColumnError(DataError):
    """No column is named, and none can be told.

    Args:
        source: name of the data.
        what: the column holds.
        columns: that there are, in words.
        flag: the option that names it.
    """

    def __init__(self, source: str, what: str, columns: str, flag: str) -> None:
        super().__init__(f"{source}: which column holds the {what}? There are {columns}: name one with {flag}")
        self.source, self.columns = source, columns


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
        The column that was named; else the one called text, sentence or content, or a chat's usual name; else the only
        one of text; else the first of two that belong together, such as sentence1 and sentence2; else one called by
        another usual name.

    Raises:
        DataError: If that leaves none or several; the message lists the columns.
    """
    columns = _columns(first)
    if asked is not None:
        return _existing(asked, columns, source)
    free = [name for name in columns if name not in taken]
    textual = [name for name in free if _is_textual(first, name)]
    pairs = [pair for pair in _known_pairs(columns) if set(pair) <= set(textual)]
    named = [[name for name in free if normalize_name(name) in names] for names in TEXT_NAMES]
    named = [[name for name in found if name in textual] or found for found in named]
    for choice in (*named[:2], textual, [pair[0] for pair in pairs], *named[2:]):
        if len(choice) == 1:
            return choice[0]
    raise DataError(f"{source}: which column holds the text? There are {_listed(columns)}: name one with --data-column")


def find_pair_column(first: Sequence[DataRow], column: str, *, taken: Sequence[str | None] = ()) -> str | None:
    """Find the column of the second text of a pair by its name.

    Args:
        first: The first rows.
        column: The column of the first text.
        taken: Columns that hold something else.

    Returns:
        The column that is known to belong to the first, such as sentence2 to sentence1; None if there is none.
    """
    for one, other in _known_pairs(_columns(first)):
        if one == column and other not in taken and _is_textual(first, other):
            return other
    return None


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
        The column that was named; else the one called label, labels or score, or by another usual name; else the only
        one of numbers.

    Raises:
        DataError: If that leaves none or several; the message lists the columns.
    """
    columns = _columns(first)
    if asked is not None:
        return _existing(asked, columns, source)
    free = [name for name in columns if name not in taken]
    named = [[name for name in free if normalize_name(name) in names] for names in LABEL_NAMES]
    numeric = [name for name in free if all(is_number(row.values.get(name)) for row in first)]
    for choice in (named[0], numeric, *named[1:], [name for name in named[0] if name in numeric]):
        if len(choice) == 1:
            return choice[0]
    raise NoSuchColumnError(source, "label", _listed(columns), "--data-label-column")


def require_column(column: str, first: Sequence[DataRow], source: str) -> str:
    """Return the column if it exists.

    Raises:
        DataError: If it does not; the message lists the columns.
    """
    return _existing(column, _columns(first), source)


def has_column(column: str, first: Sequence[DataRow]) -> bool:
    """Whether one of the first rows has a value in a column."""
    return any(row.values.get(column) is not None for row in first)


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
        row: The row; its column `tools` describes what a chat may call.
        column: The column that holds text or a chat, see :func:`eckart.data.chat.read_chat`.
        tokenizer: Only its chat template is used.

    Returns:
        The text, and whether a chat template wrote it.

    Raises:
        DataError: If the cell holds something else, or there is no chat template.
    """
    value = cell_value(row, column)
    chat = read_chat(value)
    if chat is not None:
        where = f"{row.where}: column {column!r}"
        return replace_surrogates(write_chat(chat, row.values.get(TOOLS), tokenizer, where)), True
    if isinstance(value, str):
        return replace_surrogates(value), False
    raise DataError(
        f"{row.where}: column {column!r} holds a {type(value).__name__}, not text nor a list of "
        "{role, content} messages: name a column of text"
    )


def replace_surrogates(text: str) -> str:
    """A text that can be written as UTF-8: the halves of a surrogate pair joined, and U+FFFD for one that is alone.

    JSON may hold a half of a pair, as a text does that was cut in UTF-16; tokenizers do not take it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _columns(first: Sequence[DataRow]) -> list[str]:
    return list(dict.fromkeys(name for row in first for name in row.values))


def _known_pairs(columns: Sequence[str]) -> list[tuple[str, str]]:
    known = {normalize_name(name): name for name in columns}
    return [(known[one], known[other]) for one, other in PAIR_NAMES if one in known and other in known]


def _existing(column: str, columns: list[str], source: str) -> str:
    if column in columns:
        return column
    raise DataError(f"{source}: no column {column!r}: name one of {_listed(columns)}")


def _listed(columns: list[str]) -> str:
    return ", ".join(repr(name) for name in columns) or "none"


def _is_textual(first: Sequence[DataRow], column: str) -> bool:
    values = [value for row in first if (value := row.values.get(column)) is not None]
    textual = [value for value in values if isinstance(value, str) or read_chat(value) is not None]
    # Every cell of a .csv is a string: a column of numbers is not text.
    return bool(values) and len(textual) == len(values) and not all(is_number(value) for value in values)
