"""What there is to choose from: methods, forms, forms of embeddings, recoveries.

Everything shown is read from the sources, so that the tables come without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from eckart.registry import EMBEDDINGS, FORMS, METHODS, RECOVERIES, STATISTICS
from eckart.report.words import add_columns, make_table


def list_catalog(default_method: str) -> Group:
    """All that can be chosen by name, as `eckart methods` shows it."""
    tables = (list_methods(default_method), list_forms(), list_embeddings(), list_recoveries())
    return Group(*(part for table in tables for part in (table, Text())))


def list_methods(default: str) -> Table:
    """Every method: what it needs, its settings, what its factors are optimal for, its paper."""
    table = _make_catalog("methods (--method, --metric)", ("needs", "form", "ranks by", "optimal for", "paper"))
    for name in METHODS:
        about = METHODS.about(name)
        label = f"{name} (default)" if name == default else name
        form = about["form"] + (", sliced" if about["slices"] or about["by_leverage"] else "")
        ranks = about["allocation"] + (", curves measured" if about["calibrated_curves"] else "")
        ranks += ", refit" if about["refit"] else ""
        table.add_row(label, _list_needs(about), form, ranks, about["exact_for"], about["paper"])
        table.add_section()
    return table


def list_forms() -> Table:
    """How a weight matrix can be stored: the formula, with its count of numbers, and the paper."""
    table = _make_catalog("forms of a weight of m rows and n columns, rank k (--form)", ("stored as", "paper"))
    for name in FORMS:
        about = FORMS.about(name)
        table.add_row(name, about["doc"], about["paper"])
    return table


def list_embeddings() -> Table:
    """How a table of token embeddings can be stored."""
    table = _make_catalog("token embeddings (--embeddings)", ("needs", "optimal for", "paper"))
    for name in EMBEDDINGS:
        about = EMBEDDINGS.about(name)
        table.add_row(name, about["needs"], about["exact_for"], about["paper"])
    return table


def list_recoveries() -> Table:
    """Every way to win back quality: what it needs, what it trains on what, its paper."""
    table = _make_catalog("recoveries (eckart tune --recovery)", ("needs", "what is trained on what", "paper"))
    for name in RECOVERIES:
        about = RECOVERIES.about(name)
        needs = "data + teacher" if about["needs_teacher"] else "labels or text of the task"
        table.add_row(name, needs, about["title"], about["paper"])
    return table


def _make_catalog(title: str, names: tuple[str, ...]) -> Table:
    table = add_columns(make_table(title), "name", [])
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _list_needs(about: Mapping[str, Any]) -> str:
    """What a method has to be given: the same as `Method.needs_data` and `Method.needs_gradients`."""
    by_loss = about["allocation"] == "loss"
    data = bool(about["needs"]) or by_loss or about["refit"]
    gradients = by_loss or any(STATISTICS.about(name).get("needs_backward") for name in about["needs"])
    return " + ".join(["data"] * data + ["gradients"] * gradients) or "nothing"
