"""Scores and sizes side by side: the tables of `eckart eval` and `eckart compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from eckart.evaluation.scorers.harness import describe_errors
from eckart.report.speed import describe_latency
from eckart.report.wide_table import WideTable
from eckart.report.words import format_bytes, format_count, format_number, format_share

ROUNDED = "int8, int4: weights rounded to the nearest of few levels, without calibration; of the original, or as named"
KEPT = (
    "of sites: fraction of the numbers that is kept in the sites (the weights that can be factored); of model: of all "
    "numbers"
)
SIZES = {"elements": "parameters", "bytes": "bytes", "multiply_adds": "multiply-adds a token"}


def render_scores(found: Mapping[str, Any]) -> Group:
    """One model and its original: original | eckart | difference | int8 | int4; sizes below, the protocol on top."""
    names = list(dict.fromkeys(name for row in (*found["sizes"].values(), *found["scores"].values()) for name in row))
    compared = "original" in names
    own = next(name for name in names if name in ("eckart", "model"))
    shown = [name for name in names if not name.startswith("int")]
    rounded = [name for name in names if name.startswith("int")]
    table = WideTable([""], [*shown, *(["difference"] if compared else []), *rounded])
    for name, row in found["scores"].items():
        both = compared and "original" in row and own in row
        change = [f"{row[own] - row['original']:+.4f}" if both else ""] if compared else []
        table.add_row(
            name, *(format_number(row.get(n)) for n in shown), *change, *(format_number(row.get(n)) for n in rounded)
        )
    table.add_section()
    for key, row in found["sizes"].items():
        size = format_bytes if key == "bytes" else format_count
        change = [format_share(row[own], row["original"])] if compared else []
        table.add_row(SIZES[key], *(size(row[n]) for n in shown), *change, *(size(row[n]) for n in rounded))
    latency = found["latency"]
    if latency is not None:
        times = {name: _milliseconds(latency, name) for name in latency["seconds"]}
        change = [f"{latency['speedup'][own]:.2f}x as fast"] if compared else []
        table.add_row("latency, ms", *(times.get(n, "") for n in shown), *change, *("" for _ in rounded))
    data = found["data"]
    where = " ".join(str(data[key]) for key in ("source", "config", "split") if data.get(key) is not None)
    lines: list[Any] = [Text(f"{found['task']} on {where}", style="bold"), Text(found["protocol"]), Text(), table]
    if rounded:
        lines.append(Text(ROUNDED, style="dim"))
    errors = describe_errors(found["details"][own]) if found.get("details") else None
    if errors is not None:
        lines.append(Text(f"{errors} ({own})", style="dim"))
    if latency is not None:
        lines.append(Text(f"latency: {describe_latency(latency)}", style="dim"))
    return Group(*lines, *(Text(f"note: {note}", style="yellow") for note in found["notes"]))


def render_comparison(found: Mapping[str, Any]) -> Group:
    """Several methods: for each size that was asked for, what each method really kept, its sizes, quality, seconds."""
    rows = found["rows"]
    measures = list(dict.fromkeys(name for row in rows for name in row["quality"]))
    timed = next((row["latency"] for row in rows if row["latency"] is not None), None)
    speed = ["ms", "as fast"] if timed is not None else []
    names = ("keep", "bytes", *measures, *speed, "of sites", "of model", "parameters", "seconds")
    table = WideTable(["method"], names)

    def add(name: str, row: Mapping[str, Any], *, times: list[str], style: str | None = None) -> None:
        table.add_row(
            name,
            f"{row['keep']:g}" if "keep" in row else "",
            format_bytes(row["bytes"]),
            *(format_number(row["quality"].get(measure)) for measure in measures),
            *(times if timed is not None else []),
            f"{row.get('of_sites', 1):.4f}",
            f"{row.get('of_model', 1):.4f}",
            format_count(row["elements"]),
            f"{row['seconds']:.1f}" if "seconds" in row else "",
            style=style,
        )

    dense = {**found["original"], "quality": {}}
    add("original", dense, times=[_milliseconds(timed, "original"), "1.00x"] if timed is not None else [], style="dim")
    if rounded := found.get("original_rounded"):
        add(f"original {rounded['kind']}", {**rounded, "of_model": 1}, times=_speed(rounded["latency"]))
    last = None
    for row in sorted(rows, key=lambda row: -row["keep"]):
        if row["keep"] != last:
            table.add_section()
            last = row["keep"]
        if before := row.get("before_rounding"):
            of_model = before["elements"] / found["original"]["elements"]
            kept = {"keep": row["keep"], "of_sites": row["of_sites"], "of_model": of_model}
            add(row["method"], {**before, **kept}, times=["", ""])
        add(f"{row['method']} {row['rounded']}" if before else row["method"], row, times=_speed(row["latency"]))
    how = [f"ms: {describe_latency(timed)}; as fast: as the original beside it"] if timed is not None else []
    return Group(table, *(Text(line, style="dim") for line in (KEPT, *how, *found["notes"])))


def _speed(latency: Mapping[str, Any] | None) -> list[str]:
    return [_milliseconds(latency, "eckart"), f"{latency['speedup']['eckart']:.2f}x"] if latency else ["", ""]


def _milliseconds(latency: Mapping[str, Any], name: str) -> str:
    return f"{latency['seconds'][name]['median'] * 1e3:.2f}"
