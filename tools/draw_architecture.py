"""Draw docs/architecture.svg: the packages of src/eckart in the layers of pyproject.toml, and what imports what.

    python tools/draw_architecture.py           # draw
    python tools/draw_architecture.py --check   # exit 1 where the drawing is out of date; part of `make lint`

An arrow means "imports". Arrows that follow from others are left out: where compression imports report and report
imports evaluation, an arrow from compression to evaluation would tell nothing new. So are arrows to what nearly all
packages import.
"""

from __future__ import annotations

import ast
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "eckart"
DRAWING = ROOT / "docs" / "architecture.svg"

BOX, HEIGHT, GAP, STEP, MARGIN = 280, 58, 40, 96, 130  # pixels
LETTERS = 40  # of a line in a box
EVERYWHERE = ("errors", "lookup", "registry")
"""Imported by nearly all packages: arrows to them are left out."""

STYLE = """
text { font: 12px sans-serif; fill: #444 }
.name { font: bold 15px sans-serif; fill: #111 }
rect { fill: #f4f7fb; stroke: #5b7ba5; rx: 6 }
path { fill: none; stroke: #5b7ba5; marker-end: url(#head) }
.far { stroke: #b3c2d6 }
"""


def read_layers() -> list[list[str]]:
    """Packages from the top layer to the lowest, as the import contract lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip("() ") for name in layer.split("|")] for layer in layers]


def find_arrows(packages: set[str]) -> list[tuple[str, str]]:
    """(importer, imported) pairs of packages, without those that follow from others."""
    graph = grimp.build_graph("eckart", cache_dir=None)
    imports: dict[str, set[str]] = {name: set() for name in packages}
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            importer, imported = [(*name.split("."), "")[1] for name in (module, target)]
            if importer != imported and {importer, imported} <= packages:
                imports[importer].add(imported)

    def reachable(name: str) -> set[str]:
        return imports[name].union(*(reachable(other) for other in imports[name]))

    return sorted(
        (name, other)
        for name, others in imports.items()
        for other in others
        if other not in EVERYWHERE and not any(other in reachable(between) for between in others - {other})
    )


def describe(name: str) -> list[str]:
    """The first sentence or clause of the package's docstring, in at most two lines."""
    folder = PACKAGE / name
    file = folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{name}.py"
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    sentence = docstring.replace("\n", " ").replace("`", "").split(". ")[0].rstrip(".")
    lines = textwrap.wrap(sentence, LETTERS)
    while len(lines) > 2 and any(mark in sentence for mark in ";:,"):
        sentence = sentence[: max(sentence.rfind(mark) for mark in ";:,")]
        lines = textwrap.wrap(sentence, LETTERS)
    return lines[:2]


def draw(layers: list[list[str]], arrows: list[tuple[str, str]]) -> Iterator[str]:
    """The lines of the SVG."""
    widest = max(map(len, layers))
    width = widest * BOX + (widest - 1) * GAP + 2 * MARGIN
    place = {}
    for row, names in enumerate(layers):
        left = (width - len(names) * BOX - (len(names) - 1) * GAP) / 2
        for column, name in enumerate(names):
            place[name] = (row, left + column * (BOX + GAP), 20 + row * STEP)
    height = 20 + len(layers) * STEP

    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    yield f"<style>{STYLE}</style>"
    yield (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" style="fill:#5b7ba5;stroke:none;marker-end:none"/></marker></defs>'
    )
    for number, (start, end) in enumerate(arrows):
        yield _arrow(place[start], place[end], number)
    for name in (name for layer in layers for name in layer):
        _, x, y = place[name]
        yield f'<rect x="{x:g}" y="{y}" width="{BOX}" height="{HEIGHT}"/>'
        yield f'<text class="name" x="{x + 10:g}" y="{y + 18}">{name}</text>'
        for line, text in enumerate(describe(name)):
            yield f'<text x="{x + 10:g}" y="{y + 34 + 15 * line}">{escape(text)}</text>'
    yield "</svg>"


def _arrow(start: tuple[int, float, int], end: tuple[int, float, int], number: int) -> str:
    """Straight down to the next layer; past other layers, in an arc beside their boxes."""
    (row, x, y), (below, to_x, to_y) = start, end
    middle, to_middle = x + BOX / 2, to_x + BOX / 2
    if below == row + 1:
        return f'<path d="M{middle:g},{y + HEIGHT} L{to_middle:g},{to_y}"/>'
    side = -1 if (middle + to_middle < 2 * x + BOX or (middle == to_middle and number % 2)) else 1
    edge, to_edge = middle + side * BOX / 2, to_middle + side * BOX / 2
    out = (max if side > 0 else min)(edge, to_edge) + side * (20 + 25 * (below - row))
    y, to_y = y + HEIGHT // 2, to_y + HEIGHT // 2
    return f'<path class="far" d="M{edge:g},{y} C{out:g},{y} {out:g},{to_y} {to_edge:g},{to_y}"/>'


def main() -> None:
    layers = read_layers()
    arrows = find_arrows({name for layer in layers for name in layer})
    drawing = "\n".join(draw(layers, arrows)) + "\n"
    if "--check" not in sys.argv:
        DRAWING.write_text(drawing)
    elif not DRAWING.is_file() or DRAWING.read_text() != drawing:
        sys.exit(f"{DRAWING.relative_to(ROOT)} is out of date. Draw it again: python tools/draw_architecture.py")


if __name__ == "__main__":
    main()
