"""The report of a compression as people read it: its tables, and the rows of a model card."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from eckart.report.speed import describe_latency
from eckart.report.words import (
    add_columns,
    format_bytes,
    format_count,
    format_range,
    format_share,
    make_table,
    name_rank,
    shorten,
    split_kind,
)

COSTS = ("elements", "bytes", "multiply_adds")
"""The three columns of sizes."""

PART = 24
"""Letters that are shown of a name."""

UNCOUNTED = "; starting, opening the model and publishing are not counted"
"""What no step of a report's seconds holds."""

NOTES = 8
"""Notes that are shown; all of them are in report.json."""

COSINE = "1 - cosine to the original embedding (held-out text)"
"""Row of a card, of a model whose embeddings are compared."""

SIZE_ROWS = {"parameters": "elements", "bytes": "bytes", "multiply-adds per token": "multiply_adds"}
"""Rows of a card on sizes, by their keys in a report."""

CURVATURE = {"sampled": "labels drawn from the model itself", "labels": "the labels of the data"}


def render_compression(report: Mapping[str, Any], *, warned: Collection[str] = ()) -> Group:
    """What was asked, the weights by kind and the whole model before and after, quality, notes, time.

    Args:
        report: of a compression.
        warned: notes that were shown as warnings already, and are not shown again.
    """
    first, *others = _asked(report)
    parts: list[Any] = [
        Text(first, style="bold"),
        *map(Text, others),
        Text(),
        _kinds(report),
        Text(),
        _totals(report),
        Text(),
    ]
    parts += [Text(line) for line in (*_quality(report), *_stages(report), *_rounding(report))]
    parts += _beside(report)
    if report.get("latency"):
        parts.append(Text(_latency(report["latency"])))
    parts += _notes(report["notes"], warned)
    seconds = report["seconds"]
    if seconds:
        steps = ", ".join(f"{step} {value:.1f}" for step, value in seconds.items())
        parts.append(Text(f"time of the steps: {sum(seconds.values()):.1f} s ({steps}){UNCOUNTED}", style="dim"))
    return Group(*parts)


KEPT_OF = {
    "sites": "the sites (the weights that can be factored)",
    "reached": "the sites (the weights that can be factored) that the data reached",
    "model": "the whole model",
}
"""What `keep` is a fraction of, in words."""


def list_card_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    """Measured numbers for the model card: name -> {column: number}."""
    model = report["sizes"]["model"]
    rounding = report.get("quantization")
    unrounded = rounding["before"]["size"] if rounding else None
    rows: dict[str, Any] = {
        label: {
            "original": model["before"][key],
            **({"before rounding": unrounded[key]} if unrounded else {}),
            "eckart": model["after"][key],
        }
        for label, key in SIZE_ROWS.items()
    }
    before = {"before rounding": rounding["before"]["quality"]} if rounding else {}
    for name, quality in {**before, "eckart": report["quality"]}.items():
        for label, value in _card_quality(quality or {}).items():
            rows.setdefault(label, {})[name] = value
    if report.get("latency"):
        latency = report["latency"]
        times = {name: round(seconds["median"] * 1e3, 2) for name, seconds in latency["seconds"].items()}
        rows[f"milliseconds of {describe_latency(latency)}"] = times
    return rows


def _card_quality(quality: Mapping[str, Any]) -> dict[str, float]:
    """What was measured on held-out data, in words of the model's task."""
    found = {}
    if "agreement" in quality:
        values = quality["agreement"]
        unit = values.get("unit", "token")
        found[f"KL to the original per {unit} (nats, held-out {'text' if unit == 'token' else 'data'})"] = round(
            values["kl"], 5
        )
        found[_same(unit)] = round(values["top1"], 4)
    if "embedding" in quality:
        found[COSINE] = round(quality["embedding"]["cosine_distance"], 5)
    return found


def _same(unit: str) -> str:
    return "same most likely token as the original" if unit == "token" else "same answer as the original"


def list_quality(report: Mapping[str, Any]) -> dict[str, float]:
    """What was measured on held-out text, name -> number; empty where nothing was."""
    quality = report["quality"] or {}
    if "agreement" in quality:
        return {"KL to the original": quality["agreement"]["kl"], "same most likely": quality["agreement"]["top1"]}
    if "embedding" in quality:
        return {"1 - cosine to the original": quality["embedding"]["cosine_distance"]}
    return {}


