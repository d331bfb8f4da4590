"""Curves that fall, on a scale of powers of ten: spectra."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eckart.report.page.svg import color_of, drawing, line, text

HEIGHT, TOP, BOTTOM = 240.0, 26.0, 46.0
SHOWN = 120
"""Points of a curve that are drawn at most."""

DECADES = 6.0
"""Powers of ten that are shown at most."""


@dataclass(frozen=True)
class Curve:
    """A curve: its numbers from the first on, and the series that gives its color."""

    values: Sequence[float]
    series: int


def draw_spectrum(title: str, description: str, curves: Sequence[Curve], rank: int | None) -> Markup:
    """Singular values in the order of their size, and the rank that is kept as a line from top to bottom.

    Args:
        title: of the picture.
        description: of it, in words.
        curves: with one number at least, in parts of the largest.
        rank: that is stored; None for none.
    """
    longest = max(len(curve.values) for curve in curves)
    low = min((value for curve in curves for value in curve.values if value > 0), default=1.0)
    decades = min(DECADES, max(1.0, -math.log10(low)))
    depth = HEIGHT - TOP - BOTTOM
    bottom = HEIGHT - BOTTOM

    def place(index: int, value: float) -> tuple[float, float]:
        down = min(max(-math.log10(max(value, 1e-300)), 0.0) / decades, 1.0)
        return index / max(longest - 1, 1), TOP + depth * down

    parts: list[Markup] = []
    for power in range(math.floor(decades) + 1):
        at = TOP + depth * power / decades
        shown = "1" if power == 0 else f"{10.0**-power:g}"
        parts += [line(0, at, 1, at, "grid"), text(shown, 0, at, dx=-8, dy=4, anchor="end", kind="tick")]
    for number in dict.fromkeys((1, round(longest / 2), longest)):
        at = (number - 1) / max(longest - 1, 1)
        parts.append(text(str(number), at, bottom + 18, anchor="middle", kind="tick"))
    parts.append(line(0, bottom, 1, bottom, "axis"))
    if rank is not None and 0 < rank < longest:
        at = (rank - 0.5) / max(longest - 1, 1)
        side = ("end", -6) if at > 0.5 else ("start", 6)
        parts += [line(at, TOP, at, bottom, "cut")]
        parts += [text(f"rank {rank}", at, TOP - 4, dx=side[1], anchor=side[0], kind="label")]
    for curve in curves:
        points = [place(index, curve.values[index]) for index in _thin(len(curve.values))]
        parts += [line(*one, *other, f"curve {color_of(curve.series)}") for one, other in itertools.pairwise(points)]
    parts.append(text("number of the singular value", 0.5, HEIGHT - 10, anchor="middle", kind="axis-title"))
    return drawing(title, description, HEIGHT, *parts)


def _thin(count: int) -> list[int]:
    """Places of a curve: all of a short one, evenly spaced ones of a long one, its ends among them."""
    if count <= SHOWN:
        return [*range(count)]
    return sorted({round(index * (count - 1) / (SHOWN - 1)) for index in range(SHOWN)} | {0, 1, 2, 3, count - 1})
