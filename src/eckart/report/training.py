"""The report of a recovery, and the ways of recovering there are, as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from eckart.report.words import columns, count, number, plain_table


def tuned_rich(report: Mapping[str, Any]) -> Group:
    """What was trained or solved on what, the scores before and after, notes, time."""
    lines = [
        Text(f"{report['model']}: recovery {report['recovery']}, task {report['task']}", style="bold"),
        Text(_trained(report) if "training" in report else _solved(report)),
        Text(f"scored on {report['protocol']}"),
        Text(),
    ]
    table = columns(plain_table(), "", [*report["scores"]])
    for name in report["scores"]["before"]:
        table.add_row(name, *(number(row.get(name)) for row in report["scores"].values()))
    seconds = report["seconds"]
    timed = ", ".join(f"{step} {value:.1f}" for step, value in seconds.items())
    return Group(
        *lines, table, *(Text(f"note: {note}", style="yellow") for note in report["notes"]),
        Text(f"time: {sum(seconds.values()):.1f} s ({timed})", style="dim"),
    )  # fmt: skip


def _trained(report: Mapping[str, Any]) -> str:
    steps, recovery = report["training"], report["recovered_by"]
    return (
        f"{steps['steps']} steps, loss {steps['first_loss']:.4g} -> {steps['last_loss']:.4g}; "
        f"{count(recovery['trained'])} of {count(recovery['of'])} numbers trained"
    )


def _solved(report: Mapping[str, Any]) -> str:
    recovery, error = report["recovered_by"], report["recovered_by"]["output_error"]
    return (
        f"{recovery['refitted']} of {recovery['of']} sites solved again on {count(recovery['tokens'])} tokens; "
        f"mean relative error of outputs {number(error['before'])} -> {number(error['after'])}"
    )


def tuned_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    """Measured numbers for the model card."""
    scores = report["scores"]
    return {name: {column: row.get(name) for column, row in scores.items()} for name in scores["before"]}


def recoveries_table(recoveries: Iterable[Any]) -> Table:
    """Every way of recovering, its paper and what it needs."""
    table = columns(plain_table(title="recoveries (eckart tune --recovery)"), "name", [])
    for name in ("needs", "what is trained on what", "paper"):
        table.add_column(name, overflow="fold")
    for recovery in recoveries:
        needs = "data + teacher" if recovery.needs_teacher else "labels or text of the task"
        table.add_row(recovery.name, needs, recovery.title, recovery.paper)
    return table
