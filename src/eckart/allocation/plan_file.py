"""`plan.json`: a plan that a person can read and edit, checked field by field when it is read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.allocation.plan import DENSE, FORMAT_VERSION, Choice, Plan
from eckart.config import read_text_file
from eckart.errors import UsageError
from eckart.forms import Block, form_named

LARGEST_FILE = 64 << 20
"""Bytes of a plan; that of a model of 50,000 experts has 10 million."""

TOP = ("format_version", "model", "sites")
ENTRY = ("form", "rank", "block", "basis", "predicted_loss", "reason")
"""What is read of a plan, and of a site."""


def read_plan(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Plan:
    """Read `plan.json`.

    Raises:
        UsageError: if the file cannot be read or is not a plan for these sites.
    """
    try:
        content = json.loads(
            read_text_file(path, LARGEST_FILE), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--plan {path}: cannot be read ({error}); give the path of a plan.json.") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"--plan {path}: not JSON at line {error.lineno}: {error.msg}; mend that line.") from None
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"--plan {path}: {what}. Mend it, or have the plan made again.") from None
    plan = parse_plan(content, str(path), shapes)
    if all(choice.form == DENSE for choice in plan.choices.values()):
        raise UsageError(f"{path}: every site stays dense, so nothing would be factored. Give one a form and a rank.")
    return plan


def parse_plan(content: Any, where: str, shapes: Mapping[str, tuple[int, int]]) -> Plan:
    """Check a plan and make it.

    Args:
        content: the parsed JSON.
        where: the file, for messages.
        shapes: site -> (out, in) of the model it is to be used on.

    Raises:
        UsageError: naming the file, the site and the field at fault.
    """
    if not isinstance(content, dict) or not isinstance(content.get("sites"), dict):
        raise UsageError(f"{where}: not a plan; it needs an object 'sites' of site -> {{form, rank}}.")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UsageError(
            f"{where}: format_version is {version!r}, this eckart reads {FORMAT_VERSION}; "
            "make the plan again or update eckart."
        )
    _refuse_unknown(content, TOP, where)
    unknown = sorted(set(content["sites"]) - set(shapes))
    if unknown:
        raise UsageError(
            f"{where}: site {unknown[0]!r} is not one of this model's {len(shapes)} sites "
            f"({len(unknown)} such). Use the plan with the model it was made for, or remove the entry."
        )
    choices = {name: _choice(entry, f"{where}: site {name}", shapes[name]) for name, entry in content["sites"].items()}
    for name in shapes:  # a site that the plan does not name is left as it is
        choices.setdefault(name, Choice(DENSE))
    entries = content["sites"].items()
    predicted = {name: loss for name, entry in entries if isinstance(loss := entry.get("predicted_loss"), float)}
    reasons = {name: reason for name, entry in entries if isinstance(reason := entry.get("reason"), str)}
    plan = Plan(choices, str(content.get("model", "")), predicted, reasons)
    for group in plan.bases:
        _check_basis(group, choices, where, shapes)
    return plan


def _choice(entry: Any, where: str, shape: tuple[int, int]) -> Choice:
    if not isinstance(entry, dict) or "form" not in entry:
        raise UsageError(f"{where}: needs an object with 'form' and 'rank', not {entry!r}.")
    _refuse_unknown(entry, ENTRY, where)
    if entry["form"] == DENSE:
        return Choice(DENSE)
    try:
        kind = form_named(entry["form"])
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    block = _block(entry.get("block"), kind.blocks(*shape) != (None,), where, shape)
    full, rank = kind.full_rank(*shape, block), entry.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full:
        raise UsageError(
            f"{where}: rank {rank!r} must be a whole number in 1..{full} for a weight of {shape[0]} x {shape[1]}."
        )
    basis = entry.get("basis")
    shares = kind.shared_parameter is not None or not kind.own_module
    if basis is not None and not (isinstance(basis, str) and shares):
        raise UsageError(f"{where}: basis {basis!r} means nothing to this form; remove it, or name a form that shares.")
    return Choice(entry["form"], rank, block, basis)


def _refuse_unknown(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
            raise UsageError(f"{where}: {name!r} is not read from a plan; {hint}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} stands twice")
        content[name] = value
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _check_basis(
    group: Sequence[str], choices: Mapping[str, Choice], where: str, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse a basis that the site it is named for does not hold, or not in the size that its readers have."""
    holder = group[0]
    held = choices.get(holder)
    for name in group[1:]:
        own = choices[name]
        if held is None or held.basis is not None or held.form != own.form:
            raise UsageError(
                f"{where}: site {name}: basis {holder!r} is not a site of form {own.form} with a basis of its own; "
                "name one."
            )
        if not form_named(own.form).own_module:
            if held.rank != own.rank:
                raise UsageError(
                    f"{where}: site {name}: {own.rank} neurons, but {holder}, which reads them, keeps {held.rank}; "
                    "give both the same rank."
                )
            continue
        if held.rank != own.rank or shapes[holder][1] != shapes[name][1]:
            raise UsageError(
                f"{where}: site {name}: rank {own.rank} for {shapes[name][1]} inputs, but its basis in {holder} has "
                f"rank {held.rank} for {shapes[holder][1]}; give both the same."
            )
    if held is not None and not form_named(held.form).own_module:
        return
    largest = min(sum(shapes[name][0] for name in group), shapes[holder][1])
    if held is not None and held.rank > largest:
        raise UsageError(f"{where}: site {holder}: rank {held.rank} of a shared basis must be in 1..{largest}.")


def _block(value: Any, wanted: bool, where: str, shape: tuple[int, int]) -> Block | None:
    if not wanted:
        if value is not None:
            raise UsageError(f"{where}: block {value!r} means nothing to this form; remove it.")
        return None
    whole = isinstance(value, list) and len(value) == 2 and all(type(part) is int and part >= 1 for part in value)
    if not whole or shape[0] % value[0] or shape[1] % value[1]:
        raise UsageError(
            f"{where}: block {value!r} must be two whole numbers [rows, columns] that divide a weight of "
            f"{shape[0]} x {shape[1]}."
        )
    return value[0], value[1]
