"""Tables in text: by which character their cells are separated, and whether their first row names the columns.

Both are told by the first rows together. What could be read in two ways is refused rather than guessed: a header that
is read as data is calibrated on, and a first row that is taken for a header is lost.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from eckart.data.names import is_known_name
from eckart.errors import DataError

PEEK = 100
"""Rows by which a table is told."""

LONGEST_CELL = min(sys.maxsize, 2**31 - 1)
"""Characters of a cell; Python's default of 131,072 is less than a book has. A C long of 32 bits holds no more."""

WORD = re.compile(r"[#@]?[^\W\d][\w.\-/#:]*(?<![.:])")
"""A name of one word."""

NAME = re.compile(rf"{WORD.pattern}( [\w.\-/#:()]+){{0,3}}(?<![.:])|#\d+ \w+")
"""What the name of a column looks like: one to four words without punctuation between or after them."""

LONGEST_NAME = 40


def find_separator(lines: Sequence[str], usual: str) -> str:
    """Find the character between the cells of a table.

    Args:
        lines: the first lines, each with its ending; a quoted cell may go over several.
        usual: the character that the suffix of the file promises.

    Returns:
        The usual one where it makes cells or nothing else does; else the one of comma, semicolon, tab and bar by which
        every row has equally many cells, two at least.
    """
    others = [mark for mark in (",", ";", "\t", "|") if mark != usual]
    width = _common_width(lines, usual)
    found = [mark for mark in others if (_common_width(lines, mark) or 1) > 1]
    if width is not None and width > 1:
        # A comma in every text of a table that is separated by something else.
        better = [mark for mark in found if _names_columns(lines, mark) and not _names_columns(lines, usual)]
        better = better or [m for m in found if _has_number_column(lines, m) and not _has_number_column(lines, usual)]
        return better[0] if better else usual
    named = [mark for mark in found if _names_columns(lines, mark)]
    if len(lines) < 2:  # a single line with a semicolon is no table yet
        return named[0] if named else usual
    return (named or found or [usual])[0]


def has_header(rows: Sequence[list[str]], asked: Sequence[str], where: str) -> bool:
    """Whether the first row of a table names its columns.

    It does if it holds a column that the user named, or the usual name of a column of text or labels. Columns that the
    user named by number mean that it does not, unless it holds these numbers. Without either it does if every cell
    looks like a name, and there are several.

    Args:
        rows: the first rows.
        asked: columns that the user named.
        where: file and line, for messages.

    Raises:
        DataError: if it may be a header or data; the message says how to tell.
    """
    first, rest = rows[0], rows[1:]
    named = any(is_known_name(cell) and all(cell not in row[i : i + 1] for row in rest) for i, cell in enumerate(first))
    if asked and all(name.isdigit() for name in asked):
        return named or (all(name in first for name in asked) and all(cell.isdigit() for cell in first))
    if any(name in first for name in asked):
        return True
    cells = first[_unnamed(first, rest) :]
    if named:
        return True
    if len(set(cells)) < len(cells) or not all(map(_looks_like_name, (c for c in cells if not is_number(c)))):
        return False
    numbers = [cell for cell in cells if is_number(cell)]
    if not numbers and len(first) > 1:
        return True
    words = [cell for cell in cells if WORD.fullmatch(cell.strip())]
    # "review" over sentences may be a header, "good,1" may be data and "comment,2024" a header.
    unclear = len(words) == len(cells) - len(numbers) > 0 and all(cell.strip().isdigit() for cell in numbers)
    if unclear and len(rows) > 1:
        raise DataError(
            f"{where}: does the first row name the columns, or is it data? It holds {', '.join(map(repr, first))}: "
            f"name one of its columns (--data-column {words[0].strip()}), or say by its number that it is data "
            f"(--data-column {first.index(words[0])})"
        )
    return False


def column_names(header: Sequence[str], where: str) -> list[str]:
    """The names that a header gives; what has none, such as the index of a data frame, is called by its place.

    Raises:
        DataError: if two columns have one name.
    """
    names = [cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(header)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are called {twice!r}: give each a name of its own")
    return names


def is_number(value: object) -> bool:
    """Whether a cell holds a number, or text that spells one."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def read_cells(lines: Iterable[str], separator: str) -> Iterator[tuple[list[str], int]]:
    """Split lines into cells.

    Quotes in .tsv files (MRPC, GLUE) are plain characters, often unbalanced. In .csv an unbalanced quote would swallow
    the rows after it in silence, hence strict.

    Yields:
        The cells of a row, and its first line.
    """
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=separator != "\t")
    start = 1
    while True:
        with _long_cells():
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise BadRowError(str(error), start) from error
        if cells:
            yield cells, start
        start = reader.line_num + 1


class BadRowError(Exception):
    """A row that is not valid CSV: why, and its first line."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of any length; the limit belongs to the whole process and is put back."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(lines: Sequence[str], separator: str) -> list[list[str]]:
    """The rows of some lines, as far as they can be read; the last may be cut off."""
    found: list[list[str]] = []
    try:
        for cells, _ in read_cells(lines, separator):
            found.append(cells)
    except BadRowError:
        pass
    return found


def _common_width(lines: Sequence[str], separator: str) -> int | None:
    """How many cells every row has; None where they differ."""
    widths = {len(row) for row in _rows(lines, separator)}
    return widths.pop() if len(widths) == 1 else None


def _names_columns(lines: Sequence[str], separator: str) -> bool:
    rows = _rows(lines, separator)
    return bool(rows) and len(rows[0]) > 1 and any(is_known_name(cell) for cell in rows[0])


def _has_number_column(lines: Sequence[str], separator: str) -> bool:
    rows = _rows(lines, separator)[1:]
    return any(all(is_number(cell) for cell in column) for column in zip(*rows, strict=False))


def _unnamed(first: Sequence[str], rest: Sequence[list[str]]) -> int:
    """How many cells at the start have no name: `DataFrame.to_csv` writes its index so, with values in every row."""
    count = next((place for place, cell in enumerate(first) if cell.strip()), 0)
    filled = all(all(cell.strip() for cell in row[:count]) for row in rest)
    return count if filled and rest and len(first) > count else 0


def _looks_like_name(cell: str) -> bool:
    return len(cell) <= LONGEST_NAME and NAME.fullmatch(cell.strip()) is not None
