"""Draw docs/quality.svg from docs/results/causal_quality.md: perplexity against stored numbers, a line for each method.

python tools/draw_results.py           # draw
python tools/draw_results.py --check   # exit 1 where the drawing is out of date; part of `make lint`
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "docs" / "results" / "causal_quality.md"
DRAWING = ROOT / "docs" / "quality.svg"

LINES = {  # row of the table -> name in the drawing
    "svd": "svd",
    "asvd": "asvd",
    "svd-llm": "svd-llm, drone",
    "kfac": "kfac",
    "eckart": "eckart",
    "eckart, pivoted alone": "eckart --optimise size",
    "eckart, --optimise size --effort best": "eckart --optimise size --effort best",
}
COLORS = ("#8a8f98", "#b58900", "#b4552d", "#7a5195", "#1f77b4", "#2ca02c", "#0b7285")
DASHES = ("2 3", "7 3", "1 0", "9 3 2 3", "1 0", "5 3", "1 0")

WIDTH, HEIGHT = 840, 420
LEFT, RIGHT, TOP, BOTTOM = 62, 295, 46, 52
KEEPS = (0.4, 0.6, 0.8)
LOW, HIGH = 60.0, 210.0  # perplexity
TICKS = (66, 80, 100, 130, 160, 200)

TITLE = "Perplexity on unseen books, lower is better (Llama architecture)"
STYLE = """
text { font: 13px sans-serif; fill: #333 }
.title { font: bold 15px sans-serif }
.grid { stroke: #ddd }
.dense { stroke: #333; stroke-dasharray: 4 4 }
@media (prefers-color-scheme: dark) {
  .paper { fill: #1b1e24 } text { fill: #ddd } .grid { stroke: #3a3f4a } .dense { stroke: #ddd }
}
"""


def read_points(text: str) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """Perplexity of the dense model; row -> (keep, perplexity).

    The first table has a line for each method and size; the second one a line for each variant, of one seed.
    """
    first, _, second = text.partition("What the forms of the default")
    points: dict[str, list[tuple[float, float]]] = {}
    for name, keep, found in re.findall(r"^\| ([a-z, -]+?) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", first, re.M):
        points.setdefault(name, []).append((float(keep), float(found)))
    ((_, dense),) = points.pop("dense")
    row = re.search(r"^\| \*\*eckart\*\*[^|]*\|(.*)\|$", second, re.M)
    assert row is not None, "the table of the default's forms has no row of the default"
    found = map(float, row.group(1).split("|"))
    points["eckart"] = list(zip(sorted(KEEPS, reverse=True), found, strict=True))
    return dense, points


def draw(dense: float, points: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """The lines of the SVG."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-label="Perplexity on unseen books against the fraction of numbers that is kept, by method">'
    )
    yield f'<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    yield f'<text class="title" x="{LEFT}" y="24">{TITLE}</text>'
    for value in TICKS:
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(value):.1f}" y2="{_y(value):.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{_y(value) + 4:.1f}" text-anchor="end">{value}</text>'
    for keep in KEEPS:
        yield f'<text x="{_x(keep):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{keep:.0%}</text>'
    yield (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        "numbers of the linear layers that are stored</text>"
    )
    yield f'<line class="dense" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(dense):.1f}" y2="{_y(dense):.1f}"/>'
    ends = sorted((points[row][-1][1], row) for row in LINES)
    place = _y(dense) + 4.0  # names stand from below upwards, apart from each other
    heights = {}
    for value, row in ends:
        heights[row] = place = min(place - 17, _y(value) + 4)
    for row, color, dash in zip(LINES, COLORS, DASHES, strict=True):
        line = " ".join(f"{_x(keep):.1f},{_y(value):.1f}" for keep, value in points[row])
        width = 3 if row.startswith("eckart") else 1.8
        yield (
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}"/>'
        )
        yield from (
            f'<circle cx="{_x(keep):.1f}" cy="{_y(value):.1f}" r="3.5" fill="{color}"><title>{LINES[row]}, keep '
            f"{keep:g}: {value:g}</title></circle>"
            for keep, value in points[row]
        )
        weight = ' font-weight="bold"' if row.startswith("eckart") else ""
        yield (
            f'<text x="{WIDTH - RIGHT + 12}" y="{heights[row]:.1f}"{weight} style="fill:{color}">{LINES[row]} '
            f"{points[row][-1][1]:.4g}</text>"
        )
    yield f'<text x="{WIDTH - RIGHT + 12}" y="{_y(dense) + 8:.1f}">dense {dense:g}</text>'
    yield "</svg>"


def _x(keep: float) -> float:
    """From the largest on the left to the smallest on the right."""
    return LEFT + 24 + (KEEPS[-1] - keep) / (KEEPS[-1] - KEEPS[0]) * (WIDTH - LEFT - RIGHT - 36)


def _y(value: float) -> float:
    share = math.log(value / LOW) / math.log(HIGH / LOW)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def main() -> None:
    drawing = "\n".join(draw(*read_points(TABLES.read_text(encoding="utf-8")))) + "\n"
    if "--check" not in sys.argv:
        DRAWING.write_text(drawing, encoding="utf-8")
    elif not DRAWING.is_file() or DRAWING.read_text(encoding="utf-8") != drawing:
        sys.exit(f"{DRAWING.relative_to(ROOT)} is out of date. Draw it again: python tools/draw_results.py")


if __name__ == "__main__":
    main()
