"""Tables, and numbers as tables show them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SLICED = "sliced"
"""The form of layers that lose neurons: what stands as its rank is how many are left."""


def make_table(title: str | None = None) -> Table:
    """An empty table in the style of all of them."""
    return Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left", title_style="bold")


def add_columns(table: Table, first: str, others: Iterable[str]) -> Table:
    """Give a table one column of words and then columns of numbers."""
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def name_rank(sites: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers of weights are: their ranks, or neurons of layers that lose some, or either."""
    sliced = {site["form"] == SLICED for site in sites if site["form"] != "dense"}
    return "neurons" if sliced == {True} else "rank" if True not in sliced else "rank or neurons"


def format_count(value: float) -> str:
    """A number of things: `4.53 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))


def format_bytes(value: float) -> str:
    """A size in the units of a file's: `18.11 MB`."""
    number = format_count(value)
    return f"{number}B" if " " in number else f"{number} B"


def format_number(value: float | None) -> str:
    """A score: four decimals below 10, two above; inf and nan as words, None as an empty cell."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def format_share(part: float, whole: float) -> str:
    """A part in per cent of the whole; "-" of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def format_range(low: int, high: int) -> str:
    """`4-16`, or one number where both are the same."""
    return str(low) if low == high else f"{low}-{high}"


def find_common_prefix(kinds: Iterable[str]) -> str:
    """What the names of repeated layers begin with: `model.layers.*`; "" if they have nothing in common."""
    prefixes = {kind[: kind.index(".*.") + 2] for kind in kinds if ".*." in kind}
    return prefixes.pop() if len(prefixes) == 1 else ""


def split_kind(kind: str) -> tuple[str, str]:
    """A kind of site as the part of the model that is repeated and the name in it: `("model.layers.*", "mlp.up_proj")`.

    The part is "" of what is not repeated.
    """
    part, star, name = kind.rpartition(".*.")
    return (f"{part}.*", name) if star else ("", kind)


def shorten(name: str, letters: int) -> str:
    """A name with its middle left out where it is too long: its end says most."""
    if len(name) <= letters:
        return name
    begin = letters // 3
    return f"{name[:begin]}…{name[begin + 1 - letters :]}"


def to_plain_text(renderable: Any, width: int = 110) -> str:
    """What rich would show, without colors."""
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())