def _asked(report: Mapping[str, Any]) -> list[str]:
    recipe, data = report["recipe"], report["data"]
    whole = KEPT_OF[recipe["keep_of"]]
    budget = f"keep {recipe['keep']:g} of the numbers in {whole}"
    if report["allocation"] == "plan":
        budget = f"the plan {recipe['plan']}"
    elif report["allocation"] == "paper":
        budget = "the sizes that its paper states"
    lines = [
        f"{report['model']} by {report['method']}: {budget}",
        f"{_form(report['form'])}; allocation {report['allocation']}; optimal for {report['exact_for']}",
    ]
    if data is not None:
        unit = f"{data['calibration_tokens']:,} tokens" if "calibration_tokens" in data else "data"
        curvature = "" if report["curvature"] == "none" else f"; gradients from {CURVATURE[report['curvature']]}"
        lines.append(f"calibrated on {unit} of {data.get('source', 'the data given')}{curvature}")
    kept = report["kept"]
    lines.append(
        f"kept: {kept['of_sites']:.4f} of the numbers in the sites, {kept['of_model']:.4f} of all in the model"
    )
    if report.get("ranks", {}).get("multiple", 1) > 1:
        ranks, matrices = report["ranks"], kept["matrix_elements_before"]
        unused = f"; that leaves {kept['unused'] / matrices:.2%} of the numbers unused" if kept.get("unused") else ""
        lines.append(
            f"ranks of the widest weights are multiples of {ranks['multiple']} for target {ranks['target']}{unused}"
        )
    for goal, found in report.get("found", {}).items():
        lines.append(
            f"asked for {goal.replace('_', ' ')}: {', '.join(f'{key} {value:g}' for key, value in found.items())}"
        )
    return lines + [_embedding(row) for row in report.get("embeddings", ())]


def _form(name: str) -> str:
    """What the weights became, in the words in which the forms to choose from were announced."""
    return f"forms chosen: {name}" if " and " in name else f"form {name}"


def _embedding(row: Mapping[str, Any]) -> str:
    size = f"factor {row['factor']}" if "factor" in row else f"rank {row['rank']}"
    heads = f" with {', '.join(row['heads'])}" if row["heads"] else ""
    error = f"squared error {row['lookup_error']:.4f} of its look-ups"
    error += f", {row['head_error']:.4f} of its logits" if "head_error" in row else ""
    kept = f"{format_count(row['after'])} of {format_count(row['before'])} numbers"
    return f"embedding {row['table']}{heads}: {row['form']}, {size}, {kept}; {error}"


def _kinds(report: Mapping[str, Any]) -> Table:
    """What is kept of the weights of each kind; kinds of one part of the model stand under its name."""
    columns = ("factored", name_rank(report["sites"]), "parameters", "bytes", "multiply-adds")
    table = add_columns(make_table("kept of the sites"), "kind of site", columns)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["sites"]:
        kinds.setdefault(row["kind"], []).append(row)
    part = ""
    for kind, rows in kinds.items():
        here, name = split_kind(kind)
        if here != part:
            part = here
            table.add_row(shorten(part, PART + 2), style="dim")
        factored = [row["rank"] for row in rows if row["form"] != "dense"]
        ranks = "-" if not factored else format_range(min(factored), max(factored))
        full = {row.get("full_rank", min(row["shape"])) for row in rows}
        shares = [
            format_share(sum(row["after"][key] for row in rows), sum(row["before"][key] for row in rows))
            for key in COSTS
        ]
        rank = f"{ranks} of {full.pop()}" if factored and len(full) == 1 else ranks  # sliced and factored: two sorts
        indent = "  " if part else ""
        table.add_row(f"{indent}{shorten(name, PART)}", f"{len(factored)} of {len(rows)}", rank, *shares)
    return table


