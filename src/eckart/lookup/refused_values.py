"""Why a value is refused, in the words of whoever gave it: what is meant instead, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
"""A bound of a number, as pydantic names it -> the words before it."""

RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
"""Pydantic's names of refusals of a number that is out of bounds."""

KINDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "a word",
    "tuple": "a word, or a list of them,",
    "finite": "a finite number",
}
"""The beginning of pydantic's name of a refusal -> what is meant."""


def name_flag(field: str) -> str:
    """A field of a recipe as an option of the command line."""
    return "--" + field.replace("_", "-")


def describe_refusal(error: Mapping[str, Any], metadata: Iterable[Any] = (), shown: str = "{}") -> str:
    """What is meant instead of a value that pydantic refuses.

    Args:
        error: of `ValidationError.errors()`.
        metadata: of the field, which holds its bounds.
        shown: how the option with another value is written, with `{}` for the value.
    """
    kind = error["type"]
    if kind in RANGES:
        return _describe_range(error, metadata, shown)
    if kind == "literal_error":
        return _describe_choices(error["ctx"]["expected"], error["input"], shown)
    meant = next((words for name, words in KINDS.items() if kind.startswith(f"{name}_")), None)
    return f"{meant} is meant" if meant is not None else error["msg"].removeprefix("Value error, ")


def _describe_range(error: Mapping[str, Any], metadata: Iterable[Any], shown: str) -> str:
    limits = dict(error["ctx"])
    for bound in metadata:
        limits |= {name: getattr(bound, name) for name in BOUNDS if getattr(bound, name, None) is not None}
    low = next((name for name in ("gt", "ge") if name in limits), None)
    high = next((name for name in ("lt", "le") if name in limits), None)
    if low is not None and high is not None and (limits[low], limits[high]) == (0, 1):
        of = f"a fraction {'above' if low == 'gt' else 'from'} 0 {'up to' if high == 'le' else 'and below'} 1 is meant"
        value = float(error["input"])
        percent = 1 < value <= 100 and (high == "le" or value < 100)
        return f"{of}; for {value:g} % give {shown.format(f'{value / 100:g}')}" if percent else of
    whole = all(isinstance(limit, int) for limit in error["ctx"].values())
    words = [f"{BOUNDS[name]} {limits[name]:g}" for name in (low, high) if name is not None]
    return f"a {'whole ' if whole else ''}number {' and '.join(words)} is meant"


def _describe_choices(expected: str, value: Any, shown: str) -> str:
    choices = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    near = get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {shown.format(near[0])}?" if near else ""
    return f"one of {', '.join(choices)} is meant{hint}"
