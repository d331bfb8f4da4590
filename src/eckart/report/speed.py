"""Times side by side: the table of `eckart bench`, and latencies as other reports show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from eckart.report.wide_table import WideTable
from eckart.report.words import format_bytes, format_count

EXPLAINED = (
    "ms: median of one call, and the middle half of all calls; tokens/s: computed in a call; peak: the model and all "
    "tensors alive at one time"
)
COMPARED = (
    "; allowed: 1 / (1 - share of the layers that were made smaller in the original's time x what is left out of their "
    "multiply-adds); reached: speed-up / allowed"
)
COLUMNS = {
    "feed-forward": "feed-forward",
    "attention projections": "projections",
    "attention scores": "scores",
    "matrices in blocks": "matrices",
    "activations and sums": "activations",
    "norms": "norms",
    "embeddings": "embeddings",
    "heads": "heads",
    "other": "other",
}
"""Kinds of modules as the columns of a table say them."""


def render_bench(found: Mapping[str, Any]) -> Group:
    """The models; then for each phase all of them at every size; where the time goes; what it means."""
    parts: list[Any] = [Text(format_machine(found), style="bold"), Text(), _models(found), Text()]
    for phase in dict.fromkeys(row["phase"] for row in found["rows"]):
        parts += [_times(phase, [row for row in found["rows"] if row["phase"] == phase]), Text()]
    compared = any(row["speedup"] is not None for row in found["rows"])
    parts += [_shares(found["shares"]), Text(), Text(EXPLAINED + (COMPARED if compared else ""), style="dim")]
    parts += [Text(sentence, style="bold") for sentence in found["verdict"]]
    return Group(*parts, *(Text(f"note: {note}", style="yellow") for note in found["notes"]))


def format_machine(found: Mapping[str, Any]) -> str:
    """Where times were taken."""
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    clock = "" if found["clock"] == "wall" else f", {found['clock']} time"
    return f"{found['device']} ({found['device_name']}), {threads}, torch {found['torch']}{clock}"


def describe_latency(latency: Mapping[str, Any]) -> str:
    """What a latency was measured on, and where."""
    length = f" x {latency['length']} tokens" if latency["length"] is not None else " inputs"
    threads = f", {latency['threads']} thread{'s' * (latency['threads'] > 1)}" if latency["device"] == "cpu" else ""
    return (
        f"one forward pass of {latency['batch']}{length} in {latency['dtype']} on {latency['device']}{threads}, "
        "median of runs in turn"
    )


def _models(found: Mapping[str, Any]) -> WideTable:
    table = WideTable(["model"], ["type", "factored", "in memory", "files", "load s"])
    for row in found["models"]:
        sizes = [format_bytes(row[key]) if row[key] is not None else "" for key in ("held_bytes", "file_bytes")]
        load = f"{row['load_seconds']:.2f}" if row["load_seconds"] is not None else ""
        table.add_row(row["name"], row["dtype"], str(row["factored"] or ""), *sizes, load)
    return table


def _times(phase: str, rows: list[Mapping[str, Any]]) -> WideTable:
    compiled = any(row["mode"] != "eager" for row in rows)
    compared = any(row["speedup"] is not None for row in rows)
    mode = ["mode"] if compiled else []
    ratios = ["speed-up", "allowed", "reached"] if compared else []
    table = WideTable(
        ["batch x length", "model", *mode], ["ms", "middle half", "tokens/s", *ratios, "peak"], title=phase
    )
    last = None
    for row in rows:
        size = (row["batch"], row["length"])
        if last not in (None, size):
            table.add_section()
        first = "{} x {}".format(*size) if size != last else ""
        last = size
        seconds = row["seconds"]
        table.add_row(
            first,
            row["model"],
            *([row["mode"]] if compiled else []),
            _milliseconds(seconds["median"]),
            f"{_milliseconds(seconds['lower'])}-{_milliseconds(seconds['upper'])}",
            format_count(row["tokens_per_second"]),
            *([_ratio(row["speedup"]), _ratio(row.get("allowed")), _ratio(row["reached"])] if compared else []),
            format_bytes(row["peak_bytes"]) if row["peak_bytes"] is not None else "",
            style="bold" if "allowed" in row else None,
        )
    return table


def _shares(rows: list[Mapping[str, Any]]) -> WideTable:
    kinds = [kind for kind in COLUMNS if any(kind in row["shares"] for row in rows)]
    table = WideTable(
        ["", "batch x length", "model"], [COLUMNS[kind] for kind in kinds], title="where the time goes (eager)"
    )
    for row in rows:
        cells = [f"{row['shares'][kind]:.1%}" if kind in row["shares"] else "" for kind in kinds]
        table.add_row(row["phase"], f"{row['batch']} x {row['length']}", row["model"], *cells)
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else ""
