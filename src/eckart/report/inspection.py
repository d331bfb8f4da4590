"""The table of `eckart inspect`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from eckart.report.words import (
    add_columns,
    find_common_prefix,
    format_bytes,
    format_count,
    format_share,
    make_table,
    shorten,
    split_kind,
)

PART = 20
"""Letters that are shown of a name."""

NOTE = (
    "site: a weight matrix that can be factored; eff. rank: the effective rank of the weight by itself, exp(entropy of "
    "the squared singular values); 90% at: the rank that holds nine tenths of their sum. (The report of a compression "
    "has that of the weight as its data weighs it, which is mostly much smaller.)"
)


def render_inspection(found: Mapping[str, Any]) -> Group:
    """The sites with their spectra, which of them share an input, where the parameters are, and what is skipped."""
    prefix = find_common_prefix(row["kind"] for row in found["kinds"])
    parts: list[Any] = [_sites(found), Text(NOTE, style="dim"), Text(), _largest_ranks(found), Text()]
    if found["groups"]:
        parts += [_groups(found["groups"], prefix), Text()]
    parts += [_parameters(found), Text()]
    if found["skipped"]:
        parts.append(_skipped(found["skipped"]))
    return Group(*parts)


def _sites(found: Mapping[str, Any]) -> Table:
    total = sum(found["parameters"].values())
    columns = ("sites", "out x in", "parameters", "of model", "eff. rank", "90% at")
    table = add_columns(make_table(f"{found['model']}: sites"), "kind of site", columns)
    for part, rows in _by_part(found):
        if part:
            table.add_row(shorten(part, PART + 2), style="dim")
        for name, row in rows:
            table.add_row(
                f"{'  ' if part else ''}{shorten(name, PART)}",
                str(row["count"]),
                " x ".join(map(str, row["shape"])),
                format_count(row["elements"]),
                format_share(row["elements"], total),
                f"{row['effective_rank']:.0f}",
                f"{row['rank_of_energy']:.0f}",
            )
    return table


def _largest_ranks(found: Mapping[str, Any]) -> Table:
    forms = list(found["kinds"][0]["break_even"])
    table = add_columns(make_table("largest rank that stores less"), "than dense, out x in", forms)
    shapes = {tuple(row["shape"]): row["break_even"] for row in found["kinds"]}
    for shape, ranks in shapes.items():
        table.add_row(" x ".join(map(str, shape)), *(str(ranks[form]) for form in forms))
    return table


def _by_part(found: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """The kinds of each part of the model that is repeated, with their names in it."""
    split = [(*split_kind(row["kind"]), row) for row in found["kinds"]]
    for part, rows in itertools.groupby(split, key=lambda entry: entry[0]):
        yield part, [(name, row) for _, name, row in rows]


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
    table.add_row("whole model", format_count(total), format_bytes(found["sizes"]["bytes"]), style="bold")
    return table


def _skipped(skipped: list[Mapping[str, Any]]) -> Table:
    table = add_columns(make_table("left dense"), "module", ["modules"])
    table.add_column("why", overflow="fold")
    for row in skipped:
        table.add_row(row["kind"], str(row["count"]), row["reason"])
    return table
