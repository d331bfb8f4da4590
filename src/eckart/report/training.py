"""The report of a recovery as people read it: what was trained or solved, and the scores before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from eckart.report.compression import UNCOUNTED
from eckart.report.words import add_columns, format_count, format_number, make_table


def render_tuning(report: Mapping[str, Any]) -> Group:
    """What was trained or solved on what, the scores before and after, notes, time."""
    lines = [
        Text(f"{report['model']}: recovery {report['recovery']}, task {report['task']}", style="bold"),
        Text(_trained(report) if "training" in report else _solved(report)),
        Text(f"scored on {report['protocol']}"),
        Text(),
    ]
    table = add_columns(make_table(), "", [*report["scores"]])
    for name in report["scores"]["before"]:
        table.add_row(name, *(format_number(row.get(name)) for row in report["scores"].values()))
    seconds = report["seconds"]
    timed = ", ".join(f"{step} {value:.1f}" for step, value in seconds.items())
    return Group(
        *lines, table, *(Text(f"note: {note}", style="yellow") for note in report["notes"]),
        Text(f"time of the steps: {sum(seconds.values()):.1f} s ({timed}){UNCOUNTED}", style="dim"),
    )  # fmt: skip


def _trained(report: Mapping[str, Any]) -> str:
    steps, recovery = report["training"], report["recovered_by"]
    resumed = f" (resumed after step {steps['resumed_from']})" if steps["resumed_from"] else ""
    return (
        f"{steps['steps']} steps{resumed} on {report['device']}, "
        f"loss {steps['first_loss']:.4g} -> {steps['last_loss']:.4g}; "
        f"{format_count(recovery['trained'])} of {format_count(recovery['of'])} parameters trained"
    )


def _solved(report: Mapping[str, Any]) -> str:
    recovery = report["recovered_by"]
    if "lines" in recovery:
        return "\n".join(recovery["lines"])
    error = recovery["output_error"]
    tokens = format_count(recovery["tokens"])
    refined = "refined" in recovery
    what = (
        f"{recovery['refined']} of {recovery['of']} blocks trained"
        if refined
        else (f"{recovery['refitted']} of {recovery['of']} weights solved again")
    )
    return (
        f"{what} on {tokens} tokens, on {report['device']}; "
        f"mean relative error of outputs {format_number(error['before'])} -> {format_number(error['after'])}"
    )


def list_tuning_card_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    """Measured numbers for the model card: name -> {column: number}; of what is published, not of what was tried."""
    left_out = {"after"} if report["kept"] == "before" else set[str]()
    scores = {column: row for column, row in report["scores"].items() if column not in left_out}
    return {name: {column: row.get(name) for column, row in scores.items()} for name in scores["before"]}
