"""The report as people read it: a rich table, plain text, and the rows of a model card."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


def as_rich(report: Mapping[str, Any]) -> Group:
    """Per kind of site, the whole model, quality and time."""
    parts: list[Any] = [Text(_asked(report), style="bold"), _sites(report)]
    parts.extend(Text(line) for line in _quality(report))
    notes = report["notes"]
    if notes:
        parts.append(Text(f"{len(notes)} note{'s' * (len(notes) > 1)}:", style="yellow"))
        parts.extend(Text(f"  {note}") for note in notes[:8])
        if len(notes) > 8:
            parts.append(Text(f"  and {len(notes) - 8} more in report.json"))
    seconds = report["seconds"]
    parts.append(Text("seconds: " + ", ".join(f"{step} {value:.1f}" for step, value in seconds.items()), style="dim"))
    return Group(*parts)


def as_text(report: Mapping[str, Any], width: int = 110) -> str:
    """The same without colours."""
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False).print(as_rich(report))
    return stream.getvalue().rstrip()


def card_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    """Measured numbers for the model card: name -> {column: value}."""
    model = report["sizes"]["model"]
    rows: dict[str, Any] = {
        label: {"original": model["before"][key], "eckart": model["after"][key]}
        for label, key in (("parameters", "elements"), ("bytes", "bytes"), ("multiply-adds per token", "multiply_adds"))
    }
    quality = report["quality"] or {}
    if "agreement" in quality:
        rows["KL to the original per token (nats, held-out text)"] = {"eckart": round(quality["agreement"]["kl"], 5)}
        rows["same most likely token as the original"] = {"eckart": round(quality["agreement"]["top1"], 4)}
    if "embedding" in quality:
        rows["1 - cosine to the original embedding (held-out text)"] = {
            "eckart": round(quality["embedding"]["cosine_distance"], 5)
        }
    return rows


def _asked(report: Mapping[str, Any]) -> str:
    recipe = report["recipe"]
    return (
        f"{report['model']}: method {report['method']}, form {report['form']}, allocation {report['allocation']}, "
        f"keep {recipe['keep']:g} of {recipe['keep_of']} -> {report['kept']['of_sites']:.4f} of the sites' numbers, "
        f"{report['kept']['of_model']:.4f} of the model's"
    )


def _sites(report: Mapping[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("kind of site", overflow="fold")
    for name in ("sites", "dense", "rank", "of", "parameters", "kept", "bytes", "kept", "mult-adds", "kept"):
        table.add_column(name, justify="right")
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["sites"]:
        kinds.setdefault(row["kind"], []).append(row)
    for kind, rows in kinds.items():
        factored = [row["rank"] for row in rows if row["form"] != "dense"]
        ranks = "-" if not factored else _range(min(factored), max(factored))
        full = _range(min(min(r["shape"]) for r in rows), max(min(r["shape"]) for r in rows))
        totals = {
            side: {key: sum(row[side][key] for row in rows) for key in ("elements", "bytes", "multiply_adds")}
            for side in ("before", "after")
        }
        table.add_row(kind, str(len(rows)), str(len(rows) - len(factored)), ranks, full, *_costs(totals))
    table.add_section()
    count = len(report["sites"])
    dense = sum(row["form"] == "dense" for row in report["sites"])
    table.add_row("all sites", str(count), str(dense), "", "", *_costs(report["sizes"]["sites"]), style="bold")
    table.add_row("whole model", "", "", "", "", *_costs(report["sizes"]["model"]), style="bold")
    return table


def _costs(sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
    cells = []
    for key in ("elements", "bytes", "multiply_adds"):
        before, after = sizes["before"][key], sizes["after"][key]
        cells += [_count(after), f"{after / before:.1%}" if before else "-"]
    return cells


def _quality(report: Mapping[str, Any]) -> list[str]:
    quality = report["quality"]
    if quality is None:
        return ["quality: not measured here (no held-out text); see `eckart eval`"]
    lines = []
    on = f"on {quality['examples']} held-out examples of the same data"
    if "agreement" in quality:
        values = quality["agreement"]
        lines.append(
            f"against the original, {on}: KL {values['kl']:.4f} nats a token, "
            f"same most likely token {values['top1']:.1%}"
        )
    if "embedding" in quality:
        lines.append(f"against the original, {on}: 1 - cosine {quality['embedding']['cosine_distance']:.4f}")
    return lines


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))
