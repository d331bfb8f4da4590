"""A table that may have more columns than a terminal: what does not fit stands in a further table below."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from eckart.report.words import make_table, shorten

GAP = 2
"""Columns of the terminal between two columns of a table."""

LABEL = 26
"""Letters of a label before it is broken between words, or shortened in its middle where it is one word."""

HEAD = 12
"""Letters of the name of a column before it is broken between words."""


class WideTable:
    """Columns of words that say what a row is, then columns of numbers; neither is ever cut.

    Where the numbers do not fit beside the words, the table is shown in parts below each other, each with the words
    again.
    """

    def __init__(self, keys: Sequence[str], columns: Sequence[str], title: str | None = None) -> None:
        """Make an empty table.

        Args:
            keys: names of the columns of words; the last of them may be wrapped.
            columns: names of the columns of numbers.
            title: stands over the first part.
        """
        self.title = title
        self.heads = [*keys[:-1], keys[-1], *(wrap_words(name, HEAD) for name in columns)]
        self.keys = len(keys)
        self.rows: list[tuple[list[str], str | None]] = []
        self.ends: set[int] = set()

    def add_row(self, *cells: str, style: str | None = None) -> None:
        """Add a row: its words, then its numbers."""
        words = [wrap_words(cell, LABEL) for cell in cells[: self.keys]]
        self.rows.append(([*words, *cells[self.keys :]], style))

    def add_section(self) -> None:
        """Leave a little space after the row that was added last."""
        self.ends.add(len(self.rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, columns in enumerate(self._parts(options.max_width)):
            if number:
                yield ""
            yield self._table(columns, None if number else self.title)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = self._widths()
        keys = sum(widths[: self.keys]) + GAP * self.keys
        return Measurement(keys + max(widths[self.keys :], default=0), sum(widths) + GAP * (len(widths) - 1))

    def _widths(self) -> list[int]:
        columns = zip(self.heads, *(cells for cells, _ in self.rows), strict=True)
        return [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]

    def _parts(self, width: int) -> Iterator[list[int]]:
        """Numbers of the columns of each part, as many as fit, and one at least."""
        widths = self._widths()
        words = list(range(self.keys))
        room = width - sum(widths[: self.keys]) - GAP * (self.keys - 1)
        part, used = list[int](), 0
        for column in range(self.keys, len(widths)):
            if part and used + GAP + widths[column] > room:
                yield words + part
                part, used = [], 0
            part.append(column)
            used += GAP + widths[column]
        yield words + part

    def _table(self, columns: Sequence[int], title: str | None) -> Table:
        table = make_table(title)
        for column in columns:
            words = column < self.keys
            table.add_column(self.heads[column], justify="left" if words else "right", overflow="fold", no_wrap=True)
        for number, (cells, style) in enumerate(self.rows):
            table.add_row(*(cells[column] for column in columns), style=style)
            if number in self.ends:
                table.add_section()
        return table


def wrap_words(text: str, letters: int) -> str:
    """Break a text between its words where it is longer; a longer word is shortened in its middle."""
    lines = textwrap.wrap(text, letters, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(shorten(line, letters) for line in lines)
