"""Numbers as tables show them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table


def plain_table(*, title: str | None = None) -> Table:
    """An empty table in the style of all of them."""
    return Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left", title_style="bold")


def columns(table: Table, first: str, others: Iterable[str]) -> Table:
    """Give a table a column of words and columns of numbers."""
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def count(value: float) -> str:
    """A number of things: `4.53 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))


def number(value: float | None) -> str:
    """A score to four digits that count; one that is not finite as it is."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def share(after: float, before: float) -> str:
    """A fraction in per cent."""
    return f"{after / before:.1%}" if before else "-"


def between(low: int, high: int) -> str:
    """A range, or its one number."""
    return str(low) if low == high else f"{low}-{high}"


def common_stem(kinds: Iterable[str]) -> str:
    """What the kinds that repeat from layer to layer begin with: `model.layers.*`; "" if they have none in common."""
    stems = {kind[: kind.index(".*.") + 2] for kind in kinds if ".*." in kind}
    return stems.pop() if len(stems) == 1 else ""


def as_plain_text(renderable: Any, width: int = 110) -> str:
    """What rich would show, without colors."""
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())
