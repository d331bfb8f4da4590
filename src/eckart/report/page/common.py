"""What several pages say in the same way: names, sizes, quality beside bytes, steps and notes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from eckart.report.page.bars import Bar, draw_bars
from eckart.report.page.blocks import Block, Code, Details, Facts, Items, Key, Picture, Row, Section, Table, Tile, Words
from eckart.report.page.scatter import Axis, Point, draw_scatter, find_best
from eckart.report.page.svg import sample
from eckart.report.words import format_count, format_number, format_share

SIZES = {"elements": "parameters", "bytes": "bytes", "multiply_adds": "multiply-adds a token"}
DISTANCES = ("KL to the original", "1 - cosine to the original")
"""Measures of :func:`eckart.report.compression.list_quality` of which less is better: 0 is the original itself."""

ORIGINAL, ROUNDED = 3, 1
"""Series of the original, and of the original in few bits."""


@dataclass(frozen=True)
class Rival:
    """A model beside others: what it takes and how good it is.

    Attributes:
        name: of it.
        sizes: elements, bytes, multiply_adds.
        quality: measure -> number.
        seconds: of a forward pass; None where none was timed.
        series: that it is drawn as.
        label: in the picture; "" for none.
    """

    name: str
    sizes: Mapping[str, float]
    quality: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    series: int = 0
    label: str = ""

    def distance(self, name: str) -> float | None:
        """A measure of which 0 is best; None where it is not known or not finite."""
        value = self.quality.get(name)
        return max(float(value), 0.0) if isinstance(value, int | float) and math.isfinite(value) else None


def show_name(value: Any) -> str:
    """A name as it was given; of an absolute path the last part, since the page may be published."""
    words = str(value)
    return (
        PurePath(words).name or words if words.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", words) else words
    )


def show_value(value: Any) -> str:
    """An option's value as words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show_value(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show_value(one) for one in value)
    return show_name(value)


