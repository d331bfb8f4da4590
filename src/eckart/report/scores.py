"""Scores and sizes side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from eckart.report.words import columns, count, number, plain_table, share

SIZES = {"elements": "parameters", "bytes": "bytes", "multiply_adds": "multiply-adds a token"}


def scores_table(found: Mapping[str, Any]) -> Group:
    """The scores of `eckart eval`: original | eckart | difference | int8 | int4, sizes below, the protocol on top."""
    names = list(dict.fromkeys(name for row in (*found["sizes"].values(), *found["scores"].values()) for name in row))
    compared = "original" in names
    own = next(name for name in names if name in ("eckart", "model"))
    shown = [name for name in names if not name.startswith("int")]
    rounded = [name for name in names if name.startswith("int")]
    table = columns(plain_table(), "", [*shown, *(["difference"] if compared else []), *rounded])
    for name, row in found["scores"].items():
        both = compared and "original" in row and own in row
        change = [f"{row[own] - row['original']:+.4f}" if both else ""] if compared else []
        table.add_row(name, *(number(row.get(n)) for n in shown), *change, *(number(row.get(n)) for n in rounded))
    table.add_section()
    for key, row in found["sizes"].items():
        change = [share(row[own], row["original"])] if compared else []
        table.add_row(SIZES[key], *(count(row[n]) for n in shown), *change, *(count(row[n]) for n in rounded))
    data = found["data"]
    where = " ".join(str(data[key]) for key in ("source", "config", "split") if data.get(key) is not None)
    lines: list[Any] = [Text(f"{found['task']} on {where}", style="bold"), Text(found["protocol"]), Text(), table]
    if rounded:
        lines.append(Text("int8, int4: the original's same weights rounded to nearest, no calibration", style="dim"))
    return Group(*lines, *(Text(f"note: {note}", style="yellow") for note in found["notes"]))


def comparison_table(found: Mapping[str, Any]) -> Group:
    """Methods by kept fraction: `rows` of method, keep, what was really kept, sizes, quality, seconds."""
    rows = found["rows"]
    measures = list(dict.fromkeys(name for row in rows for name in row["quality"]))
    names = ("keep", "of sites", "of model", "parameters", "bytes", *measures, "seconds")
    table = columns(plain_table(), "method", names)
    before = found["original"]
    dense = ["1.0000", "1.0000", count(before["elements"]), count(before["bytes"]), *("" for _ in measures), ""]
    table.add_row("original", "", *dense, style="dim")
    last = None
    for row in sorted(rows, key=lambda row: -row["keep"]):
        if row["keep"] != last:
            table.add_section()
            last = row["keep"]
        table.add_row(
            row["method"],
            f"{row['keep']:g}",
            f"{row['of_sites']:.4f}",
            f"{row['of_model']:.4f}",
            count(row["elements"]),
            count(row["bytes"]),
            *(number(row["quality"].get(name)) for name in measures),
            f"{row['seconds']:.1f}",
        )
    return Group(table, *(Text(line, style="dim") for line in found["notes"]))
