"""The page of `eckart bench`: how fast, beside what is allowed, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.report.page.bars import Bar, draw_bars
from eckart.report.page.blocks import Block, Key, Page, Picture, Section, Table, Tiles, Words
from eckart.report.page.common import ORIGINAL, ROUNDED, list_notes, show_bytes, show_name
from eckart.report.page.svg import free_series, sample
from eckart.report.speed import COMPARED, EXPLAINED, format_machine
from eckart.report.words import format_count


def describe_bench(found: Mapping[str, Any], name: str) -> Page:
    """Times of models beside their original.

    Args:
        found: what :func:`eckart.bench` returns.
        name: of what was timed.
    """
    compared = any(row["speedup"] is not None for row in found["rows"])
    explained = Words(EXPLAINED + (COMPARED if compared else ""))
    verdict: list[Block] = [Words(sentence, strong=True) for sentence in found["verdict"]]
    return Page(
        title=show_name(name),
        kind="benchmark",
        summary=f"Times of {len(found['models'])} models on {format_machine(found)}.",
        tiles=Tiles(()),
        sections=[
            Section("times", "Speed", [*verdict, *_phases(found), explained]),
            Section("shares", "Where the time goes", _shares(found)),
            Section("models", "The models", [_models(found)]),
            Section("notes", "Warnings and fallbacks", list_notes(found)),
        ],
    )


def _phases(found: Mapping[str, Any]) -> list[Block]:
    series = _series(found)
    blocks: list[Block] = []
    for phase in dict.fromkeys(row["phase"] for row in found["rows"]):
        for size in dict.fromkeys((row["batch"], row["length"]) for row in found["rows"] if row["phase"] == phase):
            rows = [row for row in found["rows"] if (row["phase"], row["batch"], row["length"]) == (phase, *size)]
            blocks.append(_times(phase, size, rows, series))
    return blocks


def _series(found: Mapping[str, Any]) -> dict[str, int]:
    """Model -> number of its series: the original and what it is in few bits have theirs."""
    series: dict[str, int] = {}
    for model in found["models"]:
        if model["name"] == "original":
            series[model["name"]] = ORIGINAL
        elif model.get("role") == "baseline" and model.get("of") == "original":
            series[model["name"]] = ROUNDED
        else:
            series[model["name"]] = free_series(len([number for number in series.values() if number not in (1, 3)]))
    return series


def _times(phase: str, size: tuple[int, int], rows: Sequence[Mapping[str, Any]], series: Mapping[str, int]) -> Picture:
    bars = [
        Bar(
            row["model"] if row["mode"] == "eager" else f"{row['model']}, {row['mode']}",
            row["seconds"]["median"] * 1e3,
            series=series.get(row["model"], 0),
            words=_words(row),
        )
        for row in rows
    ]
    caption = f"{phase}, {size[0]} × {size[1]} tokens: milliseconds of a call"
    fastest = min(bars, key=lambda bar: bar.value)
    drawn = draw_bars(caption, f"{len(bars)} models; the fastest is {fastest.name}", bars, lambda v: f"{v:.3g} ms",
                      above=True)  # fmt: skip
    cells = [
        [
            bar.name,
            f"{row['seconds']['median'] * 1e3:.3g}",
            f"{row['seconds']['lower'] * 1e3:.3g} to {row['seconds']['upper'] * 1e3:.3g}",
            format_count(row["tokens_per_second"]),
            *(_ratio(row.get(key)) for key in ("speedup", "allowed", "reached")),
            show_bytes(row["peak_bytes"]) if row["peak_bytes"] is not None else "",
        ]
        for bar, row in zip(bars, rows, strict=True)
    ]
    header = ["model", "ms", "half of calls", "tokens/s", "speed-up", "allowed", "reached", "peak"]
    return Picture(caption, drawn, numbers=Table(caption, header, cells), flush=True)


def _words(row: Mapping[str, Any]) -> str:
    words = f"{row['seconds']['median'] * 1e3:.3g} ms"
    if row["speedup"] is None or row["model"] == "original":
        return words
    allowed = f" of {row['allowed']:.2f}" if row.get("allowed") else ""
    return f"{words}, {row['speedup']:.2f}×{allowed}"


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else ""


def _shares(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    models = list(dict.fromkeys(row["model"] for row in found["shares"]))
    legend = [Key(sample(free_series(place)), name) for place, name in enumerate(models)]
    for phase, batch, length in dict.fromkeys((r["phase"], r["batch"], r["length"]) for r in found["shares"]):
        rows = [r for r in found["shares"] if (r["phase"], r["batch"], r["length"]) == (phase, batch, length)]
        kinds = sorted({kind for row in rows for kind in row["shares"]},
                       key=lambda kind: -max(row["shares"].get(kind, 0.0) for row in rows))  # fmt: skip
        bars = [
            Bar(
                kind if place == 0 else "", row["shares"].get(kind, 0.0), series=free_series(models.index(row["model"]))
            )
            for kind in kinds
            for place, row in enumerate(rows)
        ]
        caption = f"{phase}, {batch} × {length} tokens: part of the time, by kind of module"
        drawn = draw_bars(caption, f"most goes to {kinds[0]}", bars, lambda value: f"{value:.0%}", above=True)
        cells = [[kind, *(f"{row['shares'].get(kind, 0.0):.1%}" for row in rows)] for kind in kinds]
        numbers = Table(caption, ["kind", *(row["model"] for row in rows)], cells)
        blocks.append(Picture(caption, drawn, legend, numbers, flush=True))
    return blocks


def _models(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            model["name"],
            model["dtype"],
            str(model["factored"] or ""),
            *(show_bytes(model[key]) if model[key] is not None else "" for key in ("held_bytes", "file_bytes")),
            f"{model['load_seconds']:.2f}" if model["load_seconds"] is not None else "",
        ]
        for model in found["models"]
    ]
    header = ["model", "type", "factored weights", "in memory", "files", "load, s"]
    return Table("What was timed", header, rows, words=(1,))