def show_score(value: float | str | None) -> str:
    """A score; small ones with two digits that count. One that is not finite is a word in a report."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.2g}" if isinstance(value, float) and 0 < abs(value) < 0.001 else format_number(_number(value))


def show_bytes(value: float) -> str:
    """`9.51 MB`."""
    return f"{format_count(value)}B" if value >= 1e3 else f"{value:.0f} B"


def show_size(key: str, value: float) -> str:
    """A size as words: bytes have a unit."""
    return show_bytes(value) if key == "bytes" else format_count(value)


def change(after: float, before: float) -> str:
    """`−27.1%` of what it was."""
    if not before:
        return ""
    part = 100 * (after / before - 1)
    return f"{'−' if part < 0 else '+'}{abs(part):.1f}%"


def tile_of(key: str, before: float, after: float) -> Tile:
    """A size before and after."""
    return Tile(
        SIZES[key], show_size(key, after), f"of {show_size(key, before)}, {change(after, before)}",
        min(after / before, 1.0) if before else None,
    )  # fmt: skip


def list_sizes(rows: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> Table:
    """Sizes in their three columns: name -> before and after; a row without a change is one that was before."""
    cells = [
        [name, *(
            show_size(key, after[key])
            + (f" ({format_share(after[key], before[key])})" if after is not before else "")
            for key in SIZES
        )]
        for name, (before, after) in rows.items()
    ]  # fmt: skip
    return Table("What is stored and computed, and the part of what it was", ["what", *SIZES.values()], cells)


def measure_of(rivals: Sequence[Rival]) -> str | None:
    """The distance to the original that was measured."""
    return next((name for name in DISTANCES if any(rival.distance(name) is not None for rival in rivals)), None)


def compare_rivals(rivals: Sequence[Rival], caption: str = "Quality beside size") -> list[Block]:
    """A picture of quality against bytes, one against time where it was taken, and the numbers as a table."""
    name = measure_of(rivals)
    blocks: list[Block] = []
    if name is not None:
        drawn = [picture for picture in (_by_bytes(rivals, name), _by_time(rivals, name)) if picture is not None]
        blocks += [Row(drawn)] if len(drawn) > 1 else drawn
    measures = list(dict.fromkeys(measure for rival in rivals for measure in rival.quality))
    timed = any(rival.seconds is not None for rival in rivals)
    header = ["model", "parameters", "bytes", *measures, *(["ms"] if timed else [])]
    rows = [
        [
            rival.name,
            format_count(rival.sizes["elements"]),
            show_bytes(rival.sizes["bytes"]),
            *(show_score(rival.quality.get(measure)) for measure in measures),
            *([f"{rival.seconds * 1e3:.2f}" if rival.seconds is not None else ""] if timed else []),
        ]
        for rival in rivals
    ]
    return [*blocks, Table(caption, header, rows)]


def judge_rounding(rivals: Sequence[Rival], own: Rival, *, rounded: bool = False) -> str | None:
    """What the original in few bits says about a smaller model: whether one is both smaller and nearer.

    Args:
        rivals: both, among others.
        own: the smaller model.
        rounded: whether it is in few bits itself.
    """
    name = measure_of(rivals)
    found = own.distance(name) if name is not None else None
    if name is None or found is None:
        return None
    better = [
        (distance, rival)
        for rival in rivals
        if rival.series == ROUNDED
        and rival.sizes["bytes"] <= own.sizes["bytes"]
        and (distance := rival.distance(name)) is not None
        and distance <= found
    ]
    if not better:
        return None
    distance, rival = min(better, key=lambda one: one[0])
    return (
        f"For stored bytes alone, {rival.name} is the better choice: {show_bytes(rival.sizes['bytes'])} and "
        f"{name} {show_score(distance)}, against {show_bytes(own.sizes['bytes'])} and "
        f"{show_score(found)}. Factoring saves multiply-adds, which rounding does not"
        + (
            "."
            if rounded
            else ", and both go together: compress with `--quantize int8` too, or round what is published, "
            "`eckart export DIR --format factored --quantize int8`."
        )
    )


def list_steps(report: Mapping[str, Any]) -> list[Block]:
    """What each stage brought, where that was measured, and what each step took."""
    blocks: list[Block] = []
    stages = [stage for stage in report.get("stages") or () if isinstance(stage, Mapping)]
    known = [stage for stage in stages if isinstance(stage.get("distance"), int | float) and stage.get("stage")]
    if known:
        bars = [
            Bar(str(stage["stage"]), float(stage["distance"]), series=2 if stage.get("kept") is False else 0,
                words=show_score(stage["distance"]) + ("" if stage.get("kept", True) else ", not kept"))
            for stage in known
        ]  # fmt: skip
        caption = "Distance to the original on held-out text after each stage: less is better"
        about = f"from {show_score(known[0]['distance'])} to {show_score(known[-1]['distance'])}"
        blocks.append(Picture(caption, draw_bars(caption, about, bars, show_score, above=True), flush=True))
    if stages:
        flat = [_flatten(stage) for stage in stages]
        columns = list(dict.fromkeys(key for stage in flat for key in stage))
        first = next((key for key in ("stage", "name", "step") if key in columns), columns[0])
        columns = [first, *(key for key in columns if key != first)]
        words = [place for place, key in enumerate(columns) if any(isinstance(stage.get(key), str) for stage in flat)]
        rows = [[_cell(stage.get(key)) for key in columns] for stage in flat]
        header = [column.replace("_", " ") for column in columns]
        blocks.append(Table("What each stage brought, in order", header, rows, words=words))
        if "kept" in columns:
            blocks.append(Words("kept: whether the run went on with what the stage made. A refit, a refinement or a "
                                "distillation that is no nearer to the original on held-out text is "
                                "undone."))  # fmt: skip
    seconds = {step: float(value) for step, value in (report.get("seconds") or {}).items() if value}
    if seconds:
        total = sum(seconds.values())
        bars = [Bar(step, value, words=f"{_seconds(value)} ({value / total:.0%})") for step, value in seconds.items()]
        about = f"{len(bars)} steps; the longest is {max(seconds, key=lambda step: seconds[step])}"
        caption = f"Where the {_seconds(total)} went"
        blocks.append(Picture(caption, draw_bars(caption, about, bars, _seconds, above=True), flush=True))
    return blocks


def list_notes(report: Mapping[str, Any]) -> list[Block]:
    """Every warning and fallback, what stayed dense, and what was never a candidate."""
    data = report.get("data") or {}
    notes = [*report.get("notes", ()), *(data.get("warnings") or ())]
    blocks: list[Block] = [Items(list(dict.fromkeys(map(str, notes))), warning=True)] if notes else []
    if not notes:
        blocks.append(Words("None: everything was done as it was asked for."))
    dense = Counter(site["left_dense"] for site in report.get("sites", ()) if site.get("left_dense"))
    if dense:
        blocks.append(Words("Sites that stay dense:"))
        blocks.append(Items([f"{count} × {reason}" for reason, count in dense.items()]))
    left = (report.get("quantization") or {}).get("left") or {}
    if left:
        blocks.append(Words("Layers that keep their floating-point numbers:"))
        blocks.append(Items([f"{count} × {reason}" for reason, count in left.items()]))
    skipped = report.get("skipped") or {}
    if skipped:
        rows = [[name, str(reason)] for name, reason in skipped.items()]
        table = Table("Modules with matrices that were left alone", ["module", "why"], rows[:MOST], words=(1,))
        blocks.append(Details(f"{len(rows)} modules were left alone, and why", [table]))
    return blocks


MOST = 2000
"""Rows of a table at most: a model of many experts has more weights than a page should hold."""


def show_loading(lines: str | None, again: str | None) -> Section:
    """How to load what was published, and how to make it again."""
    blocks: list[Block] = []
    if lines:
        blocks.append(Code("In Python", lines.strip()))
    if again:
        blocks.append(Code("Make it again", again))
    return Section("load", "How to load it", blocks)


def list_options(options: Mapping[str, Any]) -> Details:
    """Every option with its value."""
    pairs = [(name.replace("_", " "), show_value(value)) for name, value in options.items() if value is not None]
    return Details(f"All {len(pairs)} options", [Facts(pairs)])


def _by_bytes(rivals: Sequence[Rival], name: str) -> Picture | None:
    shown, points = [], []
    for rival in rivals:
        distance, size = rival.distance(name), rival.sizes["bytes"]
        if distance is not None:
            about = f"{rival.name}: {show_bytes(size)}, {name} {show_score(distance)}"
            shown.append(rival)
            points.append(Point(size / 1e6, distance, rival.series, rival.label or rival.name, about))
    return _draw(shown, points, "Quality against stored bytes", Axis("megabytes stored", lambda v: f"{v:g}"), name)


def _by_time(rivals: Sequence[Rival], name: str) -> Picture | None:
    shown, points = [], []
    for rival in rivals:
        distance = rival.distance(name)
        if distance is not None and rival.seconds is not None:
            time = rival.seconds * 1e3
            about = f"{rival.name}: {time:.2f} ms, {name} {show_score(distance)}"
            shown.append(rival)
            points.append(Point(time, distance, rival.series, rival.label or rival.name, about))
    axis = Axis("milliseconds of a forward pass", lambda v: f"{v:g}")
    return _draw(shown, points, "Quality against latency", axis, name)


def _draw(shown: Sequence[Rival], points: list[Point], title: str, x: Axis, name: str) -> Picture | None:
    if len(points) < 2:
        return None
    best = find_best(points)
    points = [Point(p.x, p.y, p.series, p.label, p.about, p in best) for p in points]
    names = [rival.name for rival, point in zip(shown, points, strict=True) if point.strong]
    about = f"{len(points)} models; none of the others is smaller on both axes than {', '.join(names)}"
    caption = (
        f"{title}: the nearer to the top left, the better; a ring marks what no other beats in both. Heights are by "
        "the square root, so that small distances are told apart; 0 is the original."
    )
    legend = [
        Key(sample(series), words)
        for series, words in dict.fromkeys((rival.series, _series_name(rival)) for rival in shown)
    ]
    y = Axis(f"{name} (square-root scale)", lambda v: f"{v:g}")
    return Picture(caption, draw_scatter(title, about, points, x, y), legend)


def _series_name(rival: Rival) -> str:
    if rival.series == ORIGINAL:
        return "original"
    return "original in few bits" if rival.series == ROUNDED else rival.name.rpartition(" at ")[0] or rival.name


def _flatten(stage: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings as one, keys joined; what is no number, word or truth is left out."""
    flat: dict[str, Any] = {}
    for key, value in stage.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name} ")
        elif isinstance(value, str | int | float) or value is None:
            flat[name] = value
    return flat


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return show_score(value) if isinstance(value, float) else "" if value is None else str(value)


def _seconds(value: float) -> str:
    if value >= 90:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
