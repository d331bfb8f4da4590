"""Horizontal bars: a row a thing, one or two numbers each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eckart.report.page.svg import color_of, drawing, line, mark, percent, tag, text

ROW, TOP, BAR, NAME = 26.0, 4.0, 12.0, 20.0
LONGEST = 0.6
"""Of the width: the longest bar leaves room for its number."""


@dataclass(frozen=True)
class Bar:
    """A row.

    Attributes:
        name: to the left.
        value: length of the bar.
        other: a second number, drawn as a mark; None for none.
        series: color of the bar.
        words: beside the bar; "" for the number.
    """

    name: str
    value: float
    other: float | None = None
    series: int = 0
    words: str = ""


def draw_bars(
    title: str, description: str, bars: Sequence[Bar], show: Callable[[float], str], *, above: bool = False
) -> Markup:
    """Bars from 0, each with its number at its end.

    Args:
        title: of the picture.
        description: of it, in words.
        bars: one at least.
        show: a number as words.
        above: put names above their bars, where long ones have room, instead of to the left.
    """
    largest = max(max(bar.value, bar.other or 0.0) for bar in bars) or 1.0
    bottom = TOP
    parts: list[Markup] = []
    for bar in bars:
        named = above and bool(bar.name)
        bottom += NAME if named else 0.0
        middle = bottom + (BAR / 2 + 1 if above else ROW / 2)
        bottom += BAR + 4 if above else ROW
        length = LONGEST * bar.value / largest
        if named:
            parts.append(text(bar.name, 0, middle, dy=-BAR / 2 - 5, kind="tick"))
        elif not above:
            parts.append(text(bar.name, 0, middle, dx=-8, dy=4, anchor="end", kind="tick"))
        about = f"{bar.name}: {bar.words or show(bar.value)}"
        parts.append(
            tag("rect", tag("title", about), x=0, y=middle - BAR / 2, width=percent(max(length, 0.002)), height=BAR,
                rx=2, class_=f"bar {color_of(bar.series)}")
        )  # fmt: skip
        end = length
        if bar.other is not None:
            place = LONGEST * bar.other / largest
            parts.append(mark(3, place, middle, f"{bar.name}: {show(bar.other)}"))
            end = max(end, place)
        parts.append(text(bar.words or show(bar.value), end, middle, dx=10, dy=4, kind="value"))
    return drawing(title, description, bottom + 4, *([] if above else [line(0, TOP, 0, bottom, "axis")]), *parts)
