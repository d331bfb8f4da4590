"""What `eckart inspect` and `eckart methods` show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from eckart.forms import EMBEDDINGS, FORMS
from eckart.methods import Method
from eckart.report.words import columns, common_stem, count, plain_table, share


def inspection_table(found: Mapping[str, Any]) -> Group:
    """Sites with spectra, groups, where the parameters are, what is skipped."""
    parameters = found["parameters"]
    total = sum(parameters.values())
    forms = list(next(iter(found["kinds"]))["break_even"])
    stem = common_stem(row["kind"] for row in found["kinds"])
    sites = columns(
        plain_table(title=f"{found['model']}: sites"),
        f"in {stem}" if stem else "kind",
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
        sites.add_row(
            row["kind"].removeprefix(f"{stem}."),
            str(row["count"]),
            " x ".join(map(str, row["shape"])),
            count(row["elements"]),
            share(row["elements"], total),
            f"{row['effective_rank']:.0f} of {full}",
            f"{row['rank_of_energy']:.0f} of {full}",
            *(str(row["break_even"][form]) for form in forms),
        )
    note = Text(
        "eff. rank: exp(entropy of the squared singular values); 90% of energy: the rank that holds it; "
        "max FORM: the largest rank that is smaller than the dense weight",
        style="dim",
    )
    parts: list[Any] = [sites, note, Text()]
    if found["groups"]:
        groups = columns(plain_table(title="one input, one Gram matrix"), "sites", ["groups"])
        for group in found["groups"]:
            groups.add_row(" = ".join(kind.removeprefix(f"{stem}.") for kind in group["kinds"]), str(group["count"]))
        parts += [groups, Text()]
    where = columns(plain_table(title="where the parameters are"), "", ["parameters", "of model"])
    for name, number in parameters.items():
        if number:
            where.add_row(name, count(number), share(number, total))
    where.add_row("whole model", count(total), f"{count(found['sizes']['bytes'])}B", style="bold")
    parts += [where, Text()]
    skipped = columns(plain_table(title="left alone"), "module", ["modules"])
    skipped.add_column("why", overflow="fold")
    for row in found["skipped"]:
        skipped.add_row(row["kind"], str(row["count"]), row["reason"])
    return Group(*parts, skipped) if found["skipped"] else Group(*parts)


def methods_table(methods: Iterable[Method], default: str) -> Group:
    """Every method, its paper and what it is best for; then the forms, and how token embeddings can be stored."""
    table = columns(plain_table(title="methods (--method, --metric)"), "name", [])
    for name in ("needs", "form", "allocation", "exact for", "paper"):
        table.add_column(name, overflow="fold")
    for method in methods:
        needs = " + ".join(["data"] * method.needs_data + ["gradients"] * method.needs_gradients) or "nothing"
        own = f"{method.name} (default)" if method.name == default else method.name
        settings = method.allocation + (", refit" if method.refit else "")
        table.add_row(own, needs, method.form, settings, method.exact_for, method.paper)
        table.add_section()
    forms = columns(plain_table(title="forms (--form)"), "name", ["768 x 768 at half"])
    forms.add_column("stored as", overflow="fold")
    for name, form in FORMS.items():
        rank = _rank_at_half(form)
        forms.add_row(name, f"rank {rank}", (form.__doc__ or "").strip().splitlines()[0])
    tables = columns(plain_table(title="token embeddings (--embeddings)"), "name", [])
    for name in ("needs", "exact for", "paper"):
        tables.add_column(name, overflow="fold")
    for name, embedding in EMBEDDINGS.items():
        tables.add_row(name, embedding.needs, embedding.exact_for, embedding.paper)
    return Group(table, Text(), forms, Text(), tables)


def _rank_at_half(form: Any, width: int = 768) -> int:
    ranks = range(1, form.max_rank(width, width) + 1)
    return max(rank for rank in ranks if form.size(width, width, rank).parameters <= width * width // 2)
