"""The page of `eckart eval`, and its part in other pages: scores beside those of the original and of plain rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eckart.report.page.blocks import Block, Page, Section, Table, Tiles, Words
from eckart.report.page.common import SIZES, list_notes, show_name, show_score, show_size
from eckart.report.page.compression import list_latency
from eckart.report.scores import ROUNDED


def describe_scores(found: Mapping[str, Any], name: str) -> Page:
    """Scores of a model and its original.

    Args:
        found: what :func:`eckart.evaluate` returns.
        name: of the model.
    """
    own = next((column for column in ("eckart", "model") if any(column in row for row in found["scores"].values())), "")
    words = [
        f"{measure} {show_score(row.get(own))}"
        + (f" (original {show_score(row['original'])})" if "original" in row else "")
        for measure, row in found["scores"].items()
    ]
    return Page(
        title=show_name(name),
        kind="evaluation",
        summary=f"{found['task']}: {'; '.join(words)}.",
        tiles=Tiles(()),
        sections=[
            list_scores(found),
            Section("speed", "Speed", list_latency(_speed(found))),
            Section("notes", "Warnings and fallbacks", list_notes(found)),
        ],
    )


def list_scores(found: Mapping[str, Any]) -> Section:
    """Every model as a row: its scores and its sizes."""
    sources = (*found["scores"].values(), *found["sizes"].values())
    names = list(dict.fromkeys(name for row in sources for name in row))
    header = ["model", *found["scores"], *(SIZES[key] for key in found["sizes"])]
    rows = [
        [
            name,
            *(show_score(row.get(name)) for row in found["scores"].values()),
            *(show_size(key, row[name]) if name in row else "" for key, row in found["sizes"].items()),
        ]
        for name in names
    ]
    own = [place for place, name in enumerate(names) if name in ("eckart", "model")]
    data = found.get("data") or {}
    where = " ".join(show_name(data[key]) for key in ("source", "config", "split") if data.get(key) is not None)
    blocks: list[Block] = [Words(f"{found['task']} on {where}: {found['protocol']}"),
                           Table("Scores beside sizes", header, rows, strong=own)]  # fmt: skip
    if any(name.startswith("int") for name in names):
        blocks.append(Words(ROUNDED))
    return Section("scores", "Scores", blocks)


def _speed(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    latency: Mapping[str, Any] | None = found.get("latency")
    return latency
