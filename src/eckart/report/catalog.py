"""What there is to choose from: methods, forms, forms of embeddings, recoveries.

Everything shown is read from the sources, so that the tables come without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from eckart.registry import EMBEDDINGS, FORMS, METHODS, RECOVERIES, STATISTICS


def list_catalog(default_method: str) -> Group:
    """All that can be chosen by name, as `eckart methods` shows it."""
    lists = (list_methods(default_method), list_forms(), list_embeddings(), list_recoveries())
    return Group(Text(UNDECIDED.format(default_method)), Text(), *(part for shown in lists for part in (shown, Text())))


UNDECIDED = (
    "The default is {0}: it need not be named, and chooses form and size of every weight by the data. Without data, "
    "take svd. The other methods are those of papers, as published, to be compared with: eckart compare MODEL "
    "--methods svd,drone,{0} --keep 0.7 --data FILE"
)
"""For those who do not want to choose."""


def describe_catalog() -> dict[str, dict[str, dict[str, Any]]]:
    """The same for programs: kind of thing -> name -> what its source says of it."""
    kinds = {"methods": METHODS, "forms": FORMS, "embeddings": EMBEDDINGS, "recoveries": RECOVERIES}
    return {kind: {name: _as_json(registry.about(name)) for name in registry} for kind, registry in kinds.items()}


def _as_json(about: Mapping[str, Any]) -> dict[str, Any]:
    """Words, numbers and sets of words; what else there is of an object is no choice of its user."""
    listed = {key: sorted(value) if isinstance(value, frozenset | set) else value for key, value in about.items()}
    return {key: value for key, value in listed.items() if isinstance(value, str | bool | int | float | list)}


def list_methods(default: str) -> Group:
    """Every method: what it needs, its settings, what its factors are optimal for, its paper."""
    rows = []
    for name in METHODS:
        about = METHODS.about(name)
        label = f"{name} (default)" if name == default else name
        form = about["form"] + (", sliced" if about["slices"] or about["by_leverage"] else "")
        ranks = about["allocation"] + (", curves measured" if about["calibrated_curves"] else "")
        ranks += ", refit" if about["refit"] else ""
        below = [f"optimal for {about['exact_for']}", about["paper"]]
        rows.append(([label, _list_needs(about), form, ranks], below))
    return _list_entries("methods (--method, --metric)", ("name", "needs", "form", "ranks by"), rows)


def list_forms() -> Group:
    """How a weight matrix can be stored: the formula, with its count of numbers, and the paper."""
    rows = [([name], [FORMS.about(name)["doc"], FORMS.about(name)["paper"]]) for name in FORMS]
    return _list_entries("forms of a weight of m rows and n columns, rank k (--form)", ("name",), rows)


def list_embeddings() -> Group:
    """How a table of token embeddings can be stored."""
    rows = []
    for name in EMBEDDINGS:
        about = EMBEDDINGS.about(name)
        rows.append(([name, about["needs"]], [f"optimal for {about['exact_for']}", about["paper"]]))
    return _list_entries("token embeddings (--embeddings)", ("name", "needs"), rows)


def list_recoveries() -> Group:
    """Every way to win back quality: what it needs, what it trains on what, its paper."""
    rows = []
    for name in RECOVERIES:
        about = RECOVERIES.about(name)
        needs = "data + teacher" if about["needs_teacher"] else "labels or text of the task"
        rows.append(([name, needs], [about["title"], about["paper"]]))
    return _list_entries("recoveries (eckart tune --recovery)", ("name", "needs"), rows)


def _list_entries(title: str, heads: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Group:
    """A line of short facts in columns for each name, and its sentences below it."""
    columns = zip(heads, *(facts for facts, _ in rows), strict=True)
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    parts: list[Any] = [Text(title, style="bold"), Text(line(heads), style="bold")]
    for facts, sentences in rows:
        parts.append(Text(line(facts)))
        words = [sentence.replace("`", "") for sentence in sentences if sentence]  # they are marked up for other places
        parts += [Padding(Text(sentence, style="dim"), (0, 0, 0, 4)) for sentence in words]
    return Group(*parts)


def _list_needs(about: Mapping[str, Any]) -> str:
    """What a method has to be given: the same as `Method.needs_data` and `Method.needs_gradients`."""
    by_loss = about["allocation"] == "loss"
    data = bool(about["needs"]) or by_loss or about["refit"]
    gradients = by_loss or any(STATISTICS.about(name).get("needs_backward") for name in about["needs"])
    return " + ".join(["data"] * data + ["gradients"] * gradients) or "nothing"
