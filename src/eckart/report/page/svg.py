"""Drawings in SVG that suit any width: places along x are per cent of it, everything else is in pixels.

Text keeps its size on a phone, and colors come from the page's style sheet, which knows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

COLORS = 6
"""Colors of the style sheet, and shapes of marks."""

RESERVED = (1, 3)
"""Series with a meaning of their own: the original in few bits, and the original."""

FREE = tuple(number for number in range(COLORS) if number not in RESERVED)


def color_of(series: int) -> str:
    """The class of the style sheet that gives a series its color."""
    return f"s{series if series < COLORS else FREE[(series - COLORS) % len(FREE)]}"


def shape_of(series: int) -> int:
    """The shape of its marks: series of one color have different ones."""
    if series < COLORS:
        return series
    return (FREE[(series - COLORS) % len(FREE)] + 1 + (series - COLORS) // len(FREE)) % COLORS


def free_series(place: int) -> int:
    """The number of the series at a place, from 0, among those without a meaning of their own."""
    return FREE[place] if place < len(FREE) else COLORS + place - len(FREE)


def tag(name: str, *content: str | Markup, **attributes: str | float | None) -> Markup:
    """An element; text and values of attributes are escaped. `class_` is `class`, other underscores are dashes."""
    words = [
        f'{key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    inside = Markup("").join(content)
    opened = " ".join([name, *words])
    return Markup(f"<{opened}>{inside}</{name}>") if inside else Markup(f"<{opened}/>")


def percent(part: float) -> str:
    """A place along x, from 0 to 1."""
    return f"{100 * part:.2f}%"


def drawing(title: str, description: str, height: float, *content: Markup) -> Markup:
    """The whole drawing, which says in words what it shows."""
    return tag(
        "svg", *content, role="img", aria_label=f"{title}. {description}", class_="drawing", width="100%", height=height
    )


def text(
    words: str, x: float, y: float, *, dx: float = 0, dy: float = 0, anchor: str = "start", kind: str = ""
) -> Markup:
    """Words at a place; `kind` is a class of the style sheet."""
    return tag("text", words, x=percent(x), y=y, dx=dx, dy=dy, text_anchor=anchor, class_=kind or None)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return tag("line", x1=percent(x1), y1=y1, x2=percent(x2), y2=y2, class_=kind)


def mark(number: int, x: float, y: float, about: str = "") -> Markup:
    """A mark of a series, filled; `about` shows where a pointer rests on it."""
    shape = shape_of(number)
    size = 5.0
    inside = tag("title", about) if about else Markup("")
    if shape == 0:
        drawn = tag("circle", inside, r=size)
    elif shape == 1:
        drawn = tag("rect", inside, x=-size + 0.5, y=-size + 0.5, width=2 * size - 1, height=2 * size - 1)
    elif shape == 2:
        drawn = tag("path", inside, d="M0,-6 L5.6,4.4 L-5.6,4.4 Z")
    elif shape == 3:
        drawn = tag("path", inside, d="M0,-6.4 L6.4,0 L0,6.4 L-6.4,0 Z")
    elif shape == 4:
        drawn = tag("path", inside, d="M0,6 L5.6,-4.4 L-5.6,-4.4 Z")
    else:
        drawn = tag("path", inside, d="M-2,-6 H2 V-2 H6 V2 H2 V6 H-2 V2 H-6 V-2 H-2 Z")
    return tag("svg", drawn, x=percent(x), y=y, overflow="visible", class_=f"mark {color_of(number)}")


def sample(number: int) -> Markup:
    """The mark of a series for a legend."""
    return tag("svg", mark(number, 0.5, 7), class_="sample", width=14, height=14, aria_hidden="true", focusable="false")


def round_ticks(largest: float, wanted: int = 5) -> list[float]:
    """Round numbers from 0 to at least the largest.

    Args:
        largest: that is shown; above 0.
        wanted: how many there are about.
    """
    if not largest > 0 or not math.isfinite(largest):
        return [0.0, 1.0]
    raw = largest / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    count = math.ceil(largest / step - 1e-9)
    return [step * number for number in range(count + 1)]


def round_ladder(largest: float, gap: float = 0.15) -> list[float]:
    """Round numbers from 0 to at most the largest, 1, 2 and 5 times powers of ten, for a scale of square roots.

    Args:
        largest: that is shown; above 0.
        gap: between two ticks, at least, as a part of the scale.
    """
    ticks: list[float] = []
    power, last = math.floor(math.log10(largest)), 1.0 + gap
    while last >= 2 * gap:  # the next one has room above 0
        for factor in (5, 2, 1):
            value = factor * 10.0**power
            place = math.sqrt(value / largest)
            if place <= 1.0 + 1e-9 and gap <= place <= last - gap:
                ticks.append(value)
                last = place
        power -= 1
        if 10.0**power * 5 < gap * gap * largest:
            break
    return [0.0, *reversed(ticks)]


def list_words(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _plain(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