def _totals(report: Mapping[str, Any]) -> Table:
    """Sizes before and after, and what is kept, of all sites together and of the whole model."""
    table = add_columns(make_table(), "size", ("parameters", "bytes", "multiply-adds"))
    for name, what in (("all sites", "sites"), ("whole model", "model")):
        sizes = report["sizes"][what]
        before, after = sizes["before"], sizes["after"]
        table.add_row(f"{name}, before", *(_size(before, key) for key in COSTS))
        cells = [f"{format_share(after[key], before[key])}  {_size(after, key)}" for key in COSTS]
        table.add_row(f"{name}, after", *cells, style="bold")
    return table


def _size(sizes: Mapping[str, int], key: str) -> str:
    return format_bytes(sizes[key]) if key == "bytes" else format_count(sizes[key])


def _quality(report: Mapping[str, Any]) -> list[str]:
    quality = report["quality"]
    if quality is None:
        return ["quality: not measured here (no held-out text); measure it with `eckart eval`"]
    lines = []
    on = f"on {quality['examples']} held-out examples of the same data"
    if "agreement" in quality:
        values = quality["agreement"]
        unit = values.get("unit", "token")
        lines.append(
            f"against the original, {on}: KL {values['kl']:.4f} nats per {unit}, "
            f"{_same(unit).removesuffix(' as the original')} {values['top1']:.1%}"
        )
    if "embedding" in quality:
        lines.append(f"against the original, {on}: 1 - cosine {quality['embedding']['cosine_distance']:.4f}")
    return lines


def _stages(report: Mapping[str, Any]) -> list[str]:
    """What each stage brought, as held-out text says."""
    found = report.get("stages", ())
    if not found:
        return []
    what = "KL" if "agreement" in (report["quality"] or {}) else "1 - cosine"
    steps = [f"{row['stage']} {row['distance']:.4f}{'' if row['kept'] else ' (not kept)'}" for row in found]
    return [f"after each stage, {what}: {', '.join(steps)}"]


def _rounding(report: Mapping[str, Any]) -> list[str]:
    """How the model was rounded, and what it was before."""
    rounding = report.get("quantization")
    if rounding is None:
        return []
    before, after = rounding["before"]["size"], report["sizes"]["model"]["after"]
    line = f"rounded to {rounding['kind']}: {rounding['layers']} layers, {format_bytes(before['bytes'])} -> "
    line += format_bytes(after["bytes"])
    was, now = list_quality({"quality": rounding["before"]["quality"]}), list_quality(report)
    changes = [f"{name} {value:.4f} -> {now[name]:.4f}" for name, value in was.items() if name in now]
    return [f"{line}; {', '.join(changes)}" if changes else line]


def _beside(report: Mapping[str, Any]) -> list[Any]:
    """The original in few bits beside this model: what plain rounding gives at which size."""
    rounded, own = report.get("baselines") or (), list_quality(report)
    measures = [name for name in own if all(name in row["quality"] for row in rounded)]
    if not rounded or not measures:
        return []
    table = add_columns(make_table("beside plain rounding of the original"), "model", ("bytes", *measures))
    now = {"name": "this model", "bytes": report["sizes"]["model"]["after"]["bytes"], "quality": own}
    for row in (now, *rounded):
        table.add_row(row["name"], format_bytes(row["bytes"]), *(f"{row['quality'][name]:.4f}" for name in measures))
    return [Text(), table, Text()]


def _latency(latency: Mapping[str, Any]) -> str:
    before, after = (latency["seconds"][name]["median"] * 1e3 for name in ("original", "eckart"))
    faster = latency["speedup"]["eckart"]
    return f"latency: {before:.2f} ms -> {after:.2f} ms, {faster:.2f} times as fast ({describe_latency(latency)})"


def _notes(notes: Sequence[str], warned: Collection[str]) -> list[Text]:
    shown = [note for note in notes if note not in warned]
    before = len(notes) - len(shown)
    above = f"{before} {'was' if before == 1 else 'were'} shown above, as {'a warning' if before == 1 else 'warnings'}"
    if not notes:
        return []
    counted = f"{len(notes)} note{'s' * (len(notes) > 1)}"
    lines = [Text(f"{counted}, of which {above}{':' * bool(shown)}" if before else f"{counted}:", style="yellow")]
    lines += [Text(f"  {note}") for note in shown[:NOTES]]
    if len(shown) > NOTES:
        lines.append(Text(f"  and {len(shown) - NOTES} more in report.json"))
    return lines
