"""Where the budget went: kinds of weights down, layers across, ranks in the cells, colors for what is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from eckart.report.page.blocks import Cell, Heat
from eckart.report.words import find_common_prefix, format_range, name_rank

STEPS = 10
"""Colors of the scale."""


def layer_of(name: str) -> int | None:
    """The first number among the parts of a module's name, which counts layers; None where it has none."""
    found = re.search(r"\.(\d+)(?=\.|$)", f".{name}")
    return int(found[1]) if found else None


def draw_ranks(sites: Sequence[Mapping[str, Any]]) -> Heat:
    """The ranks of all sites.

    Args:
        sites: of a report; one at least.
    """
    layers = sorted({layer for site in sites if (layer := layer_of(site["site"])) is not None})
    columns: list[int | None] = [*layers]
    if any(layer_of(site["site"]) is None for site in sites):
        columns.append(None)
    kinds: dict[str, dict[int | None, list[Mapping[str, Any]]]] = {}
    for site in sites:
        kinds.setdefault(site["kind"], {}).setdefault(layer_of(site["site"]), []).append(site)
    prefix = find_common_prefix(kinds)
    rows = [
        (kind.removeprefix(f"{prefix}.") if prefix else kind, [_cell(by_layer.get(layer, ())) for layer in columns])
        for kind, by_layer in kinds.items()
    ]
    what = {
        "rank": "Rank of every weight",
        "neurons": "Neurons kept in every layer that loses some",
        "rank or neurons": "Rank of every weight, or neurons kept where a feed-forward layer loses some",
    }[name_rank(sites)]
    outside = "; column –: outside the numbered layers" if None in columns else ""
    return Heat(
        f"{what}, by layer and kind; full: as it was; the color is the part of its numbers that is kept{outside}",
        f"in {prefix}" if prefix else "kind",
        ["–" if layer is None else str(layer) for layer in columns],
        rows,
        ("few kept", "all kept"),
    )


def _cell(sites: Sequence[Mapping[str, Any]]) -> Cell:
    if not sites:
        return Cell(about="no such weight")
    before = sum(site["before"]["elements"] for site in sites)
    after = sum(site["after"]["elements"] for site in sites)
    kept = after / before if before else 1.0
    factored = [site["rank"] for site in sites if site["form"] != "dense"]
    forms = sorted({site["form"] for site in sites})
    shown = format_range(min(factored), max(factored)) if factored else "full"
    full = [site.get("full_rank", min(site["shape"])) for site in sites]
    names = sites[0]["site"] if len(sites) == 1 else f"{len(sites)} weights"
    about = f"{names}: {' and '.join(forms)}"
    if factored:
        about += f", {name_rank(sites)} {shown} of {format_range(min(full), max(full))}"
    return Cell(shown, step_of(kept), f"{about}, {kept:.0%} of its numbers")


def step_of(part: float) -> int:
    """The color of a part from 0 to 1."""
    return min(STEPS - 1, max(0, int(part * STEPS)))
