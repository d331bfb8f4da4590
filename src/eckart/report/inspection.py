"""The table of `eckart inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from eckart.report.words import add_columns, find_common_prefix, format_count, format_share, make_table

NOTE = (
    "site: a weight matrix that can be factored; effective rank: exp(entropy of the squared singular values); 90% of "
    "energy: the rank that holds nine tenths of their sum; max FORM: the largest rank that stores fewer numbers than "
    "the dense weight"
)


def render_inspection(found: Mapping[str, Any]) -> Group:
    """The sites with their spectra, which of them share an input, where the parameters are, and what is skipped."""
    prefix = find_common_prefix(row["kind"] for row in found["kinds"])
    parts: list[Any] = [_sites(found, prefix), Text(NOTE, style="dim"), Text()]
    if found["groups"]:
        parts += [_groups(found["groups"], prefix), Text()]
    parts += [_parameters(found), Text()]
    if found["skipped"]:
        parts.append(_skipped(found["skipped"]))
    return Group(*parts)


def _sites(found: Mapping[str, Any], prefix: str) -> Table:
    total = sum(found["parameters"].values())
    forms = list(found["kinds"][0]["break_even"])
    table = add_columns(
        make_table(f"{found['model']}: sites"),
        f"in {prefix}" if prefix else "kind",
        [
            "sites",
            "out x in",
            "parameters",
            "of model",
            "effective rank",
            "90% of energy",
            *(f"max {f}" for f in forms),
        ],
    )
    for row in found["kinds"]:
        full = min(row["shape"])
        table.add_row(
            row["kind"].removeprefix(f"{prefix}."),
            str(row["count"]),
            " x ".join(map(str, row["shape"])),
            format_count(row["elements"]),
            format_share(row["elements"], total),
            f"{row['effective_rank']:.0f} of {full}",
            f"{row['rank_of_energy']:.0f} of {full}",
            *(str(row["break_even"][form]) for form in forms),
        )
    return table


def _groups(groups: list[Mapping[str, Any]], prefix: str) -> Table:
    table = add_columns(make_table("sites that read the same input, and share its statistics"), "sites", ["groups"])
    for group in groups:
        table.add_row(" = ".join(kind.removeprefix(f"{prefix}.") for kind in group["kinds"]), str(group["count"]))
    return table


def _parameters(found: Mapping[str, Any]) -> Table:
    total = sum(found["parameters"].values())
    table = add_columns(make_table("where the parameters are"), "", ["parameters", "of model"])
    for name, number in found["parameters"].items():
        if number:
            table.add_row(name, format_count(number), format_share(number, total))
    table.add_row("whole model", format_count(total), f"{format_count(found['sizes']['bytes'])}B", style="bold")
    return table


def _skipped(skipped: list[Mapping[str, Any]]) -> Table:
    table = add_columns(make_table("left dense"), "module", ["modules"])
    table.add_column("why", overflow="fold")
    for row in skipped:
        table.add_row(row["kind"], str(row["count"]), row["reason"])
    return table
