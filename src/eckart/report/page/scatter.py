"""A cloud of points, such as quality against size: what is best at each size stands out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eckart.report.page.svg import color_of, drawing, line, mark, percent, round_ladder, round_ticks, tag, text

HEIGHT, TOP, BOTTOM = 340.0, 26.0, 52.0
NARROW = 290.0
"""Pixels of the narrowest plot: words that do not overlap there do not on a wider page."""

LETTER, ROW = 6.6, 15.0
"""Pixels of a letter, and of a line of words."""


@dataclass(frozen=True)
class Point:
    """A point.

    Attributes:
        x: from 0.
        y: from 0; 0 is best.
        series: number of the series, which gives color and shape.
        label: words beside it, where there is room; "" for none.
        about: what shows where a pointer rests on it.
        strong: whether it stands out.
    """

    x: float
    y: float
    series: int
    label: str = ""
    about: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: what is shown along it.
        format: a number as words.
    """

    title: str
    format: Callable[[float], str]


def draw_scatter(title: str, description: str, points: Sequence[Point], x: Axis, y: Axis) -> Markup:
    """Points; the best are at the top left. Up is nearer to 0, by the square root: small numbers are told apart.

    Args:
        title: of the picture.
        description: of it, in words.
        points: one at least; those of a series are joined in the order of x.
        x: along the bottom.
        y: along the left.
    """
    xs = round_ticks(max(point.x for point in points) * 1.04)
    largest = max(point.y for point in points) * 1.05 or 1.0
    depth = HEIGHT - TOP - BOTTOM

    def place(point: Point) -> tuple[float, float]:
        return point.x / xs[-1], TOP + depth * math.sqrt(point.y / largest)

    parts: list[Markup] = []
    for value in round_ladder(largest):
        at = TOP + depth * math.sqrt(min(value / largest, 1.0))
        parts += [line(0, at, 1, at, "grid"), text(y.format(value), 0, at, dx=-8, dy=4, anchor="end", kind="tick")]
    for value in xs:
        at = value / xs[-1]
        bottom = HEIGHT - BOTTOM
        parts += [line(at, bottom, at, bottom + 5, "axis")]
        parts += [text(x.format(value), at, bottom + 19, anchor="middle", kind="tick")]
    parts += [line(0, HEIGHT - BOTTOM, 1, HEIGHT - BOTTOM, "axis")]
    parts += [text(x.title, 0.5, HEIGHT - 12, anchor="middle", kind="axis-title")]
    parts += [text(f"↑ {y.title}", 0, 10, dx=-44, kind="axis-title")]
    for series in dict.fromkeys(point.series for point in points):
        own = sorted(place(point) for point in points if point.series == series)
        parts += [line(*one, *other, f"join {color_of(series)}") for one, other in itertools.pairwise(own)]
    ordered = sorted(points, key=lambda point: point.strong)
    for point in ordered:
        across, down = place(point)
        if point.strong:
            parts.append(tag("circle", cx=percent(across), cy=down, r=10.0, class_="halo"))
        parts.append(mark(point.series, across, down, point.about))
    parts += _labels([(point, place(point)) for point in reversed(ordered)])
    return drawing(title, description, HEIGHT, *parts)


def find_best(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both numbers, by x: smaller and nearer to 0."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.x, each.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best


Box = tuple[float, float, float, float]


def _labels(placed: Sequence[tuple[Point, tuple[float, float]]]) -> list[Markup]:
    """The words beside the points, each where it covers no other point and no other words; else none."""
    taken: list[Box] = [_around(NARROW * x, y, 6) for _, (x, y) in placed]
    parts = []
    for number, (point, (x, y)) in enumerate(placed):
        if not point.label:
            continue
        width = LETTER * len(point.label)
        own = taken[number]
        far = 14 if point.strong else 10  # beyond the ring
        for dx, dy, anchor in ((far, 4, "start"), (-far, 4, "end"), (0, -far - 1, "middle"), (0, far + 10, "middle")):
            left = NARROW * x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = left, y + dy - 11, left + width, y + dy - 11 + ROW
            inside = box[0] >= -4 and box[2] <= NARROW + 4 and box[1] >= 12 and box[3] <= HEIGHT - BOTTOM + 8
            if inside and not any(_meet(box, other) for other in taken if other is not own):
                taken.append(box)
                parts.append(text(point.label, x, y, dx=dx, dy=dy, anchor=anchor, kind="label"))
                break
    return parts


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
