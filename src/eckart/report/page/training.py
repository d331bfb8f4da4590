"""The page of a recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.report.page.blocks import Block, Facts, Page, Section, Table, Tile, Tiles, Words
from eckart.report.page.common import (
    list_notes,
    list_options,
    list_steps,
    show_loading,
    show_name,
    show_score,
    show_value,
)
from eckart.report.page.spectra import Spectrum, show_spectra
from eckart.report.words import format_count


def describe_tuning(
    report: Mapping[str, Any],
    name: str,
    *,
    loading: str | None = None,
    again: str | None = None,
    scores: Sequence[Section] = (),
    spectra: Sequence[Spectrum] = (),
) -> Page:
    """What was trained or solved on what, and the scores before and after; arguments as of a compression."""
    before, after = report["scores"]["before"], report["scores"]["after"]
    main = report.get("criterion")
    measure = main if main in before and main in after else next(iter(before))
    kept = "the model after it is published" if report["kept"] == "after" else "the model before it was kept"
    tiles = [Tile(each, show_score(after.get(each)), f"before: {show_score(value)}") for each, value in before.items()]
    return Page(
        title=name,
        kind="recovery report",
        summary=f"{show_name(report['recipe'].get('model') or report['model'])}, recovered by {report['recovery']}: "
        f"{measure} {show_score(before[measure])} before, {show_score(after.get(measure))} after; {kept}.",
        tiles=Tiles(tiles),
        sections=[
            Section("quality", "Quality before and after", [_scores(report)]),
            *scores,
            Section("asked", "What was asked", _asked(report)),
            Section("spectra", "Spectra", show_spectra(spectra)),
            Section("stages", "What each stage brought", list_steps(report)),
            Section("notes", "Warnings and fallbacks", list_notes(report)),
            show_loading(loading, again),
        ],
    )


def _scores(report: Mapping[str, Any]) -> Table:
    columns = report["scores"]
    rows = [
        [name, *(show_score(row.get(name)) for row in columns.values())] for name in columns["before"]
    ]  # fmt: skip
    return Table(f"Scored on {report['protocol']}", ["measure", *columns], rows)


def _asked(report: Mapping[str, Any]) -> list[Block]:
    data = report.get("data") or {}
    pairs = [
        ("recovery", report["recovery"]),
        *((f"its {name.replace('_', ' ')}", show_value(value)) for name, value in report["recovery_settings"].items()),
        ("model", report["model"]),
        ("task", report["task"]),
        ("data", show_name(data.get("source", "the data given"))),
        ("device", report["device"]),
        *((name.replace("_", " "), show_value(value)) for name, value in (report.get("training") or {}).items()),
    ]
    done = report.get("recovered_by") or {}
    if {"trained", "of"} <= done.keys():
        pairs.append(("parameters trained", f"{format_count(done['trained'])} of {format_count(done['of'])}"))
    if {"refitted", "of"} <= done.keys():
        pairs.append(("weights solved again", f"{done['refitted']} of {done['of']}"))
    for when, error in (done.get("output_error") or {}).items():
        pairs.append((f"error of outputs {when}", show_score(error)))
    lines = [Words(line) for line in done.get("lines", [])]
    paper = [Words(f"Paper: {report['paper']}")] if report.get("paper") else []
    return [Facts(pairs), *lines, *paper, list_options(report["recipe"])]
