"""What a page is made of. The template knows one way to show each kind of block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Block:
    """A part of a section; `kind` names the macro of the template that shows it."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Words(Block):
    """A paragraph.

    Attributes:
        text: of it.
        strong: whether it is what a reader should take home.
    """

    kind: ClassVar[str] = "words"
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Facts(Block):
    """Names with what they are, such as options with their values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table(Block):
    """Rows whose first cell is their heading.

    Attributes:
        caption: what it shows.
        header: of every column.
        rows: cells as text.
        strong: numbers of rows that stand out.
        words: numbers of columns that hold words, not numbers; the first always does.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Key(Block):
    """An entry of a legend: what a mark stands for."""

    kind: ClassVar[str] = "key"
    mark: Markup
    text: str


@dataclass(frozen=True)
class Picture(Block):
    """A drawing with the numbers that it is made of.

    Attributes:
        caption: what it shows.
        drawing: an SVG element that has a title and a description.
        legend: what its marks stand for.
        numbers: the same as a table.
        flush: whether nothing stands to its left.
    """

    kind: ClassVar[str] = "picture"
    caption: str
    drawing: Markup
    legend: Sequence[Key] = ()
    numbers: Table | None = None
    flush: bool = False


@dataclass(frozen=True)
class Row(Block):
    """Blocks side by side where the page is wide enough."""

    kind: ClassVar[str] = "row"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Cell:
    """A place of a heat map.

    Attributes:
        text: shown in it.
        step: of the color scale, 0 to 9; None for what is on no scale.
        about: more, where a pointer rests on it.
    """

    text: str = ""
    step: int | None = None
    about: str = ""


@dataclass(frozen=True)
class Heat(Block):
    """A heat map: a table whose cells are colored.

    Attributes:
        caption: what it shows.
        corner: heading of the rows' names.
        columns: headings of the columns.
        rows: name and cells.
        scale: what the colors mean, lowest and highest.
    """

    kind: ClassVar[str] = "heat"
    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    scale: tuple[str, str]


@dataclass(frozen=True)
class Tile:
    """A number to be seen first.

    Attributes:
        label: what it is of.
        value: as words, after what was done.
        note: beside it: what it was before.
        share: part of the bar that is filled, 0 to 1; None for no bar.
    """

    label: str
    value: str
    note: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Tiles(Block):
    """The numbers to be seen first."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Code(Block):
    """Lines to be copied.

    Attributes:
        label: what they do.
        text: the lines.
    """

    kind: ClassVar[str] = "code"
    label: str
    text: str


@dataclass(frozen=True)
class Items(Block):
    """A list: of warnings, where `warning` says so."""

    kind: ClassVar[str] = "items"
    texts: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Details(Block):
    """What is shown when its summary is opened."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading.

    Attributes:
        name: of its address in the page.
        title: its heading.
        blocks: its content.
    """

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: what the report is of.
        kind: what was done, in two or three words.
        summary: one sentence: what a reader in a hurry reads.
        tiles: numbers to be seen first.
        sections: in order; those without blocks are left out.
    """

    title: str
    kind: str
    summary: str
    tiles: Tiles = field(default_factory=lambda: Tiles(()))
    sections: Sequence[Section] = ()
