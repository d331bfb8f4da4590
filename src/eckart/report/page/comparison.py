"""The page of `eckart compare`: what to choose, at a glance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eckart.report.page.blocks import Block, Details, Facts, Page, Section, Table, Tiles, Words
from eckart.report.page.common import (
    ORIGINAL,
    ROUNDED,
    Rival,
    compare_rivals,
    list_notes,
    measure_of,
    show_bytes,
    show_name,
    show_score,
)
from eckart.report.page.compression import list_rounded
from eckart.report.page.scatter import Point, find_best
from eckart.report.page.svg import free_series
from eckart.report.scores import KEPT
from eckart.report.speed import describe_latency
from eckart.report.words import format_count, format_share

MILLISECONDS = (
    "ms: each model was timed in turn with the original; shown is the original's median time by the model's speed-up."
)
SHOWN = 3
"""Models that the first sentence names at most."""


def describe_comparison(found: Mapping[str, Any], name: str) -> Page:
    """The methods side by side, the original and the original in few bits among them.

    Args:
        found: what :meth:`eckart.compression.compare.Comparison.as_dict` returns.
        name: of the model, as far as it is known.
    """
    rivals = list_compared(found)
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    keeps = sorted({row["keep"] for row in found["rows"]}, reverse=True)
    asked = [("methods", ", ".join(methods)), ("sizes (keep)", ", ".join(f"{keep:g}" for keep in keeps))]
    timed = next((row["latency"] for row in found["rows"] if row.get("latency")), None)
    asked += [("latency", describe_latency(timed))] if timed else []
    return Page(
        title=show_name(name),
        kind="comparison",
        summary=f"{len(found['rows'])} smaller models: {', '.join(methods)} at keep "
        f"{', '.join(f'{keep:g}' for keep in keeps)}. {_best_in_words(rivals)}".strip(),
        tiles=Tiles(()),
        sections=[
            Section("choose", "What to choose", _choose(rivals)),
            Section("asked", "What was asked", [Facts(asked), Words(KEPT)]),
            Section("numbers", "Every result", [_rows(found)]),
            Section("notes", "Warnings and fallbacks", list_notes(found)),
        ],
    )


def list_compared(found: Mapping[str, Any]) -> list[Rival]:
    """Every model of a comparison that has sizes, with a series a method."""
    rows = found["rows"]
    names = list(dict.fromkeys(name for row in rows for name in _names(row)))
    series = {name: free_series(place) for place, name in enumerate(names)}
    measures = list(dict.fromkeys(measure for row in rows for measure in row["quality"]))
    perfect = {measure: 1.0 if measure == "same most likely" else 0.0 for measure in measures}
    before = [row["latency"]["seconds"]["original"]["median"] for row in rows if row.get("latency")]
    base = statistics.median(before) if before else None
    rivals = []
    if found.get("original"):
        rivals.append(Rival("original", found["original"], perfect, base, ORIGINAL))
    if rounded := found.get("original_rounded"):
        seconds = _seconds(rounded.get("latency"), base)
        label = f"original {rounded['kind']}"
        rivals.append(Rival(label, rounded, rounded["quality"], seconds, ROUNDED, rounded["kind"]))
    known = {rival.name for rival in rivals}
    rivals += [rival for rival in list_rounded(found.get("baselines") or ()) if rival.name not in known]
    for row in rows:
        *before, own = _names(row)
        keep = f"{row['keep']:g}"
        if before:
            was = row["before_rounding"]
            rivals.append(
                Rival(f"{before[0]} at {keep}", was, was["quality"], None, series[before[0]], f"{before[0]} {keep}")
            )
        rivals.append(
            Rival(
                f"{own} at {keep}",
                row,
                row["quality"],
                _seconds(row.get("latency"), base),
                series[own],
                f"{own} {keep}",
            )
        )
    return rivals


def _names(row: Mapping[str, Any]) -> list[str]:
    """The methods of a row: as it is in floating point, and rounded where it was."""
    return [row["method"], f"{row['method']} {row['rounded']}"] if row.get("before_rounding") else [row["method"]]


def _seconds(latency: Mapping[str, Any] | None, base: float | None) -> float | None:
    """Seconds beside those of others: each was timed in turn with the original, whatever else the machine did then."""
    return base / latency["speedup"]["eckart"] if latency and base is not None else None


def _best(rivals: Sequence[Rival], cost: Callable[[Rival], float | None]) -> list[Rival]:
    """Models that no other beats in both cost and nearness to the original, from small to large."""
    name = measure_of(rivals)
    points = [
        (rival, Point(price, distance, 0))
        for rival in rivals
        if name is not None and (distance := rival.distance(name)) is not None and (price := cost(rival)) is not None
    ]
    best = find_best([point for _, point in points])
    return [rival for rival, point in sorted(points, key=lambda pair: pair[1].x) if point in best]


def _best_by(rivals: Sequence[Rival]) -> dict[str, list[Rival]]:
    return {
        "bytes": _best(rivals, lambda rival: rival.sizes["bytes"]),
        "latency": _best(rivals, lambda rival: rival.seconds),
    }


def _best_in_words(rivals: Sequence[Rival]) -> str:
    words = []
    for what, best in _best_by(rivals).items():
        names = [rival.name for rival in reversed(best) if rival.series != ORIGINAL]
        more = f" and {len(names) - SHOWN} smaller ones" if len(names) > SHOWN else ""
        words += [f"Nearest to the original for their {what}: {', '.join(names[:SHOWN])}{more}."] if names else []
    return " ".join(words)


def _choose(rivals: Sequence[Rival]) -> list[Block]:
    """What a person sees first: the pictures, then what is left to choose from, then all."""
    *pictures, table = compare_rivals(rivals, "All of them")
    return [*pictures, *_choice(rivals), Details("All of them as a table", [table])]


def _choice(rivals: Sequence[Rival]) -> list[Block]:
    name, by = measure_of(rivals), _best_by(rivals)
    if name is None:
        return [Words("Quality was not measured, so that only sizes can be compared: give --data.")]
    best = [rival for rival in rivals if any(rival in those for those in by.values())]
    before = next((rival for rival in rivals if rival.series == ORIGINAL), rivals[-1])
    timed = any(rival.seconds is not None for rival in rivals)
    rows = [
        [
            rival.name,
            " and ".join(what for what, those in by.items() if rival in those),
            show_bytes(rival.sizes["bytes"]),
            format_share(rival.sizes["bytes"], before.sizes["bytes"]),
            format_share(rival.sizes["multiply_adds"], before.sizes["multiply_adds"]),
            show_score(rival.quality[name]),
            *([f"{rival.seconds * 1e3:.2f}" if rival.seconds is not None else ""] if timed else []),
        ]
        for rival in sorted(best, key=lambda rival: rival.sizes["bytes"])
    ]
    header = ["model", "best for", "bytes", "of the original's", "multiply-adds", name, *(["ms"] if timed else [])]
    caption = "Choose among these: for every other, one of them costs no more and is nearer to the original"
    table = Table(caption, header, rows, words=(1,))
    return [table, *([Words(MILLISECONDS)] if timed else [])]


def _rows(found: Mapping[str, Any]) -> Table:
    rows = found["rows"]
    measures = list(dict.fromkeys(measure for row in rows for measure in row["quality"]))
    header = ["method", "keep", "of sites", "of model", "parameters", "bytes", "multiply-adds", *measures, "as fast",
              "seconds"]  # fmt: skip
    cells = [
        [
            _names(row)[-1],
            f"{row['keep']:g}",
            f"{row['of_sites']:.4f}",
            f"{row['of_model']:.4f}",
            format_count(row["elements"]),
            show_bytes(row["bytes"]),
            format_count(row["multiply_adds"]),
            *(show_score(row["quality"].get(measure)) for measure in measures),
            f"{row['latency']['speedup']['eckart']:.2f}×" if row.get("latency") else "",
            f"{row['seconds']:.1f}",
        ]
        for row in sorted(rows, key=lambda row: -row["keep"])
    ]
    return Table("As asked, and as it came out", header, cells)
